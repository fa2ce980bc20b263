"""The small measurements of the Hamburger card: low-rank recovery, the step through a ham, the digit network."""

from functools import partial

import pytest
import torch

from common.errors import UserError
from common.ham.decompose import CD, NMF, VQ
from common.runtime.verbs.evaluate import SplitEvaluation
from projects.hamburger.hamnet import HamNet
from projects.hamburger.recovery import LowRankMatrices, Recovery, ScalarBread, relative_error, truncated
from projects.hamburger.toy import PlainBackbone
from tools.claim import load_claim

SMALL = dict(rows=16, columns=40, rank=3, test_count=5, eval_batch_size=2, batch_size=4)


def recovery(methods=None, rank=3, **options) -> Recovery:
    net = ScalarBread(channels=16, decomposition=NMF(rank=3, **options))
    return Recovery(
        net=net,
        methods=methods or {},
        rank=rank,
        columns=40,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        schedule=None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Matrices


def test_matrices_are_low_rank_non_negative_and_noisy_as_said():
    data = LowRankMatrices(rows=64, columns=256, rank=8, noise=0.2)
    batch = data.matrices("test", [0, 1])
    clean, noisy = batch["clean"], batch["noisy"]
    assert torch.linalg.matrix_rank(clean.double(), rtol=1e-5).tolist() == [8, 8]
    assert clean.min() >= 0 and noisy.min() >= 0
    noise = (noisy - clean)[clean > clean.mean() * 0.8]  # far from 0, where nothing is cut off
    assert noise.std() == pytest.approx(0.2 * clean.mean().item(), rel=0.05)
    assert torch.equal(
        LowRankMatrices(noise=0).matrices("test", [3])["noisy"], LowRankMatrices().matrices("test", [3])["clean"]
    )


def test_matrices_depend_on_seed_split_and_number():
    data = LowRankMatrices(**SMALL)
    assert torch.equal(data.matrices("train", [1, 2])["noisy"][1], data.matrices("train", [2])["noisy"][0])
    others = [
        data.matrices("test", [2]),
        data.matrices("train", [3]),
        LowRankMatrices(**SMALL, seed=1).matrices("train", [2]),
    ]
    assert all(not torch.equal(other["noisy"][0], data.matrices("train", [2])["noisy"][0]) for other in others)
    batches = iter(data.train_dataloader())
    assert [next(batches)["position"].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(batch["clean"]) for batch in data.eval_batches("test")] == [2, 2, 1]
    assert data.fingerprint("test") != LowRankMatrices(**{**SMALL, "rank": 2}).fingerprint("test")


# ---------------------------------------------------------------------------------------------------------------------
# Recovery


def test_errors_of_known_matrices():
    clean = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    assert relative_error(torch.zeros_like(clean), clean).item() == pytest.approx(1.0)
    assert relative_error(1.5 * clean, clean).item() == pytest.approx(0.5)
    torch.testing.assert_close(truncated(clean, 1), torch.tensor([[[0.0, 0.0], [0.0, 4.0]]]))


def test_evaluation_compares_all_methods_with_input_and_bound():
    data = LowRankMatrices(**SMALL)
    methods = {"nmf": NMF(rank=3), "long": NMF(rank=3, eval_steps=400), "cd": CD(rank=3), "vq": VQ(rank=6), "off": None}
    evaluation = SplitEvaluation(split="test", average="raw")
    errors = {name: record.value for name, record in evaluation.run(recovery(methods), data).items()}
    assert set(errors) == {f"{name}_error" for name in ("nmf", "long", "cd", "vq", "input", "svd")}
    assert next(iter(errors)) == "nmf_error"
    by_hand = data.matrices("test", list(range(5)))
    assert errors["input_error"] == pytest.approx(relative_error(by_hand["noisy"], by_hand["clean"]).mean().item())
    assert errors["long_error"] < errors["nmf_error"] and errors["svd_error"] < errors["input_error"]
    # the weights play no part, and neither does torch's own stream
    module = recovery(methods)
    module.net.upper.data.fill_(7.0)
    torch.manual_seed(99)
    again = {name: record.value for name, record in evaluation.run(module, data).items()}
    assert again == pytest.approx(errors)


def test_clean_matrices_are_recovered():
    data = LowRankMatrices(**{**SMALL, "noise": 0.0})
    module = recovery({"nmf": NMF(rank=3, eval_steps=2000)})
    errors = {name: record.value for name, record in SplitEvaluation(average="raw").run(module, data).items()}
    assert errors["input_error"] == 0 and errors["svd_error"] < 1e-5 and errors["nmf_error"] < 0.03


@pytest.mark.parametrize("gradient", ["one_step", "bptt"])
def test_a_training_step_reaches_both_scalars(gradient):
    module = recovery(gradient=gradient)
    batch = LowRankMatrices(**SMALL).matrices("train", [0, 1])
    torch.manual_seed(0)
    loss = module.training_step(batch, 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for p in module.parameters())
    shapes = {name: tuple(t.shape) for name, t in module.fake_batch(2).items()}
    assert shapes == {name: tuple(t.shape) for name, t in batch.items()}


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: LowRankMatrices(**SMALL | {"rank": 17}),
            "data.rank must be between 1 and the smaller side of 16 x 40, got 17",
        ),
        (lambda: LowRankMatrices(**SMALL | {"noise": -1.0}), "data.noise must be >= 0"),
        (lambda: LowRankMatrices(**SMALL | {"test_count": 0}), "data.test_count must be >= 1"),
        (lambda: LowRankMatrices(**SMALL | {"batch_size": 0}), "data.batch_size must be a whole number >= 1"),
        (lambda: recovery(rank=0), r"project\.rank must be >= 1, got 0"),
        (lambda: PlainBackbone(width=0), r"backbone\.width must be >= 1"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# The digit network and the claim


def test_five_convolutions_with_the_context_at_half_the_size():
    seen = []

    class Spy(torch.nn.Identity):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x

    net = HamNet(
        backbone=PlainBackbone(width=8),
        context=Spy(),
        num_classes=4,
        width=8,
        out_width=8,
        dropout=0.0,
        align_corners=False,
    )
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 4, 32, 32)
    assert seen == [(2, 8, 16, 16)]
    assert sum(isinstance(part, torch.nn.Conv2d) for part in net.modules()) == 5


def test_the_claim_is_declared_well():
    claim = load_claim("hamburger")
    assert len(claim["seeds"]) == 3
    used = {measure["run"] for measure in claim["measures"].values()}
    assert used == set(claim["runs"])
