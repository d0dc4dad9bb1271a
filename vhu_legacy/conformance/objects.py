# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Checks of capabilities (CAP), resource objects (OBJ), device parts (PRT) and mode (MOD); virtio 1.4, 2.12.1."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Sequence
from typing import Final

from ..admin import Command, Opcode, Status, opcodes_in
from ..vfio_client import CommandCode
from ..virtio_driver import BlkDriver, BlkPending, BlkType, Feature, Legacy, LegacyDevice, mask, take_events
from .bench import GET, SELF, SET, SR_IOV, Bench, Part, say
from .registry import check
from .report import Level

DEV_FEATURES: Final = 0x100
DRV_FEATURES: Final = 0x101
COMMON_CFG: Final = 0x102
DEVICE_STATUS: Final = 0x103
VQ_CFG: Final = 0x104

_QUIET: Final = 0.1
"""Seconds in which nothing may happen."""


# --- capabilities ---------------------------------------------------------------------------------------------------


@check("CAP-01", title="opcodes 7 to 9 all or none")
def cap_01(bench: Bench) -> str | None:
    present = sorted((bench.supported(SELF) or frozenset()) & {7, 8, 9})
    bench.expect(len(present) in (0, 3), f"only {', '.join(map(str, present))} are supported")
    return None if present else "none"


@check("CAP-02", title="capability commands of another group than the self group are EINVAL", needs=["capabilities"])
def cap_02(bench: Bench) -> None:
    bench.use_all()
    header = bench.capability_header(0)
    for group in (SR_IOV, 2):
        for member in (0, 1):
            for opcode, data in (
                (Opcode.CAP_ID_LIST_QUERY, b""),
                (Opcode.DEVICE_CAP_GET, header),
                (Opcode.DRIVER_CAP_SET, header + bytes(2)),
            ):
                done = bench.admin(opcode, group, member, data, 8)
                bench.refused(done, f"{opcode.name} of group {group}, member {member}")


@check("CAP-03", level=Level.SHOULD, title="unknown capabilities are ENXIO", needs=["capabilities"])
def cap_03(bench: Bench) -> None:
    bench.use_all()
    present = opcodes_in(bench.ok(Opcode.CAP_ID_LIST_QUERY, SELF, size=1024).result)
    for number in (0x1, 0x7FF, 0x800, 0xFFF, 0x1000, 0xFFFF):
        if number in present:
            continue
        header = bench.capability_header(number)
        done = bench.admin(Opcode.DEVICE_CAP_GET, SELF, data=header, size=16)
        bench.refused(done, f"DEVICE_CAP_GET of {number:#x}", Status.ENXIO)
        done = bench.admin(Opcode.DRIVER_CAP_SET, SELF, data=header + bytes(8))
        bench.refused(done, f"DRIVER_CAP_SET of {number:#x}", Status.ENXIO)
    for number in present:
        bench.ok(Opcode.DEVICE_CAP_GET, SELF, data=bench.capability_header(number), size=1024)


@check(
    "CAP-04",
    level=Level.SHOULD,
    title="disabling a capability that has objects is EBUSY",
    needs=["capabilities", "objects"],
)
def cap_04(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0)
    bench.refused(bench.cap_set(0, 0), "limits of 0 with an object", Status.EBUSY)
    bench.expect(bench.query(0).status == 0, "the object is gone")
    done = bench.destroy(0)
    bench.expect(done.status == 0, f"RESOURCE_OBJ_DESTROY: {say(done)}")
    done = bench.cap_set(0, 0)
    bench.expect(done.status == 0, f"limits of 0 without objects: {say(done)}")


@check("CAP-05", title="a reset clears the driver's capabilities", needs=["capabilities", "objects"])
def cap_05(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0)
    bench.reset_owner()
    bench.use_all()
    bench.fails(bench.create(0), "creating an object with the limits of before the reset")
    bench.prepare_objects()
    bench.created(0)


# --- resource objects -----------------------------------------------------------------------------------------------


@check("OBJ-01", level=Level.SHOULD, title="an id in use is EEXIST", needs=["capabilities", "objects"])
def obj_01(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0)
    for operation in (GET, SET):
        bench.refused(bench.create(0, operation), "an id in use", Status.EEXIST)


@check("OBJ-02", level=Level.SHOULD, title="unknown objects are ENXIO", needs=["capabilities", "objects"])
def obj_02(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0)
    for number in (1, 255, 0xFFFF_FFFF):
        bench.refused(bench.query(number), f"RESOURCE_OBJ_QUERY of id {number}", Status.ENXIO)
        bench.refused(bench.destroy(number), f"RESOURCE_OBJ_DESTROY of id {number}", Status.ENXIO)
        if 0xC in bench.group(SR_IOV):
            bench.refused(bench.modify(number, SET), f"RESOURCE_OBJ_MODIFY of id {number}", Status.ENXIO)


@check("OBJ-03", level=Level.SHOULD, title="an object that can't be made is ENOSPC", needs=["capabilities", "objects"])
def obj_03(bench: Bench) -> None:
    bench.use_all()
    # A limit that was never set counts as 0.
    bench.refused(bench.create(0), "an object without DRIVER_CAP_SET", Status.ENOSPC)
    bench.prepare_objects()
    bench.expect(bench.cap_set(1, 0).status == 0, "limits of 1 and 0 are refused")
    bench.refused(bench.create(0, SET), "a SET object with a limit of 0", Status.ENOSPC)
    bench.created(0, GET)


@check("OBJ-04", title="a MODIFY that fails has no effect", needs=["capabilities", "objects", "modify"])
def obj_04(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0, GET)
    before = bench.query(0)
    for operation in (2, 0x7F, 0xFF):
        bench.fails(bench.modify(0, operation), f"operation {operation}")
        after = bench.query(0)
        bench.expect(after.written == before.written, f"a MODIFY to operation {operation} failed, but had an effect")
    bench.fails(bench.modify(1, SET), "an object that isn't there")
    bench.expect(bench.query(0).written == before.written, "a MODIFY of another object had an effect")


@check("OBJ-05", title="QUERY returns what was set last", needs=["capabilities", "objects"])
def obj_05(bench: Bench) -> str | None:
    bench.prepare_objects()

    def same(operation: int, when: str) -> None:
        done = bench.query(0)
        bench.expect(done.status == 0, f"RESOURCE_OBJ_QUERY {when}: {say(done)}")
        right = bytes([operation]) + bytes(7)
        bench.expect(done.result == right, f"RESOURCE_OBJ_QUERY {when}: {done.result.hex()} instead of {right.hex()}")

    for operation in (GET, SET):
        bench.created(0, operation)
        same(operation, "after CREATE")
        if 0xC in bench.group(SR_IOV):
            done = bench.modify(0, 1 - operation)
            same(operation if done.status else 1 - operation, "after MODIFY")
        bench.expect(bench.destroy(0).status == 0, "RESOURCE_OBJ_DESTROY fails")
    return None if 0xC in bench.group(SR_IOV) else "no RESOURCE_OBJ_MODIFY"


@check("OBJ-06", title="an id can be used again after DESTROY", needs=["capabilities", "objects"])
def obj_06(bench: Bench) -> None:
    bench.prepare_objects()
    for operation in (GET, SET, GET, SET):
        bench.created(0, operation)
        done = bench.destroy(0)
        bench.expect(done.status == 0, f"RESOURCE_OBJ_DESTROY: {say(done)}")
        bench.fails(bench.query(0), "RESOURCE_OBJ_QUERY after DESTROY")


@check("OBJ-07", title="a reset destroys all objects", needs=["capabilities", "objects"])
def obj_07(bench: Bench) -> None:
    bench.prepare_objects()
    for number in range(min(*bench.limits(), 4)):
        bench.created(number, number & 1)
    bench.reset_owner()
    bench.prepare_objects()
    for number in range(min(*bench.limits(), 4)):
        bench.refused(bench.query(number), f"id {number} after a reset", Status.ENXIO)
        bench.created(number, number & 1)


# --- device parts ---------------------------------------------------------------------------------------------------


@check("PRT-01", title="parts and object commands (0xa to 0x11) all or none", needs=["sr-iov"])
def prt_01(bench: Bench) -> str | None:
    present = bench.group(SR_IOV) & set(range(0xA, 0x12))
    if not present & {0xE, 0xF, 0x10, 0x11}:
        return "none"
    missing = ", ".join(f"{one:#x}" for one in sorted(set(range(0xA, 0x12)) - present))
    bench.expect(not missing, f"{missing} missing")
    return None


def _use_member(bench: Bench) -> LegacyDevice:
    """The member, driven so far that its parts differ from the default."""
    device = LegacyDevice(bench.registers)
    device.negotiate(bench.features & mask(Feature.INDIRECT_DESC, Feature.EVENT_IDX))
    return device


def _predecessors(bench: Bench, parts: Sequence[Part]) -> None:
    bench.expect(parts, "there are no parts")
    for earlier, later in itertools.pairwise(parts):
        bench.expect(earlier.type <= later.type, f"part {later.type:#x} comes after {earlier.type:#x}")
    kinds = {part.type for part in parts}
    for one, needed in (
        (DRV_FEATURES, DEV_FEATURES),
        (COMMON_CFG, DRV_FEATURES),
        (DEVICE_STATUS, COMMON_CFG),
        (VQ_CFG, DEVICE_STATUS),
    ):
        bench.expect(one not in kinds or needed in kinds, f"part {one:#x} without {needed:#x}")
    keys = [(part.type, part.selector) for part in parts]
    bench.expect(len(set(keys)) == len(keys), "a part is there twice")


@check(
    "PRT-02",
    title="GET can be repeated, in order of types, predecessors first",
    needs=["capabilities", "parts", "legacy"],
)
def prt_02(bench: Bench) -> str:
    bench.prepare_objects()
    _use_member(bench)
    bench.stopped()
    bench.created(0, GET)
    data = bench.get_parts(0)
    parts = bench.parse_parts(data)
    _predecessors(bench, parts)
    for _ in range(3):
        bench.expect(bench.get_parts(0) == data, "the same parts read otherwise the second time")
    count = bench.metadata(0, 1, 8)
    bench.expect(count.result[:4] == struct.pack("<I", len(parts)), f"COUNT is {count.result.hex()}, not {len(parts)}")
    listed = bench.metadata(0, 2, 8 + 16 * len(parts))
    headers = b"".join(part.pack()[:16] for part in parts)
    bench.expect(listed.result[8:] == headers, "LIST shows other parts than there are")
    # SELECTED: a few, and one that nobody knows, which is skipped.
    chosen = parts[:: max(1, len(parts) // 3)]
    unknown = Part(0x5FF, 0, bytes(8), b"").pack()
    request = bench.object_header(0) + struct.pack("<B7x", 0) + b"".join(one.pack()[:16] for one in chosen) + unknown
    done = bench.ok(Opcode.DEV_PARTS_GET, SR_IOV, bench.member, request, len(data))
    bench.expect(done.result == b"".join(one.pack() for one in chosen), "SELECTED brings other parts than asked for")
    return f"{len(parts)} parts, {len(data)} bytes"


@check(
    "PRT-03",
    level=Level.SHOULD,
    title="SET is refused while the member runs",
    needs=["capabilities", "parts", "legacy"],
)
def prt_03(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0, GET)
    data = bench.get_parts(0)
    bench.created(1, SET)
    _use_member(bench)
    before = bench.snapshot()
    bench.fails(bench.set_parts(1, data), "DEV_PARTS_SET of a member that runs")
    bench.unchanged(before, bench.snapshot(), "a refused DEV_PARTS_SET")
    bench.stopped()
    done = bench.set_parts(1, data)
    bench.expect(done.status == 0, f"DEV_PARTS_SET of a stopped member: {say(done)}")
    bench.resumed()


@check("PRT-04", title="SET of a part with a wrong length is refused", needs=["capabilities", "parts", "legacy"])
def prt_04(bench: Bench) -> None:
    bench.prepare_objects()
    _use_member(bench)
    bench.created(0, GET)
    bench.stopped()
    data = bench.get_parts(0)
    parts = bench.parse_parts(data)
    bench.created(1, SET)
    wrong: list[tuple[str, bytes]] = []
    for part in parts:
        if part.flags & 1:
            continue  # Optional parts may be ignored, whatever they are.
        name = f"part {part.type:#x} {part.selector.hex()}"
        for value in (part.value + b"\0", part.value[:-1], b""):
            changed = [Part(one.type, one.flags, one.selector, value) if one is part else one for one in parts]
            wrong.append((f"{name} with {len(value)} bytes", b"".join(one.pack() for one in changed)))
        if len(wrong) > 60:
            break
    wrong += [("parts that end within a header", data[:8]), ("parts that end within a value", data[:-1])]
    for what, one in wrong:
        bench.fails(bench.set_parts(1, one), what)
        bench.expect(bench.get_parts(0) == data, f"{what}: refused, but something has changed")
    done = bench.set_parts(1, data)
    bench.expect(done.status == 0, f"the right parts afterwards: {say(done)}")
    bench.resumed()


@check("PRT-05", title="DEV_FEATURES is compared, never set", needs=["capabilities", "parts", "legacy"])
def prt_05(bench: Bench) -> None:
    bench.prepare_objects()
    bench.created(0, GET)
    bench.stopped()
    data = bench.get_parts(0)
    parts = bench.parse_parts(data)
    own = next((part for part in parts if part.type == DEV_FEATURES), None)
    if own is None:
        bench.not_applicable("the member has no DEV_FEATURES part")
    offered = bench.features
    bench.created(1, SET)
    for change in (1 << 44, 1 << Feature.ANY_LAYOUT, (1 << 45) | (1 << Feature.INDIRECT_DESC)):
        value = int.from_bytes(own.value, "little") ^ change
        changed = Part(own.type, own.flags, own.selector, value.to_bytes(len(own.value), "little"))
        rest = [changed if part is own else part for part in parts]
        bench.set_parts(1, b"".join(part.pack() for part in rest))
        bench.expect(bench.features == offered, "DEV_PARTS_SET changes what the member offers")
        bench.expect(bench.get_parts(0)[: len(own.pack())] == own.pack(), "DEV_FEATURES reads as it was set")
    more = (int.from_bytes(own.value, "little") | 1 << 44).to_bytes(len(own.value), "little")
    changed = Part(own.type, 0, own.selector, more)
    done = bench.set_parts(1, b"".join((changed if part is own else part).pack() for part in parts))
    bench.fails(done, "DEV_FEATURES, not optional, with a bit that the member doesn't offer")
    bench.resumed()
    bench.expect(bench.features == offered, "after resume the member offers something else")


@check(
    "PRT-06",
    title="a reset of the member brings its parts back to the default",
    needs=["capabilities", "parts", "legacy"],
)
def prt_06(bench: Bench) -> str | None:
    bench.prepare_objects()
    bench.created(0, GET)
    LegacyDevice(bench.registers).reset()
    fresh = bench.get_parts(0)
    device = _use_member(bench)
    bench.registers.write(Legacy.QUEUE_SELECT, 2, 0)
    bench.registers.write(Legacy.QUEUE_ADDRESS, 4, 0x40010)
    bench.expect(bench.get_parts(0) != fresh, "a member in use has the same parts as a fresh one")
    device.reset()
    bench.expect(bench.get_parts(0) == fresh, "after a reset of the member, its parts aren't the default")
    port = bench.target.ports.get(bench.member)
    if port is None:
        return "device reset only: no member's own function is given"
    _use_member(bench)
    port.function.client.reset()
    bench.expect(bench.get_parts(0) == fresh, "after a reset of the member's function, its parts aren't the default")
    return None


# --- device mode ----------------------------------------------------------------------------------------------------


def _start_reads(driver: BlkDriver, count: int, size: int = 4096) -> list[BlkPending]:
    """Requests on their way, all made known at once."""
    pending = [driver.start(BlkType.IN, 0, size=size, kick=False) for _ in range(count)]
    driver.queue.kick(always=True)
    return pending


@check("MOD-01", title="STOP completes what was taken before it answers", needs=["mode", "legacy", "port", "blk"])
def mod_01(bench: Bench) -> None:
    bench.use_all()
    for _ in range(5):
        _, driver = bench.blk()
        memory, ring = bench.port.memory, driver.queue.ring
        pending = _start_reads(driver, min(ring.size // 3, 20))
        bench.stopped()
        # Whatever the device has seen is in the used ring now, and nothing comes after that.
        before = memory.read(memory.base, memory.size)
        time.sleep(0.02)
        bench.expect(memory.read(memory.base, memory.size) == before, "memory is written after STOP has completed")
        done = memory.u16(ring.device + 2)
        bench.expect(done <= len(pending), f"a used index of {done} after {len(pending)} requests")
        bench.resumed()
        driver.queue.notify()
        for one in pending:
            result = driver.finish(one)
            bench.expect((result.status, result.used) == (0, 4097), f"a read ends with {result.status}, {result.used}")
        bench.legacy().reset()
        memory.clear()


@check("MOD-02", title="a stopped member touches no ring and notifies nobody", needs=["mode", "legacy", "port", "blk"])
def mod_02(bench: Bench) -> None:
    bench.use_all()
    function = bench.port.function
    vector = None
    if function.msix is not None:
        function.enable_msix(2)
        vector = 1
    _, driver = bench.blk(vector=vector)
    expected = bench.works(driver, "before")
    bench.stopped()
    for fd in function.vectors:
        take_events(fd)
    pending = _start_reads(driver, 4, 512)
    memory = bench.port.memory
    before = memory.read(memory.base, memory.size)
    driver.queue.notify()
    time.sleep(_QUIET)
    function.client.pump()
    bench.expect(memory.read(memory.base, memory.size) == before, "a stopped member writes memory")
    bench.expect(not any(take_events(fd) for fd in function.vectors), "a stopped member interrupts")
    bench.resumed()
    # A notification that came while it was stopped counts.
    for one in pending:
        result = driver.finish(one)
        bench.expect(result.status == 0 and result.data == expected, "a request of then goes wrong after resume")
    bench.works(driver, "after resume", expected=expected)


@check("MOD-03", title="a stopped member's registers and PCI interface work", needs=["mode", "legacy"])
def mod_03(bench: Bench) -> None:
    bench.use_all()
    LegacyDevice(bench.registers).negotiate()
    before = bench.snapshot()
    bench.stopped()
    bench.unchanged(before, bench.snapshot(), "STOP")
    for queue in (0, 1, 0xFFFF):
        done = bench.common_write(Legacy.QUEUE_NOTIFY, struct.pack("<H", queue))
        bench.expect(done.status == 0, f"notifying queue {queue} of a stopped member: {say(done)}")
    port = bench.target.ports.get(bench.member)
    if port is not None:
        identity = port.function.config_read(0, 4)
        bench.expect(
            identity == port.function.identity.vendor | port.function.identity.device << 16,
            f"configuration space of a stopped member reads {identity:#x}",
        )
        if port.modern is not None:
            status = port.modern.status
            bench.expect(status == before["status"][0], f"the modern status of a stopped member is {status:#x}")
    bench.resumed()
    bench.unchanged(before, bench.snapshot(), "resume")


@check("MOD-04", title="STOP twice and resume twice succeed", needs=["mode", "legacy"])
def mod_04(bench: Bench) -> None:
    bench.use_all()
    before = bench.snapshot()
    for stopped in (False, True, True, True, False, False, True, False):
        done = bench.mode(stopped)
        bench.expect((done.status, done.qualifier) == (0, 0), f"{'STOP' if stopped else 'resume'} again: {say(done)}")
        bench.unchanged(before, bench.snapshot(), "DEV_MODE_SET")


@check("MOD-05", title="STOP and PARTS_SET wait for a reset that is under way", needs=["mode", "legacy"])
def mod_05(bench: Bench) -> str | None:
    bench.prepare_objects()
    bench.created(0, GET)
    bench.created(1, SET)
    bench.stopped()
    fresh = bench.get_parts(0)
    bench.resumed()
    reset = bytes([Legacy.STATUS]) + bytes(8)
    sequence = [
        (Opcode.LEGACY_COMMON_CFG_WRITE, reset),
        (Opcode.DEV_MODE_SET, b"\1"),
        (Opcode.DEV_PARTS_SET, bench.object_header(1) + fresh),
    ]
    commands = [(Command(opcode, SR_IOV, bench.member, data).pack(), 8) for opcode, data in sequence]
    port = bench.target.ports.get(bench.member)
    busy = port is not None and bench.member_type == 2
    for _ in range(4):
        if busy and port is not None:
            _, driver = bench.blk()
            _start_reads(driver, min(driver.queue.ring.size // 3, 20))
        for (opcode, _), done in zip(sequence, bench.target.raw_many(commands), strict=True):
            bench.expect(done.status == 0, f"{opcode.name} right behind a reset: {say(done)}")
        bench.expect(bench.get_parts(0) == fresh, "the parts of a member that was reset and stopped aren't the default")
        bench.resumed()
        if port is not None:
            port.memory.clear()
    if port is None:
        return "device reset only: no member's own function is given"
    for _ in range(4):
        if busy:
            _, driver = bench.blk()
            _start_reads(driver, min(driver.queue.ring.size // 3, 20))
        number = port.function.client.send(CommandCode.DEVICE_RESET)
        bench.stopped()
        done = bench.set_parts(1, fresh)
        bench.expect(done.status == 0, f"DEV_PARTS_SET right behind a function level reset: {say(done)}")
        port.function.client.reply_to(number, CommandCode.DEVICE_RESET)
        bench.expect(bench.get_parts(0) == fresh, "parts after a function level reset aren't the default")
        bench.resumed()
        port.memory.clear()
        port.function.place_bars()
        port.function.enable()
    return None
