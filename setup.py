"""Build of the ament_python package; the same file serves colcon and pip."""

from __future__ import annotations

import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

NAME = "stac_ros"
COMMANDS = {
    "stac-ros": "stac_ros.starter:main",
    "stac-replay": "stac_ros.replay:main",
    "stac-record": "stac_ros.recorder:main",
    "stac-view": "stac_ros.viewer:main",
    "stac_node": "stac_ros.mapping_node:main",
    "stac-eval": "stac_core.evaluation.evaluate:main",
    "stac-reconstruct": "stac_core.reconstruct:main",
    "stac-train": "stac_core.training.train:main",
    "stac-world": "stac_core.worlds.export:main",
}


def executables() -> list[str]:
    """One small script per command, for lib/stac_ros, where `ros2 run` and launch files look.

    colcon puts its own there; pip puts commands into bin/ only.
    """
    folder = Path("build") / "executables"
    folder.mkdir(parents=True, exist_ok=True)
    for command, target in COMMANDS.items():
        module, function = target.split(":")
        script = folder / command
        script.write_text(
            f"#!/usr/bin/env python3\nfrom {module} import {function}\n\nraise SystemExit({function}())\n"
        )
        script.chmod(0o755)
    return [str(folder / command) for command in COMMANDS]


data_files = [
    ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
    (f"share/{NAME}", ["package.xml"]),
    (f"share/{NAME}/launch", glob("launch/*.launch.py")),
    (f"share/{NAME}/config", glob("config/*")),
    (f"share/{NAME}/rviz", glob("rviz/*.rviz")),
]
if "bdist_wheel" in sys.argv:
    data_files.append((f"lib/{NAME}", executables()))

setup(
    name=NAME,
    version="0.1.0",
    description="A camera topic becomes a live 3D map: streaming CausalVGGT with a compressed cache",
    license="Apache-2.0",
    maintainer="stac_ros maintainers",
    maintainer_email="maintainers@example.org",
    python_requires=">=3.10",
    packages=find_packages(include=["stac_core*", "stac_ros*"]),
    package_data={"stac_core": ["weights/*"]},
    data_files=data_files,
    install_requires=["setuptools"],
    extras_require={"slurm": ["submitit"]},  # stac-eval --slurm
    zip_safe=False,
    entry_points={"console_scripts": [f"{command} = {target}" for command, target in COMMANDS.items()]},
)
