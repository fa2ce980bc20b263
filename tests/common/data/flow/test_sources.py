"""The public sets in made-up miniature, equal to torchvision's readers, their damage, and the real pairs."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from common.data.flow.files import write_flow
from common.data.flow.sources import FlyingChairs, FlyingThings3D, Hd1k, Kitti, Pairs, Sintel
from common.errors import UserError

HEIGHT, WIDTH = 6, 9


def picture(path, number, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.Philox(number))
    Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def truth(path, number, size=(HEIGHT, WIDTH), sparse=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(number)
    flow = (torch.randn(2, *size, generator=generator) * 640).round() / 64
    write_flow(path, flow, (torch.rand(size, generator=generator) < 0.5).float() if sparse else None)


def make_chairs(root):
    for number in range(1, 6):
        base = root / "FlyingChairs" / "data"
        picture(base / f"{number:05d}_img1.ppm", number)
        picture(base / f"{number:05d}_img2.ppm", 100 + number)
        truth(base / f"{number:05d}_flow.flo", number)
    (root / "FlyingChairs" / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n1\n2\n")


def make_things(root):
    base = root / "FlyingThings3D"
    for scene in ("A/0000", "B/0003"):
        for number in (6, 7, 8):
            for part in ("frames_cleanpass", "frames_finalpass"):
                picture(base / part / "TRAIN" / scene / "left" / f"{number:04d}.png", number)
            for way, word in (("into_future", "Future"), ("into_past", "Past")):
                name = f"OpticalFlowInto{word}_{number:04d}_L.pfm"
                truth(base / "optical_flow" / "TRAIN" / scene / way / "left" / name, number)


def make_sintel(root):
    base = root / "Sintel" / "training"
    for scene in ("bamboo_2", "alley_1"):
        for number in (1, 2, 3):
            for part in ("clean", "final"):
                picture(base / part / scene / f"frame_{number:04d}.png", number)
            if number < 3:
                truth(base / "flow" / scene / f"frame_{number:04d}.flo", number)


def make_kitti(root):
    base = root / "KittiFlow" / "training"
    for number in range(3):
        for frame in (10, 11):
            picture(base / "image_2" / f"{number:06d}_{frame}.png", number + frame)
        truth(base / "flow_occ" / f"{number:06d}_10.png", number, sparse=True)


def make_hd1k(root):
    for sequence in range(2):
        for frame in range(3):
            name = f"{sequence:06d}_{frame * 10:04d}.png"
            picture(root / "hd1k" / "hd1k_input" / "image_2" / name, frame)
            truth(root / "hd1k" / "hd1k_flow_gt" / "flow_occ" / name, frame, sparse=True)


SETS = {
    "chairs": (make_chairs, FlyingChairs, {}, lambda root: datasets.FlyingChairs(root, split="train"), 3),
    "things": (
        make_things, FlyingThings3D, {"passes": "final"},
        lambda root: datasets.FlyingThings3D(root, pass_name="final"), 8,
    ),
    "sintel": (make_sintel, Sintel, {"passes": "clean"}, lambda root: datasets.Sintel(root), 4),
    "kitti": (make_kitti, Kitti, {}, lambda root: datasets.KittiFlow(root), 3),
    "hd1k": (make_hd1k, Hd1k, {}, lambda root: datasets.HD1K(root), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_pairs_are_torchvisions(tmp_path, name):
    make, kind, options, theirs, count = SETS[name]
    make(tmp_path)
    source = kind(root=str(tmp_path), **options)
    source.check("train")
    pairs, reference = source.load("train"), theirs(str(tmp_path))
    assert len(pairs) == len(reference) == count
    order = sorted(range(count), key=lambda i: (*reference._image_list[i], reference._flow_list[i]))
    for ours, i in enumerate(order):
        sample, (first, second, flow, *mask) = pairs.read(ours), reference[i]
        assert np.array_equal(sample["first"].permute(1, 2, 0).numpy(), np.array(first))
        assert np.array_equal(sample["second"].permute(1, 2, 0).numpy(), np.array(second))
        known = mask[0] if mask else np.ones((HEIGHT, WIDTH), bool)
        assert np.array_equal(sample["valid"].numpy() > 0, known)
        assert np.array_equal(sample["flow"].numpy()[:, known], np.asarray(flow)[:2, known])
        assert pairs.size(ours) == (HEIGHT, WIDTH)


def test_splits_and_passes(tmp_path):
    make_chairs(tmp_path)
    source = FlyingChairs(root=str(tmp_path))
    names = {split: [f.split("/")[-1][:5] for f in source.load(split).flows] for split in source.splits}
    assert names == {"train": ["00001", "00003", "00004"], "val": ["00002", "00005"]}
    assert source.load("train").fingerprint() != source.load("val").fingerprint()
    with pytest.raises(UserError, match=r"no split 'valid'\. Closest: val"):
        source.load("valid")
    for kind in (Sintel, FlyingThings3D):
        with pytest.raises(UserError, match="passes must be one of clean, final, got 'both'"):
            kind(root=str(tmp_path), passes="both")


@pytest.mark.parametrize("name", SETS)
def test_a_missing_set_tells_the_layout(tmp_path, name):
    _, kind, options, *_ = SETS[name]
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match=rf"{name} not found.*{root}.*Set data\.root to the folder that holds"
        ) as said:
            kind(root=str(root), **options).check("train")
        assert kind.layout.split("/")[0] in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize(
    "name, file, message",
    [
        ("chairs", "FlyingChairs/data/00003_img2.ppm", "chairs.*Set data.root|do not belong together|incomplete"),
        ("chairs", "FlyingChairs/data/00003_flow.flo", "do not belong together"),
        ("chairs", "FlyingChairs/FlyingChairs_train_val.txt", r"FlyingChairs_train_val\.txt file was not found"),
        ("sintel", "Sintel/training/flow/alley_1/frame_0001.flo", "4 pairs of pictures, but 3 flow files"),
        ("sintel", "Sintel/training/clean/alley_1/frame_0003.png", "3 pairs of pictures, but 4 flow files"),
        ("things", "FlyingThings3D/frames_finalpass/TRAIN/A/0000/left/0007.png", "incomplete|do not belong together"),
        ("kitti", "KittiFlow/training/image_2/000000_11.png", "pairs of pictures, but|do not belong together"),
        ("kitti", "KittiFlow/training/flow_occ/000001_10.png", "3 pairs of pictures, but 2 flow files"),
        ("hd1k", "hd1k/hd1k_flow_gt/flow_occ/000000_0000.png", "do not belong together"),
        ("hd1k", "hd1k/hd1k_input/image_2/000001_0000.png", "do not belong together|incomplete"),
    ],
)
def test_a_lost_file_does_not_shift_the_others(tmp_path, name, file, message):
    make, kind, options, *_ = SETS[name]
    make(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=message):
        kind(root=str(tmp_path), **options).check("train")


def test_damaged_and_mismatched_files_are_named(tmp_path):
    make_sintel(tmp_path)
    pairs = Sintel(root=str(tmp_path)).load("train")
    flow = tmp_path / "Sintel" / "training" / "flow" / "alley_1" / "frame_0001.flo"
    truth(flow, 0, (HEIGHT, WIDTH + 1))
    with pytest.raises(
        UserError, match=rf"sintel: the flow {flow} is 10x6, its picture .*frame_0001\.png 9x6\. Put the"
    ):
        pairs.read(0)
    flow.write_bytes(flow.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"sintel: The flow {flow} cannot be read \(its head says 10x6"):
        pairs.read(0)
    flow.unlink()
    with pytest.raises(UserError, match=rf"sintel: The flow {flow} cannot be read \(there is no such file"):
        pairs.read(0)
    with pytest.raises(UserError, match=rf"sintel: {flow} is missing"):
        pairs.fingerprint()
    second = tmp_path / "Sintel" / "training" / "clean" / "alley_1" / "frame_0003.png"
    picture(second, 0, (HEIGHT, WIDTH + 2))
    with pytest.raises(UserError, match=rf"the second picture {second} is 11x6"):
        pairs.read(1)


def test_far_flow_is_not_valid_in_dense_sets_only(tmp_path):
    make_sintel(tmp_path)
    flow = torch.zeros(2, HEIGHT, WIDTH)
    flow[1, 0, 0], flow[0, 0, 1] = 1000.0, -999.0
    write_flow(tmp_path / "Sintel" / "training" / "flow" / "alley_1" / "frame_0001.flo", flow)
    valid = Sintel(root=str(tmp_path)).load("train").read(0)["valid"]
    assert valid[0, :2].tolist() == [0, 1] and valid.sum() == HEIGHT * WIDTH - 1


# The real pairs -------------------------------------------------------------------------------------------------------


def test_the_real_pairs(data_folder):
    source = Pairs(root=str(data_folder("flow").parent))
    counts = {}
    for split in source.splits:
        source.check(split)
        counts[split] = len(source.load(split))
    assert counts == {"chairs_train": 9, "chairs": 3, "middlebury": 2, "sintel": 1, "kitti": 2, "all": 17}


def test_their_flow_is_the_recorded_one(data_folder):
    """index.csv: chairs_00 has a mean of 6.053 and at most 77.95 pixels, RubberWhale 98.4 % known and 4.62 at most."""
    source = Pairs(root=str(data_folder("flow").parent))
    sample = source.load("chairs_train").read(0)
    length = sample["flow"].square().sum(0).sqrt()
    assert float(length.mean()) == pytest.approx(6.053, abs=1e-3)
    assert float(length.max()) == pytest.approx(77.95, abs=1e-2)
    assert sample["first"].shape == (3, 384, 512) and sample["valid"].all()
    whale = source.load("middlebury").read(1)
    assert float(whale["valid"].mean()) == pytest.approx(0.984, abs=1e-3)
    assert float(whale["flow"].square().sum(0).sqrt().max()) == pytest.approx(4.62, abs=1e-2)
    assert not whale["flow"][:, whale["valid"] == 0].any()
    kitti = source.load("kitti").read(0)
    assert float(kitti["valid"].mean()) == pytest.approx(0.162, abs=1e-3)
    assert kitti["first"].shape == (3, 375, 1242)


def test_an_index_that_is_missing_or_wrong(tmp_path):
    with pytest.raises(UserError, match=r"looked for .*flow/index\.csv\. Set data\.root"):
        Pairs(root=str(tmp_path)).check("chairs")
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "index.csv").write_text("name,size\nchairs_09,3\n")
    with pytest.raises(UserError, match=r"index\.csv needs columns name and flow_scale"):
        Pairs(root=str(tmp_path)).check("chairs")
    (tmp_path / "flow" / "index.csv").write_text("name,flow_scale\nchairs_09,64\n")
    with pytest.raises(UserError, match=r"pairs chairs: .*chairs_09_1\.webp is missing"):
        Pairs(root=str(tmp_path)).check("chairs")
    with pytest.raises(UserError, match="pairs kitti holds no pairs"):
        Pairs(root=str(tmp_path)).check("kitti")
