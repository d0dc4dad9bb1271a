# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The serving process is killed with SIGKILL at any moment, and the next one goes on: no acknowledged write is lost, no
request is answered twice or never, none fails.

A driver writes blocks whose content says which block and which write it is. It waits for calls and never polls, so that
an interrupt that died with the process would stop it. What it holds between a kill and the next server is what QEMU
holds: guest memory, the eventfds, and the memory for what is in flight.
"""

from __future__ import annotations

import os
import random
import select
import signal
import statistics
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from .frontend import (
    BLK_HEADER,
    OK,
    SECTOR,
    BlkDriver,
    Buffer,
    Connection,
    ConnectionLost,
    F,
    FrontEnd,
    Message,
    P,
    PackedBlkDriver,
    R,
    Refused,
    T,
    bits,
    wait_until,
)

STARTER = """
import functools
from vhu_legacy import cli, supervisor

# servers of this test die sooner than an operator's supervisor would put up with
supervisor.Policy = functools.partial(supervisor.Policy, quick=0.0)
cli.main()
"""
CONFIG = """
    [group]
    name = "kill"
    workers = 2
    [[members]]
    type = "blk"
    image = "disk.raw"
    queues = 2
    packed = true
    in_order = true
"""
STAMP: Final = struct.Struct("<QQ")
KIBI: Final = 1 << 10
IMAGE_SIZE: Final = 16 << 20
LIMIT: Final = 10.0
"""Seconds that anything may take; most takes milliseconds."""

AnyDriver = FrontEnd[Any]
C = TypeVar("C", bound=Connection)


class Server:
    """`vhu-legacy serve --supervise`: a parent that forks one server after the other."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "disk.raw"
        self.path = directory / "run" / "member-1.vhost-user.sock"
        self._log = directory / "serve.log"
        (directory / "group.toml").write_text(textwrap.dedent(CONFIG))
        self.image.touch()
        os.truncate(self.image, IMAGE_SIZE)
        self._directory = directory
        self._killed = 0
        self.start()

    def start(self) -> None:
        options = ["serve", "--supervise", str(self._directory / "group.toml"), "--run-dir"]
        with self._log.open("wb") as log:
            self._parent = subprocess.Popen(
                [sys.executable, "-c", STARTER, *options, str(self._directory / "run")],
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def wait_ready(self) -> None:
        assert self._parent.stdout is not None
        assert self._parent.stdout.readline(), self.log()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def pid(self) -> int:
        """The process that serves, once there is one."""
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children")
        deadline = time.monotonic() + LIMIT
        while not (found := children.read_text().split()):
            assert self._parent.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.0005)
        return int(found[0])

    def kill(self) -> None:
        self._killed = self.pid()
        os.kill(self._killed, signal.SIGKILL)

    def wait_replaced(self) -> None:
        """Wait until the server that was killed has been, and another one answers: then nothing is left of it."""
        wait_until(lambda: self.pid() != self._killed, LIMIT, "the end of the server")
        self.connect(lambda: Connection(self.path)).close()

    def connect(self, make: Callable[[], C]) -> C:
        """A connection to the next server, as soon as it is there."""
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                return make()
            except OSError:
                assert self._parent.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.0005)

    def stop(self) -> None:
        self._parent.send_signal(signal.SIGTERM)
        try:
            status = self._parent.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self._parent.kill()
            raise
        finally:
            assert self._parent.stdout is not None
            self._parent.stdout.close()
        log = self.log()
        assert status == 0, log
        for word in ("Traceback", "panicked", "broken"):
            assert word not in log, log


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("kill"))
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@dataclass
class Statistics:
    """What happened, for people, and to see that it wasn't nothing."""

    kills: int = 0
    writes: int = 0
    reads: int = 0
    outstanding: int = 0
    """Requests that the driver was waiting for when a server died."""
    run_again: int = 0
    """Those of them that it had taken, and the next one had to run again."""
    out_of_order: int = 0
    """Pairs of overlapping writes of which the first one won."""
    gaps: list[float] = field(default_factory=list)
    """Seconds from a kill to the first completion afterwards."""

    def __str__(self) -> str:
        gap = f"{statistics.median(self.gaps) * 1000:.0f} ms" if self.gaps else "-"
        return (
            f"{self.kills} kills, {self.writes} writes, {self.reads} reads, {self.outstanding} outstanding at a kill, "
            f"{self.run_again} run again, {self.out_of_order} pairs out of order, {gap} to the first completion"
        )


@dataclass(slots=True)
class Request:
    """One on its way."""

    block: int
    number: int
    """Of the write; 0 for a read."""
    slot: int


class Slots:
    """Buffers in guest memory, one set for each request that may be on its way."""

    def __init__(self, driver: AnyDriver, count: int, size: int) -> None:
        allocate = driver.memory.allocate
        # the status stands apart: nothing of a request is where another's is
        self.sets = [(allocate(16), allocate(size), allocate(1, 64), allocate(64)) for _ in range(count)]
        self.free = list(range(count))


class Load:
    """A driver at work that knows what has to be on its disk."""

    def __init__(
        self,
        server: Server,
        kind: type[AnyDriver],
        *,
        seed: int,
        queues: int = 1,
        event_idx: bool = True,
        track: bool = True,
        in_order: bool = False,
        block_size: int = 4 * KIBI,
        blocks: int = 64,
        depth: int = 16,
        protocol: int | None = None,
    ) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.block_size = block_size
        self.blocks = blocks
        self.statistics = Statistics()
        self.holds: list[set[int]] = [{0} for _ in range(blocks)]
        """By block: the writes of which one must be there. One, if not two overlapped."""
        self.busy: dict[int, list[int]] = {}
        """By block on which there is something outstanding: the writes since there was nothing."""
        self.outstanding: dict[tuple[int, int], Request] = {}
        """By queue and the number that it is used by."""
        self.last_write = 0
        self._killed_at: float | None = None
        self._waiting_since: float | None = None
        with server.image.open("r+b") as file:
            for block in range(blocks):
                file.write(self._pattern(block, 0))
        features = bits(F.VERSION_1, F.PROTOCOL_FEATURES, F.INDIRECT, F.FLUSH, F.MQ)
        features |= bits(F.EVENT_IDX) * event_idx | bits(F.IN_ORDER) * in_order
        if kind is PackedBlkDriver:
            features |= bits(F.RING_PACKED)
        # room for direct chains of three
        size = 64 if kind is BlkDriver else 60
        room = 2 * queues * depth * (block_size + 4096)
        self.driver = kind(
            server.path,
            features,
            protocol,
            queues=queues,
            queue_size=size,
            memory_size=(room + (1 << 20)) // 4096 * 4096,
            track=track,
            timeout=LIMIT,
        )
        try:
            self.driver.start()
            self.ordered = in_order or not track
            for ring in self.driver.rings:
                # without a record the used index has to say what is done
                ring.in_order = self.ordered
            self.slots = [Slots(self.driver, depth, block_size) for _ in range(queues)]
        except BaseException:
            self.driver.close()
            raise

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.close()

    # --- contents ---------------------------------------------------------------------------------------------

    def _pattern(self, block: int, number: int) -> bytes:
        return STAMP.pack(block, number) * (self.block_size // STAMP.size)

    def _check(self, block: int, data: bytes, where: str) -> int:
        """Which write a block holds; it must be one that it may hold, as a whole."""
        found, number = STAMP.unpack_from(data)
        assert data == STAMP.pack(found, number) * (self.block_size // STAMP.size), f"block {block} is torn {where}"
        assert found == block, f"block {block} holds block {found} {where}"
        allowed = self.holds[block]
        assert number in allowed, f"block {block} holds write {number} {where}; {sorted(allowed)} would be right"
        return int(number)

    def check_image(self) -> None:
        """All blocks that nothing is on its way to, as the host sees them."""
        with self.server.image.open("rb") as file:
            for block in range(self.blocks):
                if block not in self.busy:
                    file.seek(block * self.block_size)
                    number = self._check(block, file.read(self.block_size), "in the image")
                    # what it holds now it has to go on holding
                    self.holds[block] = {number}

    def check_device(self) -> None:
        """All blocks, read by the driver."""
        todo = list(range(self.blocks))
        while todo or self.outstanding:
            for index in range(len(self.driver.rings)):
                while todo and self._room(index):
                    self._submit(index, todo.pop(), read=True)
                self.driver.rings[index].publish()
            self._wait()

    # --- requests ---------------------------------------------------------------------------------------------

    def _room(self, index: int) -> bool:
        return bool(self.slots[index].free) and self.driver.rings[index].room >= 3

    def _submit(self, index: int, block: int, *, read: bool = False) -> None:
        ring, memory, slots = self.driver.rings[index], self.driver.memory, self.slots[index]
        slot = slots.free.pop()
        header, data, status, table = slots.sets[slot]
        number = 0
        if not read:
            self.last_write += 1
            number = self.last_write
            memory.write(data, self._pattern(block, number))
        sector = block * self.block_size // SECTOR
        memory.write(header, BLK_HEADER.pack(T.IN if read else T.OUT, 0, sector))
        memory.write(status, b"\xa5")
        chain = [Buffer(header, 16), Buffer(data, self.block_size, read), Buffer(status, 1, True)]
        head = ring.add(chain, indirect=self.random.random() < 0.5, table=table)
        key = (index, head)
        assert key not in self.outstanding
        self.outstanding[key] = Request(block, number, slot)
        self.busy.setdefault(block, [])
        if number:
            self.busy[block].append(number)

    def fill(self, most: int = 1000) -> None:
        """Submit what there is room for."""
        for index, ring in enumerate(self.driver.rings):
            while most > 0 and self._room(index):
                most -= 1
                block = self.random.randrange(self.blocks)
                if block in self.busy:
                    # the queues may not agree on an order, so pairs are of one queue, and made at once
                    break
                choice = self.random.random()
                self._submit(index, block, read=choice < 0.25)
                if choice > 0.9 and self._room(index):
                    self._submit(index, block)
            ring.publish()

    def _completed(self, index: int, head: int, length: int) -> None:
        # a KeyError here is an answer to what wasn't asked, or the second one
        request = self.outstanding.pop((index, head))
        slots, memory = self.slots[index], self.driver.memory
        _, data, status, _ = slots.sets[request.slot]
        assert memory.read(status, 1)[0] == OK, f"status of block {request.block}, write {request.number}"
        slots.free.append(request.slot)
        others = any(other.block == request.block for other in self.outstanding.values())
        if request.number:
            assert length == 1
            self.statistics.writes += 1
        else:
            assert length == self.block_size + 1
            self._check(request.block, memory.read(data, self.block_size), "for the driver")
            self.statistics.reads += 1
        if not others and (writes := self.busy.pop(request.block)):
            self.holds[request.block] = set(writes)
            self._pair(request.block, writes)
        if self._waiting_since is not None:
            self.statistics.gaps.append(time.monotonic() - self._waiting_since)
            self._waiting_since = None

    def _pair(self, block: int, writes: list[int]) -> None:
        if len(writes) > 1:
            with self.server.image.open("rb") as file:
                file.seek(block * self.block_size)
                number = self._check(block, file.read(self.block_size), "after two writes")
            self.statistics.out_of_order += number != writes[-1]
            self.holds[block] = {number}

    def take_used(self) -> int:
        """What is complete, whoever has done it; how many."""
        count = 0
        for index, ring in enumerate(self.driver.rings):
            ring.take_calls()
            while True:
                if ring.event_idx:
                    ring.ask_for_call()
                done = ring.take_used()
                if not done:
                    break
                for head, length in done:
                    self._completed(index, head, length)
                count += len(done)
        return count

    def _wait(self) -> None:
        """Wait for a call, and take what is complete. ConnectionLost when there is nobody to call any more."""
        if self.take_used():
            return
        poll = select.poll()
        poll.register(self.driver.connection.socket, select.POLLIN)
        for ring in self.driver.rings:
            poll.register(ring.call_fd, select.POLLIN)
        found = poll.poll(LIMIT * 1000)
        assert found, f"nothing happens: {len(self.outstanding)} requests outstanding; {self.server.log()}"
        if self.driver.connection.socket.fileno() in dict(found):
            raise ConnectionLost
        self.take_used()

    def work(self, until: Callable[[], bool]) -> None:
        """Keep the rings full. ConnectionLost when the server dies."""
        while not until():
            self.fill()
            self._wait()

    def drain(self) -> None:
        """Wait for everything."""
        while self.outstanding:
            self._wait()

    # --- life and death ---------------------------------------------------------------------------------------

    def kill(self) -> None:
        self._killed_at = time.monotonic()
        self.server.kill()

    def died(self) -> None:
        """The server is dead: what it has left."""
        self.driver.connection.close()
        self.take_used()
        self._waiting_since = self._killed_at if self.outstanding else None
        self._killed_at = None
        self.statistics.kills += 1
        self.statistics.outstanding += len(self.outstanding)
        self.statistics.run_again += self._taken()

    def reset(self) -> None:
        """The driver has reset its device, whatever became of that: what was outstanding has happened, or won't."""
        lost = {(request.block, request.number) for request in self.outstanding.values()}
        for block, writes in self.busy.items():
            done = [number for number in writes if (block, number) not in lost]
            self.holds[block] = set(writes) if done else self.holds[block] | set(writes)
        self.busy.clear()
        for (index, _), request in self.outstanding.items():
            self.slots[index].free.append(request.slot)
        self.outstanding.clear()
        for ring in self.driver.rings:
            ring.restart()
        self.driver.forget_region()

    def _taken(self) -> int:
        """Requests that the record has in flight."""
        region, count = self.driver.region, 0
        if region is None:
            return 0
        packed = isinstance(self.driver, PackedBlkDriver)
        for index in range(len(self.driver.rings)):
            for entry in region.in_flight(index, packed=packed):
                number = entry
                if packed:
                    # by the buffer ID, which is the last descriptor's
                    _, _, last, *_ = region.read(region.PACKED_ENTRY, region.entry_at(entry, index, packed=True))
                    number = region.read(region.PACKED_ENTRY, region.entry_at(last, index, packed=True))[5]
                count += (index, number) in self.outstanding
        return count

    def reconnect(self) -> None:
        """Over to the next server."""
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                self.driver.reconnect(self.server.connect(lambda: Connection(self.server.path, LIMIT)))
            except (ConnectionLost, Refused):
                # the dying one has still taken the connection
                assert time.monotonic() < deadline, self.server.log()
            else:
                return

    def work_and_kill(self, seconds: float) -> None:
        """Work, until somebody kills the server."""
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        try:
            with suppress(ConnectionLost):
                self.work(lambda: False)
        finally:
            timer.join()
        if self.random.random() < 0.5:
            # the guest knows of nothing
            self.fill(3)
        self.died()

    def rounds(self, count: int, longest: float) -> None:
        """So many kills, each after up to so many seconds; most of them with a look at everything afterwards."""
        for _ in range(count):
            self.work_and_kill(self.random.uniform(0, longest))
            self.check_image()
            self.reconnect()
            if self.random.random() < 0.7:
                self.drain()
                self.check_image()
                self.check_device()
        self.finish()

    def finish(self) -> None:
        self.drain()
        self.check_device()
        self.check_image()
        assert not self.busy
        for ring in self.driver.rings:
            assert not ring.waiting


def report(record_property: Callable[[str, object], None], numbers: Statistics) -> None:
    """For those who read reports (`pytest -rP`, or the XML)."""
    print(numbers)
    for name in ("kills", "writes", "outstanding", "run_again"):
        record_property(name, getattr(numbers, name))


# --- under load -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How the driver is."""

    name: str
    kind: type[AnyDriver]
    options: dict[str, Any]
    kills: int
    longest: float = 0.05


VARIANTS = [
    Variant("split", BlkDriver, {}, 35),
    Variant("split-plain", BlkDriver, {"event_idx": False}, 25),
    Variant("split-two-queues", BlkDriver, {"queues": 2}, 20),
    Variant("split-in-order", BlkDriver, {"in_order": True}, 15),
    Variant("split-untracked", BlkDriver, {"track": False}, 30),
    Variant("split-untracked-plain", BlkDriver, {"track": False, "event_idx": False, "queues": 2}, 20),
    Variant("packed", PackedBlkDriver, {}, 35),
    Variant("packed-plain", PackedBlkDriver, {"event_idx": False}, 25),
    Variant("packed-two-queues", PackedBlkDriver, {"queues": 2}, 20),
    Variant("packed-in-order", PackedBlkDriver, {"in_order": True}, 15),
    Variant("split-large", BlkDriver, {"block_size": 512 * KIBI, "blocks": 32}, 15),
    Variant("split-large-untracked", BlkDriver, {"block_size": 512 * KIBI, "blocks": 32, "track": False}, 10),
    Variant("packed-large", PackedBlkDriver, {"block_size": 512 * KIBI, "blocks": 32}, 15),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=[one.name for one in VARIANTS])
def test_killed_under_load(server: Server, variant: Variant, record_property: Callable[[str, object], None]) -> None:
    with Load(server, variant.kind, seed=VARIANTS.index(variant), **variant.options) as load:
        load.rounds(variant.kills, variant.longest)
        numbers = load.statistics
        report(record_property, numbers)
    assert numbers.kills == variant.kills
    # it was worth it
    assert numbers.outstanding > variant.kills
    assert numbers.writes > variant.kills
    if variant.options.get("track", True):
        assert numbers.run_again > 0


def test_at_least_200_kills() -> None:
    assert sum(one.kills for one in VARIANTS) >= 200


# --- at every step of the handshake ---------------------------------------------------------------------------------


class Fatal(Connection):
    """A connection whose server is killed at a message: when it was sent, or when it was answered."""

    def __init__(self, server: Server, step: int, *, answered: bool) -> None:
        self._server = server
        self._left = step
        self._answered = answered
        self.fired = False
        super().__init__(server.path, LIMIT)

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._server.kill()
            self.fired = True

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        flags: int | None = None,
        size: int | None = None,
    ) -> None:
        super().send(request, payload, fds, need_reply=need_reply, flags=flags, size=size)
        if not self._answered:
            self._count()

    def receive(self) -> Message:
        message = super().receive()
        if self._answered:
            self._count()
        return message


@pytest.mark.parametrize("answered", [False, True], ids=["sent", "answered"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BlkDriver, {}),
        (BlkDriver, {"track": False}),
        (BlkDriver, {"protocol": ~bits(P.REPLY_ACK)}),
        (PackedBlkDriver, {}),
    ],
    ids=["split", "split-untracked", "split-unacknowledged", "packed"],
)
def test_killed_at_each_message(
    server: Server,
    kind: type[AnyDriver],
    options: dict[str, Any],
    answered: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """With requests waiting in the ring from before the connection."""
    with Load(server, kind, seed=1, **options) as load:
        step = 1
        deadline = time.monotonic() + 60
        while True:
            # a guest that resets its device: the first server of the two is asked for a new region
            load.driver.stop()
            load.driver.connection.close()
            load.reset()
            load.fill(4)
            fatal = server.connect(partial(Fatal, server, step, answered=answered))
            try:
                load.driver.reconnect(fatal)
            except (ConnectionLost, Refused):
                if not fatal.fired:
                    # the last connection was still being let go of
                    assert time.monotonic() < deadline, server.log()
                    load.reconnect()
                    load.drain()
                    continue
            if not fatal.fired:
                break
            load.died()
            load.check_image()
            load.reconnect()
            load.drain()
            step += 1
        load.finish()
        report(record_property, load.statistics)
        # 4 to negotiate, 4 for features and status, 1 for memory, 6 for the ring, and 2 for what is in flight
        messages = 15 if "track" in options else 17
        if answered:
            # all but SET_PROTOCOL_FEATURES; without REPLY_ACK two GET_FEATURES, GET_PROTOCOL_FEATURES, GET_INFLIGHT_FD
            messages = 4 if "protocol" in options else messages - 1
        assert load.statistics.kills == messages


# --- at other moments -------------------------------------------------------------------------------------------------


def some_time(load: Load, longest: float) -> Callable[[], bool]:
    end = time.monotonic() + load.random.uniform(0, longest)
    return lambda: time.monotonic() >= end


KINDS = pytest.mark.parametrize("kind", [BlkDriver, PackedBlkDriver], ids=["split", "packed"])


# (nothing in memory says where an untracked packed ring stands)
@pytest.mark.parametrize(
    ("kind", "track"),
    [(BlkDriver, True), (BlkDriver, False), (PackedBlkDriver, True)],
    ids=["split", "split-untracked", "packed"],
)
def test_killed_while_it_lets_go(
    server: Server, kind: type[AnyDriver], track: bool, record_property: Callable[[str, object], None]
) -> None:
    """The front end has hung up, with requests in flight, and the rings are being stopped."""
    with Load(server, kind, seed=2, track=track, block_size=512 * KIBI, blocks=32) as load:
        for _ in range(15):
            load.work(some_time(load, 0.03))
            load.fill()
            load.driver.connection.close()
            if load.random.random() < 0.5:
                time.sleep(load.random.uniform(0, 0.001))
            load.kill()
            server.wait_replaced()
            load.died()
            load.check_image()
            load.reconnect()
            load.drain()
            load.check_device()
        load.finish()
        report(record_property, load.statistics)
        # how many were outstanding is a matter of speed
        assert load.statistics.kills == 15


@KINDS
def test_killed_during_a_reset(
    server: Server, kind: type[AnyDriver], record_property: Callable[[str, object], None]
) -> None:
    """What was in flight may have been done. If it wasn't, it mustn't be done later."""
    with Load(server, kind, seed=3) as load:
        for _ in range(15):
            load.work(some_time(load, 0.03))
            load.fill()
            load.driver.connection.send(R.RESET_DEVICE, need_reply=True)
            time.sleep(load.random.uniform(0, 0.002))
            load.kill()
            server.wait_replaced()
            load.driver.connection.close()
            load.statistics.kills += 1
            load.statistics.outstanding += len(load.outstanding)
            load.reset()
            # from here on each block holds what it holds
            load.check_image()
            load.reconnect()
            load.check_device()
        load.finish()
        report(record_property, load.statistics)
        assert load.statistics.outstanding > 0


@KINDS
def test_killed_again_and_again(
    server: Server, kind: type[AnyDriver], record_property: Callable[[str, object], None]
) -> None:
    """Before what was in flight is done; the next one starts from what all before it have left."""
    with Load(server, kind, seed=4, block_size=512 * KIBI, blocks=32) as load:
        for _ in range(15):
            load.fill()
            time.sleep(load.random.uniform(0, 0.001))
            load.kill()
            server.wait_replaced()
            load.died()
            load.check_image()
            load.reconnect()
        load.finish()
        report(record_property, load.statistics)
        assert load.statistics.run_again > 0


class ByHand(Server):
    """Without a supervisor: the whole `vhu-legacy serve` dies, and somebody starts it again."""

    def start(self) -> None:
        options = ["serve", str(self._directory / "group.toml"), "--run-dir", str(self._directory / "run")]
        with self._log.open("ab") as log:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "vhu_legacy", *options], stdout=subprocess.PIPE, stderr=log
            )

    def pid(self) -> int:
        return self._parent.pid

    def kill(self) -> None:
        super().kill()
        self._parent.wait(LIMIT)
        assert self._parent.stdout is not None
        self._parent.stdout.close()
        self.start()


@KINDS
def test_killed_and_started_by_hand(
    tmp_path: Path, kind: type[AnyDriver], record_property: Callable[[str, object], None]
) -> None:
    server = ByHand(tmp_path)
    try:
        server.wait_ready()
        with Load(server, kind, seed=5) as load:
            load.rounds(3, 0.1)
            report(record_property, load.statistics)
            assert load.statistics.kills == 3
    finally:
        server.stop()
