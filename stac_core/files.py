"""Files that are whole or not there at all, whatever ends the program while it writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; at the end the file there takes the place of `path`.

    Missing folders are made. A failure leaves `path` as it was, and nothing beside it; an OSError names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(usual_mode)  # some libraries write files that nobody else may read
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # else a power cut may leave the new name with no content
        os.replace(temporary, path)
    except OSError as error:  # of a full disk names no file, another one the temporary
        if error.filename in (None, str(temporary)) and error.filename2 is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def name_folder(whole: Path, name: Path) -> None:
    """Rename a folder whose files are whole; after a power cut it has one name or the other, and all files.

    OSError where a folder of that name holds anything already.
    """
    _sync(whole)
    os.rename(whole, name)
    _sync(name.parent)


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace a file by `content`, text as UTF-8. Raises OSError where that is not possible."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """The same of a text of many lines, which are never all in memory; each ends as it is to end."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)


def _sync(folder: Path) -> None:
    """See the names in it written to the disk, as far as its file system can."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse
            os.fsync(opened)
    finally:
        os.close(opened)
