"""`task=test`: the paper's metrics of a trained run beside the published numbers."""

import time

import torch
from omegaconf import DictConfig

from common.errors import UserError
from common.runtime.training.weights import trained_weights
from common.runtime.verbs.assemble import assemble, task_overrides
from common.runtime.verbs.report import print_table, show, write_result


def test_task(cfg: DictConfig) -> float | None:
    """Measure, print ours beside the published values with their source, and write `<run.dir>/test/result.json`."""
    started = time.perf_counter()
    run = assemble(cfg, training=False, measuring=True)
    if not run.evaluation:
        raise UserError(
            "Nothing to measure: evaluate has no samplers or no extractors. Set evaluate=<choice> in conf/evaluate."
        )
    source = trained_weights(
        run.module, run.folder, resume=cfg.resume, init_file=cfg.init.file, average=cfg.evaluate.average
    )
    run.module.to("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    print(f"weights: {source['file']} ({source['average']}, step {source['step']})", flush=True)
    metrics = {f"test/{name}": record for name, record in run.evaluation.run(run.module, run.data, say=print).items()}
    metrics |= {f"test/{name}": record for name, record in run.evaluation.floor(run.data).items()}
    published = {entry["metric"]: entry for entry in run.plain["published"]}
    rows = []
    for name in dict.fromkeys([*metrics, *published]):
        entry, record = published.get(name), metrics.get(name)
        rows.append({
            "metric": name,
            "ours": show(record.value) if record else "not measured",
            run.module.unit: record.samples if record else "-",
            "published": show(float(entry["value"])) if entry else "-",
            "source": entry["source"] if entry else "-",
        })  # fmt: skip
    print_table(f"{cfg.run.experiment}: {source['average']} weights at step {source['step']}", rows)
    objective = next(iter(metrics.values())).value
    path = write_result(
        run.folder / "test", experiment=cfg.run.experiment, task="test", overrides=task_overrides(), seed=cfg.seed,
        step=source["step"], wall_time_s=time.perf_counter() - started, metrics=metrics, objective=objective,
    )  # fmt: skip
    print(f"records: {path}")
    return objective
