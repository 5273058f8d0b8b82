"""Commands as people are told them: they run where they are typed, whatever a file, style or prompt is called."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig

PLAIN = {"posix": r"[\w@+=:,./-]+", "nt": r"[\w@+=:./\\-]+"}  # needs no quotes


def command(*words: object) -> str:
    """``dmm WORDS`` as a line for this machine's shell."""
    return " ".join(quoted(str(word)) for word in (*program(), *words))


def program() -> list[str]:
    """How this very ``dmm`` is called: by its name where the shell finds it, else with its path."""
    launcher = shutil.which("dmm", path=sysconfig.get_path("scripts"))  # what install.py or pip put there
    if launcher is None:
        return [sys.executable or "python", "-m", "dmm_core"]
    found = shutil.which("dmm")
    return ["dmm"] if found and os.path.samefile(found, launcher) else [launcher]


def quoted(word: str, system: str = os.name) -> str:
    """One word for the shell; double quotes where they will do, for Windows' cmd knows no others."""
    if re.fullmatch(PLAIN.get(system, PLAIN["posix"]), word):
        return word
    if system == "nt":  # as the C library reads it: backslashes before a quote count, the quote's own comes after
        return '"' + re.sub(r'(\\*)("|\Z)', lambda m: 2 * m[1] + m[2].replace('"', '\\"'), word) + '"'
    return shlex.quote(word) if re.search(r'["$`\\!\n]', word) else f'"{word}"'
