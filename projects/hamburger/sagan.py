"""SAGAN's generator and discriminator with a Hamburger in the place of self-attention: HamGAN.

    net = Sagan(img_resolution=128, label_dim=1000)
    images = net(torch.randn(4, 128), class_labels)         # (4, 3, 128, 128) in [-1, 1]
    logits = net.discriminator(images, class_labels)        # (4,)

Is Attention Better Than Matrix Decomposition? (arXiv 2109.04553), ImageNet experiments; SAGAN (arXiv 1805.08318); sizes
and normalisations as in the released TensorFlow code (Gsunshine/Enjoy-Hamburger, gan/HamGAN, on TF-GAN).
"""

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common import limits
from common.deq.layers import SpectralNorm
from common.errors import UserError
from common.ham.decompose import NMF, Decomposition
from common.ham.ham import Ham
from common.nets.inputs import check_label_dims

CONTEXTS = ("ham", "attention", "none")
BURGERS = ("v1", "v2")
START = 4  # pixels of the generator's first and the discriminator's last feature map


class Sagan(nn.Module):
    """A generator with its discriminator; calling it calls the generator.

    img_resolution  pixels R, 4 times a power of two, at least 8
    img_channels    of the images
    label_dim       number of classes, 0 = unconditional
    z_dim           length of the noise vector
    g_width         channels of the generator's last block; each block before it has twice as many
    d_width         channels of the discriminator's first block; each block after it has twice as many
    context         module over the whole feature map: ham, attention (SAGAN's), none
    g_context_at, d_context_at   resolution of its feature map in either network
    g_ham, d_ham    decompositions of the hams; NMF starts from bases that are uniform, not of unit length
    version         of the Hamburger: v1, v2 (with cheese)
    norm_momentum   rate of the running statistics of the batch normalisations

    The published network has the sizes of the defaults with label_dim=1000: both hams at 32 x 32, with 256 channels and
    32 atoms in the generator, 128 and 16 in the discriminator.
    Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        img_resolution: int = 128,
        img_channels: int = 3,
        label_dim: int = 0,
        z_dim: int = 128,
        g_width: int = 64,
        d_width: int = 64,
        context: str = "ham",
        g_context_at: int = 32,
        d_context_at: int = 32,
        g_ham: Decomposition | None = None,
        d_ham: Decomposition | None = None,
        version: str = "v1",
        norm_momentum: float = 0.001,
    ):
        super().__init__()
        limits.choice("context", context, CONTEXTS)
        check_label_dims(label_dim=label_dim)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.noise_shape = (z_dim,)
        self.generator = Generator(
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, z_dim=z_dim, width=g_width,
            context=context, context_at=g_context_at, ham=g_ham or NMF(rank=32, unit=False), version=version,
            norm_momentum=norm_momentum,
        )  # fmt: skip
        self.discriminator = Discriminator(
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, width=d_width,
            context=context, context_at=d_context_at, ham=d_ham or NMF(rank=16, unit=False), version=version,
        )  # fmt: skip

    def forward(self, z: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Images (B, C, R, R) in [-1, 1] from noise (B, z_dim) and one-hot class labels (B, label_dim)."""
        return self.generator(z, class_labels)


class Generator(nn.Module):
    """(B, z_dim) standard normal, (B, label_dim) one-hot -> (B, C, R, R) in [-1, 1]. Arguments as in `Sagan`."""

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        z_dim: int,
        width: int,
        context: str,
        context_at: int,
        ham: Decomposition,
        version: str,
        norm_momentum: float,
    ):
        super().__init__()
        limits.positive(img_channels=img_channels, z_dim=z_dim, g_width=width)
        widths = [width << k for k in reversed(range(_halvings(img_resolution)))]
        sizes = [START << (k + 1) for k in range(len(widths))]
        _check_context("g_context_at", context, context_at, [START, *sizes])
        norm = lambda channels, classes: ConditionalBatchNorm2d(channels, classes, momentum=norm_momentum)
        self.z_dim, self.label_dim, self.context_at = z_dim, label_dim, context_at
        self.first = _spectral(nn.Linear(z_dim, widths[0] * START**2))
        inside = [widths[0], *widths]
        self.blocks = nn.ModuleList(UpBlock(before, after, label_dim, norm) for before, after in pairwise(inside))
        at = inside[[START, *sizes].index(context_at)] if context != "none" else 0
        self.context = _context(context, at, ham, version, lambda c: norm(c, label_dim), eval_seed=0)
        self.norm = norm(width, 0)
        self.last = _spectral(nn.Conv2d(width, img_channels, 3, padding=1))

    def forward(self, z: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise UserError(f"the generator takes noise of shape (batch, {self.z_dim}), got {tuple(z.shape)}.")
        _check_labels(class_labels, self.label_dim, len(z))
        x = self.first(z).view(len(z), -1, START, START)
        x = self._add_context(x, class_labels)
        for block in self.blocks:
            x = self._add_context(block(x, class_labels), class_labels)
        return torch.tanh(self.last(F.relu(self.norm(x))))

    def _add_context(self, x: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.context(x, class_labels) if self.context is not None and x.shape[2] == self.context_at else x


class Discriminator(nn.Module):
    """(B, C, R, R) images in [-1, 1], (B, label_dim) one-hot -> (B,) logits. Arguments as in `Sagan`.

    Projection discriminator (arXiv 1802.05637): D(x, y) = l(phi(x)) + <phi(x), e_y>, phi summed over pixels.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        width: int,
        context: str,
        context_at: int,
        ham: Decomposition,
        version: str,
    ):
        super().__init__()
        limits.positive(img_channels=img_channels, d_width=width)
        widths = [width << k for k in range(_halvings(img_resolution))]
        sizes = [img_resolution >> (k + 1) for k in range(len(widths))]
        _check_context("d_context_at", context, context_at, sizes)
        self.label_dim, self.context_at = label_dim, context_at
        self.entry = EntryBlock(img_channels, width)
        self.blocks = nn.ModuleList(
            [DownBlock(a, b) for a, b in pairwise(widths)] + [DownBlock(widths[-1], widths[-1], downsample=False)]
        )
        at = widths[sizes.index(context_at)] if context != "none" else 0
        self.context = _context(context, at, ham, version, None, eval_seed=0)
        self.last = _spectral(nn.Linear(widths[-1], 1))
        self.classes = _spectral(nn.Linear(label_dim, widths[-1], bias=False)) if label_dim else None

    def features(self, images: Tensor) -> Tensor:
        """phi (B, features)."""
        x, seen = self.entry(images), False
        for block in [None, *self.blocks]:
            x = x if block is None else block(x)
            if self.context is not None and not seen and x.shape[2] == self.context_at:
                x, seen = self.context(x), True  # once, where two blocks have that resolution
        return F.relu(x).sum(dim=(2, 3))

    def forward(self, images: Tensor, class_labels: Tensor | None = None) -> Tensor:
        _check_labels(class_labels, self.label_dim, len(images))
        phi = self.features(images)
        logits = self.last(phi).squeeze(1)
        return logits if self.classes is None else logits + (phi * self.classes(class_labels)).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class ConditionalBatchNorm2d(nn.Module):
    """Batch normalisation whose scale and shift belong to the class of the sample; label_dim 0: to all of them.

    scale, shift  (label_dim or 1, channels), ones and zeros at the start
    momentum      rate of the running statistics: 1 - 0.999 in TF-GAN;  eps as there

    The statistics are those of a plain `nn.BatchNorm2d`, so that trainer.sync_batchnorm finds it.
    """

    def __init__(self, channels: int, label_dim: int, *, momentum: float = 0.001, eps: float = 1e-3):
        super().__init__()
        self.label_dim = label_dim
        self.statistics = nn.BatchNorm2d(channels, affine=False, momentum=momentum, eps=eps)
        self.scale = nn.Parameter(torch.ones(max(label_dim, 1), channels))
        self.shift = nn.Parameter(torch.zeros(max(label_dim, 1), channels))

    def forward(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        scale, shift = (
            (class_labels @ self.scale, class_labels @ self.shift) if self.label_dim else (self.scale, self.shift)
        )
        return torch.addcmul(shift[:, :, None, None], self.statistics(x), scale[:, :, None, None])


class UpBlock(nn.Module):
    """Residual block of the generator: (B, inside, H, W) -> (B, outside, 2H, 2W).

    The 1x1 convolution of the shortcut runs before the upsampling: the same numbers at a quarter of the cost.
    """

    def __init__(self, inside: int, outside: int, label_dim: int, norm):
        super().__init__()
        self.norm1, self.norm2 = norm(inside, label_dim), norm(outside, label_dim)
        self.conv1 = _spectral(nn.Conv2d(inside, outside, 3, padding=1))
        self.conv2 = _spectral(nn.Conv2d(outside, outside, 3, padding=1))
        self.shortcut = _spectral(nn.Conv2d(inside, outside, 1))

    def forward(self, x: Tensor, class_labels: Tensor | None) -> Tensor:
        y = self.conv1(_double(F.relu(self.norm1(x, class_labels))))
        y = self.conv2(F.relu(self.norm2(y, class_labels)))
        return y + _double(self.shortcut(x))


class DownBlock(nn.Module):
    """Residual block of the discriminator: (B, inside, H, W) -> (B, outside, H/2, W/2), or the same size.

    The shortcut has its 1x1 convolution, behind the average, where the size or the number of channels changes.
    """

    def __init__(self, inside: int, outside: int, *, downsample: bool = True):
        super().__init__()
        self.downsample = downsample
        self.conv1 = _spectral(nn.Conv2d(inside, outside, 3, padding=1))
        self.conv2 = _spectral(nn.Conv2d(outside, outside, 3, padding=1))
        changes = downsample or inside != outside
        self.shortcut = _spectral(nn.Conv2d(inside, outside, 1)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(F.relu(x))))
        if self.downsample:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return self.shortcut(x) + y


class EntryBlock(nn.Module):
    """First block of the discriminator: as `DownBlock`, without the ReLU that would cut the image."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv1 = _spectral(nn.Conv2d(inside, outside, 3, padding=1))
        self.conv2 = _spectral(nn.Conv2d(outside, outside, 3, padding=1))
        self.shortcut = _spectral(nn.Conv2d(inside, outside, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


class GatedHamburger(nn.Module):
    """x + sigma h(x) with sigma = 0 at the start, (B, channels, H, W) -> the same shape; h is

        v1   norm(upper(ham(lower(x))))
        v2   upper(relu(norm(cheese(ham(lower(x))))))

    and a ReLU before NMF. All convolutions are 1x1, without bias and of spectral norm 1.

    ham        decomposition
    norm       channels -> normalisation taking (x, class_labels), or None: none, as in the discriminator
    eval_seed  as in common.ham.ham.Ham
    """

    def __init__(self, channels: int, ham: Decomposition, *, version: str = "v1", norm=None, eval_seed=None):
        super().__init__()
        limits.choice("version", version, BURGERS)
        one = lambda: _spectral(nn.Conv2d(channels, channels, 1, bias=False), exact=True)
        self.rectify = ham.nonnegative
        self.lower = one()
        self.ham = Ham(channels, replace(ham, negative="trust") if self.rectify else ham, eval_seed=eval_seed)
        self.cheese = one() if version == "v2" else None
        self.norm = norm(channels) if norm is not None else None
        self.upper = one()
        self.sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        h = self.lower(x)
        h = self.ham(F.relu(h) if self.rectify else h)
        h = self._normed(self.upper(h), class_labels) if self.cheese is None else self._behind_cheese(h, class_labels)
        return x + self.sigma * h

    def _behind_cheese(self, h: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.upper(F.relu(self._normed(self.cheese(h), class_labels)))

    def _normed(self, h: Tensor, class_labels: Tensor | None) -> Tensor:
        return h if self.norm is None else self.norm(h, class_labels)


class GatedAttention(nn.Module):
    """x + sigma attention(x), SAGAN's block: keys and values of every 2x2 square of pixels (their maximum).

    Queries and keys of channels/8, values of channels/2, softmax of plain products. sigma = 0 at the start.
    """

    def __init__(self, channels: int):
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        one = lambda inside, outside: _spectral(nn.Conv2d(inside, outside, 1, bias=False), exact=True)
        self.query, self.key, self.value = one(channels, narrow), one(channels, narrow), one(channels, half)
        self.upper = one(half, channels)
        self.sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        tokens = lambda y: y.flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, pixels, channels)
        key, value = F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2)
        seen = F.scaled_dot_product_attention(tokens(self.query(x)), tokens(key), tokens(value), scale=1.0)
        return x + self.sigma * self.upper(seen.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


def _context(kind: str, channels: int, ham: Decomposition, version: str, norm, eval_seed) -> nn.Module | None:
    limits.choice("version", version, BURGERS)
    if kind == "ham":
        return GatedHamburger(channels, ham, version=version, norm=norm, eval_seed=eval_seed)
    return GatedAttention(channels) if kind == "attention" else None


def _spectral(layer: nn.Linear | nn.Conv2d, *, exact: bool = False):
    """The layer with Glorot-uniform weights, biases of zero, and a spectral norm of at most 1, or exactly 1.

    TF-GAN divides by max(1, norm), except in the 1x1 convolutions of the context blocks. One power iteration per
    `common.deq.layers.reset` in training.
    """
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    norm = SpectralNorm(dim=0, clip=None if exact else 1.0, learn_scale=False)
    parametrize.register_parametrization(layer, "weight", norm)
    return layer


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _halvings(img_resolution: int) -> int:
    """Number of blocks that change the resolution between START and the image."""
    blocks = (img_resolution // START).bit_length() - 1 if isinstance(img_resolution, int) else 0
    if blocks < 1 or START << blocks != img_resolution:
        raise UserError(
            f"img_resolution must be {START} times a power of two and at least {2 * START}, got {img_resolution}. "
            "Resize the images, say to 32 or 128 pixels."
        )
    return blocks


def _check_context(name: str, kind: str, at: int, sizes: list[int]) -> None:
    if kind == "none":
        return
    limits.choice(name, at, sorted(set(sizes)))
    if kind == "attention":
        limits.whole(name, at, least=2, hint="Attention pools its keys by 2.")


def _check_labels(class_labels: Tensor | None, label_dim: int, batch: int) -> None:
    if not label_dim:
        return
    if class_labels is None or tuple(class_labels.shape) not in ((batch, label_dim), (1, label_dim)):
        got = None if class_labels is None else tuple(class_labels.shape)
        raise UserError(f"class_labels must be one-hot of shape ({batch}, {label_dim}), got {got}.")
