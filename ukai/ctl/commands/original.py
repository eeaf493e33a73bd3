"""The nine commands of the original UKAI, by their names and with their arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from ukai import model
from ukai.ctl import metafile, render, schema
from ukai.ctl.commands import hypervisor as hypervisors_of
from ukai.ctl.commands.image import show_changed
from ukai.ctl.commands.location import add_location as add_location_to
from ukai.ctl.commands.location import remove_location as remove_location_from
from ukai.ctl.commands.status import error_table
from ukai.ctl.params import IMAGE, NODE, SIZE, Command, Session, once_each, pass_session
from ukai.errors import Exists


@click.command(
    name="create_metadata",
    cls=Command,
    example=(
        "ukai-ctl create_metadata -s 8000000000 -b 50000000 -h 192.0.2.100 -l 192.0.2.100 image01\n"
        "ukai-ctl create_metadata -s 8G -b 64M -l 192.0.2.100 -o /var/lib/ukai/metadata/image01 image01"
    ),
)
@click.argument("name", type=IMAGE)
@click.option("-s", "size", type=SIZE, required=True, metavar="SIZE", help="Bytes, or 8G, 500M …")
@click.option("-b", "block_size", type=SIZE, required=True, metavar="BLOCK_SIZE", help="Bytes per block file.")
@click.option(
    "-h",
    "hypervisors",
    type=NODE,
    multiple=True,
    metavar="HYPERVISOR",
    help="A node that may use the image; repeat.  [default: the locations]",
)
@click.option(
    "-l",
    "-n",
    "locations",
    type=NODE,
    multiple=True,
    required=True,
    metavar="LOCATION",
    help="A node that holds the blocks; repeat.",
)
@click.option("-o", "output", metavar="FILE", help="Where to write; - is stdout.  [default: NAME in this directory]")
@pass_session
def create_metadata(
    session: Session,
    name: str,
    size: int,
    block_size: int,
    hypervisors: tuple[str, ...],
    locations: tuple[str, ...],
    output: str | None,
) -> None:
    """Write a metadata file for an image whose block files are prepared by hand.

    metad isn't needed for it.  Put the file into metadata_root on metad's node and the block files below
    data_root/NAME on each location, then run add_image.  Never overwrites a file.
    """
    rounded = model.round_up(size)
    model.check_sizes(rounded, block_size)
    where = once_each(locations, "location")
    hosts = once_each(hypervisors, "hypervisor") or where
    notes = []
    if rounded != size:
        notes.append(f"the size was rounded up from {size} to {rounded} bytes, a multiple of 4096")
    if not hypervisors:
        notes.append(f"no -h was given, so the hypervisors are the locations: {', '.join(where)}")
    pieces = metafile.of_new(name, rounded, block_size, hosts, where)
    if output == "-":
        for piece in pieces:
            sys.stdout.write(piece)
        for note in notes:
            session.out.remark(f"note: {note}")
        return
    path = Path(output or name)
    _write_new(path, pieces)
    blocks = -(-rounded // block_size)
    if session.as_json:
        session.out.json(
            {
                "path": str(path),
                "name": name,
                "size": rounded,
                "block_size": block_size,
                "blocks": blocks,
                "hypervisors": hosts,
                "locations": where,
                "notes": notes,
            }
        )
        return
    sizes = f"{render.exact_size(rounded)} in {render.plural(blocks, 'block')} of {render.plain_size(block_size)}"
    session.out.line(f"wrote {path}: {sizes} on {', '.join(where)}")
    session.out.notes(notes)
    root = session.config.metadata_root
    session.out.line(f"next: put it at {root}/{name} on metad's node, then: ukai-ctl add_image {name}")


def _write_new(path: Path, pieces: Iterable[str]) -> None:
    """Write a file that must not exist; all of it or nothing.  Raises Exists, OSError."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise Exists(f"{path} is there already and is not overwritten; remove it or name another with -o") from None
    try:
        with file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@click.command(name="add_image", cls=Command, example="ukai-ctl add_image image01")
@click.argument("name", type=IMAGE)
@pass_session
def add_image(session: Session, name: str) -> None:
    """Bring an image online on all its hypervisors.

    Its metadata file is read from metadata_root and the block files prepared by hand are taken as they are; an image
    that remove_image took offline comes back.
    """
    reply = session.ask("image.add", {"name": name})
    show_changed(session, schema.summary(reply.get("image")), schema.texts(reply.get("notes")), "online")


@click.command(name="remove_image", cls=Command, example="ukai-ctl remove_image image01")
@click.argument("name", type=IMAGE)
@click.option("--force", is_flag=True, help="Even where a hypervisor can't be asked whether the image is open.")
@pass_session
def remove_image(session: Session, name: str, force: bool) -> None:
    """Take an image offline.  Deletes nothing; refused while the image is open."""
    reply = session.ask("image.offline", {"name": name, "force": force})
    show_changed(session, schema.summary(reply.get("image")), schema.texts(reply.get("notes")), "offline")


@click.command(name="get_diskinfo", cls=Command, example="ukai-ctl get_diskinfo image01 --json > image01.json")
@click.argument("name", type=IMAGE)
@pass_session
def get_diskinfo(session: Session, name: str) -> None:
    """Show the metadata of an image: name, size, block_size and locations.

    With --json it is the very form of the metadata file, with one entry per block.
    """
    image = schema.image(session.ask("image.show", {"name": name}).get("image"))
    if session.as_json:
        for piece in metafile.of_image(image):
            sys.stdout.write(piece)
        return
    out = session.out
    out.line(f"name: {image['name']}")
    out.line(f"size: {image['size']}")
    out.line(f"block_size: {image['block_size']}")
    out.line(f"hypervisors: {', '.join(image['hypervisors'])}")
    out.line("locations:")
    for node, status, reason, blocks in schema.by_status(image):
        cause = f" ({reason})" if reason else ""
        out.line(f"  {node}: {status}{cause}: blocks {schema.few_ranges(blocks)}")


@click.command(name="add_hypervisor", cls=Command, example="ukai-ctl add_hypervisor image01 192.0.2.101")
@click.argument("image_name", type=IMAGE)
@click.argument("hypervisor", type=NODE)
@pass_session
def add_hypervisor(session: Session, image_name: str, hypervisor: str) -> None:
    """Add a hypervisor to an image: needed before a machine is migrated there."""
    hypervisors_of.change(session, "hypervisor.add", image_name, hypervisor)


@click.command(name="remove_hypervisor", cls=Command, example="ukai-ctl remove_hypervisor image01 192.0.2.100")
@click.argument("image_name", type=IMAGE)
@click.argument("hypervisor", type=NODE)
@pass_session
def remove_hypervisor(session: Session, image_name: str, hypervisor: str) -> None:
    """Remove a hypervisor from an image.  Refused while the image is open there."""
    hypervisors_of.change(session, "hypervisor.remove", image_name, hypervisor)


@click.command(name="add_location", cls=Command, example="ukai-ctl add_location image01 192.0.2.101")
@click.argument("image_name", type=IMAGE)
@click.argument("location", type=NODE)
@pass_session
def add_location(session: Session, image_name: str, location: str) -> None:
    """Add a location to an image, out-of-sync at first; `sync start` brings it in sync."""
    add_location_to(session, image_name, location)


@click.command(name="remove_location", cls=Command, example="ukai-ctl remove_location image01 192.0.2.100")
@click.argument("image_name", type=IMAGE)
@click.argument("location", type=NODE)
@pass_session
def remove_location(session: Session, image_name: str, location: str) -> None:
    """Remove a location from an image.

    Refused where it holds the last in-sync copy of a block; the message says of which.
    """
    remove_location_from(session, image_name, location)


@click.command(name="get_error_state", cls=Command, example="ukai-ctl get_error_state")
@pass_session
def get_error_state(session: Session) -> None:
    """List the nodes that are not available, since when and why.

    A node leaves the list when it answers again.  Nodes that nobody has tried to reach may be missing.
    """
    nodes = schema.errors(session.ask("errors").get("nodes"))
    if session.as_json:
        session.out.json({"nodes": nodes})
    elif nodes:
        error_table(session, nodes)
    else:
        session.out.line("no node is known to be unavailable")


COMMANDS = (
    create_metadata,
    add_image,
    remove_image,
    get_diskinfo,
    add_hypervisor,
    remove_hypervisor,
    add_location,
    remove_location,
    get_error_state,
)
