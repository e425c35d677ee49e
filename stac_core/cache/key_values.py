"""Keys and values of all layers in preallocated buffers, exact or as codes.

Growing needs spare memory of one field, keys or values; compacting at most as much as what stays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stac_core.cache.saved_state import State
from stac_core.device import send
from stac_core.kernels.attend import AnySegment, CodedSegment, Codes, Segment
from stac_core.kernels.attend_listed import ListedSegment
from stac_core.kernels.quantization import Codec
from stac_core.words import copy_rows

MOST_MOVES = 8  # pieces in which tokens are moved without a second copy of them
Fields = tuple[Tensor, ...]  # as stored: the fields of the key, then those of the value
Move = Callable[[], None]  # of some tokens to other slots


class KeyScale:
    """A factor per channel that is taken out of keys before they are coded, fixed by the first frame.

    Outliers of keys sit in fixed channels (XStreamVGGT, arXiv 2601.01204). One stream has one of these.
    """

    def __init__(self, layers: int) -> None:
        self.layers: list[Tensor | None] = [None] * layers  # [heads, 1, D] each

    def clear(self) -> None:
        """Begin again: the first frame is yet to come."""
        self.layers = [None] * len(self.layers)

    def fix(self, layer: int, first_frame: Tensor) -> None:
        """first_frame: keys [heads, tokens, D]; counts only once per layer."""
        if self.layers[layer] is None:
            largest = first_frame.float().abs().amax(1, keepdim=True)
            self.layers[layer] = largest.clamp_min(torch.finfo(torch.float16).tiny)

    def of(self, layer: int) -> Tensor:
        """[heads, D] of one layer."""
        scale = self.layers[layer]
        if scale is None:
            raise RuntimeError(f"layer {layer} has no key scale: it is fixed by the first frame")
        return scale[:, 0]

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(scale.nbytes for scale in self.layers if scale is not None)

    def state(self) -> State:
        return {str(i): scale for i, scale in enumerate(self.layers) if scale is not None}

    def restore(self, state: State) -> None:
        self.layers = [state.get(str(i)) for i in range(len(self.layers))]

    @property
    def lanes(self) -> Tensor:
        """[layers · heads, D]."""
        return torch.cat([scale[:, 0] for scale in self.layers if scale is not None])


class KeyValues:
    """Buffers [lanes, capacity, …], one per stored field, allocated at first use.

    A lane is one (layer, head), layer by layer: what happens between passes happens to all lanes at once.
    """

    def __init__(self, layers: int, bits: int = 16, scale: KeyScale | None = None) -> None:
        """scale: needed where the bits are fewer than 16."""
        self._layers, self._bits, self._scale = layers, bits, scale
        self._codec: Codec | None = None  # known with the first token
        self._fields: list[Tensor] = []  # in the order of `Fields`
        self._cut: list[tuple[Tensor, ...]] = []  # see `_views`; empty until somebody asks

    @property
    def exact(self) -> bool:
        return self._bits == 16

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(field.nbytes for field in self._fields)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is decoded."""
        if self._codec is None:
            raise RuntimeError("nothing has been stored yet")
        return self._codec.dtype

    @property
    def device(self) -> torch.device:
        return self.fields[0].device

    @property
    def fields(self) -> Fields:
        """The buffers of all lanes; slot t is the t-th along their second axis."""
        if not self._fields:
            raise RuntimeError("nothing has been stored yet")
        return tuple(self._fields)

    def segment(self, layer: int, stop: int) -> AnySegment:
        """The first `stop` tokens of one layer, as they are stored."""
        return self._segment(layer, tuple(view[layer][:, :stop] for view in self._views))

    def segments(self, stop: int, bias: Tensor | None = None) -> list[AnySegment]:
        """The same of every layer; bias [layers, heads, stop]."""
        by_field = (field[:, :stop].chunk(self._layers) for field in self.fields)
        biases = [None] * self._layers if bias is None else bias.unbind()
        by_layer = zip(zip(*by_field, strict=True), biases, strict=True)
        return [self._segment(layer, fields, own) for layer, (fields, own) in enumerate(by_layer)]

    def listed(self, length: int, bias: Tensor | None = None) -> ListedSegment | None:
        """The first tokens of every lane for kernels that read where they lie; None where there are none."""
        return ListedSegment(self._fields[0], self._fields[1], length, bias) if length else None

    def reserve(self, capacity: int, valid: int) -> None:
        """Have room for so many tokens, of which the first `valid` survive; after the first one."""
        self._reserve(self.fields, len(self.fields[0]), capacity, valid)

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor, capacity: int, valid: int) -> None:
        """Store [heads, n, D] in one layer from slot `start` on.

        The first `valid` slots of every layer survive a change of capacity.
        """
        new = self.encode(keys, values, layer)
        self._reserve(new, self._layers * len(keys), capacity, valid)
        for view, part in zip(self._views, new, strict=True):
            copy_rows(view[layer][:, start : start + part.shape[1]], part)

    def put(self, start: int, new: Fields, capacity: int, valid: int) -> None:
        """The same for stored fields [lanes, n, …] of all layers."""
        self._reserve(new, len(new[0]), capacity, valid)
        for buffer, part in zip(self._fields, new, strict=True):
            copy_rows(buffer[:, start : start + part.shape[1]], part)

    def hold(self, fields: Fields) -> None:
        """Have these fields [lanes, n, …] of all layers as buffers, without a copy."""
        for i, field in enumerate(fields):
            self._set(i, field)

    def compact(self, slots: slice | Tensor, count: int) -> list[Move]:
        """What brings the tokens of so many slots, ascending, to the front.

        To be done in turn; each may be done again, as long as none after it has been.
        """
        step = slots.start if isinstance(slots, slice) else 0
        if 0 < count <= MOST_MOVES * step:  # each piece to where nothing lies that is still to be moved
            pieces = [slice(first, min(first + step, count)) for first in range(0, count, step)]
            return [partial(_move, buffer, piece, step) for buffer in self._fields for piece in pieces]
        moved = [buffer[:, slots].clone() for buffer in self._fields]  # all copies before the first change
        return [partial(_put, *pair) for pair in zip(self._fields, moved, strict=True)]

    def emptied(self) -> KeyValues:
        """Another memory of the same kind, with nothing in it."""
        other = KeyValues(self._layers, self._bits, self._scale)
        other._codec = self._codec
        return other

    def convert(self, other: KeyValues, fields: Fields) -> Fields:
        """Stored fields of all lanes of another memory as those of this one; codes are never coded again."""
        if self._codec is None and other._codec is not None:
            self._codec = Codec(self._bits, other._codec.dim, other._codec.dtype)
        return fields if self._bits == other._bits else self.encode(*other.decode(fields))

    def encode(self, keys: Tensor, values: Tensor, layer: int | None = None) -> Fields:
        """Keys and values of one layer [heads, T, D], or of all lanes [lanes, T, D] → their stored fields."""
        if self._codec is None:
            self._codec = Codec(self._bits, keys.shape[-1], keys.dtype)
        if not self.exact:
            keys = keys / self._factor(layer)[:, None]
        return *self._codec.encode(keys), *self._codec.encode(values)

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Stored fields of all lanes → keys and values."""
        if self.exact:
            return fields[0], fields[1]
        keys, values = self._codes(fields, self._factor(None))
        return keys.decode(self.dtype), values.decode(self.dtype)

    def state(self, length: int) -> State:
        """The first `length` tokens of every lane, as they are stored."""
        if self._codec is None:
            return {}
        fields = {str(i): field[:, :length] for i, field in enumerate(self._fields)}
        if len(fields) < 2 * len(self._codec.columns):  # the first pass failed for want of room for all
            fields = {}
        return {"like": torch.empty(0, self._codec.dim, dtype=self._codec.dtype), **fields}

    def restore(self, state: State) -> None:
        if not state:
            return
        self._codec = Codec(self._bits, state["like"].shape[-1], state["like"].dtype)
        if "0" in state:
            self.hold(tuple(state[str(i)] for i in range(2 * len(self._codec.columns))))

    def _segment(self, layer: int, fields: Fields, bias: Tensor | None = None) -> AnySegment:
        if self.exact:
            return Segment(fields[0], fields[1], bias)
        return CodedSegment(*self._codes(fields, self._factor(layer)), bias)

    def _codes(self, fields: Fields, factor: Tensor) -> tuple[Codes, Codes]:
        """Stored fields of codes → keys and values as kernels read them; factor: see `Codes`."""
        if self._codec is None:
            raise RuntimeError("nothing has been stored yet")
        bits, dim = self._bits, self._codec.dim
        return Codes(fields[0], fields[1], bits, dim, factor), Codes(fields[2], fields[3], bits, dim)

    def _factor(self, layer: int | None) -> Tensor:
        """What keys are divided by, of one layer [heads, D] or of all lanes [lanes, D]."""
        if self._scale is None:
            raise RuntimeError("codes need a key scale")
        return self._scale.lanes if layer is None else self._scale.of(layer)

    def _reserve(self, like: Fields, lanes: int, capacity: int, valid: int) -> None:
        """Have buffers of at least this capacity, one field after the other."""
        for i, part in enumerate(like):
            if i < len(self._fields) and self._fields[i].shape[1] >= capacity:
                continue
            shape = lanes, capacity, part.shape[2]
            with torch.inference_mode(False):  # the buffer outlives the mode of this pass
                buffer = torch.empty(shape, dtype=part.dtype, device=part.device)
            if i < len(self._fields):
                copy_rows(buffer[:, :valid], self._fields[i][:, :valid])
            self._set(i, buffer)

    def _set(self, i: int, buffer: Tensor) -> None:
        self._fields[i : i + 1] = [buffer]
        self._cut = []

    @property
    def _views(self) -> list[tuple[Tensor, ...]]:
        """Of each field the part of each layer."""
        if not self._cut:
            with torch.inference_mode(False):
                self._cut = [field.chunk(self._layers) for field in self._fields]
        return self._cut


def _move(buffer: Tensor, piece: slice, step: int) -> None:
    """Have in these slots what lies `step` further on."""
    copy_rows(buffer[:, piece], buffer[:, piece.start + step : piece.stop + step])


def _put(buffer: Tensor, tokens: Tensor) -> None:
    """Have these tokens [lanes, n, …] in the first slots."""
    copy_rows(buffer[:, : tokens.shape[1]], tokens)


def as_index(slots: Tensor, device: torch.device) -> slice | Tensor:
    """Slots [n], on the host and ascending, as an index of what lies on the device.

    A slice where they lie in one piece, so that nothing is sent there.
    """
    first, count = int(slots[0]) if len(slots) else 0, len(slots)
    if not count or int(slots[-1]) - first + 1 == count:
        return slice(first, first + count)
    return send(slots, device)
