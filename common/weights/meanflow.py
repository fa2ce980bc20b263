"""Released weights of MeanFlow, iMF and pMF under our names: which files there are, and how their tensors are called.

    load_official(net, "iMF-B-2.pth")

The authors' PyTorch files, their JAX parameter trees (see `common.weights.flax`), the port in FD-loss
(arXiv 2604.28190) and, for a DiT of one time, the releases of DiT and SiT differ in how they name the same tensors.
The CIFAR-10 code names its U-Net as EDM does, but lists all queries, then all keys, then all values of an attention.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.targets import EXPORT
from common.weights.build import build
from common.weights.convert import Converted, write_converted
from common.weights.flax import read_flax
from common.weights.load import LoadReport, load_into, load_tensors
from common.weights.official import Release, by_file

_HOST = "https://huggingface.co/Lyy0725"
_LICENCE = "MIT (the code's; the files name none)"


def _release(folder: str, file: str, **published: float) -> Release:
    return Release(
        file=file,
        url=f"{_HOST}/{folder}/resolve/main/{file}",
        family=folder.lower(),
        licence=_LICENCE,
        published=published,
    )


# READMEs of Lyy-iiis/imeanflow and Lyy-iiis/pMF, branch torch: inference weights; FID of 50,000 images in one step.
RELEASES: dict[str, Release] = {
    "imf_b2": _release("iMF", "iMF-B-2.pth", fid_nfe1=3.32),
    "imf_m2": _release("iMF", "iMF-M-2.pth", fid_nfe1=2.26),
    "imf_l2": _release("iMF", "iMF-L-2.pth", fid_nfe1=1.83),
    "imf_xl2": _release("iMF", "iMF-XL-2.pth", fid_nfe1=1.72, fid_nfe2=1.54),
    "pmf_b16": _release("pMF", "pMF-B-16.pt", fid_nfe1=3.15),
    "pmf_l16": _release("pMF", "pMF-L-16.pt", fid_nfe1=2.51),
    "pmf_h16": _release("pMF", "pMF-H-16.pt", fid_nfe1=2.15),
    "pmf_b32": _release("pMF", "pMF-B-32.pt", fid_nfe1=3.63),
    "pmf_l32": _release("pMF", "pMF-L-32.pt", fid_nfe1=2.69),
    "pmf_h32": _release("pMF", "pMF-H-32.pt", fid_nfe1=2.36),
}

# Of the training noise, where it is not 1: official configurations of pMF.
NOISE_SCALES = {"pMF-H-16.pt": 2.0, "pMF-B-32.pt": 2.0, "pMF-L-32.pt": 4.0, "pMF-H-32.pt": 4.0}

# Guidance of the published one-step numbers, a condition of the network: omega, and the times between which it acts.
# READMEs of the same branches; on the main branches the configurations recommend the same.
GUIDANCE = {
    "iMF-B-2.pth": (8.0, 0.4, 0.65),
    "iMF-M-2.pth": (10.5, 0.4, 0.6),
    "iMF-L-2.pth": (10.5, 0.4, 0.6),
    "iMF-XL-2.pth": (8.0, 0.42, 0.62),
    "pMF-B-16.pt": (8.5, 0.1, 0.7),
    "pMF-L-16.pt": (7.0, 0.2, 0.7),
    "pMF-H-16.pt": (7.0, 0.2, 0.6),
    "pMF-B-32.pt": (6.5, 0.1, 0.7),
    "pMF-L-32.pt": (7.5, 0.2, 0.6),
    "pMF-H-32.pt": (5.5, 0.1, 0.6),
}


def published_sampler(file: str) -> dict:
    """Tree of the sampler behind the published number of the released `file`; one plain step for any other name."""
    sampler = {"_target_": "common.diffusion.sample.AverageVelocitySteps", "steps": 1}
    if file not in GUIDANCE:
        return sampler
    omega, t_min, t_max = GUIDANCE[file]
    return sampler | {"omega": omega, "t_min": t_min, "t_max": t_max}


# Tensors that are computed here, not stored; the fixed positions of a DiT among them, the learned ones of pMF not.
_COMPUTED = re.compile(r"(^|\.)rope_freqs$")
# Wrappers around a layer: flax in JAX and in the authors' PyTorch files, linear and embedding in FD-loss.
_WRAPPED = re.compile(
    r"\b(q_proj|k_proj|v_proj|out_proj|w[123]|qkv|proj|fc[12]|mlp\.\d|linear|adaLN_modulation)\.(_flax_linear|linear)\."
)
_TABLE = re.compile(r"\bembedding_table\.(_flax_embedding|embedding)\b\.?")
_UNET_QKV = re.compile(r"^(enc|dec)\..*\.qkv\.(weight|bias)$")
_TOKENS = re.compile(r"(class|omega|t_min|t_max|time)_tokens$")


def official_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an official file under the names, and in the shapes, of our DiT, MiT, PixelMiT and SongUNet.

    tensors  names without the program's own prefix ("net."), of a PyTorch file or, with "/" in them, of a JAX tree
    """
    found = {}
    for name, value in tensors.items():
        if "/" in name or name == "kernel":
            name, value = _from_flax(name, value)
        name = name.replace("adaLN_modulation.1.", "adaLN_modulation.")
        name = _WRAPPED.sub(r"\1.", name)
        name = _TABLE.sub("embedding_table.", name)
        if _COMPUTED.search(name):
            continue
        if _TOKENS.search(name) or name == "y_embedder.embedding_table.weight":
            value = value.reshape(value.shape[-2:])  # pMF keeps a leading 1
        if _UNET_QKV.search(name):
            # Query, key and value of a channel side by side, as EDM has them.
            value = value.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
        found[name] = value
    return found


def _from_flax(path: str, value: Tensor) -> tuple[str, Tensor]:
    """Flax keeps (in, out) matrices and (height, width, in, out) convolutions, and numbers the layers of a list."""
    parts = path.split("/")
    leaf = parts.pop() if parts[-1] in ("kernel", "embedding") else ""
    name = re.sub(r"(^|\.)(shared_blocks|u_heads|v_heads)_(\d+)", r"\1\2.\3", ".".join(parts))
    name = re.sub(r"\blayers_(\d+)\b", r"\1", name)
    if leaf == "kernel" and value.ndim == 4:
        value = value.permute(3, 2, 0, 1)
    elif leaf == "kernel" and value.ndim == 2:
        value = value.T
    return f"{name}.weight" if leaf else name, value.contiguous()


def load_official(net: nn.Module, path: str | Path, *, prefix: str | None = None) -> LoadReport:
    """Copies the weights of an official file into a DiT, MiT, PixelMiT or the U-Net in an AverageVelocity.

    path    .pth, .pt or .safetensors file of the PyTorch releases, .npz or msgpack file of a JAX tree
    prefix  which copy to take, e.g. "ema_params/net/" or "ema."; None takes the only average, else the only copy
    A v-head the file has and the network lacks (v_depth null) is skipped, and so are the fixed positions of a DiT.
    Raises UserError when the file is damaged, holds several copies, or is of another architecture.
    """
    return _load(net, official_state(_copy_of(_read(Path(path)), prefix, str(path))), str(path))


def convert_official(
    path: str | Path,
    out_dir: str | Path,
    *,
    network: Mapping,
    prefix: str | None = None,
    sampler: Mapping | None = None,
    noise_scale: float | None = None,
) -> Converted:
    """Reads an official file (nothing in it runs) and writes the export folder `out_dir`.

    network  `_target_` tree of a DiT, MiT, PixelMiT or AverageVelocity; the depth of its v-head is that of the file
    prefix   which copy to take, see `load_official`; None also takes "net_ema.", the main average of the CIFAR-10 code
    sampler  `_target_` tree of its sampler, or None
    noise_scale  standard deviation of the noise at t = 1; None: that of the released file's name, else 1
    Raises UserError that names the file when it is damaged or of another architecture.
    """
    path = Path(path)
    tensors = _read(path)
    if prefix is None and any(name.startswith("net_ema.") for name in tensors):
        prefix = "net_ema."
    state = official_state(_copy_of(tensors, prefix, str(path)))
    network = dict(network)
    if "v_depth" in network:
        blocks = {name.split(".")[1] for name in state if name.startswith("v_heads.")}
        network["v_depth"] = len(blocks) if any(name.startswith("v_final_layer.") for name in state) else None
    if "model" in network and not any(name.startswith("map_augment.") for name in state):
        network["model"] = {**network["model"], "augment_dim": 0}
    with torch.random.fork_rng(devices=[]):
        net = build(network, allowed=EXPORT)
    _load(net, state, str(path))
    noise_scale = NOISE_SCALES.get(path.name, 1.0) if noise_scale is None else noise_scale
    return write_converted(
        path, out_dir, net, network, tensors=net.state_dict(), release=by_file(path.name, RELEASES), sampler=sampler,
        facts={"average": prefix, "noise_scale": noise_scale},
    )  # fmt: skip


def _read(path: Path) -> dict[str, Tensor]:
    return load_tensors(path) if path.suffix in (".pth", ".pt", ".safetensors", ".ckpt") else read_flax(path)


def _load(net: nn.Module, state: Mapping[str, Tensor], name: str) -> LoadReport:
    net = getattr(net, "raw", net)
    own = {key.split(".")[0] for key in net.state_dict()}
    skip = [f"{part}*" for part in ("v_heads", "v_final_layer", "pos_embed") if part not in own]
    return load_into(net, state, prefix="", ignore=skip, name=name)


def _copy_of(tensors: Mapping[str, Tensor], prefix: str | None, name: str) -> dict[str, Tensor]:
    """The tensors of one network in a file that may hold several, without what stands before their names."""
    mark = re.compile(r"^(.*?)(x_embedder[./]|map_layer0\.weight$)")
    copies = sorted({match[1] for key in tensors if (match := mark.match(key))})
    copies = [copy for copy in copies if not copy.startswith("opt_state")]
    averages = [copy for copy in copies if "ema" in copy]
    if prefix is None:
        choice = averages if averages else copies
        if len(choice) > 1:
            raise UserError(f"{name} holds several copies of its weights. Choose with prefix= one of: {choice}.")
        if not choice:
            raise UserError(f"{name} holds no DiT, iMF, pMF or U-Net: no tensor is called x_embedder or map_layer0.")
        prefix = choice[0]
    elif prefix not in copies:
        raise UserError(f"{name} has no network below prefix {prefix!r}. Choose one of: {copies}.")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
