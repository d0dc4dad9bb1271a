# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The wire format of administration commands, against layouts written down by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vhu_legacy import VhuError, admin
from vhu_legacy.admin import (
    CapabilityId,
    Command,
    CommandResult,
    DevicePart,
    DevPartsCapability,
    DevPartsObject,
    FeatureAttributes,
    GroupType,
    ManagementOperation,
    MetadataType,
    NotifyInfo,
    NotifyPlace,
    ObjectHeader,
    Opcode,
    PartHeader,
    PartsOperation,
    PartType,
    Qualifier,
    Status,
    VqConfig,
    VqNotifyConfig,
    bits_in,
    capability_data,
    error_of,
    legacy_read_data,
    legacy_write_data,
    management_data,
    management_value,
    metadata_count,
    metadata_list,
    mode_data,
    notify_infos,
    object_data,
    opcode_list,
    opcode_name,
    opcodes_in,
    pack_parts,
    parts_get_data,
    parts_in,
    parts_metadata_data,
    parts_set_data,
)


def test_command_layout() -> None:
    command = Command(Opcode.LEGACY_COMMON_CFG_READ, GroupType.SR_IOV, 0x0102030405060708, b"\x12")
    part = command.pack()
    assert part == bytes.fromhex("0300 0100 000000000000000000000000 0807060504030201 12")
    assert Command.unpack(part) == command


def test_a_short_command_reads_as_zeroes() -> None:
    part = Command(Opcode.LIST_USE, GroupType.SR_IOV, 7, b"\xff" * 8).pack()
    for length in range(24):
        command = Command.unpack(part[:length])
        assert command.data == b""
        assert command.opcode == (1 if length else 0)
        assert command.group_type == (1 if length > 2 else 0)
        assert command.group_member_id == (7 if length > 16 else 0)


@pytest.mark.parametrize(("opcode", "group", "member"), [(-1, 0, 0), (0x10000, 0, 0), (0, 0x10000, 0), (0, 0, 1 << 64)])
def test_numbers_that_do_not_fit(opcode: int, group: int, member: int) -> None:
    with pytest.raises(ValueError, match="administration command"):
        Command(opcode, group, member).pack()


def test_result_layout() -> None:
    result = CommandResult(Status.EINVAL, Qualifier.INVALID_MEMBER, b"\xaa\xbb")
    assert result.pack() == bytes.fromhex("1600 0500 00000000 aabb")
    assert CommandResult.unpack(result.pack()) == result


def test_unknown_outcomes_are_read_as_the_specification_says() -> None:
    result = CommandResult.unpack(bytes.fromhex("6300 2a00 00000000"))
    assert (result.status, result.qualifier) == (Status.EINVAL, Qualifier.INVALID_COMMAND)


@pytest.mark.parametrize("length", range(8))
def test_a_completion_without_its_header(length: int) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        CommandResult.unpack(bytes(length))


@pytest.mark.parametrize(
    ("opcodes", "bitmap"),
    [
        ([], bytes(8)),
        ([0, 1], b"\x03" + bytes(7)),
        (range(2, 7), b"\x7c" + bytes(7)),
        ([63], bytes(7) + b"\x80"),
        ([64], bytes(8) + b"\x01" + bytes(7)),
        ([0, 128], b"\x01" + bytes(15) + b"\x01" + bytes(7)),
    ],
)
def test_opcode_bitmaps(opcodes: list[int], bitmap: bytes) -> None:
    assert opcode_list(opcodes) == bitmap
    assert opcodes_in(bitmap) == set(opcodes)


def test_what_linux_asks_for() -> None:
    """The masks of Linux 6.12 and 7.2 on x86."""
    assert int.from_bytes(opcode_list(range(2, 7)), "little") == 0x7C
    assert opcodes_in((0x3E7FC).to_bytes(8, "little")) == {*range(2, 11), *range(13, 18)}


def test_not_an_opcode() -> None:
    with pytest.raises(ValueError, match="not an opcode"):
        opcode_list([0x10000])


# --- the legacy interface ---------------------------------------------------------------------------------


def test_legacy_access_layouts() -> None:
    assert legacy_read_data(18) == b"\x12"
    assert legacy_write_data(16, b"\x01\x00") == bytes.fromhex("10 00000000000000 0100")
    for offset in (-1, 256):
        with pytest.raises(ValueError, match="allowed: 0 to 255"):
            legacy_read_data(offset)


def test_notify_regions() -> None:
    first = bytes.fromhex("02 02 000000000000 0030000000000000")
    second = bytes.fromhex("01 04 000000000000 0200000000000000")
    member = NotifyInfo(NotifyPlace.MEMBER, 2, 0x3000)
    owner = NotifyInfo(NotifyPlace.OWNER, 4, 2)
    assert notify_infos(first + second + bytes(32)) == (member, owner)
    assert (member.pack(), owner.pack()) == (first, second)


@pytest.mark.parametrize(
    "entry",
    [
        "03 02 000000000000 0030000000000000",  # no such kind
        "02 00 000000000000 0030000000000000",  # members have no BAR 0
        "02 06 000000000000 0030000000000000",  # nobody has
        "02 02 000000000000 0130000000000000",  # odd
    ],
)
def test_notify_regions_that_a_driver_must_not_use(entry: str) -> None:
    good = NotifyInfo(NotifyPlace.MEMBER, 1, 0).pack()
    assert notify_infos(bytes.fromhex(entry) + good) == notify_infos(good)


def test_a_torn_notify_list() -> None:
    good = NotifyInfo(NotifyPlace.MEMBER, 1, 0).pack()
    # what comes after the end of the list is no part of it, nor is half an entry
    assert notify_infos(good + bytes(16) + good) == notify_infos(good + good[:15]) == notify_infos(good)
    assert notify_infos(b"") == ()


# --- capabilities and objects -----------------------------------------------------------------------------


def test_capability_layouts() -> None:
    assert capability_data(CapabilityId.DEV_PARTS) == bytes(8)
    assert capability_data(0x801, b"\x08\x09") == bytes.fromhex("0108 000000000000 0809")
    assert DevPartsCapability(8, 9).pack() == b"\x08\x09"
    assert DevPartsCapability.unpack(b"\x08\x09\x00\x00") == DevPartsCapability(8, 9)
    assert bits_in(b"\x01" + bytes(511)) == {CapabilityId.DEV_PARTS}


def test_object_layouts() -> None:
    header = ObjectHeader(0x04030201, 0x0605)
    assert header.pack() == bytes.fromhex("0506 0000 01020304")
    assert ObjectHeader.unpack(header.pack() + b"more") == header
    assert object_data(ObjectHeader(7), DevPartsObject(PartsOperation.SET).pack()) == bytes.fromhex(
        "0000 0000 07000000 0000000000000000 01 00000000000000"
    )
    assert object_data(ObjectHeader(7), flags=1) == bytes.fromhex("0000 0000 07000000 0100000000000000")
    assert DevPartsObject.unpack(b"\x01") == DevPartsObject(PartsOperation.SET)


# --- device parts -----------------------------------------------------------------------------------------


def test_parts_command_layouts() -> None:
    header = ObjectHeader(3)
    assert parts_metadata_data(header, MetadataType.LIST) == bytes.fromhex("0000 0000 03000000 02 00000000000000")
    assert parts_get_data(header) == bytes.fromhex("0000 0000 03000000 01 00000000000000")
    selected = PartHeader(PartType.VQ_CFG, selector=b"\x02" + bytes(7), length=32)
    assert parts_get_data(header, [selected]) == bytes.fromhex(
        "0000 0000 03000000 00 00000000000000 0401 00 00 0200000000000000 20000000"
    )
    assert parts_set_data(header, b"parts") == bytes.fromhex("0000 0000 03000000") + b"parts"
    assert (mode_data(stopped=True), mode_data(stopped=False)) == (b"\1", b"\0")


PARTS = (
    DevicePart(PartType.DEV_FEATURES, bytes.fromhex("0000003001000000"), optional=True),
    DevicePart(PartType.DRV_FEATURES, bytes.fromhex("0000000000000000")),
    DevicePart(PartType.PCI_COMMON_CFG, b"\xff\xff", selector=b"\x10" + bytes(7)),
    DevicePart(PartType.DEVICE_STATUS, b"\x0f"),
    DevicePart(PartType.VQ_CFG, VqConfig(256, 1, True, 0x1000, 0x2000, 0x3000).pack(), selector=b"\1" + bytes(7)),
    DevicePart(PartType.VQ_NOTIFY_CFG, VqNotifyConfig(1, 0).pack(), selector=b"\1" + bytes(7)),
    DevicePart(0x200, b""),
)


def test_parts_layout() -> None:
    assert PARTS[0].pack() == bytes.fromhex("0001 01 00 0000000000000000 08000000 0000003001000000")
    assert PARTS[4].value == bytes.fromhex("0001 0100 0100 0000 0010000000000000 0020000000000000 0030000000000000")
    assert PARTS[5].value == bytes.fromhex("0100 0000 00000000")
    assert parts_in(pack_parts(PARTS)) == PARTS
    assert parts_in(b"") == ()


def test_what_parts_mean() -> None:
    assert [part.header.name for part in PARTS] == [
        "DEV_FEATURES",
        "DRV_FEATURES",
        "PCI_COMMON_CFG",
        "DEVICE_STATUS",
        "VQ_CFG",
        "VQ_NOTIFY_CFG",
        "0x200",
    ]
    assert [part.header.index for part in PARTS] == [None, None, 16, None, 1, 1, None]
    assert [part.decoded() for part in PARTS] == [
        0x130000000,
        0,
        0xFFFF,
        0x0F,
        VqConfig(256, 1, True, 0x1000, 0x2000, 0x3000),
        VqNotifyConfig(1, 0),
        None,
    ]
    # a value that isn't as long as its type's is shown as bytes, not as something else
    assert DevicePart(PartType.DEVICE_STATUS, b"\1\2").decoded() is None
    assert DevicePart(PartType.VQ_CFG, bytes(31)).decoded() is None


@pytest.mark.parametrize("length", range(1, len(PARTS[0].pack())))
def test_torn_parts(length: int) -> None:
    with pytest.raises(ValueError, match="device part"):
        parts_in(PARTS[1].pack() + PARTS[0].pack()[:length])


def test_a_part_longer_than_everything() -> None:
    with pytest.raises(ValueError, match="DRV_FEATURES: 8 bytes of 4294967295"):
        parts_in(PartHeader(PartType.DRV_FEATURES, length=0xFFFFFFFF).pack() + bytes(8))


def test_metadata() -> None:
    headers = [part.header for part in PARTS]
    result = bytes.fromhex("07000000 00000000") + b"".join(header.pack() for header in headers)
    assert metadata_count(result) == 7
    assert metadata_list(result) == tuple(headers)
    for length in (0, 7, len(result) - 1):
        with pytest.raises(ValueError, match="metadata"):
            metadata_list(result[:length])


# --- feature management -----------------------------------------------------------------------------------


def test_management_layouts() -> None:
    """Packed as the draft has it: the value begins at offset 3."""
    data = management_data(ManagementOperation.ASSIGN, value=0x1122334455667788)
    assert data == bytes.fromhex("01 0000 8877665544332211 0000000000")
    assert management_data(ManagementOperation.QUERY, 0x0201) == bytes.fromhex("02 0102") + bytes(13)
    assert management_value(bytes.fromhex("8877665544332211") + bytes(8)) == 0x1122334455667788
    attributes = FeatureAttributes(0x1122334455667788)
    assert attributes.pack() == bytes.fromhex("0100000000000000 8877665544332211") + bytes(48)
    assert FeatureAttributes.unpack(attributes.pack()) == attributes
    assert FeatureAttributes.unpack(bytes(64)).features is None


@pytest.mark.parametrize(
    "pack",
    [
        lambda: capability_data(0x10000),
        lambda: DevPartsCapability(256, 0).pack(),
        lambda: ObjectHeader(1 << 32).pack(),
        lambda: ObjectHeader(0, -1).pack(),
        lambda: object_data(ObjectHeader(0), flags=1 << 64),
        lambda: PartHeader(0x10000).pack(),
        lambda: PartHeader(0x100, selector=bytes(7)).pack(),
        lambda: management_data(256),
        lambda: management_data(1, 0, 1 << 64),
        lambda: VqConfig(1 << 16, 0, True, 0, 0, 0).pack(),
        lambda: NotifyInfo(NotifyPlace.MEMBER, 256, 0).pack(),
    ],
)
def test_what_does_not_fit_its_field(pack: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match=":"):
        pack()


@pytest.mark.parametrize(
    "unpack",
    [
        DevPartsCapability.unpack,
        ObjectHeader.unpack,
        DevPartsObject.unpack,
        PartHeader.unpack,
        VqConfig.unpack,
        VqNotifyConfig.unpack,
        FeatureAttributes.unpack,
        metadata_count,
        management_value,
    ],
)
def test_results_that_are_too_short(unpack: Callable[[bytes], object]) -> None:
    with pytest.raises(ValueError, match=r"0 bytes; it has \d+"):
        unpack(b"")


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "qualifier", "kind"),
    [
        (Status.EINVAL, Qualifier.INVALID_COMMAND, admin.InvalidCommandError),
        (Status.EINVAL, Qualifier.OK, admin.InvalidCommandError),
        (Status.EINVAL, Qualifier.INVALID_OPCODE, admin.InvalidOpcodeError),
        (Status.EINVAL, Qualifier.INVALID_FIELD, admin.InvalidFieldError),
        (Status.EINVAL, Qualifier.INVALID_GROUP, admin.InvalidGroupError),
        (Status.EINVAL, Qualifier.INVALID_MEMBER, admin.InvalidMemberError),
        (Status.ENXIO, Qualifier.INVALID_COMMAND, admin.NoSuchResourceError),
        (Status.EAGAIN, Qualifier.TRYAGAIN, admin.TryAgainError),
        (Status.ENOMEM, Qualifier.NORESOURCE, admin.NoMemoryError),
        (Status.EBUSY, Qualifier.INVALID_COMMAND, admin.DeviceBusyError),
        (Status.EEXIST, Qualifier.INVALID_COMMAND, admin.ResourceExistsError),
        (Status.ENOSPC, Qualifier.NORESOURCE, admin.NoSpaceError),
    ],
)
def test_each_status_has_its_exception(status: Status, qualifier: Qualifier, kind: type[admin.AdminError]) -> None:
    command = Command(Opcode.DEV_MODE_SET, GroupType.SR_IOV, 7, b"\1")
    error = error_of(command, CommandResult(status, qualifier))
    assert type(error) is kind
    assert isinstance(error, VhuError)
    assert (error.opcode, error.group_type, error.member) == (Opcode.DEV_MODE_SET, GroupType.SR_IOV, 7)
    assert (error.status, error.qualifier) == (status, qualifier)
    assert str(error) == f"member 7: DEV_MODE_SET: {status.name} / {qualifier.name}"
    assert isinstance(error, admin.InvalidCommandError) is (status is Status.EINVAL)


def test_success_and_strangers() -> None:
    command = Command(0x1234, GroupType.SELF)
    assert error_of(command, CommandResult(Status.OK, Qualifier.OK)) is None
    # the driver treats statuses it doesn't know as EINVAL
    strange = CommandResult.unpack(bytes.fromhex("6300 2a00 00000000"))
    assert str(error_of(command, strange)) == "owner: opcode 0x1234: EINVAL / INVALID_COMMAND"
    assert opcode_name(Opcode.LIST_USE) == "LIST_USE"
