"""What all commands share: the options each takes (before or after the verb), kinds of arguments, the session."""

from __future__ import annotations

import ipaddress
import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import click
import zmq
from click.shell_completion import CompletionItem

from ukai import config, model, ranges
from ukai.ctl.client import Client, Deadline
from ukai.ctl.render import Output
from ukai.errors import NotFound, Refused, UkaiError, UsageError
from ukai.messages import Header

DEFAULT_TIMEOUT_S = 10.0
COMPLETION_TIMEOUT_S = 1.0
ANY_BLOCK_COUNT = 2**62


class Session:
    """One run of ``ukai-ctl``: what the common options say, the settings, metad and the output."""

    def __init__(self) -> None:
        self.config_path: str | None = None
        self.as_json = False
        self.timeout_s = DEFAULT_TIMEOUT_S

    @cached_property
    def config(self) -> config.Config:
        """Raises UsageError."""
        return config.load(self.config_path)

    @cached_property
    def deadline(self) -> Deadline:
        """The command's own, from the first time that it is asked for."""
        return Deadline(self.timeout_s)

    @cached_property
    def out(self) -> Output:
        return Output(self.as_json)

    def client(self) -> Client:
        return Client(self.config.control_endpoint, self.deadline, self.config.message_limit)

    def ask(self, op: str, fields: Header | None = None) -> Header:
        """One request to metad."""
        with self.client() as client:
            return client.call(op, fields)

    def fresh_deadline(self) -> Deadline:
        """``--timeout`` from now, for one request of a command that takes as long as its work takes."""
        return Deadline(self.timeout_s)


pass_session = click.make_pass_decorator(Session, ensure=True)


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    session = ctx.ensure_object(Session)
    if param.name == "json" and value:
        session.as_json = True
    elif param.name == "timeout" and value is not None:
        session.timeout_s = value
    elif param.name == "config" and value is not None:
        session.config_path = value


class _Seconds(click.ParamType[float]):
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        if not (math.isfinite(seconds) and 0 < seconds <= 86400):
            self.fail(f"{value} is not between 0 and 86400 seconds", param, ctx)
        return seconds


SECONDS = _Seconds()


def common_options() -> list[click.Parameter]:
    """``--json``, ``--timeout`` and ``--config``, for every command and group; the one nearest to the verb wins."""
    return [
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_store,
            help="Print JSON with stable keys; an error too, as {error, message, details}.",
        ),
        click.Option(
            ["--timeout"],
            type=SECONDS,
            metavar="SECONDS",
            expose_value=False,
            callback=_store,
            help=f"For the whole command; where it waits, for each request.  [default: {DEFAULT_TIMEOUT_S:g}]",
        ),
        click.Option(
            ["--config"],
            type=click.Path(),
            metavar="FILE",
            expose_value=False,
            callback=_store,
            help=f"Settings.  [default: $UKAI_CONFIG or {config.DEFAULT_PATH}]",
        ),
    ]


class Command(click.Command):
    """A verb: takes the common options and shows an example in its help."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.params.extend(common_options())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(" " * formatter.current_indent + line + "\n")


class Group(click.Group):
    """Verbs on the same thing."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(common_options())


Group.group_class = Group


class _Checked(click.ParamType[Any]):
    """A text that ``check`` makes into a value; its UsageError or ValueError is shown beside the argument's name."""

    def __init__(self, name: str, check: Callable[[str], Any]) -> None:
        self.name = name
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._check(value)
        except (UsageError, ValueError) as e:
            self.fail(str(e), param, ctx)


class _Known(_Checked):
    """A checked text whose completions metad knows."""

    def __init__(self, name: str, check: Callable[[str], Any], op: str, list_key: str, name_key: str) -> None:
        super().__init__(name, check)
        self._op, self._list_key, self._name_key = op, list_key, name_key

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What metad lists; nothing when it can't be asked, since a shell waits for this."""
        session = ctx.find_object(Session) or Session()
        session.timeout_s = COMPLETION_TIMEOUT_S
        try:
            items = session.ask(self._op).get(self._list_key)
        except (UkaiError, zmq.ZMQError):
            return []
        names = [i.get(self._name_key) for i in items if isinstance(i, dict)] if isinstance(items, list) else []
        return [CompletionItem(n) for n in names if isinstance(n, str) and n.startswith(incomplete)]


def _address(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise UsageError(f"{text!r:.60} is no node; a node is named by its IPv4 address, such as 192.0.2.100") from None


def _rate(text: str) -> int:
    if text in ("default", "none"):
        return -1 if text == "default" else 0
    rate = model.parse_size(text.removesuffix("/s"))
    if rate > 2**40:
        raise UsageError(f"a rate of {rate} bytes per second is not possible; at most 1T, or none for no limit")
    return rate


def _blocks(text: str) -> list[tuple[int, int]]:
    return ranges.parse(text, ANY_BLOCK_COUNT)


IMAGE = _Known("image", model.check_name, "image.list", "images", "name")
NODE = _Known("node", _address, "node.list", "nodes", "address")
SIZE = _Checked("size", model.parse_size)
RATE = _Checked("rate", _rate)
BLOCKS = _Checked("blocks", _blocks)


def agree(price: str, question: str) -> None:
    """Name the price of an order and ask.  Raises Refused without a yes, or where nobody can be asked."""
    if not sys.stdin.isatty():
        raise Refused(f"{price} To go on, add --yes")
    click.echo(price, err=True)
    if not click.confirm(question, err=True):
        raise Refused("nothing was done")


def once_each(nodes: Sequence[str], what: str) -> list[str]:
    """The nodes as a list.  Raises UsageError when one is named twice."""
    for node in nodes:
        if nodes.count(node) > 1:
            raise UsageError(f"{what} {node} is named twice; name each node once")
    return list(nodes)


def within_image(client: Client, name: str, blocks: list[tuple[int, int]] | None) -> list[list[int]]:
    """Block ranges for a request, after asking how many blocks there are; none: all.  Raises NotFound."""
    if not blocks:
        return []
    known = client.call("image.list").get("images")
    for image in known if isinstance(known, list) else []:
        if isinstance(image, dict) and image.get("name") == name:
            try:
                ranges.parse(ranges.show(blocks), int(image.get("blocks", 0)))
            except ValueError as e:
                raise UsageError(f"image {name}: {e}") from None
            return [list(part) for part in blocks]
    raise NotFound(f"image {name} is not known; see: ukai-ctl image list")
