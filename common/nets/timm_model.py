"""timm's networks, also on fake tensors: a run can be planned without building them."""

import timm
import torch
from torch import nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import _disable_current_modes


def create(name: str, **options) -> nn.Module:
    """`timm.create_model(name, **options)` without pretrained weights; inside a FakeTensorMode, its parameters fake.

    Some networks read numbers from tensors while they are built, which fake ones do not have: those are built without
    storage outside the mode, and their parameters exchanged.
    """
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
