"""Which pixels are certain enough."""

import numpy as np
import pytest

from stac_core import most_confident


@pytest.mark.parametrize("left_out", [0, 1e-9, 12.5, 30, 50, 99.9, 100])
@pytest.mark.parametrize("levels", [3, 1 << 20])
def test_the_least_confident_of_the_valid_pixels_are_left_out(left_out, levels):
    rng = np.random.default_rng(1)
    confidence = rng.integers(0, levels, (31, 40)).astype(np.float32)
    valid = rng.random(confidence.shape) < 0.7
    least = np.percentile(confidence[valid], left_out, method="higher")
    np.testing.assert_array_equal(most_confident(valid, confidence, left_out), valid & (confidence >= least))


def test_of_no_valid_pixel_none_is_left():
    nothing = np.zeros((3, 4), bool)
    assert not most_confident(nothing, np.ones((3, 4), np.float32), 30).any()
