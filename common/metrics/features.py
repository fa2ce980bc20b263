"""Frozen networks that turn 8-bit images into feature vectors, behind one interface.

Only the 2015 Inception network gives "FID". Every other one gives "FD-<name>": a valid relative measure between our
own models, never comparable with a published FID.

Extractors are not `nn.Module`s on purpose: held as an attribute of a LightningModule they must not enter its
checkpoint, its averages or its optimiser.
"""

import hashlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.errors import UserError, nearest
from common.files import refuse_lfs_pointer, write_bytes
from common.metrics.hashes import short_hash, tensors_hash
from common.metrics.images import from_uint8
from common.nets.resnet import CifarResNet
from common.weights.load import load_into, load_tensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # first digits; torch.hub's convention puts them into the file name
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILE


class FeatureExtractor(ABC):
    """`extractor(images)`: uint8 (B, C, H, W) -> features (B, dim) float32, on the extractor's device.

    name         short name for tables and file names, e.g. "resnet56"
    metric       name of the Frechet distance it gives: "FID" or "FD-<name>"
    hash         16 hex digits over weights and preprocessing: equal hash, equal features up to rounding
    dim          width of a feature vector
    classifies   whether `features_and_logits` returns logits (for the inception score)
    """

    classifies = True

    def __init__(self, *, name: str, dim: int, hash: str, network: nn.Module | None, batch_size: int):
        limits.whole(f"batch_size of the {name} extractor", batch_size, least=1)
        self.name, self.dim, self.hash = name, dim, hash
        self.metric = f"FD-{name}"
        self.batch_size = batch_size
        self.device = torch.device("cpu")
        self._network = network.eval().requires_grad_(False) if network is not None else None

    def to(self, device: str | torch.device) -> "FeatureExtractor":
        """Moves the network. Returns self."""
        self.device = torch.device(device)
        if self._network is not None:
            self._network.to(self.device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """images uint8 (B, C, H, W), any device -> (B, dim) float32. Raises UserError on other types or shapes."""
        return torch.cat([features for features, _ in self._batches(images)])

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """One pass: features (B, dim) and class logits (B, K), or None for an extractor without classes."""
        parts = list(self._batches(images))
        logits = torch.cat([logits for _, logits in parts]) if self.classifies else None
        return torch.cat([features for features, _ in parts]), logits

    def _batches(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise UserError(
                f"the {self.name} extractor takes uint8 images (B, C, H, W), got {images.dtype} of shape "
                f"{tuple(images.shape)}. Round with common.metrics.images.to_uint8 first."
            )
        for batch in images.split(self.batch_size) if len(images) else [images]:
            # A metric must not depend on the precision of the training around it: no autocast, no TF32.
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, enabled=False),
                torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
            ):
                features, logits = self._extract(batch.to(self.device))
            yield features.to(torch.float32), logits

    @abstractmethod
    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, C, H, W) on the device -> features (B, dim), logits (B, K) or None."""


class CifarResNet56(FeatureExtractor):
    """64-d features of the CIFAR-10 ResNet-56 of akamaster/pytorch_resnet_cifar10 (6.61 % test error): "resnet56".

    weights  path of cifar10_resnet56.safetensors, or several to look at in turn
    Input is taken at its own size, [0, 1], ImageNet mean and std.
    """

    def __init__(self, *, weights: str | Sequence[str], batch_size: int = 250):
        network = CifarResNet(blocks=9)
        state = _load(network, weights, "ResNet-56 weights")
        fingerprint = tensors_hash(state, "resnet56: own size, [0, 1], ImageNet mean and std, pooled 64-d")
        super().__init__(name="resnet56", dim=network.dim, hash=fingerprint, network=network, batch_size=batch_size)

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self._network.features(_normalise(_three_channels(images), IMAGENET_MEAN, IMAGENET_STD))
        return features, self._network.linear(features)


class TimmFeatures(FeatureExtractor):
    """Pooled penultimate features of any timm model with local weights: "timm:<model>".

    model    timm name, e.g. "resnet50"
    weights  local checkpoint with that model's keys: .safetensors, or a .pth that loads with weights_only
    Preprocessing is the model's own: bicubic or bilinear with antialias to its square input, no crop, its mean and std.
    """

    def __init__(self, *, model: str, weights: str, batch_size: int = 50):
        network, dim, pre, fingerprint = _timm(model, weights)
        super().__init__(name=f"timm:{model}", dim=dim, hash=fingerprint, network=network, batch_size=batch_size)
        self._preprocessing = pre

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return _timm_forward(self._network, self._preprocessing, images)


class EfficientNetLite0(FeatureExtractor):
    """1280-d features of ImageNet EfficientNet-Lite0, bicubic to 224 px: "efflite0".

    weights  path of tf_efficientnet_lite0_in1k_fp16.safetensors (stored in float16, computed in float32), or several
             to look at in turn
    """

    def __init__(self, *, weights: str | Sequence[str], batch_size: int = 50):
        network, dim, pre, fingerprint = _timm("tf_efficientnet_lite0", weights)
        super().__init__(name="efflite0", dim=dim, hash=fingerprint, network=network, batch_size=batch_size)
        self._preprocessing = pre

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return _timm_forward(self._network, self._preprocessing, images)


class Inception(FeatureExtractor):
    """2048-d pool3 features and 1008 logits of the 2015 Inception network, through torch-fidelity: gives "FID".

    weights  path of weights-inception-2015-12-05-6726825d.pth (91 MB)
    sha256   first hex digits the file must have; the official ones by default

    torch-fidelity unpickles without limits, so the bytes are checked first: checksum, then a weights-only load.
    """

    def __init__(self, *, weights: str, sha256: str = INCEPTION_SHA256, batch_size: int = 50):
        path = Path(weights)
        if not path.is_file():
            raise UserError(
                f"FID needs the 2015 Inception weights, and there is no file {path}. Download {INCEPTION_URL} and put "
                f"it at {path.with_name(INCEPTION_FILE)}, or set weights to where it is; without it use FD-resnet56 or "
                "FD-efflite0."
            )
        refuse_lfs_pointer(path)
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if not digest.startswith(sha256.lower()):
            raise UserError(
                f"{path} is not {INCEPTION_FILE}: its SHA-256 starts with {digest[:8]}, expected {sha256}. "
                f"Delete it and download {INCEPTION_URL} again."
            )
        try:
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:  # any unpickling failure means the same to a user
            raise UserError(f"{path} does not load as plain weights ({type(error).__name__}).") from error
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], io.BytesIO(data))
        fingerprint = tensors_hash(network.state_dict(), "inception: TF1 bilinear 299, (x-128)/128, pool3 2048-d")
        super().__init__(name="inception", dim=2048, hash=fingerprint, network=network, batch_size=batch_size)
        self.metric = "FID"

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._network(_three_channels(images))
        return features, logits


class DigitsClassifier(FeatureExtractor):
    """64-d features of a small classifier of the 8x8 digits, trained on first use in seconds and kept: "digits".

    cache_dir  folder for the trained weights (digits-classifier-<hash of code settings>.safetensors)

    Training is deterministic: one thread, fixed seed, the 1400 train images of `common.data.images.digits`. It runs in
    float64 with smooth activations and ends by rounding the weights to multiples of 2^-10, so that machines whose
    matrix products differ in the last bits still arrive at the same weights and hence at the same hash.
    """

    SETTINGS = "digits v1: 64-128-64-10, SiLU, Adam 1e-3 cosine, 100 epochs of batch 100, seed 0, on a 2^-10 grid"

    def __init__(self, *, cache_dir: str = ".cache/metrics", batch_size: int = 2000):
        path = Path(cache_dir) / f"digits-classifier-{short_hash(self.SETTINGS)}.safetensors"
        state = _read_cached(path)
        if state is None:
            state = train_digits_classifier()
            _write_cached(path, state)
        network = _digits_network()
        network.load_state_dict(state)
        super().__init__(
            name="digits", dim=64, hash=tensors_hash(state, self.SETTINGS), network=network, batch_size=batch_size
        )

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (1, 8, 8):
            raise UserError(f"the digits extractor takes images (B, 1, 8, 8), got {tuple(images.shape)}.")
        features = self._network[:-1](from_uint8(images).flatten(1))
        return features, self._network[-1](features)


class Pixels(FeatureExtractor):
    """The image itself, flattened, in [-1, 1]: "pixels". Sensitive to mean and low-order statistics only.

    channels, resolution  of the images
    side                  images are averaged down to side x side first, None: as they are; divides the resolution

    dim = channels * side^2, keep it below a few thousand.
    """

    classifies = False

    def __init__(self, *, channels: int, resolution: int, side: int | None = None, batch_size: int = 2000):
        side = resolution if side is None else side
        for field, value in (("channels", channels), ("resolution", resolution), ("side", side)):
            limits.whole(f"{field} of pixels", value, least=1)
        if resolution % side:
            raise UserError(f"side of pixels must divide the resolution {resolution}, got {side}. Set a divisor.")
        self._shape, self._side = (channels, resolution, resolution), side
        name = "pixels" if side == resolution else f"pixels{side}"
        averaged = [] if side == resolution else [f"averaged to {side}"]
        fingerprint = short_hash("pixels: v / 127.5 - 1", str(self._shape), *averaged)
        super().__init__(name=name, dim=channels * side**2, hash=fingerprint, network=None, batch_size=batch_size)

    def _extract(self, images: Tensor) -> tuple[Tensor, None]:
        if tuple(images.shape[1:]) != self._shape:
            raise UserError(
                f"the pixels extractor was made for images (B, {', '.join(map(str, self._shape))}), got "
                f"{tuple(images.shape)}. Set its channels and resolution."
            )
        return F.avg_pool2d(from_uint8(images), self._shape[1] // self._side).flatten(1), None


def _three_channels(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise UserError(f"this extractor takes images with 1 or 3 channels, got {images.shape[1]}.")
    return images.expand(-1, 3, -1, -1)


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 or 0..255 float (B, 3, H, W) -> float32, zero mean and unit deviation on [0, 1]."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images.to(torch.float32) / 255 - mean) / std


def _load(network: nn.Module, weights: str | os.PathLike | Sequence[str], what: str) -> dict[str, Tensor]:
    """Copies the file into the network (as float32) and returns its tensors. Only batch counters may be missing.

    weights  the file, or several of which the first that exists is taken
    """
    places = [weights] if isinstance(weights, str | os.PathLike) else list(weights)
    weights = next((place for place in places if Path(place).is_file()), None)
    if weights is None:
        raise UserError(
            f"no {what} at {' or '.join(map(str, places))}. Put the file there, or set weights to where it is."
        )
    state = load_tensors(weights)
    load_into(network, state, ignore=["*num_batches_tracked"], name=str(weights))
    return state


def _timm(model: str, weights: str | Sequence[str]) -> tuple[nn.Module, int, dict, str]:
    """Network, feature width, preprocessing and hash."""
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(model):
        raise UserError(f"timm has no model {model!r}. {nearest(model, timm.list_models())}See timm.list_models().")
    network = timm.create_model(model, pretrained=False)
    state = _load(network, weights, f"{model} weights")
    config = resolve_model_data_config(network)
    mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    pre = {"size": config["input_size"][-2:], "mode": mode, "mean": config["mean"], "std": config["std"]}
    fingerprint = tensors_hash(state, f"timm {model}: antialias, no crop, pooled, {sorted(pre.items())}")
    return network, network.num_features, pre, fingerprint


def _timm_forward(network: nn.Module, pre: dict, images: Tensor) -> tuple[Tensor, Tensor]:
    x = _three_channels(images).to(torch.float32)
    if x.shape[-2:] != pre["size"]:
        x = F.interpolate(x, size=pre["size"], mode=pre["mode"], antialias=True)
    hidden = network.forward_features(_normalise(x, pre["mean"], pre["std"]))
    features = network.forward_head(hidden, pre_logits=True)
    return features, network.get_classifier()(features)


def _digits_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 10))


def train_digits_classifier() -> dict[str, Tensor]:
    """State dict (float32) of the frozen digits classifier; the same bits on every call."""
    from common.data.images.digits import digits_split

    train_x, train_y, _, _ = digits_split()
    x = from_uint8(torch.as_tensor(train_x)).flatten(1).to(torch.float64)
    y = torch.as_tensor(train_y)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # reductions split over threads would round differently
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            network = _digits_network().to(torch.float64)
            generator = torch.Generator().manual_seed(0)
            epochs, batch = 100, 100
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // batch))
            for _ in range(epochs):
                for rows in torch.randperm(len(x), generator=generator).split(batch):
                    optimizer.zero_grad()
                    F.cross_entropy(network(x[rows]), y[rows]).backward()
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return {key: ((value * 1024).round() / 1024).to(torch.float32) for key, value in network.state_dict().items()}


def _write_cached(path: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    write_bytes(path, save(state, metadata={"hash": tensors_hash(state)}))


def _read_cached(path: Path) -> dict[str, Tensor] | None:
    """The cached weights; None when there are none or they are damaged (then they are made again)."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if (file.metadata() or {}).get("hash") == tensors_hash(state):
                return state
        problem = "its checksum does not match"
    except (SafetensorError, OSError) as error:
        problem = str(error)
    warnings.warn(f"{path} is damaged ({problem}); training the digits classifier again", stacklevel=3)
    return None
