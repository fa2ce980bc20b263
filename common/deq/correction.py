"""Sparse fixed-point correction: losses on several states of one solve, with larger weights for later states.

Bai et al., Deep Equilibrium Optical Flow Estimation (arXiv 2204.08442), Equation 9. The weight functions, their names
and their defaults are those of TorchDEQ's code (arXiv 2310.18605).
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from common.errors import UserError, nearest


def exp_weight(n: int, k: int, gamma: float = 0.8) -> float:
    """gamma^(n-k-1) for state k = 0 .. n-1 of n. The last state has weight 1."""
    return gamma ** (n - k - 1)


def linear_weight(n: int, k: int, gamma: float = 0.9, bias: float = 0.0) -> float:
    """1 - (n-k-1)/n gamma + bias for state k = 0 .. n-1 of n. The last state has weight 1 + bias."""
    return 1 - (n - k - 1) / n * gamma + bias


def const_weight(n: int, k: int, c: float = 1.0) -> float:
    """c for every state."""
    return c


WEIGHTS: dict[str, Callable[..., float]] = {"exp": exp_weight, "linear": linear_weight, "const": const_weight}


class Correction:
    """Weighted sum of the losses of the n states of one forward pass, sum_k w(n, k) loss_k.

    weight  "exp": gamma^(n-k-1), gamma 0.8;  "linear": 1 - (n-k-1)/n gamma + bias, gamma 0.9, bias 0;
            "const": 1;  or a function (n, k) -> float
    gamma   of "exp" and "linear"; None: the default given above
    bias    of "linear" only

    A single state has weight 1 (linear: 1 + bias).
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
            raise UserError(f"gamma={gamma} has no effect with weight={weight!r}. Set gamma=None, or weight='exp'.")
        if bias and weight != "linear":
            raise UserError(f"bias={bias} has no effect with weight={weight!r}. Set bias=0, or weight='linear'.")
        self.weight, self.gamma, self.bias = weight, gamma, bias

    def weights(self, n: int) -> list[float]:
        """The n weights, in the order of the states."""
        function = self.weight if callable(self.weight) else WEIGHTS[self.weight]
        options = {} if self.gamma is None else {"gamma": self.gamma}
        if self.bias:
            options["bias"] = self.bias
        return [function(n, k, **options) for k in range(n)]

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        """The weighted sum, in the shape of one loss. Raises UserError for an empty list.

        losses  one per state, in the order of the states, all of one shape
        """
        if not len(losses):
            raise UserError("losses is empty: correction needs the loss of at least one state. Pass a list of losses.")
        weighted = [weight * loss for weight, loss in zip(self.weights(len(losses)), losses, strict=True)]
        return sum(weighted[1:], start=weighted[0])


def losses_of(criterion: Callable[..., Tensor], args: Sequence) -> list[Tensor]:
    """The loss of each state: criterion(args of that state) n times.

    criterion  called with one entry of each argument
    args       for example (list of n predictions, target, mask). A list or tuple gives one entry per state. Everything
               else, and a list of length 1, is used for every state
    Raises UserError for lists of different lengths.
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
    """The n_states solver steps after which a state is taken, in increasing order. The last is max_iter.

    State k = 0 .. n-1 is taken after step max_iter - (n-k-1) floor(max_iter / n). The remainder of the division goes
    before the first state, as in TorchDEQ. With more states than steps, some steps are used for several states.
    Raises UserError unless max_iter >= 0 and n_states >= 1.
    """
    if not isinstance(max_iter, int) or max_iter < 0:
        raise UserError(f"max_iter must be a whole number of at least 0, got {max_iter!r}. Set it to the solver steps.")
    if not isinstance(n_states, int) or n_states < 1:
        raise UserError(
            f"n_states must be a whole number of at least 1, got {n_states!r}. Set 1 for the last state only."
        )
    gap = max_iter // n_states
    if not gap:  # ceil((k + 1) max_iter / n)
        return [-(-(k + 1) * max_iter // n_states) for k in range(n_states)]
    return [max_iter - (n_states - k - 1) * gap for k in range(n_states)]
