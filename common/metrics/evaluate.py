"""A generator's images in, records with names, hashes and counts out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common import limits
from common.errors import UserError
from common.metrics.features import FeatureExtractor
from common.metrics.fid import GaussianStatistics, frechet_distance
from common.metrics.images import ROUNDINGS, to_uint8
from common.metrics.measurement import Measurement
from common.metrics.quality import inception_score, precision_recall
from common.metrics.reference import ReferenceImages, first, reference_hash, reference_statistics

NOISES = ("gaussian", "uniform")


@dataclass(kw_only=True)
class Collected:
    """What one extractor saw of a set of images; all on the CPU, so that ranks can exchange it."""

    statistics: GaussianStatistics
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class GeneratorEvaluation:
    """Frechet distances (and, if wanted, inception score, precision and recall) of generated images.

        evaluation = GeneratorEvaluation(extractors=[CifarResNet56(weights=...)], samples=50_000)
        table = evaluation(batches_of_images, SplitImages(data=datamodule))     # {"FD-resnet56": Measurement, ...}

    extractors        one pass over the images serves all of them
    samples           images measured, >= 1; the iterable must give at least as many, the rest is not drawn
    batch_size        of reading reference images and making noise
    rounding          how float images become 8-bit, see `common.metrics.images.to_uint8`
    ddof              1: covariance over n - 1 (EDM); 0: over n (ECT)
    minimum           refuse Frechet distances from fewer images on either side; None: warn below dim + 1
    inception_score   also "IS-<extractor>" in 10 splits ("IS" for the 2015 Inception network)
    precision_recall  also "precision-<extractor>", "recall-<extractor>", k = 3, against as many real images, evenly
                      spaced over the reference; keeps all features in memory
    cache_dir         where reference statistics are kept
    device            "auto" = CUDA when there is one
    """

    def __init__(
        self,
        *,
        extractors: list[FeatureExtractor],
        samples: int,
        batch_size: int = 250,
        rounding: str = "edm",
        ddof: int = 1,
        minimum: int | None = None,
        inception_score: bool = False,
        precision_recall: bool = False,
        cache_dir: str = ".cache/metrics",
        device: str = "auto",
    ):
        limits.positive(**{"evaluate.samples": samples, "evaluate.batch_size": batch_size})
        limits.choice("evaluate.rounding", rounding, ROUNDINGS)
        limits.choice("evaluate.ddof", ddof, (0, 1), hint="Set 0 to divide by n, 1 to divide by n - 1.")
        names = [extractor.name for extractor in extractors]
        if not names or len(set(names)) < len(names):
            raise UserError(f"extractors must hold at least one, each once, got {names}. Change evaluate.extractors.")
        if samples - ddof < 1:
            raise UserError(f"a covariance needs at least {ddof + 1} images, got samples={samples}. Set it higher.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = device
        self.extractors = list(extractors)
        self.samples, self.batch_size, self.rounding, self.ddof, self.minimum = (
            samples, batch_size, rounding, ddof, minimum,
        )  # fmt: skip
        self.with_score, self.with_precision, self.cache_dir = inception_score, precision_recall, cache_dir

    def __call__(self, images: Iterable[Tensor], reference: ReferenceImages) -> dict[str, Measurement]:
        """Metric name -> record.

        images  batches (B, C, H, W), float in [-1, 1] or uint8, any device; read until `samples` are there

        Raises UserError naming both counts when there are too few.
        """
        return self.measure(self.collect(images), reference)

    def collect(self, images: Iterable[Tensor], samples: int | None = None) -> dict[str, Collected]:
        """Extractor name -> what it saw of the first `samples` images (those of the evaluation unless given)."""
        wanted = self.samples if samples is None else samples
        collected = {e.name: Collected(statistics=GaussianStatistics(dim=e.dim)) for e in self.extractors}
        seen = 0
        for batch in first(images, wanted):
            batch = to_uint8(batch, self.rounding)
            seen += len(batch)
            for extractor in self.extractors:
                into = collected[extractor.name]
                features, logits = extractor.to(self.device).features_and_logits(batch)
                into.statistics.update(features)
                if self.with_precision:
                    into.features.append(features.cpu())
                if self.with_score and logits is not None:
                    into.logits.append(logits.cpu())
        if seen < wanted:
            raise UserError(f"found {seen} images, but expected at least {wanted}. Make more, or lower samples.")
        return collected

    def measure(self, collected: dict[str, Collected], reference: ReferenceImages) -> dict[str, Measurement]:
        """Records from what `collect` gave (several ranks: merge their statistics, join their lists, first)."""
        return {m.name: m for e in self.extractors for m in self._measure(e, collected[e.name], reference)}

    def floor(self, reference: ReferenceImages, held_out: ReferenceImages) -> dict[str, Measurement]:
        """The distance real images have: the first `samples` held-out ones (fewer if there are fewer)."""
        held = held_out.images(self.batch_size)
        batches = list(first(held, self.samples))  # uint8, small: the count must be known before the first measure
        collected = self.collect(batches, samples=sum(len(batch) for batch in batches))
        return self.measure(collected, reference)

    def noise_ceiling(
        self, reference: ReferenceImages, *, kind: str = "gaussian", seed: int = 0
    ) -> dict[str, Measurement]:
        """The distance pure noise has: N(0, 1) clipped to [-1, 1] ("gaussian"), or uniform on [-1, 1] ("uniform")."""
        limits.choice("kind of noise", kind, NOISES)
        shape = next(iter(reference.images(1))).shape[1:]
        return self(_noise(kind, self.samples, self.batch_size, shape, seed), reference)

    def _measure(
        self, extractor: FeatureExtractor, seen: Collected, reference: ReferenceImages
    ) -> Iterator[Measurement]:
        real = reference_statistics(
            reference,
            extractor.to(self.device),
            cache_dir=self.cache_dir,
            rounding=self.rounding,
            batch_size=self.batch_size,
        )
        common = {
            "extractor": extractor.name,
            "extractor_hash": extractor.hash,
            "samples": seen.statistics.n,
            "rounding": self.rounding,
        }
        count = real.record.get("n", real.n)
        against = {
            "reference": f"{reference.name} ({'count unknown' if count is None else f'{count} images'})",
            "reference_hash": reference_hash(reference, extractor, self.rounding),
        }
        value = frechet_distance(seen.statistics, real, ddof=self.ddof, minimum=self.minimum)
        yield Measurement(name=extractor.metric, value=value, ddof=self.ddof, **common, **against)

        suffix = "" if extractor.metric == "FID" else f"-{extractor.name}"
        if self.with_score and seen.logits:
            score, _ = inception_score(torch.cat(seen.logits))
            none = {"reference": "none", "reference_hash": "none"}
            yield Measurement(name=f"IS{suffix}", value=score, ddof=0, **common, **none)
        if self.with_precision:
            features = self._spread(reference, extractor, real.n, seen.statistics.n)
            against = {
                "reference": f"{reference.name} ({len(features)} of {real.n} images)",
                "reference_hash": reference_hash(reference, extractor, self.rounding, f"spread {len(features)}"),
            }
            precision, recall = precision_recall(features, torch.cat(seen.features).to(features.device))
            yield Measurement(name=f"precision{suffix}", value=precision, ddof=0, **common, **against)
            yield Measurement(name=f"recall{suffix}", value=recall, ddof=0, **common, **against)

    def _spread(self, reference: ReferenceImages, extractor: FeatureExtractor, n: int, count: int) -> Tensor:
        """Features of `count` real images evenly spaced over all n: data sets sorted by class stay balanced."""
        count = min(n, count)
        chosen = torch.arange(count) * n // count
        parts, start = [], 0
        for batch in reference.images(self.batch_size):
            rows = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
            start += len(batch)
            if len(rows):
                parts.append(extractor(to_uint8(batch, self.rounding)[rows]))
        return torch.cat(parts)


def _noise(kind: str, samples: int, batch_size: int, shape, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, batch_size):
        size = (min(batch_size, samples - start), *shape)
        if kind == "gaussian":
            yield torch.randn(size, generator=generator)
        else:
            yield torch.rand(size, generator=generator) * 2 - 1
