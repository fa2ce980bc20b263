"""Generated pairs: photographs that move by known smooth, affine and layered motion, with exact ground truth.

Everything is laid out on canvases, one for each layer: frame t shows layer k at pixel x where that layer's map sends x,
canvas point C_k,t(x). The second frame of a pair has C = identity and the first C = x + flow_k(x), with any smooth
flow_k. So both frames show the same point of the canvas at x and at x + flow(x): the flow is exact at the pixels of the
first frame and no map is ever inverted. Photographs are read through a random similarity in BOTH frames, which are
therefore equally (little) blurred. Outlines of layers are formulas, evaluated wherever needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import limits
from common.data.draws import PositionDraws
from common.data.flow.photographs import Photographs
from common.data.source import check_split
from common.errors import UserError

WAVES = 4  # of a layer's outline
SOFT = 1.0  # pixels over which a layer's edge fades


@dataclass
class _Layer:
    """One moving thing: where its texture comes from, and its outline on the canvas (None: everything)."""

    texture: Tensor  # float32 (3, h, w) 0..255
    place: Tensor  # (2, 3): canvas point (x, y, 1) -> point of the texture, pixels
    outline: Tensor | None = None  # (3 + 2 WAVES): centre x, y, radius, amplitudes and phases of the waves


class SynthFlow:
    """Endless generated pairs; pair i of a split depends on (seed, i) only. Splits train and held_out, with different
    photographs.

    size          [height, width], pixels, both >= 16
    folders       folders or zips of pictures, searched recursively
    bundled       also the photographs that come with scikit-image (15 of them; no download)
    held_out      share of the pictures of `folders` for held_out, [0, 1); of the bundled ones it is always three
    pairs         pairs that one pass of a mixture takes: the weight of this set beside others
    held_out_pairs  pairs of the split held_out
    shift         standard deviation of the whole picture's shift, pixels per side
    smooth        standard deviation of the smooth motion on top, pixels at its control points, which lie `spacing`
    spacing       pixels apart; at most spacing / 10, so that nothing folds
    rotation      standard deviation of the rotation, degrees;   zoom  of the size's logarithm;   shear  of the shears
    layers        at most so many further things, 0.. of them drawn uniformly, moving by themselves in front of it
    layer_shift   standard deviation of their own shift, pixels per side
    layer_radius  [least, most] radius of them, in shorter sides of the picture
    max_flow      motion is scaled down as a whole until no vector is longer, pixels
    seed          beside the number of a pair all that it depends on

    valid is 1 everywhere; `occluded` is 1 where the second picture does not show the pixel: hidden by another layer, or
    outside. Raises UserError for numbers out of range, and from `load` when there is no picture.
    """

    name = "synthflow"
    splits = ("train", "held_out")

    def __init__(
        self,
        *,
        size: Sequence[int] = (96, 128),
        folders: Sequence[str] = (),
        bundled: bool = True,
        held_out: float = 0.1,
        pairs: int = 10_000,
        held_out_pairs: int = 64,
        shift: float = 5.0,
        smooth: float = 2.0,
        spacing: float = 32.0,
        rotation: float = 3.0,
        zoom: float = 0.05,
        shear: float = 0.02,
        layers: int = 3,
        layer_shift: float = 6.0,
        layer_radius: Sequence[float] = (0.1, 0.35),
        max_flow: float = 100.0,
        seed: int = 0,
    ):
        if len(size) != 2 or min(size) < 16:
            raise UserError(f"source.size must be [height, width], both >= 16, got {list(size)}. Set [96,128].")
        for field, value in (("pairs", pairs), ("held_out_pairs", held_out_pairs)):
            limits.whole(f"source.{field}", value, least=1, hint=f"Set source.{field}=64.")
        spreads = dict(shift=shift, smooth=smooth, rotation=rotation, zoom=zoom, shear=shear, layer_shift=layer_shift)
        for field, value in spreads.items():
            limits.number(f"source.{field}", value, least=0, hint="Set 0 for none.")
        limits.whole("source.layers", layers, hint="Set 0 for none.")
        limits.number("source.spacing", spacing, above=0, hint="Set source.spacing=32.")
        folds = f"More than source.spacing / 10 folds the picture. Set source.spacing={10 * smooth:g}."
        limits.number("source.smooth", smooth, most=spacing / 10, hint=folds)
        limits.number("source.max_flow", max_flow, above=0, hint="Set source.max_flow=100, in pixels.")
        if len(layer_radius) != 2 or not 0 < layer_radius[0] <= layer_radius[1]:
            raise UserError(f"source.layer_radius must be [least, most] above 0, got {list(layer_radius)}.")
        self.size, self.pairs, self.held_out_pairs = (int(size[0]), int(size[1])), pairs, held_out_pairs
        self.seed = seed
        self.shift, self.smooth, self.spacing, self.rotation = shift, smooth, spacing, rotation
        self.zoom, self.shear, self.layers, self.layer_shift = zoom, shear, layers, layer_shift
        self.layer_radius, self.max_flow = tuple(layer_radius), max_flow
        self.photographs = Photographs(folders=folders, bundled=bundled, held_out=held_out)

    def check(self, split: str) -> None:
        """The folders are there and hold pictures. Raises UserError."""
        self.photographs.names(check_split(split, self.splits, self.name))

    def load(self, split: str) -> "SynthPairs":
        check_split(split, self.splits, self.name)
        return SynthPairs(self, split)


class SynthPairs:
    """One split of a `SynthFlow`: see `common.data.flow.pairs.FlowPairs`."""

    def __init__(self, source: SynthFlow, split: str):
        self.source, self.split, self.endless = source, split, split == "train"
        self.photographs = source.photographs.of(split)
        height, width = source.size
        y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
        self.pixels = torch.stack([x, y])  # (2, H, W)
        self.centre = torch.tensor([(width - 1) / 2, (height - 1) / 2])
        self.spread = [_bicubic(max(2, round(side / source.spacing) + 1), side) for side in source.size]

    def __len__(self) -> int:
        return self.source.pairs if self.endless else self.source.held_out_pairs

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size

    def fingerprint(self) -> str:
        facts = {key: value for key, value in vars(self.source).items() if key != "photographs"}
        return self.photographs.fingerprint(repr(sorted(facts.items())))

    def read(self, index: int) -> dict[str, Tensor]:
        """Pair `index`, any number >= 0."""
        draw = PositionDraws(self.source.seed, index, f"synthflow {self.split}")
        layers = self._layers(draw)
        flows = self._motions(draw, layers)
        first, tops = self._frame(layers, [self.pixels + flow for flow in flows])
        second, _ = self._frame(layers, [self.pixels] * len(layers))
        flow = _of_top(flows, tops)
        occluded = self._hidden(layers, tops, [self.pixels + flow] * len(layers), self.pixels + flow)
        return {
            "first": first, "second": second, "flow": flow, "valid": torch.ones(self.source.size),
            "occluded": occluded.float(),
        }  # fmt: skip

    def sequence(self, index: int, frames: int) -> dict[str, Tensor]:
        """A panning camera: first frames uint8 (N, 3, H, W), flow float32 (N-1, 2, H, W) from each frame to the next,
        occluded float32 (N-1, H, W). Every layer moves by a similarity that changes smoothly with time.

        Raises UserError unless frames >= 2.
        """
        limits.whole("frames", frames, least=2)
        draw = PositionDraws(self.source.seed, index, f"synthflow sequence {self.split}")
        layers = self._layers(draw)
        paths = [self._path(draw, frames, camera=number == 0) for number in range(len(layers))]
        for path in paths[1:]:  # the layers in front move with the panned background
            for t in range(frames):
                path[t] = path[t] @ paths[0][t]
        shown, flows, hidden = [], [], []
        for t in range(frames):
            picture, tops = self._frame(layers, [self._mapped(path[t]) for path in paths])
            shown.append(picture)
            if t + 1 < frames:
                steps = [np.linalg.inv(path[t + 1]) @ path[t] - np.eye(3) for path in paths]
                flow = _of_top([self._mapped(step) for step in steps], tops)
                target = self.pixels + flow
                hidden.append(self._hidden(layers, tops, [_apply(path[t + 1], target) for path in paths], target))
                flows.append(flow)
        return {
            "frames": torch.stack(shown), "flow": torch.stack(flows), "occluded": torch.stack(hidden).float()
        }  # fmt: skip

    # What is drawn ----------------------------------------------------------------------------------------------------

    def _layers(self, draw: PositionDraws) -> list[_Layer]:
        """The background and 0..layers things before it, the nearest last."""
        source = self.source
        found = [self._textured(draw)]
        height, width = source.size
        for _ in range(draw.below(source.layers + 1)):
            layer = self._textured(draw)
            radius = min(height, width) * draw.between(*source.layer_radius)
            waves = draw.uniforms(2 * WAVES)
            fade = 0.5 / np.arange(1, WAVES + 1)
            outline = [draw.between(0, width), draw.between(0, height), radius]
            outline += [*((2 * waves[:WAVES] - 1) * fade / 2), *(2 * math.pi * waves[WAVES:])]
            layer.outline = torch.tensor(outline, dtype=torch.float32)
            found.append(layer)
        return found

    def _textured(self, draw: PositionDraws) -> _Layer:
        """A photograph at a random place, size (1/2 to 2 of its pixels for one of ours), angle and mirroring."""
        step = 2 ** draw.between(-1, 1)
        texture, shrunk = self.photographs.level(draw.below(len(self.photographs)), step)
        step, angle = step / shrunk, draw.between(-math.pi / 6, math.pi / 6)
        mirror = -1.0 if draw.coin() else 1.0
        cos, sin = step * math.cos(angle), step * math.sin(angle)
        linear = np.array([[mirror * cos, -sin], [mirror * sin, cos]])
        middle = np.array([draw.uniform() * texture.shape[2], draw.uniform() * texture.shape[1]])
        place = np.concatenate([linear, (middle - linear @ self.centre.numpy())[:, None]], 1)
        return _Layer(texture, torch.from_numpy(place.astype(np.float32)))

    def _motions(self, draw: PositionDraws, layers: list[_Layer]) -> list[Tensor]:
        """Flow (2, H, W) of each layer. Things move by a shift of their own on top of the background's shift."""
        source, flows = self.source, []
        common = np.zeros(2)
        for number, layer in enumerate(layers):
            normals = _normals(draw, 6)
            shift = common + normals[:2] * (source.layer_shift if number else source.shift)
            common = common if number else shift
            centre = self.centre if layer.outline is None else layer.outline[:2]
            angle, zoom = math.radians(source.rotation) * normals[2], math.exp(source.zoom * normals[3])
            sheared = np.array([[1, source.shear * normals[4]], [source.shear * normals[5], 1]])
            turned = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            linear = zoom * turned @ sheared - np.eye(2)
            offset = shift - linear @ centre.numpy()
            flow = self._mapped(np.concatenate([linear, offset[:, None]], 1))
            if source.smooth:
                flow = flow + self._smooth(draw)
            longest = float(flow.square().sum(0).max().sqrt())
            flows.append(flow * min(1.0, source.max_flow / max(longest, 1e-6)))
        return flows

    def _smooth(self, draw: PositionDraws) -> Tensor:
        rows, columns = (len(weights[0]) for weights in self.spread)
        # at most 2.5 standard deviations: the map must not fold
        values = np.clip(_normals(draw, 2 * rows * columns), -2.5, 2.5) * self.source.smooth
        knots = torch.from_numpy(values.astype(np.float32)).view(2, rows, columns)
        return self.spread[0] @ knots @ self.spread[1].T

    def _path(self, draw: PositionDraws, frames: int, camera: bool) -> np.ndarray:
        """(N, 3, 3): pixel of frame t -> canvas. A steady pan with a slow swing, turning and zooming a little."""
        source, t = self.source, np.arange(frames)
        normals, swing = _normals(draw, 6), 2 * math.pi * draw.uniform()
        speed = normals[:2] * 0.7 * source.layer_shift
        if camera:  # some way to go in every frame
            speed = source.shift * draw.between(0.5, 1.5) * normals[:2] / max(math.hypot(*normals[:2]), 1e-6)
        wave = np.sin(2 * math.pi * t / 12 + swing)
        shifts = speed * t[:, None] + normals[2:4] * wave[:, None]
        angles = math.radians(source.rotation) * normals[4] * 0.2 * t
        zooms = np.exp(source.zoom * normals[5] * 0.2 * t)
        maps = np.zeros((frames, 3, 3))
        cos, sin = zooms * np.cos(angles), zooms * np.sin(angles)
        maps[:, 0, 0], maps[:, 0, 1], maps[:, 1, 0], maps[:, 1, 1], maps[:, 2, 2] = cos, -sin, sin, cos, 1
        centre = self.centre.numpy()
        maps[:, :2, 2] = centre + shifts - maps[:, :2, :2] @ centre
        return maps

    # What is seen -----------------------------------------------------------------------------------------------------

    def _mapped(self, matrix: np.ndarray) -> Tensor:
        return _apply(matrix, self.pixels)

    def _frame(self, layers: list[_Layer], places: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Picture uint8 (3, H, W) and the number of the nearest layer at each pixel, int64 (H, W).

        places  canvas point (2, H, W) that each layer shows at a pixel
        """
        picture, top = None, torch.zeros(self.source.size, dtype=torch.int64)
        for number, (layer, place) in enumerate(zip(layers, places)):
            if layer.outline is None:
                picture = _texture(layer, place)
                continue
            cover = _cover(layer.outline, place)
            box = _box(cover > 0)
            if box is not None:  # the texture is only read where the layer is
                part = (slice(None), *box)
                picture[part] = torch.lerp(picture[part], _texture(layer, place[part]), cover[box])
            top = torch.where(cover > 0.5, number, top)
        return picture.round_().clamp_(0, 255).to(torch.uint8), top

    def _hidden(self, layers: list[_Layer], top: Tensor, places: list[Tensor], target: Tensor) -> Tensor:
        """Pixels (H, W) of layer `top` that are not seen at `target` (2, H, W) in the next frame.

        places  canvas point of each layer that the next frame shows at `target`
        """
        height, width = self.source.size
        x, y = target
        hidden = (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1)
        for number, (layer, place) in enumerate(zip(layers, places)):
            if layer.outline is not None:
                hidden |= (number > top) & (_cover(layer.outline, place) > 0.5)
        return hidden


def _apply(matrix: np.ndarray, points: Tensor) -> Tensor:
    """The affine map (2, 3) or (3, 3) of points (2, H, W)."""
    return _affine(torch.from_numpy(np.ascontiguousarray(matrix[:2]).astype(np.float32)), points)


def _affine(matrix: Tensor, points: Tensor) -> Tensor:
    return torch.addmm(matrix[:, 2:], matrix[:, :2], points.flatten(1)).view_as(points)


def _bicubic(knots: int, count: int) -> Tensor:
    """Weights (count, knots) that interpolate values at `knots` places, the first and last at the ends."""
    eye = torch.eye(knots).view(1, knots, knots, 1)  # knot by knot as a channel
    return F.interpolate(eye, size=(count, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T.contiguous()


def _box(mask: Tensor) -> tuple[slice, slice] | None:
    """The smallest rows and columns that hold every True of (H, W); None without one."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _texture(layer: _Layer, place: Tensor) -> Tensor:
    """The layer's colours (3, H, W) at canvas points (2, H, W); the photograph is continued by its mirror image."""
    # grid_sample's coordinates: -1 and 1 are the outer edges of the outer pixels
    unit = torch.tensor([2 / layer.texture.shape[2], 2 / layer.texture.shape[1]])[:, None]
    matrix = layer.place * unit
    matrix[:, 2:] += 0.5 * unit - 1
    grid = _affine(matrix, place).movedim(0, -1)
    return F.grid_sample(layer.texture[None], grid[None], padding_mode="reflection", align_corners=False)[0]


def _cover(outline: Tensor, place: Tensor) -> Tensor:
    """How much a layer covers at canvas points (2, H, W), 0..1 (H, W): 1 within radius (1 + sum_k a_k cos(k angle +
    p_k)) of its centre.

    The cosines are the real parts of powers of one complex number, which cost less than angles and cosines.
    """
    offset = torch.complex(place[0] - outline[0], place[1] - outline[1])
    distance = offset.abs()
    turn = offset / distance.clamp(min=1e-6)
    factors = torch.polar(outline[3 : 3 + WAVES].abs(), outline[3 + WAVES :] + math.pi * (outline[3 : 3 + WAVES] < 0))
    wave = factors[-1] * turn
    for factor in factors[:-1].flip(0):
        wave = (wave + factor) * turn
    return (((1 + wave.real) * outline[2] - distance) / SOFT + 0.5).clamp_(0, 1)


def _of_top(flows: list[Tensor], top: Tensor) -> Tensor:
    """Flow (2, H, W) of the nearest layer at every pixel."""
    if len(flows) == 1:
        return flows[0]
    return torch.stack(flows).gather(0, top.expand(1, 2, *top.shape))[0]


def _normals(draw: PositionDraws, count: int) -> np.ndarray:
    """Standard normal numbers (count,), by Box and Muller."""
    half = -(-count // 2)
    values = draw.uniforms(2 * half)
    radius, angle = np.sqrt(-2 * np.log1p(-values[:half])), 2 * math.pi * values[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
