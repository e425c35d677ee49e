"""Errors of depth maps, after the alignment that a scale-free prediction needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from stac_core.geometry import VALID_DEPTH

DepthMap = NDArray[np.floating]
Pair = tuple[DepthMap, DepthMap]  # predicted and true depth of one frame's valid pixels, [N] each
DEPTH_ALIGNMENTS = ("scale", "scale_shift", "metric")


def valid_pixels(predicted: DepthMap, truth: DepthMap, max_depth: float = np.inf) -> NDArray[np.bool_]:
    """Where both maps measure something: finite, positive, and truth within max_depth."""
    if predicted.shape != truth.shape:
        raise ValueError(
            f"predicted depth {predicted.shape} and true depth {truth.shape} differ in shape: do they show "
            "the same view?"
        )
    finite = np.isfinite(predicted) & np.isfinite(truth)
    return finite & (predicted > VALID_DEPTH) & (truth > VALID_DEPTH) & (truth <= max_depth)


def fit_depth(pairs: list[Pair], align: str) -> tuple[float, float]:
    """Scale and shift with truth ≈ scale · predicted + shift over the valid pixels of some frames.

    "scale": the median of truth / predicted, which a few wrong pixels cannot move; "scale_shift":
    least squares (R. Ranftl et al., TPAMI 2020, equation 4); "metric": no change.
    """
    if align not in DEPTH_ALIGNMENTS:
        raise ValueError(f"align = {align!r}: choose one of {', '.join(DEPTH_ALIGNMENTS)}")
    if align == "metric":
        return 1.0, 0.0
    if align == "scale":
        return float(np.median(np.concatenate([truth / predicted for predicted, truth in pairs]))), 0.0
    return _least_squares(pairs)


def _least_squares(pairs: list[Pair]) -> tuple[float, float]:
    count = sum(len(truth) for _, truth in pairs)
    mean_predicted = sum(predicted.sum(dtype=np.float64) for predicted, _ in pairs) / count
    mean_truth = sum(truth.sum(dtype=np.float64) for _, truth in pairs) / count
    spread = shared = 0.0
    for predicted, truth in pairs:
        centred = predicted.astype(np.float64) - mean_predicted
        spread += centred @ centred
        shared += centred @ (truth - mean_truth)
    if spread <= 0:
        raise ValueError("scale and shift need at least two different predicted depths; use align='scale'")
    return shared / spread, mean_truth - shared / spread * mean_predicted


def pixel_sums(predicted: DepthMap, truth: DepthMap) -> NDArray[np.float64]:
    """Sums over aligned valid pixels [N] of what `_MEASURES` names, in its order.

    Aligned depth that fell to zero or below cannot enter a logarithm: for that measure and for
    delta it is raised to 1e-3, as the published benchmarks do.
    Source: D. Eigen et al., NIPS 2014, section 4.
    """
    difference = predicted - truth
    positive = np.maximum(predicted, 1e-3)
    ratio = np.maximum(positive / truth, truth / positive)
    per_pixel = (
        np.abs(difference) / truth,
        difference**2 / truth,
        difference**2,
        np.log(positive / truth) ** 2,
        *(ratio < 1.25**power for power in (1, 2, 3)),
    )
    return np.array([values.sum(dtype=np.float64) for values in per_pixel])


_MEASURES = ("abs_rel", "sq_rel", "depth_rmse", "log_rmse", "delta_1", "delta_2", "delta_3")


def depth_errors(
    predicted: Iterable[DepthMap],
    truth: Iterable[DepthMap],
    align: str = "scale",
    per: str = "sequence",
    max_depth: float = np.inf,
) -> dict[str, float]:
    """The depth columns of a result row, every valid pixel of every frame weighing the same.

    predicted, truth: one map [H, W] per frame; only valid pixels are kept in memory. per: one
    alignment for the whole "sequence" (which also judges consistency over time) or one per "frame".
    Raises ValueError for unequal counts or shapes and where no pixel is valid.
    """
    if per not in ("sequence", "frame"):
        raise ValueError(f"per = {per!r}: choose 'sequence' or 'frame'")
    pairs: list[Pair] = []
    for ours, theirs in zip_longest(predicted, truth):
        if ours is None or theirs is None:
            raise ValueError(
                f"one side ends after {len(pairs)} depth maps; predicted and true counts must match"
            )
        mask = valid_pixels(ours, theirs, max_depth)
        pairs.append((ours[mask], theirs[mask]))
    pairs = [pair for pair in pairs if len(pair[1])]
    if not pairs:
        raise ValueError("no pixel has both a predicted and a true depth: are the depth files empty?")
    sums = np.zeros(len(_MEASURES))
    whole = fit_depth(pairs, align) if per == "sequence" else None
    for ours, theirs in pairs:
        scale, shift = whole or fit_depth([(ours, theirs)], align)
        sums += pixel_sums(scale * ours.astype(np.float64) + shift, theirs.astype(np.float64))
    pixels = sum(len(theirs) for _, theirs in pairs)
    errors = dict(zip(_MEASURES, map(float, sums / pixels), strict=True))
    for squared in ("depth_rmse", "log_rmse"):
        errors[squared] = math.sqrt(errors[squared])
    return {**errors, "depth_pixels": float(pixels)}
