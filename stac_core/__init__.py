"""Streaming 3D reconstruction with a memory that stays small; useful without ROS."""
