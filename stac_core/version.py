"""Which version of the package computes."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

VERSION = "0.1.0"  # as package.xml and setup.py say
_GIT_LIMIT_S = 10.0  # the files of a slow disk may not be looked through


@cache
def version() -> str:
    """The package's version; of a source checkout also its revision: "0.1.0 (00fdd74206e4)".

    "-dirty" follows a revision whose files have been changed since.
    """
    revision = _revision(Path(__file__).resolve().parents[1])
    return f"{VERSION} ({revision})" if revision else VERSION


def _revision(root: Path) -> str:
    """Of git, "" where the package does not lie in a checkout of its own, or git does not answer."""
    checkout = root / ".git"  # no folder further up: an environment may lie in the checkout of something else
    if not checkout.exists():
        return ""
    command = ["git", "--no-optional-locks", f"--git-dir={checkout}", f"--work-tree={root}", "describe"]
    command += ["--always", "--dirty", "--abbrev=12", "--exclude=*"]  # tags would say what VERSION says
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_GIT_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
