"""A folder of one's own pictures with masks, classes listed in a text file."""

import re
from functools import cached_property
from pathlib import Path

from common import limits
from common.data.pictures import list_pictures
from common.data.segmentation.augment import IGNORE
from common.data.segmentation.pairs import Pairs, label_table, require_folder
from common.data.segmentation.palette import bit_palette
from common.data.source import check_split
from common.errors import UserError

MOST = 255  # classes; the number 255 stands for pixels without one
Colour = tuple[int, int, int]


class SegmentationFolder:
    """Pictures and masks of the same names in two folders, with a list of classes.

    root      folder that holds `images/` and `masks/`, or `train/images/` and `train/masks/`, and the same for `val`
              and `test`. A picture `a/b.jpg` has the mask `a/b.png` (any ending that is a picture's)
    classes   text file, one class a line, in the order of the labels; None: `classes.txt` in root. A line is
              `name`                masks hold the number of the line, from 0
              `name = 7`            masks hold that number
              `name = 255 0 128`    masks show that colour (red, green, blue)
              Masks with a palette hold the index of the colour, unless the file lists colours
    ignore    number or [red, green, blue] in the masks of pixels that count neither in the loss nor in a metric; None:
              every pixel has a class
    held_out  share of the pictures kept for `val` where there are no folders of splits (and for `test`, the same ones),
              every picture number on which it falls in the order of the names

    Splits are train, val and test. Of the folders `val` and `test` one may be missing: it is the other; without either
    they are held out from train. Raises UserError.
    """

    splits = ("train", "val", "test")

    def __init__(
        self,
        *,
        root: str,
        classes: str | None = None,
        ignore: int | list[int] | None = IGNORE,
        held_out: float = 0.2,
        name: str = "segmentation folder",
    ):
        limits.number("data.source.held_out", held_out, above=0, below=1)
        self.root, self.name, self.held_out = Path(root).expanduser(), name, held_out
        self.classes = self.root / "classes.txt" if classes is None else Path(classes).expanduser()
        for value in ignore if isinstance(ignore, list) else [] if ignore is None else [ignore]:
            limits.whole("data.source.ignore", value, most=255)
        if isinstance(ignore, list) and len(ignore) != 3:
            raise UserError(f"data.source.ignore must be a number or [red, green, blue], got {ignore}.")
        self.ignore = ignore

    @cached_property
    def _listed(self) -> list[tuple[str, int | Colour]]:
        return read_classes(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._listed)

    @property
    def palette(self) -> tuple[Colour, ...]:
        """The colours of the masks, or those of PASCAL VOC's rule for masks that hold numbers."""
        drawn = bit_palette(len(self._listed))
        return tuple(mark if isinstance(mark, tuple) else colour for (_, mark), colour in zip(self._listed, drawn))

    def check(self) -> None:
        for split in self.splits:
            self.load(split)

    def load(self, split: str) -> Pairs:
        check_split(split, self.splits, self.name)
        require_folder(self.root, "Pictures with masks", "Set data.root to the folder that holds images/ and masks/.")
        pairs = self._of_split(split)
        marks = [mark for _, mark in self._listed]
        colours = None
        if isinstance(marks[0], tuple):
            colours, marks = marks, list(range(len(marks)))
        void = []
        if isinstance(self.ignore, list):
            if colours is None:
                raise UserError(f"data.source.ignore is a colour, but {self.classes} lists none. Set it to a number.")
            if tuple(self.ignore) in colours:
                raise UserError(f"data.source.ignore={self.ignore} is the colour of a class in {self.classes}.")
            void, colours = [len(colours)], [*colours, tuple(self.ignore)]
        elif self.ignore is not None and colours is None:
            if self.ignore in marks:
                taken = self.class_names[marks.index(self.ignore)]
                raise UserError(
                    f"data.source.ignore={self.ignore} is the number of the class {taken} in {self.classes}. Set it to "
                    "another number, or to null."
                )
            void = [self.ignore]
        table = label_table({mark: label for label, mark in enumerate(marks)}, void=void)
        images, masks = map(list, zip(*pairs)) if pairs else ([], [])
        return Pairs(name=self.name, images=images, masks=masks, table=table, colours=colours)

    def _of_split(self, split: str) -> list[tuple[str, str]]:
        parts = [part for part in self.splits if (self.root / part / "images").is_dir()]
        if parts and "train" not in parts:
            raise UserError(
                f"{self.name}: there is no {self.root / 'train' / 'images'}. Put the training pictures there."
            )
        if split == "train" or not parts or parts == ["train"]:
            inside = self._pairs(self.root / "train" if parts else self.root)
            if parts not in ([], ["train"]):
                return inside
            out = [int((i + 1) * self.held_out) > int(i * self.held_out) for i in range(len(inside))]
            return [pair for pair, held in zip(inside, out) if held == (split != "train")]
        return self._pairs(self.root / (split if split in parts else parts[-1]))

    def _pairs(self, folder: Path) -> list[tuple[str, str]]:
        """(picture, mask) of `images` and `masks` in a folder. Raises UserError for a file without its partner."""
        fix = "Put the pictures into images/ and their masks, of the same names, into masks/."
        places = [require_folder(folder / part, self.name, fix) for part in ("images", "masks")]
        images, masks = map(_by_stem, places)
        for stem in sorted(images.keys() ^ masks.keys()):
            here, there = (0, 1) if stem in images else (1, 0)
            name = (images, masks)[here][stem]
            raise UserError(
                f"{self.name}: {places[here] / name} has no {('picture', 'mask')[there]} {stem} in {places[there]}. "
                "Put it there, or remove the file."
            )
        return [(str(places[0] / images[stem]), str(places[1] / masks[stem])) for stem in sorted(images)]


def _by_stem(place: Path) -> dict[str, str]:
    """Name without ending -> name, of the pictures below `place`. Raises UserError for two of one name."""
    found: dict[str, str] = {}
    for name in list_pictures(place):
        other = found.setdefault(str(Path(name).with_suffix("")), name)
        if other != name:
            raise UserError(f"{place} holds both {other} and {name}. Remove one of them.")
    return found


def read_classes(path: Path) -> list[tuple[str, int | Colour]]:
    """(name, number or colour in the masks) of every class in the file; see `SegmentationFolder`.

    Raises UserError naming the line.
    """
    fix = "Write one class a line: name, or name = number, or name = red green blue."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"The list of classes {path} {what}. {fix}") from error
    found: list[tuple[str, int | Colour]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, mark = (part.strip() for part in line.partition("="))
        values = [int(word) for word in re.split(r"[,\s]+", mark) if word.isdecimal()] if mark else [len(found)]
        written = len(re.split(r"[,\s]+", mark)) if mark else 1
        if not name or len(values) != written or written not in (1, 3) or max(values) > 255:
            raise UserError(f"Line {number} of {path} is no class: {line.strip()!r}. {fix} Numbers are 0..255.")
        found.append((name, values[0] if len(values) == 1 else tuple(values)))
    if not 1 <= len(found) <= MOST:
        raise UserError(f"{path} lists {len(found)} classes, but 1 to {MOST} are possible. {fix}")
    for what, entries in (("name", [name for name, _ in found]), ("number or colour", [mark for _, mark in found])):
        twice = [entry for entry in entries if entries.count(entry) > 1]
        if twice:
            raise UserError(f"{path} gives the {what} {twice[0]} to two classes. Give each its own.")
    if len({isinstance(mark, tuple) for _, mark in found}) > 1:
        raise UserError(f"{path} mixes numbers and colours. {fix} Use one form in all lines.")
    return found
