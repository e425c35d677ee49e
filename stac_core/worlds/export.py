"""Write one synthetic world as an image folder with its truth, as a rosbag2 recording, or as both.

    stac-world --folder room --frames 300
    stac-world --bag loop --seed 7 --kind rooms --frames 3000 --step_max 0.02

Everything appears under its final name only when it is complete. Needs no ROS: bags are written in
pure Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stac_core.command import status_of
from stac_core.config import PATCH_SIZE
from stac_core.device import choose_device
from stac_core.settings import add_flags, check_settings, read_flags, refuse, setting
from stac_core.worlds.config import WorldConfig, check_frame_size
from stac_core.worlds.export_bag import BagSettings, BagWriter
from stac_core.worlds.export_folder import FolderSettings, FolderWriter
from stac_core.worlds.recording import Camera, RecordedFrame
from stac_core.worlds.world import World


@dataclass(frozen=True)
class ExportConfig:
    """Which world, how much of it, and at what size and rate."""

    seed: int = setting(0, "seed of the world", minimum=0)
    frames: int = setting(300, "frames to write", minimum=2, maximum=100_000)
    height: int = setting(
        308, f"image height, a multiple of {PATCH_SIZE}", minimum=PATCH_SIZE, maximum=2044, unit="px"
    )
    width: int = setting(
        420, f"image width, a multiple of {PATCH_SIZE}", minimum=PATCH_SIZE, maximum=2044, unit="px"
    )
    rate: float = setting(15.0, "frames per second in the stamps", minimum=0.01, maximum=1000, unit="Hz")
    start: int = setting(
        1_000_000_000, "stamp of the first frame", minimum=1, maximum=4_000_000_000, unit="s"
    )
    device: str = setting("cpu", "where to render: cpu, or a torch device name such as cuda")

    def __post_init__(self) -> None:
        check_settings(self)
        check_frame_size(self.height, self.width)


def export_world(
    config: ExportConfig,
    world: WorldConfig,
    folder: tuple[Path, FolderSettings] | None = None,
    bag: tuple[Path, BagSettings] | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Render a world and write it to an image folder, a bag, or both.

    Raises:
        ValueError: nothing to write, a target that exists (without `overwrite`, or that is neither a
            world nor a bag), two that get in each other's way, or a path that ends before the last frame.
        OSError: a target cannot be written; nothing is left under its name.
    """
    _check_targets([target[0] for target in (folder, bag) if target is not None], overwrite)
    scene = World(config.seed, world, choose_device(config.device, "ExportConfig.device"))
    if world.path == "explore" and config.frames > scene.lap:
        why = f"the exploring path ends after {scene.lap} frames; add rooms or shorten the steps"
        raise refuse(config, "frames", why, scene.lap)
    matrix = scene.intrinsics(config.height, config.width).double().cpu().numpy()
    camera = Camera(config.width, config.height, matrix)
    title = f"synthetic world, seed {config.seed}: {_differences(world)}"
    with ExitStack() as stack:
        writers: list[Any] = []
        if folder is not None:
            partial = stack.enter_context(_complete_or_absent(folder[0].resolve()))
            writers.append(stack.enter_context(FolderWriter(partial, folder[1], camera, partial.name, title)))
        if bag is not None:
            partial = stack.enter_context(_complete_or_absent(bag[0].resolve()))
            writers.append(stack.enter_context(BagWriter(partial, bag[1], camera)))
        frames = _render(scene, config)
        for frame in tqdm(frames, total=config.frames, unit="frame", disable=not progress):
            for writer in writers:
                writer.write(frame)


def _render(scene: World, config: ExportConfig, chunk: int = 8) -> Iterator[RecordedFrame]:
    for first in range(0, config.frames, chunk):
        last = min(first + chunk, config.frames)
        batch = scene.render(first, last, config.height, config.width)
        images = (batch.images[0] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        depth = batch.depth[0].cpu().numpy()
        poses = batch.world_from_camera[0].double().cpu().numpy()
        for offset in range(last - first):
            index = first + offset
            stamp = config.start * 1_000_000_000 + round(index * 1e9 / config.rate)
            image = np.ascontiguousarray(images[offset])
            yield RecordedFrame(index, stamp, image, depth[offset], poses[offset])


def _check_targets(targets: list[Path], overwrite: bool) -> None:
    """ValueError where there is none, where one may not be replaced, or where both are in one place."""
    if not targets:
        raise ValueError("nothing to write: give a folder, a bag, or both")
    for target in targets:
        if target.exists() and not overwrite:
            raise ValueError(f"{target}: exists already; choose another name or add --overwrite")
        if target.exists() and not _replaceable(target):
            raise ValueError(f"{target}: is no world or bag, and stays; choose another name, or remove it")
    places = [target.resolve() for target in targets]
    if any(one == other or one in other.parents for one, other in permutations(places, 2)):
        raise ValueError("the folder and the bag would be written over each other: choose two places")


def _replaceable(target: Path) -> bool:
    """Whether it is what this command writes, or an empty folder."""
    written = any((target / name).is_file() for name in ("case.json", "metadata.yaml"))
    return target.is_dir() and (written or not any(target.iterdir()))


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its name at the end, or vanishes on any error."""
    workspace = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    try:
        yield workspace / target.name  # a bag names its file after its folder
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(workspace / target.name, target)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _differences(world: WorldConfig) -> str:
    changed = [
        f"{field.name}={getattr(world, field.name)}"
        for field in dataclasses.fields(world)
        if getattr(world, field.name) != field.default
    ]
    return " ".join(changed) or "default settings"


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="stac-world", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, metavar="PATH", help="write an image folder")
    parser.add_argument("--bag", type=Path, metavar="PATH", help="write a rosbag2 recording (MCAP)")
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    for section in (ExportConfig, WorldConfig, FolderSettings, BagSettings):
        group = parser.add_argument_group((section.__doc__ or "").splitlines()[0].rstrip("."))
        add_flags(group, section, separator="_")
    given = parser.parse_args(arguments)
    refusals, interrupted = (OSError, RuntimeError), "interrupted; nothing was kept"
    try:
        return status_of(parser.prog, lambda: _run(given), refusals, interrupted)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    export_world(
        read_flags(ExportConfig, given),
        read_flags(WorldConfig, given),
        (given.folder, read_flags(FolderSettings, given)) if given.folder else None,
        (given.bag, read_flags(BagSettings, given)) if given.bag else None,
        overwrite=given.overwrite,
        progress=True,
    )
    for path in (given.folder, given.bag):
        if path:
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
