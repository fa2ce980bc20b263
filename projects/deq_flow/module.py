"""Training, evaluation and pictures of optical flow as an equilibrium (arXiv 2204.08442), and of RAFT unrolled.

g1, g2, q = features(I1), features(I2), context(I1)
f(h, c): h' = GRU(h, q, motion(lookup(<g1, g2>, c), c - c0));  c' = c + head(h')
h, c = 0, c0
for i in 1 .. n states:                            # sliced: n solves, each from the last state
    (h, c) = solve (h, c) = f(h, c)                # any solver, without autograd
    (h_i, c_i) = one to three differentiable steps of f from (h, c)
    flow_i = upsample(h_i, c_i - c0)
minimise sum_i gamma^(n-i-1) mean(valid |flow_i - truth|_1)
next pair of a clip: start from this pair's (h, c), optionally moved along its flow
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.data.flow.padding import Padder
from common.data.images.module import to_unit_range
from common.errors import UserError
from common.runtime.training.equilibrium import EquilibriumModule
from projects.deq_flow.losses import flow_loss
from projects.deq_flow.metrics import flow_metrics
from projects.deq_flow.pictures import Row, write_pairs
from projects.deq_flow.video import open_clips, write_clip

REUSE = (False, True, "interpolate")
PICTURES = 12  # rows of a picture


class DeqFlow(EquilibriumModule):
    """The weighted l1 loss of the flow decoded from every state; end-point errors over the pairs of a data set.

    L = sum_i gamma^(n-i-1) mean(valid |flow_i - flow|_1), a mean over all pixels as in the released code; the sum over
    the n states is `correction`. The unrolled baseline (RAFT, twelve steps) is the same with the gradient rule
    `backprop` and as many states as steps.

    net             images (B, 3, H, W) in [-1, 1], sides multiples of 8 -> flows (B, 2, H, W) in pixels; see
                    `projects.deq_flow.raft.network.FlowEquilibrium`
    crop            [height, width] of a training crop; what planning counts with
    max_flow        pixels that move further (in pixels) do not count in the loss
    freeze_norms    batch normalisation keeps its statistics: True in every stage after FlyingChairs. It stays frozen
                    through every change between training and evaluation
    padding         where evaluation pads to multiples of 8: "sintel" on all sides, "kitti" on both sides and below. An
                    evaluation set that names its own has that (`common.data.flow.module.EvaluationSet`)
    reuse           a clip's next solve starts from the last equilibrium (True), from it with the flow moved along
                    itself ("interpolate"), or from zero (False)
    optimizer, schedule, correction   see `EquilibriumModule`

    Raises UserError for options out of range.
    """

    reads = "pairs of frames with optical flow"
    unit = "pairs"

    def __init__(
        self,
        *,
        net: nn.Module,
        crop: Sequence[int],
        max_flow: float,
        freeze_norms: bool,
        padding: str,
        reuse: bool | str,
        optimizer: Callable,
        schedule: Callable | None,
        correction: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule, correction=correction)
        if len(crop) != 2 or any(side < 8 or side % 8 for side in crop):
            raise UserError(f"project.crop must be [height, width], multiples of 8, got {list(crop)}. Set data.crop.")
        if not max_flow > 0:
            raise UserError(f"project.max_flow must be > 0 pixels, got {max_flow}. The paper's is 400.")
        if padding not in ("sintel", "kitti"):
            raise UserError(
                f"project.padding must be sintel or kitti, got {padding!r}. Choose where images are padded."
            )
        if reuse not in REUSE:
            raise UserError(f"project.reuse must be true, false or interpolate, got {reuse!r}. Set it to true.")
        self.crop, self.max_flow, self.padding, self.reuse = tuple(crop), max_flow, padding, reuse
        net.freeze_batch_norm(freeze_norms)

    # What a task defines ----------------------------------------------------------------------------------------------

    def outputs(self, batch: dict) -> list[Tensor]:
        """Flows (B, 2, H, W) of a training crop, or of images padded already."""
        return self.net.outputs(batch["first"], batch["second"])

    def criterion(self, output: Tensor, batch: dict) -> Tensor:
        """mean(valid |output - flow|_1) over all pixels."""
        return flow_loss(output, batch["flow"], batch["valid"], max_flow=self.max_flow)

    def estimate(self, first: Tensor, second: Tensor, start=None, padding: str | None = None) -> Tensor:
        """Flow (B, 2, H, W) between images of any size, padded for the network and cut back.

        Both sides are padded to multiples of 8, small images to the least size of the network.

        padding  where, None: as the module's
        start  state to solve from, as left in `net.state` by the call before; None: zero hidden state, no motion
        """
        padder = Padder(*first.shape[-2:], multiple=8, mode=padding or self.padding, least=self.net.least)
        first, second = padder.pad(first, second)
        return padder.unpad(self.net.outputs(first, second, start=start)[-1])

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts of `epe`, `epe_per_image` (pixels), `1px`, `3px`, `5px` and `fl_all` (per cent), and of
        `motion`, the length of the true flow in pixels: the end-point error of saying that nothing moves."""
        flow, valid = batch["flow"], batch["valid"]
        found = flow_metrics(self.estimate(batch["first"], batch["second"], padding=batch.get("padding")), flow, valid)
        return {**found, "motion": flow_metrics(torch.zeros_like(flow), flow, valid)["epe"]}

    # What the runtime asks for ----------------------------------------------------------------------------------------

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """`first`, `second` (N, 3, h, w), `flow` (N, 2, h, w), `valid` (N, h, w) of training crops."""
        return {
            "first": torch.zeros(samples, 3, *self.crop),
            "second": torch.zeros(samples, 3, *self.crop),
            "flow": torch.zeros(samples, 2, *self.crop),
            "valid": torch.ones(samples, *self.crop),
        }

    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """`<set>.png` for every evaluation set: frame, true flow, estimate and error of pairs drawn by
        `seed`, at most twelve."""
        return [
            self._sheet(data, name, Path(folder) / f"{name}.png", min(samples, PICTURES), seed) for name in data.splits
        ]

    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """Pairs of the first evaluation set as one picture `<stem>.png`."""
        return [self._sheet(data, data.splits[0], stem.with_name(f"{stem.name}.png"), min(samples, 4), seed)]

    def _sheet(self, data, split: str, path: Path, count: int, seed: int) -> Path:
        pairs = data.pairs(split)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
        rows = []
        for index in order.tolist():
            pair = pairs.read(index)
            images = [to_unit_range(pair[name][None].to(self.device)) for name in ("first", "second")]
            rows.append(
                Row(
                    pair["first"],
                    self.estimate(*images, padding=data.padding(split))[0].float().cpu(),
                    pair["flow"],
                    pair["valid"],
                )
            )
        return write_pairs(path, rows)

    def show_files(self, files: Path | list[Path], data, folder: Path) -> list[Path]:
        """Flow of a clip: `flow.gif` (and `flow.mp4` where a film writer is installed), `frames/000000.png` ...; and
        `iterations.png`, `iterations.json`: how many evaluations each pair needs from zero and with `reuse`.

        files  folder of pictures (`common.data.flow.frames.Frames` says in which order), list of pictures, animated
               picture, or film. Several sequences in one folder are written into a folder each
        """
        clips = open_clips(files)
        places = [folder] if len(clips) == 1 else [folder / clip.name for clip in clips]
        return [path for clip, place in zip(clips, places) for path in write_clip(self, clip, place, reuse=self.reuse)]
