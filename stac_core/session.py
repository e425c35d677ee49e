"""One stream of camera frames through the network: the whole method on one page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stac_core.cache import StreamCache, open_cache
from stac_core.cache.offline_cache import OfflineCache
from stac_core.cache.one_pass import OnePass
from stac_core.cache.saved_state import State, read_state, write_state
from stac_core.cache.stats import CacheStats
from stac_core.camera_tracker import CameraTracker
from stac_core.chunk_positions import cameras_of, positions_of
from stac_core.config import Config
from stac_core.device import Stopwatch, free_bytes, send
from stac_core.geometry import decode_pose, encode_pose
from stac_core.images import ImageGeometry, ResizedImages, plan_resize, prepare_images, resize_images
from stac_core.intrinsics import check_intrinsics
from stac_core.kernels.select import select_kernels
from stac_core.moves import Moves
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.context import AttentionContext
from stac_core.prediction import Prediction
from stac_core.relocalization import See, find_camera
from stac_core.settings import refuse
from stac_core.submaps import Submaps
from stac_core.uncertainty import is_measured

Images = list[np.ndarray] | ResizedImages


@dataclass(frozen=True)
class SessionStats:
    """Plain numbers about a stream: its memory, and what the last step took that the device has done with."""

    cache: CacheStats  # of the present submap, but `frames_seen` of the whole stream
    submaps: int  # so far, the present one included
    loops: int  # closed so far: times that earlier submaps were moved
    keyframe_bytes: int
    landmarks: int  # that the last frame shows; 0 where poses are as the network says
    prepare_ms: float
    network_ms: float
    settle_ms: float


class StreamSession:
    """One stream. The network may serve several sessions, in turns; each has its own memory.

    Predictions leave with the caller: a session keeps none.
    """

    def __init__(self, network: CausalVGGT, config: Config) -> None:
        self.config = config
        self.geometry: ImageGeometry | None = None  # network pixels ↔ camera image, of the last step
        self._network = network
        self._device = next(network.parameters()).device
        self._kernels = select_kernels(config.kernels.backend, self._device)
        self._free = free_bytes(self._device)  # before the stream takes any of it
        self._cache = self._empty_cache()
        self._submaps = self._no_submaps()
        self._watches: list[Stopwatch] = []  # of the last two steps
        self._ahead: tuple[Images, Tensor, ImageGeometry] | None = None  # what the network has begun with

    @torch.inference_mode()
    def step(
        self,
        images: Images,
        intrinsics: np.ndarray | None = None,
        to_host: bool = False,
        upcoming: Images | None = None,
    ) -> Prediction:
        """1 … `cache.chunk_size` new frames, uint8 RGB [H, W, 3] of one size → Prediction [S, …].

        images: they themselves, or what `prepare` has made of them.
        intrinsics: of these images [3, 3], if known. Where `tracking.landmarks` are followed they take the
        place of what the network says, and poses are refined; else they are not used.
        to_host: give what `Prediction.to_host` would, without waiting until the device has also taken the
        frames into the memory.
        upcoming: what the next step will be given as `images`, the very same object, if known. A GPU then
        begins with them while these frames are taken into the memory; results stay the same.

        Frames of one step see each other and what is kept of the past. ValueError where the frames do
        not fit the stream; whatever is raised, the stream goes on as if the step had not been. It also does
        where a first chunk does not reach `cache.first_confidence`. Where the camera has departed by
        `submap.reach`, the step begins the next submap, which takes one to seven frames more; also after a
        pose that is no number, and no stream of submaps begins with one. Where the camera has come back to
        an earlier submap, that may tell how those in between lie: `Prediction.moved`.
        """
        watch = Stopwatch(self._device)
        pixels, geometry = self._begun(images) or self._pixels(images)
        lens = self._lens(intrinsics, geometry)
        watch.mark()
        submaps = self._submaps.copy()  # which takes their place once everything has gone well
        continues, moved = not submaps.carried, None
        if submaps.next_is_due:
            goes_on, moved = self._begin_submap(submaps, lens)
            continues = continues and goes_on
        before = None if continues or submaps.carried else submaps.last.pose.double().cpu().numpy()
        if upcoming is not None:
            self._network.foresee(partial(self._begin_with, upcoming))
        prediction = self._see(pixels, lens)
        watch.mark()
        taken_in = bool(self._cache.frames_seen) or self._can_begin(prediction)
        said = submaps.follow(pixels, prediction, calibrated=lens is not None) if taken_in else prediction
        said = replace(said, camera_tokens=None, continues=continues, before=before, moved=moved)
        on_host = said.sent_to_host() if to_host else None
        if taken_in:
            self._settle(prediction)
            self._submaps = submaps
        watch.mark()
        self._watches, self.geometry = [*self._watches[-1:], watch], geometry
        return said if on_host is None else on_host()

    @torch.inference_mode()
    def relocalize(self, images: Images, intrinsics: np.ndarray | None = None) -> bool:
        """Look for a camera that may be anywhere, as after `load`: for a keyframe that shows what it sees.

        images, intrinsics: as for `step`, which may be told the same images once they are found. → whether
        they are; the next submap then begins with that keyframe, else the stream stays as it was. Takes a
        pass over two frames for each keyframe. A stream in one submap (`submap.reach` 0) has no keyframes:
        where its camera is, the network sees by itself, and nothing is looked for. Raises what `step` does.
        """
        pixels, geometry = self._pixels(images)
        lens, submaps = self._lens(intrinsics, geometry), self._submaps.copy()
        if not submaps.reach:
            return True
        keyframe = find_camera(self._see_anew(lens), submaps.keyframes, pixels, submaps.reach)
        if keyframe is None:
            return False
        before, self._cache = self._cache, self._empty_cache()
        try:
            submaps.go_to(keyframe, self._take(keyframe.pixels, lens))
        except BaseException:
            self._cache = before
            raise
        self._submaps = submaps
        return True

    def prepare(self, images: list[np.ndarray]) -> ResizedImages:
        """What `step` would begin with, ahead of it: images in the size that the network wants.

        Any thread may call it, also while another one is in `step`: it looks at nothing of the stream and
        asks nothing of a GPU. ValueError for images that no stream could take.
        """
        return resize_images(images, self.config.image, self._network.config.image_size, torch.device("cpu"))

    @property
    def uses_intrinsics(self) -> bool:
        """Whether `step` makes something of them."""
        return self._submaps.tracks

    def check_image_size(self, height: int, width: int) -> None:
        """ValueError if images of this size become too small for the network, whatever the stream."""
        plan_resize(height, width, self.config.image, self._network.config.image_size)

    def reset(self) -> None:
        """Forget everything: the next frame begins a new stream."""
        self._cache.reset()
        self._submaps.forget()
        self.geometry, self._watches = None, []

    @torch.inference_mode()
    def pin(self, frame: int) -> None:
        """Keep one more frame whole for ever, by its number in the stream; ValueError where it is gone."""
        if isinstance(self._cache, OfflineCache):
            raise ValueError(f"cache.mode = {self.config.cache.mode!r} keeps no frames")
        if self._submaps.reach:
            raise ValueError(f"frame = {frame}: a submap ends with all its frames; pin with submap.reach = 0")
        self._cache.pin(frame)

    @torch.inference_mode()
    def repose(self, move_voxels: bool = False) -> tuple[Tensor, Tensor]:
        """Read the poses of the frames kept by `cache.repose_frames` again, with all later knowledge.

        → frame numbers [n] and world_from_camera [n, 4, 4]. The stream stays as it is, except that with
        `move_voxels` merged tokens move with the frames that saw them. ValueError where nothing is kept.
        """
        if isinstance(self._cache, OfflineCache):
            raise ValueError(f"cache.mode = {self.config.cache.mode!r} keeps no frames")
        kept, every_frame = self._cache.camera_tokens, OnePass("full")
        tokens = kept.tokens
        every_frame.begin(len(tokens), 1)
        encoding = self._network.camera_head(tokens[None], every_frame)[-1][0]
        poses = decode_pose(encoding, 1, 1)[0]
        if move_voxels:
            self._cache.follow(poses)
        return kept.frames, poses

    @torch.inference_mode()
    def save(self, path: str | Path) -> None:
        """Write the whole stream as one safetensors file, to be resumed by `load`.

        ValueError in the modes that take a sequence in one pass.
        """
        if isinstance(self._cache, OfflineCache):
            raise ValueError(f"cache.mode = {self.config.cache.mode!r} remembers nothing that could be saved")
        state: State = {"cache": self._cache.state(), "submaps": self._submaps.state()}
        if self.geometry is not None:
            state["camera_size"] = torch.tensor(self.geometry.camera_size)
        write_state(Path(path), state, self._about())

    def load(self, path: str | Path) -> None:
        """Go on with a saved stream in place of the present one; predictions continue as if uninterrupted.

        ValueError where the file is damaged or was saved under other settings; this stream then stays.
        """
        cache = self._empty_cache()
        if isinstance(cache, OfflineCache):
            raise ValueError(f"cache.mode = {self.config.cache.mode!r} cannot go on with a saved stream")
        try:
            state = read_state(Path(path), self._about(), self._device)
            submaps = self._no_submaps()
            cache.restore(state["cache"])
            submaps.restore(state["submaps"])
            geometry = self._geometry_of(state["camera_size"].tolist()) if submaps.frames_seen else None
        except (KeyError, IndexError) as missing:
            raise ValueError(f"{path} lacks {missing}: save the stream again") from missing
        self._cache, self._submaps, self.geometry, self._watches = cache, submaps, geometry, []

    def hold(self) -> None:
        """What has been seen so far stays where it is from here on; loops move only what comes after.

        As for a map that is trusted, in which a camera is to be localised.
        """
        self._submaps.hold()

    @torch.inference_mode()
    def stats(self, members: bool = False) -> SessionStats:
        """Does not wait for the device, unless it is asked for members: to count merged tokens by how many
        they stand for, which looks at every one.

        On a GPU, tokens that have left the live cache are merged, and counted, during the next step.
        """
        passed = [watch for watch in self._watches if watch.passed]
        times_ms = passed[-1].milliseconds() if passed else (0.0, 0.0, 0.0)
        cache = replace(self._cache.stats(members), frames_seen=self._submaps.frames_seen)
        submaps = self._submaps
        return SessionStats(
            cache, submaps.count, submaps.loops, submaps.keyframes.bytes, submaps.landmarks, *times_ms
        )

    def _about(self) -> dict[str, Any]:
        """What a saved stream must agree on with this one."""
        sections: dict[str, Any] = {
            "network": self._network.config,
            "cache": self.config.cache,
            "image": self.config.image,
            "submap": self.config.submap,
            "tracking": self.config.tracking,
        }
        settings = {f"{n}.{k}": v for n, section in sections.items() for k, v in asdict(section).items()}
        del settings["cache.memory_budget"]  # another computer may have more memory, or less
        settings["network.weights"] = self._network.fingerprint()
        return json.loads(json.dumps(settings))  # tuples become lists, as in the file

    def _begin_with(self, images: Images) -> Tensor | None:
        """What the next pass will be given; None where something is wrong, which the next step says."""
        try:
            pixels, geometry = self._pixels(images)
        except ValueError:
            return None
        self._ahead = images, pixels, geometry
        return pixels[None]

    def _begun(self, images: Images) -> tuple[Tensor, ImageGeometry] | None:
        """Pixels of images that the network has begun with. ValueError where they do not fit the stream."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not images:
            return None
        self._check_size(ahead[2])
        return ahead[1:]

    def _geometry_of(self, camera_size: tuple[int, int]) -> ImageGeometry:
        plan = plan_resize(*camera_size, self.config.image, self._network.config.image_size)
        return plan.geometry(*camera_size)

    def _pixels(self, images: Images) -> tuple[Tensor, ImageGeometry]:
        """On the device, and the way back. ValueError where they do not fit network or stream."""
        if isinstance(images, ResizedImages):
            pixels, geometry = images.pixels(self._device), images.geometry
            if geometry != self._geometry_of(geometry.camera_size):
                raise ValueError("images were prepared by a session of other settings: have this one do it")
        else:
            trained_size = self._network.config.image_size
            pixels, geometry = prepare_images(images, self.config.image, trained_size, self._device)
        self._check_size(geometry)
        return pixels, geometry

    def _check_size(self, geometry: ImageGeometry) -> None:
        """ValueError where frames are of another size than those that the stream consists of."""
        if self._submaps.frames_seen and self.geometry not in (None, geometry):
            (old_height, old_width), (height, width) = self.geometry.camera_size, geometry.camera_size
            raise ValueError(
                f"frames of {width}×{height} pixels in a stream of {old_width}×{old_height}: "
                "keep the image size, or reset the stream"
            )

    def _lens(self, intrinsics: np.ndarray | None, geometry: ImageGeometry) -> Tensor | None:
        """Intrinsics [3, 3] of the network pixels, where they are to be used. ValueError if they are none."""
        if intrinsics is None or not self.uses_intrinsics:
            return None
        known = check_intrinsics(intrinsics, *geometry.camera_size)
        return send(geometry.network_intrinsics(torch.from_numpy(known)).float(), self._device)

    def _empty_cache(self) -> StreamCache | OfflineCache:
        return open_cache(self.config.cache, self._network.config, self._kernels, self._free)

    def _no_submaps(self) -> Submaps:
        """The state before the first frame; a sequence taken in one pass has but one submap."""
        config = self.config
        reach = 0.0 if config.cache.rules.offline else config.submap.reach_of(self._network.config)
        if reach and config.cache.repose_frames:
            why = f"a submap ends with all its frames, and submap.reach is {reach}"
            raise refuse(config.cache, "repose_frames", why, 0)
        landmarks = 0 if config.cache.rules.offline else config.tracking.landmarks_of(self._network.config)
        if landmarks and config.cache.repose_frames:
            why = f"poses are read again as the network says, and tracking.landmarks is {landmarks}"
            raise refuse(config.cache, "repose_frames", why, 0)
        tracker = CameraTracker(landmarks) if landmarks else None
        measured = reach > 0 and is_measured(self._network.config, reach)
        return Submaps(reach, config.submap.keyframes, tracker, measured)

    def _begin_submap(self, submaps: Submaps, lens: Tensor | None) -> tuple[bool, Moves | None]:
        """Forget everything but where a few frames lie, and see one of them again as the first one.

        → whether poses continue; else the camera has come back, and what drift had added is gone, or its last
        pose is no number. Also how earlier submaps have moved then.
        """
        self._cache.reset()
        if submaps.lost:
            submaps.go_to(submaps.first, self._take(submaps.first.pixels, lens))
            return False, None
        keyframe = submaps.come_back_to(self._see_anew(lens))
        if keyframe is not None:
            first, last = self._take(keyframe.pixels, lens), self._take(submaps.last.pixels, lens)
            came_back, moved = submaps.go_back(keyframe, first, last)
            if came_back:
                return False, moved
            self._cache.reset()
        submaps.go_on(self._take(submaps.last.pixels, lens))
        return True, None

    def _see_anew(self, lens: Tensor | None) -> See:
        """What the network says of frames that have nothing to do with the present submap."""
        once = OnePass("causal")
        return lambda frames: self._ask(frames, lens, once)

    def _take(self, pixels: Tensor, lens: Tensor | None) -> Prediction:
        """See frames and take them into the memory."""
        prediction = self._see(pixels, lens)
        self._settle(prediction)
        return prediction

    def _see(self, pixels: Tensor, lens: Tensor | None) -> Prediction:
        """What the network says of frames [S, 3, H, W], in the present submap; all but a known lens."""
        wants_points = self._cache.wants_positions and self.config.cache.positions == "points"
        return self._ask(pixels, lens, self._cache, wants_points)

    def _ask(
        self, pixels: Tensor, lens: Tensor | None, context: AttentionContext, points: bool = False
    ) -> Prediction:
        prediction = self._network(pixels[None], context, points=points).map(lambda t: t[0])
        if lens is None:
            return prediction
        intrinsics = lens.to(prediction.intrinsics).expand_as(prediction.intrinsics)
        encoding = encode_pose(prediction.world_from_camera, intrinsics, *pixels.shape[-2:])
        return replace(prediction, intrinsics=intrinsics, pose_encoding=encoding)

    def _settle(self, prediction: Prediction) -> None:
        """Take the frames of the pass into the memory."""
        positions = None
        if self._cache.wants_positions:
            positions = positions_of(prediction, self.config.cache, self._network.config)
        self._cache.settle(positions, cameras_of(prediction))

    def _can_begin(self, prediction: Prediction) -> bool:
        """Whether a first chunk is good enough to be what everything else refers to."""
        least = self.config.cache.first_confidence
        if self._submaps.reach and not bool(prediction.world_from_camera.isfinite().all()):
            return False
        return not least or float(prediction.depth_confidence.mean()) >= least
