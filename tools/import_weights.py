"""Official EDM / EDM2 pickles to safetensors, without running the code they carry.

python -m tools.import_weights edm  edm-cifar10-32x32-uncond-vp.pkl
python -m tools.import_weights edm2 edm2-img64-s-1073741-0.075.pkl --out weights/edm2_imagenet64_s
"""

import argparse
import json
import sys
from pathlib import Path

from common.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=["edm", "edm2"], help="which code base wrote the file")
    parser.add_argument("file", type=Path, help="the downloaded .pkl")
    parser.add_argument("--out", type=Path, help="folder to write (default: the file's name without .pkl, beside it)")
    parser.add_argument("--key", default="ema", help="entry of the file to take (default: ema)")
    args = parser.parse_args(argv)

    from common.weights.convert import convert

    try:
        out = args.out or args.file.with_suffix("")
        if out == args.file:
            raise UserError(f"{args.file} has no .pkl ending. Name the output folder with --out.")
        done = convert(args.file, out, family=args.family, key=args.key)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    print(f"read      {args.file}")
    print(f"sha256    {done.sha256}")
    print(f"class     {done.class_name} -> {done.network['_target_']} around {done.network['model']['_target_']}")
    print(f"size      {done.parameters:,} parameters")
    options = {key: value for key, value in done.network["model"].items() if key != "_target_"}
    print(f"network   {json.dumps(options)}")
    print(f"written   {done.folder}/model.safetensors and config.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
