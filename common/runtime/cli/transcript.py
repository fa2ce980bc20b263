"""The console text of a run, kept in its folder."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from common.errors import user_error

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Transcript:
    """Collects lines of text until `keep(path)` names their file, and appends to that file from then on."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.file: TextIO | None = None

    def keep(self, path: Path) -> None:
        """Append to `path` what was collected, under a heading, and everything that follows."""
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed when `recorded` ends)
        self.add(f"--- {datetime.now():%Y-%m-%d %H:%M:%S} ---\n" + "".join(self.text))
        self.text.clear()

    def add(self, text: str) -> None:
        """Colours and the redrawing of a live bar are left out: a file has no cursor."""
        if "\r" in text or "\x1b[2K" in text or "\x1b[1A" in text:
            return
        text = CONTROL.sub("", text)
        if self.file is None:
            self.text.append(text)
            return
        with suppress(OSError, ValueError):  # a full disk must not end a run that its checkpoints survive
            self.file.write(text)
            self.file.flush()


class Copied:
    """A text stream whose text also goes into a transcript; everything else is the stream's own."""

    def __init__(self, stream: TextIO, transcript: Transcript):
        self._stream, self._transcript = stream, transcript

    def write(self, text: str) -> int:
        self._transcript.add(text)
        return self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def recorded() -> Iterator[Transcript]:
    """A transcript of what is printed inside, with the error that ends it."""
    transcript = Transcript()
    streams = [Copied(stream, transcript) for stream in (sys.stdout, sys.stderr)]
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):  # type: ignore[type-var]
            yield transcript
    except BaseException as error:
        transcript.add(f"error: {user_error(error) or repr(error)}\n")
        raise
    finally:
        if transcript.file is not None:
            with suppress(OSError):
                transcript.file.close()
