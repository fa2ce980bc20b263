"""Where weights come from, and what does not fit."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from common.diffusion.precond import ECMPrecond, EDMPrecond
from common.errors import UserError
from common.nets.mlp import MLPDenoiser
from common.runtime.training.checkpoint import SafeCheckpointIO, list_checkpoints
from common.runtime.training.generative import GenerativeModule
from common.runtime.training.weights import find_init, initialise, network_tensors, trained_weights


def network(precond=EDMPrecond, *, augment_dim: int = 0, width: int = 8, seed: int = 0, **options):
    torch.manual_seed(seed)
    return precond(
        model=MLPDenoiser(
            img_resolution=4, in_channels=1, out_channels=1, width=width, depth=1, augment_dim=augment_dim
        ),
        **options,
    )  # fmt: skip


def same(one, two) -> bool:
    theirs = dict(two.named_parameters())
    return all(torch.equal(p, theirs[n]) for n, p in one.named_parameters())


@pytest.fixture
def file(tmp_path):
    """file(net) -> its weights as safetensors."""

    def write(net):
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


def test_edm_with_augmentation_starts_ect_without(file):
    teacher, student = network(augment_dim=9), network(ECMPrecond, seed=1)
    assert not same(student, teacher)
    report = initialise(student, file(teacher))
    assert same(student, teacher) and report.skipped == ("model.map_augment.weight",)


def test_the_opposite_direction_is_refused_and_changes_nothing(file):
    teacher, student = network(), network(ECMPrecond, augment_dim=9, seed=1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit ECMPrecond: 1 missing.*map_augment.weight"):
        initialise(student, file(teacher))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_another_width_is_refused_with_both_shapes(file):
    with pytest.raises(UserError, match=r"\(16, .* in the file, \(8, .* in the network"):
        initialise(network(), file(network(width=16)))


@pytest.fixture
def checkpoint(tmp_path):
    raw, average = network(seed=1), network(seed=2)
    module = GenerativeModule(net=raw, optimizer=partial(torch.optim.Adam))
    named = {n: dict(average.named_parameters())[n.removeprefix("net.")] for n, _ in module.named_parameters()}
    path = tmp_path / "run/checkpoints/step-00000007.ckpt"
    SafeCheckpointIO().save_checkpoint(
        {"state_dict": module.state_dict(), "averages": {"ema": {n: p.detach() for n, p in named.items()}},
         "global_step": 7}, path,
    )  # fmt: skip
    return path, raw, average


def test_a_checkpoint_gives_the_average_asked_for(checkpoint):
    path, raw, average = checkpoint
    for name, expected in (("raw", raw), ("ema", average), (None, average)):
        net = network()
        initialise(net, path, name)
        assert same(net, expected), name
    with pytest.raises(UserError, match=r"'em' is not in this run. Closest: ema"):
        network_tensors(path, "em")


def test_the_newest_checkpoint_of_a_run_else_the_init_file(checkpoint, file, tmp_path):
    path, _, average = checkpoint
    module = GenerativeModule(net=network(), optimizer=partial(torch.optim.Adam))
    options = dict(init_file=None, average="ema")
    assert trained_weights(module, tmp_path / "run", resume="auto", **options) == {
        "file": str(path), "step": 7, "average": "ema"}  # fmt: skip
    assert same(module.net, average)
    assert trained_weights(module, tmp_path / "other", resume=str(path), **options)["step"] == 7
    weights = file(network(seed=5))
    source = trained_weights(module, tmp_path / "other", resume="auto", init_file=str(weights), average="ema")
    assert source == {"file": str(weights), "step": 0, "average": "file"} and same(module.net, network(seed=5))
    with pytest.raises(UserError, match=r"No trained weights in .*other/checkpoints. Trained runs.*run \(step 7\)\."):
        trained_weights(module, tmp_path / "other", resume="auto", **options)


def test_a_missing_file_is_named_with_the_fix(tmp_path):
    assert find_init(None, None) is None and find_init("", None) is None
    with pytest.raises(UserError, match=r"Initial weights .*nowhere do not exist \(init.file\). Run make teacher"):
        find_init(str(tmp_path / "nowhere"), "Run make teacher")
    with pytest.raises(UserError, match=r"init.file=<model.safetensors"):
        find_init(str(tmp_path / "nowhere"), None)
    with pytest.raises(UserError, match=r"model.safetensors do not exist"):
        find_init(str(tmp_path), None)  # a folder that is no export


def test_an_edm2_teacher_goes_by_our_names_without_its_uncertainty_head(file, tmp_path):
    teacher = network(seed=3)
    tensors = {k.replace("model.", "unet.", 1): v for k, v in teacher.state_dict().items()}
    tensors["logvar_linear.weight"] = torch.zeros(1, 4)
    save_file(tensors, tmp_path / "edm2.safetensors")
    student = network(ECMPrecond)
    initialise(student, tmp_path / "edm2.safetensors")
    assert same(student, teacher)


def test_a_real_run_gives_its_network(trained):
    path = list_checkpoints(trained / "checkpoints")[0]
    tensors = network_tensors(path, "half")
    assert all(not name.startswith("net.") for name in tensors)
    stored = torch.load(path, weights_only=True)["averages"]["half"]
    assert torch.equal(tensors["model.layer_in.weight"], stored["net.model.layer_in.weight"])


def test_a_network_may_complete_the_tensors_of_a_file(tmp_path):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

        def prepare_weights(self, tensors):
            return {**self.state_dict(), **{f"part.{name}": tensor for name, tensor in tensors.items()}}

    net, part = Whole(), torch.nn.Linear(2, 2)
    head = net.head.weight.clone()
    torch.save(part.state_dict(), tmp_path / "part.pth")
    initialise(net, tmp_path / "part.pth")
    assert torch.equal(net.part.weight, part.weight) and torch.equal(net.head.weight, head)
