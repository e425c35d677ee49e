"""Errors of depth maps, after the alignment that a scale-free prediction needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DepthMap = NDArray[np.floating]
DEPTH_ALIGNMENTS = ("scale", "scale_shift", "metric")
_VALID_ABOVE = 1e-8


def valid_pixels(predicted: DepthMap, truth: DepthMap, max_depth: float = np.inf) -> NDArray[np.bool_]:
    """Where both maps measure something: finite, positive, and truth within max_depth."""
    if predicted.shape != truth.shape:
        raise ValueError(
            f"predicted depth {predicted.shape} and true depth {truth.shape} differ in shape: resize one"
        )
    finite = np.isfinite(predicted) & np.isfinite(truth)
    return finite & (predicted > _VALID_ABOVE) & (truth > _VALID_ABOVE) & (truth <= max_depth)


def fit_depth(predicted: NDArray[np.float64], truth: NDArray[np.float64], align: str) -> tuple[float, float]:
    """Scale and shift with truth ≈ scale · predicted + shift, for valid pixels [N] of both.

    "scale": the median of truth / predicted, which a few wrong pixels cannot move; "scale_shift":
    least squares (R. Ranftl et al., TPAMI 2020, equation 4); "metric": no change.
    """
    if align not in DEPTH_ALIGNMENTS:
        raise ValueError(f"align = {align!r}: choose one of {', '.join(DEPTH_ALIGNMENTS)}")
    if not len(truth):
        raise ValueError("no pixel has both a predicted and a true depth")
    if align == "metric":
        return 1.0, 0.0
    if align == "scale":
        return float(np.median(truth / predicted)), 0.0
    mean_predicted, mean_truth = predicted.mean(), truth.mean()
    centred = predicted - mean_predicted
    spread = centred @ centred
    if spread <= 0:
        raise ValueError("scale and shift need at least two different predicted depths; use align='scale'")
    scale = float(centred @ (truth - mean_truth) / spread)
    return scale, float(mean_truth - scale * mean_predicted)


def pixel_errors(predicted: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    """Mean errors over aligned valid pixels [N].

    Aligned depth that fell to zero or below cannot enter a logarithm: for that measure and for
    delta it is raised to 1e-3, as the published benchmarks do.
    Source: D. Eigen et al., NIPS 2014, section 4.
    """
    difference = predicted - truth
    positive = np.maximum(predicted, 1e-3)
    ratio = np.maximum(positive / truth, truth / positive)
    return {
        "abs_rel": float(np.mean(np.abs(difference) / truth)),
        "sq_rel": float(np.mean(difference**2 / truth)),
        "depth_rmse": float(np.sqrt(np.mean(difference**2))),
        "log_rmse": float(np.sqrt(np.mean(np.log(positive / truth) ** 2))),
        **{f"delta_{power}": float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3)},
    }


def depth_errors(
    predicted: Sequence[DepthMap],
    truth: Sequence[DepthMap],
    align: str = "scale",
    per: str = "sequence",
    max_depth: float = np.inf,
) -> dict[str, float]:
    """The depth columns of a result row, every valid pixel of every frame weighing the same.

    predicted, truth: one map [H, W] per frame. per: one alignment for the whole "sequence" (which
    also judges consistency over time) or one per "frame". Raises ValueError for unequal counts or
    shapes and where no pixel is valid.
    """
    if per not in ("sequence", "frame"):
        raise ValueError(f"per = {per!r}: choose 'sequence' or 'frame'")
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted and {len(truth)} true depth maps: counts must match")
    pairs = []
    for ours, theirs in zip(predicted, truth, strict=True):
        mask = valid_pixels(ours, theirs, max_depth)
        pairs.append((ours[mask].astype(np.float64), theirs[mask].astype(np.float64)))
    pairs = [pair for pair in pairs if len(pair[0])]
    if not pairs:
        raise ValueError("no pixel has both a predicted and a true depth: are the depth files empty?")
    if per == "sequence":
        pairs = [(np.concatenate([p for p, _ in pairs]), np.concatenate([t for _, t in pairs]))]
    aligned = []
    for ours, theirs in pairs:
        scale, shift = fit_depth(ours, theirs, align)
        aligned.append(scale * ours + shift)
    everything = np.concatenate([t for _, t in pairs])
    errors = pixel_errors(np.concatenate(aligned), everything)
    return {**errors, "depth_pixels": float(len(everything))}
