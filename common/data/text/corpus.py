"""Where token streams come from: a text file as bytes or characters, or word files with a vocabulary of their own."""

import gzip
import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from common import limits
from common.data.source import check_split, sha256
from common.errors import UserError, nearest
from common.files import atomic, verify_checksum, write_checksum, write_text

UNREADABLE = (OSError, EOFError, ValueError, zlib.error)  # what gzip, numpy and the UTF-8 decoder raise for damage
END, UNKNOWN = "<eos>", "<unk>"
EDGE = 1 << 20  # bytes of a file's beginning and end that, with its size, identify it for the cache


class Vocabulary(Protocol):
    """Tokens 0..size-1 and their text."""

    size: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. Raises UserError naming what it does not know."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens."""

    def lengths(self) -> np.ndarray:
        """Bytes of UTF-8 text each token stands for, int64 (size,)."""


class Corpus(Protocol):
    """A text with splits. Making one touches no file; `check`, `vocabulary` and `load` do."""

    name: str
    splits: tuple[str, ...]

    def check(self) -> None:
        """Cheap look whether the files are there. Raises UserError saying what was looked for, where, and the fix."""

    def vocabulary(self) -> Vocabulary: ...

    def load(self, split: str) -> np.ndarray:
        """Tokens (N,) of an integer type, in the order of the text. Raises UserError naming a damaged file."""


class Bytes:
    """The 256 bytes; text is UTF-8, an incomplete character decodes to the replacement mark."""

    size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def lengths(self) -> np.ndarray:
        return np.ones(256, dtype=np.int64)


class Characters:
    """The distinct characters of a text, in code point order."""

    def __init__(self, text: str):
        self.symbols = sorted(set(text))
        self.size = len(self.symbols)
        self._index = {symbol: number for number, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self._index.keys())
        if unknown:
            raise UserError(f"the text has no character {unknown[0]!r}. Use only: {''.join(self.symbols)!r}.")
        return [self._index[symbol] for symbol in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.symbols[token] for token in tokens)

    def lengths(self) -> np.ndarray:
        return np.array([len(symbol.encode("utf-8")) for symbol in self.symbols], dtype=np.int64)


class Words:
    """Whole words, `<eos>` standing for the end of a line."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.size = len(self.words)
        self.index = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Tokens of the lines; an unknown word is `<unk>`, or a UserError where the vocabulary has no such token."""
        lines = [line.split() for line in text.split("\n")]
        words = [word for number, line in enumerate(lines) for word in ([END] * (number > 0) + line)]
        unknown = self.index.get(UNKNOWN)
        missing = [word for word in words if word not in self.index]
        if missing and unknown is None:
            raise UserError(
                f"the vocabulary knows neither {missing[0]!r} nor {UNKNOWN}. {nearest(missing[0], self.words)}"
                "Use words of the training text."
            )
        return [self.index.get(word, unknown) for word in words]

    def decode(self, tokens: Sequence[int]) -> str:
        lines = " ".join(self.words[token] for token in tokens).split(END)
        return "\n".join(line.strip() for line in lines)

    def lengths(self) -> np.ndarray:
        """Word and the space after it; the end of a line is one byte."""
        return np.array([1 if w == END else len(w.encode("utf-8")) + 1 for w in self.words], dtype=np.int64)


class PlainText:
    """One text file, gzip or not; splits train (the beginning) and test (the last `held_out` part).

    root      data folder
    files     where the file may lie below it; the first that is there is taken
    name      in messages and beside numbers
    unit      "byte" (256 tokens) or "char" (the distinct characters of the whole text)
    held_out  share of the text that is the test split, in (0, 1)
    digest    sha256 of the unpacked file it must have, None: any
    origin    where to get the file, for the message when it is missing
    """

    splits = ("train", "test")

    def __init__(
        self,
        *,
        root: str,
        files: Sequence[str],
        name: str = "text",
        unit: str = "byte",
        held_out: float = 0.1,
        digest: str | None = None,
        origin: str | None = None,
    ):
        limits.choice("data.source.unit", unit, ("byte", "char"))
        limits.number("data.source.held_out", held_out, above=0, below=1, hint="Set it to 0.1 for a tenth.")
        self.root, self.files, self.name, self.unit, self.held_out = root, tuple(files), name, unit, held_out
        self.digest, self.origin = digest, origin
        self._read: tuple[np.ndarray, Vocabulary] | None = None

    def check(self) -> None:
        find_file(self.root, self.files, self.name, self.origin)

    def vocabulary(self) -> Vocabulary:
        return self._all()[1]

    def load(self, split: str) -> np.ndarray:
        """Tokens uint8 (bytes) or int32 (characters)."""
        check_split(split, self.splits, self.name)
        tokens, _ = self._all()
        first = round(len(tokens) * (1 - self.held_out))
        return tokens[:first] if split == "train" else tokens[first:]

    def _all(self) -> tuple[np.ndarray, Vocabulary]:
        if self._read is None:
            path = find_file(self.root, self.files, self.name, self.origin)
            content = b"".join(_pieces(path, self.name))
            if self.digest and sha256(content) != self.digest:
                raise _damaged(path, self.name, "its text has another sha256 than it should")
            if self.unit == "byte":
                self._read = np.frombuffer(content, dtype=np.uint8), Bytes()
            else:
                try:
                    text = content.decode("utf-8")
                except ValueError as error:
                    raise _damaged(path, self.name, f"it is no UTF-8 text ({error})") from error
                characters = Characters(text)
                self._read = np.array(characters.encode(text), dtype=np.int32), characters
        return self._read


class WordFiles:
    """Files of words separated by spaces, one paragraph a line, as WikiText comes; gzip or not.

    root       data folder
    files      split -> where its file may lie below root; the first that is there is taken. "train" must be one of them
    name       in messages and beside numbers
    cache_dir  folder for the encoded splits and the vocabulary, built once and verified by checksum; None keeps them in
               memory only
    origin     where to get the files, for the message when one is missing

    Each line is followed by `<eos>`. The vocabulary is `<eos>` and the words of the training file, most frequent first,
    as in Transformer-XL (arXiv 1901.02860), so that adaptive cutoffs mean what they mean there. Words of the other
    splits that it lacks become `<unk>`.
    """

    def __init__(
        self,
        *,
        root: str,
        files: Mapping[str, Sequence[str]],
        name: str = "words",
        cache_dir: str | None = None,
        origin: str | None = None,
    ):
        if "train" not in files:
            raise UserError(
                f"data.source.files must name the split train, got {', '.join(files) or 'nothing'}. Add it."
            )
        self.root, self.name, self.origin = root, name, origin
        self.files = {split: tuple(names) for split, names in files.items()}
        self.splits = tuple(self.files)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self._words: Words | None = None

    def check(self) -> None:
        for split in self.splits:
            self._path(split)

    def vocabulary(self) -> Words:
        if self._words is None:
            kept = self._kept("train", "vocabulary.txt")
            if _intact(kept):
                self._words = Words(kept.read_text(encoding="utf-8").split("\n"))
            else:
                self._words = Words(self._count())
                if kept is not None:
                    write_text(kept, "\n".join(self._words.words))
                    write_checksum(kept)
        return self._words

    def load(self, split: str) -> np.ndarray:
        """Tokens int32, mapped from the cache where there is one."""
        check_split(split, self.splits, self.name)
        kept = self._kept(split, f"{split}.npy")
        if _intact(kept):
            try:
                return np.load(kept, mmap_mode="r", allow_pickle=False)
            except UNREADABLE:
                pass
        tokens = self._encode(split)
        if kept is not None:
            with atomic(kept) as temporary:
                np.save(temporary, tokens)
            write_checksum(kept)
        return tokens

    def _path(self, split: str) -> Path:
        return find_file(self.root, self.files[split], f"{self.name} ({split})", self.origin)

    def _kept(self, split: str, file: str) -> Path | None:
        """Where the cache keeps a file that depends on the training text and on the text of `split`."""
        if self.cache_dir is None:
            return None
        key = hashlib.sha256(" ".join(file_key(self._path(part)) for part in ("train", split)).encode()).hexdigest()
        return self.cache_dir / f"{self.name}-{key[:16]}" / file

    def _count(self) -> list[str]:
        counts: Counter[str] = Counter()
        for line in _lines(self._path("train"), self.name):
            counts.update(line.split())
        counts.pop(END, None)
        return [END, *(word for word, _ in counts.most_common())]

    def _encode(self, split: str) -> np.ndarray:
        index, ids = self.vocabulary().index, array("i")
        end, unknown = index[END], index.get(UNKNOWN, -1)
        for line in _lines(self._path(split), self.name):
            words = line.split()
            found = [index.get(word, unknown) for word in words]
            if unknown < 0 and -1 in found:
                raise UserError(
                    f"{self.name}: the word {words[found.index(-1)]!r} of the split {split} is not in the training "
                    f"text, which has no {UNKNOWN} either. Replace such words by {UNKNOWN} in both files."
                )
            ids.extend(found)
            ids.append(end)
        return np.frombuffer(ids, dtype=np.int32)


def find_file(root: str, files: Sequence[str], name: str, origin: str | None) -> Path:
    """First of `files` below `root` that is there. Raises UserError: what was looked for, where, where to get it."""
    base = Path(root).expanduser()
    for file in files:
        if (base / file).is_file():
            return base / file
    places = " or ".join(str(base / file) for file in files)
    gone = "" if base.is_dir() else f" (the folder {base} does not exist)"
    fetch = f", or get it from {origin} and put it there" if origin else ""
    raise UserError(f"{name} not found: looked for {places}{gone}. Set data.root to the folder that holds it{fetch}.")


def file_key(path: Path) -> str:
    """Identifies a file's content by its size, beginning and end: cheap for half a gigabyte."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(EDGE))
        file.seek(max(size - EDGE, 0))
        digest.update(file.read(EDGE))
    return f"{size}-{digest.hexdigest()[:16]}"


def _intact(kept: Path | None) -> bool:
    return kept is not None and kept.is_file() and bool(verify_checksum(kept))


def _open(path: Path):
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


def _pieces(path: Path, name: str) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            while piece := file.read(EDGE):
                yield piece
    except UNREADABLE as error:
        raise _damaged(path, name, f"it cannot be read ({error})") from error


def _lines(path: Path, name: str) -> Iterator[str]:
    try:
        with _open(path) as file:
            for line in file:
                yield line.decode("utf-8")
    except UNREADABLE as error:
        raise _damaged(path, name, f"it cannot be read ({error})") from error


def _damaged(path: Path, name: str, what: str) -> UserError:
    return UserError(f"{name} file {path} is damaged: {what}. Put an intact copy there.")
