"""A scripted metad and a way to run ukai-ctl in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.ctl.fake_metad import FakeMetad
from ukai.ctl.main import cli

Run = Callable[..., Result]


@pytest.fixture
def metad(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMetad]:
    monkeypatch.delenv("UKAI_CONFIG", raising=False)
    with FakeMetad() as fake:
        monkeypatch.setenv("UKAI_CONTROL_PORT", str(fake.port))
        yield fake


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("image", "list")`` in an empty directory; what it printed and its exit code."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str, **kwargs: Any) -> Result:
        result = CliRunner().invoke(cli, list(arguments), **kwargs)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return go


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """The JSON that a command prints; it must end with 0."""

    def go(*arguments: str) -> Any:
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return go
