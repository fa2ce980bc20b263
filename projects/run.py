"""The one entry: `python -m projects.run +experiment=<name> [task=fit|test|sample|export|plan] [key=value ...] [-m]`."""

import os
import sys
from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"


def main() -> int:
    """Runs one configuration (or a sweep with -m) and returns the process exit code."""
    from common.runtime import launch

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(launch.help_text(CONF))
        return 0

    import hydra

    from common.errors import UserError

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to here; they become one sentence below
    launch.register_resolvers()
    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(launch.launch)
    try:
        entry()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped by the user before training began; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = launch.explain(error, CONF)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
