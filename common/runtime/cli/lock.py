"""One training process per run folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from common.errors import UserError


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Holds `<folder>/.running` while the body runs; raises UserError when another process holds it.

    A POSIX record lock: the system releases it when the process ends, and its data workers do not share it. Only the
    first process of a distributed run takes it.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".running", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is training in {folder}. Wait for it to end, or choose another folder with "
                f"run.dir=<folder>."
            ) from error
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            if os.listdir(folder) == [".running"]:  # refused before anything was written: leave no folder
                (folder / ".running").unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
