# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Requests in flight, in memory that the front end keeps (GET_INFLIGHT_FD, SET_INFLIGHT_FD): rule by rule.

What a killed process leaves is made here by hand, as the protocol lays it out, so that each rule is looked at by
itself. Real kills are in test_kill.py; bad records are in the table of test_bad_input.py.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .conftest import GroupFactory, RunningGroup
from .frontend import (
    BLK_HEADER,
    INDIRECT,
    INFLIGHT,
    OK,
    BlkDriver,
    Buffer,
    ConnectionLost,
    F,
    FrontEnd,
    InflightRegion,
    PackedBlkDriver,
    PackedQueue,
    Place,
    R,
    Refused,
    SplitQueue,
    T,
    bits,
    wait_until,
)

RAM, DISK, SPLIT_ONLY = 1, 2, 3
SIZE = 16 << 20
RING = 16

AnyDriver = FrontEnd[Any]
KINDS = pytest.mark.parametrize("kind", [BlkDriver, PackedBlkDriver], ids=["split", "packed"])


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    disk = start_module_group.directory / "disk.raw"
    disk.touch()
    os.truncate(disk, SIZE)
    return start_module_group(
        """
        [group]
        name = "inflight"
        [[members]]
        type = "blk"
        image = "ram:16MiB"
        queues = 2
        packed = true
        [[members]]
        type = "blk"
        image = "disk.raw"
        queues = 2
        packed = true
        in_order = true
        [[members]]
        type = "blk"
        image = "ram:1MiB"
        """
    )


def make(group: RunningGroup, kind: type[AnyDriver], member: int = RAM, **options: Any) -> AnyDriver:
    group.wait_detached(member)
    return kind(group.socket(member), queue_size=RING, **options)


def is_packed(driver: AnyDriver) -> bool:
    return isinstance(driver, PackedBlkDriver)


def in_flight(driver: AnyDriver, queue: int = 0) -> list[int]:
    assert driver.region is not None
    return driver.region.in_flight(queue, packed=is_packed(driver))


def version(driver: AnyDriver, queue: int = 0) -> int:
    assert driver.region is not None
    return driver.region.split_header(queue)[1]


# --- GET_INFLIGHT_FD ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize(("queues", "size"), [(1, 1), (1, 16), (2, 128), (2, 1000), (2, 1024)])
def test_memory_is_made_as_asked(group: RunningGroup, queues: int, size: int, padding: int) -> None:
    with make(group, BlkDriver) as driver:
        driver.negotiate()
        answer = driver.connection.get(R.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, size) + bytes(padding))
        assert len(answer.payload) == 20 + padding
        bytes_, offset, *rest = INFLIGHT.unpack_from(answer.payload)
        assert rest == [queues, size]
        (fd,) = answer.fds
        try:
            assert bytes_ + offset <= os.fstat(fd).st_size
            # room for either format, each queue's at 64 bytes
            assert bytes_ >= queues * (32 + 32 * size)
            assert bytes_ // queues % 64 == 0
            with mmap.mmap(fd, bytes_, offset=offset) as memory:
                assert not any(memory[:])
                memory[0] = 1
        finally:
            os.close(fd)


def test_memory_for_a_member_without_packed_rings(group: RunningGroup) -> None:
    with make(group, BlkDriver, SPLIT_ONLY) as driver:
        driver.negotiate()
        region = driver.connection.get_inflight(1, 128)
        # QEMU 10.0 asks with its own queue size, and lets the driver have rings of up to 1024
        assert region.size == (16 + 16 * 1024 + 63) // 64 * 64
        region.close()


def test_memory_is_new_each_time(group: RunningGroup) -> None:
    with make(group, BlkDriver) as driver:
        driver.negotiate()
        one, two = (driver.connection.get_inflight(1, 16) for _ in range(2))
        assert os.fstat(one.fd).st_ino != os.fstat(two.fd).st_ino
        one.close()
        two.close()


def test_memory_can_not_shrink(group: RunningGroup) -> None:
    """Whoever holds it: a front end that did that by mistake would break its device."""
    with make(group, BlkDriver) as driver:
        driver.negotiate()
        region = driver.connection.get_inflight(1, 16)
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, 0)
        region.close()


def test_server_keeps_one_at_most(group: RunningGroup) -> None:
    """Nothing of what was asked for; of what was handed over the last, with its fd for a successor of the process."""
    group.wait_detached(RAM)
    before = group.open_fds()
    with make(group, BlkDriver) as driver:
        driver.negotiate()
        attached = group.open_fds()
        for _ in range(20):
            region = driver.connection.get_inflight(2, 1024)
            driver.connection.set_inflight(region)
            region.close()
        wait_until(lambda: group.open_fds() <= attached + 1, what="closing the fds")
        assert Path(f"/proc/{group.pid}/maps").read_text().count("vhost-user-inflight") <= 1
    group.wait_detached(RAM)
    wait_until(lambda: group.open_fds() == before, what="closing all fds")


# --- the record of a running ring -------------------------------------------------------------------------------------


@KINDS
def test_record_of_a_ring_that_is_idle(group: RunningGroup, kind: type[AnyDriver]) -> None:
    with make(group, kind, queues=2) as driver:
        driver.start()
        region = driver.region
        assert region is not None
        for queue in (0, 1):
            assert version(driver, queue) == 1
            assert region.split_header(queue)[2] == RING
        for index in range(RING + 3):
            driver.write(index, bytes([index]) * 512)
        wait_until(lambda: not in_flight(driver))
        if is_packed(driver):
            _, _, _, free, old_free, used, old_used, wrap, old_wrap = region.packed_header()
            ring = driver.rings[0]
            assert isinstance(ring, PackedQueue)
            assert (used, wrap) == ring.used
            assert (old_used, old_wrap) == (used, wrap)
            assert free == old_free < RING
            assert region.packed_header(1)[5:] == (0, 0, 1, 1)
        else:
            assert region.split_header()[4] == RING + 3
            assert region.split_header(1)[4] == 0
        # stopped and started again with the same memory, both know where they were
        driver.stop()
        assert not in_flight(driver)
        driver.connection.set_inflight(region)
        for index, ring in enumerate(driver.rings):
            driver.start_ring(index, ring.stopped_at)
        assert driver.read(3, 512) == bytes([3]) * 512
        assert driver.rings[0].take_used() == []
        assert driver.stop_ring(1) == driver.rings[1].FRESH


@KINDS
def test_memory_beyond_the_region_is_left_alone(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """The front end may have other things in the same file, before and after it."""
    with make(group, kind) as driver:
        driver.negotiate()
        region = InflightRegion.make(1 << 14, 1, RING)
        os.pwrite(region.fd, b"\xa5" * (1 << 14), 0)
        region.offset, region.size = 4096 + 8, (32 + 32 * RING + 63) // 64 * 64
        os.pwrite(region.fd, bytes(region.size), region.offset)
        driver.region = region
        start(driver)
        for index in range(2 * RING):
            driver.write(index, bytes(512))
        driver.stop()
        assert version(driver) == 1
        assert os.pread(region.fd, region.offset, 0) == b"\xa5" * region.offset
        rest = os.pread(region.fd, 1 << 14, region.offset + region.size)
        assert rest == b"\xa5" * len(rest)


def start(driver: AnyDriver) -> None:
    """With `driver.region` as it is."""
    driver.make_rings()
    driver.set_features()
    driver.share_region()
    driver.share_memory()
    for index in range(driver.queues):
        driver.start_ring(index)
    driver.connection.barrier()


@KINDS
def test_region_smaller_than_the_ring(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """Made for smaller rings than the driver then sets up: nothing is recorded, and requests complete in order."""
    with make(group, kind, DISK, memory_size=16 << 20) as driver:
        driver.negotiate()
        small = 128
        assert small < 16 + 16 * RING
        driver.region = InflightRegion.make(small, 1, 2)
        driver.queue_size = RING
        start(driver)
        driver.rings[0].in_order = True
        for _ in range(10):
            # small ones overtake large ones where they may
            mark = driver.memory.mark()
            for size in (1 << 20, 512, 1 << 20, 512):
                driver.submit(T.IN, in_size=size, indirect=True)
            driver.rings[0].publish()
            driver.rings[0].wait_used(4)
            driver.memory.release(mark)
        assert not any(os.pread(driver.region.fd, small, 0))
        assert group.member(DISK)["broken"] is None


@KINDS
def test_reset_clears_the_record(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """The driver knows of nothing any more; what was in flight must not come back with the next start."""
    with make(group, kind, queues=2) as driver:
        driver.start()
        driver.write(0, bytes(512))
        assert version(driver) == 1
        driver.connection.set(R.RESET_DEVICE)
        assert [version(driver, queue) for queue in (0, 1)] == [0, 0]
        # also flags that are left, for whatever reason
        region = driver.region
        assert region is not None
        layout = region.PACKED_ENTRY if is_packed(driver) else region.SPLIT_ENTRY
        for index in range(RING):
            at = region.entry_at(index, packed=is_packed(driver))
            values = list(region.read(layout, at))
            region.write(layout, at, 1, *values[1:])
        for ring in driver.rings:
            ring.restart()
        driver.set_features()
        for index in (0, 1):
            driver.start_ring(index)
        assert driver.read(0, 512) == bytes(512)
        assert not in_flight(driver)
        assert driver.rings[0].take_used() == []
        assert driver.stop_ring(0) != driver.rings[0].FRESH


@KINDS
def test_another_base_than_was_told_begins_anew(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """A guest's driver that was reset while its rings were stopped: firmware hands over to a kernel."""
    with make(group, kind) as driver:
        driver.start()
        for index in range(5):
            driver.write(index, bytes([index]) * 512)
        driver.stop()
        driver.rings[0].restart()
        driver.start_ring(0)
        assert driver.read(4, 512) == b"\4" * 512
        assert driver.rings[0].take_used() == []
        assert not in_flight(driver)
        assert group.member(RAM)["broken"] is None


# --- what a killed process has left -----------------------------------------------------------------------------------


def leave(driver: AnyDriver, counters: Sequence[int], *, untaken: int = 0, sector: int = 0) -> list[tuple[int, int]]:
    """Writes to one sector as a process that was killed leaves them: as many taken as there are `counters`, which say
    in which order. Number and status address of each; those that weren't taken come last.
    """
    assert driver.region is not None
    driver.stop()
    driver.connection.close()
    ring, region, memory = driver.rings[0], driver.region, driver.memory
    made = []
    for index in range(len(counters) + untaken):
        address = memory.allocate(529, 16)
        memory.write(address, BLK_HEADER.pack(T.OUT, 0, sector) + bytes([index + 1]) * 512 + b"\xa5")
        table = memory.allocate(48, 16)
        chain = [Buffer(address, 16), Buffer(address + 16, 512), Buffer(address + 528, 1, True)]
        number = ring.add(chain, indirect=True, table=table)
        made.append((number, address + 528))
        if index >= len(counters):
            continue
        if isinstance(ring, PackedQueue):
            at = region.entry_at(index, packed=True)
            values = (1, index + 1, index, 1, counters[index], number, INDIRECT, 48, table)
            region.write(region.PACKED_ENTRY, at, *values)
        else:
            region.write(region.SPLIT_ENTRY, region.entry_at(number), 1, 0, counters[index])
    ring.publish(kick=False)
    if isinstance(ring, PackedQueue):
        taken = len(counters)
        for index in range(taken, RING):
            values = (0, index + 1, 0, 0, 0, 0, 0, 0, 0)
            region.write(region.PACKED_ENTRY, region.entry_at(index, packed=True), *values)
        place = ring.used
        used = (place.slot, place.slot, place.wrap, place.wrap)
        region.write(region.PACKED_HEADER, region.start_of(0), 0, 1, RING, taken, taken, *used)
    return made


def go_on(group: RunningGroup, driver: AnyDriver, member: int = RAM) -> None:
    """Over to the next process, which is the same one here, but doesn't know that."""
    group.wait_detached(member)
    driver.reconnect()


@KINDS
@pytest.mark.parametrize("done", [0, 1, 3 * RING - 2], ids=["fresh", "used", "wrapping"])
@pytest.mark.parametrize(
    "counters",
    [[0], [0, 1, 2, 3], [3, 2, 1, 0], [7, 3, 900, 5, 4], [2**64 - 1, 5, 2**63], list(range(RING, 0, -1))],
    ids=["one", "in-order", "backwards", "mixed", "large", "full"],
)
def test_run_again_in_the_order_in_which_they_were_taken(
    group: RunningGroup, kind: type[AnyDriver], counters: list[int], done: int
) -> None:
    with make(group, kind) as driver:
        driver.start()
        for _ in range(done):
            driver.read(0, 512)
        untaken = min(3, RING - len(counters))
        made = leave(driver, counters, untaken=untaken, sector=8)
        go_on(group, driver)
        got = [number for number, _ in driver.rings[0].wait_used(len(made))]
        order = sorted(range(len(counters)), key=lambda index: counters[index])
        # what was taken before comes first, then the rest, each once
        right = [made[index] for index in order] + made[len(counters) :]
        assert got == [number for number, _ in right]
        assert [driver.memory.read(status, 1)[0] for _, status in right] == [OK] * len(right)
        last = made.index(right[-1]) + 1
        assert driver.read(8, 512) == bytes([last]) * 512
        assert not in_flight(driver)
        assert driver.rings[0].take_used() == []
        # and on it goes
        for _ in range(2 * RING):
            driver.write(8, bytes(512))
        assert group.member(RAM)["broken"] is None


@KINDS
def test_a_ring_that_stops_has_nothing_in_flight(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """What was in flight before counts as taken: a ring that was never enabled ends it when it is stopped, since the
    position that is told means that everything before it is done.
    """
    with make(group, kind) as driver:
        driver.start()
        made = leave(driver, [2, 1, 0], untaken=2, sector=8)
        group.wait_detached(RAM)
        connection = driver.connection = type(driver.connection)(driver.path)
        before = driver.accepted
        driver.negotiate()
        driver.accepted = before
        driver.set_features()
        driver.share_region()
        driver.share_memory()
        driver.start_ring(0, driver.rings[0].base, enable=False)
        connection.barrier()
        assert len(in_flight(driver)) == 3
        base = driver.stop_ring(0)
        got = [number for number, _ in driver.rings[0].take_used()]
        assert got == [number for number, _ in reversed(made[:3])]
        assert base == (3 if kind is BlkDriver else 0x8003_8003)
        assert not in_flight(driver)
        driver.start_ring(0, base)
        assert [number for number, _ in driver.rings[0].wait_used(2)] == [number for number, _ in made[3:]]
        assert driver.read(8, 512) == b"\5" * 512


def test_last_batch_that_was_published_is_not_run_again(group: RunningGroup) -> None:
    """Split: killed between the used index and striking off. The region's used index is behind the ring's."""
    with make(group, BlkDriver) as driver:
        driver.start()
        made = leave(driver, [0, 1, 2, 3], sector=8)
        ring, region, memory = driver.rings[0], driver.region, driver.memory
        assert region is not None
        assert isinstance(ring, SplitQueue)
        # the second and the third are used; a list from the last one back
        before = ring.used_idx
        for step, index in enumerate((1, 2)):
            place = ring.device + 4 + 8 * ((before + step) % RING)
            memory.write(place, struct.pack("<II", made[index][0], 1))
        memory.set_u16(ring.device + 2, before + 2)
        heads = [number for number, _ in made]
        region.write(region.SPLIT_ENTRY, region.entry_at(heads[2]), 1, heads[1], 2)
        region.write(region.SPLIT_HEADER, region.start_of(0), 0, 1, RING, heads[2], before)
        assert [number for number, _ in ring.take_used()] == heads[1:3]
        for _, status in made:
            memory.write(status, b"\xa5")
        go_on(group, driver)
        assert [number for number, _ in ring.wait_used(2)] == [heads[0], heads[3]]
        assert [memory.read(status, 1) for _, status in made] == [b"\0", b"\xa5", b"\xa5", b"\0"]
        assert region.split_header()[4] == before + 4


@pytest.mark.parametrize("published", [False, True])
def test_last_batch_of_a_packed_ring(group: RunningGroup, published: bool) -> None:
    """Killed while publishing two chains: before the flags of the first one they run again, after them they don't."""
    with make(group, PackedBlkDriver) as driver:
        driver.start()
        made = leave(driver, [0, 1, 2, 3], sector=8)
        ring, region, memory = driver.rings[0], driver.region, driver.memory
        assert region is not None
        assert isinstance(ring, PackedQueue)
        place, ids = ring.used, [number for number, _ in made]
        # the first two are used: their descriptors are written, and their entries are in front of the free list
        flags = 0x8080 if place.wrap else 0
        after = place.after(2, RING)
        for step, number in enumerate(ids[:2]):
            at = ring.desc + 16 * place.after(step, RING).slot
            memory.write(at + 8, struct.pack("<IH", 1, number))
            if step == 1 or published:
                memory.set_u16(at + 14, flags | 2)
        for index, following in ((0, 4), (1, 0)):
            at = region.entry_at(index, packed=True)
            values = list(region.read(region.PACKED_ENTRY, at))
            values[1] = following
            region.write(region.PACKED_ENTRY, at, *values)
        used = (after.slot, place.slot, after.wrap, place.wrap)
        region.write(region.PACKED_HEADER, region.start_of(0), 0, 1, RING, 1, 4, *used)
        if published:
            assert [number for number, _ in ring.take_used()] == ids[:2]
        for _, status in made:
            memory.write(status, b"\xa5")
        go_on(group, driver)
        again = ids[2:] if published else ids
        assert [number for number, _ in ring.wait_used(len(again))] == again
        done = [b"\xa5" if published and index < 2 else b"\0" for index in range(4)]
        assert [memory.read(status, 1) for _, status in made] == done
        assert not in_flight(driver)
        for _ in range(2 * RING):
            driver.write(8, bytes(512))


def test_packed_chain_whose_descriptors_were_written_over(group: RunningGroup) -> None:
    """A chain of three was taken first, another was used before it: its used descriptor is where the first one was."""
    with make(group, PackedBlkDriver) as driver:
        driver.start()
        driver.stop()
        driver.connection.close()
        ring, region, memory = driver.rings[0], driver.region, driver.memory
        assert region is not None
        slow = driver.submit(T.OUT, 8, b"s" * 512)
        quick = driver.submit(T.OUT, 16, b"q" * 512)
        ring.publish(kick=False)
        descriptors = [struct.unpack("<QIHH", memory.read(ring.desc + 16 * index, 16)) for index in range(3)]
        for index, (address, size, number, flags) in enumerate(descriptors):
            values = (int(index == 0), index + 1, 2, 3, 0, number, flags, size, address)
            region.write(region.PACKED_ENTRY, region.entry_at(index, packed=True), *values)
        for index in range(3, RING):
            values = (0, index + 1, 0, 0, 0, 0, 0, 0, 0)
            region.write(region.PACKED_ENTRY, region.entry_at(index, packed=True), *values)
        memory.write(ring.desc, struct.pack("<QIHH", 0, 1, quick.head, 0x8082))
        region.write(region.PACKED_HEADER, region.start_of(0), 0, 1, RING, 3, 3, 3, 3, 1, 1)
        assert ring.take_used() == [(quick.head, 1)]
        go_on(group, driver)
        assert ring.wait_used(1) == [(slow.head, 1)]
        assert slow.data() == b"\0"
        assert quick.data() == b"\xa5", "run again, though it was used"
        assert driver.read(8, 512) == b"s" * 512
        assert ring.used == Place(9, 1)


@KINDS
def test_call_that_died_with_the_process(group: RunningGroup, kind: type[AnyDriver]) -> None:
    """Killed between the used element and the interrupt for it: the next one calls, or the guest waits for ever."""
    with make(group, kind) as driver:
        driver.start()
        driver.read(0, 512)
        driver.rings[0].ask_for_call()
        driver.submit(T.IN, in_size=512)
        driver.rings[0].publish()
        driver.rings[0].wait_call()
        # the one we know of is the one that didn't come
        driver.connection.close()
        group.wait_detached(RAM)
        driver.rings[0].take_calls()
        driver.reconnect()
        driver.rings[0].wait_call(2)
        assert len(driver.rings[0].take_used()) == 1


@KINDS
@pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
def test_front_end_that_hangs_up_with_requests_in_flight(
    group: RunningGroup, kind: type[AnyDriver], track: bool
) -> None:
    """Nobody dies: what was taken ends, and is used; the next connection takes the rest."""
    with make(group, kind, DISK, track=track, memory_size=64 << 20) as driver:
        driver.start()
        for _ in range(5):
            mark = driver.memory.mark()
            ring = driver.rings[0]
            pending = [
                driver.submit(T.OUT, 2048 * index, bytes([index]) * (1 << 20), indirect=True) for index in range(8)
            ]
            ring.publish()
            driver.connection.close()
            group.wait_detached(DISK)
            if isinstance(ring, PackedQueue) and not track:
                # not even QEMU knows where such a ring is
                position = ring.avail.bits | ring.avail.bits << 16
                assert len(ring.wait_used(0)) <= len(pending)
                ring.stopped_at = position
                return
            driver.reconnect()
            while ring.waiting:
                ring.wait_used()
            assert [one.data() for one in pending] == [b"\0"] * 8
            driver.memory.release(mark)
        assert group.member(DISK)["broken"] is None


@KINDS
def test_each_queue_has_its_own(group: RunningGroup, kind: type[AnyDriver]) -> None:
    with make(group, kind, queues=2) as driver:
        driver.start()
        driver.read(0, 512, queue=1)
        made = leave(driver, [1, 0], sector=8)
        go_on(group, driver)
        got = [number for number, _ in driver.rings[0].wait_used(2)]
        assert got == [made[1][0], made[0][0]]
        assert driver.read(8, 512, queue=1) == b"\1" * 512
        assert driver.rings[1].take_used() == []
        assert not in_flight(driver, 0)
        assert not in_flight(driver, 1)


def test_record_that_comes_without_being_asked_for(group: RunningGroup) -> None:
    """SET without GET: memory of the front end's own will do."""
    with make(group, BlkDriver) as driver:
        driver.negotiate()
        driver.region = InflightRegion.make(4096, 1, RING)
        start(driver)
        driver.write(0, bytes(512))
        assert version(driver) == 1
        assert driver.region.split_header()[4] == 1


def test_front_end_without_the_feature(group: RunningGroup) -> None:
    """The messages are refused, and rings are in order."""
    with make(group, BlkDriver, DISK, protocol=bits(), memory_size=16 << 20) as driver:
        driver.start()
        assert driver.region is None
        driver.rings[0].in_order = True
        for size in (1 << 20, 512, 1 << 20, 512):
            driver.submit(T.IN, in_size=size, indirect=True)
        driver.rings[0].publish()
        driver.rings[0].wait_used(4)
        with pytest.raises((ConnectionLost, Refused)):
            driver.connection.get_inflight(1, 16)
    with suppress(ConnectionLost):
        group.wait_detached(DISK)
    deadline = time.monotonic() + 5
    while (error := group.member(DISK)["last-error"]) is None:
        assert time.monotonic() < deadline
    assert error["rule"] == "message.not-negotiated"


def test_in_order_and_a_record_together(group: RunningGroup) -> None:
    with make(group, BlkDriver, DISK, memory_size=16 << 20) as driver:
        driver.start()
        assert driver.accepted >> F.IN_ORDER & 1
        for size in (1 << 20, 512, 1 << 20, 512):
            driver.submit(T.IN, in_size=size, indirect=True)
        driver.rings[0].publish()
        driver.rings[0].wait_used(4)
        assert version(driver) == 1
        wait_until(lambda: not in_flight(driver))
