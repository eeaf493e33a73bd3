"""The database: what was committed is there, and every disk operation may fail."""

from __future__ import annotations

import functools
import itertools
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faultfs import KINDS, FaultFilesystem
from tests.metad.desk import state
from tests.processes.sample import ALL
from ukai.errors import DiskError, NoSpace, Refused, UkaiError
from ukai.metad.core import Entry
from ukai.metad.store import Store, connect
from ukai.model import REMOVED, Change, Cluster

NODES = ("192.0.2.1", "192.0.2.2", "192.0.2.3")
BLOCKS = 60


def new_uuid() -> str:
    return "cluster-1"


@contextmanager
def opened(root: Path, **kwargs: Any) -> Iterator[tuple[Store, Cluster]]:
    store = Store(str(root), kwargs.pop("change_keep", 10_000), **kwargs)
    try:
        yield store, store.open(new_uuid)
    finally:
        store.close()


def image(uuid: str) -> list[Change]:
    rows = [[0, BLOCKS - 1, 0, 0, ""]]
    return [
        {"t": "image", "uuid": uuid, "name": f"n-{uuid}", "size": BLOCKS * 4096, "block_size": 4096, "online": True},
        *({"t": "replicas", "uuid": uuid, "node": n, "ranges": rows} for n in NODES[:2]),
    ]


def batch(cluster: Cluster, changes: list[Change], cause: str = "test") -> list[Entry]:
    entries: list[Entry] = []
    for change in changes:
        cluster.apply(change)
        entries.append((cluster.seq, 1.5, cause, change))
    return entries


def random_change(chance: random.Random, cluster: Cluster) -> Change:
    """Some change that fits the state."""
    known = sorted(cluster.images)
    kind = chance.choice(["replicas"] * 8 + ["active"] * 4 + ["image", "node", "job", "drop", "node-drop", "job-drop"])
    uuid = chance.choice(known) if known else ""
    first = chance.randrange(BLOCKS)
    last = chance.randrange(first, min(first + 8, BLOCKS))
    if kind == "replicas" and uuid:
        status = chance.choice([0, 1, 2, 2, REMOVED])
        row = [first, last, status, chance.randrange(4), chance.choice(["", "x"])]
        return {"t": "replicas", "uuid": uuid, "node": chance.choice(NODES), "ranges": [row]}
    if kind == "active" and uuid:
        return {"t": "active", "uuid": uuid, chance.choice(["add", "del"]): [[first, last]]}
    if kind == "drop" and len(known) > 2:
        return {"t": "image-drop", "uuid": uuid}
    if kind == "node":
        return {"t": "node", "address": chance.choice(NODES), "serial": chance.randrange(100), "inc": "i"}
    if kind == "node-drop":
        return {"t": "node-drop", "address": chance.choice(NODES)}
    if kind == "job" and uuid:
        return {"t": "job", "uuid": uuid, "number": chance.randrange(9), "ranges": [[first, last]]}
    if kind == "job-drop" and uuid:
        return {"t": "job-drop", "uuid": uuid}
    return image(f"u{chance.randrange(6)}")[0]


@pytest.mark.parametrize("seed", range(6))
def test_what_was_committed_is_there_after_a_restart(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with opened(tmp_path) as (store, cluster):
        for _ in range(100):
            entries = [
                e for _ in range(chance.randrange(1, 6)) for e in batch(cluster, [random_change(chance, cluster)])
            ]
            store.commit(entries, cluster)
            if chance.random() < 0.05:
                assert state(store.load()) == state(cluster)
    with opened(tmp_path) as (store, again):
        assert state(again) == state(cluster)
        assert again.cluster_id == "cluster-1"
        history = Cluster(cluster_id="cluster-1")
        for seq, _, _, change in store.changes_since(0):
            history.apply(change)
            assert history.seq == seq
        assert state(history) == state(again)


def test_the_history_is_trimmed_and_stays_gapless(tmp_path: Path) -> None:
    with opened(tmp_path, change_keep=1000) as (store, cluster):
        for _ in range(30):
            store.commit(batch(cluster, [{"t": "node", "address": NODES[0], "serial": 1}] * 100), cluster)
        kept = [row[0] for row in store.changes_since(0)]
        assert 1000 <= len(kept) <= 1100
        assert kept == list(range(kept[0], 3001))
    with opened(tmp_path, change_keep=1000) as (_, again):
        assert again.seq == 3000


def test_a_second_metad_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(Refused, match="in use by another metad"):
        Store(str(tmp_path), 1000).open(new_uuid)
    with opened(tmp_path):
        pass


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM change WHERE seq = 2", "is damaged: changes 1 to 3 are 2 rows"),
        ("DELETE FROM change WHERE seq = 3", "is damaged: changes 1 to 2 are 2 rows, the metadata is at 3"),
        ("UPDATE meta SET value = 7 WHERE key = 'seq'", "the metadata is at 7"),
        ("DELETE FROM meta", "is damaged: KeyError"),
        ("UPDATE image SET row = x'c1'", "is damaged"),
        ("UPDATE replica SET last = -1", "is damaged: replicas of image n-u1 on"),
        ("PRAGMA user_version = 9", "has format 9, this release knows 1"),
        ("DROP TABLE node", "no such table: node"),
    ],
)
def test_a_database_that_is_wrong_is_said_so_in_one_line(tmp_path: Path, statement: str, message: str) -> None:
    with opened(tmp_path) as (store, cluster):
        store.commit(batch(cluster, image("u1")), cluster)
    db = sqlite3.connect(store.path, isolation_level=None)
    db.execute(statement)
    db.close()
    with pytest.raises(DiskError, match=message) as caught:
        Store(str(tmp_path), 1000).open(new_uuid)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("at", [0, 60, 7000])
def test_a_database_that_was_overwritten(tmp_path: Path, at: int) -> None:
    with opened(tmp_path) as (store, cluster):
        for n in range(20):
            store.commit(batch(cluster, image(f"u{n}")), cluster)
    path = Path(store.path)
    data = bytearray(path.read_bytes())
    data[at : at + 3000] = bytes(range(1, 251)) * 12
    path.write_bytes(data)
    with pytest.raises(DiskError) as caught:
        Store(str(tmp_path), 1000).open(new_uuid)
    assert "\n" not in caught.value.message


def test_a_root_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(DiskError, match=r"metadata_root: .*Not a directory"):
        Store(str(tmp_path / "root"), 1000).open(new_uuid)


def fill(store: Store, cluster: Cluster) -> None:
    for _ in range(1000):
        store.commit(batch(cluster, [{"t": "node", "address": NODES[0], "store_id": "x" * 2000}]), cluster)


def test_a_full_disk_refuses_the_commit_and_keeps_what_was(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, cluster):
        store.commit(batch(cluster, image("u1")), cluster)
        before = cluster.images["u1"].row()
        db = store._open_db()
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(NoSpace, match="database or disk is full"):
            fill(store, cluster)
        cluster = store.reopen()
        assert cluster.images.keys() == {"u1"}
        assert cluster.images["u1"].row() == before
        with pytest.raises(NoSpace):
            fill(store, cluster)
        cluster = store.reopen()
        db.execute("PRAGMA max_page_count = 1000000")
        store.commit(batch(cluster, image("u2")), cluster)
        assert state(store.load()) == state(cluster)


class Faulty:
    """A connection whose N-th statement fails, before or after the database has done it."""

    def __init__(self, path: str, fault: Fault) -> None:
        self._db = connect(path)
        self._fault = fault

    def execute(self, *args: Any) -> Any:
        return self._fault.around(self._db.execute, *args)

    def executemany(self, *args: Any) -> Any:
        return self._fault.around(self._db.executemany, *args)

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def close(self) -> None:
        self._db.close()


class Fault:
    def __init__(self, number: int, after: bool, code: int) -> None:
        self.left, self.after, self.code = number, after, code
        self.fired = False

    def around(self, call: Callable[..., Any], *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self.fired = True
            if self.after:
                call(*args)
            error = sqlite3.OperationalError("disk I/O error" if self.code == sqlite3.SQLITE_IOERR else "full")
            error.sqlite_errorcode = self.code
            raise error
        return call(*args)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL])
def test_every_statement_may_fail(tmp_path: Path, after: bool, code: int) -> None:
    """1st, 2nd, 3rd … statement: what was committed stays, what was not is gone or whole, and metad goes on."""
    number = 0
    while True:
        number += 1
        fault = Fault(number, after, code)
        root = tmp_path / str(number)
        root.mkdir()
        _story(Store(str(root), 3, functools.partial(Faulty, fault=fault)), root)  # type: ignore[arg-type]
        if not fault.fired:
            break
    assert number > 30, "the loop has run over the whole story"


def _story(store: Store, root: Path, stored: Callable[[Any], object] = id) -> list[UkaiError]:
    """A database is made, changed, and opened anew, on a disk that fails once; the errors that metad has met.

    ``stored`` is called with each state from which metad goes on.
    """
    errors: list[UkaiError] = []
    try:
        try:
            cluster = store.open(new_uuid)
        except UkaiError as e:
            errors.append(e)
            cluster = store.open(new_uuid)  # supervisord starts it anew
        good = state(cluster)
        stored(good)
        steps: list[list[Change]] = [
            image("u1"),
            [{"t": "active", "uuid": "u1", "add": [[3, 9]]}, {"t": "node", "address": NODES[0], "serial": 1}],
            [{"t": "replicas", "uuid": "u1", "node": NODES[1], "ranges": [[5, 5, 2, 0, "x"]]}],
            [{"t": "job", "uuid": "u1", "number": 3}, *image("u2")],
            [{"t": "image-drop", "uuid": "u1"}],
        ]
        for step in steps:
            while True:
                entries = batch(cluster, step)
                whole = state(cluster)
                try:
                    store.commit(entries, cluster)
                except (DiskError, NoSpace) as e:
                    errors.append(e)
                    cluster = _reopened(store, errors)
                    if state(cluster) == whole:
                        break  # it was stored, though nobody was told
                    assert state(cluster) == good, "half a batch is there"
                    stored(good)
                    continue
                break
            good = whole
            stored(good)
        store.close()
        again = Store(str(root), 1000)
        try:
            assert state(again.open(new_uuid)) == good
        except UkaiError as e:
            errors.append(e)
            assert state(again.open(new_uuid)) == good
        finally:
            again.close()
    finally:
        store.close()
    return errors


def _reopened(store: Store, errors: list[UkaiError]) -> Cluster:
    try:
        return store.reopen()
    except UkaiError as e:
        errors.append(e)
        return store.reopen()


STEPS = {"EIO": 23, "ENOSPC": 13, "sync": 6, "short": 31, "torn": 17}
"""Every so many operations are enough for each day."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultFilesystem]:
    with FaultFilesystem(tmp_path_factory.mktemp("disk")) as one:
        yield one


def _quick(path: str) -> sqlite3.Connection:
    """A connection that writes its log back into the database after each commit."""
    db = connect(path)
    db.execute("PRAGMA wal_autocheckpoint = 1")
    return db


@pytest.mark.fuse
@pytest.mark.parametrize("checkpoints", [False, True], ids=["log", "checkpoints"])
@pytest.mark.parametrize(
    ("kind", "lose"),
    [*((kind, False) for kind in KINDS), ("EIO", True), ("sync", True)],
    ids=lambda v: {False: "kept", True: "lost"}.get(v, v),
)
def test_every_operation_of_sqlite_may_fail(
    disk: FaultFilesystem, tmp_path: Path, kind: str, lose: bool, checkpoints: bool
) -> None:
    """1st, 2nd, 3rd … system call below SQLite: as above; and what metad goes on from is on the disk already.

    With ``lose`` all that a failed fsync did not store is gone at once.
    """
    copies = itertools.count()

    def survives(good: Any) -> None:
        """What would be there if power went off now is what metad tells."""
        copy = tmp_path / f"copy{next(copies)}"
        disk.copy_after_power_cut(root, copy)
        with opened(copy) as (_, found):
            assert state(found) == good, f"after {disk.fired}"

    step = 1 if ALL else STEPS[kind]
    number = 1 - step
    while True:
        number += step
        root = disk.where / f"{tmp_path.name}-{number}"
        root.mkdir()
        disk.arm(kind, number, f"/{root.name}/", lose=lose)
        errors = _story(Store(str(root), 3, _quick if checkpoints else connect), root, survives)
        fired = disk.fired
        disk.disarm()
        assert len(errors) <= (2 if fired else 0), f"{fired}: {errors}"
        assert not any("\n" in e.message for e in errors), errors
        if kind == "short":
            assert not errors, "a short read or write is no error"
        if not fired:
            break
    assert number > 3 * step, "the loop has run over the whole story"
