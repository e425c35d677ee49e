"""A tape for machines without a GPU: what `CudaTape` promises, and nothing more.

Operations are written down while they run and run again in a replay, each into the very memory it wrote when
it was recorded. Where others may have written, there is NaN: before the first part of a pass in everything
recorded, before each part that is replayed beside others in what other passes recorded there. What a replay
reads, it must have been given, or have computed itself.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from itertools import chain

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNWRITTEN = ("empty", "new_empty", "empty_like")


class EmulatedTape:
    def __init__(self):
        # All tensors made while recording, by pass: of what is replayed in its order, of what is beside it.
        self.owned = []
        self.parts = 0  # ended
        self._operations, self._beside = None, False
        self._begun = set()  # where the pass that is being recorded has parts

    @contextmanager
    def recording(self):
        self.owned.append(([], []))
        self._begun = set()
        with _Log(self):
            yield

    def begin(self, beside=False):
        self._operations, self._beside = [], beside

    @contextmanager
    def beside(self):
        yield  # at once, which is as good as any other time

    def join(self):
        pass

    def aside(self):
        return nullcontext()

    def end(self):
        operations, beside, own = self._operations, self._beside, self.owned[-1]
        first = beside not in self._begun
        self._begun.add(beside)
        self.parts += 1

        def replay():
            if first:
                self.poison([beside])
            elif beside:
                self.poison([beside], but=own)
            for operation in operations:
                _again(*operation)

        return replay

    def poison(self, pools=(False, True), but=None):
        """All recorded tensors, or all but those of one pass."""
        for owned in self.owned:
            if owned is not but:
                for tensor in chain.from_iterable(owned[pool] for pool in pools):
                    if tensor.is_floating_point():
                        tensor.fill_(math.nan)

    def write_down(self, function, arguments, named, result):
        known = {_place(leaf) for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)}
        fresh = [t for t in tree_leaves(result) if isinstance(t, Tensor) and _place(t) not in known]
        self.owned[-1][self._beside].extend(fresh)
        if function._schema.is_mutable or (fresh and function._opname not in UNWRITTEN):
            self._operations.append((function, arguments, named, fresh))


class _Log(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        self._tape.write_down(function, arguments, named or {}, result)
        return result


def _again(function, arguments, named, fresh):
    """Run one operation again, into the tensors that it made at first."""
    result = function(*arguments, **named)
    known = {_place(leaf) for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)}
    new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and _place(t) not in known]
    for old, now in zip(fresh, new, strict=True):
        old.copy_(now)


def _place(tensor):
    return tensor.untyped_storage().data_ptr()
