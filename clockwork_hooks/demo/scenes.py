"""Small scenes: drawn at random from a seed, rendered exactly, on any device.

A scene has a background and one or two objects. Its nine *attributes* (the columns of `COLUMNS`) say what a caption
can tell and what the attribute classifier reads back; its geometry (centres, radii, angles, tints) varies freely.
Objects are in canonical order along the axis they are spread on: object 1 is the left one, or the upper one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clockwork_hooks.errors import ArgumentError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

IMAGE_SIZE = 64
CHUNK = 4096  # scenes that are rendered at once
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("large", "small")
COLOURS = {
    "red": (0.88, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.93, 0.15),
    "green": (0.12, 0.75, 0.20),
    "cyan": (0.20, 0.90, 0.92),
    "blue": (0.12, 0.25, 0.95),
    "pink": (1.00, 0.40, 0.80),
    "white": (1.00, 1.00, 1.00),
}
BACKGROUNDS = {
    "white": (1.00, 1.00, 1.00),
    "black": (0.00, 0.00, 0.00),
    "grey": (0.50, 0.50, 0.50),
    "dark green": (0.03, 0.25, 0.10),
    "dark blue": (0.05, 0.07, 0.32),
    "dark red": (0.30, 0.03, 0.06),
}
PLACES = {  # of a lone object: its centre as a fraction of the image, (x, y), y down
    "in the centre": (0.50, 0.50),
    "at the top": (0.50, 0.25),
    "at the bottom": (0.50, 0.75),
    "at the left": (0.25, 0.50),
    "at the right": (0.75, 0.50),
    "at the top left": (0.25, 0.25),
    "at the top right": (0.75, 0.25),
    "at the bottom left": (0.25, 0.75),
    "at the bottom right": (0.75, 0.75),
}
SIDE_BY_SIDE, STACKED = len(PLACES), len(PLACES) + 1
LAYOUTS = (*PLACES, "side by side", "stacked")
NONE = "none"  # the shape, colour and size of an object that is not there

COLUMNS: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "count": ("1", "2"),
    "layout": LAYOUTS,
    "shape_1": SHAPES,
    "colour_1": tuple(COLOURS),
    "size_1": SIZES,
    "shape_2": (*SHAPES, NONE),
    "colour_2": (*COLOURS, NONE),
    "size_2": (*SIZES, NONE),
}
WHITE_OBJECT, WHITE_BACKGROUND = tuple(COLOURS).index("white"), tuple(BACKGROUNDS).index("white")

_RADII = {"large": (11.5, 13.0), "small": (6.0, 7.2)}  # pixels of a 64-pixel image
_JITTER_ALONG, _JITTER_ACROSS, _JITTER_ALONE = 2.5, 6.0, 2.5  # pixels, likewise
_ANGLE, _TINT = 0.15, 0.03  # radians; RGB units
_HELD_OUT_EVERY = 16


@dataclass(frozen=True, slots=True)
class Scenes:
    """N scenes, as columns.

    Attributes:
        attributes: (N, 9) indices into the values of `COLUMNS`, one column each.
        centre: (N, 2, 2) object centres (x, y) in pixels of a 64-pixel image.
        radius: (N, 2) object radii in the same pixels; 0 for an object that is not there.
        angle: (N, 2) rotations in radians.
        tint: (N, 3, 3) RGB offsets of object 1, object 2 and the background.
    """

    attributes: Ints
    centre: Floats
    radius: Floats
    angle: Floats
    tint: Floats

    def __len__(self) -> int:
        return len(self.attributes)

    def __getitem__(self, rows: Ints | slice | NDArray[np.bool_]) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_scenes(count: int, seed: int | np.random.Generator = 0, *, pairs: float = 0.7) -> Scenes:
    """Draw scenes at random; the same seed gives the same scenes on every machine.

    Args:
        count: how many scenes.
        seed: an int, or a generator to go on drawing from (endless streams).
        pairs: the share of scenes with two objects, in [0, 1].

    Returns:
        `count` scenes. A white object never stands on the white background.

    Raises:
        ArgumentError: `count` is negative or `pairs` is no share.
    """
    if count < 0 or not 0.0 <= pairs <= 1.0:
        raise ArgumentError(
            "a number of scenes is at least 0, and the share of pairs is from 0 to 1",
            seen={"count": count, "pairs": pairs},
            do="pass values in range",
        )
    rng = np.random.default_rng(seed)
    two = rng.random(count) < pairs
    background = rng.integers(0, len(BACKGROUNDS), count)
    layout = np.where(two, rng.integers(SIDE_BY_SIDE, STACKED + 1, count), rng.integers(0, len(PLACES), count))
    shape = rng.integers(0, len(SHAPES), (count, 2))
    colour = rng.integers(0, (len(COLOURS) - (background == WHITE_BACKGROUND))[:, None], (count, 2))
    size = rng.integers(0, len(SIZES), (count, 2))
    attributes = np.stack(
        [
            background, two.astype(np.int64), layout, shape[:, 0], colour[:, 0], size[:, 0],
            np.where(two, shape[:, 1], len(SHAPES)), np.where(two, colour[:, 1], len(COLOURS)),
            np.where(two, size[:, 1], len(SIZES)),
        ],
        axis=1,
    )  # fmt: skip
    return _geometry(attributes.astype(np.int64), rng)


def scenes_of(attributes: Ints, seed: int | np.random.Generator = 0) -> Scenes:
    """Draw geometry for given attributes. Args: attributes (N, 9), all told. Returns: N scenes."""
    return _geometry(attributes, np.random.default_rng(seed))


def _geometry(attributes: Ints, rng: np.random.Generator) -> Scenes:
    count = len(attributes)
    two, layout, size = attributes[:, 1] == 1, attributes[:, 2], attributes[:, [5, 8]]
    alone = np.array([*PLACES.values(), (0, 0), (0, 0)])[layout] * IMAGE_SIZE
    alone = alone + rng.uniform(-_JITTER_ALONE, _JITTER_ALONE, (count, 2))
    along = IMAGE_SIZE * np.array([0.25, 0.75]) + rng.uniform(-_JITTER_ALONG, _JITTER_ALONG, (count, 2))
    across = IMAGE_SIZE * 0.5 + rng.uniform(-_JITTER_ACROSS, _JITTER_ACROSS, (count, 2))
    beside = (layout == SIDE_BY_SIDE)[:, None]
    paired = np.stack([np.where(beside, along, across), np.where(beside, across, along)], axis=-1)
    centre = np.where(two[:, None, None], paired, alone[:, None, :])
    bounds = np.array([_RADII["large"], _RADII["small"], (0.0, 0.0)])[size]
    radius = bounds[..., 0] + rng.random((count, 2)) * (bounds[..., 1] - bounds[..., 0])
    angle = rng.uniform(-_ANGLE, _ANGLE, (count, 2))
    tint = rng.uniform(-_TINT, _TINT, (count, 3, 3))
    as_floats = [values.astype(np.float32) for values in (centre, radius, angle, tint)]
    return Scenes(attributes, *as_floats)


def held_out(attributes: Ints) -> NDArray[np.bool_]:
    """Which attribute combinations training never sees: one in sixteen, by a hash of the whole row.

    Args:
        attributes: (N, 9) indices.

    Returns:
        (N,) booleans, True for a held-out combination.
    """
    key = np.zeros(len(attributes), dtype=np.uint64)
    for column, values in zip(attributes.T.astype(np.uint64), COLUMNS.values(), strict=True):
        key = key * np.uint64(len(values) + 1) + column
    mixed = (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return np.asarray(mixed % np.uint64(_HELD_OUT_EVERY) == 0)


def render(scenes: Scenes, *, size: int = IMAGE_SIZE, device: torch.device | str = "cpu") -> Tensor:
    """Render scenes with anti-aliased edges, from signed distances.

    Args:
        scenes: N scenes.
        size: image side in pixels.
        device: where to render.

    Returns:
        (N, 3, size, size) RGB in [0, 1], float32.
    """
    attributes = torch.as_tensor(scenes.attributes, device=device)
    centre, radius, angle, tint = (
        torch.as_tensor(values, device=device) for values in (scenes.centre, scenes.radius, scenes.angle, scenes.tint)
    )
    scale = size / IMAGE_SIZE
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / scale
    colours = torch.tensor([*COLOURS.values(), (0.0, 0.0, 0.0)], device=device)
    backgrounds = torch.tensor([*BACKGROUNDS.values()], device=device)
    image = (backgrounds[attributes[:, 0]] + tint[:, 2]).clamp(0, 1)[:, :, None, None].expand(-1, -1, size, size)
    for which in (0, 1):
        shape, colour = attributes[:, 3 + 3 * which], attributes[:, 4 + 3 * which]
        x = axis[None, None, :] - centre[:, which, 0, None, None]
        y = axis[None, :, None] - centre[:, which, 1, None, None]
        cos, sin = angle[:, which, None, None].cos(), angle[:, which, None, None].sin()
        r = radius[:, which, None, None]
        distance = _distance(cos * x + sin * y, cos * y - sin * x, r, shape.clamp(max=len(SHAPES) - 1))
        cover = (0.5 - distance * scale).clamp(0, 1) * (r > 0)
        paint = (colours[colour] + tint[:, which]).clamp(0, 1)[:, :, None, None]
        image = torch.lerp(image, paint, cover[:, None])
    return image


def _distance(x: Tensor, y: Tensor, r: Tensor, shape: Tensor) -> Tensor:
    """Signed distances (N, H, W) in pixels, negative inside, of each scene's own shape."""
    ax, ay, length = x.abs(), y.abs(), torch.hypot(x, y)
    triangle = torch.maximum(y - 0.55 * r, (math.sqrt(3) * ax - y) / 2 - 0.55 * r)
    bar, arm = 0.34 * r, 1.05 * r
    cross = torch.minimum(torch.maximum(ax - arm, ay - bar), torch.maximum(ax - bar, ay - arm))
    by_shape = (
        length - r,
        torch.maximum(ax, ay) - 0.86 * r,
        triangle,
        _star(x, y, length, 1.2 * r, 0.52 * r),
        cross,
        (length - 0.74 * r).abs() - 0.27 * r,
    )
    every = torch.stack(torch.broadcast_tensors(*by_shape))
    return every.gather(0, shape[None, :, None, None].expand(1, *every.shape[1:]))[0]


def _star(x: Tensor, y: Tensor, length: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Distance to a five-pointed star, point up: fold into one tenth, then a half-plane through point and notch."""
    sector = math.pi / 5
    angle = torch.atan2(x, -y).remainder(2 * sector)
    angle = torch.minimum(angle, 2 * sector - angle)
    px, py = length * angle.cos(), length * angle.sin()
    ex, ey = inner * math.cos(sector) - outer, inner * math.sin(sector)  # from point to notch
    return (ey * (px - outer) - ex * py) / torch.hypot(ex, ey)


def draw_split(count: int, seed: int | np.random.Generator, *, test: bool) -> Scenes:
    """Draw scenes of the training combinations, or (`test`) of those held out from training.

    Args:
        count: how many.
        seed: an int, or a generator to go on drawing from.
        test: which side of `held_out`.

    Returns:
        `count` scenes.
    """
    rng = np.random.default_rng(seed)
    share = 1 / 18 if test else 15 / 16.5
    drawn: list[Scenes] = []
    while sum(map(len, drawn)) < count:
        scenes = draw_scenes(int(count / share) + 64, rng)
        drawn.append(scenes[held_out(scenes.attributes) == test])
    columns = (np.concatenate([getattr(s, name) for s in drawn])[:count] for name in Scenes.__slots__)
    return Scenes(*columns)


def render_bytes(scenes: Scenes, device: torch.device | str) -> Tensor:
    """Render scenes in chunks. Args: N scenes, a device. Returns: (N, 3, 64, 64) uint8 on it."""
    images = torch.empty((len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    for start in range(0, len(scenes), CHUNK):
        rows = slice(start, start + CHUNK)
        images[rows] = (render(scenes[rows], device=device) * 255).round().to(torch.uint8)
    return images
