"""A folder of images, or a scene `<dataset>/<scene>/images/`: no truth beyond the pictures."""

from __future__ import annotations

from pathlib import Path

from stac_core.evaluation.datasets.sequence import (
    FRAME_PERIOD_NS,
    FileSequence,
    FrameFiles,
    is_image,
    list_images,
)


def recognises(path: Path) -> bool:
    folder = _image_folder(path)
    return folder.is_dir() and any(map(is_image, folder.iterdir()))


def read(path: Path) -> FileSequence:
    """Images in natural order, stamped at 30 frames/s."""
    images = list_images(_image_folder(path))
    frames = [FrameFiles(image, index * FRAME_PERIOD_NS) for index, image in enumerate(images)]
    return FileSequence(path.name, frames)


def _image_folder(path: Path) -> Path:
    return path / "images" if (path / "images").is_dir() else path
