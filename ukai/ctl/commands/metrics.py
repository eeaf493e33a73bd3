"""``ukai-ctl metrics``: the numbers that all processes publish."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

import click

from ukai.ctl import schema
from ukai.ctl.commands.log import find_sources
from ukai.ctl.follow import PROCESSES, Follower, Source, name_all
from ukai.ctl.params import NODE, SECONDS, Command, Session, pass_session
from ukai.errors import Unreachable


@click.command(
    name="metrics",
    cls=Command,
    example="ukai-ctl metrics --once\nukai-ctl metrics --name 'ukai_requests*' --json | jq -c .metrics",
)
@click.option("--node", type=NODE, metavar="NODE", help="Only this node; then metad need not be reached.")
@click.option("--process", type=click.Choice(PROCESSES), help="Only this process.")
@click.option("--name", metavar="PATTERN", help="Only these, as ukai_inflight_*.  [default: all but the buckets]")
@click.option("--once", is_flag=True, help="The next numbers of each process, then end.")
@click.option("--for", "for_s", type=SECONDS, metavar="SECONDS", help="End after so long.")
@pass_session
def command(
    session: Session, node: str | None, process: str | None, name: str | None, once: bool, for_s: float | None
) -> None:
    """Follow the metrics of all processes, or print them once.

    With --json each process's numbers are one line, each time that it publishes them.  With --once, processes that
    are not heard within --timeout are named on stderr; none heard is exit code 3.
    """
    following = find_sources(session, node, process)
    if once:
        for_s = session.timeout_s if for_s is None else for_s
    seen: set[Source] = set()
    with Follower(session.config, following, metrics=True, join_timeout_s=session.timeout_s, for_s=for_s) as follower:
        for kind, fields in follower:
            source = Source(str(fields["node"]), str(fields["process"]))
            if kind != "metric" or (once and source in seen):
                continue
            seen.add(source)
            _show(session, schema.metric_record(fields), name)
            if once and not follower.unheard:
                break
        unheard = follower.unheard
    if unheard and (once or not seen):
        message = f"not heard within {(for_s or session.timeout_s):g} s: {name_all(unheard)}"
        if not seen:
            raise Unreachable(message)
        session.out.remark(message)


def _wanted(metric: str, pattern: str | None) -> bool:
    return not metric.endswith("_bucket") if pattern is None else fnmatchcase(metric, pattern)


def _show(session: Session, record: schema.Map, pattern: str | None) -> None:
    if session.as_json:
        if pattern is not None:
            record["metrics"] = [m for m in record["metrics"] if _wanted(m["name"], pattern)]
        session.out.json_line(record)
        return
    for metric in record["metrics"]:
        if _wanted(metric["name"], pattern):
            labels = ",".join(f'{key}="{value}"' for key, value in metric["labels"].items())
            shown = f"{metric['name']}{{{labels}}}" if labels else metric["name"]
            session.out.raw(f"{record['node']} {record['process']} {shown} {metric['value']:.10g}")
    sys.stdout.flush()
