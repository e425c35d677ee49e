"""uint8 frames → network pixels, and the way back to the camera's own pixels; the only resize.

Two published rules exist and give different heights for one camera, so a stream keeps to one. Both are
defined by Pillow's 8-bit filters. Source: demo and evaluation scripts of STream3R and StreamVGGT.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stac_core.config import PATCH_SIZE, ImageConfig
from stac_core.device import host_buffer, send

SQUARE_SIZE = 224  # at this size the evaluation rule makes squares
THREADS = min(4, os.cpu_count() or 1)  # for the images of one chunk
Bicubic, Lanczos = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
Step = tuple[int, int, Image.Resampling]  # resize to width, height with a filter


@dataclass(frozen=True)
class ImageGeometry:
    """Where the camera image lies in the network image.

    A camera pixel (u, v), its centre at integers, appears at u · scale_x + offset_x and likewise v. Outside
    the camera image the network image is padding; what it does not show of the camera image is invalid.
    """

    camera_size: tuple[int, int]  # height, width
    network_size: tuple[int, int]  # height, width
    scale: tuple[float, float]  # x, y: network pixels per camera pixel
    corner: tuple[float, float]  # x, y: the camera image's top left corner in the network image

    @property
    def offset(self) -> tuple[float, float]:
        """Position (x, y) of the centre of camera pixel (0, 0)."""
        x, y = (c + s / 2 - 0.5 for c, s in zip(self.corner, self.scale, strict=True))
        return x, y

    def camera_intrinsics(self, intrinsics: Tensor) -> Tensor:
        """Intrinsics [..., 3, 3] of the network image → of the camera image."""
        return torch.linalg.inv(self._network_from_camera).to(intrinsics) @ intrinsics

    def network_intrinsics(self, intrinsics: Tensor) -> Tensor:
        """Intrinsics [..., 3, 3] of the camera image → of the network image."""
        return self._network_from_camera.to(intrinsics) @ intrinsics

    def to_camera(self, values: Tensor) -> Tensor:
        """Depth or confidence [..., H, W] of the network image → [..., height, width] of the camera image.

        Nearest pixel, because a mean across an edge is a surface that does not exist. 0 = invalid, where
        the network image does not show the camera image. ValueError for another size.
        """
        if tuple(values.shape[-2:]) != self.network_size:
            raise ValueError(f"values are {list(values.shape[-2:])}, the network image {self.network_size}")
        rows, columns = (index.to(values.device) for index in self._nearest)
        bordered = F.pad(values, (0, 1, 0, 1))  # one row and column of zeros, for what is not shown
        return bordered.index_select(-2, rows).index_select(-1, columns)

    @cached_property
    def camera_pixels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The camera row nearest to each network row [H], and likewise for columns [W]."""
        rows, columns = (
            np.rint((np.arange(length) - offset) / scale).astype(np.int64).clip(0, size - 1)
            for size, length, scale, offset in self._axes
        )
        return rows, columns

    @cached_property
    def shown(self) -> Tensor:
        """Network pixels that show the camera image, not padding: bool [H, W]."""
        columns, rows = (
            (torch.arange(size) + 0.5 > corner) & (torch.arange(size) + 0.5 < corner + scale * camera)
            for size, corner, scale, camera in zip(
                self.network_size[::-1], self.corner, self.scale, self.camera_size[::-1], strict=True
            )
        )
        return rows[:, None] & columns

    @property
    def _axes(self) -> Iterator[tuple[int, int, float, float]]:
        """Of y, then of x: camera size, network size, scale and offset."""
        return zip(self.camera_size, self.network_size, self.scale[::-1], self.offset[::-1], strict=True)

    @cached_property
    def _network_from_camera(self) -> Tensor:
        (scale_x, scale_y), (x, y) = self.scale, self.offset
        return torch.tensor([[scale_x, 0, x], [0, scale_y, y], [0, 0, 1]], dtype=torch.float64)

    @cached_property
    def _nearest(self) -> list[Tensor]:
        """The network row of each camera row, and likewise for columns; one past the end = not shown."""
        found = []
        for size, length, scale, offset in self._axes:
            index = (scale * torch.arange(size, dtype=torch.float64) + offset).round().long()
            found.append(index.where((index >= 0) & (index < length), length))
        return found


@dataclass(frozen=True)
class ResizePlan:
    """What happens to every image of one camera: resize step by step, then cut or pad to the window."""

    height: int  # of the network image
    width: int
    left: int  # of the network image in the resized image; negative = padding
    top: int
    steps: tuple[Step, ...]

    def changes(self, image: np.ndarray) -> bool:
        """Whether pixels become others, rather than only being cut or padded."""
        return image.shape[2] != 3 or any(step[:2] != image.shape[1::-1] for step in self.steps)

    def write(self, image: np.ndarray, window: np.ndarray) -> None:
        """An image [height, width, 3 or 4] as the network sees it, into window [height, width, 3]."""
        if self.changes(image):
            resized = _to_rgb(image)
            for width, height, resampling in self.steps:
                resized = resized.resize((width, height), resampling)
            image = np.asarray(resized)
        source = image[max(self.top, 0) :, max(self.left, 0) :][: self.height, : self.width]
        if source.shape != window.shape:
            window.fill(255)
        window[max(-self.top, 0) :, max(-self.left, 0) :][: len(source), : source.shape[1]] = source

    def geometry(self, camera_height: int, camera_width: int) -> ImageGeometry:
        width, height, _ = self.steps[-1]
        return ImageGeometry(
            camera_size=(camera_height, camera_width),
            network_size=(self.height, self.width),
            scale=(width / camera_width, height / camera_height),
            corner=(float(-self.left), float(-self.top)),
        )


@dataclass(frozen=True)
class ResizedImages:
    """Frames of one camera in the size that the network wants, on the host still."""

    frames: Tensor  # uint8 [S, H, W, 3]
    geometry: ImageGeometry

    def pixels(self, device: torch.device) -> Tensor:
        """[S, 3, H, W] float32 in [0, 1], on the device."""
        channels_first = send(self.frames, device).permute(0, 3, 1, 2)  # bytes travel
        return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def prepare_images(
    images: Sequence[np.ndarray], config: ImageConfig, trained_size: int, device: torch.device
) -> tuple[Tensor, ImageGeometry]:
    """Frames of one camera → pixels [S, 3, H, W] float32 in [0, 1] on the device, and the way back.

    images, trained_size: as for `resize_images`.
    """
    resized = resize_images(images, config, trained_size, device)
    return resized.pixels(device), resized.geometry


def resize_images(
    images: Sequence[np.ndarray], config: ImageConfig, trained_size: int, bound_for: torch.device
) -> ResizedImages:
    """Frames of one camera in the size that the network wants.

    images: uint8 [height, width, 3] RGB, or 4 channels whose transparency shows white; all of one size.
    trained_size: the width in use where config.size is 0. ValueError names what is wrong with which frame.
    bound_for: where the caller sends them at once, if to a GPU.
    """
    height, width = _check_images(images)
    plan, geometry = _prepared_for(height, width, config, trained_size)
    frames = host_buffer((len(images), plan.height, plan.width, 3), torch.uint8, bound_for)
    _write_all(plan, images, frames.numpy())
    return ResizedImages(frames, geometry)


def _write_all(plan: ResizePlan, images: Sequence[np.ndarray], windows: np.ndarray) -> None:
    """Every image into its window; several at once where they are resized, which lets other threads run."""
    threads = min(len(images), THREADS) if any(map(plan.changes, images)) else 1

    def write_share(first: int) -> None:
        for image, window in zip(images[first::threads], windows[first::threads], strict=True):
            plan.write(image, window)

    with ThreadPoolExecutor(threads) as pool:
        others = pool.map(write_share, range(1, threads))
        write_share(0)
        list(others)  # raises what they have raised


@lru_cache(maxsize=8)
def _prepared_for(
    height: int, width: int, config: ImageConfig, trained_size: int
) -> tuple[ResizePlan, ImageGeometry]:
    """Plan and geometry of a camera, made once: a geometry keeps tables of its own."""
    plan = plan_resize(height, width, config, trained_size)
    return plan, plan.geometry(height, width)


def plan_resize(height: int, width: int, config: ImageConfig, trained_size: int) -> ResizePlan:
    """How images of height × width reach the network; ValueError if they are too narrow for one patch."""
    size = config.size or trained_size
    if config.rule.startswith("evaluation"):
        plan = _plan_evaluation(height, width, size, cut=config.rule == "evaluation_crop")
    else:
        plan = _plan_pad(height, width, size) if config.rule == "pad" else _plan_crop(height, width, size)
    if min(plan.height, plan.width, *plan.steps[-1][:2]) < PATCH_SIZE:
        raise ValueError(
            f"images of {width}×{height} pixels become less than one patch of {PATCH_SIZE} pixels at network "
            f"width {size}: crop them to a less extreme shape, or raise image.size"
        )
    return plan


def _plan_crop(height: int, width: int, size: int) -> ResizePlan:
    """The demos' rule: fit the width, then cut a tall image to a square in the middle."""
    fitted = _whole_patches(height * (size / width))
    top = max(0, (fitted - size) // 2)
    return ResizePlan(min(fitted, size), size, 0, top, ((size, fitted, Bicubic),))


def _plan_pad(height: int, width: int, size: int) -> ResizePlan:
    """Fit the longer side, pad the shorter one to a square in white."""
    fitted_width = size if width >= height else _whole_patches(width * (size / height))
    fitted_height = size if height > width else _whole_patches(height * (size / width))
    left, top = (size - fitted_width) // 2, (size - fitted_height) // 2
    return ResizePlan(size, size, -left, -top, ((fitted_width, fitted_height, Bicubic),))


def _plan_evaluation(height: int, width: int, size: int, cut: bool) -> ResizePlan:
    """The evaluation scripts' rule: fit the longer side, then reach whole patches by a second resize, or
    by a cut. A square has no published result here and follows the demos' rule."""
    longer = round(size * max(width / height, height / width)) if size == SQUARE_SIZE else size
    fitted_width, fitted_height = (round(side * longer / max(width, height)) for side in (width, height))
    resize: Step = (fitted_width, fitted_height, Lanczos if max(width, height) > longer else Bicubic)
    if size == SQUARE_SIZE:
        half_width = half_height = min(fitted_width // 2, fitted_height // 2)
    elif fitted_width == fitted_height:
        return _plan_crop(height, width, size // PATCH_SIZE * PATCH_SIZE)
    else:
        half_width, half_height = (side // 2 * 2 // PATCH_SIZE * (PATCH_SIZE // 2) for side in resize[:2])
    if not cut:
        second: Step = (2 * half_width, 2 * half_height, Lanczos)
        return ResizePlan(2 * half_height, 2 * half_width, 0, 0, (resize, second))
    left, top = fitted_width // 2 - half_width, fitted_height // 2 - half_height
    return ResizePlan(2 * half_height, 2 * half_width, left, top, (resize,))


def _whole_patches(length: float) -> int:
    return round(length / PATCH_SIZE) * PATCH_SIZE


def _to_rgb(image: np.ndarray) -> Image.Image:
    if image.shape[2] == 3:
        return Image.fromarray(image)
    see_through = Image.fromarray(image)
    return Image.alpha_composite(Image.new("RGBA", see_through.size, "white"), see_through).convert("RGB")


def _check_images(images: Sequence[np.ndarray]) -> tuple[int, int]:
    """Height and width of all images."""
    if len(images) == 0:
        raise ValueError("images is empty: give at least one frame")
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = getattr(image, "dtype", type(image).__name__)
            raise ValueError(f"images[{index}] is {kind}: expected a numpy array of uint8, values 0 to 255")
        if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
            raise ValueError(
                f"images[{index}] has shape {list(image.shape)}: expected [height, width, 3] in RGB order"
            )
        if image.shape[:2] != images[0].shape[:2]:
            raise ValueError(
                f"images[{index}] is {image.shape[1]}×{image.shape[0]} pixels, images[0] is "
                f"{images[0].shape[1]}×{images[0].shape[0]}: one stream has one size, reset it to change"
            )
    return images[0].shape[0], images[0].shape[1]
