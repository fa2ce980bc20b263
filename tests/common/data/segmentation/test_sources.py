"""Every layout, made tiny: what is listed, how labels are mapped, and each fault as one sentence naming the file."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from common.data.segmentation.names import ADE_NAMES, CONTEXT_NAMES, VOC_NAMES
from common.data.segmentation.pairs import check_pairs
from common.data.segmentation.sources import Ade20k, Cityscapes, PascalContext, Voc2012
from common.errors import UserError

HEIGHT, WIDTH = 6, 8


def put_image(path, seed=0, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def put_mask(path, values, size=(HEIGHT, WIDTH), palette=False):
    """The values in rows, repeated over the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.resize(np.array(values, dtype=np.uint8), size))
    if palette:
        picture.putpalette(list(range(256)) * 3)
    picture.save(path)


def put_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def voc(root, aug=None):
    """train a b, val c; aug adds d: "png" as SegmentationClassAug, "sbd" as torchvision unpacks it."""
    base = root / "VOCdevkit" / "VOC2012"
    for number, name in enumerate("abcd"):
        put_image(base / "JPEGImages" / f"{name}.jpg", number)
    for name in "abc":
        put_mask(base / "SegmentationClass" / f"{name}.png", [0, 5, 20, 255], palette=True)
    lists = base / "ImageSets" / "Segmentation"
    for split, names in (("train", "ab"), ("val", "c"), ("trainval", "abc")):
        put_list(lists / f"{split}.txt", names)
    if aug == "png":
        put_mask(base / "SegmentationClassAug" / "d.png", [7])
        put_list(lists / "trainaug.txt", "abd")
    if aug == "sbd":
        sbd = root / "sbd"
        for name in "bcd":
            put_image(sbd / "img" / f"{name}.jpg")
            (sbd / "cls").mkdir(exist_ok=True)
            values = np.full((HEIGHT, WIDTH), 7, dtype=np.uint8)
            kind = np.dtype([("Segmentation", object)])
            struct = np.zeros((1, 1), dtype=kind)
            struct[0, 0]["Segmentation"] = values
            savemat(sbd / "cls" / f"{name}.mat", {"GTcls": struct})
        put_list(sbd / "train.txt", "cd")
        put_list(sbd / "val.txt", "b")
    return base


def context(root):
    base = root / "VOCdevkit" / "VOC2010"
    for split, names in (("train", "ab"), ("val", "c")):
        put_list(base / "ImageSets" / "SegmentationContext" / f"{split}.txt", names)
        for name in names:
            put_image(base / "JPEGImages" / f"{name}.jpg")
            put_mask(base / "SegmentationClassContext" / f"{name}.png", [0, 1, 59])
    return base


def ade(root):
    base = root / "ADEChallengeData2016"
    for folder, names in (("training", ("ADE_2", "ADE_1")), ("validation", ("ADE_3",))):
        for name in names:
            put_image(base / "images" / folder / f"{name}.jpg")
            put_mask(base / "annotations" / folder / f"{name}.png", [0, 1, 150])
    return base


def cityscapes(root):
    base = root / "cityscapes"
    for split, cities in (("train", ("ulm", "aachen")), ("val", ("bonn",))):
        for city in cities:
            put_image(base / "leftImg8bit" / split / city / f"{city}_0_0_leftImg8bit.png")
            put_mask(base / "gtFine" / split / city / f"{city}_0_0_gtFine_labelIds.png", [0, 7, 9, 33, 255])
    return base


def labels(source, split, index=0):
    image, mask = source.load(split).read(index)
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == mask.dtype == torch.uint8
    return sorted(set(mask.flatten().tolist()))


def stems(pairs):
    return [name.rsplit("/", 1)[1].split(".")[0] for name in pairs.images]


def test_names_and_palettes_are_complete():
    assert (len(VOC_NAMES), len(CONTEXT_NAMES), len(ADE_NAMES)) == (21, 59, 150)
    assert Cityscapes.class_names[0] == "road" and Cityscapes.class_names[18] == "bicycle"
    for kind, count in ((Voc2012, 21), (PascalContext, 59), (Ade20k, 150), (Cityscapes, 19)):
        assert len(kind.class_names) == len(kind.palette) == count
        assert len(set(kind.class_names)) == len(set(kind.palette)) == count
    # the devkit's colours
    assert Voc2012.palette[1] == (128, 0, 0) and Voc2012.palette[15] == (192, 128, 128)
    assert Voc2012.palette[20] == (0, 64, 128)


def test_voc(tmp_path):
    voc(tmp_path)
    source = Voc2012(root=str(tmp_path))
    source.check()
    assert {s: stems(source.load(s)) for s in source.splits} == {
        "train": ["a", "b"], "val": ["c"], "trainval": ["a", "b", "c"],
    }  # fmt: skip
    assert labels(source, "train") == [0, 5, 20, 255]


@pytest.mark.parametrize("aug", ["png", "sbd"])
def test_voc_augmented_takes_vocs_masks_first_and_never_val(tmp_path, aug):
    voc(tmp_path, aug)
    source = Voc2012(root=str(tmp_path), augmented=True)
    source.check()
    pairs = source.load("trainaug")
    assert stems(pairs) == ["a", "b", "d"]
    assert labels(source, "trainaug", 1) == [0, 5, 20, 255] and labels(source, "trainaug", 2) == [7]


def test_voc_augmented_without_either_says_what_to_do(tmp_path):
    voc(tmp_path)
    with pytest.raises(UserError, match=r"Semantic Boundaries Dataset not found: .*sbd is not a folder.*data=voc2012"):
        Voc2012(root=str(tmp_path), augmented=True).check()


def test_context_leaves_the_background_out(tmp_path):
    context(tmp_path)
    source = PascalContext(root=str(tmp_path))
    source.check()
    assert labels(source, "train") == [0, 58, 255] and len(source.load("val")) == 1


def test_ade_leaves_zero_out_and_is_sorted(tmp_path):
    ade(tmp_path)
    source = Ade20k(root=str(tmp_path))
    source.check()
    assert labels(source, "val") == [0, 149, 255] and stems(source.load("train")) == ["ADE_1", "ADE_2"]


def test_cityscapes_maps_to_train_ids_and_is_sorted(tmp_path):
    base = cityscapes(tmp_path)
    (base / "leftImg8bit" / "train" / "ulm" / "notes.txt").write_text("stray")
    source = Cityscapes(root=str(tmp_path))
    source.check()
    assert labels(source, "val") == [0, 18, 255]  # road, bicycle; unlabelled, parking and licence plates are void
    assert stems(source.load("train")) == ["aachen_0_0_leftImg8bit", "ulm_0_0_leftImg8bit"]


MAKERS = {Voc2012: voc, PascalContext: context, Ade20k: ade, Cityscapes: cityscapes}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_missing_set_says_where_it_was_looked_for(tmp_path, kind):
    with pytest.raises(UserError, match=r"Set data\.root") as caught:
        kind(root=str(tmp_path / "nowhere")).check()
    assert str(tmp_path / "nowhere") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["mask", "picture"])
@pytest.mark.parametrize("kind", MAKERS)
def test_an_incomplete_pair_is_named(tmp_path, kind, what):
    MAKERS[kind](tmp_path)
    source = kind(root=str(tmp_path))
    pairs = source.load("val")
    gone = (pairs.masks if what == "mask" else pairs.images)[0]
    (tmp_path / gone).unlink()
    other = "picture" if what == "mask" else "mask"
    with pytest.raises(UserError, match=rf"the {what} {gone} of the {other} .* is missing \(1 of 1 are\)"):
        source.load("val")


@pytest.mark.parametrize("content", [None, "", "a\nb\na\n"])
def test_a_split_file_missing_empty_or_repeating_is_named(tmp_path, content):
    base = voc(tmp_path)
    path = base / "ImageSets" / "Segmentation" / "train.txt"
    path.unlink()
    if content is not None:
        path.write_text(content)
    word = {None: "is missing", "": "is empty"}.get(content, "names a twice")
    with pytest.raises(UserError, match=rf"the split file {path} {word}"):
        Voc2012(root=str(tmp_path)).check()


def damaged(tmp_path):
    base = voc(tmp_path)
    return base / "SegmentationClass" / "b.png", Voc2012(root=str(tmp_path)).load("train")


def test_a_corrupt_mask_and_picture_are_named(tmp_path):
    path, pairs = damaged(tmp_path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"voc2012: the mask {path} cannot be read .*Put an intact copy there"):
        check_pairs(pairs, None)
    check_pairs(pairs, 1)  # only the first is looked at
    image = tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "a.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(UserError, match=rf"the picture {image} cannot be read"):
        check_pairs(pairs, 1)


def test_a_mask_of_another_size_is_named(tmp_path):
    path, pairs = damaged(tmp_path)
    put_mask(path, [0], size=(5, 8))
    with pytest.raises(UserError, match=rf"the mask {path} is 8x5, its picture .*b\.jpg 8x6"):
        check_pairs(pairs, None)


def test_a_label_outside_the_classes_is_named(tmp_path):
    path, pairs = damaged(tmp_path)
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    values[2, 3] = 21
    Image.fromarray(values).save(path)
    with pytest.raises(UserError) as caught:
        check_pairs(pairs, None)
    assert f"the mask {path} holds the value 21 in row 2, column 3, which is no class" in str(caught.value)
    assert "allowed are 0..20, 255" in str(caught.value)
    Image.fromarray(np.full((HEIGHT, WIDTH), 300, dtype=np.uint16)).save(path)
    with pytest.raises(UserError, match="holds the value 300 in row 0, column 0"):
        check_pairs(pairs, None)


def test_a_coloured_mask_is_named(tmp_path):
    path, pairs = damaged(tmp_path)
    put_image(path)
    with pytest.raises(UserError, match=rf"the mask {path} is a colour picture"):
        check_pairs(pairs, None)


def test_the_fingerprint_follows_the_files(tmp_path):
    path, pairs = damaged(tmp_path)
    before = pairs.fingerprint()
    assert before == Voc2012(root=str(tmp_path)).load("train").fingerprint()
    path.write_bytes(path.read_bytes() + b"x")
    assert pairs.fingerprint() != before
