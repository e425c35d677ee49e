"""The package as it is installed: a real wheel in a prefix of its own."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "setup.py",
    "setup.cfg",
    "package.xml",
    "resource",
    "launch",
    "config",
    "rviz",
    "stac_core",
    "stac_ros",
)
SOURCES += ("pip",)
MESSAGES = ("_msgs", "_srvs", "_interfaces")


def run(*command: object, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_manifest_agrees_with_the_build():
    manifest = ElementTree.parse(ROOT / "package.xml").getroot()
    told = [manifest.findtext("name"), manifest.findtext("version"), manifest.findtext("license")]
    built = run(sys.executable, "setup.py", "-q", "--name", "--version", "--license", cwd=ROOT).split()
    assert told == built
    assert manifest.get("format") == "3"
    assert manifest.findtext("export/build_type") == "ament_python"
    depends = {element.text for element in manifest.findall("exec_depend")}
    assert {"rclpy", "cv_bridge", "sensor_msgs_py", "tf_transformations", "tf2_ros"} <= depends


def test_message_packages_are_declared_where_they_are_imported_and_nowhere_else():
    depends = {element.text for element in ElementTree.parse(ROOT / "package.xml").findall("exec_depend")}
    declared = {name for name in depends if name.endswith(MESSAGES)}
    used = set()
    for file in ROOT.glob("stac_ros/**/*.py"):
        words = [
            line.split()[1].split(".")[0]
            for line in file.read_text().splitlines()
            if line.startswith("from ")
        ]
        used |= {word for word in words if word.endswith(MESSAGES)}
    assert used == declared


# import name → rosdep key or name on the command line of pip
LIBRARIES = {
    "PIL": "python3-pil",
    "cv2": "python3-opencv",
    "matplotlib": "python3-matplotlib",
    "numpy": "python3-numpy",
    "rosbags": "rosbags-image",
    "safetensors": "safetensors",
    "scipy": "python3-scipy",
    "torch": "torch",
    "tqdm": "python3-tqdm",
    "viser": "viser",
    "yaml": "python3-yaml",
}


def test_a_workspace_gets_every_library_that_is_imported():
    """By rosdep or by the line of pip in the README; what is imported within a function is optional."""
    declared = {element.text for element in ElementTree.parse(ROOT / "package.xml").findall("exec_depend")}
    (line,) = re.findall("^pip install (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    brought = declared | {word.split("==")[0] for word in line.split()}
    for file in (*ROOT.glob("stac_core/**/*.py"), *ROOT.glob("stac_ros/**/*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                )
                for name in {name.split(".")[0] for name in names} - {"stac_core", "stac_ros", "triton"}:
                    known = name in sys.stdlib_module_names or LIBRARIES.get(name, name) in brought
                    assert known, f"{file}: nothing brings {name}"


def test_a_wheel_brings_code_share_files_index_and_executables(tmp_path):
    tree, prefix = tmp_path / "tree", tmp_path / "prefix"
    for name in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(source, tree / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, cwd=tmp_path)
    (wheel,) = tmp_path.glob("stac_ros-*.whl")
    run(*pip, "install", "--no-deps", "--ignore-installed", "--prefix", prefix, wheel, cwd=tmp_path)

    for pattern in ("config/*", "launch/*.launch.py", "rviz/*.rviz", "package.xml"):
        for file in ROOT.glob(pattern):
            assert (prefix / "share/stac_ros" / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert (prefix / "share/ament_index/resource_index/packages/stac_ros").is_file()
    executables = sorted((prefix / "lib/stac_ros").iterdir())
    assert {"stac_node", "stac-replay"} <= {file.name for file in executables}
    assert all(os.access(file, os.X_OK) for file in executables)

    site = sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)})
    where = {
        "PYTHONPATH": site,
        "AMENT_PREFIX_PATH": str(prefix),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    shown = run(prefix / "lib/stac_ros/stac-replay", "--help", cwd=tmp_path, **where)
    assert "--wait-for-subscribers" in shown
    question = (
        "import stac_core, stac_ros.share as s; print(stac_core.__file__, s.share_file('config/fastdds.xml'))"
    )
    code, configuration = run(sys.executable, "-c", question, cwd=tmp_path, **where).split()
    assert code.startswith(site)
    assert configuration == str(prefix / "share/stac_ros/config/fastdds.xml")
    without = {name: value for name, value in where.items() if name != "AMENT_PREFIX_PATH"}
    question = f"import sys; sys.prefix = {str(prefix)!r}; " + question
    assert run(sys.executable, "-c", question, cwd=tmp_path, **without).split() == [code, configuration]
