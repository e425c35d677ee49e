"""Saving unasked: what has been mapped is on disk every so often and at the end, though nobody saved it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from stac_core.files import name_folder
from stac_ros.inference_worker import InferenceWorker
from stac_ros.map_directory import explained, new_folder, whole_or_gone
from stac_ros.mapper import Mapper
from stac_ros.mapping_worker import MappingWorker
from stac_ros.parameters import Parameters
from stac_ros.predictor import Predictor
from stac_ros.run_statistics import Statistics

KIND = "autosave_"  # of folder: how its name begins
FAILED = "autosave failed"

logger = logging.getLogger(__name__)


class Autosave:
    """One folder for each stream, as `~/save_map` writes it. The next takes its place once that is whole.

    Only folders that this object has written are ever removed. A failure is counted, told once for each
    cause, and tried again; the folder before it stays.
    """

    def __init__(
        self, predictor: Predictor, mapper: Mapper, parameters: Parameters, statistics: Statistics
    ) -> None:
        self._predictor, self._mapper = predictor, mapper
        self._parameters, self._statistics = parameters, statistics
        self._images = 0  # mapped when all of them were saved
        self._folders: list[tuple[int, Path]] = []  # the stream and the folder of saves, the latest last
        self._under_way = False

    def order(self, inference: InferenceWorker, mapping: MappingWorker) -> None:
        """Have the two threads save what is new, each after all that came before; returns at once."""
        if self._under_way or not self._is_due():
            return
        self._under_way = True

        def command() -> None:
            part = self._write_stream()
            mapping.order(lambda: self._complete(part))

        inference.ask(command)

    def finish(self) -> None:
        """Save what is new before returning, where the two threads have ended."""
        if self._is_due():
            self._complete(self._write_stream())
        if self._is_due():
            logger.error("what was mapped since the last autosave is lost: see its error above")

    def _is_due(self) -> bool:
        return self._statistics.snapshot().mapped != self._images

    def _write_stream(self) -> Path | None:
        """Begin a folder, for the inference thread; None where that fails."""
        with self._failure_told():
            part = _part_of(new_folder(self._parameters.ros.map.directory, KIND))
            with whole_or_gone(part):
                with explained(part.parent):
                    part.mkdir(parents=True)
                self._predictor.save(part)
            return part
        return None

    def _complete(self, part: Path | None) -> None:
        """Finish the folder, for the mapping thread, and remove the one before it."""
        if part is not None:
            with self._failure_told(), whole_or_gone(part):
                if self._mapper.empty:  # since a reset
                    shutil.rmtree(part)
                else:
                    self._write_map(part)
                self._images = self._statistics.snapshot().mapped
                self._remove_earlier()
        self._under_way = False

    def _write_map(self, part: Path) -> None:
        mapper, whole = self._mapper, _whole_of(part)
        mapper.write(part)
        with explained(part.parent):
            name_folder(part, whole)
        points, poses = len(mapper.map), len(mapper.trajectory)
        logger.info("autosave: %d points and %d poses are in %s", points, poses, whole)
        self._folders.append((mapper.streams_ended, whole))

    def _remove_earlier(self) -> None:
        """All folders of the stream but its latest; the last of a stream that has ended is left for good."""
        while len(self._folders) > 1:
            (stream, folder), (next_stream, _) = self._folders[:2]
            if stream == next_stream:
                with explained(folder.parent):
                    _remove(folder)
            del self._folders[0]

    @contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind; mapping goes on
            cause = error.__cause__ or error
            reason = getattr(cause, "strerror", None) or type(cause).__name__
            self._statistics.event(FAILED)
            self._statistics.error(f"{FAILED} ({reason})", str(error), 0)


def _part_of(whole: Path) -> Path:
    """A hidden name for it while it is not whole, which nobody else uses."""
    return whole.with_name(f".{whole.name}.{uuid4().hex[:8]}.part")


def _whole_of(part: Path) -> Path:
    return part.with_name(part.name.removeprefix(".").rsplit(".", 2)[0])


def _remove(folder: Path) -> None:
    """Nobody is ever to find a part of it under its name; somebody else may have removed it already."""
    part = _part_of(folder)
    try:
        os.rename(folder, part)
    except FileNotFoundError:
        return
    shutil.rmtree(part)
