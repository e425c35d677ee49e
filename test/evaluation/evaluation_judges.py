"""Outside judges: evo run as a command, and plain formulas over what a bag literally holds."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from evaluation.evaluation_scene import STORE
from rosbags.highlevel import AnyReader


def evo(command: str, folder: Path, *flags: str) -> dict[str, float]:
    """Figures of one evo run on truth.tum and estimate.tum of folder."""
    result = folder / f"{command}{len(list(folder.iterdir()))}.zip"
    executable = str(Path(sys.executable).with_name(command))
    environment = {**os.environ, "HOME": str(folder), "MPLBACKEND": "agg"}
    arguments = [executable, "tum", "truth.tum", "estimate.tum", *flags, "--save_results", str(result)]
    subprocess.run(arguments, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(result) as archive:
        return json.loads(archive.read("stats.json"))


def messages(bag: Path, topic: str) -> list:
    """Every message of a topic, decoded by rosbags itself."""
    with AnyReader([bag], default_typestore=STORE) as reader:
        chosen = [c for c in reader.connections if c.topic == topic]
        return [reader.deserialize(raw, c.msgtype) for c, _, raw in reader.messages(chosen)]


def write_poses(path: Path, bag: Path, topic: str) -> None:
    """The poses of a topic as TUM text, digits untouched; of a path those of its last message."""
    lines, said = {}, messages(bag, topic)
    for message in said[-1].poses if hasattr(said[-1], "poses") else said:
        stamp, pose = (
            message.header.stamp,
            message.pose.pose if hasattr(message.pose, "pose") else message.pose,
        )
        p, q = pose.position, pose.orientation
        numbers = " ".join(repr(float(x)) for x in (p.x, p.y, p.z, q.x, q.y, q.z, q.w))
        lines[stamp.sec, stamp.nanosec] = f"{stamp.sec}.{stamp.nanosec:09d} {numbers}"
    path.write_text("\n".join(lines.values()) + "\n")


def abs_rel(answer: Path, depth_topic: str, truth: Path, truth_topic: str) -> float:
    """AbsRel with one median scale, from two recordings whose depth images share stamps and size."""
    true = {(m.header.stamp.sec, m.header.stamp.nanosec): m for m in messages(truth, truth_topic)}
    ratios = []
    for message in messages(answer, depth_topic):
        partner = true.get((message.header.stamp.sec, message.header.stamp.nanosec))
        if partner is not None:
            measured = partner.data.view("<u2").astype(float) / 1000
            predicted = message.data.view("<f4").astype(float)
            both = (measured > 0) & (predicted > 0) & np.isfinite(predicted)
            ratios.append(predicted[both] / measured[both])
    ratio = np.concatenate(ratios)
    return float(np.mean(np.abs(ratio * np.median(1 / ratio) - 1)))
