"""The import walls of the house, read from the sources: what may import what, and nothing more.

The network receives something with `attend` and never knows a cache; the core never knows ROS; the ROS
side never sees a layer, a cache or a kernel.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASICS = {"settings", "config", "geometry", "prediction", "device", "words"}
FILES = {"files", "ply", "stamps", "version"}
METHOD = BASICS | {"images", "intrinsics", "checkpoint", "session", "camera_path", "confidence"}
MAY_IMPORT = {  # part of stac_core → the parts it may import
    "settings": set(),
    "command": set(),
    "config": {"settings"},
    "device": {"host_memory"},
    "host_memory": set(),
    "files": set(),
    "words": set(),
    "confidence": set(),
    "ply": {"files"},
    "stamps": set(),
    "version": set(),
    "intrinsics": set(),
    "geometry": {"intrinsics"},
    "moves": set(),
    "prediction": {"geometry", "moves", "device"},
    "camera_path": {"moves", "prediction"},
    "images": {"config", "geometry", "device"},
    "network": BASICS | {"kernels"},  # for its blocks; the attention across frames is given
    "kernels": {"config", "settings", "device"},
    "cache": {"kernels", "geometry", "config", "settings", "files", "device", "words"},
    "keyframes": {"geometry", "prediction", "moves", "device"},
    "uncertainty": {"config", "keyframes", "prediction"},
    "pose_graph": {"keyframes", "moves"},
    "relocalization": {"keyframes", "prediction"},
    "camera_fit": set(),
    "camera_tracker": {"geometry", "prediction", "device", "camera_fit"},
    "submaps": {
        "geometry",
        "prediction",
        "moves",
        "keyframes",
        "pose_graph",
        "camera_tracker",
        "relocalization",
        "uncertainty",
    },
    "checkpoint": BASICS | {"network"},
    "chunk_positions": {"cache", "config", "geometry", "prediction"},
    "session": BASICS
    | {"network", "cache", "chunk_positions", "images", "intrinsics", "kernels"}
    | {"moves", "submaps", "camera_tracker", "relocalization", "uncertainty"},
    "first_use": {"session", "cache", "config", "device", "images", "network"},
    "worlds": {"geometry", "config", "settings", "stamps", "device", "command"},
    # the network as a type; sequences of synthetic worlds; kernels to be checked and timed
    "evaluation": METHOD | FILES | {"network", "worlds", "kernels", "command"},
    "pipeline": set(),
    "thinned_cloud": {"moves"},
    "reconstruct": METHOD | FILES | {"evaluation", "pipeline", "thinned_cloud", "command"},
    "training": METHOD | FILES | {"network", "cache", "worlds", "evaluation", "command"},
    "__init__": METHOD | {"moves", "first_use"},
}
# Benchmarks take the method apart to time its pieces.
BENCHMARKS = {"evaluation/gpu", "evaluation/benchmark_gpu.py", "evaluation/cache_benchmark"}
# The ROS side: public names, configuration, files; the replay also reads recordings, which are data.
FOR_ROS = {
    "stac_core",
    *(f"stac_core.{name}" for name in ("command", "config", "settings", "files", "ply", "stamps", "version")),
}
FOR_SOURCES = FOR_ROS | {
    "stac_core.evaluation.datasets",
    "stac_core.evaluation.datasets.bag",
    "stac_core.evaluation.datasets.bag_file",
}
ROS_PACKAGES = ("rclpy", "cv_bridge", "ament", "launch", "tf2", "tf_transformations", "stac_ros")
PYTHON_FILES = sorted([*ROOT.glob("stac_core/**/*.py"), *ROOT.glob("stac_ros/**/*.py")])


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), feature_version=(3, 10))  # the oldest Python that must do


def imports(file: Path) -> Iterator[str]:
    """Dotted names of the modules a file imports, wherever in the file."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides where it leads"
            yield node.module or ""


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def core_files() -> list[Path]:
    return [file for file in PYTHON_FILES if file.is_relative_to(ROOT / "stac_core")]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", core_files(), ids=name)
def test_the_core_keeps_its_walls(file):
    part = file.relative_to(ROOT / "stac_core").with_suffix("").parts[0]
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    inside = {part_of(module) for module in imports(file) if module.split(".")[0] == "stac_core"}
    measured = (
        {"kernels", "cache"} if name(file).removeprefix("stac_core/").startswith(tuple(BENCHMARKS)) else set()
    )
    assert inside <= MAY_IMPORT[part] | measured | {part}


def test_the_core_does_not_know_ros():
    for file in core_files():
        strangers = [module for module in imports(file) if module.startswith(ROS_PACKAGES)]
        strangers += [module for module in imports(file) if module.split(".")[0].endswith("_msgs")]
        assert not strangers, f"{name(file)} imports {strangers}"


def test_the_ros_side_sees_only_public_names():
    for file in sorted((ROOT / "stac_ros").glob("**/*.py")):
        allowed = FOR_SOURCES if file.name.endswith("_source.py") else FOR_ROS
        seen = {module for module in imports(file) if module.split(".")[0] == "stac_core"}
        assert seen <= allowed, f"{name(file)} reaches behind the wall: {seen - allowed}"


def test_open3d_is_imported_only_where_it_serves():
    """It takes a second and system libraries; nothing may need it at import time."""
    for file in PYTHON_FILES:
        top = [node for node in parsed(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top
        }
        assert not any(module.startswith("open3d") for module in names), name(file)


def test_no_import_goes_round_in_a_circle():
    """Parts import each other in one direction only."""
    below: dict[str, set[str]] = {}
    for file in core_files():
        part = file.relative_to(ROOT / "stac_core").with_suffix("").parts[0]
        inside = {part_of(module) for module in imports(file) if module.split(".")[0] == "stac_core"}
        below.setdefault(part, set()).update(inside - {part})
    order: list[str] = []
    while len(order) < len(below):
        free = [part for part in sorted(below) if part not in order and below[part] <= set(order)]
        assert free, f"a circle among {sorted(set(below) - set(order))}"
        order += free
