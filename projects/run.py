"""The one entry: `python -m projects.run +experiment=<name> [task=fit|test|sample|export|plan] [key=value] [-m]`."""

import os
import sys
from contextlib import suppress
from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"


def main() -> int:
    """Runs one configuration (or a sweep with -m) and returns the process exit code."""
    from common.runtime.cli import launch

    if {"-h", "--help"} & set(sys.argv[1:]):
        with suppress(BrokenPipeError):  # the reader, `head` say, has seen enough
            print(launch.help_text(CONF), flush=True)
        return 0

    if any(word.startswith("--e") for word in sys.argv[1:]):
        print(
            "error: --experimental-rerun reads a pickle, which may run any code. Give the overrides.", file=sys.stderr
        )
        return 2

    import hydra

    from common.runtime.cli.hydra_sections import use_checked_loader

    use_checked_loader()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to here; they become one sentence below
    launch.register_resolvers()
    refused: list[Exception] = []

    def job(cfg):
        try:
            return launch.launch(cfg)
        except Exception as error:
            if launch.is_sweep():
                raise  # the sweep's own table names the failed job
            refused.append(error)  # past Hydra, which would print its own lines first

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
        if refused:
            raise refused[0]
    except KeyboardInterrupt:
        print("error: stopped by the user. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except Exception as error:
        sentence, code = launch.explain(error, CONF)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
