"""Colour of what the rays hit: surface, light of lamps or sun, darker corners, mirror shine."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.worlds.rays import Rays
from stac_core.worlds.scene import Scene
from stac_core.worlds.shapes import Shapes, face_of, length
from stac_core.worlds.surface import SURFACE_SIZE, Surface, albedo


def shade(scene: Scene, rays: Rays, seen: list[Shapes], distance: Tensor, index: Tensor) -> Tensor:
    """Colours [F, 3, P] of the hits, and of the sky where there are none.

    Args:
        seen: the shapes that `index` [F, P] counts through.
        distance: [F, P] of the hits along the rays, infinite where nothing is hit.
    """
    missed = distance.isinf()
    depth = torch.where(missed, 0.0, distance)
    table = _table(scene, rays.worlds, seen)
    index = torch.where(missed, table.shape[2] - 1, index)
    rows = table.gather(2, index[:, None].expand(-1, table.shape[1], -1))
    kind, centre, half, rotation, columns = rows.split([1, 3, 3, 9, SURFACE_SIZE], 1)
    rotation = rotation.unflatten(1, (3, 3))
    point = rays.origin[..., None] + rays.direction * depth[:, None]
    local = (rotation * point[:, :, None]).sum(1) - centre
    local_normal, uv = face_of(kind[:, 0], local, half)
    normal = (rotation * local_normal[:, None]).sum(2)
    ray = rays.direction / rays.length[:, None]
    uv = torch.where(missed[:, None], _dome(ray), uv)
    facing = (-(normal * ray).sum(1)).clamp(min=0.1)
    footprint = torch.where(missed, rays.pixel, depth * rays.pixel / facing.sqrt()).clamp(min=1e-5)
    surface = Surface(columns)
    colour = albedo(surface, uv, footprint)
    light, shine = _light(scene, rays.worlds, point, normal, ray)
    lit = colour * light + surface["gloss"][:, None] * shine[:, None]
    exposed = 1 - torch.exp(-1.3 * lit)  # bright surfaces saturate gently, as on film
    return torch.where(missed[:, None], colour, exposed).clamp_(0, 1)


def _dome(ray: Tensor) -> Tensor:
    """Coordinates [F, 2, P] of the sky in a direction: a flat layer of clouds, bent at the horizon."""
    return ray[:, :2] / (ray[:, 2:].abs() + 0.15)


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
