"""What the recorder hears becomes files; what it did not hear is said so."""

from __future__ import annotations

import json
import signal
import time

import cv2
import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from matplotlib.axes import Axes
from nav_msgs.msg import Path
from ros_helpers import Child, ros_nodes, spin_until
from ros_recordings import picture
from std_msgs.msg import Header

from stac_ros.clouds import cloud_message
from stac_ros.images import encode_image
from stac_ros.listen import outside_name
from stac_ros.output_listener import MemorySample, OutputListener, Seen
from stac_ros.report import write_report
from stac_ros.stamps import stamp_message
from stac_ros.topics import DEPTH, DIAGNOSTICS, IMAGE, MAP_POINTS, NODE_NAME, PATH, POSE

STAMPS = [5_000_000_000 + index * 100_000_000 for index in range(3)]
OLD_STAMPS = [4_000_000_000, 4_500_000_000]  # of a stream that was reset
POINTS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
COLOURS = np.array([[250, 10, 20], [30, 240, 50]], np.uint8)


def header(stamp_ns: int, frame: str = "map") -> Header:
    return Header(stamp=stamp_message(stamp_ns), frame_id=frame)


def depth_m() -> np.ndarray:
    depth = np.full((56, 84), 1.25, np.float32)
    depth[0] = np.nan
    return depth


def diagnostics(node: str = NODE_NAME, live_bytes: int = 3 << 20) -> DiagnosticArray:
    def status(part: str, level: bytes, **values: object) -> DiagnosticStatus:
        pairs = [KeyValue(key=key.replace("__", "."), value=str(value)) for key, value in values.items()]
        return DiagnosticStatus(level=level, name=f"{node}: {part}", message="so it is", values=pairs)

    return DiagnosticArray(
        status=[
            status("inference", DiagnosticStatus.WARN, weights="random weights, seed 0"),
            status("memory", DiagnosticStatus.OK, cache__live_bytes=live_bytes, cache__voxel_bytes=1 << 20),
        ]
    )


class ScriptedMapping:
    """Publishes on the node's topics what a short run would."""

    def __init__(self, node) -> None:
        self.publishers = {
            topic: node.create_publisher(
                topic.type, outside_name(topic), 50 if topic is IMAGE else topic.qos()
            )
            for topic in (IMAGE, POSE, PATH, DEPTH, MAP_POINTS, DIAGNOSTICS)
        }

    def _heard(self, *topics) -> bool:
        return all(self.publishers[topic].get_subscription_count() for topic in topics)

    def outputs_heard(self) -> bool:
        return self._heard(POSE, PATH, DEPTH, MAP_POINTS, DIAGNOSTICS)

    def camera_heard(self) -> bool:
        return self._heard(IMAGE)

    def say_health(self) -> None:
        foreign = diagnostics(f"robot2/{NODE_NAME}", 9 << 20)
        for message in (foreign, diagnostics(), foreign):
            self.publishers[DIAGNOSTICS].publish(message)

    def say_map(self, stamp_ns: int, count: int = 2) -> None:
        cloud = cloud_message(header(stamp_ns), POINTS[:count], COLOURS[:count])
        self.publishers[MAP_POINTS].publish(cloud)

    def say_path(self, stamps_ns: list[int], x: float = 0.0) -> None:
        path = Path(header=header(stamps_ns[-1]))
        for index, stamp_ns in enumerate(stamps_ns):
            path.poses.append(PoseStamped(header=header(stamp_ns)))
            path.poses[-1].pose.position.x, path.poses[-1].pose.orientation.w = x + index, 1.0
        self.publishers[PATH].publish(path)

    def say_frame(self, stamp_ns: int, x: float = 0.0) -> None:
        self.publishers[DEPTH].publish(encode_image(depth_m(), "32FC1", header(stamp_ns, "camera")))
        self.say_pose(stamp_ns, x)

    def say_pose(self, stamp_ns: int, x: float = 0.0) -> None:
        pose = PoseWithCovarianceStamped(header=header(stamp_ns))
        pose.pose.pose.position.x, pose.pose.pose.orientation.w = x, 1.0
        self.publishers[POSE].publish(pose)

    def say_what_is_reset(self) -> None:
        for stamp_ns in OLD_STAMPS:
            self.say_frame(stamp_ns)

    def say(self) -> None:
        self.say_map(OLD_STAMPS[-1], 0)  # the reset
        for seconds in (1, 2):  # of a stream that ended when time went back
            self.say_pose(STAMPS[-1] + seconds * 10**9)
        for index, stamp in enumerate(STAMPS):
            self.publishers[IMAGE].publish(encode_image(picture(index), "rgb8", header(stamp, "camera")))
            self.say_frame(stamp, float(index))
        self.say_path(STAMPS[:-1])
        self.say_map(STAMPS[-1])
        self.say_path(STAMPS, 10.0)  # a loop has moved all of them


@pytest.mark.parametrize(
    ("most", "said_s", "kept_s"),
    [
        (0, (1, 2, 3, 4), (1, 2, 3, 4)),
        (3, (1, 2, 3, 4, 5), (3, 4, 5)),
        (0, (1, 2, 500, 3, 4), (1, 2, 500, 3, 4)),  # the node goes on after a single stamp far ahead
        (0, (6, 7, 1, 2), (1, 2)),
    ],
)
def test_poses_of_the_latest_stream_are_kept(most, said_s, kept_s):
    with ros_nodes("script") as (node,), ros_nodes("listener") as (other,):
        script, listener = ScriptedMapping(node), OutputListener(other, most=most)
        spin_until([node, other], script.outputs_heard, "the listener")
        for second in said_s:
            script.say_pose(second * 10**9, float(second))
            spin_until([other], lambda: listener.seen.stamps_ns[-1:] == [second * 10**9], "a pose")  # noqa: B023
        assert listener.seen.stamps_ns == [second * 10**9 for second in kept_s]
        assert [pose[0, 3] for pose in listener.seen.map_from_camera] == list(kept_s)


@pytest.fixture
def recording(tmp_path):
    folder = tmp_path / "out"
    (folder / "depth").mkdir(parents=True)
    (folder / "depth" / "1.000000000.png").write_bytes(b"of an older recording")
    (folder / "depth" / "mine.png").write_bytes(b"the user's own")
    with ros_nodes("script") as (node,), Child("stac_ros.recorder", folder) as recorder:
        script = ScriptedMapping(node)
        spin_until([node], script.outputs_heard, "the recorder's subscriptions")
        assert not script.camera_heard(), "a waiting replay would begin before the recorder hears the node"
        script.say_health()
        spin_until([node], script.camera_heard, "the recorder's interest in the camera")
        script.say_what_is_reset()
        depth_images = folder / "depth"
        spin_until([node], lambda: len(list(depth_images.iterdir())) == 3, "two depth images and mine.png")
        script.say()
        spin_until([node], lambda: len(list(depth_images.iterdir())) == 6, "three more")
        recorder.signal(signal.SIGTERM)
        assert recorder.wait() == 0, recorder.output
        yield folder, recorder.output


def test_map_trajectory_depth_figures_and_report(recording):
    folder, said = recording
    ply = (folder / "map.ply").read_bytes()
    assert b"element vertex 2\n" in ply
    first = np.frombuffer(ply.split(b"end_header\n")[1], np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))[0]
    assert np.allclose(first["xyz"], POINTS[0]) and np.array_equal(first["rgb"], COLOURS[0])

    lines = np.loadtxt(folder / "trajectory.tum")
    assert np.allclose(lines[:, 0], np.array(STAMPS) / 1e9)
    assert np.allclose(lines[:, 1], [10, 11, 12]) and np.allclose(lines[:, 7], 1)

    names = sorted(file.name for file in (folder / "depth").iterdir())
    assert names == ["5.000000000.png", "5.100000000.png", "5.200000000.png", "mine.png"]
    depth = cv2.imread(str(folder / "depth" / "5.100000000.png"), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16 and (depth[0] == 0).all() and (depth[1:] == 1250).all()

    told = json.loads((folder / "diagnostics.json").read_text())
    assert told["last"]["inference"]["values"]["weights"] == "random weights, seed 0"
    assert [sample["cache_bytes"] for sample in told["memory"]] == [4 << 20]
    assert "inference: warning, so it is" in said and "random weights, seed 0" in said

    report = cv2.imread(str(folder / "report.png"))
    assert report.shape[0] > 500 and report.std() > 10
    assert not [file for file in folder.rglob(".*")], "temporary files were left behind"


def test_a_camera_that_goes_on_does_not_hold_up_the_end(tmp_path):
    """Nor does it leave frames that the map lacks; asked by SIGHUP, as of a terminal that is closed."""
    with ros_nodes("script") as (node,), Child("stac_ros.recorder", tmp_path) as recorder:
        script = ScriptedMapping(node)
        spin_until([node], script.outputs_heard, "the recorder's subscriptions")
        said_ns, mapped_at = [], 0.0

        def goes_on(done) -> bool:
            """One more frame, and twice a second the map of all so far, however slow this process is."""
            nonlocal mapped_at
            said_ns.append(STAMPS[0] + len(said_ns) * 10**8)
            script.say_frame(said_ns[-1])
            if time.monotonic() > mapped_at + 0.5:
                script.say_map(said_ns[-1])
                script.say_path(said_ns)
                mapped_at = time.monotonic()
            return done()

        depth_images = tmp_path / "depth"
        spin_until([node], lambda: goes_on(lambda: list(depth_images.glob("*.png"))), "a first frame")
        recorder.signal(signal.SIGHUP)
        spin_until([node], lambda: goes_on(lambda: not recorder.running), "the end")
        assert recorder.wait() == 0, recorder.output
    assert "waiting for map and path of the last frame" in recorder.output
    assert "did not come" not in recorder.output, recorder.output
    recorded = np.loadtxt(tmp_path / "trajectory.tum")[:, 0]
    assert len(recorded) > 3 and recorded[-1] < said_ns[-1] / 1e9
    assert (tmp_path / "map.ply").exists() and (tmp_path / "report.png").exists()


def test_hearing_nothing_is_told_and_leaves_an_older_recording_alone(tmp_path):
    (tmp_path / "depth").mkdir()
    old = [tmp_path / "map.ply", tmp_path / "depth" / "1.000000000.png"]
    for file in old:
        file.write_bytes(b"of an older recording")
    with Child("stac_ros.recorder", tmp_path) as recorder, ros_nodes("witness") as (node,):
        spin_until([node], lambda: node.count_subscribers("/diagnostics"), "the recorder")
        recorder.signal(signal.SIGINT)
        assert recorder.wait() == 0, recorder.output
        assert "No diagnostics were heard" in recorder.output and "nothing was written" in recorder.output
    assert all(file.read_bytes() == b"of an older recording" for file in old)
    assert len(list(tmp_path.rglob("*"))) == 3, "files were added"


def test_a_folder_that_cannot_be_written_ends_with_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with Child("stac_ros.recorder", tmp_path / "file") as recorder:
        assert recorder.wait() == 1
        assert "stac-record: " in recorder.output and "Traceback" not in recorder.output


def test_a_long_way_is_drawn_by_no_more_than_a_short_one(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot

    def counted(axes, x, *others, **options):
        drawn.append(len(x))
        return plot(axes, x, *others, **options)

    monkeypatch.setattr(Axes, "plot", counted)
    points = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.uint8)
    samples = [MemorySample(second, 1 << 20, 1 + second) for second in range(20_000)]
    write_report(
        tmp_path / "report.png",
        Seen([0] * 20_000, [np.eye(4)] * 20_000, 0, 0, 0, *points, memory=samples),
    )
    assert len(drawn) == 2 and max(drawn) <= 5000
