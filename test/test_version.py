"""The version that rows of results name is that of the code which computed them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stac_core.version import VERSION

ROOT = Path(__file__).resolve().parent.parent


def test_all_places_say_the_same():
    assert ElementTree.parse(ROOT / "package.xml").findtext("version") == VERSION
    assert re.findall(r'\bversion="(.+)"', (ROOT / "setup.py").read_text()) == [VERSION]


def told_by(root: Path, **environment: str) -> str:
    """What a copy of the module below `root` says."""
    code = "from stac_core.version import version; print(version())"
    command, paths = [sys.executable, "-c", code], {"PYTHONPATH": str(root), **environment}
    return subprocess.run(
        command, cwd="/", env=os.environ | paths, capture_output=True, text=True, check=True
    ).stdout.strip()


def copied_to(root: Path) -> Path:
    (root / "stac_core").mkdir(parents=True)
    (root / "stac_core" / "__init__.py").touch()
    return Path(shutil.copy(ROOT / "stac_core" / "version.py", root / "stac_core"))


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_checkout_tells_its_revision_and_whether_files_were_changed(tmp_path):
    file = copied_to(tmp_path / "own")
    git(tmp_path / "own", "init")
    git(tmp_path / "own", "add", "stac_core")
    git(tmp_path / "own", "commit", "-m", "all")
    revision = git(tmp_path / "own", "rev-parse", "--short=12", "HEAD")
    assert told_by(tmp_path / "own") == f"{VERSION} ({revision})"
    git(tmp_path / "own", "tag", "v9")
    assert told_by(tmp_path / "own", GIT_DIR="/elsewhere") == f"{VERSION} ({revision})"
    file.write_text(file.read_text() + "# changed\n")
    assert told_by(tmp_path / "own") == f"{VERSION} ({revision}-dirty)"
    copied_to(tmp_path / "own" / "environment" / "lib")  # as installed, within the checkout of something else
    assert told_by(tmp_path / "own" / "environment" / "lib") == VERSION


def test_without_git_the_version_is_told(tmp_path):
    copied_to(tmp_path)
    (tmp_path / ".git").mkdir()  # damaged, too
    assert told_by(tmp_path) == told_by(tmp_path, PATH="/nowhere") == VERSION
