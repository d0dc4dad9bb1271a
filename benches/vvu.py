#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a virtio-vhost-user device adds: to a notification, and to the requests of a master.

First, notifications through the device on both carriers against bare eventfds. Then a vhost-user-blk front end through
the device and a scripted backend VM to a `qemu-storage-daemon`, against the same daemon addressed directly.
benches/README.md says what the numbers mean and what they can't say.

Nothing here passes or fails by a number. Exit status 1: something didn't run.
"""

from __future__ import annotations

import argparse
import json
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import harness
from harness import CPUS, ROOT, Bar, BenchError, end, place, print_bars, print_machine, spread, spread_text
from rich.console import Console
from rich.table import Table
from run import TMPFS, BackEnd, Cell, make_image, measure, qsd_aio

DEVICE: Final = "timed"
"""Of the notifications."""
IMAGES: Final = ("null", "tmpfs")
PLACES: Final = ("apart", "free") if len(CPUS) > 1 else ("free",)
WAY_PLACES: Final = (*PLACES[:-1], "together", "free")
"""For notifications also everything on one CPU: there is no CPU to be woken, so it shows what the way itself costs."""
CARRIERS: Final = ("vhost-user", "vfio-user")
CELLS: Final = [Cell(image, "eventfd", depth, place) for image in IMAGES for depth in (1, 32) for place in PLACES]
THROUGH: Final = "through"
DIRECT: Final = "direct"
FLOOR_BAR: Final = 2.0
START_TIMEOUT: Final = 20.0


def middle(values: Iterable[float], scale: float, digits: int = 1) -> str:
    found = spread(values)
    return harness.number(None if found is None else found[1], scale, digits)


# --- the processes ------------------------------------------------------------------------------------------------


def group_command(directory: Path) -> list[str]:
    """A group with one device to time notifications on, and one for each image."""
    devices = f'[[vhost_user_devices]]\nname = "{DEVICE}"\nmax_queues = 1\nvfio_user = true\n'
    devices += "".join(f'[[vhost_user_devices]]\nname = "{image}"\nmax_queues = 1\n' for image in IMAGES)
    config = directory / "group.toml"
    config.write_text(f'[group]\nname = "bench-vvu"\nworkers = 1\n{devices}')
    return [sys.executable, "-m", "vhu_legacy", "serve", str(config), "--run-dir", str(directory / "run")]


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, cwd=ROOT)
    try:
        yield process
    finally:
        end(process)


def said(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip()


def daemon_command(program: str, aio: str, poll_max_ns: int, directory: Path) -> list[str]:
    """One process, one iothread; each image behind two exports, since an export has one front end."""
    command = [program, "--object", f"iothread,id=io,poll-max-ns={poll_max_ns}"]
    command += ["--blockdev", "driver=null-co,node-name=null,size=1073741824,read-zeroes=on"]
    command += ["--blockdev", f"driver=file,node-name=memory,filename={directory}/tmpfs.raw,aio={aio},read-only=on"]
    command += ["--blockdev", "driver=raw,node-name=tmpfs,file=memory,read-only=on"]
    for image in IMAGES:
        for way in (DIRECT, THROUGH):
            export = f"type=vhost-user-blk,id={way}-{image},node-name={image},iothread=io,writable=off"
            command += ["--export", f"{export},addr.type=unix,addr.path={directory}/{way}-{image}.sock"]
    return [*command, "--pidfile", str(directory / "pid")]


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"qemu-storage-daemon isn't ready: {said(log)}")
        time.sleep(0.02)


def wait_for_line(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
    if not readable or not process.stdout.readline():
        raise BenchError(f"the backend VM doesn't come up: {said(log)}")


# --- notifications ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A kind of notification."""

    carrier: str
    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.carrier} {self.name}, {self.place}"


def latencies(
    program: Path, group: subprocess.Popen[bytes], sockets: dict[str, str], options: argparse.Namespace
) -> dict[Way, list[dict[str, Any]]]:
    """Rounds of all ways. Raises BenchError."""
    found: dict[Way, list[dict[str, Any]]] = {}
    for where in WAY_PLACES:
        place(group.pid, set(CPUS) if where == "free" else {CPUS[0]})
        for carrier in CARRIERS:
            command = [str(program), "latency", "--carrier", carrier, "--front", sockets["front"]]
            command += ["--device", sockets[carrier.replace("-", "_")]]
            command += ["--rounds", str(options.rounds), "--count", str(options.count)]
            if where != "free":
                command += ["--cpus", f"{CPUS[1] if where == 'apart' else CPUS[0]},{CPUS[0]}"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            except subprocess.TimeoutExpired:
                raise BenchError(f"{carrier}, {where}: no end") from None
            if done.returncode != 0:
                raise BenchError(f"{carrier}, {where}: {done.stderr.strip()}")
            for way in json.loads(done.stdout)["ways"]:
                found[Way(carrier, way["way"], where)] = way["rounds"]
    place(group.pid, set(CPUS))
    return found


def latency_ratios(rounds: list[dict[str, Any]], which: str) -> list[float]:
    return [one["ours"][which] / one["floor"][which] for one in rounds if one["floor"][which]]


def report_latencies(found: dict[Way, list[dict[str, Any]]], console: Console) -> list[Bar]:
    table = Table(title="notifications: microseconds (medians of the rounds), and ratios (min / median / max)")
    table.add_column("way", no_wrap=True)
    for title in ("us", "floor", "ours / floor", "p99 us", "floor", "ours / floor"):
        table.add_column(title, justify="right", no_wrap=True)
    bars = []
    for way, rounds in found.items():
        cells = []
        for which in ("median_ns", "p99_ns"):
            cells += [middle((one[side][which] for one in rounds), 1e3) for side in ("ours", "floor")]
            cells.append(spread_text(latency_ratios(rounds, which)))
        table.add_row(str(way), *cells)
        if way.place == "free":
            # the ratio would be that of two placements: no bar
            continue
        reached = spread(latency_ratios(rounds, "median_ns"))
        met = None if reached is None else reached[1] <= FLOOR_BAR
        text = spread_text(latency_ratios(rounds, "median_ns"))
        bars.append(Bar(f"notification, {way}", f"<= {FLOOR_BAR:g} x floor", text, met))
    console.print(table)
    return bars


# --- requests -----------------------------------------------------------------------------------------------------


Samples = dict[tuple[str, Cell], list[dict[str, Any]]]


def requests(program: Path, sides: list[BackEnd], others: list[int], options: argparse.Namespace) -> Samples:
    """Requests directly and through the device, in turns. Raises BenchError."""
    samples: Samples = {(side.name, cell): [] for side in sides for cell in CELLS}
    for side in sides:
        measure(program, side, Cell("tmpfs", "eventfd", 8, "free"), 0.1, "--verify", "--warmup", "0")
    for number in range(options.rounds):
        for cell in CELLS:
            for pid in others:
                # `measure` places the side's own process, and the front end
                place(pid, {CPUS[0]} if cell.place == "apart" else set(CPUS))
            for side in sides if number % 2 == 0 else reversed(sides):
                samples[side.name, cell].append(measure(program, side, cell, options.seconds, "--no-inflight"))
    return samples


def request_ratios(samples: Samples, cell: Cell, pick: str) -> list[float]:
    def value(one: dict[str, Any]) -> float:
        return float(one["iops"] if pick == "iops" else one["latency_ns"]["median"])

    pairs = zip(samples[THROUGH, cell], samples[DIRECT, cell], strict=True)
    return [value(ours) / value(peer) for ours, peer in pairs if value(peer)]


def report_requests(samples: Samples, console: Console) -> None:
    table = Table(
        title="4 KiB reads at random places, through the device / directly: ratios (min / median / max), medians"
    )
    table.add_column("cell", no_wrap=True)
    for title in ("requests per second", "latency", "kIOPS", "direct", "us", "direct", "CPU s/M", "bells/req"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in CELLS:
        pair = (samples[THROUGH, cell], samples[DIRECT, cell])
        table.add_row(
            f"{cell.image} QD{cell.depth} {cell.place}",
            spread_text(request_ratios(samples, cell, "iops")),
            spread_text(request_ratios(samples, cell, "latency")),
            *(middle((one["iops"] for one in side), 1e3) for side in pair),
            *(middle((one["latency_ns"]["median"] for one in side), 1e3) for side in pair),
            middle((one["cpu_seconds_per_million"] or 0.0 for one in pair[0]), 1, 2),
            middle(((one["kicks"] + one["calls"]) / max(1, one["requests"]) for one in pair[0]), 1, 2),
        )
    console.print(table)


# --- all of it ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round: shows that it works, no more")
    parser.add_argument("--rounds", type=int, help="rounds (5)")
    parser.add_argument("--count", type=int, help="notifications of a sample (5000)")
    parser.add_argument("--seconds", type=float, help="seconds of a measurement of requests (0.5)")
    parser.add_argument("--only", choices=("notifications", "requests"), help="one half of it")
    parser.add_argument("--size", type=int, default=128, help="MiB of the image in tmpfs (128)")
    parser.add_argument("--poll-max-ns", type=int, default=32768, help="of the daemon's iothread (32768, its default)")
    parser.add_argument("--json", type=Path, default=ROOT / "target" / "bench-vvu.json")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.count = options.count or (500 if options.quick else 5000)
    options.seconds = options.seconds or (0.1 if options.quick else 0.5)
    if not 1 <= options.rounds <= 1000 or not 0.01 <= options.seconds <= 600 or min(options.count, options.size) < 1:
        parser.error("--rounds is 1 to 1000, --seconds 0.01 to 600, --count and --size at least 1")
    if not 0 <= options.poll_max_ns <= 1_000_000_000:
        parser.error("--poll-max-ns is 0 to 1000000000")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    notifications, timed_requests = options.only != "requests", options.only != "notifications"
    qsd = shutil.which(harness.QSD)
    if timed_requests and qsd is None:
        raise BenchError(f"{harness.QSD} isn't installed; it is what we measure against")
    program, front_end = harness.binary("vhu-bench-vvu"), harness.binary("vhu-bench")
    on = harness.machine()
    bars: list[Bar] = []
    result: dict[str, Any] = {"machine": on}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhu-bench-")))
        log = directory / "group.log"
        group = stack.enter_context(started(group_command(directory), log))
        ready = harness.ready_line(group)
        if ready is None:
            raise BenchError(f"the group isn't ready: {said(log)}")
        sockets = {device["name"]: device for device in ready["vhost_user_devices"]}
        found: dict[Way, list[dict[str, Any]]] = {}
        if notifications:
            console.print("timing notifications")
            found = latencies(program, group, sockets[DEVICE], options)
        samples: Samples = {}
        if timed_requests:
            assert qsd is not None
            console.print("timing requests")
            samples = time_requests(qsd, front_end, program, group, sockets, directory, stack, options)
    settings = f"{options.rounds} rounds of {options.count} notifications and of {options.seconds} s of requests"
    settings += f", poll-max-ns={options.poll_max_ns}"
    print_machine(on, console, settings)
    if notifications:
        bars += report_latencies(found, console)
        result["notifications"] = [
            {**vars(way), "rounds": rounds, "ratios": latency_ratios(rounds, "median_ns")}
            for way, rounds in found.items()
        ]
    if timed_requests:
        report_requests(samples, console)
        result["requests"] = [
            {
                **vars(cell),
                "ratios": request_ratios(samples, cell, "iops"),
                "latency_ratios": request_ratios(samples, cell, "latency"),
                "samples": {name: samples[name, cell] for name in (THROUGH, DIRECT)},
            }
            for cell in CELLS
        ]
    if bars:
        print_bars(bars, console)
    harness.save(options.json, {**result, "settings": settings}, bars, console)
    return 0


def time_requests(
    qsd: str,
    front_end: Path,
    program: Path,
    group: subprocess.Popen[bytes],
    sockets: dict[str, dict[str, str]],
    directory: Path,
    stack: ExitStack,
    options: argparse.Namespace,
) -> Samples:
    """Start the daemon and the backend VMs, and measure. Raises BenchError."""
    in_memory = directory
    if harness.first_line(["stat", "-f", "-c", "%T", str(TMPFS)]) == "tmpfs":
        in_memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhu-bench-", dir=TMPFS)))
    make_image(in_memory / "disk.raw", options.size << 20)
    (directory / "tmpfs.raw").symlink_to(in_memory / "disk.raw")
    log = directory / "qsd.log"
    command = daemon_command(qsd, qsd_aio(qsd, directory), options.poll_max_ns, directory)
    daemon = stack.enter_context(started(command, log))
    wait_for(directory / "pid", daemon, log)
    pids = [group.pid, daemon.pid]
    for image in IMAGES:
        log = directory / f"backend-{image}.log"
        command = [str(program), "backend", "--device", sockets[image]["vhost_user"]]
        backend = stack.enter_context(started([*command, "--daemon", f"{directory}/{THROUGH}-{image}.sock"], log))
        wait_for_line(backend, log)
        pids.append(backend.pid)
    direct = {image: directory / f"{DIRECT}-{image}.sock" for image in IMAGES}
    through = {image: Path(sockets[image]["front"]) for image in IMAGES}
    sides = []
    for name, process, where in ((DIRECT, daemon, direct), (THROUGH, group, through)):
        side = BackEnd(name, name, lambda _side, _directory: [], lambda _side: {}, process, where)
        side.directory = directory
        sides.append(side)
    return requests(front_end, sides, pids, options)


def main() -> int:
    options = arguments()
    console = harness.console()
    try:
        return run(options, console)
    except BenchError as error:
        console.print(f"[red]vvu:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
