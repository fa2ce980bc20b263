"""Image classification with an equilibrium network: MDEQ and its small relatives."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.data.images.module import to_unit_range
from common.errors import UserError
from common.files import atomic
from common.runtime.training.equilibrium import EquilibriumModule

RIGHT, WRONG = (40, 160, 70), (200, 50, 50)  # colours of the frames in the picture


class ImageClassification(EquilibriumModule):
    """Cross-entropy on the classes; evaluated by top-1 and, with more than five classes, top-5 accuracy in percent.

    net          equilibrium network: normalised images (B, C, R, R) -> logits (B, num_classes)
    augment      augmentation of images or None: (images, generator, rank=, world_size=) -> (images, labels);
                 training only, the labels are not used
    mean, std    of each channel of images in [0, 1]; the network sees (image - mean) / std
    optimizer, schedule, correction   see `EquilibriumModule`

    Images larger than the network takes (an evaluation set stored at 256 pixels for a network of 224) are cut to their
    centre. Raises UserError for a `std` that is not positive or a number of channels that does not fit.
    """

    reads = "images"
    unit = "images"

    def __init__(
        self,
        *,
        net: nn.Module,
        augment: Callable | None,
        mean: Sequence[float],
        std: Sequence[float],
        optimizer: Callable,
        schedule: Callable | None,
        correction: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule, correction=correction)
        if not len(mean) == len(std) == net.img_channels:
            raise UserError(
                f"project.mean and project.std must hold one number per channel ({net.img_channels}), "
                f"got {len(mean)} and {len(std)}."
            )
        for value in std:
            limits.number("project.std", value, above=0, hint="Set it to the images' standard deviation.")
        self.augment = augment
        # as a map of images in [-1, 1]: ((x + 1) / 2 - mean) / std = x gain + offset
        gain, centre = 0.5 / torch.tensor(std), (0.5 - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("gain", gain.view(-1, 1, 1), persistent=False)
        self.register_buffer("offset", centre.view(-1, 1, 1), persistent=False)

    def check_data(self, data) -> None:
        """Raises UserError for data without labels, or with labels the network has no output for."""
        if not data.num_classes:
            raise UserError(
                f"{type(self).__name__} learns classes, but the pictures of {data.name} are read without labels. Set "
                "data.source.num_classes to the number of classes (one subfolder each)."
            )
        if data.num_classes > self.net.num_classes:
            raise UserError(
                f"The network has {self.net.num_classes} classes, but {data.name} has {data.num_classes}. Set "
                f"project.net.num_classes={data.num_classes}."
            )

    # Training and evaluation ------------------------------------------------------------------------------------------

    def outputs(self, batch: dict) -> list[Tensor]:
        """Logits (B, num_classes) of every state; images are augmented in training."""
        images = batch["image"]
        if self.training and self.augment is not None:
            draws = self.draws()
            images, _ = self.augment(
                images, draws.generator("augment", images.device), rank=draws.rank, world_size=draws.world_size
            )
        return self.net.outputs(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], H, W >= R, as the network takes them: (B, C, R, R)."""
        size = self.net.img_resolution
        top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
        if top > 0 or left > 0:
            images = images[:, :, top : top + size, left : left + size]
        return torch.addcmul(self.offset, images, self.gain)

    def criterion(self, output: Tensor, batch: dict) -> Tensor:
        """Mean cross-entropy of logits (B, num_classes) against `batch["label"]` (B,)."""
        return F.cross_entropy(output, batch["label"])

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts over one batch: `loss` (nats), `top1` and `top5` (percent)."""
        logits, label = self.outputs(batch)[-1], batch["label"]
        count = torch.tensor(float(len(label)))
        found = {
            "loss": (F.cross_entropy(logits, label, reduction="sum"), count),
            "top1": (100 * (logits.argmax(1) == label).sum(), count),
        }
        if logits.shape[1] > 5:
            best = logits.topk(5, dim=1).indices
            found["top5"] = (100 * (best == label[:, None]).any(1).sum(), count)
        return found

    # What the runtime asks for ----------------------------------------------------------------------------------------

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """`image` (N, C, R, R), `label` (N,), `position` (N,)."""
        size = self.net.img_resolution
        return {
            "image": torch.empty(samples, self.net.img_channels, size, size),
            "label": torch.zeros(samples, dtype=torch.int64),
            "position": torch.zeros(samples, dtype=torch.int64),
        }

    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """`predictions.png`: test images drawn by `seed`, framed green where the class is right, red where it is not.

        Below each stands the predicted class, and the true one after a bar where they differ. The names are the data
        module's `classes`, else the numbers.
        """
        return [self._predictions(data, Path(folder) / "predictions.png", samples, seed)]

    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """The same as one picture `<stem>.png`."""
        return [self._predictions(data, stem.with_name(f"{stem.name}.png"), samples, seed)]

    def _predictions(self, data, path: Path, samples: int, seed: int) -> Path:
        images = data.images("test" if "test" in data.splits else "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        pixels, labels = images.take(order[:samples].numpy())
        shown = to_unit_range(pixels.to(self.device))
        logits = [self.net(self.normalised(part)) for part in shown.split(64)]
        names = data.classes or [str(number) for number in range(data.num_classes)]
        return write_predictions(path, pixels, torch.cat(logits).argmax(1).tolist(), labels.tolist(), names)


def write_predictions(
    path: Path, pixels: Tensor, guesses: Sequence[int], labels: Sequence[int], names: Sequence[str]
) -> Path:
    """A grid of images uint8 (N, C, H, W) with their predicted and, where different, true classes; returns `path`."""
    from PIL import Image, ImageDraw

    count, channels, height, width = pixels.shape
    scale = max(1, -(-96 // width))
    tile_width, tile_height, frame, line = width * scale, height * scale, 3, 12
    step_x, step_y = tile_width + 2 * frame + 4, tile_height + 2 * frame + line + 4
    columns = max(1, round(count**0.5))
    right = sum(guess == label for guess, label in zip(guesses, labels))
    heads = ("below each picture: predicted class", f"green: right ({right} of {count}), red: wrong")
    top = line * len(heads) + 4
    sheet = Image.new("RGB", (max(columns * step_x + 4, 240), top + -(-count // columns) * step_y + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for number, head in enumerate(heads):
        pen.text((4, 2 + number * line), head, fill="black")
    arrays = pixels.expand(-1, 3, -1, -1) if channels == 1 else pixels
    for number, (array, guess, label) in enumerate(zip(arrays.permute(0, 2, 3, 1).numpy(), guesses, labels)):
        x, y = 4 + number % columns * step_x, top + number // columns * step_y
        pen.rectangle(
            (x, y, x + tile_width + 2 * frame - 1, y + tile_height + 2 * frame - 1),
            fill=RIGHT if guess == label else WRONG,
        )
        picture = Image.fromarray(array).resize((tile_width, tile_height), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + frame, y + frame))
        text = names[guess] if guess == label else f"{names[guess]} (true: {names[label]})"
        pen.text((x, y + tile_height + 2 * frame), text, fill="black")
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path
