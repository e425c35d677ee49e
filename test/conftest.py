"""Every test process talks ROS on loopback, in a domain of its own, with the shipped profile."""

from __future__ import annotations

import logging
import os
import signal
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch: several processes share the cores

import pytest
import torch

from stac_ros.domain import private_ros_environment
from stac_ros.fastdds import profile_environment

for name in ("ROS_DOMAIN_ID", "FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
    os.environ.pop(name, None)  # the user's own; and of a parent, where this process is a worker
os.environ.update(private_ros_environment() | profile_environment())
os.environ["ROS_LOG_DIR"] = tempfile.mkdtemp(prefix="stac_ros_test_log_")
# A shell starts background jobs with SIGINT ignored, which processes of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Numbers that a test draws without a seed depend on no test before it; before its fixtures are made."""
    torch.manual_seed(0)


@pytest.fixture
def loggers(monkeypatch):
    """A node takes over what the packages log: give it back afterwards."""
    for name in ("stac_core", "stac_ros"):
        for attribute in ("handlers", "level", "propagate"):
            logger = logging.getLogger(name)
            monkeypatch.setattr(logger, attribute, getattr(logger, attribute))
