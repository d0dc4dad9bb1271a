# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Everything a hostile or broken front end or guest can do, in one table.

Each case has a member of its own. While it runs, another member of the same process serves verified I/O without a
break. Afterwards: the process lives, the fault can be seen over QMP and is logged once, no descriptor has leaked, what
was acknowledged before is in the image, and the member works for the next front end.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Literal

import pytest

from .conftest import GroupFactory, RunningGroup
from .frontend import (
    ADDRESSES,
    BLK_HEADER,
    CONFIG,
    DESCRIPTOR,
    INDIRECT,
    INFLIGHT,
    IOERR,
    LOG,
    NEXT,
    NO_FD,
    OK,
    STATE,
    U64,
    WRITE,
    BackendChannel,
    BlkDriver,
    Buffer,
    Connection,
    ConnectionLost,
    F,
    InflightRegion,
    P,
    R,
    Refused,
    Region,
    T,
    bits,
    wait_until,
)

SIZE = 1 << 20
QUEUE_SIZE = 64
MAX_QUEUE_SIZE = 1024
BYSTANDER = 1
FIRST_VICTIM = 2

After = Literal["closed", "open"]
"""What becomes of the connection: a front end that breaks the protocol loses it; a guest that breaks its rings has a
broken device, which its front end can reset.
"""


@dataclass(frozen=True)
class Case:
    """One bad thing."""

    name: str
    rule: str
    act: Callable[[BlkDriver], None]
    after: After
    started: bool
    """Whether the driver is up and running first, or has negotiated only."""
    features: int | None = None
    image: str = "file"


CASES: list[Case] = []


def case(
    rule: str,
    *,
    after: After = "closed",
    started: bool = True,
    features: int | None = None,
    image: str = "file",
    name: str | None = None,
) -> Callable[[Callable[[BlkDriver], None]], Callable[[BlkDriver], None]]:
    """Put a function into the table."""

    def register(act: Callable[[BlkDriver], None]) -> Callable[[BlkDriver], None]:
        CASES.append(Case(name or act.__name__, rule, act, after, started, features, image))
        return act

    return register


def raw(name: str, rule: str, *, started: bool = False) -> Callable[..., None]:
    """A case that is one message: `raw(name, rule)(request, payload, fds=…, flags=…, size=…)`."""

    def make(
        request: int,
        payload: bytes = b"",
        *,
        fds: Callable[[ExitStack], list[int]] | None = None,
        flags: int | None = None,
        size: int | None = None,
    ) -> None:
        def act(driver: BlkDriver) -> None:
            with ExitStack() as stack:
                numbers = fds(stack) if fds else []
                driver.connection.send(request, payload, numbers, flags=flags, size=size)

        CASES.append(Case(name, rule, act, "closed", started))

    return make


def eventfds(count: int) -> Callable[[ExitStack], list[int]]:
    def make(stack: ExitStack) -> list[int]:
        numbers = []
        for _ in range(count):
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            stack.callback(os.close, fd)
            numbers.append(fd)
        return numbers

    return make


def memfd(size: int) -> Callable[[ExitStack], list[int]]:
    def make(stack: ExitStack) -> list[int]:
        fd = os.memfd_create("bad")
        stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        return [fd]

    return make


def pipe(stack: ExitStack) -> list[int]:
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    return [reader]


def dev_null(stack: ExitStack) -> list[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    stack.callback(os.close, fd)
    return [fd]


def unix_socket(kind: socket.SocketKind) -> Callable[[ExitStack], list[int]]:
    def make(stack: ExitStack) -> list[int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        stack.enter_context(ours)
        stack.enter_context(theirs)
        return [theirs.fileno()]

    return make


# --- messages -----------------------------------------------------------------------------------------------------

raw("unknown-request-99", "message.unknown")(99)
raw("unknown-request-0", "message.unknown")(0)
raw("unknown-request-max", "message.unknown")(0xFFFF_FFFF)
raw("unknown-request-with-fds", "message.unknown")(99, b"x" * 100, fds=eventfds(5))
raw("known-but-not-implemented", "message.unknown")(R.SEND_RARP, bytes(8))
raw("known-but-not-implemented-with-fd", "message.unknown")(R.POSTCOPY_ADVISE, fds=memfd(4096))
raw("version-0", "message.version")(R.GET_FEATURES, flags=0)
raw("version-2", "message.version")(R.GET_FEATURES, flags=2)
raw("marked-as-a-reply", "message.flags")(R.GET_FEATURES, flags=1 | 4)
raw("announces-4097-bytes", "message.size")(R.SET_OWNER, size=4097)
raw("announces-4-gib", "message.size")(R.SET_OWNER, size=0xFFFF_FFFF)
raw("payload-too-long", "message.size")(R.SET_FEATURES, bytes(9))
raw("payload-too-short", "message.size")(R.SET_FEATURES, bytes(7))
raw("payload-missing", "message.size")(R.SET_VRING_ADDR)
raw("set-config-says-more-than-it-has", "message.size")(R.SET_CONFIG, CONFIG.pack(32, 8, 0) + b"\1")
raw("set-config-has-more-than-it-says", "message.size")(R.SET_CONFIG, CONFIG.pack(32, 1, 0) + bytes(8))
raw("mem-table-of-more-regions-than-it-has", "message.size")(R.SET_MEM_TABLE, struct.pack("<II", 2, 0) + bytes(32))
raw("mem-table-of-2-to-the-32-regions", "message.size")(
    R.SET_MEM_TABLE, struct.pack("<II", 0xFFFF_FFFF, 0) + bytes(32), fds=memfd(4096)
)
raw("fd-where-none-belongs", "message.fds")(R.GET_FEATURES, fds=eventfds(1))
raw("two-kick-fds", "message.fds")(R.SET_VRING_KICK, U64.pack(0), fds=eventfds(2))
raw("no-kick-fd", "message.fds")(R.SET_VRING_KICK, U64.pack(0))
raw("kick-fd-and-no-fd-flag", "message.fds")(R.SET_VRING_KICK, U64.pack(NO_FD), fds=eventfds(1))
raw("region-without-fd", "message.fds")(R.ADD_MEM_REG, U64.pack(0) + Region(0, 4096, 0, 0).pack())
raw("mem-table-with-too-few-fds", "message.fds")(
    R.SET_MEM_TABLE,
    struct.pack("<II", 2, 0) + Region(0, 4096, 0, 0).pack() + Region(8192, 4096, 8192, 0).pack(),
    fds=memfd(8192),
)
raw("33-fds", "message.fds")(R.SET_OWNER, fds=eventfds(33))
raw("200-fds", "message.fds")(R.SET_MEM_TABLE, struct.pack("<II", 0, 0), fds=eventfds(200))

raw("kick-fd-is-a-pipe", "vring.kick", started=True)(R.SET_VRING_KICK, U64.pack(0), fds=pipe)
raw("kick-fd-is-a-file", "vring.kick")(R.SET_VRING_KICK, U64.pack(0), fds=memfd(4096))
raw("kick-fd-is-dev-null", "vring.kick")(R.SET_VRING_KICK, U64.pack(0), fds=dev_null)
raw("kick-by-polling", "vring.kick")(R.SET_VRING_KICK, U64.pack(NO_FD))
raw("call-fd-is-a-pipe", "vring.call")(R.SET_VRING_CALL, U64.pack(0), fds=pipe)
raw("call-fd-is-a-file-while-running", "vring.call", started=True)(R.SET_VRING_CALL, U64.pack(0), fds=memfd(4096))
raw("vring-fd-of-a-queue-that-is-not", "vring.index")(R.SET_VRING_KICK, U64.pack(1), fds=eventfds(1))
raw("vring-fd-with-undefined-bits", "vring.fd")(R.SET_VRING_CALL, U64.pack(1 << 9), fds=eventfds(1))
for _request in (R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ENABLE, R.GET_VRING_BASE):
    for _index in (1, 0xFFFF_FFFF):
        raw(f"{_request.name}-of-queue-{_index:#x}", "vring.index")(_request, STATE.pack(_index, 1))
raw("addresses-of-queue-9", "vring.index")(R.SET_VRING_ADDR, ADDRESSES.pack(9, 0, 0, 0, 0, 0))
for _value in (0, 3, 2048, 0x1_0001, 0xFFFF_FFFF):
    raw(f"queue-size-{_value:#x}", "vring.size")(R.SET_VRING_NUM, STATE.pack(0, _value))
raw("base-65536", "vring.base")(R.SET_VRING_BASE, STATE.pack(0, 65536))
raw("enable-2", "vring.enable")(R.SET_VRING_ENABLE, STATE.pack(0, 2))
raw("ring-address-flags", "vring.flags")(R.SET_VRING_ADDR, ADDRESSES.pack(0, 2, 0, 0, 0, 0))
raw("size-changed-while-running", "vring.running", started=True)(R.SET_VRING_NUM, STATE.pack(0, 32))
raw("base-changed-while-running", "vring.running", started=True)(R.SET_VRING_BASE, STATE.pack(0, 32))
raw("addresses-changed-while-running", "vring.running", started=True)(
    R.SET_VRING_ADDR, ADDRESSES.pack(0, 0, 0, 0, 0, 0)
)
raw("features-not-offered", "features.not-offered")(R.SET_FEATURES, U64.pack(bits(F.VERSION_1, 34)))
raw("ring-features-changed-while-running", "features.running", started=True)(
    R.SET_FEATURES, U64.pack(bits(F.VERSION_1, F.PROTOCOL_FEATURES))
)
raw("protocol-features-not-offered", "protocol-features.not-offered")(
    R.SET_PROTOCOL_FEATURES, U64.pack(bits(P.CONFIG, P.PAGEFAULT))
)
raw("status-of-9-bits", "status")(R.SET_STATUS, U64.pack(256))
raw("channel-is-a-pipe", "backend-channel")(R.SET_BACKEND_REQ_FD, fds=pipe)
raw("channel-is-a-datagram-socket", "backend-channel")(R.SET_BACKEND_REQ_FD, fds=unix_socket(socket.SOCK_DGRAM))


def answer_on_the_channel(data: bytes) -> Callable[[BlkDriver], None]:
    def act(driver: BlkDriver) -> None:
        channel = BackendChannel(driver.connection)
        try:
            channel.socket.sendall(data)
            driver.connection.wait_closed()
        finally:
            channel.close()

    return act


case("backend-channel", name="channel-answer-to-nothing")(
    answer_on_the_channel(struct.pack("<III", 7, 5, 8) + bytes(8))
)
case("message.version", name="channel-answer-of-version-3")(
    answer_on_the_channel(struct.pack("<III", 2, 7, 8) + bytes(8))
)
case("message.size", name="channel-answer-of-4-gib")(answer_on_the_channel(struct.pack("<III", 2, 5, 0xFFFF_FFFF)))


# --- half a message -----------------------------------------------------------------------------------------------


def half_a_message(data: bytes, *, silent: bool) -> Callable[[BlkDriver], None]:
    def act(driver: BlkDriver) -> None:
        driver.connection.send_raw(data)
        if silent:
            driver.connection.wait_closed(10)
        else:
            driver.connection.close()

    return act


WHOLE = Connection.encode(R.SET_FEATURES, U64.pack(0))
for _length in (1, 4, 11, 12, 13, 19):
    case("message.torn", name=f"hang-up-after-{_length}-bytes")(half_a_message(WHOLE[:_length], silent=False))
case("message.silence", name="silence-after-the-header")(half_a_message(WHOLE[:12], silent=True))


@case("message.silence", started=False)
def one_byte_now_and_then(driver: BlkDriver) -> None:
    """Never silent for long, never finished: the time for a message is bounded as a whole."""
    begin = time.monotonic()
    for at in range(len(WHOLE) - 1):
        driver.connection.send_raw(WHOLE[at : at + 1])
        time.sleep(0.7)
        assert time.monotonic() - begin < 12, "it would wait for ever"


# --- memory beside the guest's ---------------------------------------------------------------------------------------


def inflight(name: str, rule: str, payload: bytes, fds: Callable[[ExitStack], list[int]]) -> None:
    raw(f"inflight-{name}", rule)(R.SET_INFLIGHT_FD, payload, fds=fds)


for _queues, _size in [(0, 16), (2, 16), (0xFFFF, 16), (1, 0), (1, MAX_QUEUE_SIZE + 1), (1, 0xFFFF)]:
    raw(f"inflight-memory-for-{_queues}-queues-of-{_size}", "inflight.queues")(
        R.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, _queues, _size)
    )
for _length in (0, 16, 19, 25, 32):
    raw(f"inflight-asked-for-in-{_length}-bytes", "message.size")(R.GET_INFLIGHT_FD, bytes(_length))
    raw(f"inflight-given-in-{_length}-bytes", "message.size")(R.SET_INFLIGHT_FD, bytes(_length), fds=memfd(1 << 16))
raw("inflight-asked-for-with-an-fd", "message.fds")(R.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 1, 16), fds=memfd(1 << 16))
raw("inflight-given-without-its-fd", "message.fds")(R.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 0, 1, 16))
raw("inflight-given-while-running", "inflight.running", started=True)(
    R.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 0, 1, 16), fds=memfd(1 << 16)
)
inflight("for-no-queue", "inflight.queues", INFLIGHT.pack(1 << 16, 0, 0, 16), memfd(1 << 16))
inflight("of-no-bytes", "memory.region-size", INFLIGHT.pack(0, 0, 1, 16), memfd(1 << 16))
inflight("misaligned", "inflight.alignment", INFLIGHT.pack(4096, 4, 1, 16), memfd(1 << 16))
inflight("file-too-short", "memory.fd-short", INFLIGHT.pack((1 << 16) + 1, 0, 1, 16), memfd(1 << 16))
inflight("file-too-short-for-the-offset", "memory.fd-short", INFLIGHT.pack(1 << 16, 8, 1, 16), memfd(1 << 16))
inflight("of-exabytes", "memory.fd-short", INFLIGHT.pack(1 << 62, 0, 1, 16), memfd(1 << 16))
inflight("that-wraps", "memory.region-wrap", INFLIGHT.pack((1 << 64) - 8, 4096, 1, 16), memfd(1 << 16))
inflight("is-an-eventfd", "memory.fd-kind", INFLIGHT.pack(4096, 0, 1, 16), eventfds(1))
inflight("is-a-pipe", "memory.fd-kind", INFLIGHT.pack(4096, 0, 1, 16), pipe)
inflight("is-a-device", "memory.fd-kind", INFLIGHT.pack(4096, 0, 1, 16), dev_null)


def record(
    name: str,
    rule: str,
    write: Callable[[InflightRegion], object],
    *,
    size: int = 1 << 14,
) -> None:
    """A case of what the record of a split ring says when it starts."""

    def start(driver: BlkDriver) -> None:
        start_with_record(driver, InflightRegion.make(size, 1, QUEUE_SIZE), write)

    case(rule, started=False, name=f"record-{name}")(start)


def start_with_record(driver: BlkDriver, region: InflightRegion, write: Callable[[InflightRegion], object]) -> None:
    driver.region = region
    write(region)
    driver.make_rings()
    driver.set_features()
    driver.share_region()
    driver.share_memory()
    driver.start_ring(0)
    driver.connection.barrier()


def split_record(
    *, version: int = 1, size: int = QUEUE_SIZE, last: int = 0, used: int = 0, in_flight: Sequence[int] = ()
) -> Callable[[InflightRegion], None]:
    def write(region: InflightRegion) -> None:
        region.write(region.SPLIT_HEADER, region.start_of(0), 0, version, size, last, used)
        for head in in_flight:
            region.write(region.SPLIT_ENTRY, region.entry_at(head), 1, 0, head)

    return write


record("of-version-2", "inflight.version", split_record(version=2))
record("of-version-65535", "inflight.version", split_record(version=0xFFFF))
record("of-another-size", "inflight.size", split_record(size=QUEUE_SIZE // 2, in_flight=[3]))
record("of-a-used-index-ahead", "inflight.used-index", split_record(used=1, in_flight=[3]))
record("of-a-used-index-far-behind", "inflight.used-index", split_record(used=0xFF00, in_flight=[3]))
record("of-a-last-batch-beyond", "inflight.index", split_record(last=QUEUE_SIZE, used=0xFFFE, in_flight=[3]))
record("of-random-bytes", "inflight.version", lambda region: os.pwrite(region.fd, b"\xa5" * region.size, 0))


@case("memory.truncated", after="open", started=False)
def record_truncated(driver: BlkDriver) -> None:
    """Ours is sealed; this one is the front end's own."""
    start_with_record(driver, InflightRegion.make(1 << 14, 1, QUEUE_SIZE), lambda _: None)
    driver.read(0, 512)
    os.ftruncate(driver.region.fd if driver.region else -1, 0)
    driver.submit(T.IN, in_size=512)
    driver.rings[0].publish(kick=True)


def log_message(name: str, rule: str, payload: bytes, fds: Callable[[ExitStack], list[int]] | None) -> None:
    raw(f"log-{name}", rule, started=True)(R.SET_LOG_BASE, payload, fds=fds)


LOG_SIZE = (0x4000_0000 + (4 << 20)) // 4096 // 8
"""Bytes of a log for the driver's memory."""
log_message("too-small", "log.size", LOG.pack(LOG_SIZE - 1, 0), memfd(1 << 18))
log_message("of-no-bytes", "memory.region-size", LOG.pack(0, 0), memfd(1 << 18))
log_message("file-too-short", "memory.fd-short", LOG.pack(LOG_SIZE, 0), memfd(LOG_SIZE - 1))
log_message("file-too-short-for-the-offset", "memory.fd-short", LOG.pack(LOG_SIZE, 4096), memfd(LOG_SIZE))
log_message("of-exabytes", "memory.fd-short", LOG.pack(1 << 62, 0), memfd(1 << 18))
log_message("that-wraps", "memory.region-wrap", LOG.pack((1 << 64) - 8, 4096), memfd(1 << 18))
log_message("is-an-eventfd", "memory.fd-kind", LOG.pack(LOG_SIZE, 0), eventfds(1))
log_message("is-a-pipe", "memory.fd-kind", LOG.pack(LOG_SIZE, 0), pipe)
log_message("without-its-fd", "message.fds", LOG.pack(LOG_SIZE, 0), None)
raw("log-fd-missing", "message.fds", started=True)(R.SET_LOG_FD)


@case("memory.truncated", after="open")
def log_truncated(driver: BlkDriver) -> None:
    log = driver.start_log()
    driver.read(0, 512)
    os.ftruncate(log.fd, 0)
    driver.submit(T.IN, in_size=512)
    driver.rings[0].publish(kick=True)


# --- memory --------------------------------------------------------------------------------------------------------


def region(
    name: str,
    rule: str,
    guest: int,
    size: int,
    user: int,
    offset: int = 0,
    *,
    fds: Callable[[ExitStack], list[int]] | None = None,
) -> None:
    """A case of one more region, both by ADD_MEM_REG and in a table."""
    bad = Region(guest, size, user, offset)
    source = fds or memfd(1 << 20)

    def add(driver: BlkDriver) -> None:
        with ExitStack() as stack:
            driver.connection.send(R.ADD_MEM_REG, U64.pack(0) + bad.pack(), source(stack))

    def table(driver: BlkDriver) -> None:
        with ExitStack() as stack:
            own = driver.memory.regions[0]
            payload = struct.pack("<II", 2, 0) + own.pack() + bad.pack()
            driver.connection.send(R.SET_MEM_TABLE, payload, [own.fd, *source(stack)])

    case(rule, name=f"{name}-added")(add)
    case(rule, name=f"{name}-in-table", started=False)(table)


GUEST, USER = 0x4000_0000, 0x7E00_0000_0000
"""Where the driver's own memory of MEMORY_SIZE is."""
MEMORY_SIZE = 4 << 20
FREE_GUEST, FREE_USER = 0x9000_0000, 0x7D00_0000_0000
region("same-guest-addresses", "memory.overlap", GUEST, 4096, FREE_USER)
region("last-page-overlaps", "memory.overlap", GUEST + MEMORY_SIZE - 4096, 8192, FREE_USER)
region("one-byte-overlaps", "memory.overlap", GUEST - 4096, 4097, FREE_USER)
region("overlaps-in-user-addresses", "memory.overlap", FREE_GUEST, 8192, USER + MEMORY_SIZE - 1)
region("guest-address-wraps", "memory.region-wrap", (1 << 64) - 4096, 8192, FREE_USER)
region("user-address-wraps", "memory.region-wrap", FREE_GUEST, 8192, (1 << 64) - 4096)
region("offset-wraps", "memory.region-wrap", FREE_GUEST, 8192, FREE_USER, (1 << 64) - 4096)
region("size-wraps", "memory.region-wrap", FREE_GUEST, (1 << 64) - 1, FREE_USER)
region("empty", "memory.region-size", FREE_GUEST, 0, FREE_USER)
region("file-too-short", "memory.fd-short", FREE_GUEST, (1 << 20) + 1, FREE_USER)
region("file-too-short-for-the-offset", "memory.fd-short", FREE_GUEST, 1 << 20, FREE_USER, 1)
region("size-of-exabytes", "memory.fd-short", FREE_GUEST, 1 << 62, FREE_USER)
region("file-of-0-bytes", "memory.fd-short", FREE_GUEST, 4096, FREE_USER, fds=memfd(0))
region("memory-is-an-eventfd", "memory.fd-kind", FREE_GUEST, 4096, FREE_USER, fds=eventfds(1))
region("memory-is-a-pipe", "memory.fd-kind", FREE_GUEST, 4096, FREE_USER, fds=pipe)
region("memory-is-a-device", "memory.fd-kind", FREE_GUEST, 4096, FREE_USER, fds=dev_null)


def read_only_memory(stack: ExitStack) -> list[int]:
    (fd,) = memfd(1 << 20)(stack)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    stack.callback(os.close, again)
    return [again]


region("memory-cannot-be-written", "memory.fd-kind", FREE_GUEST, 4096, FREE_USER, fds=read_only_memory)


@case("memory.unknown-region")
def removed_region_that_never_was(driver: BlkDriver) -> None:
    driver.connection.send(R.REM_MEM_REG, U64.pack(0) + Region(GUEST, 4096, USER, 0).pack())


@case("memory.truncated", after="open", image="ram")
def memory_truncated_under_the_buffers(driver: BlkDriver) -> None:
    ring, memory = driver.rings[0], driver.memory
    header = memory.allocate(17, 1)
    memory.write(header, BLK_HEADER.pack(T.IN, 0, 0) + b"\xff")
    far = GUEST + MEMORY_SIZE // 2
    os.ftruncate(memory.fd, MEMORY_SIZE // 2)
    ring.add([Buffer(header, 16), Buffer(far, 4096, True), Buffer(header + 16, 1, True)])
    ring.publish(kick=True)


@case("memory.truncated", after="open")
def memory_truncated_under_the_rings(driver: BlkDriver) -> None:
    os.ftruncate(driver.memory.fd, 0)
    driver.rings[0].kick()


@case("memory.truncated", after="open")
def memory_truncated_with_requests_in_flight(driver: BlkDriver) -> None:
    ring = driver.rings[0]
    for number in range(8):
        driver.submit(T.IN, 8 * number, in_size=65536)
    ring.publish(kick=True)
    os.ftruncate(driver.memory.fd, 0)
    ring.kick()


# --- rings ---------------------------------------------------------------------------------------------------------


def ring_place(name: str, rule: str, desc: int, driver_area: int, device: int) -> None:
    """A case of ring addresses, given after the memory and before it."""

    def place(driver: BlkDriver) -> None:
        driver.connection.send(R.SET_VRING_NUM, STATE.pack(0, QUEUE_SIZE))
        driver.connection.send(R.SET_VRING_ADDR, ADDRESSES.pack(0, 0, desc, device, driver_area, 0))

    def before(driver: BlkDriver) -> None:
        driver.connection.reply_ack = False
        driver.set_features()
        place(driver)
        with ExitStack() as stack:
            driver.connection.send(R.SET_VRING_KICK, U64.pack(0), eventfds(1)(stack))
        with suppress(ConnectionLost):
            # Regions may come one by one, so a ring outside waits for another until it is to be used.
            driver.share_memory()
            driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 1)

    def after(driver: BlkDriver) -> None:
        driver.set_features()
        driver.share_memory()
        place(driver)

    case(rule, name=f"{name}-after-memory", started=False)(after)
    case(rule, name=f"{name}-before-memory", started=False)(before)


END = USER + MEMORY_SIZE
ring_place("descriptors-outside", "ring.address", FREE_USER, USER, USER + 4096)
ring_place("available-outside", "ring.address", USER, END, USER + 4096)
ring_place("used-outside", "ring.address", USER, USER + 4096, 0)
ring_place("descriptors-stick-out", "ring.address", END - 16 * QUEUE_SIZE + 16, USER, USER + 4096)
ring_place("available-sticks-out", "ring.address", USER, END - 6 - 2 * QUEUE_SIZE + 2, USER + 4096)
ring_place("used-sticks-out", "ring.address", USER, USER + 4096, END - 6 - 8 * QUEUE_SIZE + 2)
ring_place("ring-at-the-end-of-the-world", "ring.address", (1 << 64) - 16, USER, USER + 4096)
ring_place("guest-address-for-user-address", "ring.address", GUEST, GUEST + 4096, GUEST + 8192)
ring_place("descriptors-not-aligned", "ring.alignment", USER + 8, USER + 4096, USER + 8192)
ring_place("available-not-aligned", "ring.alignment", USER, USER + 4097, USER + 8192)
ring_place("used-not-aligned", "ring.alignment", USER, USER + 4096, USER + 8194)


def publish_index(ahead: int) -> Callable[[BlkDriver], None]:
    def act(driver: BlkDriver) -> None:
        ring = driver.rings[0]
        ring.memory.set_u16(ring.driver + 2, ring.avail_idx + ahead)
        ring.kick()

    return act


for _ahead in (QUEUE_SIZE + 1, 0x7FFF, 0x8000, 0xFFFF):
    case("ring.avail-index", after="open", name=f"available-index-{_ahead:#x}-ahead")(publish_index(_ahead))


def descriptors(
    name: str,
    rule: str,
    entries: Callable[[BlkDriver], list[tuple[int, int, int, int]]],
    *,
    head: int = 0,
    table: bool = False,
    features: int | None = None,
    table_size: int | None = None,
    table_at: int | None = None,
    table_flags: int = INDIRECT,
) -> None:
    """A case of a chain: its descriptors as (address, length, flags, next), in the ring or in an indirect table."""

    def act(driver: BlkDriver) -> None:
        ring, memory = driver.rings[0], driver.memory
        rows = b"".join(DESCRIPTOR.pack(*entry) for entry in entries(driver))
        if table:
            at = memory.allocate(max(len(rows), 16), 16)
            memory.write(at, rows)
            size = len(rows) if table_size is None else table_size
            ring.write_descriptor(0, at if table_at is None else table_at, size, table_flags, 1)
        else:
            memory.write(ring.desc, rows)
        ring.put_available(head)
        ring.publish(kick=True)

    case(rule, name=name, after="open", features=features)(act)


def header_at(driver: BlkDriver, kind: int = T.IN) -> int:
    """A request header in guest memory, for sector 0."""
    address = driver.memory.allocate(64, 16)
    driver.memory.write(address, BLK_HEADER.pack(kind, 0, 0))
    return address


def good(driver: BlkDriver) -> tuple[int, int]:
    """A header, and a page for everything else."""
    return header_at(driver), driver.memory.allocate(4096, 4096)


descriptors("head-is-queue-size", "ring.head-index", lambda _: [], head=QUEUE_SIZE)
descriptors("head-is-65535", "ring.head-index", lambda _: [], head=0xFFFF)


def next_beyond(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, _ = good(driver)
    return [(header, 16, NEXT, QUEUE_SIZE)]


def next_itself(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, _ = good(driver)
    return [(header, 16, NEXT, 0)]


def next_in_circles(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, page = good(driver)
    return [(header, 16, NEXT, 1), (page, 512, NEXT | WRITE, 2), (page, 512, NEXT | WRITE, 1)]


descriptors("next-beyond-the-table", "ring.next-index", next_beyond)
descriptors("chain-loops-to-itself", "ring.chain-length", next_itself)
descriptors("chain-loops", "ring.chain-length", next_in_circles)
descriptors("indirect-chain-loops", "ring.chain-length", next_in_circles, table=True)


def one_of(index: int, address: int | None, length: int) -> Callable[..., list[tuple[int, int, int, int]]]:
    """A read whose descriptor `index` is as given."""

    def make(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
        header, page = good(driver)
        rows = [(header, 16, NEXT, 1), (page, 512, NEXT | WRITE, 2), (page + 512, 1, WRITE, 0)]
        place, _, flags, following = rows[index]
        rows[index] = (place if address is None else address, length, flags, following)
        return rows

    return make


for _table in (False, True):
    _where = "indirect-" if _table else ""
    for _index in range(3):
        descriptors(f"{_where}length-0-at-{_index}", "ring.zero-length", one_of(_index, None, 0), table=_table)
        descriptors(f"{_where}buffer-{_index}-outside", "ring.buffer-address", one_of(_index, 0x10, 16), table=_table)
        descriptors(
            f"{_where}buffer-{_index}-sticks-out",
            "ring.buffer-address",
            one_of(_index, GUEST + MEMORY_SIZE - 8, 16),
            table=_table,
        )
        descriptors(
            f"{_where}buffer-{_index}-wraps",
            "ring.buffer-address",
            one_of(_index, (1 << 64) - 8, 16),
            table=_table,
        )
        descriptors(
            f"{_where}buffer-{_index}-of-4-gib",
            "ring.buffer-address",
            one_of(_index, None, 0xFFFF_FFFF),
            table=_table,
        )


@case("ring.total-length", after="open", name="chain-of-more-than-4-gib")
def chain_of_more_than_4_gib(driver: BlkDriver) -> None:
    # with 4 MiB of memory that takes 1025 descriptors; so make the memory larger: it is never touched
    more = os.memfd_create("large")
    try:
        size = 128 << 20
        os.ftruncate(more, size)
        large = Region(FREE_GUEST, size, FREE_USER, 0, more)
        driver.add_region(large)
        header = header_at(driver)
        rows = [(header, 16, NEXT, 1)]
        count = (4 << 30) // size
        rows += [(FREE_GUEST, size, NEXT | WRITE, i + 2) for i in range(count)]
        rows.append((header + 32, 1, WRITE, 0))
        ring = driver.rings[0]
        driver.memory.write(ring.desc, b"".join(DESCRIPTOR.pack(*row) for row in rows))
        ring.put_available(0)
        ring.publish(kick=True)
    finally:
        os.close(more)


def wrong_order(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, page = good(driver)
    return [(page, 512, NEXT | WRITE, 1), (header, 16, NEXT, 2), (page + 512, 1, WRITE, 0)]


descriptors("readable-after-writable", "ring.buffer-order", wrong_order)
descriptors("indirect-readable-after-writable", "ring.buffer-order", wrong_order, table=True)


def whole(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, page = good(driver)
    return [(header, 16, NEXT, 1), (page, 512, NEXT | WRITE, 2), (page + 512, 1, WRITE, 0)]


def too_long(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, page = good(driver)
    rows = [(header, 16, NEXT, 1)]
    rows += [(page, 1, NEXT | WRITE, i + 2) for i in range(MAX_QUEUE_SIZE - 1)]
    return [*rows, (page, 1, WRITE, 0)]


def nested(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    inner = driver.memory.allocate(48, 16)
    driver.memory.write(inner, b"".join(DESCRIPTOR.pack(*row) for row in whole(driver)))
    return [(inner, 48, INDIRECT, 0)]


def nested_after_one(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, _ = good(driver)
    ((inner, size, flags, _),) = nested(driver)
    return [(header, 16, NEXT, 1), (inner, size, flags, 0)]


def indirect_next_beyond(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, page = good(driver)
    return [(header, 16, NEXT, 2), (page, 1, WRITE, 0)]


descriptors("indirect-table-too-long", "ring.indirect-length", too_long, table=True)
descriptors("indirect-table-nested", "ring.indirect-nested", nested, table=True)
descriptors("indirect-table-nested-later", "ring.indirect-nested", nested_after_one, table=True)
descriptors("indirect-next-beyond-the-table", "ring.next-index", indirect_next_beyond, table=True)
descriptors("indirect-and-next", "ring.indirect-next", whole, table=True, table_flags=INDIRECT | NEXT)
descriptors("indirect-table-of-0-bytes", "ring.indirect-length", whole, table=True, table_size=0)
descriptors("indirect-table-of-47-bytes", "ring.indirect-length", whole, table=True, table_size=47)
descriptors("indirect-table-of-4-gib", "ring.indirect-length", whole, table=True, table_size=0xFFFF_FFF0)
descriptors("indirect-table-outside", "ring.indirect-address", whole, table=True, table_at=0x1000)
descriptors("indirect-table-sticks-out", "ring.indirect-address", whole, table=True, table_at=GUEST + MEMORY_SIZE - 16)
descriptors("indirect-table-wraps", "ring.indirect-address", whole, table=True, table_at=(1 << 64) - 16)
descriptors(
    "indirect-not-negotiated",
    "ring.indirect-not-negotiated",
    whole,
    table=True,
    features=bits(F.VERSION_1, F.PROTOCOL_FEATURES),
)


def no_status(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, _ = good(driver)
    return [(header, 16, 0, 0)]


def short_header(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    header, page = good(driver)
    return [(header, 15, NEXT, 1), (page, 513, WRITE, 0)]


def no_header(driver: BlkDriver) -> list[tuple[int, int, int, int]]:
    _, page = good(driver)
    return [(page, 513, WRITE, 0)]


descriptors("request-without-status", "blk.request-status", no_status)
descriptors("request-with-half-a-header", "blk.request-header", short_header)
descriptors("request-without-header", "blk.request-header", no_header)


# --- running the table ------------------------------------------------------------------------------------------


class Bystander:
    """A front end of another member that works all the time and checks what it gets."""

    def __init__(self, group: RunningGroup) -> None:
        self._driver = BlkDriver(group.socket(BYSTANDER), queue_size=16).start()
        self._stop = threading.Event()
        self.rounds = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bystander")
        self._thread.start()

    def _run(self) -> None:
        rng = random.Random(1)
        try:
            while not self._stop.is_set():
                sector, data = rng.randrange(SIZE // 512 - 8), rng.randbytes(4096)
                self._driver.write(sector, data)
                assert self._driver.read(sector, 4096) == data
                self.rounds += 1
                # most of the one CPU that there may be is for the others
                self._stop.wait(0.001)
        except BaseException as error:
            self.error = error

    def goes_on(self) -> None:
        """AssertionError unless it has done more rounds by now, or soon."""
        before = self.rounds
        wait_until(lambda: self.error is not None or self.rounds >= before + 2, what="I/O of the other member")
        assert self.error is None, repr(self.error)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._driver.close()


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    directory = start_module_group.directory
    tables = ['[group]\nname = "bad-input"\n[[members]]\ntype = "blk"\nimage = "ram:1MiB"\n']
    for member, one in enumerate(CASES, FIRST_VICTIM):
        image = "ram:1MiB"
        if one.image == "file":
            image = f"disk{member}.raw"
            (directory / image).touch()
            os.truncate(directory / image, SIZE)
        tables.append(f'[[members]]\ntype = "blk"\nimage = "{image}"\n')
    return start_module_group("".join(tables))


@pytest.fixture(scope="module")
def bystander(group: RunningGroup) -> Iterator[Bystander]:
    bystander = Bystander(group)
    try:
        yield bystander
    finally:
        bystander.stop()
    assert bystander.error is None
    assert group.member(BYSTANDER)["last-error"] is None


def expect_fault(group: RunningGroup, member: int, rule: str) -> None:
    state = group.wait_member(member, lambda state: state["last-error"] is not None, "at fault", 10)
    assert state["last-error"]["rule"] == rule, state["last-error"]
    assert state["last-error"]["reason"]


def leave(driver: BlkDriver) -> None:
    """Hang up. Memory that was truncated must not be touched here either."""
    driver.close()


@pytest.mark.parametrize("number", range(len(CASES)), ids=[one.name for one in CASES])
def test_bad_input(group: RunningGroup, bystander: Bystander, number: int) -> None:
    one, member = CASES[number], FIRST_VICTIM + number
    acknowledged = os.urandom(2048)
    fds = group.open_fds()

    # data that must survive
    with BlkDriver(group.socket(member)) as driver:
        driver.start()
        driver.write(1000, acknowledged)
    group.wait_detached(member)
    assert group.member(member)["last-error"] is None

    with BlkDriver(group.socket(member), features=one.features, queue_size=QUEUE_SIZE) as driver:
        if one.started:
            driver.start()
            driver.read(0, 512)
        else:
            driver.negotiate()
            driver.connection.reply_ack = False
        with suppress(ConnectionLost, Refused):
            one.act(driver)
        expect_fault(group, member, one.rule)
        bystander.goes_on()
        if one.after == "closed":
            with suppress(OSError):
                driver.connection.wait_closed()
        else:
            broken = group.member(member)
            assert broken["state"] == "broken"
            assert broken["broken"] == broken["last-error"]
            assert broken["broken"]["queue"] == 0
            assert driver.connection.get_u64(R.GET_STATUS) & 0x40, "DEVICE_NEEDS_RESET"
    group.wait_detached(member)

    assert group.alive()
    assert len(group.wait_logged(member, "broken")) == 1, group.log_lines(member)
    broken_line = group.log_lines(member, "broken")[0]
    assert broken_line.count(f"{one.rule}: ") == 1, broken_line
    # fewer: something of the case before this one was still being closed on a thread of its own
    wait_until(lambda: group.open_fds() <= fds, what="closing all fds")
    others = [state for state in group.execute("query-members") if state["id"] != member]
    assert not [state for state in others if state["id"] > member and state["broken"]]
    if one.image == "file":
        image = group.directory / f"disk{member}.raw"
        assert image.read_bytes()[1000 * 512 : 1000 * 512 + 2048] == acknowledged

    # the next front end finds it well
    with BlkDriver(group.socket(member)) as driver:
        driver.start()
        assert driver.read(1000, 2048) == acknowledged
        driver.write(1004, b"again" * 512)
        state = group.member(member)
        assert state["broken"] is None
        assert state["state"] == "running"
        assert state["last-error"]["rule"] == one.rule
    group.wait_detached(member)


# --- what doesn't fit the table -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_group(start_module_group: GroupFactory) -> RunningGroup:
    (start_module_group.directory / "disk.raw").write_bytes(bytes(SIZE))
    return start_module_group(
        """
        [group]
        name = "bad-input-2"
        workers = 1
        [[members]]
        type = "blk"
        image = "ram:1MiB"
        [[members]]
        type = "blk"
        image = "disk.raw"
        queues = 2
        """
    )


VICTIM = 2


@pytest.fixture
def neighbour(small_group: RunningGroup) -> Iterator[Bystander]:
    small_group.wait_detached(BYSTANDER)
    bystander = Bystander(small_group)
    try:
        yield bystander
    finally:
        bystander.stop()
    assert bystander.error is None


def test_file_read_into_truncated_memory(small_group: RunningGroup, neighbour: Bystander) -> None:
    """The kernel meets the hole, not we: the request fails, or the member is broken; never success."""
    with BlkDriver(small_group.socket(VICTIM), queues=2) as driver:
        driver.start()
        ring, memory = driver.rings[0], driver.memory
        header = memory.allocate(17, 1)
        memory.write(header, BLK_HEADER.pack(T.IN, 0, 0) + b"\xff")
        os.ftruncate(memory.fd, MEMORY_SIZE // 2)
        far = GUEST + MEMORY_SIZE // 2
        ring.add([Buffer(header, 16), Buffer(far, 4096, True), Buffer(header + 16, 1, True)])
        ring.publish(kick=True)
        wait_until(lambda: ring.device_used_idx == 1 or small_group.member(VICTIM)["broken"])
        assert memory.read(header + 16, 1)[0] in (IOERR, 0xFF)
        neighbour.goes_on()
    small_group.wait_detached(VICTIM)


def test_one_bad_queue_stops_the_member_s_others(small_group: RunningGroup, neighbour: Bystander) -> None:
    """The device needs a reset as a whole; a queue that went on would surprise the driver."""
    with BlkDriver(small_group.socket(VICTIM), queues=2) as driver:
        driver.start()
        driver.read(0, 512, queue=1)
        driver.rings[0].put_available(0xFFFF)
        driver.rings[0].publish(kick=True)
        small_group.wait_member(VICTIM, lambda state: state["broken"], "broken")
        driver.submit(T.IN, in_size=512, queue=1)
        driver.rings[1].publish(kick=True)
        time.sleep(0.1)
        assert driver.rings[1].device_used_idx == 1
        # both can still be stopped, and the positions are those of what was served
        assert [driver.stop_ring(index) for index in (0, 1)] == [0, 1]
        neighbour.goes_on()
    small_group.wait_detached(VICTIM)


def test_requests_before_the_bad_one(small_group: RunningGroup) -> None:
    """What was good and came first may be served or not; it isn't half done: acknowledged means written."""
    with BlkDriver(small_group.socket(VICTIM), queue_size=64) as driver:
        driver.start()
        payload = os.urandom(4096)
        pending = [driver.submit(T.OUT, 8 * i, payload, indirect=True) for i in range(8)]
        driver.rings[0].put_available(0xFFFF)
        driver.rings[0].publish(kick=True)
        small_group.wait_member(VICTIM, lambda state: state["broken"], "broken")
        used = [head for head, _ in driver.rings[0].take_used()]
        driver.connection.close()
        small_group.wait_detached(VICTIM)
        disk = (small_group.directory / "disk.raw").read_bytes()
        for i, one in enumerate(pending):
            if one.head in used:
                assert one.data() == bytes([OK])
                assert disk[4096 * i : 4096 * (i + 1)] == payload


def test_ring_that_is_scribbled_over(small_group: RunningGroup, neighbour: Bystander) -> None:
    """Random rings, random descriptors, and kicks: nothing but this member may notice."""
    rng = random.Random(4711)
    for _ in range(60):
        with BlkDriver(small_group.socket(VICTIM), queue_size=16, memory_size=1 << 20) as driver:
            driver.start()
            ring, memory = driver.rings[0], driver.memory
            base = GUEST + rng.choice([0, 4096])
            for index in range(16):
                address = rng.choice([base + rng.randrange(1 << 20), rng.getrandbits(64), ring.desc])
                length = rng.choice([16, 1, 512, rng.getrandbits(32), 32])
                ring.write_descriptor(index, address, length, rng.randrange(8), rng.randrange(20))
            for at in range(0, 32, 2):
                memory.set_u16(ring.driver + 4 + at, rng.randrange(18))
            for step in range(4):
                memory.set_u16(ring.driver + 2, rng.choice([step + 1, 4 * step, rng.getrandbits(16)]))
                ring.kick()
                driver.connection.barrier()
        small_group.wait_detached(VICTIM)
    assert small_group.alive()
    neighbour.goes_on()


def test_random_bytes_for_messages(small_group: RunningGroup, neighbour: Bystander) -> None:
    rng = random.Random(815)
    for _ in range(150):
        with Connection(small_group.socket(VICTIM)) as connection, ExitStack() as stack:
            with suppress(ConnectionLost):
                connection.set_u64(R.SET_PROTOCOL_FEATURES, bits(P.CONFIG, P.MQ, P.STATUS, P.CONFIGURE_MEM_SLOTS))
                for _ in range(rng.randrange(1, 12)):
                    request = rng.randrange(45)
                    size = rng.choice([0, 8, 8, 8, 12, 40, 40, rng.randrange(64)])
                    payload = rng.choice([bytes(size), rng.randbytes(size)])
                    kind = rng.choice([eventfds(0), eventfds(1), memfd(8192), eventfds(3), pipe])
                    connection.send(request, payload, kind(stack), need_reply=rng.random() < 0.3)
            connection.close()
        small_group.wait_detached(VICTIM)
    assert small_group.alive()
    neighbour.goes_on()
    with BlkDriver(small_group.socket(VICTIM)) as driver:
        driver.start().read(0, 512)
    small_group.wait_detached(VICTIM)


def test_breaking_over_and_over_is_logged_once(small_group: RunningGroup, neighbour: Bystander) -> None:
    """A guest can break its device as often as it likes; the log is not its to fill."""
    small_group.wait_detached(VICTIM)
    before = len(small_group.log_lines(VICTIM, "broken"))
    with BlkDriver(small_group.socket(VICTIM)) as driver:
        driver.start()
        for _ in range(50):
            driver.rings[0].put_available(0xFFFF)
            driver.rings[0].publish(kick=True)
            small_group.wait_member(VICTIM, lambda state: state["broken"], "broken")
            driver.connection.set(R.RESET_DEVICE)
            driver.rings[0].restart()
            driver.set_features()
            driver.start_ring(0)
        driver.read(0, 512)
    small_group.wait_detached(VICTIM)
    assert len(small_group.log_lines(VICTIM, "broken")) - before <= 3
    neighbour.goes_on()


def test_kicks_without_end(small_group: RunningGroup, neighbour: Bystander) -> None:
    """On one worker with its neighbour: a driver that does nothing but kick doesn't starve it."""
    with BlkDriver(small_group.socket(VICTIM)) as driver:
        driver.start()
        stop = threading.Event()

        def storm() -> None:
            while not stop.is_set():
                driver.rings[0].kick()

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            neighbour.goes_on()
            neighbour.goes_on()
        finally:
            stop.set()
            thread.join()
    small_group.wait_detached(VICTIM)
