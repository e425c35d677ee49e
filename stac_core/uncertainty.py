"""How uncertain poses are: variances that grow with the camera's departures, and fall where it comes back.

Errors add up along the way as those of a random walk do: in proportion to departures, a turn in radians plus
a way in median depths (`keyframes`). From submap to submap they add up through the graph of submaps, as
resistances do: one after the other along an open way, less where a closed loop offers two. A turn that is
wrong, or a length, also misplaces all that is far from the start.

The constants are measured, with the bundled model, in 20 synthetic worlds, and checked in 36 others;
docs/model_card.md tells how far they hold. Lengths are compared after one scale per stream, that of the
camera's way: which it is, a single camera does not know. Errors differ from stream to stream more than within
one, so that most streams are better than this says, and a few worse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stac_core.config import NetworkConfig, SubmapConfig
from stac_core.keyframes import Keyframe, departure, valid
from stac_core.prediction import Prediction

MEASURED = ("embedded",)  # networks

# Standard deviations for each axis, after a departure of 1.
TURN = 0.07  # of poses, radians
PLACE = 0.065  # median depths
FAR = 0.095  # share of the distance from the start
STEP_TURN = {False: 0.074, True: 0.038}  # of steps between two frames, of a lens unknown, and known; radians
STEP_PLACE = {False: 0.057, True: 0.041}  # median depths
# And without any departure.
STILL_TURN = {False: 0.003, True: 0.002}
STILL_PLACE = 0.0045


@dataclass(frozen=True)
class Drift:
    """What has added up from the start of a stream to the first frame of a submap."""

    departure: float = 0.0
    scaled: float = 0.0  # departures times squared depths

    def and_(self, other: Drift) -> Drift:
        """Both, one after the other."""
        return Drift(self.departure + other.departure, self.scaled + other.scaled)


def is_measured(network: NetworkConfig, reach: float) -> bool:
    """Whether the constants hold for this network, in submaps that reach so far."""
    return network.name in MEASURED and reach == SubmapConfig().reach_of(network)


def drift_between(
    ends: NDArray[np.integer], departures: NDArray[np.float64], depths: NDArray[np.float64], nodes: NDArray
) -> Drift:
    """From one node of a graph to another, [2], along L links: ends [L, 2], and how far each departs, [L].

    The variance, in departures, of the place of the second where links are to agree best (`pose_graph`).
    """
    if nodes[0] == nodes[1]:
        return Drift()
    turns, places = (_currents(ends, conductance, *nodes) for conductance in (depths**0, depths**-2))
    return Drift(float(turns**2 @ departures), float(places**2 @ (departures * depths**2)))


def with_variances(
    prediction: Prediction, first: Keyframe, last: Keyframe, drift: Drift, calibrated: bool
) -> Prediction:
    """Frames in world with the variances of their poses, and of the steps that lead to them.

    first: frame of their submap, at which `drift` had added up; last: the frame before them. NaN where a
    frame that lengths are compared with has no valid depth.
    """
    poses, depth = prediction.world_from_camera, valid(first.depth).nanmedian()
    departed = departure(first.pose, poses, depth)
    turned = STILL_TURN[calibrated] ** 2 + TURN**2 * (drift.departure + departed)
    far = FAR**2 * (drift.departure + departed) * poses[:, :3, 3].square().sum(-1)
    placed = (STILL_PLACE * depth) ** 2 + PLACE**2 * (drift.scaled + departed * depth**2) + far
    return replace(
        prediction,
        pose_variance=torch.stack([turned, placed], dim=-1),
        step_variance=_of_steps(prediction, torch.cat([last.pose[None], poses[:-1]]), calibrated),
    )


def _of_steps(prediction: Prediction, before: Tensor, calibrated: bool) -> Tensor:
    """Of the motions [S, 2] from the poses before [S, 4, 4]."""
    depths = valid(prediction.depth).flatten(1).nanmedian(1).values
    departed = departure(before, prediction.world_from_camera, depths)
    turned = STILL_TURN[calibrated] ** 2 + STEP_TURN[calibrated] ** 2 * departed
    placed = depths**2 * (STILL_PLACE**2 + STEP_PLACE[calibrated] ** 2 * departed)
    return torch.stack([turned, placed], dim=-1)


def _currents(
    ends: NDArray[np.integer], conductance: NDArray[np.float64], source: int, sink: int
) -> NDArray[np.float64]:
    """Through each of L links where 1 flows through all of them from one node to another.

    By as much the error of a link moves the second node against the first. Source: Doyle and Snell, Random
    walks and electric networks (1984), section 1.3.5.
    """
    nodes = np.delete(np.eye(ends.max() + 1), source, axis=1)
    drops = nodes[ends[:, 1]] - nodes[ends[:, 0]]  # [L, nodes - 1] of potentials
    potentials = np.linalg.lstsq(drops.T @ (conductance[:, None] * drops), nodes[sink], rcond=None)[0]
    return conductance * (drops @ potentials)
