# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What checks say things with: commands, expectations, and devices set up as far as a check needs them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from ..admin import GroupType, Opcode, Qualifier, Status, opcode_list, opcodes_in
from ..virtio_driver import (
    BlkDriver,
    BlkType,
    Completion,
    Legacy,
    LegacyDevice,
    ModernDevice,
    PciFunction,
    take_events,
)
from .registry import CheckFailed, NotApplicable
from .target import CannotReach, OwnerDriver, Port, Target

__all__ = ["BLK_FIELDS", "NET_FIELDS", "SELF", "SR_IOV", "AdminRegisters", "Bench", "Part", "say"]

SELF: Final = GroupType.SELF
SR_IOV: Final = GroupType.SR_IOV

LEGACY: Final = frozenset({2, 3, 4, 5})
CAPABILITIES: Final = frozenset({7, 8, 9})
OBJECTS: Final = frozenset({0xA, 0xB, 0xC, 0xD})
PARTS: Final = frozenset({0xE, 0xF, 0x10, 0x11})

DEV_PARTS: Final = 0
"""The resource object type, and the capability that limits it."""
GET: Final = 0
SET: Final = 1

BLK_FIELDS: Final[Mapping[int, int]] = {
    0: 8,
    8: 4,
    12: 4,
    16: 2,
    18: 1,
    19: 1,
    20: 4,
    24: 1,
    25: 1,
    26: 2,
    28: 4,
    32: 1,
    34: 2,
    36: 4,
    40: 4,
    44: 4,
    48: 4,
    52: 4,
    56: 1,
    60: 4,
    64: 4,
    68: 4,
    72: 4,
    76: 4,
    80: 4,
    84: 4,
    88: 4,
    92: 1,
}
"""Fields of struct virtio_blk_config: width by offset. What isn't covered is unused."""
NET_FIELDS: Final[Mapping[int, int]] = {0: 6, 6: 2, 8: 2, 10: 2}

BLK: Final = 2
NET: Final = 1


def say(completion: Completion) -> str:
    """A completion's outcome, for people."""

    def name(kind: type[Status] | type[Qualifier], value: int) -> str:
        return kind(value).name if value in set(kind) else str(value)

    return f"{name(Status, completion.status)}/{name(Qualifier, completion.qualifier)}"


@dataclass(frozen=True, slots=True)
class Part:
    """A device part."""

    type: int
    flags: int
    selector: bytes
    value: bytes

    def pack(self) -> bytes:
        return struct.pack("<HBx8sI", self.type, self.flags, self.selector, len(self.value)) + self.value


class Bench:
    """A device under test, for the duration of one check."""

    def __init__(self, target: Target) -> None:
        self.target: Final = target
        self._supported: dict[int, frozenset[int] | None] = {}

    # --- judgement ----------------------------------------------------------------------------------------------

    @staticmethod
    def expect(condition: object, message: str) -> None:
        """Raises CheckFailed unless true."""
        if not condition:
            raise CheckFailed(message)

    @staticmethod
    def not_applicable(reason: str) -> NoReturn:
        raise NotApplicable(reason)

    def require(self, need: str) -> None:
        """Raises NotApplicable when something that a check needs isn't there, ValueError for what nobody knows."""
        needs: Mapping[str, Callable[[], object]] = {
            "sr-iov": lambda: self.group(SR_IOV),
            "legacy": lambda: self._opcodes(SR_IOV, LEGACY, "legacy commands"),
            "notify-info": lambda: self._opcodes(SR_IOV, {6}, "LEGACY_NOTIFY_INFO"),
            "capabilities": lambda: self._opcodes(SELF, CAPABILITIES, "capability commands"),
            "objects": lambda: self._opcodes(SR_IOV, {0xA, 0xB, 0xD}, "resource object commands"),
            "modify": lambda: self._opcodes(SR_IOV, {0xC}, "RESOURCE_OBJ_MODIFY"),
            "parts": lambda: self._opcodes(SR_IOV, PARTS, "device parts commands"),
            "mode": lambda: self._opcodes(SR_IOV, {0x11}, "DEV_MODE_SET"),
            "owner": lambda: self.owner,
            "owner-driver": lambda: self.owner_driver,
            "port": lambda: self.port,
            "modern": lambda: self.modern,
            "bar0": lambda: self.bar0_port,
            "blk": self._require_blk,
            "vfs": self._vfs,
        }
        if need not in needs:
            raise ValueError(need)
        needs[need]()

    def _opcodes(self, group: int, wanted: Iterable[int], what: str) -> None:
        supported = self.group(group) if group == SR_IOV else self.supported(group)
        if supported is None or not set(wanted) <= supported:
            self.not_applicable(f"the owner has no {what}")

    def _vfs(self) -> None:
        try:
            self.target.vfs()
        except CannotReach as reason:
            self.not_applicable(str(reason))

    def _require_blk(self) -> None:
        if self.member_type != BLK:
            self.not_applicable("the member is no block device")

    def refused(
        self,
        completion: Completion,
        what: str,
        status: int = Status.EINVAL,
        qualifier: int | None = None,
    ) -> None:
        """Raises CheckFailed unless a command has failed as it should."""
        right = completion.status == status and (qualifier is None or completion.qualifier == qualifier)
        wanted = Status(status).name + ("" if qualifier is None else f"/{Qualifier(qualifier).name}")
        self.expect(right, f"{what}: {say(completion)} instead of {wanted}")

    def fails(self, completion: Completion, what: str) -> None:
        """Raises CheckFailed when a command hasn't failed."""
        self.expect(completion.status != 0, f"{what}: succeeds")

    # --- commands -----------------------------------------------------------------------------------------------

    def admin(self, opcode: int, group: int, member: int = 0, data: bytes = b"", size: int = 0) -> Completion:
        return self.target.admin(opcode, group, member, data, size)

    def ok(self, opcode: int, group: int, member: int = 0, data: bytes = b"", size: int = 0) -> Completion:
        """A command that has to succeed."""
        done = self.admin(opcode, group, member, data, size)
        name = Opcode(opcode).name if opcode in set(Opcode) else f"opcode {opcode:#x}"
        self.expect((done.status, done.qualifier) == (0, 0), f"{name}, group {group}, member {member}: {say(done)}")
        return done

    def list_query(self, group: int) -> frozenset[int]:
        """The opcodes of LIST_QUERY, which has to succeed."""
        return opcodes_in(self.ok(Opcode.LIST_QUERY, group, size=128).result)

    def supported(self, group: int) -> frozenset[int] | None:
        """What LIST_QUERY reported first in this check; None when the group doesn't exist."""
        if group not in self._supported:
            done = self.admin(Opcode.LIST_QUERY, group, size=128)
            self._supported[group] = None if done.status else opcodes_in(done.result)
        return self._supported[group]

    def group(self, group: int) -> frozenset[int]:
        """As `supported`. Raises NotApplicable when the group doesn't exist."""
        found = self.supported(group)
        if found is None:
            self.not_applicable(f"the owner has no {GroupType(group).name} group")
        return found

    def use(self, group: int, opcodes: Iterable[int]) -> Completion:
        """LIST_USE, however it ends."""
        return self.admin(Opcode.LIST_USE, group, data=opcode_list(opcodes))

    def use_all(self) -> None:
        """Everything that is supported, in both groups."""
        for group in (SELF, SR_IOV):
            supported = self.supported(group)
            if supported is not None:
                self.ok(Opcode.LIST_USE, group, data=opcode_list(supported))

    def reset_owner(self) -> None:
        """Raises NotApplicable when there is no way to."""
        try:
            self.target.reset_owner()
        except CannotReach as reason:
            self.not_applicable(str(reason))

    def common_read(self, offset: int, size: int, member: int | None = None) -> Completion:
        """LEGACY_COMMON_CFG_READ, however it ends."""
        return self.admin(Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, member or self.member, bytes([offset]), size)

    def common_write(self, offset: int, data: bytes, member: int | None = None) -> Completion:
        return self.admin(
            Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, member or self.member, bytes([offset]) + bytes(7) + data
        )

    def config_read(self, offset: int, size: int, member: int | None = None) -> Completion:
        """LEGACY_DEV_CFG_READ, however it ends."""
        return self.admin(Opcode.LEGACY_DEV_CFG_READ, SR_IOV, member or self.member, bytes([offset]), size)

    def config_write(self, offset: int, data: bytes, member: int | None = None) -> Completion:
        return self.admin(Opcode.LEGACY_DEV_CFG_WRITE, SR_IOV, member or self.member, bytes([offset]) + bytes(7) + data)

    # --- the owner ----------------------------------------------------------------------------------------------

    @property
    def owner(self) -> PciFunction:
        """The owner's PCI function. Raises NotApplicable without one."""
        if self.target.owner is None:
            self.not_applicable("the owner's PCI function can't be reached")
        return self.target.owner

    @property
    def owner_driver(self) -> OwnerDriver:
        """The owner's driver; it may have to be started. Raises NotApplicable without one."""
        if self.target.driver is None:
            self.not_applicable("the owner's PCI function can't be reached")
        return self.target.driver

    # --- members ------------------------------------------------------------------------------------------------

    @property
    def member(self) -> int:
        """The member that is tested: the first with modern registers of its own, else with any, else 1."""
        ports = self.target.ports
        for number, port in sorted(ports.items()):
            if port.modern is not None and port.bar0 is None:
                return number
        return min(ports, default=1)

    @property
    def absent_member(self) -> int:
        """An id behind the last member. Raises NotApplicable when there can be none."""
        try:
            _, number = self.target.vfs()
        except CannotReach:
            number = 0xFFFE
        if number >= 0xFFFF:
            self.not_applicable("there are as many members as there can be")
        return number + 1

    @property
    def port(self) -> Port:
        """The tested member's own function. Raises NotApplicable without one."""
        port = self.target.ports.get(self.member)
        if port is None:
            self.not_applicable("no member's own function is given, so none has memory or interrupts")
        return port

    @property
    def modern(self) -> ModernDevice:
        """The tested member's modern registers. Raises NotApplicable without."""
        if self.port.modern is None:
            self.not_applicable("the member's function has no modern registers")
        return self.port.modern

    @property
    def bar0_port(self) -> Port:
        """The first member's function with I/O BAR0. Raises NotApplicable without one."""
        ports = self.target.ports
        found = next((port for _, port in sorted(ports.items()) if port.bar0 is not None), None)
        if found is None:
            self.not_applicable("no member's function with an I/O BAR0 is given")
        return found

    @property
    def member_type(self) -> int | None:
        """The tested member's virtio device type; without a function of its own, what the owner's VFs are."""
        port = self.target.ports.get(self.member)
        if port is not None:
            return port.virtio_id
        owner = self.target.owner
        if owner is None or owner.sriov is None:
            return None
        device = owner.sriov.vf_device_id
        return device - 0x1040 if 0x1040 <= device <= 0x107F else None

    @property
    def config_fields(self) -> Mapping[int, int]:
        """The member's device configuration, width by offset. Raises NotApplicable for a type not known here."""
        fields = {BLK: BLK_FIELDS, NET: NET_FIELDS}.get(self.member_type or 0)
        if fields is None:
            self.not_applicable(f"nothing is known here of the configuration of virtio device type {self.member_type}")
        return fields

    def config_end(self) -> int:
        """Bytes of device configuration that the legacy interface shows, unused ones among them or not."""
        return max((at + 1 for at in range(256) if self.config_read(at, 1).status == 0), default=0)

    @property
    def registers(self) -> AdminRegisters:
        """The tested member's legacy interface, through administration commands."""
        return AdminRegisters(self, self.member)

    @property
    def features(self) -> int:
        """What the tested member offers to a legacy driver."""
        return self.registers.read(Legacy.DEVICE_FEATURES, 4)

    def snapshot(self, member: int | None = None) -> dict[str, bytes]:
        """A member's registers, as far as reading has no effect."""
        which = member or self.member
        registers = AdminRegisters(self, which)
        found = {
            name: registers.read(offset, width).to_bytes(width, "little")
            for name, offset, width in (
                ("device features", Legacy.DEVICE_FEATURES, 4),
                ("driver features", Legacy.DRIVER_FEATURES, 4),
                ("queue address", Legacy.QUEUE_ADDRESS, 4),
                ("queue size", Legacy.QUEUE_SIZE, 2),
                ("queue select", Legacy.QUEUE_SELECT, 2),
                ("status", Legacy.STATUS, 1),
            )
        }
        found["configuration"] = b"".join(
            done.result for at in range(64) if (done := self.config_read(at, 1, which)).status == 0
        )
        return found

    def unchanged(self, before: Mapping[str, bytes], after: Mapping[str, bytes], by: str) -> None:
        """Raises CheckFailed when two snapshots differ."""
        changed = [name for name in before if before[name] != after[name]]
        self.expect(not changed, f"{by}: changes {', '.join(changed)}")

    def legacy(self, port: Port | None = None) -> LegacyDevice:
        """The tested member, driven by administration commands; with a port, through its memory and interrupts."""
        where = self.port if port is None else port
        return LegacyDevice(AdminRegisters(self, where.number), where.function)

    def blk(self, *, features: int = 0, vector: int | None = None, ok: bool = True) -> tuple[LegacyDevice, BlkDriver]:
        """The tested member as a block device in use by a legacy driver, through administration commands."""
        self._require_blk()
        device = self.legacy()
        device.negotiate(features)
        driver = BlkDriver(device.setup_queue(0, self.port.memory, vector))
        if ok:
            device.driver_ok()
        return device, driver

    def works(self, driver: BlkDriver, what: str, *, expected: bytes | None = None) -> bytes:
        """Read a sector. Raises CheckFailed when that goes wrong or `expected` is something else.

        Checks only read: whose disk this is isn't known.
        """
        result = driver.request(BlkType.IN, 0, size=512)
        self.expect(result.status == 0, f"{what}: a read ends with status {result.status}")
        self.expect(result.used == 513, f"{what}: a read's used length is {result.used} instead of 513")
        self.expect(expected is None or result.data == expected, f"{what}: a read brings other data")
        return result.data

    def interrupted(self, driver: BlkDriver, what: str) -> None:
        """Read a sector, and wait for the interrupt. Raises CheckFailed when none comes."""
        if driver.queue.event is None:
            raise ValueError("a queue without an interrupt")
        take_events(driver.queue.event)
        with driver.queue.memory.borrowed():
            driver.queue.ring.want_interrupts(True)
            pending = driver.start(BlkType.IN, 0, size=512)
            # One for the request before it, found by looking at the ring, may come late. Its own comes behind it.
            while True:
                self.expect(driver.queue.wait_interrupt(2), f"{what}: no interrupt")
                if driver.queue.is_done(pending.id):
                    break
            self.expect(driver.finish(pending).status == 0, f"{what}: a read fails")

    # --- objects and parts --------------------------------------------------------------------------------------

    @staticmethod
    def object_header(number: int, kind: int = DEV_PARTS) -> bytes:
        return struct.pack("<HxxI", kind, number)

    @staticmethod
    def capability_header(number: int) -> bytes:
        return struct.pack("<H6x", number)

    def limits(self) -> tuple[int, int]:
        """The device's limits of GET and SET objects. Raises NotApplicable when it has no such capability."""
        done = self.admin(Opcode.DEVICE_CAP_GET, SELF, data=self.capability_header(DEV_PARTS), size=2)
        if done.status == Status.ENXIO:
            self.not_applicable("the owner has no device parts capability")
        self.expect(done.status == 0 and len(done.result) == 2, f"DEVICE_CAP_GET of device parts: {say(done)}")
        return done.result[0], done.result[1]

    def cap_set(self, get: int, set_: int) -> Completion:
        """DRIVER_CAP_SET of the device parts limits, however it ends."""
        data = self.capability_header(DEV_PARTS) + bytes([get, set_])
        return self.admin(Opcode.DRIVER_CAP_SET, SELF, data=data)

    def prepare_objects(self) -> None:
        """All commands in use and the limits at their most. Raises NotApplicable when one of them is 0."""
        self.use_all()
        get, set_ = self.limits()
        if not get or not set_:
            self.not_applicable(f"limits of {get} GET and {set_} SET objects")
        done = self.cap_set(get, set_)
        self.expect(done.status == 0, f"DRIVER_CAP_SET to the device's own limits: {say(done)}")

    def create(self, number: int, operation: int = GET, member: int | None = None) -> Completion:
        """RESOURCE_OBJ_CREATE of a device parts object, however it ends."""
        data = self.object_header(number) + struct.pack("<QB7x", 0, operation)
        return self.admin(Opcode.RESOURCE_OBJ_CREATE, SR_IOV, member or self.member, data)

    def query(self, number: int, member: int | None = None) -> Completion:
        data = self.object_header(number) + bytes(8)
        return self.admin(Opcode.RESOURCE_OBJ_QUERY, SR_IOV, member or self.member, data, 8)

    def modify(self, number: int, operation: int, member: int | None = None) -> Completion:
        data = self.object_header(number) + struct.pack("<QB7x", 0, operation)
        return self.admin(Opcode.RESOURCE_OBJ_MODIFY, SR_IOV, member or self.member, data)

    def destroy(self, number: int, member: int | None = None) -> Completion:
        return self.admin(Opcode.RESOURCE_OBJ_DESTROY, SR_IOV, member or self.member, self.object_header(number))

    def created(self, number: int, operation: int = GET, member: int | None = None) -> None:
        """An object that has to come into being."""
        done = self.create(number, operation, member)
        self.expect(done.status == 0, f"RESOURCE_OBJ_CREATE of id {number}: {say(done)}")

    def metadata(self, number: int, kind: int, size: int) -> Completion:
        data = self.object_header(number) + struct.pack("<B7x", kind)
        return self.admin(Opcode.DEV_PARTS_METADATA_GET, SR_IOV, self.member, data, size)

    def get_parts(self, number: int) -> bytes:
        """All parts, by their size first. Has to succeed."""
        done = self.metadata(number, 0, 8)
        self.expect(done.status == 0 and len(done.result) == 8, f"DEV_PARTS_METADATA_GET, SIZE: {say(done)}")
        size = int.from_bytes(done.result[:4], "little")
        self.expect(0 < size <= 1 << 20, f"DEV_PARTS_METADATA_GET, SIZE: {size} bytes")
        data = self.object_header(number) + struct.pack("<B7x", 1)
        return self.ok(Opcode.DEV_PARTS_GET, SR_IOV, self.member, data, size).result

    def set_parts(self, number: int, parts: bytes) -> Completion:
        """DEV_PARTS_SET, however it ends."""
        return self.admin(Opcode.DEV_PARTS_SET, SR_IOV, self.member, self.object_header(number) + parts)

    def parse_parts(self, data: bytes) -> list[Part]:
        """Raises CheckFailed for what isn't a list of parts."""
        found: list[Part] = []
        at = 0
        while at < len(data):
            self.expect(at + 16 <= len(data), f"device parts end within the header at {at}")
            kind, flags, selector, length = struct.unpack_from("<HBx8sI", data, at)
            self.expect(at + 16 + length <= len(data), f"device parts end within part {kind:#x} at {at}")
            found.append(Part(kind, flags, selector, data[at + 16 : at + 16 + length]))
            at += 16 + length
        return found

    def mode(self, stopped: bool) -> Completion:
        """DEV_MODE_SET, however it ends."""
        return self.admin(Opcode.DEV_MODE_SET, SR_IOV, self.member, b"\1" if stopped else b"\0")

    def stopped(self) -> None:
        """Stop the member; has to succeed."""
        done = self.mode(True)
        self.expect(done.status == 0, f"DEV_MODE_SET, STOPPED: {say(done)}")

    def resumed(self) -> None:
        done = self.mode(False)
        self.expect(done.status == 0, f"DEV_MODE_SET, resume: {say(done)}")


class AdminRegisters:
    """A member's legacy interface through administration commands; what fails there fails the check."""

    def __init__(self, bench: Bench, member: int) -> None:
        self._bench: Final = bench
        self._member: Final = member

    def _done(self, done: Completion, what: str) -> bytes:
        self._bench.expect((done.status, done.qualifier) == (0, 0), f"{what}: {say(done)}")
        return done.result

    def read(self, offset: int, width: int) -> int:
        done = self._bench.common_read(offset, width, self._member)
        data = self._done(done, f"LEGACY_COMMON_CFG_READ ({offset}, {width})")
        self._bench.expect(len(data) == width, f"LEGACY_COMMON_CFG_READ ({offset}, {width}): {len(data)} bytes")
        return int.from_bytes(data, "little")

    def write(self, offset: int, width: int, value: int) -> None:
        done = self._bench.common_write(offset, value.to_bytes(width, "little"), self._member)
        self._done(done, f"LEGACY_COMMON_CFG_WRITE ({offset}, {width})")

    def config_read(self, offset: int, size: int) -> bytes:
        done = self._bench.config_read(offset, size, self._member)
        data = self._done(done, f"LEGACY_DEV_CFG_READ ({offset}, {size})")
        self._bench.expect(len(data) == size, f"LEGACY_DEV_CFG_READ ({offset}, {size}): {len(data)} bytes")
        return data

    def config_write(self, offset: int, data: bytes) -> None:
        self._done(
            self._bench.config_write(offset, data, self._member), f"LEGACY_DEV_CFG_WRITE ({offset}, {len(data)})"
        )

    def notify(self, queue: int) -> None:
        self.write(Legacy.QUEUE_NOTIFY, 2, queue)
