"""The command behind `stac-eval bag`, as far as it refuses to begin."""

from __future__ import annotations

import sys

import pytest
import rclpy
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Path
from ros_helpers import ros_nodes, spin_until
from ros_recordings import write_bag
from std_msgs.msg import Header

from stac_core.evaluation.datasets.bag_file import BagFile
from stac_ros.answer_recorder import AnswerRecorder
from stac_ros.bag_evaluation import main
from stac_ros.listen import outside_name
from stac_ros.stamps import stamp_message
from stac_ros.topics import NODE_NAME, PATH, POSE


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_recording_is_not_replaced(tmp_path, monkeypatch, caplog, kind):
    result = tmp_path / "result"
    kept = result / "notes.txt" if kind == "folder" else result
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    words = ["bag_evaluation", str(write_bag(tmp_path / "bag", 1)), str(result)]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 1
    assert f"{result} is no recording and stays" in caplog.text and kept.read_text() == "mine"


def test_where_nothing_can_be_written_nothing_is_played(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    result = tmp_path / "file" / "result"
    words = ["bag_evaluation", str(write_bag(tmp_path / "bag", 1)), str(result)]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 1
    assert f"{result} cannot be written: " in caplog.text


def test_of_what_is_told_whole_each_time_the_last_is_kept(tmp_path):
    """A map of a million points, told once a second, would take 58 GB in an hour."""
    rclpy.init()
    recorder = AnswerRecorder(tmp_path / "result")
    with ros_nodes(NODE_NAME) as (node,):
        says = {topic: node.create_publisher(topic.type, topic.name, topic.qos()) for topic in (PATH, POSE)}
        for publisher in says.values():
            spin_until([node], publisher.get_subscription_count, "the recorder's subscription")
        for second in (1, 2, 3):
            header, before = Header(stamp=stamp_message(second * 10**9)), recorder.heard_at
            says[PATH].publish(Path(header=header))
            spin_until([recorder], lambda: recorder.heard_at > before, "a path")  # noqa: B023
            says[POSE].publish(PoseWithCovarianceStamped(header=header))
            spin_until([recorder], lambda: recorder.poses == second, "a pose")  # noqa: B023
    recorder.close()
    recorder.destroy_node()
    rclpy.try_shutdown()
    bag = BagFile(tmp_path / "result")
    stamps = {topic: bag.header_stamps(f"/{outside_name(topic)}")[0].tolist() for topic in says}
    assert stamps == {PATH: [3 * 10**9], POSE: [10**9, 2 * 10**9, 3 * 10**9]}
