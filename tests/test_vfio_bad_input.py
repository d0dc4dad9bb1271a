# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vfio-user clients that are wrong, rude, dead or many. Each gets an error or is hung up on; the process, and the other
functions of it, are well all the time.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import GroupFactory, RunningGroup
from vhu_legacy.vfio_client import (
    CommandCode,
    Disconnected,
    IrqFlag,
    IrqIndex,
    MessageFlag,
    ProtocolViolation,
    Refused,
    RegionIndex,
    VfioClient,
    VfioError,
)
from vhu_legacy.virtio_driver import (
    PAGE,
    BarRegisters,
    BlkDriver,
    BlkType,
    GuestMemory,
    LegacyDevice,
    ModernDevice,
    PciFunction,
)

CONFIG: Final = """
    [group]
    name = "vfio-bad-input"

    [owner]
    type = "blk"
    image = "ram:1MiB"
    vfio_user = true

    [[members]]
    count = {members}
    type = "blk"
    image = "ram:1MiB"
    vfio_user = true
"""

VICTIM: Final = 1
BYSTANDER: Final = 2


def path_of(group: RunningGroup, member: int, kind: str = "transitional") -> Path:
    return group.directory / "run" / f"member-{member}.{kind}.vfio-user.sock"


class Bystander:
    """Another member's guest, whose disk has to work whatever happens to the others."""

    def __init__(self, group: RunningGroup) -> None:
        self.group = group
        self.function = PciFunction(VfioClient(path_of(group, BYSTANDER)))
        self.function.place_bars()
        self.function.enable()
        self.memory = GuestMemory()
        self.memory.attach(self.function.client)
        device = ModernDevice(self.function)
        device.negotiate()
        self.function.enable_msix(2)
        self.blk = BlkDriver(device.setup_queue(0, self.memory, vector=1))
        device.driver_ok()
        self.seed = 0

    def well(self) -> None:
        """A checked round trip to its disk, within a second."""
        assert self.group.alive()
        self.seed += 1
        started = time.monotonic()
        self.blk.check(seed=self.seed)
        assert time.monotonic() - started < 1

    def close(self) -> None:
        self.function.close()
        self.memory.close()


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    return start_module_group(CONFIG.format(members=3))


@pytest.fixture(scope="module")
def bystander(group: RunningGroup) -> Iterator[Bystander]:
    bystander = Bystander(group)
    yield bystander
    bystander.close()


def connect(path: Path, *, negotiate: bool = True, timeout: float = 3.0) -> VfioClient:
    """A client, once the one before it has been let go of: its rings may take a moment."""
    deadline = time.monotonic() + 5
    while True:
        try:
            client = VfioClient(path, negotiate=negotiate, timeout=timeout)
        except Disconnected:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if negotiate:
            return client
        # Whether it is hung up on shows a moment later.
        time.sleep(0.02)
        try:
            client.pump()
        except Disconnected:
            client.close()
            if time.monotonic() > deadline:
                raise
            continue
        return client


@pytest.fixture
def victim(group: RunningGroup, bystander: Bystander) -> Iterator[VfioClient]:
    """A client that has agreed on the version; the bystander is asked before and after."""
    bystander.well()
    client = connect(path_of(group, VICTIM))
    yield client
    client.close()
    bystander.well()
    # And the victim's function serves the next one.
    with connect(path_of(group, VICTIM)) as after:
        assert after.region_read(RegionIndex.CONFIG, 0, 2) == b"\xf4\x1a"


@pytest.fixture
def stranger(group: RunningGroup, bystander: Bystander) -> Iterator[VfioClient]:
    """A client that has said nothing yet."""
    client = connect(path_of(group, VICTIM), negotiate=False)
    yield client
    client.close()
    bystander.well()


def alive(client: VfioClient) -> None:
    """The connection goes on as if nothing had been."""
    assert client.region_read(RegionIndex.CONFIG, 0, 2) == b"\xf4\x1a"


def refused_or_closed(client: VfioClient, number: int, command: int) -> None:
    """An error, and the connection goes on; or its end. Nothing else, and not later than in a second."""
    try:
        reply = client.reply_to(number, command, 1)
    except Disconnected:
        return
    assert reply.failed, reply
    alive(client)


# --- version --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\0\0\0",
        b"\1\0\0\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0{}",
        b"\0\0\0\0{\0",
        b"\0\0\0\0\0\0\0",
        b"\0\0\0\0[]\0",
        b"\0\0\0\0null\0",
        b'\0\0\0\0{"capabilities":7}\0',
        b'\0\0\0\0{"capabilities":{"max_msg_fds":-1}}\0',
        b'\0\0\0\0{"capabilities":{"max_msg_fds":"many"}}\0',
        b'\0\0\0\0{"capabilities":{"max_data_xfer_size":1e400}}\0',
        b'\0\0\0\0{"capabilities":{"max_data_xfer_size":0}}\0',
        b'\0\0\0\0{"capabilities":{"pgsizes":1}}\0',
        b"\0\0\0\0" + b"[" * 20000 + b"\0",
        b'\0\0\0\0{"capabilities":{"\xff\xfe":1}}\0',
        b"\0\0\0\0" + b"x" * 65000 + b"\0",
    ],
    ids=lambda payload: f"{payload[:48]!r}-{len(payload)}",
)
def test_bad_versions(stranger: VfioClient, payload: bytes) -> None:
    """An error, the end, or an agreement that a client can live with."""
    number = stranger.send(CommandCode.VERSION, payload)
    try:
        reply = stranger.reply_to(number, CommandCode.VERSION, 1)
    except Disconnected:
        return
    if not reply.failed:
        assert reply.payload[:4] == bytes(4)
        alive(stranger)


@pytest.mark.parametrize("command", [*range(2, 20), 0, 0xFFFF])
def test_commands_before_the_version(stranger: VfioClient, command: int) -> None:
    number = stranger.send(command, bytes(32))
    try:
        reply = stranger.reply_to(number, command, 1)
    except Disconnected:
        return
    assert reply.failed


def test_the_version_twice(victim: VfioClient) -> None:
    number = victim.send(CommandCode.VERSION, victim.version_payload({}))
    try:
        victim.reply_to(number, CommandCode.VERSION, 1)
    except Disconnected:
        return
    alive(victim)


# --- headers and sizes ----------------------------------------------------------------------------------------------

RIGHT: Final[dict[int, bytes]] = {
    CommandCode.DMA_MAP: VfioClient.dma_map_payload(0x10000, 0x1000),
    CommandCode.DMA_UNMAP: VfioClient.dma_unmap_payload(0x10000, 0x1000),
    CommandCode.DEVICE_GET_INFO: struct.pack("<IIII", 16, 0, 0, 0),
    CommandCode.DEVICE_GET_REGION_INFO: struct.pack("<IIIIQQ", 32, 0, 7, 0, 0, 0),
    CommandCode.DEVICE_GET_IRQ_INFO: struct.pack("<IIII", 16, 0, 2, 0),
    CommandCode.DEVICE_SET_IRQS: VfioClient.irqs_payload(IrqFlag.DATA_NONE | IrqFlag.TRIGGER, 2, 0, 0),
    CommandCode.REGION_READ: VfioClient.access_payload(7, 0, 4),
    CommandCode.REGION_WRITE: VfioClient.access_payload(7, 0x3C, 1, b"\5"),
    CommandCode.REGION_WRITE_MULTI: VfioClient.write_multi_payload([(7, 0x3C, b"\5")]),
}


@pytest.mark.parametrize("command", RIGHT, ids=lambda command: CommandCode(command).name)
def test_payloads_cut_short(victim: VfioClient, group: RunningGroup, command: int) -> None:
    """Each length from nothing to one byte less than right."""
    client = victim
    for length in range(len(RIGHT[command])):
        number = client.send(command, RIGHT[command][:length])
        try:
            reply = client.reply_to(number, command, 1)
        except Disconnected:
            client.close()
            client = connect(path_of(group, VICTIM))
            continue
        assert reply.failed, f"{length} bytes: {reply}"
    alive(client)
    client.close()


@pytest.mark.parametrize("command", RIGHT, ids=lambda command: CommandCode(command).name)
@pytest.mark.parametrize("extra", [1, 100, 4096])
def test_payloads_too_long(victim: VfioClient, command: int, extra: int) -> None:
    """May be accepted or refused, but the stream stays in step."""
    number = victim.send(command, RIGHT[command] + b"\xff" * extra)
    try:
        victim.reply_to(number, command, 1).close_fds()
    except Disconnected:
        return
    alive(victim)


@pytest.mark.parametrize("size", [0, 1, 15, 1 << 25, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_sizes_that_cannot_be(victim: VfioClient, size: int) -> None:
    _, data = victim.encode(CommandCode.REGION_READ, RIGHT[CommandCode.REGION_READ], size=size)
    victim.send_raw(data)
    victim.wait_closed(2)


@pytest.mark.parametrize("command", [0, 6, 11, 12, 14, 16, 17, 18, 19, 100, 0xFFFF])
def test_commands_that_nobody_knows(victim: VfioClient, command: int) -> None:
    refused_or_closed(victim, victim.send(command, bytes(16)), command)


def test_an_unknown_command_that_wants_no_reply(victim: VfioClient) -> None:
    victim.send(100, bytes(16), flags=MessageFlag.NO_REPLY)
    with suppress(Disconnected):
        alive(victim)


@pytest.mark.parametrize("flags", [1, 2, 0xF, 0x21, 0x31, 0xFFFF_FFFF, 0x40])
def test_flags_that_make_no_command(victim: VfioClient, flags: int) -> None:
    """A reply that nobody waits for, or no known type: ignored or the end."""
    victim.send(CommandCode.DEVICE_GET_INFO, RIGHT[CommandCode.DEVICE_GET_INFO], flags=flags, message_id=0x7777)
    try:
        number = victim.send(CommandCode.DEVICE_GET_INFO, RIGHT[CommandCode.DEVICE_GET_INFO])
        victim.reply_to(number, CommandCode.DEVICE_GET_INFO, 1)
    except Disconnected:
        return
    alive(victim)


def test_noise(victim: VfioClient, group: RunningGroup) -> None:
    """Bytes that mean nothing, many times."""
    noise = random.Random(1)
    victim.close()
    for _ in range(40):
        with connect(path_of(group, VICTIM), timeout=1) as client, suppress(Disconnected, OSError):
            client.send_raw(noise.randbytes(noise.randrange(1, 3000)))
            client.pump()


def test_noise_in_payloads(victim: VfioClient, group: RunningGroup) -> None:
    """Right headers with payloads of noise, and fds now and then."""
    noise = random.Random(2)
    client = victim
    fd = os.open("/dev/null", os.O_RDWR)
    for _ in range(600):
        command = noise.choice([*range(2, 11), 13, 15, 16])
        right = RIGHT.get(command, b"")
        payload = bytearray(right if noise.random() < 0.7 else noise.randbytes(noise.randrange(64)))
        for _ in range(noise.randrange(4)):
            if payload:
                payload[noise.randrange(len(payload))] = noise.randrange(256)
        try:
            number = client.send(command, bytes(payload), [fd] * noise.choice([0, 0, 0, 1, 2]))
            client.reply_to(number, command, 1).close_fds()
        except (Disconnected, ProtocolViolation):
            client.close()
            client = connect(path_of(group, VICTIM))
    os.close(fd)
    client.close()


# --- file descriptors -----------------------------------------------------------------------------------------------


def wait_fds(group: RunningGroup, before: int) -> None:
    """Wait until the process has no more fds than before."""
    deadline = time.monotonic() + 5
    while group.open_fds() > before:
        assert time.monotonic() < deadline, f"{group.open_fds()} fds, {before} before"
        time.sleep(0.01)


@pytest.mark.parametrize("command", [*RIGHT, CommandCode.DEVICE_RESET, 100], ids=str)
@pytest.mark.parametrize("count", [1, 2, 16, 17, 100])
def test_fds_where_none_belong(victim: VfioClient, group: RunningGroup, command: int, count: int) -> None:
    """Closed whatever else is done."""
    before = group.open_fds()
    fd = os.memfd_create("stray")
    os.ftruncate(fd, 0x1000)
    if command == CommandCode.DMA_MAP and count == 1:
        count = 3  # One is right.
    with suppress(Disconnected, Refused):
        victim.send(command, RIGHT.get(command, b""), [fd] * count)
        victim.receive(1).close_fds()
        # DMA_UNMAP, if it was a map.
        if command == CommandCode.DMA_MAP:
            victim.dma_unmap(0x10000, 0x1000)
    os.close(fd)
    with suppress(VfioError):
        alive(victim)
    wait_fds(group, before)


def test_a_file_that_is_no_memory(victim: VfioClient, group: RunningGroup, tmp_path: Path) -> None:
    """DMA_MAP of what can't be mapped, or is shorter than it says: refused."""
    before = group.open_fds()
    short = os.memfd_create("short")
    os.ftruncate(short, PAGE)
    read, write = os.pipe()
    one, other = socket.socketpair()
    directory = os.open(tmp_path, os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDWR)
    event = os.eventfd(0)
    readonly_path = tmp_path / "read-only"
    readonly_path.write_bytes(bytes(PAGE))
    readonly = os.open(readonly_path, os.O_RDONLY)
    cases = [
        (short, 0, 2 * PAGE),
        (short, PAGE, PAGE),
        (short, 1 << 62, PAGE),
        (short, 0xFFFF_FFFF_FFFF_F000, PAGE),
        (short, 0, 1 << 62),
        (short, 0, 0xFFFF_FFFF_FFFF_F000),
        (read, 0, PAGE),
        (write, 0, PAGE),
        (one.fileno(), 0, PAGE),
        (directory, 0, PAGE),
        (null, 0, PAGE),
        (event, 0, PAGE),
        (readonly, 0, PAGE),
    ]
    for fd, offset, size in cases:
        with pytest.raises(Refused):
            victim.dma_map(0x10000, size, fd=fd, offset=offset)
        alive(victim)
    for fd in (short, read, write, directory, null, event, readonly):
        os.close(fd)
    one.close()
    other.close()
    wait_fds(group, before)


def test_memory_that_shrinks(victim: VfioClient, bystander: Bystander) -> None:
    """A mapped file that is cut short under a ring: no signal kills the process."""
    function = PciFunction(victim)
    function.place_bars()
    function.enable()
    memory = GuestMemory()
    memory.attach(victim)
    device = ModernDevice(function)
    device.negotiate()
    blk = BlkDriver(device.setup_queue(0, memory))
    device.driver_ok()
    blk.check()
    pending = [blk.start(BlkType.IN, 0, size=4096, kick=False) for _ in range(8)]
    assert pending
    blk.queue.ring.publish()
    notify = device.notify_address(device.select(0))
    with os.fdopen(os.dup(memory.fd), "r+b") as file:
        # Our own mapping would fault too: nothing here touches it from now on.
        os.ftruncate(file.fileno(), 0)
    function.write(notify[0], notify[1], 2, 0)
    bystander.well()
    os.ftruncate(memory.fd, memory.size)
    memory.close()


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page() -> Iterator[int]:
    fd = os.memfd_create("page")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (0x10000, 0),
        (0xFFFF_FFFF_FFFF_F000, 2 * PAGE),
        (0x10000, 0xFFFF_FFFF_FFFF_F000),
        (0xFFFF_FFFF_FFFF_FFFF, 1),
    ],
)
def test_maps_that_cannot_be(victim: VfioClient, page: int, iova: int, size: int) -> None:
    for fd in (page, None):
        with pytest.raises(Refused):
            victim.dma_map(iova, size, fd=fd)
    alive(victim)


@pytest.mark.parametrize("argsz", [0, 31, 0xFFFF_FFFF])
@pytest.mark.parametrize("flags", [0, 3, 0xFFFF_FFFF])
def test_maps_with_strange_words(victim: VfioClient, page: int, argsz: int, flags: int) -> None:
    payload = struct.pack("<IIQQQ", argsz, flags, 0, 0x10000, PAGE)
    number = victim.send(CommandCode.DMA_MAP, payload, [page])
    reply = victim.reply_to(number, CommandCode.DMA_MAP, 1)
    if not reply.failed:
        victim.dma_unmap(0x10000, PAGE)
    alive(victim)


@pytest.mark.parametrize(("iova", "size"), [(0x10000, 1), (0x10000, 2), (0x11000, 1), (0xF000, 2), (0xF000, 4)])
def test_maps_over_others(victim: VfioClient, page: int, iova: int, size: int) -> None:
    victim.dma_map(0x10000, 2 * PAGE, fd=page)
    for fd in (page, None):
        with pytest.raises(Refused) as caught:
            victim.dma_map(iova, size * PAGE, fd=fd)
        assert caught.value.errno == errno.EEXIST
    victim.dma_unmap(0x10000, 2 * PAGE)
    victim.dma_map(iova, size * PAGE, fd=page)


@pytest.mark.parametrize(
    ("iova", "size"),
    [(0x10000, 1), (0x11000, 1), (0xF000, 2), (0x20000, 1), (0, 0), (0x10000, 0), ((1 << 64) - PAGE, 2)],
)
def test_unmaps_of_what_is_not_there(victim: VfioClient, page: int, iova: int, size: int) -> None:
    victim.dma_map(0x10000, 2 * PAGE, fd=page)
    with pytest.raises(Refused):
        victim.dma_unmap(iova, size * PAGE)
    victim.dma_unmap(0x10000, 2 * PAGE)
    with pytest.raises(Refused):
        victim.dma_unmap(0x10000, 2 * PAGE)
    alive(victim)


def test_unmapping_several_at_once(victim: VfioClient, page: int) -> None:
    """As a client with an IOMMU does: whole ones, however many; half a one is refused and nothing has gone."""
    for number in range(4):
        victim.dma_map(0x10000 + 2 * PAGE * number, 2 * PAGE, fd=page)
    with pytest.raises(Refused):
        victim.dma_unmap(0x10000, 3 * PAGE)
    with pytest.raises(Refused) as caught:
        victim.dma_map(0x10000, PAGE, fd=page)
    assert caught.value.errno == errno.EEXIST
    victim.dma_unmap(0x10000, 4 * PAGE)
    victim.dma_map(0x10000, 4 * PAGE, fd=page)
    victim.dma_unmap(0x10000, 8 * PAGE)
    alive(victim)


def test_many_maps(victim: VfioClient, group: RunningGroup, page: int) -> None:
    """As a guest with holes everywhere has them; they go with the client."""
    before = group.open_fds()
    count = 0
    with suppress(Refused):
        for number in range(600):
            victim.dma_map(0x10_0000 + 2 * PAGE * number, PAGE, fd=page)
            count += 1
    assert count >= 64
    alive(victim)
    victim.close()
    wait_fds(group, before)


@pytest.mark.parametrize("shared", [True, False])
def test_unmapping_in_use(victim: VfioClient, shared: bool) -> None:
    """Memory taken away under a ring with requests in flight. Afterwards nothing of it is touched."""
    function = PciFunction(victim)
    function.place_bars()
    function.enable()
    memory = GuestMemory(shared=shared)
    memory.attach(victim)
    device = LegacyDevice(BarRegisters(function), function)
    for _ in range(3):
        device.negotiate()
        blk = BlkDriver(device.setup_queue(0, memory))
        device.driver_ok()
        blk.check()
        for _ in range(8):
            blk.start(BlkType.IN, 0, size=4096, kick=False)
        blk.queue.kick(always=True)
        memory.detach(victim)
        before = memory.read(memory.base, memory.size)
        device.registers.notify(0)
        time.sleep(0.05)
        victim.pump()
        assert memory.read(memory.base, memory.size) == before
        alive(victim)
        # With the memory back and a reset, all is well.
        memory.clear()
        memory.attach(victim)
        function.client.reset()
        function.place_bars()
        function.enable()
    memory.close()


def test_rings_in_memory_that_was_never_mapped(victim: VfioClient) -> None:
    function = PciFunction(victim)
    function.place_bars()
    function.enable()
    device = LegacyDevice(BarRegisters(function), function)
    device.negotiate()
    for pfn in (1, 0x40000, 0xFFFF_FFFF):
        device.registers.write(14, 2, 0)
        device.registers.write(8, 4, pfn)
        device.registers.notify(0)
        device.driver_ok()
        alive(victim)
        device.reset()


# --- regions and interrupts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (9, 0, 4),
        (100, 0, 4),
        (0xFFFF_FFFF, 0, 4),
        (5, 0, 4),
        (7, 4096, 1),
        (7, 4095, 2),
        (7, 0, 4097),
        (7, (1 << 64) - 1, 1),
        (7, (1 << 64) - 1, 0xFFFF_FFFF),
        (7, 0, 0xFFFF_FFFF),
        (0, 1 << 40, 4),
        (2, 0x3FFF, 2),
        (2, 0, (1 << 20) + 1),
    ],
)
def test_accesses_outside(victim: VfioClient, region: int, offset: int, count: int) -> None:
    number = victim.send(CommandCode.REGION_READ, victim.access_payload(region, offset, count))
    refused_or_closed(victim, number, CommandCode.REGION_READ)
    if count <= 1 << 20:
        with suppress(Disconnected):
            payload = victim.access_payload(region, offset, count, bytes(count))
            refused_or_closed(victim, victim.send(CommandCode.REGION_WRITE, payload), CommandCode.REGION_WRITE)


@pytest.mark.parametrize("region", [0, 2, 7])
def test_accesses_of_nothing(victim: VfioClient, region: int) -> None:
    for command in (CommandCode.REGION_READ, CommandCode.REGION_WRITE):
        number = victim.send(command, victim.access_payload(region, 0, 0))
        victim.reply_to(number, command, 1)
    alive(victim)


@pytest.mark.parametrize("region", [0, 2])
def test_accesses_of_every_width_and_place(victim: VfioClient, region: int) -> None:
    """Whatever a BAR makes of them, the reply is there and of the right size."""
    function = PciFunction(victim)
    function.place_bars()
    function.enable()
    size = function.bars[region].size
    noise = random.Random(region)
    for width in (1, 2, 3, 4, 5, 7, 8, 16, 64):
        for _ in range(60):
            offset = noise.randrange(0, size - width + 1)
            with suppress(Refused):
                assert len(victim.region_read(region, offset, width)) == width
            with suppress(Refused):
                victim.region_write(region, offset, noise.randbytes(width))
    alive(victim)


def test_the_data_is_not_as_long_as_it_says(victim: VfioClient, group: RunningGroup) -> None:
    client = victim
    for count, length in ((4, 3), (4, 5), (0xFFFF_FFFF, 4), (0, 4)):
        number = client.send(CommandCode.REGION_WRITE, client.access_payload(7, 0x3C, count, bytes(length)))
        try:
            reply = client.reply_to(number, CommandCode.REGION_WRITE, 1)
        except Disconnected:
            client.close()
            client = connect(path_of(group, VICTIM))
            continue
        assert reply.failed, (count, length)
    alive(client)
    client.close()


@pytest.mark.parametrize("count", [0, 2, 201, 1 << 20, (1 << 61) + 1, (1 << 64) - 1])
def test_several_writes_with_a_wrong_count(victim: VfioClient, count: int) -> None:
    payload = victim.write_multi_payload([(7, 0x3C, b"\5")], count)
    number = victim.send(CommandCode.REGION_WRITE_MULTI, payload)
    refused_or_closed(victim, number, CommandCode.REGION_WRITE_MULTI)


def test_several_writes_of_which_one_is_wrong(victim: VfioClient) -> None:
    """Refused, or done as far as it goes; posted ones without a word."""
    for entry in ((9, 0, b"\1"), (7, 4096, b"\1"), (0xFFFF_FFFF, (1 << 64) - 1, b"\1" * 8)):
        for flags in (0, MessageFlag.NO_REPLY):
            payload = victim.write_multi_payload([(7, 0x3C, b"\5"), entry, (7, 0x3C, b"\6")])
            number = victim.send(CommandCode.REGION_WRITE_MULTI, payload, flags=flags)
            if not flags:
                assert victim.reply_to(number, CommandCode.REGION_WRITE_MULTI, 1).failed
            alive(victim)
    # More than 8 bytes in an entry.
    payload = struct.pack("<QQII8s", 1, 0x3C, 7, 9, bytes(8))
    refused_or_closed(victim, victim.send(CommandCode.REGION_WRITE_MULTI, payload), CommandCode.REGION_WRITE_MULTI)


@pytest.mark.parametrize("index", [5, 6, 100, 0xFFFF_FFFF])
def test_interrupts_of_no_type(victim: VfioClient, index: int) -> None:
    with pytest.raises(Refused):
        victim.set_irqs(IrqFlag.DATA_NONE | IrqFlag.TRIGGER, index, 0, 0)
    with pytest.raises(Refused):
        victim.irq_info(index)
    alive(victim)


@pytest.mark.parametrize(
    ("flags", "start", "count", "fds"),
    [
        (0, 0, 1, 0),
        (0x20, 0, 1, 0),
        (0x04, 0, 1, 1),
        (0x27, 0, 1, 1),
        (0x3C, 0, 1, 1),
        (0xFFFF_FFFF, 0, 1, 1),
        (0x24, 0, 3, 4),
        (0x24, 0, 1, 2),
        (0x24, 0, 0, 1),
        (0x24, 2048, 1, 1),
        (0x24, 0xFFFF_FFFF, 1, 1),
        (0x24, 0xFFFF_FFFF, 0xFFFF_FFFF, 0),
        (0x24, 0, 0xFFFF_FFFF, 0),
        (0x24, 1, 2047, 0),
        (0x21, 0, 5000, 0),
        (0x22, 0, 4, 0),
    ],
)
@pytest.mark.parametrize("index", [IrqIndex.INTX, IrqIndex.MSIX], ids=lambda index: index.name)
def test_interrupts_that_make_no_sense(
    victim: VfioClient, group: RunningGroup, index: IrqIndex, flags: int, start: int, count: int, fds: int
) -> None:
    before = group.open_fds()
    event = os.eventfd(0)
    number = victim.send(CommandCode.DEVICE_SET_IRQS, victim.irqs_payload(flags, index, start, count), [event] * fds)
    refused_or_closed(victim, number, CommandCode.DEVICE_SET_IRQS)
    os.close(event)
    wait_fds(group, before)


def test_interrupts_through_what_is_no_eventfd(victim: VfioClient, bystander: Bystander, tmp_path: Path) -> None:
    """Refused, or written to at the client's own risk; a full pipe or a socket holds up nobody."""
    function = PciFunction(victim)
    function.place_bars()
    function.enable()
    memory = GuestMemory()
    memory.attach(victim)
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while os.write(write, bytes(65536)):
            pass
    os.set_blocking(write, True)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    full = os.eventfd((1 << 32) - 1)
    os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE - ((1 << 32) - 1))
    for fd in (write, file, full):
        device = ModernDevice(function)
        device.negotiate()
        function.enable_msix(1)
        with suppress(Refused):
            victim.set_eventfds(IrqIndex.MSIX, 0, [fd])
        blk = BlkDriver(device.setup_queue(0, memory, vector=0))
        device.driver_ok()
        blk.queue.event = None
        for _ in range(4):
            assert blk.request(BlkType.IN, 0, size=512).status == 0
        bystander.well()
        device.reset()
        memory.clear()
    for fd in (read, write, file, full):
        os.close(fd)
    memory.close()


# --- clients that go, stay and crowd --------------------------------------------------------------------------------


def test_gone_within_a_message(victim: VfioClient, group: RunningGroup) -> None:
    victim.close()
    _, data = victim.encode(CommandCode.REGION_WRITE, victim.access_payload(7, 0x3C, 64, bytes(64)))
    for length in range(1, len(data), 5):
        with connect(path_of(group, VICTIM)) as client:
            client.send_raw(data[:length])


def test_gone_before_the_reply(victim: VfioClient, group: RunningGroup) -> None:
    victim.close()
    for command, payload in RIGHT.items():
        with connect(path_of(group, VICTIM)) as client:
            for _ in range(50):
                client.send(command, payload)
    with connect(path_of(group, VICTIM)) as client:
        client.send(CommandCode.DEVICE_RESET)


def test_gone_within_a_legacy_command(victim: VfioClient, group: RunningGroup) -> None:
    """BAR0 accesses are administration commands: the answer finds nobody."""
    victim.close()
    for _ in range(20):
        with connect(path_of(group, VICTIM)) as client:
            function = PciFunction(client)
            function.place_bars()
            function.enable()
            memory = GuestMemory()
            memory.attach(client)
            device = LegacyDevice(BarRegisters(function), function)
            device.negotiate()
            blk = BlkDriver(device.setup_queue(0, memory))
            device.driver_ok()
            for _ in range(8):
                blk.start(BlkType.IN, 0, size=4096, kick=False)
            blk.queue.kick(always=True)
            client.send(CommandCode.REGION_WRITE, client.access_payload(0, 18, 1, b"\0"))
            client.send(CommandCode.REGION_READ, client.access_payload(0, 18, 1))
            memory.close()


def test_gone_while_the_server_wants_memory(victim: VfioClient, group: RunningGroup, bystander: Bystander) -> None:
    """DMA_READ is never answered: the ring doesn't get on, the member can be had again."""
    victim.close()
    for _ in range(3):
        with connect(path_of(group, VICTIM)) as client:
            function = PciFunction(client)
            function.place_bars()
            function.enable()
            memory = GuestMemory(shared=False)
            memory.attach(client)
            device = LegacyDevice(BarRegisters(function), function)
            device.negotiate()
            blk = BlkDriver(device.setup_queue(0, memory))
            device.driver_ok()
            blk.start(BlkType.IN, 0, size=4096, kick=False)
            blk.queue.ring.publish()
            client.send(CommandCode.REGION_WRITE, client.access_payload(0, 16, 2, b"\0\0"))
            time.sleep(0.02)
            bystander.well()
            memory.close()


def test_a_client_that_never_answers(victim: VfioClient, bystander: Bystander) -> None:
    """Its memory can be had only by asking, and it doesn't answer: its own commands are, each within a second or so.

    QEMU gives up on a reply after five, and on the whole device with it.
    """
    function = PciFunction(victim)
    function.place_bars()
    function.enable()
    memory = GuestMemory(shared=False)
    memory.attach(victim)
    device = LegacyDevice(BarRegisters(function), function)
    device.negotiate()
    blk = BlkDriver(device.setup_queue(0, memory))
    device.driver_ok()
    blk.start(BlkType.IN, 0, size=4096, kick=False)
    blk.queue.ring.publish()

    def ask(command: int, payload: bytes) -> None:
        number = victim.send(command, payload)
        started = time.monotonic()
        while True:
            message = victim.receive(3)
            # What the server asks for is left unanswered.
            if message.is_reply and message.id == number:
                break
        assert time.monotonic() - started < 1.5, f"command {command}: {time.monotonic() - started:.2f} s"
        bystander.well()

    ask(CommandCode.REGION_WRITE, victim.access_payload(0, 16, 2, b"\0\0"))
    ask(CommandCode.REGION_READ, victim.access_payload(RegionIndex.CONFIG, 0, 4))
    ask(CommandCode.REGION_WRITE, victim.access_payload(0, 18, 1, b"\0"))
    ask(CommandCode.REGION_READ, victim.access_payload(0, 18, 1))
    ask(CommandCode.DEVICE_RESET, b"")
    ask(CommandCode.DMA_UNMAP, victim.dma_unmap_payload(memory.base, memory.size))
    ask(CommandCode.REGION_READ, victim.access_payload(RegionIndex.CONFIG, 0, 4))
    memory.close()


def test_silence_within_a_message(victim: VfioClient, bystander: Bystander) -> None:
    """Half a message, and nothing more: nobody waits for the rest."""
    _, data = victim.encode(CommandCode.REGION_WRITE, victim.access_payload(7, 0x3C, 64, bytes(64)))
    victim.send_raw(data[:20])
    for _ in range(5):
        bystander.well()
        time.sleep(0.02)


def test_a_message_byte_by_byte(victim: VfioClient) -> None:
    number, data = victim.encode(CommandCode.REGION_READ, RIGHT[CommandCode.REGION_READ])
    for at in range(len(data)):
        victim.send_raw(data[at : at + 1])
    assert victim.reply_to(number, CommandCode.REGION_READ).payload[16:18] == b"\xf4\x1a"


def test_many_messages_at_once(victim: VfioClient) -> None:
    """Pipelined: each is answered, in order."""
    numbers = []
    data = b""
    for offset in range(256):
        number, one = victim.encode(CommandCode.REGION_READ, victim.access_payload(7, offset, 1))
        numbers.append(number)
        data += one
    victim.send_raw(data)
    whole = b"".join(victim.reply_to(number, CommandCode.REGION_READ).payload[16:] for number in numbers)
    assert whole[:2] == b"\xf4\x1a"


def test_replies_that_nobody_reads(victim: VfioClient, bystander: Bystander) -> None:
    """A client that only ever sends: it is held up or hung up on, and nobody else notices."""
    _, data = victim.encode(CommandCode.REGION_READ, victim.access_payload(7, 0, 4096))
    raw = socket.socket(fileno=os.dup(victim.fileno()))
    raw.setblocking(False)
    sent = 0
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and sent < 64 << 20:
        try:
            sent += raw.send(data * 100)
        except BlockingIOError:
            time.sleep(0.01)
            bystander.well()
        except (BrokenPipeError, ConnectionResetError):
            break
    raw.close()
    bystander.well()


def test_two_clients(victim: VfioClient, group: RunningGroup) -> None:
    """The second is hung up on at once, over each of the member's sockets; the first goes on."""
    alive(victim)
    for kind in ("transitional", "legacy", "modern"):
        with pytest.raises((Disconnected, Refused)):
            VfioClient(path_of(group, VICTIM, kind), timeout=2)
        alive(victim)
    assert group.member(VICTIM)["front"] == "transitional"


def test_one_client_after_the_other(victim: VfioClient, group: RunningGroup) -> None:
    victim.close()
    before: int | None = None
    for number in range(100):
        kind = ("transitional", "legacy", "modern")[number % 3]
        with connect(path_of(group, VICTIM, kind)) as client:
            alive(client)
        if number == 10:
            before = group.open_fds()
    assert before is not None
    wait_fds(group, before + 4)


def test_connections_that_say_nothing(victim: VfioClient, group: RunningGroup, bystander: Bystander) -> None:
    """Hundreds that connect and wait: more than one at a time is hung up on."""
    before = group.open_fds()
    crowd = []
    for _ in range(200):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.settimeout(2)
        crowd.append(one)
        # The queue of connections that nobody has accepted yet is short.
        with suppress(OSError):
            one.connect(str(path_of(group, VICTIM)))
    alive(victim)
    bystander.well()
    for one in crowd:
        with suppress(OSError):
            assert one.recv(1) == b""
        one.close()
    wait_fds(group, before)


def test_many_functions(start_group: GroupFactory) -> None:
    """A hundred guests of one process; every other one dies in the middle of something."""
    count = 100
    group = start_group(CONFIG.format(members=count))
    guests: list[tuple[PciFunction, GuestMemory, BlkDriver]] = []
    for number in range(1, count + 1):
        function = PciFunction(VfioClient(path_of(group, number, "modern" if number % 3 else "transitional")))
        function.place_bars()
        function.enable()
        memory = GuestMemory(1 << 20)
        memory.attach(function.client)
        device = ModernDevice(function)
        device.negotiate()
        function.enable_msix(2)
        blk = BlkDriver(device.setup_queue(0, memory, 32, vector=1))
        device.driver_ok()
        guests.append((function, memory, blk))
    threads = sum(1 for _ in Path(f"/proc/{group.pid}/task").iterdir())
    assert threads < 32, f"{threads} threads"
    for number, (_, _, blk) in enumerate(guests):
        blk.check(seed=number)
    for function, memory, blk in guests[::2]:
        for _ in range(8):
            blk.start(BlkType.IN, 0, size=512, kick=False)
        blk.queue.kick(always=True)
        _, data = function.client.encode(CommandCode.REGION_READ, function.client.access_payload(7, 0, 4))
        function.client.send_raw(data[:10])
        function.close()
        memory.close()
    for number, (function, memory, blk) in enumerate(guests[1::2]):
        blk.check(seed=number + 7)
        function.close()
        memory.close()
    for number in (1, 2, count):
        with connect(path_of(group, number, "legacy")) as client:
            alive(client)
