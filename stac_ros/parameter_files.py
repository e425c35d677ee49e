"""Parameter files whose keys are other nodes: ROS ignores what they hold, and says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

_ENTRY = "ros__parameters"


def complaints(words: Sequence[str], node: str) -> list[str]:
    """One for each `--params-file` on a command line that holds nothing for the node of this full name."""
    files = [file for flag, file in pairwise(words) if flag == "--params-file"]
    found = []
    for file in files:
        # As ROS reads them: several documents are no fault, nor tags, which it passes over.
        documents = yaml.load_all(Path(file).read_text(), yaml.BaseLoader)
        names = [name for content in documents for name in _node_names(content)]
        if not any(_matches(name, node) for name in names):
            found.append(
                f"nothing in {file} applies: it is for {', '.join(names) or 'no node'}, and this node is "
                f"{node}; use /**: or {node}: as its key"
            )
    return found


def _node_names(content: Any, above: str = "") -> Iterator[str]:
    """Full names, with wildcards, of the nodes that a file has parameters for; namespaces may be nested."""
    if not isinstance(content, Mapping):
        return
    if _ENTRY in content:
        yield above
    for key, below in content.items():
        if key != _ENTRY:
            yield from _node_names(below, f"{above}/{str(key).strip('/')}")


def _matches(name: str, node: str) -> bool:
    """As ROS does it: * is any one part of a name, ** any number of them."""
    parts = {"*": "/[^/]+", "**": "(/[^/]+)*"}
    pattern = "".join(parts.get(part, f"/{re.escape(part)}") for part in name.split("/")[1:])
    return re.fullmatch(pattern, node) is not None
