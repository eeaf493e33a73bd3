"""``ukai-ctl sync``: bring copies back in sync while the image is in use (R11)."""

from __future__ import annotations

import click

from ukai.ctl import render, schema
from ukai.ctl.params import (
    BLOCKS,
    IMAGE,
    NODE,
    RATE,
    Group,
    Session,
    once_each,
    pass_session,
    within_image,
)
from ukai.ctl.schema import Map
from ukai.ctl.waiting import wait_for_job
from ukai.ranges import show


@click.group(name="sync", cls=Group)
def group() -> None:
    """Bring out-of-sync copies up to date, while guests write."""


@group.command(
    example=(
        "ukai-ctl sync start image01 --wait\nukai-ctl sync start image01 --node 192.0.2.101 --blocks 0-63 --rate 50M"
    )
)
@click.argument("image", type=IMAGE)
@click.option("--node", "nodes", type=NODE, multiple=True, metavar="NODE", help="Only this location; repeat for more.")
@click.option("--blocks", type=BLOCKS, metavar="A-B", help="Only these, as 0-3,7.  [default: all that are out-of-sync]")
@click.option("--rate", type=RATE, default="default", metavar="RATE", help="Bytes per second, as 100M, or none.")
@click.option("--wait", is_flag=True, help="Show progress until it ends; exit code 1 unless it is done.")
@pass_session
def start(
    session: Session,
    image: str,
    nodes: tuple[str, ...],
    blocks: list[tuple[int, int]] | None,
    rate: int,
    wait: bool,
) -> None:
    """Start a resync, or take up one that was stopped.

    Only blocks that are out-of-sync are compared, and only what differs is copied.  Ctrl-C during --wait leaves the
    resync running.
    """
    targets = once_each(nodes, "node")
    with session.client() as client:
        fields = {"name": image, "nodes": targets, "ranges": within_image(client, image, blocks), "rate": rate}
        job = schema.job(client.call("sync.start", fields).get("job"))
        if wait:
            job = wait_for_job(session, client, job)
    show_job(session, job)
    if wait and job["state"] != "done":
        session.out.remark(f"ukai-ctl: resync of {image} {job['state']}: {job['reason'] or 'no reason was given'}")
        raise click.exceptions.Exit(1)


@group.command(example="ukai-ctl sync stop image01")
@click.argument("image", type=IMAGE)
@pass_session
def stop(session: Session, image: str) -> None:
    """Stop a resync.  `sync start` takes it up where it was."""
    show_job(session, schema.job(session.ask("sync.stop", {"name": image}).get("job")))


@group.command(example="ukai-ctl sync rate image01 50M")
@click.argument("image", type=IMAGE)
@click.argument("rate", type=RATE)
@pass_session
def rate(session: Session, image: str, rate: int) -> None:
    """Limit a resync that runs: bytes per second, `none`, or `default` for the nodes' setting."""
    show_job(session, schema.job(session.ask("sync.rate", {"name": image, "rate": rate}).get("job")))


@group.command(example="ukai-ctl sync status\nukai-ctl sync status image01 --json")
@click.argument("image", type=IMAGE, required=False)
@pass_session
def status(session: Session, image: str | None) -> None:
    """Show how far resyncs and verifies are, and why one stands still."""
    jobs = schema.jobs(session.ask("sync.status", {"name": image or ""}).get("jobs"))
    if session.as_json:
        session.out.json({"jobs": jobs})
        return
    if not jobs:
        session.out.line("no resync or verify was ordered")
    for number, job in enumerate(jobs):
        if number:
            session.out.line()
        picture(session, job)


def show_job(session: Session, job: Map) -> None:
    if session.as_json:
        session.out.json({"job": job})
    else:
        picture(session, job)


def picture(session: Session, job: Map) -> None:
    total, done = job["bytes_total"], job["bytes_done"]
    progress = "-"
    if total:
        percent = f"{100 * (done or 0) / total:.1f} %"
        blocks = f"{job['blocks_done'] or 0} of {render.plural(job['blocks_total'] or 0, 'block')}"
        progress = f"{render.size(done or 0)} of {render.size(total)} ({percent}), {blocks}"
    limit = job["rate_limit"]
    # before the coordinator's first figures nobody knows the limit
    known = total and limit is not None and limit >= 0
    limits = "" if not known else ", no limit" if limit == 0 else f", limit {render.rate(limit)}"
    reason = f": {job['reason']}" if job["reason"] else ""
    verify = job["kind"] == "verify"
    found = f"{render.size(job['bytes_equal'])}, holes {render.size(job['bytes_hole'])}"
    session.out.line(render.heading(f"{job['image']}"))
    session.out.pairs(
        [
            ("order", job["kind"]),
            ("state", render.styled(job["state"], reason)),
            ("compared" if verify else "targets", ", ".join(job["nodes"]) or "all locations"),
            ("blocks", show((a, b) for a, b in job["ranges"]) or ("all" if verify else "all that are out-of-sync")),
            ("done", progress),
            ("differed", render.plural(job["blocks_differed"] or 0, "block"))
            if verify
            else ("copied", render.size(job["bytes_copied"])),
            ("equal" if verify else "skipped as equal", found),
            ("rate", render.rate(job["rate"]) + limits),
            ("time left", render.duration(job["eta"] if job["state"] == "running" else None)),
            ("started", f"{render.moment(job['started'])} on {job['coordinator'] or 'no node yet'}"),
        ]
    )
