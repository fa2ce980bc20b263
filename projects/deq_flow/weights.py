"""Weights of RAFT, GMA and DEQ-Flow under our names: which files there are, and how their tensors are called.

    load_official(net, "deq-flow-H-things-test-3x.pth")

Four code bases name the same tensors: princeton-vl/RAFT, DEQ-Flow 1.0 and 2.0 with TorchDEQ's zoo, which follow it, and
torchvision. Our recurrent unit keeps the three convolutions of a direction in one layer; theirs are put together here.
A weight with or without weight normalisation goes into a network with or without.
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
from common.weights.load import LoadReport, load_into, load_tensors
from common.weights.official import Release, by_file

_V2 = "https://drive.google.com/drive/folders/1a_eX_wYN1qTw2Rj1naEXhcsG4D3KKxFw"
_ZOO = "https://drive.google.com/drive/folders/1RTTKy9iQm4pYCEi2Zqzbxi9MHmASWeh8"
_TORCHVISION = "https://download.pytorch.org/models"
_AGPL = "AGPL-3.0 (the code's; the files name none)"


def _deq(file: str, folder: str, clean: float, final: float, epe: float, fl_all: float) -> Release:
    published = {"sintel_clean_epe": clean, "sintel_final_epe": final, "kitti_epe": epe, "kitti_fl_all": fl_all}
    return Release(file=f"{file}.pth", url=folder, family="deq_flow", licence=_AGPL, published=published)


def _raft(file: str, **published: float) -> Release:
    file = f"raft_large_{file}.pth"
    licence = "BSD-3-Clause (torchvision's code and RAFT's; the files name none)"
    return Release(file=file, url=f"{_TORCHVISION}/{file}", family="raft", licence=licence, published=published)


# README of locuslab/deq-flow (version 2.0) and log of TorchDEQ's zoo: Sintel and KITTI-15 training sets after C + T.
# The folders hold several files. torchvision: its table of RAFT weights (released code of torchvision 0.30).
RELEASES: dict[str, Release] = {
    "deq_flow_h_1x": _deq("deq-flow-H-things-test-1x", _V2, 1.27, 2.58, 3.76, 12.95),
    "deq_flow_h_3x": _deq("deq-flow-H-things-test-3x", _V2, 1.27, 2.48, 3.77, 13.41),
    "deq_flow_b_1": _deq("deq-flow-B-things-1", _ZOO, 1.386, 2.774, 4.456, 14.18),
    "deq_flow_b_2": _deq("deq-flow-B-things-2", _ZOO, 1.435, 2.741, 4.597, 15.12),
    "raft_c_t_v1": _raft("C_T_V1-22a6c225", sintel_clean_epe=1.4411, sintel_final_epe=2.7894, kitti_epe=5.0172),
    "raft_c_t_v2": _raft("C_T_V2-1bb1363a", sintel_clean_epe=1.3822, sintel_final_epe=2.7161, kitti_epe=4.5118),
}

# Plain steps of the published evaluation of a release; torchvision's table is made with 32 on Sintel, 24 on KITTI.
STEPS = {"deq_flow_h_1x": 60, "deq_flow_h_3x": 120, "deq_flow_b_1": 60, "deq_flow_b_2": 60}
STEPS |= {"raft_c_t_v1": 32, "raft_c_t_v2": 32}

# Patterns of whole names -> ours; gru.<direction>.<gate> is put together afterwards.
_ENCODERS = {"fnet": "features", "cnet": "context", "feature_encoder": "features", "context_encoder": "context"}
_NAMES = (
    # RAFT and DEQ-Flow
    (r"^(fnet|cnet)\.(conv|norm)1\.", r"\1.\2."),
    (r"^(fnet|cnet)\.conv2\.", r"\1.out."),
    (r"^(fnet|cnet)\.layer(\d)\.(\d)\.", r"\1.blocks.\2/\3."),
    (r"\.downsample\.", ".short."),
    (r"^update_block\.encoder\.conv([cf])(\d)\.", r"cell.motion.\1\2."),
    (r"^update_block\.encoder\.conv\.", "cell.motion.merge."),
    (r"^update_block\.gru\.conv([zrq])([12])\.", r"cell.gru.\2/\1."),
    (r"^update_block\.gma\.to_v\.", "cell.gather.value."),
    (r"^update_block\.(?:gma|aggregator)\.gamma$", "cell.gather.scale"),
    (r"^update_block\.aggregator\.to_v\.", "cell.gather.value."),
    (r"^update_block\.flow_head\.", "cell.head."),
    (r"^(?:update_block\.)?mask\.0\.", "mask.conv1."),
    (r"^(?:update_block\.)?mask\.2\.", "mask.conv2."),
    (r"^att(?:n)?\.to_qk\.", "attention.query_key."),
    # torchvision
    (r"^(\w+_encoder)\.conv\.(weight|bias)$", r"\1.out.\2"),
    (r"^(\w+_encoder)\.convnormrelu\.0\.", r"\1.conv."),
    (r"^(\w+_encoder)\.convnormrelu\.1\.", r"\1.norm."),
    (r"^(\w+_encoder)\.layer(\d)\.(\d)\.", r"\1.blocks.\2/\3."),
    (r"\.convnormrelu([12])\.0\.", r".conv\1."),
    (r"\.convnormrelu([12])\.1\.", r".norm\1."),
    (r"^update_block\.motion_encoder\.conv(c|f)(?:orr|low)(\d)\.0\.", r"cell.motion.\1\2."),
    (r"^update_block\.motion_encoder\.conv\.0\.", "cell.motion.merge."),
    (r"^update_block\.recurrent_block\.convgru([12])\.conv([zrq])\.", r"cell.gru.\1/\2."),
    (r"^mask_predictor\.convrelu\.0\.", "mask.conv1."),
    (r"^mask_predictor\.conv\.", "mask.conv2."),
    # both
    (r"^cell\.motion\.c(\d)\.", r"cell.motion.corr\1."),
    (r"^cell\.motion\.f(\d)\.", r"cell.motion.flow\1."),
    (r"weight_g$", "parametrizations.weight.original0"),
    (r"weight_v$", "parametrizations.weight.original1"),
)
_GATE = re.compile(r"^cell\.gru\.([12])/([zrq])\.(.*)$")
_G, _V = "parametrizations.weight.original0", "parametrizations.weight.original1"
# A second name of a tensor, unused tensors, the first encoding of positions of GMA, and the DEQ layer's own.
_LEFT_OUT = re.compile(r"(^(fnet|cnet)\..*\.norm3\.|^att(n)?\.pos_emb\.|^deq\.)")


def official_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of one of the four code bases under our names, gates of the recurrent unit put together.

    tensors  also with "module." before each name, as a parallel wrapper saves them
    Raises UserError for a network of other blocks (RAFT's small one) and for names of none of them.
    """
    plain = {name.removeprefix("module."): value for name, value in tensors.items()}
    if any(".convnormrelu3." in name or name.startswith("fnet.layer1.0.conv3.") for name in plain):
        raise UserError(
            "this file holds RAFT's small network, whose encoder and recurrent unit are others. Choose a large one."
        )
    found, gates = {}, {}
    for name, value in plain.items():
        if _LEFT_OUT.search(name):
            continue
        ours = _renamed(name)
        if match := _GATE.match(ours):
            direction, gate, leaf = match.groups()
            gates.setdefault(f"cell.gru.{('rows', 'columns')[int(direction) - 1]}.{leaf}", {})[gate] = value
        elif ours.split(".")[0] in ("features", "context", "attention", "cell", "mask"):
            found[ours] = value
        else:
            raise UserError(f"{name} is no tensor of RAFT or DEQ-Flow. Give the state dict of their network.")
    for name, parts in gates.items():
        if set(parts) != set("zrq"):
            raise UserError(f"{name} needs the gates z, r and q, found {', '.join(sorted(parts))}. The file is cut.")
        found[name] = torch.cat([parts[gate] for gate in "zrq"])
    return found


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    first, _, rest = name.partition(".")
    name = f"{_ENCODERS.get(first, first)}.{rest}"
    return re.sub(r"\.blocks\.(\d)/(\d)\.", lambda m: f".blocks.{2 * (int(m[1]) - 1) + int(m[2])}.", name)


def matched_norm(state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """`state` with each layer as `names`, those of a network, have it: one weight w, or g and v with w = v g / |v|."""
    found = {}
    for name, value in state.items():
        stem = name.removesuffix(_G).removesuffix(_V).removesuffix("weight")
        plain, g, v = stem + "weight", stem + _G, stem + _V
        if name == plain and plain not in names and v in names:
            found[g], found[v] = _length(value), value
        elif name == v and v not in names and plain in names:
            found[plain] = value * (state[g] / _length(value))
        elif name != g or g in names or plain not in names:
            found[name] = value
    return found


def _length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=list(range(1, v.ndim)), keepdim=True)


def load_official(net: nn.Module, path: str | Path) -> LoadReport:
    """Copies the weights of a file of RAFT, GMA, DEQ-Flow or torchvision into a `FlowEquilibrium`.

    The network has to be of the file's size; RAFT's and torchvision's want hidden_init="tanh_context".
    Raises UserError when the file is damaged or of another architecture.
    """
    return _load(net, _read(Path(path)), str(path))


def convert_official(path: str | Path, out_dir: str | Path, *, network: Mapping) -> Converted:
    """Reads such a file (nothing in it runs) and writes the export folder `out_dir`.

    network  `_target_` tree of a `FlowEquilibrium` of the file's size. Its `hidden_init` becomes "tanh_context" where
             the file's context encoder has the channels of RAFT's first hidden state. A released file is evaluated
             with the plain steps of its published numbers (`STEPS`)
    Raises UserError that names the file when it is damaged or of another architecture.
    """
    path = Path(path)
    state, network = _read(path), dict(network)
    width = network.get("hidden_channels", 128)
    if "context.out.weight" in state and len(state["context.out.weight"]) == 2 * width:
        network["hidden_init"] = "tanh_context"
    release = by_file(path.name, RELEASES)
    if release is not None and isinstance(network.get("deq"), Mapping):
        steps = next(STEPS[key] for key, value in RELEASES.items() if value is release)
        plain = {"_target_": "common.deq.solvers.Picard", "max_iter": steps, "stop": "never"}
        network["deq"] = {**network["deq"], "eval_solver": plain}
    with torch.random.fork_rng(devices=[]):
        net = build(network, allowed=EXPORT)
    _load(net, state, str(path))
    return write_converted(
        path, out_dir, net, network, tensors=net.state_dict(), release=release, sampler=None, facts={}
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return official_state(load_tensors(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


def _load(net: nn.Module, state: Mapping[str, Tensor], name: str) -> LoadReport:
    return load_into(net, matched_norm(state, set(net.state_dict())), prefix="", name=name)
