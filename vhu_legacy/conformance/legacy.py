# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Checks of the legacy commands (LEG) and of the interface behind them (LIF); virtio 1.4, 2.12.1.3 and 4.1.4.10."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from .. import pci
from ..admin import Opcode, Qualifier
from ..virtio_driver import (
    NO_VECTOR,
    PAGE,
    BlkDriver,
    BlkType,
    Common,
    DriverError,
    Feature,
    Legacy,
    LegacyDevice,
    SplitRing,
    legacy_ring_size,
    mask,
    take_events,
)
from .bench import BLK, NET, SR_IOV, Bench, say
from .registry import check
from .report import Level

COMMON_FIELDS: Final[Mapping[int, int]] = {0: 4, 4: 4, 8: 4, 12: 2, 14: 2, 16: 2, 18: 1, 19: 1}
"""The legacy common configuration: width by offset."""
MSIX_FIELDS: Final[Mapping[int, int]] = {**COMMON_FIELDS, 20: 2, 22: 2}

LEGACY_ONLY: Final = mask(Feature.NOTIFY_ON_EMPTY, 26, Feature.ANY_LAYOUT, 30)
"""Feature bits that the legacy interface may have by itself: 24, 27, 30, and 26 of old block devices."""

_QUIET: Final = 0.05
"""Seconds in which nothing may happen."""


def _inside(fields: Mapping[int, int], offset: int, size: int) -> bool:
    """Whether an access lies in one field."""
    return size > 0 and any(at <= offset and offset + size <= at + width for at, width in fields.items())


def _accesses(end: int) -> Iterator[tuple[int, int]]:
    return itertools.product(range(end), range(10))


def _common_accesses(bench: Bench, fields: Mapping[int, int], state: str) -> None:
    """All reads, and the writes that have to be refused: offset and length, every one of them."""
    before = bench.snapshot()
    for offset, size in _accesses(30):
        right = _inside(fields, offset, size)
        what = f"({offset}, {size}){state}"
        # Reading ISR clears it, which nobody minds here: there are no interrupts.
        done = bench.common_read(offset, size)
        if right:
            bench.expect(done.status == 0, f"read of {what}: {say(done)}")
            bench.expect(len(done.result) == size, f"read of {what}: {len(done.result)} bytes")
            continue
        bench.fails(done, f"read of {what}")
        bench.fails(bench.common_write(offset, bytes(size)), f"write of {what}")
    for offset in (0x40, 0x7F, 0xFF):
        bench.fails(bench.common_read(offset, 1), f"read of ({offset}, 1){state}")
        bench.fails(bench.common_write(offset, b"\0"), f"write of ({offset}, 1){state}")
    bench.unchanged(before, bench.snapshot(), f"accesses outside of fields{state}")


# --- legacy commands ------------------------------------------------------------------------------------------------


@check("LEG-01", title="opcodes 2 to 5 all or none", needs=["sr-iov"])
def leg_01(bench: Bench) -> str | None:
    present = sorted(bench.group(SR_IOV) & {2, 3, 4, 5})
    bench.expect(len(present) in (0, 4), f"only {', '.join(map(str, present))} are supported")
    return None if present else "none"


@check("LEG-02", title="data is little-endian in both directions", needs=["legacy"])
def leg_02(bench: Bench) -> None:
    bench.use_all()
    registers = bench.registers
    registers.write(Legacy.DRIVER_FEATURES, 4, 0)
    offered = bench.features
    for at in range(4):
        byte = registers.read(Legacy.DEVICE_FEATURES + at, 1)
        bench.expect(byte == offered >> 8 * at & 0xFF, f"byte {at} of features {offered:#x} is {byte:#x}")
    bench.common_write(Legacy.DRIVER_FEATURES, struct.pack("<I", offered))
    for at in range(4):
        byte = registers.read(Legacy.DRIVER_FEATURES + at, 1)
        bench.expect(byte == offered >> 8 * at & 0xFF, f"features written as {offered:#x}: byte {at} is {byte:#x}")
    registers.write(Legacy.QUEUE_SELECT, 2, 0x0102)
    low, high = registers.read(Legacy.QUEUE_SELECT, 1), registers.read(Legacy.QUEUE_SELECT + 1, 1)
    bench.expect((low, high) == (2, 1), f"queue_select 0x0102: bytes {low:#x}, {high:#x}")
    registers.write(Legacy.QUEUE_SELECT, 2, 0)
    size = registers.read(Legacy.QUEUE_SIZE, 2)
    bench.expect(0 < size <= 0x8000 and size & (size - 1) == 0, f"queue_size is {size}")
    if bench.member_type == BLK:
        capacity = int.from_bytes(registers.config_read(0, 8), "little")
        halves = [int.from_bytes(registers.config_read(at, 4), "little") for at in (0, 4)]
        bench.expect(capacity == halves[0] | halves[1] << 32, f"capacity {capacity:#x} in halves {halves}")
        bench.expect(capacity < 1 << 48, f"a capacity of {capacity:#x} sectors: big-endian?")


@check("LEG-03", title="common configuration: only accesses within one field, within 20 or 24 bytes", needs=["legacy"])
def leg_03(bench: Bench) -> str | None:
    bench.use_all()
    _common_accesses(bench, COMMON_FIELDS, "")
    for offset, size in ((18, 2), (10, 4), (24, 1), (20, 2)):
        done = bench.common_read(offset, size)
        bench.refused(done, f"read of ({offset}, {size})", qualifier=Qualifier.INVALID_FIELD)
    port = bench.target.ports.get(bench.member)
    if port is None or port.function.msix is None:
        return "without MSI-X: no member's own function with it is given"
    port.function.enable_msix(2)
    _common_accesses(bench, MSIX_FIELDS, " with MSI-X")
    port.function.disable_msix()
    bench.fails(bench.common_read(20, 2), "read of (20, 2) after MSI-X went off")
    return None


@check("LEG-04", title="device configuration: only accesses within one field, within its end", needs=["legacy"])
def leg_04(bench: Bench) -> str | None:
    bench.use_all()
    end = bench.config_end()
    bench.expect(end > 0, "there is no device configuration")
    for at in (*range(end, min(end + 40, 256)), 0xF0, 0xFE, 0xFF):
        if at >= end:
            bench.fails(bench.config_read(at, 1), f"read of ({at}, 1), behind the end at {end}")
            bench.fails(bench.config_write(at, b"\0"), f"write of ({at}, 1), behind the end at {end}")
    bench.fails(bench.config_read(0, 0), "read of no bytes")
    bench.fails(bench.config_write(0, b""), "write of no bytes")
    fields = bench.config_fields
    known = {at + i for at, width in fields.items() for i in range(width)}
    for offset, size in _accesses(end):
        touched = set(range(offset, offset + size))
        if size == 0 or not touched & set(range(end)) <= known:
            continue  # Of unused bytes nothing is said.
        done = bench.config_read(offset, size)
        if _inside(fields, offset, size) and offset + size <= end:
            bench.expect(done.status == 0, f"read of ({offset}, {size}): {say(done)}")
            bench.expect(len(done.result) == size, f"read of ({offset}, {size}): {len(done.result)} bytes")
        else:
            bench.fails(done, f"read of ({offset}, {size})")
            bench.fails(bench.config_write(offset, bytes(size)), f"write of ({offset}, {size})")
    return f"{end} bytes of device configuration"


@check("LEG-05", title="COMMON_CFG_WRITE is a legacy write", needs=["legacy", "modern"])
def leg_05(bench: Bench) -> None:
    bench.use_all()
    registers, modern = bench.registers, bench.modern
    modern.function.enable_msix(2)
    registers.write(Legacy.STATUS, 1, 1)
    bench.expect(modern.status == 1, f"status 1 is {modern.status:#x} in the modern registers")
    registers.write(Legacy.STATUS, 1, 3)
    bench.expect(modern.status == 3, f"status 3 is {modern.status:#x} in the modern registers")
    wanted = bench.features & mask(Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.ANY_LAYOUT)
    registers.write(Legacy.DRIVER_FEATURES, 4, wanted)
    bench.expect(registers.read(Legacy.DRIVER_FEATURES, 4) == wanted, "features read otherwise than written")
    got = modern.driver_features(1)
    bench.expect(got & ~LEGACY_ONLY == wanted & ~LEGACY_ONLY, f"features {wanted:#x} are {got:#x} in modern registers")
    registers.write(Legacy.QUEUE_SELECT, 2, 0)
    registers.write(Legacy.QUEUE_VECTOR, 2, 1)
    registers.write(Legacy.CONFIG_VECTOR, 2, 0)
    ring = SplitRing(bench.port.memory, registers.read(Legacy.QUEUE_SIZE, 2), layout="legacy")
    registers.write(Legacy.QUEUE_ADDRESS, 4, ring.desc >> 12)
    modern.select(0)
    address = modern.read(Common.QUEUE_DESC, 4) | modern.read(Common.QUEUE_DESC + 4, 4) << 32
    bench.expect(address == ring.desc, f"a queue at {ring.desc:#x} is at {address:#x} in the modern registers")
    bench.expect(modern.read(Common.QUEUE_VECTOR, 2) == 1, "the queue's vector differs in the modern registers")
    bench.expect(modern.read(Common.CONFIG_VECTOR, 2) == 0, "the config vector differs in the modern registers")
    # Byte by byte: the parts make up the whole.
    registers.write(Legacy.DRIVER_FEATURES, 4, 0)
    for at in range(4):
        registers.write(Legacy.DRIVER_FEATURES + at, 1, wanted >> 8 * at & 0xFF)
    bench.expect(registers.read(Legacy.DRIVER_FEATURES, 4) == wanted, "features written byte by byte read otherwise")
    # Registers that can't be written: nothing happens, as in a BAR.
    before = bench.snapshot()
    for offset, width in ((Legacy.DEVICE_FEATURES, 4), (Legacy.QUEUE_SIZE, 2), (Legacy.ISR, 1)):
        done = bench.common_write(offset, b"\xff" * width)
        bench.expect(done.status == 0, f"write of read-only ({offset}, {width}): {say(done)}")
    bench.unchanged(before, bench.snapshot(), "writing read-only registers")


def _interrupt_without_msix(bench: Bench) -> LegacyDevice:
    """A device whose queue has interrupted, with MSI-X off."""
    device, driver = bench.blk()
    bench.works(driver, "without MSI-X")
    return device


@check("LEG-06", title="COMMON_CFG_READ is a legacy read: reading ISR clears it", needs=["legacy", "modern", "blk"])
def leg_06(bench: Bench) -> None:
    bench.use_all()
    offered, modern = bench.features, bench.modern.device_features(1)
    differ = (offered ^ modern) & ~LEGACY_ONLY & 0xFFFFFFFF
    # A transitional device offers the same on both sides, but what only one of them may have.
    bench.expect(not differ & ~mask(0, 7), f"features {offered:#x}, in the modern registers {modern:#x}")
    size = bench.registers.read(Legacy.QUEUE_SIZE, 2)
    shown = bench.modern.select(0).size
    bench.expect(size == shown, f"queue_size {size}, in the modern registers {shown}")
    device = _interrupt_without_msix(bench)
    done = bench.common_read(18, 2)
    bench.fails(done, "read of status and ISR in one")
    bench.expect(device.isr() == 1, "ISR isn't 1 after a completion, or a refused read has cleared it")
    bench.expect(device.isr() == 0, "ISR isn't 0 after it was read")


@check("LEG-07", title="DEV_CFG_WRITE is a legacy write", needs=["legacy"])
def leg_07(bench: Bench) -> str | None:
    bench.use_all()
    registers = bench.registers
    fields = bench.config_fields
    end = bench.config_end()
    device = LegacyDevice(registers)
    device.reset()
    writable = {32} if bench.member_type == BLK and bench.features >> Feature.BLK_CONFIG_WCE & 1 else set()
    if bench.member_type == NET:
        writable = {0}
    for at, width in fields.items():
        if at + width > end or at in writable:
            continue
        before = registers.config_read(at, width)
        done = bench.config_write(at, bytes(byte ^ 0xFF for byte in before))
        bench.expect(done.status == 0, f"write of read-only ({at}, {width}): {say(done)}")
        bench.expect(registers.config_read(at, width) == before, f"read-only ({at}, {width}) was written")
    for at in writable:
        for value in (0, 1, 0):
            data = bytes([value]) + bytes(fields[at] - 1)
            registers.config_write(at, data)
            bench.expect(registers.config_read(at, len(data)) == data, f"({at}, {len(data)}) reads otherwise")
            if bench.target.ports and bench.port.modern is not None:
                shown = bench.modern.config(at, len(data))
                bench.expect(shown == data, f"({at}, {len(data)}) is {shown.hex()} in the modern registers")
    return None if writable else "no field that can be written"


@check("LEG-08", title="DEV_CFG_READ is a legacy read", needs=["legacy"])
def leg_08(bench: Bench) -> str | None:
    bench.use_all()
    registers, fields = bench.registers, bench.config_fields
    end = bench.config_end()
    by_field = {at: registers.config_read(at, width) for at, width in fields.items() if at + width <= end}
    for at, data in by_field.items():
        by_byte = b"".join(registers.config_read(at + i, 1) for i in range(len(data)))
        bench.expect(by_byte == data, f"({at}, {len(data)}) is {data.hex()}, byte by byte {by_byte.hex()}")
    port = bench.target.ports.get(bench.member)
    if port is None or port.modern is None:
        return "against itself only: no member's modern registers are given"
    for at, data in by_field.items():
        shown = port.modern.config(at, len(data))
        bench.expect(shown == data, f"({at}, {len(data)}) is {data.hex()}, in the modern registers {shown.hex()}")
    return None


@dataclass(frozen=True, slots=True)
class _NotifyEntry:
    flags: int
    bar: int
    offset: int


def _notify_entries(bench: Bench) -> list[_NotifyEntry]:
    """All four, valid or not."""
    bench.use_all()
    result = bench.ok(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, bench.member, size=64).result
    bench.expect(len(result) == 64, f"LEGACY_NOTIFY_INFO: {len(result)} bytes")
    return [_NotifyEntry(*struct.unpack_from("<BB6xQ", result, at)) for at in range(0, 64, 16)]


def _valid(entries: list[_NotifyEntry]) -> list[_NotifyEntry]:
    return list(itertools.takewhile(lambda one: one.flags != 0, entries))


@check("LEG-09", title="LEGACY_NOTIFY_INFO only with opcodes 2 to 5", needs=["sr-iov"])
def leg_09(bench: Bench) -> str | None:
    supported = bench.group(SR_IOV)
    if 6 not in supported:
        return "no LEGACY_NOTIFY_INFO"
    bench.expect({2, 3, 4, 5} <= supported, "LEGACY_NOTIFY_INFO without all of opcodes 2 to 5")
    return None


@check("LEG-10", title="LEGACY_NOTIFY_INFO's last entry has flags 0", needs=["notify-info"])
def leg_10(bench: Bench) -> str | None:
    entries = _notify_entries(bench)
    bench.expect(entries[3].flags == 0, f"the last entry has flags {entries[3].flags}")
    return f"{len(_valid(entries))} usable"


def _member_bar_size(bench: Bench, bar: int) -> int | None:
    """A VF's BAR: from the member's own function or the owner's SR-IOV capability; None: neither is known."""
    port = bench.target.ports.get(bench.member)
    if port is not None and port.bar0 is None:
        found = port.function.bars.get(bar)
        return 0 if found is None else found.size
    owner = bench.target.owner
    if owner is None or owner.sriov is None:
        return None
    at = owner.sriov.offset + pci.SrIovRegister.VF_BAR0
    before = [owner.config_read(at + 4 * i, 4) for i in range(pci.BAR_COUNT)]
    bench.target.set_vfs(enable=False)
    for i in range(pci.BAR_COUNT):
        owner.config_write(at + 4 * i, 4, 0xFFFFFFFF)
    probe = [owner.config_read(at + 4 * i, 4) for i in range(pci.BAR_COUNT)]
    for i, value in enumerate(before):
        owner.config_write(at + 4 * i, 4, value)
    bench.target.set_vfs(enable=True)
    measured = pci.bar_from_probe(bar, probe[bar:])
    return 0 if measured is None else measured.size


@check("LEG-11", title="LEGACY_NOTIFY_INFO names BARs that are there", needs=["notify-info"])
def leg_11(bench: Bench) -> str | None:
    remark: str | None = None
    for one in _valid(_notify_entries(bench)):
        bench.expect(1 <= one.bar <= 5, f"an entry with BAR{one.bar}")
        if one.flags == 1 and bench.target.owner is not None:
            bar = bench.target.owner.bars.get(one.bar)
            size: int | None = 0 if bar is None else bar.size
        else:
            size = _member_bar_size(bench, one.bar)
        if size is None:
            remark = "sizes of BARs aren't known this way"
            continue
        bench.expect(size > 0, f"BAR{one.bar} is hardwired to zero")
        bench.expect(one.offset + 2 <= size, f"offset {one.offset:#x} in BAR{one.bar} of {size:#x} bytes")
    return remark


@check("LEG-12", title="LEGACY_NOTIFY_INFO's offsets are even", needs=["notify-info"])
def leg_12(bench: Bench) -> None:
    for one in _valid(_notify_entries(bench)):
        bench.expect(one.offset % 2 == 0, f"offset {one.offset:#x}")


@check(
    "LEG-13",
    level=Level.MAY,
    title="LEGACY_NOTIFY_INFO's entries are the owner's or the member's",
    needs=["notify-info"],
)
def leg_13(bench: Bench) -> str:
    kinds = [one.flags for one in _valid(_notify_entries(bench))]
    bench.expect(set(kinds) <= {1, 2}, f"flags {kinds}")
    return ", ".join({1: "owner", 2: "member"}[kind] for kind in kinds) or "none"


@check("LEG-14", title="with LEGACY_NOTIFY_INFO, VF BAR0 is hardwired to zero", needs=["notify-info", "owner"])
def leg_14(bench: Bench) -> None:
    owner = bench.owner
    if owner.sriov is None:
        bench.not_applicable("the owner has no SR-IOV capability")
    at = owner.sriov.offset + pci.SrIovRegister.VF_BAR0
    enabled, _ = bench.target.vfs()
    bench.target.set_vfs(enable=False)
    try:
        owner.config_write(at, 4, 0xFFFFFFFF)
        value = owner.config_read(at, 4)
    finally:
        bench.target.set_vfs(enable=enabled)
    bench.expect(value == 0, f"VF BAR0 reads {value:#x} after all-ones were written")
    for number, port in bench.target.ports.items():
        if port.bar0 is None:
            bench.expect(0 not in port.function.bars, f"member {number} has a BAR0")


@check("LEG-15", title="writing the notify address is a write of queue_notify", needs=["notify-info", "port", "blk"])
def leg_15(bench: Bench) -> str | None:
    entries = _valid(_notify_entries(bench))
    if not entries:
        bench.not_applicable("LEGACY_NOTIFY_INFO gives no address")
    _, driver = bench.blk()
    expected = bench.works(driver, "notified by command")
    used: list[str] = []
    for one in entries:
        function = bench.target.owner if one.flags == 1 else bench.port.function
        if function is None or (one.flags == 2 and bench.port.bar0 is not None):
            continue  # Another function's BAR than the one that is meant.
        pending = driver.start(BlkType.IN, 0, size=512, kick=False)
        driver.queue.ring.publish()
        function.write(one.bar, one.offset, 2, 0)
        result = driver.finish(pending)
        bench.expect(result.data == expected, f"notified at BAR{one.bar} + {one.offset:#x}: other data")
        # Of a queue that isn't there: nothing.
        function.write(one.bar, one.offset, 2, 0x7FFF)
        used.append(f"BAR{one.bar} + {one.offset:#x}")
    if not used:
        bench.not_applicable("none of the addresses can be reached")
    bench.works(driver, "afterwards", expected=expected)
    return ", ".join(used)


@check(
    "LEG-16",
    level=Level.SHOULD,
    title="owner and members have revision 1 or more, and subsystem ids from 0x40 on",
    needs=["legacy", "owner"],
)
def leg_16(bench: Bench) -> str | None:
    def compare(what: str, one: pci.Identity) -> None:
        bench.expect(one.revision >= 1, f"{what}: revision {one.revision}")
        bench.expect(one.subsystem >= 0x40, f"{what}: subsystem id {one.subsystem:#x}")

    compare("owner", bench.owner.identity)
    device = bench.owner.identity.device
    bench.expect(0x1040 <= device <= 0x107F, f"owner: device id {device:#x}")
    own = {number: port for number, port in bench.target.ports.items() if port.bar0 is None}
    for number, port in own.items():
        compare(f"member {number}", port.function.identity)
    return None if own else "the owner only: no member's own function is given"


# --- the legacy interface -------------------------------------------------------------------------------------------


@check("LIF-01", title="features 32 to 63 are taken as not accepted", needs=["legacy", "modern", "blk"])
def lif_01(bench: Bench) -> None:
    bench.use_all()
    _, driver = bench.blk(features=mask(Feature.INDIRECT_DESC))
    accepted = bench.modern.driver_features(4)
    bench.expect(accepted >> 32 == 0, f"accepted features {accepted:#x} after a legacy negotiation")
    bench.works(driver, "after a legacy negotiation")


@check("LIF-02", title="without VERSION_1 accepted the device is a legacy one", needs=["legacy", "port", "blk"])
def lif_02(bench: Bench) -> None:
    bench.use_all()
    # A ring at its PFN, in the legacy layout, no FEATURES_OK, for a driver that never writes features (SeaBIOS).
    device = bench.legacy()
    device.reset()
    device.status = 3
    driver = BlkDriver(device.setup_queue(0, bench.port.memory))
    device.status = 7
    bench.works(driver, "without features")
    bench.expect(device.status == 7, f"status is {device.status:#x} instead of 7")


def _writeback(bench: Bench) -> None:
    """Raises NotApplicable for a device without a cache mode that can be written."""
    bench.require("blk")
    if not bench.features >> Feature.BLK_CONFIG_WCE & 1:
        bench.not_applicable("CONFIG_WCE isn't offered")


@check("LIF-03", title="configuration can be written before features", needs=["legacy"])
def lif_03(bench: Bench) -> None:
    bench.use_all()
    if bench.member_type == NET:
        place, values = 0, [bytes.fromhex("021122334455"), bytes.fromhex("020000000001")]
    else:
        _writeback(bench)
        place, values = 32, [b"\0", b"\1", b"\0"]
    device = LegacyDevice(bench.registers)
    device.reset()
    before = bench.registers.config_read(place, len(values[0]))
    for status in (0, 1, 3):
        if status:
            device.status = status
        for value in values:
            bench.registers.config_write(place, value)
            found = bench.registers.config_read(place, len(value))
            bench.expect(found == value, f"status {status}: written {value.hex()}, read {found.hex()}")
    bench.registers.config_write(place, before)


@check("LIF-04", title="the device can be used before DRIVER_OK", needs=["legacy", "port", "blk"])
def lif_04(bench: Bench) -> None:
    bench.use_all()
    device = bench.legacy()
    for status in (0, 1, 3):
        device.reset()
        if status:
            device.status = status
        driver = BlkDriver(device.setup_queue(0, bench.port.memory))
        bench.works(driver, f"status {status}, no features")
        device.registers.write(Legacy.DRIVER_FEATURES, 4, 0)
        bench.works(driver, f"status {status}, features 0")


@check("LIF-05", title="in BAR0, device configuration is at 20, with MSI-X at 24", needs=["legacy", "bar0"])
def lif_05(bench: Bench) -> None:
    bench.use_all()
    port = bench.bar0_port
    function = port.function
    expected = b"".join(done.result for at in range(8) if (done := bench.config_read(at, 1, port.number)).status == 0)
    bench.expect(bool(expected), "there is no device configuration")

    def read(at: int) -> bytes:
        return b"".join(function.client.region_read(0, at + i, 1) for i in range(len(expected)))

    bench.expect(read(20) == expected, f"at 20: {read(20).hex()} instead of {expected.hex()}")
    if function.msix is None:
        bench.not_applicable("the function has no MSI-X")
    function.enable_msix(2)
    bench.expect(read(24) == expected, f"with MSI-X, at 24: {read(24).hex()} instead of {expected.hex()}")
    vectors = function.read(0, 20, 2), function.read(0, 22, 2)
    bench.expect(vectors == (NO_VECTOR, NO_VECTOR), f"with MSI-X, vectors read {vectors}")
    function.disable_msix()
    bench.expect(read(20) == expected, f"with MSI-X off again, at 20: {read(20).hex()} instead of {expected.hex()}")


@check("LIF-06", title="device configuration reads the same at any width", needs=["legacy"])
def lif_06(bench: Bench) -> str | None:
    bench.use_all()
    fields, end = bench.config_fields, bench.config_end()
    known = {at + i for at, width in fields.items() for i in range(width) if at + i < end}
    whole = b"".join(bench.registers.config_read(at, 1) if at in known else b"\0" for at in range(end))
    for at, width in fields.items():
        for size in (1, 2, 4, 8):
            for offset in range(at, min(at + width, end) - size + 1):
                data = bench.registers.config_read(offset, size)
                bench.expect(
                    data == whole[offset : offset + size],
                    f"({offset}, {size}) is {data.hex()}, byte by byte {whole[offset : offset + size].hex()}",
                )
    if not any(port.bar0 is not None for port in bench.target.ports.values()):
        return "by command only: no member's function with an I/O BAR0 is given"
    port = bench.bar0_port
    whole = b"".join(bench.config_read(at, 1, port.number).result if at in known else b"\0" for at in range(end))
    for size in (1, 2, 4):
        for at, width in fields.items():
            for offset in range(at, min(at + width, end) - size + 1):
                data = port.function.client.region_read(0, 20 + offset, size)
                right = whole[offset : offset + size]
                bench.expect(data == right, f"BAR0 {20 + offset}, {size} wide: {data.hex()} instead of {right.hex()}")
    return None


@check("LIF-07", title="rings have the legacy layout, at PFN * 4096", needs=["legacy", "port", "blk"])
def lif_07(bench: Bench) -> None:
    bench.use_all()
    device = bench.legacy()
    device.negotiate()
    memory = bench.port.memory
    driver = BlkDriver(device.setup_queue(0, memory))
    device.driver_ok()
    ring = driver.queue.ring
    size = ring.size
    used = (18 * size + 6 + PAGE - 1) // PAGE * PAGE
    bench.expect(ring.device - ring.desc == used, "this suite's own ring is wrong")
    pfn = bench.registers.read(Legacy.QUEUE_ADDRESS, 4)
    bench.expect(pfn == ring.desc >> 12, f"PFN reads {pfn:#x} instead of {ring.desc >> 12:#x}")
    end = ring.desc + legacy_ring_size(size)
    last = ring.device + 6 + 8 * size
    padding = memory.read(last, end - last)
    for _ in range(3):
        pending = driver.start(BlkType.IN, 0, size=512, kick=False)
        before = memory.read(ring.desc, used)
        driver.queue.ring.publish()
        before = before[: 16 * size + 2] + memory.read(ring.driver + 2, 2) + before[16 * size + 4 :]
        driver.queue.notify()
        driver.finish(pending)
        bench.expect(memory.read(ring.desc, used) == before, "the device writes to the driver's part of the ring")
    index = memory.u16(ring.device + 2)
    bench.expect(index == 3, f"the used index, {used} bytes from the start, is {index} after 3 requests")
    bench.expect(memory.read(last, end - last) == padding, "the device writes behind the used ring")
    # A queue is taken out of use by address 0, and can be set up elsewhere.
    bench.registers.write(Legacy.QUEUE_SELECT, 2, 0)
    bench.registers.write(Legacy.QUEUE_ADDRESS, 4, 0)
    bench.expect(bench.registers.read(Legacy.QUEUE_ADDRESS, 4) == 0, "address 0 isn't taken")
    again = BlkDriver(device.setup_queue(0, memory))
    bench.expect(again.queue.ring.desc != ring.desc, "this suite's rings are the same")
    bench.works(again, "in another place")
    bench.expect(memory.u16(ring.device + 2) == 3, "the ring in the old place is still in use")


@check("LIF-08", title="writing status 0 resets, at once", needs=["legacy"])
def lif_08(bench: Bench) -> None:
    bench.use_all()
    device = LegacyDevice(bench.registers)
    registers = bench.registers
    device.reset()
    fresh = bench.snapshot()
    port = bench.target.ports.get(bench.member)
    for _ in range(3):
        device.negotiate(bench.features)
        if port is not None and bench.member_type == BLK:
            driver = BlkDriver(bench.legacy().setup_queue(0, port.memory))
            device.driver_ok()
            for _ in range(8):
                driver.start(BlkType.IN, 0, size=512, kick=False)
            driver.queue.kick(always=True)
        else:
            device.driver_ok()
        registers.write(Legacy.QUEUE_SELECT, 2, 1)
        device.reset()
        bench.unchanged(fresh, bench.snapshot(), "a device that was reset differs from a fresh one: its use")
        bench.expect(registers.read(Legacy.ISR, 1) == 0, "ISR isn't 0 after a reset")
        if port is not None:
            before = port.memory.read(port.memory.base, port.memory.size)
            time.sleep(0.01)
            after = port.memory.read(port.memory.base, port.memory.size)
            bench.expect(before == after, "memory is written after a reset has ended")
            port.memory.clear()
    for index in range(4):
        registers.write(Legacy.QUEUE_SELECT, 2, index)
        bench.expect(registers.read(Legacy.QUEUE_ADDRESS, 4) == 0, f"queue {index} has an address after a reset")
    registers.write(Legacy.QUEUE_SELECT, 2, 0x7FFF)
    bench.expect(registers.read(Legacy.QUEUE_SIZE, 2) == 0, "a queue that isn't there has a size")


@check("LIF-09", title="reading ISR returns and clears it", needs=["legacy", "port", "blk"])
def lif_09(bench: Bench) -> str | None:
    bench.use_all()
    device, driver = bench.blk()
    bench.expect(device.isr() == 0, "ISR isn't 0 in the beginning")
    for _ in range(3):
        bench.works(driver, "without MSI-X")
        bench.expect(device.isr() & 1 == 1, "ISR's queue bit isn't set after a completion")
        bench.expect(device.isr() == 0, "ISR isn't 0 after it was read")
    function = bench.port.function
    if not function.identity.interrupt_pin:
        return "a VF has no INTx whose level could be seen"
    function.enable_intx()
    device, driver = bench.blk()
    for _ in range(3):
        bench.interrupted(driver, "with INTx")
    return None


@check(
    "LIF-10",
    title="vectors are unmapped by a reset; one that can't be mapped reads NO_VECTOR",
    needs=["legacy", "port"],
)
def lif_10(bench: Bench) -> None:
    bench.use_all()
    function, registers = bench.port.function, bench.registers
    capability = function.msix
    if capability is None:
        bench.not_applicable("the member's function has no MSI-X")
    function.enable_msix()
    device = LegacyDevice(registers)
    device.reset()
    for round_ in range(2):
        for register in (Legacy.CONFIG_VECTOR, Legacy.QUEUE_VECTOR):
            registers.write(Legacy.QUEUE_SELECT, 2, 0)
            found = registers.read(register, 2)
            bench.expect(found == NO_VECTOR, f"{register.name} reads {found:#x} {'after a reset' if round_ else ''}")
            for vector in (0, capability.vectors - 1):
                registers.write(register, 2, vector)
                found = registers.read(register, 2)
                bench.expect(found == vector, f"{register.name} reads {found:#x} instead of {vector:#x}")
            for vector in (capability.vectors, 0x7FFF, 0xFFFE):
                registers.write(register, 2, vector)
                found = registers.read(register, 2)
                bench.expect(found == NO_VECTOR, f"{register.name}: vector {vector:#x} isn't there but is taken")
            registers.write(register, 2, 0)
        device.reset()


@check("LIF-11", title="with NO_VECTOR there is no interrupt", needs=["legacy", "port", "blk"])
def lif_11(bench: Bench) -> None:
    bench.use_all()
    function = bench.port.function
    if function.msix is None:
        bench.not_applicable("the member's function has no MSI-X")
    function.enable_msix(2)
    _, driver = bench.blk()
    bench.works(driver, "with NO_VECTOR")
    time.sleep(_QUIET)
    seen = [take_events(fd) for fd in function.vectors]
    bench.expect(not any(seen), f"interrupts {seen} with NO_VECTOR")
    bench.registers.write(Legacy.QUEUE_SELECT, 2, 0)
    bench.registers.write(Legacy.QUEUE_VECTOR, 2, 1)
    driver.queue.event = function.vectors[1]
    for _ in range(3):
        bench.interrupted(driver, "with vector 1")
    bench.expect(take_events(function.vectors[0]) == 0, "an interrupt through vector 0 instead of 1")
    bench.registers.write(Legacy.QUEUE_VECTOR, 2, NO_VECTOR)
    driver.queue.event = None
    take_events(function.vectors[1])
    bench.works(driver, "with NO_VECTOR again")
    time.sleep(_QUIET)
    seen = [take_events(fd) for fd in function.vectors]
    bench.expect(not any(seen), f"interrupts {seen} with NO_VECTOR again")


@check("LIF-12", title="ANY_LAYOUT is offered", needs=["legacy"])
def lif_12(bench: Bench) -> None:
    bench.use_all()
    bench.expect(bench.features >> Feature.ANY_LAYOUT & 1, f"features {bench.features:#x}")


@check("LIF-13", title="NOTIFY_ON_EMPTY is honoured", needs=["legacy", "port", "blk"])
def lif_13(bench: Bench) -> None:
    bench.use_all()
    if not bench.features >> Feature.NOTIFY_ON_EMPTY & 1:
        bench.not_applicable("NOTIFY_ON_EMPTY isn't offered")
    function = bench.port.function
    if function.msix is None:
        bench.not_applicable("the member's function has no MSI-X")
    function.enable_msix(2)
    for accepted in (False, True):
        _, driver = bench.blk(features=mask(Feature.NOTIFY_ON_EMPTY) if accepted else 0, vector=1)
        fd, driver.queue.event = driver.queue.event, None
        if fd is None:
            raise DriverError("no eventfd for vector 1")
        ring = driver.queue.ring
        ring.want_interrupts(False)
        take_events(fd)
        bench.works(driver, "with interrupts suppressed")
        deadline = time.monotonic() + (2 if accepted else _QUIET)
        count = 0
        while not count and time.monotonic() < deadline:
            count = take_events(fd)
            time.sleep(0.001)
        what = "accepted" if accepted else "not accepted"
        bench.expect(bool(count) == accepted, f"{count} interrupts of an empty ring with NOTIFY_ON_EMPTY {what}")


@check("LIF-14", title="buffers and used length are written before the used index", needs=["legacy", "port", "blk"])
def lif_14(bench: Bench) -> None:
    bench.use_all()
    _, driver = bench.blk()
    expected = bench.works(driver, "first")
    memory, ring = bench.port.memory, driver.queue.ring
    for count in range(200):
        with memory.borrowed():
            pending = driver.start(BlkType.IN, 0, size=512, kick=False)
            before = memory.u16(ring.device + 2)
            at = ring.device + 4 + 8 * (before % ring.size)
            memory.write(at, b"\xff" * 8)
            driver.queue.kick()
            deadline = time.monotonic() + driver.queue.timeout
            # As tight as can be: what comes after the index is to be caught.
            while memory.u16(ring.device + 2) == before:
                if time.monotonic() > deadline:
                    raise TimeoutError("a request wasn't completed")
                bench.port.function.client.pump()
            status = memory.read(pending.status, 1)[0]
            data = memory.read(pending.data, 512)
            element = struct.unpack("<II", memory.read(at, 8))
            bench.expect(status == 0, f"request {count}: status {status:#x} when the used index has moved")
            bench.expect(data == expected, f"request {count}: other data when the used index has moved")
            bench.expect(element[1] == 513, f"request {count}: used length {element[1]} when the used index has moved")
            driver.finish(pending)


@check("LIF-15", title="notifications without a reason do no harm", needs=["legacy", "port", "blk"])
def lif_15(bench: Bench) -> None:
    bench.use_all()
    device = bench.legacy()
    device.reset()
    for queue in (0, 1, 0x7FFF, 0xFFFF):
        device.registers.notify(queue)
    _, driver = bench.blk()
    for _ in range(3):
        for queue in (0, 0, 1, 0x7FFF, 0xFFFF):
            device.registers.notify(queue)
        bench.works(driver, "after notifications without a reason")
    index = bench.port.memory.u16(driver.queue.ring.device + 2)
    bench.expect(index == 3, f"the used index is {index} after 3 requests")


@check("LIF-16", title="net: the MAC can be written, num_buffers only with MRG_RXBUF", needs=["legacy"])
def lif_16(bench: Bench) -> str | None:
    bench.use_all()
    if bench.member_type != NET:
        bench.not_applicable("the member is no network device")
    registers = bench.registers
    before = registers.config_read(0, 6)
    for value in (bytes.fromhex("0211223344aa"), before):
        for at in range(6):
            registers.config_write(at, value[at : at + 1])
        found = registers.config_read(0, 6)
        bench.expect(found == value, f"MAC {value.hex()} reads {found.hex()}")
    return "the MAC only: what a packet's header looks like is not looked at"


@check("LIF-17", title="blk: the cache mode is left alone by features and status", needs=["legacy", "blk"])
def lif_17(bench: Bench) -> None:
    bench.use_all()
    _writeback(bench)
    device, registers = LegacyDevice(bench.registers), bench.registers
    device.reset()
    offered = bench.features
    for mode in (b"\0", b"\1"):
        device.reset()
        registers.config_write(32, mode)

        def same(what: str, mode: bytes = mode) -> None:
            found = registers.config_read(32, 1)
            bench.expect(found == mode, f"{what} changes the cache mode from {mode.hex()} to {found.hex()}")

        for features in (0, offered & ~mask(Feature.BLK_CONFIG_WCE), offered & mask(Feature.BLK_CONFIG_WCE), offered):
            registers.write(Legacy.DRIVER_FEATURES, 4, features)
            same(f"accepting {features:#x}")
        for status in (1, 3, 7):
            # The last with CONFIG_WCE accepted: without it, DRIVER_OK may change the mode.
            device.status = status
            same(f"status {status}")
    device.reset()


@check("LIF-18", title="blk: ZONED is not offered", needs=["legacy", "blk"])
def lif_18(bench: Bench) -> None:
    bench.use_all()
    bench.expect(not bench.features >> Feature.BLK_ZONED & 1, f"features {bench.features:#x}")
