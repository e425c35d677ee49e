"""Procedural surfaces: what colour a point on a wall, a box or the sky has.

Three layers cover every scale: cells (tiles, bricks, planks, stripes, checks) with sharp seams;
marks inside some cells (rows of short strokes like print, dots); octaves of gradient-free value
noise. Everything is anchored to the surface, and everything fades once it is finer than a pixel,
so that far surfaces do not flicker.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stac_core.worlds.draws import Draws, mix

_COLUMNS = {
    "first": 3,  # colours of the noise and of the cells
    "second": 3,
    "seam": 3,
    "mark": 3,
    "turn": 2,  # cosine and sine of the pattern's angle
    "offset": 2,  # m
    "cell": 2,  # size of a cell, m
    "shift": 1,  # of each row against the one below, in cells
    "seam_width": 1,  # m
    "contrast": 1,  # between cells
    "printed": 1,  # share of cells that carry marks
    "stroke": 2,  # spacing of marks, m
    "density": 1,  # share of places that hold a mark
    "dots": 1,  # 1 = round marks, 0 = strokes
    "noise": 1,  # amplitude
    "frequency": 1,  # of the coarsest octave, 1/m
    "gain": 1,  # amplitude from one octave to the next
    "stretch": 1,  # grain: how much longer the noise is along u
    "gloss": 1,
}
SURFACE_SIZE = sum(_COLUMNS.values())
_OCTAVES = 6
_LACUNARITY = 2.3
_TABLE = 256  # side of the noise table


class Surface:
    """Named rows of surface numbers [F, K, P]."""

    def __init__(self, values: Tensor) -> None:
        self._rows = dict(zip(_COLUMNS, values.split(list(_COLUMNS.values()), 1), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """[F, P], or [F, n, P] for a column of n numbers."""
        rows = self._rows[name]
        return rows[:, 0] if rows.shape[1] == 1 else rows


def draw_surfaces(draws: Draws, count: int, scale: Tensor) -> Tensor:
    """Surfaces [B, count, K]; `scale` [B] enlarges all patterns (outdoors is coarser)."""
    scale = scale[:, None, None]
    plain = draws.chance(0.2, count, 1)
    first, second = _draw_colours(draws, count)
    angle = draws.choice([0.7, 0.1, 0.2], count, 1) * 0.785 + draws.uniform(count, 1, low=-0.03, high=0.03)
    cell = _draw_cells(draws, count) * scale
    no_seam = draws.chance(0.35, count, 1) | plain
    contrast = draws.uniform(count, 1, high=1.2) * draws.chance(0.7, count, 1)
    columns = {
        "first": first,
        "second": second,
        "seam": first * draws.uniform(count, 1, low=0.2, high=1.4),
        "mark": torch.where(draws.chance(0.75, count, 1), draws.uniform(count, 3, high=0.2), 0.9),
        "turn": torch.cat([angle.cos(), angle.sin()], -1),
        "offset": draws.uniform(count, 2, high=50.0),
        "cell": cell,
        "shift": torch.where(draws.chance(0.4, count, 1), 0.5, 0.0),
        "seam_width": torch.where(no_seam, 0.0, draws.uniform(count, 1, low=0.01, high=0.08))
        * cell.amin(-1, keepdim=True),
        "contrast": torch.where(plain, 0.0, contrast),
        "printed": torch.where(draws.chance(0.35, count, 1), draws.uniform(count, 1, low=0.1, high=0.8), 0.0),
        "stroke": draws.log_uniform(count, 1, low=0.015, high=0.12)
        * draws.uniform(count, 2, low=0.6, high=1.6)
        * scale,
        "density": draws.uniform(count, 1, low=0.2, high=0.85),
        "dots": draws.chance(0.3, count, 1).float(),
        "noise": torch.where(plain, 0.15, 1.0) * draws.uniform(count, 1, low=0.15, high=1.1),
        "frequency": draws.log_uniform(count, 1, low=0.3, high=3.0) / scale,
        "gain": draws.uniform(count, 1, low=0.5, high=0.95),
        "stretch": torch.where(
            draws.chance(0.25, count, 1), draws.uniform(count, 1, low=0.05, high=0.4), 1.0
        ),
        "gloss": torch.where(draws.chance(0.25, count, 1), draws.uniform(count, 1, high=0.35), 0.0),
    }
    return torch.cat([columns[name].expand(-1, -1, size) for name, size in _COLUMNS.items()], -1)


def with_columns(surfaces: Tensor, **columns: Tensor) -> Tensor:
    """The surfaces [B, count, K] with some named numbers replaced."""
    parts = dict(zip(_COLUMNS, surfaces.split(list(_COLUMNS.values()), -1), strict=True))
    parts.update({name: value.expand_as(parts[name]) for name, value in columns.items()})
    return torch.cat(list(parts.values()), -1)


def _draw_colours(draws: Draws, count: int) -> tuple[Tensor, Tensor]:
    """Two colours of a surface [B, count, 3]: mostly muted, the second near or far from the first."""

    def colour() -> Tensor:
        grey = draws.uniform(count, 1, low=0.12, high=0.9)
        vivid = draws.uniform(count, 1) ** 3
        return (grey + vivid * draws.uniform(count, 3, low=-0.55, high=0.55)).clamp(0.03, 0.97)

    first, other = colour(), colour()
    return first, torch.lerp(first, other, draws.uniform(count, 1, low=0.25))


def _draw_cells(draws: Draws, count: int) -> Tensor:
    """Cell sizes [B, count, 2] in metres; a very long cell is a plank or a stripe."""
    width = draws.log_uniform(count, 1, low=0.08, high=1.2)
    aspect = draws.log_uniform(count, 1, low=1.0, high=4.0)
    aspect = torch.where(draws.chance(0.15, count, 1), 40.0, aspect)
    sizes = torch.cat([width * aspect, width], -1)
    return torch.where(draws.chance(0.4, count, 1), sizes.flip(-1), sizes)


def albedo(surface: Surface, uv: Tensor, footprint: Tensor) -> Tensor:
    """Colours [F, 3, P] at surface coordinates [F, 2, P], for pixels `footprint` [F, P] metres wide."""
    uv = uv + surface["offset"]
    cos, sin = surface["turn"].unbind(1)
    u, v = cos * uv[:, 0] - sin * uv[:, 1], sin * uv[:, 0] + cos * uv[:, 1]
    cell_value, seam, cell_hash = _cells(surface, u, v, footprint)
    blend = 0.5 + surface["noise"] * _noise(surface, u, v, footprint) + surface["contrast"] * cell_value
    colour = torch.lerp(surface["first"], surface["second"], blend.clamp_(0, 1)[:, None])
    marks = _marks(surface, u, v, footprint) * (cell_hash < surface["printed"])
    colour = torch.lerp(colour, surface["mark"], marks[:, None])
    return torch.lerp(colour, surface["seam"], seam[:, None])


def _cells(surface: Surface, u: Tensor, v: Tensor, footprint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Brightness of the cell (−½ to ½), coverage by its seam, and its hash (0 to 1)."""
    width, height = surface["cell"].unbind(1)
    y = v / height
    row = y.floor()
    x = u / width + surface["shift"] * row
    column = x.floor()
    value, cell_hash = _hash_cell(column, row, 0)
    edge_x = (0.5 - (x - column - 0.5).abs()) * width
    edge_y = (0.5 - (y - row - 0.5).abs()) * height
    edge = torch.minimum(edge_x, edge_y) - 0.5 * surface["seam_width"]
    seam = (0.5 - edge / footprint).clamp_(0, 1) * (surface["seam_width"] / footprint).clamp(max=1)
    fade = (1.5 - footprint / torch.minimum(width, height)).clamp_(0, 1)
    return (value - 0.5) * fade, seam * fade, cell_hash


def _marks(surface: Surface, u: Tensor, v: Tensor, footprint: Tensor) -> Tensor:
    """Coverage of a pixel by print [F, P]."""
    width, height = surface["stroke"].unbind(1)
    x, y = u / width, v / height
    column, row = x.floor(), y.floor()
    value, other = _hash_cell(column, row, 77)
    side_x = ((x - column - 0.5) * width).abs()
    side_y = ((y - row - 0.5) * height).abs()
    stroke = torch.maximum(side_x - (0.2 + 0.3 * other) * width, side_y - 0.32 * height)
    dot = (side_x.square() + side_y.square()).sqrt() - (0.2 + 0.25 * other) * torch.minimum(width, height)
    distance = torch.where(surface["dots"] > 0.5, dot, stroke)
    smallest = torch.minimum(width, height)
    fade = (1.4 - footprint / smallest).clamp_(0, 1)
    return (0.5 - distance / footprint).clamp_(0, 1) * (value < surface["density"]) * fade


def _noise(surface: Surface, u: Tensor, v: Tensor, footprint: Tensor) -> Tensor:
    """Octaves of value noise [F, P], about −½ to ½."""
    octave = torch.arange(_OCTAVES, device=u.device, dtype=u.dtype)[:, None, None]
    frequency = surface["frequency"] * _LACUNARITY**octave  # [O, F, P]
    weight = surface["gain"] ** octave
    visible = (1.0 - frequency * footprint).clamp_(0, 1)
    drift = 37.13 * octave
    value = _value_noise(u * surface["stretch"] * frequency + drift, v * frequency + drift)
    return (value * weight * visible).sum(0) / weight.square().sum(0).sqrt()


def _value_noise(x: Tensor, y: Tensor) -> Tensor:
    """Smooth noise between −½·√3 and ½·√3 with a random value at every integer point."""
    column, row = x.floor(), y.floor()
    along_x, along_y = _smooth(x - column), _smooth(y - row)
    index = ((row.int() & (_TABLE - 1)) * _TABLE) + (column.int() & (_TABLE - 1))
    flat = index.flatten()
    corners = [table.index_select(0, flat).view(x.shape) for table in _noise_tables(x.device)]
    low = torch.lerp(corners[0], corners[1], along_x)
    high = torch.lerp(corners[2], corners[3], along_x)
    return torch.lerp(low, high, along_y)


def _smooth(part: Tensor) -> Tensor:
    return part * part * (3 - 2 * part)


def _hash_cell(column: Tensor, row: Tensor, salt: int) -> tuple[Tensor, Tensor]:
    """Two unrelated numbers in 0 to 1 per cell."""
    index = (column.int() * 73 + row.int() * 4523 + salt) & (_TABLE * _TABLE - 1)
    flat = index.flatten()
    first, second = _hash_tables(column.device)
    return first.index_select(0, flat).view(index.shape), second.index_select(0, flat).view(index.shape)


@lru_cache(maxsize=8)
def _hash_tables(device: torch.device) -> Tensor:
    """Two rows of uniform numbers [2, 65536], the same in every world: worlds differ by their offsets."""
    values = Draws(torch.zeros(1, dtype=torch.int64)).uniform(2, _TABLE * _TABLE)[0]
    return values.to(device)


@lru_cache(maxsize=8)
def _noise_tables(device: torch.device) -> Tensor:
    """The four corner values [4, 65536] of every cell of a repeating random lattice."""
    lattice = Draws(mix(torch.ones(1, dtype=torch.int64))).uniform(_TABLE, _TABLE)[0] - 0.5
    lattice = lattice * 3**0.5
    right, up = lattice.roll(-1, 1), lattice.roll(-1, 0)
    corners = torch.stack([lattice, right, up, right.roll(-1, 0)])
    return corners.flatten(1).to(device)
