"""What every verb of the command line shares: its streams, its common options, and the boundary of errors.

Results go to stdout, progress and errors to stderr; exit codes are those of `errors`. It knows no verb.
"""

from __future__ import annotations

import json
import os
import pwd
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from luthier.errors import LuthierError

errors = Console(stderr=True, emoji=False)
results = Console(emoji=False)

Home = Annotated[Path | None, typer.Option("--home", help="default: $LUTHIER_HOME, else ~/.luthier")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout instead of words")]


def answer(as_json: bool, ask: Callable[[Any], Any], draw: Callable[[Console, Any], None]) -> Any:
    with door(as_json):
        from luthier import api

        found = ask(api)
        if as_json:
            print(json.dumps(found), flush=True)
        else:
            draw(results, found)
    return found


def who() -> str:
    """Who sits at this command line, as the audit log names them: what the kernel says, no variable."""
    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"cli:{os.getuid()}"


@contextmanager
def door(as_json: bool) -> Iterator[None]:
    """The boundary: our errors become a sentence and an exit code; anything else is a bug and says so."""
    try:
        yield
    except LuthierError as error:
        if as_json:
            body = {
                "kind": type(error).__name__,
                "what": error.what,
                "where": error.where,
                "hint": error.hint,
            }
            print(json.dumps({"error": body}), flush=True)
        errors.print(f"[bold red]{type(error).__name__}[/] ", end="")
        errors.print(_printable(str(error)), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except (BrokenPipeError, KeyboardInterrupt):
        raise typer.Exit(75) from None
    except typer.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - the outermost boundary of the program
        errors.print(traceback.format_exc(), markup=False, highlight=False)
        errors.print(f"[bold red]A bug in luthier:[/] {type(error).__name__}; please report the above.")
        raise typer.Exit(70) from None


def _printable(text: str) -> str:
    """Texts from files may hold terminal commands; they are shown, not obeyed."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
