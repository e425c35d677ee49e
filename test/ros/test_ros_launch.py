"""One table of arguments behind launch file and starter; the launch file is checked without `launch`."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ros_helpers import ros_nodes
from ros_recordings import write_bag

from stac_core.config import Config
from stac_ros.arguments import ARGUMENTS, SWITCH, children, complete
from stac_ros.fastdds import profile_environment
from stac_ros.listen import outside_name
from stac_ros.reference import parameter_reference
from stac_ros.settings import RosConfig
from stac_ros.share import share_file
from stac_ros.starter import command
from stac_ros.topics import INPUTS, OUTPUTS

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_FILE = ROOT / "launch" / "stac.launch.py"
LAUNCH_NAMES = {
    "launch": {"LaunchContext", "LaunchDescription", "LaunchDescriptionEntity"},
    "launch.actions": {"DeclareLaunchArgument", "OpaqueFunction", "SetEnvironmentVariable", "Shutdown"},
    "launch.substitutions": {"LaunchConfiguration"},
    "launch_ros.actions": {"Node"},
}
HAVE_LAUNCH = importlib.util.find_spec("launch_ros") is not None


def child(executable: str, **given: str):
    (found,) = [one for one in children(complete(given)) if one.executable == executable]
    return found


def parameter_types() -> dict[str, type]:
    return {
        f"{section}.{name}": type(default)
        for config in (Config(), RosConfig())
        for section in vars(config)
        for name, default in vars(getattr(config, section)).items()
    }


def test_the_launch_file_uses_only_known_names_of_launch():
    tree = ast.parse(LAUNCH_FILE.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("launch"):
            assert {alias.name for alias in node.names} <= LAUNCH_NAMES[node.module]
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "generate_launch_description" in functions


@pytest.mark.skipif(not HAVE_LAUNCH, reason="launch_ros is part of a ROS installation, no wheel carries it")
def test_the_launch_description_declares_the_table():
    from launch.actions import DeclareLaunchArgument

    spec = importlib.util.spec_from_file_location("stac_launch", LAUNCH_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entities = module.generate_launch_description().entities
    declared = [entity.name for entity in entities if isinstance(entity, DeclareLaunchArgument)]
    assert declared == [argument.name for argument in ARGUMENTS]


@pytest.mark.skipif(not HAVE_LAUNCH, reason="launch_ros is part of a ROS installation, no wheel carries it")
def test_the_launch_file_takes_parameters_and_refuses_unknown_ones():
    from launch import LaunchContext

    spec = importlib.util.spec_from_file_location("stac_launch", LAUNCH_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(**parameters: str):
        context = LaunchContext()
        for argument in ARGUMENTS:
            context.launch_configurations[argument.name] = argument.default
        context.launch_configurations.update(parameters)
        return module.start(context)

    assert start(**{"cache.memory_budget": "1e9", "of_another_launch_file": "x"})
    with pytest.raises(ValueError, match=r"did you mean 'cache.memory_budget'"):
        start(**{"cache.memry_budget": "1e9"})


def test_every_argument_is_described_and_names_a_real_parameter():
    assert len({argument.name for argument in ARGUMENTS}) == len(ARGUMENTS)
    for argument in ARGUMENTS:
        assert argument.help
        assert not argument.choices or argument.default in (*argument.choices, "")
        if argument.parameter:
            assert parameter_types()[argument.parameter] is (bool if argument.choices == SWITCH else str)


def test_by_default_the_node_alone_with_its_own_defaults():
    (node,) = children(complete({}))
    assert node.executable == "stac_node" and not node.parameter_files
    assert not node.parameters and not node.remappings


def test_values_reach_the_processes_with_their_types():
    node = child(
        "stac_node",
        device="cpu",
        compressed="true",
        publish_tf="False",
        odom_frame="odom",
        namespace="robot1",
    )
    assert node.parameters == {
        "model.device": "cpu",
        "input.compressed": True,
        "frames.publish_tf": False,
        "frames.odom": "odom",
    }
    words = command(node, complete({"namespace": "/robot1", "log_level": "debug"}))
    assert words[words.index("--log-level") + 1] == "debug"
    assert "__ns:=/robot1" in words and 'model.device:="cpu"' in words and "input.compressed:=true" in words


def test_parameters_may_stand_among_the_arguments():
    given = {"cache.memory_budget": "1e9", "cache.retrieve_buf": "False", "frames.map": "m"}
    given |= {"frames.republish_period": "1", "input.time_jump": "continue"}
    node = child("stac_node", **given)
    assert node.parameters == {
        "cache.memory_budget": 1_000_000_000,
        "cache.retrieve_buf": False,
        "frames.map": "m",
        "frames.republish_period": 1.0,
        "input.time_jump": "continue",
    }
    assert [type(node.parameters[name]) for name in given] == [int, bool, str, float, str]
    assert complete({"input.image_qos": "reliable"}, {"image_qos": "sensor_data"})["image_qos"] == "reliable"
    for text in ("many", "2.5", "inf", ""):
        with pytest.raises(ValueError, match=f"cache.memory_budget:={text}: expected int"):
            child("stac_node", **{"cache.memory_budget": text})


@pytest.mark.parametrize(
    "name", ["two words", "März 🗺", '\'a "b" \\c', "true", "1e9", "{a: b}", "$(x)", "a\tb"]
)
def test_any_name_reaches_a_node_as_it_is(name):
    words = command(child("stac_node", map_directory=name), complete({}))
    options = {"automatically_declare_parameters_from_overrides": True}
    with ros_nodes("stac_mapping", cli_args=words[words.index("--ros-args") :], **options) as (node,):
        assert node.get_parameter("map.directory").value == name


def test_files_may_be_named_from_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("params_file", "checkpoint", "source", "calibration", "record", "rviz_config", "fastdds_profile")
    for name in names:
        assert complete({name: "~/x"})[name] == f"{tmp_path}/x"
    assert complete({"map.directory": "~/x"})["map_directory"] == f"{tmp_path}/x"
    assert complete({"image_topic": "~/x"})["image_topic"] == "~/x", "a topic below the node's own name"


@pytest.mark.parametrize(("rate", "waits"), [("0", True), ("0.0", True), ("1.0", False), ("fast", False)])
def test_chunks_are_waited_for_where_a_source_is_played_as_fast_as_the_node_answers(rate, waits):
    assert ("worker.chunk_wait" in child("stac_node", source="walk.mp4", rate=rate).parameters) is waits
    assert not child("stac_node", rate=rate).parameters
    given = {"source": "walk.mp4", "rate": rate, "worker.chunk_wait": "2"}
    assert child("stac_node", **given).parameters["worker.chunk_wait"] == 2.0


def test_a_camera_topic_is_remapped_alike_for_node_and_replay():
    given = {"image_topic": "/cam/image_raw", "camera_info_topic": "/cam/camera_info", "source": "walk.mp4"}
    expected = {
        "image": "/cam/image_raw",
        "image/compressed": "/cam/image_raw/compressed",
        "camera_info": "/cam/camera_info",
    }
    assert child("stac_node", **given).remappings == expected
    assert child("stac-replay", **given).remappings == expected


@pytest.mark.parametrize("asked", ["", "true", "false"])
@pytest.mark.parametrize(("topic", "compressed"), [("/camera", False), ("/camera/compressed", True)])
def test_a_bag_says_itself_whether_its_images_are_compressed(tmp_path, topic, compressed, asked):
    bag = write_bag(tmp_path / "bag", 1, image_topics=(topic,))
    node = child("stac_node", source=str(bag), compressed=asked)
    assert node.parameters == {"input.compressed": compressed}


def test_a_calibration_goes_to_the_replay_and_rectifying_to_the_node():
    given = {"source": "camera:0", "calibration": "ost.yaml", "rectify": "true"}
    assert child("stac_node", **given).parameters["input.rectify"] is True
    words = child("stac-replay", **given).arguments
    assert words[words.index("--calibration") + 1] == "ost.yaml"
    assert "--calibration" not in child("stac-replay", source="camera:0").arguments
    with pytest.raises(ValueError, match=r"calibration:=ost.yaml: is sent with the images of a source"):
        children(complete({"calibration": "ost.yaml"}))


def test_images_without_a_bag_are_compressed_where_asked_for():
    for asked, compressed in {"": False, "true": True}.items():
        given = {"source": "world:3", "compressed": asked}
        assert child("stac_node", **given).parameters == {"input.compressed": compressed}
        assert ("--compressed" in child("stac-replay", **given).arguments) == compressed


def test_simulated_time_comes_from_the_replay_and_not_to_it():
    given = {"use_sim_time": "true", "source": "bag", "viewer": "true", "record": "out"}
    for executable in ("stac_node", "stac-view", "stac-record"):
        assert child(executable, **given).parameters["use_sim_time"] is True
    replay = child("stac-replay", **given)
    assert not replay.parameters and "--clock" in replay.arguments


@pytest.mark.parametrize(
    ("given", "image"),
    [({}, "/robot1/image"), ({"image_topic": "cam"}, "/robot1/cam"), ({"image_topic": "/cam"}, "/cam")],
)
def test_rviz_follows_the_namespace_and_the_image_topic(given, image):
    rviz = child("rviz2", rviz="true", namespace="robot1", **given)
    assert rviz.remappings["/stac_mapping/map_points"] == "/robot1/stac_mapping/map_points"
    assert (rviz.remappings["/image"], rviz.remappings["/image/compressed"]) == (image, f"{image}/compressed")
    assert not {"/tf", "/diagnostics"} & set(rviz.remappings)
    assert Path(rviz.arguments[1]).name == "stac.rviz"
    assert not child("rviz2", rviz="true").remappings


def test_rviz_looks_from_the_frame_of_the_map():
    """Its -f replaces the fixed frame of the configuration; without, that of the default stands there."""
    assert child("rviz2", rviz="true", map_frame="m").arguments[2:] == ["-f", "m"]
    assert not child("rviz2", rviz="true").arguments[2:]
    assert rviz_config()["Visualization Manager"]["Global Options"]["Fixed Frame"] == RosConfig().frames.map


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"imagetopic": "x"},
            r"'imagetopic' [(]did you mean 'image_topic'[?][)]; arguments: namespace",
        ),
        (
            {"cache.windw_size": "3"},
            r"no parameter 'cache.windw_size' [(]did you mean 'cache.window_size'",
        ),
        ({"input.compressed": "yes"}, "input.compressed:=yes: choose one of true, false"),
        ({"map_frame": "m", "frames.map": "n"}, "frames.map:=n: map_frame says the same; give one of them"),
        ({"rviz": "yes"}, "rviz:=yes: choose one of true, false"),
    ],
)
def test_unknown_arguments_and_values_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        complete(given)


def test_the_transport_profile_is_named_as_the_distribution_knows_it(monkeypatch, tmp_path):
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROS_DISTRO", "kilted")
    assert set(profile_environment()) == {"FASTDDS_DEFAULT_PROFILES_FILE"}
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    assert set(profile_environment()) == {"FASTRTPS_DEFAULT_PROFILES_FILE"}
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", "the user's")
    assert profile_environment() == {}
    assert profile_environment("none") == {}
    with pytest.raises(FileNotFoundError, match="no such file; use auto, none or a file"):
        profile_environment(str(tmp_path / "missing.xml"))


def test_the_table_of_commands_is_that_of_the_package():
    """What the table starts is what the package installs, under the same name."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS"
    ]
    commands = ast.literal_eval(table)
    everything = {"source": "bag", "viewer": "true", "record": "out"}
    for one in children(complete(everything)):
        assert commands[one.executable] == f"{one.module}:main"
    for target in commands.values():
        assert importlib.util.find_spec(target.split(":")[0]), target


@pytest.mark.parametrize("file", ["config/small_gpu.yaml"])
def test_parameter_files_hold_declared_parameters_of_the_right_type(file):
    content = yaml.safe_load(share_file(file).read_text())
    sections = content["/**"]["ros__parameters"]
    for section, values in sections.items():
        config = Config() if hasattr(Config(), section) else RosConfig()
        for name, value in values.items():
            default = getattr(getattr(config, section), name)
            assert isinstance(value, type(default)), f"{section}.{name}"
            assert value != default, f"{section}.{name} repeats the default"
        type(getattr(config, section))(**values)  # within the limits


def test_the_reference_of_parameters_is_up_to_date():
    written = (ROOT / "docs" / "parameters.md").read_text()
    assert written.strip() == parameter_reference().strip(), "run: stac-ros parameters > docs/parameters.md"
    assert all(f"`{name}`" in written for name in parameter_types())


DISPLAY_CLASSES = {
    f"rviz_default_plugins/{name}"
    for name in (
        "Grid",
        "Map",
        "TF",
        "PointCloud2",
        "Image",
        "Path",
        "Odometry",
        "Pose",
        "MoveCamera",
        "Select",
    )
} | {"rviz_default_plugins/FocusCamera", "rviz_default_plugins/Measure", "rviz_default_plugins/Orbit"}
PANEL_CLASSES = {f"rviz_common/{name}" for name in ("Displays", "Views", "Selection", "Time")}


def rviz_config() -> dict:
    return yaml.safe_load(share_file("rviz/stac.rviz").read_text())


def test_rviz_knows_every_class():
    config = rviz_config()
    assert {panel["Class"] for panel in config["Panels"]} <= PANEL_CLASSES
    manager = config["Visualization Manager"]
    shown = [*manager["Displays"], *manager["Tools"], manager["Views"]["Current"]]
    assert {item["Class"] for item in shown} <= DISPLAY_CLASSES


def test_rviz_displays_match_what_is_published():
    topics = {str(Path("/", outside_name(topic))): topic for topic in (*INPUTS, *OUTPUTS)}
    displays = [one for one in rviz_config()["Visualization Manager"]["Displays"] if "Topic" in one]
    assert len(displays) >= 5
    for display in displays:
        entry = display["Topic"]
        topic = topics[entry["Value"]]
        # One display shows both kinds of images, told by the topic's name.
        kind = topic.type.__name__.removeprefix("Compressed").replace("OccupancyGrid", "Map")
        assert display["Class"] == f"rviz_default_plugins/{kind}"
        latched = entry["Durability Policy"] == "Transient Local"
        assert latched == (topic.profile == "latched"), entry["Value"]
        reliable = entry["Reliability Policy"] == "Reliable"
        assert reliable == (topic.profile in ("latched", "reliable")), entry["Value"]


def test_the_starter_lists_its_arguments_and_refuses_others():
    def starter(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "stac_ros.starter", *words], capture_output=True, text=True, check=False
        )

    shown = starter("up", "--show-args").stdout
    assert all(f"{argument.name}:=" in shown for argument in ARGUMENTS)
    refused = starter("up", "image_topic=/camera")
    assert refused.returncode == 1
    assert "expected name:=value" in refused.stderr and "Traceback" not in refused.stderr
