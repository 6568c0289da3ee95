"""`ratoon`: the group of verbs. Each is imported when it is called, so that help costs nothing."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import click

VERBS: dict[str, str] = {
    "quickstart": "From a text to a GPT that writes, with a page that shows how it learned.",
    "prepare": "Turn files of text into tokenizer, shards and a ledger.",
    "tokenizer": "Train a tokenizer, or look into one.",
    "pretrain": "Train a model as a recipe says.",
    "finetune": "Fine-tune a model for a task, with all parameters or few.",
    "evaluate": "Measure a model on text, or at the task it was fine-tuned for.",
    "compare": "Lay fine-tuned runs side by side: score, size, speed, memory.",
    "generate": "Let a model go on from a prompt.",
    "chat": "Talk with a model in the terminal.",
    "export": "Write a model as a Hugging Face folder.",
    "pull": "Fetch a model or a corpus of the catalogue.",
    "runs": "List runs, or show one.",
    "recipes": "List the recipes that ship, or show one.",
    "schema": "Print every key of a recipe.",
    "verify": "Check on your own model that equal means equal.",
    "doctor": "Look at this machine, and train a toy on it.",
    "plan": "Say what a recipe will cost, before it runs.",
}


class _Verbs(click.Group):
    """Verbs by name; the module `cli/<verb>.py` holds the command `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        found: click.Command = importlib.import_module(f"ratoon.cli.{name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"There is no verb '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="ratoon")
def group(debug: bool) -> None:
    """The whole life of a GPT on your own machine."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (failed), 2 (the input), 3 (refused by a gate) or 130 (interrupted)."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        group.main(args=arguments, prog_name="ratoon", standalone_mode=False)
    except click.exceptions.Exit as ending:
        return int(ending.exit_code)
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except Exception as error:
        from ratoon.base.errors import RatoonError

        if not isinstance(error, RatoonError) or "--debug" in arguments:
            raise
        _show(error.as_dict(), str(error), as_json="--json" in arguments)
        return error.exit_code
    return 0


def _show(fields: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(fields, ensure_ascii=False))
    click.echo(f"{fields['error']}: {text}", err=True)
