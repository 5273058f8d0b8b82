"""How much memory there is and how much this process has had, on every system, without a further package."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path


def available_ram() -> int | None:
    """Bytes that programs could still get, a container's limit included; None where that cannot be found out."""
    found = []
    if sys.platform == "win32":
        found = [_windows_memory()[1]]
    elif (about := _proc("/proc/meminfo")) and "MemAvailable" in about:
        found = [about["MemAvailable"]]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # a Mac: half of what it has
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        found.append(max(0, limit - used))
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def resident_bytes() -> int | None:
    """This process's memory now (RSS, working set); None where that cannot be found out."""
    if sys.platform == "win32":
        return _windows_process()[0]
    return _proc("/proc/self/status").get("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most memory that this process ever had."""
    if sys.platform == "win32":
        return _windows_process()[1]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _proc(path: str) -> dict[str, int]:
    """``Name:  123 kB`` lines in bytes."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}


def _windows_memory() -> tuple[int, int]:
    """Physical memory: all of it, and what is free."""

    class Status(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (f"field{i}", ctypes.c_uint64) for i in range(7)
        ]

    status = Status(size=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.field0, status.field1


def _windows_process() -> tuple[int, int]:
    """Working set of this process: now, and its peak."""

    class Counters(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint32), ("faults", ctypes.c_uint32)] + [
            (f"field{i}", ctypes.c_size_t) for i in range(8)
        ]

    counters = Counters(size=ctypes.sizeof(Counters))
    process = ctypes.c_void_p(-1)  # this process
    ctypes.windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)  # type: ignore[attr-defined]
    return counters.field1, counters.field0
