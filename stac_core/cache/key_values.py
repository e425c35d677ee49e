"""Keys and values of every layer in preallocated buffers, exact or as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.quantization import Codec
from stac_core.cache.saved_state import State
from stac_core.kernels.attend import AnySegment, CodedSegment, Codes, Segment

Fields = tuple[Tensor, ...]  # as stored: the fields of the key, then those of the value


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
    """Buffers [heads, capacity, …] per layer, allocated at first use."""

    def __init__(self, layers: int, bits: int = 16, scale: KeyScale | None = None) -> None:
        """scale: needed where the bits are fewer than 16."""
        self._bits, self._scale = bits, scale
        self._codec: Codec | None = None  # known with the first token
        self._layers: list[Fields | None] = [None] * layers

    @property
    def exact(self) -> bool:
        return self._bits == 16

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(field.nbytes for fields in self._layers if fields is not None for field in fields)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is decoded."""
        if self._codec is None:
            raise RuntimeError("nothing has been stored yet")
        return self._codec.dtype

    def segment(self, layer: int, stop: int) -> AnySegment:
        """The first `stop` tokens of one layer, as they are stored."""
        fields = tuple(field[:, :stop] for field in self.fields(layer))
        return Segment(*fields) if self.exact else CodedSegment(*self._codes(layer, fields))

    def fields(self, layer: int) -> Fields:
        fields = self._layers[layer]
        if fields is None:
            raise RuntimeError(f"layer {layer} has never been written")
        return fields

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor, capacity: int, valid: int) -> None:
        """Store [heads, n, D] from slot `start` on; the first `valid` slots survive a change of capacity."""
        self.put(layer, start, self.encode(layer, keys, values), capacity, valid)

    def put(self, layer: int, start: int, new: Fields, capacity: int, valid: int) -> None:
        """The same for tokens that are stored fields already."""
        fields = self._layers[layer]
        if fields is None or fields[0].shape[1] < capacity:
            fields = _allocate(new, capacity, fields, valid)
            self._layers[layer] = fields
        for buffer, part in zip(fields, new, strict=True):
            buffer[:, start : start + part.shape[1]] = part

    def compact(self, layer: int, slots: Tensor) -> None:
        """Move the tokens of `slots` [n], on the host and ascending, to the front of one layer."""
        fields = self._layers[layer]
        if fields is None:
            return
        first, count = int(slots[0]) if len(slots) else 0, len(slots)
        in_one_piece = not count or int(slots[-1]) - first + 1 == count
        where = slice(first, first + count) if in_one_piece else slots.to(fields[0].device)
        moved = [buffer[:, where].clone() for buffer in fields]  # all copies before the first change
        for buffer, part in zip(fields, moved, strict=True):
            buffer[:, :count] = part

    def emptied(self) -> KeyValues:
        """Another memory of the same kind, with nothing in it."""
        other = KeyValues(len(self._layers), self._bits, self._scale)
        other._codec = self._codec
        return other

    def take(self, other: KeyValues, slots: Tensor, start: int, capacity: int) -> None:
        """Copy the tokens in `slots` of another memory to slot `start` and on."""
        for layer, fields in enumerate(other._layers):
            if fields is not None:
                on_device = slots.to(fields[0].device)
                moved = self.convert(other, layer, tuple(field[:, on_device] for field in fields))
                self.put(layer, start, moved, capacity, start)

    def convert(self, other: KeyValues, layer: int, fields: Fields) -> Fields:
        """Stored fields of another memory as those of this one; codes are copied, not coded again."""
        self.adopt(other)
        return fields if self._bits == other._bits else self.encode(layer, *other.decode(layer, fields))

    def encode(self, layer: int, keys: Tensor, values: Tensor) -> Fields:
        if self._codec is None:
            self._codec = Codec(self._bits, keys.shape[-1], keys.dtype)
        if not self.exact:
            keys = keys / self._scale_of(layer)
        return *self._codec.encode(keys), *self._codec.encode(values)

    def decode(self, layer: int, fields: Fields) -> tuple[Tensor, Tensor]:
        """Stored fields → keys and values."""
        if self.exact:
            return fields[0], fields[1]
        keys, values = self._codes(layer, fields)
        return keys.decode(self.dtype), values.decode(self.dtype)

    def _codes(self, layer: int, fields: Fields) -> tuple[Codes, Codes]:
        """Stored fields of codes → keys and values as kernels read them."""
        if self._codec is None:
            raise RuntimeError("nothing has been stored yet")
        bits, dim = self._bits, self._codec.dim
        factor = self._scale_of(layer)[:, 0]
        return Codes(fields[0], fields[1], bits, dim, factor), Codes(fields[2], fields[3], bits, dim)

    def adopt(self, other: KeyValues) -> None:
        """Be ready to decode what another memory of the same stream has encoded."""
        if self._codec is None and other._codec is not None:
            self._codec = Codec(self._bits, other._codec.dim, other._codec.dtype)

    def state(self, length: int) -> State:
        """The first `length` tokens of every layer, as they are stored."""
        if self._codec is None:
            return {}
        layers = {
            f"{layer}.{i}": field[:, :length]
            for layer, fields in enumerate(self._layers)
            if fields is not None
            for i, field in enumerate(fields)
        }
        return {"like": torch.empty(0, self._codec.dim, dtype=self._codec.dtype), **layers}

    def restore(self, state: State) -> None:
        if not state:
            return
        self._codec = Codec(self._bits, state["like"].shape[-1], state["like"].dtype)
        count = 2 * len(self._codec.columns)
        for layer in range(len(self._layers)):
            if f"{layer}.0" in state:
                self._layers[layer] = tuple(state[f"{layer}.{i}"] for i in range(count))

    def _scale_of(self, layer: int) -> Tensor:
        scale = None if self._scale is None else self._scale.layers[layer]
        if scale is None:
            raise RuntimeError(f"layer {layer} has no key scale: it is fixed by the first frame")
        return scale


def _allocate(like: Fields, capacity: int, old: Fields | None, valid: int) -> Fields:
    with torch.inference_mode(False):  # the store outlives the mode of this pass
        fields = tuple(
            torch.empty(part.shape[0], capacity, part.shape[2], dtype=part.dtype, device=part.device)
            for part in like
        )
    if old is not None:
        for new, part in zip(fields, old, strict=True):
            new[:, :valid] = part[:, :valid]
    return fields
