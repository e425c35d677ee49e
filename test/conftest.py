"""Every test process talks ROS on loopback, in a domain of its own, with the shipped profile."""

from __future__ import annotations

import os
import signal
import tempfile

os.environ.pop("ROS_DOMAIN_ID", None)  # also where a worker inherits the domain of its parent

from stac_ros.domain import private_ros_environment
from stac_ros.share import share_file

os.environ.update(private_ros_environment())
os.environ["ROS_LOG_DIR"] = tempfile.mkdtemp(prefix="stac_ros_test_log_")
os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(share_file("config/fastdds.xml"))
# A shell starts background jobs with SIGINT ignored, which processes of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
