"""Parameter groups: which weights decay."""

from collections.abc import Iterable

from torch import nn

from common.errors import UserError


def weight_decay_groups(module: nn.Module, *, weight_decay: float, no_decay: Iterable[str] = ()) -> list[dict]:
    """Two groups for a torch optimiser: matrices and filters with `weight_decay`, the rest with none.

    No decay for biases, gains and normalisation parameters (fewer than 2 axes) and for every parameter whose name
    contains one of `no_decay`. Frozen parameters are left out, a shared parameter appears once, empty groups are
    dropped.
    Raises UserError for a negative weight_decay.
    """
    if not weight_decay >= 0:
        raise UserError(f"weight_decay must be >= 0, got {weight_decay!r}. Set weight_decay=0 to switch it off.")
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.dim() < 2 or any(part in name for part in no_decay)
            (plain if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
