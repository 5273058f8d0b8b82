"""Open the tab DMM as a web page on this machine: merge, inspect, mix and export, extend, evaluate."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

from dmm_core.errors import BadInput

HELP = "open all this as a web page on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", default="dmm-models", metavar="DIR",
        help="the folder with checkpoints/ and loras/ in it, made if it is missing (dmm-models)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="where it listens (the first free one from 7860)")
    parser.add_argument(
        "--listen", default="127.0.0.1", metavar="ADDRESS",
        help="127.0.0.1: for this machine alone; the page asks nobody for a password",
    )  # fmt: skip
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")


def run(args: argparse.Namespace, report: Any) -> dict:
    require(args)
    from a1111_extension.tab import alone

    models = Path(args.models).absolute()
    said: dict[str, Any] = {"models": models}

    def ready(address: str) -> None:
        said["address"] = address
        report.out(f"{address} shows what is in {models}. Ctrl-C ends it.")

    with contextlib.suppress(KeyboardInterrupt):
        alone.serve(models, args.listen, args.port, not args.no_browser, ready)
    return said


def require(args: argparse.Namespace) -> None:
    """Raises BadInput: no gradio, no such folder, another machine's address, or a port that is taken."""
    if importlib.util.find_spec("gradio") is None:
        raise BadInput(
            "the page needs gradio",
            sys.executable,
            'Run: python install.py --ui. Or, in an environment of your own: pip install gradio "huggingface-hub<1"',
        )
    models = Path(args.models)
    if models.exists() and not models.is_dir():
        raise BadInput("is no folder", models, "Give --models a folder.")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise BadInput(f"--port {args.port}: expected 1 to 65535")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((args.listen, args.port or 0))  # 0: any free one, to try the address alone
    except (OSError, UnicodeError) as error:  # a name that cannot be one at all is no OSError
        place, other = (args.listen, "--listen") if args.port is None else (f"{args.listen}:{args.port}", "--port")
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{place} cannot be used ({why})", hint=f"Try another {other}.") from None
