"""The files under deploy/ say what is so."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from supervisor.options import ServerOptions

from tests.machine import check_installed
from ukai.config import KEYS, Config, load

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def shown_settings() -> dict[str, object]:
    """What ukai.toml sets once every line of the form ``# key = value`` is made active."""
    text = (DEPLOY / "ukai.toml").read_text()
    return tomllib.loads(re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE))


def test_every_setting_is_shown_with_its_default() -> None:
    defaults = {name: field.default for name, field in KEYS.items()}
    shown = shown_settings()
    assert shown == defaults
    assert {name: type(value) for name, value in shown.items()} == {n: type(v) for n, v in defaults.items()}


def test_file_as_delivered_is_the_default() -> None:
    assert load(str(DEPLOY / "ukai.toml"), env={}) == Config()


def test_every_setting_says_why() -> None:
    paragraphs = (DEPLOY / "ukai.toml").read_text().split("\n\n")
    for paragraph in paragraphs:
        lines = paragraph.strip().splitlines()
        settings = [line for line in lines if re.match(r"# [a-z_]+ = ", line)]
        assert len(settings) < len(lines) or not settings, paragraph


@pytest.mark.filterwarnings("default::ResourceWarning")  # supervisor leaves the file open
def test_supervisord_takes_its_file_and_finds_all_beside_it(tmp_path: Path) -> None:
    link = tmp_path / "supervisord.conf"
    link.symlink_to(DEPLOY / "supervisord.conf")
    options = ServerOptions()
    options.realize(["-c", str(link)])
    assert options.logfile == str(tmp_path / "supervisord.log")
    assert options.minfds == 65536
    assert [c["section"] for c in options.server_configs] == ["unix_http_server"]
    programs = {group.name: group.process_configs[0] for group in options.process_group_configs}
    assert list(programs) == ["metad", "blockd", "frontend"]  # in the order of their priority
    for program in programs.values():
        assert program.environment["UKAI_CONFIG"] == str(tmp_path / "ukai.toml")
        assert program.startretries >= 100_000
    assert programs["metad"].exitcodes == [64]
    assert {n: p.stopwaitsecs for n, p in programs.items()} == {"metad": 30, "blockd": 30, "frontend": 120}


def test_no_socket_of_supervisord_on_the_network() -> None:
    parser = configparser.RawConfigParser()
    parser.read(DEPLOY / "supervisord.conf")
    assert "inet_http_server" not in parser.sections()


COMPILED = "ukai.zmtp", "ukai.sockets", "ukai.blockd.writes", "ukai.blockd.replica", "ukai.frontend.client"


@pytest.mark.skipif(os.environ.get("UKAI_PURE", "") not in ("", "0"), reason="asked to leave it to the interpreter")
def test_what_every_request_passes_is_compiled() -> None:
    check_installed()
    code = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]))"
    found = subprocess.run([sys.executable, "-P", "-c", code, *COMPILED], capture_output=True, text=True, check=True)
    assert [file.rpartition(".")[2] for file in found.stdout.split()] == ["so"] * len(COMPILED)
