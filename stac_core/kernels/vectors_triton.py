"""Keys and values in Triton kernels whose programs have few lanes, by number, always as float32.

In pieces a vector lies in four neighbouring lanes: products of two vectors need few exchanges. In rows every
lane has channels of all vectors: sums over vectors need few.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (Triton gives variables their types when it compiles; a tuple that grows has another one at every step)

from __future__ import annotations

import triton
import triton.language as tl

CHANNELS = tl.constexpr(4)  # of a vector, in one thread: as many in 16 bits as in 32 saves a change of layout
PIECE = tl.constexpr(16)  # channels of a vector side by side: CHANNELS for each of four lanes
SMALLEST_NORM = tl.constexpr(1e-12)  # of torch.nn.functional.normalize


@triton.jit
def in_pieces(vectors, number, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors [·, DIM] by number [T]: a tuple of their pieces, [T, PIECE]; zero where not inside."""
    pieces = ()
    for begin in tl.static_range(0, WIDTH, PIECE):
        channel = begin + tl.arange(0, PIECE)[None]
        at = tl.max_contiguous(number[:, None] * DIM + channel, [1, CHANNELS])
        piece = tl.load(vectors + at, mask=inside[:, None] & (channel < DIM), other=0.0)
        pieces = pieces + (piece.to(tl.float32),)  # noqa: RUF005, which Triton does not compile
    return pieces


@triton.jit
def both(x, y):
    """The sum of two vectors in pieces."""
    pieces = ()
    for p in tl.static_range(len(x)):
        pieces = pieces + (x[p] + y[p],)  # noqa: RUF005
    return pieces


@triton.jit
def dots(x, y):
    """Of vectors in pieces → [T]."""
    products = x[0] * y[0]
    for p in tl.static_range(1, len(x)):
        products += x[p] * y[p]
    return tl.sum(products, 1)


@triton.jit
def lengths(x):
    """Of vectors in pieces → [T]."""
    return tl.maximum(tl.sqrt(dots(x, x)), SMALLEST_NORM)


@triton.jit
def in_rows(vectors, number, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors [·, DIM] by number [T] as [T, WIDTH]; zero where not inside."""
    channel = tl.arange(0, WIDTH)[None]
    at = tl.max_contiguous(number[:, None] * DIM + channel, [1, CHANNELS])
    return tl.load(vectors + at, mask=inside[:, None] & (channel < DIM), other=0.0).to(tl.float32)


@triton.jit
def row_lengths(x):
    """[T, WIDTH] → [T]."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, 1)), SMALLEST_NORM)


@triton.jit
def row_of(x, which):
    """The row of x [T, WIDTH] where `which` [T] is true: [WIDTH]."""
    return tl.sum(tl.where(which[:, None], x, 0.0), 0)


@triton.jit
def number_of(x, which):
    """The sum of the numbers x [T] where `which` [T] is true, often one."""
    return tl.sum(tl.where(which, x, 0.0), 0)
