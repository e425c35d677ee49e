"""How many bytes of tensors are alive at the most, counted on tensors without contents."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Of what is made inside `with`, after every operation."""

    def __init__(self):
        super().__init__()
        self.most = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, named)) if _is(leaf)}
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for tensor in filter(_is, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


def _is(leaf):
    return isinstance(leaf, Tensor)
