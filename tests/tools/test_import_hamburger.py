"""tools.import_weights for Hamburger blocks: files named like the released ones become exports."""

import pytest
import torch

from common.weights.export import load
from tools import import_weights

HEAD = "decode_head.hamburger."


def run(capsys, *words) -> tuple[int, str, str]:
    code = import_weights.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def light_ham(width: int = 8) -> dict:
    return {
        "backbone.stem.weight": torch.rand(3, 3),
        f"{HEAD}ham_in.conv.weight": torch.rand(width, width, 1, 1),
        f"{HEAD}ham_in.conv.bias": torch.rand(width),
        f"{HEAD}ham_out.conv.weight": torch.rand(width, width, 1, 1),
        f"{HEAD}ham_out.gn.weight": torch.rand(width),
        f"{HEAD}ham_out.gn.bias": torch.rand(width),
    }


def hamnet(width: int = 8, rank: int = 3) -> dict:
    """V2+ of HamNet with stored bases, a cheese of half the channels and batch norm."""
    norm = {name: torch.rand(width // 2) for name in ("weight", "bias", "running_mean", "running_var")}
    return {
        "lower_bread.0.weight": torch.rand(width, 6, 1, 1),
        "lower_bread.0.bias": torch.rand(width),
        "ham.bases": torch.rand(2, width // 2, rank),
        "cheese.conv.weight": torch.rand(width // 2, width, 1, 1),
        **{f"cheese.bn.{name}": value for name, value in norm.items()},
        "cheese.bn.num_batches_tracked": torch.tensor(1),
        "upper_bread.weight": torch.rand(6, width // 2, 1, 1),
        "coef_shortcut": torch.ones(1),
        "coef_ham": torch.full((1,), 0.3),
    }


def test_the_block_of_a_light_head(tmp_path, capsys):
    tensors = light_ham()
    torch.save({"state_dict": tensors}, tmp_path / "light.pth")
    code, printed, err = run(
        capsys, "hamburger", tmp_path / "light.pth", "--key", HEAD, "--set", "norm_groups=4", "--set", "rank=5",
        "--set", "eval_seed=0",
    )  # fmt: skip
    assert code == 0, err
    assert "class     Hamburger ->" in printed
    made = load(tmp_path / "light")
    assert made.net.version == "v1" and made.net.ham.decomposition.rank == 5
    assert torch.equal(made.net.lower.weight, tensors[f"{HEAD}ham_in.conv.weight"])
    assert torch.equal(made.net.norm.bias, tensors[f"{HEAD}ham_out.gn.bias"])
    z = torch.rand(2, 8, 4, 4)
    assert torch.equal(made.net(z), load(tmp_path / "light").net(z)), "eval_seed: the same bases every time"


def test_a_block_of_hamnet_shows_version_sizes_and_bases(tmp_path, capsys):
    tensors = hamnet()
    torch.save(tensors, tmp_path / "hamnet.pth")
    code, _, err = run(capsys, "hamburger", tmp_path / "hamnet.pth", "--out", tmp_path / "block")
    assert code == 0, err
    net = load(tmp_path / "block").net
    assert (net.version, net.ham.groups, net.ham.decomposition.rank) == ("v2plus", 2, 3)
    assert torch.equal(net.ham.bases, tensors["ham.bases"]) and net(torch.rand(1, 6, 3, 3)).shape == (1, 6, 3, 3)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "'backbone.stem.weight' belongs to no released Hamburger block"),
        (["--key", "head."], "No weight of the checkpoint begins with 'head.'"),
        (["--key", HEAD, "--net", "dit_b4"], "leave --net"),
        (["--key", HEAD], "must be a multiple of 32 (norm_groups)"),
        (["--key", HEAD, "--set", "decomposition=NMV"], "NMV"),
    ],
)
def test_one_sentence(tmp_path, capsys, words, sentence):
    torch.save(light_ham(), tmp_path / "light.pth")
    code, _, err = run(capsys, "hamburger", tmp_path / "light.pth", *words)
    assert code == 2 and sentence in err
