"""Depth errors against hand-made figures and scipy's own optimisers."""

import numpy as np
import pytest
from scipy import optimize, stats

from stac_core.evaluation.depth_metrics import depth_errors, fit_depth


def maps(seed: int, frames: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    truth = [random.uniform(0.5, 6, (20, 30)) for _ in range(frames)]
    predicted = [0.4 * depth * random.lognormal(0, 0.1, depth.shape) + 0.05 for depth in truth]
    truth[1][:5] = 0  # not measured
    predicted[2][3, 4] = np.nan
    return predicted, truth


def test_figures_of_a_case_small_enough_for_paper():
    errors = depth_errors([np.array([[2.0, 2.0, 9.0]])], [np.array([[1.0, 4.0, 0.0]])], align="metric")
    assert errors["abs_rel"] == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert errors["sq_rel"] == pytest.approx((1 / 1 + 4 / 4) / 2)
    assert errors["depth_rmse"] == pytest.approx(np.sqrt((1 + 4) / 2))
    assert errors["log_rmse"] == pytest.approx(np.log(2))
    assert (errors["delta_1"], errors["delta_3"], errors["depth_pixels"]) == (0, 0, 2)
    assert depth_errors([np.ones((2, 2))], [np.full((2, 2), 1.5)], align="metric")["delta_2"] == 1


def test_scale_is_the_median_ratio_and_scale_shift_is_least_squares():
    predicted, truth = maps(0)
    ours = np.concatenate([p.ravel() for p in predicted])
    theirs = np.concatenate([t.ravel() for t in truth])
    keep = np.isfinite(ours) & (theirs > 0)
    ours, theirs = ours[keep], theirs[keep]
    assert fit_depth([(ours, theirs)], "scale")[0] == pytest.approx(
        stats.scoreatpercentile(theirs / ours, 50), rel=1e-12
    )
    judged = optimize.least_squares(lambda x: x[0] * ours + x[1] - theirs, [1.0, 0.0], method="lm").x
    assert fit_depth([(ours, theirs)], "scale_shift") == pytest.approx(tuple(judged), abs=1e-6)


@pytest.mark.parametrize("align", ["metric", "scale", "scale_shift"])
def test_one_alignment_per_sequence_differs_from_one_per_frame(align):
    predicted, truth = maps(1)
    predicted = [depth * (1 + frame) for frame, depth in enumerate(predicted)]  # the unit drifts
    whole = depth_errors(predicted, truth, align)["abs_rel"]
    single = depth_errors(predicted, truth, align, per="frame")["abs_rel"]
    assert whole == single if align == "metric" else whole > 2 * single


def test_perfect_depth_in_another_unit_has_no_error():
    _, truth = maps(2)
    errors = depth_errors([depth / 7 for depth in truth], truth)
    assert errors["abs_rel"] == pytest.approx(0, abs=1e-12)
    assert errors["delta_1"] == 1


def test_what_cannot_be_compared_is_refused():
    predicted, truth = maps(3)
    with pytest.raises(ValueError, match="ends after 3 depth maps"):
        depth_errors(predicted, truth[:3])
    with pytest.raises(ValueError, match="differ in shape"):
        depth_errors([predicted[0][:5]], truth[:1])
    with pytest.raises(ValueError, match="depth files empty"):
        depth_errors(predicted, [np.zeros_like(depth) for depth in truth])
    with pytest.raises(ValueError, match="choose one of scale"):
        depth_errors(predicted, truth, align="affine")
    with pytest.raises(ValueError, match="two different"):
        depth_errors([np.ones((3, 3))], [np.ones((3, 3))], align="scale_shift")
