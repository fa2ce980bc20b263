"""Official EDM, EDM2 and ECT pickles turned into our export folder: `model.safetensors` + `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import sha256_file
from common.targets import EXPORT
from common.weights import official
from common.weights.build import build
from common.weights.export import write_export
from common.weights.pickle import Snapshot, read_snapshot

_PRECOND, _UNET = "common.diffusion.precond.", "common.nets.unet."

# official class -> (our class, raw network when `model_type` is not given, official option -> ours)
_EDM = {
    "EDMPrecond": ("EDMPrecond", "DhariwalUNet", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "ECMPrecond": ("ECMPrecond", "DhariwalUNet", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "VEPrecond": ("VEPrecond", "SongUNet", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "VPPrecond": (
        "VPPrecond",
        "SongUNet",
        {"beta_d": "beta_d", "beta_min": "beta_min", "M": "M", "epsilon_t": "epsilon_t"},
    ),
    "iDDPMPrecond": ("IDDPMPrecond", "DhariwalUNet", {"C_1": "C1", "C_2": "C2", "M": "M"}),
}
for _name in ("EDMPrecond", "ECMPrecond"):
    _EDM[_name][2]["sigma_data"] = "sigma_data"
_RAW = {"SongUNet": _UNET + "SongUNet", "DhariwalUNet": _UNET + "DhariwalUNet"}
_FIRST = ("img_resolution", "img_channels", "label_dim", "use_fp16")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was read and where it was written."""

    folder: Path
    class_name: str
    parameters: int
    network: dict
    sha256: str


def network_tree(snapshot: Snapshot) -> dict:
    """The `_target_` tree of our network for the class and constructor arguments of an official one.

    An EDM2 network without the head of the uncertainty is one of ECT's branch imgnet.
    Raises UserError for a class we have no counterpart of, and for an option our network does not take.
    """
    options = dict(zip(_FIRST, snapshot.args)) | snapshot.kwargs
    options.pop("class_name", None)
    missing = [name for name in _FIRST[:2] if name not in options]
    if missing:
        raise UserError(f"{snapshot.class_name} was made without {missing[0]}, so its architecture is unknown.")
    if snapshot.class_name in _EDM:
        return _edm_tree(snapshot.class_name, options)
    if snapshot.class_name == "Precond":
        return _edm2_tree(options, head=any(name.startswith("logvar_") for name in snapshot.tensors))
    known = ", ".join([*_EDM, "Precond (EDM2)"])
    raise UserError(f"{snapshot.class_name} is not a network we can import. Known: {known}.")


def _edm_tree(class_name: str, options: dict) -> dict:
    ours, default_raw, names = _EDM[class_name]
    kind = options.pop("model_type", default_raw)
    if kind not in _RAW:
        raise UserError(f"model_type {kind!r} is not a network we can import. Known: {', '.join(_RAW)}.")
    channels = options.pop("img_channels")
    outer = {names[key]: options.pop(key) for key in list(options) if key in names}
    raw = {
        "_target_": _RAW[kind],
        "in_channels": channels,
        "out_channels": channels * (2 if ours == "IDDPMPrecond" else 1),
    }
    return _tree(ours, outer, raw, options)


def _edm2_tree(options: dict, *, head: bool) -> dict:
    if not head:
        options["logvar_channels"] = 0
    outer = {key: options.pop(key) for key in ("sigma_data", "logvar_channels") if key in options}
    raw = {"_target_": "common.nets.edm2.EDM2UNet"}
    options.setdefault("use_fp16", True)
    return _tree("EDM2Precond", outer, raw, options)


def _tree(ours: str, outer: dict, raw: dict, options: dict) -> dict:
    half = options.pop("use_fp16", False)
    return {
        "_target_": _PRECOND + ours,
        **outer,
        "dtype": "float16" if half else "float32",
        "model": raw | options,
    }


def convert(path: str | Path, out_dir: str | Path, *, family: str, key: str = "ema") -> Converted:
    """Reads an official pickle (nothing in it runs) and writes the export folder `out_dir`.

    family  "edm" or "edm2": what the caller expects the file to be
    The network is rebuilt from the arguments on the meta device and every name and shape compared before writing.
    Raises UserError that names the file when it is no such pickle, or its tensors are not those of its arguments.
    """
    path = Path(path)
    snapshot = read_snapshot(path, key=key)
    if (snapshot.class_name == "Precond") != (family == "edm2"):
        other = "edm2" if family == "edm" else "edm"
        raise UserError(f"{path} holds {snapshot.class_name}, no {family} network. Use: import_weights {other} {path}")
    digest = sha256_file(path)
    release = official.by_file(path.name)
    if release is not None and release.sha256 not in (None, digest):
        raise UserError(f"{path} is not the released {release.file}: its sha256 is {digest}. Download it again.")
    try:
        tree = network_tree(snapshot)
        with torch.device("meta"):
            network = build(tree, allowed=EXPORT)
        want = {name: value.shape for name, value in network.state_dict().items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    have = {name: value.shape for name, value in snapshot.tensors.items()}
    if have != want:
        wrong = [name for name in [*want, *have] if have.get(name) != want.get(name)]
        shapes = [tuple(side[wrong[0]]) if wrong[0] in side else "absent" for side in (have, want)]
        raise UserError(
            f"{path}: {len(set(wrong))} tensors are not those of {snapshot.class_name} with its own arguments, first "
            f"{wrong[0]}: {shapes[0]} in the file, {shapes[1]} in the network."
            " The file is damaged or comes from changed code."
        )
    return write_converted(
        path, out_dir, network, tree, tensors=snapshot.tensors, release=release,
        sampler=_sampler(tree),
        facts={"official_class": snapshot.class_name, "average": key},
    )  # fmt: skip


def write_converted(
    path: Path,
    out_dir: str | Path,
    net: nn.Module,
    network: Mapping,
    *,
    tensors: Mapping[str, Tensor],
    release: official.Release | None,
    sampler: Mapping | None,
    facts: Mapping,
) -> Converted:
    """The export folder of an official file, with where its weights come from.

    net      the network `tensors` belong to, on any device, and `network` its `_target_` tree
    release  what is known of the file, or None;   facts  more for the record, plain data
    """
    digest = sha256_file(path)
    meta = {
        "source": path.name,
        "source_sha256": digest,
        "licence": release.licence if release else None,
        "url": release.url if release else None,
        "published": dict(release.published) if release else {},
        **facts,
    }
    folder = write_export(out_dir, tensors, network, meta=meta, sampler=sampler)
    count = sum(value.numel() for value in net.parameters())
    name = facts.get("official_class", type(getattr(net, "raw", net)).__name__)
    return Converted(folder=folder, class_name=name, parameters=count, network=dict(network), sha256=digest)


def _sampler(tree: dict) -> dict:
    """That of the papers: consistency networks in two steps, diffusion networks by deterministic Heun steps.

    ECT: over noise level 0.821 at 32 pixels, 1.526 for EDM2 at 64; EDM: 18 steps (32 pixels), 40 (64 pixels); EDM2: 32.
    """
    edm2 = "EDM2" in tree["_target_"]
    if tree["_target_"].endswith("ECMPrecond") or tree.get("logvar_channels") == 0:
        return {"_target_": "common.diffusion.sample.Multistep", "mids": [1.526 if edm2 else 0.821]}
    steps = 32 if edm2 else 18 if tree["model"]["img_resolution"] <= 32 else 40
    return {"_target_": "common.diffusion.sample.Heun", "steps": steps}
