"""The keys of ``--json``: stable, all always there, whatever version of metad answered.

A key that metad did not send, or sent with another kind of value, has the default given here.  Sizes are bytes,
times seconds since 1970, durations seconds, blocks ``[first, last]`` with both ends included.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from ukai.ranges import RangeSet, show

Map: TypeAlias = dict[str, Any]

SUMMARY: Map = {
    "name": "",
    "uuid": "",
    "size": 0,
    "block_size": 0,
    "blocks": 0,
    "online": False,
    "health": "",
    "writer": "",
    "epoch": 0,
    "replication": "sync",
    "checksum": False,
    "hypervisors": [],
    "locations": {},
    "open": {},
}
LOCATION: Map = {"in_sync": 0, "syncing": 0, "out_of_sync": 0}
RANGE: Map = {"first": 0, "last": 0, "replicas": {}}
REPLICA: Map = {"status": 2, "status_name": "", "generation": 0, "reason": ""}
NODE: Map = {
    "address": "",
    "state": "unknown",
    "since": None,
    "reason": "",
    "store_id": "",
    "space_free": None,
    "space_total": None,
    "images": 0,
}
JOB: Map = {
    "image": "",
    "kind": "sync",
    "number": 0,
    "state": "",
    "reason": "",
    "nodes": [],
    "ranges": [],
    "started": None,
    "coordinator": "",
    "bytes_total": None,
    "bytes_done": None,
    "bytes_equal": None,
    "bytes_copied": None,
    "bytes_hole": None,
    "blocks_total": None,
    "blocks_done": None,
    "blocks_differed": None,
    "rate": None,
    "eta": None,
    "rate_limit": None,
}
ERROR: Map = {"address": "", "since": None, "reason": "", "reported_by": []}
SEEN: Map = {"address": "", "reported": False, "seq": 0, "reason": ""}
HOLDING: Map = {
    "location": False,
    "reported": False,
    "held": False,
    "epoch": 0,
    "written": 0,
    "newest": 0,
    "bad": [],
    "bad_blocks": 0,
}
HELD: Map = {"name": "", "uuid": "", "blocks": 0, "epoch": 0, "newest": 0, "copies": {}}
UNKNOWN: Map = {"name": "", "uuid": "", "nodes": []}
METAD: Map = {"address": "", "version": "", "since": None}
LOG: Map = {"time": None, "level": "", "node": "", "process": "", "logger": "", "message": ""}
METRIC: Map = {"time": None, "node": "", "process": "", "metrics": []}


def pick(raw: object, keys: Map) -> Map:
    """The values of ``keys`` in what a peer sent; a default of None stands for a number that may be missing."""
    given = _map(raw)
    out: Map = {}
    for key, default in keys.items():
        value = given.get(key)
        if default is None:
            out[key] = value if type(value) in (int, float) else None
        elif type(value) is type(default):
            out[key] = value
        else:
            out[key] = default.copy() if isinstance(default, list | dict) else default
    return out


def _map(raw: object) -> Map:
    return raw if isinstance(raw, dict) else {}


def _list(raw: object) -> list[Any]:
    return raw if isinstance(raw, list) else []


def _maps(raw: object, keys: Map) -> list[Map]:
    return [pick(item, keys) for item in _list(raw) if isinstance(item, dict)]


def _named(raw: Map, keys: Map) -> Map:
    return {str(name): pick(value, keys) for name, value in raw.items()}


def texts(raw: object) -> list[str]:
    return [str(item) for item in _list(raw)]


def block_ranges(raw: object) -> list[list[int]]:
    return [
        [item[0], item[1]]
        for item in _list(raw)
        if isinstance(item, list | tuple) and len(item) == 2 and all(type(n) is int and n >= 0 for n in item)
    ]


def summary(raw: object) -> Map:
    image = pick(raw, SUMMARY)
    image["hypervisors"] = texts(image["hypervisors"])
    image["locations"] = _named(image["locations"], LOCATION)
    image["open"] = {str(node): n for node, n in image["open"].items() if type(n) is int and n > 0}
    return image


def summaries(raw: object) -> list[Map]:
    return [summary(item) for item in _list(raw)]


def image(raw: object) -> Map:
    """A summary with ``placement``, ``active`` and ``job`` (null where there is none).

    ``placement_omitted`` counts the ranges that metad left out of a placement in too many pieces.
    """
    out = summary(raw)
    given = _map(raw)
    omitted = given.get("placement_omitted")
    out["placement"] = _maps(given.get("placement"), RANGE)
    out["placement_omitted"] = omitted if type(omitted) is int else 0
    for part in out["placement"]:
        part["replicas"] = _named(part["replicas"], REPLICA)
    out["active"] = block_ranges(given.get("active"))
    out["job"] = job(given["job"]) if isinstance(given.get("job"), dict) else None
    return out


def job(raw: object) -> Map:
    out = pick(raw, JOB)
    out["nodes"] = texts(out["nodes"])
    out["ranges"] = block_ranges(out["ranges"])
    return out


def jobs(raw: object) -> list[Map]:
    return [job(item) for item in _list(raw) if isinstance(item, dict)]


def nodes(raw: object) -> list[Map]:
    return _maps(raw, NODE)


def errors(raw: object) -> list[Map]:
    out = _maps(raw, ERROR)
    for item in out:
        item["reported_by"] = list(dict.fromkeys(texts(item["reported_by"])))
    return out


def status(raw: Map) -> Map:
    """All that ``status`` shows; ``behind`` is empty unless metad is older than what nodes have seen (R12)."""
    return {
        "cluster_id": str(raw.get("cluster_id", "")),
        "seq": raw.get("seq") if type(raw.get("seq")) is int else 0,
        "metad": pick(raw.get("metad"), METAD),
        "behind": {str(node): seq for node, seq in _map(raw.get("behind")).items() if type(seq) is int},
        "nodes": nodes(raw.get("nodes")),
        "images": summaries(raw.get("images")),
        "jobs": jobs(raw.get("jobs")),
        "errors": errors(raw.get("errors")),
    }


def holdings(raw: Map) -> Map:
    """What the metadata knows and what nodes reported, of ``metadata show``."""
    images = _maps(raw.get("images"), HELD)
    for item in images:
        item["copies"] = _named(item["copies"], HOLDING)
    return {
        "behind": raw.get("behind") is True,
        "seq": raw.get("seq") if type(raw.get("seq")) is int else 0,
        "nodes": _maps(raw.get("nodes"), SEEN),
        "images": images,
        "unknown": [{**item, "nodes": texts(item["nodes"])} for item in _maps(raw.get("unknown"), UNKNOWN)],
    }


def log_record(raw: Map) -> Map:
    return pick(raw, LOG)


def metric_record(raw: Map) -> Map:
    """One process's numbers, ``metrics`` a list of {``name``, ``labels``, ``value``}."""
    out = pick(raw, METRIC)
    out["metrics"] = [
        {"name": str(item[0]), "labels": {str(k): str(v) for k, v in item[1].items()}, "value": item[2]}
        for item in _list(out["metrics"])
        if isinstance(item, list) and len(item) == 3 and isinstance(item[1], dict) and type(item[2]) in (int, float)
    ]
    return out


def by_status(picture: Map) -> list[tuple[str, str, str, RangeSet]]:
    """Placement by (location, name of the status, reason) → blocks, for people."""
    groups: dict[tuple[str, int, str, str], RangeSet] = {}
    for part in picture["placement"]:
        if part["first"] > part["last"]:
            continue
        for node, replica in part["replicas"].items():
            key = (node, replica["status"], replica["status_name"], replica["reason"])
            groups.setdefault(key, RangeSet()).add(part["first"], part["last"])
    return [(node, name, reason, blocks) for (node, _, name, reason), blocks in sorted(groups.items(), key=_order)]


def _order(item: tuple[tuple[str, int, str, str], RangeSet]) -> tuple[tuple[int, ...], int, str]:
    (node, status_number, _, reason), _ = item
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in node.split("."))
    return numbers, status_number, reason


def few_ranges(blocks: RangeSet, limit: int = 12) -> str:
    """``0-3,7`` and, from ``limit`` ranges on, how many more there are."""
    parts = list(blocks)
    more = f" and {len(parts) - limit} more ranges" if len(parts) > limit else ""
    return show(parts[:limit]) + more
