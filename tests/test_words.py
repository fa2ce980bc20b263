"""Words the repository does without: names of documents it does not hold, and phrases that were replaced once."""

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".md", ".yaml", ".toml")
FOLDERS = ("common", "conf", "projects", "tests", "tools")
WORDS = {
    # documents that are not in the repository
    r"(?<![a-z])pitfalls?[ _]\d+": "state the fact",
    r"\b(the|our|papers'|common_diffusion) sheets?\b|\bsheet'?s? section\b|shared/papers": "state the fact",
    r"\bour notes\b|\bfrom memory\b": "name the source, or call the number unverified",
    r"\b(the|an) issue (asks|says|wants|names)\b|\bof the issue\b|\bdesign section \d": "state the fact",
    r"\(verify\)|, verify[).\"]": "call the number unverified",
    # phrases that were replaced by the field's own terms
    r"\btold (t|omega|t_min|their class)\b|\b(network|MLP|labels) (is|are) told\b": "conditioned on",
    r"\berror of no answer\b|\bthan no answer\b": "EPE of predicting zero flow",
    r"\bnet of (the )?encoders\b": "beyond the encoders and one step",
    r"\bwhoever left\b|\bhangs on the weights\b": "subject, verb, object",
}


def files() -> list[Path]:
    """Text files of the repository, this one excepted."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=False
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    found = [REPO / name for name in names] or [
        *REPO.glob("*.md"), *(path for folder in FOLDERS for path in (REPO / folder).rglob("*"))
    ]  # fmt: skip
    return [path for path in found if path.suffix in SUFFIXES and path.is_file() and path != Path(__file__).resolve()]


def hits(text: str) -> list[tuple[int, str, str]]:
    """(line, word, what to write instead) of every old word."""
    return [
        (text.count("\n", 0, match.start()) + 1, match[0], instead)
        for word, instead in WORDS.items()
        for match in re.finditer(word, text, flags=re.IGNORECASE)
    ]


def test_the_repository_names_nothing_it_does_not_hold():
    wrong = []
    for path in files():
        name = path.relative_to(REPO).as_posix()
        for line, word, instead in hits(path.read_text(encoding="utf-8")):
            wrong.append(f"{name}:{line}: {' '.join(word.split())!r}; {instead}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1e8 (pitfall 12)", 1),
        ("test_pitfall_2_x", 1),
        ("numbers of the sheet", 1),
        ("FID 5.01 (from memory, verify)", 2),
        ("a network told t and r", 1),
        ("a contact sheet of pictures; verify: false; the issue of scale; told apart", 0),
    ],
)
def test_old_words_are_found(text, count):
    assert len(hits(text)) == count
