"""The public flow data sets in the folders that torchvision's readers expect, and the real pairs of the data folder."""

import csv
import operator
import re
from collections.abc import Callable
from pathlib import Path

from torchvision import datasets

from common import limits
from common.data.flow.pairs import FilePairs
from common.data.source import check_split
from common.errors import UserError

PASSES = ("clean", "final")


class FlyingChairs:
    """FlyingChairs (Dosovitskiy et al., ICCV 2015): splits train (22,232 pairs) and val (640) of 512x384.

    root  folder that holds `FlyingChairs/data/*_{img1,img2}.ppm`, `*_flow.flo` and `FlyingChairs/
          FlyingChairs_train_val.txt`, the authors' split, from the data set's page
    """

    name = "chairs"
    splits = ("train", "val")
    layout = "FlyingChairs/data/00001_{img1.ppm,img2.ppm,flow.flo} and FlyingChairs/FlyingChairs_train_val.txt"

    def __init__(self, *, root: str):
        self.root = root

    def check(self, split: str) -> None:
        self.load(split).require()

    def load(self, split: str) -> FilePairs:
        check_split(split, self.splits, self.name)
        found = _listed(self, lambda root: datasets.FlyingChairs(root, split=split))
        return _pairs(self, found, lambda path: Path(path).name.split("_")[0])


class FlyingThings3D:
    """FlyingThings3D (Mayer et al., CVPR 2016), left camera, both directions of time: splits train (40,302 pairs of
    each pass) and test.

    root    folder that holds `FlyingThings3D/{frames_cleanpass,frames_finalpass,optical_flow}/{TRAIN,TEST}/...`
    passes  clean or final
    """

    name = "things"
    splits = ("train", "test")
    layout = (
        "FlyingThings3D/frames_{pass}pass/{TRAIN,TEST}/A/0000/left/0006.png and FlyingThings3D/optical_flow/"
        "{TRAIN,TEST}/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm"
    )

    def __init__(self, *, root: str, passes: str = "clean"):
        self.root, self.passes = root, _checked_pass(passes)

    def check(self, split: str) -> None:
        self.load(split).require()

    def load(self, split: str) -> FilePairs:
        check_split(split, self.splits, self.name)
        found = _listed(self, lambda root: datasets.FlyingThings3D(root, split=split, pass_name=self.passes))
        return _pairs(self, found, _things_key, _neighbours)


class Sintel:
    """MPI-Sintel (Butler et al., ECCV 2012): split train, 1041 pairs of 1024x436 of each pass; those of the test split
    have no public ground truth.

    root    folder that holds `Sintel/training/{clean,final,flow}/<scene>/`
    passes  clean or final
    """

    name = "sintel"
    splits = ("train",)
    layout = "Sintel/training/{clean,final}/alley_1/frame_0001.png and Sintel/training/flow/alley_1/frame_0001.flo"

    def __init__(self, *, root: str, passes: str = "clean"):
        self.root, self.passes = root, _checked_pass(passes)

    def check(self, split: str) -> None:
        self.load(split).require()

    def load(self, split: str) -> FilePairs:
        check_split(split, self.splits, self.name)
        found = _listed(self, lambda root: datasets.Sintel(root, split=split, pass_name=self.passes))
        return _pairs(self, found, lambda path: (Path(path).parent.name, _digits(path, 4)), _next)


class Kitti:
    """KITTI 2015 (Menze and Geiger, CVPR 2015): split train, 200 pairs with sparse ground truth (occluded pixels too).

    root  folder that holds `KittiFlow/training/{image_2,flow_occ}/`
    """

    name = "kitti"
    splits = ("train",)
    layout = "KittiFlow/training/image_2/000000_{10,11}.png and KittiFlow/training/flow_occ/000000_10.png"

    def __init__(self, *, root: str):
        self.root = root

    def check(self, split: str) -> None:
        self.load(split).require()

    def load(self, split: str) -> FilePairs:
        check_split(split, self.splits, self.name)
        found = _listed(self, lambda root: datasets.KittiFlow(root, split=split))
        return _pairs(self, found, lambda path: Path(path).name.split("_")[0], dense=False)


class Hd1k:
    """HD1K (Kondermann et al., CVPR workshops 2016): split train, 35 sequences of 2560x1080, sparse ground truth.

    root  folder that holds `hd1k/{hd1k_input/image_2,hd1k_flow_gt/flow_occ}/`
    """

    name = "hd1k"
    splits = ("train",)
    layout = "hd1k/hd1k_input/image_2/000000_0010.png and hd1k/hd1k_flow_gt/flow_occ/000000_0010.png"

    def __init__(self, *, root: str):
        self.root = root

    def check(self, split: str) -> None:
        self.load(split).require()

    def load(self, split: str) -> FilePairs:
        check_split(split, self.splits, self.name)
        found = _listed(self, lambda root: datasets.HD1K(root, split=split))
        return _pairs(self, found, lambda path: Path(path).name, _of_one_sequence, dense=False)


class Pairs:
    """Real pairs listed in `<root>/<folder>/index.csv`: `<name>_1.webp`, `<name>_2.webp`, `<name>_flow.png` (KITTI's
    layout with the steps per pixel of column `flow_scale`).

    Splits: chairs_train (chairs_00..08), chairs (chairs_09..11), middlebury, sintel, kitti, all.

    root    the data folder
    folder  name of the folder in it
    """

    name = "pairs"
    groups = {  # noqa: RUF012  (never changed)
        "chairs_train": r"chairs_0[0-8]$", "chairs": r"chairs_(09|10|11)$", "middlebury": "middlebury_",
        "sintel": "sintel_", "kitti": "kitti_", "all": "",
    }  # fmt: skip
    splits = tuple(groups)

    def __init__(self, *, root: str, folder: str = "flow"):
        self.root, self.folder = root, folder

    def check(self, split: str) -> None:
        self.load(split).require()

    def load(self, split: str) -> FilePairs:
        check_split(split, self.splits, self.name)
        place = Path(self.root).expanduser() / self.folder
        index = place / "index.csv"
        try:
            with open(index, newline="", encoding="utf-8") as file:
                scales = {row["name"]: float(row["flow_scale"]) for row in csv.DictReader(file)}
        except FileNotFoundError as error:
            raise UserError(
                f"pairs not found: looked for {index}. Set data.root to the folder that holds {self.folder}/ with "
                "index.csv and <name>_{1.webp,2.webp,flow.png}."
            ) from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"pairs: {index} needs columns name and flow_scale ({error!r}). Write it anew.") from error
        names = sorted(name for name in scales if re.match(self.groups[split], name))
        return FilePairs(
            name=f"pairs {split}",
            images=[(str(place / f"{name}_1.webp"), str(place / f"{name}_2.webp")) for name in names],
            flows=[str(place / f"{name}_flow.png") for name in names],
            scales=[scales[name] for name in names],
            dense=split not in ("kitti", "all"),
        )


# torchvision lists the files; what it would pair wrongly is found here ------------------------------------------------


def _listed(source, make: Callable[[str], datasets.VisionDataset]) -> list[tuple[str, str, str]]:
    """(first, second, flow) of every pair, sorted. Raises UserError with the expected layout."""
    root = Path(source.root).expanduser()
    layout = source.layout.replace("{pass}", getattr(source, "passes", ""))
    fix = f"Set data.root to the folder that holds {layout}."
    if not root.is_dir():
        raise UserError(f"{source.name} not found: the folder {root} does not exist. {fix}")
    try:
        files = make(str(root))
    except (OSError, IndexError, ValueError) as error:  # IndexError: more flows than pictures
        raise UserError(f"{source.name} not found or incomplete below {root} ({_short(error)}). {fix}") from error
    images, flows = files._image_list, files._flow_list
    if not images:
        raise UserError(f"{source.name} not found below {root}: no pair of pictures. {fix}")
    if len(images) != len(flows):
        raise UserError(
            f"{source.name}: {len(images)} pairs of pictures, but {len(flows)} flow files below {root}. Unpack the "
            f"archive again; it holds {layout}."
        )
    return sorted((*pair, flow) for pair, flow in zip(images, flows))


def _pairs(source, found: list, key: Callable, follows: Callable = operator.eq, dense: bool = True) -> FilePairs:
    """`found` as pairs, after a check that the names belong together: one lost file moves all that follow.

    key      what the names of a picture and its ground truth share
    follows  (key of the first picture, key of the second) -> whether the second can be the first's
    """
    for first, second, flow in found:
        if key(first) != key(flow) or not follows(key(first), key(second)):
            raise UserError(
                f"{source.name}: {first}, {second} and {flow} do not belong together: a file between them is missing. "
                "Unpack the archive again."
            )
    return FilePairs(name=source.name, images=[(a, b) for a, b, _ in found], flows=[f for *_, f in found], dense=dense)


def _next(first: tuple, second: tuple) -> bool:
    return second == (first[0], first[1] + 1)


def _neighbours(first: tuple, second: tuple) -> bool:
    return first[0] == second[0] and abs(first[1] - second[1]) == 1  # time runs both ways


def _of_one_sequence(first: str, second: str) -> bool:
    return first.split("_")[0] == second.split("_")[0]


def _things_key(path: str) -> tuple[str, int]:
    parts = Path(path).parts
    scene = parts[-5:-3] if path.endswith(".pfm") else parts[-4:-2]
    return "/".join(scene), _digits(path, 4)


def _digits(path: str, count: int) -> int:
    """The run of `count` digits in the file's name; -1 without one."""
    found = re.search(rf"\d{{{count}}}", Path(path).name)
    return int(found.group()) if found else -1


def _checked_pass(passes: str) -> str:
    return limits.choice("source.passes", passes, PASSES)


def _short(error: BaseException) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return first.split(" - ")[0].rstrip(".")  # torchvision goes on with advice of its own
