"""Boxes, cylinders and spheres, and where rays meet them.

A set holds shapes of one kind that share one rotation, so rays are turned and inverted once per
set and not once per shape. A shape whose half size is negative is never hit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BOX, CYLINDER, SPHERE = 0, 1, 2
GONE = -1.0  # half size of a shape that does not exist
_TINY = 1e-7


@dataclass(frozen=True)
class Shapes:
    """N shapes of one kind in each of B worlds."""

    kind: int
    rotation: Tensor  # [B, 3, 3] world from set
    centre: Tensor  # [B, N, 3] in the set's axes
    half: Tensor  # [B, N, 3] half sizes; a cylinder stands along its z, radii are equal
    surface: Tensor  # [B, N, K] numbers of `surface.Surface`

    @property
    def count(self) -> int:
        return self.centre.shape[1]

    def select(self, worlds: Tensor, index: Tensor) -> Shapes:
        """The shapes `index` [F, M] of worlds [F]."""

        def take(values: Tensor) -> Tensor:
            return values[worlds[:, None], index]

        return replace(
            self,
            rotation=self.rotation[worlds],
            centre=take(self.centre),
            half=take(self.half),
            surface=take(self.surface),
        )

    def intersect(self, origin: Tensor, direction: Tensor) -> Tensor:
        """First hits in units of `direction`, [F, N, P]; infinite where a ray misses.

        Args:
            origin: [F, 3] in world axes, outside every shape.
            direction: [F, 3, P] in world axes, any length.
        """
        inverse_rotation = self.rotation.transpose(1, 2)
        local_origin = turn(inverse_rotation, origin[..., None])[:, None, :, 0]
        local_direction = turn(inverse_rotation, direction)
        offset = self.centre - local_origin  # [F, N, 3]
        near, far = _INTERVALS[self.kind](offset, self.half, local_direction)
        return torch.where((near < far) & (near > 0), near, torch.inf)


def _slab(offset: Tensor, half: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit between two parallel planes: [F, N], [F, N], [F, P] -> [F, N, P] twice."""
    direction = torch.where(direction.abs() < _TINY, _TINY, direction)
    inverse = direction.reciprocal()[:, None]
    middle = offset[..., None] * inverse
    reach = half[..., None] * inverse.abs()
    return middle - reach, middle.add_(reach)


def _box_interval(offset: Tensor, half: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    near, far = _slab(offset[..., 0], half[..., 0], direction[:, 0])
    for axis in (1, 2):
        axis_near, axis_far = _slab(offset[..., axis], half[..., axis], direction[:, axis])
        near, far = torch.maximum(near, axis_near), torch.minimum(far, axis_far)
    return near, far


def _round_interval(offset: Tensor, radius: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit of circle (2 axes) or ball (3 axes): [F, N, D], [F, N], [F, D, P]."""
    scale = direction.square().sum(1).clamp(min=_TINY)[:, None]
    nearest = _dot(offset, direction) / scale  # where the ray passes closest
    # Squared distance from the nearest point, from the difference itself: the textbook
    # b² − 4ac cancels badly for a small ball far away.
    gap = torch.zeros_like(nearest)
    for axis in range(direction.shape[1]):
        gap += (offset[..., axis, None] - nearest * direction[:, None, axis]).square_()
    reach = (((radius * radius.abs())[..., None] - gap) / scale).clamp_(min=0).sqrt_()
    return nearest - reach, nearest + reach


def _dot(offset: Tensor, direction: Tensor) -> Tensor:
    total = offset[..., 0, None] * direction[:, None, 0]
    for axis in range(1, direction.shape[1]):
        total = total + offset[..., axis, None] * direction[:, None, axis]
    return total


def _cylinder_interval(offset: Tensor, half: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    near, far = _round_interval(offset[..., :2], half[..., 0], direction[:, :2])
    end_near, end_far = _slab(offset[..., 2], half[..., 2], direction[:, 2])
    return torch.maximum(near, end_near), torch.minimum(far, end_far)


def _sphere_interval(offset: Tensor, half: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return _round_interval(offset, half[..., 0], direction)


def join(sets: list[Shapes]) -> Shapes:
    """One set of sets that share kind and rotation."""
    return replace(
        sets[0],
        centre=torch.cat([s.centre for s in sets], 1),
        half=torch.cat([s.half for s in sets], 1),
        surface=torch.cat([s.surface for s in sets], 1),
    )


_INTERVALS = {BOX: _box_interval, CYLINDER: _cylinder_interval, SPHERE: _sphere_interval}


def turn(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Product of [F, R, 3] and [F, 3, P], in full precision whatever the setting for matrix products."""
    product = matrix[..., 0, None] * vectors[:, 0, None]
    for axis in (1, 2):
        product = product.addcmul(matrix[..., axis, None], vectors[:, axis, None])
    return product


def length(vectors: Tensor) -> Tensor:
    """Lengths [F, P] of vectors [F, n, P]; much faster on a CPU than a norm over the middle axis."""
    total = vectors[:, 0].square()
    for axis in range(1, vectors.shape[1]):
        total = total.addcmul(vectors[:, axis], vectors[:, axis])
    return total.sqrt()


def face_of(kind: Tensor, local: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Outward normals [F, 3, P] in set axes and surface coordinates [F, 2, P] in metres.

    Args:
        kind: [F, P] BOX, CYLINDER or SPHERE.
        local: [F, 3, P] hit point relative to the shape's centre.
        half: [F, 3, P].
    """
    x, y, z = local.unbind(1)
    scaled = local / half.abs().clamp(min=_TINY)
    flat = scaled.abs()
    cap = flat[:, 2] > length(scaled[:, :2])

    on_z = (flat[:, 2] >= flat[:, 0]) & (flat[:, 2] >= flat[:, 1])  # faces of a box
    on_x = (flat[:, 0] >= flat[:, 1]) & ~on_z
    box_normal = torch.stack([on_x, ~(on_x | on_z), on_z], 1) * scaled.sign()
    box_uv = (torch.where(on_x, y, x), torch.where(on_z, y, z))
    angle = torch.atan2(y, x)
    upright = torch.stack([x, y, torch.zeros_like(z)], 1)
    side_normal = upright / length(upright)[:, None].clamp(min=_TINY)
    cap_normal = torch.stack([torch.zeros_like(x), torch.zeros_like(x), z.sign()], 1)
    cylinder_normal = torch.where(cap[:, None], cap_normal, side_normal)
    cylinder_uv = (torch.where(cap, x, angle * half[:, 0]), torch.where(cap, y, z))
    latitude = torch.asin(scaled[:, 2].clamp(-1, 1))
    sphere_uv = (angle * half[:, 0], latitude * half[:, 0])

    is_box, is_cylinder = kind == BOX, kind == CYLINDER
    normal = torch.where(
        is_box[:, None], box_normal, torch.where(is_cylinder[:, None], cylinder_normal, scaled)
    )
    uv = [
        torch.where(is_box, box, torch.where(is_cylinder, tube, ball))
        for box, tube, ball in zip(box_uv, cylinder_uv, sphere_uv, strict=True)
    ]
    return normal, torch.stack(uv, 1)
