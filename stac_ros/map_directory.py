"""The folder that ~/save_map writes to: tried at start, as a map that took an hour is saved at its end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError


def try_to_write(directory: str) -> None:
    """Make the folder and, for a moment, a file in it. OSError naming the parameter and the cure.

    Nothing less tells: permissions say little to root, and nothing about a read-only or full disk.
    """
    folder = _absolute(directory)
    with explained(directory):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"map")


def new_folder(directory: str, kind: str = "") -> Path:
    """A name in it that nobody has used yet, made of the time. kind: what it begins with.

    OSError as of `try_to_write`, where that depends on the name alone.
    """
    return _absolute(directory) / (kind + datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f"))


@contextmanager
def explained(directory: str | Path) -> Iterator[None]:
    """An OSError of writing there, for somebody who has yet to learn that a parameter decides where.

    It is also what becomes of the error of safetensors, which has one of its own for a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"map.directory = {str(directory)!r} cannot be written: {error}; set it to another folder, which "
            "is possible while the node runs (ros2 param set)"
        ) from error


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """What writes into the folder; if that fails, the folder goes, for nobody could load it."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _absolute(directory: str) -> Path:
    with explained(directory):
        return home_expanded(directory).absolute()


def home_expanded(name: str) -> Path:
    """~ and ~user are home directories. OSError where nobody of that name has one."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise OSError(f"{Path(name).parts[0]} is nobody's home directory") from error
