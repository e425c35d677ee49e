"""A map that is saved and gone on with later: files, the unit of length, and a node that starts again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from mapping_helpers import mapper_of
from node_helpers import NOBODYS, NodeProcess, Observer, header, images, matrix_of
from ros_helpers import ros_nodes
from safetensors.numpy import load_file, save_file
from walks import LAP, bundled, frames_of

from stac_core import Config
from stac_core.config import CacheConfig, ModelConfig
from stac_ros import topics
from stac_ros.clouds import cloud_points
from stac_ros.images import encode_image
from stac_ros.mapper import MAP_FROM_OPTICAL
from stac_ros.mapping_node import MappingNode
from stac_ros.node_process import run_node
from stac_ros.saved_map import MAP, STREAM, SavedMap
from stac_ros.topics import qos_profile

CONFIG = Config(model=ModelConfig(device="cpu"))
WALK = "world:50,frames=24,height=126,width=168,step_max=0.03"
ELSEWHERE = "world:58,frames=4,height=126,width=168"
CHUNK = 4


def messages(walk, chosen, first_stamp_s):
    """Images of a synthetic world, a tenth of a second apart."""
    return [
        encode_image(frames_of(walk)[index].image, "rgb8", header(first_stamp_s + number / 10))
        for number, index in enumerate(chosen)
    ]


def chunks(walk, chosen, first_stamp_s=10.0):
    sent = messages(walk, chosen, first_stamp_s)
    return [sent[i : i + CHUNK] for i in range(0, len(sent), CHUNK)]


def process(mapper, sent):
    for chunk in sent:
        mapper.process(chunk)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a map of a walk, its points, and where its images were seen from."""
    directory = tmp_path_factory.mktemp("maps")
    with mapper_of(bundled(), config=CONFIG, map__directory=str(directory)) as (mapper, notes, _):
        process(mapper, chunks(WALK, range(24)))
        folder = Path(mapper.save().splitlines()[0]).parent
        return folder, mapper.map.points(), [frame.map_from_camera for frame in notes.frames]


def test_a_map_is_gone_on_with_where_the_camera_is_found(saved, tmp_path):
    folder, points, poses = saved
    with mapper_of(bundled(), config=CONFIG, map__directory=str(tmp_path)) as (mapper, notes, statistics):
        mapper.load(folder)
        assert notes.loads == 1
        assert all(map(np.allclose, mapper.map.points(), points))
        process(mapper, chunks(ELSEWHERE, range(4)))
        assert statistics.snapshot().dropped == {"not found in the map": 4}
        assert not notes.frames and len(mapper.map) == len(points[0])
        again = SavedMap.read(Path(mapper.save().splitlines()[0]).parent / MAP)
        assert np.allclose(again.positions, points[0]) and np.allclose(again.map_from_world, MAP_FROM_OPTICAL)
        again = range(9, 17)
        process(mapper, chunks(WALK, again, first_stamp_s=5.0))  # stamps of another day
        assert statistics.snapshot().dropped == {"not found in the map": 4} and not notes.streams
        assert len(notes.frames) == len(again) and len(mapper.trajectory) == len(again)
        extent = np.linalg.norm(np.ptp(np.stack(poses)[:, :3, 3], axis=0))
        for index, frame in zip(again, notes.frames, strict=True):
            moved = np.linalg.inv(poses[index]) @ frame.map_from_camera
            assert np.degrees(np.arccos(np.clip((np.trace(moved[:3, :3]) - 1) / 2, -1, 1))) < 4
            assert np.linalg.norm(moved[:3, 3]) < 0.15 * extent
        assert len(points[0]) < len(mapper.map) < 1.6 * len(points[0]), "it saw the same again"
        process(mapper, chunks(WALK, range(4), first_stamp_s=1.0))  # in the running stream, time went back
        assert notes.streams == [False]


def test_a_camera_that_was_carried_away_is_found_again():
    """It was covered meanwhile; what the stream goes on with is no motion."""
    with mapper_of(bundled(), config=CONFIG) as (mapper, notes, statistics):
        with pytest.raises(ValueError, match="no image has been mapped"):
            mapper.predictor.relocalize()
        process(mapper, chunks(WALK, range(24)))
        mapper.predictor.relocalize()
        process(mapper, chunks(ELSEWHERE, range(4), first_stamp_s=20.0))
        assert statistics.snapshot().dropped == {"not found in the map": 4} and not notes.jumps
        process(mapper, chunks(WALK, range(9, 13), first_stamp_s=30.0))
        assert notes.jumps == [24] and not mapper.predictor.searching
        there, again = (notes.frames[index].map_from_camera for index in (9, 24))
        extent = np.ptp([frame.map_from_camera[:3, 3] for frame in notes.frames[:24]], axis=0)
        assert np.linalg.norm(there[:3, 3] - again[:3, 3]) < 0.15 * np.linalg.norm(extent)


def test_a_map_that_must_not_grow_tells_where_the_camera_is(saved):
    folder, points, _ = saved
    with mapper_of(bundled(), config=CONFIG, map__grow=False) as (mapper, notes, _):
        mapper.load(folder)
        process(mapper, chunks(WALK, range(9, 17), first_stamp_s=5.0))
        assert len(notes.frames) == len(mapper.trajectory) == 8
        assert all(len(seen.positions) for seen in notes.points), "what is seen is still said"
        assert all(map(np.allclose, mapper.map.points(), points))


@pytest.mark.parametrize("grow", [True, False])
def test_a_closed_loop_moves_what_may_grow_and_nothing_else(grow):
    with mapper_of(bundled(), config=CONFIG, map__grow=grow) as (mapper, notes, _):
        process(mapper, chunks(LAP, range(40)))
        assert notes.jumps[0] == 32 and len(notes.frames) == 40
        assert bool(mapper.session_stats.loops) == grow


def test_a_search_that_fails_goes_on(saved, monkeypatch, caplog):
    folder = saved[0]
    with mapper_of(bundled(), config=CONFIG) as (mapper, notes, statistics):
        mapper.load(folder)
        with monkeypatch.context() as patch:
            patch.setattr(bundled(), "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
            process(mapper, chunks(WALK, range(4)))
        assert statistics.snapshot().failing and "MemoryError: full" in caplog.text
        process(mapper, chunks(ELSEWHERE, range(4)))
        assert not notes.frames and not statistics.snapshot().failing, "not to be found is no failure"
        process(mapper, chunks(WALK, range(4), first_stamp_s=1.0))
        assert len(notes.frames) == 4 and not statistics.snapshot().failing


def test_an_image_of_another_size_shows_nothing_of_a_map(saved, caplog):
    """A stray one costs no more than itself, and is no failure of the network."""
    with mapper_of(bundled(), config=CONFIG) as (mapper, notes, statistics):
        mapper.load(saved[0])
        other = images(5, 10.0, height=96, width=128)
        for image in other:
            mapper.process([image])
        mapper.process([images(1, 20.0, height=96, width=128)[0], *messages(WALK, range(9, 12), 21.0)])
        assert statistics.snapshot().dropped == {"size": 6} and not statistics.snapshot().failed
        assert "made of 168×126" in caplog.text and "~/reset" in caplog.text
        assert len(notes.frames) == 3 and not notes.streams


def test_a_reset_ends_the_search(saved):
    with mapper_of(bundled(), config=CONFIG) as (mapper, notes, _):
        mapper.load(saved[0])
        mapper.reset()
        assert notes.streams == [False] and len(mapper.map) == 0
        process(mapper, chunks(ELSEWHERE, range(4)))
        assert len(notes.frames) == 4


def test_a_map_saved_in_metres_stays_in_metres(saved, tmp_path):
    """Whatever becomes of the scale: as measured before, as set now, or none."""
    folder, (positions, _), _ = saved
    metric = tmp_path / "metric"
    metric.mkdir()
    (metric / STREAM).write_bytes((folder / STREAM).read_bytes())
    unit = SavedMap.read(folder / MAP)
    in_metres = unit.map_from_world.copy()
    in_metres[:3, 3] *= 2.5
    measured = {"factor": np.array(2.5), "stretches": np.array([[2.5, 0]]), "map_from_world": in_metres}
    replace(unit, positions=np.float32(2.5) * unit.positions, **measured).write(metric / MAP)
    fine = {"map__voxel_size": 5e-5}
    for given, factor in (
        ({"scale__mode": "odometry", "frames__odom": "odom"}, 2.5),
        ({"scale__mode": "fixed", "scale__factor": 4.0}, 4.0),
        ({}, 1.0),
    ):
        robot = Standing() if "frames__odom" in given else None
        with mapper_of(bundled(), robot, config=CONFIG, **given, **fine) as (mapper, notes, _):
            mapper.load(metric)
            extent = np.ptp(mapper.map.points()[0], axis=0)
            assert np.allclose(extent, 2.5 * np.ptp(positions, axis=0), rtol=1e-4)
            old = len(mapper.map)
            process(mapper, chunks(WALK, range(4)))
            assert str(mapper.scale).startswith(given.get("scale__mode", "none"))
            assert {f for moves in notes.moves for f in moves.scale} == ({factor / 2.5} - {1.0})
            assert len(mapper.map) > old
            first = notes.frames[0].map_from_camera[:3, 3]
            assert np.linalg.norm(first) < 0.1 * factor


class Standing:
    """Odometry of a robot that stands still."""

    def odom_from_camera(self, camera: str, stamp_ns: int) -> np.ndarray:
        return np.eye(4)


def test_what_is_no_saved_map_is_refused_before_anything_is_subscribed_to(saved, tmp_path, capfd, loggers):
    folder = saved[0]
    damaged = {
        "without": (lambda f: (f / MAP).unlink(), "there is no "),
        "no_stream": (lambda f: (f / STREAM).unlink(), "no such file"),
        "cut": (lambda f: (f / MAP).write_bytes((f / MAP).read_bytes()[:-9]), "is damaged"),
        "shape": (lambda f: _without_a_row(f / MAP, "confidences"), "confidences has shape"),
        "part": (lambda f: _without(f / MAP, "factor"), "is damaged"),
        "submaps": (lambda f: _without_a_row(f / MAP, "submaps"), "submaps has shape"),
        "kind": (lambda f: (f / MAP).write_bytes((f / STREAM).read_bytes()), "is not a saved map of this"),
    }
    for name, (damage, text) in damaged.items():
        copy = tmp_path / name
        copy.mkdir()
        for file in (MAP, STREAM):
            (copy / file).write_bytes((folder / file).read_bytes())
        damage(copy)
        log = refusal(copy, capfd)
        assert f"map.load = '{copy}': " in log and text in log, (name, log)
    for name in (NOBODYS, str(tmp_path / "nothing")):
        assert f"map.load = '{name}': " in refusal(name, capfd)
    assert "name a folder that ~/save_map wrote" in refusal(tmp_path / "nothing", capfd)
    log = refusal(folder, capfd, "cache.window_size:=3")
    assert f"cache.window_size = {CacheConfig.window_size} (here 3)" in log


def refusal(folder, capfd, *parameters) -> str:
    given = [f"map.load:={folder}", "model.device:=cpu", *parameters]
    words = [word for parameter in given for word in ("-p", parameter)]
    assert run_node(MappingNode, topics.NODE_NAME, ["--ros-args", *words]) == 1
    log = "".join(capfd.readouterr())
    assert "cannot start" in log and "subscribed" not in log and "Traceback" not in log
    return log


def _without_a_row(path, name):
    arrays = load_file(path)
    save_file(arrays | {name: arrays[name][1:]}, path, {"format": "stac_map 4"})


def _without(path, name):
    arrays = load_file(path)
    save_file({k: v for k, v in arrays.items() if k != name}, path, {"format": "stac_map 4"})


def test_a_node_goes_on_where_another_one_ended(tmp_path):
    """Two processes one after the other: the second says the map at once, and where its camera is in it."""
    reliable = {"input.image_qos": "reliable", "image.size": 168, "publish.map_period": 0.2}
    walk = messages(WALK, range(0, 24, 2), 100.0)
    with ros_nodes("observer") as (node,):
        with NodeProcess("before", reliable | {"map.directory": tmp_path}) as first:
            observer = talk_to(node, first)
            observer.map_images(*walk)
            answer = observer.call(topics.SAVE_MAP)
            assert answer.success, answer.message
            folder = Path(answer.message.splitlines()[0]).parent
            poses = [matrix_of(message.pose.pose) for message in observer.received[topics.POSE]]
            saved_points = len(SavedMap.read(folder / MAP).positions)
        with NodeProcess("after", reliable | {"map.load": folder}) as second:
            observer = talk_to(node, second)
            cloud = observer.wait(topics.MAP_POINTS)
            assert len(cloud_points(cloud)[0]) == saved_points
            for message in messages(ELSEWHERE, range(2), 50.0):
                observer.publish(message)
            report = observer.diagnostics_when(
                lambda found: found["input"].get("dropped: not found in the map") == "2"
            )
            assert report["input"]["level"] == DiagnosticStatus.WARN
            assert "has not been found in the map yet" in report["input"]["message"]
            assert not observer.received[topics.POSE]
            observer.map_images(walk[6])
            moved = np.linalg.inv(poses[6]) @ matrix_of(observer.received[topics.POSE][-1].pose.pose)
            assert np.trace(moved[:3, :3]) > 1 + 2 * np.cos(np.radians(4))
            assert np.linalg.norm(moved[:3, 3]) < 0.1
            assert observer.fresh_diagnostics()["input"]["searching"] == "False"
            assert observer.call(topics.RELOCALIZE).success
            assert observer.fresh_diagnostics()["input"]["searching"] == "True"


def talk_to(node, process) -> Observer:
    observer = Observer(node, process, topics.IMAGE, qos_profile("reliable", 10))
    observer.wait_until_ready()
    return observer
