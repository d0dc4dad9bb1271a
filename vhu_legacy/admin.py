# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Administration commands: numbers, wire format and errors, as a driver sees them (virtio 1.4, 2.12 and 2.13).

A codec and nothing else: bytes in, values out. The device side is Rust; the owner driver (`owner.py`) and scripted
drivers in tests speak through these types. All numbers are little-endian, all sizes and offsets are bytes. What packs
raises ValueError for a number that doesn't fit its field; what unpacks raises ValueError for bytes that are too few.

::

    VhuError
     +-- AdminError               a command failed: opcode, group_type, member, status, qualifier
          +-- InvalidCommandError        EINVAL
          |    +-- InvalidOpcodeError    not supported, or not in the set of LIST_USE
          |    +-- InvalidFieldError     something in command_specific_data
          |    +-- InvalidGroupError     no such group (VF Enable is clear)
          |    +-- InvalidMemberError    no such member
          +-- NoSuchResourceError        ENXIO: no such capability or object
          +-- TryAgainError              EAGAIN
          +-- NoMemoryError              ENOMEM, or the room for the result is too small
          +-- DeviceBusyError            EBUSY
          +-- ResourceExistsError        EEXIST
          +-- NoSpaceError               ENOSPC
          +-- MalformedResultError       status OK, but the result isn't what the command has
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Self

from .errors import VhuError

__all__ = [
    "COMMAND_HEADER_SIZE",
    "RESULT_HEADER_SIZE",
    "AdminError",
    "CapabilityId",
    "Command",
    "CommandResult",
    "DevPartsCapability",
    "DevPartsObject",
    "DeviceBusyError",
    "DevicePart",
    "FeatureAttributes",
    "GroupType",
    "InvalidCommandError",
    "InvalidFieldError",
    "InvalidGroupError",
    "InvalidMemberError",
    "InvalidOpcodeError",
    "MalformedResultError",
    "ManagementOperation",
    "ManagementResource",
    "MetadataType",
    "NoMemoryError",
    "NoSpaceError",
    "NoSuchResourceError",
    "NotifyInfo",
    "NotifyPlace",
    "ObjectHeader",
    "ObjectType",
    "Opcode",
    "PartHeader",
    "PartType",
    "PartsGetType",
    "PartsOperation",
    "Qualifier",
    "ResourceExistsError",
    "Status",
    "TryAgainError",
    "VqConfig",
    "VqNotifyConfig",
    "bits_in",
    "capability_data",
    "error_of",
    "legacy_read_data",
    "legacy_write_data",
    "management_data",
    "management_value",
    "metadata_count",
    "metadata_list",
    "mode_data",
    "notify_infos",
    "object_data",
    "opcode_list",
    "opcode_name",
    "opcodes_in",
    "pack_parts",
    "parts_get_data",
    "parts_in",
    "parts_metadata_data",
    "parts_set_data",
]

COMMAND_HEADER_SIZE: Final = 24
"""Bytes before command_specific_data in the device-readable part."""
RESULT_HEADER_SIZE: Final = 8
"""Bytes before command_specific_result in the device-writable part."""

_COMMAND: Final = struct.Struct("<HH12xQ")
_RESULT: Final = struct.Struct("<HH4x")
_WORD_BITS: Final = 64
_OBJECT: Final = struct.Struct("<H2xI")
_FLAGS: Final = struct.Struct("<Q")
_PART: Final = struct.Struct("<HBx8sI")
_COUNT: Final = struct.Struct("<I4x")
_NOTIFY: Final = struct.Struct("<BB6xQ")
_CAPABILITY: Final = struct.Struct("<H6x")
_PAIR: Final = struct.Struct("<BB")
# as the draft has it: packed, so nothing is aligned
_MANAGEMENT: Final = struct.Struct("<BHQ5x")
_MANAGEMENT_RESULT: Final = struct.Struct("<Q8x")
_ATTRIBUTES: Final = struct.Struct("<QQ48x")
_VQ: Final = struct.Struct("<HHH2xQQQ")
_VQ_NOTIFY: Final = struct.Struct("<HH4x")


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


def _pack(layout: struct.Struct, what: str, *values: object) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ValueError(f"{what}: {error}") from None


def _name(kind: type[IntEnum], value: int) -> str | None:
    try:
        return kind(value).name
    except ValueError:
        return None


def _unpack(layout: struct.Struct, what: str, data: bytes, offset: int = 0) -> tuple[Any, ...]:
    if len(data) - offset < layout.size:
        raise ValueError(f"{what}: {max(0, len(data) - offset)} bytes; it has {layout.size}")
    return layout.unpack_from(data, offset)


# --- lists -------------------------------------------------------------------------------------------------


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


def bits_in(bitmap: bytes) -> frozenset[int]:
    """The numbers of such a bitmap, of any length (opcodes, capability ids); what is missing of it reads as zero."""
    bits = int.from_bytes(bitmap, "little")
    return frozenset(number for number in range(bits.bit_length()) if bits >> number & 1)


opcodes_in = bits_in


# --- the legacy interface (2.13.6) --------------------------------------------------------------------------


def legacy_read_data(offset: int) -> bytes:
    """For the two legacy reads; how much is read is the room for the result. `offset`: 0 to 255."""
    if not 0 <= offset <= 0xFF:
        raise ValueError(f"offset {offset} doesn't fit the command; allowed: 0 to 255")
    return bytes([offset])


def legacy_write_data(offset: int, data: bytes) -> bytes:
    """For the two legacy writes: the device takes the length from the command's, so `data` is not padded."""
    return legacy_read_data(offset) + bytes(7) + data


class NotifyPlace(IntEnum):
    """Whose BAR a notify region is in."""

    OWNER = 1
    MEMBER = 2


@dataclass(frozen=True, slots=True)
class NotifyInfo:
    """Where queue notifications of a member may be written, a 16-bit queue index each."""

    place: NotifyPlace
    bar: int
    """1 to 5."""
    offset: int
    """Within the BAR; even."""

    def pack(self) -> bytes:
        """An entry of 16 bytes."""
        return _pack(_NOTIFY, "notify info", self.place, self.bar, self.offset)


def notify_infos(result: bytes) -> tuple[NotifyInfo, ...]:
    """The usable entries of a LEGACY_NOTIFY_INFO result, preferred ones first.

    The list ends with flags 0. Entries of unknown kind, with BAR 0 (which members don't have) or above 5, or at an odd
    offset are left out, as a driver has to.
    """
    found = []
    for start in range(0, len(result) - _NOTIFY.size + 1, _NOTIFY.size):
        flags, bar, offset = _NOTIFY.unpack_from(result, start)
        if flags == 0:
            break
        if flags in (NotifyPlace.OWNER, NotifyPlace.MEMBER) and 1 <= bar <= 5 and offset % 2 == 0:
            found.append(NotifyInfo(NotifyPlace(flags), bar, offset))
    return tuple(found)


# --- capabilities (2.12.1.3) --------------------------------------------------------------------------------


class CapabilityId(IntEnum):
    """Capabilities of a device. Others belong to device types that have none here."""

    DEV_PARTS = 0x0


@dataclass(frozen=True, slots=True)
class DevPartsCapability:
    """How many resource objects there may be at a time; DEVICE_CAP_GET says what can be, DRIVER_CAP_SET what will."""

    get_limit: int
    set_limit: int

    def pack(self) -> bytes:
        """Two bytes."""
        return _pack(_PAIR, "device parts capability", self.get_limit, self.set_limit)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From the capability's data; more than two bytes are ignored."""
        return cls(*_unpack(_PAIR, "device parts capability", data))


def capability_data(capability: int, data: bytes = b"") -> bytes:
    """For DEVICE_CAP_GET (no data) and DRIVER_CAP_SET."""
    return _pack(_CAPABILITY, "capability", capability) + data


# --- resource objects (2.12.1.4) ----------------------------------------------------------------------------


class ObjectType(IntEnum):
    """Types of resource objects."""

    DEV_PARTS = 0x0


class PartsOperation(IntEnum):
    """What a device parts object is for."""

    GET = 0
    SET = 1


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """Names a resource object: ids are the driver's choice, from 0 to the limit of the capability less one."""

    id: int
    type: int = ObjectType.DEV_PARTS

    def pack(self) -> bytes:
        """8 bytes."""
        return _pack(_OBJECT, "resource object", self.type, self.id)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From the beginning of the data."""
        object_type, object_id = _unpack(_OBJECT, "resource object", data)
        return cls(object_id, object_type)


@dataclass(frozen=True, slots=True)
class DevPartsObject:
    """The data of a device parts object."""

    operation: PartsOperation

    def pack(self) -> bytes:
        """8 bytes."""
        return bytes([self.operation]).ljust(8, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From the object's data. Raises ValueError for an operation there isn't."""
        if not data:
            raise ValueError("device parts object: 0 bytes; it has 8")
        return cls(PartsOperation(data[0]))


def object_data(header: ObjectHeader, data: bytes = b"", *, flags: int = 0) -> bytes:
    """For RESOURCE_OBJ_CREATE and _MODIFY (with the object's data) and _QUERY (without). _DESTROY takes the header."""
    return header.pack() + _pack(_FLAGS, "resource object flags", flags) + data


# --- device parts (2.12.1.5) --------------------------------------------------------------------------------


class MetadataType(IntEnum):
    """What DEV_PARTS_METADATA_GET asks for."""

    SIZE = 0
    COUNT = 1
    LIST = 2


class PartsGetType(IntEnum):
    """Which parts DEV_PARTS_GET asks for."""

    SELECTED = 0
    ALL = 1


class PartType(IntEnum):
    """Device parts. Those of device types begin at 0x200."""

    DEV_FEATURES = 0x100
    DRV_FEATURES = 0x101
    PCI_COMMON_CFG = 0x102
    DEVICE_STATUS = 0x103
    VQ_CFG = 0x104
    VQ_NOTIFY_CFG = 0x105


_OPTIONAL: Final = 1
_NO_SELECTOR: Final = bytes(8)


@dataclass(frozen=True, slots=True)
class PartHeader:
    """Names a device part."""

    type: int
    optional: bool = False
    """Whoever sets it may leave it out."""
    selector: bytes = _NO_SELECTOR
    """8 bytes: which one of its type; see `index`."""
    length: int = 0
    """Of the value."""

    @property
    def index(self) -> int | None:
        """The queue, or the offset within the common configuration, where the type has one."""
        match self.type:
            case PartType.PCI_COMMON_CFG:
                return int.from_bytes(self.selector[:4], "little")
            case PartType.VQ_CFG | PartType.VQ_NOTIFY_CFG:
                return int.from_bytes(self.selector[:2], "little")
            case _:
                return None

    @property
    def name(self) -> str:
        """The type by name, or by number."""
        return _name(PartType, self.type) or f"0x{self.type:x}"

    def pack(self) -> bytes:
        """16 bytes."""
        if len(self.selector) != 8:
            raise ValueError(f"device part: a selector of {len(self.selector)} bytes; it has 8")
        return _pack(_PART, "device part", self.type, _OPTIONAL if self.optional else 0, self.selector, self.length)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Self:
        """From the bytes at this offset."""
        part_type, flags, selector, length = _unpack(_PART, "device part", data, offset)
        return cls(part_type, bool(flags & _OPTIONAL), selector, length)


@dataclass(frozen=True, slots=True)
class VqConfig:
    """The value of a VQ_CFG part."""

    size: int
    vector: int
    enabled: bool
    desc: int
    driver: int
    device: int

    def pack(self) -> bytes:
        """32 bytes."""
        values = (self.size, self.vector, int(self.enabled), self.desc, self.driver, self.device)
        return _pack(_VQ, "queue configuration", *values)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From the part's value."""
        size, vector, enabled, desc, driver, device = _unpack(_VQ, "queue configuration", data)
        return cls(size, vector, bool(enabled), desc, driver, device)


@dataclass(frozen=True, slots=True)
class VqNotifyConfig:
    """The value of a VQ_NOTIFY_CFG part."""

    notify_off: int
    config_data: int

    def pack(self) -> bytes:
        """8 bytes."""
        return _pack(_VQ_NOTIFY, "queue notification", self.notify_off, self.config_data)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From the part's value."""
        return cls(*_unpack(_VQ_NOTIFY, "queue notification", data))


@dataclass(frozen=True, slots=True)
class DevicePart:
    """A device part with its value."""

    type: int
    value: bytes
    optional: bool = False
    selector: bytes = _NO_SELECTOR

    @property
    def header(self) -> PartHeader:
        """What precedes the value on the wire."""
        return PartHeader(self.type, self.optional, self.selector, len(self.value))

    def pack(self) -> bytes:
        """Header and value."""
        return self.header.pack() + self.value

    def decoded(self) -> int | VqConfig | VqNotifyConfig | None:
        """The value as what it means; None when it has no meaning here, or not its length."""
        match self.type:
            case PartType.DEV_FEATURES | PartType.DRV_FEATURES if len(self.value) % 8 == 0:
                return int.from_bytes(self.value, "little")
            case PartType.PCI_COMMON_CFG if len(self.value) in (1, 2, 4, 8):
                return int.from_bytes(self.value, "little")
            case PartType.DEVICE_STATUS if len(self.value) == 1:
                return self.value[0]
            case PartType.VQ_CFG if len(self.value) == _VQ.size:
                return VqConfig.unpack(self.value)
            case PartType.VQ_NOTIFY_CFG if len(self.value) == _VQ_NOTIFY.size:
                return VqNotifyConfig.unpack(self.value)
            case _:
                return None


def pack_parts(parts: Iterable[DevicePart]) -> bytes:
    """Parts as DEV_PARTS_GET returns and DEV_PARTS_SET takes them."""
    return b"".join(part.pack() for part in parts)


def _parts(data: bytes) -> Iterator[DevicePart]:
    offset = 0
    while offset < len(data):
        header = PartHeader.unpack(data, offset)
        offset += _PART.size
        if len(data) - offset < header.length:
            raise ValueError(f"device part {header.name}: {len(data) - offset} bytes of {header.length}")
        value = data[offset : offset + header.length]
        yield DevicePart(header.type, value, header.optional, header.selector)
        offset += header.length


def parts_in(data: bytes) -> tuple[DevicePart, ...]:
    """The parts in a row of them."""
    return tuple(_parts(data))


def parts_metadata_data(header: ObjectHeader, wanted: MetadataType) -> bytes:
    """For DEV_PARTS_METADATA_GET."""
    return header.pack() + bytes([wanted]).ljust(8, b"\0")


def metadata_count(result: bytes) -> int:
    """The size (bytes of all parts with their headers) or count in a result of DEV_PARTS_METADATA_GET."""
    return int(_unpack(_COUNT, "device parts metadata", result)[0])


def metadata_list(result: bytes) -> tuple[PartHeader, ...]:
    """The headers in a result of DEV_PARTS_METADATA_GET."""
    count = metadata_count(result)
    if (len(result) - _COUNT.size) // _PART.size < count:
        raise ValueError(f"device parts metadata: {len(result)} bytes for {count} parts")
    return tuple(PartHeader.unpack(result, _COUNT.size + index * _PART.size) for index in range(count))


def parts_get_data(header: ObjectHeader, selected: Sequence[PartHeader] | None = None) -> bytes:
    """For DEV_PARTS_GET: these parts, or all."""
    wanted = PartsGetType.ALL if selected is None else PartsGetType.SELECTED
    return header.pack() + bytes([wanted]).ljust(8, b"\0") + b"".join(part.pack() for part in selected or ())


def parts_set_data(header: ObjectHeader, parts: bytes) -> bytes:
    """For DEV_PARTS_SET: packed parts."""
    return header.pack() + parts


def mode_data(*, stopped: bool) -> bytes:
    """For DEV_MODE_SET: bit 0 stops. (The specification's constant 0 is the bit's number.)"""
    return bytes([1 if stopped else 0])


# --- feature management (never standardised; design D10) ----------------------------------------------------


class ManagementOperation(IntEnum):
    """What DEVICE_MGMT does."""

    ASSIGN = 1
    QUERY = 2


class ManagementResource(IntEnum):
    """What DEVICE_MGMT does it with."""

    FEATURES_63_0 = 0


@dataclass(frozen=True, slots=True)
class FeatureAttributes:
    """The result of DEVICE_MGMT_ATTRS: which features of members can be assigned; None when it doesn't say."""

    features: int | None

    def pack(self) -> bytes:
        """64 bytes."""
        return _pack(_ATTRIBUTES, "attributes", int(self.features is not None), self.features or 0)

    @classmethod
    def unpack(cls, result: bytes) -> Self:
        """From the command's result."""
        mask, features = _unpack(_ATTRIBUTES, "attributes", result)
        return cls(features if mask & 1 else None)


def management_data(operation: int, resource: int = ManagementResource.FEATURES_63_0, value: int = 0) -> bytes:
    """For DEVICE_MGMT, 16 bytes; the value is that of an assignment."""
    return _pack(_MANAGEMENT, "device management", operation, resource, value)


def management_value(result: bytes) -> int:
    """The value in a result of DEVICE_MGMT."""
    return int(_unpack(_MANAGEMENT_RESULT, "device management", result)[0])


# --- errors ------------------------------------------------------------------------------------------------


def opcode_name(opcode: int) -> str:
    """By name where it has one."""
    return _name(Opcode, opcode) or f"opcode 0x{opcode:x}"


class AdminError(VhuError):
    """A command failed. The attributes say which, on whom, and how; the classes below are one for each status."""

    def __init__(
        self,
        opcode: int,
        group_type: int,
        member: int,
        status: Status,
        qualifier: Qualifier,
        reason: str | None = None,
    ) -> None:
        who = f"member {member}" if group_type == GroupType.SR_IOV and member else "owner"
        text = reason if reason is not None else f"{status.name} / {qualifier.name}"
        super().__init__(f"{who}: {opcode_name(opcode)}: {text}")
        self.opcode = opcode
        self.group_type = group_type
        self.member = member
        self.status = status
        self.qualifier = qualifier


class InvalidCommandError(AdminError):
    """EINVAL: nothing has changed."""


class InvalidOpcodeError(InvalidCommandError):
    """EINVAL: the device doesn't have this command for this group, or it isn't in the set of LIST_USE."""


class InvalidFieldError(InvalidCommandError):
    """EINVAL: something in command_specific_data, such as a legacy access that isn't within one register."""


class InvalidGroupError(InvalidCommandError):
    """EINVAL: there is no such group; there are no VFs."""


class InvalidMemberError(InvalidCommandError):
    """EINVAL: there is no such member."""


class NoSuchResourceError(AdminError):
    """ENXIO: no such capability or resource object."""


class TryAgainError(AdminError):
    """EAGAIN: nothing has changed, and it may work later."""


class NoMemoryError(AdminError):
    """ENOMEM: nothing has changed; also when a result of DEV_PARTS_METADATA_GET doesn't fit its room."""


class DeviceBusyError(AdminError):
    """EBUSY: the member, or what depends on the object, is in the way."""


class ResourceExistsError(AdminError):
    """EEXIST: there is an object with this id already."""


class NoSpaceError(AdminError):
    """ENOSPC: no more of these objects."""


class MalformedResultError(AdminError):
    """The command succeeded, as it says, but its result isn't one: the device is at fault."""


_ERRORS: Final[dict[Status, type[AdminError]]] = {
    Status.ENXIO: NoSuchResourceError,
    Status.EAGAIN: TryAgainError,
    Status.ENOMEM: NoMemoryError,
    Status.EBUSY: DeviceBusyError,
    Status.EEXIST: ResourceExistsError,
    Status.ENOSPC: NoSpaceError,
}
_INVALID: Final[dict[Qualifier, type[AdminError]]] = {
    Qualifier.INVALID_OPCODE: InvalidOpcodeError,
    Qualifier.INVALID_FIELD: InvalidFieldError,
    Qualifier.INVALID_GROUP: InvalidGroupError,
    Qualifier.INVALID_MEMBER: InvalidMemberError,
}


def error_of(command: Command, result: CommandResult) -> AdminError | None:
    """The exception for a command's result; None when it succeeded."""
    if result.status == Status.OK:
        return None
    kind = _ERRORS.get(result.status) or _INVALID.get(result.qualifier, InvalidCommandError)
    return kind(command.opcode, command.group_type, command.group_member_id, result.status, result.qualifier)
