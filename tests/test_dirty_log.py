# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The log of written pages, as a live migration uses it: each page that the device writes is marked, and no other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from .conftest import GroupFactory, RunningGroup
from .frontend import (
    BLK_HEADER,
    LOG,
    OK,
    PAGE,
    BlkDriver,
    Buffer,
    ConnectionLost,
    DirtyLog,
    F,
    FrontEnd,
    GuestMemory,
    P,
    PackedBlkDriver,
    R,
    Refused,
    Region,
    T,
    bits,
    wait_until,
)

RAM, DISK = 1, 2
MIB = 1 << 20

AnyDriver = FrontEnd[Any]


@dataclass
class LegacyDriver(BlkDriver):
    """A legacy driver: its ring is in one piece."""

    layout: Literal["modern", "legacy"] = "legacy"


KINDS = pytest.mark.parametrize("kind", [BlkDriver, LegacyDriver, PackedBlkDriver], ids=["split", "legacy", "packed"])
MEMBERS = pytest.mark.parametrize("member", [RAM, DISK], ids=["ram", "file"])


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    (start_module_group.directory / "disk.raw").write_bytes(os.urandom(8 * MIB))
    return start_module_group(
        """
        [group]
        name = "dirty-log"
        [[members]]
        type = "blk"
        image = "ram:8MiB"
        packed = true
        queues = 2
        [[members]]
        type = "blk"
        image = "disk.raw"
        packed = true
        queues = 2
        """
    )


def start(group: RunningGroup, kind: type[AnyDriver], member: int = RAM, **options: Any) -> AnyDriver:
    group.wait_detached(member)
    options.setdefault("memory_size", 16 * MIB)
    return kind(group.socket(member), **options).start()


def pages(address: int, size: int) -> set[int]:
    """The pages that a piece of memory touches."""
    return set(range(address // PAGE * PAGE, address + size, PAGE))


def ring_pages(driver: AnyDriver, queue: int = 0) -> set[int]:
    """What the device writes of a ring: the used ring with the index and its event index, or the packed ring with the
    device's event structure.
    """
    ring = driver.rings[queue]
    if isinstance(driver, PackedBlkDriver):
        return pages(ring.desc, 16 * ring.size) | pages(ring.device, 4)
    return pages(ring.device, 6 + 8 * ring.size)


def at_pages(driver: AnyDriver, size: int) -> int:
    """Memory that begins at a page and has all of its last page."""
    return driver.memory.allocate((size + PAGE - 1) // PAGE * PAGE, PAGE)


def read_to(driver: AnyDriver, address: int, size: int, *, queue: int = 0) -> set[int]:
    """Read to an address; the pages that were written besides the ring's."""
    memory, ring = driver.memory, driver.rings[queue]
    header = at_pages(driver, 16)
    status = at_pages(driver, 1)
    memory.write(header, BLK_HEADER.pack(T.IN, 0, 0))
    memory.write(status, b"\xa5")
    ring.add([Buffer(header, 16), Buffer(address, size, True), Buffer(status, 1, True)])
    ring.publish()
    ring.wait_used()
    assert memory.read(status, 1)[0] == OK
    return pages(address, size) | pages(status, 1)


def settled(driver: AnyDriver, log: DirtyLog) -> set[int]:
    """What is marked once the rings are still: a worker goes on writing event fields after the last completion."""
    found: set[int] = set()
    while True:
        driver.connection.barrier()
        threading.Event().wait(0.02)
        more = log.take()
        if not more - found:
            return found | more
        found |= more


@KINDS
@MEMBERS
def test_exactly_what_is_written(group: RunningGroup, kind: type[AnyDriver], member: int) -> None:
    with start(group, kind, member) as driver:
        log = driver.start_log()
        # the ring's pages are marked as soon as there is a log: whoever had the ring before may have left something
        assert settled(driver, log) == ring_pages(driver)
        for offset, size in [
            (0, 512),
            (PAGE - 512, 512),
            (PAGE - 512, 1024),
            (PAGE - 1, 512),
            (100, 9 * PAGE),
            (0, MIB),
        ]:
            written = read_to(driver, at_pages(driver, offset + size) + offset, size)
            assert settled(driver, log) == written | ring_pages(driver)
        driver.memory.release(driver.memory.GUEST_BASE + 2 * MIB)


@KINDS
@MEMBERS
def test_nothing_else(group: RunningGroup, kind: type[AnyDriver], member: int) -> None:
    """Writes, flushes and failures write a status; the driver's own half of the ring isn't the device's."""
    with start(group, kind, member) as driver:
        log = driver.start_log()
        memory, ring = driver.memory, driver.rings[0]
        settled(driver, log)
        for kind_, size in [(T.OUT, 8 * PAGE), (T.FLUSH, 0), (77, 0)]:
            source = at_pages(driver, 16 + size)
            status = at_pages(driver, 1)
            memory.write(source, BLK_HEADER.pack(kind_, 0, 0))
            ring.add([Buffer(source, 16 + size), Buffer(status, 1, True)])
            ring.publish()
            ring.wait_used()
            assert settled(driver, log) == pages(status, 1) | ring_pages(driver)
        # GET_ID writes what there is
        source, target, status = at_pages(driver, 16), at_pages(driver, 20), at_pages(driver, 1)
        memory.write(source, BLK_HEADER.pack(T.GET_ID, 0, 0))
        ring.add([Buffer(source, 16), Buffer(target, 20, True), Buffer(status, 1, True)])
        ring.publish()
        ring.wait_used()
        assert settled(driver, log) == pages(target, 20) | pages(status, 1) | ring_pages(driver)
        # and an idle device nothing
        assert settled(driver, log) == set()


@KINDS
def test_two_regions_and_two_queues(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """Guest addresses count, whatever the front end's and the file's; buffers may cross from one region to the next."""
    with start(group, kind, queues=2, regions=2) as driver:
        log = driver.start_log()
        assert settled(driver, log) == ring_pages(driver, 0) | ring_pages(driver, 1)
        border = driver.memory.GUEST_BASE + 8 * MIB
        assert settled(driver, log) == set()
        written = read_to(driver, border - 2 * PAGE - 100, 4 * PAGE, queue=1)
        assert settled(driver, log) == written | ring_pages(driver, 1)
        # the queues may share a page, but here only one of them works
        written = read_to(driver, border + 4 * MIB, 512)
        assert settled(driver, log) == written | ring_pages(driver, 0)


@KINDS
def test_indirect_tables_are_only_read(group: RunningGroup, kind: type[AnyDriver]) -> None:
    with start(group, kind) as driver:
        log = driver.start_log()
        settled(driver, log)
        memory, ring = driver.memory, driver.rings[0]
        source, table, target, status = (at_pages(driver, size) for size in (16, 48, PAGE, 1))
        memory.write(source, BLK_HEADER.pack(T.IN, 0, 0))
        chain = [Buffer(source, 16), Buffer(target, PAGE, True), Buffer(status, 1, True)]
        ring.add(chain, indirect=True, table=table)
        ring.publish()
        ring.wait_used()
        assert settled(driver, log) == pages(target, PAGE) | pages(status, 1) | ring_pages(driver)


# --- on and off -------------------------------------------------------------------------------------------------------


@KINDS
def test_only_while_it_is_switched_on(group: RunningGroup, kind: type[AnyDriver]) -> None:
    with start(group, kind) as driver:
        log = DirtyLog(driver.memory)
        driver.set_log(log)
        read_to(driver, at_pages(driver, PAGE), PAGE)
        assert settled(driver, log) == set()
        for _ in range(3):
            driver.switch_log(on=True)
            assert settled(driver, log) == ring_pages(driver)
            written = read_to(driver, at_pages(driver, PAGE), PAGE)
            assert settled(driver, log) == written | ring_pages(driver)
            driver.switch_log(on=False)
            settled(driver, log)
            read_to(driver, at_pages(driver, PAGE), PAGE)
            assert settled(driver, log) == set()
        # it isn't one of the driver's features
        names = group.member(RAM)["driver-features"]["value"]
        assert not names >> F.LOG_ALL & 1


@KINDS
@MEMBERS
def test_nothing_is_missed_while_io_runs(group: RunningGroup, kind: type[AnyDriver], member: int) -> None:
    """A migration in small: memory is copied once while requests go on, then what is marked, until nothing is; the copy
    is then the same as the memory.
    """
    with start(group, kind, member, queue_size=64, memory_size=8 * MIB) as driver:
        memory, ring = driver.memory, driver.rings[0]
        base = memory.GUEST_BASE
        buffers = []
        for _ in range(16):
            header, target, status = memory.allocate(16, 16), at_pages(driver, 16 * PAGE), memory.allocate(1, 64)
            buffers.append((header, target, status))
        flying: dict[int, int] = {}
        idle = list(range(16))
        turn = 0

        def work(rounds: int, *, last: bool = False) -> None:
            nonlocal turn
            for _ in range(rounds):
                while idle and not last:
                    slot = idle.pop()
                    header, target, status = buffers[slot]
                    turn += 1
                    memory.write(header, BLK_HEADER.pack(T.IN, 0, 128 * (turn % 100)))
                    # what the driver writes is the hypervisor's to log
                    guest_wrote.update(pages(header, 16))
                    head = ring.add([Buffer(header, 16), Buffer(target, 16 * PAGE, True), Buffer(status, 1, True)])
                    flying[head] = slot
                ring.publish()
                for head, _ in ring.wait_used():
                    idle.append(flying.pop(head))

        guest_wrote: set[int] = set()
        work(20)
        for _ in range(3):
            log = driver.start_log()
            copy = bytearray(memory.map)
            for _ in range(10):
                work(10)
                for page in log.take():
                    at = page - base
                    copy[at : at + PAGE] = memory.map[at : at + PAGE]
            while flying:
                work(1, last=True)
            driver.stop()
            for page in log.take():
                at = page - base
                copy[at : at + PAGE] = memory.map[at : at + PAGE]
            own = guest_wrote | pages(ring.desc, 16 * 64) | pages(ring.driver, 6 + 2 * 64)
            for at in range(0, len(copy), PAGE):
                if base + at not in own:
                    assert copy[at : at + PAGE] == memory.map[at : at + PAGE], hex(base + at)
            driver.switch_log(on=False)
            driver.start_ring(0, ring.stopped_at)


@KINDS
def test_switched_on_with_requests_in_flight(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """What was taken before and is written after has to be marked."""
    with start(group, kind, DISK, queue_size=64, memory_size=32 * MIB) as driver:
        memory, ring = driver.memory, driver.rings[0]
        for _ in range(10):
            mark = memory.mark()
            places = []
            for index in range(16):
                header, target, status = memory.allocate(16, 16), at_pages(driver, MIB), at_pages(driver, 1)
                memory.write(header, BLK_HEADER.pack(T.IN, 0, 2048 * (index % 8)))
                ring.add([Buffer(header, 16), Buffer(target, MIB, True), Buffer(status, 1, True)])
                places.append((target, status))
            ring.publish()
            before = len(ring.take_used())
            log = driver.start_log()
            done = before + len(ring.take_used())
            if done < 16:
                ring.wait_used(16 - done)
            found = log.take()
            for target, status in places:
                # as a whole or not at all
                marked = pages(target, MIB) & found
                assert marked in (set(), pages(target, MIB))
                assert (status in found) == bool(marked)
            # whoever wasn't done when the log was there
            assert sum(target in found for target, _ in places) >= 16 - done
            driver.switch_log(on=False)
            memory.release(mark)


# --- logs come and go -------------------------------------------------------------------------------------------------


@KINDS
def test_log_is_replaced(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """Memory was added, so QEMU makes a larger one. From the answer on the old one isn't written."""
    with start(group, kind) as driver:
        first = DirtyLog(driver.memory)
        driver.start_log(first)
        settled(driver, first)
        kept = os.dup(first.fd)
        second = DirtyLog(driver.memory, first.size + PAGE)
        driver.set_log(second)
        assert settled(driver, second) == ring_pages(driver)
        written = read_to(driver, at_pages(driver, PAGE), PAGE)
        assert settled(driver, second) == written | ring_pages(driver)
        assert not any(os.pread(kept, first.size, 0))
        os.close(kept)


def test_log_at_an_offset(group: RunningGroup) -> None:
    """What comes before and after it in its file is left alone."""
    with start(group, BlkDriver) as driver:
        log = DirtyLog(driver.memory, offset=3 * PAGE)
        os.ftruncate(log.fd, log.offset + log.size + PAGE)
        os.pwrite(log.fd, b"\xa5" * log.offset, 0)
        os.pwrite(log.fd, b"\xa5" * PAGE, log.offset + log.size)
        driver.start_log(log)
        written = read_to(driver, at_pages(driver, PAGE), PAGE)
        assert settled(driver, log) == written | ring_pages(driver)
        assert os.pread(log.fd, log.offset, 0) == b"\xa5" * log.offset
        assert os.pread(log.fd, PAGE, log.offset + log.size) == b"\xa5" * PAGE


@KINDS
def test_memory_added_meanwhile(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """Beyond the log's end there are no bits: I/O there goes on unmarked, until there is a larger log."""
    with start(group, kind) as driver:
        log = driver.start_log()
        settled(driver, log)
        more = GuestMemory(MIB)
        try:
            region = Region(0x9000_0000, MIB, 0x7D00_0000_0000, 0, more.fd)
            driver.add_region(region)
            memory, ring = driver.memory, driver.rings[0]

            def read_there() -> int:
                header, status = at_pages(driver, 16), at_pages(driver, 1)
                memory.write(header, BLK_HEADER.pack(T.IN, 0, 0))
                chain = [Buffer(header, 16), Buffer(region.guest, 512, True), Buffer(status, 1, True)]
                ring.add(chain)
                ring.publish()
                ring.wait_used()
                assert memory.read(status, 1)[0] == OK
                return status

            status = read_there()
            assert settled(driver, log) == {status} | ring_pages(driver)
            larger = DirtyLog(memory, (region.guest + region.size) // PAGE // 8)
            driver.set_log(larger)
            settled(driver, larger)
            status = read_there()
            assert settled(driver, larger) == {status, region.guest} | ring_pages(driver)
            driver.remove_region(region)
            driver.read(0, 512)
        finally:
            more.close()
    assert group.alive()


def test_log_too_small(group: RunningGroup) -> None:
    """One bit less than memory needs: refused. (That the member is broken then: test_bad_input.py.)"""
    with start(group, BlkDriver) as driver:
        right = DirtyLog(driver.memory)
        assert driver.connection.get(R.SET_LOG_BASE, right.pack(), [right.fd]).u64() == 0
        with pytest.raises((ConnectionLost, Refused, AssertionError)):
            driver.connection.get(R.SET_LOG_BASE, LOG.pack(right.size - 1, 0), [right.fd])
        right.close()
    state = group.wait_detached(RAM)
    assert state["last-error"]["rule"] == "log.size"


@KINDS
def test_log_that_shrinks(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """Its file is the front end's: it breaks its own device with it, and nobody else's."""
    with start(group, kind, DISK) as other, start(group, kind, RAM) as driver:
        log = driver.start_log()
        driver.read(0, 512)
        os.ftruncate(log.fd, 0)
        driver.submit(T.IN, in_size=512)
        driver.rings[0].publish(kick=True)
        broken = group.wait_member(RAM, lambda state: state["broken"], "broken")["broken"]
        assert broken["rule"] == "memory.truncated"
        other.read(0, 512)
        assert group.member(DISK)["broken"] is None
    group.wait_detached(RAM)
    assert group.alive()
    with start(group, kind) as driver:
        driver.read(0, 512)


@KINDS
def test_log_ends_with_a_reset_and_with_the_connection(group: RunningGroup, kind: type[AnyDriver]) -> None:
    def marked(act: Callable[[AnyDriver], None]) -> set[int]:
        with start(group, kind) as driver:
            log = driver.start_log()
            settled(driver, log)
            act(driver)
            return settled(driver, log)

    def reset(driver: AnyDriver) -> None:
        driver.connection.set(R.RESET_DEVICE)
        driver.rings[0].restart()
        driver.accepted &= ~bits(F.LOG_ALL)
        driver.set_features()
        driver.start_ring(0)
        driver.read(0, 512)

    def reconnect(driver: AnyDriver) -> None:
        driver.accepted &= ~bits(F.LOG_ALL)
        driver.stop()
        log = driver.log
        assert log is not None
        log.take()
        driver.connection.close()
        group.wait_detached(RAM)
        driver.reconnect()
        driver.read(0, 512)

    assert marked(reset) <= ring_pages_of(group, kind)
    assert marked(reconnect) == set()


def ring_pages_of(group: RunningGroup, kind: type[AnyDriver]) -> set[int]:
    """Drivers made alike have their rings at the same places."""
    with start(group, kind) as driver:
        return ring_pages(driver)


def test_without_the_protocol_feature(group: RunningGroup) -> None:
    with start(group, BlkDriver, protocol=~bits(P.LOG_SHMFD)) as driver:
        log = DirtyLog(driver.memory)
        with pytest.raises((ConnectionLost, Refused, AssertionError)):
            driver.connection.get(R.SET_LOG_BASE, log.pack(), [log.fd])
        log.close()
    group.wait_detached(RAM)


def test_log_fd_is_taken_and_closed(group: RunningGroup) -> None:
    """SET_LOG_FD: to be told of each page. Nobody wants that any more."""
    with start(group, BlkDriver) as driver:
        before = group.open_fds()
        for _ in range(10):
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            driver.connection.set(R.SET_LOG_FD, b"", [fd])
            os.close(fd)
        wait_until(lambda: group.open_fds() == before, what="closing them")
        driver.read(0, 512)
