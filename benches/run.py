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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import harness
from harness import CPUS, ROOT, Bar, BenchError, end, number, place, print_bars, print_machine, spread, spread_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

START_TIMEOUT: Final = 20.0
SECTOR: Final = 512
BLOCK: Final = 4096
BASELINE: Final = "qsd"
OURS: Final = "ours"


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    image: str
    mode: str
    depth: int
    place: str
    op: str = "read"

    def __str__(self) -> str:
        return f"{self.image} {self.op} {self.mode} QD{self.depth} {self.place}"


PLACES: Final = ("apart", "free") if len(CPUS) > 1 else ("free",)
"""Where the two sides run: on a CPU each, or wherever the scheduler puts them."""
MODES: Final = ("eventfd", "polled")

CELLS: Final = [
    *(
        Cell(image, mode, depth, place)
        for image in ("null", "file")
        for mode in MODES
        for depth in (1, 32)
        for place in PLACES
    ),
    *(Cell(image, mode, 32, place, "write") for image in ("tmpfs", "file") for mode in MODES for place in PLACES),
]
IMAGES: Final = ("null", "file", "tmpfs")
TMPFS: Final = Path("/dev/shm")
"""Writes to a disk's file system are written back in the middle of a measurement; here they stay in the page cache."""

DEPTHS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
SWEEP: Final = [Cell(image, "eventfd", depth, PLACES[0]) for image in ("null", "file") for depth in DEPTHS]
"""For the plot."""


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
            [[members]]
            type = "blk"
            image = "tmpfs.raw"
            """
        )
        command = [sys.executable, "-m", "vhu_legacy", "serve", str(config), "--run-dir", str(directory / "run")]
        return [*command, "--engine", engine]

    return start


def ours_ready(back_end: BackEnd) -> dict[str, Path]:
    assert back_end.process is not None
    ready = harness.ready_line(back_end.process, START_TIMEOUT)
    if ready is None:
        raise BenchError(f"{back_end.name} isn't ready: {back_end.log()}")
    members = ready["members"]
    return {image: Path(member["vhost_user"]) for image, member in zip(IMAGES, members, strict=True)}


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
            *("--blockdev", f"driver=file,node-name=memory,filename={directory}/tmpfs.raw,aio={aio}"),
            *("--blockdev", "driver=raw,node-name=tmpfs,file=memory"),
            *("--export", f"{export},id=export-tmpfs,node-name=tmpfs,addr.path={directory}/tmpfs.sock"),
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
    return {image: back_end.directory / f"{image}.sock" for image in IMAGES}


@contextmanager
def running(back_end: BackEnd, directory: Path, in_memory: Path, size: int) -> Iterator[None]:
    back_end.directory = directory
    directory.mkdir()
    make_image(directory / "disk.raw", size)
    make_image(in_memory / f"{back_end.name}.raw", size)
    (directory / "tmpfs.raw").symlink_to(in_memory / f"{back_end.name}.raw")
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
    command += ["--mode", cell.mode, "--op", cell.op, "--depth", str(cell.depth), "--seconds", str(seconds), *options]
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


Sample = dict[str, Any]
Samples = dict[tuple[str, Cell], list[Sample | None]]


def check(front_end: Path, back_ends: list[BackEnd], console: Console) -> None:
    """Every back end gives right data; one that doesn't takes no part."""
    for back_end in back_ends:
        if back_end.error is None:
            try:
                for mode in MODES:
                    measure(front_end, back_end, Cell("file", mode, 8, "free"), 0.1, "--verify", "--warmup", "0")
            except BenchError as error:
                back_end.error = str(error).strip()
        if back_end.error is not None:
            console.print(f"[red]{back_end.name} takes no part:[/] {back_end.error}", highlight=False)


def measure_all(
    front_end: Path,
    plan: dict[Cell, list[BackEnd]],
    rounds: int,
    seconds: float,
    console: Console,
) -> Samples:
    """Each cell with its back ends, all of them in each round."""
    samples: Samples = {(back_end.name, cell): [] for cell, back_ends in plan.items() for back_end in back_ends}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=rounds * len(samples))
        for number in range(rounds):
            for cell, back_ends in plan.items():
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


def iops(one: Sample) -> float | None:
    return float(one["iops"])


def latency(one: Sample) -> float | None:
    return float(one["latency_ns"]["median"])


def cpu(one: Sample) -> float | None:
    """CPU seconds for a million requests."""
    value = one["cpu_seconds_per_million"]
    return None if value is None else float(value)


Pick = Callable[[Sample], float | None]


def ratios(samples: Samples, name: str, cell: Cell, pick: Pick = iops) -> list[float]:
    """A back end's number over that of the base line in the same round."""
    pairs = zip(samples.get((name, cell), []), samples.get((BASELINE, cell), []), strict=False)
    found = [(pick(one), pick(base)) for one, base in pairs if one and base]
    return [one / base for one, base in found if one is not None and base]


def median(samples: Samples, name: str, cell: Cell, pick: Pick) -> float | None:
    found = [pick(one) for one in samples.get((name, cell), []) if one is not None]
    values = [value for value in found if value is not None]
    return statistics.median(values) if values else None


def ratio_text(values: list[float], *, less: bool = False) -> str:
    """Minimum / median / maximum, the median coloured by whether it is good."""
    found = spread(values)
    if found is None:
        return "-"
    low, middle, high = found
    good = 1 / middle if less and middle else middle
    colour = "green" if good >= 1 else "yellow" if good >= 0.8 else "red"
    return f"{low:.2f} / [bold {colour}]{middle:.2f}[/] / {high:.2f}"


def report(samples: Samples, names: Sequence[str], cells: Sequence[Cell], console: Console) -> None:
    for name in names:
        if name == BASELINE or BASELINE not in names:
            continue
        table = Table(title=f"{name} / {BASELINE}, 4 KiB at random places: ratios (min / median / max)")
        table.add_column("cell", no_wrap=True)
        for title in ("requests per second", "CPU s/M", "median latency at QD1"):
            table.add_column(title, justify="right", no_wrap=True)
        for cell in cells:
            if (name, cell) in samples:
                table.add_row(
                    str(cell),
                    ratio_text(ratios(samples, name, cell)),
                    ratio_text(ratios(samples, name, cell, cpu), less=True),
                    ratio_text(ratios(samples, name, cell, latency), less=True) if cell.depth == 1 else "",
                )
        console.print(table)

    table = Table(title="medians of the rounds")
    table.add_column("cell", no_wrap=True)
    table.add_column("back end", no_wrap=True)
    for title in ("kIOPS", "median us", "p99 us", "CPU s/M", "kicks/req", "calls/req"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        for at, name in enumerate(name for name in names if (name, cell) in samples):
            per = [
                median(samples, name, cell, lambda one, key=key: one[key] / one["requests"])  # type: ignore[misc]
                for key in ("kicks", "calls")
            ]
            table.add_row(
                str(cell) if at == 0 else "",
                name,
                number(median(samples, name, cell, iops), 1e3),
                number(median(samples, name, cell, latency), 1e3),
                number(median(samples, name, cell, lambda one: one["latency_ns"]["p99"]), 1e3),
                number(median(samples, name, cell, cpu), 1, 2),
                *(number(value, 1, 3) for value in per),
            )
        table.add_section()
    console.print(table)


def bars(samples: Samples, cells: Sequence[Cell]) -> list[Bar]:
    """What should be reached against the base line, cell by cell."""
    found: list[Bar] = []

    def add(what: str, cell: Cell, pick: Pick, limit: float, *, less: bool) -> None:
        values = ratios(samples, OURS, cell, pick)
        middle = spread(values)
        met = None if middle is None else middle[1] <= limit if less else middle[1] >= limit
        sign = "<=" if less else ">="
        found.append(Bar(f"{cell}: {what}", f"{sign} {limit} x {BASELINE}", spread_text(values), met))

    for cell in cells:
        if cell.depth == 1 and cell.image == "null":
            add("round trip", cell, latency, 0.8, less=True)
        elif cell.depth == 32:
            add("requests per second", cell, iops, 1.5 if cell.image == "null" else 1.3, less=False)
    for cell in cells:
        if cell.depth == 32:
            add("CPU per request", cell, cpu, 0.7, less=True)
    return found


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
    parser.add_argument("--quick", action="store_true", help="1 round of 0.1 s: shows that it works, no more")
    parser.add_argument("--rounds", type=int, help="rounds (5)")
    parser.add_argument("--seconds", type=float, help="seconds of a measurement (0.7)")
    parser.add_argument(
        "--only", default="", help='cells to measure: those with all these words, as in "null QD1 apart"'
    )
    parser.add_argument("--no-sweep", action="store_true", help="without the cells for the plot over queue depth")
    parser.add_argument(
        "--back-ends",
        help=f"some of {', '.join(NAMES)}; without it all but the last, and the third only on CPUs of its own",
    )
    parser.add_argument("--size", type=int, default=128, help="MiB of the file image (128)")
    parser.add_argument("--directory", type=Path, help="where the file images go (a temporary directory)")
    parser.add_argument("--json", type=Path, default=ROOT / "target" / "bench.json", help="results (target/bench.json)")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (0.1 if options.quick else 0.7)
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
    wanted = DEFAULT if options.back_ends is None else options.back_ends.split(",")
    unknown = set(wanted) - set(NAMES)
    if unknown:
        raise BenchError(f"--back-ends {', '.join(sorted(unknown))}: unknown; allowed: {', '.join(NAMES)}")
    sweep = [] if options.no_sweep or options.only else [cell for cell in SWEEP if cell not in cells]
    front_end = harness.binary("vhu-bench")
    on = harness.machine()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhu-bench-", dir=options.directory)))
        in_memory = directory
        if harness.first_line(["stat", "-f", "-c", "%T", str(TMPFS)]) == "tmpfs":
            in_memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhu-bench-", dir=TMPFS)))
        else:
            console.print(f"[yellow]{TMPFS} is no tmpfs: those cells are the same as those with a file[/]")
        aio = qsd_aio(program, directory)
        on["file_system"] = harness.first_line(["stat", "-f", "-c", "%T", str(directory)])
        on["qemu_storage_daemon"] += f", aio={aio}"
        back_ends = [back_end for back_end in contenders(program, aio) if back_end.name in wanted]
        for back_end in back_ends:
            console.print(f"starting {back_end.name}: {back_end.what}", highlight=False)
            stack.enter_context(running(back_end, directory / back_end.name, in_memory, options.size << 20))
        check(front_end, back_ends, console)
        plan = {cell: [one for one in back_ends if takes_part(one.name, cell, options)] for cell in cells}
        plan |= {cell: [one for one in back_ends if one.name in (OURS, BASELINE)] for cell in sweep}
        plan = {cell: some for cell, some in plan.items() if some}
        samples = measure_all(front_end, plan, options.rounds, options.seconds, console)
    settings = f"{options.rounds} rounds of {options.seconds} s, files of {options.size} MiB in the page cache"
    print_machine(on, console, settings)
    names = [back_end.name for back_end in back_ends]
    report(samples, names, cells, console)
    reached = bars(samples, cells)
    print_bars(reached, console)
    result = {
        "machine": on,
        "settings": {"rounds": options.rounds, "seconds": options.seconds, "size_mib": options.size},
        "back_ends": {back_end.name: {"what": back_end.what, "error": back_end.error} for back_end in back_ends},
        "cells": [as_dict(samples, names, cell) for cell in plan],
        "sweep": [as_dict(samples, names, cell) for cell in SWEEP if cell in plan],
    }
    harness.save(options.json, result, reached, console)
    return 1 if any(back_end.error for back_end in back_ends) else 0


def takes_part(name: str, cell: Cell, options: argparse.Namespace) -> bool:
    """The engine that is there for comparison doesn't get everything, unless it was asked for by name."""
    return name != "rust-vmm" or options.back_ends is not None or cell.place == PLACES[0]


def as_dict(samples: Samples, names: Sequence[str], cell: Cell) -> dict[str, Any]:
    part = [name for name in names if (name, cell) in samples]
    return {
        **vars(cell),
        "ratios": {name: ratios(samples, name, cell) for name in part},
        "cpu_ratios": {name: ratios(samples, name, cell, cpu) for name in part},
        "latency_ratios": {name: ratios(samples, name, cell, latency) for name in part},
        "samples": {name: samples[name, cell] for name in part},
    }


def main() -> int:
    console = harness.console()
    try:
        return run(arguments(), console)
    except BenchError as error:
        console.print(f"[red]bench:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
