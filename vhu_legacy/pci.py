# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""PCI configuration space: names and decoders, as a driver needs them (PCIe base specification; virtio 1.4, 4.1.4).

Bytes in, values out; nothing here reads a device. The device side of all this is in Rust.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Literal, Self

__all__ = [
    "BAR_COUNT",
    "CONFIG_SIZE",
    "MSIX_ENABLE",
    "SRIOV_VF_ENABLE",
    "SRIOV_VF_MEMORY",
    "VIRTIO_VENDOR",
    "Bar",
    "Capability",
    "CapabilityId",
    "CommandBit",
    "ExtendedId",
    "Identity",
    "Msix",
    "Register",
    "SrIov",
    "SrIovRegister",
    "VirtioCapability",
    "VirtioCapabilityType",
    "bar_from_probe",
    "capabilities",
    "extended_capabilities",
    "virtio_capabilities",
]

CONFIG_SIZE: Final = 4096
"""Bytes of a PCI Express function's configuration space; a conventional one has 256."""
BAR_COUNT: Final = 6
VIRTIO_VENDOR: Final = 0x1AF4

MSIX_ENABLE: Final = 1 << 15
"""In the MSI-X capability's message control."""
MSIX_FUNCTION_MASK: Final = 1 << 14
EXPRESS_FLR: Final = 1 << 15
"""In the PCI Express capability's device control: Initiate Function Level Reset."""
SRIOV_VF_ENABLE: Final = 1 << 0
SRIOV_VF_MEMORY: Final = 1 << 3


class Register(IntEnum):
    """Offsets in a type 0 header."""

    VENDOR = 0x00
    DEVICE = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION = 0x08
    CLASS = 0x09
    HEADER_TYPE = 0x0E
    BAR0 = 0x10
    SUBSYSTEM_VENDOR = 0x2C
    SUBSYSTEM = 0x2E
    ROM = 0x30
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D


class CommandBit(IntFlag):
    """Bits of the command register."""

    IO = 1 << 0
    MEMORY = 1 << 1
    MASTER = 1 << 2
    INTX_DISABLE = 1 << 10


class CapabilityId(IntEnum):
    """Capabilities below 0x100."""

    POWER_MANAGEMENT = 0x01
    MSI = 0x05
    VENDOR = 0x09
    EXPRESS = 0x10
    MSIX = 0x11


class ExtendedId(IntEnum):
    """Extended capabilities, from 0x100."""

    AER = 0x0001
    ARI = 0x000E
    SR_IOV = 0x0010


class VirtioCapabilityType(IntEnum):
    """cfg_type of virtio's vendor capabilities."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5
    SHARED_MEMORY = 8
    VENDOR = 9


class SrIovRegister(IntEnum):
    """Offsets in the SR-IOV extended capability."""

    CAPABILITIES = 0x04
    CONTROL = 0x08
    STATUS = 0x0A
    INITIAL_VFS = 0x0C
    TOTAL_VFS = 0x0E
    NUM_VFS = 0x10
    FIRST_VF_OFFSET = 0x14
    VF_STRIDE = 0x16
    VF_DEVICE_ID = 0x1A
    SUPPORTED_PAGE_SIZES = 0x1C
    SYSTEM_PAGE_SIZE = 0x20
    VF_BAR0 = 0x24


_IDENTITY: Final = struct.Struct("<HH4xB3s2xB")
_VIRTIO: Final = struct.Struct("<BBBBBB2xII")
_MSIX: Final = struct.Struct("<xxHII")
_SRIOV: Final = struct.Struct("<4xIHHHHHB1xHH2xHII6I")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a driver is chosen by."""

    vendor: int
    device: int
    revision: int
    class_code: int
    """24 bits: base class, subclass, programming interface."""
    header_type: int
    subsystem_vendor: int
    subsystem: int
    interrupt_pin: int
    """0: no INTx."""

    @classmethod
    def decode(cls, config: bytes) -> Self:
        """Raises ValueError for fewer than 64 bytes."""
        if len(config) < 64:
            raise ValueError(f"{len(config)} bytes are no PCI header")
        vendor, device, revision, class_code, header_type = _IDENTITY.unpack_from(config)
        subsystem_vendor, subsystem = struct.unpack_from("<HH", config, Register.SUBSYSTEM_VENDOR)
        return cls(
            vendor,
            device,
            revision,
            int.from_bytes(class_code, "little"),
            header_type,
            subsystem_vendor,
            subsystem,
            config[Register.INTERRUPT_PIN],
        )

    @property
    def virtio_id(self) -> int | None:
        """The virtio device type; None for what no virtio driver would take."""
        if self.vendor != VIRTIO_VENDOR or not 0x1000 <= self.device <= 0x107F:
            return None
        return self.device - 0x1040 if self.device >= 0x1040 else self.subsystem


@dataclass(frozen=True, slots=True)
class Capability:
    """An entry of either capability list."""

    id: int
    offset: int
    body: bytes
    """From the entry's first byte to wherever the configuration space as read ends; take what is yours of it."""


def capabilities(config: bytes) -> list[Capability]:
    """The entries below 0x100 in list order.

    Raises ValueError for a list that loops or leads out of its area: what a driver must not follow.
    """
    found: list[Capability] = []
    at = config[Register.CAPABILITIES] & ~3
    seen: set[int] = set()
    while at:
        if at in seen or at < 0x40 or at + 2 > min(len(config), 256):
            raise ValueError(f"the capability list {'loops' if at in seen else 'leads'} to {at:#x}")
        seen.add(at)
        found.append(Capability(config[at], at, config[at : min(len(config), 256)]))
        at = config[at + 1] & ~3
    return found


def extended_capabilities(config: bytes) -> list[Capability]:
    """The entries from 0x100 on, in list order; none in a conventional function. Raises as `capabilities` does."""
    found: list[Capability] = []
    at = 0x100
    seen: set[int] = set()
    while at and len(config) >= 0x104:
        if at in seen or at < 0x100 or at + 4 > len(config):
            raise ValueError(f"the extended capability list {'loops' if at in seen else 'leads'} to {at:#x}")
        seen.add(at)
        header = int.from_bytes(config[at : at + 4], "little")
        # An all-zero entry at 0x100 is an empty list.
        if header & 0xFFFF:
            found.append(Capability(header & 0xFFFF, at, config[at:]))
        at = header >> 20 & ~3
    return found


@dataclass(frozen=True, slots=True)
class VirtioCapability:
    """Where one of virtio's structures is."""

    offset: int
    """Of the capability itself, in configuration space."""
    length: int
    """cap_len."""
    type: int
    bar: int
    id: int
    structure_offset: int
    structure_length: int
    multiplier: int
    """notify_off_multiplier; 0 for what has none."""

    @classmethod
    def decode(cls, capability: Capability) -> Self:
        """Raises ValueError for a vendor capability too short to be virtio's."""
        body = capability.body
        if len(body) < 16 or body[2] < 16:
            raise ValueError(f"the vendor capability at {capability.offset:#x} is too short")
        _id, _next, length, kind, bar, number, offset, size = _VIRTIO.unpack_from(body)
        multiplier = 0
        if kind == VirtioCapabilityType.NOTIFY:
            if length < 20 or len(body) < 20:
                raise ValueError(f"the notify capability at {capability.offset:#x} has no multiplier")
            multiplier = int.from_bytes(body[16:20], "little")
        return cls(capability.offset, length, kind, bar, number, offset, size, multiplier)


def virtio_capabilities(config: bytes) -> list[VirtioCapability]:
    """Virtio's capabilities in list order. Those of VENDOR type have another layout and are left out."""
    return [
        VirtioCapability.decode(one)
        for one in capabilities(config)
        if one.id == CapabilityId.VENDOR and len(one.body) > 3 and one.body[3] != VirtioCapabilityType.VENDOR
    ]


@dataclass(frozen=True, slots=True)
class Msix:
    """The MSI-X capability."""

    offset: int
    vectors: int
    enabled: bool
    masked: bool
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int

    @classmethod
    def decode(cls, config: bytes) -> Self | None:
        """None when the function has none."""
        for one in capabilities(config):
            if one.id == CapabilityId.MSIX:
                control, table, pba = _MSIX.unpack_from(one.body)
                return cls(
                    one.offset,
                    (control & 0x7FF) + 1,
                    bool(control & MSIX_ENABLE),
                    bool(control & MSIX_FUNCTION_MASK),
                    table & 7,
                    table & ~7,
                    pba & 7,
                    pba & ~7,
                )
        return None


@dataclass(frozen=True, slots=True)
class SrIov:
    """The SR-IOV extended capability."""

    offset: int
    capabilities: int
    control: int
    initial_vfs: int
    total_vfs: int
    num_vfs: int
    first_vf_offset: int
    vf_stride: int
    vf_device_id: int
    supported_page_sizes: int
    system_page_size: int
    vf_bars: tuple[int, ...]

    @classmethod
    def decode(cls, config: bytes) -> Self | None:
        """None when the function has none."""
        for one in extended_capabilities(config):
            if one.id == ExtendedId.SR_IOV:
                caps, control, _status, initial, total, num, _link, first, stride, device, pages, page, *bars = (
                    _SRIOV.unpack_from(one.body)
                )
                return cls(
                    one.offset, caps, control, initial, total, num, first, stride, device, pages, page, tuple(bars)
                )
        return None

    @property
    def vf_enable(self) -> bool:
        return bool(self.control & SRIOV_VF_ENABLE)


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register, as sizing shows it."""

    index: int
    kind: Literal["io", "memory32", "memory64"]
    size: int
    prefetchable: bool


def bar_from_probe(index: int, probe: Sequence[int]) -> Bar | None:
    """What registers read back after all-ones were written to them, from register `index` on; None: hardwired to zero.

    Raises ValueError for what no BAR may read.
    """
    low = probe[0]
    if low == 0:
        return None
    if low & 1:
        mask = low & ~3 & 0xFFFFFFFF
        # Upper halves of I/O BARs may be hardwired to zero.
        size = -mask & (0xFFFF if mask < 0x10000 else 0xFFFFFFFF)
        return _checked(Bar(index, "io", size, False))
    prefetchable = bool(low & 8)
    if low >> 1 & 3 == 2:
        if len(probe) < 2:
            raise ValueError(f"BAR{index} is a 64-bit one without a second half")
        mask = (low & ~15) | probe[1] << 32
        return _checked(Bar(index, "memory64", -mask & 0xFFFFFFFF_FFFFFFFF, prefetchable))
    return _checked(Bar(index, "memory32", -(low & ~15) & 0xFFFFFFFF, prefetchable))


def _checked(bar: Bar) -> Bar:
    if bar.size <= 0 or bar.size & (bar.size - 1):
        raise ValueError(f"BAR{bar.index}'s size of {bar.size} bytes is no power of two")
    return bar
