"""What is printed also goes into a file, without the control characters of a terminal."""

import sys

import pytest

from common.errors import UserError
from common.runtime.cli.transcript import recorded


def test_what_was_printed_before_the_file_had_a_name_is_in_it(tmp_path, capsys):
    path = tmp_path / "run.log"
    with recorded() as transcript:
        print("early")
        transcript.keep(path)
        print("\x1b[1mbold\x1b[0m")
        print("to stderr", file=sys.stderr)
        sys.stdout.write("\r 50 %")
    print("late")
    heading, *lines = path.read_text().splitlines()
    assert heading.startswith("--- ") and lines == ["early", "bold", "to stderr"]
    shown = capsys.readouterr()
    assert shown.out == "early\n\x1b[1mbold\x1b[0m\n\r 50 %late\n" and shown.err == "to stderr\n"


def test_a_second_start_is_appended_and_errors_are_kept(tmp_path):
    for error in (UserError("One sentence."), KeyboardInterrupt()):
        with pytest.raises(type(error)), recorded() as transcript:
            transcript.keep(tmp_path / "run.log")
            raise error
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines[1::2] == ["error: One sentence.", "error: KeyboardInterrupt()"]


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with recorded():
        print("refused")
    assert list(tmp_path.iterdir()) == []
