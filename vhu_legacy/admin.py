# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Administration commands: numbers and wire format, as a driver sees them (virtio 1.4, 2.12 and 2.13).

A codec and nothing else: bytes in, values out. The owner that executes commands is not served yet (README, Limits);
what sends and reads them (the owner driver, scripted drivers in tests) speaks through these types.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

__all__ = [
    "COMMAND_HEADER_SIZE",
    "RESULT_HEADER_SIZE",
    "Command",
    "CommandResult",
    "GroupType",
    "Opcode",
    "Qualifier",
    "Status",
    "opcode_list",
    "opcodes_in",
]

COMMAND_HEADER_SIZE: Final = 24
"""Bytes before command_specific_data in the device-readable part."""
RESULT_HEADER_SIZE: Final = 8
"""Bytes before command_specific_result in the device-writable part."""

_COMMAND: Final = struct.Struct("<HH12xQ")
_RESULT: Final = struct.Struct("<HH4x")
_WORD_BITS: Final = 64


class GroupType(IntEnum):
    """Device groups an owner can have."""

    SELF = 0
    SR_IOV = 1


class Opcode(IntEnum):
    """Administration commands. 0xb and 0xc follow the specification's opcode table, which its text contradicts."""

    LIST_QUERY = 0x0
    LIST_USE = 0x1
    LEGACY_COMMON_CFG_WRITE = 0x2
    LEGACY_COMMON_CFG_READ = 0x3
    LEGACY_DEV_CFG_WRITE = 0x4
    LEGACY_DEV_CFG_READ = 0x5
    LEGACY_NOTIFY_INFO = 0x6
    CAP_ID_LIST_QUERY = 0x7
    DEVICE_CAP_GET = 0x8
    DRIVER_CAP_SET = 0x9
    RESOURCE_OBJ_CREATE = 0xA
    RESOURCE_OBJ_QUERY = 0xB
    RESOURCE_OBJ_MODIFY = 0xC
    RESOURCE_OBJ_DESTROY = 0xD
    DEV_PARTS_METADATA_GET = 0xE
    DEV_PARTS_GET = 0xF
    DEV_PARTS_SET = 0x10
    DEV_MODE_SET = 0x11
    DEVICE_MGMT = 0x3E
    """Never standardised; ours when the group says feature_management = true."""
    DEVICE_MGMT_ATTRS = 0x3F
    """As DEVICE_MGMT."""


class Status(IntEnum):
    """Outcome of a command; the numbers are those of errno."""

    OK = 0
    ENXIO = 6
    EAGAIN = 11
    ENOMEM = 12
    EBUSY = 16
    EEXIST = 17
    """Used by the specification's text, missing from its table."""
    EINVAL = 22
    ENOSPC = 28

    @classmethod
    def _missing_(cls, value: object) -> Status | None:
        # "Any other value: the driver treats it as EINVAL."
        return cls.EINVAL if isinstance(value, int) and 0 <= value <= 0xFFFF else None


class Qualifier(IntEnum):
    """What exactly a failed command did wrong."""

    OK = 0
    INVALID_COMMAND = 1
    INVALID_OPCODE = 2
    INVALID_FIELD = 3
    INVALID_GROUP = 4
    INVALID_MEMBER = 5
    NORESOURCE = 6
    TRYAGAIN = 7

    @classmethod
    def _missing_(cls, value: object) -> Qualifier | None:
        # Unknown ones say no more than INVALID_COMMAND does.
        return cls.INVALID_COMMAND if isinstance(value, int) and 0 <= value <= 0xFFFF else None


@dataclass(frozen=True, slots=True)
class Command:
    """The device-readable part of a command."""

    opcode: int
    group_type: int
    group_member_id: int = 0
    data: bytes = b""
    """command_specific_data. The legacy commands take their length from it, so it is not padded."""

    def pack(self) -> bytes:
        """The bytes to be read by the device. Raises ValueError for a number that does not fit its field."""
        try:
            return _COMMAND.pack(self.opcode, self.group_type, self.group_member_id) + self.data
        except struct.error as error:
            raise ValueError(f"administration command {self.opcode:#x}: {error}") from None

    @classmethod
    def unpack(cls, part: bytes) -> Self:
        """What a device makes of a device-readable part: one that is too short reads as if zeroes followed."""
        header = part[:COMMAND_HEADER_SIZE].ljust(COMMAND_HEADER_SIZE, b"\0")
        opcode, group_type, group_member_id = _COMMAND.unpack(header)
        return cls(opcode, group_type, group_member_id, part[COMMAND_HEADER_SIZE:])


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The device-writable part of a command, after its completion."""

    status: Status
    qualifier: Qualifier
    result: bytes = b""
    """command_specific_result, as many bytes as the device wrote."""

    def pack(self) -> bytes:
        """The bytes a device writes."""
        return _RESULT.pack(self.status, self.qualifier) + self.result

    @classmethod
    def unpack(cls, part: bytes) -> Self:
        """What a driver makes of the bytes written.

        Raises:
            ValueError: fewer than the eight bytes that every completion has.
        """
        if len(part) < RESULT_HEADER_SIZE:
            raise ValueError(f"a completion of {len(part)} bytes; each has at least {RESULT_HEADER_SIZE}")
        status, qualifier = _RESULT.unpack_from(part)
        return cls(Status(status), Qualifier(qualifier), part[RESULT_HEADER_SIZE:])


def opcode_list(opcodes: Iterable[int]) -> bytes:
    """The bitmap of LIST_QUERY and LIST_USE: bit k of the i-th le64 is opcode 64 i + k.

    As many words as the largest opcode needs, at least one. The specification's formula comes out one short when that
    opcode is a multiple of 64; its prose, followed here, does not. Raises ValueError for what is not an opcode.
    """
    bits = 0
    for opcode in opcodes:
        if not 0 <= opcode <= 0xFFFF:
            raise ValueError(f"{opcode} is not an opcode")
        bits |= 1 << opcode
    words = max(1, -(-bits.bit_length() // _WORD_BITS))
    return bits.to_bytes(words * 8, "little")


def opcodes_in(bitmap: bytes) -> frozenset[int]:
    """The opcodes of such a bitmap, of any length; what is missing of its last word reads as zero."""
    bits = int.from_bytes(bitmap, "little")
    return frozenset(opcode for opcode in range(bits.bit_length()) if bits >> opcode & 1)
