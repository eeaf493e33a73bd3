"""``ukai-ctl image import``: a disk image file of any format into an image, through the mount."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import click

from ukai import model
from ukai.ctl import qemu, render, schema
from ukai.ctl.client import Client, Deadline
from ukai.ctl.commands.image import creation_notes, creation_options, creation_request
from ukai.ctl.params import IMAGE, NODE, SIZE, Command, Session, pass_session
from ukai.ctl.schema import Map
from ukai.ctl.waiting import Meter
from ukai.errors import Busy, NotFound, Refused, UkaiError, UsageError

PUNCH_HOLE_KEEP_SIZE = 0x03
ZERO_STEP_BYTES = 2**30
APPEAR_POLL_S = 0.1
CLOSE_BEATS = 3


@click.command(
    name="import",
    cls=Command,
    example=(
        "ukai-ctl image import image01 debian-12.qcow2 --location 192.0.2.100 --location 192.0.2.101\n"
        "ukai-ctl image import image02 old-disk.raw --format raw"
    ),
)
@click.argument("name", type=IMAGE)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "image_format", type=click.Choice(qemu.FORMATS), help="Of FILE.  [default: found out]")
@click.option(
    "--location",
    "locations",
    type=NODE,
    multiple=True,
    metavar="NODE",
    help="Create the image first, on this node; repeat.  Without it the image must exist.",
)
@click.option(
    "--size", type=SIZE, metavar="SIZE", help="Of an image to be created.  [default: as large as FILE's disk]"
)
@creation_options
@click.option("--force", is_flag=True, help="Even into an image that is open.")
@pass_session
def command(
    session: Session,
    /,
    name: str,
    file: Path,
    image_format: str | None,
    locations: tuple[str, ...],
    size: int | None,
    force: bool,
    **options: Any,
) -> None:
    """Copy a disk image file into an image, through the mount of this hypervisor.

    All formats of qemu-img; zeros stay holes; everything is on the disks when it is done.  What the image held
    before is gone.  An image that was created for it is removed again when the copy fails.
    """
    source = qemu.check_source(file, image_format)
    own = (size, options["block_size"], options["checksum"]) != (None, None, False) or options["hypervisors"]
    if own and not locations:
        raise UsageError(
            "--size, --block-size, --hypervisor and --checksum are for an image to be created: add --location"
        )
    request = None
    if locations:
        asked = source.virtual_size_bytes if size is None else size
        request = creation_request(name, asked, locations, **options)
        _check_fits(name, model.round_up(asked), file, source)
        qemu.check_mount(session.config, name, request["hypervisors"] or request["locations"])
    with session.client() as client:
        notes: list[str] = []
        if request:
            reply = client.call("image.create", request)
            created = schema.summary(reply.get("image"))
            notes = creation_notes(request["size"], created, schema.texts(reply.get("notes")))
        try:
            image = schema.image(client.call("image.show", {"name": name}, session.fresh_deadline()).get("image"))
            if not request:
                _check_fits(name, image["size"], file, source)
                image = image if force else _when_closed(session, client, image)
            target = _mounted(session, image, patient=bool(request))
            with Meter(f"import {name}", session.as_json) as meter:
                _copy(image, target, file, source, meter)
        except BaseException:
            if request:
                _undo(session, client, name)
            raise
    if session.as_json:
        session.out.json(
            {
                "image": {key: image[key] for key in schema.SUMMARY},
                "file": str(file),
                "format": source.format,
                "virtual_size": source.virtual_size_bytes,
                "notes": notes,
            }
        )
        return
    session.out.line(f"{name}: imported {render.exact_size(source.virtual_size_bytes)} from {file} ({source.format})")
    session.out.notes(notes)


def _check_fits(name: str, size_bytes: int, file: Path, source: qemu.FileInfo) -> None:
    if source.virtual_size_bytes > size_bytes:
        raise Refused(
            f"{file} holds a disk of {source.virtual_size_bytes} bytes, and image {name} has only {size_bytes}; "
            "import it into a larger image"
        )


def _when_closed(session: Session, client: Client, image: Map) -> Map:
    """The image, open nowhere.  Raises Busy.

    metad hears of a close with the node's next beat, so one that was just closed counts as open for a moment.
    """
    patience = Deadline(session.config.beat_interval * CLOSE_BEATS)
    while image["open"]:
        if not patience.left_s():
            raise Busy(
                f"image {image['name']} is open on {', '.join(image['open'])}; "
                "stop the machine that uses it, or add --force"
            )
        time.sleep(APPEAR_POLL_S)
        fields = {"name": image["name"]}
        image = schema.image(client.call("image.show", fields, session.fresh_deadline()).get("image"))
    return image


def _mounted(session: Session, image: Map, patient: bool) -> Path:
    """The image's file; a new image gets ``--timeout`` to appear.  Raises UkaiError."""
    deadline = session.fresh_deadline()
    while True:
        try:
            return qemu.mounted_file(session.config, image)
        except NotFound:
            if not patient or not deadline.left_s():
                raise
        time.sleep(APPEAR_POLL_S)  # nothing tells us when the frontend has heard of it


def _copy(image: Map, target: Path, file: Path, source: qemu.FileInfo, meter: Meter) -> None:
    """Copy, zero what is behind the copy, and have all of it on the disks."""
    never_written = all(not r["generation"] for part in image["placement"] for r in part["replicas"].values())
    arguments = ["-n", "-t", "none", "-W", "-m", str(qemu.REQUESTS_IN_FLIGHT)]
    if never_written:
        arguments.append("--target-is-zero")
    arguments += ["-f", source.format, "-O", "raw", "--", str(file), str(target)]
    qemu.convert(arguments, lambda percent: meter.show_bytes(percent, source.virtual_size_bytes))
    handle = os.open(target, os.O_RDWR)
    try:
        if not never_written:
            _zero(handle, source.virtual_size_bytes, image["size"])
        os.fsync(handle)
    finally:
        os.close(handle)


def _zero(handle: int, start_bytes: int, end_bytes: int) -> None:
    """Make start…end read as zeros and give the space back.  Raises OSError."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    for offset_bytes in range(start_bytes, end_bytes, ZERO_STEP_BYTES):
        length_bytes = min(ZERO_STEP_BYTES, end_bytes - offset_bytes)
        if fallocate(handle, PUNCH_HOLE_KEEP_SIZE, offset_bytes, length_bytes):
            number = ctypes.get_errno()
            raise OSError(number, f"the end of the image could not be zeroed: {os.strerror(number)}")


def _undo(session: Session, client: Client, name: str) -> None:
    """Remove the image that was created for this import.  The mount may hold it open for a moment more."""
    deadline = session.fresh_deadline()
    while True:
        try:
            client.call("image.remove", {"name": name, "delete_data": True}, deadline)
        except Busy:
            if deadline.left_s():
                time.sleep(APPEAR_POLL_S)
                continue
            session.out.remark(f"{name} is still open; remove it with: ukai-ctl image remove {name} --delete-data")
        except UkaiError as e:
            session.out.remark(f"{name} could not be removed again: {e.message}")
        else:
            session.out.remark(f"the import failed, {name} was removed again")
        return
