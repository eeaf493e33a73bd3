"""A repeated copy of the metadata, in step by sequence number.

Drop changes at or below the sequence of the snapshot, apply the rest; on a gap or a new metad process ask again.
Published changes are a hint: a reply to our own request carries all changes up to what the reply relies on, so
a decision never waits for a PUB message.  Pure: ``metalink.py`` has the sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ukai.errors import Behind, LocalProtocolError, RemoteProtocolError
from ukai.messages import Header
from ukai.model import Change, Cluster

FORMER_PROCESSES = 8
MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)


class Mirror:
    """The copy and the rules by which it moves on.  Pure.

    ``floor`` is the highest sequence this node ever saw, made by the metad process ``floor_maker``: a metad below it,
    or one that has another change there, is refused (R12).
    """

    def __init__(self, floor: int = 0, cluster_id: str = "", maker: str = "") -> None:
        self.cluster = Cluster()
        self.inc = ""
        self.floor, self.floor_maker = floor, maker
        self.cluster_id = cluster_id
        self.loaded = False
        self._former: deque[str] = deque(maxlen=FORMER_PROCESSES)
        """metad processes before the present one, whose replies may still arrive."""
        self.on_change: list[Callable[[Change], None]] = []
        self.on_reset: list[Callable[[], None]] = []

    @property
    def seq(self) -> int:
        return self.cluster.seq if self.loaded else -1

    def take_reply(self, reply: Header) -> None:
        """Take the catch-up part of a reply, if it has one.  Raises Behind (R12) and RemoteProtocolError."""
        if (snapshot := reply.get("snapshot")) is not None:
            self._reset(snapshot, reply)
        elif "changes" in reply and self._check(reply) and self.loaded and not self._take(reply["changes"]):
            self._broken("changes that do not join on")

    def take_published(self, message: Header) -> bool:
        """Take one message of the PUB socket; false: something is missing, ask metad to catch up.

        Raises RemoteProtocolError.
        """
        if not self.loaded or message.get("cluster_id") != self.cluster.cluster_id:
            return False
        if message.get("inc") != self.inc:
            return False
        if message.get("op") == "beat":
            seq = message.get("seq")
            return type(seq) is int and seq <= self.seq  # below: a reply has overtaken the beat
        return self._take(message.get("changes"))

    def _check(self, reply: Header) -> bool:
        """Whether a reply is news; false: it was overtaken.  Raises Behind (R12), RemoteProtocolError."""
        seq, cluster_id, inc = reply.get("seq"), reply.get("cluster_id"), reply.get("inc")
        if type(seq) is not int or not isinstance(cluster_id, str) or not isinstance(inc, str):
            raise RemoteProtocolError("a reply of metad without its sequence")
        if self.cluster_id and cluster_id != self.cluster_id:
            raise Behind(
                f"metad serves cluster {cluster_id}, this node belongs to cluster {self.cluster_id}; "
                "check metad_address and metadata_root"
            )
        if inc in self._former:
            return False
        if inc == self.inc:
            return True
        if seq < self.floor:
            raise Behind(
                f"the metadata is at change {seq}, this node has seen {self.floor}: it was restored from an older "
                "copy; bring back the newest metadata_root"
            )
        self._former.append(self.inc)
        self.inc, self.cluster_id = inc, cluster_id
        return True

    def _take(self, changes: Any) -> bool:
        """Apply what is new; false: there is a gap.  Raises RemoteProtocolError."""
        try:
            for seq, _time, _cause, change in changes:
                if seq <= self.cluster.seq:
                    continue
                if seq != self.cluster.seq + 1:
                    return False
                self.cluster.apply(change)
                self._seen()
                for call in self.on_change:
                    call(change)
        except (*MALFORMED, LocalProtocolError) as e:
            self._broken(f"a change that can't be applied: {type(e).__name__}: {e}")
        return True

    def _seen(self) -> None:
        if self.cluster.seq >= self.floor:
            self.floor, self.floor_maker = self.cluster.seq, self.cluster.maker

    def _broken(self, what: str) -> None:
        """The copy may be half changed: a snapshot is needed.  Raises RemoteProtocolError."""
        self.loaded = False
        raise RemoteProtocolError(f"metad sent {what}")

    def _reset(self, snapshot: Any, reply: Header) -> None:
        if not isinstance(snapshot, dict):
            raise RemoteProtocolError("metad sent a snapshot that is no map")
        about = {"seq": snapshot.get("seq"), "cluster_id": snapshot.get("cluster_id"), "inc": reply.get("inc")}
        if not self._check(about) or (self.loaded and snapshot["seq"] < self.cluster.seq):
            return
        try:
            cluster = Cluster.from_snapshot(snapshot)
        except MALFORMED as e:
            raise RemoteProtocolError(f"metad sent a snapshot that can't be read: {type(e).__name__}: {e}") from None
        if not cluster.saw(self.floor, self.floor_maker):
            raise Behind(
                f"change {self.floor} of the metadata is not the one that this node has seen: metadata_root was copied "
                "and has gone on in two places; stop the wrong metad"
            )
        self.cluster = cluster
        self.loaded = True
        self._seen()
        for call in self.on_reset:
            call()
