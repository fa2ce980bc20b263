"""Weight and spectral normalisation for equilibrium cells, computed once per solve.

The weights of a cell must not change between the steps of a solver, and recomputing them at each step costs time and
memory. `reset(module)` computes every normalised weight once, with its graph. All solver steps and gradient steps then
use that weight. Formulas: weight normalisation (arXiv 1602.07868, Equation 2), spectral normalisation
(arXiv 1802.05957, Equation 8), clipping as in TorchDEQ's code (arXiv 2310.18605).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.deq.dropout import VariationalMask
from common.deq.structure import without_autocast
from common.errors import UserError, nearest
from common.tensors import only_shapes

# Layer type -> axis of the weight with the output channels. Exact types, not isinstance: other modules read the weights
# of some subclasses directly and bypass a parametrisation, for example the output projection of nn.MultiheadAttention.
TARGETS = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
}
KINDS = ("weight", "spectral", "none")
WRITTEN = (
    "a normalised weight was written in place, which has no effect on its parameters. "
    "Assign instead: layer.weight = new_value, or initialise before apply_norm."
)
EPS = 1e-12  # below this a norm counts as zero


@dataclass
class Held:
    """A normalised weight kept since the last reset, and a record of the parameters it was computed from.

    weight    the result, with its graph where gradients were on
    sources   the parameters, by identity
    stamps    (version, address) of each source at that time
    version   of the weight itself, to notice in-place writes to it
    spent     a backward pass has gone through the graph: it cannot serve a second one
    given     assigned from outside (`Norm.hold`): it stays until the next reset whatever happens to the sources
    """

    weight: Tensor
    sources: tuple[Tensor, ...]
    stamps: tuple[tuple[int, int], ...]
    version: int
    spent: bool = False
    given: bool = False


class Norm(nn.Module):
    """Base class of the two normalisations: a parametrisation whose result is kept ("held") by `reset`.

    Without a held weight every access computes it again, as any torch parametrisation does. A held weight is discarded
    when a parameter is written, replaced, moved or loaded, when the module changes between training and evaluation,
    and after a backward pass through it. Two limits: a write through `parameter.data` in place goes unnoticed until
    the next of these events or reset, and inside torch.compile versions are not compared.

    The weight is a result: writing into it (`nn.init.zeros_(layer.weight)`, `layer.weight.data.fill_(0)`) reaches no
    parameter and is refused, at the next access or, through `.data`, at the first reset. Assign instead, or
    initialise before apply_norm.
    """

    def __init__(self, dim: int, clip: float | None, learn_scale: bool, target: float):
        super().__init__()
        if clip is not None and not clip > 0:
            raise UserError(f"clip must be a number above 0, got {clip!r}. Set clip=None to switch clipping off.")
        if not target > 0:
            raise UserError(f"target must be above 0, got {target!r}. Set target to the norm wanted, such as 1.0.")
        self.dim = dim
        self.clip = clip
        self.learn_scale = learn_scale
        self.target = target
        self.held: Held | None = None  # common.deq.recompute puts an earlier one back
        # Results given out before the first reset (tensor, copy, version); None after it.
        self.shown: list[tuple[Tensor, Tensor, int]] | None = []

    def compute(self, *originals: Tensor) -> Tensor:
        """The normalised weight from (g, v), or from (v,) when the scale is constant."""
        raise NotImplementedError

    def advance(self, *originals: Tensor) -> None:
        """Update the buffers; called by a reset in training mode."""

    def forward(self, *originals: Tensor) -> Tensor:
        self._refuse_writes()
        held = self.held
        # Other parameters than those of the held weight: a torch.func.functional_call. The held weight is kept.
        if held is None or any(a is not b for a, b in zip(originals, held.sources)):
            return self._show(self.compute(*originals))
        if not torch.compiler.is_compiling() and not self._is_current(held):
            self.held = None
            return self.compute(*originals)
        if not torch.is_grad_enabled():
            return held.weight.detach()
        if not held.weight.requires_grad and any(t.requires_grad for t in originals):
            # The reset ran without gradients, but now they are needed: compute the same weight with its graph.
            if torch.compiler.is_compiling():
                return self.compute(*originals)
            return self._hold(originals)
        return held.weight

    def reset(self, *originals: Tensor) -> None:
        """Compute the weight now and keep it until the next reset or any of the events of the class docstring."""
        self._refuse_writes(values=True)
        self.held = self.shown = None
        if self.training:
            self.advance(*originals)
        self._hold(originals)

    def hold(self, weight: Tensor, *originals: Tensor) -> None:
        """Use `weight`, with its graph, in place of the computed one until the next reset; the parameters stay."""
        self.held = Held(weight, originals, tuple(map(_stamp, originals)), _stamp(weight)[0], given=True)

    def _show(self, weight: Tensor) -> Tensor:
        """Remembers a result made before the first reset, so that a write into it is noticed."""
        if self.shown is not None and not torch.compiler.is_compiling() and not only_shapes(weight):
            seen = weight.detach()  # shares its version
            if not torch._C._functorch.is_functorch_wrapped_tensor(seen) and not seen.is_inference():
                self.shown = [(seen, seen.clone(), seen._version)]
        return weight

    def _refuse_writes(self, values: bool = False) -> None:
        if torch.compiler.is_compiling():
            return
        for seen, copy, version in self.shown or ():
            if seen._version != version or (values and not torch.equal(seen, copy)):
                self.shown = []
                raise UserError(WRITTEN)

    def current(self) -> Held | None:
        """The held weight if the next access would use it."""
        return self.held if self.held is not None and self._is_current(self.held) else None

    def _hold(self, originals: tuple[Tensor, ...]) -> Tensor:
        weight = self.compute(*originals)
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return weight  # computed inside jvp, grad or vmap of torch.func: not valid outside, so not held
        held = Held(weight, originals, tuple(map(_stamp, originals)), _stamp(weight)[0])
        if weight.requires_grad:
            held_ref = ref(held)  # weak: weight -> hook -> held -> weight would keep the graph alive

            def mark_spent(_):
                if (current := held_ref()) is not None:
                    current.spent = True

            weight.register_hook(mark_spent)
        self.held = held
        return weight

    def _is_current(self, held: Held) -> bool:
        if held.given:
            return True
        if held.spent or held.stamps != tuple(map(_stamp, held.sources)):
            return False
        if held.weight.is_inference():
            return torch.is_inference_mode_enabled()
        if held.weight._version != held.version:
            raise UserError(WRITTEN)
        return True

    def _factor(self, g: Tensor | None, norm: Tensor) -> Tensor:
        """min(clip, g / norm), the factor of v in the normalised weight; g = target without a learnt scale."""
        factor = (self.target if g is None else g) / norm.clamp(min=EPS)
        return factor if self.clip is None else factor.clamp(max=self.clip)

    def _split(self, originals: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor]:
        return (originals[0], originals[1]) if self.learn_scale else (None, originals[0])

    def _join(self, g: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (g, v) if self.learn_scale else v

    # The events that end a held weight, beyond those that `_is_current` sees.

    def _forget(self) -> None:
        self.held = None
        self.shown = self.shown and []

    def train(self, mode: bool = True):
        if mode != self.training:
            self.held = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        # A copy starts without: graphs cannot be copied.
        return {**self.__dict__, "held": None, "shown": self.shown and []}

    def extra_repr(self) -> str:
        scale = "learn_scale=True" if self.learn_scale else f"target={self.target}"
        return f"dim={self.dim}, clip={self.clip}, {scale}"


class WeightNorm(Norm):
    """Weight normalisation per output channel i of the weight w: w_i = v_i min(clip, g_i / ||v_i||).

    v     parameter of the shape of w; starts as w
    g     parameter with w's size along `dim` and 1 elsewhere; starts as ||w_i||, which leaves the function unchanged.
          With learn_scale=False it is the constant `target`, which changes the function
    dim   axis of the output channels
    clip  upper limit of the factor g_i / ||v_i||, None: no limit; a limit below 1 changes the function

    A channel of zeros stays zero at the start and can be learnt: g_i = 0, and v_i is a constant vector.
    Weight normalisation, arXiv 1602.07868, Equation 2.
    """

    def __init__(self, dim: int = 0, clip: float | None = None, learn_scale: bool = True, target: float = 1.0):
        super().__init__(dim, clip, learn_scale, target)

    def compute(self, *originals: Tensor) -> Tensor:
        g, v = self._split(originals)
        with _full_precision(v):
            return (v * self._factor(g, self._norm(v))).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(g, v), or v, that give `weight`: what `layer.weight = value` stores."""
        self._forget()
        norm = self._norm(weight)
        return self._join(norm.clone(), torch.where(norm > EPS, weight, weight[0].numel() ** -0.5))

    def _norm(self, v: Tensor) -> Tensor:
        axes = [axis for axis in range(v.ndim) if axis != self.dim]
        return torch.linalg.vector_norm(v, dim=axes, keepdim=True)


class SpectralNorm(Norm):
    """Spectral normalisation: w = v min(clip, g / sigma(v)), with sigma(v) the largest singular value of v as a matrix.

    v       parameter of the shape of w; starts as w
    g       parameter, one number per output channel (w's size along `dim`, 1 elsewhere); all start as sigma(w), which
            leaves the function unchanged. With learn_scale=False it is the constant `target`, which changes it
    dim     axis of the output channels: the rows of the matrix. All other axes together are its columns
    clip    upper limit of the factor g / sigma(v), None: no limit. To bound the norm of w use learn_scale=False,
            target=bound and clip=1
    power_iterations   steps of power iteration at each computation; a reset in training mode stores the result

    Buffers left (rows,) and right (columns,): estimates of the singular vectors of sigma(v), exact at the start.
    Gradients treat them as constants: sigma = left^T v right.
    A weight of zeros stays zero at the start and can be learnt: g = 0, and v is constant.
    Spectral normalisation, arXiv 1802.05957, Equation 8 and Algorithm 1.
    """

    def __init__(
        self,
        dim: int = 0,
        clip: float | None = None,
        learn_scale: bool = True,
        target: float = 1.0,
        power_iterations: int = 1,
    ):
        super().__init__(dim, clip, learn_scale, target)
        if not isinstance(power_iterations, int) or power_iterations < 1:
            raise UserError(f"power_iterations must be a whole number of at least 1, got {power_iterations!r}. Set 1.")
        self.power_iterations = power_iterations
        self.register_buffer("left", torch.empty(0))
        self.register_buffer("right", torch.empty(0))

    def compute(self, *originals: Tensor) -> Tensor:
        g, v = self._split(originals)
        with _full_precision(v):
            matrix = self._matrix(v)
            left, right = self._vectors(matrix)
            return (v * self._factor(g, left @ (matrix @ right))).to(v.dtype)

    def advance(self, *originals: Tensor) -> None:
        _, v = self._split(originals)
        with torch.no_grad(), _full_precision(v):
            left, right = self._vectors(self._matrix(v))
            self.left.copy_(left)
            self.right.copy_(right)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(g, v), or v, that give `weight`, after finding its singular vectors: what `layer.weight = value` stores."""
        self._forget()
        empty = torch.linalg.vector_norm(weight) <= EPS
        v = torch.where(empty, torch.ones_like(weight), weight)
        matrix = self._matrix(v)
        self.left, self.right = _top_singular_vectors(matrix)
        # The same operations as in `compute`, so that g / sigma(v) there is 1 up to one rounding error.
        left, right = self._vectors(matrix)
        sigma = torch.where(empty, 0.0, left @ (matrix @ right))
        shape = [size if axis == self.dim else 1 for axis, size in enumerate(weight.shape)]
        return self._join(sigma.expand(shape).clone(), v)

    def _matrix(self, v: Tensor) -> Tensor:
        return v.movedim(self.dim, 0).flatten(1)

    @torch.no_grad()
    def _vectors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        # Power iteration: right = v^T left / ||v^T left||, left = v right / ||v right||. The results are new tensors,
        # not the buffers: a graph may still use them when the next reset writes the buffers in place.
        left, right = self.left, self.right
        for _ in range(self.power_iterations):
            right = _unit_vector(matrix.mT @ left, right)
            left = _unit_vector(matrix @ right, left)
        return left, right


def apply_norm(
    module: nn.Module,
    kind: str = "weight",
    skip: str | Sequence[str] = (),
    skip_prefix: str | Sequence[str] = (),
    clip: bool | float | None = None,
    clip_value: float = 1.0,
    learn_scale: bool = True,
    target: float = 1.0,
    power_iterations: int = 1,
) -> list[str]:
    """Normalise the `weight` of every linear and convolution layer of `module`; returns their paths.

    kind         "weight", "spectral" or "none" (does nothing)
    skip         modules whose path contains one of these strings are not normalised
    skip_prefix  modules whose path begins with one of these strings are not normalised
    clip         upper limit of the factor. True: clip_value; a number: that number; None or False: no limit
    learn_scale  True: g is a parameter that starts at the norm of the weight, which leaves the function unchanged.
                 False: g is the constant `target`
    power_iterations   steps of the spectral norm per reset

    Layers: exactly nn.Linear, nn.Conv1d/2d/3d (channels on axis 0), nn.ConvTranspose1d/2d/3d (axis 1), no subclasses.
    The parameters become `parametrizations.weight.original0` (g) and `original1` (v), or `original` (v) if g is
    constant, so build the optimiser afterwards. Assigning `layer.weight = value` sets both.
    Raises UserError for an unknown kind, for a layer that is already normalised, and if no layer is found.
    """
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}. {nearest(str(kind), KINDS)}")
    if kind == "none":
        return []
    skip, skip_prefix = ((s,) if isinstance(s, str) else tuple(s) for s in (skip, skip_prefix))
    max_factor = clip_value if clip is True else None if clip is False else clip
    chosen = {
        name: layer
        for name, layer in module.named_modules()
        if parametrize.type_before_parametrizations(layer) in TARGETS
        and not any(part in name for part in skip)
        and not name.startswith(skip_prefix)
    }
    if not chosen:
        raise UserError(
            f"apply_norm found no layer to normalise in {type(module).__name__}: it takes nn.Linear and nn.Conv*, "
            "not their subclasses. Use those layers, shorten skip, or set kind='none'."
        )
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise UserError(
                f"the weight of layer '{name}' is parametrised already. Call remove_norm first, or add it to skip."
            )
    for layer in chosen.values():
        dim = TARGETS[parametrize.type_before_parametrizations(layer)]
        options: dict = dict(dim=dim, clip=max_factor, learn_scale=learn_scale, target=target)
        norm = WeightNorm(**options) if kind == "weight" else SpectralNorm(power_iterations=power_iterations, **options)
        parametrize.register_parametrization(layer, "weight", norm)
    return list(chosen)


def remove_norm(module: nn.Module) -> None:
    """Turn every normalised weight below `module` back into a plain parameter with its current value."""
    for layer in list(module.modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        weights: Any = layer.parametrizations
        if isinstance(weights.weight[0], Norm):
            parametrize.remove_parametrizations(layer, "weight")


def reset(module: nn.Module) -> None:
    """Start a solve: compute and hold every normalised weight below `module`, and discard every dropout mask.

    Call once per forward pass, before the solve, in the gradient mode of the training step.
    """
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList):
            if isinstance(part[0], Norm):
                part[0].reset(*([part.original] if part.is_tensor else [part.original0, part.original1]))
        elif isinstance(part, VariationalMask):
            part.reset()


def _stamp(t: Tensor) -> tuple[int, int]:
    """(version, storage): changes when the tensor is written in place or when its `.data` is replaced."""
    # Inference tensors have no version. Fake tensors have no address, so the storage object identifies the memory.
    return 0 if t.is_inference() else t._version, t.untyped_storage()._cdata


def _full_precision(t: Tensor):
    """Context manager without autocast: a norm computed from bfloat16 products would change the weight."""
    return without_autocast(t.device.type)


def _unit_vector(x: Tensor, if_zero: Tensor) -> Tensor:
    """x / ||x||, or `if_zero` where ||x|| counts as zero."""
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > EPS, x / norm.clamp(min=EPS), if_zero)


def _top_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left (rows,) and right (columns,) singular vector of the largest singular value.

    The first is the eigenvector of the largest eigenvalue of the smaller Gram matrix a a^T; the second is a^T first,
    normalised.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    a = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    a = a if wide else a.mT
    first = torch.linalg.eigh(a @ a.mT).eigenvectors[:, -1]
    second = _unit_vector(a.mT @ first, a.new_full(a.shape[1:], a.shape[1] ** -0.5))
    left, right = (first, second) if wide else (second, first)
    return left.to(matrix.dtype), right.to(matrix.dtype)
