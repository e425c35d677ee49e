"""A world as files: rgb/, depth/, case.json, groundtruth.txt (TUM) and intrinsics.txt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stac_core.geometry import quaternion_from_rotation
from stac_core.settings import check_settings, setting
from stac_core.stamps import stamp_text
from stac_core.worlds.recording import Camera, RecordedFrame, encode_image, millimetres


@dataclass(frozen=True)
class FolderSettings:
    """How an image folder is written."""

    image_format: str = setting("jpg", "format of the image files", choices=("jpg", "png"))
    image_quality: int = setting(95, "JPEG quality of the image files", minimum=1, maximum=100)

    def __post_init__(self) -> None:
        check_settings(self)


class FolderWriter:
    """Writes frames one by one; leaving the `with` block without an error writes the descriptions."""

    def __init__(self, root: Path, settings: FolderSettings, camera: Camera, name: str, title: str) -> None:
        self._root, self._settings, self._camera = root, settings, camera
        self._name, self._title = name, title
        self._rows: list[dict[str, Any]] = []
        self._truth: list[str] = []

    def __enter__(self) -> FolderWriter:
        for part in ("rgb", "depth"):
            (self._root / part).mkdir(parents=True)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._describe()

    def write(self, frame: RecordedFrame) -> None:
        """Write one frame's image and depth and remember its pose."""
        suffix = self._settings.image_format
        rgb, depth = f"rgb/{frame.index:06d}.{suffix}", f"depth/{frame.index:06d}.png"
        (self._root / rgb).write_bytes(frame.encode(suffix, self._settings.image_quality).tobytes())
        (self._root / depth).write_bytes(encode_image(millimetres(frame.depth), "png", []).tobytes())
        pose = frame.world_from_camera
        moment = {"t": frame.stamp_ns / 1e9, "stamp_ns": frame.stamp_ns}
        self._rows.append(
            {"i": frame.index, **moment, "rgb": rgb, "depth": depth, "T_wc": pose.round(9).tolist()}
        )
        turn = quaternion_from_rotation(torch.from_numpy(pose[:3, :3])).tolist()
        numbers = " ".join(f"{value:.9f}" for value in (*pose[:3, 3], *turn))
        self._truth.append(f"{stamp_text(frame.stamp_ns)} {numbers}\n")

    def _describe(self) -> None:
        header = "# timestamp tx ty tz qx qy qz qw, camera to world\n"
        (self._root / "groundtruth.txt").write_text(header + "".join(self._truth))
        np.savetxt(self._root / "intrinsics.txt", self._camera.matrix, fmt="%.9f")
        (self._root / "case.json").write_text(json.dumps(self._case(), indent=1))

    def _case(self) -> dict[str, Any]:
        camera = self._camera
        fx, fy, cx, cy = (float(camera.matrix[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
        lens = {"width": camera.width, "height": camera.height, "fx": fx, "fy": fy, "cx": cx, "cy": cy}
        return {
            "case": self._name,
            "pose_field": "T_wc: 4x4 row-major, camera-to-world, metres, OpenCV camera axes",
            "depth": "16-bit PNG, z-depth; metres = value / depth_scale; 0 = no measurement",
            "frame_field": (
                "i: index; t: seconds, rounded; stamp_ns: the same in nanoseconds, exact; "
                "rgb, depth: paths relative to this file"
            ),
            "title": self._title,
            "camera": {"model": "pinhole", **lens, "distortion": []},
            "gt": {"pose": "exact", "depth": "exact", "scale": "metric", "units": "m", "depth_scale": 1000.0},
            "frame_count": len(self._rows),
            "frames": self._rows,
        }
