"""The node in a process of its own: topics, services and signals, seen by another process over DDS."""

from __future__ import annotations

import array
import contextlib
import itertools
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import TransformStamped
from lap_helpers import expected_frames, lap, stamped
from node_helpers import (
    HEIGHT,
    NOBODYS,
    WIDTH,
    NodeProcess,
    Observer,
    header,
    images,
    matrix_of,
    stamps_s,
)
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import ReliabilityPolicy
from ros_helpers import StaticTransformBroadcaster, ros_nodes
from safetensors.torch import save_file
from scipy.spatial import cKDTree
from sensor_msgs.msg import CameraInfo, CompressedImage
from tiny import TINY, golden_weights, synthetic_frames
from walks import LAP, frames_of

from stac_core.training.figures import turn_error
from stac_ros import topics
from stac_ros.camera_messages import calibration_message
from stac_ros.clouds import cloud_points
from stac_ros.continuity import PERSISTENT
from stac_ros.images import decode_depth, encode_image
from stac_ros.mapper import MAP_FROM_OPTICAL
from stac_ros.mapping_node import MappingNode
from stac_ros.node_process import run_node
from stac_ros.settings import MapSettings, PointSettings
from stac_ros.topics import qos_profile
from stac_ros.transforms import (
    TransformBroadcaster,
    stamped_transform,
    transform_matrix,
)

LAST = 3  # images mapped where a test needs some


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """All nodes of this file, started together because each takes seconds to load PyTorch."""
    plain = {
        "input.image_qos": "reliable",  # a lost image would be a lost test
        "map.directory": tmp_path_factory.mktemp("maps"),
        "frames.map": "plain_map",
        "publish.map_period": 0.2,
    }
    robot = {
        "input.compressed": True,
        "frames.map": "robot_map",
        "frames.odom": "odom",
        "frames.camera": "front",
        "scale.mode": "fixed",
        "scale.factor": 3.0,
    }
    stopped = {"input.image_qos": "reliable", "worker.mailbox_size": 100, "publish.map_period": 1000.0}
    patient = {"input.image_qos": "reliable", "worker.chunk_wait": 3600.0, "worker.mailbox_size": 40}
    patient |= {"image.size": 168, "publish.map_period": 0.2}
    settings = {"plain": plain, "robot": robot, "stopped": stopped, "patient": patient}
    with contextlib.ExitStack() as stack:
        found = {}
        for name, parameters in settings.items():
            found[name] = stack.enter_context(NodeProcess(name, parameters))
        yield found


@pytest.fixture(scope="module")
def plain_observer(processes):
    with ros_nodes("observer") as (node,):
        observer = Observer(node, processes["plain"], topics.IMAGE, qos_profile("reliable", 10))
        observer.wait_until_ready()
        yield observer


@pytest.fixture
def observer(plain_observer):
    """The plain node with a fresh stream and an empty map."""
    plain_observer.restart()
    return plain_observer


def qos_of_node(observer: Observer, infos):
    return next(
        info.qos_profile
        for info in infos
        if info.node_name == topics.NODE_NAME and observer.under_test.namespace in info.node_namespace
    )


def test_every_topic_has_the_quality_of_service_of_the_table(observer):
    for topic in topics.OUTPUTS:
        infos = observer.node.get_publishers_info_by_topic(observer.name(topic))
        found, wanted = qos_of_node(observer, infos), topic.qos()
        assert (found.reliability, found.durability) == (wanted.reliability, wanted.durability), topic.name
    for topic, reliability in (
        (topics.IMAGE, ReliabilityPolicy.RELIABLE),
        (topics.CAMERA_INFO, ReliabilityPolicy.BEST_EFFORT),
    ):
        infos = observer.node.get_subscriptions_info_by_topic(observer.name(topic))
        assert qos_of_node(observer, infos).reliability == reliability, topic.name


@pytest.mark.parametrize("image", [topics.DEPTH, topics.CONFIDENCE], ids=lambda topic: topic.name)
def test_the_calibration_of_an_image_lies_beside_it(image):
    """Where image_transport, and with it RViz and depth_image_proc, look for it."""
    assert topics.DEPTH_INFO.name == f"{image.name.rpartition('/')[0]}/camera_info"


def test_every_topic_speaks_of_every_image_with_its_stamp_and_frame(observer):
    sent = images(LAST)
    observer.map_images(*sent)
    stamps = stamps_s(sent)
    for topic, frame in {
        topics.POINTS: "plain_map",
        topics.POSE: "plain_map",
        topics.ODOMETRY: "plain_map",
        topics.DEPTH: "camera",
        topics.DEPTH_INFO: "camera",
        topics.CONFIDENCE: "camera",
    }.items():
        observer.spin_until(lambda topic=topic: len(observer.received[topic]) == LAST, topic.name)
        assert stamps_s(observer.received[topic]) == stamps, topic.name
        assert {message.header.frame_id for message in observer.received[topic]} == {frame}, topic.name
    path = observer.wait(topics.PATH, lambda path: len(path.poses) == LAST)
    assert path.header.frame_id == "plain_map" and stamps_s(path.poses) == stamps

    poses = [matrix_of(message.pose.pose) for message in observer.received[topics.POSE]]
    assert [matrix_of(message.pose.pose).tolist() for message in observer.received[topics.ODOMETRY]] == [
        pose.tolist() for pose in poses
    ]
    assert {message.child_frame_id for message in observer.received[topics.ODOMETRY]} == {"camera"}

    def ours():
        transforms = [t for message in observer.received[topics.TF] for t in message.transforms]
        return [t for t in transforms if t.header.frame_id == "plain_map"]

    observer.spin_until(lambda: len(ours()) == LAST, topics.TF.name)
    assert [t.child_frame_id for t in ours()] == ["camera"] * LAST and stamps_s(ours()) == stamps
    for transform, pose in zip(ours(), poses, strict=True):
        assert np.allclose(transform_matrix(transform.transform), pose, atol=1e-9)

    depth, info = observer.received[topics.DEPTH][-1], observer.received[topics.DEPTH_INFO][-1]
    confidence = observer.received[topics.CONFIDENCE][-1]
    assert (depth.height, depth.width, depth.encoding) == (HEIGHT, WIDTH, "32FC1")
    assert (info.height, info.width) == (HEIGHT, WIDTH) and info.k[0] > 0
    assert (confidence.height, confidence.width, confidence.encoding) == (HEIGHT, WIDTH, "32FC1")
    assert np.isfinite(decode_depth(depth)).all() and decode_depth(confidence).min() >= 1
    whole = observer.wait(topics.MAP_POINTS, lambda cloud: stamps_s([cloud]) == stamps[-1:])
    assert whole.header.frame_id == "plain_map" and whole.width > 0
    positions, colours = cloud_points(observer.received[topics.POINTS][-1])
    assert len(positions) > 0 and np.isfinite(positions).all()
    seen = {tuple(colour) for colour in synthetic_frames(LAST, HEIGHT, WIDTH)[-1].reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in colours.tolist()} <= seen


def test_who_comes_late_gets_the_whole_map(observer):
    observer.map_images(*images(1))
    whole = observer.wait(topics.MAP_POINTS, lambda cloud: cloud.width > 0)
    late: list = []
    topic = topics.MAP_POINTS
    subscription = observer.node.create_subscription(
        topic.type, observer.name(topic), late.append, topic.qos()
    )
    observer.spin_until(lambda: late, "the latched map")
    assert late[0] == whole
    observer.node.destroy_subscription(subscription)


def test_without_a_level_map_in_metres_there_is_no_grid_and_the_log_says_why_once(observer):
    observer.map_images(*images(LAST))
    observer.wait(topics.MAP_POINTS, lambda cloud: cloud.width > 0)
    log = observer.under_test.output
    assert not observer.received[topics.GRID]
    assert log.count("nothing is sent on /plain/stac_mapping/map, to which somebody listens") == 1
    assert "name the robot's odometry in frames.odom, and set scale.mode to odometry" in log


def test_diagnostics_tell_what_runs_and_how(observer):
    before = observer.fresh_diagnostics()
    observer.map_images(*images(LAST))
    after = observer.fresh_diagnostics()
    assert int(after["inference"]["images mapped"]) - int(before["inference"]["images mapped"]) == LAST
    assert int(after["input"]["images received"]) - int(before["input"]["images received"]) == LAST
    assert after["input"]["topic"] == "/plain/image" and after["input"]["publishers"] == "1"
    inference = after["inference"]
    assert inference["weights"] and inference["device"] == "cpu" and inference["precision"] == "float32"
    assert "rosbags.image" in inference["libraries"] or "cv_bridge" in inference["libraries"]
    mean, p95, most = (float(inference[f"step {what} [ms]"]) for what in ("mean", "p95", "max"))
    assert 0 < mean <= most and p95 <= most
    memory = after["memory"]
    assert int(memory["cache.frames_seen"]) == LAST
    assert 0 < int(memory["cache.live_bytes"]) < int(memory["cache.byte_limit"])
    assert int(after["map"]["points"]) > 0 and after["map"]["poses"] == str(LAST)
    assert after["map"]["scale"].startswith("none") and after["map"]["intrinsics"] in (
        "predicted",
        "camera_info",
    )


def test_a_second_publisher_of_images_is_warned_of(observer):
    stamps = itertools.count(100)

    def map_one() -> None:  # silence would be the greater trouble
        observer.map_images(*images(1, next(stamps)))

    second = observer.node.create_publisher(topics.IMAGE.type, observer.name(topics.IMAGE), 1)
    found = observer.diagnostics_when(lambda now: now["input"]["publishers"] == "2", map_one)["input"]
    observer.node.destroy_publisher(second)
    assert found["level"] == DiagnosticStatus.WARN
    assert "2 publishers on /plain/image, whose images would mix: stop one" in found["message"]
    observer.diagnostics_when(lambda now: now["input"]["publishers"] == "1")


def test_reset_empties_the_map_and_begins_anew(observer):
    observer.map_images(*images(2))
    observer.wait(topics.MAP_POINTS, lambda cloud: cloud.width > 0)
    observer.forget()
    answer = observer.call(topics.RESET)
    assert answer.success and "empty" in answer.message
    observer.wait(topics.MAP_POINTS, lambda cloud: cloud.width == 0)
    observer.wait(topics.PATH, lambda path: len(path.poses) == 0)
    observer.map_images(*images(1, first_stamp_s=5))  # earlier: no jump in time, for nothing came before
    observer.wait(topics.PATH, lambda path: stamps_s(path.poses) == [5.0])


def test_pause_ignores_images_until_told_otherwise(observer):
    observer.map_images(*images(1))
    before = observer.fresh_diagnostics()
    answer = observer.call(topics.PAUSE, data=True)
    assert answer.success and "paused" in answer.message
    for message in images(2, first_stamp_s=200):
        observer.publish(message)

    already = int(before["input"].get("dropped: paused", 0))
    now = observer.diagnostics_when(lambda now: now["input"].get("dropped: paused") == str(already + 2))
    assert now["input"]["paused"] == "True"
    assert observer.call(topics.PAUSE, data=False).message == "running"
    observer.map_images(*images(1, first_stamp_s=300))
    assert stamps_s(observer.received[topics.POSE]) == [100.0, 300.0]
    path = observer.wait(topics.PATH, lambda path: len(path.poses) == 2)
    assert stamps_s(path.poses) == [100.0, 300.0], "the map has stayed"


def test_the_map_is_saved_where_the_answer_says(observer):
    empty = observer.call(topics.SAVE_MAP)
    assert not empty.success and "nothing to save yet" in empty.message
    observer.map_images(*images(2))
    answer = observer.call(topics.SAVE_MAP)
    ply, tum = map(Path, answer.message.splitlines())
    whole = observer.wait(topics.MAP_POINTS, lambda cloud: stamps_s([cloud]) == [101.0])
    assert answer.success and f"element vertex {whole.width}\n".encode() in ply.read_bytes()
    assert [float(line.split()[0]) for line in tum.read_text().splitlines()] == [100.0, 101.0]
    again = observer.call(topics.SAVE_MAP)
    assert again.success and again.message != answer.message, "a saved map is not overwritten"


def test_a_recording_that_loops_begins_a_new_stream(observer):
    before = observer.fresh_diagnostics()["input"]
    for _ in range(2):
        observer.forget()
        observer.map_images(*images(2))
    path = observer.wait(topics.PATH, lambda path: len(path.poses) == 2)
    assert stamps_s(path.poses) == [100.0, 101.0]
    after = observer.fresh_diagnostics()["input"]
    assert int(after["events: time jumps"]) == int(before.get("events: time jumps", 0)) + 1


def test_images_of_another_size_begin_a_new_stream(observer):
    observer.map_images(*images(2))
    set_anew = images(PERSISTENT + 1, 200, 64, 96)
    for stray in set_anew[: PERSISTENT - 1]:  # what they might be
        observer.publish(stray)
    observer.map_images(*set_anew[PERSISTENT - 1 :])
    last_two = stamps_s(set_anew[-2:])
    path = observer.wait(topics.PATH, lambda path: stamps_s(path.poses) == last_two)
    depth = observer.wait(topics.DEPTH, lambda depth: stamps_s([depth]) == last_two[1:])
    assert (depth.height, depth.width) == (64, 96) and len(path.poses) == 2
    assert "image size changed from 64×48 to 96×64: a new stream begins" in observer.under_test.output


def test_bad_images_are_counted_and_the_node_lives_on_with_its_map(observer):
    observer.map_images(*images(1))
    before = observer.fresh_diagnostics()["input"]
    unknown, depth, empty, short, truncated, flat = bad = images(6, first_stamp_s=200)
    unknown.encoding, depth.encoding, empty.width = "rgb9", "16UC1", 0
    short.step, truncated.data = 3, truncated.data[:-1]
    swapped = images(1, first_stamp_s=300)[0]  # mono16 in the other byte order: no fault at all
    swapped.encoding, swapped.is_bigendian, swapped.step = "mono16", 1, 2 * WIDTH
    swapped.data = array.array("B", np.full((HEIGHT, WIDTH), 12345, ">u2").tobytes())
    for index, message in enumerate(bad[:5]):
        observer.publish(message)
        swapped.header = header(300 + index)
        observer.map_images(swapped)  # the answer to this one is the answer to both
    after = observer.fresh_diagnostics()["input"]
    for cause, count in {"encoding": 2, "size": 2, "truncated": 1}.items():
        key = f"dropped: bad image ({cause})"
        assert int(after[key]) - int(before.get(key, 0)) == count, cause
    path = observer.wait(topics.PATH, lambda path: len(path.poses) == 6)
    assert stamps_s(path.poses)[0] == 100.0, "the stream and its map went on"
    assert "'rgb9' is not supported: publish one of rgb8" in observer.under_test.output

    flat.height, flat.data = 1, flat.data[: flat.step]  # less than a patch of the network
    observer.publish(flat)
    observer.map_images(*images(1, first_stamp_s=400))
    assert "less than one patch" in observer.fresh_diagnostics()["inference"]["last error"]
    path = observer.wait(topics.PATH, lambda path: len(path.poses) == 7)
    assert stamps_s(path.poses)[0] == 100.0


def test_intrinsics_come_from_camera_info_once_there_is_one(observer):
    topic = topics.CAMERA_INFO
    camera = observer.node.create_publisher(topic.type, observer.name(topic), topic.qos())
    info = CameraInfo(height=HEIGHT, width=WIDTH, distortion_model="plumb_bob", d=[0.0] * 5)
    info.k = np.array([61.0, 0, 31, 0, 62, 23, 0, 0, 1])
    info.p = np.array([61.0, 0, 31, 0, 0, 62, 23, 0, 0, 0, 1, 0])

    stamps = itertools.count(100)

    def map_one() -> None:  # best effort: both are sent until they have arrived
        camera.publish(info)
        observer.map_images(*images(1, next(stamps)))

    observer.diagnostics_when(lambda now: now["map"]["intrinsics"] == "camera_info", map_one)
    observer.restart()
    sent = images(1)
    observer.map_images(*sent)
    found = observer.wait(topics.DEPTH_INFO)
    assert (
        found.header == sent[0].header and np.array_equal(found.k, info.k) and np.array_equal(found.p, info.p)
    )
    observer.restart()
    observer.map_images(*images(1, 200, 64, 96))  # no longer the size of the calibration
    found = observer.wait(topics.DEPTH_INFO, lambda found: found.height == 64)
    assert not np.array_equal(found.k, info.k) and found.k[2] == pytest.approx(48, abs=1)


def test_a_calibration_that_no_camera_has_is_refused_once_and_images_are_mapped_without(observer):
    topic, stamps = topics.CAMERA_INFO, itertools.count(100)
    camera = observer.node.create_publisher(topic.type, observer.name(topic), topic.qos())
    absurd = calibration_message(np.diag([1e-3, 1e-3, 1.0]), HEIGHT, WIDTH, header(0))
    failed = observer.fresh_diagnostics()["inference"]["chunks failed"]
    refused = "camera_info is refused: intrinsics = "

    def map_one() -> bool:  # best effort: both are sent until they have arrived
        camera.publish(absurd)
        observer.map_images(*images(1, next(stamps)))
        return refused in observer.under_test.output

    observer.spin_until(map_one, "the refusal")
    observer.forget()
    observer.map_images(*images(2, 200))
    now = observer.fresh_diagnostics()
    assert now["inference"]["chunks failed"] == failed and now["map"]["intrinsics"] == "predicted"
    assert observer.under_test.output.count(refused) == 1
    assert observer.received[topics.DEPTH_INFO][-1].k[0] > 1


def test_a_camera_that_has_a_parent_already_is_warned_of_once(observer):
    """As drivers place it; the root of what they place is what the map can be tied to."""
    drivers = StaticTransformBroadcaster(observer.node)
    for parent, child in (("mount", "camera_link"), ("camera_link", "colour_optical_frame")):
        drivers.send(stamped_transform(np.eye(4), parent, child, header(1).stamp))
    warning = "colour_optical_frame has the parent camera_link on /tf_static"

    def look_on() -> bool:
        observer.map_images(*images(1, time.time(), frame="colour_optical_frame"))
        return warning in observer.under_test.output

    observer.spin_until(look_on, "the warning")
    look_on()
    log = observer.under_test.output
    assert log.count(warning) == 1 and "or where there is none to mount, the root" in log


def test_live_parameters_change_and_fixed_ones_do_not(observer):
    client = observer.node.create_client(SetParameters, "/plain/stac_mapping/set_parameters")
    observer.spin_until(client.service_is_ready, "the parameter service")

    def set_parameter(name: str, value: int):
        given = Parameter(
            name=name, value=ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
        )
        future = client.call_async(SetParameters.Request(parameters=[given]))
        observer.spin_until(future.done, "the answer")
        return future.result().results[0]

    assert set_parameter("points.max_points", 17).successful
    observer.map_images(*images(1))
    assert observer.wait(topics.POINTS).width == 17
    assert not set_parameter("points.max_points", 0).successful
    refused = set_parameter("cache.window_size", 9)
    assert not refused.successful and "read-only" in refused.reason
    assert set_parameter("points.max_points", 250_000).successful


def odom_from_camera(stamp_s: float) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    pose[:3, 3] = stamp_s % 100, 0.5, 1.2
    return pose


def test_with_odometry_the_node_corrects_it_in_metres(processes):
    """Compressed, best-effort images; the camera is part of a robot: map → odom, never a second parent."""
    with ros_nodes("observer") as (node,):
        observer = Observer(node, processes["robot"], topics.COMPRESSED_IMAGE, topics.COMPRESSED_IMAGE.qos())
        observer.wait_until_ready()
        broadcaster = TransformBroadcaster(node)

        def jpeg(stamp_s: float) -> CompressedImage:
            pixels = synthetic_frames(3, HEIGHT, WIDTH)[int(stamp_s) % 3]
            data = array.array("B", cv2.imencode(".jpg", pixels[:, :, ::-1])[1].tobytes())
            return CompressedImage(header=header(stamp_s, "mislabelled"), format="jpeg", data=data)

        def move_and_look(stamp_s: float) -> bool:
            pose = odom_from_camera(stamp_s)
            broadcaster.send(stamped_transform(pose, "odom", "front", header(stamp_s).stamp))
            observer.publish(jpeg(stamp_s))
            return bool(observer.received[topics.POSE])

        stamp = [100.0]

        def look_on() -> bool:  # best effort: look until one image has come through
            stamp[0] += 1
            return move_and_look(stamp[0])

        observer.spin_until(look_on, "a pose")
        first = observer.received[topics.POSE][0]
        first_stamp = stamps_s([first])[0]
        assert first.header.frame_id == "robot_map"
        assert np.allclose(matrix_of(first.pose.pose), odom_from_camera(first_stamp), atol=1e-6)
        assert observer.wait(topics.DEPTH).header.frame_id == "front"

        def ours() -> dict[float, TransformStamped]:
            sent = [t for message in observer.received[topics.TF] for t in message.transforms]
            return {stamps_s([t])[0]: t for t in sent if t.header.frame_id == "robot_map"}

        def poses_s() -> list[float]:
            return stamps_s(observer.received[topics.POSE])

        observer.spin_until(lambda: len(poses_s()) > 2 or look_on(), "a pose and more", 60)
        observer.spin_until(
            lambda: set(poses_s()) <= ours().keys(),
            "the transform of every pose",  # another topic, which may come later
        )
        assert all(stamp_s % 1 == 0 for stamp_s in ours()), "stamps of another clock: nothing in between"
        clock_warning = "this node's clock says"
        observer.spin_until(lambda: clock_warning in observer.under_test.output, "the warning of the clock")
        log = observer.under_test.output
        assert log.count(clock_warning) == 1 and "set use_sim_time to true" in log
        for pose in observer.received[topics.POSE]:
            seconds = stamps_s([pose])[0]
            map_from_camera = transform_matrix(ours()[seconds].transform) @ odom_from_camera(seconds)
            assert np.allclose(map_from_camera, matrix_of(pose.pose.pose), atol=1e-6)

        def look_now() -> bool:
            return move_and_look(int(time.time())) and poses_s()[-1] > 1e9

        observer.spin_until(look_now, "a pose of the present")
        observer.spin_until(lambda: any(stamp_s % 1 for stamp_s in ours()), "map → odom said again")
        assert {transform.child_frame_id for transform in ours().values()} == {"odom"}

        def look_back() -> None:  # to a time of which odometry does not speak
            now_s = time.time()
            broadcaster.send(stamped_transform(odom_from_camera(now_s), "odom", "front", header(now_s).stamp))
            observer.publish(jpeg(5000.0))

        now = observer.diagnostics_when(lambda now: "dropped: no odometry (stamp)" in now["input"], look_back)
        assert now["map"]["scale"] == "fixed, 3 m per unit"
    processes["robot"].signal(signal.SIGINT)
    assert processes["robot"].wait() == 0


def test_a_signal_lets_the_chunk_at_hand_finish_and_be_heard(processes):
    """Even where the terminal is closed: then shell and system send SIGHUP, both."""
    with ros_nodes("observer") as (node,):
        observer = Observer(node, processes["stopped"], topics.IMAGE, qos_profile("reliable", 100))
        observer.wait_until_ready()
        endless = itertools.cycle(images(3))
        stamps = itertools.count(100)

        def hear_a_pose() -> bool:
            message = next(endless)
            message.header = header(next(stamps))
            observer.publish(message)
            return bool(observer.received[topics.POSE])

        observer.spin_until(hear_a_pose, "a pose")  # more images wait: a chunk is at hand now
        for _ in range(2):
            processes["stopped"].signal(signal.SIGHUP)
            time.sleep(0.05)  # two that wait at the same time would be one
        observer.spin_until(lambda: not processes["stopped"].running, "the end of the node")
        assert processes["stopped"].wait() == 0
        log = processes["stopped"].output
        assert "the chunk at hand is finished first" in log and "Traceback" not in log
        heard = len(observer.received[topics.POSE])
        assert f"stopped: {heard} images mapped" in log
        assert len(observer.received[topics.DEPTH]) == heard
        (last_map,) = observer.received[topics.MAP_POINTS]
        assert last_map.header.stamp == observer.received[topics.POSE][-1].header.stamp and last_map.width > 0


def start(*parameters: str) -> int:
    """The exit status of a node that cannot start; it must not get as far as to serve anything."""
    arguments = ["--ros-args"]
    for parameter in parameters:
        arguments += ["-p", parameter]
    return run_node(MappingNode, topics.NODE_NAME, arguments)


def test_bad_weights_are_refused_before_anything_is_subscribed_to(tmp_path, capfd, loggers):
    class Code:
        def __reduce__(self):
            return (print, ("this must not run",))

    good = tmp_path / "good.safetensors"
    save_file({name: torch.zeros(2) for name in ("a", "b")}, good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-4])
    torch.save({"weights": Code()}, tmp_path / "code.pt")
    save_file(golden_weights(), tmp_path / "other.safetensors", {"name": TINY.name})
    for name, text in {
        "missing.safetensors": "does not exist: check model.checkpoint",
        "cut.safetensors": "truncated",
        "code.pt": "carries code",
        "other.safetensors": "is no checkpoint of embedded",
    }.items():
        assert start(f"model.checkpoint:={tmp_path / name}") == 1
        log = "".join(capfd.readouterr())
        assert "cannot start" in log and text in log, name
        assert "subscribed" not in log and "Traceback" not in log and "this must not run" not in log


def test_what_ros_or_the_kernels_refuse_ends_in_one_message_too(capfd, loggers):
    # Not triton: tests of kernels in this process have its interpreter, which runs everywhere.
    on_cpu = ["-p", "model.device:=cpu", "-p", "kernels.backend:=cuda"]
    for arguments, text in {
        ("--params-file", "nowhere.yaml"): "nowhere.yaml",
        ("-r", "image:=a b"): "a b",
        ("-r", "__ns:=two words"): "two words",
        tuple(on_cpu): "kernels.backend = 'cuda' cannot run",
    }.items():
        assert run_node(MappingNode, topics.NODE_NAME, ["--ros-args", *arguments]) == 1
        log = "".join(capfd.readouterr())
        assert "cannot start: " in log and text in log, arguments
        assert "Traceback" not in log and "subscribed" not in log


def test_a_map_directory_that_cannot_be_written_is_told_at_start(tmp_path, capfd, loggers):
    (tmp_path / "file").write_text("in the way")
    directories = {tmp_path / "file" / "maps": True, tmp_path / "new" / "maps": False, NOBODYS: True}
    for directory, told in directories.items():
        assert start(f"map.directory:={directory}", "model.device:=quantum") == 1
        log = "".join(capfd.readouterr())
        assert (f"map.directory = '{directory}' cannot be written: " in log) == told
        assert "quantum" in log, "a warning, no refusal: the start went on to the device"


def test_a_budget_without_room_for_an_image_is_told_at_start(capfd, loggers, monkeypatch):
    def stop(node: MappingNode) -> None:
        raise ValueError("far enough")

    monkeypatch.setattr(MappingNode, "_subscribe", stop)
    for budget, told in {"1e3": True, "1e9": False}.items():
        assert start(f"cache.memory_budget:={budget}", "model.device:=cpu") == 1
        log = "".join(capfd.readouterr())
        assert ("4:3 images cannot be mapped: cache.memory_budget = 1000: less than the " in log) == told
        assert "far enough" in log, "a warning, no refusal"


def test_bad_parameters_are_refused_before_anything_is_loaded(capfd, loggers):
    for parameter, text in {
        "cache.windw_size:=3": "did you mean 'cache.window_size'",
        "cache.window_size:=0": "nearest value that works: 1",
        "model.device:=quantum": "quantum",
        "cache.mode:=full": "'full' needs all images at once; a node streams: causal",
        "cache.repose_frames:=10": "start: cache.repose_frames = 10: a submap ends with all its frames",
    }.items():
        assert start(parameter) == 1
        log = "".join(capfd.readouterr())
        assert "cannot start" in log and text in log, parameter
        assert "subscribed" not in log and "Traceback" not in log


def test_a_patient_node_takes_whole_chunks_and_what_is_left_at_the_end_of_a_recording(processes):
    with ros_nodes("player") as (node,):
        observer = Observer(node, processes["patient"], topics.IMAGE, qos_profile("reliable", 10))
        end = topics.END_OF_INPUT
        at_the_end = node.create_publisher(end.type, observer.name(end), end.qos())
        observer.wait_until_ready()

        def told(count: int) -> list[float]:
            observer.spin_until(lambda: len(observer.received[topics.POSE]) >= count, f"{count} poses")
            return stamps_s(observer.received[topics.POSE])

        sent = images(9)
        sent[3].encoding = "unheard of"  # the last one of its chunk
        for message in sent[:6]:
            observer.publish(message)
        assert told(3) == [100, 101, 102]
        observer.wait(topics.PROGRESS, lambda newest: newest.stamp == sent[3].header.stamp)
        found = observer.diagnostics_when(lambda found: found["input"]["images waiting"] == "2")
        assert found["inference"]["chunks"] == "1 of 3" and len(observer.received[topics.POSE]) == 3

        at_the_end.publish(sent[5].header)  # after its image
        assert told(5)[3:] == [104, 105]
        at_the_end.publish(sent[8].header)  # before its image
        time.sleep(0.5)  # so that it arrives first
        for message in sent[6:]:
            observer.publish(message)
        assert told(8)[5:] == [106, 107, 108]
        found = observer.diagnostics_when(lambda found: found["inference"]["images mapped"] == "8")
        assert found["inference"]["chunks"] == "2 of 3, 1 of 2"


def test_a_loop_that_closes_moves_what_was_said_of_the_whole_walk(processes):
    """Path and map lie better in the end than as they were said image by image; judged by true poses."""
    frames = frames_of(LAP)
    with ros_nodes("walker") as (node,):
        observer = Observer(node, processes["patient"], topics.IMAGE, qos_profile("reliable", len(frames)))
        observer.wait_until_ready()
        observer.restart()
        for number, frame in enumerate(frames):
            observer.publish(encode_image(frame.image, "rgb8", stamped(number)))
        last = stamped(len(frames) - 1).stamp
        path = observer.wait(topics.PATH, lambda path: path.header.stamp == last)
        whole = observer.wait(topics.MAP_POINTS, lambda cloud: cloud.header.stamp == last)
        observer.spin_until(lambda: len(observer.received[topics.POSE]) == len(frames), "all poses")
        memory = observer.fresh_diagnostics()["memory"]
        said = np.stack([matrix_of(message.pose.pose) for message in observer.received[topics.POSE]])
    assert int(memory["loops"]) >= 1 and int(memory["submaps"]) == lap().said[-1].submap + 1
    moved = np.stack([matrix_of(stamped.pose) for stamped in path.poses])
    true = np.stack([frame.world_from_camera for frame in frames])
    live, now = turn_error(said, true), turn_error(moved, true)
    print(f"turned by {live:.2f}° as said, {now:.2f}° in the last path")
    assert now < 0.8 * live
    expected = expected_frames(MAP_FROM_OPTICAL, 1.0)
    assert np.allclose(moved, [frame.map_from_camera for frame in expected], atol=1e-3)
    seen = np.concatenate([frame.points(PointSettings()).positions for frame in expected])
    off = cKDTree(seen).query(cloud_points(whole)[0][::7])[0]
    assert off.max() < 2 * MapSettings().voxel_size
