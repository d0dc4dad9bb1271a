# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The block device as a driver sees it: requests in every framing and ring layout, drivers of every manner, and what
the host finds in the image afterwards.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from .conftest import GroupFactory, RunningGroup
from .frontend import (
    IOERR,
    OK,
    PAGE,
    SECTOR,
    SEGMENT,
    UNSUPP,
    BackendChannel,
    BlkDriver,
    ConnectionLost,
    F,
    P,
    R,
    Refused,
    T,
    bits,
    wait_until,
)

SIZE = 4 << 20
SECTORS = SIZE // SECTOR

DISK, READ_ONLY, QUEUES, NULL, RAM, BLOCKS, MODERN, RESIZE = range(1, 9)


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    for name in ("disk", "read-only", "queues", "blocks", "modern", "resize"):
        (start_module_group.directory / f"{name}.raw").write_bytes(pattern(SIZE))
    return start_module_group(
        """
        [group]
        name = "blk"
        [[members]]
        type = "blk"
        image = "disk.raw"
        serial = "a-serial-of-20-chars"
        [[members]]
        type = "blk"
        image = "read-only.raw"
        read_only = true
        [[members]]
        type = "blk"
        image = "queues.raw"
        queues = 4
        queue_size = 64
        [[members]]
        type = "blk"
        image = "null:4MiB"
        [[members]]
        type = "blk"
        image = "ram:4MiB"
        [[members]]
        type = "blk"
        image = "blocks.raw"
        blk_size = 4096
        serial = "short"
        [[members]]
        type = "blk"
        image = "modern.raw"
        legacy = false
        [[members]]
        type = "blk"
        image = "resize.raw"
        """
    )


@pytest.fixture
def driver(group: RunningGroup) -> Iterator[BlkDriver]:
    """A running modern driver on member 1."""
    group.wait_detached(DISK)
    with BlkDriver(group.socket(DISK)) as driver:
        yield driver.start()
    group.wait_detached(DISK)


def image(group: RunningGroup, name: str = "disk") -> Path:
    return group.directory / f"{name}.raw"


def on_disk(group: RunningGroup, sector: int, size: int, name: str = "disk") -> bytes:
    with image(group, name).open("rb") as file:
        file.seek(sector * SECTOR)
        return file.read(size)


# --- requests -------------------------------------------------------------------------------------------------------


def test_read_and_write(group: RunningGroup, driver: BlkDriver) -> None:
    for sector, size in [(0, 512), (7, 4096), (100, 1536), (SECTORS - 1, 512), (200, 1 << 20)]:
        assert driver.read(sector, size) == on_disk(group, sector, size)
        data = os.urandom(size)
        driver.write(sector, data)
        assert on_disk(group, sector, size) == data
        assert driver.read(sector, size) == data
    driver.flush()
    requests = group.member(DISK)["requests"]
    assert requests["bytes-read"] > 0
    assert requests["failed"] == 0


def test_flush_both_names(driver: BlkDriver) -> None:
    for kind in (T.FLUSH, T.FLUSH_OUT):
        result = driver.request(kind)
        assert (result.status, result.used) == (OK, 1)


def test_get_id(group: RunningGroup, driver: BlkDriver) -> None:
    result = driver.request(T.GET_ID, in_size=20)
    assert (result.status, result.used) == (OK, 21)
    assert result.data == b"a-serial-of-20-chars"
    with BlkDriver(group.socket(BLOCKS)) as other:
        assert other.start().request(T.GET_ID, in_size=20).data == b"short" + bytes(15)


@pytest.mark.parametrize("kind", [2, 3, 10, 14, 16, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_unknown_type(driver: BlkDriver, kind: int) -> None:
    result = driver.request(kind, in_size=512)
    assert result.status == UNSUPP
    assert result.data == b"\xa5" * 512
    driver.read(0, 512)


@pytest.mark.parametrize("size", [1, 100, 511, 513, 4095])
def test_sizes_that_are_no_sectors(group: RunningGroup, driver: BlkDriver, size: int) -> None:
    before = image(group).read_bytes()
    read = driver.request(T.IN, 5, in_size=size)
    assert read.status == IOERR
    assert read.data == b"\xa5" * size
    assert read.used == 0, "the status byte is not at the start of what was written"
    assert driver.request(T.OUT, 5, bytes(size)).status == IOERR
    assert image(group).read_bytes() == before


@pytest.mark.parametrize(
    ("sector", "size"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS + 1000, 512),
        (1 << 55, 512),
        ((1 << 64) - 1, 512),
        ((1 << 64) - 1, 1024),
        ((1 << 63) // 512, 512),
    ],
)
def test_beyond_the_end(group: RunningGroup, driver: BlkDriver, sector: int, size: int) -> None:
    before = image(group).read_bytes()
    assert driver.request(T.IN, sector, in_size=size).status == IOERR
    assert driver.request(T.OUT, sector, bytes(size)).status == IOERR
    assert image(group).read_bytes() == before
    driver.read(SECTORS - 1, 512)


def test_errors_are_counted(group: RunningGroup, driver: BlkDriver) -> None:
    before = group.member(DISK)["requests"]
    driver.request(T.IN, SECTORS, in_size=512)
    driver.request(99, in_size=512)
    wait_until(lambda: group.member(DISK)["requests"]["failed"] >= before["failed"] + 2)
    after = group.member(DISK)["requests"]
    assert after["failed"] == before["failed"] + 2
    assert after["unsupported"] == before["unsupported"] + 1


@pytest.mark.parametrize("unmap", [0, 1])
@pytest.mark.parametrize("member", [DISK, RAM])
def test_write_zeroes(group: RunningGroup, member: int, unmap: int) -> None:
    with BlkDriver(group.socket(member)) as driver:
        driver.start()
        driver.write(0, b"w" * 16384)
        # odd ends, whole pages in between; and two ranges at once
        assert driver.segments(T.WRITE_ZEROES, [(3, 20, unmap), (30, 1, unmap)]).status == OK
        zeroed = bytearray(b"w" * 16384)
        zeroed[3 * 512 : 23 * 512] = bytes(20 * 512)
        zeroed[30 * 512 : 31 * 512] = bytes(512)
        assert driver.read(0, 16384) == zeroed
        if member == DISK:
            assert on_disk(group, 0, 16384) == zeroed
            assert image(group).stat().st_size == SIZE
    group.wait_detached(member)


def test_discard_gives_blocks_back(group: RunningGroup, driver: BlkDriver) -> None:
    driver.write(1024, os.urandom(1 << 20))
    driver.flush()
    os.sync()
    before = image(group).stat().st_blocks
    assert driver.segments(T.DISCARD, [(1024, (1 << 20) // SECTOR, 0)]).status == OK
    os.sync()
    assert image(group).stat().st_blocks <= before - (1 << 20) // 512 + 64
    assert image(group).stat().st_size == SIZE
    driver.read(1024, 1 << 20)


@pytest.mark.parametrize("kind", [T.DISCARD, T.WRITE_ZEROES])
def test_bad_ranges(group: RunningGroup, driver: BlkDriver, kind: T) -> None:
    config = driver.connection.get_config(0, 60)
    at = 36 if kind == T.DISCARD else 48
    max_sectors, max_segments = struct.unpack_from("<II", config, at)
    before = image(group).read_bytes()
    one = SEGMENT.pack(0, 1, 0)
    for sector, sectors, flags, status in [
        (SECTORS, 1, 0, IOERR),
        (SECTORS - 1, 2, 0, IOERR),
        ((1 << 64) - 1, 1, 0, IOERR),
        (0, max_sectors + 1, 0, IOERR),
        (0, 1, 2, UNSUPP),
        (0, 1, 0x8000_0000, UNSUPP),
    ]:
        assert driver.segments(kind, [(sector, sectors, flags)]).status == status, (sector, sectors, flags)
    # nothing of a request with one bad range is carried out
    assert driver.segments(kind, [(0, 8, 0), (SECTORS, 1, 0)]).status == IOERR
    assert driver.segments(kind, [(0, 1, 0)] * (max_segments + 1)).status == IOERR
    for payload in (b"", one[:-1], one + b"\0"):
        assert driver.request(kind, 0, payload).status == IOERR
    if kind == T.DISCARD:
        assert driver.segments(kind, [(0, 1, 1)]).status == UNSUPP
    assert image(group).read_bytes() == before
    assert driver.segments(kind, [(i * 8, 8, 0) for i in range(max_segments)]).status == OK
    # put something back: the next test may want to see it gone
    driver.write(0, before[: max_segments * 4096])


def test_read_only(group: RunningGroup) -> None:
    before = image(group, "read-only").read_bytes()
    with BlkDriver(group.socket(READ_ONLY)) as driver:
        driver.start()
        assert driver.offered >> F.RO & 1
        assert not driver.offered & bits(F.DISCARD, F.WRITE_ZEROES)
        assert driver.read(9, 4096) == before[9 * 512 : 9 * 512 + 4096]
        assert driver.request(T.OUT, 0, b"!" * 512).status == IOERR
        assert driver.segments(T.DISCARD, [(0, 8, 0)]).status in (IOERR, UNSUPP)
        assert driver.segments(T.WRITE_ZEROES, [(0, 8, 0)]).status in (IOERR, UNSUPP)
        driver.flush()
    assert image(group, "read-only").read_bytes() == before
    assert group.member(READ_ONLY)["broken"] is None


def test_null_and_ram(group: RunningGroup) -> None:
    with BlkDriver(group.socket(NULL)) as null:
        null.start()
        assert null.capacity() == SECTORS
        null.write(5, b"gone" * 128)
        assert null.read(5, 512) == bytes(512)
        assert null.request(T.IN, SECTORS, in_size=512).status == IOERR
        assert null.segments(T.DISCARD, [(0, 8, 0)]).status == OK
        null.flush()
    data = os.urandom(65536)
    with BlkDriver(group.socket(RAM)) as ram:
        ram.start()
        ram.write(5, data)
        assert ram.request(T.OUT, SECTORS - 1, bytes(1024)).status == IOERR
    # it outlives its front ends
    with BlkDriver(group.socket(RAM)) as ram:
        assert ram.start().read(5, 65536) == data


def test_config(group: RunningGroup) -> None:
    for member, blk_size, exponent in [(DISK, 512, 3), (BLOCKS, 4096, 0)]:
        with BlkDriver(group.socket(member)) as driver:
            driver.negotiate()
            config = driver.connection.get_config(0, 96)
            assert int.from_bytes(config[:8], "little") == SECTORS
            assert int.from_bytes(config[12:16], "little") >= 126, "seg_max: SeaBIOS and Linux want 126"
            assert int.from_bytes(config[20:24], "little") == blk_size
            assert config[24] == exponent, "physical blocks of 4 KiB"
            assert config[32] == 1
            assert config[60:] == bytes(36)
        group.wait_detached(member)


# --- framing -------------------------------------------------------------------------------------------------------

FRAMINGS: dict[str, tuple[list[int] | None, list[int] | None]] = {
    "as-always": (None, None),
    "header-and-data-together": ([16 + 2048], None),
    "status-with-data": (None, [2048 + 1]),
    "all-in-two": ([16 + 2048], [2048 + 1]),
    "header-in-pieces": ([8, 8, 2048], None),
    "header-byte-by-byte": ([1] * 16 + [2048], None),
    "header-cut-into-data": ([10, 6 + 1000, 1048], [1, 2047 + 1]),
    "data-in-sectors": ([16] + [512] * 4, [512] * 4 + [1]),
    "data-in-odd-pieces": ([16, 1, 511, 700, 836], [3, 1000, 1045, 1]),
    "data-crosses-sectors": ([16, 1000, 1048], [1000, 1048, 1]),
}


@pytest.mark.parametrize("indirect", [False, True, 1], ids=["direct", "indirect", "mixed"])
@pytest.mark.parametrize("member", [DISK, RAM])
@pytest.mark.parametrize(("readable", "writable"), FRAMINGS.values(), ids=list(FRAMINGS))
def test_any_layout(
    group: RunningGroup,
    member: int,
    readable: list[int] | None,
    writable: list[int] | None,
    indirect: bool | int,
) -> None:
    data = os.urandom(2048)
    with BlkDriver(group.socket(member), queue_size=32) as driver:
        driver.start()
        result = driver.request(T.OUT, 40, data, readable=readable, indirect=indirect)
        assert (result.status, result.used) == (OK, 1)
        result = driver.request(T.IN, 40, in_size=2048, writable=writable, indirect=indirect)
        assert (result.status, result.used, result.data) == (OK, 2049, data)
        # an error is reported in the same place
        result = driver.request(T.IN, SECTORS, in_size=2048, writable=writable, indirect=indirect)
        assert (result.status, result.data) == (IOERR, b"\xa5" * 2048)
    if member == DISK:
        assert on_disk(group, 40, 2048) == data
    group.wait_detached(member)


def test_get_id_and_segments_in_pieces(driver: BlkDriver) -> None:
    assert driver.request(T.GET_ID, in_size=20, writable=[1, 7, 13]).data == b"a-serial-of-20-chars"
    ranges = SEGMENT.pack(64, 8, 0) + SEGMENT.pack(80, 8, 0)
    assert driver.request(T.WRITE_ZEROES, 0, ranges, readable=[5, 20, 23]).status == OK
    assert driver.read(64, 4096) == bytes(4096)


def test_longest_chains(group: RunningGroup) -> None:
    """As many segments as seg_max allows, direct and indirect, even with a ring that is smaller than the table."""
    with BlkDriver(group.socket(DISK), queue_size=256) as driver:
        driver.start()
        seg_max = int.from_bytes(driver.connection.get_config(12, 4), "little")
        data = os.urandom(seg_max * 512)
        pieces = [512] * seg_max
        for indirect in (False, True):
            result = driver.request(T.OUT, 0, data, readable=[16, *pieces], indirect=indirect)
            assert result.status == OK
            assert on_disk(group, 0, len(data)) == data
            result = driver.request(T.IN, 0, in_size=len(data), writable=[*pieces, 1], indirect=indirect)
            assert (result.status, result.data) == (OK, data)
    group.wait_detached(DISK)
    with BlkDriver(group.socket(DISK), queue_size=4) as driver:
        driver.start()
        result = driver.request(T.IN, 0, in_size=len(data), writable=[*pieces, 1], indirect=True)
        assert (result.status, result.data) == (OK, data)
    group.wait_detached(DISK)


def test_many_in_flight(group: RunningGroup) -> None:
    """A full ring at once, in random order; every answer belongs to its question."""
    with BlkDriver(group.socket(DISK), queue_size=64) as driver:
        driver.start()
        reference = image(group).read_bytes()
        for _ in range(20):
            mark = driver.memory.mark()
            wanted = [random.randrange(SECTORS - 8) for _ in range(64)]
            pending = [driver.submit(T.IN, sector, in_size=4096, indirect=True) for sector in wanted]
            driver.rings[0].publish()
            for sector, one in zip(wanted, pending, strict=True):
                result = driver.finish(one)
                assert (result.status, result.used) == (OK, 4097)
                assert result.data == reference[sector * 512 : sector * 512 + 4096]
            driver.memory.release(mark)
        assert driver.stop_ring(0) == 20 * 64
    group.wait_detached(DISK)


@pytest.mark.parametrize("stop", ["base", "disconnect", "reset"])
def test_stop_with_requests_in_flight(group: RunningGroup, stop: str) -> None:
    """What was taken is finished; what was acknowledged is in the image."""
    with BlkDriver(group.socket(DISK), queue_size=64, memory_size=16 << 20) as driver:
        driver.start()
        payload = os.urandom(65536)
        pending = [driver.submit(T.OUT, 128 * i, payload, indirect=True) for i in range(32)]
        ring = driver.rings[0]
        ring.publish(kick=True)
        if stop == "base":
            base = driver.stop_ring(0)
            assert ring.device_used_idx == base, "taken but neither finished nor given back"
        elif stop == "reset":
            driver.connection.set(R.RESET_DEVICE)
        else:
            driver.connection.close()
            group.wait_detached(DISK)
        used = ring.device_used_idx
        time.sleep(0.05)
        assert ring.device_used_idx == used, "the ring was touched after it had stopped"
        for head, length in ring.take_used():
            (number,) = (i for i, one in enumerate(pending) if one.head == head)
            assert length == 1
            assert pending[number].data() == bytes([OK])
            assert on_disk(group, 128 * number, 65536) == payload
    group.wait_detached(DISK)


def test_multi_queue(group: RunningGroup) -> None:
    with BlkDriver(group.socket(QUEUES), queues=4, queue_size=64) as driver:
        driver.start()
        assert int.from_bytes(driver.connection.get_config(34, 2), "little") == 4
        data = [os.urandom(4096) for _ in range(4)]
        pending = []
        for _ in range(10):
            for index in range(4):
                pending.append(driver.submit(T.OUT, 100 * index, data[index], queue=index))
        for ring in driver.rings:
            ring.publish()
        for one in pending:
            assert driver.finish(one).status == OK
        for index in range(4):
            # written through one queue, read through another
            assert driver.read(100 * index, 4096, queue=3 - index) == data[index]
            assert on_disk(group, 100 * index, 4096, "queues") == data[index]
        assert [queue["requests"] for queue in group.member(QUEUES)["queues"]] == [11] * 4
        # one stops, the others go on
        assert driver.stop_ring(1) == 11
        for index in (0, 2, 3):
            driver.read(0, 512, queue=index)
    group.wait_detached(QUEUES)


def test_only_some_of_the_queues(group: RunningGroup) -> None:
    """SeaBIOS uses one queue of four; GET_VRING_BASE comes for all."""
    with BlkDriver(group.socket(QUEUES), queues=1) as driver:
        driver.start()
        for index in (1, 2, 3):
            driver.connection.set_vring(R.SET_VRING_ENABLE, index, 1)
        driver.read(0, 512)
        assert [driver.stop_ring(index) for index in range(4)] == [1, 0, 0, 0]
    group.wait_detached(QUEUES)


# --- drivers of every manner ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("queue_size", [4, 128, 256])
@pytest.mark.parametrize("align", [PAGE, 64, 8192])
def test_legacy_layout(group: RunningGroup, align: int, queue_size: int, event_idx: bool) -> None:
    features = bits(F.PROTOCOL_FEATURES, F.FLUSH, F.INDIRECT, *([F.EVENT_IDX] if event_idx else []))
    with BlkDriver(
        group.socket(DISK), features=features, layout="legacy", align=align, queue_size=queue_size
    ) as driver:
        driver.start()
        for number in range(20):
            data = os.urandom(4096)
            driver.write(8 * number, data)
            assert driver.read(8 * number, 4096) == data
            assert on_disk(group, 8 * number, 4096) == data
        info = group.member(DISK)
        assert info["driver-mode"] == "legacy"
        (queue,) = info["queues"]
        assert queue["layout"] == "legacy"
        assert queue["event-idx"] is event_idx
    group.wait_detached(DISK)


def test_legacy_driver_on_a_modern_member(group: RunningGroup) -> None:
    features = bits(F.PROTOCOL_FEATURES)
    with BlkDriver(group.socket(MODERN), features=features, layout="legacy") as driver:
        with pytest.raises((Refused, ConnectionLost)):
            driver.start()
        driver.connection.wait_closed()
    fault = group.wait_detached(MODERN)["last-error"]
    assert fault["rule"] == "features.legacy-refused"
    with BlkDriver(group.socket(MODERN)) as driver:
        driver.start().read(0, 512)
    group.wait_detached(MODERN)


@pytest.mark.parametrize("features", [None, 0, bits(F.PROTOCOL_FEATURES)], ids=["never", "0", "bit-30"])
def test_driver_that_never_accepts_features(group: RunningGroup, features: int | None) -> None:
    """SeaBIOS. QEMU then sends bit 30 alone; others may not send SET_FEATURES at all."""
    with BlkDriver(group.socket(DISK), features=features or 0, layout="legacy", status=False) as driver:
        driver.negotiate()
        if driver.accepted == 0 and features is None:
            # the protocol features can be known without any driver
            assert driver.connection.get_u64(R.GET_PROTOCOL_FEATURES)
        driver.make_rings()
        if features is not None:
            driver.set_features()
        driver.share_memory()
        driver.start_ring(0)
        data = os.urandom(512)
        driver.write(2, data)
        assert driver.read(2, 512) == data
        assert on_disk(group, 2, 512) == data
        assert group.member(DISK)["queues"][0]["running"]
    group.wait_detached(DISK)


def test_driver_that_accepts_features_late(group: RunningGroup) -> None:
    """OVMF: queues are set up first. And QEMU says the same twice."""
    with BlkDriver(group.socket(DISK)) as driver:
        driver.negotiate()
        driver.make_rings()
        driver.share_memory()
        ring, connection = driver.rings[0], driver.connection
        connection.set_vring(R.SET_VRING_NUM, 0, ring.size)
        driver.set_addresses(0)
        connection.set_u64(R.SET_VRING_CALL, 0, [ring.call_fd])
        driver.set_features()
        driver.set_features()
        connection.set_u64(R.SET_VRING_KICK, 0, [ring.kick_fd])
        connection.set_vring(R.SET_VRING_ENABLE, 0, 1)
        driver.set_features()
        driver.read(0, 512)
        # a bit that means nothing to a ring may change under it
        driver.accepted &= ~bits(F.MQ)
        driver.set_features()
        driver.read(0, 512)
    group.wait_detached(DISK)


def test_driver_that_kicks_before_driver_ok(group: RunningGroup) -> None:
    """iPXE and old drivers: DRIVER_OK comes late or never."""
    with BlkDriver(group.socket(DISK), status=False) as driver:
        driver.start()
        assert driver.has(P.STATUS)
        assert driver.connection.get_u64(R.GET_STATUS) == 0
        driver.read(0, 512)
        for value in (1, 3, 11, 15):
            driver.connection.set_u64(R.SET_STATUS, value)
            driver.read(0, 512)
    group.wait_detached(DISK)


def test_driver_that_never_wants_a_call(group: RunningGroup) -> None:
    """Firmware polls the used index: no call fd is ever given."""
    with BlkDriver(group.socket(DISK), features=bits(F.PROTOCOL_FEATURES), layout="legacy") as driver:
        driver.negotiate()
        driver.make_rings()
        driver.set_features()
        driver.share_memory()
        ring, connection = driver.rings[0], driver.connection
        connection.set_vring(R.SET_VRING_NUM, 0, ring.size)
        driver.set_addresses(0)
        connection.set_u64(R.SET_VRING_KICK, 0, [ring.kick_fd])
        connection.set_vring(R.SET_VRING_ENABLE, 0, 1)
        assert driver.request(T.IN, in_size=512, polled=True).status == OK
    group.wait_detached(DISK)


# --- notifications -------------------------------------------------------------------------------------------------

BASIC = bits(F.PROTOCOL_FEATURES, F.VERSION_1)


def settled_calls(driver: BlkDriver) -> int:
    """Calls so far, after giving the device time to send one too many."""
    time.sleep(0.05)
    return driver.rings[0].take_calls()


@pytest.mark.parametrize("member", [DISK, RAM])
def test_no_interrupt_flag(group: RunningGroup, member: int) -> None:
    with BlkDriver(group.socket(member), features=BASIC) as driver:
        driver.start()
        ring = driver.rings[0]
        counted = group.member(member)["queues"][0]["calls"]
        ring.set_flags(1)
        for _ in range(5):
            assert driver.request(T.IN, in_size=512, polled=True).status == OK
        assert settled_calls(driver) == 0
        ring.set_flags(0)
        for _ in range(5):
            assert driver.request(T.IN, in_size=512, polled=True).status == OK
            assert settled_calls(driver) == 1
        assert group.member(member)["queues"][0]["calls"] == counted + 5
    group.wait_detached(member)


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("member", [DISK, RAM])
def test_notify_on_empty(group: RunningGroup, member: int, accepted: bool) -> None:
    """With NOTIFY_ON_EMPTY there is a call when the ring has run empty, whatever the flag says."""
    features = bits(F.PROTOCOL_FEATURES, *([F.NOTIFY_ON_EMPTY] if accepted else []))
    with BlkDriver(group.socket(member), features=features, layout="legacy") as driver:
        driver.start()
        driver.rings[0].set_flags(1)
        for _ in range(3):
            assert driver.request(T.IN, in_size=512, polled=True).status == OK
            assert settled_calls(driver) == (1 if accepted else 0)
    group.wait_detached(member)


@pytest.mark.parametrize("member", [DISK, RAM])
def test_event_idx_suppresses_calls(group: RunningGroup, member: int) -> None:
    with BlkDriver(group.socket(member), features=BASIC | bits(F.EVENT_IDX)) as driver:
        driver.start()
        ring = driver.rings[0]
        # the device may call once when it starts: it can't know what was missed
        assert driver.request(T.IN, in_size=512, polled=True).status == OK
        settled_calls(driver)
        counted = group.member(member)["queues"][0]["calls"]
        # the flag means nothing then
        ring.set_flags(1)
        for _ in range(3):
            base = ring.used_idx
            ring.set_used_event(base + 3)
            for number in range(1, 9):
                assert driver.request(T.IN, in_size=512, polled=True).status == OK
                # at the one that passes base + 3, and not again before used_event moves on
                assert settled_calls(driver) == (1 if number == 4 else 0), number
        assert group.member(member)["queues"][0]["calls"] == counted + 3
    group.wait_detached(member)


def test_event_idx_across_the_wrap(group: RunningGroup) -> None:
    with BlkDriver(group.socket(RAM), features=BASIC | bits(F.EVENT_IDX)) as driver:
        driver.negotiate()
        driver.make_rings()
        driver.set_features()
        driver.share_memory()
        ring = driver.rings[0]
        ring.restart(0xFFFC)
        ring.set_used_event(1)
        driver.start_ring(0, 0xFFFC)
        # the device may call once when it starts: it can't know what was missed
        settled_calls(driver)
        calls = []
        for _ in range(8):
            assert driver.request(T.IN, in_size=512, polled=True).status == OK
            calls.append(settled_calls(driver))
        assert sum(calls[1:]) == 1
        assert calls[5] == 1, "the one that makes the used index pass 1"
    group.wait_detached(RAM)


def test_one_call_for_a_batch(group: RunningGroup) -> None:
    """The used index is published once for what was taken together, so there is one call, not 16."""
    with BlkDriver(group.socket(NULL), features=BASIC | bits(F.EVENT_IDX), queue_size=64) as driver:
        driver.start()
        ring = driver.rings[0]
        for _ in range(3):
            driver.submit(T.IN, in_size=512)
        ring.publish(kick=False)
        time.sleep(0.02)
        ring.set_used_event(ring.used_idx)
        for _ in range(13):
            driver.submit(T.IN, in_size=512)
        ring.publish(kick=True)
        wait_until(lambda: len(ring.take_used()) or ring.used_idx == 16)
        wait_until(lambda: ring.take_used() is not None and ring.used_idx == 16)
        assert settled_calls(driver) == 1
    group.wait_detached(NULL)


def test_device_asks_for_kicks_when_it_sleeps(group: RunningGroup) -> None:
    """A driver that only kicks when asked never hangs: the usual way to lose a request is a race right here."""
    for features in (BASIC, BASIC | bits(F.EVENT_IDX)):
        with BlkDriver(group.socket(NULL), features=features, queue_size=64) as driver:
            driver.start()
            ring = driver.rings[0]
            for number in range(2000):
                mark = driver.memory.mark()
                pending = driver.submit(T.IN, in_size=512)
                ring.publish()
                assert driver.finish(pending, polled=bool(number % 3)).status == OK
                driver.memory.release(mark)
            assert ring.kicks <= 2000
        group.wait_detached(NULL)


# --- changes under a running driver -------------------------------------------------------------------------------


@pytest.mark.parametrize("acked", [0, 1], ids=["answer-0", "answer-1"])
def test_resize_tells_the_driver(group: RunningGroup, acked: int) -> None:
    with BlkDriver(group.socket(RESIZE)) as driver:
        driver.negotiate()
        channel = BackendChannel(driver.connection)
        try:
            driver.make_rings()
            driver.set_features()
            driver.share_memory()
            driver.start_ring(0)
            driver.connection.set_u64(R.SET_STATUS, 15)
            assert driver.request(T.IN, SECTORS, in_size=512).status == IOERR
            for size in (2 * SIZE, 3 * SIZE, SIZE):
                group.execute("member-modify", id=RESIZE, size=size)
                message = channel.receive(acked)
                assert (message.request, message.payload) == (channel.CONFIG_CHANGE, b"")
                assert driver.capacity() == size // SECTOR
                assert image(group, "resize").stat().st_size == size
                data = os.urandom(512)
                driver.write(size // SECTOR - 1, data)
                assert on_disk(group, size // SECTOR - 1, 512, "resize") == data
                assert driver.request(T.IN, size // SECTOR, in_size=512).status == IOERR
            # nothing to tell, nothing told
            group.execute("member-modify", id=RESIZE, size=SIZE)
            driver.read(0, 512)
            channel.socket.settimeout(0.1)
            with pytest.raises(TimeoutError):
                channel.receive()
        finally:
            channel.close()
    group.wait_detached(RESIZE)


def test_resize_before_the_driver_is_ready_is_told_later(group: RunningGroup) -> None:
    """QEMU must not get the message before the device has started; it isn't lost."""
    with BlkDriver(group.socket(RESIZE)) as driver:
        driver.negotiate()
        channel = BackendChannel(driver.connection)
        try:
            group.execute("member-modify", id=RESIZE, size=2 * SIZE)
            driver.connection.barrier()
            channel.socket.settimeout(0.1)
            with pytest.raises(TimeoutError):
                channel.receive()
            channel.socket.settimeout(5)
            driver.make_rings()
            driver.set_features()
            driver.share_memory()
            driver.start_ring(0)
            driver.connection.set_u64(R.SET_STATUS, 15)
            assert channel.receive().request == channel.CONFIG_CHANGE
            assert driver.capacity() == 2 * SECTORS
        finally:
            channel.close()
    group.wait_detached(RESIZE)
    group.execute("member-modify", id=RESIZE, size=SIZE)


def test_resize_without_a_channel(group: RunningGroup) -> None:
    """A front end that can't be told finds out by asking."""
    with BlkDriver(group.socket(RESIZE)) as driver:
        driver.start()
        group.execute("member-modify", id=RESIZE, size=2 * SIZE)
        assert driver.capacity() == 2 * SECTORS
        driver.read(2 * SECTORS - 1, 512)
        group.execute("member-modify", id=RESIZE, size=SIZE)
    group.wait_detached(RESIZE)


def test_silent_channel_blocks_nobody(group: RunningGroup) -> None:
    """The front end never answers on the channel, nor reads from it: the main one is served all the same."""
    with BlkDriver(group.socket(RESIZE)) as driver:
        driver.negotiate()
        channel = BackendChannel(driver.connection)
        try:
            driver.make_rings()
            driver.set_features()
            driver.share_memory()
            driver.start_ring(0)
            driver.connection.set_u64(R.SET_STATUS, 15)
            for number in range(2, 20):
                group.execute("member-modify", id=RESIZE, size=SIZE + number * PAGE)
                assert driver.capacity() == SECTORS + number * PAGE // SECTOR
            driver.read(0, 512)
        finally:
            channel.close()
    group.wait_detached(RESIZE)
    group.execute("member-modify", id=RESIZE, size=SIZE)


def test_read_only_from_now_on(group: RunningGroup) -> None:
    with BlkDriver(group.socket(RESIZE)) as driver:
        driver.start()
        driver.write(0, b"before" + bytes(506))
        group.execute("member-modify", id=RESIZE, read_only=True)
        assert driver.request(T.OUT, 0, bytes(512)).status == IOERR
        assert driver.read(0, 512).startswith(b"before")
        group.execute("member-modify", id=RESIZE, read_only=False)
        driver.write(0, bytes(512))
    group.wait_detached(RESIZE)


def test_image_swapped_under_the_driver(group: RunningGroup) -> None:
    other = group.directory / "other.raw"
    other.write_bytes(b"other" * 1024 * 1024)
    size = len(b"other" * 1024 * 1024)
    with BlkDriver(group.socket(RESIZE)) as driver:
        driver.start()
        driver.write(0, b"r" * 512)
        group.execute("member-modify", id=RESIZE, image="other.raw")
        assert driver.capacity() == size // SECTOR
        assert driver.read(0, 512) == (b"other" * 1024)[:512]
        driver.write(0, b"o" * 512)
        group.execute("member-modify", id=RESIZE, image="resize.raw")
        assert driver.read(0, 512) == b"r" * 512
    assert other.read_bytes()[:512] == b"o" * 512
    group.wait_detached(RESIZE)


def test_image_truncated_behind_our_back(group: RunningGroup) -> None:
    """Requests beyond the new end fail; the member lives."""
    with BlkDriver(group.socket(RESIZE)) as driver:
        driver.start()
        os.truncate(image(group, "resize"), SIZE // 2)
        assert driver.request(T.IN, SECTORS - 8, in_size=4096).status == IOERR
        driver.read(0, 4096)
        os.truncate(image(group, "resize"), SIZE)
        driver.read(SECTORS - 8, 4096)
    group.wait_detached(RESIZE)
    assert group.member(RESIZE)["broken"] is None


def test_write_cache(group: RunningGroup, driver: BlkDriver) -> None:
    """Write-through and write-back do the same to the data; only flushing differs, which a test can't see."""
    driver.connection.set_config(32, b"\0")
    data = os.urandom(4096)
    driver.write(16, data)
    driver.segments(T.WRITE_ZEROES, [(32, 8, 0)])
    assert on_disk(group, 16, 4096) == data
    driver.connection.set_config(32, b"\1")
    driver.flush()


Layout = Literal["modern", "legacy"]


@pytest.mark.parametrize("layout", ["modern", "legacy"])
def test_random_operations_against_a_model(group: RunningGroup, layout: Layout) -> None:
    """A disk is a bytearray, whatever the framing and however many at once."""
    seed = 20261121 + len(layout)
    rng = random.Random(seed)
    features = None if layout == "modern" else bits(F.PROTOCOL_FEATURES, F.EVENT_IDX, F.INDIRECT, F.FLUSH)
    model = bytearray(image(group).read_bytes())
    with BlkDriver(group.socket(DISK), features=features, layout=layout, queue_size=64) as driver:
        driver.start()
        for _ in range(300):
            mark = driver.memory.mark()
            # requests of one batch don't overlap: there is no order between them
            starts = rng.sample(range(0, SECTORS - 64, 64), rng.randint(1, 6))
            batch = []
            for start in starts:
                sector = start + rng.randrange(32)
                size = 512 * rng.randint(1, 16)
                kind = rng.choice([T.IN, T.IN, T.OUT, T.OUT, T.WRITE_ZEROES])
                indirect = rng.random() < 0.5
                if kind == T.IN:
                    cut = rng.randrange(1, size)
                    one = driver.submit(T.IN, sector, in_size=size, writable=[cut, size - cut + 1], indirect=indirect)
                    batch.append((one, bytes(model[sector * 512 : sector * 512 + size])))
                elif kind == T.OUT:
                    data = rng.randbytes(size)
                    cut = rng.randrange(1, size + 16)
                    one = driver.submit(T.OUT, sector, data, readable=[cut, size + 16 - cut], indirect=indirect)
                    model[sector * 512 : sector * 512 + size] = data
                    batch.append((one, b""))
                else:
                    payload = SEGMENT.pack(sector, size // 512, rng.randint(0, 1))
                    one = driver.submit(T.WRITE_ZEROES, 0, payload, indirect=indirect)
                    model[sector * 512 : sector * 512 + size] = bytes(size)
                    batch.append((one, b""))
            driver.rings[0].publish()
            for one, expected in batch:
                result = driver.finish(one)
                assert result.status == OK, f"seed {seed}"
                assert result.data == expected, f"seed {seed}"
            driver.memory.release(mark)
    group.wait_detached(DISK)
    assert image(group).read_bytes() == model, f"seed {seed}"
