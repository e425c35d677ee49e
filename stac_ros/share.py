"""Where the files installed beside the code are: configuration, launch and RViz files."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = "stac_ros"


def share_file(relative: str) -> Path:
    """The path of an installed file such as "rviz/stac.rviz".

    Looks into the ament index of a sourced ROS workspace, then into the environment's own share
    folder (wheels), then into the source checkout (editable installs). Raises FileNotFoundError
    naming the places.
    """
    places = _share_folders()
    for folder in places:
        if (folder / relative).is_file():
            return folder / relative
    raise FileNotFoundError(
        f"{relative} is in none of {', '.join(map(str, places))}; install the package again"
    )


def _share_folders() -> list[Path]:
    folders = [Path(sys.prefix) / "share" / _PACKAGE, Path(__file__).resolve().parent.parent]
    try:
        from ament_index_python.packages import get_package_share_directory

        folders.insert(0, Path(get_package_share_directory(_PACKAGE)))
    except (ImportError, LookupError, OSError):  # OSError: AMENT_PREFIX_PATH is not set
        pass
    return folders
