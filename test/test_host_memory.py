"""A stream gets what its computer has left, or its container, whichever is less."""

from pathlib import Path

import pytest

from stac_core.host_memory import available_bytes

GIB = 1 << 30
HOST = 16 * GIB
NO_LIMIT_OF_V1 = 0x7FFFFFFFFFFFF000


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def host(root: Path, groups: str | None = None) -> Path:
    meminfo = f"MemTotal: {32 << 20} kB\nMemFree: 1024 kB\nMemAvailable: {HOST >> 10} kB\n"
    return write(root, {"proc/meminfo": meminfo} | ({"proc/self/cgroup": groups} if groups else {}))


def v2(path: str, limit: int | str, taken: int, cached: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{taken}\n",
        f"{folder}/memory.stat": f"anon {taken - cached}\ninactive_file {cached}\n",
    }


def v1(path: str, limit: int, taken: int, cached: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory/{path}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{taken}\n",
        f"{folder}/memory.stat": f"inactive_file 0\ntotal_inactive_file {cached}\n",
    }


def test_without_a_container_it_is_what_the_system_has_left(tmp_path):
    assert available_bytes(host(tmp_path)) == HOST
    assert available_bytes(host(tmp_path, "0::/user.slice\n")) == HOST  # a group that keeps no books


def test_where_the_system_does_not_say_nothing_is_known(tmp_path):
    assert available_bytes(tmp_path) is None


@pytest.mark.parametrize("path", ["/", "/system.slice/docker-4f.scope"])  # its own view of groups, the host's
def test_a_container_of_cgroup_v2_has_what_its_limit_leaves(tmp_path, path):
    write(host(tmp_path, f"0::{path}\n"), v2("", 4 * GIB, 3 * GIB, cached=GIB))
    assert available_bytes(tmp_path) == 2 * GIB


@pytest.mark.parametrize("path", ["/", "/docker/4f"])
def test_a_container_of_cgroup_v1_too(tmp_path, path):
    groups = f"5:cpu,cpuacct:{path}\n4:memory:{path}\n0::/\n"
    write(host(tmp_path, groups), v1("", 4 * GIB, 3 * GIB, cached=GIB))
    assert available_bytes(tmp_path) == 2 * GIB


def test_the_tightest_of_the_groups_around_the_process_counts(tmp_path):
    write(host(tmp_path, "0::/robot/mapping\n"), v2("robot", 8 * GIB, 7 * GIB))
    write(tmp_path, v2("robot/mapping", 4 * GIB, GIB))
    write(tmp_path, v2("robot/other", GIB, GIB))  # not around it
    assert available_bytes(tmp_path) == GIB


@pytest.mark.parametrize("files", [v2("", "max", GIB), v1("", NO_LIMIT_OF_V1, GIB)])
def test_a_group_without_a_limit_leaves_what_the_system_has(tmp_path, files):
    write(host(tmp_path, "4:memory:/\n0::/\n"), files)
    assert available_bytes(tmp_path) == HOST


def test_a_limit_larger_than_the_computer_adds_nothing(tmp_path):
    write(host(tmp_path, "0::/\n"), v2("", 64 * GIB, GIB))
    assert available_bytes(tmp_path) == HOST


def test_a_group_above_its_limit_leaves_nothing(tmp_path):
    write(host(tmp_path, "0::/\n"), v2("", GIB, 2 * GIB))
    assert available_bytes(tmp_path) == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux: the system does not say")
def test_this_computer_tells():
    available = available_bytes()
    assert available is not None and available > 0
