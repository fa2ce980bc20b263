"""`task=export`: the chosen weights as safetensors, with the configuration that rebuilds the network without Hydra."""

from pathlib import Path

from omegaconf import DictConfig

from common.runtime.training.weights import trained_weights
from common.runtime.verbs.assemble import Assembled, assemble
from common.runtime.verbs.report import environment
from common.weights.export import export


def write_export(run: Assembled, *, step: int, average: str, folder: Path | None = None) -> Path:
    """The network's weights as they are now, and the trees that rebuild it without Hydra, in `folder` (None:
    `<run>/export`).
    """
    facts = environment()
    return export(
        run.folder / "export" if folder is None else folder,
        run.module.net,
        run.plain["project"]["net"],
        sampler=run.plain["sample"]["sampler"] if run.module.uses_sampler else None,
        meta={
            "experiment": run.cfg.run.experiment, "seed": run.cfg.seed, "step": step, "average": average,
            "profile": run.plain["ema"]["profiles"].get(average),
            "commit": facts["commit"], "dirty": facts["dirty"], "published": run.plain["published"],
            **run.module.export_facts(),
        },
    )  # fmt: skip


def export_task(cfg: DictConfig) -> None:
    """Write the chosen average of the newest checkpoint as safetensors + configuration."""
    run = assemble(cfg, training=False, measuring=False)
    source = trained_weights(
        run.module, run.folder, resume=cfg.resume, init_file=cfg.init.file, average=cfg.evaluate.average
    )
    folder = write_export(run, step=source["step"], average=source["average"])
    print(f"exported {source['average']} weights of {source['file']} to {folder}")
