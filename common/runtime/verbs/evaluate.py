"""The paper's metrics: at the end of a run, under task=test, and as a curve during training."""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from common.deq.regular import spectral_radius
from common.errors import UserError, nearest
from common.metrics.evaluate import Collected, GeneratorEvaluation
from common.metrics.features import FeatureExtractor
from common.metrics.measurement import Measurement
from common.metrics.reference import SplitImages, StatisticsFile
from common.runtime.training.ema import averaged, choose_average
from common.runtime.training.generative import GenerativeModule, index_batches
from common.runtime.training.module import ResearchModule, evaluating, leaves, to_device
from common.runtime.training.solver_health import SolverTotals, equilibria
from common.runtime.training.timing import step_times


class Evaluation:
    """Every extractor on every sampler. Metrics are called `<metric>_<extractor>_<sampler>`, e.g. `fd_digits_one_step`.

    samples, batch_size  images per sampler, and how many at a time (the images do not depend on it)
    seed                 image i depends on (seed, i) alone
    average              which weights: an entry of ema.profiles, or raw
    samplers             name -> sampler (`common.diffusion.sample`); null removes an inherited entry
    extractors           name -> feature extractor (`common.metrics.features`); null removes one
    every_n_steps        optimiser steps between two points of the curve, None: only at the end
    curve_samples        images per point of the curve
    at_start             the curve begins with the initial weights
    reference            split of the real images the generated ones are compared with
    statistics           file of feature statistics to compare with in place of those images: one of `tools.fid_ref`, or
                         an npz with mu and sigma as papers publish; None: the images
    balanced             as many images of every class, image i of class i modulo their number; False: random classes
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
        samplers: dict[str, Callable | None],
        extractors: dict[str, FeatureExtractor | None],
        at_start: bool = False,
        rounding: str = "edm",
        ddof: int = 1,
        inception_score: bool = False,
        precision_recall: bool = False,
        cache_dir: str = ".cache/metrics",
        reference: str = "train",
        statistics: str | None = None,
        balanced: bool = False,
    ):
        index_batches(samples, batch_size, "evaluate")
        index_batches(curve_samples, batch_size, "evaluate")
        self.samples, self.batch_size, self.seed, self.average = samples, batch_size, seed, average
        self.every_n_steps, self.curve_samples, self.at_start, self.with_floor = (
            every_n_steps, curve_samples, at_start, floor,
        )  # fmt: skip
        self.reference, self.balanced = reference, balanced
        self.statistics = None if statistics is None else StatisticsFile(path=statistics)
        if statistics is not None and precision_recall:
            raise UserError("evaluate.precision_recall needs images. Set it to false, or evaluate.statistics=null.")
        self.samplers = {name: sampler for name, sampler in samplers.items() if sampler is not None}
        self.extractors = [extractor for extractor in extractors.values() if extractor is not None]
        self._options: dict[str, Any] = dict(
            rounding=rounding, ddof=ddof, inception_score=inception_score, precision_recall=precision_recall,
            cache_dir=cache_dir, batch_size=batch_size,
        )  # fmt: skip

    def __bool__(self) -> bool:
        return bool(self.samplers and self.extractors)

    def check(self, module: ResearchModule, data) -> None:
        """Raises UserError when the module generates no images, or the data have none to measure them against."""
        if self and not isinstance(module, GenerativeModule):
            raise UserError(
                f"evaluate measures generated images, but {type(module).__name__} makes none. Set evaluate=split."
            )
        if self.statistics is not None:
            return
        if self and self.reference not in data.splits:
            raise UserError(
                f"evaluate.reference={self.reference} is no split of the data. {nearest(self.reference, data.splits)}"
                f"Splits: {', '.join(data.splits)}."
            )
        if self and hasattr(data, "check_reference"):
            data.check_reference(self.reference)

    def curve(self, module: ResearchModule, data) -> dict[str, Measurement]:
        """`run` with the images of one point of the curve."""
        return self.run(module, data, samples=self.curve_samples)

    def run(self, module: ResearchModule, data, *, samples: int | None = None, say=None) -> dict[str, Measurement]:
        """Metric name -> record, with the module's weights as they are."""
        samples, generator = samples or self.samples, cast(GenerativeModule, module)  # `check` has verified the type
        rank, world = _rank()
        batches = index_batches(samples, self.batch_size, "evaluate")[rank::world]
        judge = GeneratorEvaluation(
            extractors=self.extractors, samples=samples, device=str(module.device), **self._options
        )
        reference = self.statistics or SplitImages(data=data, split=self.reference)
        results: dict[str, Measurement] = {}
        for name, sampler in self.samplers.items():
            started = time.perf_counter()
            classes = generator.net.label_dim if self.balanced else 0
            images = (
                generator.generate(
                    indices, sampler=sampler, seed=self.seed, labels=indices % classes if classes else None
                )
                for indices in batches
            )
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


class SplitEvaluation:
    """The module's `evaluation_step` over a split of its data, averaged, plus what the solvers of equilibria report.

    `module.evaluation_step(batch)` gives name -> (sum, count); the means over the split go through `module.finalise`.
    A sum may be a tensor, a confusion matrix say, of which `finalise` then makes numbers.
    The first metric is the one a sweep minimises: a loss or an error. Networks with a DEQ have beside them `nfe`
    (evaluations of the map per sample), `residual` (mean relative residual) and `converged` (share of the samples).

    split            a split of the data module, read by `data.eval_batches(split)`; its transfer hooks are applied
                     here, as to the batches of a loader. A list: every one of them, metrics called `<split>_<metric>`
    average          which weights: an entry of ema.profiles, or raw
    every_n_steps    optimiser steps between two points of the curve, None: only at the end
    at_start         the curve begins with the initial weights
    samples          at most about so many samples (whole batches), None: all
    curve_samples    the same for a point of the curve;   curve_split  its split, None: `split`
    timed_steps      also median seconds of so many real training steps: `forward_s`, `backward_s`, `step_s`
    spectral_radius  also the spectral radius of the map's Jacobian at the equilibrium of the first batch, mean over its
                     samples, on the curve too

    In a multi-process run every rank runs over its share of the split and the sums are added.
    Raises UserError for options out of range, and from `check` and `run` for a split or module that do not fit.
    """

    def __init__(
        self,
        *,
        split: str | Sequence[str] = "test",
        average: str = "ema",
        every_n_steps: int | None = None,
        at_start: bool = False,
        samples: int | None = None,
        curve_samples: int | None = None,
        curve_split: str | Sequence[str] | None = None,
        timed_steps: int = 0,
        spectral_radius: bool = False,
    ):
        for name, value in (("samples", samples), ("curve_samples", curve_samples), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise UserError(f"evaluate.{name} must be >= 1 or null, got {value}. Set it to null for the default.")
        if timed_steps < 0:
            raise UserError(f"evaluate.timed_steps must be >= 0, got {timed_steps}. Set it to 0 to time nothing.")
        self.split, self.average, self.every_n_steps, self.at_start = split, average, every_n_steps, at_start
        self.samples, self.curve_samples, self.curve_split = samples, curve_samples, curve_split or split
        self.timed_steps, self.spectral_radius = timed_steps, spectral_radius

    def __bool__(self) -> bool:
        return True

    def check(self, module: ResearchModule, data) -> None:
        """Raises UserError when the module has no metrics of its own, or the data no such split."""
        if not callable(getattr(module, "evaluation_step", None)):
            raise UserError(
                f"evaluate=split needs {type(module).__name__}.evaluation_step, which it does not have. "
                f"Choose another evaluate=<choice> of conf/evaluate, or none."
            )
        for field, splits in (("split", self.split), ("curve_split", self.curve_split)):
            for split in [splits] if isinstance(splits, str) else splits:
                if split not in data.splits:
                    raise UserError(
                        f"evaluate.{field}={split} is no split of the data. {nearest(split, data.splits)}"
                        f"Splits: {', '.join(data.splits)}."
                    )

    def run(self, module: ResearchModule, data, *, say=None) -> dict[str, Measurement]:
        """Metric name -> record, with the module's weights as they are."""
        if data.trainer is None:
            data.setup("test")
        found = self._measure_all(module, data, self.split, self.samples, say)
        if self.timed_steps:
            times = step_times(module, data, self.timed_steps)
            if say is not None:
                say("  training steps: " + ", ".join(f"{name} {seconds:.4g}" for name, seconds in times.items()))
            found |= {name: self._record(name, value, self.timed_steps, data, "train") for name, value in times.items()}
        return found

    def curve(self, module: ResearchModule, data) -> dict[str, Measurement]:
        """The metrics of one point of the curve."""
        return self._measure_all(module, data, self.curve_split, self.curve_samples)

    def floor(self, data) -> dict[str, Measurement]:
        """Empty: these metrics have no floor."""
        return {}

    def _measure_all(self, module, data, splits: str | Sequence[str], samples, say=None) -> dict[str, Measurement]:
        found: dict[str, Measurement] = {}
        for split in [splits] if isinstance(splits, str) else splits:
            started = time.perf_counter()
            own = self._measure(module, data, split, samples)
            if say is not None:
                shown = ", ".join(f"{name} {record.value:.4g}" for name, record in own.items())
                say(f"  {split}: {shown}  ({time.perf_counter() - started:.0f} s)")
            found |= own if isinstance(splits, str) else {f"{split}_{name}": record for name, record in own.items()}
        return found

    def _measure(self, module: ResearchModule, data, split: str, samples: int | None) -> dict[str, Measurement]:
        sums: dict[str, tuple] = {}
        extra: dict[str, tuple] = {}
        seen, share = 0, None if samples is None else -(-samples // _rank()[1])
        with evaluating(module), SolverTotals(module.net) as solver:
            module.refresh()
            for batch in data.eval_batches(split):
                batch = to_device(batch, data, module.device)
                watched = self.spectral_radius and not seen
                with _keeping_last(module.net, watched):
                    for name, (total, count) in cast(Any, module).evaluation_step(batch).items():
                        before = sums.get(name, (0, 0))
                        sums[name] = (before[0] + _number(total), before[1] + _number(count))
                    extra |= _spectral_radius(module.net, module.device) if watched else {}
                seen += next((len(leaf) for leaf in leaves(batch) if leaf.dim()), 1)
                if share is not None and seen >= share:
                    break
        own = {name: (_read(total), float(count)) for name, (total, count) in sums.items()}
        health = {name: (float(total), float(count)) for name, (total, count) in (solver.sums | extra).items()}
        own, health = _add_up(own), _add_up(health)
        if not own:
            raise UserError(f"The split {split} of the data is empty: there is nothing to measure. Check data.root.")
        values = module.finalise({name: total / count for name, (total, count) in own.items()})
        counts = {name: count for name, (_, count) in own.items()}
        first = next(iter(counts.values()))
        values |= {name: total / count for name, (total, count) in health.items() if name not in values}
        counts = {name: count for name, (_, count) in health.items()} | counts
        return {
            name: self._record(name, float(value), round(counts.get(name, first)), data, split)
            for name, value in values.items()
        }

    def _record(self, name: str, value: float, samples: int, data, split: str) -> Measurement:
        fingerprint = getattr(data, "fingerprint", None)
        return Measurement(
            name=name, value=value, extractor="none", extractor_hash="none",
            reference=f"{getattr(data, 'name', None) or type(data).__name__}/{split}",
            reference_hash=fingerprint(split) if fingerprint else "none", samples=samples, rounding="none", ddof=0,
        )  # fmt: skip


class EvaluationCurve(Callback):
    """Logs `val/<metric>` every `evaluation.every_n_steps` optimiser steps, on the averaged weights."""

    def __init__(self, evaluation: Evaluation | SplitEvaluation, data, averages, progress=None):
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
            found = self.evaluation.curve(cast(ResearchModule, pl_module), self.data)
        values = {f"val/{name}": record.value for name, record in found.items()}
        log_now(trainer, values)
        if self.progress is not None and values:
            first = next(iter(values))
            self.progress.latest = {f"{first}@{trainer.global_step}": values[first]}


def log_now(trainer: Trainer, values: dict[str, float]) -> None:
    """Hand values to every logger at the current optimiser step, independent of `log_every_n_steps`."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def _key(metric: str) -> str:
    return metric.lower().replace("-", "_").replace(":", "_")


@contextmanager
def _keeping_last(net, wanted: bool):
    """The equilibrium layers keep the map and point of their last solve inside the block, if wanted."""
    layers = equilibria(net) if wanted else []
    for layer in layers:
        layer.keep_last = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keep_last, layer.last = False, None


def _spectral_radius(net, device: torch.device) -> dict[str, tuple]:
    """{spectral_radius: (sum over samples, samples)} of the maps just solved; empty without equilibria."""
    radii = []
    for layer in equilibria(net):
        if layer.last is not None:
            fn, z, args = layer.last
            radii.append(spectral_radius(fn, z, args, generator=torch.Generator(device).manual_seed(0)).double())
    return {"spectral_radius": (sum(r.sum() for r in radii), sum(len(r) for r in radii))} if radii else {}


def _number(value):
    """A float, or a tensor left on its device in double precision: adding up does not synchronise."""
    if not torch.is_tensor(value):
        return float(value)
    value = value.detach().double()
    return value.reshape(()) if value.numel() == 1 else value


def _read(total):
    """A sum as a float, or as a tensor on the CPU if it is more than a number."""
    return total.cpu() if torch.is_tensor(total) and total.dim() else float(total)


def _add_up(own: dict[str, tuple]) -> dict[str, tuple]:
    """The sums and counts of every rank added up, in the order of the first rank that has them."""
    _, world = _rank()
    if world == 1:
        return own
    gathered: list[dict] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(gathered, own)
    total: dict[str, tuple] = {}
    for part in gathered:
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


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
