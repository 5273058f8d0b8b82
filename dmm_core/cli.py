"""``dmm …``: arguments in, exit code out. What a command does is in ``dmm_core/commands/NAME.py``:

    HELP = "one line"
    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(args: argparse.Namespace, report: Reporter) -> dict: ...   # the dict is what --json prints

Those modules import nothing heavy at their top, so that ``dmm --help`` is quick and works without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from dmm_core import __version__
from dmm_core.errors import BadInput
from dmm_core.progress import Progress, Quiet, hush

COMMANDS = ("demo", "inspect", "plan", "distill", "extend", "merge", "mix", "generate", "evaluate", "ui")
INSTALLABLE = {"PIL": "pillow", "yaml": "pyyaml"} | {  # import name → what pip calls it
    name: name for name in ("torch", "safetensors", "diffusers", "transformers", "numpy", "tqdm", "scipy")
}
OUT_OF_OUR_HANDS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.EINVAL,
)  # fmt: skip
OURS = [Path(__file__).parents[1] / name for name in ("dmm_core", "a1111_extension", "comfyui_dmm", "mini_family")]
STOPPED = 130


class Unread(Exception):
    """The reader of our output went away, as ``| head`` does."""


class Reporter:
    """What a command says: its answer on stdout (``out``; silent under --json), all else on stderr (``note``)."""

    def __init__(self, json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.json = json
        self.stdout = out or sys.stdout
        self.stderr = cast(TextIO, Quiet(err or sys.stderr))

    def out(self, text: str = "") -> None:
        if not self.json:
            answer(text, self.stdout)

    def note(self, text: str) -> None:
        print(text, file=self.stderr, flush=True)

    def progress(self, total: int | None, label: str) -> Progress:
        return Progress(total, label, self.stderr)

    def silent(self) -> Reporter:
        """One that says nothing, for all but the first of several processes."""
        return Reporter(True, io.StringIO(), io.StringIO())


class Parser(argparse.ArgumentParser):
    """argparse, whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}. See {self.prog} --help.\n")


def command_module(name: str) -> Any:
    """The module of a command, or None where there is none yet."""
    full = f"dmm_core.commands.{name}"
    return importlib.import_module(full) if importlib.util.find_spec(full) else None


def build_parser() -> Parser:
    parser = Parser(prog="dmm", description="Many Stable Diffusion checkpoints in one, with a slider for each style.")
    parser.add_argument("--version", action="version", version=f"dmm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        module = command_module(name)
        if module is None:
            continue
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")
        sub.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 2 (bad input: one line on stderr), 1 (our fault: a traceback) or 130 (stopped)."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch loads: spinning threads starve a busy machine
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by 2>&-: the next file opened would get its number, and its text
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a Windows console may lack letters; a lost letter beats a lost run
            stream.reconfigure(errors="replace")
    with contextlib.redirect_stderr(cast(TextIO, Quiet(sys.stderr))):
        return _answered(arguments)


def _answered(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return _run(args)
    except BadInput as error:
        return _fail(str(error))
    except KeyboardInterrupt as stop:
        how = " ".join(str(part) for part in stop.args)
        return _fail(f"stopped. {how}" if how else "stopped", STOPPED)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in INSTALLABLE:
            return _fail(f"{sys.executable}: this command needs {name}. Run: pip install {INSTALLABLE[name]}")
        traceback.print_exc()
        return 1
    except Unread:
        return 0
    except OSError as error:
        if (place := _place(error)) is not None:
            return _fail(f"{place}: {error.strerror}. Choose another place, or change its rights.")
        if error.errno == errno.ENOSPC:
            return _fail("the disk is full. Make room, or choose another place with --out.")
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def _run(args: argparse.Namespace) -> int:
    report = Reporter(args.json)
    if not args.json:
        args.run(args, report)
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print
        result = args.run(args, report)
    answer(json.dumps(jsonable(result)), report.stdout)
    return 0


def answer(text: str, stream: TextIO) -> None:
    """Print a line of our output. Raises Unread where nobody takes it; a pipe of other work that breaks is an error."""
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
            raise
        hush(stream)
        raise Unread from None


def _place(error: OSError) -> str | None:
    """The file or folder that the user chose and cannot be used; None where the fault is ours.

    Of a file that is renamed in the end it is the place where it should have gone.
    """
    named = error.filename2 if error.filename2 is not None else error.filename
    if not isinstance(named, str | bytes | os.PathLike):
        return None
    place = Path(os.fsdecode(named))
    missing = error.errno == errno.ENOENT and not any(folder in place.absolute().parents for folder in OURS)
    return str(place) if missing or error.errno in OUT_OF_OUR_HANDS else None


def _fail(line: str, code: int = 2) -> int:
    print("dmm: " + " ".join(line.split("\n")), file=sys.stderr, flush=True)
    return code


def jsonable(value: Any) -> Any:
    """Plain JSON types: paths as text, numpy's and torch's numbers and arrays as Python's, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return value if value is None or isinstance(value, str | int | bool) else str(value)
