"""torchdeq's normalisation names over common.deq.layers, and its dropout reset.

What differs from torchdeq: g and v are parameters of a torch parametrisation, `parametrizations.weight.original0` and
`original1`, so copies, device moves and state dicts work and writing into the weight in place, which
torchdeq loses at the next reset, is refused; checkpoints written by torchdeq go through `from_torchdeq`. As there,
`layer.weight = value` changes the weight until the next reset and no parameter. spectral_norm keeps the function of
the layer when it is put on; the command line's names serve as keywords, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.deq import layers
from common.deq.dropout import VariationalMask
from common.errors import UserError, nearest
from common.torchdeq.config import DEQConfig

# torchdeq's keyword -> its name in args and on the command line
SPELLINGS = {
    "target_norm": "norm_target_norm",
    "clip": "norm_clip",
    "clip_value": "norm_clip_value",
    "n_power_iterations": "sn_n_power_iters",
}
KEYWORDS = {*SPELLINGS, *SPELLINGS.values(), "learn_scale", "norm_no_scale", "names", "dims", "eps"}


class _Parametrised:
    """torchdeq's protocol of a normalisation: `apply` puts it on a module, the object resets it and takes it off."""

    # module class -> (names of its weights, their axes of output channels), by type and not by isinstance
    _target_modules: ClassVar[dict[type, tuple[str | Sequence[str], int | Sequence[int]]]] = {}

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        deq_args: Any = None,
        names: str | Sequence[str] | None = None,
        dims: int | Sequence[int] | None = None,
        learn_scale: bool = True,
        target_norm: float = 1.0,
        clip: bool = False,
        clip_value: float = 1.0,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
    ) -> "_Parametrised":
        """Normalise the weights `names` of one module, whose output channels lie on the axes `dims`.

        names, dims  None: as registered for the class of the module. Settings in deq_args (norm_clip, ...) come first.
        eps          accepted for torchdeq's signature; norms below 1e-12 count as zero
        """
        if names is None or dims is None:
            names, dims = cls._target_modules[parametrize.type_before_parametrizations(module)]
        names, dims = ([each] if isinstance(each, str | int) else list(each) for each in (names, dims))
        if len(names) != len(dims):
            raise UserError(f"names {names} and dims {dims} of a norm differ in length. Give one axis per name.")
        config = DEQConfig(deq_args)
        own = {"target_norm": target_norm, "clip": clip, "clip_value": clip_value}
        own["n_power_iterations"] = n_power_iterations
        given = {name: config.get(SPELLINGS[name], value) for name, value in own.items()}
        learn_scale = not config.get("norm_no_scale", not learn_scale)
        for name, dim in zip(names, dims, strict=True):
            if parametrize.is_parametrized(module, name):
                raise UserError(f"{name} of {type(module).__name__} is normalised already. Call remove_norm first.")
            if not isinstance(getattr(module, name, None), Tensor):
                raise UserError(
                    f"{type(module).__name__} has no weight {name!r} to normalise. Change names of the norm."
                )
            cls._register(module, name, dim, learn_scale, given)
            module.parametrizations[name].__class__ = _Assigned
        return cls(names)

    @classmethod
    def _register(cls, module: nn.Module, name: str, dim: int, learn_scale: bool, given: dict[str, Any]) -> None:
        raise NotImplementedError

    def __call__(self, module: nn.Module) -> None:
        for name in self.names:
            _reset(module.parametrizations[name])

    def remove(self, module: nn.Module) -> None:
        for name in self.names:
            parametrize.remove_parametrizations(module, name)


class _Assigned(parametrize.ParametrizationList):
    """What `module.name = value` does once a norm is on: the value is held until the next reset, as in torchdeq."""

    def right_inverse(self, value: Tensor) -> None:
        self[0].hold(value, *_originals(self))


def _originals(weight: parametrize.ParametrizationList) -> list[Tensor]:
    return [weight.original] if weight.is_tensor else [weight.original0, weight.original1]


def _common(dim: int, learn_scale: bool, given: dict[str, Any]) -> dict[str, Any]:
    clip = given["clip_value"] if given["clip"] else None
    return {"dim": dim, "clip": clip, "learn_scale": learn_scale, "target": given["target_norm"]}


class WeightNorm(_Parametrised):
    """w_i = v_i min(clip_value, g_i / ||v_i||) per output channel; common.deq.layers.WeightNorm."""

    _target_modules: ClassVar = {kind: ("weight", dim) for kind, dim in layers.TARGETS.items()}

    @classmethod
    def _register(cls, module, name, dim, learn_scale, given):
        parametrize.register_parametrization(module, name, layers.WeightNorm(**_common(dim, learn_scale, given)))


class SpectralNorm(_Parametrised):
    """w = v min(clip_value, g / sigma(v)); common.deq.layers.SpectralNorm.

    g is learnable and starts at sigma, so that the function does not change (torchdeq: at target_norm).
    With clip, where a bound on the norm is what is asked for, it starts at target_norm as in torchdeq.
    """

    _target_modules: ClassVar = {kind: ("weight", dim) for kind, dim in layers.TARGETS.items()}

    @classmethod
    def _register(cls, module, name, dim, learn_scale, given):
        norm = layers.SpectralNorm(power_iterations=given["n_power_iterations"], **_common(dim, learn_scale, given))
        parametrize.register_parametrization(module, name, norm)
        if learn_scale and given["clip"]:
            with torch.no_grad():
                module.parametrizations[name].original0.fill_(given["target_norm"])


_norms: dict[str, Any] = {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}


def _norm_class(norm_type: str) -> Any:
    if norm_type not in _norms:
        known = ("none", *_norms)
        raise UserError(f"norm_type must be one of {', '.join(known)}, got {norm_type!r}. {nearest(norm_type, known)}")
    return _norms[norm_type]


def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: str | Sequence[str] | None = None,
    filter_out: str | Sequence[str] | None = None,
    args: Any = None,
    **norm_kwargs,
) -> None:
    """Normalise the weights of all registered module types below `model`: Linear, Conv1-3d, ConvTranspose1-3d.

    norm_type          "weight_norm", "spectral_norm", "none" or registered; a norm_type in args comes first
    prefix_filter_out  beginnings of module paths that are skipped; filter_out: parts of module paths
    args               Namespace, dict or object with norm_type, norm_no_scale, norm_clip, norm_clip_value,
                       norm_target_norm, sn_n_power_iters; read, never changed
    norm_kwargs        the same names, which come before args; or learn_scale, clip, clip_value, target_norm,
                       n_power_iterations, which as in torchdeq come after args (torchdeq takes only these)

    A module without such layers is unchanged. Raises UserError for unknown names, with the nearest.
    """
    config = DEQConfig(args)
    config.update(**norm_kwargs)
    norm_type = config.get("norm_type", norm_type)
    if norm_type == "none":
        return
    norm = _norm_class(norm_type)
    own = {name: value for name, value in norm_kwargs.items() if name not in (*SPELLINGS.values(), "norm_no_scale")}
    if isinstance(norm, type) and issubclass(norm, _Parametrised):
        for name in own:
            if name not in KEYWORDS:
                raise UserError(f"apply_norm has no setting {name!r}. {nearest(name, KEYWORDS)}")
    skipped = tuple(_listed(prefix_filter_out))
    for path, module in list(model.named_modules()):
        if path.startswith(skipped) or any(part in path for part in _listed(filter_out)):
            continue
        if parametrize.type_before_parametrizations(module) in norm._target_modules:
            module._deq_norm = norm.apply(module, deq_args=config, **own)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def reset_norm(model: nn.Module) -> None:
    """Compute every normalised weight below `model` and hold it: once per training forward, before the solve."""
    for part in model.modules():
        if isinstance(part, parametrize.ParametrizationList):
            _reset(part)
        elif not isinstance(getattr(part, "_deq_norm", None), _Parametrised | None):
            part._deq_norm(part)


def _reset(weight: parametrize.ParametrizationList) -> None:
    if isinstance(weight[0], layers.Norm):
        weight[0].reset(*_originals(weight))


def from_torchdeq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict written with torchdeq's norms, as its zoo publishes them, under the names used here.

    weight_g, weight_v            of weight_norm (v alone without learnt scale)
    weight_orig, weight_u, _v, _g of spectral_norm; its g per channel
    "module." before every name, as a parallel wrapper saves them, is taken off. All other tensors stay as they are.
    """
    wrapped = state and all(name.startswith("module.") for name in state)
    state = {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}
    found = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition("_")
        if kind not in ("g", "v", "u", "orig") or not ({stem + "_v", stem + "_orig"} & state.keys()):
            found[name] = value
            continue
        module, _, weight = stem.rpartition(".")
        place = f"{module}.parametrizations.{weight}".removeprefix(".")
        spectral, scaled = stem + "_orig" in state, stem + "_g" in state
        direction = "original1" if scaled else "original"
        names = {"g": "original0", "orig": direction, "u": "0.left", "v": "0.right" if spectral else direction}
        found[f"{place}.{names[kind]}"] = value
    return found


def remove_norm(model: nn.Module) -> None:
    """Turn every normalised weight below `model` back into a plain parameter with exactly its present value."""
    for module in list(model.modules()):
        if hasattr(module, "_deq_norm"):
            module._deq_norm.remove(module)
            del module._deq_norm


def register_norm(norm_type: str, norm_class: Any) -> None:
    """Make a normalisation available to apply_norm under the name `norm_type`.

    norm_class  has `_target_modules`, a dict of module classes, and apply(module, deq_args=, **norm_kwargs) -> object,
                which is called with the module by reset_norm and whose remove(module) takes it off again
    """
    missing = [name for name in ("_target_modules", "apply") if not hasattr(norm_class, name)]
    if missing:
        raise UserError(f"norm_class of register_norm needs {' and '.join(missing)}. Derive it from norm.WeightNorm.")
    _norms[norm_type] = norm_class


def register_norm_module(
    module_class: type, norm_type: str, names: str | Sequence[str] = "weight", dims: int | Sequence[int] = 0
) -> None:
    """Let apply_norm(norm_type=...) normalise the parameters `names` of every module of exactly this class.

    dims  for each name the axis of its output channels
    """
    _norm_class(norm_type)._target_modules[module_class] = (names, dims)


def reset_dropout(model: nn.Module) -> None:
    """Clear every dropout mask below `model`: the next use draws a new one, on the input's device."""
    for part in model.modules():
        if isinstance(part, VariationalMask):
            part.reset()


def reset_deq(model: nn.Module) -> None:
    """reset_norm and reset_dropout: once per training forward, before the solve."""
    reset_norm(model)
    reset_dropout(model)
