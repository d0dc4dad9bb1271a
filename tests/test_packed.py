# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packed rings over vhost-user: what test_blk.py and test_vhost_user.py show of split rings, as far as it differs."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .conftest import GroupFactory, RunningGroup
from .frontend import (
    AVAIL,
    BLK_HEADER,
    INDIRECT,
    IOERR,
    NEXT,
    OK,
    STATE,
    UNSUPP,
    USED,
    WRITE,
    Buffer,
    ConnectionLost,
    F,
    GuestMemory,
    PackedBlkDriver,
    PackedQueue,
    Place,
    R,
    Refused,
    Region,
    T,
    bits,
    wait_until,
)

SIZE = 4 << 20
DISK, RAM, QUEUES, SPLIT_ONLY, ORDERED, VICTIM = range(1, 7)
PLAIN = bits(F.VERSION_1, F.PROTOCOL_FEATURES, F.RING_PACKED, F.MQ, F.FLUSH)
"""No INDIRECT, no EVENT_IDX."""


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    for name in ("disk.raw", "victim.raw"):
        (start_module_group.directory / name).write_bytes(pattern(SIZE))
    return start_module_group(
        """
        [group]
        name = "packed"
        [[members]]
        type = "blk"
        image = "disk.raw"
        serial = "packed"
        packed = true
        [[members]]
        type = "blk"
        image = "ram:4MiB"
        packed = true
        queue_size = 1024
        legacy = false
        [[members]]
        type = "blk"
        image = "ram:4MiB"
        packed = true
        queues = 4
        [[members]]
        type = "blk"
        image = "ram:4MiB"
        [[members]]
        type = "blk"
        image = "ram:4MiB"
        packed = true
        in_order = true
        [[members]]
        type = "blk"
        image = "victim.raw"
        packed = true
        """
    )


@pytest.fixture
def driver(group: RunningGroup) -> Iterator[PackedBlkDriver]:
    """A running driver on member 1."""
    with make(group, DISK) as driver:
        yield driver.start()
    group.wait_detached(DISK)


def make(group: RunningGroup, member: int, **options: Any) -> PackedBlkDriver:
    group.wait_detached(member)
    return PackedBlkDriver(group.socket(member), **options)


def on_disk(group: RunningGroup, sector: int, size: int) -> bytes:
    with (group.directory / "disk.raw").open("rb") as file:
        file.seek(512 * sector)
        return file.read(size)


# --- negotiation ------------------------------------------------------------------------------------------------------


def test_what_is_offered(group: RunningGroup) -> None:
    wanted = {DISK: (True, False), RAM: (True, False), SPLIT_ONLY: (False, False), ORDERED: (True, True)}
    for member, right in wanted.items():
        with make(group, member) as driver:
            offered = driver.connection.get_u64(R.GET_FEATURES)
            assert (bool(offered >> F.RING_PACKED & 1), bool(offered >> F.IN_ORDER & 1)) == right


def test_not_where_it_is_not_offered(group: RunningGroup) -> None:
    with make(group, SPLIT_ONLY) as driver:
        driver.negotiate()
        with pytest.raises((Refused, ConnectionLost)):
            driver.connection.set_u64(R.SET_FEATURES, driver.accepted | bits(F.RING_PACKED))


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests(group: RunningGroup, driver: PackedBlkDriver) -> None:
    assert driver.read(0, 4096) == pattern(SIZE)[:4096]
    data = os.urandom(65536)
    driver.write(100, data)
    assert driver.read(100, 65536) == data
    assert on_disk(group, 100, 65536) == data
    driver.flush()
    assert driver.get_id() == "packed"
    assert driver.segments(T.WRITE_ZEROES, [(100, 8, 0)]).status == OK
    assert driver.segments(T.DISCARD, [(108, 8, 0)]).status == OK
    assert driver.read(100, 8192) == bytes(8192)
    assert driver.read(116, 512) == data[8192 : 8192 + 512]
    for result in (
        driver.request(77),
        driver.request(T.IN, SIZE // 512, in_size=512),
        driver.request(T.IN, 0, in_size=100),
        driver.segments(T.DISCARD, [(SIZE // 512, 8, 0)]),
    ):
        assert result.status in (IOERR, UNSUPP)


@pytest.mark.parametrize("indirect", [False, True], ids=["chain", "table"])
@pytest.mark.parametrize("features", [PLAIN | bits(F.INDIRECT), None], ids=["plain", "event-idx"])
def test_any_layout(group: RunningGroup, indirect: bool, features: int | None) -> None:
    cuts = [
        ([16, 2048], [2048, 1]),
        ([1] * 16 + [2048], [2049]),
        ([2064], [1] * 7 + [2042]),
        ([3, 13, 2047, 1], [2047, 2]),
    ]
    with make(group, DISK, features=features, queue_size=27) as driver:
        driver.start()
        for seed, (readable, writable) in enumerate(cuts):
            data = pattern(2048, seed)
            assert driver.request(T.OUT, 8, data, readable=readable, indirect=indirect).status == OK
            result = driver.request(T.IN, 8, in_size=2048, writable=writable, indirect=indirect)
            assert (result.status, result.data, result.used) == (OK, data, 2049)


@pytest.mark.parametrize("indirect", [False, True], ids=["chain", "table"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["plain", "event-idx"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 100, 255, 256, 1000, 1024])
def test_queue_sizes(group: RunningGroup, size: int, event_idx: bool, indirect: bool) -> None:
    """Any size will do, not only powers of two; more than two laps of each."""
    features = PLAIN | bits(F.INDIRECT) | bits(F.EVENT_IDX) * event_idx
    if size < 3 and not indirect:
        # a request of three descriptors doesn't fit; two will do
        layout: dict[str, Any] = {"readable": [16], "writable": [513]}
        if size == 1:
            indirect, layout = True, {}
    else:
        layout = {"readable": [16], "writable": [512, 1]}
    with make(group, RAM, features=features, queue_size=size, memory_size=8 << 20) as driver:
        driver.start()
        driver.write(0, b"q" * 512) if size >= 3 else driver.request(T.OUT, 0, b"q" * 512, indirect=True)
        ring = driver.rings[0]
        each = 1 if indirect else len(layout["readable"]) + len(layout["writable"])
        most = size // each
        for _ in range(5):
            mark = driver.memory.mark()
            pending = [driver.submit(T.IN, in_size=512, indirect=indirect, **layout) for _ in range(most)]
            ring.publish()
            for one in pending:
                result = driver.finish(one)
                assert (result.status, result.data, result.used) == (OK, b"q" * 512, 513)
            driver.memory.release(mark)
        assert ring.room == size
        assert driver.stop_ring(0) == ring.position


def test_size_0_and_too_large_ones(group: RunningGroup) -> None:
    for size in (0, 1025, 32768, 65535):
        with make(group, RAM) as driver:
            driver.negotiate()
            driver.set_features()
            with pytest.raises((Refused, ConnectionLost)):
                driver.connection.set_vring(R.SET_VRING_NUM, 0, size)


def test_longest_chains(group: RunningGroup) -> None:
    """As long as the ring, and a table as long as the largest ring there may be."""
    with make(group, RAM, queue_size=64, memory_size=8 << 20) as driver:
        driver.start()
        data = pattern(62 * 512)
        for _ in range(3):
            assert driver.request(T.OUT, 0, data, readable=[16] + [512] * 62).status in (OK, IOERR)
            driver.write(0, data)
            result = driver.request(T.IN, in_size=62 * 512, writable=[512] * 62 + [1])
            assert (result.status, result.data) == (OK, data)
        result = driver.request(T.IN, in_size=1022 * 512, writable=[512] * 1022 + [1], indirect=True)
        assert result.status == OK
        assert result.data[: len(data)] == data


def test_completions_out_of_order(group: RunningGroup) -> None:
    """Used descriptors of chains of different lengths, in whatever order the disk is done with them."""
    rng = random.Random(3)
    with make(group, DISK, queue_size=50, memory_size=32 << 20) as driver:
        driver.start()
        ring = driver.rings[0]
        expected = bytearray(pattern(SIZE))
        at_start = driver.read(0, 1 << 20)
        for _ in range(20):
            mark = driver.memory.mark()
            pending = []
            while ring.room >= 8:
                sector, size = rng.randrange(2048, 4096), rng.choice([512, 4096, 1 << 19])
                writable = [size, 1] if rng.random() < 0.5 else [size // 4, size // 4, size // 2, 1]
                pending.append((sector, driver.submit(T.IN, sector, in_size=size, writable=writable)))
            ring.publish()
            for sector, one in pending:
                result = driver.finish(one)
                assert result.status == OK
                assert result.data == expected[512 * sector : 512 * sector + len(result.data)]
            driver.memory.release(mark)
        assert driver.read(0, 1 << 20) == at_start


def test_in_order(group: RunningGroup) -> None:
    """Each has a used descriptor of its own, in the order of the ring: the driver here insists on that."""
    with make(group, ORDERED, queue_size=21, memory_size=16 << 20) as driver:
        driver.start()
        ring = driver.rings[0]
        assert ring.in_order
        for _ in range(20):
            mark = driver.memory.mark()
            for size in (1 << 20, 512, 1 << 18, 512, 512, 1 << 20):
                driver.submit(T.IN, in_size=size)
            ring.publish()
            ring.wait_used(6)
            driver.memory.release(mark)
        assert driver.stop_ring(0) == ring.position


def test_multi_queue(group: RunningGroup) -> None:
    with make(group, QUEUES, queues=4, queue_size=10) as driver:
        driver.start()
        for round_ in range(8):
            for queue in range(4):
                driver.write(8 * queue, bytes([queue + round_]) * 512, queue=queue)
        for queue in range(4):
            assert driver.read(8 * queue, 512, queue=3 - queue) == bytes([queue + 7]) * 512
        assert driver.stop() == [ring.position for ring in driver.rings]


# --- notifications and interrupts -------------------------------------------------------------------------------------


def settle(driver: PackedBlkDriver) -> None:
    """The first call after the start is for what may have been missed."""
    driver.request(T.IN, in_size=512, polled=True)
    time.sleep(0.05)
    driver.rings[0].take_calls()


def test_no_call_while_disabled(group: RunningGroup) -> None:
    for features in (PLAIN, PLAIN | bits(F.EVENT_IDX)):
        with make(group, RAM, features=features) as driver:
            driver.start()
            ring = driver.rings[0]
            settle(driver)
            ring.set_driver_event(ring.DISABLE)
            for _ in range(20):
                driver.request(T.IN, in_size=512, polled=True)
            time.sleep(0.05)
            assert ring.take_calls() == 0
            ring.set_driver_event(ring.ENABLE)
            driver.request(T.IN, in_size=512, polled=True)
            ring.wait_call()


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize("ahead", [0, 1, 5, 14])
def test_call_at_a_place(group: RunningGroup, size: int, ahead: int) -> None:
    """Across the wrap as well: so many used descriptors on, and not before."""
    with make(group, RAM, queue_size=size) as driver:
        driver.start()
        ring = driver.rings[0]
        settle(driver)
        for _ in range(6):
            ring.set_driver_event(ring.AT_PLACE, ring.used.after(ahead, size))
            for _ in range(ahead):
                assert driver.request(T.IN, in_size=512, polled=True, indirect=True).status == OK
            time.sleep(0.03)
            assert ring.take_calls() == 0
            driver.request(T.IN, in_size=512, polled=True, indirect=True)
            ring.wait_call()
            time.sleep(0.01)
            assert ring.take_calls() == 0


def test_call_at_a_place_inside_a_chain(group: RunningGroup) -> None:
    """Drivers ask for places without knowing where a used descriptor will be: one that is skipped counts."""
    with make(group, RAM) as driver:
        driver.start()
        ring = driver.rings[0]
        settle(driver)
        ring.set_driver_event(ring.AT_PLACE, ring.used.after(1, ring.size))
        driver.request(T.IN, in_size=512, polled=True)
        ring.wait_call()


def test_device_asks_for_kicks_when_it_sleeps(group: RunningGroup) -> None:
    """At the place where it will go on, or in general without EVENT_IDX; while it works it doesn't want any."""
    for features in (PLAIN, PLAIN | bits(F.EVENT_IDX)):
        with make(group, RAM, features=features, queue_size=13) as driver:
            driver.start()
            ring = driver.rings[0]
            for _ in range(20):
                driver.read(0, 512)
                if features & bits(F.EVENT_IDX):
                    wait_until(lambda ring=ring: ring.device_event == (ring.AT_PLACE, ring.avail))
                else:
                    wait_until(lambda ring=ring: ring.device_event[0] == ring.ENABLE)


def test_kick_that_is_not_wanted_is_not_needed(group: RunningGroup) -> None:
    """The driver believes the device's event structure to the letter; a missing kick would show as a time-out."""
    for features in (PLAIN, PLAIN | bits(F.EVENT_IDX)):
        with make(group, RAM, features=features, queue_size=50) as driver:
            driver.start()
            ring = driver.rings[0]
            for _ in range(300):
                mark = driver.memory.mark()
                pending = []
                for _ in range(3):
                    pending.append(driver.submit(T.IN, in_size=512))
                    ring.publish()
                for one in pending:
                    assert driver.finish(one).status == OK
                driver.memory.release(mark)
            assert ring.kicks <= 900


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 17])
def test_stop_and_go_on_at_each_place(group: RunningGroup, size: int) -> None:
    """Both indices and both wrap counters, through more than two laps."""
    with make(group, RAM, queue_size=size) as driver:
        driver.start()
        ring = driver.rings[0]
        wraps = set()
        for number in range(2 * size + 5):
            base = driver.stop_ring(0)
            assert base == ring.position
            wraps.add(ring.avail.wrap)
            driver.start_ring(0, base)
            driver.write(number, bytes([number]) * 512)
            assert driver.read(number, 512) == bytes([number]) * 512
        assert wraps == {0, 1}


def test_stop_with_chains_that_were_not_taken(group: RunningGroup) -> None:
    with make(group, RAM, queue_size=8) as driver:
        driver.start()
        ring = driver.rings[0]
        for _ in range(10):
            driver.read(0, 512)
            before = driver.stop_ring(0)
            pending = [driver.submit(T.IN, in_size=512) for _ in range(2)]
            ring.publish()
            time.sleep(0.005)
            assert ring.take_used() == []
            driver.start_ring(0, before)
            # nobody kicks: what came while it was stopped is looked for
            assert [driver.finish(one).status for one in pending] == [OK, OK]


def test_vring_base_of_a_ring_that_never_ran(group: RunningGroup) -> None:
    with make(group, RAM) as driver:
        driver.negotiate()
        driver.set_features()
        assert driver.stop_ring(0) == 0x8000_8000
        driver.connection.set_vring(R.SET_VRING_BASE, 0, 0x0005_0007)
        assert driver.stop_ring(0) == 0x0005_0007


@pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
def test_another_connection_goes_on(group: RunningGroup, track: bool) -> None:
    """Told where: a back end that was stopped in order, and its successor."""
    with make(group, RAM, queue_size=11, track=track) as driver:
        driver.start()
        for number in range(25):
            driver.write(number, bytes([number]) * 512)
            driver.stop()
            group_position = driver.rings[0].stopped_at
            assert group_position == driver.rings[0].position
            driver.connection.close()
            group.wait_detached(RAM)
            driver.reconnect()
            assert driver.read(number, 512) == bytes([number]) * 512
        assert driver.rings[0].take_used() == []


def test_reset_begins_anew(group: RunningGroup) -> None:
    with make(group, RAM, queue_size=7) as driver:
        driver.start()
        for _ in range(3):
            for _ in range(5):
                driver.read(0, 512)
            driver.connection.set(R.RESET_DEVICE)
            driver.rings[0].restart()
            driver.set_features()
            driver.start_ring(0)
        driver.read(0, 512)
        assert driver.stop_ring(0) == driver.rings[0].position


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_added_while_the_ring_runs(group: RunningGroup, driver: PackedBlkDriver) -> None:
    data = driver.read(0, 512)
    more = GuestMemory(1 << 20)
    ring, memory = driver.rings[0], driver.memory
    try:
        region = Region(0x9000_0000, 1 << 20, 0x7D00_0000_0000, 0, more.fd)
        for _ in range(3):
            driver.add_region(region)
            more.map[0:512] = bytes(512)
            header = memory.allocate(17, 1)
            memory.write(header, BLK_HEADER.pack(T.IN, 0, 0) + b"\xff")
            ring.add([Buffer(header, 16), Buffer(region.guest, 512, True), Buffer(header + 16, 1, True)])
            ring.publish()
            ring.wait_used()
            assert memory.read(header + 16, 1) == b"\0"
            assert more.map[0:512] == data
            driver.remove_region(region)
            driver.read(0, 512)
    finally:
        more.close()


def test_ring_s_own_memory_is_replaced_while_it_runs(group: RunningGroup, driver: PackedBlkDriver) -> None:
    (region,) = driver.memory.regions
    for _ in range(5):
        driver.read(0, 512)
        driver.remove_region(region)
        pending = driver.submit(T.IN, in_size=512)
        driver.rings[0].publish(kick=True)
        time.sleep(0.01)
        driver.add_region(region)
        assert driver.finish(pending).status == OK


# --- bad rings --------------------------------------------------------------------------------------------------------

GUEST = GuestMemory.GUEST_BASE


def header_at(driver: PackedBlkDriver) -> int:
    address = driver.memory.allocate(17, 16)
    driver.memory.write(address, BLK_HEADER.pack(T.IN, 0, 0) + b"\xff")
    return address


def chain(*descriptors: tuple[int | None, int, int, int]) -> Callable[[PackedBlkDriver], None]:
    """Descriptors as they are, (address, size, flags, buffer ID); None: the address of a request's header."""

    def act(driver: PackedBlkDriver) -> None:
        ring = driver.rings[0]
        for address, size, flags, number in descriptors:
            ring.put(header_at(driver) if address is None else address, size, flags, number)
        ring.publish(kick=True)

    return act


def table(*entries: tuple[int, int, int], size: int | None = None) -> Callable[[PackedBlkDriver], None]:
    def act(driver: PackedBlkDriver) -> None:
        memory, ring = driver.memory, driver.rings[0]
        data = b"".join(struct.pack("<QIHH", address, length, 0, flags) for address, length, flags in entries)
        at = memory.allocate(max(len(data), 16), 16)
        memory.write(at, data)
        ring.put(at, len(data) if size is None else size, INDIRECT, 0)
        ring.publish(kick=True)

    return act


def same_id_twice(driver: PackedBlkDriver) -> None:
    """The first one is still in flight: both come in one batch."""
    ring = driver.rings[0]
    for _ in range(2):
        header = header_at(driver)
        ring.put(header, 16, NEXT, 0)
        ring.put(driver.memory.allocate(1 << 20), 1 << 20, WRITE | NEXT, 0)
        ring.put(header + 16, 1, WRITE, 3)
    ring.publish(kick=True)


def whole_lap_and_more(driver: PackedBlkDriver) -> None:
    """A chain without an end: every descriptor there is says that there is another."""
    ring = driver.rings[0]
    for _ in range(ring.size):
        ring.put(header_at(driver), 1, NEXT, 0)
    ring.publish(kick=True)


BAD: list[tuple[str, str, int | None, Callable[[PackedBlkDriver], None]]] = [
    ("buffer-id-as-large-as-the-ring", "ring.buffer-id", None, chain((None, 17, WRITE, 16))),
    ("buffer-id-65535", "ring.buffer-id", None, chain((None, 17, WRITE, 65535))),
    ("buffer-id-in-flight", "ring.buffer-id", None, same_id_twice),
    ("chain-without-an-end", "ring.chain-length", None, whole_lap_and_more),
    ("address-outside", "ring.buffer-address", None, chain((0x1000, 16, 0, 0))),
    ("address-at-the-end", "ring.buffer-address", None, chain((GUEST + (4 << 20) - 8, 16, 0, 0))),
    ("address-wraps", "ring.buffer-address", None, chain(((1 << 64) - 8, 16, 0, 0))),
    ("length-0", "ring.zero-length", None, chain((None, 0, 0, 0))),
    ("wrong-order", "ring.buffer-order", None, chain((GUEST, 16, WRITE | NEXT, 0), (GUEST + 64, 16, 0, 0))),
    ("table-not-negotiated", "ring.indirect-not-negotiated", PLAIN, table((GUEST, 16, 0))),
    ("table-of-0-bytes", "ring.indirect-length", None, table(size=0)),
    ("table-of-17-bytes", "ring.indirect-length", None, table((GUEST, 16, 0), (GUEST, 1, WRITE), size=17)),
    ("table-too-long", "ring.indirect-length", None, table((GUEST, 16, 0), size=16 * 1025)),
    ("table-outside", "ring.indirect-address", None, chain((0x2000, 32, INDIRECT, 0))),
    ("table-with-next", "ring.indirect-next", None, chain((GUEST, 32, INDIRECT | NEXT, 0), (GUEST, 16, 0, 0))),
    ("table-at-the-end", "ring.indirect-next", None, chain((None, 16, NEXT, 0), (GUEST, 32, INDIRECT, 0))),
    ("no-status", "blk.request-status", None, chain((None, 16, 0, 0))),
]


@pytest.mark.parametrize(("rule", "features", "act"), [one[1:] for one in BAD], ids=[one[0] for one in BAD])
def test_bad_ring(group: RunningGroup, rule: str, features: int | None, act: Callable[[PackedBlkDriver], None]) -> None:
    """Breaks its own member, and no other; a reset mends it."""
    with make(group, RAM) as other, make(group, VICTIM, features=features) as driver:
        other.start()
        driver.start()
        driver.write(1, b"v" * 512)
        act(driver)
        broken = group.wait_member(VICTIM, lambda state: state["broken"], "broken")["broken"]
        assert broken["rule"] == rule, broken
        assert broken["queue"] == 0
        assert driver.connection.get_u64(R.GET_STATUS) & 0x40
        assert other.read(0, 512) is not None
        assert group.member(RAM)["broken"] is None
        driver.connection.set(R.RESET_DEVICE)
        driver.rings[0].restart()
        driver.set_features()
        driver.start_ring(0)
        assert driver.read(1, 512) == b"v" * 512
        assert group.member(VICTIM)["broken"] is None
    group.wait_detached(VICTIM)


@pytest.mark.parametrize(
    "base",
    [0x0010_0000, 0x0000_0010, 0x8010_8010, 0xFFFF_FFFF, 0x8003_0004, 0x0004_0003],
    ids=["used-beyond", "avail-beyond", "both-beyond", "all-ones", "more-than-a-lap", "used-ahead"],
)
def test_bad_base(group: RunningGroup, base: int) -> None:
    """Not a position of a ring of 16: indices beyond it, or sides that are further apart than a lap."""
    with make(group, VICTIM, track=False) as driver:
        driver.negotiate()
        driver.make_rings()
        driver.set_features()
        driver.share_memory()
        with pytest.raises((Refused, ConnectionLost)):
            driver.start_ring(0, base)
    group.wait_detached(VICTIM)
    assert group.member(VICTIM)["last-error"]["rule"] == "ring.position"


def test_ring_that_is_scribbled_over(group: RunningGroup) -> None:
    """Random descriptors, random events, random flags, and kicks: nothing but this member may notice."""
    rng = random.Random(4712)
    with make(group, RAM) as other:
        other.start()
        for _ in range(40):
            with make(group, VICTIM, memory_size=1 << 20) as driver:
                driver.start()
                ring, memory = driver.rings[0], driver.memory
                for step in range(4):
                    for index in range(16):
                        address = rng.choice([GUEST + rng.randrange(1 << 20), rng.getrandbits(64), ring.desc])
                        size = rng.choice([16, 1, 512, rng.getrandbits(32), 32])
                        number = rng.choice([index, rng.getrandbits(16)])
                        flags = rng.randrange(8) | rng.choice([AVAIL, USED, AVAIL | USED, 0])
                        memory.write(ring.desc + 16 * index, struct.pack("<QIHH", address, size, number, flags))
                    memory.write(ring.driver, rng.randbytes(4))
                    if step == 2:
                        memory.write(ring.device, rng.randbytes(4))
                    ring.kick()
                    driver.connection.barrier()
            other.read(0, 512)
    group.wait_detached(VICTIM)
    assert group.alive()
    with make(group, VICTIM) as driver:
        driver.start().read(0, 512)


def test_message_of_a_base_too_large(group: RunningGroup) -> None:
    """A split ring's has 16 bits, a packed one's 32: what is right depends on the features."""
    with make(group, VICTIM) as driver:
        driver.negotiate()
        with pytest.raises((Refused, ConnectionLost)):
            driver.connection.set(R.SET_VRING_BASE, STATE.pack(0, 0x8000_8000))
    group.wait_detached(VICTIM)
    assert group.member(VICTIM)["last-error"]["rule"] == "vring.base"


def test_places() -> None:
    """The driver's own arithmetic."""
    assert Place(14, 1).after(3, 16) == (1, 0)
    assert Place(15, 0).after(1, 16) == (0, 1)
    assert Place.of(Place(5, 1).bits) == (5, 1)
    assert Place().bits | Place().bits << 16 == PackedQueue.FRESH
