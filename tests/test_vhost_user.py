# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vhost-user back end, message by message: right ones, wrong ones, in pieces, in odd orders, reconnects."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from .conftest import GroupFactory, RunningGroup
from .frontend import (
    ADDRESSES,
    BLK_HEADER,
    CONFIG,
    INFLIGHT,
    LOG,
    NO_FD,
    OK,
    STATE,
    U64,
    BackendChannel,
    BlkDriver,
    Buffer,
    Connection,
    ConnectionLost,
    F,
    GuestMemory,
    P,
    R,
    Refused,
    Region,
    T,
    bits,
    wait_until,
)

PROTOCOL_FEATURES = bits(
    P.MQ,
    P.LOG_SHMFD,
    P.REPLY_ACK,
    P.BACKEND_REQ,
    P.CONFIG,
    P.INFLIGHT,
    P.RESET_DEVICE,
    P.CONFIGURE_MEM_SLOTS,
    P.STATUS,
)
SIZE = 1 << 20
MEMBER = 1
TWO_QUEUES = 2


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    (start_module_group.directory / "disk1.raw").write_bytes(bytes(SIZE))
    return start_module_group(
        """
        [group]
        name = "vhost-user"
        [[members]]
        type = "blk"
        image = "disk1.raw"
        serial = "serial-of-1"
        [[members]]
        type = "blk"
        image = "ram:1MiB"
        queues = 2
        """
    )


@pytest.fixture
def connection(group: RunningGroup) -> Iterator[Connection]:
    """A connection that has done nothing yet."""
    group.wait_detached(MEMBER)
    with Connection(group.socket(MEMBER)) as connection:
        yield connection
    group.wait_detached(MEMBER)


@pytest.fixture
def driver(group: RunningGroup) -> Iterator[BlkDriver]:
    """A driver on member 1, not started."""
    group.wait_detached(MEMBER)
    with BlkDriver(group.socket(MEMBER)) as driver:
        yield driver
    group.wait_detached(MEMBER)


def works(group: RunningGroup, member: int = MEMBER) -> None:
    """A new front end can use the member."""
    with BlkDriver(group.socket(member)) as driver:
        driver.start()
        payload = os.urandom(1024)
        driver.write(8, payload)
        assert driver.read(8, 1024) == payload
        assert group.member(member)["broken"] is None
    group.wait_detached(member)


# --- what is offered ------------------------------------------------------------------------------------------


def test_protocol_features_are_exactly_those_implemented(connection: Connection) -> None:
    assert connection.get_u64(R.GET_FEATURES) >> F.PROTOCOL_FEATURES & 1
    assert connection.get_u64(R.GET_PROTOCOL_FEATURES) == PROTOCOL_FEATURES


def test_features(connection: Connection) -> None:
    assert connection.get_u64(R.GET_FEATURES) == bits(
        F.SEG_MAX,
        F.BLK_SIZE,
        F.FLUSH,
        F.TOPOLOGY,
        F.CONFIG_WCE,
        F.MQ,
        F.DISCARD,
        F.WRITE_ZEROES,
        F.NOTIFY_ON_EMPTY,
        F.LOG_ALL,
        F.ANY_LAYOUT,
        F.INDIRECT,
        F.EVENT_IDX,
        F.PROTOCOL_FEATURES,
        F.VERSION_1,
    )


def test_numbers(group: RunningGroup) -> None:
    with BlkDriver(group.socket(TWO_QUEUES)) as driver:
        driver.negotiate()
        assert driver.connection.get_u64(R.GET_QUEUE_NUM) == 2
        # QEMU takes the minimum over all of a guest's devices: fewer than 8 would be worse than no slots at all
        assert driver.connection.get_u64(R.GET_MAX_MEM_SLOTS) >= 32
    group.wait_detached(TWO_QUEUES)


# --- each message -----------------------------------------------------------------------------------------------


class Fds:
    """Descriptors to send: eventfds, a memfd, a socket. Made for one test."""

    def __init__(self, stack: ExitStack) -> None:
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        stack.callback(os.close, self.eventfd)
        self.memfd = os.memfd_create("region")
        stack.callback(os.close, self.memfd)
        os.ftruncate(self.memfd, 1 << 20)
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        self.socket = theirs.fileno()


@pytest.fixture
def fds() -> Iterator[Fds]:
    with ExitStack() as stack:
        yield Fds(stack)


@dataclass(frozen=True)
class Sample:
    """A right message."""

    request: R
    payload: bytes = b""
    fd: Callable[[Fds], int] | None = None
    answered: bool = False
    any_tail: bool = False
    """What follows the first 12 bytes of the payload is of no consequence."""


A_REGION = Region(0x10_0000, 1 << 20, 0x7F00_0000_0000, 0)
SAMPLES = [
    Sample(R.GET_FEATURES, answered=True),
    Sample(R.SET_FEATURES, U64.pack(bits(F.PROTOCOL_FEATURES, F.VERSION_1))),
    Sample(R.SET_OWNER),
    Sample(R.RESET_OWNER),
    Sample(R.SET_MEM_TABLE, struct.pack("<II", 1, 0) + A_REGION.pack(), lambda fds: fds.memfd),
    Sample(R.SET_VRING_NUM, STATE.pack(0, 16)),
    Sample(R.SET_VRING_ADDR, ADDRESSES.pack(0, 0, 0x1000, 0x3000, 0x2000, 0)),
    Sample(R.SET_VRING_BASE, STATE.pack(0, 7)),
    Sample(R.GET_VRING_BASE, STATE.pack(0, 0), answered=True),
    Sample(R.SET_VRING_KICK, U64.pack(0), lambda fds: fds.eventfd),
    Sample(R.SET_VRING_CALL, U64.pack(0), lambda fds: fds.eventfd),
    Sample(R.SET_VRING_ERR, U64.pack(0), lambda fds: fds.eventfd),
    Sample(R.GET_PROTOCOL_FEATURES, answered=True),
    Sample(R.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES)),
    Sample(R.GET_QUEUE_NUM, answered=True),
    Sample(R.SET_VRING_ENABLE, STATE.pack(0, 1)),
    Sample(R.SET_BACKEND_REQ_FD, b"", lambda fds: fds.socket),
    Sample(R.GET_CONFIG, CONFIG.pack(0, 60, 0) + bytes(60), answered=True, any_tail=True),
    Sample(R.SET_CONFIG, CONFIG.pack(32, 1, 0) + b"\1"),
    Sample(R.RESET_DEVICE),
    Sample(R.GET_MAX_MEM_SLOTS, answered=True),
    Sample(R.ADD_MEM_REG, U64.pack(0) + A_REGION.pack(), lambda fds: fds.memfd),
    Sample(R.SET_STATUS, U64.pack(1)),
    Sample(R.GET_STATUS, answered=True),
    Sample(R.SET_LOG_BASE, LOG.pack(1 << 17, 0), lambda fds: fds.memfd, answered=True),
    Sample(R.SET_LOG_FD, b"", lambda fds: fds.eventfd),
    Sample(R.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 1, 256), answered=True),
    Sample(R.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 0, 1, 256), lambda fds: fds.memfd),
]
SAMPLE_IDS = [sample.request.name for sample in SAMPLES]


def negotiated(group: RunningGroup) -> Connection:
    """A connection with all protocol features, that has not asked for acknowledgements yet."""
    group.wait_detached(MEMBER)
    connection = Connection(group.socket(MEMBER))
    offered = connection.get_u64(R.GET_PROTOCOL_FEATURES)
    connection.set_u64(R.SET_PROTOCOL_FEATURES, offered)
    connection.set(R.SET_OWNER)
    return connection


def send_sample(connection: Connection, sample: Sample, fds: Sequence[int], payload: bytes) -> None:
    """Send it, wanting an answer; return when it was taken. Raises ConnectionLost, Refused."""
    connection.send(sample.request, payload, fds, need_reply=not sample.answered)
    if sample.answered:
        answer = connection.receive()
        assert answer.request == sample.request
    else:
        connection.acknowledged(sample.request)


def right_fds(sample: Sample, fds: Fds) -> list[int]:
    return [] if sample.fd is None else [sample.fd(fds)]


@pytest.mark.parametrize("sample", SAMPLES, ids=SAMPLE_IDS)
def test_right_message(group: RunningGroup, fds: Fds, sample: Sample) -> None:
    with negotiated(group) as connection:
        send_sample(connection, sample, right_fds(sample, fds), sample.payload)
        connection.barrier()
        assert group.member(MEMBER)["broken"] is None


@pytest.mark.parametrize("sample", SAMPLES, ids=SAMPLE_IDS)
def test_right_message_without_need_reply(group: RunningGroup, fds: Fds, sample: Sample) -> None:
    """Nobody answers what hasn't asked: the next answer is that of the next question."""
    with negotiated(group) as connection:
        connection.send(sample.request, sample.payload, right_fds(sample, fds))
        if sample.answered:
            connection.receive()
        connection.barrier()


@pytest.mark.parametrize("sample", SAMPLES, ids=SAMPLE_IDS)
def test_right_message_byte_by_byte(group: RunningGroup, fds: Fds, sample: Sample) -> None:
    with negotiated(group) as connection:
        data = connection.encode(sample.request, sample.payload, need_reply=not sample.answered)
        connection.send_raw(data[:1], right_fds(sample, fds))
        for at in range(1, len(data)):
            connection.send_raw(data[at : at + 1])
            if at in (5, 11, 12):
                # let it be read before the rest is there
                time.sleep(0.01)
        if sample.answered:
            assert connection.receive().request == sample.request
        else:
            connection.acknowledged(sample.request)


@pytest.mark.parametrize("change", [-1, 1, 8])
@pytest.mark.parametrize("sample", SAMPLES, ids=SAMPLE_IDS)
def test_wrong_size(group: RunningGroup, fds: Fds, sample: Sample, change: int) -> None:
    if change < 0 and not sample.payload:
        change = 4
    if sample.any_tail:
        change = CONFIG.size - len(sample.payload) - abs(change)
    payload = sample.payload[:change] if change < 0 else sample.payload + bytes(change)
    with negotiated(group) as connection:
        with pytest.raises((ConnectionLost, Refused)):
            send_sample(connection, sample, right_fds(sample, fds), payload)
        assert connection.wait_closed() == []
        fault = group.wait_detached(MEMBER)["last-error"]
    assert fault["rule"] == "message.size"
    assert sample.request.name in fault["reason"]
    works(group)


@pytest.mark.parametrize("sample", SAMPLES, ids=SAMPLE_IDS)
def test_wrong_number_of_fds(group: RunningGroup, fds: Fds, sample: Sample) -> None:
    right = right_fds(sample, fds)
    wrong = [[*right, fds.eventfd]]
    if right:
        wrong.append([])
    before = group.open_fds()
    for attempt in wrong:
        with negotiated(group) as connection:
            with pytest.raises((ConnectionLost, Refused)):
                send_sample(connection, sample, attempt, sample.payload)
            assert connection.wait_closed() == []
        fault = group.wait_detached(MEMBER)["last-error"]
        assert fault["rule"] == "message.fds"
        assert sample.request.name in fault["reason"]
    wait_until(lambda: group.open_fds() == before, what="closing all fds")


@pytest.mark.parametrize(
    ("sample", "feature"),
    [
        (SAMPLES[SAMPLE_IDS.index(name)], feature)
        for name, feature in [
            ("GET_QUEUE_NUM", P.MQ),
            ("SET_BACKEND_REQ_FD", P.BACKEND_REQ),
            ("GET_CONFIG", P.CONFIG),
            ("SET_CONFIG", P.CONFIG),
            ("RESET_DEVICE", P.RESET_DEVICE),
            ("GET_MAX_MEM_SLOTS", P.CONFIGURE_MEM_SLOTS),
            ("ADD_MEM_REG", P.CONFIGURE_MEM_SLOTS),
            ("SET_STATUS", P.STATUS),
            ("GET_STATUS", P.STATUS),
        ]
    ],
)
def test_message_of_a_feature_that_was_not_negotiated(
    group: RunningGroup, fds: Fds, sample: Sample, feature: P
) -> None:
    group.wait_detached(MEMBER)
    with Connection(group.socket(MEMBER)) as connection:
        connection.set_u64(R.SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES & ~bits(feature))
        connection.send(sample.request, sample.payload, right_fds(sample, fds))
        assert connection.wait_closed() == []
        assert group.wait_detached(MEMBER)["last-error"]["rule"] == "message.not-negotiated"


def test_need_reply_without_reply_ack_is_not_answered(connection: Connection) -> None:
    connection.set_u64(R.SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES & ~bits(P.REPLY_ACK))
    connection.send(R.SET_OWNER, need_reply=True)
    connection.barrier()


def test_need_reply_on_a_message_with_an_answer_gives_one_answer(group: RunningGroup) -> None:
    with negotiated(group) as connection:
        connection.send(R.GET_FEATURES, need_reply=True)
        assert connection.receive().request == R.GET_FEATURES
        connection.barrier()


def test_refusal_is_acknowledged_before_the_connection_is_closed(group: RunningGroup) -> None:
    with negotiated(group) as connection:
        connection.send(R.SET_VRING_NUM, STATE.pack(0, 3), need_reply=True)
        (answer,) = connection.wait_closed()
        assert answer.request == R.SET_VRING_NUM
        assert answer.u64() != 0


def test_many_messages_at_once(connection: Connection) -> None:
    """They don't arrive one by one: the kernel glues them together."""
    count = 100
    connection.send_raw(Connection.encode(R.GET_FEATURES) * count + Connection.encode(R.SET_OWNER))
    answers = {connection.receive().u64() for _ in range(count)}
    assert len(answers) == 1
    connection.barrier()


def test_front_end_that_never_reads_its_answers(group: RunningGroup) -> None:
    """It blocks itself and nobody else, and costs no CPU."""
    group.wait_detached(MEMBER)
    with Connection(group.socket(MEMBER)) as connection:
        connection.socket.settimeout(1)
        data = Connection.encode(R.GET_FEATURES) * 100_000
        with pytest.raises(TimeoutError):
            connection.socket.sendall(data)
        works(group, TWO_QUEUES)
        assert cpu_of(group, 0.3) < 0.1
    group.wait_detached(MEMBER)
    works(group)


def cpu_of(group: RunningGroup, seconds: float) -> float:
    """CPU seconds that the group uses in so many seconds."""

    def used() -> float:
        with open(f"/proc/{group.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(seconds)
    return used() - before


# --- whole conversations ------------------------------------------------------------------------------------------


class SlowConnection(Connection):
    """Every byte is a packet of its own."""

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        super().send_raw(data[:1], fds)
        for at in range(1, len(data)):
            super().send_raw(data[at : at + 1])


def test_everything_byte_by_byte(group: RunningGroup, driver: BlkDriver) -> None:
    driver.connection.close()
    group.wait_detached(MEMBER)
    driver.connection = SlowConnection(group.socket(MEMBER))
    driver.start()
    driver.write(1, b"slow" * 128)
    assert driver.read(1, 512) == b"slow" * 128


PROTOCOLS = {
    "all": None,
    "no-reply-ack": PROTOCOL_FEATURES & ~bits(P.REPLY_ACK),
    "no-mem-slots": PROTOCOL_FEATURES & ~bits(P.CONFIGURE_MEM_SLOTS),
    "no-status": PROTOCOL_FEATURES & ~bits(P.STATUS),
    "config-only": bits(P.CONFIG),
    "nothing": 0,
}


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_data_with_any_protocol_features(group: RunningGroup, protocol: int | None, regions: int) -> None:
    path = group.socket(MEMBER)
    with BlkDriver(path, protocol=protocol, regions=regions, memory_size=3 << 20) as driver:
        driver.start()
        # a buffer from the first region to the last, as the guest sees them
        payload = os.urandom(SIZE - 8192)
        mark = driver.memory.mark()
        source = driver.memory.GUEST_BASE + (3 << 20) // 3 - 4096 if regions > 1 else None
        driver.write(0, payload[:4096])
        assert driver.read(0, 4096) == payload[:4096]
        if source is not None:
            crossing = read_to(driver, source, 8192)
            assert crossing[:4096] == payload[:4096]
        driver.memory.release(mark)
        info = group.member(MEMBER)
        assert len(info["memory"]) == regions
    group.wait_detached(MEMBER)


def read_to(driver: BlkDriver, address: int, size: int) -> bytes:
    """Read the start of the disk to a guest address."""
    ring, memory = driver.rings[0], driver.memory
    header = memory.allocate(17, 1)
    memory.write(header, BLK_HEADER.pack(T.IN, 0, 0) + b"\xff")
    ring.add([Buffer(header, 16), Buffer(address, size, True), Buffer(header + 16, 1, True)])
    ring.publish()
    ((_, used),) = ring.wait_used()
    assert used == size + 1
    assert memory.read(header + 16, 1) == b"\0"
    return memory.read(address, size)


def test_front_end_without_protocol_features(group: RunningGroup) -> None:
    """No bit 30: no protocol messages, and rings are enabled as soon as they are kicked."""
    features = bits(F.VERSION_1, F.EVENT_IDX, F.INDIRECT)
    with BlkDriver(group.socket(MEMBER), features=features) as driver:
        driver.start()
        assert driver.agreed == 0
        assert driver.read(0, 512) is not None
        assert driver.stop_ring(0) == 1
    group.wait_detached(MEMBER)


def test_ring_is_disabled_until_enabled(driver: BlkDriver) -> None:
    driver.negotiate()
    driver.make_rings()
    driver.set_features()
    driver.share_memory()
    driver.start_ring(0, enable=False)
    pending = driver.submit(T.IN, in_size=512)
    driver.rings[0].publish(kick=True)
    driver.connection.barrier()
    time.sleep(0.05)
    assert driver.rings[0].device_used_idx == 0
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 1)
    assert driver.finish(pending).status == OK


def test_enable_in_any_state(driver: BlkDriver) -> None:
    """virtio-net's front end says it before anything else, and over again."""
    driver.negotiate()
    for value in (1, 1, 0, 0, 1):
        driver.connection.set_vring(R.SET_VRING_ENABLE, 0, value)
    driver.make_rings()
    driver.set_features()
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 1)
    driver.share_memory()
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 1)
    driver.start_ring(0, enable=False)
    assert driver.read(0, 512) is not None
    # disabled while it runs: what comes then waits
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 0)
    pending = driver.submit(T.IN, in_size=512)
    driver.rings[0].publish(kick=True)
    time.sleep(0.05)
    assert driver.rings[0].device_used_idx == driver.rings[0].used_idx
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 1)
    assert driver.finish(pending).status == OK
    driver.stop_ring(0)
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 0)
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 1)


def test_vring_base_is_the_position(driver: BlkDriver) -> None:
    driver.start()
    for count in range(1, 4):
        for _ in range(3):
            driver.read(0, 512)
        base = driver.stop_ring(0)
        assert base == 3 * count
        # what is made available while the ring is stopped is found when it goes on
        pending = driver.submit(T.IN, in_size=512)
        driver.rings[0].publish(kick=False)
        driver.start_ring(0, base)
        driver.rings[0].kick()
        assert driver.finish(pending).status == OK
        # and not counted twice
        driver.stop_ring(0)
        driver.rings[0].restart(3 * count)
        driver.start_ring(0, 3 * count)


def test_position_wraps(driver: BlkDriver) -> None:
    driver.negotiate()
    driver.make_rings()
    driver.set_features()
    driver.share_memory()
    driver.rings[0].restart(0xFFF0)
    driver.start_ring(0, 0xFFF0)
    for _ in range(40):
        driver.read(0, 512)
    assert driver.stop_ring(0) == 0xFFF0 + 40 - 0x10000


def test_vring_base_of_a_ring_that_never_started(driver: BlkDriver) -> None:
    driver.negotiate()
    assert driver.stop_ring(0) == 0
    driver.connection.set_vring(R.SET_VRING_BASE, 0, 77)
    assert driver.stop_ring(0) == 77
    driver.close()


def test_stop_with_requests_available_but_not_taken(driver: BlkDriver) -> None:
    """The position is that of what was taken, not of what is available."""
    driver.start()
    driver.connection.set_vring(R.SET_VRING_ENABLE, 0, 0)
    driver.submit(T.IN, in_size=512)
    driver.rings[0].publish(kick=True)
    assert driver.stop_ring(0) == 0


def test_call_fd_changed_while_the_ring_runs(driver: BlkDriver) -> None:
    driver.start()
    ring = driver.rings[0]
    driver.read(0, 512)
    old = ring.call_fd
    ring.take_calls()
    try:
        ring.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        driver.connection.set_u64(R.SET_VRING_CALL, 0, [ring.call_fd])
        driver.read(0, 512)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(old)
    finally:
        os.close(old)
    # no fd: the driver polls
    driver.connection.set_u64(R.SET_VRING_CALL, NO_FD | 0)
    ring.take_calls()
    result = driver.request(T.IN, in_size=512, polled=True)
    assert result.status == OK
    assert ring.take_calls() == 0
    driver.connection.set_u64(R.SET_VRING_CALL, 0, [ring.call_fd])
    driver.read(0, 512)


def test_kick_fd_changed_while_the_ring_runs(driver: BlkDriver) -> None:
    driver.start()
    ring = driver.rings[0]
    driver.read(0, 512)
    os.close(ring.kick_fd)
    ring.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    driver.connection.set_u64(R.SET_VRING_KICK, 0, [ring.kick_fd])
    driver.read(0, 512)


def test_kick_that_was_there_before_the_ring_started(driver: BlkDriver) -> None:
    driver.negotiate()
    driver.make_rings()
    driver.set_features()
    driver.share_memory()
    pending = driver.submit(T.IN, in_size=512)
    driver.rings[0].publish(kick=True)
    driver.start_ring(0)
    assert driver.finish(pending).status == OK


def test_status_is_stored(driver: BlkDriver) -> None:
    driver.negotiate()
    for value in (0, 1, 3, 11, 15, 0x80, 0):
        driver.connection.set_u64(R.SET_STATUS, value)
        assert driver.connection.get_u64(R.GET_STATUS) == value


def test_status_0_stops_the_rings_and_keeps_positions(driver: BlkDriver) -> None:
    """QEMU 7.2 pauses a guest in this order."""
    driver.start()
    for _ in range(5):
        driver.read(0, 512)
    driver.connection.set_u64(R.SET_STATUS, 0)
    assert driver.stop_ring(0) == 5
    driver.start_ring(0, 5)
    driver.connection.set_u64(R.SET_STATUS, 15)
    driver.read(0, 512)


@pytest.mark.parametrize("running", [True, False])
def test_reset_device(group: RunningGroup, driver: BlkDriver, running: bool) -> None:
    if running:
        driver.start()
        driver.read(0, 512)
    else:
        driver.negotiate()
    for _ in range(2):
        driver.connection.set(R.RESET_DEVICE)
    info = group.member(MEMBER)
    assert info["status"]["value"] == 0
    assert info["driver-features"]["value"] == 0
    assert info["state"] == "attached"
    assert not any(queue["started"] for queue in info["queues"])
    if running:
        # the memory stays, the rest is set up again
        driver.rings[0].restart()
        driver.set_features()
        driver.start_ring(0)
        driver.connection.set_u64(R.SET_STATUS, 15)
        driver.read(0, 512)
        assert driver.stop_ring(0) == 1


def test_reset_device_mends_a_broken_member(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    ring = driver.rings[0]
    ring.put_available(ring.size + 1)
    ring.publish(kick=True)
    group.wait_member(MEMBER, lambda state: state["broken"], "broken")
    assert driver.connection.get_u64(R.GET_STATUS) & 0x40
    driver.connection.set(R.RESET_DEVICE)
    assert driver.connection.get_u64(R.GET_STATUS) == 0
    ring.restart()
    driver.set_features()
    driver.start_ring(0)
    driver.read(0, 512)
    info = group.member(MEMBER)
    assert info["broken"] is None
    assert info["last-error"]["rule"] == "ring.head-index"


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_added_and_removed_while_the_ring_runs(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    driver.write(0, b"m" * 512)
    more = GuestMemory(1 << 20)
    try:
        region = Region(0x9000_0000, 1 << 20, 0x7D00_0000_0000, 0, more.fd)
        for _ in range(3):
            driver.add_region(region)
            assert len(group.member(MEMBER)["memory"]) == 2
            more.map[0:512] = bytes(512)
            assert request_to(driver, region.guest) == (OK, 513)
            assert more.map[0:512] == b"m" * 512
            driver.remove_region(region)
            assert len(group.member(MEMBER)["memory"]) == 1
            driver.read(0, 512)
        request_to(driver, region.guest, wait=False)
        fault = group.wait_member(MEMBER, lambda state: state["broken"], "broken")["broken"]
        assert fault["rule"] == "ring.buffer-address"
        assert fault["queue"] == 0
    finally:
        more.close()


def request_to(driver: BlkDriver, address: int, *, wait: bool = True) -> tuple[int, int]:
    """Read a sector to an address outside the driver's own memory: status and used length."""
    ring, memory = driver.rings[0], driver.memory
    header = memory.allocate(17, 1)
    memory.write(header, BLK_HEADER.pack(T.IN, 0, 0) + b"\xff")
    ring.add([Buffer(header, 16), Buffer(address, 512, True), Buffer(header + 16, 1, True)])
    ring.publish(kick=True)
    if not wait:
        return -1, -1
    ((_, used),) = ring.wait_used()
    return memory.read(header + 16, 1)[0], used


def test_the_ring_s_own_memory_is_replaced_while_it_runs(group: RunningGroup, driver: BlkDriver) -> None:
    """QEMU removes a region and adds its successor in two messages; in between the ring has no place."""
    driver.start()
    (region,) = driver.memory.regions
    for _ in range(3):
        driver.read(0, 512)
        driver.remove_region(region)
        assert group.member(MEMBER)["memory"] == []
        pending = driver.submit(T.IN, in_size=512)
        driver.rings[0].publish(kick=True)
        time.sleep(0.02)
        assert group.member(MEMBER)["broken"] is None
        driver.add_region(region)
        assert driver.finish(pending).status == OK


def test_mem_table_replaces_everything(group: RunningGroup) -> None:
    protocol = PROTOCOL_FEATURES & ~bits(P.CONFIGURE_MEM_SLOTS)
    with BlkDriver(group.socket(MEMBER), protocol=protocol, regions=2) as driver:
        driver.start()
        driver.read(0, 512)
        more = GuestMemory(1 << 20)
        try:
            region = Region(0x9000_0000, 1 << 20, 0x7D00_0000_0000, 0, more.fd)
            driver.set_mem_table([*driver.memory.regions, region])
            assert len(group.member(MEMBER)["memory"]) == 3
            assert request_to(driver, region.guest)[0] == OK
            driver.set_mem_table(driver.memory.regions)
            driver.connection.barrier()
            assert len(group.member(MEMBER)["memory"]) == 2
            driver.read(0, 512)
        finally:
            more.close()
    group.wait_detached(MEMBER)


def test_region_with_an_offset_that_is_no_page(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    driver.write(0, b"o" * 512)
    more = GuestMemory(1 << 20)
    try:
        region = Region(0x9000_0000, 1 << 16, 0x7D00_0000_0000, 512, more.fd)
        driver.add_region(region)
        assert request_to(driver, region.guest)[0] == OK
        assert more.map[512:1024] == b"o" * 512
        driver.remove_region(region)
    finally:
        more.close()


def test_as_many_regions_as_it_says(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    slots = driver.connection.get_u64(R.GET_MAX_MEM_SLOTS)
    more = GuestMemory(slots * 4096)
    try:
        regions = [
            Region(0x9000_0000 + i * 8192, 4096, 0x7D00_0000_0000 + i * 8192, i * 4096, more.fd) for i in range(slots)
        ]
        for region in regions[:-1]:
            driver.add_region(region)
        assert request_to(driver, regions[-2].guest)[0] == OK
        with pytest.raises((Refused, ConnectionLost)):
            driver.add_region(regions[-1])
        assert group.wait_detached(MEMBER)["last-error"]["rule"] == "memory.slots"
    finally:
        more.close()


# --- configuration ---------------------------------------------------------------------------------------------


def test_get_config(group: RunningGroup) -> None:
    with negotiated(group) as connection:
        whole = connection.get_config(0, 256)
        assert len(whole) == 256
        assert int.from_bytes(whole[:8], "little") == SIZE // 512
        assert int.from_bytes(whole[20:24], "little") == 512
        assert int.from_bytes(whole[34:36], "little") == 1
        assert whole[32] == 1
        assert whole[96:] == bytes(160)
        for offset, size in [(0, 57), (0, 60), (0, 96), (0, 97), (20, 4), (32, 1), (90, 20), (96, 160), (255, 1)]:
            assert connection.get_config(offset, size) == whole[offset : offset + size]


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 257), (256, 1), (200, 57), (0, 0), (0xFFFF_FFFF, 2), (0xFFFF_FFFF, 0xFFFF_FFFF)]
)
def test_get_config_out_of_range(group: RunningGroup, offset: int, size: int) -> None:
    with negotiated(group) as connection:
        payload = CONFIG.pack(offset, size, 0) + bytes(min(size, 1000))
        assert connection.get(R.GET_CONFIG, payload).payload == b""
        # and nothing else has happened
        assert connection.get_config(0, 8)
        assert group.member(MEMBER)["broken"] is None


def test_set_config_writeback(group: RunningGroup) -> None:
    with negotiated(group) as connection:
        connection.reply_ack = True
        for value in (0, 0, 1, 0):
            connection.set_config(32, bytes([value]))
            assert connection.get_config(32, 1) == bytes([value])
            assert group.member(MEMBER)["config"]["writeback"] is bool(value)
        # QEMU keeps its copy over a reset, and a guest that reads "write-through" there sends no flushes.
        connection.set(R.RESET_DEVICE)
        assert connection.get_config(32, 1) == b"\0"
    with negotiated(group) as connection:
        assert connection.get_config(32, 1) == b"\1", "a front end that knows nothing yet gets the default"


def test_the_cache_mode_outlives_a_reconnection(group: RunningGroup) -> None:
    """QEMU's chardev reconnects without reading the configuration again."""
    with negotiated(group) as connection:
        connection.reply_ack = True
        connection.set_config(32, b"\0")
    with negotiated(group):
        assert group.member(MEMBER)["config"]["writeback"] is False
    with negotiated(group) as connection:
        assert connection.get_config(32, 1) == b"\1"


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, bytes(8)), (32, b"\2"), (33, b"\1"), (20, b"\0\0\0\0"), (256, b"\1"), (0xFFFF_FFFF, b"\1\1")],
)
def test_set_config_of_what_cannot_be_written(group: RunningGroup, offset: int, data: bytes) -> None:
    with negotiated(group) as connection:
        connection.reply_ack = True
        before = connection.get_config(0, 256)
        with pytest.raises(Refused):
            connection.set_config(offset, data)
        assert connection.get_config(0, 256) == before
        assert group.member(MEMBER)["broken"] is None


def test_set_config_of_the_whole_structure(group: RunningGroup) -> None:
    """QEMU's generic device sends all of it when one byte has changed."""
    with negotiated(group) as connection:
        connection.reply_ack = True
        data = bytearray(connection.get_config(0, 96))
        data[32] = 0
        connection.set_config(0, bytes(data))
        assert connection.get_config(0, 96) == bytes(data)
        connection.set(R.RESET_DEVICE)


# --- connections -----------------------------------------------------------------------------------------------


def steps(driver: BlkDriver) -> list[Callable[[], object]]:
    """A whole start, and the stop, in single messages."""
    connection, memory = driver.connection, driver.memory

    def ring_message(request: int) -> Callable[[], object]:
        ring = driver.rings[0]
        fd = ring.call_fd if request == R.SET_VRING_CALL else ring.kick_fd
        return lambda: connection.set_u64(request, 0, [fd])

    driver.rings.clear()
    driver.queue_size = 16
    driver.accepted = bits(F.VERSION_1, F.PROTOCOL_FEATURES, F.EVENT_IDX, F.INDIRECT)
    driver.make_rings()
    return [
        lambda: connection.get(R.GET_FEATURES),
        lambda: connection.get(R.GET_PROTOCOL_FEATURES),
        lambda: connection.set_u64(R.SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES),
        lambda: setattr(connection, "reply_ack", True),
        lambda: connection.get(R.GET_QUEUE_NUM),
        lambda: connection.get(R.GET_MAX_MEM_SLOTS),
        lambda: BackendChannel(connection).close(),
        lambda: connection.set(R.SET_OWNER),
        ring_message(R.SET_VRING_CALL),
        lambda: connection.get_config(0, 57),
        lambda: connection.set(R.RESET_DEVICE),
        lambda: connection.set_u64(R.SET_FEATURES, driver.accepted),
        lambda: connection.get(R.GET_STATUS),
        lambda: connection.set_u64(R.SET_STATUS, 8),
        lambda: driver.add_region(memory.regions[0]),
        lambda: connection.set_vring(R.SET_VRING_NUM, 0, 16),
        lambda: connection.set_vring(R.SET_VRING_BASE, 0, 0),
        lambda: driver.set_addresses(0),
        ring_message(R.SET_VRING_KICK),
        lambda: connection.set_vring(R.SET_VRING_ENABLE, 0, 1),
        lambda: connection.set_u64(R.SET_STATUS, 15),
        lambda: driver.read(0, 512),
        lambda: (driver.submit(T.IN, in_size=4096), driver.rings[0].publish(kick=True)),
        lambda: connection.set_vring(R.SET_VRING_ENABLE, 0, 0),
        lambda: connection.get_vring_base(0),
        lambda: connection.set_u64(R.SET_STATUS, 0),
        lambda: connection.set(R.RESET_DEVICE),
    ]


@pytest.mark.parametrize("count", range(28))
def test_reconnect_after_any_step(group: RunningGroup, count: int) -> None:
    group.wait_detached(MEMBER)
    before = group.open_fds()
    connections = group.member(MEMBER)["connections"]
    with BlkDriver(group.socket(MEMBER)) as driver:
        todo = steps(driver)
        assert count <= len(todo)
        for step in todo[:count]:
            step()
    # at once: whoever reconnects doesn't wait until the back end has noticed
    with BlkDriver(group.socket(MEMBER)) as driver:
        driver.start()
        driver.write(3, b"r" * 512)
        assert driver.read(3, 512) == b"r" * 512
        info = group.member(MEMBER)
        assert info["connections"] == connections + 2
        assert info["broken"] is None
        assert info["driver-mode"] == "modern"
        assert len(info["memory"]) == 1
    info = group.wait_detached(MEMBER)
    assert info["memory"] == []
    wait_until(lambda: group.open_fds() == before, what="closing all fds")


def test_reconnect_with_the_same_memory_goes_on_where_it_was(group: RunningGroup) -> None:
    """What QEMU does when its chardev reconnects: the guest's rings don't know about it."""
    group.wait_detached(MEMBER)
    with BlkDriver(group.socket(MEMBER)) as driver:
        driver.start()
        for _ in range(5):
            driver.read(0, 512)
        for _ in range(3):
            driver.connection.close()
            pending = driver.submit(T.IN, in_size=512)
            driver.rings[0].publish(kick=False)
            ring = driver.rings[0]
            driver.connection = Connection(group.socket(MEMBER))
            driver.negotiate()
            driver.set_features()
            driver.share_memory()
            # from the used index in guest memory
            driver.start_ring(0, ring.device_used_idx)
            driver.connection.set_u64(R.SET_STATUS, 15)
            ring.kick()
            assert driver.finish(pending).status == OK
            driver.read(0, 512)
    group.wait_detached(MEMBER)


def test_many_reconnects(group: RunningGroup) -> None:
    group.wait_detached(MEMBER)
    before = group.open_fds()
    for _ in range(50):
        with BlkDriver(group.socket(MEMBER), memory_size=1 << 20) as driver:
            driver.start()
            driver.read(0, 512)
    group.wait_detached(MEMBER)
    wait_until(lambda: group.open_fds() == before, what="closing all fds")


def test_second_front_end_is_refused_in_bounded_time(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    begin = time.monotonic()
    with Connection(group.socket(MEMBER)) as second:
        second.send(R.GET_FEATURES)
        while time.monotonic() < begin + 10:
            # the first one is served all the time
            driver.read(0, 512)
            if select.select([second.socket], [], [], 0.05)[0]:
                break
        assert second.wait_closed(0.5) == []
    assert time.monotonic() - begin < 5
    driver.read(0, 512)
    info = group.member(MEMBER)
    assert info["broken"] is None
    assert info["connection"]["refused"] >= 1
    assert len(group.wait_logged(MEMBER, "refused")) == 1


def test_second_front_end_is_served_when_the_first_leaves(group: RunningGroup, driver: BlkDriver) -> None:
    """A QEMU that is restarted: the new process connects before the old one's end has been noticed."""
    driver.start()
    with BlkDriver(group.socket(MEMBER)) as second:
        driver.connection.close()
        second.start()
        second.read(0, 512)
    group.wait_detached(MEMBER)


def test_crowd_of_front_ends(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    with ExitStack() as stack:
        crowd = []
        for _ in range(40):
            try:
                crowd.append(stack.enter_context(Connection(group.socket(MEMBER), timeout=2)))
            except (BlockingIOError, TimeoutError):
                # the backlog is full; nobody has to take more
                break
        driver.read(0, 512)
        for other in crowd:
            other.wait_closed(10)
    driver.read(0, 512)


def test_member_says_who_is_connected(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    info = group.member(MEMBER)
    assert info["peer-pid"] == os.getpid()
    assert info["state"] == "running"
    assert info["protocol-features"]["value"] == PROTOCOL_FEATURES
    assert len(info["protocol-features"]["names"]) == PROTOCOL_FEATURES.bit_count()
    assert not [name for name in info["protocol-features"]["names"] if name.startswith("BIT_")]
    assert info["status"]["names"] == ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"]
    (queue,) = info["queues"]
    assert (queue["size"], queue["max-size"], queue["running"]) == (16, 256, True)
    assert queue["desc"] == driver.memory.user(driver.rings[0].desc)
    driver.close()
    info = group.wait_detached(MEMBER)
    assert info["peer-pid"] is None


# --- the back-end channel --------------------------------------------------------------------------------------


def test_channel_given_twice(group: RunningGroup) -> None:
    """The later one counts; the earlier one is closed."""
    with negotiated(group) as connection:
        connection.reply_ack = True
        first = BackendChannel(connection)
        second = BackendChannel(connection)
        try:
            with pytest.raises(ConnectionLost):
                first.receive()
            connection.barrier()
        finally:
            first.close()
            second.close()
        connection.barrier()


def test_closed_channel_does_no_harm(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    BackendChannel(driver.connection).close()
    time.sleep(0.05)
    driver.read(0, 512)
    assert group.member(MEMBER)["broken"] is None
    group.execute("member-modify", id=MEMBER, size=SIZE)


def test_idle_costs_no_cpu(group: RunningGroup, driver: BlkDriver) -> None:
    driver.start()
    driver.read(0, 512)
    assert cpu_of(group, 0.5) < 0.1
