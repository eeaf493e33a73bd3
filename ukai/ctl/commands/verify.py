"""``ukai-ctl verify``: compare the copies of an image while it is in use."""

from __future__ import annotations

import click

from ukai.ctl import schema
from ukai.ctl.commands.sync import show_job
from ukai.ctl.params import BLOCKS, IMAGE, NODE, RATE, Command, Session, once_each, pass_session, within_image
from ukai.ctl.waiting import wait_for_job
from ukai.errors import UsageError


@click.command(
    name="verify",
    cls=Command,
    example="ukai-ctl verify image01 --wait\nukai-ctl verify image01 --blocks 0-63 --rate 50M\n"
    "ukai-ctl verify image01 --stop",
)
@click.argument("image", type=IMAGE)
@click.option("--node", "nodes", type=NODE, multiple=True, metavar="NODE", help="Only this location; repeat for more.")
@click.option("--blocks", type=BLOCKS, metavar="A-B", help="Only these, as 0-3,7.  [default: all]")
@click.option("--rate", type=RATE, default="default", metavar="RATE", help="Bytes per second, as 100M, or none.")
@click.option("--wait", is_flag=True, help="Show progress until it ends; exit code 1 if a block differed.")
@click.option("--stop", is_flag=True, help="Stop the one that is under way.")
@pass_session
def command(
    session: Session,
    image: str,
    nodes: tuple[str, ...],
    blocks: list[tuple[int, int]] | None,
    rate: int,
    wait: bool,
    stop: bool,
) -> None:
    """Compare the in-sync copies, while guests write, and mark what differs.

    A copy that differs from the others, can't be read or doesn't match its checksums goes out-of-sync, with the
    reason; `sync start` makes it good.  With two copies and no checksums the one that the guest reads is kept.
    `sync status` shows the progress, `sync rate` alters the limit.
    """
    targets = once_each(nodes, "node")
    if stop:
        if targets or blocks or wait or rate != -1:
            raise UsageError("--stop stands alone")
        show_job(session, schema.job(session.ask("sync.stop", {"name": image}).get("job")))
        return
    with session.client() as client:
        fields = {"name": image, "nodes": targets, "ranges": within_image(client, image, blocks), "rate": rate}
        job = schema.job(client.call("verify.start", fields).get("job"))
        if wait:
            job = wait_for_job(session, client, job)
    show_job(session, job)
    if not wait:
        return
    if job["state"] != "done":
        session.out.remark(f"ukai-ctl: verify of {image} {job['state']}: {job['reason'] or 'no reason was given'}")
    if job["state"] != "done" or job["blocks_differed"]:
        raise click.exceptions.Exit(1)
