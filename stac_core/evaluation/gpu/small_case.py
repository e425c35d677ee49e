"""One small call of every compiled kernel, for compute-sanitizer to watch."""

from __future__ import annotations

import torch
from torch import nn

from stac_core.evaluation.gpu import listed
from stac_core.evaluation.gpu.attention import random_inputs
from stac_core.evaluation.gpu.gathering import random_wanted
from stac_core.evaluation.gpu.merging import BUFFER, DIM, PIVOTS
from stac_core.evaluation.gpu.renewal import random_parts, random_scores
from stac_core.evaluation.gpu.slots import SMALL_CASES
from stac_core.kernels.judge_blocks import random_map, random_product
from stac_core.kernels.judge_slots import move
from stac_core.kernels.random_merges import RULES, empty_state, random_tokens
from stac_core.kernels.random_slots import random_problem
from stac_core.kernels.select import select_kernels
from stac_core.kernels.voxel_merge import RowState, RowTokens
from stac_core.network.dense_head import uv_embedding


def main(device: torch.device) -> list[str]:
    """Returns the backends that ran."""
    ran = []
    for name in ("triton", "cuda"):
        try:
            kernels = select_kernels(name, device)
        except RuntimeError:
            continue  # the benchmark's own table says why
        q, segments = random_inputs(2, 70, ((97, 16), (33, 8), (40, 4)), 64, torch.bfloat16, device)
        kernels.attend(q, segments[:1], True, 1.0)
        kernels.attend(q, segments, True, 1.0)
        if name == "triton":
            from stac_core.evaluation.gpu.split import attend_in

            attend_in(3)(q, segments, True, 1.0)
            for case in SMALL_CASES:
                move(kernels.slots, random_problem(case, 0).copy_to(device))
            kernels.highest(random_scores(3, 9300, device), 500, True)
            for width in (64, 5):
                parts = random_parts(3, (70, 0, 33), width, device)
                kernels.take(parts, torch.randint(103, (3, 130), device=device))
            run_maps(device)
        if kernels.listed is not None:
            for problem in listed.SMALL_CASES:
                listed.judge(kernels.listed, problem, device)
        if kernels.blocks is not None:
            q, k, v = kernels.blocks.to_heads(*random_product((2, 70, 3, 48), torch.bfloat16, device))
            kernels.blocks.gelu_(kernels.blocks.attend_within(q, k, v).transpose(1, 2))
            for width in (640, 37):
                kernels.blocks.few_rows(*random_map(3, width, 70, "norm gelu residual", device))
        state = RowState(*(part.to(device) for part in empty_state(5, PIVOTS, BUFFER, DIM)))
        tokens = RowTokens(*(part.to(device) for part in random_tokens(5, 60, DIM, 0)))
        kernels.voxel_merge(state, tokens, RULES)
        kinds = [random_wanted(bits, 50, 2, 3, 20, device) for bits in (16, 8, 4)]
        kernels.gather(kinds, 30, DIM, torch.bfloat16)
        ran.append(name)
    return ran


def run_maps(device: torch.device) -> None:
    """All kernels of the dense heads."""
    from stac_core.network.maps_triton import TritonMaps  # needs Triton

    maps, conv, norm = TritonMaps(), nn.Conv2d(3, 40, 3, padding=1).to(device), nn.LayerNorm(24).to(device)
    x, other = (torch.randn(2, channels, 5, 6, device=device) for channels in (3, 40))
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):  # the library is not what is watched
        maps.normalise(norm, torch.randn(2, 30, 24, device=device))
        maps.convolve(conv, x, other, other, uv=uv_embedding(5, 6, 40, 1.2, device), rectify=True)
        maps.enlarge(conv, maps.begin(conv, x), (9, 11), uv_embedding(9, 11, 40, 1.2, device))


if __name__ == "__main__":
    print("ran", *main(torch.device("cuda")))
    torch.cuda.synchronize()
