"""Start the mapping node and what belongs to it; `ros2 launch stac_ros stac.launch.py --show-args`."""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from stac_ros.arguments import ARGUMENTS, Child, children, complete
from stac_ros.fastdds import profile_environment


def generate_launch_description() -> LaunchDescription:
    declared = [
        DeclareLaunchArgument(argument.name, default_value=argument.default, description=argument.help)
        for argument in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The profile first: a node reads it when it is made."""
    given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    # launch keeps what it was given beyond that; the node's parameters have a dot in their names.
    given |= {name: value for name, value in context.launch_configurations.items() if "." in name}
    values = complete(given)
    variables = profile_environment(values["fastdds_profile"]).items()
    environment = [SetEnvironmentVariable(name, value) for name, value in variables]
    return [*environment, *(node(child, values) for child in children(values))]


def node(child: Child, values: dict[str, str]) -> Node:
    """One process; the end of the mapping node ends all."""
    return Node(
        package=child.package,
        executable=child.executable,
        namespace=values["namespace"],
        arguments=child.arguments,
        parameters=[*child.parameter_files, child.parameters],
        remappings=list(child.remappings.items()),
        ros_arguments=["--log-level", values["log_level"]],
        on_exit=Shutdown() if child.executable == "stac_node" else None,
        output="screen",
    )
