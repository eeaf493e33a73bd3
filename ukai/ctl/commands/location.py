"""``ukai-ctl location``: which nodes hold which blocks of an image."""

from __future__ import annotations

import click

from ukai.ctl import schema
from ukai.ctl.commands.image import show_changed
from ukai.ctl.params import BLOCKS, IMAGE, NODE, Group, Session, pass_session, within_image

Blocks = list[tuple[int, int]] | None

blocks_option = click.option("--blocks", type=BLOCKS, metavar="A-B", help="Only these, as 0-3,7.  [default: all]")


@click.group(name="location", cls=Group)
def group() -> None:
    """Add and remove copies of an image."""


@group.command(example="ukai-ctl location add image01 192.0.2.102\nukai-ctl sync start image01 --wait")
@click.argument("image", type=IMAGE)
@click.argument("node", type=NODE)
@blocks_option
@pass_session
def add(session: Session, image: str, node: str, blocks: Blocks) -> None:
    """Add a location.  Its blocks are out-of-sync until `sync start` has brought them up to date."""
    add_location(session, image, node, blocks)


@group.command(example="ukai-ctl location remove image01 192.0.2.100 --blocks 0-63")
@click.argument("image", type=IMAGE)
@click.argument("node", type=NODE)
@blocks_option
@click.option("--keep-data", is_flag=True, help="Leave the block files on the node's disk.")
@pass_session
def remove(session: Session, image: str, node: str, blocks: Blocks, keep_data: bool) -> None:
    """Remove a location and delete its block files.

    Refused for blocks of which it holds the last in-sync copy; the message says which.
    """
    remove_location(session, image, node, blocks, keep_data)


def add_location(session: Session, image: str, node: str, blocks: Blocks = None) -> None:
    with session.client() as client:
        reply = client.call(
            "location.add", {"name": image, "node": node, "ranges": within_image(client, image, blocks)}
        )
    changed = schema.summary(reply.get("image"))
    show_changed(session, changed, schema.texts(reply.get("notes")), f"location {node} added")


def remove_location(session: Session, image: str, node: str, blocks: Blocks = None, keep_data: bool = False) -> None:
    with session.client() as client:
        fields = {
            "name": image,
            "node": node,
            "ranges": within_image(client, image, blocks),
            "keep_data": keep_data,
        }
        reply = client.call("location.remove", fields)
    changed = schema.summary(reply.get("image"))
    show_changed(session, changed, schema.texts(reply.get("notes")), f"location {node} removed")
