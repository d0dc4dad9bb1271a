# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A scripted virtio PCI driver on top of `vfio_client`: what a guest's kernel does, step by step and under control.

Plain blocking code with a time limit on every wait; no trio. From the bottom:

- `GuestMemory`: a memfd as guest RAM, with or without its fd given to the server;
- `SplitRing`, `PackedRing`: the driver's half of a virtqueue;
- `PciFunction`: configuration space, BARs, capabilities, MSI-X and INTx;
- `ModernDevice`: registers of virtio 1.x; `LegacyDevice`: the 20- or 24-byte header, wherever that is reached;
- `Queue`: a ring with its doorbell and its interrupt; `AdminQueue`, `BlkDriver`: what is said through one.
"""

from __future__ import annotations

import enum
import mmap
import os
import select
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Protocol, Self

from . import pci
from .admin import COMMAND_HEADER_SIZE, RESULT_HEADER_SIZE, Command
from .errors import VhuError
from .vfio_client import TIMEOUT, IrqFlag, IrqIndex, RegionIndex, VfioClient

__all__ = [
    "NO_VECTOR",
    "PAGE",
    "AdminQueue",
    "BarRegisters",
    "BlkDriver",
    "BlkResult",
    "BlkType",
    "Buffer",
    "Common",
    "Completion",
    "DriverError",
    "Feature",
    "Framing",
    "GuestMemory",
    "Legacy",
    "LegacyDevice",
    "LegacyRegisters",
    "ModernDevice",
    "PackedRing",
    "PciFunction",
    "Pending",
    "Queue",
    "Ring",
    "RingFull",
    "SplitRing",
    "Status",
    "Used",
    "Virtqueue",
    "legacy_ring_size",
]

PAGE: Final = 4096
SECTOR: Final = 512
NO_VECTOR: Final = 0xFFFF
POISON: Final = 0xA5
"""What the device's buffers are filled with before the device gets them."""

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_BLK_HEADER: Final = struct.Struct("<IIQ")

_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_PACKED_AVAIL: Final = 1 << 7
_PACKED_USED: Final = 1 << 15

_ALIGN: Final = 4096


class DriverError(VhuError):
    """A device that a driver can't go on with: it breaks a rule, or lacks what is needed."""


class RingFull(DriverError):
    """A ring has no room for a chain: something has to come back first."""


class Feature(enum.IntEnum):
    """Feature bits."""

    BLK_SEG_MAX = 2
    BLK_GEOMETRY = 4
    BLK_RO = 5
    BLK_BLK_SIZE = 6
    BLK_FLUSH = 9
    BLK_TOPOLOGY = 10
    BLK_CONFIG_WCE = 11
    BLK_MQ = 12
    BLK_DISCARD = 13
    BLK_WRITE_ZEROES = 14
    BLK_ZONED = 17
    NOTIFY_ON_EMPTY = 24
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41


class Status(enum.IntFlag):
    """device_status."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Common(enum.IntEnum):
    """Offsets in struct virtio_pci_common_cfg."""

    DEVICE_FEATURE_SELECT = 0
    DEVICE_FEATURE = 4
    DRIVER_FEATURE_SELECT = 8
    DRIVER_FEATURE = 12
    CONFIG_VECTOR = 16
    NUM_QUEUES = 18
    STATUS = 20
    CONFIG_GENERATION = 21
    QUEUE_SELECT = 22
    QUEUE_SIZE = 24
    QUEUE_VECTOR = 26
    QUEUE_ENABLE = 28
    QUEUE_NOTIFY_OFF = 30
    QUEUE_DESC = 32
    QUEUE_DRIVER = 40
    QUEUE_DEVICE = 48
    QUEUE_NOTIF_CONFIG_DATA = 56
    QUEUE_RESET = 58
    ADMIN_QUEUE_INDEX = 60
    ADMIN_QUEUE_NUM = 62


class Legacy(enum.IntEnum):
    """Offsets in the legacy common configuration; the last two exist while MSI-X is enabled."""

    DEVICE_FEATURES = 0
    DRIVER_FEATURES = 4
    QUEUE_ADDRESS = 8
    QUEUE_SIZE = 12
    QUEUE_SELECT = 14
    QUEUE_NOTIFY = 16
    STATUS = 18
    ISR = 19
    CONFIG_VECTOR = 20
    QUEUE_VECTOR = 22


class BlkType(enum.IntEnum):
    """Block request types."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


def mask(*numbers: int) -> int:
    """The value with these bits set."""
    value = 0
    for number in numbers:
        value |= 1 << number
    return value


# --- memory ---------------------------------------------------------------------------------------------------------


_fence = threading.Lock()


def fence() -> None:
    """A full memory barrier: taking a lock is one on every machine there is."""
    with _fence:
        pass


class GuestMemory:
    """Guest RAM in a memfd, at `base` in the device's eyes.

    `shared`: give the server the fd (`attach`). Otherwise the server has to ask the client for each access.
    """

    def __init__(self, size: int = 4 << 20, base: int = 0x4000_0000, *, shared: bool = True) -> None:
        if size % PAGE or base % PAGE:
            raise ValueError("guest memory comes in pages")
        self.base: Final = base
        self.size: Final = size
        self.shared: Final = shared
        self.fd: Final = os.memfd_create("vhu-guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map: Final = mmap.mmap(self.fd, size)
        # 2-byte stores have to be single ones: struct.pack_into writes byte by byte.
        self._view: Final = memoryview(self.map)
        self._words: Final = self._view.cast("H")
        self._next = base + PAGE

    def close(self) -> None:
        """Idempotent. What others have mapped of it stays theirs."""
        if not self.map.closed:
            self._words.release()
            self._view.release()
            self.map.close()
            os.close(self.fd)

    def attach(self, client: VfioClient) -> None:
        """DMA_MAP of all of it."""
        client.memory = self
        client.dma_map(self.base, self.size, fd=self.fd if self.shared else None)

    def detach(self, client: VfioClient) -> None:
        """DMA_UNMAP of all of it."""
        client.dma_unmap(self.base, self.size)

    def _at(self, address: int, size: int) -> int:
        if not self.base <= address <= address + size <= self.base + self.size:
            raise ValueError(f"{address:#x} + {size} isn't guest memory")
        return address - self.base

    def read(self, address: int, size: int) -> bytes:
        at = self._at(address, size)
        return self.map[at : at + size]

    def write(self, address: int, data: bytes) -> None:
        at = self._at(address, len(data))
        self.map[at : at + len(data)] = data

    dma_read = read
    dma_write = write

    def u16(self, address: int) -> int:
        return self._words[self._at(address, 2) // 2]

    def set_u16(self, address: int, value: int) -> None:
        self._words[self._at(address, 2) // 2] = value & 0xFFFF

    def allocate(self, size: int, align: int = 16) -> int:
        """A piece that nobody else has. MemoryError when there is no room."""
        address = -(-self._next // align) * align
        if address + size > self.base + self.size:
            raise MemoryError(f"no {size} bytes of guest memory left")
        self._next = address + size
        return address

    def clear(self) -> None:
        """Zero all of it and give everything back."""
        self.map[:] = bytes(self.size)
        self._next = self.base + PAGE

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Give back, in the end, what is allocated within."""
        mark = self._next
        try:
            yield
        finally:
            self._next = mark


# --- rings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Buffer:
    """A piece of a chain."""

    address: int
    size: int
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Used:
    """A chain that the device has given back."""

    id: int
    length: int


class Ring(ABC):
    """The driver's half of a virtqueue."""

    desc: int
    """Addresses of the three areas."""
    driver: int
    device: int

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool) -> None:
        self.memory: Final = memory
        self.size: Final = size
        self.event_idx: Final = event_idx

    @abstractmethod
    def add(self, chain: Sequence[Buffer], *, indirect: bool | int = False) -> int:
        """Put a chain on the ring without making it known; its id.

        `indirect`: in a table of its own; a number says how many descriptors stay in the ring before it.
        """

    @abstractmethod
    def publish(self) -> bool:
        """Make added chains known; whether the device wants to be notified."""

    @abstractmethod
    def take_used(self) -> list[Used]:
        """What the device has given back since the last time, in its order."""

    @abstractmethod
    def want_interrupts(self, wanted: bool) -> None:
        """Ask for interrupts, or for none; with EVENT_IDX: for one at the next completion."""

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Chains that the device hasn't given back."""

    def _indirect_table(self, chain: Sequence[Buffer], *, chained: bool) -> Buffer:
        at = self.memory.allocate(16 * len(chain), 16)
        for i, buffer in enumerate(chain):
            flags = _WRITE if buffer.writable else 0
            if chained and i + 1 < len(chain):
                entry = _DESCRIPTOR.pack(buffer.address, buffer.size, flags | _NEXT, i + 1)
            elif chained:
                entry = _DESCRIPTOR.pack(buffer.address, buffer.size, flags, 0)
            else:
                entry = struct.pack("<QIHH", buffer.address, buffer.size, 0, flags)
            self.memory.write(at + 16 * i, entry)
        return Buffer(at, 16 * len(chain))

    @staticmethod
    def _cut(chain: Sequence[Buffer], indirect: bool | int) -> tuple[list[Buffer], list[Buffer]]:
        if indirect is False:
            return list(chain), []
        stay = 0 if indirect is True else indirect
        return list(chain[:stay]), list(chain[stay:])


def legacy_ring_size(size: int) -> int:
    """Bytes of a legacy ring of so many descriptors, aligned as it has to be."""
    return _up(18 * size + 6) + _up(8 * size + 6)


def _up(value: int) -> int:
    return (value + _ALIGN - 1) & ~(_ALIGN - 1)


class SplitRing(Ring):
    """A split virtqueue, in the modern layout (three areas anywhere) or the legacy one (one area, page aligned)."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        layout: Literal["modern", "legacy"] = "modern",
        event_idx: bool = False,
    ) -> None:
        super().__init__(memory, size, event_idx=event_idx)
        self.layout: Final = layout
        if layout == "legacy":
            self.desc = memory.allocate(legacy_ring_size(size), _ALIGN)
            self.driver = self.desc + 16 * size
            self.device = self.desc + _up(18 * size + 6)
        else:
            # Aligned no better than they have to be.
            self.desc = memory.allocate(16 * size + 16, 32) + 16
            self.driver = memory.allocate(2 * size + 6 + 2, 16) + 2
            self.device = memory.allocate(8 * size + 6 + 4, 16) + 4
        for address, length in ((self.desc, 16 * size), (self.driver, 2 * size + 6), (self.device, 8 * size + 6)):
            memory.write(address, bytes(length))
        self.avail_idx = 0
        self.used_idx = 0
        self._published = 0
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}

    # The ring as it is in memory, also for those who want it wrong.

    def write_descriptor(self, index: int, address: int, size: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.desc + 16 * index, _DESCRIPTOR.pack(address, size, flags, following))

    def put_available(self, head: int) -> None:
        """A ring entry; `publish` makes it known."""
        self.memory.set_u16(self.driver + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    @property
    def device_idx(self) -> int:
        """used.idx."""
        return self.memory.u16(self.device + 2)

    @property
    def device_flags(self) -> int:
        """used.flags."""
        return self.memory.u16(self.device)

    @property
    def in_flight(self) -> int:
        return (self._published - self.used_idx) & 0xFFFF

    def take_heads(self, count: int) -> list[int]:
        """Descriptors for a chain written by hand. Raises RingFull."""
        if count > len(self._free):
            raise RingFull(f"{count} descriptors wanted, {len(self._free)} free")
        taken, self._free = self._free[:count], self._free[count:]
        self._chains[taken[0]] = taken
        return taken

    def add(self, chain: Sequence[Buffer], *, indirect: bool | int = False) -> int:
        direct, table = self._cut(chain, indirect)
        taken = self.take_heads(len(direct) + (1 if table else 0))
        for i, buffer in enumerate(direct):
            last = i + 1 == len(taken)
            flags = (_WRITE if buffer.writable else 0) | (0 if last else _NEXT)
            self.write_descriptor(taken[i], buffer.address, buffer.size, flags, 0 if last else taken[i + 1])
        if table:
            at = self._indirect_table(table, chained=True)
            self.write_descriptor(taken[-1], at.address, at.size, _INDIRECT)
        self.put_available(taken[0])
        return taken[0]

    def publish(self) -> bool:
        old, self._published = self._published, self.avail_idx
        fence()
        self.memory.set_u16(self.driver + 2, self.avail_idx)
        fence()
        if self.event_idx:
            event = self.memory.u16(self.device + 4 + 8 * self.size)
            return (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - old) & 0xFFFF
        return not self.device_flags & 1

    def take_used(self) -> list[Used]:
        done: list[Used] = []
        end = self.device_idx
        fence()
        while self.used_idx != end:
            at = self.device + 4 + 8 * (self.used_idx % self.size)
            head, length = _USED.unpack(self.memory.read(at, 8))
            if head not in self._chains:
                raise DriverError(f"the device gave back descriptor {head}, which it doesn't have")
            self._free += self._chains.pop(head)
            done.append(Used(head, length))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        return done

    def want_interrupts(self, wanted: bool) -> None:
        self.memory.set_u16(self.driver, 0 if wanted or self.event_idx else 1)
        if self.event_idx:
            event = self.used_idx if wanted else self.used_idx - 1
            self.memory.set_u16(self.driver + 4 + 2 * self.size, event)
        fence()


class PackedRing(Ring):
    """A packed virtqueue (virtio 1.4, 2.8)."""

    _ENABLE: Final = 0
    _DISABLE: Final = 1
    _DESC: Final = 2

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool = False) -> None:
        super().__init__(memory, size, event_idx=event_idx)
        self.desc = memory.allocate(16 * size, 16)
        self.driver = memory.allocate(4, 4)
        self.device = memory.allocate(4, 4)
        memory.write(self.desc, bytes(16 * size))
        memory.write(self.driver, bytes(4))
        memory.write(self.device, bytes(4))
        self._next = 0
        self._wrap = 1
        self._used = 0
        self._used_wrap = 1
        self._pending: list[tuple[int, int]] = []
        """First descriptors whose flags aren't written yet."""
        self._published = (0, 1)
        self._free_ids = list(range(size))
        self._room = size
        self._lengths: dict[int, int] = {}

    def write_descriptor(self, index: int, address: int, size: int, number: int, flags: int) -> None:
        """All but making it available; `flags` without AVAIL and USED are written as they are."""
        self.memory.write(self.desc + 16 * index, struct.pack("<QIH", address, size, number))
        self.memory.set_u16(self.desc + 16 * index + 14, flags)

    @property
    def in_flight(self) -> int:
        return len(self._lengths)

    def add(self, chain: Sequence[Buffer], *, indirect: bool | int = False) -> int:
        direct, table = self._cut(chain, indirect)
        pieces = [(one, 0) for one in direct]
        if table:
            if direct:
                raise DriverError("a packed ring has no chain that ends in an indirect table")
            pieces.append((self._indirect_table(table, chained=False), _INDIRECT))
        if len(pieces) > self._room:
            raise RingFull(f"{len(pieces)} descriptors wanted, {self._room} free")
        number = self._free_ids.pop(0)
        self._lengths[number] = len(pieces)
        self._room -= len(pieces)
        for i, (buffer, extra) in enumerate(pieces):
            flags = extra | (_WRITE if buffer.writable else 0) | (_NEXT if i + 1 < len(pieces) else 0)
            flags |= _PACKED_AVAIL if self._wrap else _PACKED_USED
            at = self.desc + 16 * self._next
            self.memory.write(at, struct.pack("<QIH", buffer.address, buffer.size, number))
            if i == 0:
                # The first one's flags make the chain available: they come last, in `publish`.
                self._pending.append((self._next, flags))
            else:
                self.memory.set_u16(at + 14, flags)
            self._next += 1
            if self._next == self.size:
                self._next = 0
                self._wrap ^= 1
        return number

    def publish(self) -> bool:
        fence()
        # From the last to the first: the device takes none before it may take all.
        for index, flags in reversed(self._pending):
            self.memory.set_u16(self.desc + 16 * index + 14, flags)
            fence()
        self._pending.clear()
        old, _ = self._published
        self._published = (self._next, self._wrap)
        wanted, where = struct.unpack("<HH", self.memory.read(self.device, 4))[::-1]
        if wanted != self._DESC:
            return bool(wanted == self._ENABLE)
        event = where & 0x7FFF
        new = self._next
        if self._wrap != where >> 15:
            event -= self.size
        if old > new:
            old -= self.size
        return bool((new - event - 1) & 0xFFFF < (new - old) & 0xFFFF)

    def take_used(self) -> list[Used]:
        done: list[Used] = []
        while True:
            at = self.desc + 16 * self._used
            flags = self.memory.u16(at + 14)
            avail, used = bool(flags & _PACKED_AVAIL), bool(flags & _PACKED_USED)
            if not (avail == used == bool(self._used_wrap)):
                return done
            fence()
            _address, length, number, _flags = _DESCRIPTOR.unpack(self.memory.read(at, 16))
            if number not in self._lengths:
                raise DriverError(f"the device gave back buffer {number}, which it doesn't have")
            skip = self._lengths.pop(number)
            self._free_ids.append(number)
            self._room += skip
            self._used += skip
            if self._used >= self.size:
                self._used -= self.size
                self._used_wrap ^= 1
            done.append(Used(number, length))

    def want_interrupts(self, wanted: bool) -> None:
        if not wanted:
            self.memory.write(self.driver, struct.pack("<HH", 0, self._DISABLE))
        elif self.event_idx:
            self.memory.write(self.driver, struct.pack("<HH", self._used | self._used_wrap << 15, self._DESC))
        else:
            self.memory.write(self.driver, struct.pack("<HH", 0, self._ENABLE))
        fence()


# --- the PCI function -----------------------------------------------------------------------------------------------


class PciFunction:
    """A PCI function behind a vfio-user socket, as a driver sees it after its bus has enumerated it.

    Owns the client and the eventfds of its interrupts.
    """

    def __init__(self, client: VfioClient) -> None:
        self.client: Final = client
        self.vectors: list[int] = []
        """Eventfds of MSI-X vectors while MSI-X is enabled."""
        self.msix_enabled = False
        self.intx: int | None = None
        """INTx's eventfd while that is enabled."""
        size = client.region_info(RegionIndex.CONFIG).size
        self.config: Final = client.region_read(RegionIndex.CONFIG, 0, size)
        """Configuration space as it was in the beginning."""
        try:
            self.identity: Final = pci.Identity.decode(self.config)
            self.capabilities: Final = pci.capabilities(self.config)
            self.extended: Final = pci.extended_capabilities(self.config)
            self.virtio: Final = pci.virtio_capabilities(self.config)
            self.sriov: Final = pci.SrIov.decode(self.config)
            self.bars: Final = self._size_bars()
        except ValueError as error:
            raise DriverError(f"{client.path}: {error}") from error

    def close(self) -> None:
        """Hang up, as a driver's machine that is switched off does. Idempotent."""
        self.client.close()
        self._close_vectors()
        self._close_intx()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, region: int, offset: int, width: int) -> int:
        """A little-endian number from a region."""
        return int.from_bytes(self.client.region_read(region, offset, width), "little")

    def write(self, region: int, offset: int, width: int, value: int, *, posted: bool = False) -> None:
        self.client.region_write(region, offset, value.to_bytes(width, "little"), posted=posted)

    def config_read(self, offset: int, width: int) -> int:
        return self.read(RegionIndex.CONFIG, offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        self.write(RegionIndex.CONFIG, offset, width, value)

    def _size_bars(self) -> dict[int, pci.Bar]:
        """What BARs there are, found out as firmware does: all-ones, read back, restored."""
        command = self.config_read(pci.Register.COMMAND, 2)
        decode = pci.CommandBit.IO | pci.CommandBit.MEMORY
        self.config_write(pci.Register.COMMAND, 2, command & ~decode)
        places = [pci.Register.BAR0 + 4 * i for i in range(pci.BAR_COUNT)]
        before = [self.config_read(place, 4) for place in places]
        for place in places:
            self.config_write(place, 4, 0xFFFFFFFF)
        probe = [self.config_read(place, 4) for place in places]
        for place, value in zip(places, before, strict=True):
            self.config_write(place, 4, value)
        self.config_write(pci.Register.COMMAND, 2, command)
        bars: dict[int, pci.Bar] = {}
        index = 0
        while index < pci.BAR_COUNT:
            bar = pci.bar_from_probe(index, probe[index:])
            if bar is not None:
                bars[index] = bar
            index += 2 if bar is not None and bar.kind == "memory64" else 1
        return bars

    def place_bars(self, memory: int = 0xC000_0000, io: int = 0xC000) -> None:
        """Give the BARs addresses. Nobody decodes them here, but a device may look whether they have any."""
        for bar in self.bars.values():
            at = -(-(io if bar.kind == "io" else memory) // bar.size) * bar.size
            self.config_write(pci.Register.BAR0 + 4 * bar.index, 4, at & 0xFFFFFFFF)
            if bar.kind == "memory64":
                self.config_write(pci.Register.BAR0 + 4 * bar.index + 4, 4, at >> 32)
            if bar.kind == "io":
                io = at + bar.size
            else:
                memory = at + bar.size

    def enable(self) -> None:
        """Decoding of both kinds, and bus mastering."""
        bits = pci.CommandBit.IO | pci.CommandBit.MEMORY | pci.CommandBit.MASTER
        self.config_write(pci.Register.COMMAND, 2, self.config_read(pci.Register.COMMAND, 2) | bits)

    @property
    def msix(self) -> pci.Msix | None:
        """The MSI-X capability as it is now."""
        for one in self.capabilities:
            if one.id == pci.CapabilityId.MSIX:
                control = self.config_read(one.offset + 2, 2)
                found = pci.Msix.decode(self.config[: one.offset + 2] + struct.pack("<H", control) + one.body[4:])
                if found is not None:
                    return found
        return None

    def enable_msix(self, vectors: int | None = None) -> int:
        """Enable MSI-X with an eventfd each for the first `vectors` vectors (default: all); how many those are.

        Raises DriverError when there is no such capability.
        """
        capability = self.msix
        if capability is None:
            raise DriverError(f"{self.client.path}: no MSI-X capability")
        count = capability.vectors if vectors is None else min(vectors, capability.vectors)
        self._close_vectors()
        self.disable_intx()
        self.vectors = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        self.config_write(capability.offset + 2, 2, pci.MSIX_ENABLE)
        self.msix_enabled = True
        self.client.set_eventfds(IrqIndex.MSIX, 0, self.vectors)
        return count

    def disable_msix(self) -> None:
        """Idempotent."""
        capability = self.msix
        if capability is not None and capability.enabled:
            self.config_write(capability.offset + 2, 2, 0)
        self.msix_enabled = False
        if self.vectors:
            self.client.disable_irqs(IrqIndex.MSIX)
            self._close_vectors()

    def enable_intx(self) -> bool:
        """An eventfd for INTx; False when the function has no interrupt pin."""
        if not self.identity.interrupt_pin:
            return False
        self.disable_msix()
        self.disable_intx()
        self.intx = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.client.set_eventfds(IrqIndex.INTX, 0, [self.intx])
        return True

    def disable_intx(self) -> None:
        """Idempotent."""
        if self.intx is not None:
            self.client.set_irqs(IrqFlag.DATA_NONE | IrqFlag.TRIGGER, IrqIndex.INTX, 0, 0)
            self._close_intx()

    def _close_vectors(self) -> None:
        for fd in self.vectors:
            os.close(fd)
        self.vectors = []

    def _close_intx(self) -> None:
        if self.intx is not None:
            os.close(self.intx)
            self.intx = None

    def function_reset(self) -> None:
        """FLR through the PCI Express capability. Raises DriverError when there is none."""
        for one in self.capabilities:
            if one.id == pci.CapabilityId.EXPRESS:
                control = self.config_read(one.offset + 8, 2)
                self.config_write(one.offset + 8, 2, control | pci.EXPRESS_FLR)
                return
        raise DriverError(f"{self.client.path}: no PCI Express capability")

    def capability(self, kind: pci.VirtioCapabilityType) -> pci.VirtioCapability | None:
        """The first, that is preferred, virtio capability of a type in a BAR that a driver may use."""
        return next((one for one in self.virtio if one.type == kind and one.bar < pci.BAR_COUNT), None)

    def window_read(self, bar: int, offset: int, width: int) -> int:
        """A BAR, through the PCI_CFG capability: for those who can't reach BARs. Raises DriverError without one."""
        at = self._window(bar, offset, width)
        return self.config_read(at, width)

    def window_write(self, bar: int, offset: int, width: int, value: int) -> None:
        """As `window_read`."""
        at = self._window(bar, offset, width)
        self.config_write(at, width, value)

    def _window(self, bar: int, offset: int, width: int) -> int:
        window = next((one for one in self.virtio if one.type == pci.VirtioCapabilityType.PCI), None)
        if window is None:
            raise DriverError(f"{self.client.path}: no PCI_CFG capability")
        self.config_write(window.offset + 4, 1, bar)
        self.config_write(window.offset + 8, 4, offset)
        self.config_write(window.offset + 12, 4, width)
        return window.offset + 16


def take_events(fd: int) -> int:
    """How often an eventfd has been signalled since the last time."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# --- queues ---------------------------------------------------------------------------------------------------------


class Queue:
    """A ring with its doorbell and its interrupt.

    `event`: the eventfd that completions are signalled through, None: look at the ring from time to time. `client`:
    whose server may want memory meanwhile. `acknowledge`: called after each interrupt; with INTx that reads ISR.
    """

    def __init__(
        self,
        ring: Ring,
        notify: Callable[[], None],
        *,
        event: int | None = None,
        client: VfioClient | None = None,
        acknowledge: Callable[[], object] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.ring: Final = ring
        self.memory: Final = ring.memory
        self.notify: Final = notify
        self.event = event
        self.timeout = timeout
        self.interrupts = 0
        """Interrupts taken."""
        self._client: Final = client
        self._acknowledge: Final = acknowledge
        self._done: dict[int, int] = {}
        self.order: list[int] = []
        """Ids in the order of their completion."""

    def add(self, chain: Sequence[Buffer], *, indirect: bool | int = False) -> int:
        """Put a chain on the ring without making it known; its id. Raises RingFull."""
        number = self.ring.add(chain, indirect=indirect)
        # Somebody may never have asked for the chain that had the id before.
        self._done.pop(number, None)
        return number

    def kick(self, *, always: bool = False) -> None:
        """Make added chains known; notify if the device wants it, or always."""
        if self.ring.publish() or always:
            self.notify()

    def poll(self) -> int:
        """Take what is done; how many chains that were."""
        if self._client is not None:
            self._client.pump()
        done = self.ring.take_used()
        for one in done:
            self._done[one.id] = one.length
            self.order.append(one.id)
        return len(done)

    def wait_interrupt(self, timeout: float) -> bool:
        """Wait for an interrupt and acknowledge it; False when none came. Only with an `event`."""
        if self.event is None:
            raise DriverError("a queue without an interrupt")
        if self._client is not None:
            ready = bool(self._client.wait_readable([self.event], timeout))
        else:
            ready = bool(select.select([self.event], [], [], timeout)[0])
        if ready:
            self.interrupts += take_events(self.event)
            if self._acknowledge is not None:
                self._acknowledge()
        return ready

    def wait(self, number: int, timeout: float | None = None) -> int:
        """Wait for a chain to come back; the length the device says it wrote. Raises TimeoutError."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while True:
            if self.event is not None:
                self.ring.want_interrupts(True)
            self.poll()
            if number in self._done:
                return self._done.pop(number)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"a chain wasn't completed within {limit} s")
            if self.event is not None:
                self.wait_interrupt(left)
            else:
                time.sleep(0.0002)

    def is_done(self, number: int) -> bool:
        """Whether a chain has come back and nobody has waited for it."""
        self.poll()
        return number in self._done


# --- registers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Virtqueue:
    """A queue as the device shows it."""

    index: int
    size: int
    notify_off: int


class ModernDevice:
    """Virtio 1.x registers of a PCI function. Raises DriverError when the capabilities don't make up a device."""

    def __init__(self, function: PciFunction, *, timeout: float = TIMEOUT) -> None:
        self.function: Final = function
        self.timeout = timeout
        found = {
            kind: function.capability(kind)
            for kind in (
                pci.VirtioCapabilityType.COMMON,
                pci.VirtioCapabilityType.NOTIFY,
                pci.VirtioCapabilityType.ISR,
                pci.VirtioCapabilityType.DEVICE,
            )
        }
        common = found[pci.VirtioCapabilityType.COMMON]
        notify = found[pci.VirtioCapabilityType.NOTIFY]
        isr = found[pci.VirtioCapabilityType.ISR]
        if common is None or notify is None or isr is None:
            raise DriverError(f"{function.client.path}: not a virtio 1.x device: a capability is missing")
        if common.structure_length < 56 or notify.structure_length < 2 or isr.structure_length < 1:
            raise DriverError(f"{function.client.path}: a virtio structure is too short")
        self.common: Final = common
        self.notify_cap: Final = notify
        self.isr_cap: Final = isr
        self.device_cap: Final = found[pci.VirtioCapabilityType.DEVICE]
        for one in found.values():
            if one is None:
                continue
            bar = function.bars.get(one.bar)
            if bar is None or one.structure_offset + one.structure_length > bar.size:
                raise DriverError(f"{function.client.path}: a virtio structure lies outside of BAR{one.bar}")
        self.accepted = 0

    def read(self, register: int, width: int) -> int:
        """A field of the common configuration."""
        return self.function.read(self.common.bar, self.common.structure_offset + register, width)

    def write(self, register: int, width: int, value: int) -> None:
        self.function.write(self.common.bar, self.common.structure_offset + register, width, value)

    def config(self, offset: int, size: int) -> bytes:
        """Bytes of the device configuration. Raises DriverError when there is none."""
        if self.device_cap is None:
            raise DriverError("no device configuration")
        return self.function.client.region_read(self.device_cap.bar, self.device_cap.structure_offset + offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        if self.device_cap is None:
            raise DriverError("no device configuration")
        self.function.client.region_write(self.device_cap.bar, self.device_cap.structure_offset + offset, data)

    def isr(self) -> int:
        """Read, and so clear, ISR."""
        return self.function.read(self.isr_cap.bar, self.isr_cap.structure_offset, 1)

    @property
    def status(self) -> int:
        return self.read(Common.STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write(Common.STATUS, 1, value)

    def reset(self) -> None:
        """Write 0 and wait until it reads 0. Raises TimeoutError."""
        self.status = 0
        deadline = time.monotonic() + self.timeout
        while self.status:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end of the device's reset within {self.timeout} s")
            time.sleep(0.001)
        self.accepted = 0

    def device_features(self, words: int = 4) -> int:
        """What is offered, in so many 32-bit words."""
        value = 0
        for word in range(words):
            self.write(Common.DEVICE_FEATURE_SELECT, 4, word)
            value |= self.read(Common.DEVICE_FEATURE, 4) << 32 * word
        return value

    def driver_features(self, words: int = 2) -> int:
        """What was accepted, read back."""
        value = 0
        for word in range(words):
            self.write(Common.DRIVER_FEATURE_SELECT, 4, word)
            value |= self.read(Common.DRIVER_FEATURE, 4) << 32 * word
        return value

    def negotiate(self, wanted: int | None = None) -> int:
        """From reset to FEATURES_OK, accepting what is offered of `wanted` (default: the rings' features and
        everything below 24, not NOTIFICATION_DATA, ACCESS_PLATFORM and what else changes how everything is done).

        Returns what was accepted. Raises DriverError when the device doesn't take it.
        """
        default = mask(*range(24), Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.SR_IOV, Feature.ADMIN_VQ)
        self.reset()
        self.status = Status.ACKNOWLEDGE
        self.status = Status.ACKNOWLEDGE | Status.DRIVER
        offered = self.device_features()
        if not offered >> Feature.VERSION_1 & 1:
            raise DriverError("a device without VERSION_1")
        self.accepted = offered & ((default if wanted is None else wanted) | mask(Feature.VERSION_1))
        for word in range(2):
            self.write(Common.DRIVER_FEATURE_SELECT, 4, word)
            self.write(Common.DRIVER_FEATURE, 4, self.accepted >> 32 * word & 0xFFFFFFFF)
        self.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        if not self.status & Status.FEATURES_OK:
            raise DriverError(f"features {self.accepted:#x} of {offered:#x} aren't accepted")
        return self.accepted

    def has(self, feature: Feature) -> bool:
        """Whether it was accepted."""
        return bool(self.accepted >> feature & 1)

    def driver_ok(self) -> None:
        self.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK

    @property
    def num_queues(self) -> int:
        return self.read(Common.NUM_QUEUES, 2)

    @property
    def admin_queues(self) -> range:
        """Indices of the administration virtqueues. Raises DriverError for a common configuration too short."""
        if self.common.structure_length < 64:
            raise DriverError("the common configuration ends before admin_queue_num")
        first = self.read(Common.ADMIN_QUEUE_INDEX, 2)
        return range(first, first + self.read(Common.ADMIN_QUEUE_NUM, 2))

    def select(self, index: int) -> Virtqueue:
        self.write(Common.QUEUE_SELECT, 2, index)
        return Virtqueue(index, self.read(Common.QUEUE_SIZE, 2), self.read(Common.QUEUE_NOTIFY_OFF, 2))

    def notify_address(self, queue: Virtqueue) -> tuple[int, int]:
        """BAR and offset. Raises DriverError for one outside of the structure."""
        at = queue.notify_off * self.notify_cap.multiplier
        if at + 2 > self.notify_cap.structure_length:
            raise DriverError(f"queue {queue.index}: notify address outside of the notify structure")
        return self.notify_cap.bar, self.notify_cap.structure_offset + at

    def make_ring(self, memory: GuestMemory, size: int) -> Ring:
        event_idx = self.has(Feature.EVENT_IDX)
        if self.has(Feature.RING_PACKED):
            return PackedRing(memory, size, event_idx=event_idx)
        return SplitRing(memory, size, event_idx=event_idx)

    def program(self, index: int, ring: Ring, vector: int | None = None) -> Virtqueue:
        """Tell the device where a ring is, and enable it. Raises DriverError when there is no such queue."""
        queue = self.select(index)
        if queue.size == 0:
            raise DriverError(f"no queue {index}")
        self.write(Common.QUEUE_SIZE, 2, ring.size)
        if vector is not None:
            self.write(Common.QUEUE_VECTOR, 2, vector)
            if self.read(Common.QUEUE_VECTOR, 2) != vector:
                raise DriverError(f"queue {index}: vector {vector} isn't taken")
        for register, value in (
            (Common.QUEUE_DESC, ring.desc),
            (Common.QUEUE_DRIVER, ring.driver),
            (Common.QUEUE_DEVICE, ring.device),
        ):
            self.write(register, 4, value & 0xFFFFFFFF)
            self.write(register + 4, 4, value >> 32)
        self.write(Common.QUEUE_ENABLE, 2, 1)
        return queue

    def setup_queue(self, index: int, memory: GuestMemory, size: int | None = None, vector: int | None = None) -> Queue:
        """A ring of `size` (default: as offered, at most 256) for queue `index`, ready for DRIVER_OK.

        `vector`: its MSI-X vector; None: INTx when that is enabled, otherwise no interrupt.
        """
        offered = self.select(index)
        if offered.size == 0:
            raise DriverError(f"no queue {index}")
        ring = self.make_ring(memory, min(offered.size, 256) if size is None else size)
        self.program(index, ring, vector)
        bar, at = self.notify_address(offered)

        def notify() -> None:
            self.function.write(bar, at, 2, index, posted=True)

        return Queue(
            ring,
            notify,
            event=self.event(vector),
            client=self.function.client,
            acknowledge=self._intx_handler if vector is None and self.function.intx is not None else None,
            timeout=self.timeout,
        )

    def event(self, vector: int | None) -> int | None:
        """The eventfd of a vector; of INTx for None, None when that isn't enabled."""
        if vector is None:
            return self.function.intx
        return self.function.vectors[vector] if vector < len(self.function.vectors) else None

    def _intx_handler(self) -> int:
        """What a kernel and QEMU do: reading ISR lowers the line, and the interrupt is unmasked for the next time."""
        isr = self.isr()
        self.function.client.unmask(IrqIndex.INTX)
        return isr


class LegacyRegisters(Protocol):
    """The legacy interface, however it is reached. Numbers are little-endian; widths 1, 2, 4, for config any."""

    def read(self, offset: int, width: int) -> int:
        """A register of the common part."""

    def write(self, offset: int, width: int, value: int) -> None: ...

    def config_read(self, offset: int, size: int) -> bytes:
        """Device configuration, offsets from its start."""

    def config_write(self, offset: int, data: bytes) -> None: ...

    def notify(self, queue: int) -> None: ...


class BarRegisters:
    """The legacy interface in I/O BAR0; where the device configuration begins depends on MSI-X."""

    def __init__(self, function: PciFunction) -> None:
        bar = function.bars.get(0)
        if bar is None or bar.kind != "io":
            raise DriverError(f"{function.client.path}: no I/O BAR0")
        self.function: Final = function

    @property
    def config_offset(self) -> int:
        return 24 if self.function.msix_enabled else 20

    def read(self, offset: int, width: int) -> int:
        return self.function.read(0, offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        self.function.write(0, offset, width, value)

    def config_read(self, offset: int, size: int) -> bytes:
        """Byte by byte, as Linux and U-Boot do."""
        at = self.config_offset + offset
        return b"".join(self.function.client.region_read(0, at + i, 1) for i in range(size))

    def config_write(self, offset: int, data: bytes) -> None:
        """Byte by byte, too."""
        at = self.config_offset + offset
        for i in range(len(data)):
            self.function.client.region_write(0, at + i, data[i : i + 1])

    def notify(self, queue: int) -> None:
        self.write(Legacy.QUEUE_NOTIFY, 2, queue)


class LegacyDevice:
    """A device driven through the legacy interface.

    `function`: where its memory and interrupts are, None when there is only the registers.
    """

    def __init__(
        self, registers: LegacyRegisters, function: PciFunction | None = None, *, timeout: float = TIMEOUT
    ) -> None:
        self.registers: Final = registers
        self.function: Final = function
        self.timeout = timeout

    @property
    def status(self) -> int:
        return self.registers.read(Legacy.STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.registers.write(Legacy.STATUS, 1, value)

    def reset(self) -> None:
        """One write and one read, as legacy drivers do. Raises DriverError when it doesn't read 0."""
        self.status = 0
        if self.status:
            raise DriverError("device_status isn't 0 right after a reset")

    def isr(self) -> int:
        return self.registers.read(Legacy.ISR, 1)

    def negotiate(self, wanted: int = 0) -> int:
        """From reset to the features; what of `wanted` was accepted."""
        self.reset()
        self.status = Status.ACKNOWLEDGE
        self.status = Status.ACKNOWLEDGE | Status.DRIVER
        accepted = self.registers.read(Legacy.DEVICE_FEATURES, 4) & wanted
        self.registers.write(Legacy.DRIVER_FEATURES, 4, accepted)
        return accepted

    def driver_ok(self) -> None:
        self.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK

    def queue_size(self, index: int) -> int:
        self.registers.write(Legacy.QUEUE_SELECT, 2, index)
        return self.registers.read(Legacy.QUEUE_SIZE, 2)

    def setup_queue(
        self, index: int, memory: GuestMemory, vector: int | None = None, *, event_idx: bool = False
    ) -> Queue:
        """A ring for queue `index`, in use at once. `vector`: its MSI-X vector; None: INTx, or none.

        Raises DriverError for a queue that is absent or in use, and for a vector that isn't taken.
        """
        size = self.queue_size(index)
        if size == 0 or self.registers.read(Legacy.QUEUE_ADDRESS, 4):
            raise DriverError(f"queue {index} is {'in use' if size else 'absent'}")
        ring = SplitRing(memory, size, layout="legacy", event_idx=event_idx)
        self.registers.write(Legacy.QUEUE_ADDRESS, 4, ring.desc >> 12)
        if vector is not None:
            self.registers.write(Legacy.QUEUE_VECTOR, 2, vector)
            if self.registers.read(Legacy.QUEUE_VECTOR, 2) != vector:
                raise DriverError(f"queue {index}: vector {vector} isn't taken")
        return self.make_queue(index, ring, vector)

    def make_queue(self, index: int, ring: Ring, vector: int | None = None) -> Queue:
        """A queue on a ring that the device knows already."""
        function = self.function
        event: int | None = None
        acknowledge: Callable[[], object] | None = None
        if function is not None and vector is not None:
            event = function.vectors[vector] if vector < len(function.vectors) else None
        elif function is not None and function.intx is not None:
            event, acknowledge = function.intx, self._intx_handler
        return Queue(
            ring,
            lambda: self.registers.notify(index),
            event=event,
            client=None if function is None else function.client,
            acknowledge=acknowledge,
            timeout=self.timeout,
        )

    def _intx_handler(self) -> int:
        isr = self.isr()
        if self.function is not None:
            self.function.client.unmask(IrqIndex.INTX)
        return isr


# --- the administration virtqueue -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Framing:
    """How a command is cut into descriptors: sizes of the readable and of the writable ones; None: all in one.

    What is left over after the sizes goes into one more; sizes of 0 make descriptors of length 0.
    """

    readable: tuple[int, ...] | None = None
    writable: tuple[int, ...] | None = None
    indirect: bool | int = False

    @classmethod
    def linux(cls) -> Self:
        """Header and data, status and result, each in their own."""
        return cls((COMMAND_HEADER_SIZE,), (RESULT_HEADER_SIZE,))

    @staticmethod
    def _sizes(total: int, sizes: tuple[int, ...] | None) -> list[int]:
        found: list[int] = []
        for size in sizes or ():
            take = min(size, total)
            if take or size == 0:
                found.append(take)
            total -= take
        if total:
            found.append(total)
        return found

    def chain(self, memory: GuestMemory, readable: bytes, writable: int) -> list[Buffer]:
        """The chain's buffers, the readable ones filled in and the writable ones poisoned."""
        chain: list[Buffer] = []
        at = 0
        for size in self._sizes(len(readable), self.readable):
            address = memory.allocate(max(size, 1), 1)
            memory.write(address, readable[at : at + size])
            chain.append(Buffer(address, size))
            at += size
        for size in self._sizes(writable, self.writable):
            address = memory.allocate(max(size, 1), 1)
            memory.write(address, bytes([POISON]) * size)
            chain.append(Buffer(address, size, writable=True))
        return chain


@dataclass(frozen=True, slots=True)
class Completion:
    """A command as it came back, nothing interpreted."""

    used: int
    """The length the device says it has written."""
    buffer: bytes
    """The device-writable part: all of it when `whole`, otherwise what was written."""
    whole: bool = True

    @property
    def written(self) -> bytes:
        return self.buffer[: self.used]

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self.written[at : at + size], "little")

    @property
    def status(self) -> int:
        """As far as there was room for it."""
        return self._number(0, 2)

    @property
    def qualifier(self) -> int:
        return self._number(2, 2)

    @property
    def reserved(self) -> int:
        return self._number(4, 4)

    @property
    def result(self) -> bytes:
        """command_specific_result, as many bytes as were written."""
        return self.written[RESULT_HEADER_SIZE:]


@dataclass(slots=True)
class Pending:
    """A command on its way."""

    id: int
    writable: list[Buffer]
    """The descriptors for the answer."""


@dataclass
class AdminQueue:
    """The driver's side of an administration virtqueue. `framing`: how commands are cut unless said otherwise."""

    queue: Queue
    framing: Framing = field(default_factory=Framing.linux)

    def start(self, readable: bytes, writable: int, framing: Framing | None = None, *, kick: bool = True) -> Pending:
        """Put a command on the ring. Its memory is nobody else's until the guest memory is given back.

        Raises RingFull.
        """
        cut = self.framing if framing is None else framing
        chain = cut.chain(self.queue.memory, readable, writable)
        pending = Pending(self.queue.add(chain, indirect=cut.indirect), [buffer for buffer in chain if buffer.writable])
        if kick:
            self.queue.kick()
        return pending

    def finish(self, pending: Pending, timeout: float | None = None) -> Completion:
        """Wait for a command. Raises TimeoutError."""
        used = self.queue.wait(pending.id, timeout)
        memory = self.queue.memory
        return Completion(used, b"".join(memory.read(one.address, one.size) for one in pending.writable))

    def raw(self, readable: bytes, writable: int, framing: Framing | None = None) -> Completion:
        """One command from start to end, its parts as they are."""
        with self.queue.memory.borrowed():
            return self.finish(self.start(readable, writable, framing))

    def command(
        self,
        opcode: int,
        group: int,
        member: int = 0,
        data: bytes = b"",
        result_size: int = 0,
        *,
        framing: Framing | None = None,
    ) -> Completion:
        """One command from start to end, with room for so many bytes of command_specific_result."""
        return self.raw(Command(opcode, group, member, data).pack(), RESULT_HEADER_SIZE + result_size, framing)


# --- the block device -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlkResult:
    """A completed request."""

    status: int
    data: bytes
    used: int


@dataclass(slots=True)
class BlkPending:
    """A request on its way."""

    id: int
    data: int
    """Where data comes in."""
    size: int
    status: int
    """Where the status byte comes in."""


@dataclass
class BlkDriver:
    """Requests of a block device through one queue; header, data and status each in a descriptor of their own."""

    queue: Queue

    def start(
        self, kind: int, sector: int = 0, out: bytes = b"", size: int = 0, *, indirect: bool = False, kick: bool = True
    ) -> BlkPending:
        """Put a request on the ring; its memory stays taken. `size`: bytes to come in."""
        memory = self.queue.memory
        header = memory.allocate(16)
        memory.write(header, _BLK_HEADER.pack(kind, 0, sector))
        chain = [Buffer(header, 16)]
        data = 0
        if out:
            data = memory.allocate(len(out))
            memory.write(data, out)
            chain.append(Buffer(data, len(out)))
        if size:
            data = memory.allocate(size)
            memory.write(data, bytes([POISON]) * size)
            chain.append(Buffer(data, size, writable=True))
        status = memory.allocate(1)
        memory.write(status, bytes([POISON]))
        chain.append(Buffer(status, 1, writable=True))
        pending = BlkPending(self.queue.add(chain, indirect=indirect), data, size, status)
        if kick:
            self.queue.kick()
        return pending

    def finish(self, pending: BlkPending, timeout: float | None = None) -> BlkResult:
        """Wait for a request. Raises TimeoutError."""
        used = self.queue.wait(pending.id, timeout)
        memory = self.queue.memory
        data = memory.read(pending.data, pending.size) if pending.size else b""
        return BlkResult(memory.read(pending.status, 1)[0], data, used)

    def request(
        self, kind: int, sector: int = 0, out: bytes = b"", size: int = 0, *, indirect: bool = False
    ) -> BlkResult:
        """One request from start to end."""
        with self.queue.memory.borrowed():
            return self.finish(self.start(kind, sector, out, size, indirect=indirect))

    def read(self, sector: int, size: int) -> bytes:
        """Sectors. Raises DriverError when the device refuses."""
        result = self.request(BlkType.IN, sector, size=size)
        if result.status or result.used != size + 1:
            raise DriverError(f"read of sector {sector}: status {result.status}, used length {result.used}")
        return result.data

    def write(self, sector: int, data: bytes) -> None:
        """Write sectors. Raises DriverError when the device refuses."""
        result = self.request(BlkType.OUT, sector, data)
        if result.status or result.used != 1:
            raise DriverError(f"write of sector {sector}: status {result.status}, used length {result.used}")

    def check(self, sectors: Iterable[int] = (0, 1, 9), seed: int = 1) -> None:
        """Write a pattern to sectors and read it back. Raises DriverError when it is another."""
        places = list(sectors)
        patterns = {sector: bytes((seed * 31 + sector * 7 + i) & 0xFF for i in range(SECTOR)) for sector in places}
        for sector in places:
            self.write(sector, patterns[sector])
        for sector in places:
            if self.read(sector, SECTOR) != patterns[sector]:
                raise DriverError(f"sector {sector} reads otherwise than it was written")
