"""Command `stac-reconstruct`: an image folder or a video → point cloud, trajectory, depth maps, picture.

Frames are read, mapped and written one chunk at a time; only the thinned cloud and the poses stay. Where the
camera comes back and a loop is closed, they move to where that shows that they lie, and in the end depth maps
are scaled to the same lengths.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stac_core.camera_path import CameraPath
from stac_core.checkpoint import load_network
from stac_core.command import status_of
from stac_core.confidence import most_confident
from stac_core.config import Config
from stac_core.device import free_bytes
from stac_core.evaluation.datasets import FileSequence, Frame, Sequence, open_sequence
from stac_core.evaluation.flags import add_config_flags, configure, given_flags
from stac_core.evaluation.plots import cloud_from_above
from stac_core.evaluation.trajectory import Trajectory, write_tum
from stac_core.evaluation.visualise import save_figure
from stac_core.files import write_whole
from stac_core.geometry import VALID_DEPTH, unproject_pixels
from stac_core.images import ImageGeometry, ResizedImages
from stac_core.pipeline import OneBehind, one_ahead, with_next
from stac_core.ply import write_ply
from stac_core.prediction import Prediction
from stac_core.session import SessionStats, StreamSession
from stac_core.thinned_cloud import ThinnedCloud

DEPTH_PNG_UNITS = 1000  # per unit of the prediction, as RGB-D data sets store millimetres
POINTS_PER_FRAME = 20_000
RESULTS = ("stats.json", "cloud.ply", "trajectory.tum", "trajectory_reposed.tum", "report.png")
DEPTH_NAME = re.compile(r"\d{6,}\.png")
UNFINISHED = "unfinished"  # a file beside what a run has written so far
CELL = 0.01  # of the thinned cloud, in median depths of the first frame that has any


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = _parser().parse_args(arguments)
    return status_of("stac-reconstruct", lambda: _run(given), (ValueError, OSError, RuntimeError))


def _run(given: argparse.Namespace) -> int:
    config = configure(given_flags(given))
    _check(given, config)
    reconstruct(given, config)
    return 0


def reconstruct(given: argparse.Namespace, config: Config) -> None:
    """Map one source and write everything to the output folder; what breaks off is written up to there."""
    sequence = open_sequence(given.scene_dir)
    loaded = load_network(config.model, config.kernels)
    session = StreamSession(loaded.network, config)
    if given.resume:
        session.load(given.resume)
    output = Path(given.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(f"{sequence.name}: {loaded.weights}; cache {config.cache.mode}")
    result = Reconstruction(output, given.conf_percent)
    left = total = len(range(0, len(sequence), given.kf_every))
    about: dict[str, object] = {"source": sequence.name, "weights": loaded.weights}
    to_be_checked, best = not config.cache.rules.bounded, 0.0
    try:
        with (
            tqdm(total=total, unit="frame", disable=given.quiet) as progress,
            OneBehind() as behind,
        ):
            chunks = one_ahead(_chunks(sequence, given.kf_every, session))
            for (frames, images), following in with_next(chunks):
                upcoming = following[1] if following else None
                prediction = session.step(images, frames[0].intrinsics, to_host=True, upcoming=upcoming)
                best = max(best, float(prediction.depth_confidence.mean()))
                left -= len(frames)
                if to_be_checked and session.stats().cache.frames_seen:
                    to_be_checked = False
                    _check_that_all_fit(session.stats(), left, given.kf_every, loaded.device)
                behind.do(partial(result.add, frames, prediction, _geometry(session)))
                progress.update(len(frames))
                progress.set_postfix_str(f"cache {session.stats().cache.bytes / 2**20:.1f} MiB")
        _check_that_it_began(session, best)
        if given.save_stream:
            session.save(given.save_stream)
    finally:
        if len(result):
            result.write(_figures(session), {**about, "given": given_flags(given)})
    if config.cache.repose_frames:
        result.write_reposed(*session.repose(), session.stats().cache.frames_seen)


def _figures(session: StreamSession) -> SessionStats:
    """With merged tokens by how many they stand for, if what is still to be merged does not fail."""
    try:
        return session.stats(members=True)
    except RuntimeError as cause:
        print(f"stac-reconstruct: the last chunk is not merged: {cause}", file=sys.stderr)
        return session.stats()


class Reconstruction:
    """What a run leaves behind; its first frames take the place of what another run has left."""

    def __init__(self, output: Path, conf_percent: float) -> None:
        """conf_percent: share of each frame's points that is left out for low confidence."""
        self._output, self._conf_percent = output, conf_percent
        self._stamps: list[int] = []
        self._path = CameraPath()
        self._cloud = ThinnedCloud()

    def __len__(self) -> int:
        """Frames so far."""
        return len(self._path)

    def add(self, frames: list[Frame], prediction: Prediction, geometry: ImageGeometry) -> None:
        """Take one chunk in; depth maps, in the size of the images, go to files at once."""
        depth = geometry.to_camera(prediction.depth)
        confidence = geometry.to_camera(prediction.depth_confidence)
        if not len(self):
            self._make_room()
        cameras = geometry.camera_intrinsics(prediction.intrinsics), prediction.world_from_camera
        intrinsics, poses = (part.numpy() for part in cameras)
        for number, image in enumerate(depth, len(self)):
            _write_depth(self._depth_file(number), image)
        self._stamps += [frame.stamp_ns for frame in frames]
        self._path.add(prediction)
        if prediction.moved is not None:
            self._cloud.move(prediction.moved)
        for i, frame in enumerate(frames):
            valid = (depth[i] > VALID_DEPTH) & depth[i].isfinite()
            if not (bool(valid.any()) and np.isfinite(poses[i]).all()):
                continue
            self._cloud.cell = self._cloud.cell or CELL * float(depth[i][valid].median())
            chosen = _certain(valid.numpy(), confidence[i].numpy(), self._conf_percent)
            points = unproject_pixels(depth[i].numpy(), chosen, intrinsics[i], poses[i])
            self._cloud.add(prediction.submap, points, frame.image.reshape(-1, 3)[chosen])

    def write(self, stats: SessionStats, about: dict[str, object]) -> None:
        """cloud.ply, trajectory.tum, report.png and stats.json, each whole or not at all.

        stats.json comes last: once it is there, depth maps have the lengths of the others.
        """
        points, colours = self._cloud.points()
        path = _known(np.array(self._stamps, np.int64), self._path.world_from_camera())
        write_ply(self._output / "cloud.ply", points, colours)
        write_tum(self._output / "trajectory.tum", path)
        if len(points):
            figure = cloud_from_above(points, colours / 255.0, path, f"{len(self)} frames, from above")
            save_figure(self._output / "report.png", figure)
        for number, scale in enumerate(self._path.moves().scale):
            if scale != 1:
                _scale_depth(self._depth_file(number), float(scale))
        numbers = {**about, "depth_png_units": DEPTH_PNG_UNITS, "frames": len(self), "points": len(points)}
        write_whole(self._output / "stats.json", json.dumps({**numbers, "stats": asdict(stats)}, indent=1))
        (self._output / UNFINISHED).unlink(missing_ok=True)
        print(f"{len(self)} frames, {len(points)} points, cache {stats.cache.bytes} bytes → {self._output}")

    def _make_room(self) -> None:
        """Remove the files of another run, and no others: none may pass for one of this run."""
        (self._output / UNFINISHED).touch()
        (self._output / "depth").mkdir(exist_ok=True)
        for file in (*(self._output / name for name in RESULTS), *_depth_maps(self._output)):
            file.unlink(missing_ok=True)

    def _depth_file(self, number: int) -> Path:
        return self._output / "depth" / f"{number:06d}.png"

    def write_reposed(self, frames: Tensor, world_from_camera: Tensor, seen: int) -> None:
        """trajectory_reposed.tum: poses read again, of the frames [n] of this run.

        seen: frames of the stream, which may have begun before this run, or later in it.
        """
        place = frames.numpy() - seen + len(self._stamps)
        own = place >= 0
        stamps = np.array(self._stamps, np.int64)[place[own]]
        path = _known(stamps, world_from_camera.cpu().double().numpy()[own])
        write_tum(self._output / "trajectory_reposed.tum", path)


def _known(stamps: NDArray[np.int64], world_from_camera: NDArray[np.float64]) -> Trajectory:
    """Of the frames [N] those whose poses are numbers."""
    known = np.flatnonzero(np.isfinite(world_from_camera).all(axis=(1, 2)))
    return Trajectory(stamps, world_from_camera).take(known)


def _geometry(session: StreamSession) -> ImageGeometry:
    if session.geometry is None:
        raise RuntimeError("a session that has stepped knows the geometry of its images")
    return session.geometry


def _chunks(
    sequence: Sequence, every: int, session: StreamSession
) -> Iterator[tuple[list[Frame], ResizedImages]]:
    """Frames in the size of a pass, and their images as the session takes them."""
    chosen = range(0, len(sequence), every)
    frames, size = _frames(sequence, chosen), session.config.cache.frames_per_pass(len(chosen))
    while chunk := list(islice(frames, size)):
        yield chunk, session.prepare([frame.image for frame in chunk])


def _frames(sequence: Sequence, chosen: range) -> Iterator[Frame]:
    """Raises ValueError naming a frame that is not of the first one's size."""
    first: tuple[int, ...] = ()
    for index in chosen:
        frame = sequence.frame(index)
        shape = frame.image.shape
        first = first or shape
        if shape != first:
            raise ValueError(
                f"{_name(sequence, index)} is {shape[1]}×{shape[0]} pixels, those before it are "
                f"{first[1]}×{first[0]}: one stream has one size; leave it out, or resize it"
            )
        yield frame


def _name(sequence: Sequence, index: int) -> str:
    """Which frame, for people: its file where it has one of its own."""
    if isinstance(sequence, FileSequence):
        return str(sequence.frames[index].image)
    return f"frame {index} of {sequence.name}"


def _certain(valid: NDArray[np.bool_], confidence: NDArray[np.float32], left_out: float) -> NDArray[np.int64]:
    """Pixels of one frame worth a point: of the valid ones the confident, at most POINTS_PER_FRAME."""
    chosen = np.flatnonzero(most_confident(valid, confidence, left_out))
    return chosen[:: max(1, -(-len(chosen) // POINTS_PER_FRAME))]


def _write_depth(path: Path, depth: Tensor) -> None:
    """16-bit PNG, 0 = no depth."""
    units = (depth.nan_to_num(0, 0, 0) * DEPTH_PNG_UNITS).round().clamp(0, 2**16 - 1)
    encoded, data = cv2.imencode(".png", units.to(torch.int32).numpy().astype(np.uint16))
    if not encoded:
        raise OSError(f"{path}: the depth map could not be encoded")
    write_whole(path, data.tobytes())


def _scale_depth(path: Path, scale: float) -> None:
    """The same map in other lengths."""
    units = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if units is None:
        raise OSError(f"{path}: the depth map could not be read again")
    _write_depth(path, torch.from_numpy(units.astype(np.float32)) * (scale / DEPTH_PNG_UNITS))


def _check_that_all_fit(stats: SessionStats, frames: int, kf_every: int, device: torch.device) -> None:
    """ValueError after the stream's first chunk where a cache without limit will not hold `frames` more."""
    need, free = frames * stats.cache.live_bytes // stats.cache.frames_seen, free_bytes(device)
    if free is not None and need > free:
        raise ValueError(
            f"cache.mode keeps every frame: {frames} more need {need} bytes, {free} are free; nearest value "
            f"that works: --kf_every {kf_every * -(-need // max(1, free))}, or choose a mode with a limit"
        )


def _check_that_it_began(session: StreamSession, best: float) -> None:
    """ValueError where every chunk was refused; best: the highest mean confidence of one."""
    cache = session.config.cache
    if cache.first_confidence and not (session.stats().cache.frames_seen or cache.rules.offline):
        raise ValueError(
            f"no chunk reaches cache.first_confidence = {cache.first_confidence}: the stream never began, "
            "and what was written lies in a frame of its own for each chunk; nearest value that works: "
            f"{math.floor(1000 * best) / 1000}"
        )


def _check(given: argparse.Namespace, config: Config) -> None:
    """Refuse what contradicts itself before any work is done."""
    if given.kf_every < 1:
        raise ValueError(f"--kf_every {given.kf_every}: below the minimum; nearest value that works: 1")
    if not 0 <= given.conf_percent < 100:
        raise ValueError(f"--conf_percent {given.conf_percent}: must lie in [0, 100); 50 is the default")
    output = Path(given.output_dir)
    if output.resolve() == Path(given.scene_dir).resolve():
        raise ValueError(f"--output_dir {output}: is the source itself; choose a folder beside it")
    if _depth_maps(output) and not any((output / name).is_file() for name in ("stats.json", UNFINISHED)):
        raise ValueError(
            f"--output_dir {output}: the numbered images in its folder depth/ are of no run of this command; "
            "choose another folder"
        )
    offline = config.cache.rules.offline
    if given.streaming and offline:
        raise ValueError(
            f"--streaming: mode {config.cache.mode!r} sees the whole sequence; choose a streaming mode"
        )
    if offline and (given.save_stream or given.resume):
        raise ValueError(
            f"--save_stream, --resume: mode {config.cache.mode!r} remembers nothing; choose another"
        )


def _depth_maps(output: Path) -> list[Path]:
    """Files in a folder of results that are named like depth maps."""
    return [file for file in (output / "depth").glob("*.png") if DEPTH_NAME.fullmatch(file.name)]


def _parser() -> argparse.ArgumentParser:
    usage = "%(prog)s --scene_dir SCENE_DIR --output_dir OUTPUT_DIR [--help] [settings]"  # there are 70
    parser = argparse.ArgumentParser("stac-reconstruct", usage, description=__doc__)
    parser.add_argument("--scene_dir", required=True, help="image folder, video, or any supported data set")
    parser.add_argument("--output_dir", required=True, help="folder for the results, made where missing")
    parser.add_argument("--kf_every", type=int, default=1, help="use every n-th frame")
    parser.add_argument("--streaming", action="store_true", help="insist on a mode that sees no future")
    parser.add_argument(
        "--conf_percent", type=float, default=50.0, help="least confident points left out, in percent"
    )
    parser.add_argument("--save_stream", default="", help="write the stream's memory to this file at the end")
    parser.add_argument("--resume", default="", help="go on with the stream saved in this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_config_flags(parser)
    for other_name, setting in (("--pinned", "cache.pinned_frames"), ("--voxel_backend", "kernels.backend")):
        parser.add_argument(other_name, dest=setting, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
