"""--json: the keys are a promise; a change here breaks scripts of other people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ctl.conftest import Run
from tests.ctl.fake_metad import FakeMetad

SUMMARY_KEYS = [
    "name",
    "uuid",
    "size",
    "block_size",
    "blocks",
    "online",
    "health",
    "writer",
    "epoch",
    "replication",
    "checksum",
    "hypervisors",
    "locations",
    "open",
]
IMAGE_KEYS = [*SUMMARY_KEYS, "placement", "placement_omitted", "active", "job"]
NODE_KEYS = ["address", "state", "since", "reason", "store_id", "space_free", "space_total", "images"]
JOB_KEYS = [
    "image",
    "kind",
    "number",
    "state",
    "reason",
    "nodes",
    "ranges",
    "started",
    "coordinator",
    "bytes_total",
    "bytes_done",
    "bytes_equal",
    "bytes_copied",
    "bytes_hole",
    "blocks_total",
    "blocks_done",
    "blocks_differed",
    "rate",
    "eta",
    "rate_limit",
]
ERROR_KEYS = ["address", "since", "reason", "reported_by"]
CHANGED = {"image": SUMMARY_KEYS, "notes": None}

SHAPES: dict[str, dict[str, list[str] | None]] = {
    "image create image01 --size 8G --location 127.0.0.1": CHANGED,
    "image list": {"images": SUMMARY_KEYS},
    "image show image01": {"image": IMAGE_KEYS},
    "image set image01 --replication flush": CHANGED,
    "image remove image01": {"name": None, "data_deleted": None, "notes": None},
    "location add image01 127.0.0.2": CHANGED,
    "location remove image01 127.0.0.2": CHANGED,
    "hypervisor add image01 127.0.0.2": CHANGED,
    "hypervisor remove image01 127.0.0.2": CHANGED,
    "migrate image01 127.0.0.2": CHANGED,
    "sync start image01": {"job": JOB_KEYS},
    "verify image01": {"job": JOB_KEYS},
    "sync stop image01": {"job": JOB_KEYS},
    "sync rate image01 10M": {"job": JOB_KEYS},
    "sync status": {"jobs": JOB_KEYS},
    "node list": {"nodes": NODE_KEYS},
    "status": {
        "cluster_id": None,
        "seq": None,
        "metad": ["address", "version", "since"],
        "behind": None,
        "nodes": NODE_KEYS,
        "images": SUMMARY_KEYS,
        "jobs": JOB_KEYS,
        "errors": ERROR_KEYS,
    },
    "add_image image01": CHANGED,
    "remove_image image01": CHANGED,
    "add_hypervisor image01 127.0.0.2": CHANGED,
    "remove_hypervisor image01 127.0.0.2": CHANGED,
    "add_location image01 127.0.0.2": CHANGED,
    "remove_location image01 127.0.0.2": CHANGED,
    "get_error_state": {"nodes": ERROR_KEYS},
    "completion bash": {"shell": None, "script": None},
    "create_metadata -s 1M -b 64K -l 127.0.0.1 new01": dict.fromkeys(
        ["path", "name", "size", "block_size", "blocks", "hypervisors", "locations", "notes"]
    ),
}


@pytest.mark.parametrize("line", SHAPES)
def test_keys(line: str, metad: FakeMetad, run_json: Callable[..., Any]) -> None:
    shape = SHAPES[line]
    printed = run_json(*line.split())
    assert list(printed) == list(shape)
    for key, inner in shape.items():
        if inner is not None:
            items = printed[key] if isinstance(printed[key], list) else [printed[key]]
            assert items
            assert all(list(item) == inner for item in items)


def test_keys_are_there_when_metad_sends_nothing_of_them(metad: FakeMetad, run_json: Callable[..., Any]) -> None:
    metad.answers = {op: {} for op in metad.answers}
    assert list(run_json("image", "show", "image01")["image"]) == IMAGE_KEYS
    assert list(run_json("status")) == list(SHAPES["status"])
    assert run_json("node", "list") == {"nodes": []}


@pytest.mark.parametrize("value", [None, 7, "x", [], [7], {"x": 7}, [{"x": 7}], True])
@pytest.mark.parametrize("line", [line for line in SHAPES if "metadata" not in line])
def test_values_of_the_wrong_kind_are_survived(line: str, value: object, metad: FakeMetad, run: Run) -> None:
    """Both for people and for programs."""
    metad.answers = {
        op: dict.fromkeys(answer, value) if isinstance(answer, dict) else answer for op, answer in metad.answers.items()
    }
    for extra in ([], ["--json"]):
        assert run(*line.split(), *extra).exit_code in (0, 1, 2)


@pytest.mark.parametrize("line", ["--json image list", "image --json list", "image list --json"])
def test_common_options_may_stand_anywhere(line: str, metad: FakeMetad, run: Run) -> None:
    assert json.loads(run(*line.split()).stdout)["images"][0]["name"] == "image01"


def test_get_diskinfo_prints_the_metadata_file(metad: FakeMetad, run_json: Callable[..., Any]) -> None:
    printed = run_json("get_diskinfo", "image01")
    assert list(printed) == ["name", "size", "block_size", "hypervisors", "blocks"]
    assert len(printed["blocks"]) == 128
    assert printed["blocks"][0] == {"127.0.0.1": {"sync_status": 0}, "127.0.0.2": {"sync_status": 0}}
    assert printed["blocks"][100]["127.0.0.2"] == {"sync_status": 1}
    assert printed["blocks"][127]["127.0.0.2"] == {"sync_status": 2}


def test_create_metadata_prints_what_get_diskinfo_prints(
    metad: FakeMetad, run: Run, run_json: Callable[..., Any], tmp_path: Path
) -> None:
    """The two forms are the same, byte for byte, for the same image."""
    arguments = ["-s", "8G", "-b", "64M", "-h", "127.0.0.1", "-h", "127.0.0.2", "-n", "127.0.0.1", "image01"]
    assert run("create_metadata", *arguments).exit_code == 0
    both = {"first": 0, "last": 127, "replicas": {"127.0.0.1": {"status": 0}}}
    shown = metad.answers["image.show"]
    assert isinstance(shown, dict)
    metad.answers["image.show"] = {"image": {**shown["image"], "placement": [both]}}
    assert (tmp_path / "image01").read_text() == run("get_diskinfo", "image01", "--json").stdout
