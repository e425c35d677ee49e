"""Attention across the frames of a single call: masks over whole frames, nothing stored.

Serves any batch and is differentiable, so it is the context of training and the yardstick of every
stream. Source: STream3R (arXiv 2508.10893), attention modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.device import send

MODES = ("full", "causal", "window")


def visible_frames(mode: str, frames: int, window: int) -> Tensor:
    """Which frame (row) sees which (column): bool [S, S].

    full: all; causal: itself and all before; window: frame 0 and the last `window`, itself included.
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: choose one of {', '.join(MODES)}")
    row, column = torch.arange(frames)[:, None], torch.arange(frames)
    if mode == "full":
        return torch.ones(frames, frames, dtype=torch.bool)
    causal = column <= row
    return causal if mode == "causal" else causal & ((column > row - window) | (column == 0))


class OnePass:
    """An `AttentionContext` whose past is the call itself."""

    frames_seen = 0

    def __init__(self, mode: str = "full", window: int = 5, visible: Tensor | None = None) -> None:
        """visible: bool [S, S], row = looking frame, overrides the mode; every frame must see itself."""
        if visible is not None and not bool(visible.diagonal().all()):
            raise ValueError("visible has a frame that does not see itself: set its diagonal to True")
        self.mode, self.window, self.given = mode, window, visible
        visible_frames(mode, 1, window)

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        """Announce one pass of S frames; ValueError where a given `visible` has another size."""
        if self.given is not None and tuple(self.given.shape) != (frames, frames):
            raise ValueError(f"visible has shape {list(self.given.shape)}, the call has {frames} frames")
        self._visible, self._tokens = self._seen(frames), tokens_per_frame
        every = (0, frames)
        self._groups = [(*every, [every])] if self._visible is None else _groups(self._visible)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, heads, S·P, D]. Frames with one view of the past attend together, without a token mask."""
        out = []
        for first, last, seen in self._groups:
            keys, values = self._select(k, seen), self._select(v, seen)
            rows = q[:, :, first * self._tokens : last * self._tokens]
            out.append(F.scaled_dot_product_attention(rows, keys, values))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, heads, S, D]; the same rule with one token per frame."""
        mask = None if self._visible is None else send(self._visible, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def _seen(self, frames: int) -> Tensor | None:
        """Which frame (row) sees which (column), bool [S, S] on the host; None where each sees all."""
        if self.given is not None:
            return self.given.cpu()
        return None if self.mode == "full" else visible_frames(self.mode, frames, self.window)

    def _select(self, x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """The tokens of whole frames, given as runs of frames."""
        parts = [x[:, :, first * self._tokens : last * self._tokens] for first, last in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _groups(visible: Tensor) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Consecutive frames with equal rows: first, last (exclusive), runs of the frames they see."""
    rows = visible.tolist()
    return [(first, last, _runs(rows[first])) for first, last in _spans(rows)]


def _runs(row: list[bool]) -> list[tuple[int, int]]:
    return [(first, last) for first, last in _spans(row) if row[first]]


def _spans(items: Sequence[object]) -> list[tuple[int, int]]:
    """Borders of the stretches of equal items."""
    spans, first = [], 0
    for _, stretch in groupby(items):
        last = first + len(list(stretch))
        spans.append((first, last))
        first = last
    return spans
