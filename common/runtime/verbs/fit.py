"""`task=fit`: needs, refusals, restart, training, evaluation, export, tables."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from common.errors import UserError
from common.files import read_json, write_json, write_text
from common.runtime.cli import needs
from common.runtime.cli.identity import first_difference
from common.runtime.cli.lock import only_run
from common.runtime.training.callbacks import Progress
from common.runtime.training.checkpoint import SafeCheckpointIO, latest_complete, list_checkpoints
from common.runtime.training.ema import WeightAverages, averaged, choose_average
from common.runtime.training.figures import plot_curves
from common.runtime.training.logger import MetricsCSV
from common.runtime.training.weights import find_init, initialise
from common.runtime.verbs.assemble import Assembled, assemble, instantiate, task_overrides
from common.runtime.verbs.evaluate import EvaluationCurve
from common.runtime.verbs.export import write_export
from common.runtime.verbs.report import comparison_table, environment, show, write_result
from common.weights.load import stored_step


def prepare_folder(run: Assembled, overrides: list[str]) -> Path | None:
    """Make the run folder self-explaining and find the checkpoint to continue from.

    Raises UserError when the folder holds a run with other settings; `resume=never` puts that run's checkpoints aside.
    """
    folder, resume = run.folder, run.cfg.resume
    checkpoints = folder / "checkpoints"
    if resume == "never" and list_checkpoints(checkpoints):
        number = 1 + len(list(folder.glob("checkpoints.old-*")))
        shutil.move(checkpoints, folder / f"checkpoints.old-{number}")
        print(f"Starting over: the earlier checkpoints are kept in {folder / f'checkpoints.old-{number}'}")
    if resume not in ("auto", "never"):
        start = Path(resume)
        if not start.is_file():
            raise UserError(f"resume={resume} is no checkpoint file. Use resume=auto, resume=never or a step-*.ckpt.")
    else:
        start = latest_complete(checkpoints)
    stored, inputs = folder / "config.yaml", folder / "inputs.json"
    if start is not None and stored.is_file():
        _refuse_other_run(OmegaConf.to_container(OmegaConf.load(stored)), run.plain, folder)
    known = read_json(inputs) if start is not None and inputs.is_file() else {}
    found = _data_fingerprint(run)
    if found and known.get("data", found) != found:
        raise UserError(
            f"{folder} holds a run on other data: the files below data.root={run.plain['data'].get('root')} are not "
            f"those it was started with. Choose another folder with run.dir=<folder>, or start over with resume=never."
        )
    write_json(inputs, {"data": found or known.get("data")})
    write_text(stored, OmegaConf.to_yaml(OmegaConf.create(run.plain)))
    write_text(folder / "overrides.yaml", OmegaConf.to_yaml(overrides))
    write_json(folder / "environment.json", environment())
    return start


def _refuse_other_run(old: dict, new: dict, folder: Path) -> None:
    found = first_difference(old, new)
    if found is not None:
        key, before, after = found
        raise UserError(
            f"{folder} holds a run with other settings: {key} was {before}, is {after}. "
            f"Choose another folder with run.dir=<folder>, or start over with resume=never."
        )


def _data_fingerprint(run: Assembled) -> str | None:
    """Fingerprint of the split trained on; None for data that have none, such as mixtures of sets."""
    split = getattr(run.data, "train_split", "train")
    if split not in getattr(run.data, "splits", ()) or not hasattr(run.data, "fingerprint"):
        return None
    with suppress(UserError):  # of latents: the pictures they were made of may not be here
        return run.data.fingerprint(split)
    return None


def build_trainer(run: Assembled) -> tuple[Trainer, WeightAverages]:
    """Lightning's Trainer with our checkpoint files, averages and callbacks in their order."""
    cfg = run.cfg
    averages = instantiate(cfg.ema)
    for wanted in (cfg.evaluate.average, cfg.sample.average):
        choose_average(dict.fromkeys(averages.profiles), wanted)  # refuse now, not after the last step
    callbacks = {name: instantiate(node) for name, node in (cfg.callbacks or {}).items() if node is not None}
    progress = next((c for c in callbacks.values() if isinstance(c, Progress)), None)
    ordered = [averages, *callbacks.values()]
    if run.evaluation:
        ordered.insert(1, EvaluationCurve(run.evaluation, run.data, averages, progress))
    loggers = [MetricsCSV(path=str(run.folder / "metrics.csv"))]
    loggers += [instantiate(node) for node in (cfg.logger or {}).values() if node is not None]
    trainer = instantiate_trainer(cfg, callbacks=ordered, logger=loggers, default_root_dir=str(run.folder))
    return trainer, averages


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
    run = assemble(cfg, training=True, measuring=True)
    results = {
        name: needs.ensure(name, need, seed=cfg.seed, paths=run.plain["paths"])
        for name, need in (run.plain["needs"] or {}).items()
    }
    started = time.perf_counter()
    with only_run(run.folder):
        start = prepare_folder(run, overrides)
        init = find_init(cfg.init.file, cfg.init.hint) if start is None else None
        if init is not None:
            report = initialise(run.module.net, init, cfg.init.average)
            print(f"Initial weights: {init} ({report.loaded} tensors)")
        trainer, averages = build_trainer(run)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.start_at(stored_step(start) if start else 0)
        before = _earlier_seconds(run.folder) if start else 0.0
        if trainer.is_global_zero:
            action = f"continuing {start.name}" if start else "training"
            print(f"{action}: {cfg.run.experiment} to step {trainer.max_steps} in {run.folder}")
        try:
            trainer.fit(run.module, datamodule=run.data, ckpt_path=str(start) if start else None, weights_only=True)
        except SystemExit as leaving:  # Lightning's answer to Ctrl-C outside the steps
            if isinstance(leaving.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from leaving
            raise
        finally:
            with suppress(UserError):  # a full disk has been reported by then
                if trainer.is_global_zero:
                    write_json(run.folder / "seconds.json", {"training": before + time.perf_counter() - started})
        return finish(run, trainer, averages, results, overrides, started, before)


def finish(
    run: Assembled, trainer: Trainer, averages: WeightAverages, results: dict, overrides, started, before
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
            metrics.update({f"test/{k}": v for k, v in run.evaluation.floor(run.data).items()} if metrics else {})
            write_export(run, step=trainer.global_step, average=cfg.evaluate.average)
    if not trainer.is_global_zero:
        return None
    values = {name: record.value for name, record in metrics.items()}
    for logger in trainer.loggers:
        if values:
            logger.log_metrics(values, step=max(trainer.global_step - 1, 0))
        logger.save()
    objective = next(iter(values.values()), _last_loss(trainer))
    for callback in trainer.callbacks:  # what was seen on the way: `results`, name -> number
        metrics.update(getattr(callback, "results", dict)())
    pictures = plot_curves(run.folder / "metrics.csv", run.folder / "pictures")
    write_result(
        run.folder, experiment=cfg.run.experiment, task=cfg.task, overrides=overrides, seed=cfg.seed,
        step=trainer.global_step, wall_time_s=trained, metrics=metrics, objective=objective,
    )  # fmt: skip
    if run.plain["table"] and metrics:
        measured = {name: {"value": value} for name, value in values.items()}
        own = {"metrics": measured, "step": trainer.global_step, "wall_time_s": trained}
        print_closing_table(run, own, results)
    newest = sorted((run.folder / "pictures").glob("step-*"))[-1:]
    for what, path in [*(("samples", p) for p in newest), *(("curve", p) for p in pictures)]:
        print(f"{what}: {path}")
    print(f"weights: {run.folder / 'export'}\nrun folder: {run.folder}")
    close(trainer.loggers)
    return objective


def close(loggers: list) -> None:
    """Flush every logger, and end the wandb run: the next run of a sweep may live in this same process."""
    for logger in loggers:
        logger.finalize("success")
        end = getattr(logger.experiment, "finish", None)
        if end is not None:
            end()


def print_closing_table(run: Assembled, own: dict, results: dict) -> None:
    """The rows of `table`: this run beside the runs it needed, each number read from a result record."""
    rows = []
    for row in run.plain["table"]:
        source = own if row["run"] == "self" else results.get(row["run"])
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
