"""The vectorised merge against one that takes tokens one by one, in plain Python."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stac_core.kernels.voxel_merge import MergeCounts, MergeRules, RowState
from stac_core.kernels.voxel_merge_rows import group_by_row
from stac_core.kernels.voxel_merge_torch import voxel_merge


def cosine(a, b) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def merge_row(pivots: list[dict], buffer: list[tuple], tokens: list[tuple], rules, capacities) -> dict:
    """One row, one call, by the words of the contract. Pivots and buffer change in place."""
    slots, waiting = capacities
    counts = dict.fromkeys(("merged", "buffered", "gated", "aggregated", "remerged"), 0)
    old = [(p["k"].clone(), p["v"].clone(), p["W"]) for p in pivots]
    joins: dict[int, list] = {}
    passed = []
    for k, v, s in tokens:
        best = max(range(len(old)), key=lambda i: cosine(k, old[i][0]), default=None)
        if best is not None and cosine(k, old[best][0]) >= rules.threshold:
            joins.setdefault(best, []).append((math.exp(cosine(k, old[best][0])), k, v, s))
            counts["merged"] += 1
        else:
            passed.append((k, v, s))
    for i, members in joins.items():
        p, total = pivots[i], old[i][2] + sum(w for w, *_ in members)
        p["k"] = (old[i][2] * old[i][0] + sum(w * k for w, k, _, _ in members)) / total
        p["v"] = (old[i][2] * old[i][1] + sum(w * v for w, _, v, _ in members)) / total
        p["W"], p["S"], p["n"] = total, p["S"] + sum(s for *_, s in members), p["n"] + len(members)
    if pivots:
        least = rules.gate * sum(p["S"] for p in pivots) / sum(p["n"] for p in pivots)
        counts["gated"] = sum(s <= least for *_, s in passed)
        passed = [t for t in passed if t[2] > least]
    counts["buffered"] = len(passed)
    candidates = sorted([*buffer, *passed], key=lambda t: -t[2])
    while len(candidates) >= waiting:
        group, candidates = candidates[:waiting], candidates[waiting:]
        weights = [math.exp(cosine(k, group[0][0])) for k, _, _ in group]
        new = {
            "k": sum(w * t[0] for w, t in zip(weights, group, strict=True)) / sum(weights),
            "v": sum(w * t[1] for w, t in zip(weights, group, strict=True)) / sum(weights),
            "W": sum(weights), "S": sum(t[2] for t in group), "n": len(group),
        }  # fmt: skip
        counts["aggregated"] += 1
        if len(pivots) < slots:
            pivots.append(new)
            continue
        victim = min(range(slots), key=lambda i: pivots[i]["W"])
        others = [i for i in range(slots) if i != victim]
        near = max(others, key=lambda i: cosine(pivots[i]["k"], pivots[victim]["k"]))
        a, b = pivots[near], pivots[victim]
        w = b["W"] * math.exp(cosine(a["k"], b["k"]) - 1)
        a["k"] = (a["W"] * a["k"] + w * b["k"]) / (a["W"] + w)
        a["v"] = (a["W"] * a["v"] + w * b["v"]) / (a["W"] + w)
        a["W"], a["S"], a["n"] = a["W"] + w, a["S"] + b["S"], a["n"] + b["n"]
        pivots[victim] = new
        counts["remerged"] += 1
    buffer[:] = candidates
    return counts


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3), count=st.integers(1, 40), calls=st.integers(1, 4), seed=st.integers(0, 9999),
    slots=st.integers(2, 4), waiting=st.integers(2, 6), threshold=st.floats(-0.5, 1), gate=st.floats(0, 1.5),
)  # fmt: skip
def test_merging_equals_merging_token_by_token(rows, count, calls, seed, slots, waiting, threshold, gate):
    generator = torch.Generator().manual_seed(seed)
    rules, dim = MergeRules(threshold, gate), 6
    state = RowState(
        torch.zeros(rows, slots, dim), torch.zeros(rows, slots, dim), *torch.zeros(3, rows, slots),
        *torch.zeros(2, rows, waiting, dim), torch.full((rows, waiting), -torch.inf),
    )  # fmt: skip
    plain: list[tuple[list, list]] = [([], []) for _ in range(rows)]
    centres = torch.randn(3, dim, generator=generator)
    for _ in range(calls):
        row = torch.randint(rows, (count,), generator=generator)
        which = torch.randint(3, (count,), generator=generator)
        noise = torch.randn(2, count, dim, generator=generator)
        keys, score = centres[which] + 0.5 * noise[0], torch.rand(count, generator=generator) + 0.01
        tokens = group_by_row(row, rows, keys, noise[1], score)
        before = state
        kept = RowState(*(part.clone() for part in before))
        state, counts = voxel_merge(before, tokens, rules)
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True)), "the input was changed"
        total = dict.fromkeys(MergeCounts._fields, 0)
        for r, (pivots, buffer) in enumerate(plain):
            mine = [
                (tokens.keys[i], tokens.values[i], float(tokens.score[i])) for i in (row == r).nonzero()[:, 0]
            ]
            for name, n in merge_row(pivots, buffer, mine, rules, (slots, waiting)).items():
                total[name] += n
        assert MergeCounts(*counts.tolist())._asdict() == total
        for r, (pivots, buffer) in enumerate(plain):
            held = state.members[r] > 0
            assert int(held.sum()) == len(pivots)
            for i, p in enumerate(pivots):
                torch.testing.assert_close(state.pivot_keys[r, i], p["k"], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(state.pivot_values[r, i], p["v"], rtol=1e-4, atol=1e-4)
                for part, name in ((state.weight, "W"), (state.score_sum, "S"), (state.members, "n")):
                    torch.testing.assert_close(float(part[r, i]), float(p[name]), rtol=1e-4, atol=1e-4)
            assert int((state.buffer_score[r] > -torch.inf).sum()) == len(buffer)
            for i, (k, _, s) in enumerate(buffer):
                torch.testing.assert_close(state.buffer_keys[r, i], k)
                torch.testing.assert_close(float(state.buffer_score[r, i]), s)
