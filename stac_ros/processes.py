"""Child processes that live and die together: one failure ends all, signals reach everyone once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time

from stac_ros.signals import when_asked_to_end

POLL_S = 0.1
logger = logging.getLogger(__name__)


class Processes:
    """Named processes. They run in sessions of their own, so that the terminal's signals reach only their
    parent."""

    def __init__(self, environment: dict[str, str], patience_s: float = 60.0) -> None:
        self._environment = {**os.environ, **environment}
        self._patience_s = patience_s
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.asked_to_end = False
        when_asked_to_end(self._on_signal)

    def start(self, name: str, command: list[str]) -> None:
        """Raises OSError for a command that cannot be started."""
        self._running[name] = subprocess.Popen(command, env=self._environment, start_new_session=True)

    def is_running(self, name: str) -> bool:
        process = self._running.get(name)
        return process is not None and process.poll() is None

    def wait(self, *names: str) -> int:
        """Wait until one of these has ended, any has failed, or a signal came; the status of the first."""
        while not self.asked_to_end:
            for name, process in list(self._running.items()):
                status = process.poll()
                if status is None:
                    continue
                del self._running[name]
                if status:
                    logger.error("%s ended with status %d", name, status)
                if status or name in names:
                    return status
            time.sleep(POLL_S)
        return 0

    def end(self, name: str) -> int:
        """Ask one to end, and wait; it is killed when it does not listen. Its status, 0 if long gone."""
        process = self._running.pop(name, None)
        if process is None:
            return 0
        process.terminate()
        try:
            status = process.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            logger.warning("%s does not end within %g s; it is killed", name, self._patience_s)
            process.kill()
            status = process.wait()
        return 0 if status == -signal.SIGTERM else status  # before it could listen: also an end

    def end_all(self) -> int:
        """End what still runs, the last started first; the first status that is not 0."""
        statuses = [self.end(name) for name in reversed(list(self._running))]
        return next((status for status in statuses if status), 0)

    def _on_signal(self, number: int) -> None:
        self.asked_to_end = True
