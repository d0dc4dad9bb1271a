# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The scripted vfio-user client, against bytes written down by hand; the driver's rings, against a device in Python."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from vhu_legacy import pci
from vhu_legacy.vfio_client import (
    CommandCode,
    Disconnected,
    IrqIndex,
    ProtocolViolation,
    Refused,
    VfioClient,
)
from vhu_legacy.virtio_driver import (
    Buffer,
    DriverError,
    Framing,
    GuestMemory,
    PackedRing,
    Ring,
    SplitRing,
    legacy_ring_size,
)

HEADER: Final = struct.Struct("<HHIII")


class Peer:
    """The server's end: plain bytes in and out."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(5)
        self.fds: list[int] = []

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part, fds, _, _ = socket.recv_fds(self.socket, count - len(data), 32)
            self.fds += fds
            if not part:
                raise EOFError
            data += part
        return data

    def command(self) -> tuple[int, int, int, bytes]:
        """Id, command, flags, payload of the next message."""
        number, command, size, flags, error = HEADER.unpack(self.exactly(16))
        assert error == 0
        return number, command, flags, self.exactly(size - 16)

    def reply(self, number: int, command: int, payload: bytes = b"", error: int | None = None, pieces: int = 0) -> None:
        flags = 1 | (0 if error is None else 0x20)
        data = HEADER.pack(number, command, 16 + len(payload), flags, error or 0) + payload
        if not pieces:
            self.socket.sendall(data)
            return
        for at in range(0, len(data), pieces):
            self.socket.sendall(data[at : at + pieces])

    def answer(self, command: int, payload: bytes = b"", error: int | None = None, pieces: int = 0) -> bytes:
        """Take one command, which has to be this, and answer it; its payload."""
        number, got, flags, asked = self.command()
        assert (got, flags) == (command, 0)
        self.reply(number, got, payload, error, pieces)
        return asked


Script = Callable[[Peer], None]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Script], Path]]:
    """Runs a script as a server; what goes wrong there fails the test."""
    threads: list[threading.Thread] = []
    problems: list[BaseException] = []
    listeners: list[socket.socket] = []

    def start(script: Script) -> Path:
        path = tmp_path / f"{len(threads)}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listeners.append(listener)
        listener.settimeout(5)
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            try:
                connection, _ = listener.accept()
                peer = Peer(connection)
                with connection:
                    script(peer)
                for fd in peer.fds:
                    os.close(fd)
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=run)
        threads.append(thread)
        thread.start()
        return path

    yield start
    for thread in threads:
        thread.join(6)
        assert not thread.is_alive()
    for listener in listeners:
        listener.close()
    assert not problems, problems


VERSION_REPLY: Final = (
    b"\0\0\0\0" + b'{"capabilities":{"max_msg_fds":2,"max_data_xfer_size":4096,"write_multiple":true}}' + b"\0"
)


def test_version(serve: Callable[[Script], Path]) -> None:
    def script(peer: Peer) -> None:
        asked = peer.answer(1, VERSION_REPLY, pieces=5)
        assert asked.startswith(b'\0\0\0\0{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,')
        assert asked.endswith(b'"write_multiple":true}}\0')

    with VfioClient(serve(script)) as client:
        assert client.version is not None
        assert client.version.max_msg_fds == 2
        assert client.version.max_data_xfer_size == 4096
        assert client.version.write_multiple


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (b"\0\0\1\0", r"version 0\.1"),
        (b"\1\0\0\0", r"version 1\.0"),
        (b"\0\0", "2 bytes"),
        (b"\0\0\0\0{}", "no end"),
        (b"\0\0\0\0{\0", "text"),
        (b"\0\0\0\0[]\0", "text"),
        (b'\0\0\0\0{"capabilities":{"max_msg_fds":17}}\0', "max_msg_fds"),
    ],
)
def test_versions_that_qemu_refuses(serve: Callable[[Script], Path], reply: bytes, problem: str) -> None:
    def script(peer: Peer) -> None:
        peer.answer(1, reply)

    path = serve(script)
    with pytest.raises(ProtocolViolation, match=problem):
        VfioClient(path)


def client_of(path: Path) -> VfioClient:
    return VfioClient(path, negotiate=False, timeout=2)


def test_commands(serve: Callable[[Script], Path]) -> None:
    """Each message, byte for byte."""

    def script(peer: Peer) -> None:
        # DMA_MAP with an fd, DMA_MAP without, DMA_UNMAP
        asked = peer.answer(2)
        assert asked == struct.pack("<IIQQQ", 32, 3, 0x1000, 0x4000_0000, 0x2000)
        assert len(peer.fds) == 1
        assert peer.answer(2) == struct.pack("<IIQQQ", 32, 1, 0, 0x8000, 0x1000)
        assert len(peer.fds) == 1
        assert peer.answer(3, bytes(24)) == struct.pack("<IIQQ", 24, 0, 0x4000_0000, 0x2000)
        # info
        assert peer.answer(4, struct.pack("<IIII", 16, 3, 9, 5)) == struct.pack("<IIII", 16, 0, 0, 0)
        region = struct.pack("<IIIIQQ", 32, 3, 2, 0, 0x4000, 0)
        assert peer.answer(5, region) == struct.pack("<IIIIQQ", 32, 0, 2, 0, 0, 0)
        assert peer.answer(7, struct.pack("<IIII", 16, 1, 2, 4)) == struct.pack("<IIII", 16, 0, 2, 0)
        # region accesses
        access = struct.pack("<QII", 0x34, 7, 2)
        assert peer.answer(9, access + b"\x12\x34", pieces=1) == access
        assert peer.answer(10, access) == access + b"\xab\xcd"
        number, command, flags, asked = peer.command()
        assert (command, flags) == (10, 0x10)
        assert asked == struct.pack("<QII", 0x3000, 2, 2) + b"\1\0"
        number, command, flags, asked = peer.command()
        assert (command, flags) == (15, 0x10)
        first, second = struct.pack("<QII", 8, 2, 4) + b"abcd" + bytes(4), struct.pack("<QII", 16, 4, 8) + b"12345678"
        assert asked == struct.pack("<Q", 2) + first + second
        assert peer.answer(13) == b""
        assert number != 0

    with client_of(serve(script)) as client:
        fd = os.memfd_create("test")
        client.dma_map(0x4000_0000, 0x2000, fd=fd, offset=0x1000)
        os.close(fd)
        client.dma_map(0x8000, 0x1000, writable=False)
        client.dma_unmap(0x4000_0000, 0x2000)
        info = client.device_info()
        assert (info.flags, info.regions, info.irqs) == (3, 9, 5)
        assert client.region_info(2).size == 0x4000
        assert client.irq_info(2).count == 4
        assert client.region_read(7, 0x34, 2) == b"\x12\x34"
        client.region_write(7, 0x34, b"\xab\xcd")
        client.region_write(2, 0x3000, b"\1\0", posted=True)
        client.write_multi([(2, 8, b"abcd"), (4, 16, b"12345678")])
        client.reset()


def test_interrupts_in_chunks(serve: Callable[[Script], Path]) -> None:
    """As many fds in a message as agreed; vectors without one in messages of their own."""
    seen: list[tuple[int, ...]] = []

    def script(peer: Peer) -> None:
        peer.answer(1, VERSION_REPLY)
        for _ in range(4):
            before = len(peer.fds)
            argsz, flags, index, start, count = struct.unpack("<IIIII", peer.answer(8))
            assert (argsz, flags, index) == (20, 0x24, 2)
            seen.append((start, count, len(peer.fds) - before))
        for flags in (0x21, 0x09, 0x11):
            assert peer.answer(8)[:12] == struct.pack("<III", 20, flags, 0)

    with VfioClient(serve(script)) as client:
        fd = os.eventfd(0)
        client.set_eventfds(IrqIndex.MSIX, 1, [fd, fd, fd, None, None, fd])
        client.disable_irqs(IrqIndex.INTX)
        client.mask(IrqIndex.INTX)
        client.unmask(IrqIndex.INTX)
        os.close(fd)
    assert seen == [(1, 2, 2), (3, 1, 1), (4, 2, 0), (6, 1, 1)]


def test_a_region_with_capabilities(serve: Callable[[Script], Path]) -> None:
    """The first answer has no room for them; the fd of each is the client's to close."""

    def script(peer: Peer) -> None:
        for room in (32, 64):
            number, _, _, asked = peer.command()
            assert asked[:4] == struct.pack("<I", room)
            payload = struct.pack("<IIIIQQ", 64, 0xF, 4, 32, 0x4000, 0x1000)
            payload += bytes(room - 32)
            data = HEADER.pack(number, 5, 16 + len(payload), 1, 0) + payload
            fd = os.memfd_create("region")
            socket.send_fds(peer.socket, [data], [fd])
            os.close(fd)

    with client_of(serve(script)) as client:
        region = client.region_info(4)
        assert region.capabilities == bytes(32)
        assert region.fd is not None
        os.close(region.fd)


def region_answer(room: int, cap_offset: int, capabilities: bytes, flags: int = 0xF) -> bytes:
    whole = struct.pack("<IIIIQQ", 32 + len(capabilities), flags, 4, cap_offset, 0x4000, 0x1000) + capabilities
    return whole[:32] if room < len(whole) else whole


def areas(*listed: tuple[int, int], count: int | None = None, following: int = 0) -> bytes:
    head = struct.pack("<HHIII", 1, 1, following, len(listed) if count is None else count, 0)
    return head + b"".join(struct.pack("<QQ", *area) for area in listed)


def test_a_region_is_mapped(serve: Callable[[Script], Path]) -> None:
    """The fd comes with the whole answer only, and the region begins somewhere in its file."""
    file = os.memfd_create("region")
    os.ftruncate(file, 0x5000)
    os.pwrite(file, b"there", 0x3000)

    def script(peer: Peer) -> None:
        other = struct.pack("<HHI", 9, 1, 40)
        for room in (32, 88):
            number, _, _, asked = peer.command()
            assert asked[:4] == struct.pack("<I", room)
            payload = region_answer(room, 32, other + areas((0, 0x1000), (0x2000, 0x2000)))
            data = HEADER.pack(number, 5, 16 + len(payload), 1, 0) + payload
            socket.send_fds(peer.socket, [data], [file] if room == 88 else [])

    with client_of(serve(script)) as client:
        mapped = client.map_region(4)
        assert {offset: len(area) for offset, area in mapped.items()} == {0: 0x1000, 0x2000: 0x2000}
        assert mapped[0x2000][:5] == b"there"
        mapped[0][:4] = b"here"
        assert os.pread(file, 4, 0x1000) == b"here"
        for area in mapped.values():
            area.close()
    os.close(file)


@pytest.mark.parametrize(
    ("cap_offset", "capabilities", "reason"),
    [
        (0, areas((0, 0x1000)), "capabilities at 0"),
        (65, areas((0, 0x1000)), "capabilities at 65"),
        (60, areas((0, 0x1000)), "capability at 60"),
        (56, areas((0, 1)), "without its length"),
        (32, areas((0, 0x1000), count=2), "2 areas"),
        (32, areas((0x3000, 0x1001)), "areas"),
        (32, struct.pack("<HHI", 9, 1, 32) + bytes(24), "followed by one at 32"),
    ],
    ids=["none", "outside", "torn", "no-length", "short", "too-large", "loop"],
)
def test_a_region_with_capabilities_that_make_no_sense(
    serve: Callable[[Script], Path], cap_offset: int, capabilities: bytes, reason: str
) -> None:
    def script(peer: Peer) -> None:
        # It doesn't ask again when the first answer is wrong already.
        with suppress(EOFError):
            number, _, _, _ = peer.command()
            peer.reply(number, 5, region_answer(32, cap_offset, capabilities))
            number, _, _, asked = peer.command()
            room = int.from_bytes(asked[:4], "little")
            peer.reply(number, 5, region_answer(room, cap_offset, capabilities))

    with client_of(serve(script)) as client, pytest.raises(ProtocolViolation, match=reason):
        client.region_info(4)


def test_a_mapped_region_needs_its_fd(serve: Callable[[Script], Path]) -> None:
    def script(peer: Peer) -> None:
        for flags in (0x7, 0x3):
            number, _, _, _ = peer.command()
            peer.reply(number, 5, region_answer(32, 0, b"", flags))

    with client_of(serve(script)) as client:
        with pytest.raises(ProtocolViolation, match="no fd"):
            client.map_region(4)
        assert client.map_region(4) == {}


def test_errors(serve: Callable[[Script], Path]) -> None:
    def script(peer: Peer) -> None:
        peer.answer(13, error=errno.EINVAL)
        peer.answer(9, error=0)
        number, _, _, _ = peer.command()
        peer.reply(number, 4)
        number, _, _, _ = peer.command()
        peer.reply(number, 9, bytes(16))
        peer.answer(9, struct.pack("<QII", 0, 0, 4) + bytes(3))
        peer.answer(13, b"data", error=5)

    with client_of(serve(script)) as client:
        with pytest.raises(Refused, match="DEVICE_RESET: EINVAL") as caught:
            client.reset()
        assert (caught.value.command, caught.value.errno) == (CommandCode.DEVICE_RESET, errno.EINVAL)
        with pytest.raises(Refused, match="REGION_READ: 0"):
            client.region_read(0, 0, 4)
        with pytest.raises(ProtocolViolation, match="names command 4"):
            client.region_read(0, 0, 4)
        with pytest.raises(ProtocolViolation, match="not the 4 bytes"):
            client.region_read(0, 0, 4)
        with pytest.raises(ProtocolViolation, match="not the 4 bytes"):
            client.region_read(0, 0, 4)
        with pytest.raises(ProtocolViolation, match="error reply"):
            client.reset()


def test_silence_and_the_end(serve: Callable[[Script], Path]) -> None:
    let_go = threading.Event()

    def script(peer: Peer) -> None:
        peer.command()
        assert let_go.wait(5)

    client = VfioClient(serve(script), negotiate=False, timeout=0.1)
    with pytest.raises(TimeoutError):
        client.reset()
    let_go.set()
    with pytest.raises(Disconnected, match="between two messages"):
        client.receive(2)
    client.close()
    client.close()


def test_the_end_within_a_message(serve: Callable[[Script], Path]) -> None:
    client = client_of(serve(lambda peer: peer.socket.sendall(HEADER.pack(1, 9, 100, 1, 0) + b"half")))
    with pytest.raises(Disconnected, match="after 4 of 84 bytes"):
        client.receive()
    client.close()


@pytest.mark.parametrize("size", [0, 15, 0xFFFFFFFF])
def test_impossible_sizes(serve: Callable[[Script], Path], size: int) -> None:
    client = client_of(serve(lambda peer: peer.socket.sendall(HEADER.pack(1, 9, size, 1, 0))))
    with pytest.raises(ProtocolViolation, match="a size of"):
        client.receive()
    client.close()


def test_the_servers_own_commands(serve: Callable[[Script], Path]) -> None:
    """DMA_READ and DMA_WRITE come in the middle of something else and are answered from local memory."""

    def dma(peer: Peer, number: int, command: int, payload: bytes) -> tuple[int, int, bytes]:
        peer.socket.sendall(HEADER.pack(number, command, 16 + len(payload), 0, 0) + payload)
        got, answered, size, flags, error = HEADER.unpack(peer.exactly(16))
        assert (got, answered) == (number, command)
        return flags, error, peer.exactly(size - 16)

    def script(peer: Peer) -> None:
        number, _, _, _ = peer.command()
        where = struct.pack("<QQ", 0x4000_0010, 4)
        assert dma(peer, number, 12, where + b"data") == (1, 0, where)
        assert dma(peer, 0, 11, where) == (1, 0, where + b"data")
        assert dma(peer, 1, 11, struct.pack("<QQ", 0x5000, 4)) == (0x21, errno.ENODEV, b"")
        assert dma(peer, 1, 12, where + b"dat") == (0x21, errno.EINVAL, b"")
        assert dma(peer, 1, 11, where[:12]) == (0x21, errno.EINVAL, b"")
        assert dma(peer, 1, 11, struct.pack("<QQ", 0x4000_0000, 1 << 40)) == (0x21, errno.E2BIG, b"")
        assert dma(peer, 1, 13, b"") == (0x21, errno.ENOSYS, b"")
        peer.reply(number, 13)
        # And while the client waits for an eventfd.
        assert dma(peer, 7, 12, where + b"more") == (1, 0, where)
        _, _, _, asked = peer.command()
        os.eventfd_write(int.from_bytes(asked[16:], "little"), 1)
        with contextlib.suppress(EOFError):
            peer.exactly(1)

    memory = GuestMemory(1 << 16)
    fd = os.eventfd(0)
    with client_of(serve(script)) as client:
        client.memory = memory
        client.reset()
        assert client.counters.dma_writes == 1
        assert client.wait_readable([fd], 0.05) == []
        assert memory.read(0x4000_0010, 4) == b"more"
        client.region_write(0, 0, fd.to_bytes(4, "little"), posted=True)
        assert client.wait_readable([fd], 2) == [fd]
    os.close(fd)
    memory.close()


def test_abandoned_replies(serve: Callable[[Script], Path]) -> None:
    def script(peer: Peer) -> None:
        first, _, _, _ = peer.command()
        second, _, _, _ = peer.command()
        peer.reply(first, 13)
        peer.reply(second, 13)

    with client_of(serve(script)) as client:
        client.abandon(client.send(CommandCode.DEVICE_RESET))
        client.reset()


# --- rings ----------------------------------------------------------------------------------------------------------


class Device:
    """The device's half of either ring, as simple as can be: takes a chain and gives it back."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.memory = ring.memory
        self.last = 0
        self.wrap = 1
        self.used = 0

    def _table(self, address: int, count: int, packed: bool) -> list[tuple[int, int, bool]]:
        found = []
        for i in range(count):
            at, size, a, b = struct.unpack("<QIHH", self.memory.read(address + 16 * i, 16))
            found.append((at, size, bool((b if packed else a) & 2)))
        return found

    def take(self) -> list[tuple[int, int, bool]] | None:
        """The next chain: address, size, writable of each buffer. Remembers its id."""
        memory, ring = self.memory, self.ring
        if isinstance(ring, SplitRing):
            if memory.u16(ring.driver + 2) == self.last:
                return None
            self.id = index = memory.u16(ring.driver + 4 + 2 * (self.last % ring.size))
            self.last = (self.last + 1) & 0xFFFF
            direct: list[tuple[int, int, bool]] = []
            while True:
                address, size, flags, following = struct.unpack("<QIHH", memory.read(ring.desc + 16 * index, 16))
                if flags & 4:
                    return direct + self._table(address, size // 16, False)
                direct.append((address, size, bool(flags & 2)))
                if not flags & 1:
                    return direct
                index = following
        chain: list[tuple[int, int, bool]] = []
        count = 0
        at = self.last
        wrap = self.wrap
        while True:
            address, size, number, flags = struct.unpack("<QIHH", memory.read(ring.desc + 16 * at, 16))
            if count == 0 and (bool(flags & 0x80), bool(flags & 0x8000)) != (bool(wrap), not wrap):
                return None
            count += 1
            at += 1
            if at == ring.size:
                at, wrap = 0, wrap ^ 1
            self.id = number
            if flags & 4:
                chain += self._table(address, size // 16, True)
            else:
                chain.append((address, size, bool(flags & 2)))
            if not flags & 1:
                break
        self.place, self.place_wrap = self.last, self.wrap
        self.last, self.wrap = at, wrap
        return chain

    def give(self, length: int) -> None:
        memory, ring = self.memory, self.ring
        if isinstance(ring, SplitRing):
            memory.write(ring.device + 4 + 8 * (self.used % ring.size), struct.pack("<II", self.id, length))
            self.used = (self.used + 1) & 0xFFFF
            memory.set_u16(ring.device + 2, self.used)
            return
        # In order, so a chain's used descriptor takes its first one's place.
        flags = 0x8080 if self.place_wrap else 0
        memory.write(ring.desc + 16 * self.place, struct.pack("<QIH", 0, length, self.id))
        memory.set_u16(ring.desc + 16 * self.place + 14, flags)


@pytest.mark.parametrize("kind", ["split", "legacy", "packed"])
def test_rings(kind: str) -> None:
    """Chains of all lengths, direct and indirect, several times around the ring."""
    memory = GuestMemory(1 << 20)
    ring: Ring
    if kind == "packed":
        ring = PackedRing(memory, 7)
    else:
        ring = SplitRing(memory, 8, layout="legacy" if kind == "legacy" else "modern")
    device = Device(ring)
    if kind == "legacy":
        assert ring.desc % 4096 == 0
        assert ring.device == ring.desc + 4096
        assert legacy_ring_size(8) == 8192
    for turn in range(100):
        chains = []
        for length in (1 + turn % 3, 2):
            chain = [Buffer(0x4000_0000 + 64 * i + turn, 8 + i, writable=i > 0) for i in range(length)]
            chains.append((ring.add(chain, indirect=turn % 2 == 1), chain))
        assert ring.publish()
        for number, chain in chains:
            taken = device.take()
            assert taken == [(one.address, one.size, one.writable) for one in chain]
            assert device.id == number
            device.give(turn)
        assert device.take() is None
        assert [(one.id, one.length) for one in ring.take_used()] == [(number, turn) for number, _ in chains]
        assert ring.in_flight == 0
        assert ring.take_used() == []
    memory.close()


def test_a_full_ring() -> None:
    memory = GuestMemory(1 << 20)
    for ring in (SplitRing(memory, 4), PackedRing(memory, 4)):
        ring.add([Buffer(0x4000_0000, 1)] * 3)
        with pytest.raises(DriverError, match="1 free"):
            ring.add([Buffer(0x4000_0000, 1)] * 2)
    memory.close()


def test_an_id_that_the_device_has_not() -> None:
    memory = GuestMemory(1 << 20)
    ring = SplitRing(memory, 4)
    memory.write(ring.device + 4, struct.pack("<II", 2, 0))
    memory.set_u16(ring.device + 2, 1)
    with pytest.raises(DriverError, match="descriptor 2"):
        ring.take_used()
    memory.close()


@pytest.mark.parametrize(
    ("framing", "sizes"),
    [
        (Framing(), [30, -20]),
        (Framing.linux(), [24, 6, -8, -12]),
        (Framing((24,), (8, 12)), [24, 6, -8, -12]),
        (Framing((1, 0, 2), (0, 20)), [1, 0, 2, 27, 0, -20]),
        (Framing((100,), (100,)), [30, -20]),
    ],
)
def test_framing(framing: Framing, sizes: list[int]) -> None:
    memory = GuestMemory(1 << 16)
    chain = framing.chain(memory, bytes(range(30)), 20)
    assert [-one.size if one.writable else one.size for one in chain] == sizes
    assert b"".join(memory.read(one.address, one.size) for one in chain if not one.writable) == bytes(range(30))
    memory.close()


# --- configuration space --------------------------------------------------------------------------------------------


def config_space() -> bytearray:
    config = bytearray(4096)
    struct.pack_into("<HH", config, 0, 0x1AF4, 0x1042)
    config[8] = 1
    config[9:12] = b"\0\0\1"
    struct.pack_into("<HH", config, 0x2C, 0x1AF4, 0x40)
    config[0x34], config[0x3D] = 0x40, 1
    struct.pack_into("<BBHII", config, 0x40, 0x11, 0x50, 0x8003, 0x1000 | 2, 0x2000 | 4)
    struct.pack_into("<BBBBBBHIII", config, 0x50, 9, 0, 20, 2, 2, 0, 0, 0x3000, 0x100, 4)
    struct.pack_into("<I", config, 0x100, 0x0010 | 1 << 16)
    struct.pack_into("<IHHHHHBBHHHH", config, 0x104, 0, 9, 0, 4, 4, 3, 0, 0, 1, 1, 0, 0x1042)
    return config


def test_config_space() -> None:
    config = bytes(config_space())
    identity = pci.Identity.decode(config)
    assert (identity.vendor, identity.device, identity.revision, identity.class_code) == (0x1AF4, 0x1042, 1, 0x10000)
    assert (identity.subsystem_vendor, identity.subsystem, identity.interrupt_pin) == (0x1AF4, 0x40, 1)
    assert identity.virtio_id == 2
    msix = pci.Msix.decode(config)
    assert msix == pci.Msix(0x40, 4, True, False, 2, 0x1000, 4, 0x2000)
    (notify,) = pci.virtio_capabilities(config)
    assert notify == pci.VirtioCapability(0x50, 20, 2, 2, 0, 0x3000, 0x100, 4)
    sriov = pci.SrIov.decode(config)
    assert sriov is not None
    assert (sriov.vf_enable, sriov.initial_vfs, sriov.total_vfs, sriov.num_vfs) == (True, 4, 4, 3)
    assert (sriov.first_vf_offset, sriov.vf_stride, sriov.vf_device_id) == (1, 1, 0x1042)
    assert pci.SrIov.decode(config[:256]) is None


@pytest.mark.parametrize("following", [0x40, 0x50, 0x04, 0xFC])
def test_capability_lists_that_go_wrong(following: int) -> None:
    config = config_space()
    config[0x51] = following
    if following == 0xFC:
        config[0xFD] = 0xFC
    with pytest.raises(ValueError, match="capability list"):
        pci.capabilities(bytes(config))


@pytest.mark.parametrize(
    ("probe", "bar"),
    [
        ([0], None),
        ([0xFFFFFFE1], pci.Bar(0, "io", 32, False)),
        ([0x0000FFE1], pci.Bar(0, "io", 32, False)),
        ([0xFFFFF000], pci.Bar(0, "memory32", 4096, False)),
        ([0xFFFFC00C, 0xFFFFFFFF], pci.Bar(0, "memory64", 0x4000, True)),
        ([0x00000004, 0xFFFFFFFF], pci.Bar(0, "memory64", 1 << 32, False)),
    ],
)
def test_bars(probe: list[int], bar: pci.Bar | None) -> None:
    assert pci.bar_from_probe(0, probe) == bar


@pytest.mark.parametrize("probe", [[0xFFFF0F00], [0xFFFFC00C]])
def test_bars_that_cannot_be(probe: list[int]) -> None:
    with pytest.raises(ValueError, match="BAR0"):
        pci.bar_from_probe(0, probe)
