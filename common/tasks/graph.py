"""Classes of nodes or of whole graphs with an implicit graph network (IGNN)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import limits
from common.errors import UserError
from common.files import write_text
from common.runtime.training.equilibrium import EquilibriumModule
from common.runtime.training.figures import new_figure, save_figure
from common.runtime.training.module import to_device

LOSSES = ("cross_entropy", "binary")
FAKE_NODES = 8  # nodes per graph of a fake batch


class GraphClassification(EquilibriumModule):
    """One class out of several, or any number of labels at once, for every node or for every graph.

    net    `common.nets.ignn`; `net.level` says whether a row of its logits is a node or a graph
    loss   "cross_entropy": labels are classes; evaluated by accuracy in percent
           "binary": labels are zeros and ones (rows, C), each a yes-no question; evaluated by micro-averaged F1 in
           percent, 2 TP / (2 TP + FP + FN) over all labels of all rows, a logit above 0 means yes (IGNN on PPI)
    optimizer, schedule, correction   see `EquilibriumModule`

    Only the rows that `batch["mask"]` marks count, in the loss as in the metrics. Raises UserError for another loss,
    and when the labels of the data do not fit it.
    """

    reads = "graphs"
    unit = "graphs"

    def __init__(
        self, *, net: nn.Module, loss: str, optimizer: Callable, schedule: Callable | None, correction: Callable | None
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule, correction=correction)
        self.loss = limits.choice("project.loss", loss, LOSSES, hint="Set project.loss=cross_entropy.")

    # Training and evaluation ------------------------------------------------------------------------------------------

    def _inputs(self, batch: dict) -> tuple:
        graphs = len(batch["label"]) if self.net.level == "graph" else 1  # a node network pools nothing
        return batch["x"], batch["incoming"], batch["outgoing"], batch["radius"], batch["owner"], graphs

    def outputs(self, batch: dict) -> list[Tensor]:
        """Logits (rows, C) of every state of the last layer; rows are nodes or graphs."""
        return self.net.outputs(*self._inputs(batch))

    def row_losses(self, logits: Tensor, batch: dict) -> Tensor:
        """Loss of every row (rows,), 0 where the mask is off: cross-entropy in nats, or the mean over the C labels."""
        label = batch["label"]
        binary = self.loss == "binary"
        if label.is_floating_point() != binary:
            raise UserError(
                f"project.loss={self.loss} does not fit the data, whose labels are "
                f"{'zeros and ones' if not binary else 'classes'}. "
                f"Set project.loss={LOSSES[0 if binary else 1]}."
            )
        if binary:
            losses = F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1)
        else:
            losses = F.cross_entropy(logits, label, reduction="none")
        return losses * batch["mask"]

    def criterion(self, output: Tensor, batch: dict) -> Tensor:
        """Mean loss over the rows that count."""
        return self.row_losses(output, batch).sum() / batch["mask"].sum()

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts: `loss`, and `accuracy` or `micro_f1` (percent; F1 as the ratio of its two sums)."""
        logits, mask = self.outputs(batch)[-1], batch["mask"]
        found = {"loss": (self.row_losses(logits, batch).sum(), mask.sum())}
        if self.loss == "binary":
            predicted, true = (logits > 0) & mask[:, None], (batch["label"] > 0) & mask[:, None]
            twice = 2 * (predicted & true).sum()
            found["micro_f1"] = (100 * twice, (predicted.sum() + true.sum()).clamp(min=1))
        else:
            found["accuracy"] = (100 * ((logits.argmax(1) == batch["label"]) & mask).sum(), mask.sum())
        return found

    # What the runtime asks for ----------------------------------------------------------------------------------------

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """`samples` graphs of 8 nodes. The links are dense: a sparse product has no FLOP formula to count with."""
        nodes = FAKE_NODES * samples
        rows = nodes if self.net.level == "node" else samples
        if self.loss == "binary":
            label = torch.zeros(rows, self.net.classes)
        else:
            label = torch.zeros(rows, dtype=torch.int64)
        return {
            "label": label,
            "mask": torch.ones(rows, dtype=torch.bool),
            "x": torch.zeros(nodes, self.net.in_features),
            "incoming": torch.zeros(nodes, nodes),
            "outgoing": torch.zeros(nodes, nodes),
            "radius": torch.ones(()),
            "owner": torch.zeros(nodes, dtype=torch.int64),
        }

    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """`states.png` and `classes.txt` of the split "test".

        The picture: at most `samples` rows drawn by `seed`, their states before the classifier on their two principal
        axes, coloured by class (labels: by their number), a cross where the class is wrong (labels: where all are).
        The table: every class with its rows, how many were predicted right, and how many were predicted as that class.
        """
        states, predicted, true = self._answers(data)
        order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:samples]
        if self.loss == "binary":
            right, colour, meaning = (predicted & true).any(1) | ~true.any(1), true.sum(1), "labels that hold"
            text = label_table(predicted, true)
        else:
            right, colour, meaning = predicted == true, true, "class"
            text = class_table(F.one_hot(true, self.net.classes).T @ F.one_hot(predicted, self.net.classes))
        picture, table = Path(folder) / "states.png", Path(folder) / "classes.txt"
        draw_states(picture, principal_axes(states)[order], colour[order], right[order], meaning)
        write_text(table, text)
        return [picture, table]

    def _answers(self, data) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows of "test" that count: states (R, m), predictions and truth ((R,) or (R, C) bool), on the CPU."""
        parts = []
        for batch in data.eval_batches("test"):
            batch = to_device(batch, data, self.device)
            logits = self.outputs(batch)[-1]
            states = self.net.embed(*self._inputs(batch))
            if self.loss == "binary":
                predicted, true = logits > 0, batch["label"] > 0
            else:
                predicted, true = logits.argmax(1), batch["label"]
            parts.append([part[batch["mask"]].cpu() for part in (states, predicted, true)])
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def principal_axes(states: Tensor) -> Tensor:
    """States (R, m) on their two principal axes (R, 2), each axis turned so that its largest entry is positive."""
    centred = (states - states.mean(0)).double()
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    places = centred @ (axes * signs).T
    return F.pad(places, (0, 2 - places.shape[1])).float()


def draw_states(path: Path, places: Tensor, colour: Tensor, right: Tensor, meaning: str) -> Path:
    """A scatter plot of places (R, 2) coloured by the numbers `colour` (R,); dots where `right` (R,), else crosses."""
    figure, axes = new_figure()
    top = int(colour.max()) if len(colour) else 0
    for shown, marker, size in ((right, "o", 14), (~right, "x", 22)):
        x, y = places[shown].T.tolist() if bool(shown.any()) else ([], [])
        drawn = axes.scatter(
            x, y, c=colour[shown].tolist(), marker=marker, s=size, linewidths=1.0,
            cmap="tab10" if top < 10 else "viridis", vmin=-0.5, vmax=max(top, 9 if top < 10 else top) + 0.5,
        )  # fmt: skip
    axes.set_xlabel("first principal axis of the states")
    axes.set_ylabel("second")
    axes.set_title(f"dot: right, cross: wrong ({100 * right.float().mean():.1f} % right)", fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, label=meaning)
    if top < 10:
        bar.set_ticks(list(range(top + 1)))
        bar.ax.set_ylim(-0.5, top + 0.5)
    save_figure(figure, path)
    return path


def class_table(hits: Tensor) -> str:
    """Text: the confusion matrix `hits` (C, C), rows the true class, columns the predicted; accuracies in percent."""
    size = len(hits)
    width = max(5, len(str(int(hits.max()))) + 1)
    lines = ["true \\ predicted" + "".join(f"{name:>{width}}" for name in range(size)) + "     right"]
    for name, row in enumerate(hits.tolist()):
        share = 100 * row[name] / max(sum(row), 1)
        lines.append(f"{name:>16}" + "".join(f"{count:>{width}}" for count in row) + f"{share:>8.1f} %")
    total = int(hits.sum())
    lines.append(f"all {total} rows: {100 * int(hits.trace()) / max(total, 1):.2f} % right")
    return "\n".join(lines) + "\n"


def label_table(predicted: Tensor, true: Tensor) -> str:
    """Text: precision, recall and F1 in percent of every label of predictions and truth (R, C) bool, then micro."""
    both, yes, there = (part.sum(0) for part in (predicted & true, predicted, true))
    lines = ["label   rows  predicted  precision  recall      F1"]
    rows = [*zip(range(len(both)), both.tolist(), yes.tolist(), there.tolist())]
    rows.append(("micro", int(both.sum()), int(yes.sum()), int(there.sum())))
    for name, hit, answered, wanted in rows:
        precision, recall = 100 * hit / max(answered, 1), 100 * hit / max(wanted, 1)
        f1 = 200 * hit / max(answered + wanted, 1)
        lines.append(f"{name:>5} {wanted:>6} {answered:>10} {precision:>10.1f} {recall:>7.1f} {f1:>7.2f}")
    return "\n".join(lines) + "\n"
