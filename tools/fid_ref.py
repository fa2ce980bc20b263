"""Reference statistics of a data set for the Frechet distance.

    python -m tools.fid_ref --data cifar10 --root ../shared/data --extractor resnet56 --out cifar10-resnet56.npz
    python -m tools.fid_ref --data some/folder/of/images --extractor inception --weights inception.pth --out ref.npz

Prints the record kept inside the file: extractor and hash, data set and fingerprint, count, rounding.
"""

import argparse
import sys
from pathlib import Path

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
        # the libraries name the configuration keys of an experiment; here the same things are options
        message = str(error).replace("data.root", "--root").replace("set weights to", "set --weights to")
        print(f"error: {message}", file=sys.stderr)
        return error.exit_code
    for key, value in record.items():
        print(f"{key:15} {value}")
    return 0


def run(options: argparse.Namespace) -> dict:
    """Computes and saves the statistics; returns their record. Raises UserError on anything the user can mend."""
    out = Path(options.out)
    if out.suffix != ".npz":
        raise UserError(f"--out must end in .npz, got {options.out}. Name it {out.stem}.npz.")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be >= 1, got {options.batch_size}. Give a positive number.")
    from common.metrics.reference import compute_statistics  # torch: not for --help

    reference = open_reference(options)
    extractor = open_extractor(options, reference).to(_device(options.device))
    statistics = compute_statistics(reference, extractor, batch_size=options.batch_size)
    if statistics.n < extractor.dim + 1:
        print(
            f"warning: {statistics.n} images give a singular covariance of {extractor.dim}-d features; "
            f"use at least {extractor.dim + 1}",
            file=sys.stderr,
        )
    statistics.save(out)
    return {"file": str(out), **statistics.record, "sha256": statistics.digest()[:16]}


def open_reference(options: argparse.Namespace):
    """The images named by --data, --root, --split and --limit."""
    from common.metrics.reference import FolderImages, SplitImages

    if options.data not in DATASETS:
        if not Path(options.data).is_dir():
            raise UserError(
                f"--data must be one of {', '.join(DATASETS)}, or a folder of images; {options.data!r} is neither. "
                f"{nearest(options.data, DATASETS)}"
            )
        return FolderImages(path=options.data, limit=options.limit)
    from common.data.images.module import ImageDataModule

    data = ImageDataModule(source=_source(options.data, options.root))
    if options.split not in data.splits:
        raise UserError(f"--split of {options.data} must be one of {', '.join(data.splits)}, got {options.split!r}.")
    data.check()
    return SplitImages(data=data, split=options.split, limit=options.limit)


def open_extractor(options: argparse.Namespace, reference):
    """The extractor named by --extractor, with weights from --weights or <root>/weights."""
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
        hint = nearest(name, EXTRACTORS)
        raise UserError(f"--extractor must be one of {', '.join(EXTRACTORS)}, got {name!r}. {hint}".strip())
    weights = options.weights or str(Path(options.root) / "weights" / WEIGHTS[name])
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
    parser.add_argument("--data", required=True, help=f"{', '.join(DATASETS)}, or a folder of images")
    parser.add_argument("--root", default="../shared/data", help="folder holding cifar10/, weights/, ... (%(default)s)")
    parser.add_argument("--split", default="train", help="split of a named data set (%(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first N images")
    parser.add_argument("--extractor", default="resnet56", help=f"{', '.join(EXTRACTORS)} (%(default)s)")
    parser.add_argument("--weights", help="the extractor's weights; default: the known file in <root>/weights")
    parser.add_argument("--out", required=True, help="npz to write")
    parser.add_argument("--batch-size", type=int, default=250, help="images read at once (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (%(default)s)")
    parser.add_argument("--cache-dir", default=".cache/metrics", help="where the digits classifier is kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
