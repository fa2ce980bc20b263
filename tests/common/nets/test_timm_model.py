import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from common.nets.timm_model import create

KEPT = {"resnet10t": True, "convnextv2_atto": False}  # whether timm builds it on fake tensors by itself


@pytest.mark.parametrize("name", KEPT)
def test_networks_have_the_same_shapes_on_fake_tensors(name):
    real = create(name, num_classes=0)
    with FakeTensorMode():
        fake = create(name, num_classes=0).eval()
        out = fake(torch.empty(2, 3, 64, 64))
        assert isinstance(out, FakeTensor) and out.device.type == "cpu"
    state = fake.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in real.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    assert all(isinstance(v, FakeTensor) for v in state.values())
    assert [p.requires_grad for p in fake.parameters()] == [p.requires_grad for p in real.parameters()]
