"""Which keyframe shows what a camera sees that may be anywhere.

The network is shown a keyframe and then the camera's images. Where they share nothing, its answers contradict
each other: the surfaces that it sees from one camera are not where it sees them from the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from stac_core.keyframes import Keyframe, disagreement
from stac_core.prediction import Prediction

# Most by which depths may differ, as the median |log| of their ratio. With the bundled model and its reach,
# 75 % of 146 times four images between those of a walk that had been seen are found, and none of 1074 from
# elsewhere.
FOUND = 0.08

See = Callable[[Tensor], Prediction]  # frames [S, 3, H, W] in one pass, each of which sees those before it


def find_camera(see: See, keyframes: Iterable[Keyframe], pixels: Tensor, reach: float) -> Keyframe | None:
    """The keyframe that agrees best with the last of frames [S, 3, H, W], if it does with all of them.

    reach: how far the last one may have departed from it, as the network sees it: what is seen in different
    places and yet agrees is seen from afar.
    """
    last = [(_disagreement(see, keyframe, pixels[-1:], reach), keyframe) for keyframe in keyframes]
    least, best = min(last, key=lambda pair: pair[0], default=(math.inf, None))
    if best is None or least > FOUND:
        return None
    alone = len(pixels) == 1
    return best if alone or _disagreement(see, best, pixels, reach) <= FOUND else None


def _disagreement(see: See, keyframe: Keyframe, pixels: Tensor, reach: float) -> float:
    """The greatest between the keyframe and one of the frames; ∞ where one shows too little of the same.

    ∞ also where the last one departs from the keyframe by more than `reach`.
    """
    frames = torch.cat([keyframe.pixels, pixels])
    seen = see(frames)
    if Keyframe.of(frames, seen, 0).departure(Keyframe.of(frames, seen, -1)) > reach:
        return math.inf
    first, *others = (seen.frame(index) for index in range(seen.frames))
    return float(torch.stack([disagreement(first, other) for other in others]).max())
