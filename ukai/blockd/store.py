"""The block files of a node.

    data_root/.ukai/store.json       which store this is, and what it has seen (R8, R12)
    data_root/<image>/.ukai.json     uuid, sizes, highest epoch seen (R1)
    data_root/<image>/.ukai.gen      generation of each block, 8 bytes little endian, 0: never written (R8)
    data_root/<image>/.ukai.sum      checksums, where the image asks for them (see sums.py)
    data_root/<image>/<block>        the block, named by blockname_format

A file alone proves nothing: a block is good only with the right image uuid, the right size and the generation
that the metadata names.  Nothing is deleted but on an administrator's order.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable

from ukai.blockd.disk import Disk
from ukai.blockd.files import (
    GENERATIONS,
    META,
    SUMS,
    TEMPORARY,
    disk_error,
    keep_record,
    whole,
    words,
)
from ukai.blockd.image_store import ImageStore
from ukai.errors import Busy, Damaged, Exists, NotFound, UkaiError, UsageError
from ukai.model import check_name


class Store:
    """All images of this node and the identity of the store."""

    def __init__(self, root: str, blockname_format: str, disk: Disk, open_files_limit: int) -> None:
        self.root, self.blockname_format, self.disk = root, blockname_format, disk
        self.images: dict[str, ImageStore] = {}
        self.files: OrderedDict[tuple[str, int], int] = OrderedDict()
        self.open_files_limit = open_files_limit
        self.store_id = ""
        self.cluster_id = ""
        self.serial = 0
        self.highest_seq = 0
        self.maker = ""
        """The metad process that made that change (R12)."""
        self.boot_id = ""
        """The run of the kernel in which this store was used last: unflushed writes of another may be lost in part."""
        self.strange: list[str] = []
        """Directories under data_root that hold no image of ours, with the reason."""
        self.on_forget: Callable[[str, int | None], None] = lambda uuid, block: None
        """Called when descriptors of an image, or of one block, are not to be used any more."""
        self._lock_fd = -1

    def open(self, new_id: str) -> None:
        """Lock the store, read its identity (a new store takes ``new_id``) and its images.

        Raises Busy when another blockd has it, UsageError when data_root can't be used.
        """
        private = f"{self.root}/.ukai"
        try:
            self._make_root(private)
            self._lock_fd = self.disk.open(f"{private}/lock", create=True)
            if not self.disk.lock(self._lock_fd):
                raise Busy(f"another blockd uses {self.root}; stop it first")
            if self.disk.exists(f"{private}/store.json"):
                self._identify(self.disk.read_file(f"{private}/store.json"))
            else:
                self.store_id = new_id
                self.save()
            for name in self.disk.names(self.root):
                if not name.startswith(".") and self.disk.exists(f"{self.root}/{name}/{META}"):
                    self._load(name)
        except OSError as e:
            self.close()
            raise UsageError(f"data_root {self.root} can't be used: {e.strerror}: {e.filename or private}") from e
        except UkaiError:
            self.close()
            raise

    def _make_root(self, private: str) -> None:
        """Make what is missing down to ``private``; it is on the disk before a store is said to be in it.

        Raises OSError.
        """
        if self.disk.exists(f"{private}/store.json"):
            return
        parents = {self.root, os.path.dirname(self.root)}
        path = self.root
        while path != "/" and not self.disk.exists(path):
            path = os.path.dirname(path)
            parents.add(path)
        self.disk.make_directories(private)
        for path in sorted(parents):
            self.disk.sync_directory(path)

    def _identify(self, data: bytes) -> None:
        """Raises UsageError."""
        try:
            fields = json.loads(data)
            self.store_id, self.cluster_id = words(fields, "store_id"), words(fields, "cluster_id")
            self.serial, self.highest_seq = whole(fields, "serial"), whole(fields, "highest_seq")
            self.maker = words(fields, "maker") if "maker" in fields else ""
            self.boot_id = words({"boot_id": "", **fields}, "boot_id")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            path = f"{self.root}/.ukai/store.json"
            raise UsageError(f"{path} is damaged ({e}); bring it back from a copy or move it away") from e

    def _load(self, name: str) -> None:
        try:
            meta = json.loads(self.disk.read_file(f"{self.root}/{name}/{META}"))
            image = ImageStore(self, name, meta)
            if image.uuid in self.images:
                raise ValueError(f"the same image as {self.images[image.uuid].name}")
            image.load()
        except (ValueError, KeyError, TypeError, RecursionError, OSError, UkaiError) as e:
            self.strange.append(f"{self.root}/{name}: {META} can't be used: {e}")
            return
        self.images[image.uuid] = image

    def save(self) -> None:
        """Raises OSError."""
        fields = {
            "store_id": self.store_id,
            "cluster_id": self.cluster_id,
            "serial": self.serial,
            "highest_seq": self.highest_seq,
            "maker": self.maker,
            "boot_id": self.boot_id,
        }
        keep_record(self.disk, f"{self.root}/.ukai", "store.json", fields)

    def image(self, uuid: str) -> ImageStore:
        """Raises Damaged."""
        image = self.images.get(uuid)
        if image is None:
            raise Damaged(
                f"no data of image {uuid} under {self.root}; if they are lost, remove this location and add it again"
            )
        return image

    def prepare(
        self, uuid: str, name: str, size: int, block_size: int, mode: str, checksum: bool = False
    ) -> ImageStore:
        """Make room for an image (``create``, ``adopt`` or ``join``).

        Raises Exists where data of another image, or any data but at an adoption, are in the way; UsageError for
        what can't be an image; DiskError, NoSpace.  After an error nothing is left of it.
        """
        if mode not in ("create", "adopt", "join"):
            raise UsageError(f"mode {mode!r} is not known")
        known = self.images.get(uuid)
        if known is not None and mode != "create":
            if (known.name, known.size, known.block_size) != (name, size, block_size):
                raise Exists(f"{known.directory} holds image {known.name} in another form; move it away")
            return known
        meta = {"uuid": uuid, "size": size, "block_size": block_size, "epoch": 0, "checksum": checksum}
        image = ImageStore(self, check_name(name), meta)
        directory = image.directory
        try:
            fresh = not self.disk.exists(directory)
            names = [] if fresh else [n for n in self.disk.names(directory) if n not in (TEMPORARY, GENERATIONS, SUMS)]
            if META in names:
                raise Exists(f"{directory} holds another image; move it away or choose another name")
            if names and mode == "create":
                raise Exists(f"{directory} holds data; move them away, or bring them online with add_image")
            if names and mode == "join":
                raise Exists(f"{directory} holds data of something else; move them away")
            if mode == "adopt":
                present, bad = image.adopt()
                if bad and not present:
                    raise Exists(f"the block files in {directory} have another size than {block_size} bytes")
        except OSError as e:
            raise disk_error(e, directory) from e
        self._furnish(image, fresh)
        self.images[uuid] = image
        return image

    def _furnish(self, image: ImageStore, fresh: bool) -> None:
        """Make the directory, if it is ``fresh``, and our own files in it.  Raises DiskError, NoSpace."""
        try:
            if fresh:
                self.disk.mkdir(image.directory)
                self.disk.sync_directory(self.root)
            for stale in (GENERATIONS, SUMS):  # without META beside them, of nothing
                with contextlib.suppress(FileNotFoundError):
                    self.disk.unlink(f"{image.directory}/{stale}")
            image.load()
            image.save(0)
        except OSError as e:
            self._clear(image, fresh)
            raise disk_error(e, image.directory) from e
        except UkaiError:
            self._clear(image, fresh)
            raise

    def _clear(self, image: ImageStore, fresh: bool) -> None:
        """Take back what ``_furnish`` made, as far as the disk lets us."""
        image.close()
        for mine in (META, GENERATIONS, SUMS, TEMPORARY):
            with contextlib.suppress(OSError):
                self.disk.unlink(f"{image.directory}/{mine}")
        if fresh:
            with contextlib.suppress(OSError):
                self.disk.rmdir(image.directory)

    def drop(self, uuid: str, name: str) -> Callable[[], None]:
        """Let go of all blocks of an image: only on an administrator's order.  Raises NotFound, DiskError.

        Returns what deletes their files, to be run in a thread; ``forget`` comes after it.
        """
        image = self.images.get(uuid)
        if image is None:
            raise NotFound(f"no data of image {name} ({uuid}) under {self.root}")
        return image.drop([(0, image.block_count - 1)])

    def forget(self, uuid: str) -> None:
        """Take back ``prepare``: our own files go, block files stay, and their directory with them."""
        image = self.images.get(uuid)
        if image is None:
            return
        try:
            # first what names the image: if that fails it is known still, and the order can be given again
            for mine in (META, GENERATIONS, SUMS, TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    self.disk.unlink(f"{image.directory}/{mine}")
                self.release(uuid)
            with contextlib.suppress(OSError):  # not empty: something that is not ours
                self.disk.rmdir(image.directory)
            self.disk.sync_directory(self.root)
        except OSError as e:
            raise disk_error(e, image.directory) from e

    def release(self, uuid: str) -> None:
        """Forget an image without touching its files."""
        image = self.images.pop(uuid, None)
        if image is not None:
            image.close()

    def forget_files(self, uuid: str, block: int | None = None) -> None:
        """Close descriptors of an image, or of one block."""
        self.on_forget(uuid, block)
        keys = [k for k in self.files if k[0] == uuid] if block is None else [(uuid, block)]
        for key in keys:
            fd = self.files.pop(key, -1)
            if fd >= 0:
                self.disk.close(fd)

    def keep_file(self, key: tuple[str, int], fd: int) -> None:
        """Remember a descriptor; those unused for longest, and flushed, are closed when there are too many."""
        self.files[key] = fd
        excess = len(self.files) - self.open_files_limit
        if excess <= 0:
            return
        for old in list(self.files):
            image = self.images.get(old[0])
            if old != key and (image is None or old[1] not in image.unflushed):
                self.disk.close(self.files.pop(old))
                excess -= 1
                if not excess:
                    return

    def close(self) -> None:
        for uuid in list(self.images):
            self.release(uuid)
        if self._lock_fd >= 0:
            self.disk.close(self._lock_fd)
            self._lock_fd = -1
