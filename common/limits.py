"""Range checks of plain Python values a user gives; one sentence each, which names the field. Tensors are never
checked: that would wait for the device. `hint` says what to set instead of the sentence's own advice.
`RANGES` is the one table for the numbers of a configuration.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from common.errors import UserError, nearest

Value = TypeVar("Value")


def number(
    name: str,
    value: Value,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> Value:
    """Return `value` when it is a real number (infinity included) inside the limits, else raise `UserError`.

    above, least   value must be > above, >= least
    below, most    value must be < below, <= most
    """
    bounds = (("> ", above), (">= ", least), ("< ", below), ("<= ", most))
    allowed = " and ".join(f"{sign}{bound:g}" for sign, bound in bounds if bound is not None) or "a number"
    good = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if good:
        x = float(value)  # type: ignore[arg-type]  # a Real, as checked
        good = (above is None or x > above) and (least is None or x >= least)
        good = good and (below is None or x < below) and (most is None or x <= most)
    if not good:
        raise _error(name, allowed, value, hint or f"Set {name} to a number in that range.")
    return value


def probability(name: str, value: Value, hint: str = "") -> Value:
    """Return `value` when it is a number in [0, 1), the probability to drop something; else raise `UserError`."""
    return number(name, value, least=0, below=1, hint=hint or f"Set {name} to a probability such as 0.1.")


def whole(name: str, value: Value, *, least: int = 0, most: int | None = None, hint: str = "") -> Value:
    """Return `value` when it is an int in least .. most (None: no upper end), else raise `UserError`."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not good:
        allowed = f"a whole number >= {least}" + (f" and <= {most}" if most is not None else "")
        advice = f"Set {name}={max(least, 1)} or more." if most is None else f"Set {name} to {least} .. {most}."
        raise _error(name, allowed, value, hint or advice)
    return value


def positive(**fields: Any) -> None:
    """Raise `UserError` for the first field that is no whole number >= 1. Names that are no Python identifiers are
    passed as `**{"project.net.width": width}`.
    """
    for name, value in fields.items():
        whole(name, value, least=1)


def multiple_of(name: str, value: int, divisor: int, why: str = "", hint: str = "") -> int:
    """Return `value` when it is a whole number >= 1 and a multiple of `divisor` >= 1, else raise `UserError`.

    why  what the divisor is, e.g. "the number of groups"
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % divisor:
        reason = f" ({why})" if why else ""
        closest = max(round(value / divisor), 1) * divisor if isinstance(value, Real) else divisor
        raise _error(name, f"a multiple of {divisor}{reason}", value, hint or f"Set {name}={closest}.")
    return value


def sigma(name: str, value: Value) -> Value:
    """Return a noise level given as a Python number when it is > 0, else raise `UserError`.

    Networks are conditioned on ln(sigma), so zero or a negative sigma would only show up much later as nan.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not float(value) > 0:
        what = "negative sigma: " if isinstance(value, Real) and float(value) < 0 else "sigma: "
        raise _error(f"{what}{name}", "> 0", value, f"Set {name} to a positive noise level, e.g. 0.002.")
    return value


def sigma_range(low: float, high: float, names: tuple[str, str] = ("sigma_min", "sigma_max")) -> None:
    """Raise `UserError` unless 0 < low < high < inf."""
    sigma(names[0], low)
    sigma(names[1], high)
    if not low < high < math.inf:
        raise UserError(
            f"{names[0]} must be below {names[1]} and both finite, got {low!r} and {high!r}. "
            f"Set for example {names[0]}=0.002 {names[1]}=80."
        )


def choice(name: str, value: Value, options: Collection[Value], hint: str = "") -> Value:
    """Return `value` when it is one of `options`, else raise `UserError` with the nearest one."""
    if value not in options:
        words = [str(option) for option in options]
        closest = nearest(str(value), words)
        proposed = closest.removeprefix("Closest: ").removesuffix(". ") or words[0]
        raise _error(name, f"one of {', '.join(words)}", value, closest + (hint or f"Set {name}={proposed}."))
    return value


def _error(name: str, allowed: str, value: Any, advice: str) -> UserError:
    return UserError(f"{name} must be {allowed}, got {value!r}. {advice}".rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# The numbers of a configuration. Checked before any work; a class may be stricter about its own arguments.


@dataclass(frozen=True)
class Range:
    """Which numbers a key may have. `words` describes them in messages."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # low itself is not allowed
    whole: bool = False
    infinite: bool = False  # .inf is allowed

    def holds(self, value: float) -> bool:
        """Whether `value`, a number but no nan, is in the range."""
        inside = (value > self.low if self.open_low else value >= self.low) and value <= self.high
        return inside and (self.infinite or not math.isinf(value)) and (not self.whole or value == int(value))


LARGEST = 2**53  # up to here every whole number is exact in float64, which PyTorch and YAML readers pass through
FINITE = Range("a finite number", -LARGEST, LARGEST)
COUNT = Range("a whole number of 1 or more", 1, LARGEST, whole=True)
INDEX = Range("a whole number of 0 or more", 0, LARGEST, whole=True)
SHARE = Range("a number from 0 to 1", 0, 1)
POSITIVE = Range("a number above 0", 0, LARGEST, open_low=True)
NOT_NEGATIVE = Range("a number of 0 or more", 0, LARGEST)
POSITIVE_OR_INF = Range("a number above 0, or .inf", 0, open_low=True, infinite=True)
NOT_NEGATIVE_OR_INF = Range("a number of 0 or more, or .inf", 0, infinite=True)
SEED = Range("a whole number from 0 to 2**32 - 1", 0, 2**32 - 1, whole=True)
BYTE = Range("a number from -255 to 255", -255, 255)


def _names(text: str, kind: Range) -> dict[str, Range]:
    return dict.fromkeys(text.split(), kind)


# Key, or the end of a dotted path, -> range; the longest end that fits counts. Elements of a list have the range of the
# list's key. A number whose key is not here must be finite.
RANGES: dict[str, Range] = {
    **_names(
        """accumulate_grad_batches attempts batch_size blocks bottleneck chains channel_mult channel_mult_emb
        channel_mult_noise channels channels_per_head check_every cheese_factor classes columns corr_channels crop
        curve_samples cutoffs d_context_at d_width depth dimension divide dropout_res emb_channels encoder_channels
        eval_batch_size eval_fit every every_n_steps expansion feature_channels features final_channels fit
        flow_channels folds frames g_context_at g_width groups head_channels head_depth head_width heads height hidden
        hidden_channels held_out_pairs images img_channels img_resolution in_channels in_features inner inputs keep
        kernel last layers length levels log_every_n_steps logvar_channels m max_steps mlp_multiple
        model_channels motion_channels multi_grid norm_groups num_blocks num_heads num_nodes num_times out_channels
        out_features out_width output_stride pairs parameters patch_size pool power_iterations rank
        resolution rows samples size stages states stem_width steps steps_per_stage stride test_nodes text_length
        total train_count train_nodes v_depth val_nodes vectors vocabulary width z_dim check_val_every_n_epoch""",
        COUNT,
    ),
    **_names(
        """attn_resolutions augment_dim auxiliary batches checked_pairs ddof downsample eval_steps first_stage fold
        index label_dim max_iter memory num_classes num_sanity_val_steps padding phantom_steps reuse_steps rounds
        test_count timed_steps""",
        INDEX,
    ),
    **_names(
        """attention_dropout attn_balance bn_momentum concat_balance decay drop_path dropout equal eta flip
        label_balance label_dropout max_class_share norm_momentum p ramp res_balance rotate_frac share start end
        held_out uniform yflip xflip frequency t_min t_max t_floor t_below split tau phantom_tau betas momentum
        dampening gamma""",
        SHARE,
    ),
    **_names(
        """bias_lr eps eval_factor fourier_scale mlp_ratio noise_scale peak_tflops rate ratio scales seconds
        every_seconds sigma_data spacing std temperature time_scale k q clip_act clip_value""",
        POSITIVE,
    ),
    **_names(
        """auxiliary_weight c churn clip final gradient_clip_val inv_t limit_test_batches limit_train_batches
        limit_val_batches limit_predict_batches lr max_flow noise omega overfit_batches power replace rho
        s_min smooth val_check_interval warmup weight weight_decay zoom shear rotation
        layer_radius layer_shift shift""",
        NOT_NEGATIVE,
    ),
    **_names("sigma_max mids", POSITIVE_OR_INF),
    **_names("s_max s_noise safeguard sigma_min", NOT_NEGATIVE_OR_INF),
    **_names("seed eval_seed fold_seed plane_seed", SEED),
    **_names("augment.fill", BYTE),
    **_names(
        """alpha area at b beta coefficients convnext extra factor fill first gain kappa
        loss_scaling lpips resample_filter max_scale mean min_scale radius reference scale step tangent_r tangent_t
        tangent_v target per_step""",
        FINITE,
    ),
    "sample.classes": INDEX,
    "backbone.stages": FINITE,  # counted from the end, too
    "trainer.devices": COUNT,
    "trainer.devices[]": INDEX,  # numbers of GPUs
    "trainer.max_epochs": Range("-1 (no limit) or a whole number of 1 or more", -1, LARGEST, whole=True),
    # The initial state already meets a residual this large: no step would be taken.
    "tol": Range("a number from 0 to 1 (a larger residual is met before the first step)", 0, 1),
    "speed.threads": Range("a whole number from 1 to 1024", 1, 1024, whole=True),
    "num_workers": Range("a whole number from 0 to 1024", 0, 1024, whole=True),
}
UNCHECKED_SECTIONS = ("published", "table", "needs")  # sections that are printed or passed on, not used


def range_of(path: str) -> Range | None:
    """The range of the number at a dotted path (without list positions), None when no entry of `RANGES` fits."""
    parts = path.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((RANGES[end] for end in ends if end in RANGES), None)


def configuration_problems(tree, path: str = "") -> Iterator[str]:
    """One sentence per number of a plain configuration that is out of its range."""
    if isinstance(tree, dict):
        if "solver" in tree:
            yield from _no_solve(tree, path)
        for key, value in tree.items():
            if path or key not in UNCHECKED_SECTIONS:
                yield from configuration_problems(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from configuration_problems(value, f"{path}.{index}")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        named = ".".join(part for part in path.split(".") if not part.isdigit())
        listed = RANGES.get(f"{named}[]") if path.rpartition(".")[2].isdigit() else None
        allowed = listed or range_of(named) or FINITE
        if math.isnan(tree) or not allowed.holds(tree):
            yield f"{path} must be {allowed.words}, got {_short(tree)}."


def _no_solve(node: dict, path: str) -> Iterator[str]:
    """A fixed point layer whose settings leave no step to take."""
    solver, grad = node.get("solver"), node.get("grad")
    steps = solver.get("max_iter") if isinstance(solver, dict) else None
    unrolled = grad.get("steps") if isinstance(grad, dict) else None
    if steps == 0 and not unrolled:
        yield f"{path}.solver.max_iter must be 1 or more, got 0: no step of the solver would be taken."
    evaluated = node.get("eval_solver")
    if isinstance(evaluated, dict) and evaluated.get("max_iter") == 0:
        yield f"{path}.eval_solver.max_iter must be 1 or more, got 0: evaluation would take no step."
    factor = node.get("eval_factor")
    if evaluated is None and isinstance(factor, int | float) and isinstance(steps, int) and 0 < factor * steps < 1:
        yield f"{path}.eval_factor must be {1 / steps:g} or more, got {factor}: evaluation would take no step."


def _short(value: float) -> str:
    text = repr(value)
    return text if len(text) <= 30 else f"a number of {len(text)} digits"
