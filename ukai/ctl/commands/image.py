"""``ukai-ctl image``: create, list, show, remove, accept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ukai import model
from ukai.ctl import render, schema
from ukai.ctl.params import (
    BLOCKS,
    IMAGE,
    NODE,
    SIZE,
    Group,
    Session,
    agree,
    once_each,
    pass_session,
    within_image,
)
from ukai.ctl.schema import Map
from ukai.ranges import show

REPLICATIONS = ("sync", "flush")


@click.group(name="image", cls=Group)
def group() -> None:
    """Create, list, show, alter, remove, import and export images."""


def creation_request(
    name: str,
    size_bytes: int,
    locations: Sequence[str],
    *,
    block_size: int | None,
    hypervisors: Sequence[str],
    replication: str,
    checksum: bool,
) -> Map:
    """The fields of ``image.create``.  Raises UsageError for what can be seen to be wrong from here."""
    rounded = model.round_up(size_bytes)
    model.check_sizes(rounded, rounded if block_size is None else block_size)
    return {
        "name": name,
        "size": size_bytes,
        "block_size": block_size or 0,
        "locations": once_each(locations, "location"),
        "hypervisors": once_each(hypervisors, "hypervisor"),
        "replication": replication,
        "checksum": checksum,
    }


def creation_notes(asked_bytes: int, image: Map, notes: list[str]) -> list[str]:
    """metad's notes, and that the size was rounded where they don't say it."""
    if image["size"] != asked_bytes and not any("rounded" in note for note in notes):
        notes = [*notes, f"the size was rounded up from {asked_bytes} to {image['size']} bytes, a multiple of 4096"]
    return notes


def creation_options(function: Any) -> Any:
    """What ``image create`` and ``image import`` have in common."""
    options = [
        click.option("--block-size", type=SIZE, metavar="SIZE", help="Bytes per block file.  [default: 64M]"),
        click.option(
            "--hypervisor",
            "hypervisors",
            type=NODE,
            multiple=True,
            metavar="NODE",
            help="A node that may use the image; repeat.  [default: the locations]",
        ),
        click.option(
            "--replication",
            type=click.Choice(REPLICATIONS),
            default="sync",
            show_default=True,
            help="sync: a write is done when every copy has it.  flush: when the local copy has it; an fsync waits for "
            "all.",
        ),
        click.option(
            "--checksum", is_flag=True, help="Checksums beside the blocks: what a disk alters silently is not read."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@group.command(
    example="ukai-ctl image create image01 --size 8G --location 192.0.2.100 --location 192.0.2.101",
)
@click.argument("name", type=IMAGE)
@click.option("--size", type=SIZE, required=True, metavar="SIZE", help="8G, 500M, 8GiB (1024) or 8GB (1000).")
@click.option(
    "--location",
    "locations",
    type=NODE,
    multiple=True,
    required=True,
    metavar="NODE",
    help="A node that holds all blocks; repeat for more copies.",
)
@creation_options
@pass_session
def create(session: Session, /, name: str, size: int, locations: tuple[str, ...], **options: Any) -> None:
    """Create an image: metadata and everything else in one step.

    It takes no space until it is written to.  The size is rounded up to a multiple of 4096 bytes, which QEMU wants.
    """
    request = creation_request(name, size, locations, **options)
    reply = session.ask("image.create", request)
    image = schema.summary(reply.get("image"))
    show_changed(session, image, creation_notes(size, image, schema.texts(reply.get("notes"))), "created")


@group.command(name="list", example="ukai-ctl image list\nukai-ctl image list --json | jq -r '.images[].name'")
@pass_session
def list_images(session: Session) -> None:
    """List the images with their health."""
    images = schema.summaries(session.ask("image.list").get("images"))
    if session.as_json:
        session.out.json({"images": images})
    elif images:
        image_table(session, images)
    else:
        session.out.line("no images; make one with: ukai-ctl image create")


@group.command(name="show", example="ukai-ctl image show image01")
@click.argument("name", type=IMAGE)
@pass_session
def show_image(session: Session, name: str) -> None:
    """Show an image: sizes, where its blocks lie and in what state, writer and epoch."""
    image = schema.image(session.ask("image.show", {"name": name}).get("image"))
    if session.as_json:
        session.out.json({"image": image})
        return
    picture(session, image)


@group.command(name="set", example="ukai-ctl image set image01 --replication flush")
@click.argument("name", type=IMAGE)
@click.option(
    "--replication",
    type=click.Choice(REPLICATIONS),
    required=True,
    help="When a write is done; see: ukai-ctl image create --help",
)
@pass_session
def alter(session: Session, name: str, replication: str) -> None:
    """Change how an image is replicated, also while a machine uses it.

    Back to sync its writer first flushes what it has written.
    """
    reply = session.ask("image.set", {"name": name, "replication": replication})
    image = schema.summary(reply.get("image"))
    show_changed(session, image, schema.texts(reply.get("notes")), f"replication {image['replication']}")


@group.command(example="ukai-ctl image remove image01 --delete-data")
@click.argument("name", type=IMAGE)
@click.option("--delete-data", is_flag=True, help="Forget the image and delete its block files on all nodes, for good.")
@click.option("--force", is_flag=True, help="Even where a node that holds a copy can't be reached now.")
@pass_session
def remove(session: Session, name: str, delete_data: bool, force: bool) -> None:
    """Take an image offline and, with --delete-data, forget it and delete its blocks.

    Refused while it is open.  Without --delete-data nothing is deleted: add_image brings it back.
    """
    reply = session.ask("image.remove", {"name": name, "delete_data": delete_data, "force": force})
    notes = schema.texts(reply.get("notes"))
    if session.as_json:
        session.out.json({"name": name, "data_deleted": delete_data, "notes": notes})
        return
    session.out.line(f"{name}: " + ("removed, its data deleted" if delete_data else "offline, its data kept"))
    session.out.notes(notes)


@group.command(example="ukai-ctl image accept image01 192.0.2.100 --blocks 0-63")
@click.argument("image", type=IMAGE)
@click.argument("node", type=NODE)
@click.option("--blocks", type=BLOCKS, metavar="A-B", help="Only these, as 0-3,7.  [default: all]")
@click.option("--zeros", is_flag=True, help="Blocks of which the node has no usable file read as zeros from now on.")
@click.option("--force", is_flag=True, help="Even where a node with an in-sync copy can't be reached: it is given up.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@pass_session
def accept(
    session: Session, image: str, node: str, blocks: list[tuple[int, int]] | None, zeros: bool, force: bool, yes: bool
) -> None:
    """Take what a node holds for the truth, of blocks that have no usable in-sync copy any more.

    For a last copy that is refused: an older file came back, it is missing or cut, or does not match its checksums,
    which are then made anew.  Blocks with a good in-sync
    copy stay as they are.  The image must not be open.
    """
    if not yes:
        price = f"{image}: what {node} holds counts from now on, however old it is; the other copies are out-of-sync."
        price += " Blocks without a usable file there become zeros." if zeros else ""
        price += " In-sync copies on nodes that can't be reached are given up." if force else ""
        agree(f"{price} Run fsck in the machine afterwards.", f"Accept the copy of {node}?")
    with session.client() as client:
        fields = {"name": image, "node": node, "ranges": within_image(client, image, blocks), "zeros": zeros}
        reply = client.call("image.accept", {**fields, "force": force})
    changed, notes = schema.summary(reply.get("image")), schema.texts(reply.get("notes"))
    accepted, blank = schema.block_ranges(reply.get("accepted")), schema.block_ranges(reply.get("zeros"))
    if session.as_json:
        session.out.json({"image": changed, "accepted": accepted, "zeros": blank, "notes": notes})
        return
    text = show((a, b) for a, b in accepted)
    session.out.line(
        f"{image}: the copy of {node} is accepted for blocks {text}"
        + (f"; zeros are {show((a, b) for a, b in blank)}" if blank else "")
    )
    session.out.notes([*notes, f"bring the other copies up to date with: ukai-ctl sync start {image}"])


def show_changed(session: Session, image: Map, notes: list[str], what: str) -> None:
    """The result of a command that made or altered an image."""
    if session.as_json:
        session.out.json({"image": image, "notes": notes})
        return
    session.out.line(f"{image['name']}: {what}; {describe(image)}")
    session.out.notes(notes)


def describe(image: Map) -> str:
    blocks = f"{render.plural(image['blocks'], 'block')} of {render.plain_size(image['block_size'])}"
    where = ", ".join(image["locations"]) or "no location"
    return f"{render.exact_size(image['size'])} in {blocks} on {where}"


def in_sync(image: Map) -> str:
    """``192.0.2.1 128/128, …``: blocks in sync per location, of those that it holds."""
    parts = []
    for node, count in image["locations"].items():
        held = count["in_sync"] + count["syncing"] + count["out_of_sync"]
        parts.append(f"{node} {count['in_sync']}/{held}")
    return ", ".join(parts) or "-"


def image_table(session: Session, images: list[Map], indent: int = 0) -> None:
    session.out.table(
        ["*IMAGE", ">SIZE", "HEALTH", "WRITER", ">OPEN", "*IN SYNC"],
        (
            [
                image["name"],
                render.size(image["size"]),
                render.styled(image["health"]),
                image["writer"] or "-",
                str(sum(image["open"].values())),
                in_sync(image),
            ]
            for image in images
        ),
        indent,
    )


def picture(session: Session, image: Map) -> None:
    """Everything about one image, for people."""
    out = session.out
    opened = ", ".join(f"{n} ({render.plural(c, 'handle')})" for n, c in image["open"].items())
    out.line(render.heading(image["name"]))
    out.pairs(
        [
            ("health", render.styled(image["health"], "" if image["online"] else " (not shown on any hypervisor)")),
            ("size", render.exact_size(image["size"])),
            ("block size", f"{render.exact_size(image['block_size'])}, {render.plural(image['blocks'], 'block')}"),
            ("replication", image["replication"] + (", with checksums" if image["checksum"] else "")),
            ("hypervisors", ", ".join(image["hypervisors"]) or "-"),
            ("open on", opened or "-"),
            ("writer", image["writer"] or "nobody"),
            ("epoch", str(image["epoch"])),
            ("active blocks", show((a, b) for a, b in image["active"]) or "none"),
            ("order", job_line(image["job"]) if image["job"] else "no order"),
            ("uuid", image["uuid"]),
        ]
    )
    out.line()
    out.table(
        ["LOCATION", "STATUS", ">COUNT", "*BLOCKS", "*REASON"],
        (
            [node, render.styled(status), str(blocks.total()), schema.few_ranges(blocks), reason or "-"]
            for node, status, reason, blocks in schema.by_status(image)
        ),
    )
    if image["placement_omitted"]:
        out.line(f"and {image['placement_omitted']} more ranges, which metad left out")


def job_line(job: Map) -> str:
    """One line about a resync order."""
    parts = [f"{job['kind']} {job['state']}"]
    if job["bytes_total"]:
        done = job["bytes_done"] or 0
        parts.append(f"{100 * done // job['bytes_total']} % of {render.size(job['bytes_total'])}")
    if job["state"] == "running" and job["eta"] is not None:
        parts.append(f"{render.rate(job['rate'])}, {render.duration(job['eta'])} left")
    if job["reason"]:
        parts.append(job["reason"])
    return "; ".join(parts)
