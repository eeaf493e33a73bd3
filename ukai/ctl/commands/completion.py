"""``ukai-ctl completion``: the script that teaches a shell our commands, images and nodes."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ukai.ctl.params import Command, Session, pass_session
from ukai.errors import UsageError

VARIABLE = "_UKAI_CTL_COMPLETE"


@click.command(
    name="completion",
    cls=Command,
    example='eval "$(ukai-ctl completion bash)"\nukai-ctl completion fish > ~/.config/fish/completions/ukai-ctl.fish',
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
@pass_session
def command(session: Session, ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell; names of images and nodes are asked from metad."""
    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"there is no completion for {shell}")
    try:
        script = kind(ctx.find_root().command, {}, "ukai-ctl", VARIABLE).source()
    except (RuntimeError, OSError) as e:
        raise UsageError(f"completion for {shell}: {e}") from None
    if session.as_json:
        session.out.json({"shell": shell, "script": script})
    else:
        session.out.raw(script)
