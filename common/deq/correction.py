"""Sparse fixed-point correction: losses on several states of one solve, later states counting more.

Bai et al., Deep Equilibrium Optical Flow Estimation (arXiv 2204.08442), Equation 9; weights as in TorchDEQ
(arXiv 2310.18605, code), whose names and defaults are kept.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from common.errors import UserError, nearest


def exp_weight(n: int, k: int, gamma: float = 0.8) -> float:
    """gamma^(n-k-1): state k = 0..n-1 of n, the last counts 1."""
    return gamma ** (n - k - 1)


def linear_weight(n: int, k: int, gamma: float = 0.9, bias: float = 0.0) -> float:
    """1 - (n-k-1)/n gamma + bias: state k = 0..n-1 of n, the last counts 1 + bias."""
    return 1 - (n - k - 1) / n * gamma + bias


def const_weight(n: int, k: int, c: float = 1.0) -> float:
    """c for every state."""
    return c


WEIGHTS: dict[str, Callable[..., float]] = {"exp": exp_weight, "linear": linear_weight, "const": const_weight}


class Correction:
    """Weighted sum of the losses of the n states of one forward pass, sum_k w(n, k) loss_k.

    weight  "exp": gamma^(n-k-1), gamma 0.8;  "linear": 1 - (n-k-1)/n gamma + bias, gamma 0.9, bias 0;
            "const": 1;  or a function (n, k) -> float
    gamma   None = the default just named
    bias    of "linear" only

    One state alone has weight 1 (linear: 1 + bias).
    """

    def __init__(
        self, weight: str | Callable[[int, int], float] = "exp", gamma: float | None = None, bias: float = 0.0
    ):
        if not callable(weight) and weight not in WEIGHTS:
            raise UserError(
                f"weight must be one of {', '.join(WEIGHTS)} or a function, got {weight!r}. "
                f"{nearest(str(weight), WEIGHTS)}"
            )
        if gamma is not None and weight not in ("exp", "linear"):
            raise UserError(f"gamma={gamma} means nothing for weight={weight!r}. Set gamma=None, or weight='exp'.")
        if bias and weight != "linear":
            raise UserError(f"bias={bias} means nothing for weight={weight!r}. Set bias=0, or weight='linear'.")
        self.weight, self.gamma, self.bias = weight, gamma, bias

    def weights(self, n: int) -> list[float]:
        """The n factors, first state first."""
        function = self.weight if callable(self.weight) else WEIGHTS[self.weight]
        options = {} if self.gamma is None else {"gamma": self.gamma}
        if self.bias:
            options["bias"] = self.bias
        return [function(n, k, **options) for k in range(n)]

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        """losses: one per state, first state first, any equal shapes. Raises UserError for an empty list."""
        if not len(losses):
            raise UserError("losses is empty: correction needs the loss of at least one state. Pass a list of losses.")
        weighted = [weight * loss for weight, loss in zip(self.weights(len(losses)), losses, strict=True)]
        return sum(weighted[1:], start=weighted[0])


def losses_of(criterion: Callable[..., Tensor], args: Sequence) -> list[Tensor]:
    """[criterion(*row) for each state]: lists and tuples of `args` give one entry per state, all else is repeated.

    criterion  called with one entry of each argument
    args       e.g. (list of n predictions, target, mask); a list of one is repeated too
    Raises UserError for lists of different length.
    """
    columns = [each if isinstance(each, list | tuple) else [each] for each in args]
    lengths = sorted({len(column) for column in columns} - {1})
    if len(lengths) > 1 or 0 in lengths:
        raise UserError(
            f"the lists in args hold {', '.join(str(len(c)) for c in columns)} states. Pass lists of one length, or "
            "single tensors."
        )
    n = lengths[0] if lengths else 1
    return [criterion(*(column[k if len(column) == n else 0] for column in columns)) for k in range(n)]


def positions(max_iter: int, n_states: int) -> list[int]:
    """The n_states solver steps after which a state is taken, in order; the last is max_iter.

    Equally spaced backwards from the end, max_iter - (n-k-1) floor(max_iter / n): what is left over goes before the
    first one, as in TorchDEQ. More states than steps: evenly shared, some steps then serve two states.
    Raises UserError unless max_iter >= 0 and n_states >= 1.
    """
    if not isinstance(max_iter, int) or max_iter < 0:
        raise UserError(f"max_iter must be a whole number of at least 0, got {max_iter!r}. Set max_iter to the budget.")
    if not isinstance(n_states, int) or n_states < 1:
        raise UserError(f"n_states must be a whole number of at least 1, got {n_states!r}. Set n_states=1 for the end.")
    gap = max_iter // n_states
    if not gap:
        return [-(-(k + 1) * max_iter // n_states) for k in range(n_states)]
    return [max_iter - (n_states - k - 1) * gap for k in range(n_states)]
