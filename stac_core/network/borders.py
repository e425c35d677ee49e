"""From one block's last product to the next one's first, as one piece to be compiled.

In between, the residual stream takes in its last part and is normed at once; in two pieces all of it would be
written and read in between. Blocks stay as they are: whoever follows finds its first product there already.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from stac_core.network.blocks import Block

Join = Callable[[Block, Block, Tensor, Tensor], tuple[Tensor, Tensor]]


def join(block: Block, following: Block, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The end of one block and the beginning of the next: `narrow` and, of that, `product`."""
    x = block.narrow(x, hidden)
    return x, following.product(x)


class FirstProduct:
    """`Block.product` of a block, which the one before may have computed already."""

    def __init__(self, block: Block, product: Callable[[Block, Tensor], Tensor]) -> None:
        self._block, self._product = block, product
        self._ready: tuple[Tensor, Tensor] | None = None  # x and its product

    def __call__(self, x: Tensor) -> Tensor:
        """Given once. As long as one x waits, no other one is given its memory and could be taken for it."""
        ready, self._ready = self._ready, None
        if ready is not None and x.is_set_to(ready[0]):
            return ready[1]
        return self._product(self._block, x)

    def after(self, before: Block, join: Join, x: Tensor, hidden: Tensor) -> Tensor:
        """`narrow` of the block before; what it returns comes here next, unless something goes wrong."""
        self._ready = join(before, self._block, x, hidden)
        return self._ready[0]
