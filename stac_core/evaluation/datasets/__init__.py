"""Open any supported source as a `Sequence`; one reader per file, one row per reader here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stac_core.evaluation.datasets import (
    bag,
    case_json,
    dtu,
    folder,
    kitti,
    nrgbd,
    scannet,
    seven_scenes,
    sintel,
    tum_rgbd,
    video,
    world,
)
from stac_core.evaluation.datasets.sequence import FileSequence, Frame, FrameFiles, Sequence, natural_key

__all__ = [
    "READERS",
    "FileSequence",
    "Frame",
    "FrameFiles",
    "Sequence",
    "absolute_source",
    "find_kind",
    "find_scenes",
    "open_sequence",
]


@dataclass(frozen=True)
class Reader:
    """How one kind of source is told from its files, and opened."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], Sequence]


READERS: dict[str, Reader] = {  # in the order in which an unnamed source is tried
    "case": Reader(case_json.recognises, case_json.read),
    "bag": Reader(bag.recognises, bag.read),
    "video": Reader(video.recognises, video.read),
    "tum": Reader(tum_rgbd.recognises, tum_rgbd.read),
    "bonn": Reader(tum_rgbd.recognises_bonn, tum_rgbd.read_bonn),
    "7scenes": Reader(seven_scenes.recognises, seven_scenes.read),
    "nrgbd": Reader(nrgbd.recognises, nrgbd.read),
    "dtu": Reader(dtu.recognises, dtu.read),
    "scannet": Reader(scannet.recognises, scannet.read),
    "sintel": Reader(sintel.recognises, sintel.read),
    "kitti": Reader(kitti.recognises, kitti.read),
    "images": Reader(folder.recognises, folder.read),
}


def open_sequence(
    source: Path | str, kind: str = "auto", bag_options: bag.BagOptions = bag.DEFAULTS
) -> Sequence:
    """Open one scene. kind: a key of READERS, or "auto" to tell it from the files.

    `world:SEED,...` names a synthetic world, anything else a path. A dataset's scene that holds
    nothing but `images/` opens as images under any kind. Raises ValueError or OSError naming the path
    and what was expected.
    """
    found = find_kind(source, kind)
    if found == "world":
        return world.read(str(source))
    path = _with_a_name(Path(source))
    return bag.read(path, bag_options) if found == "bag" else READERS[found].read(path)


def find_kind(source: Path | str, kind: str = "auto") -> str:
    """The key of READERS that opens a source, or "world". Raises as `open_sequence` does."""
    if world.recognises(str(source)):
        return "world"
    path = _with_a_name(Path(source))
    if kind != "auto" and kind not in READERS:
        raise ValueError(f"dataset {kind!r}: choose one of auto, {', '.join(READERS)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if kind != "auto" and (READERS[kind].recognises(path) or not folder.recognises(path)):
        return kind
    for name, reader in READERS.items():
        if reader.recognises(path):
            return name
    raise ValueError(f"{path}: no images in it, and none of the known layouts ({', '.join(READERS)})")


def absolute_source(source: Path | str) -> str:
    """The whole name of a source, which tells apart scenes whose folders are called alike."""
    return str(source) if world.recognises(str(source)) else str(Path(source).resolve())


def _with_a_name(path: Path) -> Path:
    """Scenes are called as their folders are; "." and ".." stand for folders that have names."""
    return path if path.name not in ("", "..") else path.resolve()


def find_scenes(root: Path, kind: str = "auto", depth: int = 3) -> list[Path]:
    """The scenes at or below root, in natural order; a scene is not searched for further scenes."""
    root = _with_a_name(root)
    kinds = READERS.values() if kind == "auto" else [READERS[kind], READERS["images"]]
    if any(reader.recognises(root) for reader in kinds):
        return [root]
    if depth == 0 or not root.is_dir():
        return []
    children = sorted(root.iterdir(), key=natural_key)
    return [scene for child in children for scene in find_scenes(child, kind, depth - 1)]
