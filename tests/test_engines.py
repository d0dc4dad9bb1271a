# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The same front end against both engines: our own session and rings, and the stock daemon of vhost-user-backend.

Each probe drives a member and returns what a front end can see. The two engines must show the same, but for the
differences listed in PERMITTED with their reasons; a listed difference that has gone is an error as well.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import GroupFactory, RunningGroup
from .frontend import (
    CONFIG,
    SEGMENT,
    BlkDriver,
    Buffer,
    Connection,
    ConnectionLost,
    F,
    P,
    R,
    Refused,
    T,
    bits,
)

ENGINES = ("native", "rust-vmm")
SIZE = 1 << 20
SECTORS = SIZE // 512

WRITABLE, READ_ONLY, QUEUES, RAM = 1, 2, 3, 4

Probe = Callable[[RunningGroup], Any]
PROBES: dict[str, Probe] = {}


def probe(function: Probe) -> Probe:
    PROBES[function.__name__] = function
    return function


CONFIG_FILE = """
[group]
name = "engines"
workers = 2
[[members]]
type = "blk"
image = "disk1.raw"
serial = "engine-test"
[[members]]
type = "blk"
image = "disk2.raw"
read_only = true
[[members]]
type = "blk"
image = "disk3.raw"
queues = 2
queue_size = 128
[[members]]
type = "blk"
image = "ram:1MiB"
"""


@pytest.fixture(scope="module")
def groups(start_module_group: GroupFactory) -> dict[str, RunningGroup]:
    groups = {}
    for engine in ENGINES:
        for number in (1, 2, 3):
            data = random.Random(number).randbytes(SIZE)
            (start_module_group.directory / f"disk{number}.raw").write_bytes(data)
        groups[engine] = start_module_group(CONFIG_FILE, engine=engine)
    return groups


def connect(group: RunningGroup, member: int, **options: Any) -> BlkDriver:
    """A driver on a member. The stock daemon makes its listener anew after each connection: try again for a while."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return BlkDriver(group.socket(member), **options)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def outcome(action: Callable[..., Any], *arguments: Any) -> Any:
    """What an action returns, or how it was refused."""
    try:
        return action(*arguments)
    except Refused:
        return "refused"
    except ConnectionLost:
        return "closed"


# --- what is offered -----------------------------------------------------------------------------------------------


@probe
def features(group: RunningGroup) -> Any:
    found = []
    for member in (WRITABLE, READ_ONLY, QUEUES, RAM):
        with connect(group, member) as driver:
            found.append(hex(driver.connection.get_u64(R.GET_FEATURES) & ~bits(F.LOG_ALL)))
    return found


@probe
def logging(group: RunningGroup) -> Any:
    with connect(group, WRITABLE) as driver:
        return bool(driver.connection.get_u64(R.GET_FEATURES) >> F.LOG_ALL & 1)


@probe
def protocol_features(group: RunningGroup) -> Any:
    with connect(group, WRITABLE) as driver:
        driver.connection.get_u64(R.GET_FEATURES)
        value = driver.connection.get_u64(R.GET_PROTOCOL_FEATURES)
    return sorted(bit for bit in range(64) if value >> bit & 1)


@probe
def queue_numbers(group: RunningGroup) -> Any:
    found = []
    for member in (WRITABLE, QUEUES):
        with connect(group, member) as driver:
            driver.negotiate()
            found.append(driver.connection.get_u64(R.GET_QUEUE_NUM))
    return found


@probe
def memory_slots(group: RunningGroup) -> Any:
    with connect(group, WRITABLE) as driver:
        driver.negotiate()
        return driver.connection.get_u64(R.GET_MAX_MEM_SLOTS)


@probe
def config_space(group: RunningGroup) -> Any:
    found = []
    for member in (WRITABLE, READ_ONLY, QUEUES, RAM):
        with connect(group, member) as driver:
            driver.negotiate()
            for offset, size in [(0, 8), (0, 57), (0, 60), (0, 96), (0, 256), (20, 4), (32, 1), (96, 160)]:
                found.append(driver.connection.get_config(offset, size).hex())
    return found


@probe
def config_space_out_of_range(group: RunningGroup) -> Any:
    found = []
    for offset, size in [(0, 257), (200, 100), (256, 1)]:
        with connect(group, WRITABLE) as driver:
            driver.negotiate()
            payload = CONFIG.pack(offset, size, 0) + bytes(size)
            answer = outcome(driver.connection.get, R.GET_CONFIG, payload)
            found.append(answer if isinstance(answer, str) else answer.payload.hex())
    return found


@probe
def write_cache(group: RunningGroup) -> Any:
    found = []
    with connect(group, WRITABLE) as driver:
        driver.negotiate()
        for value in (0, 1, 0):
            driver.connection.set_config(32, bytes([value]))
            found.append(driver.connection.get_config(32, 1).hex())
        driver.connection.set_config(32, b"\1")
    return found


@probe
def config_that_cannot_be_written(group: RunningGroup) -> Any:
    with connect(group, WRITABLE) as driver:
        driver.negotiate()
        return outcome(lambda: driver.connection.set_config(0, bytes(8)))


# --- requests ----------------------------------------------------------------------------------------------------


def script(driver: BlkDriver, seed: int) -> list[Any]:
    """All kinds of requests, good and bad, one after another; what came back."""
    rng = random.Random(seed)
    seen = []

    def do(kind: int, sector: int = 0, out: bytes = b"", in_size: int = 0, **options: Any) -> None:
        result = driver.request(kind, sector, out, in_size, **options)
        seen.append((kind, sector, result.status, result.used, result.data.hex()))

    for indirect in (False, True, 1):
        data = rng.randbytes(2048)
        do(T.OUT, 8, data, indirect=indirect)
        do(T.IN, 8, in_size=2048, indirect=indirect)
        do(T.OUT, 9, data, readable=[7, 9 + 1000, 1048], indirect=indirect)
        do(T.IN, 9, in_size=2048, writable=[1, 1000, 1048], indirect=indirect)
    do(T.FLUSH)
    do(T.FLUSH_OUT)
    do(T.GET_ID, in_size=20)
    do(T.WRITE_ZEROES, 0, SEGMENT.pack(10, 3, 0) + SEGMENT.pack(20, 8, 1))
    do(T.IN, 8, in_size=8192)
    do(T.DISCARD, 0, SEGMENT.pack(16, 8, 0))
    do(T.DISCARD, 0, SEGMENT.pack(16, 8, 1))
    do(T.DISCARD, 0, SEGMENT.pack(SECTORS, 8, 0))
    do(T.WRITE_ZEROES, 0, b"short")
    for kind in (T.IN, T.OUT):
        for sector, size in [(SECTORS, 512), (SECTORS - 1, 1024), (1 << 60, 512), (0, 100), (0, 513)]:
            if kind == T.IN:
                do(kind, sector, in_size=size)
            else:
                do(kind, sector, bytes(size))
    for unknown in (2, 14, 99, 0xFFFF_FFFF):
        do(unknown, in_size=64)
    return seen


EVENT_IDX = bits(F.PROTOCOL_FEATURES, F.VERSION_1, F.EVENT_IDX, F.INDIRECT, F.FLUSH, F.CONFIG_WCE)
NO_EVENT_IDX = EVENT_IDX & ~bits(F.EVENT_IDX)
LEGACY = EVENT_IDX & ~bits(F.VERSION_1)


def requests_of(member: int, **options: Any) -> Probe:
    def run(group: RunningGroup) -> Any:
        with connect(group, member, **options) as driver:
            driver.start()
            seen = script(driver, member)
            return seen, driver.stop_ring(0)

    return run


PROBES["requests_modern"] = requests_of(WRITABLE)
PROBES["requests_no_event_idx"] = requests_of(WRITABLE, features=NO_EVENT_IDX)
PROBES["requests_legacy"] = requests_of(WRITABLE, features=LEGACY, layout="legacy")
PROBES["requests_legacy_small"] = requests_of(WRITABLE, features=LEGACY, layout="legacy", queue_size=8, align=64)
PROBES["requests_read_only"] = requests_of(READ_ONLY)
PROBES["requests_ram"] = requests_of(RAM)
PROBES["requests_three_regions"] = requests_of(WRITABLE, regions=3, memory_size=3 << 20)
PROBES["requests_mem_table"] = requests_of(
    WRITABLE, protocol=bits(P.MQ, P.REPLY_ACK, P.CONFIG), regions=2, memory_size=4 << 20
)
PROBES["requests_no_protocol_features"] = requests_of(WRITABLE, features=EVENT_IDX & ~bits(F.PROTOCOL_FEATURES))


@probe
def images(group: RunningGroup) -> Any:
    return [(group.directory / f"disk{number}.raw").read_bytes().hex() for number in (1, 2, 3)]


@probe
def two_queues(group: RunningGroup) -> Any:
    with connect(group, QUEUES, queues=2, queue_size=64) as driver:
        driver.start()
        seen = []
        for number in range(20):
            queue = number % 2
            driver.write(number, bytes([number]) * 512, queue=queue)
            seen.append(driver.read(number, 512, queue=1 - queue).hex())
        return seen, [driver.stop_ring(index) for index in (0, 1)]


@probe
def positions(group: RunningGroup) -> Any:
    """Stop, look, go on; from a base that wraps."""
    seen = []
    with connect(group, WRITABLE) as driver:
        driver.negotiate()
        driver.make_rings()
        driver.set_features()
        driver.share_memory()
        seen.append(driver.stop_ring(0))
        driver.rings[0].restart(0xFFFA)
        driver.start_ring(0, 0xFFFA)
        for _ in range(3):
            for _ in range(4):
                driver.read(0, 512)
            base = driver.stop_ring(0)
            seen.append(base)
            driver.start_ring(0, base)
            driver.rings[0].kick()
        driver.read(0, 512)
        seen.append(driver.stop_ring(0))
    return seen


@probe
def enable_and_disable(group: RunningGroup) -> Any:
    seen = []
    with connect(group, WRITABLE) as driver:
        driver.start()
        driver.read(0, 512)
        driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 0)
        pending = driver.submit(T.IN, in_size=512)
        driver.rings[0].publish(kick=True)
        time.sleep(0.05)
        seen.append(driver.rings[0].device_used_idx)
        driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 1)
        driver.rings[0].kick()
        seen.append(driver.finish(pending).status)
    return seen


@probe
def reset_device(group: RunningGroup) -> Any:
    with connect(group, WRITABLE) as driver:
        driver.start()
        driver.read(0, 512)
        base = driver.stop_ring(0)
        driver.connection.set(R.RESET_DEVICE)
        driver.rings[0].restart()
        driver.set_features()
        driver.start_ring(0)
        data = driver.read(1, 512)
        return base, data.hex(), driver.stop_ring(0)


@probe
def reconnect(group: RunningGroup) -> Any:
    seen = []
    for _ in range(3):
        with connect(group, WRITABLE) as driver:
            driver.start()
            seen.append(driver.read(0, 512).hex())
    return seen


@probe
def calls(group: RunningGroup) -> Any:
    """How many calls there are for requests one by one, with and without suppression."""
    seen = []
    for accepted, event in [(NO_EVENT_IDX, 0), (EVENT_IDX, 3), (EVENT_IDX, -2)]:
        with connect(group, WRITABLE, features=accepted) as driver:
            driver.start()
            ring = driver.rings[0]
            # the first call after the start is for what may have been missed
            driver.request(T.IN, in_size=512, polled=True)
            time.sleep(0.05)
            ring.take_calls()
            if accepted == EVENT_IDX:
                ring.set_used_event(ring.used_idx + event)
            for _ in range(6):
                driver.request(T.IN, in_size=512, polled=True)
                time.sleep(0.02)
            time.sleep(0.05)
            seen.append(ring.take_calls())
    return seen


@probe
def calls_that_are_not_wanted(group: RunningGroup) -> Any:
    """avail.flags says NO_INTERRUPT."""
    with connect(group, WRITABLE, features=NO_EVENT_IDX) as driver:
        driver.start()
        driver.rings[0].set_flags(1)
        for _ in range(5):
            driver.request(T.IN, in_size=512, polled=True)
        time.sleep(0.05)
        return driver.rings[0].take_calls()


# --- bad input ---------------------------------------------------------------------------------------------------


def bad_ring(spoil: Callable[[BlkDriver], None]) -> Probe:
    """Served before, nothing served after, and a new connection is fine."""

    def run(group: RunningGroup) -> Any:
        with connect(group, RAM) as driver:
            driver.start()
            driver.read(0, 512)
            spoil(driver)
            driver.rings[0].publish(kick=True)
            time.sleep(0.1)
            used = driver.rings[0].device_used_idx
        with connect(group, RAM) as driver:
            driver.start()
            return used, driver.read(0, 512).hex()

    return run


def loop(driver: BlkDriver) -> None:
    driver.rings[0].write_descriptor(0, driver.memory.allocate(16), 16, 1, 0)
    driver.rings[0].put_available(0)


def outside(driver: BlkDriver) -> None:
    driver.rings[0].add([Buffer(0x10, 16), Buffer(0x20, 1, True)])


def far_ahead(driver: BlkDriver) -> None:
    driver.rings[0].avail_idx += 1000


PROBES["bad_ring_loop"] = bad_ring(loop)
PROBES["bad_ring_head"] = bad_ring(lambda driver: driver.rings[0].put_available(5000))
PROBES["bad_ring_address"] = bad_ring(outside)
PROBES["bad_ring_index"] = bad_ring(far_ahead)


def bad_message(send: Callable[[Connection], Any]) -> Probe:
    def run(group: RunningGroup) -> Any:
        with connect(group, RAM) as driver:
            driver.negotiate()
            return outcome(lambda: send(driver.connection))

    return run


PROBES["bad_queue_index"] = bad_message(lambda c: c.set_vring(R.SET_VRING_NUM, 7, 16))
PROBES["bad_features"] = bad_message(lambda c: c.set_u64(R.SET_FEATURES, bits(F.VERSION_1, 34)))
PROBES["bad_request"] = bad_message(lambda c: c.set(99))
PROBES["bad_size"] = bad_message(lambda c: c.set(R.SET_FEATURES, bytes(9)))

PERMITTED: dict[str, tuple[Any, Any, str]] = {
    "protocol_features": (
        [
            P.MQ,
            P.LOG_SHMFD,
            P.REPLY_ACK,
            P.BACKEND_REQ,
            P.CONFIG,
            P.INFLIGHT,
            P.RESET_DEVICE,
            P.CONFIGURE_MEM_SLOTS,
            P.STATUS,
        ],
        [P.MQ, P.REPLY_ACK, P.CONFIG, P.RESET_DEVICE, P.CONFIGURE_MEM_SLOTS],
        "the crates have no GET_STATUS and SET_STATUS, can't send CONFIG_CHANGE, and the adapter keeps no records",
    ),
    "logging": (True, False, "the adapter has no log"),
    "config_space_out_of_range": (
        ["", "", ""],
        ["00" * 12, "c8" + "00" * 11, "0001" + "00" * 10],
        "the specification wants an empty reply; vhost sends offset, size 0 and flags",
    ),
    "bad_request": (
        "refused",
        "closed",
        "vhost closes the connection at once; we give the answer that was asked for first",
    ),
    "bad_size": ("refused", "closed", "as bad_request"),
}
"""Probe: what native shows, what rust-vmm shows, why."""


@pytest.mark.parametrize("name", PROBES)
def test_both_engines_show_the_same(groups: dict[str, RunningGroup], name: str) -> None:
    native, other = (PROBES[name](groups[engine]) for engine in ENGINES)
    if name in PERMITTED:
        left, right, _reason = PERMITTED[name]
        assert (native, other) == (left, right)
    else:
        assert native == other


def test_every_permitted_difference_has_a_probe() -> None:
    assert set(PERMITTED) <= set(PROBES)


def test_scripts_see_errors_and_successes(groups: dict[str, RunningGroup]) -> None:
    """Two engines that refuse everything would agree, too."""
    seen, base = PROBES["requests_modern"](groups["native"])
    assert {status for _, _, status, _, _ in seen} == {0, 1, 2}
    assert base == len(seen)
