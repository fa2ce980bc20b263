"""The module every paper starts from, and the small helpers of the runtime around it."""

import torch
from torch import nn

from common.runtime.training.callbacks import unit_of
from common.runtime.training.generative import GenerativeModule
from common.runtime.training.module import ResearchModule, evaluating, leaves, modes_of, restore_modes, to_device


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 2)

    @property
    def raw(self):
        return self.inner


def module(net) -> ResearchModule:
    return ResearchModule(net=net, optimizer=torch.optim.SGD)


def test_raw_is_the_wrapped_network_or_the_network_itself():
    assert module(net := Wrapper()).raw is net.inner
    assert module(net := nn.Linear(1, 1)).raw is net


def test_what_a_paper_need_not_say(tmp_path):
    made = module(nn.Linear(1, 1))
    assert made.show(None, tmp_path, samples=1, seed=0) == made.preview(None, tmp_path, samples=1, seed=0) == []
    assert made.finalise({"loss": 1.0}) == {"loss": 1.0} and made.refresh() is None
    assert unit_of(made) == "samples" and unit_of(GenerativeModule) == "images"
    assert not made.uses_sampler and GenerativeModule.uses_sampler


def test_evaluating_restores_every_submodules_own_mode():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    net[1][0].eval()
    with evaluating(net):
        assert not any(part.training for part in net.modules()) and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert [part.training for part in net.modules()] == [True, True, True, False, True]
    modes = modes_of(net)
    net.eval()
    restore_modes(modes)
    assert [part.training for part in net.modules()] == [True, True, True, False, True]


def test_modes_are_put_back_through_train():
    """Modules that drop what they hold when the mode changes must hear of it."""
    heard = []

    class Listens(nn.Module):
        def train(self, mode=True):
            heard.append(mode)
            return super().train(mode)

    net = nn.Sequential(Listens())
    with evaluating(net):
        pass
    assert heard == [False, True]


def test_a_batch_takes_the_hooks_of_its_data_module():
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"x": batch["x"].float() / 2}

    batch = to_device({"x": torch.tensor([2, 4])}, Data(), "cpu")
    assert batch["x"].tolist() == [1.0, 2.0]


def test_leaves_of_a_batch():
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(leaf) for leaf in leaves({"a": one, "b": [two, (three, "word")], "c": 4})] == [1, 2, 3]
