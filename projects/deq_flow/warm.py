"""What starting from the equilibrium of the frame before saves: evaluations along sequences of frames."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from common.data.flow.frames import Frames
from common.data.flow.photographs import BUNDLED, BUNDLED_HELD_OUT, read_photograph
from common.data.images.module import to_unit_range
from common.data.source import check_split
from common.errors import UserError, nearest
from projects.deq_flow.module import DeqFlow
from projects.deq_flow.video import Follower


class WarmStart(DeqFlow):
    """DEQ-Flow measured along sequences of frames instead of on pairs with a true flow; not to be trained.

    Metrics of a sequence, over its pairs but the first (which starts from zero in every way): evaluations until the
    relative residual is at most the solver's tolerance, `zero_steps`, `reuse_steps`, `interpolate_steps`; smallest
    relative residuals `..._residual`; `..._difference`, pixels between the flows found so and from zero. The evaluation
    solver must stop at a tolerance.
    """

    def evaluation_step(self, batch: dict) -> dict[str, tuple[float, int]]:
        """One sequence: `frames` (1, T, 3, H, W) in [-1, 1]."""
        frames = batch["frames"]
        ways = {"zero": False, "reuse": True, "interpolate": "interpolate"}
        followers = {name: Follower(self, reuse) for name, reuse in ways.items()}
        sums: dict[str, float] = defaultdict(float)
        pairs = list(pairwise(frames.unbind(1)))
        for number, (first, second) in enumerate(pairs):
            found = {name: follow(first, second) for name, follow in followers.items()}
            if not number:
                continue
            for name, (flow, steps, residual) in found.items():
                sums[f"{name}_steps"] += steps
                sums[f"{name}_residual"] += residual
                gap = torch.linalg.vector_norm(flow - found["zero"][0], dim=1).mean()
                sums[f"{name}_difference"] += float(gap)
        return {key: (total, len(pairs) - 1) for key, total in sums.items()}


class Sequences(pl.LightningDataModule):
    """Sequences of frames to evaluate on, each a split of its own: `frames` (1, T, 3, H, W) float32 in [-1, 1].

    pans     name -> {photograph, size, step, frames}: a window of size [height, width] that moves by step [right, down]
             pixels a frame over a photograph of scikit-image, from its upper left corner (for negative steps from
             where it ends in bounds)
    folders  name -> {path, sequence, size}: a sequence of a folder (see `common.data.flow.frames.Frames`); size
             [height, width] cut from the middle of its frames, None: as they are
    batch_size  not used: nothing is trained on them

    Raises UserError for a photograph, folder or size that does not exist, when it is checked or read.
    """

    name = "sequences"
    num_classes = 0

    def __init__(self, *, pans: Mapping[str, Mapping], folders: Mapping[str, Mapping], batch_size: int = 1):
        super().__init__()
        self.pans, self.folders, self.batch_size = dict(pans), dict(folders), batch_size
        self.splits = (*self.pans, *self.folders)
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise UserError("data.pans and data.folders must name at least one sequence, each name once.")

    def check(self) -> None:
        """Raises UserError when a folder is not there."""
        for name, spec in self.folders.items():
            if not Path(spec["path"]).is_dir():
                raise UserError(
                    f"data.folders.{name}.path: {spec['path']} is no folder. Set it to one with frames, or leave the "
                    f"sequence out: evaluate.split={list(self.pans)} data.folders={{}}"
                )

    def setup(self, stage: str) -> None:
        """Nothing to prepare."""

    def train_dataloader(self):
        raise UserError("Sequences have no true flow to train on. Use task=test with init.file=<trained weights>.")

    def eval_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """The one sequence called `split`."""
        check_split(split, self.splits, self.name)
        frames = pan(**self.pans[split]) if split in self.pans else folder(**self.folders[split])
        yield {"frames": to_unit_range(torch.stack(frames)[None])}


def pan(photograph: str, size: list[int], step: list[int], frames: int) -> list[Tensor]:
    """`frames` windows uint8 (3, *size) of a photograph, each `step` [right, down] pixels further; at least two."""
    if photograph not in (*BUNDLED, *BUNDLED_HELD_OUT):
        raise UserError(
            f"data.pans names the photograph {photograph!r}. {nearest(photograph, (*BUNDLED, *BUNDLED_HELD_OUT))}"
            f"Choose one of {', '.join((*BUNDLED, *BUNDLED_HELD_OUT))}."
        )
    pixels = torch.from_numpy(read_photograph(None, photograph)).permute(2, 0, 1)
    way = [(frames - 1) * pace for pace in (step[1], step[0])]
    if frames < 2 or any(side + abs(moved) > whole for side, moved, whole in zip(size, way, pixels.shape[1:])):
        raise UserError(
            f"a pan of {frames} frames by {list(step)} pixels over {photograph} ({pixels.shape[1]}x{pixels.shape[2]}) "
            f"does not hold a window of {list(size)}. Lower data.pans' size, step or frames; at least two frames."
        )
    top, left = (max(-moved, 0) for moved in way)
    return [
        pixels[:, top + n * step[1] :, left + n * step[0] :][:, : size[0], : size[1]].contiguous()
        for n in range(frames)
    ]


def folder(path: str, sequence: str, size: list[int] | None = None) -> list[Tensor]:
    """Pictures uint8 (3, H, W) of one sequence of a folder; at least two."""
    frames = Frames(path).read(sequence)
    shape = tuple(frames.shape[2:])
    if len(frames) < 2 or (size and any(side > whole for side, whole in zip(size, shape))):
        raise UserError(
            f"{path} gives {len(frames)} frame(s) of {sequence}, {shape[0]}x{shape[1]} (height x width); flow needs "
            f"two, none smaller than its size {size}. Change data.folders."
        )
    if size is None:
        return list(frames)
    top, left = ((whole - side) // 2 for whole, side in zip(shape, size))
    return list(frames[:, :, top : top + size[0], left : left + size[1]])
