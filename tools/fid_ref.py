"""Reference statistics of a data set for the Frechet distance, and the distance between two sets of pictures.

    python -m tools.fid_ref --data my/pictures --resolution 64 --fit center --against generated/pictures
    python -m tools.fid_ref --data my/pictures --resolution 32 --fit center --out mine.npz
    python -m tools.fid_ref --data cifar10 --extractor inception --out cifar10.npz

--against prints a number: the distance from the pictures of --data to another folder, data set or file of statistics,
read at the same resolution. --out keeps the statistics of --data, which `evaluate.statistics=mine.npz` compares a
generator with. Also prints their record: extractor and hash, data set and fingerprint, count, rounding.

Only --extractor inception gives "FID". The others give "FD-<name>", comparable among themselves alone.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

from common import limits
from common.errors import UserError, nearest

DATASETS = ("cifar10", "mnist", "fashion_mnist", "digits")
WEIGHTS = {
    "resnet56": "cifar10_resnet56.safetensors",
    "efflite0": "tf_efficientnet_lite0_in1k_fp16.safetensors",
    "inception": "weights-inception-2015-12-05-6726825d.pth",
}
EXTRACTORS = (*WEIGHTS, "digits", "pixels", "timm:<model>")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code (0, or 2 after one sentence on stderr)."""
    options = _parser().parse_args(arguments)
    try:
        record = run(options)
    except UserError as error:
        print(f"error: {_as_options(str(error))}", file=sys.stderr)
        return error.exit_code
    for key, value in record.items():
        print(f"{key:15} {value}")
    return 0


def run(options: argparse.Namespace) -> dict:
    """Computes the statistics, saves them, measures the distance; returns the record.

    Raises UserError for bad options, data or weights.
    """
    if options.out is None and options.against is None:
        raise UserError("--out or --against is missing. Give a file to write, or a folder to measure against.")
    if options.out is not None and Path(options.out).suffix != ".npz":
        raise UserError(f"--out must end in .npz, got {options.out}. Name it {Path(options.out).stem}.npz.")
    for name in ("batch_size", "limit", "resolution"):
        if getattr(options, name) is not None:
            limits.whole(f"--{name.replace('_', '-')}", getattr(options, name), least=1)
    from common.metrics.fid import frechet_distance  # torch: not for --help

    reference = open_reference(options)
    extractor = open_extractor(options, reference).to(_device(options.device))
    statistics = _statistics(reference, extractor, options)
    record = {}
    if options.out is not None:
        statistics.save(Path(options.out))
        record["file"] = str(options.out)
    record |= {**statistics.record, "sha256": statistics.digest()[:16]}
    if options.against is not None:
        other = _against(options, extractor)
        count = other.record.get("n")
        record["against"] = f"{other.record.get('dataset', options.against)} ({count or 'unknown number of'} images)"
        record[extractor.metric] = f"{frechet_distance(statistics, other):.6g}"
    return record


def _against(options: argparse.Namespace, extractor):
    """Statistics of what --against names."""
    from common.metrics.reference import StatisticsFile

    if options.against.endswith(".npz"):
        return StatisticsFile(path=options.against).statistics(extractor, "edm")
    other = copy.copy(options)
    other.data = options.against
    return _statistics(open_reference(other, option="--against"), extractor, options)


def _statistics(reference, extractor, options: argparse.Namespace):
    from common.metrics.reference import compute_statistics

    statistics = compute_statistics(reference, extractor, batch_size=options.batch_size)
    if statistics.n < extractor.dim + 1:
        print(
            f"warning: {statistics.n} images give a singular covariance of {extractor.dim}-d features; "
            f"use at least {extractor.dim + 1}",
            file=sys.stderr,
        )
    return statistics


def open_reference(options: argparse.Namespace, option: str = "--data"):
    """The images named by --data, --root, --split, --limit, --resolution and --fit."""
    from common.metrics.reference import FolderImages, SplitImages

    if options.data not in DATASETS:
        path = Path(options.data).expanduser()
        if not path.is_dir() and path.suffix.lower() != ".zip":
            raise UserError(
                f"{option} must be one of {', '.join(DATASETS)}, or a folder or zip of pictures; {options.data!r} is "
                f"none of them. {nearest(options.data, DATASETS)}"
            )
        return FolderImages(path=path, limit=options.limit, resolution=options.resolution, fit=options.fit)
    from common.data.images.module import ImageDataModule

    data = ImageDataModule(source=_source(options.data, options.root))
    limits.choice(f"--split of {options.data}", options.split, data.splits)
    data.check()
    return SplitImages(data=data, split=options.split, limit=options.limit)


def open_extractor(options: argparse.Namespace, reference):
    """The extractor named by --extractor, with weights from --weights, $ONESTEP_WEIGHTS or <root>/weights."""
    from common.metrics import features

    name = options.extractor
    if name == "digits":
        return features.DigitsClassifier(cache_dir=options.cache_dir)
    if name == "pixels":
        channels, resolution = next(iter(reference.images(1))).shape[1:3]
        return features.Pixels(channels=channels, resolution=resolution)
    if name.startswith("timm:"):
        if options.weights is None:
            raise UserError(f"--extractor {name} needs --weights, a local checkpoint of that timm model.")
        return features.TimmFeatures(model=name.removeprefix("timm:"), weights=options.weights)
    if name not in WEIGHTS:
        limits.choice("--extractor", name, EXTRACTORS)
    places = [Path(os.environ.get("ONESTEP_WEIGHTS", ".cache/weights")), Path(options.root).expanduser() / "weights"]
    files = [str(place / WEIGHTS[name]) for place in places]
    weights = options.weights or next((file for file in files if Path(file).is_file()), files[-1])
    kinds = {
        "resnet56": features.CifarResNet56,
        "efflite0": features.EfficientNetLite0,
        "inception": features.Inception,
    }
    return kinds[name](weights=weights)


def _source(name: str, root: str):
    from common.data.images.cifar import Cifar10
    from common.data.images.digits import Digits
    from common.data.images.mnist import FashionMnist, Mnist

    if name == "digits":
        return Digits()
    return {"cifar10": Cifar10, "mnist": Mnist, "fashion_mnist": FashionMnist}[name](root=root)


def _as_options(message: str) -> str:
    """The message of a library with keys of an experiment replaced by the options of this tool."""
    for key, option in (
        ("Set data.source.fit=center", "Give --fit center"), ("data.source.resolution", "--resolution"),
        ("data.source.fit", "--fit"), ("Set data.root or data.source.path", "Set --data"), ("data.root", "--root"),
        ("set weights to", "set --weights to"),
    ):  # fmt: skip
        message = message.replace(key, option)
    return message


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]} Use --device cpu.") from error
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fid_ref", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = os.environ.get("DATA_ROOT", ".cache/data")
    add("--data", required=True, help=f"{', '.join(DATASETS)}, or a folder or zip of pictures")
    add("--against", help="print the distance to this: as --data, or a file of statistics .npz")
    add("--out", help="npz to write")
    add("--resolution", type=int, help="of a folder: pixels, width = height; default: that of its first picture")
    add("--fit", default="exact", choices=("exact", "center", "adm"), help="of a folder: how pictures get that size")
    add("--root", default=root, help="folder holding cifar10/, weights/, ...; default: $DATA_ROOT (%(default)s)")
    add("--split", default="train", help="split of a named data set (%(default)s)")
    add("--limit", type=int, help="use only the first N images")
    add("--extractor", default="resnet56", help=f"{', '.join(EXTRACTORS)} (%(default)s)")
    add("--weights", help="the extractor's weights; default: its file in $ONESTEP_WEIGHTS or <root>/weights")
    add("--batch-size", type=int, default=250, help="images read at once (%(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto (%(default)s)")
    add("--cache-dir", default=".cache/metrics", help="where the digits classifier is kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
