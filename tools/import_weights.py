"""Official weights to safetensors, without running the code in them.

python -m tools.import_weights edm  edm-cifar10-32x32-uncond-vp.pkl
python -m tools.import_weights edm2 edm2-img64-s-1073741-0.075.pkl --out weights/edm2_imagenet64_s
python -m tools.import_weights edm  network-snapshot-000500.pkl          (ECT on CIFAR-10; edm2 for ECT on ImageNet-64)
python -m tools.import_weights imf  iMF-B-2.pth
python -m tools.import_weights pmf  own-H-16.pt --net pmf_h16 --omega 7 --interval 0.2 0.6
python -m tools.import_weights meanflow checkpoint-last.pth              (PyTorch code, CIFAR-10)
python -m tools.import_weights meanflow b4.npz --net dit_b4              (JAX code; npz or msgpack)
python -m tools.import_weights flow deq-flow-H-things-test-3x.pth        (DEQ-Flow, RAFT, GMA, torchvision)
python -m tools.import_weights hamburger segnext_base.pth --key decode_head.hamburger.   (one block of a network)
"""

import argparse
import json
import sys
from pathlib import Path

from common.errors import UserError

PICKLES = ("edm", "edm2")
VELOCITIES = ("meanflow", "imf", "pmf")
FLOW, HAMBURGER = "flow", "hamburger"
CONF = Path(__file__).resolve().parent.parent / "conf"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "family", choices=[*PICKLES, *VELOCITIES, FLOW, HAMBURGER], help="which code base wrote the file"
    )
    parser.add_argument("file", type=Path, help="the downloaded file")
    parser.add_argument("--out", type=Path, help="folder to write (default: the file's name without ending, beside it)")
    parser.add_argument("--key", help="entry of the file to take (default: ema), e.g. net_ema1. of meanflow's PyTorch")
    parser.add_argument("--net", help="network of conf/net, e.g. dit_b4 (default: that of the released file's name)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of that network, e.g. mlp_multiple=1 for a pMF-H of hidden width 3413",
    )
    parser.add_argument("--noise-scale", type=float, help="of pMF's noise (default: that of the released file's name)")
    parser.add_argument("--omega", type=float, help="guidance of iMF, pMF (default: that of the released file's name)")
    parser.add_argument(
        "--interval", type=float, nargs=2, default=(0.0, 1.0), help="times it acts between, with --omega"
    )
    args = parser.parse_args(argv)

    try:
        out = args.out or args.file.with_suffix("")
        if out == args.file:
            ending = "no .pkl ending" if args.family in PICKLES else "no ending"
            raise UserError(f"{args.file} has {ending}. Name the output folder with --out.")
        kinds = dict.fromkeys(PICKLES, _pickle) | {FLOW: _flow, HAMBURGER: _hamburger}
        done = kinds.get(args.family, _velocity)(args, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    inner = done.network.get("model", done.network)
    around = f"{done.network['_target_']} around {inner['_target_']}" if "model" in done.network else inner["_target_"]
    print(f"read      {args.file}")
    print(f"sha256    {done.sha256}")
    print(f"class     {done.class_name} -> {around}")
    print(f"size      {done.parameters:,} parameters")
    print(f"network   {json.dumps({key: value for key, value in inner.items() if key != '_target_'})}")
    print(f"written   {done.folder}/model.safetensors and config.json")
    return 0


def _pickle(args: argparse.Namespace, out: Path):
    from common.weights.convert import convert

    if args.net or args.set or args.noise_scale is not None or args.omega is not None:
        raise UserError(
            f"the file names its network: leave --net, --set, --noise-scale and --omega out for {args.family}."
        )
    return convert(args.file, out, family=args.family, key=args.key or "ema")


def _velocity(args: argparse.Namespace, out: Path):
    from common.weights.meanflow import convert_official, published_sampler

    sampler = published_sampler(args.file.name)
    if args.omega is not None:
        low, high = args.interval
        sampler |= {"omega": args.omega, "t_min": low, "t_max": high}
    return convert_official(
        args.file, out, network=network_of(args), prefix=args.key, sampler=sampler, noise_scale=args.noise_scale
    )


def _flow(args: argparse.Namespace, out: Path):
    from projects.deq_flow.weights import convert_official

    if args.key or args.noise_scale is not None or args.omega is not None:
        raise UserError("files of optical flow hold one network and no noise: leave --key, --noise-scale, --omega out.")
    return convert_official(args.file, out, network=network_of(args))


def _hamburger(args: argparse.Namespace, out: Path):
    """A Hamburger out of HamNet or a head of mmseg; --key is what its names begin with, --set its arguments."""
    import yaml

    from common.ham.official import block_tree, from_official
    from common.targets import EXPORT
    from common.weights.build import build
    from common.weights.convert import write_converted
    from common.weights.load import load_into, load_tensors

    if args.net or args.noise_scale is not None or args.omega is not None:
        raise UserError("a Hamburger is no whole network: leave --net, --noise-scale and --omega out. Use --set.")
    state = from_official(load_tensors(args.file), args.key or "")
    options = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in args.set)}
    tree = block_tree(state, **options)
    block = build(tree, allowed=EXPORT)
    load_into(block, state, prefix="", name=str(args.file))
    return write_converted(
        args.file, out, block, tree, tensors=block.state_dict(), release=None, sampler=None,
        facts={"prefix": args.key or ""},
    )  # fmt: skip


def network_of(args: argparse.Namespace) -> dict:
    """The tree of conf/net/<--net>, or of the network a released file is of. Raises UserError without either."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import ConfigCompositionException, HydraException
    from omegaconf import OmegaConf

    from common.runtime.cli.launch import register_resolvers
    from common.weights import meanflow
    from projects.deq_flow import weights as flow

    releases = flow.RELEASES if args.family == FLOW else meanflow.RELEASES
    released = next((key for key, release in releases.items() if release.file == args.file.name), None)
    if released is not None and args.family == FLOW:
        default = "deq_flow_huge" if released.startswith("deq_flow_h") else "deq_flow_base"
    elif released is not None:
        default = f"mit_{released.removeprefix('imf_').removesuffix('2')}" if args.family == "imf" else released
    else:
        default = "meanflow_unet" if args.family == "meanflow" and args.file.suffix in (".pth", ".pt") else None
    name = args.net or default
    kinds = ("deq_flow",) if args.family == FLOW else ("meanflow", "dit", "mit", "pmf")
    known = sorted(p.stem for kind in kinds for p in (CONF / "net").glob(f"{kind}_*.yaml"))
    if name not in known:
        raise UserError(f"{args.file} is of no released name: say its network with --net, one of {', '.join(known)}.")
    register_resolvers()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(f"net/{name}", overrides=[f"net.{word}" for word in args.set])
    except (ConfigCompositionException, HydraException) as error:
        raise UserError(f"--set {args.set} is no option of {name}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_container(config.net, resolve=True)


if __name__ == "__main__":
    sys.exit(main())
