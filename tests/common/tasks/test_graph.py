"""The graph task: masks, losses and metrics by hand, its pictures, and a run that learns what two hops cannot."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from common.data.graph.module import GraphDataModule
from common.deq.correction import Correction
from common.deq.grads import Backprop, Implicit, Unrolled
from common.deq.layer import DEQ
from common.deq.solvers import Picard
from common.errors import UserError
from common.nets.ignn import IgnnGraph, IgnnNode, IgnnSkip
from common.runtime.cli.launch import register_resolvers
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.training.module import evaluating
from common.runtime.verbs import fit
from common.tasks.graph import GraphClassification, class_table, label_table, principal_axes
from projects.torchdeq.chains import Chains


def module(net=None, loss: str = "cross_entropy", **options) -> GraphClassification:
    torch.manual_seed(0)
    net = net or IgnnNode(4, 3, DEQ(solver=Picard(max_iter=20)), hidden=5, dropout=0.0)
    settings = {"optimizer": torch.optim.Adam, "schedule": None, "correction": None}
    return GraphClassification(net=net, loss=loss, **settings | options)


def batch(label: Tensor, mask: list[bool], nodes: int | None = None) -> dict:
    nodes = nodes or len(label)
    a = torch.eye(nodes) + torch.diag(torch.ones(nodes - 1), 1)
    a = a / 2
    return {
        "label": label, "mask": torch.tensor(mask), "x": torch.randn(nodes, 4), "incoming": a.T, "outgoing": a,
        "radius": torch.tensor(1.0), "owner": torch.arange(nodes) % max(len(label), 1),
    }  # fmt: skip


def fixed(task: GraphClassification, logits: Tensor, monkeypatch) -> GraphClassification:
    monkeypatch.setattr(task, "outputs", lambda batch: [logits])
    return task


def test_loss_and_accuracy_count_masked_rows_only(monkeypatch):
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [5, 0, 0]])
    data = batch(torch.tensor([0, 0, 2, 1]), [True, True, True, False])
    task = fixed(module(), logits, monkeypatch)
    assert task.criterion(logits, data) == pytest.approx(F.cross_entropy(logits[:3], data["label"][:3]).item())
    found = {name: float(total) / float(count) for name, (total, count) in task.evaluation_step(data).items()}
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[:3], data["label"][:3]).item())


def test_micro_f1_is_that_of_scikit_learn_over_several_batches(monkeypatch):
    from sklearn.metrics import f1_score

    generator = torch.Generator().manual_seed(3)
    total = count = 0
    predicted, true = [], []
    for rows in (5, 8):
        logits = torch.randn(rows, 6, generator=generator)
        label = (torch.rand(rows, 6, generator=generator) < 0.3).float()
        data = batch(label, [k % 4 != 0 for k in range(rows)])
        parts = fixed(module(loss="binary"), logits, monkeypatch).evaluation_step(data)["micro_f1"]
        total, count = total + float(parts[0]), count + float(parts[1])
        predicted.append((logits > 0)[data["mask"]])
        true.append((label > 0)[data["mask"]])
    expected = f1_score(torch.cat(true).numpy(), torch.cat(predicted).numpy(), average="micro")
    assert total / count == pytest.approx(100 * expected)


def test_micro_f1_without_any_answer_is_zero(monkeypatch):
    data = batch(torch.zeros(2, 3), [True, True])
    total, count = fixed(module(loss="binary"), -torch.ones(2, 3), monkeypatch).evaluation_step(data)["micro_f1"]
    assert float(total) / float(count) == 0


def test_binary_loss_is_the_mean_over_labels():
    logits, label = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    data = batch(label, [True, False, True, True])
    rows = [0, 2, 3]
    expected = F.binary_cross_entropy_with_logits(logits[rows], label[rows])
    torch.testing.assert_close(module(loss="binary").criterion(logits, data), expected)


def test_every_state_is_trained_with_its_weight():
    deq = DEQ(solver=Picard(max_iter=9), grad=Unrolled(steps=2), states=3)
    net = IgnnNode(4, 3, deq, hidden=5, dropout=0.0)
    task = module(net, correction=Correction(weight="const"))
    data = batch(torch.tensor([0, 1, 2]), [True, True, True])
    loss = task.training_step(data, 0)
    with torch.enable_grad():
        losses = [task.criterion(output, data) for output in task.outputs(data)]
    assert len(losses) == 3
    torch.testing.assert_close(loss, sum(losses))


@pytest.mark.parametrize(
    "kind, loss", [(IgnnNode, "cross_entropy"), (IgnnSkip, "binary"), (IgnnGraph, "cross_entropy")]
)
def test_fake_step(kind, loss):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        task = module(kind(4, 3, DEQ(solver=Picard(max_iter=4)), hidden=4), loss=loss).train()
        task.training_step(task.fake_batch(2), 0).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in task.net.parameters())


def test_refusals():
    with pytest.raises(UserError, match=r"project\.loss must be one of .*'crossentropy'.*Closest: cross_entropy"):
        module(loss="crossentropy")
    with pytest.raises(UserError, match=r"project\.loss=binary does not fit .*Set project\.loss=cross_entropy"):
        module(loss="binary").criterion(torch.zeros(2, 3), batch(torch.tensor([0, 1]), [True, True]))
    with pytest.raises(UserError, match=r"whose labels are zeros and ones\. Set project\.loss=binary"):
        module().criterion(torch.zeros(2, 3), batch(torch.zeros(2, 3), [True, True]))


def test_principal_axes_order_the_directions_by_spread_and_keep_distances():
    states = torch.randn(50, 2) @ torch.tensor([[5.0, 0], [0, 1]])
    wide = F.pad(states, (0, 4))[:, torch.randperm(6)].double()
    places = principal_axes(wide)
    assert places[:, 0].var() > places[:, 1].var()
    torch.testing.assert_close(
        torch.cdist(places.double(), places.double()), torch.cdist(wide, wide), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(principal_axes(wide), principal_axes(wide.clone()))
    assert principal_axes(torch.randn(5, 1)).shape == (5, 2)


def test_tables_say_the_numbers():
    text = class_table(torch.tensor([[8, 2], [1, 9]]))
    assert "80.0 %" in text and "90.0 %" in text and "all 20 rows: 85.00 % right" in text
    predicted, true = torch.tensor([[1, 0], [1, 1], [0, 0]]).bool(), torch.tensor([[1, 1], [0, 1], [0, 0]]).bool()
    lines = label_table(predicted, true).splitlines()
    assert lines[1].split() == ["0", "1", "2", "50.0", "100.0", "66.67"]
    assert lines[-1].split() == ["micro", "3", "3", "66.7", "66.7", "66.67"]


def chains_task(deq: DEQ) -> tuple[GraphClassification, GraphDataModule]:
    """A small chain problem, trained for 60 steps."""
    data = GraphDataModule(
        source=Chains(chains=6, length=6, features=4, train_nodes=20, val_nodes=1, test_nodes=50, seed=0)
    )
    torch.manual_seed(0)
    task = module(IgnnNode(4, 2, deq, hidden=8, dropout=0.0)).train()
    optimizer = torch.optim.Adam(task.parameters(), lr=0.03)
    stream = iter(data.train_dataloader())
    for number in range(60):
        optimizer.zero_grad()
        task.training_step(next(stream), number).backward()
        optimizer.step()
    return task, data


def accuracy(task: GraphClassification, data: GraphDataModule) -> float:
    with evaluating(task):
        total, count = task.evaluation_step(next(iter(data.eval_batches("test"))))["accuracy"]
    return float(total) / float(count)


def test_the_equilibrium_hears_what_two_hops_cannot_and_shows_it(tmp_path):
    solver = Picard(max_iter=100, tol=1e-6)
    task, data = chains_task(DEQ(solver=solver, grad=Implicit(solver=solver)))
    assert accuracy(task, data) == 100
    near, _ = chains_task(DEQ(solver=Picard(max_iter=2, stop="never"), grad=Backprop()))
    assert 40 < accuracy(near, data) < 90  # three of six nodes, and half of the others by chance
    with evaluating(task):
        picture, table = task.show(data, tmp_path, samples=20, seed=0)
    assert picture.read_bytes()[:4] == b"\x89PNG" and "all 50 rows: 100.00 % right" in table.read_text()


class ManyLabels(Chains):
    """The chains with their class as two yes-no labels."""

    def load(self, split):
        (graph,) = super().load(split)
        return [replace(graph, label=np.eye(2, dtype=np.float32)[graph.label])]


def test_labels_at_once_are_shown_too(tmp_path):
    data = GraphDataModule(source=ManyLabels(features=4))
    task = module(IgnnSkip(4, 2, DEQ(solver=Picard(max_iter=5)), hidden=2), loss="binary")
    with evaluating(task):
        picture, table = task.show(data, tmp_path, samples=9, seed=0)
    assert picture.is_file() and table.read_text().splitlines()[-1].startswith("micro")


def run(repo, folder, *overrides: str) -> dict:
    """The newest checkpoint of a run of torchdeq_ignn_tiny in `folder`."""
    register_resolvers()
    with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[
            "+experiment=torchdeq_ignn_tiny", "run.experiment=tiny", "run.name=x", f"run.dir={folder}",
            "evaluate.every_n_steps=2", "callbacks.progress=null", "callbacks.pictures=null", *overrides,
        ])  # fmt: skip
    fit.fit_task(cfg)
    return torch.load(list_checkpoints(folder / "checkpoints")[0], weights_only=True)


def test_a_run_stopped_and_continued_ends_as_the_one_that_ran_through(repo, tmp_path):
    straight = run(repo, tmp_path / "a", "trainer.max_steps=7")
    run(repo, tmp_path / "b", "trainer.max_steps=4")
    resumed = run(repo, tmp_path / "b", "trainer.max_steps=7")
    assert straight["global_step"] == resumed["global_step"] == 7
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
