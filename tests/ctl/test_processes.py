"""The console script as a process: signals, pipes, completion, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ctl.fake_metad import JOB, SUMMARY, FakeMetad

CTL = str(Path(sys.executable).with_name("ukai-ctl"))


def ctl(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CTL, *arguments], capture_output=True, text=True, timeout=30, check=False, env={**os.environ, **env}
    )


def test_exit_codes(metad: FakeMetad) -> None:
    assert ctl("image", "list").returncode == 0
    metad.answers["image.list"] = {"err": "refused", "msg": "no"}
    assert ctl("image", "list").returncode == 1
    assert ctl("image", "lost").returncode == 2
    metad.answers["image.list"] = None
    silent = ctl("image", "list", "--timeout", "0.3")
    assert silent.returncode == 3
    assert "Traceback" not in silent.stderr


def test_version() -> None:
    assert ctl("--version").stdout.startswith("ukai-ctl ")


def test_a_reader_that_has_enough(metad: FakeMetad) -> None:
    """Neither a traceback nor a complaint at the interpreter's end."""
    metad.answers["image.list"] = {"images": [SUMMARY | {"name": f"image{i}"} for i in range(2000)]}
    for extra in ("", "--json"):
        shell = f"set -o pipefail; {CTL} image list {extra} | head -n 1"
        result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=30, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("\n") == 1


def test_a_full_disk_is_one_line(metad: FakeMetad) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([CTL, "image", "list"], stdout=full, stderr=subprocess.PIPE, timeout=30, check=False)
    assert result.returncode == 1
    assert result.stderr == b"ukai-ctl: No space left on device\n"


def test_interrupted_wait_leaves_the_resync(metad: FakeMetad) -> None:
    metad.answers["sync.status"] = {"jobs": [JOB]}
    with subprocess.Popen([CTL, "sync", "start", "image01", "--wait"], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while "sync.status" not in metad.ops():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "stop it with: ukai-ctl sync stop image01" in stderr
    assert "Traceback" not in stderr
    assert "sync.stop" not in metad.ops()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = ctl("completion", shell)
    assert result.returncode == 0
    assert "_UKAI_CTL_COMPLETE" in result.stdout


def complete(words: str, index: int) -> list[str]:
    result = ctl(_UKAI_CTL_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(index))
    return [line.partition(",")[2] for line in result.stdout.splitlines() if line]


def test_completion_of_verbs_images_and_nodes(metad: FakeMetad) -> None:
    assert complete("ukai-ctl im", 1) == ["image"]
    assert "create" in complete("ukai-ctl image ", 2)
    assert complete("ukai-ctl image show im", 3) == ["image01"]
    assert complete("ukai-ctl get_diskinfo ", 2) == ["image01"]
    assert complete("ukai-ctl location add image01 ", 4) == ["127.0.0.1", "127.0.0.2"]
    assert complete("ukai-ctl image show x", 3) == []


def test_completion_asks_where_the_line_says(metad: FakeMetad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--config`` before the verb counts."""
    settings = tmp_path / "ukai.toml"
    settings.write_text(f"control_port = {metad.port}\n")
    monkeypatch.delenv("UKAI_CONTROL_PORT")
    monkeypatch.setenv("UKAI_METAD_ADDRESS", "127.0.0.1")
    assert complete(f"ukai-ctl --config {settings} image show ", 5) == ["image01"]


def test_completion_without_metad_is_quick_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UKAI_CONTROL_PORT", "1")
    begun = time.monotonic()
    result = ctl(_UKAI_CTL_COMPLETE="bash_complete", COMP_WORDS="ukai-ctl image show ", COMP_CWORD="3")
    assert (result.stdout.strip(), result.stderr) == ("", "")
    assert time.monotonic() - begun < 5


def test_json_error_is_on_stdout(metad: FakeMetad) -> None:
    metad.answers["image.show"] = {"err": "not-found", "msg": "image x is not known"}
    result = ctl("image", "show", "x", "--json")
    assert json.loads(result.stdout) == {"error": "not-found", "message": "image x is not known", "details": {}}
    assert result.stderr == "ukai-ctl: image x is not known\n"
    assert result.returncode == 1
