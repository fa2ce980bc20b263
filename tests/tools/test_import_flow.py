"""tools.import_weights for optical flow: files named and made like the released ones become exports of our networks."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.models.optical_flow import raft_large, raft_small

from common.weights.export import load
from projects.deq_flow.weights import RELEASES, STEPS, official_state
from tools import import_weights

RECORD = json.loads((Path(__file__).parents[1] / "fixtures" / "nets" / "deq_flow_zoo.json").read_text())


def run(capsys, *words) -> tuple[int, str, str]:
    code = import_weights.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_released_file_keeps_every_tensor(tmp_path, capsys):
    tensors = {f"module.{name}": torch.rand(shape) for name, shape in RECORD["cases"]["plain"]["tensors"].items()}
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(3) for name in tensors if "_var" in name
    }
    torch.save({**tensors, **counters}, tmp_path / "own.pth")
    code, printed, err = run(capsys, "flow", tmp_path / "own.pth", "--net", "deq_flow_tiny")
    assert code == 0, err
    assert "size      2,490,976 parameters" in printed and "class     FlowEquilibrium ->" in printed
    made = load(tmp_path / "own")
    assert made.sampler is None and made.config["network"]["hidden_init"] == "zero"
    kept = made.net.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in official_state(tensors).items())


def test_a_released_name_says_its_size_and_raft_its_start(tmp_path, capsys):
    file = tmp_path / "raft_large_C_T_V2-1bb1363a.pth"
    torch.save(raft_large(weights=None).state_dict(), file)
    code, _, err = run(capsys, "flow", file, "--out", tmp_path / "raft", "--set", "norm=null")
    assert code == 0, err
    made = load(tmp_path / "raft")
    assert made.config["network"]["hidden_init"] == "tanh_context" and made.meta["published"]["kitti_epe"] == 4.5118
    assert sum(p.numel() for p in made.net.parameters()) == 5_257_536
    solver = made.net.deq.eval_solver
    assert (type(solver).__name__, solver.max_iter, solver.stop) == ("Picard", 32, "never")
    assert STEPS.keys() == RELEASES.keys() and STEPS["deq_flow_h_3x"] == 120
    for name, file in (
        ("deq_flow_huge", "deq-flow-H-things-test-3x.pth"),
        ("deq_flow_base", "deq-flow-B-things-1.pth"),
    ):
        tree = import_weights.network_of(
            import_weights.argparse.Namespace(family="flow", file=Path(file), net=None, set=[])
        )
        assert tree["motion_channels"] == {"deq_flow_huge": 256, "deq_flow_base": 128}[name]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "is of no released name: say its network with --net, one of deq_flow_base"),
        (["--net", "dit_b4"], "say its network with --net, one of deq_flow_base"),
        (["--net", "deq_flow_tiny"], "RAFT's small network"),
        (["--net", "deq_flow_tiny", "--noise-scale", "2"], "leave --key, --noise-scale, --omega out"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, capsys):
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "own.pth")
    code, _, err = run(capsys, "flow", tmp_path / "own.pth", *words)
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "own").exists()
