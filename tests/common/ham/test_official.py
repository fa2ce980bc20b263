"""Names of released weights; values are tested in test_burger.py."""

import pytest
import torch

from common.errors import UserError
from common.ham.burger import Hamburger
from common.ham.decompose import CD
from common.ham.official import from_official

BLOCK = "decode_head.hamburger."


def test_names_of_the_light_model_and_a_prefix():
    state = {BLOCK + name: torch.zeros(1) for name in ("ham_in.conv.weight", "ham_in.conv.bias", "ham_out.conv.weight")}
    state |= {BLOCK + "ham_out.gn.weight": torch.zeros(1), BLOCK + "ham_out.gn.bias": torch.zeros(1)}
    state["backbone.conv.weight"] = torch.zeros(1)
    ours = Hamburger(32, 32, version="v1", norm="gn").state_dict()
    assert from_official(state, BLOCK).keys() == ours.keys()


@pytest.mark.parametrize("bread", ["lower_bread.0.", "lower_bread."])
def test_stored_bases_and_both_lower_breads(bread):
    state = {bread + "weight": torch.ones(2), "ham_1.bases": torch.ones(3), "ham_2.bases": torch.ones(4)}
    assert {name: len(v) for name, v in from_official(state).items()} == {
        "lower.weight": 2,
        "ham.bases": 3,
        "ham_channel.bases": 4,
    }
    single = Hamburger(4, 4, ham=CD(rank=2), bases="online").state_dict()
    assert "ham.bases" in single and from_official({"ham.bases": single["ham.bases"]}).keys() == {"ham.bases"}


def test_unknown_names_are_one_sentence():
    with pytest.raises(UserError, match=r"'squeeze.conv.weight' belongs to no released Hamburger block"):
        from_official({"squeeze.conv.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"No weight of the checkpoint begins with 'burger'. Names begin with: ham."):
        from_official({"ham.bases": torch.zeros(1)}, "burger")
