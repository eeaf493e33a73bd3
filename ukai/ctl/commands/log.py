"""``ukai-ctl log``: what all processes log, as it comes."""

from __future__ import annotations

import sys

import click
from rich.text import Text

from ukai.ctl import render, schema
from ukai.ctl.follow import LEVELS, PROCESSES, Follower, Source, levels_from, name_all, sources
from ukai.ctl.params import NODE, SECONDS, Command, Session, pass_session
from ukai.errors import Unreachable

LEVEL_STYLES = {"debug": "dim", "warning": "yellow", "error": "red", "critical": "bold red"}


@click.command(
    name="log",
    cls=Command,
    example="ukai-ctl log --level warning\nukai-ctl log --node 192.0.2.100 --process blockd --json | jq -r .message",
)
@click.option("--node", type=NODE, metavar="NODE", help="Only this node; then metad need not be reached.")
@click.option("--process", type=click.Choice(PROCESSES), help="Only this process.")
@click.option("--level", type=click.Choice(LEVELS), default="info", show_default=True, help="This and graver ones.")
@click.option("--follow", is_flag=True, default=True, help="Go on until Ctrl-C; this is what it does anyway.")
@click.option("--for", "for_s", type=SECONDS, metavar="SECONDS", help="End after so long.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many lines.")
@pass_session
def command(
    session: Session,
    node: str | None,
    process: str | None,
    level: str,
    follow: bool,
    for_s: float | None,
    count: int | None,
) -> None:
    """Follow the log of all processes, from now on.

    With --json each record is one line.  Processes that are not heard within --timeout are named on stderr; they are
    followed as soon as they are there.
    """
    following = find_sources(session, node, process)
    left = count
    with Follower(
        session.config,
        following,
        levels=levels_from(level),
        join_timeout_s=session.timeout_s,
        for_s=for_s,
        on_join=lambda unheard: _say_unheard(session, unheard),
    ) as follower:
        for _, fields in follower:
            _show(session, schema.log_record(fields))
            if left is not None:
                left -= 1
                if not left:
                    return


def find_sources(session: Session, node: str | None, process: str | None) -> list[Source]:
    """The processes asked for; metad is asked for the nodes only where none was named.

    Raises Unreachable, with a hint, when it can't be asked.
    """
    config = session.config
    if node is not None or process == "metad":
        nodes = [node] if node is not None else []
    else:
        try:
            nodes = [n["address"] for n in schema.nodes(session.ask("node.list").get("nodes"))]
        except Unreachable as e:
            raise type(e)(f"{e.message} (with --node a node is followed without metad)") from None
    found = sources(config, nodes, node, process)
    if not found:
        raise Unreachable(f"there is no {process or 'process'} to follow on {node or 'any node'}")
    return found


def _say_unheard(session: Session, unheard: list[Source]) -> None:
    if unheard:
        session.out.remark(f"not heard within {session.timeout_s:g} s: {name_all(unheard)}")


def _show(session: Session, record: schema.Map) -> None:
    if session.as_json:
        session.out.json_line(record)
        return
    level = Text(f"{record['level']:<7}", LEVEL_STYLES.get(record["level"], ""))
    where = f"{render.clock(record['time'])} {record['node']} {record['process']} "
    session.out.unfolded(Text.assemble(where, level, f" {record['message']}"))
    sys.stdout.flush()
