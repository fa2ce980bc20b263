"""The autoencoder of latents: a tiny random one saved and read back, and decoding in chunks through a stand-in."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.weights import vae
from common.weights.vae import LatentDecoder, SdVae


class Doubling:
    """Stand-in autoencoder: a latent is the mean of its 2 x 2 pixels; remembers how many it was given at a time."""

    def __init__(self):
        self.sizes = []

    def check(self):
        pass

    def decode(self, latents):
        self.sizes.append(len(latents))
        return latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_decoding_undoes_the_normalisation_in_chunks():
    stand_in = Doubling()
    raw = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([4.0, 0.5, 2.0])
    latents = (raw - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    images = LatentDecoder(vae=stand_in, mean=mean.tolist(), std=std.tolist(), batch_size=3)(latents)
    assert images.shape == (7, 3, 4, 4) and stand_in.sizes == [3, 3, 1]
    torch.testing.assert_close(images[..., ::2, ::2], raw)
    scaled = LatentDecoder(vae=stand_in, mean=0.0, std=1 / 0.18215)(raw * 0.18215)
    torch.testing.assert_close(scaled[..., ::2, ::2], raw)


def test_wrong_numbers_are_named():
    decoder = LatentDecoder(vae=Doubling(), mean=[0.0, 0.0], std=1.0)
    with pytest.raises(UserError, match=r"decoder\.mean has 2 numbers, but the latents have 3 channels"):
        decoder(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match=r"decoder\.batch_size must be a whole number >= 1, got 0"):
        LatentDecoder(vae=Doubling(), mean=0.0, std=1.0, batch_size=0)
    with pytest.raises(UserError, match="dtype of the autoencoder must be one of float32"):
        SdVae(path="somewhere", dtype="half")


def test_missing_weights_and_package(tmp_path, monkeypatch):
    monkeypatch.setattr(vae.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        SdVae(path=str(tmp_path)).check()
    monkeypatch.setattr(vae.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package diffusers, which is not installed. Run: pip install"):
        SdVae(path=str(tmp_path)).check()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a tiny random autoencoder, the network itself)."""
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, sample_size=16,
    ).eval()  # fmt: skip
    folder = tmp_path_factory.mktemp("weights") / "tiny-vae"
    model.save_pretrained(folder)
    return folder, model


def test_folder_saved_by_diffusers(saved):
    folder, model = saved
    made = SdVae(path=str(folder))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = made.encode(images)
    with torch.no_grad():
        moments = model.quant_conv(model.encoder(images))
    assert mean.shape == std.shape == (2, 4, 8, 8) and not mean.requires_grad
    torch.testing.assert_close(mean, moments[:, :4])
    torch.testing.assert_close(std, torch.exp(0.5 * moments[:, 4:].clamp(-30, 20)))
    back = LatentDecoder(vae=made, mean=0.5, std=2.0, batch_size=1)((mean - 0.5) / 2)
    with torch.no_grad():
        torch.testing.assert_close(back, model.decoder(model.post_quant_conv(mean)), rtol=1e-4, atol=1e-5)
    assert back.shape == images.shape


def test_old_names_and_identity(saved, tmp_path):
    folder, _ = saved
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    older = {
        name.replace(".to_q.", ".query.").replace(".to_k.", ".key.").replace(".to_v.", ".value.")
        .replace(".to_out.0.", ".proj_attn."): value
        for name, value in tensors.items()
    }  # fmt: skip
    assert set(older) != set(tensors)
    file = tmp_path / "old.safetensors"
    save_file(older, file)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(SdVae(path=str(file)).decode(latents), SdVae(path=str(folder)).decode(latents))
    same, other = SdVae(path=str(folder)).identity(), SdVae(path=str(file)).identity()
    assert same.startswith("tiny-vae-") and same == SdVae(path=str(folder)).identity()
    assert same.split("-")[-1] != other.split("-")[-1]


def test_other_weights_are_refused(saved, tmp_path):
    folder, _ = saved
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors["quant_conv.weight"] = torch.zeros(6, 6, 1, 1)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"quant_conv\.weight"):
        SdVae(path=str(tmp_path)).decode(torch.zeros(1, 4, 8, 8))


def test_the_default_architecture_is_stable_diffusions():
    """83,653,863 parameters: diffusers' count for stabilityai/sd-vae-ft-mse."""
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(vae.STABLE_DIFFUSION)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
