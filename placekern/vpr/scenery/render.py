"""A small ray caster in numpy: textured parallelograms, one sun with shadows, sky, camera errors.

The surprise: no ray is ever intersected one by one. For a parallelogram `origin + u across + v up`
the ray through a pixel solves a 3x3 system whose solution (a, b, c) is *linear* in the pixel's
coordinates, with u = a / c, v = b / c and inverse depth c. So a surface costs three outer sums and
a comparison with the depth buffer, and only the pixels that it wins are divided and textured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Samples along each axis of a pixel: edges are averaged over SAMPLES^2 rays.
SAMPLES = 2
_NEAR = 0.15
_MAX_LEVELS = 5

# Channels of a texel.
RED, GREEN, BLUE, COVERAGE, GLOW = range(5)


@dataclass(frozen=True)
class Texture:
    """A mip pyramid of uint8 texels (red, green, blue, coverage, glow) in one flat array.

    `texels` is uint8 [n, 5], row 0 of each level at the bottom; level l starts at `offsets[l]` and
    has rows of `strides[l]` texels. `glow` is light that the surface gives off by itself (windows
    after dark); texels with coverage below one half are holes.
    """

    texels: np.ndarray
    offsets: np.ndarray
    strides: np.ndarray
    width: int
    height: int
    opaque: bool

    @classmethod
    def from_canvas(cls, canvas: np.ndarray) -> Texture:
        """The pyramid of a uint8 canvas [height, width, 5], by 2x2 box averages."""
        height, width = canvas.shape[:2]
        levels = 1
        while levels < _MAX_LEVELS and min(height, width) >> levels >= 2:
            levels += 1
        step = 1 << (levels - 1)
        padding = ((0, -height % step), (0, -width % step), (0, 0))
        level = np.pad(canvas, padding, mode="edge") if any(p[1] for p in padding) else canvas
        parts, strides = [level.reshape(-1, 5)], [level.shape[1]]
        for _ in range(levels - 1):
            pairs = level[0::2].astype(np.uint16) + level[1::2]
            level = ((pairs[:, 0::2] + pairs[:, 1::2] + 2) >> 2).astype(np.uint8)
            parts.append(level.reshape(-1, 5))
            strides.append(level.shape[1])
        offsets = np.cumsum([0] + [len(part) for part in parts[:-1]])
        return cls(
            np.concatenate(parts),
            offsets.astype(np.int32),
            np.array(strides, dtype=np.int32),
            width,
            height,
            bool(canvas[..., COVERAGE].min() == 255),
        )

    def sample(self, u: np.ndarray, v: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Texels uint8 [n, 5] nearest to u, v in [0, 1] at the given pyramid levels."""
        column = np.minimum((u * self.width).astype(np.int32), self.width - 1)
        row = np.minimum((v * self.height).astype(np.int32), self.height - 1)
        level = np.minimum(level, len(self.offsets) - 1)
        index = self.offsets[level] + (row >> level) * self.strides[level] + (column >> level)
        return self.texels.take(index, axis=0)


@dataclass(frozen=True)
class Surface:
    """A textured parallelogram: points `origin + u across + v up` in metres, u and v in [0, 1].

    `normal` is the unit normal for lighting (None: lit the same from all sides, as leaves are).
    `shade` scales the light that falls on it.
    """

    origin: tuple[float, float, float]
    across: tuple[float, float, float]
    up: tuple[float, float, float]
    texture: Texture
    normal: tuple[float, float, float] | None = None
    shade: float = 1.0


@dataclass(frozen=True)
class Canyon:
    """The rows of houses at x = -half_width and x = half_width, as the sun sees them.

    `left` and `right` are roof heights in metres [n], one each metre of z from `start` on.
    """

    half_width: float
    start: float
    left: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: position in metres (x right, y up, z along the street), angles in degrees.

    Yaw turns to the right, pitch upwards; the field of view is the horizontal one.
    """

    x: float
    y: float
    z: float
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    field_of_view: float = 62.0

    def axes(self) -> np.ndarray:
        """float64 [3, 3]: the rows are the camera's right, up and forward directions."""
        yaw, pitch, roll = np.radians([self.yaw, self.pitch, self.roll])
        forward = np.array(
            [np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)]
        )
        level = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
        upright = np.cross(forward, level)
        right = np.cos(roll) * level + np.sin(roll) * upright
        return np.stack([right, np.cross(forward, right), forward])


@dataclass(frozen=True)
class Light:
    """The light of one view. Colours are linear RGB; `sun` is the unit direction to the sun."""

    sun: tuple[float, float, float]
    sun_colour: tuple[float, float, float]
    ambient: tuple[float, float, float]
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    clouds: float = 0.4
    glow: float = 0.0
    haze: float = 0.003


@dataclass(frozen=True)
class Exposure:
    """What the camera does to the light: brightness aimed at, tint, contrast, noise and blur."""

    brightness: float = 0.42
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    contrast: float = 1.0
    noise: float = 0.01
    blur: float = 0.0
    vignette: float = 0.2


def render(
    surfaces: Sequence[Surface],
    canyon: Canyon,
    camera: Camera,
    light: Light,
    exposure: Exposure,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """Takes a picture.

    Args:
        surfaces: what stands there; the nearest is seen.
        canyon: what throws shadows.
        camera, light, exposure: how it is seen.
        size: height and width in pixels.
        rng: makes the noise.

    Returns:
        float32 [3, height, width] RGB in [0, 1].

    Raises:
        ValueError: more surfaces than their numbers can tell apart.
    """
    if len(surfaces) >= 1 << 15:
        raise ValueError(f"a scene may hold up to 32,767 surfaces, got {len(surfaces)}")
    height, width = size[0] * SAMPLES, size[1] * SAMPLES
    focal = 0.5 * width / np.tan(np.radians(camera.field_of_view) / 2)
    across = ((np.arange(width) + 0.5 - width / 2) / focal).astype(np.float32)
    upward = ((height / 2 - np.arange(height) - 0.5) / focal).astype(np.float32)
    frame = _cast(surfaces, camera, across, upward, focal)
    colour = _shade(surfaces, canyon, camera, light, across, upward, *frame)
    colour = colour.reshape(3, size[0], SAMPLES, size[1], SAMPLES).mean((2, 4), dtype=np.float32)
    return _develop(colour, exposure, rng)


def _cast(surfaces, camera, across, upward, focal):
    """For every sample: inverse depth [h, w] (0: sky), texel [h * w, 5] and surface [h * w]."""
    height, width = len(upward), len(across)
    nearest = np.zeros((height, width), dtype=np.float32)
    texels = np.zeros((height * width, 5), dtype=np.uint8)
    owner = np.full(height * width, -1, dtype=np.int16)
    for number, solution, window in _visible(surfaces, camera, across, upward):
        rows, columns = window
        x, y = across[columns], upward[rows, None]
        a, b, c = ((plane[2] + plane[0] * x) + plane[1] * y for plane in solution)
        best = nearest[window]
        won = (c > best) & (c < 1 / _NEAR) & (a >= 0) & (a < c) & (b >= 0) & (b < c)
        index = np.flatnonzero(won)
        if not len(index):
            continue
        scale = c.ravel()[index]
        inverse = 1 / scale
        u, v = a.ravel()[index] * inverse, b.ravel()[index] * inverse
        # Texels that a sample spans: the derivatives of u along x and of v along y.
        texture = surfaces[number].texture
        step = np.maximum(
            np.abs(solution[0, 0] - u * solution[2, 0]) * np.float32(texture.width / focal),
            np.abs(solution[1, 1] - v * solution[2, 1]) * np.float32(texture.height / focal),
        )
        step *= inverse
        level = np.zeros(len(index), dtype=np.int32)
        for bound in (1.5, 3.0, 6.0, 12.0):
            level += step > bound
        found = texture.sample(u, v, level)
        if not texture.opaque:
            solid = found[:, COVERAGE] >= 128
            index, found, scale = index[solid], found[solid], scale[solid]
        best_row, best_column = np.divmod(index, best.shape[1])
        place = (best_row + rows.start) * width + best_column + columns.start
        nearest.ravel()[place] = scale
        texels[place] = found
        owner[place] = number
    return nearest, texels, owner


def _visible(surfaces, camera, across, upward):
    """Yields surfaces that may be seen: number, solution float32 [3, 3], (rows, columns) covered.

    The rows of a solution give a, b and c as (x, y, 1) products of a pixel's coordinates.
    """
    eye, axes = np.array([camera.x, camera.y, camera.z]), camera.axes()
    origins = np.array([surface.origin for surface in surfaces], dtype=np.float64) - eye
    spans = np.array([surface.across for surface in surfaces], dtype=np.float64)
    rises = np.array([surface.up for surface in surfaces], dtype=np.float64)
    basis = np.stack([spans, rises, origins], axis=1) @ axes.T  # [n, 3 vectors, 3], camera's axes
    span, rise, start = basis[:, 0], basis[:, 1], basis[:, 2]
    rings = np.stack([start, start + span, start + span + rise, start + rise], axis=1)
    depth = rings[..., 2] - _NEAR
    normals = np.array([s.normal or (0, 0, 0) for s in surfaces], dtype=np.float64)
    averted = (normals * origins).sum(1) > 0
    edge_on = np.abs(np.linalg.det(basis)) < 1e-9
    for number in np.flatnonzero((depth.max(1) > 0) & ~averted & ~edge_on):
        ring = rings[number]
        if depth[number].min() <= 0:
            ring = _clip(ring, depth[number])
        x, y = ring[:, 0] / ring[:, 2], ring[:, 1] / ring[:, 2]
        left, right = np.searchsorted(across, [x.min(), x.max()])
        top, bottom = np.searchsorted(-upward, [-y.max(), -y.min()])
        if left < right and top < bottom:
            window = slice(int(top), int(bottom)), slice(int(left), int(right))
            yield int(number), np.linalg.inv(basis[number].T).astype(np.float32), window


def _clip(ring, depth):
    """The corners [n, 3] of what is left of a ring of corners in front of the near plane."""
    points = []
    for here in range(len(ring)):
        there = (here + 1) % len(ring)
        if depth[here] > 0:
            points.append(ring[here])
        if (depth[here] > 0) != (depth[there] > 0):
            part = depth[here] / (depth[here] - depth[there])
            points.append(ring[here] + (ring[there] - ring[here]) * part)
    return np.array(points)


_LINEAR = (np.arange(256, dtype=np.float32) / 255) ** 2


def _shade(surfaces, canyon, camera, light, across, upward, nearest, texels, owner):
    """Linear colour float32 [3, h, w] of every sample."""
    right, up, forward = camera.axes().astype(np.float32)
    shape = nearest.shape
    ray = [
        (forward[axis] + right[axis] * across + up[axis] * upward[:, None]).ravel()
        for axis in range(3)
    ]
    nearest = nearest.ravel()
    colour = np.empty((3, nearest.size), dtype=np.float32)
    empty = np.flatnonzero(owner < 0)
    colour[:, empty] = _sky(light, *(part[empty] for part in ray), camera)
    hit = np.flatnonzero(owner >= 0)
    number = owner[hit]
    depth = 1 / nearest[hit]
    x, y, z = (
        np.float32(start) + part[hit] * depth
        for start, part in zip((camera.x, camera.y, camera.z), ray, strict=True)
    )
    sun = np.array(light.sun, dtype=np.float32)
    facing = np.array(
        [0.45 if s.normal is None else max(float(np.dot(s.normal, sun)), 0.0) for s in surfaces],
        dtype=np.float32,
    )
    direct = facing[number]
    if max(light.sun_colour) > 0:
        lit = np.flatnonzero(direct > 0)
        direct[lit] *= _unshadowed(canyon, sun, x[lit], y[lit], z[lit])
    # Less of the sky is seen from the bottom of a street than from under the roofs.
    ambient = 0.62 + 0.38 * np.clip(y, 0, 12) / 12
    shade = np.array([s.shade for s in surfaces], dtype=np.float32)[number]
    direct *= shade
    ambient *= shade
    veil = 1 - np.exp(-np.float32(light.haze) * depth)
    found = texels[hit]
    shine = _LINEAR[found[:, GLOW]] * np.float32(light.glow)
    for channel, warmth in enumerate((1.0, 0.72, 0.38)):
        received = light.ambient[channel] * ambient + light.sun_colour[channel] * direct
        value = _LINEAR[found[:, channel]] * received + warmth * shine
        value += (np.float32(light.horizon[channel]) - value) * veil
        colour[channel, hit] = value
    return colour.reshape(3, *shape)


def _unshadowed(canyon, sun, x, y, z):
    """1 where the way to the sun passes over the row of houses on the sun's side, else 0."""
    if abs(sun[0]) < 1e-3:
        return np.ones_like(x)
    side, heights = (1, canyon.right) if sun[0] > 0 else (-1, canyon.left)
    distance = (side * np.float32(canyon.half_width) - x) / sun[0]
    metre = z + distance * sun[2] - np.float32(canyon.start)
    metre = np.clip(metre.astype(np.int32), 0, len(heights) - 1)
    over = y + distance * sun[1] - heights[metre]
    # A quarter of a metre of penumbra; a point on or behind that row itself is in the light.
    return np.where(distance < 0.05, 1, np.clip(over * 4, 0, 1)).astype(np.float32)


def _sky(light, x, y, z, camera):
    """Sky colours [3, n] along rays, with clouds on a plane far above; below it: the horizon's."""
    length = np.sqrt(x * x + y * y + z * z)
    elevation = y / length
    mix = np.clip(elevation * 1.6, 0, 1) ** 0.6
    if light.clouds > 0:
        rise = np.maximum(elevation, 0.04)
        u = (x / length / rise) * 1.3 + camera.x * 7.1 + light.sun[2] * 37
        v = (z / length / rise) * 1.3 + camera.z * 3.7 + light.sun[0] * 53
        cover = (
            np.sin(u * 1.7 + 1.3 * np.sin(v * 1.1))
            + np.sin(v * 2.3 + 1.7 * np.sin(u * 1.3 + 0.5))
            + 0.6 * np.sin(u * 4.1 + v * 3.3 + 2 * np.sin(v * 2.7))
        )
        cover = np.clip(cover * 0.3 + light.clouds * 1.6 - 0.55, 0, 1) * light.clouds
        cover *= np.clip(elevation * 8, 0, 1)
    else:
        cover = np.zeros_like(mix)
    cosine = np.clip((x * light.sun[0] + y * light.sun[1] + z * light.sun[2]) / length, 0, 1)
    halo = 0.5 * cosine**24
    white = max(light.horizon)
    result = np.empty((3, len(x)), dtype=np.float32)
    for channel in range(3):
        value = light.horizon[channel] + (light.zenith[channel] - light.horizon[channel]) * mix
        value += (white - value) * 0.85 * cover
        result[channel] = value + light.sun_colour[channel] * halo * (1 - 0.7 * cover)
    return result


def _develop(colour, exposure, rng):
    """Linear light [3, H, W] to a picture in [0, 1]: exposure, tone curve, blur and noise."""
    _, height, width = colour.shape
    # The meter weighs the darker two thirds: a bright sky must not turn the street black.
    luminance = colour.mean(0)
    metered = np.minimum(luminance, np.quantile(luminance[::4, ::4], 0.67)).mean()
    gain = exposure.brightness**2 / max(float(metered), 1e-6)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)
    falloff = 1 - exposure.vignette * 0.5 * (rows * rows + columns * columns)
    picture = colour * (gain * falloff)
    picture *= np.array(exposure.tint, dtype=np.float32)[:, None, None]
    # Highlights roll off above one half instead of clipping.
    bright = picture > 0.5
    picture[bright] = 1 - 0.25 / picture[bright]
    picture = np.sqrt(picture)
    if exposure.contrast != 1:
        picture = exposure.brightness + (picture - exposure.brightness) * exposure.contrast
    if exposure.blur > 0:
        side = np.float32(exposure.blur / (1 + 2 * exposure.blur))
        wide = np.pad(picture, ((0, 0), (1, 1), (0, 0)), mode="edge")
        picture = picture * (1 - 2 * side) + side * (wide[:, :-2] + wide[:, 2:])
        wide = np.pad(picture, ((0, 0), (0, 0), (1, 1)), mode="edge")
        picture = picture * (1 - 2 * side) + side * (wide[:, :, :-2] + wide[:, :, 2:])
    if exposure.noise > 0:
        picture += np.float32(exposure.noise) * rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture, 0, 1).astype(np.float32)
