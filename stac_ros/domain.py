"""A ROS domain of one's own: nodes of different domains do not see each other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import TextIO

_DOMAINS = range(1, 102)  # above 101 the ports may collide with ephemeral ones; 0 is everybody's
_held: list[TextIO] = []  # an open file keeps its lock until the process ends


def claim_domain() -> int:
    """A domain number that no other caller on this computer holds, until this process ends.

    It is not that of ROS_DOMAIN_ID either, where the user's own nodes are.

    Raises RuntimeError when all are taken.
    """
    folder = Path(tempfile.gettempdir()) / f"stac_ros_domains_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    strangers = os.environ.get("ROS_DOMAIN_ID")
    for domain in _DOMAINS:
        if str(domain) == strangers:
            continue
        lock = (folder / str(domain)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _held.append(lock)
        return domain
    raise RuntimeError(f"all ROS domains from {_DOMAINS[0]} to {_DOMAINS[-1]} are in use; see {folder}")


def private_ros_environment() -> dict[str, str]:
    """Variables for processes that talk to each other on this computer and to nobody else."""
    return {"ROS_DOMAIN_ID": str(claim_domain()), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
