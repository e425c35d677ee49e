"""How uncertain poses are: variances that grow with the camera's departures, and fall where it comes back.

Errors add up along the way as those of a random walk do: in proportion to departures, a turn in radians plus
a way in median depths (`keyframes`), from submap to submap. A turn that is wrong, or a length, also misplaces
all that is far from the start. Where the camera comes back to a keyframe, only what had added up until that
one remains. That a closed loop tells more about what lies in between is left out: it errs less than is said.

The constants are measured in 20 synthetic worlds, with the bundled model before the present one, which errs
less, and checked with this one in 36 others; docs/model_card.md tells how far they hold. Lengths are compared
after one scale per stream, that of the camera's way: which it is, a single camera does not know. Errors
differ from stream to stream more than within one, so that most streams are better than this says, and a few
worse.
"""

from __future__ import annotations

from dataclasses import replace

import torch
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


def is_measured(network: NetworkConfig, reach: float) -> bool:
    """Whether the constants hold for this network, in submaps that reach so far."""
    return network.name in MEASURED and reach == SubmapConfig().reach_of(network)


def with_variances(prediction: Prediction, first: Keyframe, last: Keyframe, calibrated: bool) -> Prediction:
    """Frames in world with the variances of their poses, and of the steps that lead to them.

    first: frame of their submap; last: the frame before them. NaN where a frame that lengths are compared
    with has no valid depth.
    """
    poses = prediction.world_from_camera
    turns, places = first.drift_to(poses).unbind(-1)
    far = poses[:, :3, 3].square().sum(-1)
    turned = STILL_TURN[calibrated] ** 2 + TURN**2 * turns
    still = (STILL_PLACE * valid(first.depth).nanmedian()) ** 2
    placed = still + PLACE**2 * places + FAR**2 * turns * far
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
