"""``ukai-ctl migrate``: the writer role moves to another node."""

from __future__ import annotations

import click

from ukai.ctl import schema
from ukai.ctl.params import IMAGE, NODE, Command, Session, agree, pass_session


@click.command(
    name="migrate",
    cls=Command,
    example="ukai-ctl migrate image01 192.0.2.101",
)
@click.argument("image", type=IMAGE)
@click.argument("node", type=NODE)
@click.option("--force", is_flag=True, help="Even where the present writer can't be asked to finish.")
@click.option("--yes", is_flag=True, help="Don't ask before --force.")
@pass_session
def command(session: Session, image: str, node: str, force: bool, yes: bool) -> None:
    """Move the writer role of an image to a node.

    The present writer finishes what is under way, flushes and lets go.  The role also moves by itself at the first
    write on another hypervisor; this command does it before.
    """
    if force and not yes:
        _agree(session, image, node)
    reply = session.ask("migrate", {"name": image, "node": node, "force": force})
    changed = schema.summary(reply.get("image"))
    notes = schema.texts(reply.get("notes"))
    if session.as_json:
        session.out.json({"image": changed, "notes": notes})
        return
    session.out.line(f"{changed['name']}: writer is {changed['writer'] or 'nobody'}, epoch {changed['epoch']}")
    session.out.notes(notes)


def _agree(session: Session, image: str, node: str) -> None:
    """Name the price of force and ask.  Raises Refused without a yes, or where nobody can be asked."""
    writer = schema.summary(session.ask("image.show", {"name": image}).get("image"))["writer"]
    price = (
        f"{image}: if the writer, {writer or 'nobody now'}, can't be asked to finish, what a machine there wrote and "
        "did not fsync may be lost, and its open handles get I/O errors. Be sure that it no longer runs there."
    )
    agree(price, f"Move {image} to {node}?")
