# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The wire format of administration commands, against layouts written down by hand."""

from __future__ import annotations

import pytest

from vhu_legacy.admin import (
    Command,
    CommandResult,
    GroupType,
    Opcode,
    Qualifier,
    Status,
    opcode_list,
    opcodes_in,
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
