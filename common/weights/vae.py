"""The autoencoder of Stable Diffusion: images to moments of latents, and latents back to images.

The network is diffusers' `AutoencoderKL`, an optional dependency (`pip install -e '.[latents]'`) imported at first use.
MeanFlow and iMF use the weights `stabilityai/sd-vae-ft-mse`; any folder saved by diffusers is read.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common import limits
from common.errors import UserError
from common.files import read_json, sha256_file
from common.weights.load import load_into, load_tensors

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The architecture of all autoencoders of Stable Diffusion 1 and 2 (config.json of stabilityai/sd-vae-ft-mse).
STABLE_DIFFUSION = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
# Names of the attention layers in files older than diffusers 0.14.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class Autoencoder(Protocol):
    """What encodes images into Gaussians over latents and decodes latents; no `torch.nn.Module`, so that a module
    that holds it neither trains, averages nor saves it.
    """

    def check(self) -> None:
        """Cheap check whether it can be loaded. Raises UserError saying what to do."""

    def identity(self) -> str:
        """A name that changes with the weights; kept beside what was encoded."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 (B, c, h, w), of images (B, 3, H, W) in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 (B, 3, H, W), about in [-1, 1], of latents (B, c, h, w) as `encode` gives them."""


class SdVae:
    """Stable Diffusion's autoencoder (arXiv 2112.10752): 8 x 8 pixels to one latent of 4 numbers.

    path   folder with config.json and diffusion_pytorch_model.safetensors (or .bin), as diffusers saves one; or that
           file alone, which then has Stable Diffusion's architecture
    dtype  arithmetic: float32 | bfloat16 | float16

    Loaded at first use, and moved to where its input is. Raises UserError for missing or other weights.
    """

    def __init__(self, *, path: str, dtype: str = "float32"):
        limits.choice("dtype of the autoencoder", dtype, tuple(DTYPES), hint="Set one of them.")
        self.path = Path(path).expanduser()
        self.dtype = DTYPES[dtype]
        self._model = None

    def check(self) -> None:
        if importlib.util.find_spec("diffusers") is None:
            raise UserError(
                "Latents need the package diffusers, which is not installed. Run: pip install -e '.[latents]'"
            )
        self._file()

    def identity(self) -> str:
        """`<name>-<first 16 hex digits of the weights' sha256>`."""
        return f"{self.path.stem}-{sha256_file(self._file())[:16]}"

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        gaussian = self._model_on(images).encode(images.to(self.dtype)).latent_dist
        return gaussian.mean.float(), gaussian.std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._model_on(latents).decode(latents.to(self.dtype)).sample.float()

    def _model_on(self, tensor: Tensor):
        if self._model is None:
            self.check()
            self._model = self._load()
        return self._model.to(tensor.device)

    def _load(self):
        from diffusers import AutoencoderKL

        file = self._file()
        described = file.with_name("config.json")
        options = read_json(described) if described.is_file() else STABLE_DIFFUSION
        model = AutoencoderKL.from_config({k: v for k, v in options.items() if not k.startswith("_")})
        load_into(model, {_new_name(name): value for name, value in load_tensors(file).items()}, name=str(file))
        torch.nn.Module.to(model, self.dtype)  # diffusers' own `to` warns of modules this network has not
        return model.eval().requires_grad_(False)

    def _file(self) -> Path:
        if self.path.is_file():
            return self.path
        for name in WEIGHT_FILES:
            if (self.path / name).is_file():
                return self.path / name
        raise UserError(
            f"The autoencoder {self.path} does not exist or holds no {WEIGHT_FILES[0]}. Download "
            "huggingface.co/stabilityai/sd-vae-ft-mse (config.json and that file) and give its folder."
        )


class LatentDecoder:
    """Latents as a network makes them, (B, c, h, w) normalised, to images (B, 3, H, W) in [-1, 1].

    vae         the autoencoder (`SdVae`)
    mean, std   of the data the network was trained on (see `LatentFolder`): one number, or one per
                channel
    batch_size  latents decoded at a time, >= 1; does not change the images beyond rounding
    """

    def __init__(
        self, *, vae: Autoencoder, mean: float | Sequence[float], std: float | Sequence[float], batch_size: int = 32
    ):
        limits.whole("decoder.batch_size", batch_size, least=1, hint="Set it to latents decoded at a time.")
        self.vae, self.mean, self.std, self.batch_size = vae, mean, std, batch_size

    def check(self) -> None:
        """Cheap check whether the autoencoder is there. Raises UserError."""
        self.vae.check()

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Raises UserError when the latents have another number of channels than mean and std."""
        parts = []
        for part in latents.to(torch.float32).split(self.batch_size):
            raw = part * per_channel(self.std, part, "decoder.std") + per_channel(self.mean, part, "decoder.mean")
            parts.append(self.vae.decode(raw))
        return torch.cat(parts)


def per_channel(values: float | Sequence[float], like: Tensor, field: str) -> Tensor:
    """`values` as (1 or C, 1, 1) on the device of `like` (B, C, H, W). Raises UserError when C is another number."""
    numbers = torch.tensor(values, dtype=torch.float32, device=like.device).reshape(-1, 1, 1)
    if len(numbers) not in (1, like.shape[1]):
        raise UserError(
            f"{field} has {len(numbers)} numbers, but the latents have {like.shape[1]} channels. "
            f"Give one number, or {like.shape[1]}."
        )
    return numbers


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
