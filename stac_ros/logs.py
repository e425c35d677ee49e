"""Python's log records as ROS log messages, so that what the core says reaches /rosout."""

from __future__ import annotations

import logging

from rclpy.impl.rcutils_logger import RcutilsLogger


class RosLogHandler(logging.Handler):
    """Hands records to a node's logger."""

    def __init__(self, logger: RcutilsLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        # rclpy ties a severity to the line of the call: one line for each.
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)


def log_to_ros(logger: RcutilsLogger) -> None:
    """Send what stac_core and stac_ros log to a node's logger, instead of anywhere else."""
    for name in ("stac_core", "stac_ros"):
        source = logging.getLogger(name)
        source.handlers = [RosLogHandler(logger)]
        source.setLevel(logging.INFO)
        source.propagate = False
