"""Command: what every cache mode and every switch of the cache costs in quality.

    python -m stac_core.evaluation.cache_quality                           # every row, 4 rooms of 300 frames
    python -m stac_core.evaluation.cache_quality --rows causal stac --worlds 1

A camera walks a loop in synthetic rooms, so that the second lap shows what the first one has seen and the
window has forgotten. Every run is held against the truth and against the run of `causal`, which keeps
everything: a weak network is far from the truth in every mode, but what compression loses shows all the
same. Rows are written as they finish, and a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from stac_core.checkpoint import LoadedNetwork, load_network
from stac_core.command import status_of
from stac_core.config import CacheConfig, Config, ModelConfig, SubmapConfig, TrackingConfig
from stac_core.evaluation.cache_quality_table import tables
from stac_core.evaluation.cache_rows import PLAIN, ROWS, Row
from stac_core.evaluation.loop_world import LoopWorld, loop_seeds
from stac_core.evaluation.results import ResultTable
from stac_core.evaluation.results import Row as Result
from stac_core.evaluation.scene_run import SceneRun, run_scene
from stac_core.evaluation.score import ReconOptions, score_depth, score_pose, score_recon
from stac_core.evaluation.trajectory_metrics import rotation_angles
from stac_core.files import replacing, write_whole
from stac_core.geometry import unproject_depth
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.worlds.config import check_count

SIZE = (126, 168)  # height and width in pixels that the bundled network was trained at
CLOUD = ReconOptions(voxel_size=0.05, threshold=0.1, icp_distance=0.0)  # pixels correspond: no registration
PIXEL_STRIDE = 7  # of the pixels whose points are compared


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a network said about N frames."""

    depth: NDArray[np.float32]  # [N, H, W]
    world_from_camera: NDArray[np.float64]  # [N, 4, 4]
    intrinsics: NDArray[np.float64]  # [N, 3, 3]
    tokens: NDArray[np.float16]  # [N, P, C] of the last layer, before any head

    def save(self, path: Path) -> None:
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Outputs:
        with np.load(path) as stored:
            return cls(**stored)

    def points(self) -> NDArray[np.float64]:
        """Every seventh pixel's point [N, n, 3] in the stream's world."""
        arrays = (self.depth, self.intrinsics, self.world_from_camera)
        points = unproject_depth(*(torch.from_numpy(np.asarray(a, np.float64)) for a in arrays))[
            :, ::PIXEL_STRIDE, ::PIXEL_STRIDE
        ]
        return points.flatten(1, 2).numpy()


def distances(ours: Outputs, reference: Outputs, lap: int) -> dict[str, float]:
    """How far two runs of one network over one scene are apart, over all frames and from `lap` on.

    Tokens by the norm of the difference and depth by its size, both relative to the reference's; turns in
    degrees; camera centres and points in units of the reference's median depth. Nothing is aligned: both
    streams share the camera of frame 0 and its scale.
    """
    scale = float(np.median(reference.depth))
    turn = np.swapaxes(reference.world_from_camera[:, :3, :3], 1, 2) @ ours.world_from_camera[:, :3, :3]
    centres = ours.world_from_camera[:, :3, 3] - reference.world_from_camera[:, :3, 3]
    theirs = reference.tokens.astype(np.float32)
    per_frame = {
        "tokens": np.linalg.norm(ours.tokens - theirs, axis=(1, 2)) / np.linalg.norm(theirs, axis=(1, 2)),
        "depth": (np.abs(ours.depth - reference.depth) / reference.depth).mean((1, 2)),
        "rotation": rotation_angles(turn),
        "centre": np.linalg.norm(centres, axis=-1) / scale,
        "points": np.linalg.norm(ours.points() - reference.points(), axis=-1).mean(1) / scale,
    }
    overall = {f"{name}_to_reference": float(values.mean()) for name, values in per_frame.items()}
    return overall | {f"{name}_after_loop": float(values[lap:].mean()) for name, values in per_frame.items()}


def truth_errors(run: SceneRun, world: LoopWorld) -> dict[str, float]:
    """Depth, pose and cloud columns; rotation is the mean angle between turns since frame 0."""
    pose, depth = score_pose(run, world, "sim3"), score_depth(run, world, "scale", "sequence")
    cloud = score_recon(run, world, CLOUD)
    ours, true = run.trajectory.world_from_camera[:, :3, :3], world.world_from_camera[:, :3, :3]
    turn = np.swapaxes(true[0].T @ true, 1, 2) @ (ours[0].T @ ours)
    return {
        "abs_rel": depth["abs_rel"],
        "rotation_deg": float(rotation_angles(turn).mean()),
        "ate_share": pose["ate_rmse"] / pose["path_length"],
        "accuracy": cloud["accuracy_mean"],
        "completeness": cloud["completeness_mean"],
    }


class Study:
    """Rows × worlds, in one folder."""

    def __init__(self, folder: Path, loaded: LoadedNetwork) -> None:
        self.table = ResultTable(folder)
        self._folder, self._loaded = folder, loaded

    def run(self, name: str, row: Row, world: LoopWorld) -> Result:
        """Measure one row in one world, unless that is done already. Its reference must have been run."""
        config = self._widened(row, world) if row.bytes_of else row.config
        key = self._key(name, config, world)
        known = self.table.find(key)
        if known is not None and (name != row.reference or self._outputs(name, world).exists()):
            return known
        scratch = self._folder / "scratch"
        started = time.process_time()
        with _tokens(self._loaded.network) as tokens:
            alone = Config(cache=config, submap=SubmapConfig(reach=0.0), tracking=TrackingConfig(landmarks=0))
            run = run_scene(
                world, self._loaded.network, alone, scratch
            )  # nothing else but the cache remembers
        cpu_ms = 1000 * (time.process_time() - started) / len(world)
        outputs = Outputs(
            np.array(run.depth),
            run.trajectory.world_from_camera,
            run.camera_intrinsics,
            np.concatenate(tokens),
        )
        if name == row.reference:
            outputs.save(self._outputs(name, world))
        result = {
            **key,
            "row": name,
            "window": config.window_size,
            "cache_bytes": int(run.cache_bytes[-1]),
            "cpu_ms_per_frame": cpu_ms,
            **distances(outputs, Outputs.load(self._outputs(row.reference, world)), world.lap),
            **truth_errors(run, world),
        }
        shutil.rmtree(scratch)
        if known is None:
            self.table.add(result)
        return result

    def _widened(self, row: Row, world: LoopWorld) -> CacheConfig:
        """The row's settings with a window, or a budget, that allocates at least the bytes of another row."""
        plain = ROWS[PLAIN].config  # allocates whole frames and little else
        held = plain.pinned_frames + plain.window_size + plain.chunk_size
        frame = self._bytes(PLAIN, world) / held
        frames = math.ceil(self._bytes(row.bytes_of, world) / frame)
        frames -= row.config.chunk_size  # what a pass adds is allocated too
        if row.config.mode == "xstream":
            tokens = self._tokens_per_frame(world)
            return dataclasses.replace(row.config, xstream_budget=max(2, frames) * tokens)
        return dataclasses.replace(row.config, window_size=max(1, frames - row.config.pinned_frames))

    def _tokens_per_frame(self, world: LoopWorld) -> int:
        height, width = world.frame(0).image.shape[:2]
        patch = self._loaded.config.patch_size
        return self._loaded.config.special_tokens + (height // patch) * (width // patch)

    def _bytes(self, name: str, world: LoopWorld) -> int:
        row = self.table.find(self._key(name, ROWS[name].config, world))
        if row is None:
            raise ValueError(f"the row {name!r} must be run first in {world.name}")
        return int(row["cache_bytes"])

    def _key(self, name: str, config: CacheConfig, world: LoopWorld) -> Result:
        settings = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
        return {
            "task": "cache_quality",
            "dataset": "loop",
            "scene": world.name,
            "source": world.name,
            "model_name": self._loaded.config.name,
            "settings": f"{name} {hashlib.sha256(settings.encode()).hexdigest()[:8]}",
            "measured": f"frames={len(world)}",
            "weights": self._loaded.weights,
        }

    def _outputs(self, name: str, world: LoopWorld) -> Path:
        key = self._key(name, ROWS[name].config, world)
        digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:8]
        return self._folder / "outputs" / f"{world.name}_{digest}.npz"


@contextmanager
def _tokens(network: CausalVGGT) -> Iterator[list[NDArray[np.float16]]]:
    """Collects the last layer's tokens [S, P, C] of every pass."""
    seen: list[NDArray[np.float16]] = []
    hook = network.aggregator.register_forward_hook(
        lambda module, inputs, outputs: seen.append(outputs.layers[-1][0].half().cpu().numpy())
    )
    try:
        yield seen
    finally:
        hook.remove()


def needed_rows(names: Sequence[str]) -> list[str]:
    """The rows with those that they refer to, in the order of the table."""
    wanted = set(names)
    for name in names:
        row = ROWS[name]
        wanted |= {row.reference} | ({row.bytes_of, PLAIN} if row.bytes_of else set())
    return [name for name in ROWS if name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="cache_quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=tuple(ROWS), metavar="ROW",
        help='lines of the tables, in quotes, such as "stac, no voxels"; those they are compared with come '
        "along (default: all; a wrong name lists them)",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, default=300, help="of each room (default: %(default)s)")
    parser.add_argument(
        "--worlds", type=int, default=4,
        help="so many rooms, the first whose camera returns about half way (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="these rooms instead")
    parser.add_argument(
        "--checkpoint", default="", help="weights instead of the bundled ones, of the same network"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/cache_quality"), help="folder of results (default: %(default)s)"
    )
    parser.add_argument(
        "--renders", type=Path, default=None, help="folder of rendered rooms (default: OUT/worlds)"
    )
    given = parser.parse_args(arguments)
    return status_of(parser.prog, lambda: _run(given), interrupted="interrupted; the same command goes on")


def _run(given: argparse.Namespace) -> int:
    check_count("--frames", given.frames, 1)
    check_count("--worlds", given.worlds, 1)
    loaded = load_network(ModelConfig(checkpoint=given.checkpoint))
    study, names, results = Study(given.out, loaded), needed_rows(given.rows), []
    for seed in given.seeds or loop_seeds(given.worlds, given.frames):
        world = LoopWorld(seed, given.frames, *SIZE, given.renders or given.out / "worlds")
        for name in tqdm(names, desc=world.name, unit="row"):
            results.append(study.run(name, ROWS[name], world))
    text = tables(results)
    write_whole(given.out / "tables.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
