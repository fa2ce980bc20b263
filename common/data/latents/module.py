"""The data module of networks in latents: moments from a cache, one draw from them per sample, exact restart.

Which image, which mirror image and which noise a run sees depends on (seed, samples seen so far) alone, as in
`common.data.images.module`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import limits
from common.data.images.module import ImageDataModule
from common.data.latents import cache as latent_cache
from common.data.source import Source, check_split
from common.errors import UserError


class LatentFolder:
    """Encoded images, as `python -m tools.encode_latents` writes them.

    path         folder of the train split
    test_path    folder of the test split, None when there is none
    resolution   side of the latents: an eighth of the images'
    channels     of the latents
    num_classes  classes the labels must stay below; 0 reads no labels
    mean, std    of the latents, one number or one per channel: a batch holds (latent - mean) / std. MeanFlow divides by
                 1 / 0.18215 (arXiv 2112.10752), iMF standardises each channel
    verify       compare every shard with its sha256 when the split is loaded
    name         name used in messages and beside numbers
    """

    def __init__(
        self,
        *,
        path: str,
        resolution: int,
        test_path: str | None = None,
        channels: int = 4,
        num_classes: int = 0,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1 / 0.18215,
        verify: bool = False,
        name: str = "latents",
    ):
        self.path = path
        self.test_path = test_path
        self.resolution = resolution
        self.channels = channels
        self.num_classes = num_classes
        self.mean = self._numbers("mean", mean)
        self.std = self._numbers("std", std)
        limits.number("data.source.std", float(self.std.min()), above=0, hint="Set it to standard deviations.")
        self.verify = verify
        self.name = name
        self.splits = ("train",) if test_path is None else ("train", "test")

    def check(self) -> None:
        for split in self.splits:
            self._index(split)

    def load(self, split: str) -> "LatentFiles":
        check_split(split, self.splits, self.name)
        files = LatentFiles(self._place(split), self._index(split, verify=self.verify), labelled=self.num_classes > 0)
        if self.num_classes and (files.labels.min() < 0 or files.labels.max() >= self.num_classes):
            raise UserError(
                f"{self._place(split)} holds labels {files.labels.min()}..{files.labels.max()}, but "
                f"data.source.num_classes is {self.num_classes}. Set it to at least {files.labels.max() + 1}, or 0."
            )
        return files

    def _place(self, split: str) -> Path:
        return Path(self.path if split == "train" else self.test_path).expanduser()

    def _index(self, split: str, *, verify: bool = False) -> dict:
        place = self._place(split)
        index = latent_cache.read_index(place, verify=verify)
        for key in ("channels", "resolution"):
            if index[key] != getattr(self, key):
                raise UserError(
                    f"{place} holds latents of {index['channels']} x {index['resolution']} x {index['resolution']}, "
                    f"but data.source.{key} is {getattr(self, key)}. Set data.source.{key}={index[key]}, or encode the "
                    f"images at --size {index['size'] * self.resolution // index['resolution']}."
                )
        return index

    def _numbers(self, key: str, values: float | Sequence[float]) -> np.ndarray:
        """As float32 (1 or C, 1, 1)."""
        numbers = np.asarray(values, dtype=np.float32).reshape(-1, 1, 1)
        if len(numbers) not in (1, self.channels):
            raise UserError(
                f"data.source.{key} has {len(numbers)} numbers for {self.channels} channels. "
                f"Give one number, or {self.channels}."
            )
        return numbers


class LatentFiles:
    """The moments of one cache, memory-mapped and read on demand.

    labels  int64 (N,), zeros when not labelled
    """

    def __init__(self, folder: Path, index: dict, *, labelled: bool):
        self.folder = folder
        self.index = index
        self._ends = np.cumsum([shard["count"] for shard in index["shards"]])
        self._opened: dict[int, np.ndarray] = {}
        self.labels = np.zeros(len(self), dtype=np.int64)
        if labelled:
            self.labels = np.concatenate([np.asarray(self._open(k)["label"]) for k in range(len(index["shards"]))])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def mirrored(self) -> bool:
        """Whether the mirror images were encoded too."""
        return self.index["mirrored"]

    def label_counts(self) -> np.ndarray:
        """Images per class, int64 (classes,)."""
        return np.bincount(self.labels, minlength=self.index["num_classes"])

    def moments(self, rows: np.ndarray, flips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float32 (B, c, h, w), of images `rows` (B,) int64; flips (B,) 0 or 1 (mirror).

        Raises UserError naming a shard that cannot be read.
        """
        shape = (len(rows), 2 * self.index["channels"], *2 * (self.index["resolution"],))
        both = np.empty(shape, dtype=np.float32)
        shards = np.searchsorted(self._ends, rows, side="right")
        # by shard, and within it in the order of the file: few maps are touched, and read forwards
        order = np.lexsort((rows, shards))
        for group in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            shard = int(shards[group[0]])
            first = self._ends[shard] - self.index["shards"][shard]["count"]
            both[group] = self._moments(shard)[rows[group] - first, flips[group]]
        return both[:, : self.index["channels"]], both[:, self.index["channels"] :]

    def fingerprint(self) -> str:
        """16 hex digits of all shards' checksums."""
        text = " ".join(shard["sha256"] for shard in self.index["shards"])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": {}}

    def _moments(self, shard: int) -> np.ndarray:
        if shard not in self._opened:
            self._opened[shard] = self._open(shard)["moments"]
        return self._opened[shard]

    def _open(self, shard: int) -> dict[str, np.ndarray]:
        entry = self.index["shards"][shard]
        arrays, _ = latent_cache.open_shard(self.folder / entry["file"])
        if len(arrays["label"]) != entry["count"]:
            raise UserError(
                f"The shard {self.folder / entry['file']} holds {len(arrays['label'])} images, not {entry['count']}. "
                f"{latent_cache.again(self.folder)}"
            )
        return arrays


class LatentDataModule(ImageDataModule):
    """Batches `image` float32 (B, c, h, w), normalised latents, `label` int64 (B,), `position` int64 (B,).

    A latent is mean + std * noise of the image's moments, as in the MeanFlow release, with noise that depends on
    (seed, position) alone.

    source     cache (`LatentFolder`)
    reference  pixels of the same images (`common.data.images.folder.ImageFolder`), what generated images are measured
               against; None: nothing can be measured
    xflip      True adds each image's mirror image to the set, as encoded, which doubles an epoch
    The other arguments are those of `ImageDataModule`. Raises UserError for xflip with a cache of no mirror images,
    and for a cache whose latents are not of the network's shape.
    """

    def __init__(
        self,
        *,
        source: LatentFolder,
        reference: Source | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        xflip: bool = False,
        val_split: str | None = "test",
        pin_memory: bool | None = None,
        name: str | None = None,
        root: str | None = None,
    ):
        super().__init__(
            source=source, batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed,
            shuffle=shuffle, xflip=xflip, val_split=val_split, pin_memory=pin_memory, name=name, root=root,
        )  # fmt: skip
        self.reference = reference
        self._pixels: dict[str, object] = {}

    def setup(self, stage: str) -> None:
        self._check_net()
        super().setup(stage)

    def check_reference(self, split: str) -> None:
        """Raises UserError unless there are pixels of the split to measure generated images against."""
        if self.reference is None:
            raise UserError(
                "Generated images are measured against pixels, and these data are latents: set data.reference to the "
                "images they were encoded from, or evaluate=none."
            )
        check_split(split, self.reference.splits, self.reference.name)
        self.reference.check()

    def fingerprint(self, split: str) -> str:
        """16 hex digits that change when the images measured against do; without them, when the latents do."""
        return self.images(split).fingerprint() if self.reference is None else self._reference(split).fingerprint()

    def reference_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 (B, 3, H, W) and labels int64 (B,) of the images the latents were made of, in stored order."""
        images = self._reference(split)
        for first in range(0, len(images), batch_size):
            yield images.take(np.arange(first, min(first + batch_size, len(images))))

    def _reference(self, split: str):
        if split not in self._pixels:
            self.check_reference(split)
            self._pixels[split] = self.reference.load(split)
        return self._pixels[split]

    def _check_net(self) -> None:
        net = getattr(getattr(self.trainer, "lightning_module", None), "net", None)
        wanted = (getattr(net, "img_channels", self.channels), getattr(net, "img_resolution", self.resolution))
        if wanted != (self.channels, self.resolution):
            raise UserError(
                f"The latents are {self.channels} x {self.resolution} x {self.resolution}, but the network takes "
                f"{wanted[0]} x {wanted[1]} x {wanted[1]}. Set project.net.img_resolution={self.resolution} and "
                f"project.net.in_channels={self.channels}, or choose other data."
            )

    def _draws(self, images: LatentFiles, endless: bool) -> Dataset:
        if endless and self.xflip and not images.mirrored:
            raise UserError(
                f"data.xflip=true needs the mirror images, which {images.folder} lacks. Set data.xflip=false, or "
                "encode again without --no-mirror."
            )
        stream = f"latent noise {self.seed}" + ("" if endless else " evaluation")
        return _LatentDraws(images, self.source.mean, self.source.std, stream, mirrored=endless and self.xflip)


class _LatentDraws(Dataset):
    """Turns a list of (index, position) into one batch; indices from N on are the mirror images of 0..N-1."""

    def __init__(self, images: LatentFiles, mean: np.ndarray, std: np.ndarray, stream: str, mirrored: bool):
        self.images, self.mean, self.std, self.stream, self.mirrored = images, mean, std, stream, mirrored

    def __len__(self) -> int:
        return len(self.images) * (2 if self.mirrored else 1)

    def __getitems__(self, draws: Iterable[tuple[int, int]]) -> dict[str, Tensor | str]:
        indices, positions = np.asarray(draws, dtype=np.int64).T
        flips, rows = np.divmod(indices, len(self.images))
        try:
            mean, std = self.images.moments(rows, flips)
        except UserError as error:
            return {"error": str(error)}
        latent = std * normal_at(self.stream, positions, mean.shape[1:])
        latent += mean
        latent -= self.mean
        latent /= self.std
        return {
            "image": torch.from_numpy(latent),
            "label": torch.from_numpy(self.images.labels[rows]),
            "position": torch.from_numpy(positions.copy()),
        }

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        return self.__getitems__([draw])


def normal_at(stream: str, positions: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 (B, *shape); row i depends on (stream, positions[i]) alone, whatever else is drawn.

    Each position owns a range of the counters of one Philox generator (Salmon et al. 2011), whose raw words numpy
    promises never to change; Box and Muller's formula makes the numbers.
    """
    count = int(np.prod(shape))
    blocks = -(-count // 8)  # a counter gives four words of 64 bits, a word one uniform pair, which is two normals
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    normal = np.empty((len(positions), blocks * 8), dtype=np.float32)
    # a training batch is one run of positions, drawn in one go
    for run in np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) != 1) + 1):
        counter = int(positions[run[0]]) * blocks
        words = np.random.Philox(key=key, counter=counter).random_raw(len(run) * blocks * 4)
        uniform = (words.view(np.uint32).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
        radius = np.sqrt(-2 * np.log(np.clip(uniform[0::2], 2.0**-33, 1.0)))
        angle = np.float32(2 * np.pi) * uniform[1::2]
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
        normal[run[0] : run[-1] + 1] = pairs.reshape(len(run), -1)
    return normal[:, :count].reshape(len(positions), *shape)
