"""Latents from a cache: what a draw is, exact restart, mirror images, and errors that name the shard."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.images.folder import ImageFolder
from common.data.latents import cache as latent_cache
from common.data.latents.module import LatentDataModule, LatentFolder, normal_at
from common.errors import UserError

COUNT, SHARD = 11, 4


def write_cache(folder, moments: np.ndarray, *, mirrored: bool = True):
    facts = {
        "images": len(moments), "source": "cd" * 8, "size": 16, "fit": "adm", "mirrored": mirrored,
        "autoencoder": "stand-in", "arithmetic": "float32", "stored": str(moments.dtype), "shard_size": SHARD,
        "num_classes": 3, "classes": ["x", "y", "z"],
        "command": ["python", "-m", "tools.encode_latents", "pictures", "latents"],
    }  # fmt: skip
    latent_cache.begin(folder, facts)
    for number in range(latent_cache.shard_count(facts)):
        rows = np.arange(number * SHARD, min((number + 1) * SHARD, len(moments)))
        latent_cache.write_shard(folder / latent_cache.shard_name(number), moments[rows], rows % 3)
    latent_cache.finish(folder)
    return folder


@pytest.fixture
def moments():
    """(11, 2, 8, 2, 2): mean k + 100 for the mirror image, standard deviation 0.25."""
    array = np.full((COUNT, 2, 8, 2, 2), 0.25, dtype=np.float32)
    array[:, 0, :4] = np.arange(COUNT).reshape(-1, 1, 1, 1)
    array[:, 1, :4] = np.arange(COUNT).reshape(-1, 1, 1, 1) + 100
    return array


@pytest.fixture
def cache(tmp_path, moments):
    return write_cache(tmp_path / "train", moments)


def source(path, **options) -> LatentFolder:
    return LatentFolder(**{"path": str(path), "resolution": 2, "num_classes": 3, "mean": 0.0, "std": 1.0, **options})


def module(path, source_options=(), **options) -> LatentDataModule:
    return LatentDataModule(**{"source": source(path, **dict(source_options)), "batch_size": 4, **options})


def batches(data, count: int) -> list[dict]:
    return list(islice(data.train_dataloader(), count))


def joined(parts: list[dict], key: str) -> torch.Tensor:
    return torch.cat([part[key] for part in parts])


def test_noise_depends_on_its_position_alone_and_is_normal():
    drawn = normal_at("a", np.arange(100, 1124), (4, 9, 9))
    some = normal_at("a", np.array([700, 101, 102, 100]), (4, 9, 9))
    assert drawn.dtype == np.float32 and np.array_equal(some, drawn[[600, 1, 2, 0]])
    assert not np.array_equal(normal_at("b", np.array([100]), (4, 9, 9)), drawn[:1])
    n = drawn.size  # 331,776 numbers; four standard errors
    assert abs(drawn.mean()) < 4 / n**0.5 and abs(drawn.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((drawn**4).mean() - 3) < 4 * (96 / n) ** 0.5
    flat = drawn.reshape(len(drawn), -1).astype(np.float64)
    for left, right in ((flat[:, :-1], flat[:, 1:]), (flat[:-1], flat[1:])):  # neighbours in a row, and in position
        assert abs((left * right).mean()) < 4 / left.size**0.5


def test_batch_is_the_contracts(cache):
    data = module(cache)
    data.check()
    batch = data.on_after_batch_transfer(batches(data, 1)[0], 0)
    assert batch["image"].dtype == torch.float32 and batch["image"].shape == (4, 4, 2, 2)
    assert batch["label"].dtype == batch["position"].dtype == torch.int64
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert (data.num_classes, data.channels, data.resolution, data.splits) == (3, 4, 2, ("train",))
    rows = batch["image"].mean(dim=(1, 2, 3)).round().long()
    assert torch.equal(rows % 3, batch["label"])
    assert data.images("train").label_counts().tolist() == [4, 4, 3]


def test_draws_have_the_moments_and_are_normalised(cache):
    plain = joined(batches(module(cache), 400), "image").double()
    index = plain.mean(dim=(1, 2, 3)).round()
    noise = (plain - index.view(-1, 1, 1, 1)) / 0.25
    assert noise.std().item() == pytest.approx(1, abs=0.02) and abs(noise.mean().item()) < 0.03
    assert len(torch.unique(noise)) > 0.99 * noise.numel(), "every draw of an image has noise of its own"
    mean, std = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 0.5, 5.0]
    scaled = joined(batches(module(cache, {"mean": mean, "std": std}), 400), "image").double()
    expected = (plain - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(scaled, expected.double(), rtol=1e-5, atol=1e-5)


def test_an_epoch_holds_each_image_and_each_mirror_image_once(cache):
    drawn = joined(batches(module(cache, batch_size=2 * COUNT, xflip=True), 1), "image")
    seen = drawn.mean(dim=(1, 2, 3)).round().long().tolist()
    assert sorted(seen) == [*range(COUNT), *range(100, 100 + COUNT)]
    alone = joined(batches(module(cache, batch_size=COUNT), 1), "image").mean(dim=(1, 2, 3)).round().long()
    assert sorted(alone.tolist()) == list(range(COUNT))


def test_restart_workers_and_processes_change_nothing(cache):
    whole = batches(module(cache, xflip=True, seed=3), 9)
    again = module(cache, xflip=True, seed=3)
    again.load_state_dict({"images_seen": 5 * 4, "batches": 0, "seed": 3, "shuffle": True, "xflip": True})
    for expected, batch in zip(whole[5:], batches(again, 4), strict=True):
        assert all(torch.equal(expected[key], batch[key]) for key in expected)
    larger = batches(module(cache, xflip=True, seed=3, batch_size=12), 3)
    assert torch.equal(joined(whole, "image"), joined(larger, "image"))
    with_workers = module(cache, xflip=True, seed=3, num_workers=2)
    assert torch.equal(joined(whole, "image"), joined(batches(with_workers, 9), "image"))
    with_workers.teardown("fit")
    shares = []
    for rank in (0, 1):
        data = module(cache, xflip=True, seed=3)
        data._world = lambda rank=rank: (rank, 2)
        shares.append(batches(data, 9))
    both = [torch.cat([a["image"], b["image"]]) for a, b in zip(*shares, strict=True)]
    assert torch.equal(torch.cat(both), joined(whole, "image"))
    assert not torch.equal(joined(batches(module(cache, xflip=True, seed=4), 9), "image"), joined(whole, "image"))


def test_evaluation_reads_every_image_once_in_order(cache, tmp_path, moments):
    held_out = write_cache(tmp_path / "test", moments[:5])
    data = module(cache, {"test_path": str(held_out)}, eval_batch_size=3)
    parts = list(data.eval_batches("test"))
    assert [len(part["image"]) for part in parts] == [3, 2]
    assert joined(parts, "image").mean(dim=(1, 2, 3)).round().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(joined(list(data.eval_batches("test")), "image"), joined(parts, "image"))


def test_halves_are_read_as_floats(tmp_path, moments):
    data = module(write_cache(tmp_path / "half", moments.astype(np.float16)))
    assert data.images("train").moments(np.array([9, 0]), np.array([1, 0]))[0][:, 0, 0, 0].tolist() == [109, 0]
    assert batches(data, 1)[0]["image"].dtype == torch.float32


def test_pixels_are_the_reference(cache, tmp_path):
    pictures = tmp_path / "pictures" / "a"
    pictures.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(pictures / f"{number}.png")
    reference = ImageFolder(path=str(pictures.parent), resolution=16)
    data = module(cache, reference=reference)
    images = list(data.reference_images("train", 2))
    assert [part.shape[0] for part in images] == [2, 1] and images[1].dtype == torch.uint8
    assert images[1].unique().tolist() == [2] and images[0].shape[1:] == (3, 16, 16)
    assert data.fingerprint("train") == reference.load("train").fingerprint() != module(cache).fingerprint("train")
    for bad, sentence in ((module(cache), "set data.reference to"), (data, None)):
        if sentence:
            with pytest.raises(UserError, match=sentence):
                bad.check_reference("train")
        else:
            bad.check_reference("train")


def test_a_missing_shard_is_named_before_training(cache):
    (cache / "shard-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00002\.safetensors is missing; the others are kept\. Make what"):
        module(cache).check()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_bad_during_training_is_named(cache, workers):
    data = module(cache, num_workers=workers, source_options={"num_classes": 0})
    loader = data.train_dataloader()
    (cache / "shard-00001.safetensors").write_bytes(b"rubbish, not a shard")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged"):
        list(islice(loader, 3))
    data.teardown("fit")


def test_verify_reads_checksums(cache):
    path = cache / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    module(cache).check()
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged: its sha256"):
        module(cache, {"verify": True}).images("train")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            {"resolution": 4},
            r"latents of 4 x 2 x 2, but data\.source\.resolution is 4\. .*resolution=2, or .* --size 32",
        ),
        ({"channels": 8}, r"data\.source\.channels is 8"),
        ({"num_classes": 2}, r"holds labels 0\.\.2, but data\.source\.num_classes is 2"),
    ],
)
def test_other_shapes_and_labels_are_refused(cache, options, sentence):
    with pytest.raises(UserError, match=sentence):
        module(cache, options).images("train")


def test_bad_options(cache):
    for options, sentence in (
        ({"mean": [0.0, 1.0]}, r"data\.source\.mean has 2 numbers for 4 channels"),
        ({"std": [1.0, 1.0, 0.0, 1.0]}, r"data\.source\.std must be > 0, got 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            source(cache, **options)


def test_no_mirror_images_and_another_net(tmp_path, moments, cache):
    plain = write_cache(tmp_path / "plain", moments[:, :1], mirrored=False)
    assert len(batches(module(plain), 3)) == 3
    with pytest.raises(UserError, match=r"data\.xflip=true needs the mirror images"):
        module(plain, xflip=True).train_dataloader()
    data = module(cache)
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(net=SimpleNamespace(img_channels=4, img_resolution=8))
    )
    with pytest.raises(UserError, match=r"latents are 4 x 2 x 2, but the network takes 4 x 8 x 8"):
        data.setup("fit")
