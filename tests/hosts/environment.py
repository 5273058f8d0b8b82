"""Environments of the host tests, beside the clone and made once; what ``.venv-dmm`` has already comes from there."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / ".venv-dmm"  # python install.py --test makes it


def python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def answer(venv: Path, code: str, *arguments: str) -> str:
    """What a line of Python prints there."""
    command = [str(python(venv)), "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def packages(venv: Path) -> Path:
    return Path(answer(venv, "import sysconfig; print(sysconfig.get_path('purelib'))"))


def pip(venv: Path, *arguments: str) -> None:
    """By the pip of ``.venv-dmm``: an environment of its own would take seconds to get one."""
    command = [str(python(TESTS)), "-m", "pip", "--python", str(python(venv)), *arguments[:1]]
    command += ["--quiet", "--disable-pip-version-check"]
    if arguments[0] == "install" and not sys.dont_write_bytecode:
        command.append("--no-compile")  # what is imported is compiled then, and only that
    subprocess.run([*command, *arguments[1:]], check=True)


def prepare(venv: Path, content: str, install: Callable[[], None]) -> Path:
    """Its Python. ``install`` fills a new environment, unless one was made of the same ``content`` before."""
    base = python(TESTS)
    if not base.exists():
        raise SystemExit("prepare.py: there is no .venv-dmm yet. Run: python install.py --test -k no_test")
    stamp = venv / "dmm.stamp"
    state = hashlib.sha256("\n".join((sys.version, str(base.resolve()), content)).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != state:
        print(f"prepare.py: makes {venv.name}, a minute or two", file=sys.stderr, flush=True)
        shutil.rmtree(venv, ignore_errors=True)
        command = [str(base), "-m", "venv", "--without-pip", str(venv)]  # of the same Python: it is to load its torch
        subprocess.run(command, check=True)
        install()
        stamp.write_text(state, encoding="utf-8")
    return python(venv)


def see_all(venv: Path) -> None:
    """The packages of ``.venv-dmm`` come after its own. Call it after pip, which would take them for its own."""
    line = f"import sys; sys.path.append({str(packages(TESTS))!a})\n"
    (packages(venv) / "zz-dmm.pth").write_text(line, encoding="ascii")


def share(venv: Path, pins: list[str]) -> None:
    """Link those of ``NAME==VERSION`` that ``.venv-dmm`` has, and nothing else of it. Call it before pip."""
    code = (
        "import sys, importlib.metadata as m\n"
        "for pin in sys.argv[1:]:\n"
        "    name, _, version = pin.partition('==')\n"
        "    try: found = m.distribution(name)\n"
        "    except m.PackageNotFoundError: continue\n"
        "    if found.version.partition('+')[0] == version: print(*{f.parts[0] for f in found.files}, sep='\\n')"
    )
    source, target = packages(TESTS), packages(venv)
    for name in set(answer(TESTS, code, *pins).split("\n")) - {"..", "__pycache__", ""}:
        if not (target / name).exists():
            (target / name).symlink_to(source / name)
