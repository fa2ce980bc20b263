"""Images to latents, once, so that training reads numbers instead of running an encoder.

    python -m tools.encode_latents <images> <out> --vae <folder of the autoencoder> --size 256
    torchrun --nproc-per-node 8 -m tools.encode_latents <images> <out> --vae <folder>

<images> is a folder with one folder per class (ImageNet's train), or any folder or zip of pictures. Every picture is
cut and resized as Dhariwal & Nichol do, and it and its mirror image are encoded into mean and standard deviation of
latents, in shards of --shard-size pictures (`common/data/latents/cache.py` says how). 1,281,167 pictures of 256 pixels
take 84 GB, half with --store float16.

Stop it at any time: the same command continues, checks what is there by checksum and encodes only what is missing.
Several processes share the shards by --rank and --world, or as torchrun numbers them.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import limits
from common.errors import UserError

MANY = 2**31 - 1  # more classes than any data set has


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 2 after one sentence on stderr, 130 when stopped."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    try:
        run(options)
    except UserError as error:
        print(f"error: {_as_options(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped. The finished shards are kept; the same command continues.", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> dict | None:
    """Encodes this process's missing shards; returns the index, or None while other processes have some to do.

    Raises UserError for bad options, missing or damaged pictures, a missing autoencoder, or a folder that holds
    latents of other settings.
    """
    _check(options)
    from common.data.latents import cache as latent_cache

    pictures, classes = open_pictures(options)
    encoder = open_encoder(options)
    out = Path(options.out)
    facts = {
        "images": len(pictures), "source": pictures.fingerprint(), "size": options.size, "fit": options.fit,
        "mirrored": not options.no_mirror, "autoencoder": encoder.identity(), "arithmetic": options.dtype,
        "stored": options.store, "shard_size": options.shard_size,
        "num_classes": 0 if classes is None else 1 + int(pictures.labels.max()), "classes": classes or None,
        "command": _command(options),
    }  # fmt: skip
    latent_cache.begin(out, facts)
    total = latent_cache.shard_count(facts)
    mine = range(options.rank, total, options.world)
    there = sum((out / latent_cache.shard_name(number)).is_file() for number in mine)
    if there:
        print(f"comparing {there} shards with their checksums", flush=True)
    todo = []
    for number in mine:
        if latent_cache.is_finished(out, number):
            continue
        if (out / latent_cache.shard_name(number)).is_file():
            print(f"{latent_cache.shard_name(number)} differs from its checksum and is encoded again", flush=True)
        todo.append(number)
    print(f"{len(mine) - len(todo)} of {len(mine)} shards are there, {len(todo)} to encode", flush=True)
    started, done = time.perf_counter(), 0
    for position, (number, moments, label, skipped) in enumerate(encode(pictures, encoder, todo, options), start=1):
        latent_cache.write_shard(out / latent_cache.shard_name(number), moments, label, skipped)
        done += len(label)
        for name in skipped:
            print(f"skipped: {name}", flush=True)
        rate = done / (time.perf_counter() - started)
        left = (len(todo) - position) * options.shard_size / max(rate, 1e-9) / 60
        print(
            f"shard {number} written, {position} of {len(todo)}: {done} images, {rate:.1f} images/s, "
            f"about {left:.0f} min left",
            flush=True,
        )
    index = latent_cache.finish(out)
    if index is None:
        print("This process is done; the last one to finish writes index.json.")
    else:
        skipped = sum(len(shard["skipped"]) for shard in index["shards"])
        left_out = f", {skipped} skipped" if skipped else ""
        print(f"{out}: {index['count']} images in {total} shards{left_out}, complete")
    return index


def encode(pictures, encoder, shards: list[int], options: argparse.Namespace) -> Iterator[tuple]:
    """(shard, moments (n, V, 2c, h, w), label (n,), names skipped) one after the other.

    Pictures are read, cut and resized by the workers, ahead of the encoder. Batches never cross a shard's end, so a
    shard does not depend on what was encoded before it.
    """
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from common.metrics.images import from_uint8

    device = _device(options)
    batches = []
    for shard in shards:
        end = min((shard + 1) * options.shard_size, len(pictures))
        for first in range(shard * options.shard_size, end, options.batch_size):
            batches.append(range(first, min(first + options.batch_size, end)))
    loader = DataLoader(
        Pictures(pictures), batch_sampler=batches, collate_fn=_as_is, num_workers=options.workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    parts: list[np.ndarray] = []
    rows: list[int] = []
    skipped: list[str] = []
    for numbers, batch in zip(batches, loader):
        for name, sentence in batch["bad"]:
            if not options.skip_bad:
                raise UserError(f"{sentence} Or leave such files out with --skip-bad.")
            skipped.append(name)
        if batch["kept"]:
            image = from_uint8(batch["image"].to(device, non_blocking=True))
            views = [image] if options.no_mirror else [image, image.flip(3)]
            moments = torch.stack([torch.cat(encoder.encode(view), dim=1) for view in views], dim=1).cpu().numpy()
            if not np.isfinite(moments).all():
                name = pictures.where(batch["kept"][0])
                raise UserError(f"The autoencoder gives non-finite numbers from {name} on. Use --dtype float32.")
            parts.append(moments.astype(options.store))
            rows += batch["kept"]
        last = numbers[-1]
        if last == len(pictures) - 1 or (last + 1) % options.shard_size == 0:
            shard = last // options.shard_size
            if not parts:
                raise UserError(f"No picture of shard {shard} can be read. Repair the folder, or lower --shard-size.")
            yield shard, np.concatenate(parts), pictures.labels[rows], skipped
            parts, rows, skipped = [], [], []


class Pictures:
    """Pictures by number for the workers: uint8 images of those that can be read, and what is wrong with the others."""

    def __init__(self, files):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, numbers) -> dict:
        import numpy as np
        import torch

        images, kept, bad = [], [], []
        for number in numbers:
            try:
                images.append(self.files.read(number))
                kept.append(number)
            except UserError as error:
                bad.append((self.files.files[number], str(error)))
        return {"image": torch.from_numpy(np.stack(images)) if images else None, "kept": kept, "bad": bad}


def open_pictures(options: argparse.Namespace):
    """(the pictures, class names; None without labels, [] where dataset.json numbers them)."""
    from common.data.images.folder import ImageFiles

    path = Path(options.images).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
        raise UserError(f"{path} is neither a folder nor a zip of pictures. Give one that exists.")
    labelled = not options.no_labels
    made = {"path": path, "resolution": options.size, "channels": 3, "fit": options.fit}
    pictures = ImageFiles(**made, num_classes=MANY if labelled else 0)
    if not labelled:
        return pictures, None
    return pictures, [] if pictures.numbered else sorted({name.split("/")[0] for name in pictures.files})


def open_encoder(options: argparse.Namespace):
    """The autoencoder, its files looked at."""
    module, _, name = options.encoder.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--encoder {options.encoder} cannot be imported ({error}). Give a dotted path.") from error
    if options.vae is None:
        raise UserError("--vae is missing. Give a folder saved by diffusers, or its safetensors file.")
    encoder = kind(path=options.vae, dtype=options.dtype)
    encoder.check()
    return encoder


def _check(options: argparse.Namespace) -> None:
    for name in ("batch_size", "shard_size", "world"):
        limits.whole(f"--{name.replace('_', '-')}", getattr(options, name), least=1, hint="Set it higher.")
    limits.whole("--workers", options.workers, hint="Set 0 to read in this process.")
    limits.multiple_of("--size", options.size, 8, "pixels per latent", hint="Set 256 or 512.")
    limits.whole("--rank", options.rank, most=options.world - 1, hint="Number processes from 0.")


def _device(options: argparse.Namespace):
    import torch

    name = options.device
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', options.rank)) % count}" if count else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device} cannot be used ({error}). Use cpu or auto.") from error
    return torch.device(name)


def _command(options: argparse.Namespace) -> list[str]:
    """The command line that repeats this work in one process."""
    words = ["python", "-m", "tools.encode_latents", *map(os.path.abspath, (options.images, options.out))]
    for key in ("size", "vae", "encoder", "shard_size", "dtype", "store", "fit"):
        if getattr(options, key) != _parser().get_default(key):
            words += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    return words + [f"--{key.replace('_', '-')}" for key in ("no_mirror", "no_labels") if getattr(options, key)]


def _as_options(message: str) -> str:
    """The message of a library with keys of an experiment replaced by the options of this tool."""
    for key, option in (
        ("set data.source.num_classes=0", "give --no-labels"), ("Set data.source.fit=center", "Give --fit center"),
        ("data.source.resolution", "--size"), ("Set data.root to another place", "Give another folder"),
    ):  # fmt: skip
        message = message.replace(key, option)
    return message


def _as_is(batch):
    return batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.encode_latents", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("images", help="folder or zip of pictures")
    add("out", help="folder for the latents; made when missing")
    add("--size", type=int, default=256, help="pixels, width = height (256)")
    add("--vae", help="folder of the autoencoder as diffusers saves it, or its safetensors file")
    add("--encoder", default="common.weights.vae.SdVae", help="class of the autoencoder (common.weights.vae.SdVae)")
    add("--batch-size", type=int, default=32, help="pictures at a time (32)")
    add("--workers", type=int, default=8, help="processes that read and resize pictures (8); 0: none")
    add("--shard-size", type=int, default=4096, help="pictures per file (4096)")
    add("--rank", type=int, default=int(os.environ.get("RANK", 0)), help="number of this process, from 0")
    add("--world", type=int, default=int(os.environ.get("WORLD_SIZE", 1)), help="processes that share the work")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="arithmetic of the encoder")
    add("--store", default="float32", choices=("float32", "float16"), help="type of the numbers kept")
    add("--fit", default="adm", choices=("adm", "center", "exact"), help="crop and resize (common.data.images.folder)")
    add("--no-mirror", action="store_true", help="leave the mirror images out")
    add("--no-labels", action="store_true", help="pictures without classes")
    add("--skip-bad", action="store_true", help="leave out pictures that cannot be read, and say which")
    return parser


if __name__ == "__main__":
    sys.exit(main())
