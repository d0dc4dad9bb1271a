# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Checks of the command envelope (ADM), of command lists (LST) and of the queue (AVQ); virtio 1.4, 2.12 and 2.13."""

from __future__ import annotations

import struct
import time
from typing import Final

from ..admin import Command, GroupType, Opcode, Qualifier, Status, opcode_list
from ..virtio_driver import (
    POISON,
    Common,
    Feature,
    Legacy,
    ModernDevice,
    mask,
    take_events,
)
from ..virtio_driver import Status as DeviceStatus
from .bench import SELF, SR_IOV, Bench, say
from .registry import check
from .report import Level
from .target import CannotReach

UNKNOWN_GROUPS: Final = (2, 7, 0x7FFF, 0xFFFF)
UNKNOWN_OPCODES: Final = (0x12, 0x13, 0x3D, 0x40, 0x7FFF)
"""Unassigned ones. From 0x8000 on another envelope may apply, so those prove nothing."""


def _listed_members(bench: Bench) -> list[int]:
    """Ids that are none of a member's, in the SR-IOV group."""
    absent = bench.absent_member
    return [0, absent, 0x10000, 0x1_0000_0001, 0xFFFF_FFFF_FFFF_FFFF]


# --- envelope and validation ----------------------------------------------------------------------------------------


@check("ADM-01", title="group, opcode and member are validated: EINVAL and the matching qualifier")
def adm_01(bench: Bench) -> str | None:
    bench.use_all()
    bench.refused(bench.admin(Opcode.LIST_QUERY, 7, size=8), "group 7", qualifier=Qualifier.INVALID_GROUP)
    for group in (SELF, SR_IOV):
        if bench.supported(group) is None:
            continue
        done = bench.admin(0x7FFF, group, size=8)
        bench.refused(done, f"opcode 0x7fff, group {group}", qualifier=Qualifier.INVALID_OPCODE)
    capable = 7 in (bench.supported(SELF) or ())
    if capable:
        done = bench.admin(Opcode.CAP_ID_LIST_QUERY, SELF, 1, size=8)
        bench.refused(done, "CAP_ID_LIST_QUERY of member 1 of the self group", qualifier=Qualifier.INVALID_MEMBER)
    sriov = bench.supported(SR_IOV) or frozenset()
    used = next((opcode for opcode in (Opcode.LEGACY_COMMON_CFG_READ, Opcode.DEV_MODE_SET) if opcode in sriov), None)
    if used is not None:
        for member in _listed_members(bench):
            done = bench.admin(used, SR_IOV, member, b"\0", 1)
            bench.refused(done, f"{used.name} of member {member:#x}", qualifier=Qualifier.INVALID_MEMBER)
    if not capable and used is None:
        return "no command that names a member"
    return None


@check("ADM-02", title="an invalid group is INVALID_GROUP, whatever else is wrong")
def adm_02(bench: Bench) -> None:
    bench.use_all()
    for group in UNKNOWN_GROUPS:
        for opcode in (Opcode.LIST_QUERY, Opcode.LEGACY_COMMON_CFG_READ, 0x12, 0x7FFF):
            for member in (0, 1, 0xFFFF_FFFF):
                done = bench.admin(opcode, group, member, b"\xff", 1)
                what = f"group {group:#x}, opcode {opcode:#x}, member {member:#x}"
                bench.refused(done, what, qualifier=Qualifier.INVALID_GROUP)


@check("ADM-03", title="an invalid opcode is INVALID_OPCODE, whatever is wrong with the member or the data")
def adm_03(bench: Bench) -> None:
    bench.use_all()
    for group in (SELF, SR_IOV):
        supported = bench.supported(group)
        if supported is None:
            continue
        for opcode in UNKNOWN_OPCODES:
            if opcode in supported:
                continue
            for member in (0, 1, 0xFFFF_FFFF):
                done = bench.admin(opcode, group, member, b"\xff" * 9, 1)
                what = f"opcode {opcode:#x}, group {group}, member {member:#x}"
                bench.refused(done, what, qualifier=Qualifier.INVALID_OPCODE)


@check("ADM-04", title="an invalid member is INVALID_MEMBER, whatever is wrong with the data", needs=["legacy"])
def adm_04(bench: Bench) -> None:
    bench.use_all()
    for member in _listed_members(bench):
        for opcode, data in (
            (Opcode.LEGACY_COMMON_CFG_READ, b"\xc8"),
            (Opcode.LEGACY_COMMON_CFG_WRITE, b""),
            (Opcode.LEGACY_DEV_CFG_READ, b"\xff"),
            (Opcode.LEGACY_DEV_CFG_WRITE, b"\xff" * 20),
        ):
            done = bench.admin(opcode, SR_IOV, member, data, 9)
            what = f"{opcode.name} of member {member:#x} with bad data"
            bench.refused(done, what, qualifier=Qualifier.INVALID_MEMBER)


@check("ADM-05", title="success is status 0 and qualifier 0")
def adm_05(bench: Bench) -> None:
    bench.use_all()
    for group in (SELF, SR_IOV):
        if bench.supported(group) is not None:
            bench.ok(Opcode.LIST_QUERY, group, size=8)
    sriov = bench.supported(SR_IOV) or frozenset()
    if Opcode.LEGACY_COMMON_CFG_READ in sriov:
        bench.ok(Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, bench.member, b"\0", 4)
        bench.ok(Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, bench.member, b"\x0e" + bytes(9))
        bench.ok(Opcode.LEGACY_DEV_CFG_READ, SR_IOV, bench.member, b"\0", 1)
    if Opcode.LEGACY_NOTIFY_INFO in sriov:
        bench.ok(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, bench.member, size=64)
    if Opcode.DEV_MODE_SET in sriov:
        bench.ok(Opcode.DEV_MODE_SET, SR_IOV, bench.member, b"\0")
    if Opcode.CAP_ID_LIST_QUERY in (bench.supported(SELF) or ()):
        bench.ok(Opcode.CAP_ID_LIST_QUERY, SELF, size=8)


@check("ADM-06", title="failure is a status other than 0")
def adm_06(bench: Bench) -> None:
    bench.use_all()
    bench.fails(bench.admin(0, 7), "an unknown group")
    bench.fails(bench.admin(0x7FFF, SELF), "an unknown opcode")
    sriov = bench.supported(SR_IOV) or frozenset()
    if Opcode.LEGACY_COMMON_CFG_READ in sriov:
        bench.fails(bench.common_read(18, 2), "a legacy read of status and ISR in one")
        bench.fails(bench.admin(Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, 0, b"\0", 1), "a legacy read of member 0")
    if Opcode.RESOURCE_OBJ_DESTROY in sriov:
        bench.fails(bench.destroy(0), "destroying an object that isn't there")
    if Opcode.DEVICE_CAP_GET in (bench.supported(SELF) or ()):
        done = bench.admin(Opcode.DEVICE_CAP_GET, SELF, data=bench.capability_header(0x7FF), size=8)
        bench.fails(done, "reading an unknown capability")


@check("ADM-07", title="EINVAL changes nothing, and the device goes on", needs=["legacy"])
def adm_07(bench: Bench) -> None:
    bench.use_all()
    # Something to lose: a status, features, a selected queue.
    bench.registers.write(Legacy.STATUS, 1, 3)
    bench.registers.write(Legacy.DRIVER_FEATURES, 4, bench.features & mask(Feature.INDIRECT_DESC))
    bench.registers.write(Legacy.QUEUE_SELECT, 2, 0)
    before = bench.snapshot()
    listed = bench.list_query(SR_IOV)
    header = bytes([Legacy.STATUS]) + bytes(7)
    wrong: list[tuple[str, int, int, int, bytes]] = [
        ("an unknown group", Opcode.LEGACY_COMMON_CFG_WRITE, 7, bench.member, header + b"\0"),
        ("the self group", Opcode.LEGACY_COMMON_CFG_WRITE, SELF, 0, header + b"\0"),
        ("an unknown opcode", 0x7FFF, SR_IOV, bench.member, header + b"\0"),
        ("an unknown member", Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, bench.absent_member, header + b"\0"),
        ("a write over two registers", Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, bench.member, header + b"\0\0"),
        ("a write of nothing", Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, bench.member, header),
        ("a write beyond the end", Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, bench.member, b"\x40" + bytes(8)),
        ("a read over ISR", Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, bench.member, b"\x12"),
        ("a list of what isn't supported", Opcode.LIST_USE, SR_IOV, 0, opcode_list([0, 1, 0x7FF])),
    ]
    if 0x11 in listed:
        wrong.append(("an unknown mode", Opcode.DEV_MODE_SET, SR_IOV, bench.member, b"\xfe"))
    for what, opcode, group, member, data in wrong:
        done = bench.admin(opcode, group, member, data, 2 if opcode == Opcode.LEGACY_COMMON_CFG_READ else 0)
        bench.refused(done, what)
        bench.unchanged(before, bench.snapshot(), what)
    bench.expect(bench.list_query(SR_IOV) == listed, "the list of opcodes changes")
    if bench.target.driver is not None and bench.target.driver.queues:
        status = bench.target.driver.device.status
        bench.expect(not status & DeviceStatus.NEEDS_RESET, f"the owner's status is {status:#x}")


@check(
    "ADM-08", level=Level.SHOULD, title="other failures leave things as they were", needs=["capabilities", "objects"]
)
def adm_08(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0)
    before = bench.query(0)
    bench.expect(before.status == 0, f"RESOURCE_OBJ_QUERY: {say(before)}")
    bench.fails(bench.create(0, 1), "creating an object twice")
    bench.fails(bench.destroy(200), "destroying an object that isn't there")
    bench.fails(bench.cap_set(0, 0), "disabling a capability with objects")
    after = bench.query(0)
    bench.expect(after.status == 0 and after.result == before.result, "a failed command changes an object")
    done = bench.destroy(0)
    bench.expect(done.status == 0, f"the object can't be destroyed any more: {say(done)}")


@check("ADM-09", title="EAGAIN and ENOMEM have no effects", needs=["capabilities", "objects", "parts"])
def adm_09(bench: Bench) -> str | None:
    bench.prepare_objects()
    bench.created(0)
    before = bench.get_parts(0)
    # The only failure of this kind that a driver can bring about: metadata that don't fit.
    done = bench.metadata(0, 2, 8)
    if done.status != Status.ENOMEM:
        bench.not_applicable(f"too small a buffer for DEV_PARTS_METADATA_GET, LIST: {say(done)}")
    bench.expect(bench.get_parts(0) == before, "device parts change")
    bench.expect(bench.query(0).status == 0, "the object is gone")
    return "ENOMEM by DEV_PARTS_METADATA_GET; a driver has no way to bring about EAGAIN"


@check("ADM-10", title="a short device-readable part reads as if zeroes followed")
def adm_10(bench: Bench) -> None:
    # LIST_QUERY of the self group is all zeroes, so it may be cut anywhere.
    whole = Command(Opcode.LIST_QUERY, SELF).pack()
    expected = bench.target.raw(whole, 16).result
    for length in range(1, 24):
        done = bench.target.raw(whole[:length], 16)
        bench.expect((done.status, done.qualifier) == (0, 0), f"a command of {length} bytes: {say(done)}")
        bench.expect(done.result == expected, f"a command of {length} bytes: another result")
    if bench.supported(SR_IOV) is not None:
        # Up to the group type, and without data: an empty list, which is a list.
        bench.use_all()
        done = bench.target.raw(Command(Opcode.LIST_USE, SR_IOV).pack()[:3], 8)
        bench.expect((done.status, done.qualifier) == (0, 0), f"LIST_USE without a list: {say(done)}")
        done = bench.admin(Opcode.LIST_QUERY, SR_IOV, size=8)
        bench.refused(done, "LIST_QUERY after an empty list", qualifier=Qualifier.INVALID_OPCODE)


@check("ADM-11", title="a short device-writable part takes what fits; that is no failure")
def adm_11(bench: Bench) -> None:
    bench.use_all()
    command = Command(Opcode.LIST_QUERY, SELF).pack()
    whole = bench.target.raw(command, 16).written
    for length in (1, 2, 3, 4, 6, 7, 8, 9, 12, 15):
        done = bench.target.raw(command, length)
        bench.expect(done.used == length, f"{length} bytes of room: a used length of {done.used}")
        bench.expect(done.written == whole[:length], f"{length} bytes of room: other bytes than with 16")
    if 6 in (bench.supported(SR_IOV) or ()):
        command = Command(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, bench.member).pack()
        whole = bench.target.raw(command, 72).written
        for length in (8, 9, 24, 40, 71):
            done = bench.target.raw(command, length)
            bench.expect(done.written == whole[:length], f"LEGACY_NOTIFY_INFO with {length} bytes of room: other bytes")
    # What fails does so for its own reason.
    done = bench.target.raw(Command(0x7FFF, SELF).pack(), 4)
    bench.refused(done, "an unknown opcode with 4 bytes of room", qualifier=Qualifier.INVALID_OPCODE)


@check("ADM-12", title="of a long readable part the rest is ignored; of a long writable part it is not written")
def adm_12(bench: Bench) -> str | None:
    bench.use_all()
    command = Command(Opcode.LIST_QUERY, SELF).pack()
    expected = bench.target.raw(command, 16)
    done = bench.target.raw(command + b"\xff" * 100, 16)
    bench.expect(done.written == expected.written, f"LIST_QUERY with 100 bytes too many: {say(done)}")
    remarks: str | None = None
    sriov = bench.supported(SR_IOV) or frozenset()
    cases: list[tuple[str, bytes, int | None]] = [("LIST_QUERY", command, None)]
    if 6 in sriov:
        cases.append(("LEGACY_NOTIFY_INFO", Command(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, bench.member).pack(), 72))
    if 0x11 in sriov:
        mode = Command(Opcode.DEV_MODE_SET, SR_IOV, bench.member, bytes(8)).pack()
        cases.append(("DEV_MODE_SET", mode, 8))
    for name, readable, right in cases:
        done = bench.target.raw(readable, 4096)
        bench.expect(done.status == 0, f"{name} with 4096 bytes of room: {say(done)}")
        bench.expect(
            done.used % 8 == 0 if right is None else done.used == right,
            f"{name} with 4096 bytes of room: a used length of {done.used}",
        )
        if done.whole:
            rest = done.buffer[done.used :]
            bench.expect(rest == bytes([POISON]) * len(rest), f"{name}: writes behind its used length")
        else:
            remarks = "only used lengths: bytes behind them can't be seen this way"
    return remarks


@check("ADM-13", title="status and qualifier are always there")
def adm_13(bench: Bench) -> None:
    bench.use_all()
    commands = [
        ("LIST_QUERY", Command(0, SELF).pack()),
        ("an unknown group", Command(0, 7).pack()),
        ("an unknown opcode", Command(0x7FFF, SELF).pack()),
        ("nothing but zeroes", bytes(24)),
    ]
    if bench.supported(SR_IOV) is not None:
        commands.append(("an unknown member", Command(3, SR_IOV, 0xFFFF_FFFF, b"\0").pack()))
        commands.append(("a list too long", Command(1, SR_IOV, 0, b"\xff" * 64).pack()))
    for what, readable in commands:
        for room in (8, 16, 72):
            done = bench.target.raw(readable, room)
            bench.expect(done.used >= 8, f"{what}: only {done.used} bytes are written")
            known = done.status in set(Status) and done.qualifier in set(Qualifier)
            bench.expect(known, f"{what}: status {done.status}, qualifier {done.qualifier}")
            bench.expect((done.status == 0) == (done.qualifier == 0), f"{what}: {say(done)}")


@check("ADM-14", level=Level.SHOULD, title="a failed command's result is zeroes", needs=["notify-info"])
def adm_14(bench: Bench) -> None:
    bench.use_all()
    # The one command whose result has a fixed size, so that it is known how much there has to be.
    done = bench.admin(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, bench.absent_member, size=64)
    bench.refused(done, "LEGACY_NOTIFY_INFO of an unknown member", qualifier=Qualifier.INVALID_MEMBER)
    bench.expect(done.buffer[4:72] == bytes(68), "LEGACY_NOTIFY_INFO that fails: its 64 bytes aren't zeroed")
    done = bench.admin(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, bench.absent_member, size=24)
    bench.expect(done.buffer[4:32] == bytes(28), "LEGACY_NOTIFY_INFO that fails, with 24 bytes of room: not zeroed")


@check("ADM-15", title="commands of one administration queue take effect in order", needs=["legacy"])
def adm_15(bench: Bench) -> None:
    bench.use_all()
    values = [1, 3, 1, 3, 7, 1, 3, 1] * 3
    commands: list[tuple[bytes, int]] = []
    for value in values:
        data = bytes([Legacy.STATUS]) + bytes(7) + bytes([value])
        commands.append((Command(Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, bench.member, data).pack(), 8))
        read = Command(Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, bench.member, bytes([Legacy.STATUS]))
        commands.append((read.pack(), 9))
    for start in range(0, len(commands), 12):
        done = bench.target.raw_many(commands[start : start + 12])
        for i, one in enumerate(done):
            bench.expect(one.status == 0, f"command {start + i} of {len(commands)} at once: {say(one)}")
        read_back = [one.result[0] for one in done[1::2]]
        right = values[start // 2 : start // 2 + 6]
        bench.expect(read_back == right, f"statuses read {read_back} instead of {right}")


@check("ADM-16", level=Level.MAY, title="administration queues needn't wait for each other")
def adm_16(bench: Bench) -> None:
    if bench.target.queues < 2:
        bench.not_applicable("one administration queue")
    bench.use_all()
    command = Command(Opcode.LIST_QUERY, SELF).pack()
    expected = bench.target.raw(command, 16).written
    for _ in range(8):
        done = bench.target.raw_many([(command, 16)] * 16, queues=range(bench.target.queues))
        bench.expect(all(one.written == expected for one in done), "queues in use at once: another result")


@check("ADM-17", title="reserved fields are ignored where they are read and 0 where they are written")
def adm_17(bench: Bench) -> None:
    bench.use_all()

    def reserved(readable: bytes) -> bytes:
        return readable[:4] + b"\xff" * 12 + readable[16:]

    for group in (SELF, SR_IOV):
        if bench.supported(group) is None:
            continue
        done = bench.target.raw(reserved(Command(Opcode.LIST_QUERY, group).pack()), 16)
        bench.expect((done.status, done.qualifier) == (0, 0), f"reserved1 not 0: {say(done)}")
        bench.expect(done.reserved == 0, f"reserved2 is {done.reserved:#x}")
    done = bench.admin(0x7FFF, SELF, size=8)
    bench.expect(done.reserved == 0, f"reserved2 of a failed command is {done.reserved:#x}")
    sriov = bench.supported(SR_IOV) or frozenset()
    if Opcode.LEGACY_COMMON_CFG_WRITE in sriov:
        data = bytes([Legacy.STATUS]) + b"\xff" * 7 + b"\1"
        bench.ok(Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, bench.member, data)
        bench.expect(bench.registers.read(Legacy.STATUS, 1) == 1, "a write with reserved bytes goes elsewhere")
    if Opcode.LEGACY_NOTIFY_INFO in sriov:
        result = bench.ok(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, bench.member, size=64).result
        padding = [result[at + 2 : at + 8] for at in range(0, len(result), 16)]
        bench.expect(all(one == bytes(len(one)) for one in padding), "LEGACY_NOTIFY_INFO: padding isn't 0")
    if Opcode.DEVICE_CAP_GET in (bench.supported(SELF) or ()):
        right = bench.admin(Opcode.DEVICE_CAP_GET, SELF, data=struct.pack("<H", 0) + bytes(6), size=2)
        done = bench.admin(Opcode.DEVICE_CAP_GET, SELF, data=struct.pack("<H", 0) + b"\xff" * 6, size=2)
        bench.expect(done.written == right.written, f"DEVICE_CAP_GET with reserved bytes: {say(done)}")


# --- command lists --------------------------------------------------------------------------------------------------


def _groups(bench: Bench) -> list[GroupType]:
    return [group for group in (SELF, SR_IOV) if bench.supported(group) is not None]


def _probe(bench: Bench, opcode: int, group: int) -> bool:
    """Whether a command gets further than its opcode. Its member is none, so it has no effect."""
    member = 1 if group == SELF else 0xFFFF_FFFF_FFFF
    done = bench.admin(opcode, group, member, b"\xff" * 8, 8)
    if opcode in (Opcode.LIST_QUERY, Opcode.LIST_USE):
        # Those use no member: a list of nothing but ones isn't supported, so it has no effect either.
        return done.qualifier != Qualifier.INVALID_OPCODE
    return not (done.status == Status.EINVAL and done.qualifier == Qualifier.INVALID_OPCODE)


def _remark(group: int, opcode: int) -> str:
    """For capability commands in the SR-IOV group: they aren't its commands, but Linux looks for them in its list."""
    if group == SR_IOV and opcode in (7, 8, 9):
        return " (as Linux needs it: capabilities_in_sr_iov_list)"
    return ""


@check("LST-01", title="after a reset, only LIST_QUERY and LIST_USE are legal in each group")
def lst_01(bench: Bench) -> None:
    for again in (False, True):
        for group in _groups(bench):
            for opcode in sorted(bench.group(group) - {0, 1}):
                done = bench.admin(opcode, group, 0 if group == SELF else bench.member, bytes(16), 8)
                remark = " (as Linux needs it: self_group_preset)" if group == SELF else ""
                what = f"group {group}: opcode {opcode:#x} before any LIST_USE{remark}"
                bench.refused(done, what, qualifier=Qualifier.INVALID_OPCODE)
            bench.ok(Opcode.LIST_USE, group, data=opcode_list(bench.group(group)))
        if not again:
            try:
                bench.target.reset_owner()
            except CannotReach:
                return


@check("LST-02", title="after LIST_USE exactly that list is legal")
def lst_02(bench: Bench) -> None:
    for group in _groups(bench):
        supported = bench.group(group)
        rest = sorted(supported - {0, 1})
        # Words 0 and 1 stay, so that the list can change: smaller, larger, another, none, all.
        for chosen in (set(rest[:1]), set(rest[:3]), set(rest[1:2]), set(rest[-4:]), set(), set(rest)):
            done = bench.use(group, {0, 1, *chosen})
            if done.status:
                # It may be refused for what its commands need (LST-07); with all of them there is nothing to need.
                bench.expect(chosen != set(rest), f"group {group}: the list of all that is supported: {say(done)}")
                continue
            for opcode in rest:
                legal = _probe(bench, opcode, group)
                names = ", ".join(f"{one:#x}" for one in sorted(chosen))
                bench.expect(
                    legal == (opcode in chosen),
                    f"group {group}, list 0, 1, {names}: "
                    f"opcode {opcode:#x} is {'' if legal else 'not '}legal{_remark(group, opcode)}",
                )


@check("LST-03", title="a command outside of the list is INVALID_OPCODE, LIST_QUERY and LIST_USE too")
def lst_03(bench: Bench) -> None:
    for group in _groups(bench):
        rest = bench.group(group) - {0, 1}
        # What Linux does: everything but the two.
        done = bench.use(group, rest)
        bench.expect(done.status == 0, f"group {group}: a list without 0 and 1: {say(done)}")
        done = bench.admin(Opcode.LIST_QUERY, group, size=8)
        bench.refused(done, f"group {group}: LIST_QUERY that was dropped", qualifier=Qualifier.INVALID_OPCODE)
        done = bench.use(group, bench.group(group))
        bench.refused(done, f"group {group}: LIST_USE that was dropped", qualifier=Qualifier.INVALID_OPCODE)
        for opcode in sorted(rest):
            remark = _remark(group, opcode)
            what = f"group {group}: opcode {opcode:#x} isn't legal though listed{remark}"
            bench.expect(_probe(bench, opcode, group), what)


@check("LST-04", title="LIST_QUERY always reports opcodes 0 and 1")
def lst_04(bench: Bench) -> None:
    for group in _groups(bench):
        bench.expect({0, 1} <= bench.list_query(group), f"group {group}: not in the list after a reset")
        for chosen in ({0, 1}, {0}, {0, *bench.group(group)}):
            if bench.use(group, chosen).status == 0:
                bench.expect({0, 1} <= bench.list_query(group), f"group {group}: not in the list after LIST_USE")
            if 1 not in chosen:
                break  # Nothing can be listed any more.


@check("LST-05", title="the list of what is supported never shrinks")
def lst_05(bench: Bench) -> None:
    groups = _groups(bench)
    before = {group: bench.list_query(group) for group in groups}

    def compare(when: str) -> None:
        for group in groups:
            missing = before[group] - bench.list_query(group)
            names = ", ".join(f"{one:#x}" for one in sorted(missing))
            bench.expect(not missing, f"group {group}, {when}: {names} missing")

    for group in groups:
        bench.use(group, {0, 1})
    compare("with a list of 0 and 1")
    try:
        bench.target.reset_owner()
        compare("after a reset")
    except CannotReach:
        pass
    try:
        bench.target.set_vfs(enable=False)
        bench.target.set_vfs(enable=True)
        compare("after VF Enable went off and on")
    except CannotReach:
        pass


@check("LST-06", title="the lists of different groups are independent", needs=["sr-iov"])
def lst_06(bench: Bench) -> None:
    lists = {group: sorted(bench.group(group) - {0, 1}) for group in (SELF, SR_IOV)}
    for one, other in ((SELF, SR_IOV), (SR_IOV, SELF)):
        bench.ok(Opcode.LIST_USE, other, data=opcode_list({0, 1}))
        bench.ok(Opcode.LIST_USE, one, data=opcode_list(bench.group(one)))
        for opcode in lists[other]:
            legal = _probe(bench, opcode, other)
            bench.expect(not legal, f"LIST_USE of group {one} makes opcode {opcode:#x} legal in group {other}")
        bench.ok(Opcode.LIST_USE, other, data=opcode_list({0, 1}))
        for opcode in lists[one]:
            what = f"with lists of both groups, opcode {opcode:#x} isn't legal in group {one}{_remark(one, opcode)}"
            bench.expect(_probe(bench, opcode, one), what)


@check("LST-07", level=Level.MAY, title="a list may be refused for what its commands need, as INVALID_FIELD")
def lst_07(bench: Bench) -> str | None:
    refused: list[str] = []
    for group in _groups(bench):
        for opcode in sorted(bench.group(group) - {0, 1}):
            done = bench.use(group, {0, 1, opcode})
            if done.status:
                what = f"group {group}: a list of 0, 1, {opcode:#x}"
                bench.refused(done, what, qualifier=Qualifier.INVALID_FIELD)
                refused.append(f"{opcode:#x}")
    return f"refused alone: {', '.join(refused)}" if refused else "none is refused"


@check("LST-08", level=Level.SHOULD, title="a list that was accepted is accepted again after a reset")
def lst_08(bench: Bench) -> None:
    for group in _groups(bench):
        chosen = bench.group(group)
        bench.ok(Opcode.LIST_USE, group, data=opcode_list(chosen))
        bench.reset_owner()
        done = bench.use(group, chosen)
        bench.expect(done.status == 0, f"group {group}: refused after a reset: {say(done)}")


@check("LST-09", title="without VF Enable, commands to the SR-IOV group are INVALID_GROUP", needs=["sr-iov", "vfs"])
def lst_09(bench: Bench) -> None:
    supported = sorted(bench.group(SR_IOV))
    bench.use_all()
    bench.target.set_vfs(enable=False)
    try:
        # First the others: what LIST_USE does here is told apart.
        for opcode in [*(one for one in supported if one > 1), 0x7FFF]:
            done = bench.admin(opcode, SR_IOV, bench.member, bytes(9), 8)
            bench.refused(done, f"opcode {opcode:#x}", qualifier=Qualifier.INVALID_GROUP)
        for opcode in (Opcode.LIST_QUERY, Opcode.LIST_USE):
            done = bench.admin(opcode, SR_IOV, data=opcode_list(supported), size=8)
            what = f"{opcode.name} (as Linux needs it: lists_without_vfs)"
            bench.refused(done, what, qualifier=Qualifier.INVALID_GROUP)
    finally:
        bench.target.set_vfs(enable=True)


@check("LST-10", title="SR-IOV member ids outside of 1 to NumVFs are INVALID_MEMBER", needs=["sr-iov"])
def lst_10(bench: Bench) -> str | None:
    bench.use_all()
    supported = sorted(bench.group(SR_IOV) - {0, 1, *range(7, 10)})

    def compare(members: list[int], when: str = "") -> None:
        for member in members:
            for opcode in supported:
                done = bench.admin(opcode, SR_IOV, member, bytes(16), 64)
                what = f"opcode {opcode:#x} of member {member:#x}{when}"
                bench.refused(done, what, qualifier=Qualifier.INVALID_MEMBER)

    compare(_listed_members(bench))
    # LIST_QUERY and LIST_USE use no member, so theirs is ignored.
    bench.ok(Opcode.LIST_QUERY, SR_IOV, size=8)
    try:
        _, number = bench.target.vfs()
        if number < 2:
            return "one VF only: NumVFs can't be made smaller"
        bench.target.set_vfs(enable=True, number=number - 1)
    except CannotReach as reason:
        return f"NumVFs as it is: {reason}"
    try:
        bench.use_all()
        compare([number], f" with NumVFs = {number - 1}")
    finally:
        bench.target.set_vfs(enable=True, number=number)
    return None


@check("LST-11", level=Level.RECOMMENDED, title="LIST_USE of what isn't supported: INVALID_FIELD, the old list stays")
def lst_11(bench: Bench) -> None:
    for group in _groups(bench):
        supported = bench.group(group)
        for chosen in (supported, frozenset({0, 1})):
            bench.ok(Opcode.LIST_USE, group, data=opcode_list(chosen))
            for extra in (0x12, 0x3D, 64, 100, 1000):
                done = bench.use(group, supported | {extra})
                bench.refused(done, f"group {group}: opcode {extra:#x} listed", qualifier=Qualifier.INVALID_FIELD)
                for opcode in sorted(supported):
                    legal = _probe(bench, opcode, group)
                    bench.expect(
                        legal == (opcode in chosen),
                        f"group {group}: after a refused list, "
                        f"opcode {opcode:#x} is {'' if legal else 'not '}legal{_remark(group, opcode)}",
                    )
        # Words of nothing but zeroes are no opcodes.
        done = bench.admin(Opcode.LIST_USE, group, data=opcode_list(supported) + bytes(16))
        bench.expect(done.status == 0, f"group {group}: a list with words of zeroes behind it: {say(done)}")


# --- the queue and its features -------------------------------------------------------------------------------------


def _admin_device(bench: Bench) -> ModernDevice:
    """The owner with ADMIN_VQ negotiated, which makes its fields valid."""
    driver = bench.owner_driver
    driver.start(driver_ok=False)
    return driver.device


@check("AVQ-01", title="admin_queue_index is not among num_queues", needs=["owner-driver"])
def avq_01(bench: Bench) -> None:
    device = _admin_device(bench)
    first, number = device.admin_queues.start, device.num_queues
    bench.expect(first >= number, f"admin_queue_index = {first}, num_queues = {number}")


@check("AVQ-02", title="administration queues end below index 0x10000", needs=["owner-driver"])
def avq_02(bench: Bench) -> None:
    queues = _admin_device(bench).admin_queues
    bench.expect(len(queues) >= 1, "admin_queue_num is 0 though ADMIN_VQ is offered")
    bench.expect(queues.stop <= 0x10000, f"indices up to {queues.stop - 1:#x}")


@check("AVQ-03", title="num_queues doesn't count administration queues", needs=["owner-driver"])
def avq_03(bench: Bench) -> None:
    device = _admin_device(bench)
    for index in range(min(device.num_queues, 64)):
        bench.expect(device.select(index).size, f"num_queues = {device.num_queues}, but there is no queue {index}")
    queues = device.admin_queues
    for index in queues[:64]:
        bench.expect(device.select(index).size, f"administration queue {index} has a size of 0")
        bench.expect(index >= device.num_queues, f"num_queues = {device.num_queues} counts queue {index}")


@check("AVQ-04", title="queue_size is 0 for an index that isn't there", needs=["owner-driver"])
def avq_04(bench: Bench) -> None:
    device = _admin_device(bench)
    queues = device.admin_queues
    beyond = {device.num_queues, queues.start - 1, queues.stop, queues.stop + 1, 0x7FFF, 0xFFFF}
    for index in sorted(beyond):
        if index < device.num_queues or index in queues or not 0 <= index <= 0xFFFF:
            continue
        size = device.select(index).size
        bench.expect(size == 0, f"queue {index} isn't there but has a size of {size}")


@check("AVQ-05", title="SR_IOV is offered with the PCI capability, and not without", needs=["owner-driver"])
def avq_05(bench: Bench) -> None:
    owner = bench.owner
    offered = bool(bench.owner_driver.device.device_features() >> Feature.SR_IOV & 1)
    present = owner.sriov is not None
    bench.expect(offered == present, f"SR_IOV offered: {offered}; PCI capability: {present}")


@check("AVQ-06", title="no buffer is taken before DRIVER_OK", needs=["owner-driver"])
def avq_06(bench: Bench) -> None:
    driver = bench.owner_driver
    driver.start(driver_ok=False)
    queue = driver.queues[0]
    pending = queue.start(Command(Opcode.LIST_QUERY, SELF).pack(), 16)
    queue.queue.notify()
    time.sleep(0.1)
    bench.expect(not queue.queue.is_done(pending.id), "a command is completed before DRIVER_OK")
    driver.device.driver_ok()
    queue.queue.notify()
    done = queue.finish(pending)
    bench.expect((done.status, done.qualifier) == (0, 0), f"after DRIVER_OK: {say(done)}")


@check("AVQ-07", title="the notify structure covers all queues", needs=["owner-driver"])
def avq_07(bench: Bench) -> None:
    device = _admin_device(bench)
    notify = device.notify_cap
    multiplier = notify.multiplier
    bench.expect(multiplier & (multiplier - 1) == 0 and multiplier != 1, f"notify_off_multiplier = {multiplier}")
    bench.expect(notify.structure_offset % 2 == 0, f"a notify structure at odd offset {notify.structure_offset}")
    for index in [*range(min(device.num_queues, 256)), *device.admin_queues[:256]]:
        end = device.select(index).notify_off * multiplier + 2
        bench.expect(
            end <= notify.structure_length,
            f"queue {index}'s notify address ends at {end}, the structure at {notify.structure_length}",
        )


@check("AVQ-08", title="after a reset no queue is touched and nobody is notified", needs=["owner-driver"])
def avq_08(bench: Bench) -> None:
    driver = bench.owner_driver
    driver.start()
    for _ in range(4):
        for queue in driver.queues:
            for _ in range(8):
                queue.start(Command(Opcode.LIST_QUERY, SELF).pack(), 16, kick=False)
            queue.queue.kick(always=True)
        driver.device.reset()
        driver.function.client.pump()
        events = list(driver.function.vectors)
        for fd in events:
            take_events(fd)
        before = driver.memory.read(driver.memory.base, driver.memory.size)
        for queue in driver.queues:
            queue.queue.notify()
        time.sleep(0.05)
        driver.function.client.pump()
        after = driver.memory.read(driver.memory.base, driver.memory.size)
        bench.expect(before == after, "memory is written after the reset has ended")
        bench.expect(not any(take_events(fd) for fd in events), "an interrupt after the reset has ended")
        driver.start()
    # And it begins anew.
    done = driver.queues[0].command(Opcode.LIST_QUERY, SELF, result_size=8)
    bench.expect((done.status, done.qualifier) == (0, 0), f"a command afterwards: {say(done)}")
    device = driver.device
    driver.stop()
    size = device.select(device.admin_queues.start).size
    bench.expect(
        not size or device.read(Common.QUEUE_ENABLE, 2) == 0, "an administration queue is enabled after a reset"
    )
