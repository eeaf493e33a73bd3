"""Settings: one flat TOML file, every key with a default.

Found at ``--config``, ``$UKAI_CONFIG`` or ``/etc/ukai/ukai.toml``; the environment variable ``UKAI_<KEY>``
(key in capitals) wins over the file.  Everything that can be wrong is reported in one message.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import posixpath
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ukai.errors import UsageError

DEFAULT_PATH = "/etc/ukai/ukai.toml"
IPC_PATH_LIMIT_BYTES = 107
BLOCKNAME = re.compile(r"(?:[^%/\0]|%%)*%(?:0\d{1,3}|[1-9]\d{0,2})?[diuoxX](?:[^%/\0]|%%)*")
"""One number, as wide as it needs; whatever else would not name each block apart, or not name a file."""
NAME_LIMIT_BYTES = 200


def _key(default: Any, doc: str, *, low: float | None = None, high: float | None = None, among: str = "") -> Any:
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "among": among.split()})


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a node.  Times in seconds, sizes in bytes."""

    metadata_root: str = _key("/var/lib/ukai/metadata", "where metad keeps its database and finds hand-made metadata")
    data_root: str = _key("/var/lib/ukai/data", "where blockd keeps the block files")
    blockname_format: str = _key("%016d", "file name of a block, from its index")
    control_port: int = _key(22220, "metad: requests from ukai-ctl, blockd and frontend", low=1, high=65535)
    proxy_port: int = _key(22221, "blockd: requests from the blockd of other nodes", low=1, high=65535)
    publish_port: int = _key(22222, "metad: changes of the metadata (PUB)", low=1, high=65535)
    metad_events_port: int = _key(22223, "metad: log and metrics (PUB)", low=1, high=65535)
    blockd_events_port: int = _key(22224, "blockd: log and metrics (PUB)", low=1, high=65535)
    frontend_events_port: int = _key(22225, "frontend: log and metrics (PUB)", low=1, high=65535)
    metad_address: str = _key("127.0.0.1", "the node that runs metad")
    node_address: str = _key("", "this node's address; empty: found among the interfaces")
    run_dir: str = _key("/run/ukai", "sockets between the processes of this node")
    mount_point: str = _key("/ukai", "where the frontend shows the images")
    fuse_binding: str = _key("auto", "auto, mfusepy (libfuse3) or fusepy (libfuse2)", among="auto mfusepy fusepy")
    log_level: str = _key("info", "debug, info, warning or error", among="debug info warning error")
    log_format: str = _key("text", "text or json, on stderr", among="text json")
    metrics_interval: float = _key(1.0, "how often metrics are published", low=0.05, high=3600)
    replica_timeout: float = _key(5.0, "a replica that takes longer is out-of-sync", low=0.1, high=600)
    io_timeout: float = _key(30.0, "a request of the guest that takes longer fails with EIO", low=0.5, high=3600)
    lease: float = _key(5.0, "how long a writer may go on without hearing from metad", low=0.3, high=600)
    beat_interval: float = _key(1.0, "how often processes say that they live", low=0.05, high=60)
    role_linger: float = _key(2.0, "how long the writer role stays after the last close", low=0, high=3600)
    active_limit: int = _key(128, "blocks of one image that may be active at once", low=2, high=100000)
    active_idle: float = _key(10.0, "an active block not written for so long is retired", low=0.1, high=3600)
    active_age: float = _key(60.0, "an active block is announced anew after so long", low=1, high=86400)
    flush_window: int = _key(
        16 * 2**20, "flush images: bytes acknowledged that not every replica has answered yet", low=4096, high=2**30
    )
    sync_rate: int = _key(200 * 2**20, "bytes per second one resync may copy; 0: no limit", low=0, high=2**40)
    sync_chunk: int = _key(2**20, "bytes compared and copied at a time", low=4096, high=4 * 2**20)
    sync_window: int = _key(4, "chunks under way at a time", low=1, high=64)
    message_limit: int = _key(8 * 2**20, "largest message taken from a socket", low=2**20, high=2**30)
    open_files_limit: int = _key(1024, "block files kept open", low=16, high=60000)
    fault_dir: str = _key("", "for tests only: where they arm fault points; empty: none")
    busy_poll_us: int = _key(300, "so long a process looks for the next message before it sleeps", low=0, high=10_000)
    aio: bool = _key(True, "blockd: an fdatasync is done by the kernel's workers instead of a thread of blockd")
    short_circuit: bool = _key(True, "the frontend reads block files of its own node directly")
    posted_writes: bool = _key(True, "flush images: a write is acknowledged once it is on its way to its node's blockd")
    lent_files_limit: int = _key(1024, "block files that the frontend keeps open", low=1, high=60000)
    change_keep: int = _key(1_000_000, "rows kept in the change table", low=1000, high=10**9)

    @property
    def control_endpoint(self) -> str:
        return f"tcp://{self.metad_address}:{self.control_port}"

    @property
    def publish_endpoint(self) -> str:
        return f"tcp://{self.metad_address}:{self.publish_port}"

    @property
    def blockd_endpoint(self) -> str:
        return f"ipc://{self.run_dir}/blockd.sock"

    @property
    def loans_socket(self) -> str:
        return f"{self.run_dir}/loans.sock"

    def proxy_endpoint(self, node: str) -> str:
        return f"tcp://{node}:{self.proxy_port}"

    def events_endpoint(self, process: str, node: str) -> str:
        """PUB endpoint of ``process`` (metad, blockd or frontend) on ``node``."""
        return f"tcp://{node}:{getattr(self, process + '_events_port')}"


KEYS = {f.name: f for f in fields(Config)}


def load(path: str | None = None, env: dict[str, str] | None = None) -> Config:
    """Read the settings.

    Raises UsageError, with one line per fault, when a file named on purpose is missing, is no TOML, has an
    unknown key (the nearest known one is named) or a value of the wrong kind or out of bounds.
    """
    env = dict(os.environ) if env is None else env
    named = path or env.get("UKAI_CONFIG")
    source = Path(named or DEFAULT_PATH)
    values: dict[str, Any] = {}
    faults: list[str] = []
    try:
        if named or source.exists():
            values = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"cannot read the settings {source}: {e.strerror}; name a file with --config") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"{source} is not valid TOML: {e}") from e
    for name in KEYS:
        if (text := env.get("UKAI_" + name.upper())) is not None:
            values[name] = text
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1, 0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            faults.append(f"unknown setting {name}{hint}")
            continue
        try:
            clean[name] = _convert(name, value)
        except ValueError as e:
            faults.append(f"{name}: {e}")
    config = Config(**clean)
    if not faults:
        faults = _contradictions(config)
    if faults:
        raise UsageError(f"settings ({source}): " + "; ".join(faults))
    return config


def _convert(name: str, value: Any) -> Any:
    meta = KEYS[name].metadata
    kind: Any = type(KEYS[name].default)
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"true or false is wanted, not {value!r:.80}")
        return str(value).lower() == "true"
    if isinstance(value, bool):
        raise ValueError("a number or a text is wanted, not true or false")
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"a text in quotes is wanted, not {value!r:.80}")
        if not value.isprintable():
            raise ValueError(f"{value!r:.80} has characters that can't be printed")
        if meta["among"] and value not in meta["among"]:
            raise ValueError(f"{value!r} is none of {', '.join(meta['among'])}")
        return value
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a number is wanted, not {value!r:.80}") from None
    if isinstance(value, float) and kind is int and value != number:
        raise ValueError(f"a whole number is wanted, not {value!r}")
    if not meta["low"] <= number <= meta["high"]:
        raise ValueError(f"{value} is not between {meta['low']} and {meta['high']}")
    return number


def _contradictions(c: Config) -> list[str]:
    faults = []
    for name in ("metadata_root", "data_root", "run_dir", "mount_point"):
        if not getattr(c, name).startswith("/"):
            faults.append(f"{name}: an absolute path is wanted, not {getattr(c, name)!r}")
    form = c.blockname_format
    if not BLOCKNAME.fullmatch(form) or form.startswith(".") or len((form % 0).encode()) > NAME_LIMIT_BYTES:
        faults.append(f"blockname_format: {form!r:.80} must name each block apart, such as %016d")
    mount_point, *roots = (posixpath.normpath(p) for p in (c.mount_point, c.data_root, c.metadata_root, c.run_dir))
    if roots[0] == roots[1]:
        faults.append("data_root and metadata_root must not be the same")
    if any(posixpath.commonpath((mount_point, root)) == mount_point for root in roots if root[:1] == mount_point[:1]):
        faults.append(f"data_root, metadata_root and run_dir must not lie under the mount point {c.mount_point}")
    for name in ("metad_address", "node_address"):
        value = getattr(c, name)
        if value or name == "metad_address":
            try:
                ipaddress.IPv4Address(value)
            except ValueError:
                faults.append(f"{name}: {value!r} is not an IPv4 address")
    ports = [n for n in KEYS if n.endswith("_port")]
    if len({getattr(c, n) for n in ports}) != len(ports):
        faults.append("two of " + ", ".join(ports) + " are the same")
    if len(f"{c.run_dir}/blockd.sock".encode()) > IPC_PATH_LIMIT_BYTES - 20:
        faults.append(f"run_dir: {c.run_dir} is too long for a socket path")
    if c.io_timeout <= c.replica_timeout:
        faults.append("io_timeout must be greater than replica_timeout")
    if c.lease < 2 * c.beat_interval:
        faults.append("lease must be at least twice beat_interval")
    return faults
