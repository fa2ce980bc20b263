"""PASCAL VOC 2012, PASCAL-Context, ADE20K and Cityscapes, in the folders their makers (or the usual tools) give them.

torchvision lists the files of the sets it supports; the masks are read and checked by `common.data.segmentation.pairs`.
"""

from pathlib import Path

from torchvision.datasets import Cityscapes as CityscapesFiles
from torchvision.datasets import SBDataset, VOCSegmentation

from common.data.segmentation.augment import IGNORE
from common.data.segmentation.names import ADE_NAMES, CONTEXT_NAMES, VOC_NAMES
from common.data.segmentation.pairs import Pairs, label_table, read_names, require_files, require_folder
from common.data.segmentation.palette import bit_palette
from common.data.source import check_split


class Voc2012:
    """PASCAL VOC 2012 segmentation, 21 classes: splits train (1464), val (1449), trainval (2913).

    root       folder that holds `VOCdevkit/VOC2012/` with `ImageSets/Segmentation/<split>.txt`, `JPEGImages`,
               `SegmentationClass` (the archive as unpacked)
    augmented  also the split trainaug (10,582): train of VOC with VOC's masks, and every picture of the Semantic
               Boundaries Dataset (Hariharan et al., ICCV 2011) that is in neither train nor val. The masks are taken
               from `VOCdevkit/VOC2012/SegmentationClassAug/*.png` where there is
               `ImageSets/Segmentation/trainaug.txt`, else from `sbd/` as torchvision unpacks it (`cls/*.mat`,
               `img/*.jpg`, `train.txt`, `val.txt`)

    The border of the objects, value 255, is void.
    """

    name = "voc2012"
    class_names = VOC_NAMES
    palette = bit_palette(21)

    def __init__(self, *, root: str, augmented: bool = False):
        self.root, self.augmented = root, augmented
        self.splits = ("train", "val", "trainval", "trainaug") if augmented else ("train", "val", "trainval")

    def check(self) -> None:
        for split in self.splits:
            self.load(split)

    def load(self, split: str) -> Pairs:
        check_split(split, self.splits, self.name)
        folder = require_folder(
            self._folder, "PASCAL VOC 2012",
            "Set data.root to the folder that holds VOCdevkit/, unpacked from VOCtrainval_11-May-2012.tar of "
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012.",
        )  # fmt: skip
        if split == "trainaug":
            pairs, listed = self._augmented(folder), "data.source.augmented"
        else:
            pairs, listed = self._own(split), str(self._list(split))
        require_files(self.name, pairs, listed)
        images, masks = map(list, zip(*pairs))
        return Pairs(name=self.name, images=images, masks=masks, table=label_table(range(21)))

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser() / "VOCdevkit" / "VOC2012"

    def _list(self, split: str) -> Path:
        return self._folder / "ImageSets" / "Segmentation" / f"{split}.txt"

    def _names(self, split: str) -> list[str]:
        return read_names(self._list(split), self.name, "Take it from the VOC archive, or set another split.")

    def _own(self, split: str) -> list[tuple[str, str]]:
        self._names(split)
        files = VOCSegmentation(str(Path(self.root).expanduser()), year="2012", image_set=split)
        return [pair for pair in zip(files.images, files.masks) if Path(pair[0]).name != ".jpg"]  # of an empty line

    def _augmented(self, folder: Path) -> list[tuple[str, str]]:
        own, held_out = self._names("train"), set(self._names("val"))
        found = dict(zip(own, self._own("train")))
        if self._list("trainaug").is_file():
            for name in self._names("trainaug"):
                extra = (folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClassAug" / f"{name}.png")
                found.setdefault(name, (str(extra[0]), str(extra[1])))
            return list(found.values())
        sbd = require_folder(
            Path(self.root).expanduser() / "sbd", "The Semantic Boundaries Dataset",
            f"Put SegmentationClassAug/ and {self._list('trainaug')} there instead, or unpack benchmark.tgz of "
            "torchvision.datasets.SBDataset into it, or set data=voc2012.",
        )  # fmt: skip
        for split in ("train", "val"):
            read_names(sbd / f"{split}.txt", "sbd", "Take it from benchmark.tgz.")
            files = SBDataset(str(sbd), image_set=split, mode="segmentation")
            for image, mask in zip(files.images, files.masks):
                name = Path(image).stem
                if name not in held_out:
                    found.setdefault(name, (image, mask))
        return list(found.values())


class PascalContext:
    """PASCAL-Context, the 59 most frequent classes: splits train (4998), val (5105).

    root  folder that holds `VOCdevkit/VOC2010/` with `JPEGImages`, `SegmentationClassContext/*.png` (values 0..59) and
          `ImageSets/SegmentationContext/<split>.txt`, as mmsegmentation's converter writes them

    Value 0, the background, is void: the published numbers on 59 classes leave it out.
    """

    name = "pascal_context"
    class_names = CONTEXT_NAMES
    palette = bit_palette(59, first=1)
    splits = ("train", "val")

    def __init__(self, *, root: str):
        self.root = root

    def check(self) -> None:
        for split in self.splits:
            self.load(split)

    def load(self, split: str) -> Pairs:
        check_split(split, self.splits, self.name)
        folder = require_folder(
            Path(self.root).expanduser() / "VOCdevkit" / "VOC2010", "PASCAL-Context",
            "Set data.root to the folder that holds VOCdevkit/VOC2010 (VOCtrainval_03-May-2010.tar) with the masks of "
            "https://cs.stanford.edu/~roozbeh/pascal-context, converted by mmsegmentation's pascal_context.py.",
        )  # fmt: skip
        listed = folder / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        names = read_names(listed, self.name, "Run the converter of mmsegmentation, which writes it.")
        images = [str(folder / "JPEGImages" / f"{name}.jpg") for name in names]
        masks = [str(folder / "SegmentationClassContext" / f"{name}.png") for name in names]
        require_files(self.name, list(zip(images, masks)), str(listed))
        table = label_table(range(1, 60), void=(0, IGNORE))
        return Pairs(name=self.name, images=images, masks=masks, table=table)


class Ade20k:
    """ADE20K, the 150 classes of the scene parsing benchmark: splits train (20,210), val (2,000).

    root  folder that holds `ADEChallengeData2016/` with `images/{training,validation}/*.jpg` and
          `annotations/{training,validation}/*.png` (values 0..150), the archive as unpacked

    Value 0, everything else, is void.
    """

    name = "ade20k"
    class_names = ADE_NAMES
    palette = bit_palette(150, first=1)
    splits = ("train", "val")
    folders = {"train": "training", "val": "validation"}  # noqa: RUF012  (never changed)

    def __init__(self, *, root: str):
        self.root = root

    def check(self) -> None:
        for split in self.splits:
            self.load(split)

    def load(self, split: str) -> Pairs:
        check_split(split, self.splits, self.name)
        folder = Path(self.root).expanduser() / "ADEChallengeData2016"
        fix = (
            "Set data.root to the folder that holds ADEChallengeData2016/, unpacked from "
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip."
        )
        image_folder, mask_folder = (folder / part / self.folders[split] for part in ("images", "annotations"))
        stems = [
            {path.stem for path in require_folder(place, "ADE20K", fix).glob(f"*{suffix}")}
            for place, suffix in ((image_folder, ".jpg"), (mask_folder, ".png"))
        ]
        names = sorted(stems[0] | stems[1])
        images = [str(image_folder / f"{name}.jpg") for name in names]
        masks = [str(mask_folder / f"{name}.png") for name in names]
        require_files(self.name, list(zip(images, masks)), str(folder))
        table = label_table(range(1, 151), void=(0, IGNORE))
        return Pairs(name=self.name, images=images, masks=masks, table=table)


class Cityscapes:
    """Cityscapes with fine annotations, the 19 classes that are evaluated: splits train (2975), val (500).

    root  folder that holds `cityscapes/` with `leftImg8bit/<split>/<city>/*_leftImg8bit.png` and
          `gtFine/<split>/<city>/*_gtFine_labelIds.png`, the two archives as unpacked

    All other label ids are void. The pictures of the test split have no public masks.
    """

    name = "cityscapes"
    splits = ("train", "val")
    _evaluated = tuple(entry for entry in CityscapesFiles.classes if 0 <= entry.train_id < IGNORE)
    class_names = tuple(entry.name for entry in _evaluated)
    palette = tuple(entry.color for entry in _evaluated)

    def __init__(self, *, root: str):
        self.root = root

    def check(self) -> None:
        for split in self.splits:
            self.load(split)

    def load(self, split: str) -> Pairs:
        check_split(split, self.splits, self.name)
        folder = Path(self.root).expanduser() / "cityscapes"
        for part in ("leftImg8bit", "gtFine"):  # torchvision would begin to unpack archives
            require_folder(
                folder / part / split, "Cityscapes",
                "Set data.root to the folder that holds cityscapes/, with leftImg8bit_trainvaltest.zip and "
                "gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com unpacked in it.",
            )  # fmt: skip
        files = CityscapesFiles(str(folder), split=split, mode="fine", target_type="semantic")
        found = {image: targets[0] for image, targets in zip(files.images, files.targets)}
        for mask in (folder / "gtFine" / split).glob("*/*_gtFine_labelIds.png"):  # a mask whose picture is missing
            picture = mask.name.replace("_gtFine_labelIds.png", "_leftImg8bit.png")
            found.setdefault(str(folder / "leftImg8bit" / split / mask.parent.name / picture), str(mask))
        pairs = sorted(pair for pair in found.items() if pair[0].endswith("_leftImg8bit.png"))  # listed in no order
        require_files(self.name, pairs, str(folder))
        known = {entry.id: entry.train_id for entry in CityscapesFiles.classes if entry.id >= 0}
        void = [value for value, label in known.items() if label == IGNORE]
        table = label_table(
            {v: c for v, c in known.items() if c != IGNORE}, void=(*void, IGNORE)
        )  # 255: licence plates
        images, masks = map(list, zip(*pairs)) if pairs else ([], [])
        return Pairs(name=self.name, images=images, masks=masks, table=table)
