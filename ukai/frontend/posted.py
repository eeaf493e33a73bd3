"""Writes of a flush image that the caller is told are done once blockd has them in its socket: *posted* writes.

Pure: no socket, thread or clock.  Such a write is at most as safe as any other of a flush image that no fsync has
followed, and never less ordered:

- It is posted only while blockd lends the block and has said that it would answer at once: it has the writer role, an
  in-sync copy of its own, and a lease.  The page of loans is looked at before the write is sent, and again after that.
  Before blockd gives up what it promised there, it takes the loan back and then takes in what is in its sockets, so
  either it has the write by then, or the second look fails and the caller waits for the answer (R1, R2).
- It overlaps no other write under way, and another one that overlaps it is sent when it is answered.  So it needs no
  order among others.
- Reads here see it once the caller has been told that it is done (``seen``, ``cover``).  Until then it is a write under
  way like any other: blockd answers what it has.
- It is kept until blockd has answered that it is done.  One that failed, or whose blockd is gone, is sent again, until
  it is done or the handle is stale.  An fsync waits for all of them, and fails while one fails (R7).
- One whose caller has to wait after all, and is told that it failed, is not sent again: it would come as a surprise.
"""

from __future__ import annotations

from typing import Any

POST_LIMIT_BYTES = 32 * 2**10
"""A larger write costs more than the wait for its answer."""
WINDOW_REQUESTS = 48
WINDOW_BYTES = 512 * 2**10
"""Beyond either a write waits for its answer: it can't get ahead of blockd for long."""
COLLECT_REQUESTS = 16
"""So many are under way before answers are looked for."""


class Post:
    """One posted write."""

    __slots__ = ("data", "end", "failed", "handle", "key", "offset", "told", "withdrawn")

    def __init__(self, key: int, handle: Any, offset: int, data: bytes) -> None:
        self.key, self.handle, self.offset, self.end, self.data = key, handle, offset, offset + len(data), data
        self.failed = False
        """It is not done, and blockd is not at work on it: it has to be sent again."""
        self.told = False
        """The caller knows it to be done: nobody may read here what was there before."""
        self.withdrawn = False
        """The caller knows it to have failed."""


class Posted:
    """The posted writes of one image, by the number of their request; shared by all its handles."""

    __slots__ = ("posts", "size")

    def __init__(self) -> None:
        self.posts: dict[int, Post] = {}
        self.size = 0
        """Bytes of all of them."""

    def room(self, length: int) -> bool:
        return len(self.posts) < WINDOW_REQUESTS and self.size + length <= WINDOW_BYTES

    def begins(self, number: int, post: Post) -> None:
        """To be called before it is sent."""
        self.posts[number] = post
        self.size += len(post.data)

    def done(self, number: int) -> Post | None:
        """It is where a write of a flush image belongs, or can't be done any more; None: it is not known."""
        post = self.posts.pop(number, None)
        if post is not None:
            self.size -= len(post.data)
        return post

    def failed(self, number: int) -> None:
        """blockd has answered that it did nothing."""
        if (post := self.posts.get(number)) is not None:
            post.failed = True

    def lost(self) -> None:
        """The blockd that they were sent to is gone."""
        for post in list(self.posts.values()):
            post.failed = True

    def unanswered(self) -> bool:
        return not all(post.failed for post in list(self.posts.values()))

    def to_send(self) -> tuple[int, Post] | None:
        """One that has to be sent again, and the number that it has here."""
        return next(((n, post) for n, post in list(self.posts.items()) if post.failed), None)

    def touching(self, offset: int, end: int) -> list[Post]:
        """Those on a part of the image."""
        return [post for post in list(self.posts.values()) if post.offset < end and offset < post.end]

    def seen(self, offset: int, end: int) -> list[Post]:
        """Those that a read of a part of the image has to see."""
        return [post for post in self.touching(offset, end) if post.told]


def cover(posts: list[Post], offset: int, into: memoryview | bytearray) -> None:
    """Put the data of ``posts`` over what was read at ``offset``.

    The posts are those that had to be seen when the read began: what was read may be older or newer than they are, and
    whatever is newer was not answered when the read began.
    """
    end = offset + len(into)
    for post in posts:
        first, last = max(offset, post.offset), min(end, post.end)
        into[first - offset : last - offset] = post.data[first - post.offset : last - post.offset]
