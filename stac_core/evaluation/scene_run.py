"""Take one sequence through the network and keep what the measures need, on disk where it is large."""

from __future__ import annotations

import csv
import io
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stac_core.camera_path import CameraPath
from stac_core.config import Config
from stac_core.evaluation.datasets import Frame, Sequence
from stac_core.evaluation.results import MIB
from stac_core.evaluation.trajectory import Trajectory
from stac_core.files import write_whole
from stac_core.images import ImageGeometry
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.session import StreamSession

_MAPS = ("depth.npy", "confidence.npy")


@dataclass(frozen=True)
class SceneRun:
    """What is known of N frames at the end of their sequence, when closed loops have moved them."""

    indices: list[int]  # of the frames in the sequence
    trajectory: Trajectory
    camera_intrinsics: NDArray[np.float64]  # [N, 3, 3] of the camera image
    depth: NDArray[np.float32]  # [N, H, W] network pixels, on disk
    confidence: NDArray[np.float32]  # [N, H, W] network pixels, on disk
    geometry: ImageGeometry
    step_ms: NDArray[np.float64]  # [N] each frame's share of its step
    cache_bytes: NDArray[np.int64]  # [N] after the frame's step

    def camera_depth(self, index: int) -> NDArray[np.float32]:
        """Depth at the pixels of the camera image, 0 where the network did not see them."""
        return self.geometry.to_camera(torch.from_numpy(np.array(self.depth[index]))).numpy()

    def camera_confidence(self, index: int) -> NDArray[np.float32]:
        return self.geometry.to_camera(torch.from_numpy(np.array(self.confidence[index]))).numpy()

    def cost(self) -> dict[str, float]:
        """The cost columns of a result row."""
        steady = self.step_ms[len(self.step_ms) // 10 :]  # the first steps warm up
        return {
            "step_ms_median": float(np.median(steady)),
            "step_ms_p95": float(np.percentile(steady, 95)),
            "frames_per_second": float(1000 / steady.mean()),
            "cache_mib_max": float(self.cache_bytes.max() / MIB),
            "process_mib_max": peak_process_bytes() / MIB,
        }

    def write_frames_csv(self, path: Path) -> None:
        """Time and cache of every frame, for the plots over time."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["frame", "step_ms", "cache_bytes"])
        writer.writerows(zip(self.indices, self.step_ms.round(3), self.cache_bytes, strict=True))
        write_whole(path, text.getvalue())


def run_scene(
    sequence: Sequence,
    network: CausalVGGT,
    config: Config,
    folder: Path,
    stride: int = 1,
    on_frames: Callable[[int], Any] = lambda count: None,
) -> SceneRun:
    """Stream every stride-th frame; depth and confidence go to `folder` as .npy files.

    on_frames: called with the number of frames finished by each step. Raises ValueError for a stride
    or a sequence without frames, and whatever a damaged frame or the session raises.
    """
    forget_peak()
    indices = frame_indices(sequence, stride)
    session, path = StreamSession(network, config), CameraPath()
    maps: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    stamps: list[int] = []
    intrinsics, step_ms, cache_bytes = [], [], []
    for chunk in _chunks(indices, config.cache.frames_per_pass(len(indices))):
        frames = [sequence.frame(index) for index in chunk]
        started = time.perf_counter()
        prediction = session.step([frame.image for frame in frames], frames[0].intrinsics, to_host=True)
        elapsed_ms = 1000 * (time.perf_counter() - started)
        maps = maps or _create_maps(folder, (len(indices), *prediction.depth.shape[-2:]))
        done = len(stamps)
        for stored, new in zip(maps, (prediction.depth, prediction.depth_confidence), strict=True):
            stored[done : done + len(chunk)] = new.numpy()
        assert session.geometry is not None  # set by every step
        intrinsics.append(session.geometry.camera_intrinsics(prediction.intrinsics.double()).numpy())
        path.add(prediction)
        stamps += [frame.stamp_ns for frame in frames]
        step_ms += [elapsed_ms / len(chunk)] * len(chunk)
        cache_bytes += [session.stats().cache.bytes] * len(chunk)
        on_frames(len(chunk))
    assert maps is not None and session.geometry is not None
    for depth, scale in zip(maps[0], path.moves().scale, strict=True):
        if scale != 1:
            depth *= float(scale)
    return SceneRun(
        indices,
        Trajectory(np.array(stamps, np.int64), path.world_from_camera()),
        np.concatenate(intrinsics),
        *maps,
        session.geometry,
        np.array(step_ms),
        np.array(cache_bytes, np.int64),
    )


def frame_indices(sequence: Sequence, stride: int) -> list[int]:
    """Every stride-th frame. Raises ValueError for a stride below 1 or a sequence without frames."""
    if stride < 1:
        raise ValueError(f"stride = {stride}: must be at least 1")
    if not len(sequence):
        raise ValueError(f"{sequence.name}: no frames")
    return list(range(0, len(sequence), stride))


def true_frames(run: SceneRun, sequence: Sequence) -> Iterator[tuple[int, Frame]]:
    """Each frame of the run with its truth, read again: (number in the run, frame)."""
    for number, index in enumerate(run.indices):
        yield number, sequence.frame(index)


def peak_process_bytes() -> int:
    """Most memory this process held, ever or since `forget_peak`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Begin anew to tell the most memory that this process holds, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _create_maps(folder: Path, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    folder.mkdir(parents=True, exist_ok=True)
    depth, confidence = (_create_map(folder / name, shape) for name in _MAPS)
    return depth, confidence


def _create_map(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An array on disk. Raises OSError where there is no room for it.

    Without the room a write to it, being one to memory, would end the program.
    """
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            size = path.stat().st_size / MIB
            raise OSError(
                f"{path}: {error.strerror} for {size:.0f} MiB of depth and as many of confidence"
            ) from error
    return stored


def remove_maps(folder: Path) -> None:
    """Delete what `run_scene` keeps in a scene's folder, and the folder if nothing else is in it."""
    for name in _MAPS:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
