"""The entry point: the list of commands, and what becomes of errors."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

import click

from qexport.cli.output import printable
from qexport.errors import QexportError
from qexport.version import __version__

# name -> (where the command is, what it does); `qexport --help` imports none of them
COMMANDS = {
    "compare": ("qexport.cli.compare:compare", "Measure what each bit costs: the loss-vs-bits report."),
    "convert": ("qexport.cli.convert:convert", "Write a model, or an adapter, in another form."),
    "demo": ("qexport.cli.demo:demo", "Run the whole way on the embedded model, in minutes."),
    "export": (
        "qexport.cli.export:export",
        "Run a recipe: merge, shard, quantize, verify, report.",
    ),
    "imatrix": ("qexport.cli.imatrix:imatrix", "Gather a GGUF importance matrix."),
    "merge": ("qexport.cli.merge:merge", "Merge adapters into their base."),
    "push": ("qexport.cli.push:push", "Push an output, or several variants, to the Hugging Face Hub."),
    "quantize": ("qexport.cli.quantize:quantize", "Quantize a model."),
    "report": ("qexport.cli.report:report", "Render reports again, merge several, compare two."),
    "shard": ("qexport.cli.shard:shard", "Write a model again in files of another size."),
    "verify": ("qexport.cli.verify:verify", "Measure what a model lost against its reference."),
}
DEFECT = 70
ENVIRONMENT = {  # has to be there before torch is loaded
    # threads that wait by spinning lose most of their time to a busy neighbour (40 s became 20 s), and win
    # nothing on a quiet machine
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class _Stopped(BaseException):
    """A signal ends the work, with nothing left behind; click would turn a KeyboardInterrupt into its own."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


class _Commands(click.Group):
    """Commands that are imported when they are called, and help that needs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qexport")
def cli() -> None:
    """From "training is done" to "everyone can run it": merge, shard, quantize and prove language models."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what follows is cleaning up
    raise _Stopped(128 + number)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0 done, 1 not whole or lost too much, 2 bad input, 130 or 143 stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.exit(run(arguments))


def run(arguments: list[str] | None) -> int:
    """Runs a command and returns its exit code; errors are told in one line on stderr."""
    try:
        result: Any = cli.main(arguments, prog_name="qexport", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        see = f"; see {context.command_path} --help" if context else ""
        _complain(" ".join(error.format_message().split()).rstrip(".") + see)
        return 2
    except QexportError as error:
        _complain(str(error))
        return error.exit_code
    except (_Stopped, KeyboardInterrupt, click.Abort) as error:
        _complain("interrupted; nothing unfinished was left behind")
        return error.exit_code if isinstance(error, _Stopped) else 128 + signal.SIGINT
    except BrokenPipeError:
        # the reader of stdout went away; nothing more can be told to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # files have told their own by now; what is left is stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain(f"cannot write the result: {error.strerror or error}")
        return 2
    except MemoryError:
        _complain("out of memory; nothing unfinished was left behind")
        return 2
    except Exception as error:
        if os.environ.get("QEXPORT_DEBUG"):
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        _complain(
            f"a defect in qexport: {type(error).__name__}: {reason}; "
            "please report it with the traceback that QEXPORT_DEBUG=1 prints"
        )
        return DEFECT
    return result if isinstance(result, int) else 0


def _complain(line: str) -> None:
    click.echo(f"error: {printable(line)}", err=True)
