"""How much of the computer's memory is left to this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Accounts(NamedTuple):
    """Where the kernel keeps books on a group of processes, as a container is one."""

    folder: str
    limit: str
    taken: str
    cached: str  # of what is taken, files that are dropped when memory runs short: a line of memory.stat


_ACCOUNTS = {
    "": _Accounts("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": _Accounts(
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    ),
}  # cgroup v2 and v1, by the name of the controller in /proc/self/cgroup


def available_bytes(root: Path = Path("/")) -> int | None:
    """What the system can give without swapping, and within the limits of the groups that the process is in.

    A container's limit (docker run --memory, MemoryMax of systemd) is that of a group; /proc/meminfo does not
    know it. None where the system does not say. root: folder with proc and sys.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return None
    kibibytes = dict(line.split(":") for line in meminfo.read_text().splitlines())["MemAvailable"].split()[0]
    return max(0, min([1024 * int(kibibytes), *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in _ACCOUNTS:
                yield from _left_up_to_top(root, _ACCOUNTS[controller], Path(path.lstrip("/")))


def _left_up_to_top(root: Path, accounts: _Accounts, path: Path) -> Iterator[int]:
    """Of the group and all around it; in a container the path may be the host's, its own group is the top."""
    top = root / accounts.folder
    for group in (path, *path.parents):
        folder = top / group
        if (folder / accounts.limit).exists():  # the system's topmost group has none
            limit = (folder / accounts.limit).read_text().strip()
            if limit != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / accounts.taken).read_text())
                yield int(limit) - taken + int(stat.get(accounts.cached, 0))
