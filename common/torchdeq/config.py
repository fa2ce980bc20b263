"""The settings of the torchdeq facade: their sources, names and defaults, and the warning about misspelt ones."""

import warnings
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from common.errors import UserError

SOLVERS = "fixed_point_iter, simple_fixed_point_iter, anderson, broyden or a registered name"

# name -> options of add_argument; names, types and defaults are torchdeq's
ARGUMENTS: dict[str, dict[str, Any]] = {
    "f_solver": {"type": str, "default": "fixed_point_iter", "help": f"solver of the forward pass: {SOLVERS}"},
    "b_solver": {"type": str, "default": "fixed_point_iter", "help": f"solver of the backward pass (ift): {SOLVERS}"},
    "f_max_iter": {"type": int, "default": 40, "help": "steps of the forward solver at most"},
    "b_max_iter": {"type": int, "default": 40, "help": "steps of the backward solver at most"},
    "f_tol": {"type": float, "default": 1e-3, "help": "residual at which the forward solver stops"},
    "b_tol": {"type": float, "default": 1e-6, "help": "residual at which the backward solver stops"},
    "f_stop_mode": {"type": str, "default": "abs", "help": "residual of the forward solver: abs or rel"},
    "b_stop_mode": {"type": str, "default": "abs", "help": "residual of the backward solver: abs or rel"},
    "eval_factor": {"type": float, "default": 1.0, "help": "evaluation takes int(f_max_iter * eval_factor) steps"},
    "eval_f_max_iter": {"type": int, "default": 0, "help": "steps in evaluation; 0: by eval_factor"},
    "norm_type": {"type": str, "default": "weight_norm", "help": "none, weight_norm, spectral_norm or registered"},
    "norm_no_scale": {"action": "store_true", "help": "the scale of the norm is norm_target_norm, not learnt"},
    "norm_clip": {"action": "store_true", "help": "limit the factor on the weight to norm_clip_value"},
    "norm_clip_value": {"type": float, "default": 1.0, "help": "the limit of norm_clip"},
    "norm_target_norm": {"type": float, "default": 1.0, "help": "the scale when it is not learnt"},
    "sn_n_power_iters": {"type": int, "default": 1, "help": "power iterations of the spectral norm per reset"},
    "core": {"type": str, "default": "sliced", "help": "graph of the training pass: sliced, indexing or registered"},
    "ift": {"action": "store_true", "help": "exact gradient at the last state, f evaluated again in the backward pass"},
    "hook_ift": {"action": "store_true", "help": "exact gradient at the last state, its one graph kept"},
    "n_states": {"type": int, "default": 1, "help": "states returned in training, evenly spaced"},
    "indexing": {"type": int, "nargs": "+", "default": [], "help": "steps whose states are returned beside the last"},
    "gamma": {"type": float, "default": 0.8, "help": "decay of the weights of fp_correction; for the training loop"},
    "grad": {"type": int, "nargs": "+", "default": [1], "help": "phantom steps, one number or one per state"},
    "tau": {"type": float, "default": 1.0, "help": "damping of the phantom steps"},
    "sup_gap": {"type": int, "default": -1, "help": "also return every sup_gap-th phantom step"},
    "sup_loc": {"type": int, "nargs": "+", "default": [], "help": "also return these phantom steps"},
    "jac_loss_weight": {"type": float, "default": 0.0, "help": "weight of jac_reg; for the training loop"},
    "jac_loss_freq": {"type": float, "default": 0.0, "help": "share of steps with jac_reg; for the training loop"},
    "jac_incremental": {"type": int, "default": 0, "help": "raise jac_loss_weight by .1 per so many steps; likewise"},
    "sradius_mode": {"action": "store_true", "help": "spectral radius in evaluation; for the training loop"},
}
SETTINGS = {*ARGUMENTS, "no_stat"}  # all that get_deq and apply_norm may find in args


def add_deq_args(parser: ArgumentParser) -> None:
    """Add torchdeq's command line to `parser`, same names, types and defaults.

    gamma, jac_loss_weight, jac_loss_freq, jac_incremental and sradius_mode are read by training loops only.
    Unlike torchdeq's, --b_solver takes registered solvers, too; get_deq refuses unknown names.
    """
    for name, options in ARGUMENTS.items():
        parser.add_argument(f"--{name}", **options)


class DEQConfig:
    """Settings from a Namespace, a mapping, another DEQConfig or any object with __dict__; None: no settings.

    Holds a copy: what the caller passed is never changed (torchdeq's `update` writes into it).
    """

    def __init__(self, config: Any = None):
        if isinstance(config, DEQConfig):
            config = config.config
        if config is None or isinstance(config, Mapping):
            self.config = dict(config or {})
        elif hasattr(config, "__dict__"):
            self.config = dict(vars(config))
        else:
            raise UserError(
                f"args must be a Namespace, a dict or an object with attributes, got {config!r}. Name single settings: "
                f"get_deq(f_solver='anderson')."
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The setting, or `default` where it is not given."""
        return self.config.get(key, default)

    def update(self, **kwargs: Any) -> None:
        """Set these settings, here only."""
        self.config.update(kwargs)


def warn_unknown(given: Iterable[str], known: Iterable[str], where: str, *, alike: bool = False) -> None:
    """One warning that names what is no setting and has no effect, as in torchdeq, each with the nearest setting.

    alike  name only what looks like a misspelt setting
    """
    known = list(known)
    unknown = []
    for name in given:
        close = [] if name in known else get_close_matches(name, known, n=1, cutoff=0.75)
        if close or (name not in known and not alike):
            unknown.append(f"{name} (closest: {close[0]})" if close else name)
    if unknown:
        warnings.warn(f"{where} has no setting {', '.join(unknown)}: without effect.", stacklevel=3)
