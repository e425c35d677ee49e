"""Made-up tokens of a camera that circles in a room, for benchmarks that need no images.

What the bytes of a voxel memory depend on is set to what was published of real rooms (STAC, arXiv
2603.20284): keys in one voxel have a mean cosine of 0.84 with a tail below 0.4, a room of 1500 frames
saturates near 2900 voxels, and the published 1.35 GiB in so many are about 4.9 slots per layer and head. Here
it is 2816 voxels. Keys unlike all others (the tail) go on gathering, so their share decides how many slots
there are: it is calibrated to 4.9 after 1500 frames, which gives 4.4 after 300, 4.6 after 1000 and 5.7 after
3000.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.cache.token_positions import PUBLISHED_COLUMNS, TokenPositions
from stac_core.config import NetworkConfig

ROOM = (6.0, 2.6, 5.0)  # width, height, depth in metres
RADIUS = 1.4  # of the camera's circle; it looks across the room
LAP = 200  # frames for one round
PLACE = 0.35  # edge of the cells whose tokens resemble each other, two voxels
LIKENESS = 0.84  # mean cosine of keys in one voxel
UNLIKE = 0.0027  # share of tokens whose key is unlike any other; calibrated, see above


class Loop:
    """The same tokens for every mode; every lane, one (layer, head), has keys of its own."""

    def __init__(self, rows: int, columns: int, network: NetworkConfig, dtype: torch.dtype,
                 device: torch.device) -> None:  # fmt: skip
        """rows, columns: the patch grid."""
        self._network, self._device = network, device
        lanes, dim = network.layers * network.heads, network.width // network.heads
        self._random = torch.Generator(device).manual_seed(0)
        # The key of a place is looked up by its cell; neighbouring lanes see shifted tables.
        self._table = self._normal(4096, dim).to(dtype)
        self._shift = torch.arange(lanes, device=device)[:, None] * 97
        self._noise = ((1 - UNLIKE) ** 2 / LIKENESS - 1) ** 0.5  # pairs with an unlike key have cosine 0
        v, u = torch.meshgrid(
            torch.linspace(-0.5, 0.5, rows), torch.linspace(-0.65, 0.65, columns), indexing="ij"
        )
        self._rays = torch.stack([u, v, torch.ones_like(u)], -1).reshape(-1, 3).to(device)
        self._coarseness = PUBLISHED_COLUMNS / columns

    def chunk(self, first: int, count: int) -> tuple[Tensor, Tensor, TokenPositions]:
        """Keys and values [layers, heads, count·tokens, D] and the places of the tokens."""
        network, special = self._network, self._network.special_tokens
        seen = [self._look(i) for i in range(first, first + count)]
        places = F.pad(torch.stack([points for points, _ in seen]), (0, 0, special, 0))
        valid = torch.ones(places.shape[:2], dtype=torch.bool, device=self._device)
        valid[:, :special] = False
        keys = self._keys(places.flatten(0, 1)).unflatten(0, (network.layers, network.heads))
        values = self._normal(*keys.shape).to(keys.dtype)
        camera, depth = seen[-1][0].mean(0), float(seen[0][1].median())
        return keys, values, TokenPositions(places, valid, camera, depth, coarseness=self._coarseness)

    def _keys(self, places: Tensor) -> Tensor:
        """places [n, 3] → keys [lanes, n, D]."""
        cell = (places / PLACE).floor().long()
        hashed = (cell * torch.tensor([73856093, 19349663, 83492791], device=self._device)).sum(-1)
        keys = self._table[(hashed + self._shift) % len(self._table)]
        shape, dtype = keys.shape, keys.dtype
        unlike = torch.rand(*shape[:2], 1, generator=self._random, device=self._device) < UNLIKE
        keys = torch.where(unlike, self._normal(*shape).to(dtype), keys)
        return keys + self._noise * self._normal(*shape).to(dtype)

    def _look(self, index: int) -> tuple[Tensor, Tensor]:
        """Where the rays of one frame meet the walls [patches, 3], and their depth [patches]."""
        angle = torch.tensor(2 * torch.pi * index / LAP, device=self._device)
        sine, cosine = angle.sin(), angle.cos()
        turn = torch.stack(
            [cosine, 0 * sine, sine, 0 * sine, 1 + 0 * sine, 0 * sine, -sine, 0 * sine, cosine]
        )
        rays = self._rays @ turn.view(3, 3).T
        half = torch.tensor(ROOM, device=self._device) / 2
        centre = -RADIUS * torch.stack([sine, 0 * sine, cosine])  # opposite to where it looks
        reach = ((half * rays.sign() - centre) / rays.where(rays.abs() > 1e-9, 1e-9)).amin(-1)
        return centre + reach[:, None] * rays, reach

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, device=self._device)
