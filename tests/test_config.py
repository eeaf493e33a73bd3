"""Settings: everything that can be wrong is found before anything starts, in one message."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ukai import config
from ukai.config import KEYS, Config, load
from ukai.errors import UsageError

Load = Callable[..., Config]


@pytest.fixture
def from_text(tmp_path: Path) -> Load:
    def read(text: str, **env: str) -> Config:
        path = tmp_path / "ukai.toml"
        path.write_text(text, encoding="utf-8")
        return load(str(path), env)

    return read


def test_every_key_has_a_default_of_its_kind_and_says_what_it_is() -> None:
    defaults = Config()
    for name, key in KEYS.items():
        assert key.metadata["doc"], name
        value = getattr(defaults, name)
        if type(value) in (int, float):
            assert key.metadata["low"] <= value <= key.metadata["high"], name
        if key.metadata["among"]:
            assert value in key.metadata["among"], name


def test_the_five_known_names_keep_their_meaning(from_text: Load) -> None:
    got = from_text(
        'metadata_root = "/m"\ndata_root = "/d"\nblockname_format = "%08d"\ncontrol_port = 1000\nproxy_port = 1001\n'
    )
    assert (got.metadata_root, got.data_root, got.blockname_format % 7) == ("/m", "/d", "00000007")
    assert got.control_endpoint == "tcp://127.0.0.1:1000"
    assert got.proxy_endpoint("192.0.2.1") == "tcp://192.0.2.1:1001"


def test_nothing_set_gives_the_defaults(from_text: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert from_text("") == Config()
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "none" / "ukai.toml"))
    assert load(env={}) == Config()


def test_the_file_is_found_by_argument_then_environment_then_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {}
    for port, name in enumerate(("argument", "environment", "place"), 5001):
        paths[name] = tmp_path / name
        paths[name].write_text(f"control_port = {port}\n")
    monkeypatch.setattr(config, "DEFAULT_PATH", str(paths["place"]))
    env = {"UKAI_CONFIG": str(paths["environment"])}
    assert load(str(paths["argument"]), env).control_port == 5001
    assert load(None, env).control_port == 5002
    assert load(None, {}).control_port == 5003
    monkeypatch.setenv("UKAI_CONFIG", str(paths["argument"]))
    assert load().control_port == 5001


def test_the_environment_wins_over_the_file_for_every_key(from_text: Load) -> None:
    for name, key in KEYS.items():
        default = getattr(Config(), name)
        if name == "node_address":
            value = "192.0.2.9"
        elif name == "metad_address":
            value = "192.0.2.8"
        elif name == "blockname_format":
            value = "b%d"
        elif key.metadata["among"]:
            value = key.metadata["among"][-1]
        elif isinstance(default, str):
            value = "/elsewhere"
        elif name.endswith("_port"):
            value = "4711"
        else:
            value = str(type(default)(default * 1.25))
        got = from_text("", **{"UKAI_" + name.upper(): value})
        assert str(getattr(got, name)) == value
        others = [f.name for f in fields(Config) if f.name != name]
        assert all(getattr(got, other) == getattr(Config(), other) for other in others)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("control_prot = 1", "did you mean control_port"),
        ("dataroot = '/d'", "did you mean data_root"),
        ("zzzzqqq = 1", "unknown setting zzzzqqq"),
        ("[data_root]\nx = 1", "data_root: a text in quotes is wanted"),
        ("data_root = 5", "data_root: a text in quotes is wanted"),
        ("data_root = 'here'", "data_root: an absolute path"),
        ("data_root = ''", "data_root: an absolute path"),
        ('data_root = "/a\\u0000b"', "data_root: "),
        ('run_dir = "/a\\nb"', "run_dir: "),
        ("control_port = 0", "control_port: 0 is not between 1 and 65535"),
        ("control_port = 65536", "control_port"),
        ("control_port = -1", "control_port"),
        ("control_port = 1.5", "a whole number is wanted"),
        ("control_port = inf", "control_port"),
        ("control_port = nan", "control_port"),
        ("control_port = true", "not true or false"),
        ("control_port = 'many'", "a number is wanted"),
        ("control_port = [1]", "a number is wanted"),
        ("control_port = 1979-05-27", "a number is wanted"),
        ("io_timeout = inf", "io_timeout"),
        ("io_timeout = nan", "io_timeout"),
        (f"io_timeout = 1{'0' * 400}", "io_timeout"),
        ("io_timeout = 5\nreplica_timeout = 5", "io_timeout must be greater"),
        ("lease = 1\nbeat_interval = 0.9", "lease must be at least twice"),
        ("control_port = 22221", "are the same"),
        ("log_level = 'loud'", "none of debug, info"),
        ("metad_address = 'localhost'", "is not an IPv4 address"),
        ("metad_address = ''", "is not an IPv4 address"),
        ("node_address = '::1'", "is not an IPv4 address"),
        ("run_dir = '/" + "x" * 100 + "'", "too long for a socket path"),
        ("data_root = '/x'\nmetadata_root = '/x/'", "must not be the same"),
        ("data_root = '/ukai/data'", "under the mount point"),
        ("data_root = '/ukai'", "under the mount point"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(from_text: Load, text: str, wanted: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_text(text)
    assert wanted in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "form",
    [
        "",
        "block",
        "%s",
        "%d/%d",
        "%",
        "%c",
        "%016d/x",
        ".%d",
        "%.0e",
        "%f",
        "%r",
        "%(x)d",
        "%*d",
        "%0999999999d",
        "%d\0",
    ],
)
def test_a_format_that_does_not_name_each_block_apart_is_refused(from_text: Load, form: str) -> None:
    with pytest.raises(UsageError, match="blockname_format"):
        load(None, {"UKAI_CONFIG": "", "UKAI_BLOCKNAME_FORMAT": form})


@pytest.mark.parametrize("form", ["%016d", "%d", "block-%08d", "%05i.img", "%x", "%08X", "%o", "100%%-%d"])
def test_a_format_that_does_is_taken(form: str) -> None:
    got = load(None, {"UKAI_BLOCKNAME_FORMAT": form})
    assert len({got.blockname_format % index for index in range(70_000)}) == 70_000


def test_all_faults_are_in_one_message(from_text: Load) -> None:
    with pytest.raises(UsageError) as caught:
        from_text("control_prot = 1\nlease = 'x'\nlog_format = 5\n", UKAI_PROXY_PORT="none")
    for name in ("control_prot", "lease", "log_format", "proxy_port"):
        assert name in caught.value.message


@pytest.mark.parametrize("content", [b"= 1", b"\xff\xfe", b"a = 1\na = 2", b"x = " + b"[" * 5000])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ukai.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"ukai\.toml is not valid TOML"):
        load(str(path), {})


def test_a_file_named_on_purpose_must_be_there_and_readable(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "none" / "x.toml"):
        with pytest.raises(UsageError, match="cannot read the settings"):
            load(str(path), {})
        with pytest.raises(UsageError, match="cannot read the settings"):
            load(None, {"UKAI_CONFIG": str(path)})


def test_a_place_that_may_not_be_looked_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: object, *args: object, **kwargs: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(UsageError, match="Permission denied"):
        load(None, {})


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(KEYS)), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_value_is_taken_or_refused(name: str, value: str) -> None:
    try:
        got = load(None, {"UKAI_" + name.upper(): value})
    except UsageError:
        return
    assert type(getattr(got, name)) is type(getattr(Config(), name))
