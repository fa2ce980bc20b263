"""EDM2's weight average of any width after training, reconstructed from stored averages.

python -m tools.average outputs/edm/seed0-470f54 --std 0.07                # a run: all its step-*.ckpt
python -m tools.average a/export b/export --std 0.07 --out weights/s070    # exports of power-function averages

Track averages of two widths (ema=power) and keep several checkpoints (callbacks.checkpoints.keep=8). Writes an export
folder as task=export does, by default <run>/average-<std>. EDM2 (arXiv 2312.02696), algorithm 3.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.diffusion.ema import PowerFunction, combine, posthoc_weights
from common.errors import UserError
from common.targets import current

POWER = f"{PowerFunction.__module__}.{PowerFunction.__name__}"


@dataclass(frozen=True)
class Snapshot:
    """One stored average: its step, its relative width, its tensors by the network's names, where it comes from."""

    step: int
    std: float
    tensors: Mapping[str, Tensor]
    source: str


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.average", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="+", help="a run folder, or export folders of one run")
    parser.add_argument("--std", type=float, required=True, help="relative width of the average to make, e.g. 0.07")
    parser.add_argument("--step", type=int, help="optimiser step it ends at (default: the last stored one)")
    parser.add_argument("--out", type=Path, help="folder to write (default: <run>/average-<std>)")
    args = parser.parse_args(argv)
    try:
        reconstruct = _from_run if (args.source[0] / "config.yaml").is_file() else _from_exports
        reconstruct(args.source, args.std, args.step, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    return 0


def _from_run(sources: list[Path], std: float, step: int | None, out: Path | None) -> None:
    """Averages in the checkpoints of one run folder; buffers and unaveraged weights are those of the last one used."""
    from omegaconf import OmegaConf

    from common.runtime.training.checkpoint import list_checkpoints, read_checkpoint
    from common.runtime.training.ema import averaged
    from common.runtime.training.weights import NETWORK, initialise
    from common.runtime.verbs.assemble import assemble
    from common.runtime.verbs.export import write_export
    from common.weights.load import stored_step

    if len(sources) > 1:
        raise UserError(f"{sources[0]} is a run folder: give it alone, or give export folders.")
    folder = sources[0]
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg = OmegaConf.create(
        _present(OmegaConf.to_container(cfg, resolve=True)) | {"run": {**cfg.run, "dir": str(folder)}}
    )
    widths = {name: profile["std"] for name, profile in cfg.ema.profiles.items() if _is_power(profile)}
    if not widths:
        raise UserError(f"{folder} tracked no power-function average. Train with ema=power.")
    found, paths = [], {}
    for path in list_checkpoints(folder / "checkpoints"):
        at = stored_step(path)
        if step is not None and at > step:
            continue
        paths[at] = path
        averages = read_checkpoint(path).get("averages", {})
        found += [
            Snapshot(at, widths[name], averages[name], f"{path.name}:{name}") for name in widths if name in averages
        ]
    tensors, last = _average(found, std, step, str(folder))
    run = assemble(cfg, training=False, measuring=False)
    initialise(run.module.net, paths[last.step], "raw")
    with averaged(run.module.net, {name.removeprefix(NETWORK): value for name, value in tensors.items()}):
        written = write_export(
            run, step=last.step if step is None else step, average=f"power_{1000 * std:03.0f} reconstructed",
            folder=out or folder / f"average-{std:g}",
        )  # fmt: skip
    print(f"written   {written}")


def _from_exports(sources: list[Path], std: float, step: int | None, out: Path | None) -> None:
    """Averages that were exported one by one; everything that is no weight is that of the last one."""
    from common.files import read_json
    from common.weights.export import CONFIG, write_export
    from common.weights.load import load_tensors

    if out is None:
        raise UserError("exports have no run folder to write to. Name a new folder with --out.")
    found, configs = [], {}
    for folder in sources:
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is neither a run (config.yaml) nor an export ({CONFIG}). Check the path.")
        config = read_json(folder / CONFIG)
        profile = config["meta"].get("profile")
        if not _is_power(profile):
            raise UserError(
                f"{folder} holds no power-function average, or was written before exports recorded their profile. "
                "Export again: task=export evaluate.average=power_050."
            )
        at = int(config["meta"]["step"])
        found.append(Snapshot(at, float(profile["std"]), load_tensors(folder), str(folder)))
        configs[str(folder)] = config
    if len({str(config["network"]) for config in configs.values()}) > 1:
        raise UserError("The exports are of different networks. Give exports of one run.")
    tensors, last = _average([one for one in found if step is None or one.step <= step], std, step, str(sources[0]))
    config = configs[last.source]
    meta = config["meta"] | {
        "average": f"power_{1000 * std:03.0f} reconstructed", "step": last.step if step is None else step,
        "profile": {"_target_": POWER, "std": std},
    }  # fmt: skip
    rest = {name: value for name, value in last.tensors.items() if not value.is_floating_point()}
    written = write_export(out, tensors | rest, config["network"], meta=meta, sampler=config["sampler"])
    print(f"written   {written}")


def _average(found: list[Snapshot], std: float, step: int | None, where: str) -> tuple[dict[str, Tensor], Snapshot]:
    """The reconstructed floating-point tensors, and the last snapshot they are made of."""
    if not found:
        raise UserError(
            f"{where} holds no stored average up to step {step}. Leave --step out, or give that of a checkpoint."
        )
    last = max(found, key=lambda one: one.step)
    weights = posthoc_weights(
        times=[one.step for one in found], stds=[one.std for one in found],
        time=last.step if step is None else step, std=std,
    )  # fmt: skip
    for one, weight in sorted(zip(found, weights), key=lambda pair: (pair[0].step, pair[0].std)):
        print(f"{weight:+9.4f}  {one.source}, std {one.std:g}, step {one.step}")
    floating = [{n: v for n, v in one.tensors.items() if v.is_floating_point()} for one in found]
    return combine(floating, weights), last


def _is_power(profile) -> bool:
    return bool(profile) and current(str(profile.get("_target_"))) == POWER


def _present(node):
    """A stored configuration with every `_target_` under its present name."""
    if isinstance(node, dict):
        return {key: current(value) if key == "_target_" else _present(value) for key, value in node.items()}
    return [_present(item) for item in node] if isinstance(node, list) else node


if __name__ == "__main__":
    sys.exit(main())
