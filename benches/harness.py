# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the benchmarks of this directory have in common: the machine, processes under test, ratios, bars."""

from __future__ import annotations

import json
import os
import platform
import resource
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

ROOT: Final = Path(__file__).resolve().parent.parent
START_TIMEOUT: Final = 120.0
STOP_TIMEOUT: Final = 20.0
BUILD_TIMEOUT: Final = 900.0
CPUS: Final = sorted(os.sched_getaffinity(0))
QSD: Final = "qemu-storage-daemon"


class BenchError(Exception):
    """The benchmark can't run; the text is for the person at the terminal."""


@dataclass(frozen=True)
class Bar:
    """A measurement, what it should reach, and what it did."""

    what: str
    bar: str
    reached: str
    met: bool | None
    """None: could not be measured here."""


def binary(name: str) -> Path:
    """A program of the crate in this directory, built. Raises BenchError."""
    command = ["cargo", "build", "--locked", "--release", "--package", "vhu-bench", "--bin", name]
    try:
        subprocess.run(command, cwd=ROOT, check=True, timeout=BUILD_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"{name} can't be built: {error}") from error
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / name


def first_line(command: Sequence[str]) -> str:
    """The first line that a command prints, or "unknown"."""
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    return "unknown"


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = "unknown"
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    commit = first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    return {
        "cpu": model,
        "cpus": len(CPUS),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": f"{platform.system()} {platform.release()}",
        "virtual": first_line(["systemd-detect-virt"]),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "rustc": first_line(["rustc", "--version"]),
        "vhu_legacy": f"{first_line([sys.executable, '-m', 'vhu_legacy', '--version'])} ({commit})",
        "qemu_storage_daemon": first_line([QSD, "--version"]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def print_machine(on: dict[str, Any], console: Console, settings: str) -> None:
    console.print()
    for key, value in {**on, "settings": settings}.items():
        console.print(f"{key:>20}: {value}", highlight=False)
    console.print()


def place(pid: int, cpus: set[int]) -> None:
    """Have all threads of a process run on these CPUs."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        # one may have ended, and the kernel keeps some of its helpers where they are
        with suppress(OSError):
            os.sched_setaffinity(int(task.name), cpus)


def ready_line(process: subprocess.Popen[bytes], timeout: float = START_TIMEOUT) -> dict[str, Any] | None:
    """What `vhu-legacy serve` prints when all sockets are there. None when it doesn't in time."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], timeout)
    line = process.stdout.readline() if readable else b""
    if not line:
        return None
    ready = json.loads(line)
    assert isinstance(ready, dict)
    return ready


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT)
    if process.stdout is not None:
        process.stdout.close()


def raise_fd_limit(wanted: int) -> int:
    """Raise both limits of open files as far as allowed; processes started here inherit them. What was possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return soft
    # beyond the hard limit only root (CAP_SYS_RESOURCE) gets
    for limits in ((wanted, max(hard, wanted)), (min(hard, wanted), hard)):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            return limits[0]
    return soft


def spread(values: Iterable[float]) -> tuple[float, float, float] | None:
    """Minimum, median, maximum."""
    found = sorted(values)
    return (found[0], statistics.median(found), found[-1]) if found else None


def number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value / scale:.{digits}f}"


def spread_text(values: Iterable[float], scale: float = 1.0, digits: int = 2) -> str:
    """Minimum / median / maximum."""
    found = spread(values)
    return "-" if found is None else " / ".join(number(value, scale, digits) for value in found)


def print_bars(bars: Sequence[Bar], console: Console) -> None:
    """Met or missed: for whoever reads it, the run doesn't fail by it."""
    table = Table(title="bars")
    for title in ("measurement", "bar", "reached (min / median / max)"):
        table.add_column(title)
    table.add_column("")
    for bar in bars:
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not measured[/]"}[bar.met]
        table.add_row(bar.what, bar.bar, bar.reached, verdict)
    console.print(table)


def save(path: Path, result: dict[str, Any], bars: Sequence[Bar], console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "bars": [vars(bar) for bar in bars]}, indent=1) + "\n")
    console.print(f"all samples: {path}", highlight=False)


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)
