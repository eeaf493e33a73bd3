"""``ukai-ctl metadata``: what to do when only an older copy of the metadata is left."""

from __future__ import annotations

import click

from ukai.ctl import schema
from ukai.ctl.params import Group, Session, agree, pass_session
from ukai.ctl.schema import Map


@click.group(name="metadata", cls=Group)
def group() -> None:
    """See and accept metadata that is older than what the nodes have seen."""


@group.command(example="ukai-ctl metadata show")
@pass_session
def show(session: Session) -> None:
    """Show what the metadata knows and what each node holds, image by image.

    Of use while metad refuses to serve since it is older than what nodes have seen, before `metadata accept`.
    """
    found = schema.holdings(session.ask("metadata.show"))
    if session.as_json:
        session.out.json(found)
        return
    picture(session, found)


@group.command(
    example="ukai-ctl metadata accept --trust 192.0.2.100\n"
    "ukai-ctl metadata accept --trust image02=192.0.2.101 --trust 192.0.2.100",
)
@click.option("--trust", multiple=True, required=True, metavar="[IMAGE=]NODE", help="Whose copies count; repeat.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@pass_session
def accept(session: Session, trust: tuple[str, ...], yes: bool) -> None:
    """Go on from older metadata.  Of each block the copy of the first trusted node that has one counts.

    What is said of an image comes before what is said of all.  The other copies are out-of-sync; nothing is deleted.
    See `metadata show` first: what only a node has that is not trusted, or has not reported, is given up by the next
    `sync start`.
    """
    if not yes:
        found = schema.holdings(session.ask("metadata.show"))
        away = [n["address"] for n in found["nodes"] if not n["reported"]]
        price = (
            f"The metadata goes back to change {found['seq']}: what was ordered since is forgotten (images made, "
            "locations, hypervisors). All copies but those trusted are out-of-sync. Machines that have images open get "
            "I/O errors and must be started anew."
        )
        if away:
            price += f" {', '.join(away)} has not reported: what only it has is given up."
        agree(price, "Accept it?")
    reply = session.ask("metadata.accept", {"trust": list(trust)})
    notes = schema.texts(reply.get("notes"))
    if session.as_json:
        session.out.json({"seq": reply.get("seq"), "seen": reply.get("seen"), "notes": notes})
        return
    session.out.line(
        f"accepted; the metadata goes on at change {reply.get('seq')} (nodes had seen {reply.get('seen')})"
    )
    session.out.notes([*notes, "see ukai-ctl image list, then ukai-ctl sync start IMAGE for each image"])


def picture(session: Session, found: Map) -> None:
    """The holdings, for people."""
    out = session.out
    out.line(f"the metadata is at change {found['seq']}" + (", and nodes have seen more" if found["behind"] else ""))
    out.line()
    out.table(
        ["NODE", "REPORTED", ">HAS SEEN", "*REASON"],
        (
            [
                n["address"],
                "yes" if n["reported"] else "no",
                str(n["seq"]) if n["reported"] else "-",
                n["reason"] or "-",
            ]
            for n in found["nodes"]
        ),
    )
    out.line()
    out.table(
        ["*IMAGE", "NODE", ">WRITTEN", ">OF", ">NEWEST", ">BAD FILES", "*REMARK"],
        (
            [
                image["name"],
                node,
                str(copy["written"]),
                str(image["blocks"]),
                str(copy["newest"]),
                str(copy["bad_blocks"]),
                _remark(image, copy),
            ]
            for image in found["images"]
            for node, copy in image["copies"].items()
        ),
    )
    for image in found["unknown"]:
        out.line(
            f"image {image['name']} ({image['uuid']}) on {', '.join(image['nodes'])} is not in this metadata; its "
            "files stay where they are"
        )
    if not found["behind"]:
        out.line("the metadata is not older than what the nodes have seen: there is nothing to accept")


def _remark(image: Map, copy: Map) -> str:
    if not copy["reported"]:
        return "has not reported"
    if not copy["held"]:
        return "no data of this image"
    parts = [] if copy["location"] else ["no location in this metadata"]
    parts += ["newer than the metadata"] if copy["newest"] > image["newest"] else []
    parts += [f"block {bad[0]}: {bad[2]}" for bad in copy["bad"][:1] if isinstance(bad, list) and len(bad) == 3]
    return "; ".join(parts) or "-"
