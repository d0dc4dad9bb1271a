# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The owner driver: administration commands through the owner's own administration virtqueues (design D6).

::

    async with group.owner_driver() as owner:
        status = await owner.legacy_common_read(member=1, offset=18, length=1)
        await owner.stop(1)
        parts = await owner.save_parts(1)

A command goes the way that a guest's driver sends it: into descriptors of a real virtqueue, which the device side
consumes. What it answers is the device's answer; nothing here knows better. Sizes and offsets are in bytes, numbers in
`data` are little-endian, and every command raises the exception of its status (`admin.AdminError` and below).

Cancellation. A command that has been put into the queue can't be taken out again: cancelled, it is still done by the
device, completely, and only its result is dropped. A command whose turn hasn't come (the queue was full) is not sent.
Helpers of several commands may stop between two of them; what each leaves behind then is said there.

Several drivers may be open at a time, on one queue or on several, and each may be used by many tasks. Commands of one
queue are done in the order in which they were sent; there is no order between queues. All drivers drive the same
device: the lists of LIST_USE, capabilities and resource objects are the owner's, not the driver's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeVar, overload

import trio

from . import _native
from .admin import (
    RESULT_HEADER_SIZE,
    AdminError,
    CapabilityId,
    Command,
    CommandResult,
    DevicePart,
    DevPartsCapability,
    DevPartsObject,
    FeatureAttributes,
    GroupType,
    InvalidFieldError,
    InvalidGroupError,
    InvalidOpcodeError,
    MalformedResultError,
    ManagementOperation,
    ManagementResource,
    MetadataType,
    NoSpaceError,
    NotifyInfo,
    ObjectHeader,
    ObjectType,
    Opcode,
    PartHeader,
    PartsOperation,
    Qualifier,
    ResourceExistsError,
    Status,
    TryAgainError,
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
    pack_parts,
    parts_get_data,
    parts_in,
    parts_metadata_data,
    parts_set_data,
)

__all__ = ["LegacyFeatures", "OwnerDriver", "OwnerLink"]

log = logging.getLogger(__name__)
T = TypeVar("T")

LIST_ROOM: Final = 64
"""Room for the bitmap of opcodes: 512 of them."""
CAPABILITY_LIST_ROOM: Final = 512
"""Room for the bitmap of capabilities: ids up to 0xfff."""
CAPABILITY_ROOM: Final = 256
OBJECT_ROOM: Final = 256
NOTIFY_ROOM: Final = 64
MANAGEMENT_ROOM: Final = 16
ATTRIBUTES_ROOM: Final = 64
HEADERS_ROOM: Final = 64 * 1024
"""Room for a list of part headers: 4095 of them."""

DEVICE_FEATURES: Final = 0
DRIVER_FEATURES: Final = 4
DEVICE_STATUS: Final = 18

QUEUE_FULL_DELAYS: Final = (0.0002, 0.02)
"""Seconds between attempts to put a command into a full queue: the first, and the longest."""
RETRY_FIRST: Final = 0.005
RETRY_LONGEST: Final = 0.1
RETRY_TOTAL: Final = 10.0
"""Seconds that the helpers go on asking a device that answers EAGAIN."""
CLEANUP_TIMEOUT: Final = 5.0
GROUP_KEYS: Final[Mapping[GroupType, str]] = {GroupType.SELF: "self", GroupType.SR_IOV: "sr_iov"}


class AdminDevice(Protocol):
    """The native half of the queues, as `_native.DeviceGroup` has it."""

    def submit(self, queue: int, readable: bytes, writable: int) -> tuple[int, bytes | None]: ...
    def result(self, token: int) -> bytes: ...
    def abandon(self, token: int) -> None: ...
    def info(self) -> dict[str, Any]: ...


class Completions(Protocol):
    """Who knows when a command is done, as `doorbells.EventHub` does."""

    async def wait_done(self, token: int) -> None: ...


@dataclass(frozen=True, slots=True)
class LegacyFeatures:
    """The feature words of the legacy interface."""

    device: int
    """Offered."""
    driver: int
    """Accepted so far."""


class OwnerLink:
    """What all owner drivers of a group share. Made by the group."""

    def __init__(
        self,
        device: AdminDevice,
        completions: Completions,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        done: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        """`spawn` starts a task that outlives its caller; it may drop it when the group is ending.

        `done(readable)` is called after each command, before its result is returned.
        """
        self._device = device
        self._completions = completions
        self._spawn = spawn
        self._done = done
        self._settling = trio.Lock()
        self._drivers = 0
        self._shared: dict[int, OwnerDriver] = {}

    async def transfer(self, queue: int, readable: bytes, writable: int) -> bytes:
        """Put one command into a queue, and return what the device has written to its device-writable part.

        Waits for room in the queue. Raises ValueError: no such queue, or larger than 1 MiB.
        """
        delay, longest = QUEUE_FULL_DELAYS
        while True:
            # here rather than afterwards: cancelled now, nothing has been sent
            await trio.lowlevel.checkpoint()
            try:
                token, written = self._device.submit(queue, readable, writable)
                break
            except _native.BusyError:
                await trio.sleep(delay)
                delay = min(delay * 2, longest)
        if written is None:
            try:
                await self._completions.wait_done(token)
            except trio.Cancelled:
                self._device.abandon(token)
                # its end is told nevertheless, and has to be taken note of by somebody
                self._spawn(lambda: self._abandoned(token, readable))
                raise
            written = self._device.result(token)
        if self._done is not None:
            await self._done(readable)
        return written

    async def _abandoned(self, token: int, readable: bytes) -> None:
        await self._completions.wait_done(token)
        if self._done is not None:
            await self._done(readable)

    def used(self, group_type: GroupType) -> frozenset[int]:
        """The opcodes that may be sent now."""
        return frozenset(self._device.info()["used_lists"][GROUP_KEYS[group_type]])

    @asynccontextmanager
    async def driver(self, queue: int = 0) -> AsyncIterator[OwnerDriver]:
        """A driver on one of the in-process queues, with all commands of both groups in use.

        Raises ValueError for a queue there isn't.
        """
        driver = OwnerDriver(self, queue)
        self._drivers += 1
        try:
            await driver.settle(alone=self._drivers == 1)
            yield driver
        finally:
            self._drivers -= 1

    async def shared(self, queue: int = 0) -> OwnerDriver:
        """A driver that stays open for as long as the group, for commands that come one by one: made for each, a driver
        would send more commands about lists than others.
        """
        driver = self._shared.get(queue)
        if driver is None:
            driver = self._shared[queue] = OwnerDriver(self, queue)
            self._drivers += 1
            # who comes meanwhile, or after a cancellation, settles what it needs by its first command
            await driver.settle(alone=self._drivers == 1)
        return driver

    @property
    def settling(self) -> trio.Lock:
        """Held by the driver that is choosing lists."""
        return self._settling


class OwnerDriver:
    """Typed administration commands. Made by `Group.owner_driver`.

    `member` is the member's number in the SR-IOV group, from 1. All methods raise `AdminError` (the class says which
    status) when the device refuses, `MalformedResultError` when its answer is not one, and ValueError for arguments
    that don't fit the command's fields; then nothing has been sent.
    """

    def __init__(self, link: OwnerLink, queue: int) -> None:
        self.queue: Final = queue
        """Index of the administration virtqueue, from 0."""
        self._link: Final = link
        self._lists: dict[GroupType, frozenset[int]] = {}

    @property
    def lists(self) -> Mapping[GroupType, frozenset[int]]:
        """The opcodes that this driver has put in use, by group type.

        A group type is missing while its group isn't there (no VFs, and `lists_without_vfs` is off), or when another
        driver has chosen a list without LIST_QUERY.
        """
        return dict(self._lists)

    # --- the envelope -------------------------------------------------------------------------------------

    async def raw(self, readable: bytes, writable: int) -> bytes:
        """One command as it is: the device-readable part, and the room of the device-writable part.

        Returns as many bytes as the device has written, status and all. Raises nothing for a status.
        """
        return await self._link.transfer(self.queue, readable, writable)

    async def execute(self, command: Command, room: int = 0) -> CommandResult:
        """One command with room for its result; whatever its status is, it is returned.

        Raises MalformedResultError when the device doesn't even write a status.
        """
        if room < 0:
            raise ValueError(f"room for {room} bytes")
        written = await self.raw(command.pack(), RESULT_HEADER_SIZE + room)
        try:
            return CommandResult.unpack(written)
        except ValueError as error:
            raise _malformed(command, str(error)) from None

    async def command(self, command: Command, room: int = 0) -> bytes:
        """One command; its command_specific_result.

        When the device has forgotten its lists (the owner was reset by somebody else), they are put in use again and
        the command is sent once more.
        """
        result = await self.execute(command, room)
        error = error_of(command, result)
        if isinstance(error, InvalidOpcodeError) and await self._lists_again(command):
            result = await self.execute(command, room)
            error = error_of(command, result)
        if error is not None:
            raise error
        return result.result

    async def _parsed(self, command: Command, room: int, parse: Callable[[bytes], T]) -> T:
        result = await self.command(command, room)
        try:
            return parse(result)
        except ValueError as error:
            raise _malformed(command, str(error)) from None

    async def _lists_again(self, command: Command) -> bool:
        if command.opcode in (Opcode.LIST_QUERY, Opcode.LIST_USE):
            return False
        try:
            group_type = GroupType(command.group_type)
        except ValueError:
            return False
        chosen = self._lists.get(group_type)
        if chosen is not None and (command.opcode not in chosen or chosen <= self._link.used(group_type)):
            return False
        await self._settle_group(group_type, alone=False)
        return command.opcode in self._lists.get(group_type, frozenset())

    # --- lists (2.12.1.1) ---------------------------------------------------------------------------------

    async def settle(self, *, alone: bool = True) -> None:
        """LIST_QUERY and LIST_USE for both groups: everything that is supported is put in use, these two included.

        LIST_USE is not sent when other drivers are at work (not `alone`) and the list is in use already: a driver must
        have no other command in flight meanwhile.
        """
        for group_type in GroupType:
            await self._settle_group(group_type, alone=alone)

    async def _settle_group(self, group_type: GroupType, *, alone: bool) -> None:
        async with self._link.settling:
            self._lists.pop(group_type, None)
            try:
                supported = await self.list_query(group_type)
            except InvalidGroupError:
                # there are no VFs yet; asked again by the first command that needs it
                return
            except InvalidOpcodeError:
                # a guest that drives the owner has chosen a list without LIST_QUERY, as Linux does: it stays as it is
                log.debug("the owner's driver has settled the %s list", group_type.name)
                return
            if alone or self._link.used(group_type) != supported:
                await self.list_use(group_type, supported)
            self._lists[group_type] = supported

    async def list_query(self, group_type: GroupType) -> frozenset[int]:
        """The opcodes that the device has for this group."""
        return await self._parsed(Command(Opcode.LIST_QUERY, group_type), LIST_ROOM, bits_in)

    async def list_use(self, group_type: GroupType, opcodes: Iterable[int]) -> None:
        """Choose the opcodes that may be sent to this group, until the owner is reset.

        Without LIST_QUERY and LIST_USE in it, it is the last choice. No other command should be in flight.
        """
        chosen = frozenset(opcodes)
        await self.command(Command(Opcode.LIST_USE, group_type, data=opcode_list(chosen)))
        self._lists[group_type] = chosen

    # --- the legacy interface (2.13.6) --------------------------------------------------------------------

    async def _legacy_read(self, opcode: Opcode, member: int, offset: int, length: int) -> bytes:
        if length < 0:
            raise ValueError(f"a read of {length} bytes")

        def whole(result: bytes) -> bytes:
            if len(result) != length:
                raise ValueError(f"{len(result)} bytes of {length}")
            return result

        data = legacy_read_data(offset)
        return await self._parsed(Command(opcode, GroupType.SR_IOV, member, data), length, whole)

    async def legacy_common_read(self, member: int, offset: int, length: int) -> bytes:
        """Registers of the legacy common configuration, as a read at that offset of I/O BAR0 has them.

        One register, or a part of one: InvalidFieldError otherwise. Reading ISR status (19) clears it.
        """
        return await self._legacy_read(Opcode.LEGACY_COMMON_CFG_READ, member, offset, length)

    async def legacy_common_write(self, member: int, offset: int, data: bytes) -> None:
        """As a write at that offset of I/O BAR0: `data` goes to one register, or to a part of one.

        Raises DeviceBusyError while the member is attached to a front end that drives it by itself.
        """
        payload = legacy_write_data(offset, data)
        await self.command(Command(Opcode.LEGACY_COMMON_CFG_WRITE, GroupType.SR_IOV, member, payload))

    async def legacy_device_read(self, member: int, offset: int, length: int) -> bytes:
        """The device configuration; `offset` counts from its beginning, with or without MSI-X."""
        return await self._legacy_read(Opcode.LEGACY_DEV_CFG_READ, member, offset, length)

    async def legacy_device_write(self, member: int, offset: int, data: bytes) -> None:
        """As `legacy_common_write`, for the device configuration."""
        payload = legacy_write_data(offset, data)
        await self.command(Command(Opcode.LEGACY_DEV_CFG_WRITE, GroupType.SR_IOV, member, payload))

    async def legacy_notify_info(self, member: int) -> tuple[NotifyInfo, ...]:
        """Where queue notifications may be written instead of by command; preferred places first."""
        return await self._parsed(
            Command(Opcode.LEGACY_NOTIFY_INFO, GroupType.SR_IOV, member), NOTIFY_ROOM, notify_infos
        )

    # --- capabilities (2.12.1.3) --------------------------------------------------------------------------

    async def capability_list(self) -> frozenset[int]:
        """Ids of the owner's capabilities."""
        return await self._parsed(Command(Opcode.CAP_ID_LIST_QUERY, GroupType.SELF), CAPABILITY_LIST_ROOM, bits_in)

    @overload
    async def device_capability(self, capability: Literal[CapabilityId.DEV_PARTS]) -> DevPartsCapability: ...
    @overload
    async def device_capability(self, capability: int) -> bytes | DevPartsCapability: ...
    async def device_capability(self, capability: int) -> bytes | DevPartsCapability:
        """What the device can; bytes for a capability whose layout isn't known here. Raises NoSuchResourceError."""

        def parse(result: bytes) -> bytes | DevPartsCapability:
            return DevPartsCapability.unpack(result) if capability == CapabilityId.DEV_PARTS else result

        command = Command(Opcode.DEVICE_CAP_GET, GroupType.SELF, data=capability_data(capability))
        return await self._parsed(command, CAPABILITY_ROOM, parse)

    async def set_driver_capability(self, capability: int, value: bytes | DevPartsCapability) -> None:
        """What the driver will use of it. Raises DeviceBusyError when objects are in the way."""
        data = value.pack() if isinstance(value, DevPartsCapability) else value
        await self.command(Command(Opcode.DRIVER_CAP_SET, GroupType.SELF, data=capability_data(capability, data)))

    # --- resource objects (2.12.1.4) ----------------------------------------------------------------------

    def _object_command(self, opcode: Opcode, member: int | None, data: bytes) -> Command:
        if member is None:
            return Command(opcode, GroupType.SELF, 0, data)
        return Command(opcode, GroupType.SR_IOV, member, data)

    async def object_create(
        self,
        object_id: int,
        value: bytes | DevPartsObject,
        *,
        member: int | None = None,
        object_type: int = ObjectType.DEV_PARTS,
        flags: int = 0,
    ) -> None:
        """Make a resource object; of the owner itself, unless it is a member's.

        Raises ResourceExistsError, NoSpaceError.
        """
        data = value.pack() if isinstance(value, DevPartsObject) else value
        payload = object_data(ObjectHeader(object_id, object_type), data, flags=flags)
        await self.command(self._object_command(Opcode.RESOURCE_OBJ_CREATE, member, payload))

    async def object_query(
        self,
        object_id: int,
        *,
        member: int | None = None,
        object_type: int = ObjectType.DEV_PARTS,
        flags: int = 0,
    ) -> bytes:
        """The data it was made or last modified with (`DevPartsObject.unpack`). Raises NoSuchResourceError."""
        payload = object_data(ObjectHeader(object_id, object_type), flags=flags)
        return await self.command(self._object_command(Opcode.RESOURCE_OBJ_QUERY, member, payload), OBJECT_ROOM)

    async def object_modify(
        self,
        object_id: int,
        value: bytes | DevPartsObject,
        *,
        member: int | None = None,
        object_type: int = ObjectType.DEV_PARTS,
        flags: int = 0,
    ) -> None:
        """Give it other data. Raises NoSuchResourceError, DeviceBusyError."""
        data = value.pack() if isinstance(value, DevPartsObject) else value
        payload = object_data(ObjectHeader(object_id, object_type), data, flags=flags)
        await self.command(self._object_command(Opcode.RESOURCE_OBJ_MODIFY, member, payload))

    async def object_destroy(
        self, object_id: int, *, member: int | None = None, object_type: int = ObjectType.DEV_PARTS
    ) -> None:
        """Remove it; its id is free again. Raises NoSuchResourceError, DeviceBusyError."""
        payload = ObjectHeader(object_id, object_type).pack()
        await self.command(self._object_command(Opcode.RESOURCE_OBJ_DESTROY, member, payload))

    # --- device parts and mode (2.12.1.5) -----------------------------------------------------------------

    @overload
    async def parts_metadata(self, member: int, object_id: int, wanted: Literal["size", "count"]) -> int: ...
    @overload
    async def parts_metadata(self, member: int, object_id: int, wanted: Literal["list"]) -> tuple[PartHeader, ...]: ...
    async def parts_metadata(
        self, member: int, object_id: int, wanted: Literal["size", "count", "list"]
    ) -> int | tuple[PartHeader, ...]:
        """Of the parts that a GET object can get now: bytes (headers included), number, or the headers."""
        kind = MetadataType[wanted.upper()]
        data = parts_metadata_data(ObjectHeader(object_id), kind)
        command = Command(Opcode.DEV_PARTS_METADATA_GET, GroupType.SR_IOV, member, data)
        if kind is MetadataType.LIST:
            return await self._parsed(command, HEADERS_ROOM, metadata_list)
        return await self._parsed(command, 8, metadata_count)

    async def parts_get(
        self, member: int, object_id: int, selected: Sequence[PartHeader] | None = None, *, room: int | None = None
    ) -> tuple[DevicePart, ...]:
        """The member's parts, all or those selected, in the order in which they have to be set.

        `room`, in bytes, is asked of the device when it isn't given.
        """
        if room is None:
            room = await self.parts_metadata(member, object_id, "size")
        data = parts_get_data(ObjectHeader(object_id), selected)
        return await self._parsed(Command(Opcode.DEV_PARTS_GET, GroupType.SR_IOV, member, data), room, parts_in)

    async def parts_set(self, member: int, object_id: int, parts: Iterable[DevicePart] | bytes) -> None:
        """Set parts of a stopped member; they take effect when it is resumed. All or nothing."""
        packed = parts if isinstance(parts, bytes) else pack_parts(parts)
        data = parts_set_data(ObjectHeader(object_id), packed)
        await self.command(Command(Opcode.DEV_PARTS_SET, GroupType.SR_IOV, member, data))

    async def mode_set(self, member: int, *, stopped: bool) -> None:
        """Stop or resume. Stopping returns when nothing of the member is under way any more, and may take as long as
        its storage does."""
        await self.command(Command(Opcode.DEV_MODE_SET, GroupType.SR_IOV, member, mode_data(stopped=stopped)))

    # --- feature management (design D10) ------------------------------------------------------------------

    async def device_management(
        self,
        member: int,
        operation: int | ManagementOperation,
        resource: int | ManagementResource = ManagementResource.FEATURES_63_0,
        value: int = 0,
    ) -> int:
        """Assign or query one resource of a member; returns its value.

        Raises InvalidOpcodeError unless the group has `feature_management`, DeviceBusyError when the member's driver
        has begun.
        """
        data = management_data(operation, resource, value)
        command = Command(Opcode.DEVICE_MGMT, GroupType.SR_IOV, member, data)
        return await self._parsed(command, MANAGEMENT_ROOM, management_value)

    async def device_management_attributes(self, member: int) -> FeatureAttributes:
        """What can be assigned to the member."""
        command = Command(Opcode.DEVICE_MGMT_ATTRS, GroupType.SR_IOV, member)
        return await self._parsed(command, ATTRIBUTES_ROOM, FeatureAttributes.unpack)

    async def assign_features(self, member: int, features: int) -> int:
        """Choose the feature bits that a member offers; returns them. Only before its driver has acknowledged it."""
        return await self.device_management(member, ManagementOperation.ASSIGN, value=features)

    async def assigned_features(self, member: int) -> int:
        """The feature bits that a member offers."""
        return await self.device_management(member, ManagementOperation.QUERY)

    # --- helpers ------------------------------------------------------------------------------------------

    async def member_status(self, member: int) -> int:
        """The member's device status register."""
        return (await self.legacy_common_read(member, DEVICE_STATUS, 1))[0]

    async def member_features(self, member: int) -> LegacyFeatures:
        """The member's feature words, as a legacy driver sees them."""
        device = await self.legacy_common_read(member, DEVICE_FEATURES, 4)
        driver = await self.legacy_common_read(member, DRIVER_FEATURES, 4)
        return LegacyFeatures(int.from_bytes(device, "little"), int.from_bytes(driver, "little"))

    async def member_config(self, member: int, offset: int = 0, length: int | None = None) -> bytes:
        """The device configuration, read byte by byte as legacy drivers do; without a length up to its end.

        Bytes may be of different moments when it changes meanwhile: the legacy interface has no way to tell.
        """
        data = bytearray()
        end = 256 if length is None else offset + length
        for position in range(offset, end):
            try:
                data += await self.legacy_device_read(member, position, 1)
            except InvalidFieldError:
                if length is not None:
                    raise
                break
        return bytes(data)

    async def stop(self, member: int) -> None:
        """Stop a member: requests under way are finished, then nothing of it moves. Asks again while the device says
        EAGAIN, for up to 10 seconds. Cancelled, it may stop nevertheless."""
        await _patiently(lambda: self.mode_set(member, stopped=True))

    async def resume(self, member: int) -> None:
        """Let it go on, with the parts that were set meanwhile."""
        await _patiently(lambda: self.mode_set(member, stopped=False))

    async def save_parts(self, member: int) -> bytes:
        """All parts of a member, as `load_parts` takes them (a row of device parts; `admin.parts_in` takes it apart).

        The member goes on if it runs; what has to fit together needs it stopped first. The resource object that this
        takes is removed in any case, also when cancelled.
        """
        async with self._parts_object(member, PartsOperation.GET) as object_id:

            async def get() -> tuple[DevicePart, ...]:
                try:
                    return await self.parts_get(member, object_id)
                except MalformedResultError:
                    # it has grown since its size was asked: once more, with the size of now
                    return await self.parts_get(member, object_id)

            return pack_parts(await _patiently(get))

    async def load_parts(self, member: int, parts: bytes) -> None:
        """Set the parts of a stopped member; `resume` makes them take effect.

        Raises ValueError when these bytes aren't parts. Cancelled, either all of them are set or none.
        """
        parts_in(parts)
        async with self._parts_object(member, PartsOperation.SET) as object_id:
            await _patiently(lambda: self.parts_set(member, object_id, parts))

    @asynccontextmanager
    async def _parts_object(self, member: int, operation: PartsOperation) -> AsyncIterator[int]:
        """A resource object for as long as the context lasts."""
        object_id = await self._create_parts_object(member, operation)
        try:
            yield object_id
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_TIMEOUT):
                try:
                    await self.object_destroy(object_id, member=member)
                except AdminError as error:
                    # gone with the member or with a reset of the owner
                    log.debug("device parts object %d: %s", object_id, error)

    async def _create_parts_object(self, member: int, operation: PartsOperation) -> int:
        command = Command(Opcode.RESOURCE_OBJ_CREATE, GroupType.SR_IOV, member)
        # all of it or nothing: an object whose creation was cancelled would be nobody's
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_TIMEOUT):
            limits = await self.device_capability(CapabilityId.DEV_PARTS)
            # each time: a reset of the owner forgets it, and setting it again changes nothing
            await self.set_driver_capability(CapabilityId.DEV_PARTS, limits)
            # both kinds take their ids from one range, as Linux has it
            for object_id in range(min(limits.get_limit, limits.set_limit)):
                try:
                    await self.object_create(object_id, DevPartsObject(operation), member=member)
                except ResourceExistsError:
                    continue
                return object_id
            raise _error(NoSpaceError, command, Status.ENOSPC, "all device parts objects of the owner are in use")
        raise _error(TryAgainError, command, Status.EAGAIN, f"no answer within {CLEANUP_TIMEOUT:.0f} s")


def _error(kind: type[AdminError], command: Command, status: Status, reason: str) -> AdminError:
    """An error that was found here, without the device's help."""
    qualifier = Qualifier.OK if status == Status.OK else Qualifier.INVALID_COMMAND
    return kind(command.opcode, command.group_type, command.group_member_id, status, qualifier, reason)


def _malformed(command: Command, reason: str) -> AdminError:
    return _error(MalformedResultError, command, Status.OK, f"bad result: {reason}")


async def _patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Again and again while the device says EAGAIN, within limits."""
    deadline = trio.current_time() + RETRY_TOTAL
    delay = RETRY_FIRST
    while True:
        try:
            return await attempt()
        except TryAgainError:
            if trio.current_time() + delay > deadline:
                raise
        await trio.sleep(delay)
        delay = min(delay * 2, RETRY_LONGEST)
