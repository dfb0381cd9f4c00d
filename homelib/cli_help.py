"""Help that cannot fall behind the code: examples that a test parses, and defaults read off the settings when help is asked for."""

import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

_SETTING = re.compile(r"\{([a-z_]+\.[a-z_.]+)\}")  # {prediction.mirror}


def command(app: typer.Typer, name: str | None = None, *, examples: tuple[str, ...]) -> Callable:
    """A decorator as `app.command(name)`, for a command whose help ends with examples: lines as they are typed, with a comment (#) where it helps."""
    return app.command(name, cls=_Command, epilog=epilog(examples))


def epilog(examples: tuple[str, ...]) -> str:
    """The end of a help, in Rich's markup."""
    return "\n".join(["[bold]Examples[/]", *(line.replace("[", r"\[") for line in examples)])


class _Command(TyperCommand):
    """A command in whose help {prediction.mirror} stands for that setting and its default."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        parameters: list[Any] = self.params
        for parameter in parameters:
            if parameter.help and _SETTING.search(parameter.help):
                parameter.help = _with_defaults(parameter.help)
        super().format_help(ctx, formatter)


def _with_defaults(text: str) -> str:
    from .config import Settings, values  # only now: who asks for no help need not wait for pydantic

    known = values(Settings())
    return _SETTING.sub(lambda found: rf"{found[1]} ({known[found[1]]} unless set)".replace("[", r"\["), text)
