# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A scripted vhost-user front end: what QEMU and a guest's block driver do together, and what they never would.

Plain blocking code with a time limit on every wait; nothing here shares a line with the product. From the bottom:

- `Connection`: messages on the socket, whole or in pieces, right or wrong;
- `GuestMemory`: a memfd as guest RAM, in one or more regions;
- `SplitQueue`: the driver's half of a split ring, modern or legacy layout;
- `PackedQueue`: the same of a packed ring;
- `InflightRegion`, `DirtyLog`: memory that the front end shares with the back end beside the guest's;
- `BlkDriver`, `PackedBlkDriver`: a block device driven through all of these.
"""

from __future__ import annotations

import enum
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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Generic, Literal, NamedTuple, Self, TypeVar

__all__ = [
    "BackendChannel",
    "BlkDriver",
    "Buffer",
    "Connection",
    "ConnectionLost",
    "DirtyLog",
    "F",
    "FrontEnd",
    "GuestMemory",
    "InflightRegion",
    "Message",
    "P",
    "PackedBlkDriver",
    "PackedQueue",
    "Pending",
    "Place",
    "Queue",
    "R",
    "Refused",
    "Region",
    "Result",
    "SplitQueue",
    "T",
    "wait_until",
]

TIMEOUT: Final = 5.0
HEADER: Final = struct.Struct("<III")
U64: Final = struct.Struct("<Q")
STATE: Final = struct.Struct("<II")
ADDRESSES: Final = struct.Struct("<IIQQQQ")
REGION: Final = struct.Struct("<QQQQ")
CONFIG: Final = struct.Struct("<III")
DESCRIPTOR: Final = struct.Struct("<QIHH")
BLK_HEADER: Final = struct.Struct("<IIQ")
SEGMENT: Final = struct.Struct("<QII")
LOG: Final = struct.Struct("<QQ")
INFLIGHT: Final = struct.Struct("<QQHH")
PACKED_DESCRIPTOR: Final = struct.Struct("<QIHH")

VERSION: Final = 1
REPLY: Final = 4
NEED_REPLY: Final = 8
NO_FD: Final = 1 << 8
"""In SET_VRING_KICK, CALL and ERR: no fd comes with it."""

PAGE: Final = 4096
SECTOR: Final = 512

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
AVAIL: Final = 1 << 7
USED: Final = 1 << 15


class R(enum.IntEnum):
    """Message numbers."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class F(enum.IntEnum):
    """Feature bits."""

    SIZE_MAX = 1
    SEG_MAX = 2
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    NOTIFY_ON_EMPTY = 24
    LOG_ALL = 26
    ANY_LAYOUT = 27
    INDIRECT = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30
    VERSION_1 = 32
    RING_PACKED = 34
    IN_ORDER = 35


class P(enum.IntEnum):
    """Protocol feature bits."""

    MQ = 0
    LOG_SHMFD = 1
    REPLY_ACK = 3
    BACKEND_REQ = 5
    PAGEFAULT = 8
    CONFIG = 9
    INFLIGHT = 12
    RESET_DEVICE = 13
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16


class T(enum.IntEnum):
    """Block request types."""

    IN = 0
    OUT = 1
    FLUSH = 4
    FLUSH_OUT = 5
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


OK: Final = 0
IOERR: Final = 1
UNSUPP: Final = 2


def bits(*numbers: int) -> int:
    """The value with these bits set."""
    return sum(1 << number for number in numbers)


class ConnectionLost(Exception):
    """The back end has closed the connection."""


class Refused(Exception):
    """The back end has answered a message with a refusal."""


def wait_until(condition: object, timeout: float = TIMEOUT, what: str = "it") -> None:
    """Wait until a callable is true. TimeoutError otherwise."""
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} didn't happen within {timeout} s")
        time.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Message:
    """A message from the back end."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    def u64(self) -> int:
        (value,) = U64.unpack(self.payload)
        assert isinstance(value, int)
        return value


class Connection:
    """One vhost-user connection, front-end side. Every wait ends with TimeoutError after `timeout` seconds."""

    def __init__(self, path: Path | str, timeout: float = TIMEOUT) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.reply_ack = False
        """Ask for an acknowledgement of every message that has no answer of its own."""
        try:
            self.socket.connect(str(path))
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- bytes --------------------------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, with fds on the first of them. Raises ConnectionLost."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            sent = self.socket.sendmsg([data], ancillary)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionLost(str(error)) from error

    @staticmethod
    def encode(
        request: int,
        payload: bytes = b"",
        *,
        need_reply: bool = False,
        flags: int | None = None,
        size: int | None = None,
    ) -> bytes:
        """A message's bytes. `flags` and `size` override what would be right."""
        right = VERSION | (NEED_REPLY if need_reply else 0)
        return HEADER.pack(request, right if flags is None else flags, len(payload) if size is None else size) + bytes(
            payload
        )

    def _receive_exactly(self, count: int) -> tuple[bytes, list[int]]:
        data = b""
        fds: list[int] = []
        while len(data) < count:
            try:
                part, ancillary, _flags, _address = self.socket.recvmsg(count - len(data), 1024)
            except ConnectionResetError as error:
                raise ConnectionLost(str(error)) from error
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds += struct.unpack(f"{len(value) // 4}i", value[: len(value) // 4 * 4])
            if not part:
                raise ConnectionLost(f"end of file after {len(data)} of {count} bytes")
            data += part
        return data, fds

    # --- messages -----------------------------------------------------------------------------------------

    def receive(self) -> Message:
        """The next message. Raises ConnectionLost."""
        header, fds = self._receive_exactly(HEADER.size)
        request, flags, size = HEADER.unpack(header)
        payload, more = self._receive_exactly(size) if size else (b"", [])
        return Message(request, flags, payload, tuple(fds + more))

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        flags: int | None = None,
        size: int | None = None,
    ) -> None:
        """Send a message and don't wait for anything."""
        self.send_raw(self.encode(request, payload, need_reply=need_reply, flags=flags, size=size), fds)

    def get(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Send a message that is answered; the answer."""
        self.send(request, payload, fds)
        answer = self.receive()
        assert answer.request == request, f"{answer} is no answer to {request}"
        assert answer.flags == VERSION | REPLY, f"flags {answer.flags:#x} in {answer}"
        return answer

    def get_u64(self, request: int) -> int:
        """Send a message that is answered by a number."""
        return self.get(request).u64()

    def set(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message without an answer of its own. With `reply_ack`, wait for its acknowledgement and raise
        Refused when that isn't 0.
        """
        self.send(request, payload, fds, need_reply=self.reply_ack)
        if self.reply_ack:
            self.acknowledged(request)

    def acknowledged(self, request: int) -> None:
        """Wait for a message's acknowledgement. Raises Refused, ConnectionLost."""
        answer = self.receive()
        assert answer.request == request, f"{answer} is no answer to {request}"
        assert answer.flags == VERSION | REPLY, f"flags {answer.flags:#x} in {answer}"
        if answer.u64() != 0:
            raise Refused(f"message {request}: {answer.u64()}")

    def set_u64(self, request: int, value: int, fds: Sequence[int] = ()) -> None:
        self.set(request, U64.pack(value), fds)

    def set_vring(self, request: int, index: int, value: int) -> None:
        self.set(request, STATE.pack(index, value))

    def get_inflight(self, queues: int, queue_size: int) -> InflightRegion:
        """Ask for memory for what is in flight."""
        answer = self.get(R.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, queue_size))
        size, offset, *rest = INFLIGHT.unpack(answer.payload)
        (fd,) = answer.fds
        assert rest == [queues, queue_size]
        return InflightRegion(fd, size, offset, queues, queue_size)

    def set_inflight(self, region: InflightRegion) -> None:
        self.set(R.SET_INFLIGHT_FD, region.pack(), [region.fd])

    def get_vring_base(self, index: int) -> int:
        """Stop a queue and return its position."""
        got, value = STATE.unpack(self.get(R.GET_VRING_BASE, STATE.pack(index, 0)).payload)
        assert got == index
        assert isinstance(value, int)
        return value

    def get_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space; b"" when the back end can't give them."""
        answer = self.get(R.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(size)).payload
        if not answer:
            return b""
        assert CONFIG.unpack_from(answer)[:2] == (offset, size)
        return answer[CONFIG.size :]

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.set(R.SET_CONFIG, CONFIG.pack(offset, len(data), flags) + data)

    def barrier(self) -> None:
        """Make sure that everything sent so far has been looked at."""
        self.get(R.GET_FEATURES)

    def wait_closed(self, timeout: float = TIMEOUT) -> list[Message]:
        """Wait until the back end closes the connection; what it said before that. TimeoutError otherwise."""
        self.socket.settimeout(timeout)
        messages = []
        try:
            while True:
                messages.append(self.receive())
        except ConnectionLost:
            return messages


class BackendChannel:
    """The front end's end of the channel for the back end's own requests."""

    CONFIG_CHANGE: Final = 2

    def __init__(self, connection: Connection, timeout: float = TIMEOUT) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        with theirs:
            connection.set(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])

    def receive(self, answer: int | None = 0) -> Message:
        """The next request; acknowledged with `answer` if it wants to be. TimeoutError when none comes."""
        data = b""
        while len(data) < HEADER.size:
            data += self._some(HEADER.size - len(data))
        request, flags, size = HEADER.unpack(data)
        payload = b""
        while len(payload) < size:
            payload += self._some(size - len(payload))
        if flags & NEED_REPLY and answer is not None:
            self.socket.sendall(HEADER.pack(request, VERSION | REPLY, 8) + U64.pack(answer))
        return Message(request, flags, payload)

    def _some(self, count: int) -> bytes:
        data = self.socket.recv(count)
        if not data:
            raise ConnectionLost("the back end has closed its channel")
        return data

    def close(self) -> None:
        self.socket.close()


@dataclass(frozen=True, slots=True)
class Region:
    """A region of guest memory as it is announced to the back end."""

    guest: int
    size: int
    user: int
    offset: int
    fd: int = -1

    def pack(self) -> bytes:
        return REGION.pack(self.guest, self.size, self.user, self.offset)


class GuestMemory:
    """Guest RAM in a memfd. Addresses are guest-physical; `user` turns them into the front end's.

    With several regions the guest sees them next to each other, but the front end's addresses and the file
    offsets go the other way round: whoever mixes address kinds up is noticed.
    """

    GUEST_BASE: Final = 0x4000_0000
    USER_BASE: Final = 0x7E00_0000_0000

    def __init__(self, size: int = 4 << 20, regions: int = 1) -> None:
        assert size % (regions * PAGE) == 0
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.size = size
        self.map = mmap.mmap(self.fd, size)
        # 2-byte stores have to be single ones: struct.pack_into writes byte by byte
        self._view = memoryview(self.map)
        self._words = self._view.cast("H")
        part = size // regions
        self.regions = [
            Region(
                self.GUEST_BASE + i * part,
                part,
                self.USER_BASE + (regions - 1 - i) * 2 * part,
                (regions - 1 - i) * part,
                self.fd,
            )
            for i in range(regions)
        ]
        self._next = self.GUEST_BASE + PAGE

    def close(self) -> None:
        self._words.release()
        self._view.release()
        self.map.close()
        os.close(self.fd)

    def _region(self, address: int, size: int) -> Region:
        for region in self.regions:
            if region.guest <= address and address + size <= region.guest + region.size:
                return region
        raise ValueError(f"{address:#x} + {size} isn't within one region")

    def _offset(self, address: int, size: int) -> int:
        region = self._region(address, size)
        return address - region.guest + region.offset

    def user(self, address: int) -> int:
        """The front end's address of a guest address."""
        region = self._region(address, 1)
        return address - region.guest + region.user

    def allocate(self, size: int, align: int = 16) -> int:
        """A piece of guest memory that nobody else has, within one region."""
        address = (self._next + align - 1) // align * align
        for region in self.regions:
            if region.guest <= address < region.guest + region.size and (address + size > region.guest + region.size):
                address = region.guest + region.size
        self._region(address, size)
        self._next = address + size
        return address

    def mark(self) -> int:
        """Where the next piece comes from; for `release`."""
        return self._next

    def release(self, mark: int) -> None:
        """Give back everything that was allocated since `mark`."""
        self._next = mark

    def read(self, address: int, size: int) -> bytes:
        data = b""
        while size:
            region = self._region(address, 1)
            take = min(size, region.guest + region.size - address)
            at = address - region.guest + region.offset
            data += self.map[at : at + take]
            address += take
            size -= take
        return data

    def write(self, address: int, data: bytes) -> None:
        while data:
            region = self._region(address, 1)
            take = min(len(data), region.guest + region.size - address)
            at = address - region.guest + region.offset
            self.map[at : at + take] = data[:take]
            address += take
            data = data[take:]

    def u16(self, address: int) -> int:
        return self._words[self._offset(address, 2) // 2]

    def set_u16(self, address: int, value: int) -> None:
        self._words[self._offset(address, 2) // 2] = value & 0xFFFF


_fence = threading.Lock()


def fence() -> None:
    """A full memory barrier: taking a lock is one on every machine there is."""
    with _fence:
        pass


@dataclass(frozen=True, slots=True)
class Buffer:
    """A piece of a chain."""

    address: int
    size: int
    writable: bool = False


class Queue(ABC):
    """The driver's half of a ring, as far as the format doesn't matter."""

    FRESH: ClassVar[int] = 0
    """The vring base of a ring that was never used."""

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool, in_order: bool) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.in_order = in_order
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.kicks = 0
        self.calls = 0
        self.desc = self.driver = self.device = 0
        self.stopped_at = self.FRESH
        """Where the back end has told that it stands."""
        self.waiting: list[int] = []
        """What is in flight, in the order in which it was added. A device that has accepted IN_ORDER keeps to it."""

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)

    @property
    @abstractmethod
    def room(self) -> int:
        """Free descriptors."""

    @abstractmethod
    def add(self, chain: Sequence[Buffer], *, indirect: bool | int = False, table: int | None = None) -> int:
        """Put a chain on the ring without publishing it; the number it is used by. `indirect`: in a table of its own,
        at `table` if that is given.
        """

    @abstractmethod
    def publish(self, *, kick: bool | None = None) -> bool:
        """Make new chains known and kick if the device wants it (or always, or never). Whether it was kicked."""

    @abstractmethod
    def take_used(self) -> list[tuple[int, int]]:
        """The completions there are: number and length of each. AssertionError for one that wasn't in flight."""

    @abstractmethod
    def ask_for_call(self) -> None:
        """Have the device call for the next completion."""

    @abstractmethod
    def restart(self) -> None:
        """Forget what was in flight and begin anew, as after a reset."""

    @property
    @abstractmethod
    def base(self) -> int:
        """What QEMU says in SET_VRING_BASE when it has to go on without having been told where."""

    def _returned(self, number: int) -> None:
        assert number in self.waiting, f"{number} is used, but not in flight: {self.waiting}"
        if self.in_order:
            assert self.waiting[0] == number, f"{number} is used before its turn: {self.waiting}"
        self.waiting.remove(number)

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)
        self.kicks += 1

    def take_calls(self) -> int:
        """How often the device has called since the last time."""
        try:
            count = os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0
        self.calls += count
        return count

    def wait_call(self, timeout: float = TIMEOUT) -> int:
        """Wait for a call; how many there were. TimeoutError when none comes."""
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError(f"no call within {timeout} s")
        return self.take_calls()

    def wait_used(self, count: int = 1, timeout: float = TIMEOUT, *, polled: bool = False) -> list[tuple[int, int]]:
        """Wait for so many completions, for calls as a driver does; `polled`: by looking. TimeoutError."""
        done: list[tuple[int, int]] = []
        deadline = time.monotonic() + timeout
        while True:
            if self.event_idx and not polled:
                self.ask_for_call()
            found = self.take_used()
            done += found
            if len(done) >= count:
                return done
            if found:
                # the call that was asked for has come; ask for the next
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{len(done)} of {count} completions within {timeout} s")
            if polled:
                time.sleep(0.0005)
            else:
                self.wait_call(left)


class SplitQueue(Queue):
    """The driver's half of a split ring."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int = 16,
        *,
        layout: Literal["modern", "legacy"] = "modern",
        align: int = PAGE,
        event_idx: bool = False,
        in_order: bool = False,
    ) -> None:
        super().__init__(memory, size, event_idx=event_idx, in_order=in_order)
        if layout == "legacy":
            used_at = (16 * size + 6 + 2 * size + align - 1) // align * align
            self.desc = memory.allocate(used_at + 6 + 8 * size, max(align, 16))
            self.driver = self.desc + 16 * size
            self.device = self.desc + used_at
        else:
            # far from each other and aligned no better than they have to be
            self.desc = memory.allocate(16 * size + 512, 16) + 256
            self.driver = memory.allocate(6 + 2 * size + 34, 2) + 34
            self.device = (memory.allocate(6 + 8 * size + 40, 4) + 36) // 4 * 4
        memory.write(self.desc, bytes(16 * size))
        memory.write(self.driver, bytes(6 + 2 * size))
        memory.write(self.device, bytes(6 + 8 * size))
        self.avail_idx = 0
        self.used_idx = 0
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}

    def restart(self, avail_idx: int = 0) -> None:
        """Forget what was in flight and go on at an index, as after a reset."""
        self.memory.set_u16(self.driver + 2, avail_idx)
        self.memory.set_u16(self.device + 2, avail_idx)
        # a device that sleeps has asked for the next kick
        self.memory.set_u16(self.device + 4 + 8 * self.size, avail_idx)
        self.avail_idx = self.used_idx = avail_idx
        self.free = list(range(self.size))
        self.chains.clear()
        self.waiting.clear()

    # --- rings as they are in memory --------------------------------------------------------------------

    def write_descriptor(self, index: int, address: int, size: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.desc + 16 * index, DESCRIPTOR.pack(address, size, flags, following))

    def put_available(self, head: int) -> None:
        """A ring entry; `publish` makes it known."""
        self.memory.set_u16(self.driver + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.waiting.append(head)

    def set_flags(self, value: int) -> None:
        """avail.flags."""
        self.memory.set_u16(self.driver, value)

    def set_used_event(self, value: int) -> None:
        self.memory.set_u16(self.driver + 4 + 2 * self.size, value)

    def ask_for_call(self) -> None:
        self.set_used_event(self.used_idx)
        fence()

    @property
    def room(self) -> int:
        return len(self.free)

    @property
    def base(self) -> int:
        """The used index: what was used is over, everything else the back end has to take (again)."""
        return self.device_used_idx

    @property
    def device_flags(self) -> int:
        """used.flags."""
        return self.memory.u16(self.device)

    @property
    def avail_event(self) -> int:
        return self.memory.u16(self.device + 4 + 8 * self.size)

    @property
    def device_used_idx(self) -> int:
        return self.memory.u16(self.device + 2)

    # --- chains -------------------------------------------------------------------------------------------

    def add(self, chain: Sequence[Buffer], *, indirect: bool | int = False, table: int | None = None) -> int:
        """As `Queue.add`; a number for `indirect` says how many descriptors stay in the ring before the table."""
        direct = list(chain)
        apart: list[Buffer] = []
        if indirect is not False:
            stay = 0 if indirect is True else indirect
            direct, apart = direct[:stay], direct[stay:]
        count = len(direct) + (1 if apart else 0)
        taken = [self.free.pop(0) for _ in range(count)]
        for i, buffer in enumerate(direct):
            last = i == count - 1
            flags = (WRITE if buffer.writable else 0) | (0 if last else NEXT)
            self.write_descriptor(taken[i], buffer.address, buffer.size, flags, 0 if last else taken[i + 1])
        if apart:
            at = self.memory.allocate(16 * len(apart), 16) if table is None else table
            for i, buffer in enumerate(apart):
                last = i == len(apart) - 1
                flags = (WRITE if buffer.writable else 0) | (0 if last else NEXT)
                entry = DESCRIPTOR.pack(buffer.address, buffer.size, flags, 0 if last else i + 1)
                self.memory.write(at + 16 * i, entry)
            self.write_descriptor(taken[-1], at, 16 * len(apart), INDIRECT)
        self.chains[taken[0]] = taken
        self.put_available(taken[0])
        return taken[0]

    def publish(self, *, kick: bool | None = None) -> bool:
        old = self.memory.u16(self.driver + 2)
        fence()
        self.memory.set_u16(self.driver + 2, self.avail_idx)
        fence()
        if kick is None:
            if self.event_idx:
                ahead = (self.avail_idx - self.avail_event - 1) & 0xFFFF
                kick = ahead < (self.avail_idx - old) & 0xFFFF
            else:
                kick = not self.device_flags & 1
        if kick:
            self.kick()
        return kick

    def take_used(self) -> list[tuple[int, int]]:
        done = []
        end = self.device_used_idx
        fence()
        while self.used_idx != end:
            at = self.device + 4 + 8 * (self.used_idx % self.size)
            head, length = struct.unpack("<II", self.memory.read(at, 8))
            done.append((head, length))
            self._returned(head)
            self.free += self.chains.pop(head, [])
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        return done


class Place(NamedTuple):
    """A place in a packed ring, and the wrap counter of who is there."""

    slot: int = 0
    wrap: int = 1

    def after(self, count: int, size: int) -> Place:
        """`count` descriptors on, at most a lap."""
        slot = self.slot + count
        return Place(slot, self.wrap) if slot < size else Place(slot - size, 1 - self.wrap)

    @property
    def bits(self) -> int:
        """As event suppression structures and vring bases have it."""
        return self.slot | self.wrap << 15

    @classmethod
    def of(cls, bits: int) -> Place:
        return cls(bits & 0x7FFF, bits >> 15 & 1)


class PackedQueue(Queue):
    """The driver's half of a packed ring."""

    FRESH = 0x8000_8000
    ENABLE: Final = 0
    DISABLE: Final = 1
    AT_PLACE: Final = 2

    def __init__(self, memory: GuestMemory, size: int = 16, *, event_idx: bool = False, in_order: bool = False) -> None:
        super().__init__(memory, size, event_idx=event_idx, in_order=in_order)
        # aligned no better than they have to be
        self.desc = memory.allocate(16 * size + 512, 32) + 16
        self.driver = (memory.allocate(64, 4) + 20) // 4 * 4
        self.device = (memory.allocate(64, 4) + 36) // 4 * 4
        self.restart()

    def restart(self) -> None:
        self.memory.write(self.desc, bytes(16 * self.size))
        self.memory.write(self.driver, bytes(4))
        self.memory.write(self.device, bytes(4))
        self.avail = Place()
        self.used = Place()
        self.ids = list(range(self.size))
        self.chains: dict[int, int] = {}
        """By buffer ID in flight: its descriptors in the ring."""
        self.waiting.clear()
        self.stopped_at = self.FRESH
        self._taken = 0
        self._first: tuple[int, int] | None = None
        self._added = 0

    @property
    def room(self) -> int:
        return self.size - self._taken

    @property
    def base(self) -> int:
        """What the back end has told the last time: nothing in memory says where it stood when it died."""
        return self.stopped_at

    @property
    def position(self) -> int:
        """The vring base when all that was added has been taken, and all that was used was seen."""
        return self.avail.bits | self.used.bits << 16

    # --- the ring as it is in memory ------------------------------------------------------------------------

    def flags_at(self, index: int) -> int:
        """Where the flags of a descriptor are."""
        return self.desc + 16 * index + 14

    def put(self, address: int, size: int, flags: int, number: int) -> None:
        """The next descriptor. Its flags come at once, except for the first since `publish`: the device looks at no
        later one before that.
        """
        at = self.desc + 16 * self.avail.slot
        self.memory.write(at, PACKED_DESCRIPTOR.pack(address, size, number, 0)[:14])
        flags |= AVAIL if self.avail.wrap else USED
        if self._first is None:
            self._first = (self.avail.slot, flags)
        else:
            fence()
            self.memory.set_u16(self.flags_at(self.avail.slot), flags)
        self.avail = self.avail.after(1, self.size)
        self._added += 1

    def set_driver_event(self, flags: int, place: Place | None = None) -> None:
        """When the device is to call."""
        if place is not None:
            self.memory.set_u16(self.driver, place.bits)
            fence()
        self.memory.set_u16(self.driver + 2, flags)

    @property
    def device_event(self) -> tuple[int, Place]:
        """When the device wants a kick."""
        flags = self.memory.u16(self.device + 2)
        fence()
        return flags & 3, Place.of(self.memory.u16(self.device))

    # --- chains ---------------------------------------------------------------------------------------------

    def add(self, chain: Sequence[Buffer], *, indirect: bool | int = False, table: int | None = None) -> int:
        assert indirect in (True, False), "a packed ring has no descriptors before a table"
        count = 1 if indirect else len(chain)
        assert count <= self.room, f"{count} descriptors, {self.room} are free"
        number = self.ids.pop(0)
        if indirect:
            at = self.memory.allocate(16 * len(chain), 16) if table is None else table
            entries = [PACKED_DESCRIPTOR.pack(one.address, one.size, 0, WRITE * one.writable) for one in chain]
            self.memory.write(at, b"".join(entries))
            self.put(at, 16 * len(chain), INDIRECT, number)
        else:
            for i, one in enumerate(chain):
                last = i == len(chain) - 1
                # the ID that counts is the last one's
                flags = WRITE * one.writable | (0 if last else NEXT)
                self.put(one.address, one.size, flags, number if last else 0x7777)
        self.chains[number] = count
        self.waiting.append(number)
        self._taken += count
        return number

    def publish(self, *, kick: bool | None = None) -> bool:
        added, self._added = self._added, 0
        if self._first is not None:
            index, flags = self._first
            self._first = None
            fence()
            self.memory.set_u16(self.flags_at(index), flags)
        fence()
        if kick is None:
            how, event = self.device_event
            kick = how == self.ENABLE
            if how == self.AT_PLACE and self.event_idx:
                # both on the device's lap or the one after it
                new = self.avail.slot
                ahead = event.slot - (0 if event.wrap == self.avail.wrap else self.size)
                kick = (new - ahead - 1) & 0xFFFF < added
        if kick:
            self.kick()
        return kick

    def take_used(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while True:
            flags = self.memory.u16(self.flags_at(self.used.slot))
            if (flags >> 7 & 1, flags >> 15) != (self.used.wrap, self.used.wrap):
                return done
            fence()
            _, length, number, _ = PACKED_DESCRIPTOR.unpack(self.memory.read(self.desc + 16 * self.used.slot, 16))
            assert bool(flags & WRITE) == (length > 0), f"flags {flags:#x} for {length} bytes"
            done.append((number, length))
            self._returned(number)
            count = self.chains.pop(number)
            self.ids.append(number)
            self._taken -= count
            self.used = self.used.after(count, self.size)

    def ask_for_call(self) -> None:
        self.set_driver_event(self.AT_PLACE, self.used)
        fence()


@dataclass(slots=True)
class Pending:
    """A request on its way."""

    queue: Queue
    head: int
    writable: list[Buffer]
    in_size: int

    def data(self) -> bytes:
        memory = self.queue.memory
        return b"".join(memory.read(buffer.address, buffer.size) for buffer in self.writable)


@dataclass(frozen=True, slots=True)
class Result:
    """A completed request."""

    status: int
    data: bytes
    used: int
    """The length in the used element."""


class InflightRegion:
    """Memory for what is in flight, laid out by the protocol. The front end keeps it for whoever serves it next."""

    SPLIT_HEADER: Final = struct.Struct("<QHHHH")
    """features, version, desc_num, last_batch_head, used_idx."""
    SPLIT_ENTRY: Final = struct.Struct("<B5xHQ")
    """inflight, next, counter."""
    PACKED_HEADER: Final = struct.Struct("<QHHHHHHBB10x")
    """features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, and both wrap counters."""
    PACKED_ENTRY: Final = struct.Struct("<BxHHHQHHIQ")
    """inflight, next, last, num, counter, id, flags, len, addr."""

    def __init__(self, fd: int, size: int, offset: int, queues: int, queue_size: int) -> None:
        self.fd = fd
        self.size = size
        self.offset = offset
        self.queues = queues
        self.queue_size = queue_size

    @classmethod
    def make(cls, size: int, queues: int, queue_size: int) -> InflightRegion:
        """One of the front end's own: the protocol wants the back end to make it, but can't tell."""
        fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd, size, 0, queues, queue_size)

    def close(self) -> None:
        os.close(self.fd)

    def pack(self) -> bytes:
        return INFLIGHT.pack(self.size, self.offset, self.queues, self.queue_size)

    def start_of(self, queue: int) -> int:
        """Where a queue's part begins in the file: it is divided evenly, in steps of 64 bytes."""
        return self.offset + queue * (self.size // self.queues // 64 * 64)

    def read(self, layout: struct.Struct, at: int) -> tuple[int, ...]:
        return layout.unpack(os.pread(self.fd, layout.size, at))

    def write(self, layout: struct.Struct, at: int, *values: int) -> None:
        os.pwrite(self.fd, layout.pack(*values), at)

    def split_header(self, queue: int = 0) -> tuple[int, ...]:
        return self.read(self.SPLIT_HEADER, self.start_of(queue))

    def packed_header(self, queue: int = 0) -> tuple[int, ...]:
        return self.read(self.PACKED_HEADER, self.start_of(queue))

    def entry_at(self, index: int, queue: int = 0, *, packed: bool = False) -> int:
        """Where an entry is in the file."""
        header, entry = (self.PACKED_HEADER, self.PACKED_ENTRY) if packed else (self.SPLIT_HEADER, self.SPLIT_ENTRY)
        return self.start_of(queue) + header.size + entry.size * index

    def in_flight(self, queue: int = 0, *, packed: bool = False) -> list[int]:
        """The entries that are marked: heads of a split ring; for a packed one numbers of the record's own."""
        size = (self.PACKED_ENTRY if packed else self.SPLIT_ENTRY).size
        count = self.queue_size
        entries = os.pread(self.fd, size * count, self.entry_at(0, queue, packed=packed))
        return [index for index in range(count) if entries[size * index]]


class DirtyLog:
    """The log of written pages: a bit for each page of guest-physical memory."""

    def __init__(self, memory: GuestMemory, size: int | None = None, offset: int = 0) -> None:
        end = max(region.guest + region.size for region in memory.regions)
        self.size = (end // PAGE + 7) // 8 if size is None else size
        self.offset = offset
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + self.size)

    def close(self) -> None:
        os.close(self.fd)

    def pack(self) -> bytes:
        return LOG.pack(self.size, self.offset)

    def take(self) -> set[int]:
        """The guest addresses of the pages that are marked; none is afterwards. Not while the device writes."""
        pages = set()
        at = self.offset
        while (at := self._next_data(at)) < self.offset + self.size:
            chunk = os.pread(self.fd, min(PAGE - at % PAGE, self.offset + self.size - at), at)
            for index, byte in enumerate(chunk):
                first = 8 * (at - self.offset + index)
                pages |= {(first + bit) * PAGE for bit in range(8) if byte >> bit & 1}
            if any(chunk):
                os.pwrite(self.fd, bytes(len(chunk)), at)
            at += len(chunk)
        return pages

    def _next_data(self, at: int) -> int:
        try:
            return os.lseek(self.fd, at, os.SEEK_DATA)
        except OSError:
            return self.offset + self.size


Q = TypeVar("Q", bound=Queue)


@dataclass
class FrontEnd(ABC, Generic[Q]):
    """A block device behind a socket. The defaults are what QEMU with a modern Linux guest does.

    `features`: bits to accept (None: all that are offered); `protocol`: likewise; protocol None and no
    PROTOCOL_FEATURES in `features`: the oldest kind of front end, whose rings are enabled from the start.
    """

    format: ClassVar[F | None] = None
    """The feature of the rings' format."""

    path: Path
    features: int | None = None
    protocol: int | None = None
    queues: int = 1
    queue_size: int = 16
    layout: Literal["modern", "legacy"] = "modern"
    align: int = PAGE
    memory_size: int = 4 << 20
    regions: int = 1
    timeout: float = TIMEOUT
    status: bool = True
    """Whether to send SET_STATUS, when there is such a message."""
    track: bool = True
    """Whether to have what is in flight recorded, when the back end can."""

    connection: Connection = field(init=False)
    memory: GuestMemory = field(init=False)
    rings: list[Q] = field(init=False, default_factory=list)
    region: InflightRegion | None = field(init=False, default=None)
    log: DirtyLog | None = field(init=False, default=None)
    offered: int = field(init=False, default=0)
    offered_protocol: int = field(init=False, default=0)
    accepted: int = field(init=False, default=0)
    agreed: int = field(init=False, default=0)
    _done: dict[tuple[int, int], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.connection = Connection(self.path, self.timeout)
        self.memory = GuestMemory(self.memory_size, self.regions)

    def close(self) -> None:
        """Hang up, as a front end that dies does."""
        self.connection.close()
        for ring in self.rings:
            ring.close()
        self.rings.clear()
        self.forget_region()
        if self.log is not None:
            self.log.close()
            self.log = None
        with suppress(OSError):
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def has(self, bit: P) -> bool:
        """Whether a protocol feature was agreed on."""
        return bool(self.agreed >> bit & 1)

    # --- start and stop -----------------------------------------------------------------------------------

    def negotiate(self) -> None:
        """What QEMU does when the device is realized."""
        connection = self.connection
        self.offered = connection.get_u64(R.GET_FEATURES)
        formats = bits(F.RING_PACKED) & ~bits(*filter(None, [self.format]))
        self.accepted = self.offered & ~bits(F.LOG_ALL) & ~formats if self.features is None else self.features
        if self.layout == "legacy":
            self.accepted &= ~bits(F.VERSION_1)
        if self.protocol is not None or self.accepted >> F.PROTOCOL_FEATURES & 1:
            self.offered_protocol = connection.get_u64(R.GET_PROTOCOL_FEATURES)
            self.agreed = self.offered_protocol & (-1 if self.protocol is None else self.protocol)
            connection.set_u64(R.SET_PROTOCOL_FEATURES, self.agreed)
            connection.reply_ack = self.has(P.REPLY_ACK)
        connection.set(R.SET_OWNER)

    def set_features(self) -> None:
        """What the driver has accepted, and FEATURES_OK as QEMU sends it."""
        self.connection.set_u64(R.SET_FEATURES, self.accepted)
        if self.status and self.has(P.STATUS):
            self.connection.set_u64(R.SET_STATUS, 8)

    def share_region(self) -> None:
        """Asked for once, handed over at every start."""
        if self.track and self.has(P.INFLIGHT):
            if self.region is None:
                self.region = self.connection.get_inflight(self.queues, self.queue_size)
            self.connection.set_inflight(self.region)

    def forget_region(self) -> None:
        """As QEMU does when the driver resets the device: the next start is with a new one."""
        if self.region is not None:
            self.region.close()
            self.region = None

    def start_log(self, log: DirtyLog | None = None) -> DirtyLog:
        """What QEMU does when a migration begins; the log."""
        self.set_log(DirtyLog(self.memory) if log is None else log)
        self.switch_log(on=True)
        assert self.log is not None
        return self.log

    def set_log(self, log: DirtyLog) -> None:
        """Replace the log. The old one isn't written any more."""
        answer = self.connection.get(R.SET_LOG_BASE, log.pack(), [log.fd])
        assert answer.u64() == 0
        if self.log not in (None, log):
            self.log.close()
        self.log = log

    def switch_log(self, *, on: bool) -> None:
        """The feature, and the flag of each ring, as QEMU does it while they run."""
        self.accepted = self.accepted & ~bits(F.LOG_ALL) | on << F.LOG_ALL
        self.connection.set_u64(R.SET_FEATURES, self.accepted)
        for index in range(len(self.rings)):
            self.set_addresses(index, flags=int(on))

    def share_memory(self) -> None:
        if self.has(P.CONFIGURE_MEM_SLOTS):
            for region in self.memory.regions:
                self.add_region(region)
        else:
            self.set_mem_table(self.memory.regions)

    def add_region(self, region: Region) -> None:
        self.connection.set(R.ADD_MEM_REG, U64.pack(0) + region.pack(), [region.fd])

    def remove_region(self, region: Region) -> None:
        self.connection.set(R.REM_MEM_REG, U64.pack(0) + region.pack())

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        payload = struct.pack("<II", len(regions), 0) + b"".join(region.pack() for region in regions)
        self.connection.set(R.SET_MEM_TABLE, payload, [region.fd for region in regions])

    @abstractmethod
    def make_ring(self, *, event_idx: bool, in_order: bool) -> Q:
        """A new ring in guest memory."""

    def make_rings(self) -> None:
        event_idx, in_order = (bool(self.accepted >> bit & 1) for bit in (F.EVENT_IDX, F.IN_ORDER))
        for _ in range(self.queues):
            self.rings.append(self.make_ring(event_idx=event_idx, in_order=in_order))

    def set_addresses(self, index: int, *, desc: int | None = None, driver: int | None = None, flags: int = 0) -> None:
        """SET_VRING_ADDR; `desc` and `driver` override the ring's own, as front-end addresses."""
        ring = self.rings[index]
        user = self.memory.user
        payload = ADDRESSES.pack(
            index,
            flags,
            user(ring.desc) if desc is None else desc,
            user(ring.device),
            user(ring.driver) if driver is None else driver,
            0,
        )
        self.connection.set(R.SET_VRING_ADDR, payload)

    def start_ring(self, index: int, base: int | None = None, *, enable: bool | None = None) -> None:
        """NUM, BASE (None: that of a ring that was never used), ADDR, CALL, KICK, and ENABLE when rings start
        disabled.
        """
        ring, connection = self.rings[index], self.connection
        connection.set_vring(R.SET_VRING_NUM, index, ring.size)
        connection.set_vring(R.SET_VRING_BASE, index, ring.FRESH if base is None else base)
        self.set_addresses(index)
        connection.set_u64(R.SET_VRING_CALL, index, [ring.call_fd])
        connection.set_u64(R.SET_VRING_KICK, index, [ring.kick_fd])
        if enable is None:
            enable = bool(self.accepted >> F.PROTOCOL_FEATURES & 1)
        if enable:
            connection.set_vring(R.SET_VRING_ENABLE, index, 1)

    def start(self) -> Self:
        """Everything, up to DRIVER_OK."""
        self.negotiate()
        self.make_rings()
        self._bring_up([ring.FRESH for ring in self.rings])
        return self

    def _bring_up(self, bases: Sequence[int]) -> None:
        self.set_features()
        self.share_region()
        self.share_memory()
        for index, base in enumerate(bases):
            self.start_ring(index, base)
        if self.status and self.has(P.STATUS):
            self.connection.set_u64(R.SET_STATUS, 15)
        self.connection.barrier()

    def reconnect(self, connection: Connection | None = None) -> None:
        """Go on over a new connection, as QEMU does when a back end has died: nobody could tell where it was, and the
        guest knows of nothing. `connection`: one that is there already.
        """
        self.connection.close()
        self.connection = Connection(self.path, self.timeout) if connection is None else connection
        before = self.accepted
        self.negotiate()
        self.accepted = before
        self._bring_up([ring.base for ring in self.rings])

    def stop_ring(self, index: int) -> int:
        base = self.connection.get_vring_base(index)
        if index < len(self.rings):
            self.rings[index].stopped_at = base
        return base

    def stop(self) -> list[int]:
        """Stop all rings, as QEMU does when a guest is paused; where they stand."""
        return [self.stop_ring(index) for index in range(self.queues)]

    # --- requests -----------------------------------------------------------------------------------------

    def submit(
        self,
        kind: int,
        sector: int = 0,
        out: bytes = b"",
        in_size: int = 0,
        *,
        queue: int = 0,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
        indirect: bool | int = False,
    ) -> Pending:
        """Put a request on the ring. `readable` and `writable` say how the bytes of either part (header and
        data; data and status) are cut into descriptors; without them as drivers without ANY_LAYOUT have to.
        """
        ring, memory = self.rings[queue], self.memory
        source = BLK_HEADER.pack(kind, 0, sector) + out
        if readable is None:
            readable = [BLK_HEADER.size] + ([len(out)] if out else [])
        if writable is None:
            writable = ([in_size] if in_size else []) + [1]
        assert sum(readable) == len(source)
        assert sum(writable) == in_size + 1
        chain = []
        at = 0
        for size in readable:
            address = memory.allocate(size, 1)
            memory.write(address, source[at : at + size])
            chain.append(Buffer(address, size))
            at += size
        places = []
        for size in writable:
            address = memory.allocate(size, 1)
            memory.write(address, b"\xa5" * size)
            places.append(Buffer(address, size, writable=True))
        head = ring.add(chain + places, indirect=indirect)
        return Pending(ring, head, places, in_size)

    def finish(self, pending: Pending, *, polled: bool = False, timeout: float | None = None) -> Result:
        """Wait for a request. Others that complete meanwhile are kept for their own `finish`."""
        ring = pending.queue
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while (id(ring), pending.head) not in self._done:
            left = max(deadline - time.monotonic(), 0)
            for head, used in ring.wait_used(1, left, polled=polled):
                self._done[id(ring), head] = used
        used = self._done.pop((id(ring), pending.head))
        data = pending.data()
        return Result(data[-1], data[:-1], used)

    def request(
        self,
        kind: int,
        sector: int = 0,
        out: bytes = b"",
        in_size: int = 0,
        *,
        queue: int = 0,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
        indirect: bool | int = False,
        kick: bool | None = None,
        polled: bool = False,
    ) -> Result:
        """One request from start to end; its memory is given back."""
        mark = self.memory.mark()
        pending = self.submit(
            kind, sector, out, in_size, queue=queue, readable=readable, writable=writable, indirect=indirect
        )
        self.rings[queue].publish(kick=kick)
        result = self.finish(pending, polled=polled)
        self.memory.release(mark)
        return result

    def read(self, sector: int, size: int, **options: int) -> bytes:
        """Sectors of the disk; AssertionError when the device refuses."""
        result = self.request(T.IN, sector, in_size=size, queue=options.get("queue", 0))
        assert result.status == OK, f"status {result.status} for a read at {sector}"
        assert result.used == size + 1
        return result.data

    def write(self, sector: int, data: bytes, **options: int) -> None:
        """Write sectors; AssertionError when the device refuses."""
        result = self.request(T.OUT, sector, data, queue=options.get("queue", 0))
        assert result.status == OK, f"status {result.status} for a write at {sector}"
        assert result.used == 1

    def flush(self) -> None:
        result = self.request(T.FLUSH)
        assert result.status == OK

    def get_id(self) -> str:
        result = self.request(T.GET_ID, in_size=20)
        assert result.status == OK
        return result.data.rstrip(b"\0").decode()

    def segments(self, kind: int, ranges: Iterable[tuple[int, int, int]]) -> Result:
        """DISCARD or WRITE_ZEROES of (sector, sectors, flags) ranges."""
        return self.request(kind, 0, b"".join(SEGMENT.pack(*one) for one in ranges))

    def capacity(self) -> int:
        """Sectors, by GET_CONFIG."""
        return int.from_bytes(self.connection.get_config(0, 8), "little")


class BlkDriver(FrontEnd[SplitQueue]):
    """With split rings."""

    def make_ring(self, *, event_idx: bool, in_order: bool) -> SplitQueue:
        return SplitQueue(
            self.memory,
            self.queue_size,
            layout=self.layout,
            align=self.align,
            event_idx=event_idx,
            in_order=in_order,
        )


class PackedBlkDriver(FrontEnd[PackedQueue]):
    """With packed rings: the member has to offer them."""

    format = F.RING_PACKED

    def make_ring(self, *, event_idx: bool, in_order: bool) -> PackedQueue:
        assert self.accepted >> F.RING_PACKED & 1
        return PackedQueue(self.memory, self.queue_size, event_idx=event_idx, in_order=in_order)
