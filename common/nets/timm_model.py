"""timm's networks, also on fake tensors: a run can be planned without building them."""

import timm
import torch
from torch import nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import _disable_current_modes

from common.errors import UserError

# Options of timm.create_model that open files or the network: timm reads weights with pickle.
LOADING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def create(name: str, **options) -> nn.Module:
    """`timm.create_model(name, **options)` without pretrained weights; inside a FakeTensorMode, its parameters fake.

    Some networks read numbers from tensors while they are built, which fake ones do not have: those are built without
    storage outside the mode, and their parameters exchanged.
    Raises UserError for options that load files, and for the names of models outside timm ("hf-hub:...").
    """
    loading = [key for key in options if key in LOADING]
    if loading or ":" in name:
        what = f"option {loading[0]}" if loading else f"name {name!r}"
        raise UserError(
            f"timm networks start from random weights here: the {what} loads a file. Give init.file=<file>."
        )
    try:
        return timm.create_model(name, pretrained=False, **options)
    except DataDependentOutputException:
        mode = active_fake_mode()
        with _disable_current_modes(), torch.device("meta"):
            body = timm.create_model(name, pretrained=False, **options)
        with mode:
            for part in body.modules():
                for kept in (part._parameters, part._buffers):
                    for key, value in kept.items():
                        if value is not None:
                            fake = torch.empty(value.shape, dtype=value.dtype)
                            kept[key] = nn.Parameter(fake) if kept is part._parameters else fake
        return body
