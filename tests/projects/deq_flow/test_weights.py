"""Key maps; raft/test_network.py shows that the released networks' weights give their answers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrizations
from torchvision.models.optical_flow import raft_large, raft_small

from common.deq.grads import Backprop
from common.deq.layer import DEQ
from common.deq.layers import apply_norm
from common.deq.solvers import Picard
from common.errors import UserError
from projects.deq_flow.raft.network import FlowEquilibrium
from projects.deq_flow.weights import RELEASES, load_official, matched_norm, official_state

RECORD = json.loads((Path(__file__).parents[2] / "fixtures" / "nets" / "deq_flow_zoo.json").read_text())
TINY = dict(
    feature_channels=64, hidden_channels=32, corr_channels=(64, 48), flow_channels=(32, 16), motion_channels=32,
    head_channels=64,
)  # fmt: skip
WEIGHT_NORM = partial(apply_norm, kind="weight")


def tiny(case="plain", norm=WEIGHT_NORM):
    return FlowEquilibrium(deq=DEQ(solver=Picard(max_iter=1)), attention=case == "gma", norm=norm, **TINY)


def released(case, seed=0):
    torch.manual_seed(seed)
    return {name: torch.rand(shape) for name, shape in RECORD["cases"][case]["tensors"].items()}


@pytest.mark.parametrize("case", ["plain", "gma"])
def test_every_released_tensor_has_its_place(case):
    want = {name: value.shape for name, value in tiny(case).state_dict().items() if "num_batches" not in name}
    assert {name: value.shape for name, value in official_state(released(case)).items()} == want


def test_gates_are_put_together_in_the_order_update_reset_new():
    state = official_state(tensors := released("plain"))
    parts = [tensors[f"update_block.gru.conv{gate}2.weight_v"] for gate in "zrq"]
    assert torch.equal(state["cell.gru.columns.parametrizations.weight.original1"], torch.cat(parts))


def saved(tmp_path, tensors, name="flow.pth"):
    torch.save(tensors, tmp_path / name)
    return tmp_path / name


def complete(tensors):
    """With what the fixture leaves out: counters, second names, wrappers."""
    full = dict(tensors)
    for name in tensors:
        if name.endswith("running_var"):
            full[name.replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    for name, value in list(full.items()):
        full[name.replace("downsample.1.", "norm3.")] = value
    return {f"module.{name}": value for name, value in full.items()}


def test_a_file_of_a_parallel_training_loads(tmp_path):
    net = tiny("gma")
    report = load_official(net, saved(tmp_path, complete(released("gma"))))
    assert report.loaded == len(net.state_dict()) and not report.missing
    assert torch.equal(net.state_dict()["attention.query_key.weight"], released("gma")["attn.to_qk.weight"])


def test_the_first_versions_and_rafts_mask_and_gmas_names_load_too():
    tensors = {name: value for name, value in released("gma").items()}
    other = {}
    for name, value in tensors.items():
        name = f"update_block.{name}" if name.startswith("mask.") else name
        name = name.replace("update_block.gma.", "update_block.aggregator.").replace("attn.", "att.")
        other[name] = value
    other["att.pos_emb.rel_ind"] = torch.zeros(2)
    ours, theirs = official_state(tensors), official_state(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_with_and_without_normalisation_go_either_way(tmp_path):
    path = saved(tmp_path, complete(released("plain")))
    normed, bare = tiny(), tiny(norm=None)
    load_official(normed, path)
    load_official(bare, path)
    torch.testing.assert_close(bare.cell.gru.rows.weight, normed.cell.gru.rows.weight)
    state = matched_norm(bare.state_dict(), set(normed.state_dict()))
    assert state.keys() == normed.state_dict().keys()
    again = tiny()
    again.load_state_dict(state)
    torch.testing.assert_close(again.cell.head.conv2.weight, normed.cell.head.conv2.weight)


def test_torchs_own_names_of_a_weight_norm_load():
    conv = parametrizations.weight_norm(torch.nn.Conv2d(2, 3, 3, bias=False))
    named = {f"update_block.flow_head.conv2.{name}": value for name, value in conv.state_dict().items()}
    assert list(official_state(named)) == [f"cell.head.conv2.parametrizations.weight.original{i}" for i in (0, 1)]


@pytest.fixture(scope="module")
def torchvisions():
    torch.manual_seed(0)
    net = raft_large(weights=None).eval()
    with torch.no_grad():
        for value in [*net.parameters(), *net.buffers()]:
            if value.ndim == 1:  # biases and the norms' numbers, at 0 or 1 otherwise
                value.add_(0.1 * torch.rand_like(value))
    return net


def test_the_baseline_equals_torchvisions_raft(torchvisions, tmp_path):
    deq = DEQ(solver=Picard(max_iter=3, stop="never"), grad=Backprop(), states=3)
    net = FlowEquilibrium(deq=deq, hidden_init="tanh_context")
    load_official(net, saved(tmp_path, torchvisions.state_dict(), "raft_large_C_T_V2-1bb1363a.pth"))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in torchvisions.parameters())
    first, second = torch.rand(2, 1, 3, 128, 128) * 2 - 1
    net.train()
    net.freeze_batch_norm()
    flows = net.outputs(first, second)
    with torch.no_grad():
        expected = torchvisions(first, second, num_flow_updates=3)
    assert len(flows) == 3 and expected[-1].abs().max() > 1
    for ours, theirs in zip(flows, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-4)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"small\.pth: this file holds RAFT's small network"):
        load_official(tiny(), saved(tmp_path, raft_small(weights=None).state_dict(), "small.pth"))
    with pytest.raises(UserError, match=r"encoder\.conv\.weight is no tensor of RAFT"):
        official_state({"encoder.conv.weight": torch.zeros(1)})
    cut = {name: value for name, value in released("plain").items() if "convr1" not in name}
    with pytest.raises(UserError, match=r"cell\.gru\.rows\.bias needs the gates z, r and q, found q, z"):
        official_state(cut)
    with pytest.raises(UserError, match=r"flow\.pth does not fit FlowEquilibrium"):
        load_official(tiny(), saved(tmp_path, complete(released("gma"))))


def test_every_release_is_complete():
    for name, release in RELEASES.items():
        assert name.startswith(release.family) and release.file.endswith(".pth")
        assert release.url.startswith("https://") and release.published and release.licence
