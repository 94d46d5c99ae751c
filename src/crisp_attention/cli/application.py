"""The `crisp` application that commands register with."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from crisp_attention import __version__


def needs_extra(missing: ModuleNotFoundError) -> str:
    """What to tell who installed the core alone."""
    return (
        f"The crisp command needs the extra 'experiment' ({missing.name} is missing): "
        "pip install 'crisp-attention[experiment]'"
    )


try:
    import typer
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError as missing:  # the core installs without the command line
    sys.exit(needs_extra(missing))


def _without_types_of_flags(options: list[Any]) -> list[Any]:
    """Options as the help shows them: a flag takes no value, so none is named."""
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    return options


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


app = typer.Typer(
    name="crisp",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

command = app.command(cls=_Command)
"""Decorator: a function becomes a command of that name."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crisp-attention {__version__}")
        raise typer.Exit


@app.callback()
def crisp(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Let a Transformer attend to less, and find out honestly whether it helps."""
