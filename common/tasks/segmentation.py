"""Semantic segmentation: a class for every pixel. For Hamburger and the modules it is compared with."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.data.images.module import to_unit_range
from common.data.segmentation.augment import IGNORE, resized, scaled_size
from common.errors import UserError
from common.ham.ham import update_bases
from common.metrics.segmentation import confusion_matrix, segmentation_scores
from common.optim.groups import bias_and_norm_groups
from common.runtime.training.module import ResearchModule
from common.tasks.overlays import write_overlays
from common.tasks.pictures import find_pictures, read_picture, write_classes

MERGES = ("logits", "probabilities")
ODD_SIZES = ("pad", "resize", "keep")


class Segmentation(ResearchModule):
    """Cross-entropy of every pixel; evaluated by mIoU in percent, over several sizes and mirror images if wanted.

    net                normalised images (B, 3, H, W) -> logits (B, num_classes, H, W); `outputs` gives beside them, in
                       training, those of auxiliary heads; `stride` and `align_corners` say which sizes it takes
    crop               pixels of a training crop, [height, width] or one number; what planning counts with
    mean, std          of each channel of images in [0, 1]; the network sees (image - mean) / std
    class_weights      of each class in the training loss; None: those the data module computes (data.class_weighting)
    count_void         True: the loss is the mean over all pixels, those without a class counting 0, as in the released
                       code; False: over those with a class (weighted by their weights)
    auxiliary_weight   of the loss of every auxiliary head
    scales             sizes evaluated, in sizes of the image; [1.0] for one
    flip               also mirror images
    odd_sizes          pictures whose sides the network's stride does not divide: pad (right and below, with the mean
                       colour), resize (up to the next sides it divides, as Light-Ham is tested), keep (as they are)
    merge              what is averaged over them: logits (the released HamNet) or probabilities (its successors)
    bias_lr            learning rate of biases, in that of the optimiser; HamNet: 2
    decay_norms        weight decay also on normalisations and single numbers;   decay_biases  on the other biases
    optimizer, schedule   see `ResearchModule`; the optimiser's `lr` must be given by name

    Pixels of class 255 count neither in the loss nor in a metric. Raises UserError for options that do not fit.
    """

    reads = "pictures with masks"
    unit = "images"

    def __init__(
        self,
        *,
        net: nn.Module,
        crop: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        class_weights: Sequence[float] | None,
        count_void: bool,
        auxiliary_weight: float,
        scales: Sequence[float],
        flip: bool,
        odd_sizes: str,
        merge: str,
        bias_lr: float,
        decay_norms: bool,
        decay_biases: bool,
        optimizer: Callable,
        schedule: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        _check(net, mean, std, class_weights, scales, merge)
        self.odd_sizes = limits.choice("project.odd_sizes", odd_sizes, ODD_SIZES)
        self.crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
        self.count_void, self.auxiliary_weight = count_void, auxiliary_weight
        self.scales, self.flip, self.merge = tuple(scales), flip, merge
        self.group_options = dict(bias_lr=bias_lr, decay_norms=decay_norms, decay_biases=decay_biases)
        # as a map of images in [-1, 1]: ((x + 1) / 2 - mean) / std = x gain + offset
        gain, centre = 0.5 / torch.tensor(std), (0.5 - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("gain", gain.view(-1, 1, 1), persistent=False)
        self.register_buffer("offset", centre.view(-1, 1, 1), persistent=False)
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def check_data(self, data) -> None:
        """Raises UserError when the network has another number of classes than the masks."""
        if data.num_classes != self.net.num_classes:
            raise UserError(
                f"The network has {self.net.num_classes} classes, but {data.name} has {data.num_classes}. Set "
                f"project.net.num_classes={data.num_classes}."
            )

    # Training ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Weights of the classes from the masks of the training split, unless given or not wanted."""
        if self.class_weights is None:
            weights = self.trainer.datamodule.class_weights()
            self.class_weights = None if weights is None else weights.to(self.device)

    def parameter_groups(self) -> list[dict]:
        """Weights, normalisations and biases with their own decay and learning rate."""
        lr = getattr(self.make_optimizer, "keywords", {}).get("lr")
        if lr is None:
            raise UserError("project.optimizer.lr must be given: the learning rate of biases is a multiple of it.")
        return bias_and_norm_groups(self.net, lr=lr, **self.group_options)

    def normalised(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] as the network takes them."""
        return torch.addcmul(self.offset, images, self.gain)

    def criterion(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of logits (B, C, H, W) against classes (B, H, W), a mean over pixels as `count_void` says."""
        total = F.cross_entropy(logits, mask, self.class_weights, ignore_index=IGNORE, reduction="sum")
        return total / self._pixels(mask)

    def _pixels(self, mask: Tensor) -> Tensor | int:
        """What the loss of a batch is divided by; never 0."""
        if self.count_void:
            return mask.numel()
        known = mask != IGNORE
        if self.class_weights is None:
            return known.sum().clamp(min=1)
        weights = self.class_weights[mask.masked_fill(~known, 0)] * known
        return weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Loss of one micro-batch; logs `train/loss` and, with auxiliary heads, `train/auxiliary` (unweighted)."""
        first, *others = [
            self.criterion(logits.float(), batch["mask"])
            for logits in self.net.outputs(self.normalised(batch["image"]))
        ]
        loss = first
        if others:
            extra = sum(others)
            self.log("train/auxiliary", extra.detach())
            loss = loss + self.auxiliary_weight * extra
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer) -> None:
        """Stored bases of the context module follow what the step has found, before a checkpoint looks at them."""
        update_bases(self.net)

    # Evaluation -------------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Logits (B, C, H, W) of images (B, 3, h, w) in [-1, 1], averaged over `scales` and mirror images.

        size  (H, W), None: that of the images. Of probabilities the mean's logarithm is returned: it serves as logits.
        """
        images, corners = self.normalised(images), self.net.align_corners
        own = images.shape[2:]
        size = own if size is None else size
        total, parts = 0.0, 0
        for scale in self.scales:
            scaled = _resize(images, [max(round(scale * side), 1) for side in own], corners)
            for mirrored in (False, True)[: 1 + self.flip]:
                logits = self._on_any_size(scaled.flip(3) if mirrored else scaled)
                logits = _resize(logits.flip(3) if mirrored else logits, size, corners).float()
                total = total + (logits.softmax(1) if self.merge == "probabilities" else logits)
                parts += 1
        mean = total / parts
        return mean.clamp(min=1e-30).log() if self.merge == "probabilities" else mean

    def _on_any_size(self, x: Tensor) -> Tensor:
        """Logits of normalised images at sizes the network takes, see `odd_sizes`; padding is cut off again."""
        if self.odd_sizes == "keep":
            return self.net(x)
        step, rest = self.net.stride, 1 if self.net.align_corners else 0
        height, width = x.shape[2:]
        down, right = ((rest - side) % step for side in (height, width))
        if self.odd_sizes == "resize":
            return self.net(_resize(x, (height + down, width + right), self.net.align_corners))
        padded = F.pad(x, (0, right, 0, down)) if down or right else x
        return self.net(padded)[:, :, :height, :width]

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts: `loss` (nats, unweighted mean over the pixels of an image that have a class) and `confusion`
        (pixels, true class x predicted class)."""
        mask = batch["mask"]
        logits = self.predict(batch["image"], mask.shape[1:])
        losses = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")
        known = (mask != IGNORE).sum((1, 2)).clamp(min=1)
        confusion = confusion_matrix(logits.argmax(1), mask, self.net.num_classes, IGNORE)
        images = torch.tensor(float(len(mask)))
        return {"loss": ((losses.sum((1, 2)) / known).sum(), images), "confusion": (confusion, images)}

    def finalise(self, means: dict) -> dict[str, float]:
        """`loss`, and what the confusion matrix says, in percent: `miou` and the rest of `segmentation_scores`."""
        return {"loss": means["loss"], **segmentation_scores(means["confusion"])}

    # What the runtime asks for ----------------------------------------------------------------------------------------

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """`image` (N, 3, h, w), `mask` (N, h, w), `position` (N,) of training crops."""
        return {
            "image": torch.empty(samples, 3, *self.crop),
            "mask": torch.zeros(samples, *self.crop, dtype=torch.int64),
            "position": torch.zeros(samples, dtype=torch.int64),
        }

    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """`overlays.png`: held-out images drawn by `seed`, each beside its true and its predicted classes."""
        return [self._overlays(data, Path(folder) / "overlays.png", samples, seed)]

    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """The same as one picture `<stem>.png`, of eight images at most."""
        return [self._overlays(data, stem.with_name(f"{stem.name}.png"), min(samples, 8), seed)]

    def _overlays(self, data, path: Path, samples: int, seed: int) -> Path:
        pairs = data.pairs(next(name for name in ("test", "val", "train") if name in data.splits))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:samples]
        images, truths = zip(*(pairs.read(index) for index in order.tolist()))
        predicted = [self.classes(image, data.eval_fit) for image in images]
        return write_overlays(path, images, predicted, truths, palette=data.palette, names=data.class_names)

    def classes(self, image: Tensor, fit: Sequence[int] | None = None) -> Tensor:
        """Predicted classes (H, W) on the CPU of one picture uint8 (3, H, W), resized to `fit` as in evaluation."""
        shape = tuple(image.shape[1:])
        shown = image if fit is None else resized(image, scaled_size(shape, 1.0, fit))
        return self.predict(to_unit_range(shown[None].to(self.device)), shape).argmax(1)[0].cpu()

    def show_files(self, files: Path | list[Path], data, folder: Path) -> list[Path]:
        """Every picture in `files`: `<name>.png`, beside its predicted classes, and `<name>_classes.png`.

        The second holds the class numbers themselves, with the palette of the data. Raises UserError when there is no
        picture, or one that cannot be read.
        """
        written = []
        for name, path in find_pictures(files).items():
            image = read_picture(path)
            predicted = self.classes(image, data.eval_fit)
            sheet = folder / f"{name}.png"
            written.append(
                write_overlays(sheet, [image], [predicted], None, palette=data.palette, names=data.class_names)
            )
            written.append(write_classes(folder / f"{name}_classes.png", predicted, data.palette))
        return written


def _check(net, mean, std, class_weights, scales, merge) -> None:
    if not len(mean) == len(std) == 3:
        raise UserError(f"project.mean and project.std must hold 3 numbers each, got {len(mean)} and {len(std)}.")
    for value in std:
        limits.number("project.std", value, above=0, hint="Set it to the images' standard deviation.")
    if class_weights is not None and len(class_weights) != net.num_classes:
        raise UserError(
            f"project.class_weights must hold one number per class ({net.num_classes}), got {len(class_weights)}. "
            "Set it to null for those of data.class_weighting."
        )
    if not scales:
        raise UserError("project.scales is empty. Set project.scales=[1.0] for one size.")
    for scale in scales:
        limits.number("each of project.scales", scale, above=0, hint="Set project.scales=[1.0] for one size.")
    limits.choice("project.merge", merge, MERGES)


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
