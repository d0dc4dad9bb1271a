# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A vfio-user client: the half of the protocol that a virtual machine monitor speaks.

Plain blocking code with a time limit on every wait; no trio. Tests, benches and `vhu-legacy conformance` drive PCI
functions with it. What QEMU does is the default; what QEMU would never do (half a message, wrong sizes, fds where none
belong) is possible too, through `send_raw`, `send` and `receive`.

A server may ask for memory in the middle of anything (DMA_READ, DMA_WRITE). Such requests are answered from `memory`
whenever this client waits: for a reply, or in `wait_readable` for an eventfd.

Sizes are bytes. Fields are little-endian: the protocol says "as the host", and this one is.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from .errors import VhuError

__all__ = [
    "HEADER",
    "CommandCode",
    "DeviceInfo",
    "Disconnected",
    "DmaMemory",
    "IrqFlag",
    "IrqIndex",
    "IrqInfo",
    "Message",
    "MessageFlag",
    "ProtocolViolation",
    "Refused",
    "RegionIndex",
    "RegionInfo",
    "VersionReply",
    "VfioClient",
    "VfioError",
]

TIMEOUT: Final = 5.0
HEADER: Final = struct.Struct("<HHIII")
"""Message id, command, size with header, flags, errno."""

_DMA_MAP: Final = struct.Struct("<IIQQQ")
_DMA_UNMAP: Final = struct.Struct("<IIQQ")
_DEVICE_INFO: Final = struct.Struct("<IIII")
_REGION_INFO: Final = struct.Struct("<IIIIQQ")
_CAPABILITY: Final = struct.Struct("<HHI")
_SPARSE_MMAP: Final = struct.Struct("<HHIII")
_AREA: Final = struct.Struct("<QQ")
_IRQ_INFO: Final = struct.Struct("<IIII")
_IRQ_SET: Final = struct.Struct("<IIIII")
_ACCESS: Final = struct.Struct("<QII")
_DMA_ACCESS: Final = struct.Struct("<QQ")
_WRITE_ENTRY: Final = struct.Struct("<QII8s")
_VERSION: Final = struct.Struct("<HH")

# What one reply may at most carry here; a server that announces more has lost count.
_MAX_MESSAGE: Final = 64 << 20
_ANCILLARY: Final = socket.CMSG_SPACE(253 * 4)


class CommandCode(IntEnum):
    """Message numbers."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15


class MessageFlag(IntFlag):
    """The header's flags; the low four bits are the type."""

    REPLY = 1
    TYPE_MASK = 0xF
    NO_REPLY = 1 << 4
    ERROR = 1 << 5


class RegionIndex(IntEnum):
    """Regions of a PCI function; BARs are 0 to 5."""

    BAR0 = 0
    ROM = 6
    CONFIG = 7
    VGA = 8


class IrqIndex(IntEnum):
    """Interrupt types of a PCI function."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqFlag(IntFlag):
    """Of DEVICE_SET_IRQS: one kind of data, one action."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    MASK = 1 << 3
    UNMASK = 1 << 4
    TRIGGER = 1 << 5


DEVICE_RESETS: Final = 1 << 0
"""In a device's flags: DEVICE_RESET is supported."""
DEVICE_IS_PCI: Final = 1 << 1

REGION_READABLE: Final = 1 << 0
REGION_WRITABLE: Final = 1 << 1
REGION_MMAP: Final = 1 << 2
REGION_CAPS: Final = 1 << 3

_CAP_SPARSE_MMAP: Final = 1


class VfioError(VhuError):
    """Root of what goes wrong between this client and its server."""


class Disconnected(VfioError):
    """The server has closed the connection, or isn't there."""


class ProtocolViolation(VfioError):
    """The server has sent what the protocol doesn't allow."""


class Refused(VfioError):
    """The server has answered a command with an error.

    `errno` is the number it gave, 0 for none.
    """

    def __init__(self, command: int, number: int) -> None:
        name = CommandCode(command).name if command in set(CommandCode) else str(command)
        super().__init__(f"{name}: {errno.errorcode.get(number, number)}")
        self.command = command
        self.errno = number


class DmaMemory(Protocol):
    """Memory that a server may reach through this client only. Both raise ValueError for what isn't there."""

    def dma_read(self, address: int, size: int) -> bytes: ...

    def dma_write(self, address: int, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Message:
    """A message from the server. The fds belong to whoever holds this."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        return self.flags & MessageFlag.TYPE_MASK == MessageFlag.REPLY

    @property
    def failed(self) -> bool:
        return bool(self.flags & MessageFlag.ERROR)

    def close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class VersionReply:
    """What was agreed on."""

    major: int
    minor: int
    capabilities: dict[str, Any]

    @property
    def max_msg_fds(self) -> int:
        return int(self.capabilities.get("max_msg_fds", 1))

    @property
    def max_data_xfer_size(self) -> int:
        return int(self.capabilities.get("max_data_xfer_size", 1 << 20))

    @property
    def write_multiple(self) -> bool:
        return bool(self.capabilities.get("write_multiple", False))


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    flags: int
    regions: int
    irqs: int


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A region; size 0: there is none of that index."""

    index: int
    flags: int
    size: int
    offset: int
    """Where to map `fd`."""
    capabilities: bytes = b""
    """What follows the fixed part, as it came."""
    fd: int | None = None
    """The caller's to close."""
    areas: tuple[tuple[int, int], ...] = ()
    """What can be mapped: offset in the region, and bytes."""


@dataclass(frozen=True, slots=True)
class IrqInfo:
    index: int
    flags: int
    count: int


QEMU_CAPABILITIES: Final[dict[str, Any]] = {
    "max_msg_fds": 16,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "migration": {"pgsize": 4096, "max_bitmap_size": 256 << 20},
    "write_multiple": True,
}
"""What stock QEMU proposes."""


@dataclass(slots=True)
class Counters:
    """What this client has seen."""

    sent: int = 0
    received: int = 0
    dma_reads: int = 0
    dma_writes: int = 0
    dma_refused: int = 0


def _mappable_areas(info: bytes, flags: int, cap_offset: int, size: int) -> tuple[tuple[int, int], ...]:
    """Those that a whole region info lists, or else all of the region."""
    if not flags & REGION_MMAP:
        return ()
    at = cap_offset if flags & REGION_CAPS else 0
    while at:
        if at + _CAPABILITY.size > len(info):
            raise ProtocolViolation(f"a region's capability at {at} of {len(info)} bytes")
        kind, _version, following = _CAPABILITY.unpack_from(info, at)
        if kind == _CAP_SPARSE_MMAP:
            if at + _SPARSE_MMAP.size > len(info):
                raise ProtocolViolation("a list of areas without its length")
            *_, count, _reserved = _SPARSE_MMAP.unpack_from(info, at)
            listed = info[at + _SPARSE_MMAP.size :]
            if count * _AREA.size > len(listed):
                raise ProtocolViolation(f"{count} areas in {len(listed)} bytes")
            areas = tuple(_AREA.unpack_from(listed, number * _AREA.size) for number in range(count))
            if any(offset + length > size for offset, length in areas):
                raise ProtocolViolation(f"areas {areas} in a region of {size:#x} bytes")
            return areas
        if following and following <= at:
            raise ProtocolViolation(f"a region's capability at {at} is followed by one at {following}")
        at = following
    return ((0, size),)


class VfioClient:
    """One connection to one PCI function.

    Every call that waits raises TimeoutError after `timeout` seconds; the stream is of no more use then, as a late
    reply would be taken for another's. All raise Disconnected when the server is gone.

    Not for two threads at a time.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        timeout: float = TIMEOUT,
        negotiate: bool = True,
        capabilities: dict[str, Any] | None = None,
    ) -> None:
        """Connect, and unless `negotiate` is false agree on the version. Raises VfioError, TimeoutError."""
        self.path: Final = Path(path)
        self.timeout = timeout
        self.memory: DmaMemory | None = None
        """Where DMA_READ and DMA_WRITE go; None refuses them."""
        self.counters: Final = Counters()
        self.version: VersionReply | None = None
        self._next_id = 1
        self._replies: dict[int, Message] = {}
        self._abandoned: set[int] = set()
        self._socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            if negotiate:
                self.negotiate(capabilities)
        except OSError as error:
            self._socket.close()
            if isinstance(error, TimeoutError):
                raise
            raise Disconnected(f"{path}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._socket.close()
        for reply in self._replies.values():
            reply.close_fds()
        self._replies.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    # --- bytes and messages ------------------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, with fds on the first of them."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], ancillary)
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Disconnected(f"{self.path}: {error.strerror}") from error

    def encode(
        self,
        command: int,
        payload: bytes = b"",
        *,
        message_id: int | None = None,
        size: int | None = None,
        flags: int = 0,
        error: int = 0,
    ) -> tuple[int, bytes]:
        """A message's id and bytes. `size` overrides what would be right."""
        if message_id is None:
            # 0 is never used: a server that answers with an id of its own is noticed.
            message_id = self._next_id
            self._next_id = self._next_id % 0xFFFF + 1
        right = HEADER.size + len(payload)
        return message_id, HEADER.pack(message_id, command, right if size is None else size, flags, error) + payload

    def send(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        size: int | None = None,
        flags: int = 0,
        message_id: int | None = None,
    ) -> int:
        """Send a message and wait for nothing; its id."""
        number, data = self.encode(command, payload, size=size, flags=flags, message_id=message_id)
        self.send_raw(data, fds)
        self.counters.sent += 1
        return number

    def _exactly(self, count: int, fds: list[int], deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.path}: {len(data)} of {count} bytes of a message within {self.timeout} s")
            self._socket.settimeout(left)
            try:
                part, ancillary, flags, _ = self._socket.recvmsg(count - len(data), _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError as error:
                raise Disconnected(f"{self.path}: {error.strerror}") from error
            finally:
                with suppress(OSError):
                    self._socket.settimeout(self.timeout)
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds += struct.unpack(f"{len(value) // 4}i", value[: len(value) // 4 * 4])
            if flags & socket.MSG_CTRUNC:
                raise ProtocolViolation("more file descriptors than a message can carry")
            if not part:
                what = f"after {len(data)} of {count} bytes of a message" if data else "between two messages"
                raise Disconnected(f"{self.path}: end of stream {what}")
            data += part
        return bytes(data)

    def receive(self, timeout: float | None = None) -> Message:
        """The next message, whatever it is. Raises ProtocolViolation for a size that can't be."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        fds: list[int] = []
        try:
            number, command, size, flags, error = HEADER.unpack(self._exactly(HEADER.size, fds, deadline))
            if not HEADER.size <= size <= _MAX_MESSAGE:
                raise ProtocolViolation(f"message {number}, command {command}: a size of {size} bytes")
            payload = self._exactly(size - HEADER.size, fds, deadline)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self.counters.received += 1
        return Message(number, command, flags, error, payload, tuple(fds))

    def _take(self, message: Message) -> None:
        """Put a reply where its waiter finds it; answer a command of the server's."""
        if not message.is_reply:
            self._serve(message)
        elif message.id in self._abandoned:
            self._abandoned.discard(message.id)
            message.close_fds()
        elif message.id in self._replies:
            message.close_fds()
            raise ProtocolViolation(f"two replies to message {message.id}")
        else:
            self._replies[message.id] = message

    def reply_to(self, message_id: int, command: int, timeout: float | None = None) -> Message:
        """Wait for a reply, error or not; meanwhile the server's own commands are answered.

        Raises ProtocolViolation for a reply that names another command, or carries data with an error.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while message_id not in self._replies:
            self._take(self.receive(max(deadline - time.monotonic(), 0.0)))
        reply = self._replies.pop(message_id)
        if reply.command != command:
            reply.close_fds()
            raise ProtocolViolation(f"reply to command {command} names command {reply.command}")
        if reply.failed and reply.payload:
            reply.close_fds()
            raise ProtocolViolation(f"an error reply to command {command} with {len(reply.payload)} bytes of data")
        return reply

    def abandon(self, message_id: int) -> None:
        """Throw the reply to a message away, when it comes or if it is there."""
        reply = self._replies.pop(message_id, None)
        if reply is None:
            self._abandoned.add(message_id)
        else:
            reply.close_fds()

    def call(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), timeout: float | None = None
    ) -> Message:
        """Send a command and wait for its reply. Raises Refused."""
        reply = self.reply_to(self.send(command, payload, fds), command, timeout)
        if reply.failed:
            reply.close_fds()
            raise Refused(command, reply.error)
        return reply

    def _plain(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), timeout: float | None = None
    ) -> bytes:
        """As `call`, for commands whose replies bring no fds."""
        reply = self.call(command, payload, fds, timeout)
        if reply.fds:
            reply.close_fds()
            raise ProtocolViolation(f"{len(reply.fds)} file descriptors with a reply to command {command}")
        return reply.payload

    def wait_readable(self, fds: Iterable[int], timeout: float) -> list[int]:
        """Wait until one of some fds (eventfds, usually) is readable; those that are, none after `timeout` seconds.

        Meanwhile the server's own commands are answered.
        """
        wanted = list(fds)
        deadline = time.monotonic() + timeout
        poll = select.poll()
        for fd in wanted:
            poll.register(fd, select.POLLIN)
        poll.register(self._socket.fileno(), select.POLLIN)
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            ready = {fd for fd, _ in poll.poll(math.ceil(left * 1000))}
            # The server's command may be what the event waits for, or come after it: both are served.
            if self._socket.fileno() in ready:
                self._take(self.receive())
            found = [fd for fd in wanted if fd in ready]
            if found or not ready:
                return found

    def pump(self) -> int:
        """Serve what the server has asked for so far, without waiting; how many messages that were."""
        count = 0
        while select.select([self._socket], [], [], 0)[0]:
            self._take(self.receive())
            count += 1
        return count

    def wait_closed(self, timeout: float | None = None) -> list[Message]:
        """Wait until the server closes the connection; what it said before that. Raises TimeoutError."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        messages: list[Message] = []
        try:
            while (left := deadline - time.monotonic()) > 0:
                messages.append(self.receive(left))
        except Disconnected:
            return messages
        raise TimeoutError(f"{self.path}: still connected after {limit} s")

    def _serve(self, message: Message) -> None:
        """Answer DMA_READ and DMA_WRITE, with the 64-bit count of QEMU 11.1."""
        answer = b""
        error = 0
        message.close_fds()
        if message.fds:
            error = errno.EINVAL
        elif message.command not in (CommandCode.DMA_READ, CommandCode.DMA_WRITE):
            error = errno.ENOSYS
        elif len(message.payload) < _DMA_ACCESS.size:
            error = errno.EINVAL
        else:
            address, count = _DMA_ACCESS.unpack_from(message.payload)
            data = message.payload[_DMA_ACCESS.size :]
            writes = message.command == CommandCode.DMA_WRITE
            try:
                if self.memory is None:
                    error = errno.ENODEV
                elif len(data) != (count if writes else 0):
                    error = errno.EINVAL
                elif count > 1 << 20:
                    error = errno.E2BIG
                elif writes:
                    self.memory.dma_write(address, data)
                    self.counters.dma_writes += 1
                    answer = message.payload[: _DMA_ACCESS.size]
                else:
                    answer = message.payload + self.memory.dma_read(address, count)
                    self.counters.dma_reads += 1
            except ValueError:
                error = errno.ENODEV
        if error:
            self.counters.dma_refused += 1
            answer = b""
        if not message.flags & MessageFlag.NO_REPLY:
            flags = MessageFlag.REPLY | (MessageFlag.ERROR if error else 0)
            _, data = self.encode(message.command, answer, message_id=message.id, flags=flags, error=error)
            self.send_raw(data)

    # --- commands -----------------------------------------------------------------------------------------------

    @staticmethod
    def version_payload(capabilities: dict[str, Any] | None, major: int = 0, minor: int = 0) -> bytes:
        """VERSION's payload; None: without any capabilities."""
        data = b""
        if capabilities is not None:
            data = json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode() + b"\0"
        return _VERSION.pack(major, minor) + data

    def negotiate(self, capabilities: dict[str, Any] | None = None) -> VersionReply:
        """VERSION, as QEMU does it. Raises ProtocolViolation for an answer QEMU wouldn't take."""
        proposal = QEMU_CAPABILITIES if capabilities is None else capabilities
        payload = self._plain(CommandCode.VERSION, self.version_payload(proposal))
        if len(payload) < _VERSION.size:
            raise ProtocolViolation(f"a version reply of {len(payload)} bytes")
        major, minor = _VERSION.unpack_from(payload)
        if (major, minor) != (0, 0):
            raise ProtocolViolation(f"version {major}.{minor} in answer to 0.0")
        text = payload[_VERSION.size :]
        agreed: dict[str, Any] = {}
        if text:
            if not text.endswith(b"\0"):
                raise ProtocolViolation("the version reply's text has no end")
            try:
                agreed = json.loads(text[:-1]).get("capabilities", {})
            except (ValueError, AttributeError) as error:
                raise ProtocolViolation(f"the version reply's text: {error}") from error
        self.version = VersionReply(major, minor, agreed)
        if not 1 <= self.version.max_msg_fds <= 16:
            raise ProtocolViolation(f"max_msg_fds = {self.version.max_msg_fds}; 1 to 16 are possible")
        return self.version

    @property
    def _fds_per_message(self) -> int:
        return 1 if self.version is None else self.version.max_msg_fds

    @staticmethod
    def dma_map_payload(
        iova: int, size: int, *, offset: int = 0, readable: bool = True, writable: bool = True, argsz: int = 32
    ) -> bytes:
        return _DMA_MAP.pack(argsz, (1 if readable else 0) | (2 if writable else 0), offset, iova, size)

    def dma_map(
        self,
        iova: int,
        size: int,
        *,
        fd: int | None = None,
        offset: int = 0,
        readable: bool = True,
        writable: bool = True,
    ) -> None:
        """Let the server use `size` bytes at `iova`: from `offset` in the file `fd`, or through `memory`."""
        payload = self.dma_map_payload(iova, size, offset=offset, readable=readable, writable=writable)
        self._plain(CommandCode.DMA_MAP, payload, () if fd is None else [fd])

    @staticmethod
    def dma_unmap_payload(iova: int, size: int, *, flags: int = 0) -> bytes:
        return _DMA_UNMAP.pack(_DMA_UNMAP.size, flags, iova, size)

    def dma_unmap(self, iova: int, size: int) -> None:
        """Take memory back; the server has let go of it when this returns."""
        self._plain(CommandCode.DMA_UNMAP, self.dma_unmap_payload(iova, size))

    def device_info(self) -> DeviceInfo:
        payload = self._plain(CommandCode.DEVICE_GET_INFO, _DEVICE_INFO.pack(_DEVICE_INFO.size, 0, 0, 0))
        if len(payload) < _DEVICE_INFO.size:
            raise ProtocolViolation(f"device info of {len(payload)} bytes")
        _argsz, flags, regions, irqs = _DEVICE_INFO.unpack_from(payload)
        return DeviceInfo(flags, regions, irqs)

    def region_info(self, index: int) -> RegionInfo:
        """A region; asks again with more room when there are capabilities, as QEMU does."""
        room = _REGION_INFO.size
        for _ in range(2):
            reply = self.call(CommandCode.DEVICE_GET_REGION_INFO, _REGION_INFO.pack(room, 0, index, 0, 0, 0))
            if len(reply.payload) < _REGION_INFO.size or len(reply.payload) > room or len(reply.fds) > 1:
                reply.close_fds()
                what = f"{len(reply.payload)} bytes and {len(reply.fds)} fds"
                raise ProtocolViolation(f"region info {index}: {what} for an argsz of {room}")
            argsz, flags, got, cap_offset, size, offset = _REGION_INFO.unpack_from(reply.payload)
            if got != index:
                reply.close_fds()
                raise ProtocolViolation(f"region info of {got} instead of {index}")
            if flags & REGION_CAPS and not _REGION_INFO.size <= cap_offset <= argsz:
                # Already when there is no room for them: QEMU gives the device up.
                reply.close_fds()
                raise ProtocolViolation(f"region info {index}: capabilities at {cap_offset} of {argsz} bytes")
            if argsz <= room:
                break
            reply.close_fds()
            room = argsz
        try:
            areas = _mappable_areas(reply.payload, flags, cap_offset, size)
        except ProtocolViolation:
            reply.close_fds()
            raise
        fd = reply.fds[0] if reply.fds else None
        return RegionInfo(index, flags, size, offset, reply.payload[_REGION_INFO.size :], fd, areas)

    def map_region(self, index: int) -> dict[int, mmap.mmap]:
        """Map what can be mapped of a region; by offset in the region, the caller's to close.

        Raises ProtocolViolation when a region that can be mapped comes without its fd.
        """
        region = self.region_info(index)
        if region.fd is None:
            if region.areas:
                raise ProtocolViolation(f"region {index} can be mapped, but there is no fd")
            return {}
        mapped: dict[int, mmap.mmap] = {}
        access = (mmap.PROT_READ if region.flags & REGION_READABLE else 0) | (
            mmap.PROT_WRITE if region.flags & REGION_WRITABLE else 0
        )
        try:
            for offset, size in region.areas:
                mapped[offset] = mmap.mmap(region.fd, size, mmap.MAP_SHARED, access, offset=region.offset + offset)
        except BaseException:
            for area in mapped.values():
                area.close()
            raise
        finally:
            os.close(region.fd)
        return mapped

    def irq_info(self, index: int) -> IrqInfo:
        payload = self._plain(CommandCode.DEVICE_GET_IRQ_INFO, _IRQ_INFO.pack(_IRQ_INFO.size, 0, index, 0))
        if len(payload) < _IRQ_INFO.size:
            raise ProtocolViolation(f"interrupt info of {len(payload)} bytes")
        _argsz, flags, got, count = _IRQ_INFO.unpack_from(payload)
        if got != index:
            raise ProtocolViolation(f"interrupt info of {got} instead of {index}")
        return IrqInfo(index, flags, count)

    @staticmethod
    def irqs_payload(flags: int, index: int, start: int, count: int, data: bytes = b"") -> bytes:
        return _IRQ_SET.pack(_IRQ_SET.size + len(data), flags, index, start, count) + data

    def set_irqs(
        self, flags: int, index: int, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """One DEVICE_SET_IRQS, as it is said."""
        self._plain(CommandCode.DEVICE_SET_IRQS, self.irqs_payload(flags, index, start, count, data), fds)

    def set_eventfds(self, index: int, start: int, fds: Sequence[int | None]) -> None:
        """Have interrupts from `start` on signalled through eventfds, None: not at all.

        In as many messages as the agreed number of fds takes; each has either an fd for all of its interrupts or for
        none, since a message can't say which of them an fd is for.
        """
        at = 0
        while at < len(fds):
            end = at
            with_fds = fds[at] is not None
            while end < len(fds) and (fds[end] is not None) == with_fds and end - at < self._fds_per_message:
                end += 1
            self.set_irqs(
                IrqFlag.DATA_EVENTFD | IrqFlag.TRIGGER,
                index,
                start + at,
                end - at,
                fds=[fd for fd in fds[at:end] if fd is not None],
            )
            at = end

    def disable_irqs(self, index: int) -> None:
        """All interrupts of a type, at once."""
        self.set_irqs(IrqFlag.DATA_NONE | IrqFlag.TRIGGER, index, 0, 0)

    def mask(self, index: int, start: int = 0, count: int = 1) -> None:
        self.set_irqs(IrqFlag.DATA_NONE | IrqFlag.MASK, index, start, count)

    def unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        self.set_irqs(IrqFlag.DATA_NONE | IrqFlag.UNMASK, index, start, count)

    @staticmethod
    def access_payload(region: int, offset: int, count: int, data: bytes = b"") -> bytes:
        return _ACCESS.pack(offset, region, count) + data

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Exactly `count` bytes. Raises ProtocolViolation when the server sends another number of them."""
        payload = self._plain(CommandCode.REGION_READ, self.access_payload(region, offset, count))
        if payload[: _ACCESS.size] != _ACCESS.pack(offset, region, count) or len(payload) != _ACCESS.size + count:
            raise ProtocolViolation(f"region read {region}+{offset:#x}: not the {count} bytes asked for")
        return payload[_ACCESS.size :]

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write, and wait for the answer unless `posted`."""
        payload = self.access_payload(region, offset, len(data), data)
        if posted:
            self.send(CommandCode.REGION_WRITE, payload, flags=MessageFlag.NO_REPLY)
            return
        answer = self._plain(CommandCode.REGION_WRITE, payload)
        if answer != payload[: _ACCESS.size]:
            raise ProtocolViolation(f"region write {region}+{offset:#x}: the reply doesn't repeat what was asked")

    @staticmethod
    def write_multi_payload(writes: Sequence[tuple[int, int, bytes]], count: int | None = None) -> bytes:
        """`writes`: region, offset, data of up to 8 bytes."""
        body = b"".join(_WRITE_ENTRY.pack(offset, region, len(data), data) for region, offset, data in writes)
        return struct.pack("<Q", len(writes) if count is None else count) + body

    def write_multi(self, writes: Sequence[tuple[int, int, bytes]], *, posted: bool = True) -> None:
        """Several writes in one message, as QEMU does when its socket is full. `writes`: region, offset, data."""
        payload = self.write_multi_payload(writes)
        if posted:
            self.send(CommandCode.REGION_WRITE_MULTI, payload, flags=MessageFlag.NO_REPLY)
        else:
            self._plain(CommandCode.REGION_WRITE_MULTI, payload)

    def reset(self, timeout: float | None = None) -> None:
        """DEVICE_RESET."""
        if self._plain(CommandCode.DEVICE_RESET, timeout=timeout):
            raise ProtocolViolation("a reset's reply with data")
