"""Wrong use, refusals and silence: one line on stderr, the right exit code, in time, nothing left behind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ctl.conftest import Run
from tests.ctl.fake_metad import JOB, FakeMetad
from ukai import messages

CREATE = "image create image01 --location 127.0.0.1 "

USAGE = {
    CREATE + "--size 0": "0 bytes is not possible",
    CREATE + "--size 9223372036854775808": "is not possible",
    CREATE + "--size 8X": "is no size",
    CREATE + "--size -1": "is no size",
    CREATE + "--size 8G --block-size 1": "block size of 1 bytes is not possible",
    CREATE + "--size 8G --block-size 0": "block size of 0 bytes is not possible",
    CREATE + "--size 1M --block-size 2M": "block size of 2097152 bytes is not possible",
    CREATE + "--size 1P --block-size 4096": "choose a larger block size",
    CREATE + "--size 8G --location 127.0.0.1": "location 127.0.0.1 is named twice",
    CREATE + "--size 8G --hypervisor 127.0.0.2 --hypervisor 127.0.0.2": "hypervisor 127.0.0.2 is named twice",
    CREATE + "--size 8G --hypervisor host2": "a node is named by its IPv4 address",
    CREATE + "--size 8G --replication later": "'later' is not one of",
    "image create image01 --size 8G": "missing option '--location'",
    "image create -x --size 8G --location 127.0.0.1": "no such option",
    "image create .hidden --size 8G --location 127.0.0.1": "is no image name",
    "image create a/b --size 8G --location 127.0.0.1": "is no image name",
    f"image create {'a' * 101} --size 8G --location 127.0.0.1": "is no image name",
    "image shaw image01": "no such command 'shaw'",
    "location add image01": "missing argument 'NODE'",
    "location add image01 127.0.0.1 --blocks 3-1": "out of order",
    "location add image01 127.0.0.1 --blocks x": "is no block range",
    "location add image01 127.0.0.1 --blocks 0-128": "block 128 does not exist; the last one is 127",
    "sync start image01 --node 127.0.0.2 --node 127.0.0.2": "node 127.0.0.2 is named twice",
    "sync start image01 --rate fast": "is no size",
    "verify image01 --stop --wait": "--stop stands alone",
    "sync rate image01 2T": "is not possible",
    "create_metadata -s 0 -b 50000000 -l 127.0.0.1 image01": "0 bytes is not possible",
    "create_metadata -s 9223372036854775808 -b 50000000 -l 127.0.0.1 image01": "is not possible",
    "create_metadata -s 8G -b 1 -l 127.0.0.1 image01": "block size of 1 bytes is not possible",
    "create_metadata -s 4096 -b 8192 -l 127.0.0.1 image01": "block size of 8192 bytes is not possible",
    "create_metadata -s 8G -b 64M -l 127.0.0.1 -l 127.0.0.1 image01": "location 127.0.0.1 is named twice",
    "create_metadata -s 8G -b 64M image01": "missing option '-l'",
    "status --timeout 0": "not between",
    "status --timeout nan": "not between",
    "status --timeout soon": "is no number of seconds",
    "status --config /does/not/exist.toml": "cannot read the settings",
    "log --node 127.0.0.1 --level loud": "'loud' is not one of",
    "image import image01 . --format raw": "is a directory",
}


@pytest.mark.parametrize("line", USAGE)
def test_wrong_use(line: str, metad: FakeMetad, run: Run, tmp_path: Path) -> None:
    """Found before metad is asked to change anything, and no file is left."""
    result = run(*line.split())
    assert result.exit_code == 2
    assert USAGE[line] in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert set(metad.ops()) <= {"image.list"}
    assert not list(tmp_path.iterdir())


def test_wrong_use_with_json_says_it_on_stdout_too(metad: FakeMetad, run: Run) -> None:
    result = run("image", "create", "image01", "--json", "--size", "0", "--location", "127.0.0.1")
    assert result.exit_code == 2
    printed = json.loads(result.stdout)
    assert printed["error"] == "usage"
    assert printed["message"] in result.stderr


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("refused", 1), ("not-found", 1), ("busy", 1), ("last-copy", 1), ("unreachable", 3), ("usage", 2), ("new", 1)],
)
def test_what_metad_refuses(code: str, exit_code: int, metad: FakeMetad, run: Run) -> None:
    metad.answers["location.remove"] = {"err": code, "msg": "a reason and what to do", "details": {"ranges": [[0, 3]]}}
    result = run("remove_location", "image01", "127.0.0.1", "--json")
    assert result.exit_code == exit_code
    assert result.stderr == "ukai-ctl: a reason and what to do\n"
    expected = {"error": code if code != "new" else "failed", "message": "a reason and what to do"}
    assert json.loads(result.stdout) == {**expected, "details": {"ranges": [[0, 3]]}}


@pytest.mark.parametrize(
    "line",
    [
        "status",
        "image list",
        CREATE + "--size 8G",
        "add_image image01",
        "get_error_state",
        "sync start image01 --wait",
        "log --count 1",
        "metrics --once",
    ],
)
def test_a_metad_that_never_answers(line: str, metad: FakeMetad, run: Run) -> None:
    metad.answers = {}
    begun = time.monotonic()
    result = run(*line.split(), "--timeout", "0.4")
    assert time.monotonic() - begun < 2
    assert result.exit_code == 3
    assert f"metad at tcp://127.0.0.1:{metad.port} did not answer" in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_metad_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UKAI_CONTROL_PORT", "1")
    begun = time.monotonic()
    result = run("status", "--timeout", "0.3", "--json")
    assert time.monotonic() - begun < 2
    assert result.exit_code == 3
    assert "metad at tcp://127.0.0.1:1 can't be reached within 0.3 s" in result.stderr
    assert json.loads(result.stdout)["error"] == "unreachable"


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", b"\x93\x01\x02\x03", messages.pack({}), messages.pack({"re": 99})],
    ids=["empty", "garbage", "list", "no-number", "other-number"],
)
def test_an_answer_that_is_none(raw: bytes, metad: FakeMetad, run: Run) -> None:
    metad.answers["image.list"] = {"raw": raw}
    result = run("image", "list", "--timeout", "2")
    assert result.exit_code == 1
    assert result.stderr.startswith("ukai-ctl: ")
    assert result.stderr.count("\n") == 1


def test_another_version_is_told(metad: FakeMetad, run: Run) -> None:
    metad.answers["image.list"] = {"raw": b"\x82\xa1v\x63\xa2re\x01"}
    result = run("image", "list")
    assert result.exit_code == 1
    assert "run the same release on all nodes" in result.stderr


def test_metad_gets_less_time_than_we_have(metad: FakeMetad, run: Run) -> None:
    run("image", "list", "--timeout", "5")
    assert 4 < metad.asked[0]["timeout"] < 5


def test_force_names_its_price_and_wants_a_yes(metad: FakeMetad, run: Run) -> None:
    result = run("migrate", "image01", "127.0.0.2", "--force")
    assert result.exit_code == 1
    assert "if the writer, 127.0.0.1, can't be asked to finish" in result.stderr
    assert "--yes" in result.stderr
    assert "migrate" not in metad.ops()
    assert run("migrate", "image01", "127.0.0.2", "--force", "--yes").exit_code == 0
    assert metad.last("migrate") == {"name": "image01", "node": "127.0.0.2", "force": True}


def test_create_metadata_never_overwrites(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image01").write_text("precious")
    result = run("create_metadata", "-s", "1M", "-b", "64K", "-l", "127.0.0.1", "image01")
    assert result.exit_code == 1
    assert "is not overwritten" in result.stderr
    assert (tmp_path / "image01").read_text() == "precious"


def test_create_metadata_says_that_it_rounds(run: Run) -> None:
    result = run("create_metadata", "-s", "1000000", "-b", "64K", "-l", "127.0.0.1", "-o", "-", "image01")
    assert result.exit_code == 0
    assert "rounded up from 1000000 to 1003520 bytes" in result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    assert printed["size"] == 1003520
    assert printed["hypervisors"] == ["127.0.0.1"]
    assert len(printed["blocks"]) == 16


def test_create_says_that_metad_rounded(metad: FakeMetad, run: Run) -> None:
    result = run("image", "create", "image01", "--size", str(8 * 2**30 - 1), "--location", "127.0.0.1")
    assert "rounded up from 8589934591 to 8589934592 bytes" in result.stdout


@pytest.mark.parametrize(("state", "exit_code"), [("done", 0), ("failed", 1), ("stopped", 1)])
def test_wait_ends_with_the_result(state: str, exit_code: int, metad: FakeMetad, run: Run) -> None:
    metad.answers["sync.status"] = {"jobs": [JOB | {"state": state, "reason": "why" if exit_code else ""}]}
    result = run("sync", "start", "image01", "--wait")
    assert result.exit_code == exit_code
    assert ("why" in result.stderr) == bool(exit_code)


@pytest.mark.parametrize(("differed", "exit_code"), [(0, 0), (3, 1)])
def test_a_verify_that_found_something_says_so(differed: int, exit_code: int, metad: FakeMetad, run: Run) -> None:
    ended = {"kind": "verify", "state": "done", "reason": "a sum", "blocks_differed": differed}
    metad.answers["sync.status"] = {"jobs": [JOB | ended]}
    result = run("verify", "image01", "--wait")
    assert result.exit_code == exit_code
    assert "a sum" in result.stdout


def test_wait_notices_an_order_that_is_not_ours(metad: FakeMetad, run: Run) -> None:
    metad.answers["sync.status"] = {"jobs": [JOB | {"number": 8, "state": "done"}]}
    result = run("sync", "start", "image01", "--wait")
    assert result.exit_code == 1
    assert "another order took its place" in result.stderr
    metad.answers["sync.status"] = {"jobs": []}
    result = run("sync", "start", "image01", "--wait")
    assert "the order is gone" in result.stderr
