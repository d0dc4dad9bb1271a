# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Administration commands that are wrong, in their bytes and in their descriptors, through the owner's PCI function.

Whatever comes: a completion that says so, or a device that says that it needs a reset. Never silence, since a missing
completion hangs a Linux guest for ever; never a changed member; never another queue or member that suffers.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import GroupFactory, RunningGroup
from vhu_legacy.admin import Command, Opcode, Qualifier, Status, opcode_list
from vhu_legacy.conformance import VfioTarget
from vhu_legacy.conformance.bench import SELF, SR_IOV, Bench
from vhu_legacy.virtio_driver import (
    AdminQueue,
    Buffer,
    Common,
    Completion,
    Feature,
    Framing,
    GuestMemory,
    Legacy,
    SplitRing,
    mask,
)
from vhu_legacy.virtio_driver import Status as DeviceStatus

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4

CONFIG: Final = """
    [group]
    name = "bad-input"

    [owner]
    type = "blk"
    image = "ram:1MiB"
    admin_queues = 2
    vfio_user = true

    [[members]]
    count = 2
    type = "blk"
    image = "ram:1MiB"
    vfio_user = true
"""


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    return start_module_group(CONFIG)


class Owner:
    """The owner with its driver, and a member to look after."""

    def __init__(self, directory: Path) -> None:
        self.target = VfioTarget(directory / "run" / "owner.vfio-user.sock")
        self.target.restore()
        self.bench = Bench(self.target)
        self.bench.use_all()
        # Something to lose.
        self.bench.registers.write(Legacy.STATUS, 1, 3)
        self.bench.registers.write(Legacy.DRIVER_FEATURES, 4, self.bench.features & mask(Feature.INDIRECT_DESC))
        self.before = {number: self.bench.snapshot(number) for number in (1, 2)}

    @property
    def queue(self) -> AdminQueue:
        assert self.target.driver is not None
        return self.target.driver.queues[0]

    @property
    def ring(self) -> SplitRing:
        ring = self.queue.queue.ring
        assert isinstance(ring, SplitRing)
        return ring

    @property
    def memory(self) -> GuestMemory:
        return self.queue.queue.memory

    @property
    def status(self) -> int:
        assert self.target.driver is not None
        return self.target.driver.device.status

    def buffer(self, data: bytes) -> Buffer:
        address = self.memory.allocate(max(len(data), 1))
        self.memory.write(address, data)
        return Buffer(address, len(data))

    def room(self, size: int) -> Buffer:
        return Buffer(self.memory.allocate(max(size, 1)), size, writable=True)

    def settled(self) -> bool:
        """Wait until the device has given a chain back (True) or asks for a reset. AssertionError for silence."""
        deadline = time.monotonic() + 3
        ring = self.ring
        before = ring.used_idx
        while time.monotonic() < deadline:
            if ring.device_idx != before:
                self.queue.queue.poll()
                return True
            if self.status & DeviceStatus.NEEDS_RESET:
                return False
            time.sleep(0.001)
        raise AssertionError("neither a completion nor DEVICE_NEEDS_RESET")

    def well(self) -> None:
        """The queue goes on, after a reset if the device asks for one; the other queue and the members are well."""
        if self.status & DeviceStatus.NEEDS_RESET:
            self.target.reset_owner()
        self.bench = Bench(self.target)
        self.bench.use_all()
        for number in (1, 2):
            assert self.bench.snapshot(number) == self.before[number]
        command = Command(Opcode.LIST_QUERY, SELF).pack()
        for done in self.target.raw_many([(command, 16)] * 4, queues=range(2)):
            assert (done.status, done.qualifier) == (0, 0)


@pytest.fixture
def owner(group: RunningGroup) -> Iterator[Owner]:
    owner = Owner(group.directory)
    yield owner
    owner.target.close()
    assert group.alive()


# --- bytes ----------------------------------------------------------------------------------------------------------


def known(done: Completion) -> None:
    if done.used >= 4:
        assert done.status in set(Status)
        assert done.qualifier in set(Qualifier)


def test_noise(owner: Owner) -> None:
    """Parts of any length full of noise, any framing."""
    noise = random.Random(3)
    for _ in range(300):
        readable = noise.randbytes(noise.randrange(1, 200))
        writable = noise.randrange(0, 200)
        framing = Framing(
            tuple(noise.randrange(1, 40) for _ in range(noise.randrange(4))),
            tuple(noise.randrange(1, 40) for _ in range(noise.randrange(4))),
            indirect=noise.random() < 0.3,
        )
        done = owner.target.raw(readable, writable, framing=framing)
        assert done.used <= writable
        known(done)
    owner.well()


def test_noise_behind_a_right_header(owner: Owner) -> None:
    """Every opcode, with data that makes no sense, and a member that isn't there."""
    noise = random.Random(4)
    for opcode in [*range(0x14), 0x3E, 0x3F, 0x40, 0x7FFF, 0x8000, 0xFFFF]:
        for group in (SELF, SR_IOV, 2, 0xFFFF):
            for member in (0, 3, 0xFFFF, 1 << 63):
                if opcode == Opcode.LIST_USE:
                    continue  # Noise may be a list.
                readable = Command(opcode, group, member, noise.randbytes(noise.randrange(64))).pack()
                done = owner.target.raw(readable, noise.randrange(8, 80))
                known(done)
                assert done.status == 0 or done.qualifier != 0
                if group not in (SELF, SR_IOV):
                    assert (done.status, done.qualifier) == (Status.EINVAL, Qualifier.INVALID_GROUP)
    owner.well()


@pytest.mark.parametrize("opcode", [0x12, 0x13, 0x3D, 0x40, 0x1000, 0x7FFF])
def test_unknown_opcodes(owner: Owner, opcode: int) -> None:
    for group, member in ((SELF, 0), (SR_IOV, 1)):
        done = owner.bench.admin(opcode, group, member, b"\0" * 16, 16)
        assert (done.status, done.qualifier) == (Status.EINVAL, Qualifier.INVALID_OPCODE)
    owner.well()


@pytest.mark.parametrize("member", [0, 3, 0x10001, 0x1_0000_0001, (1 << 64) - 1])
@pytest.mark.parametrize("opcode", [2, 3, 4, 5, 6, 0xA, 0xB, 0xC, 0xD, 0xE, 0xF, 0x10, 0x11])
def test_unknown_members(owner: Owner, opcode: int, member: int) -> None:
    done = owner.bench.admin(opcode, SR_IOV, member, b"\x12" + bytes(40), 1)
    assert (done.status, done.qualifier) == (Status.EINVAL, Qualifier.INVALID_MEMBER)
    owner.well()


@pytest.mark.parametrize(
    "listed",
    [
        opcode_list([0, 1, 0x12]),
        opcode_list([63]),
        opcode_list([64]),
        opcode_list([0, 1, 1000]),
        b"\xff" * 8,
        b"\xff" * 4096,
        b"\x03" + bytes(4094) + b"\x01",
        b"\x03" + bytes(7) + b"\x01",
    ],
    ids=lambda listed: f"{listed[:9].hex()}-{len(listed)}",
)
def test_lists_of_what_is_not_supported(owner: Owner, listed: bytes) -> None:
    for group in (SELF, SR_IOV):
        done = owner.bench.admin(Opcode.LIST_USE, group, data=listed)
        assert (done.status, done.qualifier) == (Status.EINVAL, Qualifier.INVALID_FIELD)
    # What was legal before still is.
    assert owner.bench.common_read(18, 1).status == 0
    assert owner.bench.admin(Opcode.CAP_ID_LIST_QUERY, SELF, size=8).status == 0
    owner.well()


FIELDS: Final = {0: 4, 4: 4, 8: 4, 12: 2, 14: 2, 16: 2, 18: 1, 19: 1}


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (offset, length)
        for offset in (0, 1, 3, 8, 10, 17, 18, 19, 20, 23, 24, 127, 255)
        for length in (0, 1, 2, 3, 5, 8, 9, 24, 64, 255, 4096)
        if not length or not any(at <= offset and offset + length <= at + width for at, width in FIELDS.items())
    ],
)
def test_legacy_accesses_out_of_field(owner: Owner, offset: int, length: int) -> None:
    for done in (owner.bench.common_read(offset, length), owner.bench.common_write(offset, bytes(length))):
        assert (done.status, done.qualifier) == (Status.EINVAL, Qualifier.INVALID_FIELD)
    owner.well()


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, 9), (4, 8), (7, 2), (200, 1), (255, 1), (255, 8), (0, 255), (0, 65535)]
)
def test_device_configuration_out_of_field(owner: Owner, offset: int, length: int) -> None:
    for done in (owner.bench.config_read(offset, length), owner.bench.config_write(offset, bytes(length))):
        assert (done.status, done.qualifier) == (Status.EINVAL, Qualifier.INVALID_FIELD)
    owner.well()


@pytest.mark.parametrize("length", range(24))
def test_a_command_cut_short(owner: Owner, length: int) -> None:
    """What is missing reads as zeroes: a harmless command, or an error, by the part that is there."""
    whole = Command(Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, 1, b"\x12" + bytes(8)).pack()
    done = owner.target.raw(whole[:length], 16) if length else None
    if done is not None:
        wanted: tuple[int, int]
        if length < 3:
            wanted = (Status.EINVAL, Qualifier.INVALID_OPCODE)
        elif length < 17:
            wanted = (Status.EINVAL, Qualifier.INVALID_MEMBER)
        else:
            wanted = (Status.EINVAL, Qualifier.INVALID_FIELD)
        assert (done.status, done.qualifier) == wanted
    owner.well()


def test_parts_that_make_no_sense(owner: Owner) -> None:
    """Device parts: counts, lengths and types of noise."""
    bench = owner.bench
    bench.prepare_objects()
    bench.created(0, 1)
    bench.stopped()
    noise = random.Random(5)
    cases = [
        b"",
        bytes(16),
        b"\xff" * 16,
        struct.pack("<HBx8sI", 0x101, 0, bytes(8), 0xFFFF_FFFF),
        struct.pack("<HBx8sI", 0x104, 0, b"\xff" * 8, 32) + b"\xff" * 32,
        struct.pack("<HBx8sI", 0x103, 0, bytes(8), 1) + b"\xff",
        struct.pack("<HBx8sI", 0x102, 0, struct.pack("<II", 3, 0), 4) + bytes(4),
        *(noise.randbytes(noise.randrange(1, 300)) for _ in range(60)),
    ]
    for case in cases:
        known(bench.set_parts(0, case))
    bench.resumed()
    bench.destroy(0)
    assert bench.cap_set(0, 0).status == 0
    # The empty list is right, and changes nothing.
    for number in (1, 2):
        assert bench.snapshot(number)["device features"] == owner.before[number]["device features"]
    owner.target.settle()


# --- descriptors ----------------------------------------------------------------------------------------------------


QUERY: Final = Command(Opcode.LIST_QUERY, SELF).pack()
RESET_MEMBER: Final = Command(Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, 1, b"\x12" + bytes(8)).pack()


def test_nothing_to_write_to(owner: Owner) -> None:
    """A chain without a writable part: given back, nothing written."""
    owner.queue.queue.add([owner.buffer(QUERY)])
    owner.queue.queue.kick(always=True)
    assert owner.settled()
    owner.well()


def test_nothing_to_read(owner: Owner) -> None:
    """All zeroes is a LIST_QUERY of the self group."""
    done = owner.target.raw(b"", 16)
    assert (done.status, done.qualifier) == (0, 0)
    owner.well()


def test_descriptors_of_no_length(owner: Owner) -> None:
    for framing in (Framing((0, 24), (16,)), Framing((24, 0), (16,)), Framing((24,), (0, 16)), Framing((24,), (16, 0))):
        pending = owner.queue.start(QUERY, 16, framing)
        if owner.settled():
            assert owner.queue.finish(pending).status == 0
        owner.well()
    owner.queue.queue.add([owner.buffer(b"")])
    owner.queue.queue.kick(always=True)
    owner.settled()
    owner.well()


def test_the_writable_part_first(owner: Owner) -> None:
    owner.queue.queue.add([owner.room(16), owner.buffer(RESET_MEMBER)])
    owner.queue.queue.kick(always=True)
    owner.settled()
    owner.well()


def test_parts_that_alternate(owner: Owner) -> None:
    chain = [owner.buffer(RESET_MEMBER[:12]), owner.room(8), owner.buffer(RESET_MEMBER[12:]), owner.room(8)]
    owner.queue.queue.add(chain)
    owner.queue.queue.kick(always=True)
    owner.settled()
    owner.well()


def test_very_long_parts(owner: Owner) -> None:
    """Megabytes, in one descriptor and in many; what is ignored costs no time."""
    memory = owner.memory
    with memory.borrowed():
        base = memory.allocate(1 << 20, 4096)
        memory.write(base, QUERY.ljust(1 << 20, b"\xff"))
        room = owner.room(16)
        for pieces in (1, 40):
            size = (1 << 20) // pieces
            chain = [Buffer(base + i * size, size) for i in range(pieces)]
            started = time.monotonic()
            owner.queue.queue.add([*chain, room])
            owner.queue.queue.kick(always=True)
            if owner.settled():
                assert memory.read(room.address, 4) == bytes(4)
            assert time.monotonic() - started < 1
            # Sizes whose sum doesn't fit into 32 bits: the same memory, again and again.
            owner.well()
        chain = [Buffer(memory.base, 4 << 20)] * 50
        owner.queue.queue.add([*chain, owner.room(16)])
        owner.queue.queue.kick(always=True)
        owner.settled()
    owner.well()


Write = Callable[[Owner, int], None]


def _descriptor(address: int, size: int, flags: int, following: int = 0) -> Write:
    return lambda owner, head: owner.ring.write_descriptor(head, address, size, flags, following)


def _loop(owner: Owner, head: int) -> None:
    part = owner.buffer(RESET_MEMBER)
    owner.ring.write_descriptor(head, part.address, part.size, NEXT, head)


def _loop_of_two(owner: Owner, head: int) -> None:
    part, room = owner.buffer(RESET_MEMBER), owner.room(8)
    owner.ring.write_descriptor(head, part.address, part.size, NEXT, head + 1)
    owner.ring.write_descriptor(head + 1, room.address, room.size, NEXT | WRITE, head + 1)


def _beyond_the_ring(owner: Owner, head: int) -> None:
    part = owner.buffer(RESET_MEMBER)
    owner.ring.write_descriptor(head, part.address, part.size, NEXT, owner.ring.size)


def _far_beyond_the_ring(owner: Owner, head: int) -> None:
    part = owner.buffer(RESET_MEMBER)
    owner.ring.write_descriptor(head, part.address, part.size, NEXT, 0xFFFF)


def _table(
    *entries: tuple[int, int], size: int | None = None, address: int | None = None, flags: int = INDIRECT
) -> Write:
    """An indirect table; each entry: flags, next. Readable ones hold a command, writable ones have room."""

    def write(owner: Owner, head: int) -> None:
        at = owner.memory.allocate(max(16 * len(entries), 16), 16)
        for i, (entry_flags, following) in enumerate(entries):
            one = owner.room(16) if entry_flags & WRITE else owner.buffer(RESET_MEMBER)
            owner.memory.write(at + 16 * i, struct.pack("<QIHH", one.address, one.size, entry_flags, following))
        owner.ring.write_descriptor(
            head, at if address is None else address, 16 * len(entries) if size is None else size, flags
        )

    return write


def _indirect_then_more(owner: Owner, head: int) -> None:
    _table((0, 0))(owner, head)
    room = owner.room(16)
    at, size = struct.unpack("<QI", owner.memory.read(owner.ring.desc + 16 * head, 12))
    owner.ring.write_descriptor(head, at, size, INDIRECT | NEXT, head + 1)
    owner.ring.write_descriptor(head + 1, room.address, room.size, WRITE)


def _room_unmapped(owner: Owner, head: int) -> None:
    part = owner.buffer(RESET_MEMBER)
    owner.ring.write_descriptor(head, part.address, part.size, NEXT, head + 1)
    owner.ring.write_descriptor(head + 1, 0x10_0000_0000, 16, WRITE)


def _room_behind_the_end(owner: Owner, head: int) -> None:
    part = owner.buffer(RESET_MEMBER)
    owner.ring.write_descriptor(head, part.address, part.size, NEXT, head + 1)
    owner.ring.write_descriptor(head + 1, owner.memory.base + owner.memory.size - 4, 16, WRITE)


END: Final = 0x4000_0000 + (8 << 20)

BROKEN: Final[dict[str, Write]] = {
    "loop of one": _loop,
    "loop of two": _loop_of_two,
    "next is the ring's size": _beyond_the_ring,
    "next is 0xffff": _far_beyond_the_ring,
    "read from nowhere": _descriptor(0x10_0000_0000, 33, 0),
    "read at 0": _descriptor(0, 33, 0),
    "read over the end": _descriptor(END - 10, 33, 0),
    "read over the end of all addresses": _descriptor((1 << 64) - 16, 33, 0),
    "read of 4 GiB": _descriptor(0x4000_0000, 0xFFFF_FFFF, 0),
    "write to nowhere": _descriptor(0x10_0000_0000, 16, WRITE),
    "status in nowhere": _room_unmapped,
    "status over the end": _room_behind_the_end,
    "empty table": _table(size=0),
    "table of 8 bytes": _table((0, 0), size=8),
    "table of 17 bytes": _table((0, 0), size=17),
    "table of 4 GiB": _table((0, 0), size=0xFFFF_FFF0),
    "table nowhere": _table(size=32, address=0x10_0000_0000),
    "table over the end": _table(size=64, address=END - 32),
    "table in a table": _table((INDIRECT, 0)),
    "table with a loop": _table((NEXT, 1), (NEXT, 0)),
    "table with next beyond it": _table((NEXT, 2), (WRITE, 0)),
    "table with next 0xffff": _table((NEXT, 0xFFFF)),
    "table and more behind": _indirect_then_more,
    "flags that nobody knows": _descriptor(0x4000_0000, 24, 0xFFF8),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_chains(owner: Owner, case: str) -> None:
    """Looping, unmapped, misframed: said by a completion or by DEVICE_NEEDS_RESET, and nobody's harm."""
    # Well-formed commands before and after it in the same batch: the first is done in any case.
    room = owner.room(16)
    first = owner.queue.queue.add([owner.buffer(QUERY), room])
    head, _ = owner.ring.take_heads(2)
    BROKEN[case](owner, head)
    owner.ring.put_available(head)
    owner.queue.queue.add([owner.buffer(QUERY), owner.room(16)])
    owner.queue.queue.kick(always=True)
    assert owner.queue.queue.wait(first, 3) in (0, 16)
    if not owner.queue.queue.is_done(head):
        deadline = time.monotonic() + 3
        while not owner.queue.queue.is_done(head) and not owner.status & DeviceStatus.NEEDS_RESET:
            assert time.monotonic() < deadline, "neither a completion nor DEVICE_NEEDS_RESET"
            time.sleep(0.001)
    owner.well()


@pytest.mark.parametrize("head", [256, 1000, 0xFFFF])
def test_heads_that_are_not_there(owner: Owner, head: int) -> None:
    owner.ring.put_available(head)
    owner.ring.publish()
    owner.queue.queue.notify()
    deadline = time.monotonic() + 3
    while not owner.status & DeviceStatus.NEEDS_RESET:
        assert time.monotonic() < deadline, "no DEVICE_NEEDS_RESET"
        time.sleep(0.001)
    owner.well()


def test_an_index_that_jumps(owner: Owner) -> None:
    """More chains made available than a ring has room for."""
    owner.memory.set_u16(owner.ring.driver + 2, 0x7000)
    owner.queue.queue.notify()
    deadline = time.monotonic() + 3
    while not owner.status & DeviceStatus.NEEDS_RESET:
        assert time.monotonic() < deadline, "no DEVICE_NEEDS_RESET"
        time.sleep(0.001)
    owner.well()


@pytest.mark.parametrize(
    "area", [Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE], ids=lambda area: area.name
)
@pytest.mark.parametrize("address", [0, 0x10_0000_0000, END - 16, (1 << 64) - 16], ids=hex)
def test_rings_that_are_nowhere(owner: Owner, area: Common, address: int) -> None:
    """An administration queue whose ring isn't in memory."""
    driver = owner.target.driver
    assert driver is not None
    device = driver.device
    device.reset()
    device.negotiate()
    index = device.admin_queues.start
    ring = SplitRing(driver.memory, 16)
    device.select(index)
    device.write(Common.QUEUE_SIZE, 2, 16)
    for register, value in (
        (Common.QUEUE_DESC, ring.desc),
        (Common.QUEUE_DRIVER, ring.driver),
        (Common.QUEUE_DEVICE, ring.device),
    ):
        where = address if register == area else value
        device.write(register, 4, where & 0xFFFFFFFF)
        device.write(register + 4, 4, where >> 32)
    device.write(Common.QUEUE_ENABLE, 2, 1)
    device.driver_ok()
    bar, at = device.notify_address(device.select(index))
    driver.function.write(bar, at, 2, index)
    # It may say so, or do nothing: there is nowhere to put a completion.
    assert device.status & DeviceStatus.DRIVER_OK or device.status & DeviceStatus.NEEDS_RESET
    owner.target.reset_owner()
    owner.well()


def test_a_full_ring(owner: Owner) -> None:
    """As many commands as there is room for, all at once, several times."""
    owner.memory.clear()
    owner.target.reset_owner()
    for _ in range(3):
        count = owner.ring.size // 2
        done = owner.target.raw_many([(QUERY, 16)] * count, framing=Framing())
        assert all(one.status == 0 and one.used == 16 for one in done)
    owner.well()


def test_a_reset_with_commands_in_flight(owner: Owner) -> None:
    for _ in range(20):
        for _ in range(10):
            owner.queue.start(QUERY, 16, kick=False)
        owner.queue.queue.kick(always=True)
        owner.target.reset_owner()
    owner.well()


def test_memory_taken_away(owner: Owner, group: RunningGroup) -> None:
    """The guest's memory goes while the queue is in use: the queue ends or waits, the process goes on."""
    driver = owner.target.driver
    assert driver is not None
    owner.queue.start(QUERY, 16)
    driver.memory.detach(driver.function.client)
    owner.queue.queue.notify()
    driver.function.config_read(0, 4)
    assert group.alive()
    driver.memory.attach(driver.function.client)
    owner.target.reset_owner()
    owner.well()
