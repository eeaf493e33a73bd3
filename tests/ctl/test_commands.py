"""What each command asks of metad, and what a person reads."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ctl.conftest import Run
from tests.ctl.fake_metad import ANSWERS, BEHIND, IMAGE, JOB, SUMMARY, FakeMetad, replica
from ukai.ctl.main import commands

NODES = {"name": "image01", "node": "127.0.0.2"}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "image create image01 --size 8GiB --location 127.0.0.1 --location 127.0.0.2": (
        "image.create",
        {
            "name": "image01",
            "size": 8 * 2**30,
            "block_size": 0,
            "locations": ["127.0.0.1", "127.0.0.2"],
            "hypervisors": [],
            "replication": "sync",
            "checksum": False,
        },
    ),
    "image create image01 --size 8GB --block-size 50MB --location 127.0.0.1 --hypervisor 127.0.0.3 --checksum "
    "--replication flush": (
        "image.create",
        {
            "name": "image01",
            "size": 8_000_000_000,
            "block_size": 50_000_000,
            "locations": ["127.0.0.1"],
            "hypervisors": ["127.0.0.3"],
            "replication": "flush",
            "checksum": True,
        },
    ),
    "image set image01 --replication flush": ("image.set", {"name": "image01", "replication": "flush"}),
    "image show image01": ("image.show", {"name": "image01"}),
    "image remove image01": ("image.remove", {"name": "image01", "delete_data": False, "force": False}),
    "image remove image01 --delete-data --force": (
        "image.remove",
        {"name": "image01", "delete_data": True, "force": True},
    ),
    "location add image01 127.0.0.2": ("location.add", {**NODES, "ranges": []}),
    "location add image01 127.0.0.2 --blocks 7,0-3": ("location.add", {**NODES, "ranges": [[0, 3], [7, 7]]}),
    "location remove image01 127.0.0.2 --keep-data": (
        "location.remove",
        {**NODES, "ranges": [], "keep_data": True},
    ),
    "hypervisor add image01 127.0.0.2": ("hypervisor.add", {**NODES, "force": False}),
    "hypervisor remove image01 127.0.0.2 --force": ("hypervisor.remove", {**NODES, "force": True}),
    "migrate image01 127.0.0.2": ("migrate", {**NODES, "force": False}),
    "sync start image01": ("sync.start", {"name": "image01", "nodes": [], "ranges": [], "rate": -1}),
    "sync start image01 --node 127.0.0.2 --blocks 5 --rate 100M": (
        "sync.start",
        {"name": "image01", "nodes": ["127.0.0.2"], "ranges": [[5, 5]], "rate": 100 * 2**20},
    ),
    "verify image01": ("verify.start", {"name": "image01", "nodes": [], "ranges": [], "rate": -1}),
    "verify image01 --node 127.0.0.2 --blocks 5 --rate 100M": (
        "verify.start",
        {"name": "image01", "nodes": ["127.0.0.2"], "ranges": [[5, 5]], "rate": 100 * 2**20},
    ),
    "verify image01 --stop": ("sync.stop", {"name": "image01"}),
    "metadata show": ("metadata.show", {}),
    "metadata accept --trust image02=127.0.0.2 --trust 127.0.0.1 --yes": (
        "metadata.accept",
        {"trust": ["image02=127.0.0.2", "127.0.0.1"]},
    ),
    "image accept image01 127.0.0.2 --yes": (
        "image.accept",
        {**NODES, "ranges": [], "zeros": False, "force": False},
    ),
    "image accept image01 127.0.0.2 --blocks 7,0-3 --zeros --force --yes": (
        "image.accept",
        {**NODES, "ranges": [[0, 3], [7, 7]], "zeros": True, "force": True},
    ),
    "node accept 127.0.0.2 --yes": ("node.accept", {"node": "127.0.0.2"}),
    "sync stop image01": ("sync.stop", {"name": "image01"}),
    "sync rate image01 none": ("sync.rate", {"name": "image01", "rate": 0}),
    "sync rate image01 default": ("sync.rate", {"name": "image01", "rate": -1}),
    "sync rate image01 10MB/s": ("sync.rate", {"name": "image01", "rate": 10_000_000}),
    "sync status": ("sync.status", {"name": ""}),
    "sync status image01": ("sync.status", {"name": "image01"}),
    "add_image image01": ("image.add", {"name": "image01"}),
    "remove_image image01": ("image.offline", {"name": "image01", "force": False}),
    "get_diskinfo image01": ("image.show", {"name": "image01"}),
    "add_hypervisor image01 127.0.0.2": ("hypervisor.add", {**NODES, "force": False}),
    "remove_hypervisor image01 127.0.0.2": ("hypervisor.remove", {**NODES, "force": False}),
    "add_location image01 127.0.0.2": ("location.add", {**NODES, "ranges": []}),
    "remove_location image01 127.0.0.2": ("location.remove", {**NODES, "ranges": [], "keep_data": False}),
    "get_error_state": ("errors", {}),
    "node list": ("node.list", {}),
    "status": ("status", {}),
}


@pytest.mark.parametrize("line", ASKED)
def test_request(line: str, metad: FakeMetad, run: Run) -> None:
    op, fields = ASKED[line]
    result = run(*line.split())
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert metad.last(op) == fields


def test_every_operation_of_the_control_port_has_a_command() -> None:
    assert {op for op, _ in ASKED.values()} == set(ANSWERS) - {"image.list"}


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_has_an_example_of_this_very_command(name: str, run: Run) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    _, _, example = result.stdout.partition("Example:\n")
    assert f"ukai-ctl {name}" in example
    for option in ("--json", "--timeout", "--config"):
        assert option in result.stdout


def test_the_root_help_tells_the_exit_codes(run: Run) -> None:
    assert "0 done, 1 refused or failed, 2 wrong usage" in run("--help").stdout


def test_create_metadata_takes_h_for_a_hypervisor(run: Run) -> None:
    line = "create_metadata -s 8000000000 -b 50000000 -h 192.0.2.100 -n 192.0.2.100 image01"
    result = run(*line.split())
    assert result.exit_code == 0
    assert "wrote image01: 7.45 GiB (8000000000 bytes) in 160 blocks of 50000000 bytes" in result.stdout
    assert "/var/lib/ukai/metadata/image01" in result.stdout


def test_image_show_for_people(metad: FakeMetad, run: Run) -> None:
    text = run("image", "show", "image01").stdout
    for wanted in (
        "8 GiB (8589934592 bytes)",
        "64 MiB (67108864 bytes), 128 blocks",
        "127.0.0.1 (2 handles)",
        "3-4,9",
        "50 % of 1.75 GiB",
    ):
        assert wanted in text
    rows = [line.split() for line in text.splitlines() if line.startswith("127.")]
    assert rows == [
        ["127.0.0.1", "in-sync", "128", "0-127", "-"],
        ["127.0.0.2", "in-sync", "100", "0-99", "-"],
        ["127.0.0.2", "syncing", "8", "100-107", "-"],
        ["127.0.0.2", "out-of-sync", "20", "108-127", "no", "answer"],
    ]


def test_ranges_that_follow_each_other_are_one(metad: FakeMetad, run: Run) -> None:
    parts = [
        {"first": i, "last": i, "replicas": {"127.0.0.1": replica(0, generation=i), "127.0.0.10": replica(2 * (i % 2))}}
        for i in range(128)
    ]
    metad.answers["image.show"] = {"image": IMAGE | {"placement": parts}}
    text = run("image", "show", "image01").stdout
    assert "0-127" in text
    assert "and 52 more ranges" in text


def test_status_for_people(metad: FakeMetad, run: Run) -> None:
    text = run("status").stdout
    for wanted in (
        "metadata 42, cluster c0ffee00",
        "down",
        "no beat for 5 s",
        "degraded",
        "127.0.0.1 128/128, 127.0.0.2 100/128",
        "100 MiB/s, 9 s left",
        "UNAVAILABLE",
    ):
        assert wanted in text


def test_sync_status_tells_why_it_stands_still(metad: FakeMetad, run: Run) -> None:
    metad.answers["sync.status"] = {"jobs": [JOB | {"state": "waiting", "reason": "127.0.0.2 can't be reached"}]}
    text = run("sync", "status").stdout
    assert "waiting: 127.0.0.2 can't be reached" in text
    assert "896 MiB of 1.75 GiB (50.0 %), 14 of 28 blocks" in text
    assert "640 MiB, holes 64 MiB" in text


def test_verify_says_what_it_found(metad: FakeMetad, run: Run) -> None:
    found = JOB | {"kind": "verify", "state": "done", "reason": "28 blocks compared", "blocks_differed": 1}
    metad.answers["verify.start"] = {
        "job": found | {"state": "running", "blocks_differed": 0, "nodes": [], "reason": ""}
    }
    metad.answers["sync.status"] = {"jobs": [found]}
    begun = run("verify", "image01")
    assert begun.exit_code == 0
    lines = [" ".join(line.split()) for line in begun.stdout.splitlines()]
    assert "order verify" in lines
    assert "compared all locations" in lines
    assert "differed 0 blocks" in lines
    ended = run("verify", "image01", "--wait")
    assert ended.exit_code == 1, "a difference is not well"
    lines = [" ".join(line.split()) for line in ended.stdout.splitlines()]
    assert "state done: 28 blocks compared" in lines
    assert "differed 1 block" in lines
    metad.answers["sync.status"] = {"jobs": [found | {"state": "failed", "reason": "the disk is gone"}]}
    broken = run("verify", "image01", "--wait")
    assert broken.exit_code == 1
    assert "ukai-ctl: verify of image01 failed: the disk is gone" in broken.stderr
    assert run("verify", "image01", "--stop", "--wait").exit_code == 2


def test_metadata_show_for_people(metad: FakeMetad, run: Run) -> None:
    text = run("metadata", "show").stdout
    assert text.startswith("the metadata is at change 42, and nodes have seen more\n")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert [line for line in lines if line.startswith("127.")] == [
        "127.0.0.1 yes 57 the metadata is older than what it has seen",
        "127.0.0.2 no - -",
    ]
    assert [line for line in lines if line.startswith("image01 ")] == [
        "image01 127.0.0.1 40 128 17 0 newer than the metadata",
        "image01 127.0.0.2 0 128 0 0 has not reported",
        "image01 127.0.0.3 0 128 0 0 no data of this image",
        "image01 127.0.0.4 40 128 9 2 no location in this metadata; block 3: block file is missing",
    ]
    assert f"image later ({BEHIND['unknown'][0]['uuid']}) on 127.0.0.1 is not in this metadata" in text
    assert "nothing to accept" not in text
    metad.answers["metadata.show"] = BEHIND | {"behind": False}
    text = run("metadata", "show").stdout
    assert text.startswith("the metadata is at change 42\n")
    assert "nothing to accept" in text


def test_metadata_accept_names_the_price_and_says_where_it_goes_on(metad: FakeMetad, run: Run) -> None:
    refused = run("metadata", "accept", "--trust", "127.0.0.1")
    assert refused.exit_code == 1
    assert "what was ordered since is forgotten" in refused.stderr
    assert "127.0.0.2 has not reported: what only it has is given up" in refused.stderr
    assert refused.stderr.rstrip().endswith("To go on, add --yes")
    assert "metadata.accept" not in metad.ops()
    text = run("metadata", "accept", "--trust", "127.0.0.1", "--yes").stdout
    assert "accepted; the metadata goes on at change 1000058 (nodes had seen 57)" in text
    assert "a note" in text
    assert "then ukai-ctl sync start IMAGE for each image" in text


def test_image_accept_names_the_price_and_the_blocks(metad: FakeMetad, run: Run) -> None:
    line = ("image", "accept", "image01", "127.0.0.2")
    refused = run(*line)
    assert refused.exit_code == 1
    assert "what 127.0.0.2 holds counts from now on, however old it is" in refused.stderr
    assert "zeros" not in refused.stderr
    assert "given up" not in refused.stderr
    dear = run(*line, "--zeros", "--force").stderr
    assert "Blocks without a usable file there become zeros." in dear
    assert "In-sync copies on nodes that can't be reached are given up." in dear
    assert "image.accept" not in metad.ops()
    text = run(*line, "--yes").stdout
    assert "image01: the copy of 127.0.0.2 is accepted for blocks 0-3,7\n" in text
    assert "a note" in text
    assert "ukai-ctl sync start image01" in text
    metad.answers["image.accept"] = {"image": SUMMARY, "accepted": [[0, 3]], "zeros": [[4, 9]], "notes": []}
    assert "accepted for blocks 0-3; zeros are 4-9\n" in run(*line, "--zeros", "--yes").stdout


def test_node_accept_names_the_price_and_what_was_taken(metad: FakeMetad, run: Run) -> None:
    refused = run("node", "accept", "127.0.0.2")
    assert refused.exit_code == 1
    assert "the last copies in its data directory count from now on, however old they are" in refused.stderr
    assert "node.accept" not in metad.ops()
    assert run("node", "accept", "127.0.0.2", "--yes").stdout == (
        "image01: what 127.0.0.2 has of blocks 0-3,7 is accepted\nimage02: what 127.0.0.2 has of blocks 1 is accepted\n"
    )


def test_output_is_never_cut_in_a_pipe(metad: FakeMetad, run: Run) -> None:
    name = "a" * 100
    metad.answers["image.list"] = {"images": [SUMMARY | {"name": name, "health": "[red]x[/red]"}]}
    text = run("image", "list").stdout
    assert name in text
    assert "[red]x[/red]" in text, "what comes from elsewhere is no markup"
    assert all(len(line) == len(line.rstrip()) for line in text.splitlines())


def test_empty_lists_say_what_to_do(metad: FakeMetad, run: Run) -> None:
    metad.answers = {op: {} for op in metad.answers}
    assert "image create" in run("image", "list").stdout
    assert "ukai-blockd" in run("node", "list").stdout
    assert "no resync" in run("sync", "status").stdout
    assert "no node is known" in run("get_error_state").stdout
