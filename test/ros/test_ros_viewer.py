"""The web viewer: what it computes, and what a real browser shows of it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from stac_ros import viewer
from stac_ros.output_listener import Health, MemorySample, Seen, View
from stac_ros.viewer_scene import HOST, Scene, extent, field_of_view, figures

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def room() -> Seen:
    """A floor in blue and a wall in orange, and a camera that walked towards the wall."""
    rng = np.random.default_rng(0)
    floor = rng.uniform([0, -2, -1], [4, 2, -1], (6000, 3))
    wall = rng.uniform([4, -2, -1], [4, 2, 1], (6000, 3))
    colours = np.repeat(np.array([[40, 90, 230], [240, 140, 20]], np.uint8), 6000, axis=0)
    poses = []
    for step in range(10):
        pose = np.eye(4)
        pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]  # optical: z forward is the map's x
        pose[0, 3] = 0.2 * step
        poses.append(pose)
    image = np.full((90, 120, 3), (200, 30, 160), np.uint8)
    return Seen(
        stamps_ns=list(range(10)),
        map_from_camera=poses,
        map_stamp_ns=9,
        map_positions=np.vstack([floor, wall]).astype(np.float32),
        map_colours=colours,
        view=View(image, np.ones((90, 120), np.float32)),
        intrinsics=np.array([[60.0, 0, 60], [0, 45.0, 45], [0, 0, 1]]),
        health={
            "inference": Health(1, "random weights", {"weights": "random weights, seed 0", "device": "cpu"}),
            "map": Health(0, "12000 points", {"points": "12000"}),
        },
        memory=[MemorySample(0.0, 3 << 20, 10)],
    )


def test_figures_name_what_matters_and_what_is_wrong():
    table = figures(room())
    assert "| weights | random weights, seed 0 |" in table
    assert "| cache | 3.0 MiB |" in table and "| poses | 10 |" in table
    assert "**warning**: random weights" in table and "**map**" not in table
    assert "| poses | 0 |" in figures(Seen())


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_number_that_is_no_port_is_refused(port, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stac-view", "--port", port])
    monkeypatch.setattr(viewer, "begin_ros", lambda command: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as end:
        viewer.main()
    assert end.value.code == 2 and f"{port} is no port" in capsys.readouterr().err


def test_extent_ignores_a_few_stray_points():
    positions = room().map_positions
    assert 3.5 < extent(positions) <= 4.0
    assert 3.5 < extent(np.vstack([positions, np.full((5, 3), 1e4, np.float32)])) <= 4.0
    assert extent(np.empty((0, 3), np.float32)) == 1.0


def test_field_of_view_is_the_cameras():
    fov, aspect = field_of_view(room())
    assert fov == pytest.approx(np.pi / 2) and aspect == pytest.approx(4 / 3)


def test_maps_that_were_replaced_are_let_go():
    scene, seen = Scene(port=0), room()
    points = np.random.default_rng(0).uniform(-1, 1, (100_000, 3)).astype(np.float32)

    def show_maps(stamps) -> int:
        """Bytes in use afterwards."""
        for seen.map_stamp_ns in stamps:
            seen.map_positions, seen.map_colours = points.copy(), np.zeros((100_000, 3), np.uint8)
            scene.show(seen)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = show_maps(range(3))
        assert show_maps(range(3, 23)) - first < 3 * points.nbytes
    finally:
        tracemalloc.stop()
        scene.close()


def test_a_path_that_moves_is_drawn_anew_though_no_frame_has_come(monkeypatch):
    scene, seen, drawn = Scene(port=0), room(), []
    add = scene._server.scene.add_line_segments

    def note(name, segments, *given, **options):
        drawn.append(segments)
        return add(name, segments, *given, **options)

    monkeypatch.setattr(scene._server.scene, "add_line_segments", note)
    try:
        for corrections in (0, 0, 1):
            if corrections:
                seen.map_from_camera = [pose + 0.5 * (np.arange(4) == 3) for pose in seen.map_from_camera]
            seen.corrections = corrections
            scene.show(seen)
    finally:
        scene.close()
    assert len(drawn) == 2 and np.allclose(drawn[1], drawn[0] + 0.5)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium")
def test_a_browser_shows_map_path_and_figures(tmp_path):
    scene = Scene(port=0)
    try:
        scene.show(room())
        assert scene.address.startswith(f"http://{HOST}:")
        picture = screenshot(scene.address, tmp_path / "viewer.png")
    finally:
        scene.close()
    blue, green, red = (picture[:, :, channel].astype(int) for channel in range(3))
    lit = picture.max(axis=2) > 70  # hues, not brightness: the page fades in
    assert (lit & (blue > 1.8 * green) & (blue > 3 * red)).sum() > 1000, "the blue floor"
    assert (lit & (red > 1.4 * green) & (green > 2 * blue)).sum() > 1000, "the orange wall"
    assert (lit & (red > 3 * green) & (blue > 2.5 * green)).sum() > 1000, "the camera's image"


def screenshot(address: str, file: Path) -> np.ndarray:
    with tempfile.TemporaryDirectory() as profile:
        words = ["--headless", "--no-sandbox", "--no-first-run", "--use-angle=swiftshader"]
        words += ["--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-sync"]
        words += ["--disable-component-update", "--disable-quic", f"--user-data-dir={profile}"]
        words += ["--window-size=1280,800", "--virtual-time-budget=15000", f"--screenshot={file}", address]
        subprocess.run([CHROMIUM, *words], capture_output=True, timeout=180, check=True)
    return cv2.imread(str(file))
