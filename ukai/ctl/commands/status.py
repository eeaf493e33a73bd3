"""``ukai-ctl status``: the cluster on one screen."""

from __future__ import annotations

import click

from ukai.ctl import render, schema
from ukai.ctl.commands.image import image_table, job_line
from ukai.ctl.commands.node import node_table
from ukai.ctl.params import Command, Session, pass_session
from ukai.ctl.schema import Map


@click.command(name="status", cls=Command, example="ukai-ctl status")
@pass_session
def command(session: Session) -> None:
    """Show metad, nodes, images, resyncs and who can't be reached."""
    state = schema.status(session.ask("status"))
    if session.as_json:
        session.out.json(state)
        return
    out, metad = session.out, state["metad"]
    out.line(
        f"metad {metad['address'] or session.config.metad_address} {metad['version']}, up {render.age(metad['since'])}"
        f", metadata {state['seq']}, cluster {state['cluster_id'][:8] or '-'}"
    )
    if state["behind"]:
        seen = ", ".join(f"{node} has seen {seq}" for node, seq in state["behind"].items())
        out.line(f"the metadata is OLDER than what nodes have seen, and changes are refused: {seen}")
    out.line()
    if state["nodes"]:
        node_table(session, state["nodes"])
    else:
        out.line("no nodes; start ukai-blockd on one")
    out.line()
    if state["images"]:
        image_table(session, state["images"])
    else:
        out.line("no images; make one with: ukai-ctl image create")
    jobs = [job for job in state["jobs"] if job["state"] != "done"]
    if jobs:
        out.line()
        out.table(
            ["RESYNC", "*STATE"],
            ([job["image"], job_line(job)] for job in jobs),
        )
    if state["errors"]:
        out.line()
        error_table(session, state["errors"])


def error_table(session: Session, errors: list[Map]) -> None:
    session.out.table(
        ["UNAVAILABLE", "SINCE", "*REASON", "*REPORTED BY"],
        (
            [
                error["address"],
                render.moment(error["since"]),
                error["reason"] or "-",
                ", ".join(error["reported_by"]) or "-",
            ]
            for error in errors
        ),
    )
