"""Random numbers are a function of (seed, step, name), not of history or of the number of processes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.diffusion.time import LogNormal
from common.runtime.training.seeding import Draws, derive_seed, seed_step


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 10**9), st.text(max_size=8))
def test_seeds_fit_a_generator_and_tell_their_parts_apart(seed, step, name):
    value = derive_seed(seed, step, name)
    assert value == derive_seed(seed, step, name) and 0 <= value < 2**63
    torch.Generator().manual_seed(value)
    assert value not in {derive_seed(seed + 1, step, name), derive_seed(seed, step + 1, name), derive_seed(step, name)}


def test_parts_do_not_run_together():
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_the_derivation_never_changes():
    """A run continued by a later version must draw the same numbers: this value is part of the checkpoint format."""
    assert derive_seed(0, 1, "eps") == 1549149422476676606


def test_ranks_share_out_the_joint_batch():
    joint = Draws(seed=3, step=7).normal("eps", torch.empty(6, 2, 2))
    parts = [Draws(seed=3, step=7, rank=rank, world_size=3).normal("eps", torch.empty(2, 2, 2)) for rank in range(3)]
    assert torch.equal(torch.cat(parts), joint)
    times = LogNormal(mean=-1.2, std=1.2)
    joint = Draws(seed=3, step=7).apply("t", times, 6)
    parts = [Draws(seed=3, step=7, rank=rank, world_size=2).apply("t", times, 3) for rank in range(2)]
    assert torch.equal(torch.cat(parts), joint) and joint.shape == (6,)


def test_names_steps_and_seeds_give_other_numbers():
    like = torch.empty(4)
    one = Draws(seed=0, step=0).normal("eps", like)
    for other in (Draws(seed=1, step=0).normal("eps", like), Draws(seed=0, step=1).normal("eps", like),
                  Draws(seed=0, step=0).normal("t", like)):  # fmt: skip
        assert not torch.equal(one, other)
    assert torch.equal(one, Draws(seed=0, step=0).normal("eps", like))


def test_local_generators_differ_per_rank_and_others_do_not():
    first, second = (Draws(seed=0, step=0, rank=rank, world_size=2) for rank in (0, 1))
    draw = lambda draws, **kw: torch.rand(3, generator=draws.generator("dropout", **kw))
    assert torch.equal(draw(first), draw(second))
    assert not torch.equal(draw(first, local=True), draw(second, local=True))


def test_drawing_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Draws(seed=0, step=0).normal("eps", torch.empty(10))
    assert torch.equal(torch.rand(3), expected)


def test_seed_step_sets_the_global_stream_by_step_and_rank():
    def stream(*parts):
        seed_step(*parts)
        return torch.rand(3)

    assert torch.equal(stream(0, 4, 0), stream(0, 4, 0))
    assert not torch.equal(stream(0, 4, 0), stream(0, 5, 0)) and not torch.equal(stream(0, 4, 0), stream(0, 4, 1))
