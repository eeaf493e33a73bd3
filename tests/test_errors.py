"""One tree of errors, one row each."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from ukai import errors
from ukai.errors import BY_CODE, UkaiError, from_wire


def _all(cls: type[UkaiError]) -> list[type[UkaiError]]:
    return [cls, *(c for sub in cls.__subclasses__() if sub.__module__ == errors.__name__ for c in _all(sub))]


ALL = _all(UkaiError)


def test_every_error_has_a_code_of_its_own() -> None:
    assert len({cls.code for cls in ALL}) == len(ALL)
    assert {cls.code: cls for cls in ALL} == BY_CODE


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_has_a_row_a_docstring_and_comes_back_from_the_wire(cls: type[UkaiError]) -> None:
    assert cls.errno in errno.errorcode
    assert os.strerror(cls.errno)
    assert cls.exit_code in (1, 2, 3)
    assert type(cls.retry) is bool
    assert cls.__doc__
    error = from_wire(cls.code, "what to do")
    assert type(error) is cls
    assert error.message == str(error) == "what to do"
    assert error.details == {}


def test_errors_that_could_come_from_a_lost_answer_are_never_success() -> None:
    assert all(cls.errno != 0 and cls.exit_code != 0 for cls in ALL)


@pytest.mark.parametrize("code", ["no-such-code", "", None, 7, [], {"a": 1}])
def test_an_unknown_code_is_the_root(code: object) -> None:
    assert type(from_wire(code, "x")) is UkaiError


def test_a_message_that_is_no_text_or_has_many_lines_becomes_one_line() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    messages: list[object] = [None, 7, deep, {}, "a\nb", "a\r\nb\x00c"]
    for message in messages:
        error = from_wire("busy", message)
        assert "\n" not in error.message
        assert error.message.isprintable()
