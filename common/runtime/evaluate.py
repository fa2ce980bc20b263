"""The paper's metrics of a generator: at the end of a run, under task=test, and as a curve during training."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from common.metrics.evaluate import Collected, GeneratorEvaluation
from common.metrics.features import FeatureExtractor
from common.metrics.measurement import Measurement
from common.metrics.reference import SplitImages
from common.runtime.ema import averaged, choose_average
from common.runtime.generative import GenerativeModule, index_batches


class Evaluation:
    """Every extractor on every sampler. Metrics are called `<metric>_<extractor>_<sampler>`, e.g. `fd_digits_one_step`.

    samples, batch_size  images per sampler, and how many at a time (the images do not depend on it)
    seed                 image i depends on (seed, i) alone
    average              which weights: an entry of ema.profiles, or raw
    samplers             name -> sampler (`common.diffusion.sample`); null takes an inherited entry away
    extractors           name -> feature extractor (`common.metrics.features`); null likewise
    every_n_steps        optimiser steps between two points of the curve, None: only at the end
    curve_samples        images per point of the curve
    at_start             the curve begins with the initial weights
    floor                also the distance of held-out real images (split "test") from the training images
    rounding, ddof, inception_score, precision_recall, cache_dir   see `GeneratorEvaluation`

    In a multi-process run every rank makes its share of the images and the statistics are merged.
    """

    def __init__(
        self,
        *,
        samples: int,
        batch_size: int,
        seed: int,
        average: str,
        every_n_steps: int | None,
        curve_samples: int,
        floor: bool,
        samplers: dict[str, object | None],
        extractors: dict[str, FeatureExtractor | None],
        at_start: bool = False,
        rounding: str = "edm",
        ddof: int = 1,
        inception_score: bool = False,
        precision_recall: bool = False,
        cache_dir: str = ".cache/metrics",
    ):
        index_batches(samples, batch_size, "evaluate")
        index_batches(curve_samples, batch_size, "evaluate")
        self.samples, self.batch_size, self.seed, self.average = samples, batch_size, seed, average
        self.every_n_steps, self.curve_samples, self.at_start, self.with_floor = (
            every_n_steps, curve_samples, at_start, floor,
        )  # fmt: skip
        self.samplers = {name: sampler for name, sampler in samplers.items() if sampler is not None}
        self.extractors = [extractor for extractor in extractors.values() if extractor is not None]
        self._options = dict(
            rounding=rounding, ddof=ddof, inception_score=inception_score, precision_recall=precision_recall,
            cache_dir=cache_dir, batch_size=batch_size,
        )  # fmt: skip

    def __bool__(self) -> bool:
        return bool(self.samplers and self.extractors)

    def run(self, module: GenerativeModule, data, *, samples: int | None = None, say=None) -> dict[str, Measurement]:
        """Metric name -> record, with the module's weights as they are."""
        samples = samples or self.samples
        rank, world = _rank()
        batches = index_batches(samples, self.batch_size, "evaluate")[rank::world]
        judge = GeneratorEvaluation(
            extractors=self.extractors, samples=samples, device=str(module.device), **self._options
        )
        reference = SplitImages(data=data)
        results: dict[str, Measurement] = {}
        for name, sampler in self.samplers.items():
            started = time.perf_counter()
            images = (module.generate(indices, sampler=sampler, seed=self.seed) for indices in batches)
            share = sum(len(indices) for indices in batches)
            collected = _merge(judge.collect(images, samples=share) if share else {}, judge)
            measured = judge.measure(collected, reference)
            results.update({f"{_key(metric)}_{name}": record for metric, record in measured.items()})
            if say is not None:
                shown = ", ".join(f"{metric} {record.value:.4g}" for metric, record in measured.items())
                say(f"  {name}: {shown}  ({samples} images, {time.perf_counter() - started:.0f} s)")
        return results

    def floor(self, data) -> dict[str, Measurement]:
        """`<metric>_<extractor>_floor`: held-out real images against the training images; empty when not asked for."""
        if not self.with_floor or "test" not in data.splits:
            return {}
        judge = GeneratorEvaluation(extractors=self.extractors, samples=self.samples, device="cpu", **self._options)
        measured = judge.floor(SplitImages(data=data), SplitImages(data=data, split="test"))
        return {f"{_key(metric)}_floor": record for metric, record in measured.items()}


class EvaluationCurve(Callback):
    """Logs `val/<metric>` every `evaluation.every_n_steps` optimiser steps, on the averaged weights."""

    def __init__(self, evaluation: Evaluation, data, averages, progress=None):
        self.evaluation, self.data, self.averages, self.progress = evaluation, data, averages, progress
        self._done = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step
        if self.evaluation.at_start and self._done == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step, every = trainer.global_step, self.evaluation.every_n_steps
        if not every or step % every or step == self._done or step == trainer.max_steps:
            return  # the last step is measured with all images, by the final evaluation
        self._done = step
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = choose_average(self.averages.averages, self.evaluation.average)
        with averaged(pl_module, weights):
            found = self.evaluation.run(pl_module, self.data, samples=self.evaluation.curve_samples)
        values = {f"val/{name}": record.value for name, record in found.items()}
        log_now(trainer, values)
        if self.progress is not None and values:
            first = next(iter(values))
            self.progress.latest = {f"{first}@{trainer.global_step}": values[first]}


def log_now(trainer: Trainer, values: dict[str, float]) -> None:
    """Hand values to every logger at the current optimiser step, whatever `log_every_n_steps` says."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=max(trainer.global_step - 1, 0))


def _key(metric: str) -> str:
    return metric.lower().replace("-", "_").replace(":", "_")


def _rank() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


def _merge(own: dict[str, Collected], judge: GeneratorEvaluation) -> dict[str, Collected]:
    """Every rank's statistics added up (float64, associative), its feature lists joined in rank order."""
    _, world = _rank()
    if world == 1:
        return own
    gathered: list[dict[str, Collected]] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(gathered, own)
    total: dict[str, Collected] = {}
    for part in gathered:
        for name, seen in part.items():
            if name not in total:
                total[name] = seen
                continue
            total[name].statistics.merge(seen.statistics)
            total[name].features.extend(seen.features)
            total[name].logits.extend(seen.logits)
    return total
