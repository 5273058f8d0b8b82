"""Set-up for people and hosts; needs the standard library alone.

Without arguments, as ComfyUI and the webuis call it, it changes nothing: inference needs only what they already have.

    python install.py --demo [ARGS]   make .venv-dmm beside this file, then run ``dmm demo ARGS`` in it
    python install.py --ui [ARGS]     the same with gradio, then run ``dmm ui ARGS``: all this as a web page
    python install.py --test [ARGS]   the same, then run ``pytest ARGS``
    python install.py --train         make what hosts train with: .venv-train over this Python's packages
    python install.py --train --own-torch    the same where this Python's torch is too old: with a torch of its own

A torch that this Python already has is used, not downloaded again; no package of this Python is added or changed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv-dmm"
TRAIN = ROOT / ".venv-train"  # for hosts: over the packages of the Python that runs them
FOLDER = ROOT / ".train-packages"  # the same where Python cannot make virtual environments (ComfyUI portable)
STAMP = "dmm-install.stamp"  # in an environment: what was installed to the end
STOPPED = 130  # exit code after Ctrl-C
PYTHON = (3, 10)  # as pyproject.toml says
OLDEST_TORCH = (2, 4)  # trained with nothing older; torch.amp.GradScaler is of 2.3, and diffusers 0.39 asks for 2.6
# not -m: it would take a random.py in the folder that people are in for Python's own; PYTHONPATH has the clone
LAUNCH = "import sys; del sys.path[0]; sys.argv[0] = 'dmm'; from dmm_core.cli import main; sys.exit(main())"
FAILED = "pip could not install the requirements; its message is above. Is there a network?"
EXTRAS = {"--demo": ("train",), "--ui": ("train", "ui"), "--test": ("train", "dev"), "--train": ("train",)}
# With a host's torch its other compiled packages are kept too (they were built for each other); these are always ours.
ALWAYS_PINNED = {"diffusers", "transformers", "tokenizers", "huggingface-hub", "pytest", "ruff", "mypy"}


class SetupError(Exception):
    """What is wrong, and what to do, in one line; ``code`` is the exit code: 2 the machine's fault, 1 pip's failure."""

    def __init__(self, line: str, code: int = 2) -> None:
        super().__init__(line)
        self.code = code


def say(line: str) -> None:
    print("install.py: " + line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what to install


def extra(name: str) -> list[str]:
    """The requirements of one extra of pyproject.toml (read by hand: tomllib is newer than Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(name)} = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise SetupError(f"pyproject.toml lists no extra {name}. Is this clone complete?")
    return list(ast.literal_eval(found.group(1)))


def package_folders() -> list[str]:
    """Where this Python's packages lie."""
    return [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p)]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def host_packages() -> dict[str, str]:
    """Names and versions of what this Python has, read from the folders' names: nothing is imported."""
    found: dict[str, str] = {}
    for folder in package_folders():
        for kind in (".dist-info", ".egg-info"):  # the latter, NAME-VERSION-pyX.Y, of conda's torch
            for info in Path(folder).glob(f"*-*{kind}"):
                name, version = info.name.removesuffix(kind).split("-")[:2]
                found.setdefault(normal(name), version)
    return found


def host_torch() -> str | None:
    """The version of a torch that this Python has, if it is new enough."""
    version = host_packages().get("torch", "")
    number = re.match(r"(\d+)\.(\d+)", version)
    return version if number and (int(number[1]), int(number[2])) >= OLDEST_TORCH else None


def constraints(torch: str | None) -> str:
    """constraints.txt; where the host's torch is used, without what the host has."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    free = set(host_packages()) - ALWAYS_PINNED if torch else set()
    return "\n".join(line for line in lines if normal(line.partition("==")[0]) not in free) + "\n"


def requirements(extras: Iterable[str], torch: str | None) -> list[str]:
    return [*([] if torch else ["torch"]), *(line for name in extras for line in extra(name))]


# ---------------------------------------------------------------- the environment


def venv_python(venv: Path = VENV) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def write_launcher(venv: Path) -> None:
    """``dmm`` beside the environment's Python, to be called from any folder; nothing is installed for it."""
    if os.name == "nt":  # by its own place: cmd reads such files in the console's encoding, not in UTF-8
        lines = ["@echo off", "setlocal", "set PYTHONHOME=", 'set "PYTHONPATH=%~dp0..\\.."', "set PYTHONUTF8=1",
                 f'"%~dp0python.exe" -c "{LAUNCH}" %*']  # fmt: skip
        file, text = venv_python(venv).with_name("dmm.cmd"), "\r\n".join([*lines, ""])
    else:  # no script of Python's: its first line could not name a Python in a folder with spaces
        python, root = (shlex.quote(str(path)) for path in (venv_python(venv), ROOT))
        lines = ["#!/bin/sh", "unset PYTHONHOME", f"export PYTHONPATH={root} PYTHONUTF8=1"]
        file, text = venv_python(venv).with_name("dmm"), "\n".join([*lines, f'exec {python} -c "{LAUNCH}" "$@"', ""])
    if not file.exists() or file.read_bytes() != os.fsencode(text):
        file.write_bytes(os.fsencode(text))
        file.chmod(0o755)


def fingerprint(torch: str | None, place: Path = VENV) -> str:
    """Changes whenever the environment must be made anew: other requirements, versions, Python, place or torch."""
    about = constraints(torch), sys.version, sys.prefix, str(place), str(torch)
    return hashlib.sha256("\n".join([*requirements(("train", "dev"), torch), *about]).encode()).hexdigest()


def installed(wanted: str, place: Path = VENV) -> set[str]:
    """The extras that the environment holds; none where it is missing, outdated or was broken off half-way."""
    if not ((place / STAMP).exists() and (place == FOLDER or venv_python(place).exists())):
        return set()
    words = (place / STAMP).read_text(encoding="utf-8", errors="replace").split()
    return set(words[1:]) if words[:1] == [wanted] else set()


def stamp(place: Path, wanted: str, extras: Iterable[str]) -> None:
    """Note what an environment holds, whole or not at all."""
    fresh = place / (STAMP + ".new")
    fresh.write_text(" ".join([wanted, *sorted(extras)]), encoding="utf-8")
    os.replace(fresh, place / STAMP)


def train_environment() -> tuple[Path, list[Path]] | None:
    """The Python for training in hosts and what goes before its own packages, if ``--train`` has made them."""
    torch = host_torch()
    if "train" in installed(fingerprint(torch, TRAIN), TRAIN):
        return venv_python(TRAIN), []
    if "train" in installed(fingerprint(torch, FOLDER), FOLDER):
        return Path(sys.executable), [FOLDER]
    return None


def run(command: list[str], **options: Any) -> int:
    """Run to the end and return the exit code. The caller's PYTHONPATH and PYTHONHOME stay out of it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    # threads that soon stop spinning: as fast as the default when alone, and not many times slower on a busy machine
    environment = {"GOMP_SPINCOUNT": "10000", "PYTHONUTF8": "1", **environment, **options.pop("env", {})}
    process, stopped = subprocess.Popen(command, env=environment, **options), False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the child has it too, and takes its time to save
            stopped = True
    if stopped and code not in (0, STOPPED):
        raise KeyboardInterrupt
    return code


class NoVenv(SetupError):
    """This Python cannot make virtual environments."""


def make_venv(torch: str | None, venv: Path = VENV) -> None:
    """A fresh environment; with the host's packages behind its own, where its torch is to be used."""
    say(f"making {venv.name} with Python {sys.version.split()[0]}")
    if venv.exists():
        shutil.rmtree(venv)
    if run([sys.executable, "-m", "venv", str(venv)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        shutil.rmtree(venv, ignore_errors=True)
        raise NoVenv(
            f"{sys.executable} cannot make a virtual environment. On Debian and Ubuntu run: apt install python3-venv. "
            "Where Python came inside another program, use one from python.org."
        )
    if torch:  # not --system-site-packages: that would skip the packages of a host that runs in a venv itself
        code = "import sysconfig; print(ascii(sysconfig.get_path('purelib')))"
        own = subprocess.run([str(venv_python(venv)), "-c", code], capture_output=True, text=True, check=True).stdout
        # one line of code, and ASCII: lines of a .pth file that are bare paths are read in the locale's encoding
        # and addsitedir: editable installs and start-up files of the host count as they do in the host
        line = f"import site; list(map(site.addsitedir, {package_folders()!a}))\n"
        Path(ast.literal_eval(own), "zz-host.pth").write_text(line, encoding="ascii")


def pip(python: Path, limits: Path, *arguments: str) -> list[str]:
    """The command that installs; --only-binary: a missing wheel is an error at once, not a build without a compiler."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    # Python compiles what it imports, unless told not to, as in many containers: each start would then do it again.
    command += [] if sys.dont_write_bytecode else ["--no-compile"]
    command += [] if sys.stdout.isatty() else ["-qq"]  # progress bars for those who watch
    return [*command, "--only-binary=:all:", "-c", str(limits), *arguments]


def write_limits(place: Path, torch: str | None) -> Path:
    (place / "constraints.txt").write_text(constraints(torch), encoding="utf-8")
    return place / "constraints.txt"


def prepare(extras: tuple[str, ...], venv: Path = VENV) -> Path:
    """Bring the environment to hold these extras and ``dmm``; returns its Python. What it has already is kept."""
    torch = host_torch()
    wanted = fingerprint(torch, venv)
    have = installed(wanted, venv)
    if have.issuperset(extras):
        with suppress(OSError):  # environments of earlier versions lack it, and a shared one may be read-only
            write_launcher(venv)
        return venv_python(venv)
    if not have:
        make_venv(torch, venv)
    (venv / STAMP).unlink(missing_ok=True)  # so that an install that breaks off is seen as such
    note = f"using torch {torch} of this Python" if torch else "torch is the large part"
    say(f"installing {', '.join(extras)} requirements ({note})")
    if run(pip(venv_python(venv), write_limits(venv, torch), *requirements(extras, torch))):
        if have:  # pip changes nothing before it has found and fetched all
            stamp(venv, wanted, have)
        raise SetupError(FAILED, 1)
    write_launcher(venv)
    stamp(venv, wanted, have.union(extras))
    return venv_python(venv)


def prepare_training(own_torch: bool) -> None:
    """``.venv-train``, or ``.train-packages`` where that cannot be; this Python's own packages stay as they are."""
    if train_environment() is None:
        torch = host_torch()
        if torch is None:
            require_leave(own_torch)
        try:
            prepare(EXTRAS["--train"], TRAIN)
        except NoVenv:
            if torch is None:
                raise
            prepare_folder(torch)
    say("ready to train")


def require_leave(own_torch: bool) -> None:
    """Raises SetupError unless a torch may be downloaded: Linux's is gigabytes, and Windows' own has no CUDA."""
    old, least = host_packages().get("torch"), ".".join(map(str, OLDEST_TORCH))
    if own_torch:
        if sys.platform == "win32" and not {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} & set(os.environ):
            raise SetupError("pip's own torch has no CUDA on Windows. Set PIP_EXTRA_INDEX_URL as pytorch.org tells.")
        return
    what = f"this Python's torch is {old}" if old else f"{sys.executable} has no torch"
    way = (
        "Set DMM_TRAIN_PYTHON to a Python that can train, update the host's torch, or let training download gigabytes "
        f"for a torch of its own: {sys.executable} {ROOT / 'install.py'} --train --own-torch"
    )
    way = way if old else "Run this with the Python of your host, e.g. python_embeded of ComfyUI portable."
    raise SetupError(f"{what}; training needs {least} or newer. {way}")


def where() -> int:
    """Print the environment for training as JSON; exit code 3 where there is none."""
    found = train_environment()
    if found is None:
        return 3
    print(json.dumps({"python": str(found[0]), "paths": [str(path) for path in found[1]]}))
    return 0


def prepare_folder(torch: str) -> None:
    """Put into ``.train-packages`` what this Python lacks, and only that."""
    say(f"no virtual environments here: using the folder {FOLDER.name}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    limits, report, wanted = write_limits(FOLDER, torch), FOLDER / "lacking.json", requirements(("train",), torch)
    if run(pip(Path(sys.executable), limits, "--dry-run", "--report", str(report), *wanted)):
        raise SetupError(FAILED, 1)
    found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    lacking = [f"{about['name']}=={about['version']}" for about in found]
    if lacking and run(pip(Path(sys.executable), limits, "--no-deps", "--target", str(FOLDER), *lacking)):
        raise SetupError(FAILED, 1)
    stamp(FOLDER, fingerprint(torch, FOLDER), ["train"])


# ---------------------------------------------------------------- commands


def start(action: str, arguments: list[str]) -> int:
    """Prepare the environment and run the command in it; returns the command's exit code."""
    if sys.version_info < PYTHON:
        raise SetupError(f"Python {PYTHON[0]}.{PYTHON[1]} or newer is needed, this is {sys.version.split()[0]}.")
    if action == "--train":
        if arguments == ["--where"]:  # for dmm_core/environment.py
            return where()
        if arguments not in ([], ["--own-torch"]):
            raise SetupError("--train takes no argument but --own-torch.")
        prepare_training(own_torch=bool(arguments))
        return 0
    python, here = str(prepare(EXTRAS[action])), {"PYTHONPATH": str(ROOT)}
    if action == "--test" and not arguments:  # all of them: a core that has done its half helps the others
        cores = str(min(4, os.cpu_count() or 1))
        here["OMP_NUM_THREADS"], arguments = "1", ["-n", cores, "--dist", "worksteal"]
    if action == "--test":
        return run([python, "-m", "pytest", *arguments], cwd=ROOT, env=here)
    return run([python, "-c", LAUNCH, action.removeprefix("--"), *arguments], env=here)


def outside() -> str | None:
    """The Python that an environment of ours was made of, where this is that environment's own: it may be activated.

    Seen from inside, the environment is another one, which would be made anew in the place of the one that runs this.
    """
    if Path(sys.prefix).resolve() not in (VENV.resolve(), TRAIN.resolve()):
        return None
    base = getattr(sys, "_base_executable", None)
    if not base or Path(base).resolve() == Path(sys.executable):
        raise SetupError(f"this is the Python of {sys.prefix}. Run deactivate, or use another Python.")
    return str(base)


def main(arguments: list[str]) -> int:
    if not arguments:
        return 0
    if arguments[0] in EXTRAS and (base := outside()):
        return run([base, str(ROOT / "install.py"), *arguments])
    if arguments[0] in EXTRAS:
        return start(arguments[0], arguments[1:])
    if arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    raise SetupError(f"there is no option {arguments[0]}. They are --demo, --ui, --test and --train, and come first.")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        say(str(error))
        sys.exit(error.code)
    except OSError as error:
        say(f"{error.filename or ROOT}: {error.strerror or error}. Is there room on the disk, and the right to write?")
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(STOPPED)
