"""Checks the extension in a real, running A1111, Forge or reForge, over its HTTP API. By hand; CI has the double.

    python tests/hosts/webui/real_files.py WEBUI                  # once; then start the webui with --api
    python tests/hosts/webui/real.py http://127.0.0.1:7860        # a table; exit 1 where a line fails
    python tests/hosts/webui/real.py URL --plain plain.npy        # see below

The picture of a webui without the extension: start it with this clone out of its ``extensions/``, run with
``--plain FILE`` (the file is made), start it with the clone and run with ``--plain FILE`` again: now it is compared.
Needs numpy and Pillow.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.hosts.webui import real_checks  # noqa: E402
from tests.hosts.webui.real_api import SCRIPT, Webui  # noqa: E402


def versions(webui: Webui) -> dict[str, Any]:
    told: dict[str, Any] = {"webui": webui.draw().infotexts[0].rpartition("Version: ")[2]}
    return told | ((webui.probe() or {}).get("versions") or {})


def run(webui: Webui, only: list[str], plain: Path | None) -> int:
    checks: list[tuple[str, Callable[..., Any]]] = [
        (name, check) for name, check in real_checks.CHECKS.items() if not only or name in only
    ]
    if plain is not None:
        checks.insert(0, ("plain", lambda webui: real_checks.plain(webui, np.load(plain))))
    failed = 0
    for name, check in checks:
        began, before = time.monotonic(), webui.drawn
        try:
            lines = list(check(webui))
        except Exception as error:
            traceback.print_exc()
            lines = [(f"{name}: {type(error).__name__}", str(error).splitlines()[0], "no error", False)]
        for what, seen, limit, passed in lines:
            failed += not passed
            print(f"| {what} | {seen} | {limit} | {'' if passed else '**FAILS**'} |", flush=True)
        print(f"  {name}: {webui.drawn - before} pictures, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--only", nargs="+", default=[], choices=list(real_checks.CHECKS), metavar="CHECK")
    parser.add_argument("--plain", type=Path, help="the picture without the extension: made, or compared with")
    parser.add_argument("--size", type=int, default=128, help="of the pictures; 64 or more")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    webui = Webui(args.url, args.size, args.steps)
    webui.load(real_checks.DMM)
    scripts = webui.ask("/sdapi/v1/scripts")["txt2img"]
    print(json.dumps(versions(webui)))
    if SCRIPT not in scripts:
        if args.plain is None:
            raise SystemExit("The extension is not there. (--plain FILE would keep this webui's picture.)")
        np.save(args.plain, real_checks.plain_pictures(webui))
        print(f"{args.plain}: the picture without the extension. Start the webui with it and run this again.")
        return 0
    return int(run(webui, args.only, args.plain if args.plain and args.plain.exists() else None) > 0)


if __name__ == "__main__":
    sys.exit(main())
