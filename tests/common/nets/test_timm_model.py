import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from common.nets.timm_model import create

NAMES = ("resnet10t", "convnextv2_atto")  # the second reads numbers from tensors while it is built


@pytest.mark.parametrize("name", NAMES)
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
