"""The two cores that are used, and what the kernel says of them and of processes."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

SERVER_CORE, LOAD_CORE = 0, 1
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def pinned(core: int) -> Callable[[], None]:
    """Return what a new process calls to stay on one core."""
    return partial(os.sched_setaffinity, 0, {core})


def busy_seconds() -> float:
    """Return the seconds that both cores have worked since the machine started."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name in (f"cpu{SERVER_CORE}", f"cpu{LOAD_CORE}"):
            user, nice, system, idle, wait, irq, soft, steal, *_ = map(int, values)
            ticks += user + nice + system + irq + soft + steal
    return ticks / TICKS


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants."""
    ticks = 0
    for member in family(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def memory(pid: int) -> int:
    """Return the resident bytes of a process and its descendants."""
    sizes = (Path(f"/proc/{member}/statm").read_text().split()[1] for member in family(pid))
    return sum(int(pages) * PAGE for pages in sizes)


def family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from family(int(child))
