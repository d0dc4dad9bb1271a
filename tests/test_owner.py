# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The owner driver: what it sends and makes of the answers, against a device of written answers; then the real one."""

from __future__ import annotations

import shutil
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from vhu_legacy import GroupConfig, GroupError, MemberConfig, MemberError, OwnerConfig, _native, admin
from vhu_legacy.admin import (
    CapabilityId,
    Command,
    CommandResult,
    DevicePart,
    DevPartsCapability,
    DevPartsObject,
    FeatureAttributes,
    GroupType,
    NotifyInfo,
    NotifyPlace,
    ObjectHeader,
    Opcode,
    PartHeader,
    PartsOperation,
    PartType,
    Qualifier,
    Status,
    capability_data,
    legacy_write_data,
    object_data,
    opcode_list,
    pack_parts,
)
from vhu_legacy.group import Group, open_group
from vhu_legacy.owner import LegacyFeatures, OwnerDriver, OwnerLink
from vhu_legacy.vfio_client import VfioClient
from vhu_legacy.virtio_driver import PciFunction

SELF, SR_IOV = GroupType.SELF, GroupType.SR_IOV
ALL_OPCODES = frozenset([*range(0x12), 0x3E, 0x3F])
OK = CommandResult(Status.OK, Qualifier.OK)
Answer = CommandResult | Callable[[Command, int], CommandResult]


def ok(result: bytes) -> CommandResult:
    return CommandResult(Status.OK, Qualifier.OK, result)


def refused(status: Status, qualifier: Qualifier = Qualifier.INVALID_COMMAND) -> CommandResult:
    return CommandResult(status, qualifier)


class Device:
    """A device whose answers are written down; the lists it keeps itself."""

    def __init__(self) -> None:
        self.supported = {SELF: ALL_OPCODES, SR_IOV: ALL_OPCODES}
        self.used = {SELF: frozenset({0, 1}), SR_IOV: frozenset({0, 1})}
        self.answers: dict[Opcode, Answer | list[Answer]] = {}
        self.sent: list[tuple[int, Command, int]] = []
        self.late = False
        self.full = 0
        self._tokens = 0
        self._results: dict[int, bytes] = {}
        self._done: dict[int, trio.Event] = {}

    def take(self) -> list[Command]:
        """What was sent since the last time."""
        commands = [command for _, command, _ in self.sent]
        self.sent.clear()
        return commands

    # --- as the native half has it

    def submit(self, queue: int, readable: bytes, writable: int) -> tuple[int, bytes | None]:
        if self.full:
            self.full -= 1
            raise _native.BusyError("the queue is full")
        command = Command.unpack(readable)
        self.sent.append((queue, command, writable))
        written = self._answer(command, writable - 8).pack()[:writable]
        self._tokens += 1
        if not self.late:
            return self._tokens, written
        self._results[self._tokens] = written
        self._done[self._tokens] = trio.Event()
        return self._tokens, None

    def result(self, token: int) -> bytes:
        return self._results.pop(token)

    def abandon(self, token: int) -> None:
        del self._results[token]

    def info(self) -> dict[str, Any]:
        return {"used_lists": {"self": sorted(self.used[SELF]), "sr_iov": sorted(self.used[SR_IOV])}}

    async def wait_done(self, token: int) -> None:
        await self._done[token].wait()
        del self._done[token]

    def complete(self) -> None:
        for event in list(self._done.values()):
            event.set()

    @property
    def kept(self) -> tuple[int, int]:
        """Results that nobody has fetched, and ends that nobody has waited for."""
        return len(self._results), len(self._done)

    def _answer(self, command: Command, room: int) -> CommandResult:
        group_type = GroupType(command.group_type)
        if command.opcode not in self.used[group_type]:
            return refused(Status.EINVAL, Qualifier.INVALID_OPCODE)
        written = self.answers.get(Opcode(command.opcode))
        if isinstance(written, list):
            written = written.pop(0)
        if written is not None:
            return written(command, room) if callable(written) else written
        match command.opcode:
            case Opcode.LIST_QUERY:
                return ok(opcode_list(self.supported[group_type]))
            case Opcode.LIST_USE:
                self.used[group_type] = admin.opcodes_in(command.data)
                return OK
            case _:
                return OK


class Bench:
    """A device, and what the group would have around it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.device = Device()
        self.link = OwnerLink(self.device, self.device, nursery.start_soon)

    @asynccontextmanager
    async def driver(self, queue: int = 0) -> AsyncIterator[OwnerDriver]:
        async with self.link.driver(queue) as owner:
            self.device.sent.clear()
            yield owner


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        yield Bench(nursery)
        nursery.cancel_scope.cancel()


# --- lists ------------------------------------------------------------------------------------------------


async def test_on_entering_everything_is_put_in_use(bench: Bench) -> None:
    async with bench.link.driver() as owner:
        assert [(c.opcode, c.group_type) for c in bench.device.take()] == [(0, 0), (1, 0), (0, 1), (1, 1)]
        assert bench.device.used == {SELF: ALL_OPCODES, SR_IOV: ALL_OPCODES}
        assert owner.lists == {SELF: ALL_OPCODES, SR_IOV: ALL_OPCODES}
        # another one finds it so, and must not send LIST_USE while the first may have commands in flight
        async with bench.link.driver() as second:
            assert [c.opcode for c in bench.device.take()] == [Opcode.LIST_QUERY, Opcode.LIST_QUERY]
            assert second.lists == owner.lists


async def test_lists_forgotten_by_a_reset_are_put_in_use_again(bench: Bench) -> None:
    bench.device.answers[Opcode.LEGACY_COMMON_CFG_READ] = ok(b"\x0f")
    async with bench.driver() as owner:
        bench.device.used = {SELF: frozenset({0, 1}), SR_IOV: frozenset({0, 1})}
        assert await owner.member_status(1) == 0x0F
        assert [c.opcode for c in bench.device.take()] == [
            Opcode.LEGACY_COMMON_CFG_READ,
            Opcode.LIST_QUERY,
            Opcode.LIST_USE,
            Opcode.LEGACY_COMMON_CFG_READ,
        ]


async def test_a_chosen_list_is_not_undone(bench: Bench) -> None:
    async with bench.driver() as owner:
        await owner.list_use(SR_IOV, {0, 1, 2})
        with pytest.raises(admin.InvalidOpcodeError):
            await owner.member_status(1)
        assert [c.opcode for c in bench.device.take()] == [Opcode.LIST_USE, Opcode.LEGACY_COMMON_CFG_READ]
        await owner.legacy_common_write(1, 18, b"\0")


async def test_a_group_that_is_not_there_yet(bench: Bench) -> None:
    bench.device.answers[Opcode.LIST_QUERY] = [
        ok(opcode_list(ALL_OPCODES)),
        refused(Status.EINVAL, Qualifier.INVALID_GROUP),
        ok(opcode_list(ALL_OPCODES)),
    ]
    bench.device.answers[Opcode.LEGACY_COMMON_CFG_READ] = ok(b"\1")
    async with bench.driver() as owner:
        assert owner.lists == {SELF: ALL_OPCODES}
        # now there are VFs
        assert await owner.member_status(1) == 1
        assert owner.lists == {SELF: ALL_OPCODES, SR_IOV: ALL_OPCODES}


async def test_a_list_that_somebody_else_has_settled(bench: Bench) -> None:
    """Linux drops LIST_QUERY and LIST_USE themselves."""
    bench.device.used[SR_IOV] = frozenset(range(2, 7))
    bench.device.answers[Opcode.LEGACY_COMMON_CFG_READ] = ok(b"\1")
    async with bench.driver() as owner:
        assert owner.lists == {SELF: ALL_OPCODES}
        assert await owner.member_status(1) == 1
        with pytest.raises(admin.InvalidOpcodeError) as caught:
            await owner.stop(1)
        assert caught.value.opcode == Opcode.DEV_MODE_SET
        assert bench.device.used[SR_IOV] == frozenset(range(2, 7))


# --- commands ---------------------------------------------------------------------------------------------

Call = Callable[[OwnerDriver], Awaitable[object]]
PART = DevicePart(PartType.DEVICE_STATUS, b"\x0f")
CALLS: list[tuple[str, Call, Command, bytes, object]] = [
    (
        "common read",
        lambda owner: owner.legacy_common_read(member=1, offset=12, length=2),
        Command(Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, 1, b"\x0c"),
        b"\0\1",
        b"\0\1",
    ),
    (
        "common write",
        lambda owner: owner.legacy_common_write(3, 16, b"\2\0"),
        Command(Opcode.LEGACY_COMMON_CFG_WRITE, SR_IOV, 3, legacy_write_data(16, b"\2\0")),
        b"",
        None,
    ),
    (
        "device read",
        lambda owner: owner.legacy_device_read(1, 0, 8),
        Command(Opcode.LEGACY_DEV_CFG_READ, SR_IOV, 1, b"\0"),
        b"12345678",
        b"12345678",
    ),
    (
        "device write",
        lambda owner: owner.legacy_device_write(1, 32, b"\1"),
        Command(Opcode.LEGACY_DEV_CFG_WRITE, SR_IOV, 1, legacy_write_data(32, b"\1")),
        b"",
        None,
    ),
    (
        "notify info",
        lambda owner: owner.legacy_notify_info(65535),
        Command(Opcode.LEGACY_NOTIFY_INFO, SR_IOV, 65535),
        NotifyInfo(NotifyPlace.MEMBER, 2, 0x3000).pack() + bytes(48),
        (NotifyInfo(NotifyPlace.MEMBER, 2, 0x3000),),
    ),
    (
        "capability list",
        lambda owner: owner.capability_list(),
        Command(Opcode.CAP_ID_LIST_QUERY, SELF),
        b"\1" + bytes(7),
        frozenset({0}),
    ),
    (
        "device capability",
        lambda owner: owner.device_capability(CapabilityId.DEV_PARTS),
        Command(Opcode.DEVICE_CAP_GET, SELF, 0, bytes(8)),
        b"\x08\x09",
        DevPartsCapability(8, 9),
    ),
    (
        "unknown capability",
        lambda owner: owner.device_capability(0x801),
        Command(Opcode.DEVICE_CAP_GET, SELF, 0, capability_data(0x801)),
        b"abc",
        b"abc",
    ),
    (
        "driver capability",
        lambda owner: owner.set_driver_capability(CapabilityId.DEV_PARTS, DevPartsCapability(1, 2)),
        Command(Opcode.DRIVER_CAP_SET, SELF, 0, bytes(8) + b"\1\2"),
        b"",
        None,
    ),
    (
        "create for a member",
        lambda owner: owner.object_create(3, DevPartsObject(PartsOperation.SET), member=1),
        Command(Opcode.RESOURCE_OBJ_CREATE, SR_IOV, 1, object_data(ObjectHeader(3), b"\1" + bytes(7))),
        b"",
        None,
    ),
    (
        "create for the owner",
        lambda owner: owner.object_create(3, b"data", object_type=0x200, flags=1),
        Command(Opcode.RESOURCE_OBJ_CREATE, SELF, 0, object_data(ObjectHeader(3, 0x200), b"data", flags=1)),
        b"",
        None,
    ),
    (
        "query",
        lambda owner: owner.object_query(3, member=1),
        Command(Opcode.RESOURCE_OBJ_QUERY, SR_IOV, 1, object_data(ObjectHeader(3))),
        b"\1" + bytes(7),
        b"\1" + bytes(7),
    ),
    (
        "modify",
        lambda owner: owner.object_modify(3, DevPartsObject(PartsOperation.GET), member=1),
        Command(Opcode.RESOURCE_OBJ_MODIFY, SR_IOV, 1, object_data(ObjectHeader(3), bytes(8))),
        b"",
        None,
    ),
    (
        "destroy",
        lambda owner: owner.object_destroy(3, member=1),
        Command(Opcode.RESOURCE_OBJ_DESTROY, SR_IOV, 1, ObjectHeader(3).pack()),
        b"",
        None,
    ),
    (
        "size of parts",
        lambda owner: owner.parts_metadata(1, 3, "size"),
        Command(Opcode.DEV_PARTS_METADATA_GET, SR_IOV, 1, ObjectHeader(3).pack() + bytes(8)),
        b"\x11\0\0\0" + bytes(4),
        17,
    ),
    (
        "count of parts",
        lambda owner: owner.parts_metadata(1, 3, "count"),
        Command(Opcode.DEV_PARTS_METADATA_GET, SR_IOV, 1, ObjectHeader(3).pack() + b"\1" + bytes(7)),
        b"\1\0\0\0" + bytes(4),
        1,
    ),
    (
        "list of parts",
        lambda owner: owner.parts_metadata(1, 3, "list"),
        Command(Opcode.DEV_PARTS_METADATA_GET, SR_IOV, 1, ObjectHeader(3).pack() + b"\2" + bytes(7)),
        b"\1\0\0\0" + bytes(4) + PART.header.pack(),
        (PART.header,),
    ),
    (
        "all parts",
        lambda owner: owner.parts_get(1, 3, room=1000),
        Command(Opcode.DEV_PARTS_GET, SR_IOV, 1, ObjectHeader(3).pack() + b"\1" + bytes(7)),
        PART.pack(),
        (PART,),
    ),
    (
        "selected parts",
        lambda owner: owner.parts_get(1, 3, [PartHeader(PartType.DEVICE_STATUS)], room=1000),
        Command(
            Opcode.DEV_PARTS_GET,
            SR_IOV,
            1,
            ObjectHeader(3).pack() + bytes(8) + PartHeader(PartType.DEVICE_STATUS).pack(),
        ),
        PART.pack(),
        (PART,),
    ),
    (
        "set parts",
        lambda owner: owner.parts_set(1, 3, [PART]),
        Command(Opcode.DEV_PARTS_SET, SR_IOV, 1, ObjectHeader(3).pack() + PART.pack()),
        b"",
        None,
    ),
    (
        "stop",
        lambda owner: owner.mode_set(1, stopped=True),
        Command(Opcode.DEV_MODE_SET, SR_IOV, 1, b"\1"),
        b"",
        None,
    ),
    (
        "resume",
        lambda owner: owner.resume(1),
        Command(Opcode.DEV_MODE_SET, SR_IOV, 1, b"\0"),
        b"",
        None,
    ),
    (
        "assign",
        lambda owner: owner.assign_features(1, 0x1122),
        Command(Opcode.DEVICE_MGMT, SR_IOV, 1, bytes.fromhex("01 0000 2211000000000000 0000000000")),
        b"\x22\x11" + bytes(14),
        0x1122,
    ),
    (
        "assigned",
        lambda owner: owner.assigned_features(1),
        Command(Opcode.DEVICE_MGMT, SR_IOV, 1, b"\2" + bytes(15)),
        b"\x22\x11" + bytes(14),
        0x1122,
    ),
    (
        "attributes",
        lambda owner: owner.device_management_attributes(1),
        Command(Opcode.DEVICE_MGMT_ATTRS, SR_IOV, 1),
        FeatureAttributes(5).pack(),
        FeatureAttributes(5),
    ),
]


@pytest.mark.parametrize(("call", "command", "result", "value"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
async def test_each_command(bench: Bench, call: Call, command: Command, result: bytes, value: object) -> None:
    bench.device.answers[Opcode(command.opcode)] = lambda _, room: ok(result[:room])
    async with bench.driver() as owner:
        assert await call(owner) == value
        assert bench.device.take() == [command]


STATUSES = [
    (Status.EINVAL, Qualifier.INVALID_FIELD, admin.InvalidFieldError),
    (Status.EINVAL, Qualifier.INVALID_MEMBER, admin.InvalidMemberError),
    (Status.EINVAL, Qualifier.INVALID_COMMAND, admin.InvalidCommandError),
    (Status.ENXIO, Qualifier.INVALID_COMMAND, admin.NoSuchResourceError),
    (Status.ENOMEM, Qualifier.NORESOURCE, admin.NoMemoryError),
    (Status.EBUSY, Qualifier.INVALID_COMMAND, admin.DeviceBusyError),
    (Status.EEXIST, Qualifier.INVALID_COMMAND, admin.ResourceExistsError),
    (Status.ENOSPC, Qualifier.NORESOURCE, admin.NoSpaceError),
    (Status.EAGAIN, Qualifier.TRYAGAIN, admin.TryAgainError),
]


@pytest.mark.parametrize(("status", "qualifier", "kind"), STATUSES)
async def test_each_status(bench: Bench, status: Status, qualifier: Qualifier, kind: type[admin.AdminError]) -> None:
    bench.device.answers[Opcode.LEGACY_COMMON_CFG_READ] = CommandResult(status, qualifier, b"\xff")
    async with bench.driver() as owner:
        with pytest.raises(kind) as caught:
            await owner.legacy_common_read(5, 18, 1)
        assert type(caught.value) is kind
        assert (caught.value.member, caught.value.opcode) == (5, Opcode.LEGACY_COMMON_CFG_READ)
        # who wants to see it as it is, can
        result = await owner.execute(Command(Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, 5, b"\x12"), 1)
        assert (result.status, result.qualifier, result.result) == (status, qualifier, b"\xff")


@pytest.mark.parametrize(
    ("opcode", "call"),
    [
        (Opcode.LEGACY_COMMON_CFG_READ, lambda owner: owner.legacy_common_read(1, 0, 4)),
        (Opcode.DEVICE_CAP_GET, lambda owner: owner.device_capability(CapabilityId.DEV_PARTS)),
        (Opcode.DEV_PARTS_METADATA_GET, lambda owner: owner.parts_metadata(1, 0, "list")),
        (Opcode.DEV_PARTS_GET, lambda owner: owner.parts_get(1, 0, room=100)),
        (Opcode.DEVICE_MGMT, lambda owner: owner.assigned_features(1)),
        (Opcode.DEVICE_MGMT_ATTRS, lambda owner: owner.device_management_attributes(1)),
    ],
)
async def test_results_that_are_none(bench: Bench, opcode: Opcode, call: Call) -> None:
    bench.device.answers[opcode] = ok(b"\1")
    async with bench.driver() as owner:
        with pytest.raises(admin.MalformedResultError, match=f"{opcode.name}: bad result: .*1 bytes"):
            await call(owner)


async def test_a_device_that_writes_no_status(bench: Bench) -> None:
    async with bench.driver() as owner:
        bench.device.answers[Opcode.DEV_MODE_SET] = OK
        assert await owner.raw(Command(Opcode.DEV_MODE_SET, SR_IOV, 1, b"\1").pack(), 3) == b"\0\0\0"
        real = bench.device.submit

        def short(queue: int, readable: bytes, writable: int) -> tuple[int, bytes | None]:
            return real(queue, readable, 7)

        bench.device.submit = short  # type: ignore[method-assign]
        with pytest.raises(admin.MalformedResultError, match="a completion of 7 bytes"):
            await owner.mode_set(1, stopped=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda owner: owner.legacy_common_read(1, 256, 1),
        lambda owner: owner.legacy_common_read(1, 0, -1),
        lambda owner: owner.legacy_common_read(-1, 0, 1),
        lambda owner: owner.legacy_device_write(1, -1, b"x"),
        lambda owner: owner.object_destroy(1 << 32),
        lambda owner: owner.assign_features(1, -1),
        lambda owner: owner.execute(Command(0, 0), -1),
        lambda owner: owner.load_parts(1, b"not parts"),
    ],
)
async def test_arguments_that_fit_no_command(bench: Bench, call: Call) -> None:
    async with bench.driver() as owner:
        with pytest.raises(ValueError, match=r"out of range|allowed|read of|room for|requires|it has"):
            await call(owner)
        assert bench.device.sent == []


async def test_commands_go_to_the_queue_that_was_asked_for(bench: Bench) -> None:
    async with bench.driver(3) as owner:
        await owner.resume(1)
        assert [queue for queue, _, _ in bench.device.sent] == [3]


# --- waiting and cancellation -----------------------------------------------------------------------------


async def test_late_answers(bench: Bench) -> None:
    bench.device.answers[Opcode.LEGACY_COMMON_CFG_READ] = lambda command, _: ok(bytes([command.group_member_id]))
    async with bench.driver() as owner:
        bench.device.late = True
        results = []

        async def ask(member: int) -> None:
            results.append(await owner.member_status(member))

        async with trio.open_nursery() as nursery:
            for member in range(1, 9):
                nursery.start_soon(ask, member)
            await trio.testing.wait_all_tasks_blocked()
            assert len(bench.device.sent) == 8
            bench.device.complete()
        assert sorted(results) == list(range(1, 9))
        assert bench.device.kept == (0, 0)


async def test_a_cancelled_command_is_done_and_its_result_dropped(bench: Bench) -> None:
    async with bench.driver() as owner:
        bench.device.late = True
        with trio.move_on_after(0.01) as scope:
            await owner.stop(1)
        assert scope.cancelled_caught
        assert [c.opcode for c in bench.device.take()] == [Opcode.DEV_MODE_SET]
        assert bench.device.kept == (0, 1)
        bench.device.complete()
        await trio.testing.wait_all_tasks_blocked()
        assert bench.device.kept == (0, 0)
        # cancelled before its turn, nothing is sent
        with trio.CancelScope() as scope:
            scope.cancel()
            await owner.stop(1)
        assert bench.device.sent == []


async def test_a_full_queue_is_waited_for(bench: Bench, autojump_clock: trio.testing.MockClock) -> None:
    async with bench.driver() as owner:
        bench.device.full = 20
        await owner.resume(1)
        assert len(bench.device.sent) == 1
        bench.device.full = 1 << 30
        with trio.move_on_after(1) as scope:
            await owner.resume(1)
        assert scope.cancelled_caught
        assert len(bench.device.sent) == 1


async def test_try_again_is_tried_again(bench: Bench, autojump_clock: trio.testing.MockClock) -> None:
    again = refused(Status.EAGAIN, Qualifier.TRYAGAIN)
    async with bench.driver() as owner:
        bench.device.answers[Opcode.DEV_MODE_SET] = [again, again, again, OK]
        await owner.stop(1)
        assert len(bench.device.take()) == 4
        bench.device.answers[Opcode.DEV_MODE_SET] = again
        before = trio.current_time()
        with pytest.raises(admin.TryAgainError):
            await owner.stop(1)
        assert 9 < trio.current_time() - before < 11


# --- helpers ----------------------------------------------------------------------------------------------


async def test_registers_by_name(bench: Bench) -> None:
    registers = bytes.fromhex("11223344 55667788 00000000 0000 0000 0000 07 00")
    config = bytes(range(60))

    def common(command: Command, room: int) -> CommandResult:
        return ok(registers[command.data[0] : command.data[0] + room])

    def device(command: Command, room: int) -> CommandResult:
        data = config[command.data[0] : command.data[0] + room]
        return ok(data) if len(data) == room else refused(Status.EINVAL, Qualifier.INVALID_FIELD)

    bench.device.answers = {Opcode.LEGACY_COMMON_CFG_READ: common, Opcode.LEGACY_DEV_CFG_READ: device}
    async with bench.driver() as owner:
        assert await owner.member_status(1) == 7
        assert await owner.member_features(1) == LegacyFeatures(0x44332211, 0x88776655)
        bench.device.sent.clear()
        assert await owner.member_config(1) == config
        assert len(bench.device.sent) == len(config) + 1
        assert await owner.member_config(1, 4, 8) == config[4:12]
        with pytest.raises(admin.InvalidFieldError):
            await owner.member_config(1, 58, 4)


class Parts:
    """A device with objects and parts."""

    def __init__(self, device: Device, parts: bytes) -> None:
        self.parts = parts
        self.objects: dict[int, int] = {}
        self.limits = DevPartsCapability(2, 2)
        self.set: list[bytes] = []
        device.answers = {
            Opcode.DEVICE_CAP_GET: lambda *_: ok(self.limits.pack()),
            Opcode.RESOURCE_OBJ_CREATE: self._create,
            Opcode.RESOURCE_OBJ_DESTROY: self._destroy,
            Opcode.DEV_PARTS_METADATA_GET: lambda *_: ok(len(self.parts).to_bytes(8, "little")),
            Opcode.DEV_PARTS_GET: lambda _, room: ok(self.parts[:room]),
            Opcode.DEV_PARTS_SET: self._set,
        }

    def _create(self, command: Command, room: int) -> CommandResult:
        header = ObjectHeader.unpack(command.data)
        if header.id in self.objects:
            return refused(Status.EEXIST)
        self.objects[header.id] = command.data[16]
        return OK

    def _destroy(self, command: Command, room: int) -> CommandResult:
        header = ObjectHeader.unpack(command.data)
        return OK if self.objects.pop(header.id, None) is not None else refused(Status.ENXIO)

    def _set(self, command: Command, room: int) -> CommandResult:
        assert self.objects[ObjectHeader.unpack(command.data).id] == PartsOperation.SET
        self.set.append(command.data[8:])
        return OK


async def test_saving_and_loading_parts(bench: Bench) -> None:
    packed = pack_parts([PART, PART])
    async with bench.driver() as owner:
        parts = Parts(bench.device, packed)
        assert await owner.save_parts(1) == packed
        await owner.load_parts(1, packed)
        assert (parts.set, parts.objects) == ([packed], {})


async def test_ids_that_are_taken(bench: Bench) -> None:
    async with bench.driver() as owner:
        parts = Parts(bench.device, PART.pack())
        parts.objects[0] = 0
        assert await owner.save_parts(1) == PART.pack()
        assert parts.objects == {0: 0}
        parts.objects[1] = 0
        with pytest.raises(admin.NoSpaceError, match="all device parts objects of the owner are in use"):
            await owner.save_parts(1)
        parts.limits = DevPartsCapability(0, 0)
        with pytest.raises(admin.NoSpaceError):
            await owner.load_parts(1, PART.pack())


async def test_parts_that_grow_meanwhile(bench: Bench) -> None:
    async with bench.driver() as owner:
        parts = Parts(bench.device, PART.pack())
        sizes: list[Answer] = [ok((5).to_bytes(8, "little")), ok((17).to_bytes(8, "little"))]
        bench.device.answers[Opcode.DEV_PARTS_METADATA_GET] = sizes
        assert await owner.save_parts(1) == PART.pack()
        assert parts.objects == {}


async def test_an_object_is_removed_whatever_happens(bench: Bench) -> None:
    async with bench.driver() as owner:
        parts = Parts(bench.device, PART.pack())
        bench.device.answers[Opcode.DEV_PARTS_SET] = refused(Status.EINVAL, Qualifier.INVALID_FIELD)
        with pytest.raises(admin.InvalidFieldError):
            await owner.load_parts(1, PART.pack())
        assert parts.objects == {}

        def late(command: Command, room: int) -> CommandResult:
            bench.device.late = True
            return ok(PART.pack())

        bench.device.answers[Opcode.DEV_PARTS_GET] = late
        async with trio.open_nursery() as nursery:
            nursery.start_soon(owner.save_parts, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert len(parts.objects) == 1
            bench.device.late = False
            nursery.cancel_scope.cancel()
        assert parts.objects == {}


# --- the real device --------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory with a short name: socket paths have 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vhu-"))
    yield path
    shutil.rmtree(path)


def config(work: Path, *members: MemberConfig, **options: Any) -> GroupConfig:
    return GroupConfig("test", work / "group.toml", work / "run", members=members, **options)


def ram(member_id: int, **options: Any) -> MemberConfig:
    return MemberConfig(member_id, "blk", f"ram:{MIB}", **options)


@asynccontextmanager
async def owner_of(work: Path, *members: MemberConfig, **options: Any) -> AsyncIterator[tuple[Group, OwnerDriver]]:
    options = {"feature_management": True, **options}
    async with open_group(config(work, *members, **options)) as served, served.owner_driver() as owner:
        yield served, owner


async def test_registers_of_a_real_member(work: Path) -> None:
    async with owner_of(work, ram(1, queues=2, queue_size=128, serial="x")) as (served, owner):
        assert await owner.member_status(1) == 0
        await owner.legacy_common_write(1, 18, b"\3")
        assert await owner.member_status(1) == 3
        features = await owner.member_features(1)
        assert features.device & 1 << 27  # ANY_LAYOUT
        assert features.driver == 0
        await owner.legacy_common_write(1, 4, (1 << 9).to_bytes(4, "little"))
        assert (await owner.member_features(1)).driver == 1 << 9
        for queue, size in ((0, 128), (1, 128), (2, 0)):
            await owner.legacy_common_write(1, 14, queue.to_bytes(2, "little"))
            assert await owner.legacy_common_read(1, 12, 2) == size.to_bytes(2, "little")
        blk = await owner.member_config(1)
        assert int.from_bytes(blk[:8], "little") == MIB // 512
        assert int.from_bytes(blk[34:36], "little") == 2
        assert await owner.legacy_device_read(1, 0, 8) == blk[:8]
        assert [(place.place, place.bar) for place in await owner.legacy_notify_info(1)] == [(NotifyPlace.MEMBER, 2)]
        info = served.query_member(1)
        assert info["status"]["names"] == ["ACKNOWLEDGE", "DRIVER"]
        assert info["driver_features"]["names"] == ["FLUSH"]
        assert info["admin_commands"]["LEGACY_NOTIFY_INFO"] == 1
        await owner.legacy_common_write(1, 18, b"\0")
        assert await owner.member_status(1) == 0


async def test_what_a_real_device_refuses(work: Path) -> None:
    async with owner_of(work, ram(1), ram(3)) as (served, owner):
        refusals: list[tuple[type[admin.AdminError], Call]] = [
            (admin.InvalidFieldError, lambda owner: owner.legacy_common_read(1, 18, 2)),
            (admin.InvalidFieldError, lambda owner: owner.legacy_common_read(1, 24, 1)),
            (admin.InvalidFieldError, lambda owner: owner.legacy_device_read(1, 4, 8)),
            (admin.InvalidFieldError, lambda owner: owner.legacy_common_write(1, 10, b"\0\0\0\0")),
            (admin.InvalidFieldError, lambda owner: owner.list_use(SR_IOV, [0, 1, 40])),
            (admin.InvalidFieldError, lambda owner: owner.assign_features(1, 1 << 63)),
            (admin.InvalidMemberError, lambda owner: owner.member_status(2)),
            (admin.InvalidMemberError, lambda owner: owner.member_status(4)),
            (admin.InvalidMemberError, lambda owner: owner.stop(0)),
            (admin.InvalidOpcodeError, lambda owner: owner.command(Command(0x20, SR_IOV, 1))),
            (admin.InvalidOpcodeError, lambda owner: owner.command(Command(Opcode.DEV_MODE_SET, SELF))),
            (admin.InvalidGroupError, lambda owner: owner.command(Command(Opcode.LIST_QUERY, 2))),
            (admin.NoSuchResourceError, lambda owner: owner.device_capability(0x801)),
            (admin.NoSuchResourceError, lambda owner: owner.object_destroy(5, member=1)),
            (admin.NoSpaceError, lambda owner: owner.object_create(0, DevPartsObject(PartsOperation.GET), member=1)),
        ]
        for kind, call in refusals:
            with pytest.raises(kind) as caught:
                await call(owner)
            assert type(caught.value) is kind
        limits = await owner.device_capability(CapabilityId.DEV_PARTS)
        await owner.set_driver_capability(CapabilityId.DEV_PARTS, limits)
        await owner.object_create(0, DevPartsObject(PartsOperation.GET), member=1)
        with pytest.raises(admin.ResourceExistsError):
            await owner.object_create(0, DevPartsObject(PartsOperation.GET), member=1)
        with pytest.raises(admin.DeviceBusyError):
            await owner.set_driver_capability(CapabilityId.DEV_PARTS, DevPartsCapability(0, 0))
        metadata = Command(Opcode.DEV_PARTS_METADATA_GET, SR_IOV, 1, ObjectHeader(0).pack() + b"\2" + bytes(7))
        with pytest.raises(admin.NoMemoryError):
            await owner.command(metadata, 8)
        assert served.query_owner()["failed"] == len(refusals) + 3
        # failures have changed nothing
        assert await owner.member_status(1) == 0


async def test_a_member_in_use_by_a_front_end_is_only_read(work: Path) -> None:
    async with owner_of(work, ram(1)) as (served, owner):
        stream = await trio.open_unix_socket(served.socket_path(1))
        async with stream:
            await stream.send_all(struct.pack("<III", 1, 1, 0))
            await stream.receive_some(100)
            assert await owner.member_status(1) == 0
            writes: list[Call] = [
                lambda owner: owner.legacy_common_write(1, 18, b"\1"),
                lambda owner: owner.stop(1),
                lambda owner: owner.load_parts(1, b""),
            ]
            for call in writes:
                with pytest.raises(admin.DeviceBusyError):
                    await call(owner)
        with trio.fail_after(10):
            while served.query_member(1)["state"] != "detached":
                await trio.sleep(0.01)
        await owner.legacy_common_write(1, 18, b"\1")


async def test_without_feature_management_there_is_no_such_command(work: Path) -> None:
    async with owner_of(work, ram(1), feature_management=False) as (_, owner):
        assert Opcode.DEVICE_MGMT not in owner.lists[SR_IOV]
        with pytest.raises(admin.InvalidOpcodeError):
            await owner.assign_features(1, 0)


async def test_a_strict_group_without_members(work: Path) -> None:
    async with owner_of(work, strict=True) as (served, owner):
        assert SR_IOV not in owner.lists
        with pytest.raises(admin.InvalidGroupError):
            await owner.member_status(1)
        await served.member_add(ram(1))
        assert await owner.member_status(1) == 0
        assert Opcode.DEV_PARTS_GET in owner.lists[SR_IOV]
        await served.member_del(1)
        with pytest.raises(admin.InvalidGroupError):
            await owner.member_status(1)


async def test_members_come_and_go_while_the_owner_is_in_use(work: Path) -> None:
    async with owner_of(work, ram(1)) as (served, owner):

        def vfs() -> tuple[bool, int]:
            info = served.query_owner()
            return info["vf_enable"], info["num_vfs"]

        assert vfs() == (True, 1)
        await served.member_add(ram(5))
        assert vfs() == (True, 5)
        await owner.legacy_common_write(5, 18, b"\1")
        with pytest.raises(admin.InvalidMemberError):
            await owner.member_status(4)

        async def ask(until: trio.Event) -> None:
            while not until.is_set():
                assert await owner.member_status(1) == 0
                with suppress(admin.InvalidMemberError, admin.InvalidGroupError):
                    await owner.member_status(5)

        enough = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask, enough)
            for _ in range(20):
                await served.member_del(5)
                assert vfs() == (True, 1)
                await served.member_add(ram(5))
                assert vfs() == (True, 5)
            enough.set()
        # a new member with an old number is a new one
        assert await owner.member_status(5) == 0
        await served.member_del(5)
        await served.member_del(1)
        assert vfs() == (False, 0)
        with pytest.raises(admin.InvalidGroupError):
            await owner.member_status(1)


async def test_vfs_as_the_sr_iov_capability_would_set_them(work: Path) -> None:
    async with owner_of(work, ram(1), ram(2)) as (served, owner):
        served.set_vfs(num_vfs=1)
        assert await owner.member_status(1) == 0
        with pytest.raises(admin.InvalidMemberError):
            await owner.member_status(2)
        served.set_vfs(enable=False)
        with pytest.raises(admin.InvalidGroupError):
            await owner.member_status(1)
        served.set_vfs(enable=True, num_vfs=2)
        assert await owner.member_status(2) == 0
        for number in (-1, 65536):
            with pytest.raises(GroupError, match="allowed: 0 to 65535"):
                served.set_vfs(num_vfs=number)


async def test_state_moves_to_another_member(work: Path) -> None:
    async with owner_of(work, ram(1), ram(2)) as (served, owner):
        await owner.legacy_common_write(1, 18, b"\3")
        await owner.legacy_common_write(1, 4, (1 << 9).to_bytes(4, "little"))
        await owner.stop(1)
        assert served.query_member(1)["stopped"]
        parts = await owner.save_parts(1)
        by_name = {part.header.name: part.decoded() for part in admin.parts_in(parts)}
        assert (by_name["DEVICE_STATUS"], by_name["DRV_FEATURES"]) == (3, 1 << 9)
        with pytest.raises(admin.AdminError):
            await owner.load_parts(2, parts)  # it runs
        await owner.stop(2)
        await owner.load_parts(2, parts)
        await owner.resume(2)
        assert await owner.member_status(2) == 3
        assert (await owner.member_features(2)).driver == 1 << 9
        assert served.query_owner()["objects"] == []
        # stopping and resuming twice is as good as once
        await owner.stop(1)
        await owner.resume(1)
        await owner.resume(1)


async def test_parts_one_by_one(work: Path) -> None:
    async with owner_of(work, ram(1)) as (served, owner):
        limits = await owner.device_capability(CapabilityId.DEV_PARTS)
        await owner.set_driver_capability(CapabilityId.DEV_PARTS, limits)
        await owner.object_create(7, DevPartsObject(PartsOperation.SET), member=1)
        assert DevPartsObject.unpack(await owner.object_query(7, member=1)) == DevPartsObject(PartsOperation.SET)
        await owner.object_modify(7, DevPartsObject(PartsOperation.GET), member=1)
        headers = await owner.parts_metadata(1, 7, "list")
        assert len(headers) == await owner.parts_metadata(1, 7, "count")
        everything = await owner.parts_get(1, 7)
        assert tuple(part.header for part in everything) == headers
        assert len(pack_parts(everything)) == await owner.parts_metadata(1, 7, "size")
        status = next(header for header in headers if header.type == PartType.DEVICE_STATUS)
        unknown = PartHeader(0x3FF)
        assert await owner.parts_get(1, 7, [unknown, status]) == (DevicePart(PartType.DEVICE_STATUS, b"\0"),)
        assert served.query_owner()["objects"] == [{"type": 0, "id": 7, "member": 1, "operation": "get"}]
        await owner.object_destroy(7, member=1)


async def test_every_queue_takes_commands(work: Path) -> None:
    members = [ram(n) for n in range(1, 9)]
    owner_config = OwnerConfig("blk", f"ram:{MIB}", admin_queues=3)
    async with open_group(config(work, *members, owner=owner_config)) as served:
        for number in (-1, 3):
            with pytest.raises(GroupError, match="allowed: 0 to 2"):
                served.owner_driver(number)
        async with AsyncExitStack() as stack:
            drivers = [await stack.enter_async_context(served.owner_driver(queue)) for queue in range(3)]

            async def use(owner: OwnerDriver, member: int) -> None:
                for _ in range(50):
                    assert (await owner.legacy_common_read(member, 12, 2)) == b"\0\1"

            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    for member in range(1, 9):
                        for owner in drivers:
                            nursery.start_soon(use, owner, member)
        queues = served.query_owner()["queues"]
        assert [queue["completed"] >= 400 for queue in queues] == [True] * 3
        assert all(queue["submitted"] == queue["completed"] for queue in queues)


LEGACY_START: list[tuple[str, bool, int, int, str]] = [
    # register, write, value, width: what Linux's legacy driver does to a disk with one queue (without MSI-X)
    ("device_status", True, 0, 1, "LEGACY_COMMON_CFG_WRITE"),
    ("device_status", False, 0, 1, "LEGACY_COMMON_CFG_READ"),
    ("device_status", True, 1, 1, "LEGACY_COMMON_CFG_WRITE"),
    ("device_status", True, 3, 1, "LEGACY_COMMON_CFG_WRITE"),
    ("driver_features", True, 1 << 9, 4, "LEGACY_COMMON_CFG_WRITE"),
    ("queue_select", True, 0, 2, "LEGACY_COMMON_CFG_WRITE"),
    ("queue_size", False, 256, 2, "LEGACY_COMMON_CFG_READ"),
    ("capacity", False, 0, 1, "LEGACY_DEV_CFG_READ"),
    ("capacity+1", False, 8, 1, "LEGACY_DEV_CFG_READ"),
    ("isr_status", False, 0, 1, "LEGACY_COMMON_CFG_READ"),
]
OFFSETS = {"driver_features": 4, "queue_size": 12, "queue_select": 14, "device_status": 18, "isr_status": 19}


async def test_the_trace_of_a_drivers_start(work: Path) -> None:
    async with owner_of(work, ram(1), ram(2)) as (served, owner):
        since = served.trace()["next"]
        for register, write, value, width, opcode in LEGACY_START:
            space = "device" if "DEV_CFG" in opcode else "common"
            offset = OFFSETS.get(register, int(register.partition("+")[2] or 0))
            if write:
                await owner.legacy_common_write(1, offset, value.to_bytes(width, "little"))
            else:
                read = owner.legacy_device_read if space == "device" else owner.legacy_common_read
                await read(1, offset, width)
            await owner.member_status(2)
        with pytest.raises(admin.InvalidFieldError):
            await owner.legacy_common_read(1, 18, 2)
        answer = served.trace(1, since=since)
        assert answer["lost"] == 0
        found = [
            (entry["register"], entry["write"], entry["value"], entry["width"], entry["opcode_name"])
            for entry in answer["entries"]
        ]
        assert found[:-1] == LEGACY_START
        for entry in answer["entries"][:-1]:
            assert (entry["member"], entry["origin"]) == (1, "admin")
            assert (entry["status"], entry["qualifier"]) == (0, 0)
            assert entry["opcode"] == Opcode[entry["opcode_name"]]
            assert 0 < entry["microseconds"] < 1e6
            assert abs(entry["at"] - time.time()) < 60
        refusal = answer["entries"][-1]
        assert (refusal["status"], refusal["qualifier"]) == (Status.EINVAL, Qualifier.INVALID_FIELD)
        # numbers go on, and pages fit together
        numbers = [entry["seq"] for entry in served.trace(since=since)["entries"]]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 2 * len(LEGACY_START) + 1
        pages = []
        following = since
        while page := (answer := served.trace(since=following, limit=4))["entries"]:
            pages += [entry["seq"] for entry in page]
            following = answer["next"]
        assert pages == numbers


async def test_a_trace_is_bounded_and_says_what_was_lost(work: Path) -> None:
    async with owner_of(work, ram(1)) as (served, _):
        command = Command(Opcode.LEGACY_COMMON_CFG_READ, SR_IOV, 1, b"\x12").pack()
        for _ in range(70_000):
            served._device.submit(0, command, 9)
        answer = served.trace(limit=1)
        assert answer["lost"] > 0
        assert answer["entries"][0]["seq"] == answer["lost"]
        assert served.trace(since=1 << 63)["entries"] == []
        for wrong in ({"since": -1}, {"since": 1 << 64}, {"limit": 0}, {"limit": 5000}):
            with pytest.raises(GroupError, match="out of range"):
                served.trace(**wrong)
        with pytest.raises(MemberError, match="no such member"):
            served.trace(2)


async def test_accesses_as_events(work: Path) -> None:
    async with owner_of(work, ram(1), ram(2)) as (served, owner):
        await owner.member_status(1)
        with served.listen() as events:
            served.trace_events(2, enable=True)
            await trio.testing.wait_all_tasks_blocked()
            await owner.member_status(1)
            await owner.member_status(2)
            with trio.fail_after(5):
                event = await anext(events)
            assert (event.kind, event.data["lost"]) == ("trace", 0)
            assert [entry["member"] for entry in event.data["entries"]] == [2]
            served.trace_events(enable=True)
            for _ in range(1200):
                await owner.member_status(1)
            count = 0
            with trio.fail_after(10):
                while count < 1200:
                    event = await anext(events)
                    assert len(event.data["entries"]) <= 500
                    count += len(event.data["entries"])
            served.trace_events(enable=False)
            served.trace_events(2, enable=False)
            await owner.member_status(2)
            with trio.move_on_after(0.3):
                await anext(events)
                pytest.fail("nobody asked for this one")
        with pytest.raises(MemberError, match="no such member"):
            served.trace_events(9, enable=True)


async def test_lists_after_a_real_reset(work: Path) -> None:
    async with owner_of(work, ram(1)) as (served, owner):
        await owner.stop(1)
        served._device.reset()
        assert served.query_owner()["used_lists"]["sr_iov"] == [0, 1]
        assert await owner.save_parts(1)
        await owner.resume(1)


async def test_one_driver_that_stays(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served:
        before = served.query_owner()["commands"]["LIST_QUERY"]
        for _ in range(5):
            owner = await served.shared_owner()
            assert await owner.member_status(1) == 0
        assert served.query_owner()["commands"]["LIST_QUERY"] == before + 2
        with pytest.raises(GroupError, match="allowed: 0 to 0"):
            await served.shared_owner(1)


# --- beside a PCI function --------------------------------------------------------------------------------


async def test_the_io_bar_of_a_legacy_function_in_the_trace(work: Path) -> None:
    async with owner_of(work, ram(1, vfio_user=True)) as (served, owner):

        def drive() -> None:
            with VfioClient(served.function_path(1, "legacy")) as client, PciFunction(client) as function:
                function.place_bars()
                function.enable()
                function.write(0, 18, 1, 1)
                function.write(0, 18, 1, 3)
                function.write(0, 4, 4, 1 << 9)
                assert function.read(0, 12, 2) == 256
                # device configuration: without MSI-X it begins at 20
                assert function.read(0, 20, 1) == 0
                function.write(0, 16, 2, 0)

        since = served.trace()["next"]
        await trio.to_thread.run_sync(drive)
        found = [
            (entry["offset"], entry["register"], entry["write"], entry["width"], entry["value"], entry["opcode_name"])
            for entry in served.trace(1, since=since)["entries"]
            if entry["origin"] == "bar0"
        ]
        assert found[:5] == [
            (18, "device_status", True, 1, 1, "LEGACY_COMMON_CFG_WRITE"),
            (18, "device_status", True, 1, 3, "LEGACY_COMMON_CFG_WRITE"),
            (4, "driver_features", True, 4, 1 << 9, "LEGACY_COMMON_CFG_WRITE"),
            (12, "queue_size", False, 2, 256, "LEGACY_COMMON_CFG_READ"),
            (20, "capacity", False, 1, 0, "LEGACY_DEV_CFG_READ"),
        ]
        assert found[5][5] == "notify region"
        commands = served.query_member(1)["admin_commands"]
        assert commands["LEGACY_COMMON_CFG_WRITE"] >= 3
        assert commands["LEGACY_COMMON_CFG_READ"] >= 1
        assert commands["LEGACY_DEV_CFG_READ"] >= 1
        # the driver of the function and this one have lists of their own
        await owner.member_status(1)


async def test_a_member_under_a_function_can_be_stopped(work: Path) -> None:
    async with owner_of(work, ram(1, vfio_user=True)) as (served, owner):
        client = await trio.to_thread.run_sync(VfioClient, served.function_path(1, "modern"))
        try:
            await owner.stop(1)
            assert served.query_member(1)["stopped"]
            parts = await owner.save_parts(1)
            await owner.load_parts(1, parts)
            await owner.resume(1)
            assert not served.query_member(1)["stopped"]
            assert served.query_member(1)["front"] == "modern"
        finally:
            client.close()
