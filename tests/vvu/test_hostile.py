# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Everything a hostile master or a hostile driver of a virtio-vhost-user device can do.

After each case: the rule that was broken can be seen over QMP, the one session has ended, the device works for the next
master, and a second device of the same group has worked all the time. Descriptors don't leak, nor does memory grow.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.frontend import (
    HEADER,
    LOG,
    NO_FD,
    PAGE,
    REPLY,
    U64,
    VERSION,
    Buffer,
    ConnectionLost,
    R,
    Region,
    wait_until,
)
from tests.vvu.conftest import SHARED, Device, Rig
from tests.vvu.peers import SLAVE_UP, Master, PciSlave, QemuSlave, Slave, exchange, memory_table, signals

TOP = 1 << 64


@pytest.fixture(scope="module", params=["vhost-user", "vfio-user"])
def beside(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Beside]:
    """Another device, on either carrier in turn, in use all the time."""
    with Device(rig, "beside", request.param) as other:
        yield Beside(other)


class Beside:
    """A device that has nothing to do with what happens."""

    def __init__(self, device: Device) -> None:
        self.carrier = device.carrier
        self._device = device
        self._slave = device.boot()
        self._master = device.connect()
        self._call = self._master.vring_fd(R.SET_VRING_CALL, 0)
        self._kick = self._master.vring_fd(R.SET_VRING_KICK, 0)
        self._slave.receive()
        self._slave.receive()

    def check(self) -> None:
        """It works, with the same master as ever."""
        exchange(self._master, self._slave, R.GET_FEATURES, b"", 1 << 32)
        self._slave.call()
        assert signals(self._call)
        os.eventfd_write(self._kick, 1)
        assert self._slave.kicks()


class Target:
    """The device that is attacked, with a driver that comes up again and again."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.slave = device.boot()

    def master(self) -> Master:
        """The next one."""
        self.slave.forget()
        self.slave.config_changes(0)
        if self.slave.status == 0:
            self.slave.up()
        return self.device.connect()

    def leave(self, master: Master) -> None:
        """The master goes by itself."""
        master.close()
        assert self.slave.config_changes()
        self.slave.wait_status(0)

    def ended(self, master: Master, rule: str | None) -> None:
        """The session is over, because of a rule, and the driver knows."""
        if rule is not None:
            self.device.wait_rule(rule)
        with suppress(ConnectionLost):
            master.wait_closed()
        assert self.slave.config_changes()
        self.slave.wait_status(0)
        master.close()


@pytest.fixture(scope="module")
def shared_target(rig: Rig, beside: Beside) -> Iterator[Target]:
    """A target for those who leave its driver alone."""
    with Device(rig, "tested", beside.carrier) as device:
        yield Target(device)


@pytest.fixture
def target(rig: Rig, beside: Beside) -> Iterator[Target]:
    """A target of one's own; what is beside it has been left in peace, and no descriptor is left."""
    before = rig.descriptors()
    with Device(rig, "ram", beside.carrier) as device:
        yield Target(device)
    beside.check()
    wait_until(lambda: rig.descriptors() <= before, what=f"{before} descriptors again")


def resident(rig: Rig) -> int:
    """Bytes of the process's memory that are its own."""
    for line in Path(f"/proc/{rig.group.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


# --- one bad message --------------------------------------------------------------------------------------------------


class Fds:
    """Descriptors of all kinds, closed together."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Fds:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _keep(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def event(self) -> int:
        return self._keep(os.eventfd(0))

    def pipe(self) -> int:
        ends = os.pipe()
        self._keep(ends[1])
        return self._keep(ends[0])

    def memory(self, size: int = 16 * PAGE) -> int:
        fd = self._keep(os.memfd_create("bad"))
        os.ftruncate(fd, size)
        return fd

    def read_only(self, size: int = 16 * PAGE) -> int:
        return self._keep(os.open(f"/proc/self/fd/{self.memory(size)}", os.O_RDONLY))

    def directory(self) -> int:
        return self._keep(os.open("/", os.O_RDONLY))

    def null(self) -> int:
        return self._keep(os.open("/dev/null", os.O_RDWR))

    def socket(self, kind: int = socket.SOCK_STREAM) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self._keep(theirs.detach())
        return self._keep(ours.detach())


@pytest.fixture
def qemu_target(rig: Rig) -> Iterator[Target]:
    """On carrier (a) only."""
    with Device(rig, "ram", "vhost-user") as device:
        yield Target(device)


@pytest.fixture
def pci_target(rig: Rig) -> Iterator[Target]:
    """On carrier (b) only."""
    with Device(rig, "ram", "vfio-user") as device:
        yield Target(device)


@dataclass(frozen=True)
class Case:
    """A master's message and the rule that it breaks."""

    name: str
    rule: str
    send: Callable[[Master, Fds], None]


CASES: list[Case] = []


def case(rule: str) -> Callable[[Callable[[Master, Fds], None]], Callable[[Master, Fds], None]]:
    def add(function: Callable[[Master, Fds], None]) -> Callable[[Master, Fds], None]:
        CASES.append(Case(function.__name__, rule, function))
        return function

    return add


def message(
    request: int, payload: bytes = b"", *kinds: str, flags: int | None = None, size: int | None = None
) -> Callable[[Master, Fds], None]:
    """Sends this, with descriptors of these kinds."""

    def send(master: Master, fds: Fds) -> None:
        master.send(request, payload, [getattr(fds, kind)() for kind in kinds], flags=flags, size=size)

    return send


def table(*regions: tuple[int, int, int], fds: list[int]) -> tuple[bytes, list[int]]:
    """Of (guest, size, mmap_offset)."""
    return memory_table([Region(guest, size, guest, offset) for guest, size, offset in regions]), fds


ONE_REGION = table((0, PAGE, 0), fds=[])[0]

CASES += [Case(f"version_{flags}", "message.version", message(R.GET_FEATURES, flags=flags)) for flags in (0, 2, 3)]
CASES += [
    Case(f"size_{size:#x}", "message.size", message(R.SET_CONFIG, bytes(64), size=size))
    for size in (4097, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
]
# of protocol features that are never offered
CASES += [
    Case(f"request_{number}", "message.not-possible", message(number, bytes(8)))
    for number in (28, 31, 32, 33, 35, 36, 37, 38, 41, 42, 43, 44)
]
CASES += [
    Case(f"a_region_that_is_a_{kind}", "memory.fd-kind", message(R.SET_MEM_TABLE, ONE_REGION, kind))
    for kind in ("pipe", "event", "socket", "directory", "null", "read_only")
]
for _request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
    _name = _request.name.lower()
    CASES += [
        Case(f"{_name}_of_queue_{index}", "vring.index", message(_request, U64.pack(index), "event"))
        for index in (4, 5, 126, 255)
    ]
    CASES += [
        Case(f"{_name}_with_undefined_bits", "vring.fd", message(_request, U64.pack(1 << 9), "event")),
        Case(f"{_name}_without_fd", "message.fds", message(_request, U64.pack(0))),
        Case(f"{_name}_with_one_too_many", "message.fds", message(_request, U64.pack(NO_FD), "event")),
        Case(f"{_name}_with_two", "message.fds", message(_request, U64.pack(0), "event", "event")),
        Case(f"{_name}_of_4_bytes", "message.size", message(_request, bytes(4), "event")),
        Case(f"{_name}_with_a_pipe", "vring.fd", message(_request, U64.pack(0), "pipe")),
        Case(f"{_name}_with_memory", "vring.fd", message(_request, U64.pack(0), "memory")),
        Case(f"{_name}_with_a_socket", "vring.fd", message(_request, U64.pack(0), "socket")),
    ]


@case("message.flags")
def an_answer_to_nothing(m: Master, _: Fds) -> None:
    m.send(R.GET_FEATURES, U64.pack(0), flags=VERSION | REPLY)


@case("message.fds")
def get_features_with_fd(m: Master, fds: Fds) -> None:
    m.send(R.GET_FEATURES, b"", [fds.event()])


@case("message.fds")
def an_unknown_message_with_fd(m: Master, fds: Fds) -> None:
    m.send(1000, bytes(8), [fds.event()])


@case("message.fds")
def nine_fds(m: Master, fds: Fds) -> None:
    m.send(R.SET_OWNER, b"", [fds.event() for _ in range(9)])


@case("message.fds")
def as_many_fds_as_there_can_be(m: Master, fds: Fds) -> None:
    event = fds.event()
    m.send(R.SET_OWNER, b"", [event] * 253)


@case("message.fds")
def fds_with_every_byte(m: Master, fds: Fds) -> None:
    event = fds.event()
    with suppress(ConnectionLost):
        for byte in m.encode(R.SET_CONFIG, bytes(64)):
            m.send_raw(bytes([byte]), [event] * 8)


@case("slave-channel")
def a_channel_that_is_a_pipe(m: Master, fds: Fds) -> None:
    m.send(R.SET_BACKEND_REQ_FD, b"", [fds.pipe()])


@case("slave-channel")
def a_channel_of_datagrams(m: Master, fds: Fds) -> None:
    m.send(R.SET_BACKEND_REQ_FD, b"", [fds.socket(socket.SOCK_DGRAM)])


@case("message.fds")
def a_channel_without_fd(m: Master, _: Fds) -> None:
    m.send(R.SET_BACKEND_REQ_FD)


@case("log.fd")
def a_log_doorbell_that_is_memory(m: Master, fds: Fds) -> None:
    m.send(R.SET_LOG_FD, b"", [fds.memory()])


@case("message.size")
def set_features_of_4_bytes(m: Master, _: Fds) -> None:
    m.send(R.SET_FEATURES, bytes(4))


@case("protocol-features.not-offered")
def all_protocol_features(m: Master, _: Fds) -> None:
    m.send(R.SET_PROTOCOL_FEATURES, U64.pack(TOP - 1))


@case("message.fds")
def a_table_with_an_fd_less(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, PAGE, 0), (PAGE, PAGE, PAGE), fds=[fds.memory()]))


@case("message.fds")
def a_table_with_an_fd_more(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, PAGE, 0), fds=[fds.memory(), fds.memory()]))


@case("message.size")
def a_table_that_is_shorter_than_its_count(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, struct.pack("<II", 2, 0) + bytes(32), [fds.memory(), fds.memory()])


@case("message.size")
def a_table_of_a_huge_count(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, struct.pack("<II", 0xFFFFFFFF, 0) + bytes(32), [fds.memory()])


@case("message.size")
def a_table_of_4_bytes(m: Master, _: Fds) -> None:
    m.send(R.SET_MEM_TABLE, bytes(4))


@case("message.fds")
def a_table_of_nine_regions(m: Master, fds: Fds) -> None:
    memory = fds.memory()
    m.send(R.SET_MEM_TABLE, *table(*[(i * PAGE, PAGE, i * PAGE) for i in range(9)], fds=[memory] * 9))


@case("memory.region-size")
def a_region_of_nothing(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, 0, 0), fds=[fds.memory()]))


@case("memory.region-wrap")
def a_region_that_wraps(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((TOP - PAGE, 2 * PAGE, 0), fds=[fds.memory()]))


@case("memory.region-wrap")
def a_region_whose_place_in_the_file_wraps(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, 2 * PAGE, TOP - PAGE), fds=[fds.memory()]))


@case("memory.fd-short")
def a_region_beyond_its_file(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, 17 * PAGE, 0), fds=[fds.memory()]))


@case("shared-memory.size")
def a_region_of_all_there_is(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, TOP - PAGE, 0), fds=[fds.memory()]))


@case("shared-memory.size")
def regions_larger_than_the_window(m: Master, fds: Fds) -> None:
    memory = fds.memory(SHARED + PAGE)
    m.send(R.SET_MEM_TABLE, *table((0, SHARED, 0), (1 << 32, PAGE, SHARED), fds=[memory, memory]))


@case("memory.overlap")
def regions_that_overlap(m: Master, fds: Fds) -> None:
    memory = fds.memory()
    m.send(R.SET_MEM_TABLE, *table((0, 2 * PAGE, 0), (PAGE, PAGE, 4 * PAGE), fds=[memory, memory]))


@case("shared-memory.alignment")
def a_region_of_half_a_page(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, PAGE // 2, 0), fds=[fds.memory()]))


@case("shared-memory.alignment")
def a_region_in_the_middle_of_a_page(m: Master, fds: Fds) -> None:
    m.send(R.SET_MEM_TABLE, *table((0, PAGE, 512), fds=[fds.memory()]))


@case("message.fds")
def a_log_without_fd(m: Master, _: Fds) -> None:
    m.send(R.SET_LOG_BASE, LOG.pack(PAGE, 0))


@case("message.size")
def a_log_of_8_bytes(m: Master, fds: Fds) -> None:
    m.send(R.SET_LOG_BASE, bytes(8), [fds.memory()])


@case("memory.region-size")
def a_log_of_nothing(m: Master, fds: Fds) -> None:
    m.send(R.SET_LOG_BASE, LOG.pack(0, 0), [fds.memory()])


@case("shared-memory.alignment")
def a_log_in_the_middle_of_a_page(m: Master, fds: Fds) -> None:
    m.send(R.SET_LOG_BASE, LOG.pack(PAGE, 8), [fds.memory()])


@case("shared-memory.size")
def a_log_larger_than_the_window(m: Master, fds: Fds) -> None:
    m.send(R.SET_LOG_BASE, LOG.pack(SHARED + 1, 0), [fds.memory(2 * SHARED)])


@case("memory.fd-short")
def a_log_beyond_its_file(m: Master, fds: Fds) -> None:
    m.send(R.SET_LOG_BASE, LOG.pack(2 * PAGE, 15 * PAGE), [fds.memory()])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_message_ends_this_session_only(shared_target: Target, beside: Beside, case: Case) -> None:
    master = shared_target.master()
    with Fds() as fds, suppress(ConnectionLost):
        case.send(master, fds)
    shared_target.ended(master, case.rule)
    beside.check()


def test_no_descriptor_is_left_of_all_that(rig: Rig, shared_target: Target) -> None:
    master = shared_target.master()
    before = rig.descriptors()
    shared_target.leave(master)
    for case in CASES:
        master = shared_target.master()
        with Fds() as fds, suppress(ConnectionLost):
            case.send(master, fds)
        shared_target.ended(master, case.rule)
    master = shared_target.master()
    wait_until(lambda: rig.descriptors() <= before, what=f"{before} descriptors again")


def test_a_table_over_the_place_of_the_log(target: Target) -> None:
    """Nothing was there before the log, so it came first. While it isn't written any more it is in nobody's way."""
    master = target.master()
    with Fds() as fds:
        master.send(R.SET_LOG_BASE, LOG.pack(PAGE, 0), [fds.memory()])
        assert target.slave.receive().request == R.SET_LOG_BASE
        master.send(R.SET_MEM_TABLE, *table((0, PAGE, 0), fds=[fds.memory()]))
        assert target.slave.receive().request == R.SET_MEM_TABLE
        assert [region["log"] for region in target.device.query()["memory"]] == [False]
        master.send(R.SET_FEATURES, U64.pack(1 << 26))
        assert target.slave.receive().request == R.SET_FEATURES
        master.send(R.SET_MEM_TABLE, *table(fds=[]))
        assert target.slave.receive().request == R.SET_MEM_TABLE
        master.send(R.SET_LOG_BASE, LOG.pack(PAGE, 0), [fds.memory()])
        assert target.slave.receive().request == R.SET_LOG_BASE
        master.send(R.SET_MEM_TABLE, *table((0, PAGE, 0), fds=[fds.memory()]))
        target.ended(master, "shared-memory.log-overlap")


def test_memory_again_and_again(target: Target, rig: Rig) -> None:
    """Each table replaces the one before, whatever comes in between."""
    master = target.master()
    slave = target.slave
    with Fds() as fds:
        memory = fds.memory(64 * PAGE)
        for number in range(64):
            if number == 8:
                before = rig.descriptors()
            size = PAGE * (1 + number % 7)
            master.send(R.SET_MEM_TABLE, *table((0, size, 0), (1 << 32, size, 8 * PAGE), fds=[memory, memory]))
            assert slave.receive().request == R.SET_MEM_TABLE
        # those of the table before may not be closed yet
        wait_until(lambda: rig.descriptors() <= before, what=f"{before} descriptors again")
    assert len(target.device.query()["memory"]) == 2


# --- torn messages, silence -------------------------------------------------------------------------------------------


def test_half_a_message_and_silence(qemu_target: Target) -> None:
    """Once, since it takes 5 s, and the carrier has no part in it."""
    master = qemu_target.master()
    master.send_raw(master.encode(R.SET_CONFIG, bytes(64))[:40])
    wait_until(lambda: qemu_target.device.last_rule is not None, 10, "the end of patience")
    qemu_target.ended(master, "message.silence")


# --- the channel for the slave's requests -----------------------------------------------------------------------------


def with_channel(target: Target) -> Master:
    master = target.master()
    master.open_channel()
    assert target.slave.receive().request == R.SET_BACKEND_REQ_FD
    assert master.channel is not None
    return master


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        pytest.param(HEADER.pack(2, VERSION, 0), "slave-channel", id="a request"),
        pytest.param(HEADER.pack(2, 2 | REPLY, 8) + bytes(8), "message.version", id="version"),
        pytest.param(HEADER.pack(2, VERSION | REPLY, 1 << 30) + bytes(64), "message.size", id="size"),
    ],
)
def test_a_bad_answer_on_the_slaves_channel(target: Target, data: bytes, rule: str) -> None:
    master = with_channel(target)
    assert master.channel is not None
    master.channel.sendall(data)
    target.ended(master, rule)


def test_fds_on_the_slaves_channel(target: Target) -> None:
    master = with_channel(target)
    assert master.channel is not None
    with Fds() as fds:
        socket.send_fds(master.channel, [HEADER.pack(2, VERSION | REPLY, 8) + bytes(8)], [fds.event()])
        target.ended(master, "message.fds")


def test_half_an_answer_on_the_slaves_channel_and_its_end(target: Target) -> None:
    master = with_channel(target)
    assert master.channel is not None
    master.channel.sendall(HEADER.pack(2, VERSION | REPLY, 8))
    master.channel.close()
    target.ended(master, "message.torn")


def test_a_master_that_closes_the_slaves_channel_goes_on_without(target: Target) -> None:
    master = with_channel(target)
    assert master.channel is not None
    master.channel.close()
    for _ in range(3):
        target.slave.send(2)
    exchange(master, target.slave, R.GET_FEATURES, b"", 1)


def test_a_new_channel_replaces_the_old_one(rig: Rig, target: Target) -> None:
    master = target.master()
    before = rig.descriptors()
    for _ in range(50):
        master.open_channel()
        assert target.slave.receive().request == R.SET_BACKEND_REQ_FD
    target.slave.send(2)
    assert master.receive_channel().request == 2
    wait_until(lambda: rig.descriptors() <= before + 1, what="one channel")


def test_descriptors_again_and_again(rig: Rig, target: Target) -> None:
    master = target.master()
    before = rig.descriptors()
    for _ in range(50):
        for request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
            with Fds() as fds:
                master.send(request, U64.pack(0), [fds.event()])
                assert target.slave.receive().request == request
    wait_until(lambda: rig.descriptors() <= before + 3, what="three descriptors")


# --- floods -----------------------------------------------------------------------------------------------------------


def flood(send: Callable[[], object], seconds: float = 0.7) -> int:
    """Send as fast as it goes; how often that was."""
    count = 0
    deadline = time.monotonic() + seconds
    with suppress(TimeoutError, BlockingIOError, ConnectionLost):
        while time.monotonic() < deadline:
            send()
            count += 1
    return count


def full(slave: Slave, head: int) -> bool:
    """Whether a chain stays in txq."""
    with suppress(TimeoutError):
        slave.transmitted(head, 0.3)
        return False
    return True


def test_a_master_that_waits_for_nothing(rig: Rig, target: Target, beside: Beside) -> None:
    """The driver takes no message: what is sent stays with whoever has sent it."""
    slave = target.slave
    slave.reset()
    slave.start(rx=1).up()
    master = target.device.connect()
    exchange(master, slave, R.GET_FEATURES, b"", 1)
    # the buffer of this one was not the last
    slave.poll(repost=False)
    master.socket.settimeout(0.1)
    before = resident(rig)
    sent = flood(lambda: master.send(R.SET_CONFIG, bytes(4096)))
    beside.check()
    assert sent > 10, "the socket has some room"
    assert target.device.query()["waiting"] <= 2
    assert resident(rig) - before < 8 << 20
    slave.post(4)
    for _ in range(sent):
        assert slave.receive().request == R.SET_CONFIG


def test_a_master_that_sends_as_fast_as_it_can(rig: Rig, target: Target, beside: Beside) -> None:
    slave = target.slave
    master = target.master()
    before = resident(rig)
    ended = threading.Event()
    got = 0

    def take() -> None:
        nonlocal got
        while not ended.is_set():
            with suppress(TimeoutError):
                slave.receive(0.01)
                got += 1

    thread = threading.Thread(target=take)
    thread.start()
    try:
        sent = flood(lambda: master.send(R.GET_FEATURES))
        beside.check()
        wait_until(lambda: got >= sent - 1, 10, "all of them")
    finally:
        ended.set()
        thread.join()
    assert resident(rig) - before < 8 << 20


def test_a_master_that_reads_no_answers(rig: Rig, target: Target, beside: Beside) -> None:
    """Answers pile up to a bound, then stay in txq. The driver may give up on the master at any time."""
    slave = target.slave
    master = target.master()
    before = resident(rig)
    heads = []
    for _ in range(200):
        # each is asked for: others would be thrown away
        master.send(R.GET_CONFIG, bytes(12))
        slave.receive()
        heads.append(slave.transmit(HEADER.pack(R.GET_CONFIG, VERSION | REPLY, 4096) + bytes(4096), wait=False))
        if len(heads) > 40 and full(slave, heads[-40]):
            break
    else:
        raise AssertionError("txq is never full")
    beside.check()
    assert resident(rig) - before < 8 << 20
    slave.status = 0
    with suppress(ConnectionLost):
        master.wait_closed()
    slave.transmitted(heads[-1])
    slave.up()
    target.device.works(target.device.connect())


def test_kicks_and_calls_without_end(target: Target, beside: Beside) -> None:
    slave = target.slave
    master = target.master()
    kick = master.vring_fd(R.SET_VRING_KICK, 0)
    call = master.vring_fd(R.SET_VRING_CALL, 0)
    slave.receive()
    slave.receive()
    ended = threading.Event()

    def kicks() -> None:
        while not ended.is_set():
            os.eventfd_write(kick, 1)

    thread = threading.Thread(target=kicks)
    thread.start()
    try:
        flood(slave.call, 0.4)
        beside.check()
    finally:
        ended.set()
        thread.join()
    assert slave.kicks()
    assert signals(call)
    exchange(master, slave, R.GET_FEATURES, b"", 1)


def test_masters_that_come_and_break_a_rule_all_the_time(rig: Rig, target: Target, beside: Beside) -> None:
    logged = len(rig.group.log())
    for _ in range(20):
        master = target.master()
        with suppress(ConnectionLost):
            master.send(R.GET_FEATURES, flags=2)
        target.ended(master, "message.version")
    beside.check()
    said = rig.group.log()[logged:]
    assert said.count("message.version") + said.count("version 1 is spoken") <= 4, "the log is not theirs to fill"


# --- memory that goes away --------------------------------------------------------------------------------------------


def test_memory_that_shrinks_under_the_drivers_eyes(rig: Rig, pci_target: Target, beside: Beside) -> None:
    """Trapped accesses are ours to survive, wherever they go."""
    slave = pci_target.slave
    master = pci_target.master()
    fd = master.memfd(4 * PAGE, b"before")
    master.set_mem_table([Region(0, 4 * PAGE, 0, 0, fd)])
    (at,) = struct.unpack_from("<Q", slave.receive().payload, 8 + 24)
    assert slave.window_read(at, 6) == b"before"
    os.ftruncate(fd, 0)
    slave.window_write(at, b"gone")
    assert len(slave.window_read(at, 4 * PAGE)) == 4 * PAGE
    beside.check()
    assert rig.group.alive()
    if not slave.needs_reset:
        pci_target.leave(master)
    slave.reset()
    slave.start().up()
    pci_target.device.works(pci_target.device.connect())


def test_memory_that_shrinks_behind_qemu(qemu_target: Target, beside: Beside) -> None:
    """QEMU has it mapped, and tells us of it as of memory of its guest, again with each change. That the file has
    become too short is no fault of the backend VM's: its connection stays."""
    slave = qemu_target.slave
    assert isinstance(slave, QemuSlave)
    master = qemu_target.master()
    fd = master.memfd(4 * PAGE)
    master.set_mem_table([Region(0, 4 * PAGE, 0, 0, fd)])
    assert slave.receive().request == R.SET_MEM_TABLE
    slave.barrier()
    os.ftruncate(fd, 0)
    exchange(master, slave, R.GET_FEATURES, b"", 1)
    master.send(R.SET_LOG_BASE, LOG.pack(PAGE, 0), [master.memfd(PAGE)])
    assert slave.receive().request == R.SET_LOG_BASE
    slave.barrier()
    exchange(master, slave, R.GET_FEATURES, b"", 1)
    # the next table takes it away
    master.set_mem_table([])
    assert slave.receive().request == R.SET_MEM_TABLE
    qemu_target.leave(master)
    beside.check()
    slave.up()
    qemu_target.device.works(qemu_target.device.connect())


# --- the driver -------------------------------------------------------------------------------------------------------


def broken(target: Target, master: Master | None, rule: str) -> None:
    """The driver has broken its device: the master is away, and after a reset all is well."""
    target.device.wait_broken(rule)
    if master is not None:
        with suppress(ConnectionLost):
            master.wait_closed()
    if target.slave.needs_reset is not None:
        assert target.slave.needs_reset
    target.slave.reset()
    target.slave.start().up()
    target.device.works(target.device.connect())


@pytest.mark.parametrize("size", [0, 1, 11])
def test_less_than_a_header_in_txq(target: Target, size: int) -> None:
    master = target.master()
    slave = target.slave
    if size:
        slave.transmit(bytes(size), wait=False)
    else:
        # no readable part at all
        slave.give(1, [Buffer(slave.buffer(64), 64, writable=True)])
    broken(target, master, "message.size")


def test_a_huge_message_in_txq(target: Target) -> None:
    master = target.master()
    slave = target.slave
    address = slave.buffer(1 << 20)
    slave.give(1, [Buffer(address, 1 << 20)] * 8)
    broken(target, master, "message.size")


def test_an_rxq_buffer_without_room(target: Target) -> None:
    slave = target.slave
    slave.reset()
    slave.start(rx=0).up()
    slave.give(0, [Buffer(slave.buffer(64), 64)])
    master = target.device.connect()
    master.send(R.GET_FEATURES)
    broken(target, master, "rxq.size")


def test_buffers_outside_of_memory(target: Target) -> None:
    master = target.master()
    slave = target.slave
    slave.give(1, [Buffer((1 << 63) - PAGE, PAGE)])
    wait_until(lambda: target.device.broken_rule is not None, what="a rule")
    rule = target.device.broken_rule
    assert rule is not None
    broken(target, master, rule)


def test_answers_nobody_asked_for_are_dropped(rig: Rig, target: Target, beside: Beside) -> None:
    slave = target.slave
    master = target.master()
    before = resident(rig)
    for number in range(300):
        slave.reply(1 + number % 50, bytes(4096 if number % 2 else 8))
    assert master.is_open()
    exchange(master, slave, R.GET_FEATURES, b"", 7)
    slave.reply(R.GET_FEATURES, 8)
    exchange(master, slave, R.GET_QUEUE_NUM, b"", 4)
    beside.check()
    assert target.device.query()["messages"]["discarded"] >= 300
    assert resident(rig) - before < 4 << 20


def test_an_answer_to_something_else_is_dropped(target: Target) -> None:
    slave = target.slave
    master = target.master()
    master.send(R.GET_FEATURES)
    slave.receive()
    slave.reply(R.GET_QUEUE_NUM, 3)
    slave.reply(R.GET_FEATURES, 5)
    slave.reply(R.GET_FEATURES, 6)
    answer = master.receive()
    assert (answer.request, answer.u64()) == (R.GET_FEATURES, 5)
    exchange(master, slave, R.GET_QUEUE_NUM, b"", 4)


@pytest.mark.parametrize("size", [0, 4, 7, 9, 16])
def test_protocol_features_of_another_size(target: Target, size: int) -> None:
    """Those that pass descriptors couldn't be taken out of it."""
    slave = target.slave
    master = target.master()
    master.send(R.GET_PROTOCOL_FEATURES)
    slave.receive()
    slave.send(R.GET_PROTOCOL_FEATURES, b"\xff" * size, flags=VERSION | REPLY, wait=False)
    broken(target, master, "message.size")


def test_a_flood_of_requests_of_the_slave(rig: Rig, target: Target, beside: Beside) -> None:
    """Nobody reads them: the master loses its channel, and nothing else. Answers don't wait behind them."""
    slave = target.slave
    master = with_channel(target)
    before = resident(rig)
    for _ in range(1000):
        slave.send(2, bytes(4000))
    beside.check()
    assert slave.status == 3
    assert resident(rig) - before < 8 << 20
    exchange(master, slave, R.GET_FEATURES, b"", 1)


def test_a_flood_of_requests_before_there_is_a_channel(rig: Rig, target: Target) -> None:
    slave = target.slave
    master = target.master()
    before = resident(rig)
    for _ in range(300):
        slave.send(2, bytes(4000))
    assert resident(rig) - before < 4 << 20
    exchange(master, slave, R.GET_FEATURES, b"", 1)


def test_status_up_and_down_without_end(target: Target, beside: Beside) -> None:
    slave = target.slave
    for number in range(200):
        slave.status = number % 2
        if number % 20 == 1:
            target.device.master().close()
    beside.check()
    slave.status = SLAVE_UP
    master = target.device.master()
    master.send(1000)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        # masters of before may come in between, and go
        if slave.status == 0:
            slave.status = SLAVE_UP
        with suppress(TimeoutError):
            if slave.receive(0.1).request == 1000:
                return
    raise TimeoutError("the last master's turn never came")


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 3), (2, 4), (3, 2), (20, 4), (23, 1)])
def test_odd_writes_to_the_configuration(target: Target, offset: int, size: int) -> None:
    slave = target.slave
    whole = slave.config()
    data = whole[offset : offset + size]
    slave.write_config(offset, data)
    assert slave.config() == whole
    assert slave.status & SLAVE_UP


def test_bad_indices_in_doorbells(pci_target: Target, beside: Beside) -> None:
    """Behind QEMU there is an eventfd for each index, and none for others."""
    target, slave = pci_target, pci_target.slave
    assert isinstance(slave, PciSlave)
    master = target.master()
    call = master.vring_fd(R.SET_VRING_CALL, 0)
    slave.receive()
    bar, at = slave.device.notify_address(slave.device.select(2))
    for value in (11, 12, 255, 256, 0x7FFF, 0x8002, 0xFFFF):
        slave.function.write(bar, at, 2, value)
    for value in (2, 0x1_0002, 0xFFFF_0002):
        slave.function.write(bar, at, 4, value)
    signals(call, 0.1)
    exchange(master, slave, R.GET_FEATURES, b"", 1)
    slave.call()
    assert signals(call)
    beside.check()


# --- QEMU itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(HEADER.pack(9, VERSION | REPLY, 8) + bytes(8), id="an answer to no map"),
        pytest.param(HEADER.pack(9, VERSION, 0), id="a request"),
        pytest.param(HEADER.pack(9, VERSION | REPLY, 1 << 30), id="huge"),
        pytest.param(HEADER.pack(77, VERSION | REPLY, 8) + bytes(8), id="unknown"),
    ],
)
def test_nonsense_on_the_carriers_back_end_channel(qemu_target: Target, data: bytes) -> None:
    slave, device = qemu_target.slave, qemu_target.device
    assert isinstance(slave, QemuSlave)
    master = qemu_target.master()
    exchange(master, slave, R.GET_FEATURES, b"", 1)
    slave.send_back_raw(data)
    slave.connection.wait_closed()
    master.wait_closed()
    assert device.rig.group.alive()
    device.boot()
    device.works(device.connect())
