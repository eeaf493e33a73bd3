"""What may be lost of a flush image, and who must hear of it: seen from the metadata and the power switches alone.

The node that made an active block so, its *keeper*, alone has for certain what it acknowledged and did not flush.
When its copy of such a block counts no more, for another reason than its own word, a guest that runs there must not
go on; when its machine loses power, so does the guest.  In no other case may anything be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ukai.messages import Header
from ukai.model import IN_SYNC, Cluster

Entry = tuple[int, float, str, Any]


class Early:
    """The keepers of one image's active blocks."""

    def __init__(self, on_loss: Callable[[int], None]) -> None:
        self.on_loss = on_loss
        """Called with a block whose unflushed writes may be gone."""
        self.stale: dict[str, int] = {}
        """node → epoch below which handles there must not be served any more."""
        self._cluster = Cluster(cluster_id="cluster")
        self._keepers: dict[int, str] = {}
        self._gone: set[str] = set()
        self._begun = ""
        self._cause = ""

    def committed(self, batch: list[Entry]) -> None:
        for _, _, cause, change in batch:
            if cause != self._cause:
                self._group_ended()
                self._cause = cause
            if change["t"] == "replicas":
                self._replicas(change)
            self._cluster.apply(change)
            if change["t"] == "active":
                self._active(change)
            elif change["t"] == "image" and change.get("writer"):
                self._begun = change["writer"]
        self._group_ended()

    def _replicas(self, change: Header) -> None:
        """A keeper whose copy is no longer in-sync, though it did not say so itself."""
        image, node = self._cluster.images[change["uuid"]], change["node"]
        for block, keeper in self._keepers.items():
            if keeper != node or self._cause == f"mark by {node}":
                continue
            replica = image.replica(node, block)
            if replica is None or replica.status != IN_SYNC:
                continue
            if any(first <= block <= last and status != IN_SYNC for first, last, status, *_ in change["ranges"]):
                self.on_loss(block)
                self._gone.add(node)

    def _active(self, change: Header) -> None:
        for first, last in change.get("add", ()):
            self._keepers.update(dict.fromkeys(range(first, last + 1), self._cause.rpartition(" ")[2]))
        for first, last in change.get("del", ()):
            for block in range(first, last + 1):
                self._keepers.pop(block, None)

    def _group_ended(self) -> None:
        for image in self._cluster.images.values():
            for node in self._gone:
                self.stale[node] = image.epoch
            if self._begun and image.former in ("", self._begun):  # else it has the role only to read
                self._keepers = dict.fromkeys(self._keepers, self._begun)
        self._gone.clear()
        self._begun = ""

    def power_cut(self, node: str) -> None:
        for block, keeper in self._keepers.items():
            if keeper == node:
                self.on_loss(block)

    def is_stale(self, node: str, epoch: int) -> bool:
        """Whether a handle that was opened on a node in an epoch must not be served."""
        return 0 <= epoch < self.stale.get(node, 0)
