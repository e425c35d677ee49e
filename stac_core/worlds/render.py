"""Cast one ray per pixel, find the nearest surface, colour it.

Everything is element-wise over [frames, shapes, pixels]. Depth is exact: it is where the ray meets
the surface, not a rasterised or filtered value.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stac_core.worlds.rays import Rays, camera_rays
from stac_core.worlds.scene import Scene
from stac_core.worlds.shading import shade
from stac_core.worlds.shapes import GONE, Shapes, length, turn

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


def _cast(
    scene: Scene, worlds: Tensor, poses: Tensor, lenses: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """One pass: colours [F, 3, P] and depth [F, P]."""
    rays = camera_rays(worlds, poses, lenses, height, width)
    seen, distance, index = _nearest(scene, rays)
    colours = shade(scene, rays, seen, distance, index)
    return colours, torch.where(distance.isinf(), 0.0, distance)


def _nearest(scene: Scene, rays: Rays) -> tuple[list[Shapes], Tensor, Tensor]:
    """First hits: the shapes looked at, and distance and index into all of them, [F, P] each.

    The nearest shapes are looked at first, some at a time, until every ray has ended nearer than
    what is left: in a building of a hundred rooms, walls hide all but a few.
    """
    gap, visible = _in_view(scene, rays)
    distance = torch.full_like(rays.length, torch.inf)
    index = torch.zeros_like(distance, dtype=torch.int64)
    seen: list[Shapes] = []
    count, at_once = 0, min(_SHAPES_AT_ONCE, gap.shape[1])
    while True:
        nearest = torch.where(visible, gap, torch.inf).kthvalue(at_once, 1, keepdim=True).values
        sets = _keep_sets(scene, rays.worlds, visible & (gap <= nearest))
        if sets:
            hits, which = torch.cat(
                [shapes.intersect(rays.origin, rays.direction) for shapes in sets], 1
            ).min(1)
            index = torch.where(hits < distance, which + count, index)
            distance = torch.minimum(distance, hits)
            count += sum(shapes.count for shapes in sets)
            seen += sets
        reach = 1.001 * (distance * rays.length).amax(1, keepdim=True)  # a little more: gaps are rounded
        visible &= (gap > nearest) & (gap < reach)
        if not visible.any():
            return seen, distance, index


def _in_view(scene: Scene, rays: Rays) -> tuple[Tensor, Tensor]:
    """Least distance [F, N] of every shape, and whether it may be in view."""
    bounds = scene.bounds
    axes, exists = bounds.axes[rays.worlds], bounds.exists[rays.worlds]
    offset = bounds.centre[rays.worlds] - rays.origin[..., None]
    along = turn(rays.sides, axes.flatten(2)).unflatten(2, (3, -1)).abs().sum(2)
    gap = length(offset) - length(axes.flatten(1, 2))
    return gap, (turn(rays.sides, offset) + along > 0).all(1) & exists


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
    return replace(chosen, half=torch.where(visible.gather(1, order)[..., None], chosen.half, GONE))
