"""How `home` ends: what went wrong in one line with its remedy, or with its traceback for who asks with --debug."""

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from .errors import UserError

MISTAKE, FAULT, STOPPED = 2, 1, 130  # exit status: of a user's mistake, of a fault of ours, of Ctrl-C
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a write that finds none does not say which file it was for
_UsageError: Any = typer.BadParameter.__base__  # of the words on the command line; typer gives it no name of its own


class Home(TyperGroup):
    """`home` itself. All that its commands raise ends here; --debug may stand before or after the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with one_line():
            return super().parse_args(ctx, sorted(args, key=lambda word: word != "--debug"))  # to the front, all else as it was

    def invoke(self, ctx: Any) -> object:
        with one_line(debug=ctx.params["debug"]):
            return super().invoke(ctx)


@contextmanager
def one_line(*, debug: bool = False) -> Iterator[None]:
    """What is raised within is told in one line on stderr, `debug` after its traceback, and ends the program: with 2 where a user can mend it, with 1 where
    homelib is at fault, with 130 after Ctrl-C."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        _end(error, "stopped by Ctrl-C. The same command again goes on, or begins anew where nothing is kept.", STOPPED, debug)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help itself
            raise
        command = error.ctx.command_path if error.ctx else "home"
        told = _words(error.format_message())
        _end(error, f"{told}{'' if told.endswith(('.', '?')) else '.'} See {command} --help.", MISTAKE, debug)
    except UserError as error:
        _end(error, str(error), MISTAKE, debug)
    except Exception as error:
        if getattr(error, "errno", None) == errno.EPIPE:  # who read our output has gone, head say: typer ends in silence
            raise
        if isinstance(error, OSError) and (error.filename is not None or error.errno in NO_ROOM):  # a folder that cannot be written, a full disk
            _end(error, f"{error.filename or 'a file'}: {error.strerror}. Choose another place, or make room there.", MISTAKE, debug)
        told = ": ".join(filter(None, (type(error).__name__, _words(str(error))))).rstrip(".")
        remedy = "run it again with --debug, and send that with what home doctor --report prints"
        _end(error, f"{told}. This is a fault of homelib or of its installation: {remedy}.", FAULT, debug)


def _end(error: BaseException, line: str, status: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"home: {line}", file=sys.stderr)
    raise typer.Exit(status) from None


def _words(text: str) -> str:
    return " ".join(text.split())
