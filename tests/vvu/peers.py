# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Both sides of a virtio-vhost-user device, scripted: the master in front of it, the slave that drives it.

Plain blocking code with a time limit on every wait. From the bottom:

- `Master`: a vhost-user front end of the group's front socket, speaking as QEMU's vhost-user-blk does;
- `Slave`: the driver in the backend VM, whatever carries the device:
  `QemuSlave` is QEMU's vhost-user-test-device and the guest's driver in one, with everything QEMU would die of checked;
  `PciSlave` is a driver of the PCI function;
- `BlkProgram`: what a slave does with all this: a small block device in the master's guest memory.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Literal, Protocol, Self

from tests import frontend
from tests.frontend import (
    BLK_HEADER,
    CONFIG,
    HEADER,
    IOERR,
    NEED_REPLY,
    NO_FD,
    OK,
    PAGE,
    REPLY,
    SECTOR,
    STATE,
    TIMEOUT,
    U64,
    UNSUPP,
    VERSION,
    Buffer,
    Connection,
    ConnectionLost,
    F,
    P,
    R,
    Refused,
    Region,
    SplitQueue,
    T,
    bits,
    wait_until,
)
from vhu_legacy import virtio_driver
from vhu_legacy.vfio_client import IrqIndex, VfioClient
from vhu_legacy.virtio_driver import NO_VECTOR, Common, ModernDevice, PciFunction, SplitRing, Status, take_events

__all__ = [
    "CONFIG_SIZE",
    "MASTER_UP",
    "RX_SIZE",
    "SLAVE_UP",
    "BlkProgram",
    "Master",
    "Message",
    "PciSlave",
    "QemuSlave",
    "Slave",
    "eventfd",
    "exchange",
    "memory_table",
    "signals",
]

SLAVE_UP: Final = 1
MASTER_UP: Final = 2
CONFIG_SIZE: Final = 24
STATUS_AT: Final = 0
RX_SIZE: Final = 12 + 4096
"""The largest message."""
RXQ: Final = 0
TXQ: Final = 1
SHARED_MEMORY_BAR: Final = 4

SHMEM: Final = 22
BACKEND_SEND_FD: Final = 10
GET_SHMEM_CONFIG: Final = 44
SHMEM_MAP: Final = 9
SHMEM_UNMAP: Final = 10
CONFIG_CHANGE: Final = 2
MAP: Final = struct.Struct("<B7xQQQQ")
"""shmid, fd_offset, shm_offset, len, flags."""

Message = frontend.Message


def eventfd(value: int = 0) -> int:
    return os.eventfd(value, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def signals(fd: int, timeout: float = TIMEOUT) -> int:
    """Wait for an eventfd; its value, 0 when nothing came."""
    return take_events(fd) if select.select([fd], [], [], timeout)[0] else 0


def memory_table(regions: Sequence[Region]) -> bytes:
    return struct.pack("<II", len(regions), 0) + b"".join(region.pack() for region in regions)


# --- the master -------------------------------------------------------------------------------------------------------


class Master(Connection):
    """A front end. The messages it sends are bytes; who answers them is the slave, in the test's own time."""

    def __init__(self, path: Path | str, timeout: float = TIMEOUT) -> None:
        super().__init__(path, timeout)
        self._ours: list[int] = []
        self.channel: socket.socket | None = None
        """Our end of the channel for the slave's requests."""

    def close(self) -> None:
        super().close()
        if self.channel is not None:
            self.channel.close()
        for fd in self._ours:
            with suppress(OSError):
                os.close(fd)
        self._ours.clear()

    def __enter__(self) -> Self:
        return self

    def eventfd(self) -> int:
        """One that is closed with the master."""
        fd = eventfd()
        self._ours.append(fd)
        return fd

    def memfd(self, size: int, data: bytes = b"", at: int = 0) -> int:
        """Memory, likewise."""
        fd = os.memfd_create("master", os.MFD_CLOEXEC)
        self._ours.append(fd)
        os.ftruncate(fd, size)
        if data:
            os.pwrite(fd, data, at)
        return fd

    def vring_fd(self, request: R, queue: int = 0, *, none: bool = False) -> int:
        """SET_VRING_KICK, CALL or ERR with a new eventfd, or without one; the eventfd."""
        if none:
            self.send(request, U64.pack(queue | NO_FD))
            return -1
        fd = self.eventfd()
        self.send(request, U64.pack(queue), [fd])
        return fd

    def open_channel(self) -> socket.socket:
        """SET_SLAVE_REQ_FD."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(self.socket.gettimeout())
        with theirs:
            self.send(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        if self.channel is not None:
            self.channel.close()
        self.channel = ours
        return ours

    def receive_channel(self) -> Message:
        """The next request of the slave."""
        assert self.channel is not None
        request, flags, size = HEADER.unpack(self._from_channel(HEADER.size))
        return Message(request, flags, self._from_channel(size))

    def _from_channel(self, size: int) -> bytes:
        assert self.channel is not None
        data = b""
        while len(data) < size:
            part = self.channel.recv(size - len(data))
            if not part:
                raise ConnectionLost("the channel for the slave's requests was closed")
            data += part
        return data

    def answer_channel(self, request: int, value: int = 0) -> None:
        assert self.channel is not None
        self.channel.sendall(HEADER.pack(request, VERSION | REPLY, 8) + U64.pack(value))

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        self.send(R.SET_MEM_TABLE, memory_table(regions), [region.fd for region in regions])

    def is_open(self) -> bool:
        """Whether the connection is still there and nothing came on it."""
        readable, _, _ = select.select([self.socket], [], [], 0)
        return not readable


# --- the slave --------------------------------------------------------------------------------------------------------


class Memory(Protocol):
    """The backend VM's."""

    def read(self, address: int, size: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...

    def allocate(self, size: int, align: int) -> int: ...


class Slave(ABC):
    """The driver of a virtio-vhost-user device, up to but not including the meaning of what it is told."""

    carrier: ClassVar[Literal["vhost-user", "vfio-user"]]

    memory: Memory
    offered: int
    """Feature bits of the device."""

    def __init__(self, queues: int, timeout: float = TIMEOUT) -> None:
        self.queues: Final = queues
        """N, as the test expects it."""
        self.timeout = timeout
        self.rx_posted: dict[int, list[Buffer]] = {}
        self._received: list[Message] = []
        self._spare: dict[int, list[int]] = {}
        self._tx: dict[int, list[Buffer]] = {}
        self._used_tx: set[int] = set()

    # --- what carriers differ in ----------------------------------------------------------------------------

    @abstractmethod
    def start(self, *, rx: int = 8, rx_size: int = RX_SIZE) -> Self:
        """From a reset device to DRIVER_OK, with so many buffers in rxq."""

    @abstractmethod
    def reset(self) -> None:
        """Reset the device; `start` may follow."""

    @abstractmethod
    def close(self) -> None:
        """Switch the machine off. Idempotent. AssertionError for what QEMU would have died of."""

    @abstractmethod
    def config(self, offset: int = 0, size: int = CONFIG_SIZE) -> bytes: ...

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None: ...

    @abstractmethod
    def notify(self, index: int) -> None:
        """Ring the doorbell of a virtqueue index."""

    @abstractmethod
    def kick_event(self, queue: int) -> int:
        """The eventfd of a vhost-user queue's kick notification."""

    @abstractmethod
    def config_changes(self, timeout: float = TIMEOUT) -> int:
        """Wait for a configuration change notification; how many there were, 0 when none came."""

    @abstractmethod
    def window_read(self, offset: int, size: int) -> bytes:
        """Shared memory."""

    @abstractmethod
    def window_write(self, offset: int, data: bytes) -> None: ...

    @abstractmethod
    def _add(self, queue: int, chain: Sequence[Buffer]) -> int: ...

    @abstractmethod
    def _publish(self, queue: int) -> None: ...

    @abstractmethod
    def _used(self, queue: int) -> list[tuple[int, int]]: ...

    @property
    @abstractmethod
    def needs_reset(self) -> bool | None:
        """DEVICE_NEEDS_RESET; None where the carrier has no way to say it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget_rings(self) -> None:
        """After a reset: nothing is in flight, and all buffers are the driver's again."""
        for chain in (*self.rx_posted.values(), *self._tx.values()):
            for piece in chain:
                self._spare.setdefault(piece.size, []).append(piece.address)
        self.rx_posted.clear()
        self._tx.clear()
        self._used_tx.clear()
        self._received.clear()

    # --- configuration --------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        return int.from_bytes(self.config()[:4], "little")

    @status.setter
    def status(self, value: int) -> None:
        self.write_config(STATUS_AT, value.to_bytes(4, "little"))

    def up(self) -> Self:
        """SLAVE_UP."""
        self.status = SLAVE_UP
        assert self.status & SLAVE_UP
        return self

    def wait_status(self, value: int) -> None:
        wait_until(lambda: self.status == value, self.timeout, f"status {value}")

    # --- doorbells and notifications ------------------------------------------------------------------------

    @property
    def log_index(self) -> int:
        return 2 * (self.queues + 1)

    def call(self, queue: int = 0) -> None:
        self.notify(2 * queue + 2)

    def err(self, queue: int = 0) -> None:
        self.notify(2 * queue + 3)

    def log(self) -> None:
        self.notify(self.log_index)

    def kicks(self, queue: int = 0, timeout: float = TIMEOUT) -> int:
        """Wait for a queue's kick notification; 0 when none came."""
        return signals(self.kick_event(queue), timeout)

    def barrier(self) -> None:
        """Everything written to the device's registers so far has been looked at."""
        self.config()

    # --- messages -------------------------------------------------------------------------------------------

    def buffer(self, size: int) -> int:
        """Memory for a buffer; used again and again."""
        spare = self._spare.setdefault(size, [])
        return spare.pop() if spare else self.memory.allocate(size, 64)

    def post(self, count: int = 1, size: int = RX_SIZE, *, pieces: int = 1) -> None:
        """Buffers for rxq, each in so many descriptors."""
        for _ in range(count):
            part = size // pieces
            chain = [Buffer(self.buffer(part), part, writable=True) for _ in range(pieces - 1)]
            rest = size - part * (pieces - 1)
            chain.append(Buffer(self.buffer(rest), rest, writable=True))
            self.rx_posted[self._add(RXQ, chain)] = chain
        self._publish(RXQ)

    def poll(self, *, repost: bool = True) -> None:
        """Take what has come."""
        for head, length in self._used(RXQ):
            chain = self.rx_posted.pop(head)
            assert length >= HEADER.size, f"a message of {length} bytes"
            data = b"".join(self.memory.read(piece.address, piece.size) for piece in chain)[:length]
            request, flags, size = HEADER.unpack_from(data)
            assert length == HEADER.size + size, f"{length} bytes used for a message of {HEADER.size} + {size}"
            self._received.append(Message(request, flags, data[HEADER.size :]))
            for piece in chain:
                self._spare.setdefault(piece.size, []).append(piece.address)
            if repost:
                self.post(1, sum(piece.size for piece in chain), pieces=len(chain))

    def receive(self, timeout: float | None = None, *, repost: bool = True) -> Message:
        """The next message. TimeoutError when there is none."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            self.poll(repost=repost)
            if self._received:
                return self._received.pop(0)
            if time.monotonic() > deadline:
                raise TimeoutError("no message in rxq")
            time.sleep(0.0005)

    def forget(self) -> None:
        """Messages that have come and weren't looked at."""
        self.poll()
        self._received.clear()

    def nothing_comes(self, timeout: float = 0.1) -> bool:
        """Whether rxq stays empty for a while."""
        try:
            message = self.receive(timeout)
        except TimeoutError:
            return True
        raise AssertionError(f"unexpected: {message}")

    def transmit(self, data: bytes, *, pieces: int = 1, wait: bool = True) -> int:
        """Put bytes onto txq and wait until the device is done with them; the chain's number."""
        part = max(len(data) // pieces, 1)
        chain: list[Buffer] = []
        while data:
            take = len(data) if len(chain) == pieces - 1 else part
            address = self.buffer(take)
            self.memory.write(address, data[:take])
            chain.append(Buffer(address, take))
            data = data[take:]
        head = self.give(TXQ, chain)
        # whoever had the number before never asked
        self._used_tx.discard(head)
        self._tx[head] = chain
        if wait:
            self.transmitted(head)
        return head

    def transmitted(self, head: int, timeout: float | None = None) -> None:
        """Wait for the end of `transmit`. TimeoutError when the device doesn't take it."""
        wait_until(lambda: self._transmitted(head), self.timeout if timeout is None else timeout, "txq")
        self._used_tx.discard(head)

    def give(self, queue: int, chain: Sequence[Buffer]) -> int:
        """Any chain for a queue, for those who want it wrong."""
        head = self._add(queue, chain)
        self._publish(queue)
        return head

    def _transmitted(self, head: int) -> bool:
        for number, length in self._used(TXQ):
            assert length == 0, f"{length} bytes written to a buffer of txq"
            self._used_tx.add(number)
            for piece in self._tx.pop(number, ()):
                self._spare.setdefault(piece.size, []).append(piece.address)
        return head in self._used_tx

    def send(
        self, request: int, payload: bytes = b"", *, flags: int = VERSION, size: int | None = None, wait: bool = True
    ) -> int:
        """A message as `transmit` has it."""
        return self.transmit(HEADER.pack(request, flags, len(payload) if size is None else size) + payload, wait=wait)

    def reply(self, request: int, payload: bytes | int = 0) -> None:
        """An answer to the master; a number is a u64."""
        data = U64.pack(payload) if isinstance(payload, int) else payload
        self.send(request, data, flags=VERSION | REPLY)


def exchange(
    master: Connection,
    slave: Slave,
    request: int,
    payload: bytes = b"",
    answer: bytes | int | None = None,
    fds: Sequence[int] = (),
) -> Message:
    """A request of the master's, checked where the slave sees it, and the slave's answer, if there is one, where the
    master does. What the slave got."""
    master.send(request, payload, fds)
    got = slave.receive()
    assert (got.request, got.flags, got.payload) == (request, VERSION, payload)
    if answer is not None:
        slave.reply(request, answer)
        data = U64.pack(answer) if isinstance(answer, int) else answer
        reply = master.receive()
        assert (reply.request, reply.flags, reply.payload) == (request, VERSION | REPLY, data)
    return got


class QemuSlave(Slave):
    """Over vhost-user: QEMU 11.1's vhost-user-test-device, and the guest's driver behind it.

    What QEMU dies of, or what it refuses, is a violation: it is noted, and `close` fails because of it.
    """

    carrier = "vhost-user"

    RING: Final = 64
    WINDOW_BASE: Final = 0xC0_0000_0000
    """Where the guest has its shared memory BAR."""
    FEATURES: Final = bits(F.PROTOCOL_FEATURES, F.VERSION_1)
    PROTOCOL: Final = bits(P.MQ, P.REPLY_ACK, P.BACKEND_REQ, BACKEND_SEND_FD, P.CONFIG, P.CONFIGURE_MEM_SLOTS, SHMEM)

    def __init__(
        self, path: Path, queues: int, timeout: float = TIMEOUT, *, features: int = FEATURES, protocol: int = PROTOCOL
    ) -> None:
        super().__init__(queues, timeout)
        self.ram: Final = frontend.GuestMemory(8 << 20)
        self.memory = self.ram
        self.violations: list[str] = []
        self.maps: dict[tuple[int, int], mmap.mmap] = {}
        """By (offset, size): what the back end had mapped."""
        self.operations: list[tuple[str, int, int]] = []
        """All of it: "map" or "unmap", offset, size."""
        self._map_files: dict[tuple[int, int], tuple[int, int]] = {}
        """Where in which file."""
        # What QEMU does, it does with one lock held: also waiting for an answer.
        self._lock = threading.RLock()
        self._started = False
        self._closing = False
        self.refuse_maps = False
        """Answer with an error, as QEMU does for what it can't map."""
        self._hold = False
        self._held: list[tuple[bytes, int, bytes]] = []
        """Answers on the back-end channel that wait, and what they are to."""
        self._rings: list[SplitQueue] = []
        self._running: list[int] = []
        self._bases: dict[int, int] = {}
        self._config_events = eventfd()
        self._config = bytes(CONFIG_SIZE)
        self._reverse: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve_channel, daemon=True)
        self.connection = Connection(path, timeout)
        try:
            self._realize(features, protocol)
        except BaseException:
            self.close()
            raise

    def _realize(self, features: int, protocol: int) -> None:
        connection = self.connection
        self.offered = connection.get_u64(R.GET_FEATURES)
        self.accepted = self.offered & features
        self.offered_protocol = connection.get_u64(R.GET_PROTOCOL_FEATURES)
        self.agreed = self.offered_protocol & protocol
        connection.set_u64(R.SET_PROTOCOL_FEATURES, self.agreed)
        connection.reply_ack = bool(self.agreed >> P.REPLY_ACK & 1)
        self.num_queues = connection.get_u64(R.GET_QUEUE_NUM)
        if self.has_slots:
            self.slots = connection.get_u64(R.GET_MAX_MEM_SLOTS)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            connection.set(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        self._reverse = ours
        connection.set(R.SET_OWNER)
        assert connection.get_u64(R.GET_FEATURES) == self.offered
        self.rings_offered = 2 * self.queues + 3
        for index in range(self.rings_offered):
            # num_vqs = 2N+3 of them, at each machine reset
            ring = SplitQueue(self.ram, self.RING)
            self._rings.append(ring)
            connection.set_u64(R.SET_VRING_CALL, index, [ring.call_fd])
        if self.agreed >> SHMEM & 1:
            answer = connection.get(GET_SHMEM_CONFIG).payload
            count, _pad = struct.unpack_from("<II", answer)
            self.shared_memory = list(struct.unpack_from(f"<{(len(answer) - 8) // 8}Q", answer, 8))
            assert sum(1 for size in self.shared_memory if size) == count
            total = sum(self.shared_memory)
            if total & (total - 1) or not total:
                self.violations.append(f"QEMU aborts: regions of {self.shared_memory} bytes together")
        self._config = connection.get_config(0, CONFIG_SIZE)
        self._shared_regions = False
        self._thread.start()

    # --- the back-end channel --------------------------------------------------------------------------------

    @property
    def _channel(self) -> socket.socket:
        assert self._reverse is not None
        return self._reverse

    def send_back_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes on the back-end channel, for those who want it wrong."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        self._channel.sendmsg([data], ancillary)

    def _serve_channel(self) -> None:
        while not self._closing:
            if not select.select([self._channel], [], [], 0.05)[0]:
                continue
            with self._lock, suppress(ConnectionLost):
                if self._closing or not self._serve_one():
                    return

    def _serve_one(self) -> bool:
        """One message of the channel, if there is one; false at its end."""
        if not select.select([self._channel], [], [], 0)[0]:
            return True
        fds: list[int] = []
        data = b""
        try:
            while len(data) < HEADER.size:
                # small pieces: fds come with the byte they were sent with
                part, ancillary, _flags, _address = self._channel.recvmsg(HEADER.size - len(data), 1024)
                for level, kind, value in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        fds += struct.unpack(f"{len(value) // 4}i", value)
                if not part:
                    return False
                data += part
            request, flags, size = HEADER.unpack(data)
            payload = b""
            while len(payload) < size:
                part = self._channel.recv(size - len(payload))
                if not part:
                    return False
                payload += part
            self._handle(request, flags, payload, fds)
        except OSError:
            return False
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _next_request(self) -> int | None:
        """What waits behind the request at hand."""
        with suppress(BlockingIOError):
            head = self._channel.recv(4, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return int.from_bytes(head, "little") if len(head) == 4 else None
        return None

    def _violation(self, what: str) -> None:
        self.violations.append(what)

    def _handle(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        if not self._started:
            self._violation(f"QEMU dies: request {request} while the device isn't started")
        if request == CONFIG_CHANGE:
            if payload or fds:
                self._violation(f"CONFIG_CHANGE with {len(payload)} bytes and {len(fds)} fds")
            self._config = self._get_config()
            os.eventfd_write(self._config_events, 1)
            result = 0
        elif request in (SHMEM_MAP, SHMEM_UNMAP) and len(payload) == MAP.size:
            if self._next_request() in (SHMEM_MAP, SHMEM_UNMAP):
                self._violation("another request about shared memory before the answer to this one")
            result = self._map_request(request, payload, fds)
        else:
            self._violation(f"unknown request {request} with {len(payload)} bytes")
            result = 1
        answer = HEADER.pack(request, VERSION | REPLY, 8) + U64.pack(result)
        if self._hold and request in (SHMEM_MAP, SHMEM_UNMAP) and result == 0:
            self._held.append((answer, request, payload))
            return
        if flags & NEED_REPLY:
            self._channel.sendall(answer)
        if request in (SHMEM_MAP, SHMEM_UNMAP) and result == 0:
            # QEMU answers first, and changes the memory map then.
            self._announce(request, payload)

    def hold_answers(self) -> None:
        """A QEMU that takes its time: memory is mapped, nobody knows yet."""
        self._hold = True

    def let_answers_go(self, *, later: bool = False) -> None:
        """The end of `hold_answers`. `later`: only when the device is being stopped."""
        with self._lock:
            self._hold = False
            if later:
                return
            held, self._held = self._held, []
            for answer, request, payload in held:
                self._channel.sendall(answer)
                self._announce(request, payload)

    def _map_request(self, request: int, payload: bytes, fds: list[int]) -> int:
        shmid, fd_offset, offset, size, flags = MAP.unpack(payload)
        wrong = ""
        if shmid >= len(self.shared_memory) or not self.shared_memory[shmid]:
            wrong = f"no shared memory region {shmid}"
        elif size == 0 or offset + size > self.shared_memory[shmid]:
            wrong = f"{size:#x} bytes at {offset:#x} aren't in the region"
        elif request == SHMEM_UNMAP:
            if fds:
                wrong = "an unmap with a descriptor"
            elif (offset, size) not in self.maps:
                wrong = f"an unmap of {size:#x} bytes at {offset:#x}, which aren't a map"
        elif len(fds) != 1:
            wrong = f"a map with {len(fds)} descriptors"
        elif flags != 1:
            wrong = f"a map with flags {flags:#x}"
        elif any(start < offset + size and offset < start + length for start, length in self.maps):
            wrong = f"{size:#x} bytes at {offset:#x} overlap an earlier map"
        elif os.fstat(fds[0]).st_size < fd_offset + size:
            wrong = f"a map of {size:#x} bytes at {fd_offset:#x} of a file of {os.fstat(fds[0]).st_size:#x}"
        if wrong:
            self._violation(wrong)
            return 1
        if self.refuse_maps:
            return 1
        if request == SHMEM_MAP:
            self.maps[offset, size] = mmap.mmap(fds[0], size, offset=fd_offset)
            self._map_files[offset, size] = (fd_offset, os.dup(fds[0]))
            self.operations.append(("map", offset, size))
        else:
            self.operations.append(("unmap", offset, size))
        return 0

    def _announce(self, request: int, payload: bytes) -> None:
        """A map is memory of the guest, which every vhost-user back end is told of, this one too."""
        _shmid, _fd_offset, offset, size, _flags = MAP.unpack(payload)
        key = (offset, size)
        if request == SHMEM_MAP:
            self._tell_region(self._region_of(key), add=True)
        else:
            self._drop_map(key)

    def _tell_region(self, region: Region, *, add: bool) -> None:
        with suppress(Refused, ConnectionLost):
            if not self.has_slots:
                # Of a table that has changed while the device was stopped the back end hears at its next start.
                if self._started:
                    self._tell_table()
            elif add:
                self.connection.set(R.ADD_MEM_REG, U64.pack(0) + region.pack(), [region.fd])
            else:
                self.connection.set(R.REM_MEM_REG, U64.pack(0) + region.pack())

    @property
    def has_slots(self) -> bool:
        return bool(self.agreed >> P.CONFIGURE_MEM_SLOTS & 1)

    def _region_of(self, key: tuple[int, int]) -> Region:
        """A map, as guest memory."""
        offset, size = key
        file_offset, fd = self._map_files[key]
        return Region(self.WINDOW_BASE + offset, size, 0x7000_0000_0000 + offset, file_offset, fd)

    def _tell_table(self) -> None:
        regions = [*self.ram.regions, *map(self._region_of, self.maps)]
        if len(regions) > 8:
            # QEMU says nothing then, not even that
            return
        self.connection.set(R.SET_MEM_TABLE, memory_table(regions), [region.fd for region in regions])

    def _drop_map(self, key: tuple[int, int]) -> None:
        region = self._region_of(key)
        self.maps.pop(key).close()
        del self._map_files[key]
        self._tell_region(region, add=False)
        os.close(region.fd)

    # --- start and stop --------------------------------------------------------------------------------------

    def start(self, *, rx: int = 8, rx_size: int = RX_SIZE) -> Self:
        # A driver looks at the configuration before it sets queues up.
        self.config()
        self._go(dict.fromkeys(range(self.rings_offered), 0))
        if rx:
            self.post(rx, rx_size)
        return self

    def set_up(self, indices: Iterable[int], *, enable: Iterable[int] | None = None) -> None:
        """Start only these, for those who want it wrong."""
        self._go(dict.fromkeys(indices, 0), enable=enable)

    def _go(self, bases: dict[int, int], *, enable: Iterable[int] | None = None) -> None:
        with self._lock:
            connection = self.connection
            connection.set_u64(R.SET_FEATURES, self.accepted)
            if not self.has_slots:
                self._tell_table()
            elif not self._shared_regions:
                for region in self.ram.regions:
                    self._tell_region(region, add=True)
                self._shared_regions = True
            for index, base in bases.items():
                ring = self._rings[index]
                connection.set_vring(R.SET_VRING_NUM, index, ring.size)
                connection.set_vring(R.SET_VRING_BASE, index, base)
                user = self.ram.user
                connection.set(
                    R.SET_VRING_ADDR,
                    frontend.ADDRESSES.pack(index, 0, user(ring.desc), user(ring.device), user(ring.driver), 0),
                )
                connection.set_u64(R.SET_VRING_KICK, index, [ring.kick_fd])
                connection.set_u64(R.SET_VRING_CALL, index, [ring.call_fd])
            self._running = list(bases)
            wanted = list(range(self.rings_offered) if enable is None else enable)
            for index in wanted:
                if index == self.rings_offered - 1:
                    self._started = True
                connection.set_vring(R.SET_VRING_ENABLE, index, 1)

    def pause(self) -> None:
        """QMP stop."""
        with self._lock:
            for index in range(self.rings_offered):
                self.connection.set_vring(R.SET_VRING_ENABLE, index, 0)
                if index == 0:
                    # What was sent before this answer was sent in time.
                    while select.select([self._channel], [], [], 0)[0] and self._serve_one():
                        pass
                    self._started = False
                    self.let_answers_go()
            self._bases = {index: self.connection.get_vring_base(index) for index in self._running}

    def resume(self) -> None:
        """QMP cont."""
        self._go(self._bases)

    def stop_for_reset(self) -> None:
        """What the back end sees of a reset of the guest's."""
        self.pause()
        with self._lock:
            for key in list(self.maps):
                self._drop_map(key)
        for ring in self._rings:
            ring.restart()
            ring.take_calls()
        self._forget_rings()
        take_events(self._config_events)

    def reset(self) -> None:
        self.stop_for_reset()
        # A guest that comes up reads the configuration: only that tells a reset from a pause for certain.
        self.config()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        # As a process that is killed: everything at once.
        self.connection.close()
        if self._reverse is not None:
            with suppress(OSError):
                self._reverse.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(self.timeout)
        if self._reverse is not None:
            self._reverse.close()
        for ring in self._rings:
            ring.close()
        for held in self.maps.values():
            held.close()
        for _offset, fd in self._map_files.values():
            os.close(fd)
        os.close(self._config_events)
        self.ram.close()
        assert not self.violations, self.violations

    # --- the guest's side ------------------------------------------------------------------------------------

    def _get_config(self) -> bytes:
        return self.connection.get_config(0, CONFIG_SIZE)

    def config(self, offset: int = 0, size: int = CONFIG_SIZE) -> bytes:
        # Every read of the guest's reads all of it.
        with self._lock:
            self._config = self._get_config()
        return self._config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        # The bytes around are those that were read last.
        with self._lock:
            whole = self._config[:offset] + data + self._config[offset + len(data) :]
            self.connection.set_config(0, whole)
            self._config = whole

    def notify(self, index: int) -> None:
        os.eventfd_write(self._rings[index].kick_fd, 1)

    def kick_event(self, queue: int) -> int:
        return self._rings[2 * queue + 2].call_fd

    def config_changes(self, timeout: float = TIMEOUT) -> int:
        return signals(self._config_events, timeout)

    def _covered(self, offset: int, size: int) -> list[tuple[int, int, mmap.mmap, int]]:
        found = []
        for (start, length), held in self.maps.items():
            low, high = max(offset, start), min(offset + size, start + length)
            if low < high:
                found.append((low, high, held, start))
        return found

    def window_read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        with self._lock:
            for low, high, held, start in self._covered(offset, size):
                data[low - offset : high - offset] = held[low - start : high - start]
        return bytes(data)

    def window_write(self, offset: int, data: bytes) -> None:
        with self._lock:
            for low, high, held, start in self._covered(offset, len(data)):
                held[low - start : high - start] = data[low - offset : high - offset]

    def _add(self, queue: int, chain: Sequence[Buffer]) -> int:
        return self._rings[queue].add(chain)

    def _publish(self, queue: int) -> None:
        self._rings[queue].publish()

    def _used(self, queue: int) -> list[tuple[int, int]]:
        return self._rings[queue].take_used()

    @property
    def needs_reset(self) -> bool | None:
        return None


class PciSlave(Slave):
    """Over vfio-user: a driver of the PCI function. With MSI-X vector 0 is for the configuration, 1 and 2 for rxq and
    txq, 3 + i for kicks of queue i."""

    carrier = "vfio-user"

    def __init__(
        self, path: Path, queues: int, timeout: float = TIMEOUT, *, intx: bool = False, mapped: bool = False
    ) -> None:
        """`mapped`: shared memory is mapped where that is possible, as QEMU does it, and not read and written through
        the socket."""
        super().__init__(queues, timeout)
        self.areas: dict[int, mmap.mmap] = {}
        """By offset: what of the shared memory is mapped."""
        self.client = VfioClient(path, timeout=timeout)
        try:
            self.function = PciFunction(self.client)
        except BaseException:
            self.client.close()
            raise
        self.ram: Final = virtio_driver.GuestMemory(8 << 20)
        self.memory = self.ram
        self.ram.attach(self.client)
        self.intx = intx
        self.function.place_bars()
        self.function.enable()
        if intx:
            assert self.function.enable_intx()
        else:
            assert self.function.enable_msix() == queues + 3
        self.device = ModernDevice(self.function, timeout=timeout)
        self._rings: dict[int, SplitRing] = {}
        self._notify: dict[int, tuple[int, int]] = {}
        self.offered = 0
        self._closed = False
        try:
            self.device.reset()
            if mapped:
                self.areas = self.client.map_region(SHARED_MEMORY_BAR)
        except BaseException:
            self.close()
            raise

    def start(self, *, rx: int = 8, rx_size: int = RX_SIZE) -> Self:
        device = self.device
        device.negotiate(0)
        self.offered = device.device_features()
        if not self.intx:
            device.write(Common.CONFIG_VECTOR, 2, 0)
        for index in (RXQ, TXQ):
            ring = SplitRing(self.ram, 64)
            self._rings[index] = ring
            device.program(index, ring, None if self.intx else 1 + index)
        for queue in range(self.queues):
            if not self.intx:
                device.select(2 * queue + 2)
                device.write(Common.QUEUE_VECTOR, 2, 3 + queue)
                assert device.read(Common.QUEUE_VECTOR, 2) == 3 + queue
        for index in range(2 * self.queues + 3):
            self._notify[index] = device.notify_address(device.select(index))
        device.driver_ok()
        if rx:
            self.post(rx, rx_size)
        return self

    def reset(self) -> None:
        self.device.reset()
        self._forget_rings()
        for fd in self.function.vectors:
            take_events(fd)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for area in self.areas.values():
            area.close()
        self.function.close()
        self.ram.close()

    def config(self, offset: int = 0, size: int = CONFIG_SIZE) -> bytes:
        return self.device.config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        self.device.write_config(offset, data)

    def notify(self, index: int) -> None:
        bar, at = self._notify[index]
        self.function.write(bar, at, 2, index, posted=True)

    def kick_event(self, queue: int) -> int:
        if self.function.intx is not None:
            return self.function.intx
        return self.function.vectors[3 + queue]

    def config_changes(self, timeout: float = TIMEOUT) -> int:
        assert not self.intx
        return signals(self.function.vectors[0], timeout)

    def interrupt(self, timeout: float = TIMEOUT) -> int:
        """With INTx: wait for an interrupt, acknowledge it; ISR, 0 when none came."""
        assert self.function.intx is not None
        if not signals(self.function.intx, timeout):
            return 0
        isr = self.device.isr()
        self.client.unmask(IrqIndex.INTX)
        return isr

    def _area(self, offset: int, size: int) -> tuple[mmap.mmap, int] | None:
        """The mapping where a range is, and where there."""
        for start, area in self.areas.items():
            if start <= offset and offset + size <= start + len(area):
                return area, offset - start
        return None

    def window_read(self, offset: int, size: int) -> bytes:
        found = self._area(offset, size)
        if found is not None:
            area, at = found
            return area[at : at + size]
        return b"".join(
            self.client.region_read(SHARED_MEMORY_BAR, at, min(PAGE, offset + size - at))
            for at in range(offset, offset + size, PAGE)
        )

    def window_write(self, offset: int, data: bytes) -> None:
        found = self._area(offset, len(data))
        if found is not None:
            area, at = found
            area[at : at + len(data)] = data
            return
        for at in range(0, len(data), PAGE):
            self.client.region_write(SHARED_MEMORY_BAR, offset + at, data[at : at + PAGE])

    def _add(self, queue: int, chain: Sequence[Buffer]) -> int:
        pieces = [virtio_driver.Buffer(one.address, one.size, one.writable) for one in chain]
        return self._rings[queue].add(pieces)

    def _publish(self, queue: int) -> None:
        if self._rings[queue].publish():
            self.notify(queue)

    def _used(self, queue: int) -> list[tuple[int, int]]:
        return [(one.id, one.length) for one in self._rings[queue].take_used()]

    @property
    def needs_reset(self) -> bool | None:
        return bool(self.device.status & Status.NEEDS_RESET)

    def vector_of(self, index: int) -> int:
        """queue_msix_vector."""
        self.device.select(index)
        return self.device.read(Common.QUEUE_VECTOR, 2)

    def has_no_vector(self, index: int) -> bool:
        return self.vector_of(index) == NO_VECTOR


# --- a slave's program ------------------------------------------------------------------------------------------------


class BlkProgram:
    """A block device, as a slave has it: it answers the master, and serves split rings in its guest's memory."""

    SECTORS: Final = 128
    FEATURES: Final = bits(F.PROTOCOL_FEATURES, F.VERSION_1, F.FLUSH)
    PROTOCOL: Final = bits(
        P.MQ,
        P.LOG_SHMFD,
        P.REPLY_ACK,
        P.BACKEND_REQ,
        P.CONFIG,
        BACKEND_SEND_FD,
        P.INFLIGHT,
        P.CONFIGURE_MEM_SLOTS,
        SHMEM,
    )

    def __init__(self, slave: Slave) -> None:
        self.slave: Final = slave
        self.disk = bytearray(self.SECTORS * SECTOR)
        self.regions: list[tuple[int, int, int, int]] = []
        """guest address, size, the master's address, where in the window."""
        self.rings: dict[int, dict[str, int]] = {}
        self.seen: list[int] = []
        self.error: BaseException | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(TIMEOUT)
        if self.error is not None and value is None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                with suppress(TimeoutError):
                    self._message(self.slave.receive(0.001))
                for index in list(self.rings):
                    if self.slave.kicks(index, 0):
                        self._serve(index)
        except BaseException as error:
            self.error = error

    def _message(self, message: Message) -> None:
        self.seen.append(message.request)
        request, payload = message.request, message.payload
        answer: bytes | int | None = 0 if message.flags & NEED_REPLY else None
        if request == R.GET_FEATURES:
            answer = self.FEATURES
        elif request == R.GET_PROTOCOL_FEATURES:
            answer = self.PROTOCOL
        elif request == R.GET_QUEUE_NUM:
            answer = self.slave.queues
        elif request == R.GET_CONFIG:
            offset, size, _flags = CONFIG.unpack_from(payload)
            config = U64.pack(self.SECTORS).ljust(256, b"\0")
            answer = CONFIG.pack(offset, size, 0) + config[offset : offset + size]
        elif request == R.SET_MEM_TABLE:
            self._table(payload)
        elif request == R.SET_VRING_NUM:
            index, value = STATE.unpack(payload)
            self.rings.setdefault(index, {})["size"] = value
        elif request == R.SET_VRING_BASE:
            index, value = STATE.unpack(payload)
            self.rings.setdefault(index, {}).update(at=value, used=value)
        elif request == R.SET_VRING_ADDR:
            index, _flags, desc, used, avail, _log = frontend.ADDRESSES.unpack(payload)
            ring = self.rings.setdefault(index, {})
            ring["desc"], ring["device"], ring["driver"] = map(self._user, (desc, used, avail))
        elif request == R.GET_VRING_BASE:
            index, _ = STATE.unpack(payload)
            answer = STATE.pack(index, self.rings.pop(index, {}).get("at", 0))
        if answer is not None:
            self.slave.reply(request, answer)

    def _table(self, payload: bytes) -> None:
        """Region k is `mmap_offset` behind the end of the one before."""
        (count,) = struct.unpack_from("<I", payload)
        self.regions.clear()
        cursor = 0
        for index in range(count):
            guest, size, user, offset = frontend.REGION.unpack_from(payload, 8 + 32 * index)
            self.regions.append((guest, size, user, cursor + offset))
            cursor += offset + size

    def _user(self, address: int) -> int:
        for _guest, size, user, at in self.regions:
            if user <= address < user + size:
                return address - user + at
        raise AssertionError(f"{address:#x} is nobody's memory: {self.regions}")

    def _guest(self, address: int, size: int) -> int:
        for guest, length, _user, at in self.regions:
            if guest <= address and address + size <= guest + length:
                return address - guest + at
        raise AssertionError(f"{address:#x} is nobody's memory: {self.regions}")

    def _u16(self, at: int) -> int:
        return int.from_bytes(self.slave.window_read(at, 2), "little")

    def _serve(self, index: int) -> None:
        ring = self.rings[index]
        if "desc" not in ring:
            return
        slave, size = self.slave, ring["size"]
        done = False
        while ring["at"] != self._u16(ring["driver"] + 2):
            head = self._u16(ring["driver"] + 4 + 2 * (ring["at"] % size))
            ring["at"] = (ring["at"] + 1) & 0xFFFF
            written = self._request(ring["desc"], head)
            slave.window_write(ring["device"] + 4 + 8 * (ring["used"] % size), struct.pack("<II", head, written))
            ring["used"] = (ring["used"] + 1) & 0xFFFF
            slave.window_write(ring["device"] + 2, ring["used"].to_bytes(2, "little"))
            done = True
        if done:
            slave.call(index)

    def _request(self, table: int, head: int) -> int:
        slave = self.slave
        readable = b""
        writable: list[tuple[int, int]] = []
        following: int | None = head
        while following is not None:
            address, length, flags, after = frontend.DESCRIPTOR.unpack(slave.window_read(table + 16 * following, 16))
            at = self._guest(address, length)
            if flags & frontend.WRITE:
                writable.append((at, length))
            else:
                readable += slave.window_read(at, length)
            following = after if flags & frontend.NEXT else None
        kind, _priority, sector = BLK_HEADER.unpack_from(readable)
        data = readable[BLK_HEADER.size :]
        room = sum(length for _, length in writable) - 1
        start = sector * SECTOR
        answer, status = b"", OK
        if kind == T.IN and start + room <= len(self.disk):
            answer = bytes(self.disk[start : start + room])
        elif kind == T.OUT and start + len(data) <= len(self.disk):
            self.disk[start : start + len(data)] = data
        elif kind == T.FLUSH:
            pass
        else:
            status = UNSUPP if kind not in (T.IN, T.OUT) else IOERR
        output = answer.ljust(room, b"\0") + bytes([status])
        for at, length in writable:
            slave.window_write(at, output[:length])
            output = output[length:]
        return len(answer) + 1
