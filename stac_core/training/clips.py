"""Rendered clips that serve several steps: casting rays costs more than learning from them.

Clip i depends on the run's seed and on i alone, and is rendered when it is first needed: on a CPU into
a folder, so that helpers may render ahead of the training,

    python -m stac_core.training.clips --folder out/training/clips --first 0 --count 4000

and on a GPU into its memory, many at once. There helpers bring further worlds: what they lay into that folder
comes into use as well. Their numbers must be others than those that the run renders itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from stac_core.command import status_of
from stac_core.config import PATCH_SIZE
from stac_core.device import send
from stac_core.files import write_whole
from stac_core.settings import in_one_line
from stac_core.training.config import TrainingConfig
from stac_core.training.sequences import Sequences, join
from stac_core.worlds import WorldBatch, WorldConfig, build_worlds, world_seeds
from stac_core.worlds.config import check_count

WORLDS = WorldConfig()
BLOCK = 32  # clips rendered at once into memory


def training_seed(run_seed: int, index: int) -> int:
    """Seed of a world to train on: always odd. Held-out worlds have even seeds."""
    return (run_seed << 33) + 2 * index + 1


def held_out_seed(index: int) -> int:
    """Seed of a world that no run trains on."""
    return 2 * index


def height_of(width: int) -> int:
    """Of 4:3 images that are so wide, in whole patches."""
    return round(0.75 * width / PATCH_SIZE) * PATCH_SIZE


class Clips(Protocol):
    """Clips of F frames, by number."""

    def ready(self, count: int) -> range:
        """Numbers that may be used once `count` clips are in use."""

    def departures(self, clips: np.ndarray) -> np.ndarray:
        """How far frame j (column) of clips [n] has departed from frame i, [n, F, F]: its turn in radians
        plus its way in mean depths of frame i."""

    def read(self, clips: np.ndarray, frames: Tensor) -> Sequences:
        """Frames [n, S] of clips [n], on the device that trains."""


def open_clips(config: TrainingConfig, device: torch.device) -> Clips:
    """Where the run keeps its clips."""
    in_memory = config.clips == "memory" or (config.clips == "auto" and device.type == "cuda")
    if in_memory:
        return ClipsInMemory(config, device)
    return ClipsInFolder(*_sizes(config), clips_folder(config), device)


def clips_folder(config: TrainingConfig) -> Path:
    """Where helpers of a run lay its clips."""
    return Path(config.out) / "clips"


def render_clips(seed: int, frames: int, width: int, clips: range, device: torch.device) -> WorldBatch:
    """Clips of the run with a seed, whole."""
    check_count("clip_frames", frames, 2)
    seeds = torch.cat([world_seeds(training_seed(seed, clip), 1) for clip in clips])
    worlds = build_worlds(WORLDS, seeds.to(device))
    return worlds.render(torch.arange(frames, device=device), height_of(width), width)


class ClipsInFolder:
    """One file per clip, rendered where it is missing."""

    def __init__(self, seed: int, frames: int, width: int, folder: Path, device: torch.device) -> None:
        self._clip, self._folder, self._device = (seed, frames, width), folder, device
        folder.mkdir(parents=True, exist_ok=True)

    def ready(self, count: int) -> range:
        return range(count)

    def departures(self, clips: np.ndarray) -> np.ndarray:
        return np.stack([_departures_of_file(self._rendered(int(clip))) for clip in clips])

    def read(self, clips: np.ndarray, frames: Tensor) -> Sequences:
        parts = [self._read(int(clip), chosen) for clip, chosen in zip(clips, frames, strict=True)]
        return join(parts).to(self._device)

    def render(self, clip: int) -> None:
        """Render one clip into the folder."""
        world = render_clips(*self._clip, range(clip, clip + 1), torch.device("cpu"))
        content = {name: value[0].contiguous() for name, value in _stored(world).items()}
        write_whole(self.path(clip), save(content))

    def path(self, clip: int) -> Path:
        """File of one clip."""
        return self._folder / _file_name(*self._clip, f"{clip:07d}")

    def _rendered(self, clip: int) -> Path:
        path = self.path(clip)
        if not path.exists():
            self.render(clip)
        return path

    def _read(self, clip: int, frames: Tensor) -> Sequences:
        with _opened(self._rendered(clip)) as file:
            chosen = {name: file.get_tensor(name)[frames][None] for name in file.keys()}  # noqa: SIM118
        return _sequences(chosen)


class ClipsInMemory:
    """The newest clips of a run in the memory of the device that trains, in a ring.

    Blocks that helpers have rendered into the folder of the run are moved there as soon as they are whole.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._room = -(-config.kept_clips // BLOCK) * BLOCK
        self._stop = 0  # clips that have come into use
        self._ring: dict[str, Tensor] = {}  # [room, F, ...]
        self._departed = np.empty((self._room, config.clip_frames, config.clip_frames), np.float32)

    def ready(self, count: int) -> range:
        while helped := self._of_helpers():
            self._keep(helped)
        wanted = -(-count // BLOCK) * BLOCK
        self._stop = max(self._stop, wanted - self._room)  # after a resumption: only what there is room for
        blocks = range(self._stop, wanted, BLOCK)
        for first in tqdm(blocks, "rendering", unit="block", leave=False, disable=len(blocks) < 2):
            clips = range(first, first + BLOCK)
            self._keep(_stored(render_clips(*_sizes(self._config), clips, self._device)))
        return range(max(0, self._stop - self._room), self._stop)

    def departures(self, clips: np.ndarray) -> np.ndarray:
        return self._departed[clips % self._room]

    def read(self, clips: np.ndarray, frames: Tensor) -> Sequences:
        at = send(torch.from_numpy(clips % self._room)[:, None], self._device), send(frames, self._device)
        return _sequences({name: values[at] for name, values in self._ring.items()})

    def _of_helpers(self) -> dict[str, Tensor]:
        """A block that lies in the folder, taken out of it; empty where there is none."""
        paths = sorted(clips_folder(self._config).glob(_file_name(*_sizes(self._config), "*")))[:BLOCK]
        if len(paths) < BLOCK:
            return {}
        try:
            parts = [_whole(path, self._device) for path in paths]
        except FileNotFoundError:  # another process of the run took it
            return {}
        for path in paths:
            path.unlink(missing_ok=True)
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    def _keep(self, block: dict[str, Tensor]) -> None:
        place = slice(self._stop % self._room, self._stop % self._room + BLOCK)
        for name, values in block.items():
            if name not in self._ring:
                self._ring[name] = values.new_empty(self._room, *values.shape[1:])
            self._ring[name][place] = values
        departed = departures(block["depth"].float(), block["world_from_camera"])
        self._departed[place] = departed.cpu().numpy()
        self._stop += BLOCK


def departures(depth: Tensor, world_from_camera: Tensor) -> Tensor:
    """Of clips, depth [n, F, H, W] and poses [n, F, 4, 4], as `Clips.departures`."""
    sampled = depth[..., ::8, ::8].flatten(2).double()
    mean = (sampled.sum(-1) / (sampled > 0).sum(-1).clamp(min=1)).clamp(min=1e-3)  # [n, F]
    places, axes = world_from_camera[..., :3, 3].double(), world_from_camera[..., :3, :3].double().flatten(2)
    way = (places[:, :, None] - places[:, None]).norm(dim=-1)
    turn = ((axes @ axes.mT - 1) / 2).clamp(-1, 1).acos()
    return turn + way / mean[..., None]


def _sizes(config: TrainingConfig) -> tuple[int, int, int]:
    """What all clips of a run have in common: seed, frames, width."""
    return config.seed, config.clip_frames, config.clip_width


def _file_name(seed: int, frames: int, width: int, clip: str) -> str:
    return f"{seed}-{frames}x{width}-{clip}.safetensors"


def _stored(world: WorldBatch) -> dict[str, Tensor]:
    return {
        "images": (world.images * 255).round().byte(),
        "depth": world.depth.half(),
        "world_from_camera": world.world_from_camera,
        "intrinsics": world.intrinsics,
    }


def _whole(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a clip's file."""
    with _opened(path, str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _sequences(stored: dict[str, Tensor]) -> Sequences:
    """Of what `_stored` made, [n, S, ...]."""
    images, depth = stored["images"].float() / 255, stored["depth"].float()
    return Sequences(images, depth, stored["world_from_camera"], stored["intrinsics"])


@lru_cache(maxsize=1 << 14)
def _departures_of_file(path: Path) -> np.ndarray:
    with _opened(path) as file:
        depth, poses = file.get_tensor("depth")[None].float(), file.get_tensor("world_from_camera")[None]
    found: np.ndarray = departures(depth, poses)[0].numpy()
    return found


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """The tensors of a clip's file; OSError where it is damaged."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        why = in_one_line(error)
        raise OSError(f"{path} is damaged ({why}): remove it, to have it rendered again") from error


def main(arguments: list[str] | None = None) -> int:
    """Render clips ahead of a run, on one thread."""
    parser = argparse.ArgumentParser(prog="python -m stac_core.training.clips", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, required=True, help="clips, in the folder of the run")
    for name in ("seed", "clip_frames", "clip_width"):
        default = TrainingConfig.__dataclass_fields__[name].default
        parser.add_argument(
            "--" + name.replace("_", "-"), type=int, default=default, help="of the run (default %(default)s)"
        )
    parser.add_argument("--first", type=int, default=0, help="number of the first clip (default 0)")
    parser.add_argument("--count", type=int, required=True, help="how many clips; those there are stay")
    given = parser.parse_args(arguments)
    return status_of(parser.prog, lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    TrainingConfig(seed=given.seed)  # refuses what no run may have
    for name, least in (("first", 0), ("count", 1)):
        check_count(name, getattr(given, name), least)
    torch.set_num_threads(1)
    sizes = given.seed, given.clip_frames, given.clip_width
    clips = ClipsInFolder(*sizes, given.folder, torch.device("cpu"))
    for clip in range(given.first, given.first + given.count):
        if not clips.path(clip).exists():
            clips.render(clip)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
