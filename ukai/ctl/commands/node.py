"""``ukai-ctl node``: the machines of the cluster."""

from __future__ import annotations

import click

from ukai.ctl import render, schema
from ukai.ctl.params import NODE, Group, Session, agree, pass_session
from ukai.ctl.schema import Map


@click.group(name="node", cls=Group)
def group() -> None:
    """See the nodes of the cluster, and accept what one holds."""


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


@group.command(example="ukai-ctl node accept 192.0.2.100")
@click.argument("node", type=NODE)
@click.option("--yes", is_flag=True, help="Don't ask.")
@pass_session
def accept(session: Session, node: str, yes: bool) -> None:
    """Take the data directory of a node as it is, though it is an older copy with the last copies of some blocks.

    Such a node is held back until the right directory is there again, or until this order.
    """
    if not yes:
        agree(
            f"{node}: the last copies in its data directory count from now on, however old they are; its other copies "
            "are out-of-sync. Run fsck in the machines afterwards.",
            "Accept it?",
        )
    taken = session.ask("node.accept", {"node": node}).get("accepted")
    accepted = {str(name): str(blocks) for name, blocks in taken.items()} if isinstance(taken, dict) else {}
    if session.as_json:
        session.out.json({"node": node, "accepted": accepted})
        return
    for name, blocks in accepted.items():
        session.out.line(f"{name}: what {node} has of blocks {blocks} is accepted")


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
