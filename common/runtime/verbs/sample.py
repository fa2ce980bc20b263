"""`task=sample`: a grid, one PNG per image and an npz; of other networks, what their module's `show` writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from omegaconf import DictConfig

from common.errors import UserError
from common.files import atomic, write_json
from common.metrics.images import to_uint8
from common.runtime.training.callbacks import write_grid
from common.runtime.training.generative import GenerativeModule, index_batches
from common.runtime.training.module import evaluating
from common.runtime.training.weights import trained_weights
from common.runtime.verbs.assemble import Assembled, assemble


def sample_task(cfg: DictConfig) -> None:
    """Makes `sample.samples` images with `sample.sampler` into `<run.dir>/samples/<sampler>-nfe<n>-seed<k>/`.

    Image i depends on (sample.seed, i) and its class alone. Writes images/000000.png ..., grid.png (at most 400
    images), samples.npz with `images` uint8 (N, H, W, C), `labels` int64 (N,) or -1, and `samples.json`.
    A module that generates no images shows `sample.samples` samples in its own way, in `<run.dir>/samples/seed<k>/`,
    or what it makes of the files in `sample.input`, in `<run.dir>/samples/<name of the folder or file>/`.
    """
    batches = index_batches(cfg.sample.samples, cfg.sample.batch_size, "sample")
    run = assemble(cfg, training=False, measuring=False)
    source = trained_weights(
        run.module, run.folder, resume=cfg.resume, init_file=cfg.init.file, average=cfg.sample.average
    )
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    module = run.module.to(device)
    if module.uses_sampler and cfg.sample.input is not None:
        raise UserError(f"sample.input={cfg.sample.input} is given, but this network makes images from noise. Drop it.")
    if module.uses_sampler:
        make_images(run, batches, source)
    else:
        show_samples(run, source)


def show_samples(run: Assembled, source: dict) -> None:
    """What the module's `show` writes, with the chosen weights, its paths printed.

    Raises UserError when the data are not there or the module has nothing to show.
    """
    seed, module, folder = run.cfg.sample.seed, run.module, run.folder / "samples"
    files = input_files(run.cfg.sample.input)
    if files is None:
        run.data.check()
        run.data.setup("test")
    with evaluating(module):
        module.refresh()
        if files is None:
            written = module.show(run.data, folder / f"seed{seed}", samples=run.cfg.sample.samples, seed=seed)
        else:
            first = files if isinstance(files, Path) else files[0]
            written = module.show_files(files, run.data, folder / (first.resolve().stem or "input"))
    if not written:
        raise UserError(
            f"task=sample has nothing to show: {type(module).__name__} writes no pictures. Use task=test for metrics."
        )
    print(f"{source['file']} ({source['average']}, step {source['step']})")
    for path in written:
        print(f"shown: {path}")


def input_files(given: str | Sequence[str] | None) -> Path | list[Path] | None:
    """`sample.input` as a path or a list of paths. Raises UserError for one that does not exist."""
    if given is None:
        return None
    files = [Path(str(file)).expanduser() for file in ([given] if isinstance(given, str) else given)]
    gone = [file for file in files if not file.exists()]
    if gone or not files:
        raise UserError(
            f"sample.input={gone[0] if gone else '[]'} does not exist. Set it to a folder of pictures, to one picture, "
            "or to a list [a.png,b.png]."
        )
    return files[0] if isinstance(given, str) else files


def make_images(run: Assembled, batches: list[torch.Tensor], source: dict) -> None:
    """The images of the index `batches`, as a grid, single files and an array."""
    from rich.progress import track

    cfg, module = run.cfg, cast(GenerativeModule, run.module)
    variant = getattr(run.sampler, "variant", "")  # distinguishes samplers of the same class
    name = "-".join([type(run.sampler).__name__.lower(), f"nfe{run.sampler.nfe}", *filter(None, [variant]),
                     f"seed{cfg.sample.seed}"])  # fmt: skip
    folder = run.folder / "samples" / name
    (folder / "images").mkdir(parents=True, exist_ok=True)

    images, labels = [], []
    for indices in track(batches, description=f"{run.sampler.nfe} network calls per image"):
        classes = chosen_classes(cfg.sample.classes, indices, module.net.label_dim)
        made = module.generate(indices, sampler=run.sampler, seed=cfg.sample.seed, labels=classes)
        pixels = to_uint8(made.float().cpu())
        for index, picture in zip(indices.tolist(), pixels, strict=True):
            _write_png(folder / "images" / f"{index:06d}.png", picture)
        images.append(pixels)
        labels.append(torch.full((len(indices),), -1) if classes is None else classes.cpu())
    stacked = torch.cat(images)
    with atomic(folder / "samples.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, images=stacked.permute(0, 2, 3, 1).numpy(), labels=torch.cat(labels).numpy())
    grid = write_grid(folder / "grid.png", stacked[:400])
    write_json(folder / "samples.json", {
        "weights": source, "sampler": run.plain["sample"]["sampler"], "seed": cfg.sample.seed, "samples": len(stacked),
    })  # fmt: skip
    print(f"{len(stacked)} images of {source['file']} ({source['average']}, step {source['step']})")
    print(f"grid: {grid}\nimages: {folder / 'images'}\narray: {folder / 'samples.npz'}")


def chosen_classes(classes, indices: torch.Tensor, label_dim: int) -> torch.Tensor | None:
    """Class of each image: `classes` repeated over the image numbers, or None for random ones.

    Raises UserError for classes of an unconditional network or outside 0 .. label_dim - 1.
    """
    if not classes:
        return None
    if not label_dim:
        raise UserError("sample.classes is given, but the network is unconditional. Set sample.classes=null.")
    bad = [c for c in classes if not 0 <= c < label_dim]
    if bad:
        raise UserError(f"sample.classes must lie in 0..{label_dim - 1}, got {bad[0]}. Choose classes of the data set.")
    return torch.tensor(list(classes))[indices % len(classes)]


def _write_png(path: Path, pixels: torch.Tensor) -> None:
    from PIL import Image

    array = pixels.permute(1, 2, 0).numpy()
    with atomic(path) as temporary:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, format="PNG")
