"""``ukai-ctl node``: the machines of the cluster."""

from __future__ import annotations

import click

from ukai.ctl import render, schema
from ukai.ctl.params import Group, Session, pass_session
from ukai.ctl.schema import Map


@click.group(name="node", cls=Group)
def group() -> None:
    """See the nodes of the cluster."""


@group.command(name="list", example="ukai-ctl node list")
@pass_session
def list_nodes(session: Session) -> None:
    """List the nodes that have registered, with their state and space."""
    nodes = schema.nodes(session.ask("node.list").get("nodes"))
    if session.as_json:
        session.out.json({"nodes": nodes})
    elif nodes:
        node_table(session, nodes)
    else:
        session.out.line("no nodes; start ukai-blockd on one")


def node_table(session: Session, nodes: list[Map], indent: int = 0) -> None:
    session.out.table(
        ["NODE", "STATE", ">SINCE", ">IMAGES", ">FREE", ">OF", "*REASON"],
        (
            [
                node["address"],
                render.styled(node["state"]),
                render.age(node["since"]),
                str(node["images"]),
                render.size(node["space_free"] if node["space_total"] else None),
                render.size(node["space_total"] or None),
                node["reason"] or "-",
            ]
            for node in nodes
        ),
        indent,
    )
