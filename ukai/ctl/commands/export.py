"""``ukai-ctl image export``: an image into a disk image file of any format, through the mount."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ukai.ctl import qemu, render, schema
from ukai.ctl.params import IMAGE, Command, Session, pass_session
from ukai.ctl.waiting import Meter
from ukai.errors import Exists, NotFound


@click.command(
    name="export",
    cls=Command,
    example="ukai-ctl image export image01 image01.qcow2\nukai-ctl image export image01 /backup/image01.raw --force",
)
@click.argument("name", type=IMAGE)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "image_format",
    type=click.Choice(qemu.FORMATS),
    help="Of FILE.  [default: by its ending, .qcow2 for example; else raw]",
)
@click.option("--force", is_flag=True, help="Replace FILE.")
@pass_session
def command(session: Session, name: str, file: Path, image_format: str | None, force: bool) -> None:
    """Copy an image into a file, through the mount of this hypervisor.

    Zeros become holes.  FILE appears under its name when all of it is on the disk, not before.
    """
    qemu.program()
    kind = image_format or qemu.SUFFIXES.get(file.suffix.lower(), "raw")
    if not file.parent.is_dir():
        raise NotFound(f"the directory {file.parent} does not exist")
    if os.path.lexists(file) and not force:
        raise Exists(f"{file} is there already; add --force to replace it")
    image = schema.image(session.ask("image.show", {"name": name}).get("image"))
    source = qemu.mounted_file(session.config, image)
    notes = []
    if image["open"]:
        notes.append(
            f"the image is open on {', '.join(image['open'])}: what was written meanwhile may be in part in it"
        )
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with Meter(f"export {name}", session.as_json) as meter:
            arguments = ["-W", "-m", str(qemu.REQUESTS_IN_FLIGHT)]
            # -U: a machine that has the image open holds qemu's lock on it, and we only read
            arguments += ["-U", "-f", "raw", "-O", kind, "--", str(source), str(partial)]
            qemu.convert(arguments, lambda percent: meter.show_bytes(percent, image["size"]))
        _put(partial, file, force)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    result = {"name": name, "file": str(file), "format": kind, "size": image["size"], "notes": notes}
    if session.as_json:
        session.out.json(result)
        return
    session.out.line(f"{name}: exported {render.exact_size(image['size'])} to {file} ({kind})")
    session.out.notes(notes)


def _put(partial: Path, file: Path, force: bool) -> None:
    """Give a finished file its name, on the disk.  Raises Exists when somebody else took the name meanwhile."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    if force:
        os.replace(partial, file)
    else:
        try:
            os.link(partial, file)
        except FileExistsError:
            raise Exists(f"{file} appeared meanwhile; add --force to replace it") from None
        partial.unlink()
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
