"""A change of many objects that happens whole or not at all.

Objects of this package replace their tensors rather than write into them, so keeping the old references
is keeping the old state. The two exceptions: `Pages`, which remember what is overwritten meanwhile, and
buffers of keys and values, which are written only where nothing valid lies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stac_core.cache.pages import Pages

PACKAGE = __name__.rpartition(".")[0]
CONTAINERS = (dict, list, set)


@contextmanager
def all_or_nothing(root: object) -> Iterator[None]:
    """Whatever is raised inside, `root` and all that it is made of are left as they were before."""
    before = [(part, {name: _copy(value) for name, value in vars(part).items()}) for part in _parts(root)]
    tables = [part for part, _ in before if isinstance(part, Pages)]
    for table in tables:
        table.watch()
    try:
        yield
    except BaseException:
        for table in tables:
            table.undo()
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
        raise
    for table in tables:
        table.unwatch()


def _parts(root: object) -> list[Any]:
    """The mutable objects of this package that `root` reaches, itself included, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [root]
    while waiting:
        part = waiting.pop()
        if id(part) not in found:
            found[id(part)] = part
            for value in vars(part).values():
                if _holds_state(value.__class__):
                    waiting.append(value)
                elif isinstance(value, CONTAINERS):
                    waiting += _parts_in(value)
    return list(found.values())


def _parts_in(container: Any) -> list[Any]:
    """The members that are parts; they are all of one kind."""
    members = list(container.values() if isinstance(container, dict) else container)
    return members if members and _holds_state(members[0].__class__) else []


@functools.cache
def _holds_state(kind: type) -> bool:
    """Whether objects of this type belong to this package and can change."""
    frozen = getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)
    changes = any("__dict__" in vars(base) for base in kind.__mro__) and not frozen
    return changes and kind.__module__.startswith(PACKAGE)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, CONTAINERS) else value
