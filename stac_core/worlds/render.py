"""Cast one ray per pixel, find the nearest surface, colour it.

Everything is element-wise over [frames, shapes, pixels]. Depth is exact: it is the ray parameter
of the hit, because rays are not normalised but have length one along the optical axis. Pixel
column u is the ray through x = (u − cx)/fx, as in the networks' own unprojection.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stac_core.worlds.scene import Scene
from stac_core.worlds.shapes import Shapes, face_of, length, turn
from stac_core.worlds.surface import SURFACE_SIZE, Surface, albedo

_SHAPES_AT_ONCE = 64  # looked at in one go
_RAYS_PER_PASS = {"cpu": 20_000, "cuda": 1 << 21}  # bounds working memory; on a CPU it fits the cache


def render(
    scene: Scene, world_from_camera: Tensor, intrinsics: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Images and depth of B worlds seen by S cameras each.

    Args:
        world_from_camera: [B, S, 4, 4] OpenCV cameras (x right, y down, z forward).
        intrinsics: [B, S, 3, 3] in pixels.

    Returns:
        Images [B, S, 3, height, width] in [0, 1] and z-depth [B, S, height, width] in metres,
        0 where nothing is hit.
    """
    batch, frames = world_from_camera.shape[:2]
    device = world_from_camera.device
    poses, lenses = world_from_camera.flatten(0, 1), intrinsics.flatten(0, 1)
    worlds = torch.arange(batch, device=device).repeat_interleave(frames)
    per_pass = max(1, _RAYS_PER_PASS.get(device.type, 1 << 20) // (height * width))
    images = torch.empty(len(poses), 3, height * width, device=device)
    depth = torch.empty(len(poses), height * width, device=device)
    for start in range(0, len(poses), per_pass):
        part = slice(start, start + per_pass)
        images[part], depth[part] = _cast(scene, worlds[part], poses[part], lenses[part], height, width)
    return images.view(batch, frames, 3, height, width), depth.view(batch, frames, height, width)


def camera_rays(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Directions [F, 3, H·W] in camera axes with z = 1, for intrinsics [F, 3, 3]."""
    u = torch.arange(width, device=intrinsics.device, dtype=intrinsics.dtype)
    v = torch.arange(height, device=intrinsics.device, dtype=intrinsics.dtype)
    x = (u - intrinsics[:, 0, 2, None]) / intrinsics[:, 0, 0, None]
    y = (v - intrinsics[:, 1, 2, None]) / intrinsics[:, 1, 1, None]
    grid_x = x[:, None, :].expand(-1, height, -1)
    grid_y = y[:, :, None].expand(-1, -1, width)
    return torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], 1).flatten(2)


def _cast(
    scene: Scene, worlds: Tensor, poses: Tensor, lenses: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """One pass: colours [F, 3, P] and depth [F, P]."""
    rotation, origin = poses[:, :3, :3], poses[:, :3, 3]
    direction = turn(rotation, camera_rays(lenses, height, width))
    seen, distance, index = _nearest(
        scene, worlds, origin, direction, _frustum(rotation, lenses, height, width)
    )
    missed = distance.isinf()
    depth = torch.where(missed, 0.0, distance)
    colours = _shade(scene, worlds, seen, origin, direction, depth, index, missed, 1 / lenses[:, 0, 0, None])
    return colours, depth


def _frustum(rotation: Tensor, lenses: Tensor, height: int, width: int) -> Tensor:
    """Inward normals [F, 5, 3] in world axes of the four sides of the view and of its front."""
    fx, fy, cx, cy = lenses[:, 0, 0], lenses[:, 1, 1], lenses[:, 0, 2], lenses[:, 1, 2]
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    left, right = -cx / fx, (width - 1 - cx) / fx
    top, bottom = -cy / fy, (height - 1 - cy) / fy
    normals = torch.stack(
        [
            torch.stack([one, zero, -left], -1),
            torch.stack([-one, zero, right], -1),
            torch.stack([zero, one, -top], -1),
            torch.stack([zero, -one, bottom], -1),
            torch.stack([zero, zero, one], -1),
        ],
        1,
    )
    return turn(rotation, normals.transpose(1, 2)).transpose(1, 2)


def _nearest(
    scene: Scene, worlds: Tensor, origin: Tensor, direction: Tensor, sides: Tensor
) -> tuple[list[Shapes], Tensor, Tensor]:
    """First hits: the shapes looked at, and distance and index into all of them, [F, P] each.

    The nearest shapes are looked at first, some at a time, until every ray has ended nearer than
    what is left: in a building of a hundred rooms, walls hide all but a few.
    """
    gap, visible = _in_view(scene, worlds, origin, sides)
    ray_length = length(direction)
    distance = torch.full_like(ray_length, torch.inf)
    index = torch.zeros_like(distance, dtype=torch.int64)
    seen: list[Shapes] = []
    count, at_once = 0, min(_SHAPES_AT_ONCE, gap.shape[1])
    while True:
        nearest = torch.where(visible, gap, torch.inf).kthvalue(at_once, 1, keepdim=True).values
        sets = _keep_sets(scene, worlds, visible & (gap <= nearest))
        if sets:
            hits, which = torch.cat([shapes.intersect(origin, direction) for shapes in sets], 1).min(1)
            index = torch.where(hits < distance, which + count, index)
            distance = torch.minimum(distance, hits)
            count += sum(shapes.count for shapes in sets)
            seen += sets
        reach = 1.001 * (distance * ray_length).amax(1, keepdim=True)  # a little more: gaps are rounded
        visible &= (gap > nearest) & (gap < reach)
        if not visible.any():
            return seen, distance, index


def _in_view(scene: Scene, worlds: Tensor, origin: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Least distance [F, N] of every shape, and whether it may be in view."""
    bounds = scene.bounds
    axes, exists = bounds.axes[worlds], bounds.exists[worlds]
    offset = bounds.centre[worlds] - origin[..., None]
    along = turn(sides, axes.flatten(2)).view(*sides.shape[:2], 3, -1).abs().sum(2)
    gap = length(offset) - length(axes.flatten(1, 2))
    return gap, (turn(sides, offset) + along > 0).all(1) & exists


def _keep_sets(scene: Scene, worlds: Tensor, visible: Tensor) -> list[Shapes]:
    """The visible shapes of every set; sets without any are left out."""
    parts = visible.split([shapes.count for shapes in scene.shapes], 1)
    most = torch.stack([part.sum(1).max() for part in parts]).tolist()
    return [
        _keep(shapes, worlds, part, count)
        for shapes, part, count in zip(scene.shapes, parts, most, strict=True)
        if count
    ]


def _keep(shapes: Shapes, worlds: Tensor, visible: Tensor, count: int) -> Shapes:
    """The `count` foremost visible shapes of each camera, the others made to vanish.

    What only a neighbour in the pass sees must not appear: a frame does not depend on the others.
    """
    order = visible.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = shapes.select(worlds, order)
    return replace(chosen, half=torch.where(visible.gather(1, order)[..., None], chosen.half, -1.0))


def _shade(
    scene: Scene,
    worlds: Tensor,
    seen: list[Shapes],
    origin: Tensor,
    direction: Tensor,
    depth: Tensor,
    index: Tensor,
    missed: Tensor,
    pixel: Tensor,
) -> Tensor:
    """Colours [F, 3, P] of the hits, and of the sky where there are none."""
    frames, _, pixels = direction.shape
    table = _table(scene, worlds, seen)
    index = torch.where(missed, table.shape[2] - 1, index)
    rows = table.gather(2, index[:, None].expand(-1, table.shape[1], -1))
    kind, centre, half, rotation, surface = rows.split([1, 3, 3, 9, SURFACE_SIZE], 1)
    point = origin[..., None] + direction * depth[:, None]
    rotation = rotation.view(frames, 3, 3, pixels)
    local = (rotation * point[:, :, None]).sum(1) - centre
    local_normal, uv = face_of(kind[:, 0], local, half)
    normal = (rotation * local_normal[:, None]).sum(2)
    ray_length = length(direction)
    facing = (-(normal * direction).sum(1) / ray_length).clamp(min=0)
    footprint = depth * pixel / facing.clamp(min=0.1).sqrt()
    climb = direction[:, 2].abs() / ray_length + 0.15
    uv = torch.where(missed[:, None], direction[:, :2] / (ray_length * climb)[:, None], uv)
    footprint = torch.where(missed, pixel, footprint).clamp(min=1e-5)
    surfaces = Surface(surface)
    colour = albedo(surfaces, uv, footprint)
    light, shine = _light(scene, worlds, point, normal, direction / ray_length[:, None])
    lit = colour * light + surfaces["gloss"][:, None] * shine[:, None]
    exposed = 1 - torch.exp(-1.3 * lit)  # bright surfaces saturate gently, as on film
    return torch.where(missed[:, None], colour, exposed).clamp_(0, 1)


def _table(scene: Scene, worlds: Tensor, seen: list[Shapes]) -> Tensor:
    """What shading needs of every shape, [F, columns, N + 1]; the last is the sky."""
    parts = []
    for shapes in seen:
        frames, count = shapes.centre.shape[:2]
        kind = torch.full((frames, count, 1), float(shapes.kind), device=worlds.device)
        rotation = shapes.rotation.flatten(1)[:, None].expand(-1, count, -1)
        parts.append(torch.cat([kind, shapes.centre, shapes.half, rotation, shapes.surface], -1))
    sky = scene.sky[worlds]
    parts.append(torch.cat([torch.ones_like(sky[..., :16]), sky], -1))
    return torch.cat(parts, 1).transpose(1, 2).contiguous()


def _light(scene: Scene, worlds: Tensor, point: Tensor, normal: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Light that arrives [F, 3, P] and its mirror reflection [F, P]."""
    outdoor = scene.outdoor[worlds][:, None]
    room = scene.room[worlds][..., None]  # [F, 3, 1]
    middle = (point[:, :2] / room[:, :2]).round() * room[:, :2]
    within = torch.cat([point[:, :2] - middle, point[:, 2:]], 1)
    to_lamp = scene.lamp[worlds][..., None] - within
    distance = length(to_lamp).clamp(min=0.05)
    reach = room[:, :2].mean(1)
    fall = 1 / (0.7 + (distance / reach).square())
    toward = torch.where(outdoor[:, None], scene.sun[worlds][..., None], to_lamp / distance[:, None])
    strength = scene.power[worlds][:, None] * torch.where(outdoor, 1.0, fall)
    lambert = (normal * toward).sum(1).clamp(min=0)
    corner = torch.where(outdoor, 1.0, _corner_shade(within, room, normal))
    ambient = scene.ambient[worlds][:, None] * (1 + 0.15 * normal[:, 2]) * corner
    mirrored = ray - 2 * (normal * ray).sum(1, keepdim=True) * normal
    shine = strength * (mirrored * toward).sum(1).clamp(min=0).pow(24)
    return (ambient + strength * lambert)[:, None] * scene.tint[worlds][..., None], shine


def _corner_shade(within: Tensor, room: Tensor, normal: Tensor) -> Tensor:
    """Less light reaches the corners of a room; a surface does not shade itself."""
    wall_x = (0.5 * room[:, 0] - within[:, 0].abs()) + 9 * normal[:, 0].abs()
    wall_y = (0.5 * room[:, 1] - within[:, 1].abs()) + 9 * normal[:, 1].abs()
    ground = torch.minimum(within[:, 2], room[:, 2] - within[:, 2]) + 9 * normal[:, 2].abs()
    shade = torch.ones_like(wall_x)
    for gap in (wall_x, wall_y, ground):
        shade = shade * (1 - 0.35 * torch.exp(-gap.clamp(min=0) / 0.3))
    return shade
