"""What memory this machine, or this container, has to give.

Source: jaxcache's own.
"""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """Bytes that could be taken now without swapping: of the machine, or of the container if that has less.

    Args:
      meminfo: The kernel's account of the machine.
      group: The folder of the process's control group.

    Raises:
      OSError: There is no such account.
    """
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            machine = int(value.split()[0]) * 1024
            break
    else:
        raise OSError(f"{meminfo} says nothing about MemAvailable")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or used is None:
        return machine
    return min(machine, max(limit - used + _cached(group / "memory.stat"), 0))


def _cached(stat: Path) -> int:
    """Bytes of files that a control group keeps in memory and would give up at once."""
    try:
        fields = (line.split() for line in stat.read_text().splitlines())
        return next((int(value) for name, value in fields if name == "inactive_file"), 0)
    except OSError:
        return 0


def _number(path: Path) -> int | None:
    """What stands in a file of a control group; None if there is no limit, or no such group."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
