"""The transport profile of the package, config/fastdds.xml: without it large images are lost."""

from __future__ import annotations

import os
from pathlib import Path

from stac_ros.share import share_file

_BEFORE_KILTED = ("humble", "iron", "jazzy")


def profile_environment(choice: str = "auto") -> dict[str, str]:
    """The variable that gives Fast DDS its profile: of the package (auto), none, or a file.

    `auto` respects one that the user has set. Raises FileNotFoundError where the profile is missing.
    """
    older = os.environ.get("ROS_DISTRO") in _BEFORE_KILTED  # these ignore the new name silently
    variable = "FASTRTPS_DEFAULT_PROFILES_FILE" if older else "FASTDDS_DEFAULT_PROFILES_FILE"
    if choice == "none" or (choice == "auto" and variable in os.environ):
        return {}
    path = share_file("config/fastdds.xml") if choice == "auto" else Path(choice)
    if not path.is_file():
        raise FileNotFoundError(f"fastdds_profile:={choice}: no such file; use auto, none or a file")
    return {variable: str(path)}
