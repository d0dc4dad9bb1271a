#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""How long a front end waits when the process that serves it is killed: from `kill -9` to the first completed request.

`vhu-bench --reconnect-ms` keeps a member busy, checks that every request completes once, connects again when its
connection ends, as QEMU does with reconnect-ms, and goes on where the ring is. The serving process is killed in the
middle of it and started again: at once by this script (`by hand`), or by `vhu-legacy serve --supervise`, whose child is
the serving process, when this version has it. Every round is one kill; both ways take turns in separate groups.

Nothing here passes or fails by a number. Exit status 1: something didn't run, or a request was lost or came twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness import (
    ROOT,
    Bar,
    BenchError,
    binary,
    console,
    end,
    machine,
    print_bars,
    print_machine,
    ready_line,
    save,
    spread,
    spread_text,
)
from rich.console import Console
from rich.table import Table

BY_HAND: Final = "by hand"
SUPERVISED: Final = "--supervise"
PHASES: Final = ("lost", "negotiated", "started", "completed")
"""What the front end tells: its connection ended, another one works, its queue runs, a request is completed."""
PHASE_TIMEOUT: Final = 20.0
BAR_MS: Final = 100.0
IMAGE_BYTES: Final = 64 << 20


def has_supervisor() -> bool:
    command = [sys.executable, "-m", "vhu_legacy", "serve", "--help"]
    return "--supervise" in subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT).stdout


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@dataclass
class Group:
    """A group that is served, and served again when its process was killed."""

    way: str
    directory: Path
    image: str
    packed: bool
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    socket: Path = Path()

    def start(self) -> None:
        """Raises BenchError."""
        self._spawn()
        ready = ready_line(self.processes[-1])
        if ready is None:
            raise BenchError(f"{self.way}: isn't ready: {self.log()}")
        self.socket = Path(ready["members"][0]["vhost_user"])

    def _spawn(self) -> None:
        config = self.directory / "group.toml"
        if not config.exists():
            packed = "true" if self.packed else "false"
            member = f'[[members]]\ntype = "blk"\nimage = "{self.image}"\npacked = {packed}\n'
            config.write_text(f'[group]\nname = "restart"\n{member}')
        run_dir = str(self.directory / "run")
        command = [sys.executable, "-m", "vhu_legacy", "serve", str(config), "--run-dir", run_dir]
        command += ["--log-level", "warning", *([SUPERVISED] if self.way == SUPERVISED else [])]
        with (self.directory / "log").open("ab") as log:
            self.processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT))

    def kill(self) -> int:
        """Kill what serves, and have it started again; when that was (CLOCK_MONOTONIC, ns). Raises BenchError."""
        process = self.processes[-1]
        if self.way == BY_HAND:
            now = time.monotonic_ns()
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()
            self._spawn()
            return now
        found = children(process.pid)
        if len(found) != 1:
            raise BenchError(f"{self.way}: the supervisor has {len(found)} children, not the serving one")
        now = time.monotonic_ns()
        os.kill(found[0], signal.SIGKILL)
        return now

    def log(self) -> str:
        with suppress(OSError):
            return (self.directory / "log").read_text(errors="replace")[-2000:]
        return ""

    def close(self) -> None:
        if self.processes:
            end(self.processes[-1])


class FrontEnd:
    """A `vhu-bench` that keeps a member busy, and what it tells."""

    def __init__(self, program: Path, socket: Path, options: argparse.Namespace, seconds: float) -> None:
        command = [str(program), "--socket", str(socket), "--reconnect-ms", str(options.reconnect_ms)]
        command += ["--depth", str(options.depth), "--warmup", "0", "--seconds", str(seconds), *options.ring]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._buffer = b""

    def next(self, timeout: float) -> dict[str, Any]:
        """The next line. Raises BenchError."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            if not data:
                self.process.kill()
                _, errors = self.process.communicate(timeout=10)
                raise BenchError(f"the front end has ended, or hangs: {errors.decode(errors='replace').strip()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=10)


def outages(group: Group, program: Path, options: argparse.Namespace) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Milliseconds from each kill to each phase, and the front end's own summary. Raises BenchError."""
    samples = []
    chance = random.Random(1)
    front = FrontEnd(program, group.socket, options, 3600)
    try:
        for _ in range(options.rounds):
            time.sleep(0.2 + chance.random() * 0.2)
            if front.process.poll() is not None:
                front.next(0)
            killed = group.kill()
            sample = {}
            for phase in PHASES:
                line = front.next(PHASE_TIMEOUT)
                while phase == "started" and line.get("event") == "negotiated":
                    # with a process that has gone since
                    sample["negotiated"] = (line["ns"] - killed) / 1e6
                    line = front.next(PHASE_TIMEOUT)
                if line.get("event") != phase:
                    raise BenchError(f"{group.way}: {line} where {phase!r} is due; {group.log()}")
                sample[phase] = (line["ns"] - killed) / 1e6
            samples.append(sample)
            if group.way == BY_HAND and ready_line(group.processes[-1]) is None:
                raise BenchError(f"{group.way}: isn't ready: {group.log()}")
    finally:
        front.close()
    # one that ends by itself: whatever was lost keeps it from ending, and it says what features were agreed on
    front = FrontEnd(program, group.socket, options, 0.2)
    try:
        return samples, front.next(30)
    finally:
        front.close()


def report(samples: dict[str, list[dict[str, float]]], out: Console) -> None:
    table = Table(title="milliseconds from kill -9 (min / median / max)")
    table.add_column("started again")
    titles = ("connection lost", "negotiated again", "queue started", "first request completed")
    for title in titles:
        table.add_column(title, justify="right")
    for way, found in samples.items():
        table.add_row(way, *(spread_text((sample[phase] for sample in found), 1, 1) for phase in PHASES))
    out.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills: shows that it works, no more")
    parser.add_argument("--rounds", type=int, help="kills of each way (20)")
    parser.add_argument("--reconnect-ms", type=int, default=10, help="the front end's pause between attempts (10)")
    parser.add_argument("--depth", type=int, default=8, help="requests in flight (8)")
    parser.add_argument("--image", default="disk.raw", help="the member's image; without it a file of 64 MiB")
    parser.add_argument("--packed", action="store_const", dest="ring", const=["--packed"], default=[])
    parser.add_argument("--json", type=Path, default=ROOT / "target" / "bench-restart.json")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 20)
    if options.rounds < 1 or options.reconnect_ms < 1:
        parser.error("--rounds, --reconnect-ms: at least 1")
    return options


def run(options: argparse.Namespace, out: Console) -> int:
    program = binary("vhu-bench")
    on = machine()
    ways = [BY_HAND, *([SUPERVISED] if has_supervisor() else [])]
    samples: dict[str, list[dict[str, float]]] = {}
    tracked: dict[str, bool] = {}
    status = 0
    with tempfile.TemporaryDirectory(prefix="vhu-restart-") as scratch:
        for way in ways:
            directory = Path(scratch) / way.strip("-").replace(" ", "-")
            directory.mkdir()
            with (directory / "disk.raw").open("wb") as file:
                file.write(bytes(IMAGE_BYTES))
            group = Group(way, directory, options.image, bool(options.ring))
            try:
                group.start()
                samples[way], summary = outages(group, program, options)
                tracked[way] = summary["inflight"]
            except (BenchError, OSError, subprocess.SubprocessError) as error:
                status = 1
                out.print(f"[red]{way}:[/] {error}", highlight=False)
            finally:
                group.close()
    settings = f"{options.rounds} kills, depth {options.depth}, an attempt every {options.reconnect_ms} ms"
    settings += "".join(f"; {way}: INFLIGHT_SHMFD {'on' if on_ else 'off'}" for way, on_ in tracked.items())
    print_machine(on, out, settings)
    report(samples, out)
    reached = []
    for way in (BY_HAND, SUPERVISED):
        values = [sample["completed"] for sample in samples.get(way, [])]
        found = spread(values)
        what = f"kill -9 to first completed request, started again {way}"
        text = "-" if found is None else f"{spread_text(values, 1, 1)} ms"
        # by hand is for comparison: it has all of Python's start in it
        reached.append(Bar(what, f"<= {BAR_MS:.0f} ms median", text, None if found is None else found[1] <= BAR_MS))
    print_bars(reached, out)
    save(options.json, {"machine": on, "settings": settings, "samples": samples}, reached, out)
    return status


def main() -> int:
    out = console()
    try:
        return run(arguments(), out)
    except BenchError as error:
        out.print(f"[red]restart:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
