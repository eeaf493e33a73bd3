"""One tree of errors.

Every error has a row in one table: its code on the wire, the errno a FUSE caller sees, the exit code of
``ukai-ctl`` and whether the same request may be sent again.  The message is one line and says what to do.
"""

from __future__ import annotations

import errno as _errno


class UkaiError(Exception):
    """Root of all errors that UKAI raises on purpose."""

    code = "failed"
    errno = _errno.EIO
    exit_code = 1
    retry = False

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class UsageError(UkaiError):
    """A person gave a wrong argument or setting."""

    code = "usage"
    errno = _errno.EINVAL
    exit_code = 2


class Refused(UkaiError):
    """The request is understood and a rule forbids it."""

    code = "refused"
    errno = _errno.EPERM


class NotFound(UkaiError):
    """The image, node or location named is not known."""

    code = "not-found"
    errno = _errno.ENOENT


class Exists(UkaiError):
    """The name or the data is there already."""

    code = "exists"
    errno = _errno.EEXIST


class Busy(UkaiError):
    """The image is open or another operation is under way."""

    code = "busy"
    errno = _errno.EBUSY


class LastCopy(Refused):
    """The change would take the last in-sync replica of a written block (R9)."""

    code = "last-copy"
    errno = _errno.EIO


class NoSpace(UkaiError):
    """The disk under the last replica is full (R10)."""

    code = "no-space"
    errno = _errno.ENOSPC


class DiskError(UkaiError):
    """A block file could not be read, written or flushed."""

    code = "disk"


class Damaged(DiskError):
    """A block file is missing though written, has the wrong size, uuid or generation (R8)."""

    code = "damaged"


class Unreachable(UkaiError):
    """A peer did not answer in time."""

    code = "unreachable"
    exit_code = 3
    retry = True


class Timeout(Unreachable):
    """The deadline of the whole request has passed."""

    code = "timeout"


class NotReady(UkaiError):
    """The peer lives but is not registered or holds no snapshot yet; ask again."""

    code = "not-ready"
    retry = True


class StaleEpoch(UkaiError):
    """The sender's epoch is below the highest one this node has seen (R1)."""

    code = "stale-epoch"


class StaleSession(UkaiError):
    """A message of an older session or process (R6)."""

    code = "stale-session"
    retry = True


class StaleHandle(UkaiError):
    """The handle was opened before its node lost the writer role (R2)."""

    code = "stale-handle"


class NotCoordinator(UkaiError):
    """This node does not hold the writer role of the image (R1)."""

    code = "not-coordinator"
    retry = True


class Behind(Refused):
    """The metadata is older than what the nodes have seen (R12)."""

    code = "behind"


class ProtocolError(UkaiError):
    """Root of the two protocol errors."""

    code = "protocol"


class LocalProtocolError(ProtocolError):
    """We were about to break the protocol ourselves: a defect of ours."""

    code = "protocol-local"


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol: refuse, count, go on."""

    code = "protocol-remote"


class VersionError(RemoteProtocolError):
    """The peer speaks a version of the protocol that we do not know."""

    code = "version"


def _tree(cls: type[UkaiError]) -> dict[str, type[UkaiError]]:
    table = {cls.code: cls}
    for sub in cls.__subclasses__():
        table.update(_tree(sub))
    return table


BY_CODE = _tree(UkaiError)


def one_line(text: str) -> str:
    """``text`` without line ends and what else can't be printed."""
    return text if text.isprintable() else " ".join("".join(c if c.isprintable() else " " for c in text).split())


def from_wire(code: object, message: object) -> UkaiError:
    """Build the error a peer reported, its message in one line; an unknown code becomes the root class."""
    cls = BY_CODE.get(code, UkaiError) if isinstance(code, str) else UkaiError
    return cls(one_line(message) if isinstance(message, str) else "no reason was given")
