#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Times our block member against `qemu-storage-daemon`, in one run, with the same front end.

Every back end is started once and stays. Each round visits all cells (image, way of waiting, queue depth), and in each
cell all back ends one right after the other, in an order that turns from round to round; ratios are taken within a
round, so that a machine that gets slower or faster meanwhile changes them little. benches/README.md says what the
numbers mean and what they can't say.

Nothing here passes or fails by a number. Exit status 1: something didn't run.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT: Final = Path(__file__).resolve().parent.parent
START_TIMEOUT: Final = 20.0
STOP_TIMEOUT: Final = 10.0
BUILD_TIMEOUT: Final = 900.0
SECTOR: Final = 512
BLOCK: Final = 4096
BASELINE: Final = "qsd"
OURS: Final = "ours"


class BenchError(Exception):
    """The benchmark can't run; the text is for the person at the terminal."""


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    image: str
    mode: str
    depth: int
    place: str

    def __str__(self) -> str:
        return f"{self.image} {self.mode} QD{self.depth} {self.place}"


CPUS: Final = sorted(os.sched_getaffinity(0))
PLACES: Final = ("apart", "free") if len(CPUS) > 1 else ("free",)
"""Where the two sides run: on a CPU each, or wherever the scheduler puts them."""

CELLS: Final = [
    Cell(image, mode, depth, place)
    for image in ("null", "file")
    for mode in ("eventfd", "polled")
    for depth in (1, 32)
    for place in PLACES
]


@dataclass
class BackEnd:
    """A process that serves a null image and a file image."""

    name: str
    what: str
    start: Callable[[BackEnd, Path], list[str]]
    ready: Callable[[BackEnd], dict[str, Path]]
    process: subprocess.Popen[bytes] | None = None
    sockets: dict[str, Path] = field(default_factory=dict)
    error: str | None = None
    """Why it doesn't take part."""
    directory: Path = Path()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        with suppress(OSError):
            return (self.directory / "log").read_text(errors="replace")[-2000:]
        return ""


# --- the back ends ------------------------------------------------------------------------------------------------


def make_image(path: Path, size: int) -> None:
    """Each sector is full of its own number, as `vhu-bench --verify` expects. Left in the page cache."""
    with path.open("wb") as file:
        for base in range(0, size // SECTOR, 2048):
            words = array.array("Q")
            for sector in range(base, min(base + 2048, size // SECTOR)):
                words.extend([sector] * (SECTOR // 8))
            words.tofile(file)
        file.flush()
        # dirty pages would be written back in the middle of a measurement
        os.fsync(file.fileno())
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


def ours(engine: str) -> Callable[[BackEnd, Path], list[str]]:
    def start(back_end: BackEnd, directory: Path) -> list[str]:
        config = directory / "group.toml"
        config.write_text(
            f"""
            [group]
            name = "bench-{engine}"
            workers = 1
            [[members]]
            type = "blk"
            image = "null:1GiB"
            [[members]]
            type = "blk"
            image = "disk.raw"
            """
        )
        command = [sys.executable, "-m", "vhu_legacy", "serve", str(config), "--run-dir", str(directory / "run")]
        return [*command, "--engine", engine]

    return start


def ours_ready(back_end: BackEnd) -> dict[str, Path]:
    assert back_end.process is not None
    assert back_end.process.stdout is not None
    readable, _, _ = select.select([back_end.process.stdout], [], [], START_TIMEOUT)
    line = back_end.process.stdout.readline() if readable else b""
    if not line:
        raise BenchError(f"{back_end.name} isn't ready: {back_end.log()}")
    members = json.loads(line)["members"]
    return {image: Path(member["vhost_user"]) for image, member in zip(("null", "file"), members, strict=True)}


def qsd_aio(qsd: str, directory: Path) -> str:
    """ "io_uring" when this qemu-storage-daemon can do it here, else "threads"."""
    probe = directory / "probe.raw"
    probe.write_bytes(bytes(BLOCK))
    command = [qsd, "--blockdev", f"driver=file,node-name=probe,filename={probe},aio=io_uring", "--pidfile"]
    # it runs until it is told to end; an option it doesn't know ends it at once
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, str(directory / "probe.pid")], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while process.poll() is None and time.monotonic() < deadline:
                if (directory / "probe.pid").exists():
                    return "io_uring"
                time.sleep(0.02)
        finally:
            end(process)
    return "threads"


def qsd(program: str, aio: str, iothread: str) -> Callable[[BackEnd, Path], list[str]]:
    def start(back_end: BackEnd, directory: Path) -> list[str]:
        export = "type=vhost-user-blk,iothread=io,writable=on,addr.type=unix"
        return [
            program,
            *("--object", f"iothread,id=io{iothread}"),
            # zeroes are written to the guest's buffers, as by our null image
            *("--blockdev", "driver=null-co,node-name=null,size=1073741824,read-zeroes=on"),
            *("--export", f"{export},id=export-null,node-name=null,addr.path={directory}/null.sock"),
            *("--blockdev", f"driver=file,node-name=disk,filename={directory}/disk.raw,aio={aio}"),
            *("--blockdev", "driver=raw,node-name=file,file=disk"),
            *("--export", f"{export},id=export-file,node-name=file,addr.path={directory}/file.sock"),
            *("--pidfile", str(directory / "pid")),
        ]

    return start


def qsd_ready(back_end: BackEnd) -> dict[str, Path]:
    # written when everything is set up
    assert back_end.process is not None
    deadline = time.monotonic() + START_TIMEOUT
    while not (back_end.directory / "pid").exists():
        if back_end.process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"{back_end.name} isn't ready: {back_end.log()}")
        time.sleep(0.02)
    return {image: back_end.directory / f"{image}.sock" for image in ("null", "file")}


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


@contextmanager
def running(back_end: BackEnd, directory: Path, size: int) -> Iterator[None]:
    back_end.directory = directory
    directory.mkdir()
    make_image(directory / "disk.raw", size)
    command = back_end.start(back_end, directory)
    with (directory / "log").open("wb") as log:
        back_end.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
    try:
        try:
            back_end.sockets = back_end.ready(back_end)
        except (BenchError, OSError, ValueError, KeyError) as error:
            back_end.error = str(error).strip()
        yield
    finally:
        end(back_end.process)


# --- measuring ----------------------------------------------------------------------------------------------------


def build() -> Path:
    """The front end, up to date."""
    command = ["cargo", "build", "--release", "--quiet", "--package", "vhu-bench"]
    try:
        subprocess.run(command, cwd=ROOT, check=True, timeout=BUILD_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"vhu-bench can't be built: {error}") from error
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "vhu-bench"


def place(pid: int, cpus: set[int]) -> None:
    """Have all threads of a back end run on these CPUs."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        # one may have ended, and the kernel keeps some of its helpers where they are
        with suppress(OSError):
            os.sched_setaffinity(int(task.name), cpus)


def measure(front_end: Path, back_end: BackEnd, cell: Cell, seconds: float, *options: str) -> dict[str, Any]:
    """One measurement. Raises BenchError."""
    apart = cell.place == "apart"
    place(back_end.pid, {CPUS[0]} if apart else set(CPUS))
    # the one that is started inherits it
    os.sched_setaffinity(0, {CPUS[1]} if apart else set(CPUS))
    try:
        return measure_here(front_end, back_end, cell, seconds, *options)
    finally:
        os.sched_setaffinity(0, set(CPUS))


def measure_here(front_end: Path, back_end: BackEnd, cell: Cell, seconds: float, *options: str) -> dict[str, Any]:
    command = [str(front_end), "--socket", str(back_end.sockets[cell.image]), "--pid", str(back_end.pid)]
    command += ["--mode", cell.mode, "--depth", str(cell.depth), "--seconds", str(seconds), *options]
    # the stock daemon of vhost-user-backend needs a moment between two front ends
    deadline = time.monotonic() + 3
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{back_end.name}, {cell}: no end after {seconds + 30:.0f} s") from None
        if done.returncode == 0:
            result = json.loads(done.stdout)
            assert isinstance(result, dict)
            return result
        if time.monotonic() > deadline or "refused" not in done.stderr.lower():
            raise BenchError(f"{back_end.name}, {cell}: {done.stderr.strip()} {back_end.log()}")
        time.sleep(0.1)


Samples = dict[tuple[str, Cell], list[dict[str, Any] | None]]


def check(front_end: Path, back_ends: list[BackEnd], console: Console) -> None:
    """Every back end gives right data; one that doesn't takes no part."""
    for back_end in back_ends:
        if back_end.error is None:
            try:
                for mode in ("eventfd", "polled"):
                    measure(front_end, back_end, Cell("file", mode, 8, "free"), 0.1, "--verify", "--warmup", "0")
            except BenchError as error:
                back_end.error = str(error).strip()
        if back_end.error is not None:
            console.print(f"[red]{back_end.name} takes no part:[/] {back_end.error}", highlight=False)


def measure_all(
    front_end: Path,
    back_ends: list[BackEnd],
    cells: list[Cell],
    rounds: int,
    seconds: float,
    console: Console,
) -> Samples:
    samples: Samples = {(back_end.name, cell): [] for back_end in back_ends for cell in cells}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=rounds * len(cells) * len(back_ends))
        for number in range(rounds):
            for cell in cells:
                order = back_ends[number % len(back_ends) :] + back_ends[: number % len(back_ends)]
                if number % 2:
                    order.reverse()
                for back_end in order:
                    progress.update(task, description=f"round {number + 1}: {cell}, {back_end.name}")
                    result = None
                    if back_end.error is None:
                        try:
                            result = measure(front_end, back_end, cell, seconds)
                        except BenchError as error:
                            back_end.error = str(error).strip()
                            console.print(f"[red]{error}[/]", highlight=False)
                    samples[back_end.name, cell].append(result)
                    progress.advance(task)
    return samples


# --- the report ---------------------------------------------------------------------------------------------------


def ratios(samples: Samples, name: str, cell: Cell) -> list[float]:
    """Requests per second of a back end, in those of the base line in the same round."""
    pairs = zip(samples[name, cell], samples[BASELINE, cell], strict=True)
    return [one["iops"] / base["iops"] for one, base in pairs if one and base and base["iops"]]


def median(samples: Samples, name: str, cell: Cell, pick: Callable[[dict[str, Any]], float | None]) -> float | None:
    values = [value for one in samples[name, cell] if one is not None and (value := pick(one)) is not None]
    return statistics.median(values) if values else None


def number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value / scale:.{digits}f}"


def ratio_columns(values: list[float]) -> list[str]:
    if not values:
        return ["-", "-", "-"]
    middle = statistics.median(values)
    colour = "green" if middle >= 1 else "yellow" if middle >= 0.8 else "red"
    return [f"{min(values):.2f}", f"[bold {colour}]{middle:.2f}[/]", f"{max(values):.2f}"]


def report(samples: Samples, back_ends: list[BackEnd], cells: list[Cell], console: Console) -> None:
    names = [back_end.name for back_end in back_ends]
    for name in names:
        if name == BASELINE or BASELINE not in names:
            continue
        table = Table(title=f"{name} / {BASELINE}: requests per second, 4 KiB random reads")
        table.add_column("cell")
        for title in ("min", "median", "max"):
            table.add_column(title, justify="right")
        for title in (f"{name} kIOPS", f"{BASELINE} kIOPS"):
            table.add_column(title, justify="right")
        for cell in cells:
            iops = [number(median(samples, who, cell, lambda one: one["iops"]), 1e3) for who in (name, BASELINE)]
            table.add_row(str(cell), *ratio_columns(ratios(samples, name, cell)), *iops)
        console.print(table)

    table = Table(title="medians of the rounds")
    table.add_column("cell", no_wrap=True)
    table.add_column("back end", no_wrap=True)
    for title in ("kIOPS", "median us", "p99 us", "CPU s/M", "kicks/req", "calls/req"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        for name in names:
            latency = [
                median(samples, name, cell, lambda one, key=key: one["latency_ns"][key])  # type: ignore[misc]
                for key in ("median", "p99")
            ]
            per = [
                median(samples, name, cell, lambda one, key=key: one[key] / one["requests"])  # type: ignore[misc]
                for key in ("kicks", "calls")
            ]
            table.add_row(
                str(cell) if name == names[0] else "",
                name,
                number(median(samples, name, cell, lambda one: one["iops"]), 1e3),
                *(number(value, 1e3) for value in latency),
                number(median(samples, name, cell, lambda one: one["cpu_seconds_per_million"]), 1, 2),
                *(number(value, 1, 3) for value in per),
            )
        table.add_section()
    console.print(table)


def machine(program: str, aio: str, directory: Path) -> dict[str, Any]:
    """What the numbers were taken on."""

    def first_line(command: list[str]) -> str:
        with suppress(OSError, subprocess.SubprocessError, IndexError):
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
        return "unknown"

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
        "file_system": first_line(["stat", "-f", "-c", "%T", str(directory)]),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "rustc": first_line(["rustc", "--version"]),
        "vhu_legacy": f"{first_line([sys.executable, '-m', 'vhu_legacy', '--version'])} ({commit})",
        "qemu_storage_daemon": f"{first_line([program, '--version'])}, aio={aio}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def contenders(program: str, aio: str) -> list[BackEnd]:
    return [
        BackEnd(OURS, "vhu-legacy serve, one worker", ours("native"), ours_ready),
        BackEnd(BASELINE, f"qemu-storage-daemon, one iothread, aio={aio}", qsd(program, aio, ""), qsd_ready),
        BackEnd(
            "qsd-nopoll",
            "the same with poll-max-ns=0: its iothread sleeps as our worker does",
            qsd(program, aio, ",poll-max-ns=0"),
            qsd_ready,
        ),
        BackEnd(
            "rust-vmm",
            "vhu-legacy serve --engine rust-vmm: our device in the stock daemon",
            ours("rust-vmm"),
            ours_ready,
        ),
    ]


NAMES: Final = (OURS, BASELINE, "rust-vmm", "qsd-nopoll")
DEFAULT: Final = NAMES[:3]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.3 s: shows that it works, no more")
    parser.add_argument("--rounds", type=int, help="rounds (5)")
    parser.add_argument("--seconds", type=float, help="seconds of a measurement (0.7)")
    parser.add_argument(
        "--only", default="", help='cells to measure: those with all these words, as in "null QD1 apart"'
    )
    parser.add_argument(
        "--back-ends", default=",".join(DEFAULT), help=f"some of {', '.join(NAMES)}; without it all but the last"
    )
    parser.add_argument("--size", type=int, default=128, help="MiB of the file image (128)")
    parser.add_argument("--directory", type=Path, help="where the file images go (a temporary directory)")
    parser.add_argument("--json", type=Path, default=ROOT / "target" / "bench.json", help="results (target/bench.json)")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.3 if options.quick else 0.7)
    if not 1 <= options.rounds <= 1000 or not 0.01 <= options.seconds <= 600 or options.size < 1:
        parser.error("--rounds is 1 to 1000, --seconds 0.01 to 600, --size at least 1")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        raise BenchError("qemu-storage-daemon isn't installed; it is what we measure against")
    cells = [cell for cell in CELLS if all(word in str(cell).split() for word in options.only.split())]
    if not cells:
        raise BenchError(f"--only {options.only!r} leaves nothing; cells: {', '.join(map(str, CELLS))}")
    wanted = options.back_ends.split(",")
    unknown = set(wanted) - set(NAMES)
    if unknown:
        raise BenchError(f"--back-ends {', '.join(sorted(unknown))}: unknown; allowed: {', '.join(NAMES)}")
    front_end = build()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhu-bench-", dir=options.directory)))
        aio = qsd_aio(program, directory)
        on = machine(program, aio, directory)
        back_ends = [back_end for back_end in contenders(program, aio) if back_end.name in wanted]
        for back_end in back_ends:
            console.print(f"starting {back_end.name}: {back_end.what}", highlight=False)
            stack.enter_context(running(back_end, directory / back_end.name, options.size << 20))
        check(front_end, back_ends, console)
        samples = measure_all(front_end, back_ends, cells, options.rounds, options.seconds, console)
    console.print()
    for key, value in on.items():
        console.print(f"{key:>20}: {value}", highlight=False)
    settings = f"{options.rounds} rounds of {options.seconds} s, files of {options.size} MiB in the page cache"
    console.print(f"{'settings':>20}: {settings}\n", highlight=False)
    report(samples, back_ends, cells, console)
    save(options.json, on, options, samples, back_ends, cells)
    console.print(f"all samples: {options.json}", highlight=False)
    return 1 if any(back_end.error for back_end in back_ends) else 0


def save(
    path: Path,
    on: dict[str, Any],
    options: argparse.Namespace,
    samples: Samples,
    back_ends: list[BackEnd],
    cells: list[Cell],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": on,
        "settings": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "size_mib": options.size,
        },
        "back_ends": {back_end.name: {"what": back_end.what, "error": back_end.error} for back_end in back_ends},
        "cells": [
            {
                "image": cell.image,
                "mode": cell.mode,
                "depth": cell.depth,
                "place": cell.place,
                "ratios": {one.name: ratios(samples, one.name, cell) for one in back_ends}
                if any(one.name == BASELINE for one in back_ends)
                else {},
                "samples": {one.name: samples[one.name, cell] for one in back_ends},
            }
            for cell in cells
        ],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        return run(arguments(), console)
    except BenchError as error:
        console.print(f"[red]bench:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
