"""How submaps lie to each other, and where a closed loop shows that they lie instead.

A stream's submaps are joined frame by frame: each begins with one that another knows already. Drift adds up
along the way; a camera that comes back finds by how much, and what lies between is told to move.

Nodes are the frames that submaps begin with. Links are frames that two nodes know, with the pose and the
depth that they have by either; they would agree if nothing had drifted. Each node gets the similarity for
which all links agree best: turns first, then lengths, then places, each by linear least squares over the
graph. All at once came out no better. Source: pose graphs of similarities (Strasdat, Montiel and Davison,
Scale drift-aware large scale monocular SLAM, RSS 2010).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import shortest_path
from scipy.spatial.transform import Rotation
from torch import Tensor

from stac_core.keyframes import Keyframe, valid
from stac_core.moves import Array, Moves

STRETCH = 0.1  # most by which lengths drift along a link, as a |log| of their ratio; usual: 0.02 to 0.05


@dataclass(frozen=True)
class Link:
    """One frame as it lies by each of two nodes, in world."""

    nodes: NDArray[np.int64]  # [2]
    poses: Array  # [2, 4, 4] world_from_camera
    depths: Array  # [2] median

    @classmethod
    def between(cls, node: int, other: int, frame: Keyframe, again: Keyframe) -> Link:
        """Two nodes, and the frame as it lies by each. Waits for the device."""
        pose, depth = _lies(frame)
        pose_again, depth_again = (pose, depth) if again is frame else _lies(again)
        return cls(np.array([node, other]), np.stack([pose, pose_again]), np.array([depth, depth_again]))

    @property
    def stretch(self) -> float:
        """By how much the two nodes differ in lengths, as a |log| of their ratio."""
        return abs(float(np.log(self.depths[0] / self.depths[1])))

    def joins(self, nodes: set[int]) -> bool:
        """Whether it lies between these two."""
        return set(self.nodes.tolist()) == nodes


class PoseGraph:
    """Of one stream. Cheap to copy: what it holds is never changed, only replaced."""

    def __init__(self) -> None:
        self._node = np.zeros(1, np.int64)  # [submaps], in order: the node that each is fixed to
        self._links: tuple[Link, ...] = ()

    def go_on(self, first: Keyframe) -> None:
        """The next submap begins with a frame of the present one, and is a node of its own."""
        self._links += (Link.between(self._present, len(self._node), first, first),)
        self._begin(len(self._node))

    def go_to(self, first: Keyframe) -> None:
        """The next submap begins with the frame that an earlier one began with, and is fixed to it."""
        self._begin(self._node_of(first))

    def close(self, first: Keyframe, known: Keyframe, again: Keyframe) -> Moves | None:
        """A frame as it lies by the present submap, and by the earlier one that began with `first`.

        → moves of all submaps. None, and nothing has changed, where the nodes of the two have met before:
        how they lie has been told already; also where lengths cannot have drifted so far on the way between.
        """
        node, present = self._node_of(first), self._present
        if node == present or any(link.joins({node, present}) for link in self._links):
            return None
        link = Link.between(present, node, known, again)
        if link.stretch > STRETCH * (1 + self._apart(present, node)):
            return None
        self._links += (link,)
        return self._relax()

    def keep(self, firsts: Iterable[Keyframe]) -> None:
        """Nodes of other frames become part of a neighbour, and move with it from here on."""
        kept = {self._present, *map(self._node_of, firsts)}
        for gone in self._nodes - kept:
            self._merge(gone)

    def hold(self) -> None:
        """All so far is one node, the first, and stays."""
        self._node, self._links = np.zeros_like(self._node), ()

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        numbers = {"node": self._node}
        if self._links:
            numbers |= {k: np.stack([getattr(one, k) for one in self._links]) for k in vars(self._links[0])}
        return {name: torch.from_numpy(array) for name, array in numbers.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken. KeyError where something is missing."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in state.items()}
        self._node = arrays["node"]
        parts = [arrays.get(field.name, ()) for field in fields(Link)]  # none where nothing is linked
        self._links = tuple(Link(*link) for link in zip(*parts, strict=True))

    @property
    def _present(self) -> int:
        return int(self._node[-1])

    @property
    def _nodes(self) -> set[int]:
        """All that there are: one that is alone has no link, but is the present one."""
        return {self._present, *(node for link in self._links for node in link.nodes.tolist())}

    def _node_of(self, first: Keyframe) -> int:
        return int(self._node[first.submap])

    def _apart(self, node: int, other: int) -> int:
        """Links on the shortest way between two nodes."""
        order, ends = self._rows()
        linked = np.zeros((len(order), len(order)))
        linked[tuple(ends.T)] = 1
        start, end = np.searchsorted(order, [node, other])
        return int(shortest_path(linked, directed=False, unweighted=True, indices=start)[end])

    def _rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All nodes [n], ascending, and for each link the rows of its two in that list, [L, 2]."""
        order = np.array(sorted(self._nodes))
        return order, np.searchsorted(order, np.stack([link.nodes for link in self._links]))

    def _begin(self, node: int) -> None:
        self._node = np.append(self._node, node)

    def _relax(self) -> Moves:
        """Move every node, but that of the first submap, to where its links agree best."""
        order, ends = self._rows()
        of_submap = np.searchsorted(order, self._node)
        poses, depths = (
            np.stack([getattr(link, name) for link in self._links]) for name in ("poses", "depths")
        )
        moves = _agreement(ends, poses, depths, int(of_submap[0]))
        poses, depths = moves.poses(ends, poses), moves.scale[ends] * depths
        self._links = tuple(map(Link, order[ends], poses, depths))
        return moves[of_submap]

    def _merge(self, gone: int) -> None:
        """Fix a node to one that it has a link with."""
        into = next(int(n) for link in self._links if gone in link.nodes for n in link.nodes if n != gone)
        self._node = np.where(self._node == gone, into, self._node)
        links: list[Link] = []
        for link in self._links:
            ends = np.where(link.nodes == gone, into, link.nodes)
            if ends[0] != ends[1] and not any(other.joins(set(ends.tolist())) for other in links):
                links.append(Link(ends, link.poses, link.depths))
        self._links = tuple(links)


def _agreement(ends: NDArray[np.int64], poses: Array, depths: Array, still: int) -> Moves:
    """Moves of all nodes that bring both ends of each of L links together; one node stays.

    ends [L, 2] rows of nodes, poses [L, 2, 4, 4], depths [L, 2].
    """
    nodes = np.eye(ends.max() + 1)
    others = np.delete(nodes, still, axis=1)
    apart = others[ends[:, 1]] - others[ends[:, 0]]  # [L, nodes - 1]

    def solve(weights: Array, wanted: Array) -> Array:
        """Numbers [nodes, k] whose differences along links come nearest to those wanted [L, k]."""
        return others @ np.linalg.lstsq(weights * apart, weights * wanted, rcond=None)[0]

    alike = np.ones((len(ends), 1))
    turns = Rotation.from_matrix(poses[:, 0, :3, :3] @ poses[:, 1, :3, :3].swapaxes(-1, -2)).as_rotvec()
    rotation = Rotation.from_rotvec(solve(alike, turns)).as_matrix()
    scale = np.exp(solve(alike, np.log(depths[:, :1] / depths[:, 1:]))[:, 0])
    centres = Moves(rotation, np.zeros((len(nodes), 3)), scale).points(ends, poses[..., :3, 3])
    translation = solve(1 / depths.mean(1, keepdims=True), centres[:, 0] - centres[:, 1])
    return Moves(rotation, translation, scale)


def _lies(frame: Keyframe) -> tuple[Array, float]:
    """Its pose [4, 4], and its median depth, 1 where none is valid. Waits for the device."""
    depth = float(valid(frame.depth).nanmedian())
    return frame.pose.double().cpu().numpy(), float(np.nan_to_num(depth, nan=1.0))
