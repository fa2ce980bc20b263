"""The real images a generator is measured against, and their feature statistics, computed once and kept."""

import hashlib
import logging
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common import limits
from common.archives import open_npz
from common.data.images.folder import ImageFolder
from common.errors import UserError
from common.files import refuse_lfs_pointer, sha256_file
from common.metrics.features import FeatureExtractor
from common.metrics.fid import GaussianStatistics
from common.metrics.hashes import safe_name, short_hash
from common.metrics.images import to_uint8

log = logging.getLogger(__name__)

# Stands for a count that a file does not tell: so large that the two divisors of a covariance are one.
UNKNOWN_COUNT = 2**40


class ReferenceImages(Protocol):
    """Real images in a fixed order.

    name         for people, e.g. "cifar10/train"
    fingerprint  16 hex digits that change when any pixel does
    """

    name: str

    @property
    def fingerprint(self) -> str: ...

    def images(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 (B, C, H, W) batches, always the same images in the same order, without flips."""


class SplitImages:
    """One split of an image data module (`name`, `fingerprint(split)`, `reference_images(split, batch_size)`).

    limit  use only the first images, >= 1; None for all
    """

    def __init__(self, *, data, split: str = "train", limit: int | None = None):
        self._data, self._split, self._limit = data, split, _checked(limit)
        self.name = f"{data.name}/{split}" + _suffix(limit)

    @cached_property
    def fingerprint(self) -> str:
        return _limited(self._data.fingerprint(self._split), self._limit)

    def images(self, batch_size: int) -> Iterator[Tensor]:
        yield from first(self._data.reference_images(self._split, batch_size), self._limit)


class TensorImages:
    """Images already in memory: uint8 (N, C, H, W), or float in [-1, 1] rounded by `rounding`."""

    def __init__(self, *, images: Tensor, name: str, rounding: str = "edm"):
        self._images = to_uint8(images, rounding).cpu()
        self.name = name

    @cached_property
    def fingerprint(self) -> str:
        return short_hash(str(tuple(self._images.shape)), self._images.contiguous().numpy().tobytes())

    def images(self, batch_size: int) -> Iterator[Tensor]:
        yield from self._images.split(batch_size)


class FolderImages:
    """Every picture below a folder or in a zip, sorted by path.

    resolution  pixels, width = height; None: that of the first picture, which must be square
    fit         how pictures of another size become that: exact (they must not have one), center or adm, see
                `common.data.images.folder.ImageFolder`
    channels    3 reads all as RGB, 1 as grey
    limit       use only the first pictures; None for all

    The fingerprint covers the decoded pixels. Raises UserError when the folder is missing or empty, and naming the
    picture when one cannot be read or has another size.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike,
        resolution: int | None = None,
        fit: str = "exact",
        channels: int = 3,
        limit: int | None = None,
    ):
        path, self._limit = Path(path).expanduser(), _checked(limit)
        source = ImageFolder(path=str(path), resolution=resolution or 1, channels=channels, fit=fit)
        if resolution is None:
            source.resolution = source.load("train").size(0)[1]
        self._files = source.load("train")
        self.name = path.resolve().name + _suffix(limit)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for batch in self.images(250):
            digest.update(str(tuple(batch.shape[1:])).encode())
            digest.update(batch.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def images(self, batch_size: int) -> Iterator[Tensor]:
        count = min(len(self._files), self._limit or len(self._files))
        for start in range(0, count, batch_size):
            yield self._files.take(np.arange(start, min(start + batch_size, count)))[0]


class StatisticsFile:
    """Feature statistics in a file, in place of the images: of `tools.fid_ref`, or with mu and sigma.

    The second kind, also called ref_mu and ref_sigma, is what papers publish (ADM, MeanFlow, iMF); it does not say of
    which network, images and rounding, nor of how many images, so results name the file. Raises UserError when it is
    missing, damaged or neither kind.
    """

    def __init__(self, *, path: str | os.PathLike):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(
                f"no reference statistics at {path}. Make them with python -m tools.fid_ref --out {path}, or set "
                "evaluate.statistics to another file, or to null to measure against the data's own images."
            )
        refuse_lfs_pointer(self.path)
        self.name = self.path.name

    @cached_property
    def fingerprint(self) -> str:
        return sha256_file(self.path)[:16]

    def images(self, batch_size: int) -> Iterator[Tensor]:
        raise UserError(
            f"{self.path} holds statistics, no images: precision and recall need images. "
            "Set evaluate.precision_recall=false or evaluate.statistics=null."
        )

    def statistics(self, extractor: FeatureExtractor, rounding: str) -> GaussianStatistics:
        """Raises UserError when they were measured with another extractor or rounding."""
        found = self._published()
        if found is None:
            found = GaussianStatistics.load(self.path)
            for key, wanted in (("extractor_hash", extractor.hash), ("rounding", rounding)):
                if found.record.get(key) != wanted:
                    raise UserError(
                        f"{self.path} was measured with {key} {found.record.get(key)}, this evaluation has {wanted}. "
                        "Make it again with python -m tools.fid_ref, or set evaluate.statistics=null."
                    )
        if found.dim != extractor.dim:
            raise UserError(
                f"{self.path} holds features of width {found.dim}, but those of {extractor.name} have {extractor.dim}. "
                "Choose statistics of that network."
            )
        return found

    def _published(self) -> GaussianStatistics | None:
        try:
            with open_npz(self.path) as file:
                keys = [names for names in (("mu", "sigma"), ("ref_mu", "ref_sigma")) if set(names) <= set(file.files)]
                if not keys:
                    return None
                mean, cov = (torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in keys[0])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is no readable npz file: {error}. Copy it again.") from error
        if mean.ndim != 1 or cov.shape != 2 * mean.shape:
            raise UserError(f"{self.path} holds mu {tuple(mean.shape)} and sigma {tuple(cov.shape)}, no statistics.")
        statistics = GaussianStatistics(dim=len(mean), record={"n": None})
        statistics.n = UNKNOWN_COUNT
        statistics.mean, statistics.scatter = mean, cov * (UNKNOWN_COUNT - 1)
        return statistics


def reference_hash(reference: ReferenceImages, extractor: FeatureExtractor, rounding: str, *extra: str) -> str:
    """16 hex digits of what the reference IS, not of its floating-point numbers: machines agree on it."""
    return short_hash(reference.fingerprint, extractor.hash, rounding, *extra)


def reference_statistics(
    reference: ReferenceImages,
    extractor: FeatureExtractor,
    *,
    cache_dir: str | os.PathLike,
    rounding: str = "edm",
    batch_size: int = 250,
) -> GaussianStatistics:
    """Statistics of all reference images, from `cache_dir` when they are there and intact, else computed and kept.

    The file is `reference-<name>-<fingerprint>-<extractor>-<hash>-<rounding>.npz`. A damaged one is computed again,
    with a warning. A `StatisticsFile` gives its own.
    """
    if isinstance(reference, StatisticsFile):
        return reference.statistics(extractor, rounding)
    parts = (reference.name, reference.fingerprint, extractor.name, extractor.hash, rounding)
    path = Path(cache_dir) / f"reference-{'-'.join(safe_name(part) for part in parts)}.npz"
    if path.is_file():
        try:
            statistics = GaussianStatistics.load(path)
            if statistics.record.get("reference_hash") == reference_hash(reference, extractor, rounding):
                return statistics
            problem = f"{path} belongs to another reference"
        except UserError as error:
            problem = str(error)
        warnings.warn(f"{problem} Computing these reference statistics again.", stacklevel=2)
    statistics = compute_statistics(reference, extractor, rounding=rounding, batch_size=batch_size)
    statistics.save(path)
    return statistics


def compute_statistics(
    reference: ReferenceImages, extractor: FeatureExtractor, *, rounding: str = "edm", batch_size: int = 250
) -> GaussianStatistics:
    """Statistics of all reference images, with their record. Raises UserError when there are no images."""
    log.info("computing %s statistics of %s", extractor.name, reference.name)
    statistics = GaussianStatistics(dim=extractor.dim)
    for batch in reference.images(batch_size):
        statistics.update(extractor(to_uint8(batch, rounding)))
    if statistics.n == 0:
        raise UserError(f"{reference.name} holds no images. Choose another split or a larger limit.")
    statistics.record = {
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "dataset": reference.name,
        "fingerprint": reference.fingerprint,
        "reference_hash": reference_hash(reference, extractor, rounding),
        "n": statistics.n,
        "rounding": rounding,
        "ddof": 1,  # the default rule; the file holds the scatter, so either divisor can be had from it
    }
    return statistics


def first(batches: Iterable[Tensor], limit: int | None) -> Iterator[Tensor]:
    """The first `limit` images of the batches (all for None), the last batch cut; reads no batch it does not need."""
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


def _checked(limit: int | None) -> int | None:
    return limit if limit is None else limits.whole("limit", limit, least=1)


def _suffix(limit: int | None) -> str:
    return "" if limit is None else f"[:{limit}]"


def _limited(fingerprint: str, limit: int | None) -> str:
    return fingerprint if limit is None else short_hash(fingerprint, str(limit))
