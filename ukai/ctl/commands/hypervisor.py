"""``ukai-ctl hypervisor``: which nodes may use an image."""

from __future__ import annotations

import click

from ukai.ctl import schema
from ukai.ctl.params import IMAGE, NODE, Group, Session, pass_session


@click.group(name="hypervisor", cls=Group)
def group() -> None:
    """Say which nodes may use an image."""


@group.command(example="ukai-ctl hypervisor add image01 192.0.2.101")
@click.argument("image", type=IMAGE)
@click.argument("node", type=NODE)
@pass_session
def add(session: Session, image: str, node: str) -> None:
    """Let a node use an image: the image appears below its mount point."""
    change(session, "hypervisor.add", image, node)


@group.command(example="ukai-ctl hypervisor remove image01 192.0.2.100")
@click.argument("image", type=IMAGE)
@click.argument("node", type=NODE)
@click.option("--force", is_flag=True, help="Even where the node can't be asked whether the image is open there.")
@pass_session
def remove(session: Session, image: str, node: str, force: bool) -> None:
    """Take an image from a node.  Refused while it is open there."""
    change(session, "hypervisor.remove", image, node, force)


def change(session: Session, op: str, image: str, node: str, force: bool = False) -> None:
    reply = session.ask(op, {"name": image, "node": node, "force": force})
    changed = schema.summary(reply.get("image"))
    notes = schema.texts(reply.get("notes"))
    if session.as_json:
        session.out.json({"image": changed, "notes": notes})
        return
    session.out.line(f"{changed['name']}: hypervisors are {', '.join(changed['hypervisors']) or 'none'}")
    session.out.notes(notes)
