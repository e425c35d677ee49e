"""A ROS 2 node that maps a camera topic with a streaming, compressed CausalVGGT."""
