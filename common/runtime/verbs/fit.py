"""`task=fit`: train or continue a run, then measure, export and summarise it."""

import re
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from common.errors import UserError
from common.files import read_json, write_json
from common.runtime.cli import needs
from common.runtime.cli.lock import only_run
from common.runtime.cli.transcript import recorded
from common.runtime.training.callbacks import Progress
from common.runtime.training.checkpoint import SafeCheckpointIO
from common.runtime.training.ema import WeightAverages, averaged, choose_average
from common.runtime.training.figures import plot_curves
from common.runtime.training.logger import MetricsCSV, StepNumber
from common.runtime.training.weights import find_init, initialise
from common.runtime.verbs.assemble import Assembled, assemble, instantiate, task_overrides
from common.runtime.verbs.evaluate import EvaluationCurve
from common.runtime.verbs.export import write_export
from common.runtime.verbs.folder import finished_result, is_first_process, prepare, run_facts, starting_point
from common.runtime.verbs.report import comparison_table, show, write_result
from common.weights.load import stored_step

WANDB, TENSORBOARD = "lightning.pytorch.loggers.WandbLogger", "lightning.pytorch.loggers.TensorBoardLogger"


def build_trainer(run: Assembled) -> tuple[Trainer, WeightAverages]:
    """Lightning's Trainer with our checkpoint files, averages and callbacks in their order.

    Loggers drop what they hold of steps after the checkpoint that training continues from.
    """
    cfg, step = run.cfg, stored_step(run.start) if run.start else 0
    averages = instantiate(cfg.ema)
    for wanted in (cfg.evaluate.average, cfg.sample.average):
        choose_average(dict.fromkeys(averages.profiles), wanted)  # refuse now, not after the last step
    callbacks = {name: instantiate(node) for name, node in (cfg.callbacks or {}).items() if node is not None}
    progress = next((c for c in callbacks.values() if isinstance(c, Progress)), None)
    ordered = [averages, StepNumber(), *callbacks.values()]
    if run.evaluation:
        ordered.insert(2, EvaluationCurve(run.evaluation, run.data, averages, progress))
    table = MetricsCSV(path=str(run.folder / "metrics.csv"))
    table.start_at(step)
    loggers = [table, *(build_logger(node, run.folder, step) for node in (cfg.logger or {}).values() if node)]
    trainer = instantiate_trainer(cfg, callbacks=ordered, logger=loggers, default_root_dir=str(run.folder))
    return trainer, averages


def build_logger(node: DictConfig, folder: Path, step: int) -> Logger:
    """A logger of the configuration. When this run continues, so does its log: same id, no step twice."""
    if node._target_ == WANDB and not node.get("id"):
        return instantiate(node, id=run_facts(folder).get("id"), resume="allow")
    if node._target_ == TENSORBOARD and step:
        return instantiate(node, purge_step=step + 1)  # event files are only appended to: readers then skip later steps
    return instantiate(node)


def instantiate_trainer(cfg: DictConfig, **objects) -> Trainer:
    """The trainer section with objects passed in; SLURM, fork or spawn details are Lightning's."""
    import hydra

    return hydra.utils.instantiate(
        cfg.trainer, _convert_="all", log_every_n_steps=_logging_interval(cfg), plugins=[SafeCheckpointIO()],
        enable_checkpointing=True, **objects,
    )  # fmt: skip


def _logging_interval(cfg: DictConfig) -> int:
    """Steps between two logged rows: a run shorter than the interval still logs its last step."""
    every, steps = cfg.trainer.log_every_n_steps, cfg.trainer.max_steps
    return min(every, steps) if steps > 0 else every


def fit_task(cfg: DictConfig) -> float | None:
    """Train (or continue), evaluate, export; returns the sweep objective: the first metric of the evaluation."""
    overrides = task_overrides()
    with recorded() as transcript:
        run = assemble(cfg, training=True, measuring=True)
        with only_run(run.folder):
            run = replace(run, start=starting_point(run))
            finished = finished_result(run)
            if finished is not None:
                show_finished(run, finished)
                return finished["objective"]
            needed = {
                name: needs.ensure(name, need, seed=cfg.seed, paths=run.plain["paths"])
                for name, need in (run.plain["needs"] or {}).items()
            }
            prepare(run, overrides)
            if is_first_process():
                transcript.keep(run.folder / "run.log")
            return train(run, needed, overrides)


def show_finished(run: Assembled, result: dict) -> None:
    """Print the result of a run that has no steps left to train."""
    if is_first_process():
        print(
            f"finished: {run.cfg.run.experiment} has trained {result['step']} of {run.cfg.trainer.max_steps} steps in "
            f"{run.folder}. Measure it with task=test, sample it with task=sample, or raise trainer.max_steps."
        )
        for name, metric in result["metrics"].items():
            print(f"  {name}: {show(metric['value'])}")


def train(run: Assembled, needed: dict, overrides: list[str]) -> float | None:
    """Train in a prepared folder, then measure and export (`finish`); returns the objective."""
    cfg, start, started = run.cfg, run.start, time.perf_counter()
    init = find_init(cfg.init.file, cfg.init.hint) if start is None else None
    if init is not None:
        report = initialise(run.module.net, init, cfg.init.average)
        print(f"Initial weights: {init} ({report.loaded} tensors)")
    trainer, averages = build_trainer(run)
    before = _earlier_seconds(run.folder) if start else 0.0
    if trainer.is_global_zero:
        action = f"continuing {start.name}" if start else "training"
        print(f"{action}: {cfg.run.experiment} to step {trainer.max_steps} in {run.folder}")
    try:
        trainer.fit(run.module, datamodule=run.data, ckpt_path=str(start) if start else None, weights_only=True)
    except SystemExit as leaving:  # how Lightning ends on Ctrl-C outside the steps
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from leaving
        raise
    except RuntimeError as error:
        refusal = precision_error(error, str(cfg.trainer.precision))
        if refusal is None:
            raise
        raise refusal from error
    finally:
        with suppress(UserError):  # a full disk has been reported by then
            if trainer.is_global_zero:
                write_json(run.folder / "seconds.json", {"training": before + time.perf_counter() - started})
    return finish(run, trainer, averages, needed, overrides, started, before)


def precision_error(error: RuntimeError, precision: str) -> UserError | None:
    """The UserError for torch's error about mixed dtypes, which a precision of one format for all parts can cause."""
    if precision not in ("bf16-true", "64-true") or not re.search(r"dtype|same type|BFloat16|Double", str(error)):
        return None
    reason = " ".join(str(error).split())[:160]
    mixed = "bf16-mixed" if precision == "bf16-true" else "32-true"
    return UserError(
        f"trainer.precision={precision} does not work with this experiment, parts of which compute in float32 "
        f"({reason}). Set trainer.precision={mixed}."
    )


def finish(
    run: Assembled, trainer: Trainer, averages: WeightAverages, needed: dict, overrides, started, before
) -> float | None:
    """Everything after the last step: metrics, export, curves, result.json and the closing table."""
    cfg, module = run.cfg, run.module
    objective = None
    trained = time.perf_counter() - started + before
    metrics: dict = {}
    with averaged(module, choose_average(averages.averages, cfg.evaluate.average)):
        if run.evaluation:
            if trainer.is_global_zero:
                print("evaluating", flush=True)
            metrics = {f"test/{k}": v for k, v in run.evaluation.run(module, run.data, say=_say(trainer)).items()}
        if trainer.is_global_zero:
            if run.evaluation and metrics:
                metrics |= {f"test/{k}": v for k, v in run.evaluation.floor(run.data).items()}
            write_export(run, step=trainer.global_step, average=cfg.evaluate.average)
    if not trainer.is_global_zero:
        return None
    values = {name: record.value for name, record in metrics.items()}
    for logger in trainer.loggers:
        if values:
            logger.log_metrics(values, step=trainer.global_step)
        logger.save()
    objective = next(iter(values.values()), _last_loss(trainer))
    # what callbacks measured in training: `results`, name -> number
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        metrics.update(getattr(callback, "results", dict)())
    pictures = plot_curves(run.folder / "metrics.csv", run.folder / "pictures")
    write_result(
        run.folder, experiment=cfg.run.experiment, task=cfg.task, overrides=overrides, seed=cfg.seed,
        step=trainer.global_step, wall_time_s=trained, metrics=metrics, objective=objective,
    )  # fmt: skip
    if run.plain["table"] and metrics:
        measured = {name: {"value": value} for name, value in values.items()}
        own = {"metrics": measured, "step": trainer.global_step, "wall_time_s": trained}
        print_closing_table(run, own, needed)
    newest = sorted((run.folder / "pictures").glob("step-*"))[-1:]
    for what, path in [*(("samples", p) for p in newest), *(("curve", p) for p in pictures)]:
        print(f"{what}: {path}")
    print(f"weights: {run.folder / 'export'}\nrun folder: {run.folder}")
    close(trainer.loggers)
    return objective


def close(loggers: list) -> None:
    """Flush every logger, and end the wandb run: the next run of a sweep may run in this same process."""
    for logger in loggers:
        logger.finalize("success")
        end = getattr(logger.experiment, "finish", None)
        if end is not None:
            end()


def print_closing_table(run: Assembled, own: dict, needed: dict) -> None:
    """The rows of `table`: this run beside the runs it needed, each number read from a result record."""
    rows = []
    for row in run.plain["table"]:
        source = own if row["run"] == "self" else needed.get(row["run"])
        if source is None:
            raise UserError(f"table row '{row['label']}' names run '{row['run']}', which is not in needs.")
        line = {"model": row["label"]}
        for column, metric in row["metrics"].items():
            found = source["metrics"].get(metric)
            line[column] = show(found["value"]) if found else "-"
        if row.get("training", True):
            line |= {"training steps": source["step"], "seconds": round(source["wall_time_s"])}
        rows.append(line)
    for path in comparison_table(rows, run.folder, title=run.cfg.run.experiment):
        print(f"table: {path}")


def _say(trainer: Trainer):
    return (lambda text: print(text, flush=True)) if trainer.is_global_zero else None


def _last_loss(trainer: Trainer) -> float | None:
    loss = trainer.callback_metrics.get("train/loss")
    return None if loss is None else float(loss)


def _earlier_seconds(folder: Path) -> float:
    path = folder / "seconds.json"
    return float(read_json(path)["training"]) if path.is_file() else 0.0
