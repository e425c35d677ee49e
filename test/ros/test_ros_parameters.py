"""Settings as ROS parameters: described, limited, validated, and nothing that nobody knows."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from rclpy.parameter import Parameter
from ros_helpers import parameters_of, ros_nodes

from stac_core.config import Config
from stac_ros.parameter_files import complaints
from stac_ros.parameters import Parameters
from stac_ros.settings import LIVE, RosConfig


def test_every_setting_is_a_described_and_limited_parameter():
    with parameters_of() as (node, parameters):
        assert parameters.core == Config() and parameters.ros == RosConfig()
        descriptors = {
            name: node.describe_parameter(name)
            for name in node.list_parameters([], 0).names
            if "." in name and not name.startswith("qos_overrides")
        }
        assert {"model.checkpoint", "image.size", "cache.mode", "kernels.backend"} < set(descriptors)
        assert {"frames.map", "input.image_qos", "worker.mailbox_size", "map.voxel_size"} < set(descriptors)
        for name, descriptor in descriptors.items():
            assert len(descriptor.description) > 5, name
            live = name in LIVE or name.split(".")[0] in LIVE
            assert descriptor.read_only != live, name
        window = descriptors["cache.window_size"]
        assert window.integer_range[0].from_value == 1 and window.description.endswith("[frames]")
        percentile = descriptors["points.confidence_percentile"].floating_point_range[0]
        assert (percentile.from_value, percentile.to_value) == (0.0, 100.0)
        assert "'reset', 'continue'" in descriptors["input.time_jump"].additional_constraints


def test_given_values_replace_defaults_and_whole_numbers_are_floats_and_integers_alike():
    given = {"cache__window_size": 7, "cache__memory_budget": 1e9, "map__voxel_size": 1}
    with parameters_of(**given, frames__odom="odom") as (node, parameters):
        assert parameters.core.cache.window_size == 7
        assert type(parameters.core.cache.memory_budget) is int
        assert node.get_parameter("cache.memory_budget").value == 1_000_000_000
        assert parameters.ros.frames.odom == "odom"
        assert node.get_parameter("map.voxel_size").value == 1.0
        assert type(parameters.ros.map.voxel_size) is float
        text = parameters.describe()
        assert "*window_size=7" in text and "*voxel_size=1.0" in text and " pinned_frames=1" in text


def test_parameters_that_nobody_knows_are_refused_with_the_nearest_name():
    with (
        pytest.raises(ValueError, match=r"'cache.windw_size' \(did you mean 'cache.window_size'\?\), 'x'"),
        parameters_of(cache__windw_size=3, x=1),
    ):
        pass


NODE_NAMES = "/** /* /**/stac_mapping /*/stac_mapping /robot1/stac_mapping robot1/stac_mapping stac_mapping"
NODE_NAMES = [*NODE_NAMES.split(), "/stac_mapping", "/robot1/**", "/robot1/*", "/stac_mapper", "nested"]


@pytest.mark.parametrize("namespace", ["", "/robot1"])
@pytest.mark.parametrize("key", NODE_NAMES)
def test_files_are_complained_of_exactly_where_ros_ignores_them(tmp_path, namespace, key):
    parameters = {"ros__parameters": {"cache": {"window_size": 7}}}
    content = {"robot1": {"stac_mapping": parameters}} if key == "nested" else {key: parameters}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    words = ["--ros-args", "--params-file", str(file), *(["-r", f"__ns:={namespace}"] if namespace else [])]
    options = {"automatically_declare_parameters_from_overrides": True, "cli_args": words}
    with ros_nodes("stac_mapping", **options) as (node,):
        applied = Parameters(node).core.cache.window_size == 7
    found = complaints(words, f"{namespace}/stac_mapping")
    assert len(found) == (not applied)
    assert applied or f"use /**: or {namespace}/stac_mapping: as its key" in found[0]


@pytest.mark.parametrize("text", ["--- # a second document\n/other: {}", "", "/other: !tag {}"])
def test_files_are_read_as_ros_reads_them(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(f"/**: {{ros__parameters: {{cache: {{window_size: 7}}}}}}\n{text}\n")
    words = ["--ros-args", "--params-file", str(file)]
    options = {"automatically_declare_parameters_from_overrides": True, "cli_args": words}
    with ros_nodes("stac_mapping", **options) as (node,):
        assert Parameters(node).core.cache.window_size == 7
    assert not complaints(words, "/stac_mapping")


def test_names_of_ros_itself_pass():
    with parameters_of(use_sim_time=True) as (_, parameters):
        assert parameters.ros == RosConfig()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("cache__window_size", 0, "cache.window_size = 0: below the minimum; nearest value that works: 1"),
        ("cache__window_size", 2.5, "window_size = 2.5: expected int, got float"),
        ("cache__mode", "forget", "mode = 'forget': choose one of 'full'"),
        ("image__size", 100, "size = 100: must be a multiple of the patch size 14"),
        ("input__compressed", "yes", "compressed = 'yes': expected bool, got str"),
        (
            "frames__map",
            "/map",
            "frames.map = '/map': frames have no leading slash; nearest value that works: 'map'",
        ),
        ("frames__map", "", "frames.map = '': the map needs a frame of its own; nearest .* 'map'"),
        ("frames__odom", "map", "frames.odom = 'map': the map needs a frame of its own; nearest .* ''"),
        ("frames__camera", "map", "frames.camera = 'map': the map needs a frame of its own; nearest .* ''"),
        ("map__directory", "", "map.directory = '': maps need a folder; nearest value that works: '~/.ros/"),
        ("scale__factor", 2.0, "scale.mode = 'none': factor 2.0 would do nothing; nearest .* 'fixed'"),
        ("scale__mode", "odometry", "frames.odom must name the odometry frame of the robot"),
        ("map__voxel_size", float("nan"), "voxel_size = nan: must be finite"),
        ("publish__map_period", 1e10, "publish.map_period = 10000000000.0: above the maximum"),
        ("frames__republish_period", 1e10, "frames.republish_period = 10000000000.0: above the maximum"),
    ],
)
def test_bad_values_are_refused_at_start(name, value, text):
    with pytest.raises(ValueError, match=text), parameters_of(**{name: value}):
        pass


def test_a_map_of_several_streams_cannot_follow_the_scale_of_one():
    given = {"scale__mode": "odometry", "frames__odom": "odom", "map__keep_on_new_stream": True}
    text = "keep_on_new_stream = True: scale.mode odometry rescales a map"
    with pytest.raises(ValueError, match=text), parameters_of(**given):
        pass


def test_the_camera_cannot_be_the_odometry_frame():
    refusal = pytest.raises(ValueError, match="camera = 'odom': the camera needs a frame of its own")
    with refusal, parameters_of(frames__odom="odom", frames__camera="odom"):
        pass


def test_live_settings_change_at_run_time_and_only_to_what_is_valid():
    with parameters_of() as (node, parameters):

        def change(*pairs: tuple[str, Any]) -> str:
            """The reason of a refusal, or nothing."""
            result = node.set_parameters_atomically([Parameter(name, value=value) for name, value in pairs])
            return "" if result.successful else result.reason

        assert change(("points.confidence_percentile", 55.0), ("points.max_points", 10)) == ""
        assert parameters.ros.points.confidence_percentile == 55.0 and parameters.ros.points.max_points == 10
        assert "out of range" in change(("points.confidence_percentile", 101.0))
        assert "out of range" in change(("points.depth_limit", float("nan")))
        assert "read-only" in change(("cache.window_size", 9))
        assert "type" in change(("points.max_points", "many"))
        assert parameters.ros.points.confidence_percentile == 55.0
        assert node.get_parameter("points.max_points").value == 10
        assert change(("map.directory", "/elsewhere")) == "" and parameters.ros.map.directory == "/elsewhere"
        assert "read-only" in change(("map.voxel_size", 1.0))
        assert change(("use_sim_time", True)) == ""
