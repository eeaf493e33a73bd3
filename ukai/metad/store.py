"""The metadata on disk: SQLite in ``metadata_root/.ukai``.

The table ``change`` is the history, appended to with a gapless sequence; the other tables are the state it led to.
Both move in one transaction.  What a change does to the replicas of an image touches only their rows around it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgpack

from ukai.errors import DiskError, NoSpace, Refused, UkaiError
from ukai.metad.core import Entry
from ukai.model import REMOVED, Change, Cluster, Image, Job, Node, Replica
from ukai.ranges import RangeMap, RangeSet

DIRECTORY, DATABASE, LOCK = ".ukai", "metadata.db", "lock"
SCHEMA_VERSION = 1
TRIM_SLACK = 0.05
"""The change table may be longer than wanted by this part before it is trimmed."""
TRIM_ROWS = 20_000
"""Most rows that one transaction deletes from the change table."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE image (uuid TEXT PRIMARY KEY, row BLOB NOT NULL, active BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE place (id INTEGER PRIMARY KEY, uuid TEXT NOT NULL, node TEXT NOT NULL, UNIQUE (uuid, node));
CREATE TABLE replica (
    place INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    status INTEGER NOT NULL, generation INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (place, first)
) WITHOUT ROWID;
CREATE TABLE node (address TEXT PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE job (uuid TEXT PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE change (seq INTEGER PRIMARY KEY, time REAL NOT NULL, cause TEXT NOT NULL, body BLOB NOT NULL);
"""

Connect = Callable[[str], sqlite3.Connection]


def connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=1.0, cached_statements=256)


class Store:
    """The database of one metad.  Raises DiskError or Refused with one line; used by one thread."""

    def __init__(self, metadata_root: str, change_keep: int, connect: Connect = connect) -> None:
        self.directory = f"{metadata_root}/{DIRECTORY}"
        self.path = f"{self.directory}/{DATABASE}"
        self._keep = change_keep
        self._connect = connect
        self._db: sqlite3.Connection | None = None
        self._lock_fd = -1
        self._oldest = 1
        self._seq = 0
        self._full = False
        """The last commit failed for want of space, and for no other reason."""
        self._places: dict[tuple[str, str], int] = {}

    # --- opening

    def open(self, new_uuid: Callable[[], str]) -> Cluster:
        """Lock, check and load; a database that is not there is made."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            self._lock_fd = os.open(f"{self.directory}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Refused(f"{self.directory} is in use by another metad") from None
        except OSError as e:
            self.close()
            raise DiskError(f"metadata_root: {e.filename or self.directory}: {e.strerror}") from e
        try:
            return self._begin(new_uuid)
        except BaseException:
            self.close()
            raise

    def _begin(self, new_uuid: Callable[[], str]) -> Cluster:
        with self._faults("cannot be opened"):
            db = self._attach()
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise DiskError(f"{self.path} is not a database of UKAI")
                db.execute("BEGIN IMMEDIATE")
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('cluster_id', ?), ('seq', 0)", (new_uuid(),))
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.execute("COMMIT")
                self._sync_directories()
            elif version != SCHEMA_VERSION:
                raise DiskError(f"{self.path} has format {version}, this release knows {SCHEMA_VERSION}")
        return self.load()

    def _attach(self) -> sqlite3.Connection:
        self._db = db = self._connect(self.path)
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        # the row must be taken: an error comes with the step after it, and would leave a log that SQLite throws away
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise DiskError(f"{self.path} can't be given a write-ahead log")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA cache_size = -32768")
        db.execute("PRAGMA journal_size_limit = 67108864")
        return db

    def _sync_directories(self) -> None:
        root = os.path.dirname(self.directory)
        for directory in (self.directory, root, os.path.dirname(root)):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _faults(self, what: str) -> contextlib.AbstractContextManager[None]:
        return _Faults(self.path, what)

    def reopen(self) -> Cluster:
        """After a commit that failed: what the disk has is what counts.  Raises DiskError while it can't be read.

        The log is written into the database and synced, so that what is taken for true from here on is on the
        disk, whatever became of the failed sync.  A full disk lost nothing: going back is enough.
        """
        if self._full and self._db is not None:
            with self._faults("cannot be rolled back"):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._full = False
                return self._load(self._db)
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        with self._faults("cannot be opened again"):
            db = self._attach()
            if db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise DiskError(f"{self.path}: its log can't be written back")
        return self.load()

    def close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # --- reading

    def load(self) -> Cluster:
        """The state, checked.  Raises DiskError."""
        with self._faults("cannot be read"):
            db = self._open_db()
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise DiskError(f"{self.path} is damaged: {str(verdict).splitlines()[0]:.200}")
            collecting = gc.isenabled()
            gc.disable()  # millions of objects come and none goes: looking for garbage would take longer than loading
            try:
                return self._load(db)
            finally:
                if collecting:
                    gc.enable()

    def _open_db(self) -> sqlite3.Connection:
        if self._db is None:
            raise DiskError(f"{self.path} is not open")
        return self._db

    def _load(self, db: sqlite3.Connection) -> Cluster:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        cluster = Cluster(cluster_id=str(meta["cluster_id"]), seq=int(meta["seq"]))
        low, high, rows = db.execute("SELECT min(seq), max(seq), count(*) FROM change").fetchone()
        if (high or 0) != cluster.seq or (rows and high - low + 1 != rows):
            raise DiskError(
                f"{self.path} is damaged: changes {low} to {high} are {rows} rows, the metadata is at {cluster.seq}"
            )
        cluster.runs = [(first, inc) for first, inc in msgpack.unpackb(meta["runs"])] if "runs" in meta else []
        self._oldest = low or 1
        self._seq = cluster.seq
        for uuid, row, active in db.execute("SELECT uuid, row, active FROM image"):
            image = Image(uuid)
            _fill(image, row)
            blocks, before = msgpack.unpackb(active)
            image.active = RangeSet((a, b) for a, b in blocks)
            image.before = {n: RangeMap((a, b, g) for a, b, g in items) for n, items in before.items()}
            cluster.images[uuid] = image
            cluster.names[image.name] = uuid
        self._places = {}
        for place, uuid, node in db.execute("SELECT id, uuid, node FROM place"):
            self._places[uuid, node] = place
            self._load_place(db, cluster.images[uuid], node, place)
        for address, row in db.execute("SELECT address, row FROM node"):
            cluster.nodes[address] = Node(address)
            _fill(cluster.nodes[address], row)
        for uuid, row in db.execute("SELECT uuid, row FROM job"):
            cluster.jobs[uuid] = Job(uuid)
            _fill(cluster.jobs[uuid], row)
        return cluster

    def _load_place(self, db: sqlite3.Connection, image: Image, node: str, place: int) -> None:
        where: RangeMap[Replica] = RangeMap()
        seen: dict[tuple[int, int, str], Replica] = {}
        rows = db.execute(
            "SELECT first, last, status, generation, reason FROM replica WHERE place = ? ORDER BY first", (place,)
        )

        def items() -> Iterable[tuple[int, int, Replica]]:
            for first, last, *state in rows:
                key = (state[0], state[1], state[2])
                replica = seen.get(key)
                if replica is None:
                    replica = seen[key] = Replica(*key)
                yield first, last, replica

        try:
            where.extend(items())
        except ValueError as e:
            raise DiskError(f"{self.path} is damaged: replicas of image {image.name} on {node}: {e}") from e
        if len(where):
            image.locations[node] = where

    def changes_since(self, seq: int) -> list[tuple[int, float, str, Change]]:
        """The rows of the change table above ``seq``."""
        with self._faults("cannot be read"):
            rows = self._open_db().execute(
                "SELECT seq, time, cause, body FROM change WHERE seq > ? ORDER BY seq", (seq,)
            )
            return [(n, t, cause, msgpack.unpackb(body)) for n, t, cause, body in rows]

    # --- writing

    def commit(self, batch: Sequence[Entry], cluster: Cluster) -> None:
        """Store changes that ``cluster`` has applied already, in one transaction.

        Raises DiskError or NoSpace; then nothing may be told of any of them before ``reopen`` has said what is
        stored.
        """
        self._full = False
        try:
            with self._faults("cannot be written"):
                db = self._open_db()
                db.execute("BEGIN IMMEDIATE")
                self._write(db, batch, cluster)
                self._trim(db, cluster.seq)
                db.execute("COMMIT")
        except NoSpace:
            self._full = True
            raise

    def _write(self, db: sqlite3.Connection, batch: Sequence[Entry], cluster: Cluster) -> None:
        db.executemany(
            "INSERT INTO change VALUES (?, ?, ?, ?)", [(s, t, cause, msgpack.packb(c)) for s, t, cause, c in batch]
        )
        rows: set[str] = set()
        active: set[str] = set()
        dropped: set[str] = set()
        nodes: set[str] = set()
        jobs: set[str] = set()
        begun = False
        touched: dict[tuple[str, str], RangeSet] = {}
        for _, _, _, change in batch:
            kind = change["t"]
            if kind == "replicas":
                where = touched.setdefault((change["uuid"], change["node"]), RangeSet())
                for item in change["ranges"]:
                    where.add(item[0], item[1])
                    if item[2] == REMOVED:
                        active.add(change["uuid"])
            elif kind == "active":
                active.add(change["uuid"])
            elif kind == "image":
                rows.add(change["uuid"])
            elif kind == "image-drop":
                dropped.add(change["uuid"])
            elif kind in ("node", "node-drop"):
                nodes.add(change["address"])
            elif kind in ("job", "job-drop"):
                jobs.add(change["uuid"])
            elif kind == "run":
                begun = True
        if begun:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('runs', ?)", (msgpack.packb(cluster.runs),))
        for uuid in dropped:
            self._drop(db, uuid)
        for uuid in rows & cluster.images.keys():
            row = _pack_row(cluster.images[uuid].row())
            db.execute(
                "INSERT INTO image VALUES (?, ?, ?) ON CONFLICT (uuid) DO UPDATE SET row = excluded.row",
                (uuid, row, _pack_active(cluster.images[uuid])),
            )
        for uuid in active & cluster.images.keys():
            db.execute("UPDATE image SET active = ? WHERE uuid = ?", (_pack_active(cluster.images[uuid]), uuid))
        for (uuid, node), where in touched.items():
            if uuid in cluster.images:
                self._replicas(db, cluster.images[uuid], node, where)
        for address in nodes:
            known = cluster.nodes.get(address)
            _put(db, "node", "address", address, _pack_row(known.row()) if known is not None else None)
        for uuid in jobs:
            job = cluster.jobs.get(uuid)
            _put(db, "job", "uuid", uuid, _pack_row(job.row()) if job is not None else None)
        for seq, _, _, _ in batch:
            if seq != self._seq + 1:  # older metadata was accepted: the history begins anew (R12)
                db.execute("DELETE FROM change WHERE seq < ?", (seq,))
                self._oldest = seq
            self._seq = seq
        db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (self._seq,))

    def _drop(self, db: sqlite3.Connection, uuid: str) -> None:
        db.execute("DELETE FROM image WHERE uuid = ?", (uuid,))
        for key in [k for k in self._places if k[0] == uuid]:
            place = self._places.pop(key)
            db.execute("DELETE FROM replica WHERE place = ?", (place,))
            db.execute("DELETE FROM place WHERE id = ?", (place,))

    def _replicas(self, db: sqlite3.Connection, image: Image, node: str, touched: RangeSet) -> None:
        """Rewrite the rows around what was touched: those that were there, and the ranges there are now."""
        place = self._places.get((image.uuid, node))
        if place is None:
            cursor = db.execute("INSERT INTO place (uuid, node) VALUES (?, ?)", (image.uuid, node))
            place = self._places[image.uuid, node] = int(cursor.lastrowid or 0)
        where = image.locations.get(node)
        # a block more on each side: neighbours of equal state are one range
        around = RangeSet((max(a - 1, 0), b + 1) for a, b in touched)
        new: dict[int, tuple[int, int, int, int, int, str]] = {}
        for first, last in around:
            for a, b, replica in where.touching(first, last) if where is not None else ():
                new[a] = (place, a, b, replica.status, replica.generation, replica.reason)
        spans = RangeSet(around)
        for _, a, b, *_ in new.values():
            spans.add(a, b)
        # ranges are as long as they can be, before and after: no old row reaches beyond these spans
        gone = [(place, first, last) for first, last in spans]
        db.executemany("DELETE FROM replica WHERE place = ? AND first BETWEEN ? AND ?", gone)
        db.executemany("INSERT INTO replica VALUES (?, ?, ?, ?, ?, ?)", new.values())

    def _trim(self, db: sqlite3.Connection, seq: int) -> None:
        """Forget the oldest rows of the history where there are too many."""
        if seq - self._oldest + 1 > self._keep * (1 + TRIM_SLACK):
            oldest = min(seq - self._keep + 1, self._oldest + TRIM_ROWS)
            db.execute("DELETE FROM change WHERE seq < ?", (oldest,))
            self._oldest = oldest


class _Faults:
    """Turns what SQLite and the system raise into one line."""

    def __init__(self, path: str, what: str) -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UkaiError):
            return
        if isinstance(error, sqlite3.Error | OSError):
            text = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
            full = isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
            raise (NoSpace if full else DiskError)(f"{self._path} {self._what}: {text}") from error
        if isinstance(error, msgpack.UnpackException | ValueError | KeyError | TypeError):
            raise DiskError(f"{self._path} is damaged: {type(error).__name__}: {error}") from error


def _fill(target: Any, row: bytes) -> None:
    for name, value in msgpack.unpackb(row).items():
        if name in target.__slots__:
            setattr(target, name, value)


def _pack_row(row: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(row)
    return packed


def _pack_active(image: Image) -> bytes:
    before = {n: [list(r) for r in earlier] for n, earlier in image.before.items()}
    packed: bytes = msgpack.packb([[list(r) for r in image.active], before])
    return packed


def _put(db: sqlite3.Connection, table: str, key: str, value: str, row: bytes | None) -> None:
    if row is None:
        db.execute(f"DELETE FROM {table} WHERE {key} = ?", (value,))
    else:
        db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (value, row))
