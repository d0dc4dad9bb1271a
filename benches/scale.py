#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What many attached members cost: memory, threads, file descriptors, start time, idle CPU, and the others' throughput.

Members are attached by real connections: this process is their front end. Each gets a memory table, two queues with
kick and call eventfds, and enabled rings, as a VM's driver would have them; then nothing is asked of them. The peer is
`qemu-storage-daemon` with as many exports. benches/README.md says what is counted.

Nothing here passes or fails by a number. Exit status 1: something didn't run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harness import (
    CPUS,
    QSD,
    ROOT,
    START_TIMEOUT,
    Bar,
    BenchError,
    binary,
    console,
    end,
    machine,
    number,
    place,
    print_bars,
    print_machine,
    raise_fd_limit,
    ready_line,
    save,
    spread,
    spread_text,
)
from rich.console import Console
from rich.table import Table

QUEUES: Final = 2
QUEUE_SIZE: Final = 64
PAGE: Final = 4096
MEMBER_MEMORY: Final = 16 * PAGE
"""Of its own, or of the memory that all share. The rings are in the first two pages."""
GUEST_BASE: Final = 1 << 32
USER_BASE: Final = 0x7F00_0000_0000
FDS_PER_MEMBER: Final = 6 + 3 * QUEUES
"""What `vhu-legacy serve` reserves for one (Group._fds)."""
RESERVED_FDS: Final = 160
"""And for everything else, with some to spare."""

VARIANTS: Final = (
    ("shared", True, False),
    ("own", False, False),
    ("shared+channel", True, True),
)
"""Names, and what `FrontEnd` is told: one memory file for all or one each; channels for back-end requests."""

GET_FEATURES: Final = 1
SET_FEATURES: Final = 2
SET_OWNER: Final = 3
SET_MEM_TABLE: Final = 5
SET_VRING_NUM: Final = 8
SET_VRING_ADDR: Final = 9
SET_VRING_BASE: Final = 10
SET_VRING_KICK: Final = 12
SET_VRING_CALL: Final = 13
GET_PROTOCOL_FEATURES: Final = 15
SET_PROTOCOL_FEATURES: Final = 16
SET_VRING_ENABLE: Final = 18
SET_BACKEND_REQ_FD: Final = 21
GET_INFLIGHT_FD: Final = 31
SET_INFLIGHT_FD: Final = 32
SET_STATUS: Final = 39

FEATURES: Final = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32
"""INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1."""
MQ: Final = 1 << 0
BACKEND_REQ: Final = 1 << 5
CONFIG: Final = 1 << 9
INFLIGHT_SHMFD: Final = 1 << 12
STATUS: Final = 1 << 16


# --- the front end ------------------------------------------------------------------------------------------------


@dataclass
class FrontEnd:
    """The front end of all members: it keeps sockets, and one pair of eventfds and one memory for all."""

    shared: bool
    """All members' rings are in one file, as one VM's are; else each has a file of its own."""
    channel: bool
    """A channel for back-end requests for each, as QEMU's vhost-user-blk has."""
    sockets: list[socket.socket] = field(default_factory=list)
    channels: list[socket.socket] = field(default_factory=list)
    inflight: int = 0
    """Members that asked for memory to track requests in."""

    def __post_init__(self) -> None:
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.memory = -1

    def close(self) -> None:
        for sock in self.sockets + self.channels:
            sock.close()
        for fd in (self.kick, self.call, self.memory):
            if fd >= 0:
                os.close(fd)

    def attach(self, paths: Sequence[Path]) -> None:
        """Connect to all, and return when all have taken everything. Raises OSError, BenchError."""
        if self.shared:
            self.memory = os.memfd_create("scale", os.MFD_CLOEXEC)
            os.ftruncate(self.memory, MEMBER_MEMORY * len(paths))
        for start in range(0, len(paths), 64):
            batch = [self._begin(path, start + at, len(paths)) for at, path in enumerate(paths[start : start + 64])]
            for sock in batch:
                # it answers this when it has taken all before
                receive(sock, GET_FEATURES)
                self.sockets.append(sock)

    def _begin(self, path: Path, index: int, count: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(30)
        sock.connect(str(path))
        try:
            self._messages(sock, index, count)
        except BaseException:
            sock.close()
            raise
        return sock

    def _messages(self, sock: socket.socket, index: int, count: int) -> None:
        send(sock, GET_FEATURES)
        send(sock, GET_PROTOCOL_FEATURES)
        offered = number_in(receive(sock, GET_FEATURES)[0])
        known = MQ | CONFIG | INFLIGHT_SHMFD | STATUS | (BACKEND_REQ if self.channel else 0)
        agreed = number_in(receive(sock, GET_PROTOCOL_FEATURES)[0]) & known
        send(sock, SET_PROTOCOL_FEATURES, struct.pack("<Q", agreed))
        send(sock, SET_OWNER)
        if agreed & BACKEND_REQ:
            ours, theirs = socket.socketpair()
            with theirs:
                send(sock, SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
            self.channels.append(ours)
        send(sock, SET_FEATURES, struct.pack("<Q", offered & FEATURES))
        if agreed & STATUS:
            send(sock, SET_STATUS, struct.pack("<Q", 11))
        if agreed & INFLIGHT_SHMFD:
            self._inflight(sock)
        offset = index * MEMBER_MEMORY if self.shared else 0
        size = count * MEMBER_MEMORY if self.shared else MEMBER_MEMORY
        memory = self.memory if self.shared else os.memfd_create("scale", os.MFD_CLOEXEC)
        try:
            if not self.shared:
                os.ftruncate(memory, size)
            table = struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, size, USER_BASE, 0)
            send(sock, SET_MEM_TABLE, table, [memory])
        finally:
            if not self.shared:
                os.close(memory)
        for queue in range(QUEUES):
            at = USER_BASE + offset + queue * PAGE
            send(sock, SET_VRING_NUM, struct.pack("<II", queue, QUEUE_SIZE))
            send(sock, SET_VRING_BASE, struct.pack("<II", queue, 0))
            send(sock, SET_VRING_ADDR, struct.pack("<IIQQQQ", queue, 0, at, at + 2048, at + 1024 + 512, 0))
            send(sock, SET_VRING_KICK, struct.pack("<Q", queue), [self.kick])
            send(sock, SET_VRING_CALL, struct.pack("<Q", queue), [self.call])
        for queue in range(QUEUES):
            send(sock, SET_VRING_ENABLE, struct.pack("<II", queue, 1))
        if agreed & STATUS:
            send(sock, SET_STATUS, struct.pack("<Q", 15))
        send(sock, GET_FEATURES)

    def _inflight(self, sock: socket.socket) -> None:
        send(sock, GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, QUEUES, QUEUE_SIZE, 0))
        payload, fds = receive(sock, GET_INFLIGHT_FD)
        if len(fds) != 1:
            raise BenchError(f"GET_INFLIGHT_FD is answered with {len(fds)} fds")
        try:
            send(sock, SET_INFLIGHT_FD, payload, fds)
        finally:
            os.close(fds[0])
        self.inflight += 1


def send(sock: socket.socket, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
    message = struct.pack("<III", request, 1, len(payload)) + payload
    sent = socket.send_fds(sock, [message], list(fds)) if fds else sock.send(message)
    if sent != len(message):
        raise BenchError(f"message {request}: sent {sent} of {len(message)} bytes")


def receive(sock: socket.socket, request: int) -> tuple[bytes, list[int]]:
    header, fds, _, _ = socket.recv_fds(sock, 12, 1)
    if len(header) != 12:
        raise BenchError(f"no answer to message {request}: the back end has closed the connection")
    found, flags, size = struct.unpack("<III", header)
    payload = sock.recv(size, socket.MSG_WAITALL) if size else b""
    if found != request or not flags & 4 or len(payload) != size:
        raise BenchError(f"answer to message {request}: number {found}, flags {flags:#x}, {size} bytes")
    return payload, fds


def number_in(payload: bytes) -> int:
    value: int = struct.unpack("<Q", payload)[0]
    return value


# --- the processes under test ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Of a process, in KiB (smaps_rollup)."""

    rss: int
    pss: int
    anonymous: int
    shared: int
    """Pages of memory files: front ends' memory, and what tracks requests in flight."""


def memory(pid: int) -> Memory:
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0])
    return Memory(fields["Rss"], fields["Pss"], fields["Anonymous"], fields.get("Pss_Shmem", 0))


def count(pid: int, what: str) -> int:
    """Its threads ("task") or file descriptors ("fd")."""
    return sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir())


def cpu_time(pid: int) -> dict[str, int]:
    """Nanoseconds of each of its threads."""
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            times[task.name] = int((task / "schedstat").read_text().split()[0])
    return times


@dataclass
class Server:
    """A running back end."""

    process: subprocess.Popen[bytes]
    sockets: list[Path]
    start: float
    """Seconds until all sockets listened."""

    @property
    def pid(self) -> int:
        return self.process.pid


@contextmanager
def ours(members: int, directory: Path) -> Iterator[Server]:
    """`vhu-legacy serve` with that many null members of two queues."""
    directory.mkdir()
    config = directory / "group.toml"
    config.write_text(
        f"""
        [group]
        name = "scale"
        [[members]]
        type = "blk"
        image = "null:1GiB"
        queues = {QUEUES}
        count = {members}
        """
    )
    command = [sys.executable, "-m", "vhu_legacy", "serve", str(config), "--run-dir", str(directory / "run")]
    with (directory / "log").open("wb") as log:
        begin = time.monotonic()
        process = subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
    try:
        ready = ready_line(process)
        took = time.monotonic() - begin
        if ready is None:
            raise BenchError(f"vhu-legacy serve isn't ready: {(directory / 'log').read_text()[-2000:]}")
        yield Server(process, [Path(member["vhost_user"]) for member in ready["members"]], took)
    finally:
        end(process)


@contextmanager
def qsd(exports: int, directory: Path) -> Iterator[Server]:
    """`qemu-storage-daemon` with that many exports of null-co, two queues each; an iothread for each of our workers."""
    directory.mkdir()
    command = [QSD]
    iothreads = min(len(CPUS), 4)
    for thread in range(iothreads):
        command += ["--object", f"iothread,id=io{thread}"]
    sockets = [directory / f"{export}.sock" for export in range(exports)]
    for export, path in enumerate(sockets):
        command += ["--blockdev", f"driver=null-co,node-name=n{export},size=1073741824,read-zeroes=on"]
        options = f"type=vhost-user-blk,id=e{export},node-name=n{export},writable=on,num-queues={QUEUES}"
        options += f",iothread=io{export % iothreads}"
        command += ["--export", f"{options},addr.type=unix,addr.path={path}"]
    pidfile = directory / "pid"
    with (directory / "log").open("wb") as log:
        begin = time.monotonic()
        process = subprocess.Popen([*command, "--pidfile", str(pidfile)], stdout=log, stderr=log, cwd=directory)
    try:
        deadline = begin + START_TIMEOUT
        while not pidfile.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{QSD} isn't ready: {(directory / 'log').read_text()[-2000:]}")
            time.sleep(0.005)
        yield Server(process, sockets, time.monotonic() - begin)
    finally:
        end(process)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Of one process with so many members attached."""

    name: str
    members: int
    start: float
    attach: float
    """Seconds until all were attached, without the start."""
    empty: Memory
    """One member, nobody attached."""
    before: Memory
    after: Memory
    threads: tuple[int, int]
    fds: tuple[int, int]
    idle: float
    """CPU seconds a second, with all attached."""
    idle_seconds: float
    inflight: bool
    """Whether the back end tracks requests in flight for each."""

    def per_member(self, of: str, since: Memory) -> float:
        """KiB."""
        grown: int = getattr(self.after, of) - getattr(since, of)
        return grown / self.members


def measure(name: str, server: Server, front: FrontEnd, empty: Memory, members: int, idle: float) -> Figures:
    """Attach to the first `members` sockets and look. Raises OSError, BenchError."""
    before, threads, fds = memory(server.pid), count(server.pid, "task"), count(server.pid, "fd")
    begin = time.monotonic()
    front.attach(server.sockets[:members])
    attach = time.monotonic() - begin
    # what was started meanwhile (a thread that closes fds) may end
    time.sleep(min(idle, 1))
    at_first, since = cpu_time(server.pid), time.monotonic()
    time.sleep(idle)
    now, since = cpu_time(server.pid), time.monotonic() - since
    # one that has ended meanwhile had nothing to do
    used = sum(spent - at_first.get(thread, 0) for thread, spent in now.items()) / 1e9
    return Figures(
        name,
        members,
        server.start,
        attach,
        empty,
        before,
        memory(server.pid),
        (threads, count(server.pid, "task")),
        (fds, count(server.pid, "fd")),
        used / since,
        since,
        front.inflight > 0,
    )


def one_busy(front_end: Path, path: Path, pid: int, seconds: float, apart: bool) -> float:
    """Requests per second of one member, 4 KiB random reads at depth 32."""
    if apart:
        place(pid, {CPUS[0]})
        os.sched_setaffinity(0, {CPUS[1]})
    try:
        command = [str(front_end), "--socket", str(path), "--depth", "32", "--seconds", str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30)
    finally:
        os.sched_setaffinity(0, set(CPUS))
    if done.returncode != 0:
        raise BenchError(f"vhu-bench: {done.stderr.strip()}")
    iops: float = json.loads(done.stdout)["iops"]
    return iops


def throughput(front_end: Path, alone: Server, among: Server, rounds: int, seconds: float) -> list[dict[str, float]]:
    """A busy member in a process where it is alone, and in one with many attached, in turns."""
    samples = []
    for turn in range(rounds):
        sample = {}
        for which in ("alone", "among") if turn % 2 == 0 else ("among", "alone"):
            server = alone if which == "alone" else among
            sample[which] = one_busy(front_end, server.sockets[-1], server.pid, seconds, len(CPUS) > 1)
        samples.append(sample)
    return samples


@dataclass
class Results:
    figures: list[Figures] = field(default_factory=list)
    busy: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def run_ours(results: Results, options: argparse.Namespace, members: int, directory: Path, out: Console) -> None:
    front_end = options.front_end
    with ExitStack() as stack:
        alone = stack.enter_context(ours(1, directory / f"alone-{members}"))
        empty = memory(alone.pid)
        for name, shared, channel in VARIANTS:
            if channel and members != options.members[0]:
                continue
            with ExitStack() as inner:
                # one more than are attached here: the busy one
                server = inner.enter_context(ours(members + 1, directory / f"{members}-{shared}-{channel}"))
                front = FrontEnd(shared, channel)
                inner.callback(front.close)
                results.figures.append(measure(f"ours, {name}", server, front, empty, members, options.idle))
                out.print(f"{members} members, {name}: attached in {results.figures[-1].attach:.1f} s", highlight=False)
                if shared and not channel:
                    samples = throughput(front_end, alone, server, options.rounds, options.seconds)
                    results.busy[members] = samples


def run_qsd(results: Results, options: argparse.Namespace, directory: Path, out: Console) -> None:
    members = options.members[0]
    with qsd(1, directory / "qsd-1") as server:
        empty = memory(server.pid)
    for name, shared, channel in VARIANTS[:2]:
        with qsd(members, directory / f"qsd-{shared}") as server:
            front = FrontEnd(shared, channel)
            try:
                results.figures.append(measure(f"qsd, {name}", server, front, empty, members, options.idle))
            finally:
                front.close()
            out.print(f"{members} exports, {name}: attached in {results.figures[-1].attach:.1f} s", highlight=False)


# --- the report -----------------------------------------------------------------------------------------------------


def report(results: Results, out: Console) -> None:
    table = Table(title="KiB per attached member: growth since before they were attached (since a group of one)")
    table.add_column("back end", no_wrap=True)
    titles = ("members", "start s", "attach s", "RSS", "anonymous", "files", "threads", "fds", "idle %")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for one in results.figures:
        grown = [
            f"{one.per_member(of, one.before):.1f} ({one.per_member(of, one.empty):.1f})" for of in ("rss", "anonymous")
        ]
        table.add_row(
            one.name,
            str(one.members),
            f"{one.start:.2f}",
            f"{one.attach:.2f}",
            *grown,
            f"{one.per_member('shared', one.before):.1f}",
            f"{one.threads[0]} -> {one.threads[1]}",
            f"{one.fds[0]} -> {one.fds[1]}",
            f"{one.idle * 100:.3f}",
        )
    out.print(table)
    table = Table(title="requests per second of a busy member among attached ones / alone (4 KiB reads, QD32, eventfd)")
    for title in ("members", "min / median / max", "alone kIOPS", "among kIOPS"):
        table.add_column(title, justify="right")
    for members, samples in results.busy.items():
        medians = [spread(sample[which] for sample in samples) for which in ("alone", "among")]
        table.add_row(
            str(members),
            spread_text(sample["among"] / sample["alone"] for sample in samples),
            *(number(None if found is None else found[1], 1e3) for found in medians),
        )
    out.print(table)


def bars(results: Results, options: argparse.Namespace) -> list[Bar]:
    found = []
    for one in results.figures:
        if not one.name.startswith("ours"):
            continue
        what = f"{one.members} attached, {one.name.removeprefix('ours, ')}"
        for since, text in ((one.before, "attaching"), (one.empty, "a group of one")):
            rss = one.per_member("rss", since)
            own = one.per_member("anonymous", since)
            reached = f"{rss:.1f} KiB, {own:.1f} without memory files"
            found.append(Bar(f"{what}: RSS per member since {text}", "<= 16 KiB", reached, rss <= 16))
        grown = one.threads[1] - one.threads[0]
        found.append(Bar(f"{what}: threads", "no growth", f"{grown:+d}", grown <= 0))
        if one.members == 1024:
            found.append(Bar(f"{what}: start", "<= 2 s", f"{one.start:.2f} s", one.start <= 2))
    for members, samples in results.busy.items():
        loss = [100 * (1 - sample["among"] / sample["alone"]) for sample in samples]
        middle = spread(loss)
        assert middle is not None
        what = f"throughput of one busy member, 1 to {members} attached"
        found.append(Bar(what, "<= 5 % loss", f"{spread_text(loss, 1, 1)} %", middle[1] <= 5))
    found.extend(Bar(reason, "", "", None) for reason in results.skipped)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 members, half a second: shows that it works, no more")
    parser.add_argument("--members", type=int, nargs="+", help="how many to attach (1024 4096)")
    parser.add_argument("--rounds", type=int, help="rounds of the throughput (7)")
    parser.add_argument("--seconds", type=float, help="seconds of each (0.7)")
    parser.add_argument("--idle", type=float, help="seconds without work whose CPU time is taken (10)")
    parser.add_argument("--no-peer", action="store_true", help=f"without {QSD}")
    parser.add_argument("--json", type=Path, default=ROOT / "target" / "bench-scale.json")
    options = parser.parse_args()
    options.members = options.members or ([128] if options.quick else [1024, 4096])
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.seconds = options.seconds or (0.3 if options.quick else 0.7)
    options.idle = options.idle or (0.5 if options.quick else 10.0)
    if min(options.members) < 1 or options.rounds < 1:
        parser.error("--members, --rounds: at least 1")
    return options


def run(options: argparse.Namespace, out: Console) -> int:
    options.front_end = binary("vhu-bench")
    on = machine()
    results = Results()
    status = 0
    # /tmp rather than a deeper place: socket paths are short
    with tempfile.TemporaryDirectory(prefix="vhu-scale-") as scratch:
        directory = Path(scratch)
        for asked in options.members:
            wanted = (asked + 1) * FDS_PER_MEMBER + RESERVED_FDS
            limit = raise_fd_limit(wanted)
            members = min(asked, (limit - RESERVED_FDS) // FDS_PER_MEMBER - 1)
            if members < asked:
                reason = f"{asked} members: {wanted} open files are needed, the hard limit here is {limit} (ulimit -Hn)"
                results.skipped.append(reason)
                out.print(f"[yellow]{reason}; {members} instead[/]", highlight=False)
            try:
                run_ours(results, options, members, directory, out)
            except (BenchError, OSError) as error:
                status = 1
                out.print(f"[red]{members} members:[/] {error}", highlight=False)
        if not options.no_peer:
            if shutil.which(QSD) is None:
                raise BenchError(f"{QSD} isn't installed; it is what we measure against")
            try:
                run_qsd(results, options, directory, out)
            except (BenchError, OSError) as error:
                status = 1
                out.print(f"[red]{QSD}:[/] {error}", highlight=False)
    settings = (
        f"{QUEUES} queues each, throughput in {options.rounds} rounds of {options.seconds} s, idle {options.idle} s"
    )
    print_machine(on, out, settings)
    report(results, out)
    reached = bars(results, options)
    print_bars(reached, out)
    figures = [
        {**vars(one), **{key: vars(getattr(one, key)) for key in ("empty", "before", "after")}}
        for one in results.figures
    ]
    save(options.json, {"machine": on, "figures": figures, "busy": results.busy}, reached, out)
    return status


def main() -> int:
    out = console()
    try:
        return run(arguments(), out)
    except BenchError as error:
        out.print(f"[red]scale:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
