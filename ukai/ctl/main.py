"""The root of ``ukai-ctl`` and its way out: one place where errors become a line and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import click

from ukai import __version__
from ukai.ctl.commands import (
    completion,
    export,
    hypervisor,
    image,
    importer,
    location,
    log,
    metadata,
    metrics,
    migrate,
    node,
    original,
    status,
    sync,
    verify,
)
from ukai.ctl.params import Command, Group, Session
from ukai.errors import UkaiError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class _ReaderGone(Exception):
    """Whoever read our output has had enough; not a BrokenPipeError, so that click leaves it to us."""


class Root(Group):
    """The root group.  ``main`` always ends with SystemExit, with an exit code of the table in the help."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            raise _ReaderGone from None
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Today's commands and the original's names apart."""
        old = {command.name for command in original.COMMANDS}
        for title, wanted in (("Commands", False), ("Commands of the original UKAI", True)):
            rows = [(n, c.get_short_help_str(90)) for n, c in sorted(self.commands.items()) if (n in old) is wanted]
            with formatter.section(title):
                formatter.write_dl(rows)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        session = Session()
        kwargs["standalone_mode"] = False
        kwargs.setdefault("prog_name", "ukai-ctl")
        try:
            code = super().main(*args, obj=session, **kwargs)
        except _ReaderGone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
            sys.exit(0)
        except click.exceptions.NoArgsIsHelpError as e:
            e.show()
            sys.exit(EXIT_USAGE)
        except click.UsageError as e:
            where = e.ctx.command_path if e.ctx else "ukai-ctl"
            text = e.format_message().rstrip(".")
            sys.exit(_report(session, "usage", f"{where}: {_lower(text)}; see {where} --help", EXIT_USAGE))
        except click.ClickException as e:
            sys.exit(_report(session, "failed", e.format_message(), EXIT_FAILED))
        except click.Abort:
            sys.exit(_report(session, "interrupted", "interrupted", EXIT_INTERRUPTED))
        except UkaiError as e:
            sys.exit(_report(session, e.code, e.message, e.exit_code, e.details))
        except OSError as e:
            file = f"{e.filename}: " if e.filename else ""
            sys.exit(_report(session, "failed", f"{file}{e.strerror or e}", EXIT_FAILED))
        sys.exit(code if type(code) is int else 0)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _report(session: Session, code: str, message: str, exit_code: int, details: dict[str, Any] | None = None) -> int:
    line = " ".join(message.split())
    sys.stderr.write(line + "\n" if line.startswith(("ukai-ctl ", "ukai-ctl:")) else f"ukai-ctl: {line}\n")
    if session.as_json or "--json" in sys.argv[1:]:
        sys.stdout.write(json.dumps({"error": code, "message": line, "details": details or {}}) + "\n")
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_code


HELP = """Say where the blocks of disk images lie, and see how they are.

All commands talk to metad (settings metad_address and control_port).  --json, --timeout and --config may stand before
or after a command.  Nodes are named by their IPv4 address.

\b
Exit codes: 0 done, 1 refused or failed, 2 wrong usage,
            3 metad or a node it needs can't be reached, 130 interrupted.
An error is one line on stderr.  With --json, stdout also gets
{"error": CODE, "message": TEXT, "details": {...}}.
"""


@click.group(cls=Root, name="ukai-ctl", help=HELP)
@click.version_option(__version__, prog_name="ukai-ctl", message="%(prog)s %(version)s")
def cli() -> None:
    """The root of all commands."""


image.group.add_command(importer.command)
image.group.add_command(export.command)
for part in (image, location, hypervisor, node, metadata, sync):
    cli.add_command(part.group)
for verb in (status, migrate, verify, log, metrics, completion):
    cli.add_command(verb.command)
for alias in original.COMMANDS:
    cli.add_command(alias)


def main() -> None:
    """Entry point of the console script.

    A terminal that closes and SIGTERM end it as Ctrl-C does: what was begun is undone, qemu-img does not live on.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    cli.main()


def commands() -> dict[str, Command]:
    """Every verb by its full name, such as ``image create``."""
    found: dict[str, Command] = {}
    waiting: list[tuple[str, click.Command]] = list(cli.commands.items())
    while waiting:
        name, command = waiting.pop()
        if isinstance(command, Command):
            found[name] = command
        elif isinstance(command, click.Group):
            waiting += [(f"{name} {sub}", c) for sub, c in command.commands.items()]
    return found
