# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The suite itself: devices that are wrong in one respect, and the checks that have to notice.

Each device is a right one whose commands or answers are changed on the way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import pytest

from vhu_legacy.admin import Command, Opcode
from vhu_legacy.conformance import CHECKS, Outcome, run_check
from vhu_legacy.conformance.native import InProcessTarget
from vhu_legacy.virtio_driver import Completion, Framing

Send = Callable[[bytes, int], bytes]
"""A right device: readable part and room in, written part out."""
Wrong = Callable[[Send, bytes, int], bytes]


class WrongTarget(InProcessTarget):
    """An in-process group behind something that changes what is said."""

    wrong: Wrong | None = None
    resets: bool = True
    reversed: bool = False

    def raw_many(
        self, commands: Sequence[tuple[bytes, int]], *, queues: Sequence[int] = (0,), framing: Framing | None = None
    ) -> list[Completion]:
        if self.reversed and len(commands) > 1:
            return super().raw_many(commands[::-1], queues=queues, framing=framing)[::-1]
        if self.wrong is None:
            return super().raw_many(commands, queues=queues, framing=framing)
        done = []
        for readable, writable in commands:

            def send(readable: bytes, writable: int) -> bytes:
                return super(WrongTarget, self).raw_many([(readable, writable)])[0].buffer

            written = self.wrong(send, readable, writable)
            done.append(Completion(len(written), written, whole=False))
        return done

    def reset_owner(self) -> None:
        if self.resets:
            super().reset_owner()


@pytest.fixture
def target() -> Iterator[WrongTarget]:
    target = WrongTarget()
    yield target
    target.close()


def _answer(change: Callable[[Command, bytes], bytes], *opcodes: int, failed: bool | None = None) -> Wrong:
    """Change the answers to some commands (default: all); `failed`: only those that failed, or only the others."""

    def wrong(send: Send, readable: bytes, writable: int) -> bytes:
        written = send(readable, writable)
        command = Command.unpack(readable)
        if opcodes and command.opcode not in opcodes:
            return written
        if failed is not None and any(written[:2]) != failed:
            return written
        return change(command, written)

    return wrong


def _question(change: Callable[[Command], Command | None], *opcodes: int) -> Wrong:
    """Change some commands on their way to the device; None: they never get there, and succeed."""

    def wrong(send: Send, readable: bytes, writable: int) -> bytes:
        command = Command.unpack(readable)
        if len(readable) < 24 or (opcodes and command.opcode not in opcodes):
            return send(readable, writable)
        changed = change(command)
        return bytes(writable) if changed is None else send(changed.pack(), writable)

    return wrong


def _codes(status: int, qualifier: int) -> Callable[[Command, bytes], bytes]:
    return lambda _, written: struct.pack("<HH", status, qualifier)[: len(written)] + written[4:]


def _feature(bit: int, present: bool) -> Callable[[Command, bytes], bytes]:
    def change(command: Command, written: bytes) -> bytes:
        if command.data[:1] != b"\0" or len(written) != 12:
            return written
        value = int.from_bytes(written[8:], "little")
        value = value | 1 << bit if present else value & ~(1 << bit)
        return written[:8] + value.to_bytes(4, "little")

    return change


def _entry(index: int, flags: int, bar: int, offset: int) -> Callable[[Command, bytes], bytes]:
    def change(_: Command, written: bytes) -> bytes:
        if len(written) != 72:
            return written
        at = 8 + 16 * index
        return written[:at] + struct.pack("<BB6xQ", flags, bar, offset) + written[at + 16 :]

    return change


def _listed(bits: int, present: bool, group: int | None = None) -> Callable[[Command, bytes], bytes]:
    def change(command: Command, written: bytes) -> bytes:
        if len(written) < 16 or (group is not None and command.group_type != group):
            return written
        value = int.from_bytes(written[8:16], "little")
        value = value | bits if present else value & ~bits
        return written[:8] + value.to_bytes(8, "little") + written[16:]

    return change


def _member_one(command: Command) -> Command:
    """Whatever member is meant, it is member 1."""
    return Command(command.opcode, command.group_type, 1 if command.group_type == 1 else 0, command.data)


def _offset_wraps(command: Command) -> Command:
    """Offsets beyond the registers come out somewhere among them."""
    data = bytes([command.data[0] % 16]) + command.data[1:] if command.data else b""
    return Command(command.opcode, command.group_type, command.group_member_id, data)


def _pad(command: Command) -> Command:
    """What a device does that takes a short write for a longer one."""
    return Command(command.opcode, command.group_type, command.group_member_id, command.data.ljust(16, b"\0"))


LEGACY_READS: Final = (Opcode.LEGACY_COMMON_CFG_READ, Opcode.LEGACY_DEV_CFG_READ)

WRONG: Final[dict[str, tuple[Wrong, list[str]]]] = {
    "all is well, always": (
        _answer(_codes(0, 0)),
        ["ADM-01", "ADM-02", "ADM-03", "ADM-04", "ADM-06", "ADM-07", "LST-03", "LST-10", "LST-11", "LEG-03", "CAP-02"],
    ),
    "no qualifiers": (_answer(_codes(22, 0), failed=True), ["ADM-01", "ADM-02", "ADM-03", "ADM-13", "LST-01"]),
    "members before opcodes": (_answer(_codes(22, 5), failed=True), ["ADM-02", "ADM-03", "LST-03"]),
    "opcodes before groups": (_answer(_codes(22, 2), failed=True), ["ADM-02", "ADM-04", "LST-09", "LST-10"]),
    "another status": (_answer(_codes(16, 1), failed=True), ["ADM-01", "CAP-03", "OBJ-01", "OBJ-02", "OBJ-03"]),
    "a qualifier with success": (_answer(_codes(0, 1), failed=False), ["ADM-05", "ADM-10", "ADM-13"]),
    "reserved2 isn't 0": (_answer(lambda _, w: w[:4] + b"\1" + w[5:]), ["ADM-17"]),
    "one byte too many": (_answer(lambda _, w: w + b"\0"), ["ADM-11", "ADM-12", "LEG-03"]),
    "nothing written on failure": (_answer(lambda _, w: w[:0], failed=True), ["ADM-13"]),
    "noise on failure": (_answer(lambda _, w: w[:8] + b"\5" * 64, 6, failed=True), ["ADM-14"]),
    "short commands fail": (
        lambda send, r, w: struct.pack("<HHI", 22, 1, 0)[:w] if len(r) < 24 else send(r, w),
        ["ADM-10"],
    ),
    "long commands fail": (
        lambda send, r, w: struct.pack("<HHI", 22, 1, 0)[:w] if len(r) > 100 else send(r, w),
        ["ADM-12"],
    ),
    "reserved1 has to be 0": (
        lambda send, r, w: struct.pack("<HHI", 22, 1, 0)[:w] if any(r[4:16]) else send(r, w),
        ["ADM-17"],
    ),
    "lists don't say 0 and 1": (_answer(_listed(3, False), 0), ["LST-04"]),
    "list of an unknown length of bits": (_answer(_listed(1 << 0x13, True), 0), ["LST-02", "LST-03"]),
    "not all legacy commands": (_answer(_listed(1 << 4, False), 0), ["LEG-01", "LEG-09"]),
    "not all capability commands": (_answer(_listed(1 << 8, False, 0), 0), ["CAP-01"]),
    "not all parts commands": (_answer(_listed(1 << 0xF, False), 0), ["PRT-01"]),
    "LIST_USE has no effect": (_question(lambda _: None, 1), ["LST-02", "LST-03"]),
    "any member is member 1": (_question(_member_one), ["ADM-01", "ADM-04", "LST-10"]),
    "big-endian": (_answer(lambda _, w: w[:8] + w[:7:-1], *LEGACY_READS, failed=False), ["LEG-02", "LEG-08", "LIF-06"]),
    "offsets wrap": (_question(_offset_wraps, 2, 3, 4, 5), ["LEG-03", "LEG-04"]),
    "writes are padded": (_question(_pad, 2, 4), ["LEG-05", "LIF-08"]),
    "writes have no effect": (
        _question(lambda _: None, 2, 4),
        ["LEG-02", "LEG-05", "LEG-07", "LIF-02", "LIF-03", "LIF-07", "LIF-10", "ADM-15", "PRT-06"],
    ),
    "ISR isn't cleared": (
        _answer(lambda c, w: w[:8] + b"\1" if c.data[:1] == b"\x13" and len(w) == 9 else w, 3),
        ["LEG-06", "LIF-08", "LIF-09"],
    ),
    "a reset isn't": (
        _question(lambda c: None if c.data[:1] == b"\x12" and c.data[8:] == b"\0" else c, 2),
        ["LIF-08", "LIF-10", "PRT-06"],
    ),
    "no ANY_LAYOUT": (_answer(_feature(27, False), 3), ["LIF-12"]),
    "ZONED": (_answer(_feature(17, True), 3), ["LIF-18"]),
    "other features than the modern ones": (_answer(_feature(9, False), 3), ["LEG-06"]),
    "four notify entries": (_answer(_entry(3, 2, 2, 0x3000), 6), ["LEG-10"]),
    "notify in BAR0": (_answer(_entry(0, 2, 0, 0x3000), 6), ["LEG-11"]),
    "notify in a BAR that isn't there": (_answer(_entry(0, 2, 5, 0), 6), ["LEG-11"]),
    "notify behind the BAR's end": (_answer(_entry(0, 2, 2, 1 << 40), 6), ["LEG-11"]),
    "notify at an odd address": (_answer(_entry(0, 2, 2, 0x3001), 6), ["LEG-12"]),
    "notify of nobody": (_answer(_entry(0, 3, 2, 0x3000), 6), ["LEG-13"]),
    "notify elsewhere": (_answer(_entry(0, 2, 2, 0), 6), ["LEG-15"]),
    "capability limits aren't taken": (_question(lambda _: None, 9), ["OBJ-01", "OBJ-06", "CAP-04"]),
    "objects aren't made": (_question(lambda _: None, 0xA), ["OBJ-01", "OBJ-05", "PRT-02"]),
    "objects aren't destroyed": (_question(lambda _: None, 0xD), ["OBJ-06", "CAP-04", "OBJ-02"]),
    "queries bring something else": (_answer(lambda _, w: w[:8] + b"\7" + w[9:], 0xB, failed=False), ["OBJ-05"]),
    "parts out of order": (
        _answer(lambda _, w: w[:8] + w[32:] + w[8:32] if len(w) > 60 else w, 0xF),
        ["PRT-02"],
    ),
    "parts are never set, but it says so": (_question(lambda _: None, 0x10), ["PRT-03", "PRT-04", "PRT-05"]),
    "stopping does nothing": (_question(lambda _: None, 0x11), ["MOD-02", "PRT-03"]),
    "stopping twice fails": (_answer(_codes(16, 1), 0x11), ["MOD-01", "MOD-04"]),
}


@pytest.mark.parametrize(("wrong", "check_id"), [(name, one) for name, (_, ids) in WRONG.items() for one in ids])
def test_wrong_devices_are_noticed(target: WrongTarget, wrong: str, check_id: str) -> None:
    target.wrong = WRONG[wrong][0]
    row = run_check(target, CHECKS[check_id])
    assert row.outcome is Outcome.FAIL, row
    assert row.detail


@pytest.mark.parametrize("check_id", ["LST-01", "CAP-05", "OBJ-07"])
def test_a_reset_that_does_nothing_is_noticed(target: WrongTarget, check_id: str) -> None:
    target.resets = False
    assert run_check(target, CHECKS[check_id]).outcome is Outcome.FAIL


def test_another_order_is_noticed(target: WrongTarget) -> None:
    target.reversed = True
    assert run_check(target, CHECKS["ADM-15"]).outcome is Outcome.FAIL


def test_all_ids_are_there() -> None:
    """Each of the requirements has its check."""
    families = {
        "ADM": 17, "LST": 11, "AVQ": 8, "LEG": 16, "LIF": 18, "CAP": 5, "OBJ": 7, "PRT": 6, "MOD": 5,
    }  # fmt: skip
    assert list(CHECKS) == [f"{name}-{i:02}" for name, count in families.items() for i in range(1, count + 1)]
