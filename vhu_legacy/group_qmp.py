# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The commands and events of a group on its QMP server. `docs/QMP.md` describes them for who uses them.

Keys are spelled with '-' on the wire and with '_' in Python, values are the same.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from .admin import (
    RESULT_HEADER_SIZE,
    AdminError,
    Command,
    DevicePart,
    NotifyInfo,
    VqConfig,
    VqNotifyConfig,
    parts_in,
)
from .errors import GroupError
from .functions import MEMBER_FUNCTIONS
from .group import Group, GroupEvent
from .owner import OwnerDriver
from .qmp import (
    ANY,
    BOOL,
    INT,
    NULL,
    NUMBER,
    STR,
    Alternate,
    Array,
    CommandError,
    Enum,
    Object,
    QMPServer,
    Registry,
    Reply,
    Type,
    Version,
    nullable,
)

__all__ = ["EVENTS", "kebab", "make_registry", "serve_qmp"]

MAX_PAYLOAD: Final = 256 * 1024
"""Bytes of a command's data or result: in hexadecimal digits they have to fit a QMP message."""

# --- types -------------------------------------------------------------------------------------------------

PROBLEM: Final = Object({"rule": STR, "reason": STR, "queue": nullable(INT)})
BITS: Final = Object({"value": INT, "names": Array(STR)})
SUCCESSOR: Final = Object(
    {"pid": INT, "members": INT, "moved": INT, "reconnecting": Array(INT), "longest-pause": NUMBER}
)
STATE: Final = Enum(("detached", "attached", "running", "broken", "draining"))
LAYOUT: Final = Enum(("legacy", "modern"))
FRONT: Final = Enum(("vhost-user", "legacy", "transitional", "modern", "owner"))
FUNCTION_KIND: Final = Enum(("owner", *MEMBER_FUNCTIONS))
COUNTS: Final = ANY
"""Numbers by the names of commands; those that never came may be missing."""
IMAGE: Final = Object({"spec": STR, "kind": Enum(("file", "ram", "null")), "size": INT, "read-only": BOOL})

GROUP: Final = Object(
    {
        "name": STR,
        "source": STR,
        "run-dir": STR,
        "qmp": STR,
        "pid": INT,
        "engine": Enum(("native", "rust-vmm")),
        "strict": BOOL,
        "feature-management": BOOL,
        "members": INT,
        "attached": INT,
        "started-at": NUMBER,
    }
)

SUMMARY: Final = Object(
    {
        "id": INT,
        "type": STR,
        "legacy": BOOL,
        "state": STATE,
        "driver-mode": nullable(LAYOUT),
        "broken": nullable(PROBLEM),
        "connections": INT,
        "queues": INT,
        "queue-size": INT,
        "running-queues": INT,
        "served": INT,
        "errors": INT,
        "image": IMAGE,
        "front": nullable(FRONT),
        "stopped": BOOL,
        "vhost-user": STR,
        "functions": Array(Object({"function": FUNCTION_KIND, "socket": STR})),
        "peer-pid": nullable(INT),
    }
)

QUEUE: Final = Object(
    {
        "index": INT,
        "size": INT,
        "max-size": INT,
        "started": BOOL,
        "enabled": BOOL,
        "running": BOOL,
        "worker": nullable(INT),
        "layout": nullable(LAYOUT),
        "desc": INT,
        "driver": INT,
        "device": INT,
        "avail-idx": nullable(INT),
        "used-idx": nullable(INT),
        "last-avail-idx": INT,
        "in-flight": INT,
        "kicks": INT,
        "calls": INT,
        "requests": INT,
        "errors": INT,
        "event-idx": BOOL,
        "indirect": BOOL,
    }
)

QEMU_QUEUE: Final = Object(
    {
        "index": INT,
        "num": nullable(INT),
        "desc-phys": nullable(INT),
        "avail-phys": nullable(INT),
        "used-phys": nullable(INT),
        "avail-idx": nullable(INT),
        "used-idx": nullable(INT),
        "problem": nullable(STR),
    }
)
QEMU: Final = Object({"version": STR, "qom-path": STR, "started": BOOL, "queues": Array(QEMU_QUEUE)})

REQUESTS: Final = Object(
    {
        "in": INT,
        "out": INT,
        "flush": INT,
        "get-id": INT,
        "discard": INT,
        "write-zeroes": INT,
        "unsupported": INT,
        "failed": INT,
        "bytes-read": INT,
        "bytes-written": INT,
    }
)
CONNECTION: Final = Object(
    {"connected": BOOL, "peer-pid": nullable(INT), "messages": INT, "connections": INT, "refused": INT}
)

FUNCTION: Final = Object(
    {
        "function": FUNCTION_KIND,
        "socket": STR,
        "connected": BOOL,
        "peer-pid": nullable(INT),
        "connections": INT,
        "refused": INT,
        "messages": INT,
        "reads": INT,
        "writes": INT,
        "errors": INT,
        "pci": ANY,
    }
)

DEVICE: Final[Mapping[str, Type]] = {
    "id": INT,
    "type": STR,
    "legacy": BOOL,
    "state": STATE,
    "front": nullable(FRONT),
    "stopped": BOOL,
    "broken": nullable(PROBLEM),
    "last-error": nullable(PROBLEM),
    "connections": INT,
    "device-features": BITS,
    "driver-features": BITS,
    "assigned-features": nullable(INT),
    "protocol-features": BITS,
    "driver-mode": nullable(LAYOUT),
    "status": BITS,
    "isr": INT,
    "msix": Object({"enabled": BOOL, "vectors": INT}),
    "poll-us": INT,
    "inflight-tracking": BOOL,
    "dirty-log": BOOL,
    "queues": Array(QUEUE),
    "memory": Array(Object({"guest-address": INT, "size": INT, "user-address": INT, "mmap-offset": INT})),
    "config": ANY,
    "config-generation": INT,
    "image": IMAGE,
    "requests": REQUESTS,
    "admin-commands": COUNTS,
}
"""What members and the owner's own device have in common."""

MEMBER: Final = Object(
    {
        **DEVICE,
        "vhost-user": STR,
        "functions": Array(FUNCTION),
        "peer-pid": nullable(INT),
        "connection": nullable(CONNECTION),
        "*qemu": QEMU,
    }
)

OPCODES: Final = Object({"self": Array(INT), "sr-iov": Array(INT)})
LIMITS: Final = Object({"get-limit": INT, "set-limit": INT})
DRIVER: Final[Mapping[str, Type]] = {
    "used-lists": OPCODES,
    "capabilities": LIMITS,
    "objects": Array(Object({"type": INT, "id": INT, "member": INT, "operation": STR})),
}
"""What a driver of the owner has negotiated."""
ADMIN_QUEUES: Final = Array(Object({"index": INT, "submitted": INT, "completed": INT}))
OWNER: Final = Object(
    {
        "vf-enable": BOOL,
        "num-vfs": INT,
        "total-vfs": INT,
        "strict": BOOL,
        "feature-management": BOOL,
        "notify-region": BOOL,
        "compat": Object(
            {
                "lists-without-vfs": BOOL,
                "capabilities-in-sr-iov-list": BOOL,
                "self-group-preset": BOOL,
                "pfn-zero-resets-device": BOOL,
            }
        ),
        "admin-queues": INT,
        "supported": OPCODES,
        "device-capabilities": LIMITS,
        **DRIVER,
        "commands": COUNTS,
        "failed": INT,
        "queues": ADMIN_QUEUES,
        "forwarded": INT,
        "device": nullable(Object(DEVICE)),
        "function": nullable(Object({**FUNCTION.members, **DRIVER})),
        "peer-pid": nullable(INT),
    }
)

OUTCOME: Final = Object(
    {
        "status": Object({"value": INT, "name": STR}),
        "qualifier": Object({"value": INT, "name": STR}),
        "written": INT,
        "result": STR,
    }
)

PART_VALUE: Final = Alternate(
    (
        INT,
        Object(
            {
                "*size": INT,
                "*vector": INT,
                "*enabled": BOOL,
                "*desc": INT,
                "*driver": INT,
                "*device": INT,
                "*notify-off": INT,
                "*config-data": INT,
            }
        ),
        NULL,
    )
)
PART: Final = Object(
    {
        "type": INT,
        "name": STR,
        "index": nullable(INT),
        "optional": BOOL,
        "data": STR,
        "value": PART_VALUE,
    }
)

ACCESS: Final = Object(
    {
        "seq": INT,
        "at": NUMBER,
        "member": INT,
        "origin": Enum(("bar0", "admin")),
        "write": BOOL,
        "register": STR,
        "offset": INT,
        "width": INT,
        "value": nullable(INT),
        "opcode": nullable(INT),
        "opcode-name": STR,
        "status": INT,
        "qualifier": INT,
        "microseconds": NUMBER,
    }
)
TRACE: Final = Object({"next": INT, "lost": INT, "entries": Array(ACCESS)})

VVU_REGION: Final = Object({"guest-address": INT, "size": INT, "mmap-offset": INT, "offset": INT, "log": BOOL})
VVU_MESSAGE: Final = Object(
    {
        "from": Enum(("master", "slave")),
        "request": INT,
        "name": nullable(STR),
        "reply": BOOL,
        "flags": INT,
        "size": INT,
    }
)
VVU_QUEUE: Final = Object(
    {
        "index": INT,
        "call-doorbell": INT,
        "err-doorbell": INT,
        "kicks": INT,
        "kicks-ignored": INT,
        "calls": INT,
        "calls-ignored": INT,
        "call-connected": BOOL,
        "errs": INT,
        "errs-ignored": INT,
        "err-connected": BOOL,
    }
)
VVU_SIDE: Final = Object({"features": nullable(BITS), "protocol-features": nullable(BITS)})
VHOST_USER_DEVICE: Final = Object(
    {
        "name": STR,
        "uuid": nullable(STR),
        "max-queues": INT,
        "shared-memory": INT,
        "ram-file": nullable(STR),
        "ram-size": nullable(INT),
        "sockets": Object({"vhost-user": STR, "vfio-user": nullable(STR), "front": STR}),
        "state": Enum(("waiting", "slave-up", "connected", "paused", "broken")),
        "carrier": nullable(Enum(("vhost-user", "vfio-user"))),
        "peer-pid": nullable(INT),
        "master-pid": nullable(INT),
        "broken": nullable(PROBLEM),
        "status": BITS,
        "ready": BOOL,
        "paused": BOOL,
        "resets": INT,
        "slave": VVU_SIDE,
        "passed-on": nullable(BITS),
        "master": VVU_SIDE,
        "slave-channel": BOOL,
        "memory": Array(VVU_REGION),
        "waiting": INT,
        "last-message": nullable(VVU_MESSAGE),
        "last-error": nullable(PROBLEM),
        "messages": Object({"from-master": INT, "from-slave": INT, "discarded": INT, "masters": INT}),
        "queues": Array(VVU_QUEUE),
        "log": Object({"doorbell": INT, "rings": INT, "rings-ignored": INT}),
    }
)
"""A virtio-vhost-user device (`vvu_view.describe`)."""

STATISTICS: Final = Object(
    {
        "uptime": NUMBER,
        "members": INT,
        "events": INT,
        "fds": Object({"used": INT, "limit": INT}),
        "requests": REQUESTS,
        "admin": Object({"commands": COUNTS, "failed": INT}),
        "pool": ANY,
        "qmp": Object(
            {
                "clients": INT,
                "accepted": INT,
                "refused": INT,
                "dropped": INT,
                "commands": INT,
                "errors": INT,
                "events": INT,
            }
        ),
    }
)

MEMBER_ADD: Final = Object(
    {
        "type": STR,
        "image": STR,
        "*id": INT,
        "*read-only": BOOL,
        "*queues": INT,
        "*queue-size": INT,
        "*legacy": BOOL,
        "*packed": BOOL,
        "*in-order": BOOL,
        "*shared": BOOL,
        "*vectors": INT,
        "*blk-size": INT,
        "*serial": STR,
        "*vfio-user": BOOL,
        "*poll-us": INT,
    }
)

_CONNECTED: Final = {"peer-pid": nullable(INT)}
_STATUS: Final = {"old": INT, "new": INT}
_NAMED: Final = {"name": STR}
_BROKEN: Final = {"rule": STR, "reason": STR, "queue": nullable(INT)}

EVENTS: Final[Mapping[str, tuple[str, Object]]] = {
    "connected": ("MEMBER_CONNECTED", Object({"id": INT, **_CONNECTED, "*function": FUNCTION_KIND})),
    "disconnected": ("MEMBER_DISCONNECTED", Object({"id": INT, "reason": STR, "*function": FUNCTION_KIND})),
    "status": ("MEMBER_STATUS_CHANGE", Object({"id": INT, **_STATUS})),
    "broken": ("MEMBER_BROKEN", Object({"id": INT, **_BROKEN})),
    "added": ("MEMBER_ADDED", Object({"id": INT, "type": STR})),
    "deleted": ("MEMBER_DELETED", Object({"id": INT})),
    "config": ("MEMBER_CONFIG_CHANGE", Object({"id": INT})),
    "owner-connected": ("OWNER_CONNECTED", Object(_CONNECTED)),
    "owner-disconnected": ("OWNER_DISCONNECTED", Object({"reason": STR})),
    "owner-status": ("OWNER_STATUS_CHANGE", Object(_STATUS)),
    "owner-broken": ("OWNER_BROKEN", Object(_BROKEN)),
    "owner-config": ("OWNER_CONFIG_CHANGE", Object()),
    "slave-up": ("SLAVE_UP", Object(_NAMED)),
    "slave-down": ("SLAVE_DOWN", Object({**_NAMED, "reason": STR})),
    "master-up": ("MASTER_UP", Object({**_NAMED, **_CONNECTED})),
    "master-down": ("MASTER_DOWN", Object({**_NAMED, "reason": STR})),
    "device-broken": ("VHOST_USER_DEVICE_BROKEN", Object({**_NAMED, **_BROKEN})),
    "trace": ("REGISTER_ACCESS", Object({"entries": Array(ACCESS), "lost": INT})),
}
"""Kinds of `GroupEvent` and what they are on the wire."""


def kebab(value: Any) -> Any:
    """The same value with '-' for '_' in the keys of all its objects; names of constants stay as they are."""
    match value:
        case dict():
            return {_kebab_key(str(key)): kebab(item) for key, item in value.items()}
        case list() | tuple():
            return [kebab(item) for item in value]
        case _:
            return value


def _kebab_key(key: str) -> str:
    return key if key.isupper() else key.replace("_", "-")


async def serve_qmp(group: Group, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve the group over QMP at `group.qmp_path` until cancelled. Raises OSError when the socket can't be
    bound.
    """
    server = QMPServer(registry := make_registry(group), group.qmp_path)
    commands = _Commands(group, server)
    registry.add("query-statistics", commands.query_statistics, returns=STATISTICS)

    def forward(event: GroupEvent) -> None:
        name, data = EVENTS[event.kind]
        known = data.fields()
        values = {"id": event.member, **kebab(event.data)}
        server.emit(name, {key: value for key, value in values.items() if key in known})

    group.qmp = server
    server.keep_path = lambda: group.left
    end = group.subscribe(forward)
    try:
        await server.run(group.qmp_fd, task_status=task_status)
    finally:
        end()


def make_registry(group: Group) -> Registry:
    """The commands and events of a group, all but `query-statistics`, which needs the server itself."""
    registry = Registry(_version)
    commands = _Commands(group, None)
    by_id = Object({"id": INT})
    registry.add("query-group", commands.query_group, returns=GROUP)
    registry.add("query-members", commands.query_members, returns=Array(SUMMARY))
    registry.add(
        "query-member",
        commands.query_member,
        arguments=Object({"id": INT, "*qemu-qmp": STR, "*qom-path": STR}),
        returns=MEMBER,
    )
    registry.add(
        "member-add",
        commands.member_add,
        arguments=MEMBER_ADD,
        returns=Object({"id": INT, "vhost-user": STR, "*vfio-user": Array(STR)}),
    )
    registry.add("member-del", commands.member_del, arguments=Object({**by_id.members, "*force": BOOL}))
    registry.add(
        "member-modify",
        commands.member_modify,
        arguments=Object(
            {
                **by_id.members,
                "*image": STR,
                "*size": INT,
                "*read-only": BOOL,
                "*legacy": BOOL,
                "*serial": STR,
                "*features": INT,
            }
        ),
        returns=Object({"driver-told": BOOL}),
    )
    _add_owner_commands(registry, commands)
    registry.add("query-vhost-user-devices", commands.query_vhost_user_devices, returns=Array(VHOST_USER_DEVICE))
    registry.add("quit", commands.quit)
    registry.add("upgrade", commands.upgrade, arguments=Object({"*python": STR, "*force": BOOL}), returns=SUCCESSOR)
    for name, data in EVENTS.values():
        registry.add_event(name, data)
    return registry


def _version() -> Version:
    # the first client that asks pays for finding it out; members are served by then
    from . import __version__

    numbers = [int(part) if part.isdigit() else 0 for part in [*__version__.split("."), "0", "0"][:3]]
    return Version(numbers[0], numbers[1], numbers[2], f"vhu-legacy {__version__}")


def _add_owner_commands(registry: Registry, commands: _Commands) -> None:
    """What goes through the owner's administration virtqueue, and what can be seen of it."""
    by_id = {"id": INT}
    space = Enum(("common", "device"))
    registry.add("query-owner", commands.query_owner, returns=OWNER)
    registry.add("owner-set-vfs", commands.owner_set_vfs, arguments=Object({"*enable": BOOL, "*num-vfs": INT}))
    registry.add(
        "owner-command",
        commands.owner_command,
        arguments=Object(
            {"opcode": INT, "*group-type": INT, "*member": INT, "*data": STR, "*result-size": INT, "*queue": INT}
        ),
        returns=OUTCOME,
    )
    registry.add(
        "member-legacy-read",
        commands.member_legacy_read,
        arguments=Object({**by_id, "space": space, "offset": INT, "length": INT}),
        returns=Object({"data": STR, "value": INT}),
    )
    registry.add(
        "member-legacy-write",
        commands.member_legacy_write,
        arguments=Object({**by_id, "space": space, "offset": INT, "data": STR}),
    )
    registry.add("member-stop", commands.member_stop, arguments=Object(by_id))
    registry.add("member-resume", commands.member_resume, arguments=Object(by_id))
    registry.add(
        "member-parts-get",
        commands.member_parts_get,
        arguments=Object(by_id),
        returns=Object({"data": STR, "parts": Array(PART)}),
    )
    registry.add("member-parts-set", commands.member_parts_set, arguments=Object({**by_id, "data": STR}))
    registry.add(
        "member-assign-features",
        commands.member_assign_features,
        arguments=Object({**by_id, "features": INT}),
        returns=Object({"features": INT, "assignable": nullable(INT)}),
    )
    registry.add(
        "member-notify-info",
        commands.member_notify_info,
        arguments=Object(by_id),
        returns=Array(Object({"place": Enum(("owner", "member")), "bar": INT, "offset": INT})),
    )
    registry.add(
        "query-trace",
        commands.query_trace,
        arguments=Object({"*id": INT, "*since": INT, "*limit": INT}),
        returns=TRACE,
    )
    registry.add("trace-events", commands.trace_events, arguments=Object({"*id": INT, "enable": BOOL}))


class _Commands:
    """One method for each command; a GroupError is what the client did wrong, so it gets its text."""

    def __init__(self, group: Group, server: QMPServer | None) -> None:
        self._group = group
        self._server = server

    def _known(self, member_id: int) -> int:
        if member_id not in self._group.member_ids:
            raise CommandError(f"Member {member_id} not found", "DeviceNotFound")
        return member_id

    async def query_group(self) -> object:
        return kebab(self._group.query_group())

    async def query_members(self) -> object:
        return kebab(self._group.query_members())

    async def query_member(self, id: int, qemu_qmp: str | None = None, qom_path: str | None = None) -> object:
        answer = kebab(self._group.query_member(self._known(id)))
        if qom_path is not None and qemu_qmp is None:
            raise CommandError("Parameter 'qom-path' needs 'qemu-qmp'")
        if qemu_qmp is not None:
            # asyncio and its friends: not for a server that is to be there in a moment
            from .qemu_view import ask_qemu

            answer["qemu"] = await ask_qemu(qemu_qmp, qom_path, answer)
        return answer

    async def query_statistics(self) -> object:
        assert self._server is not None
        values = await self._group.query_statistics()
        return kebab({**values, "qmp": dataclasses.asdict(self._server.statistics())})

    async def member_add(self, *, id: int | None = None, **values: Any) -> object:
        try:
            config = await self._group.parse_member(values, id)
            path = await self._group.member_add(config)
        except GroupError as error:
            raise CommandError(str(error)) from error
        sockets = [function["socket"] for function in self._group.query_member(config.id)["functions"]]
        return {"id": config.id, "vhost-user": str(path), **({"vfio-user": sockets} if sockets else {})}

    async def member_del(self, id: int, force: bool = False) -> object:
        try:
            await self._group.member_del(self._known(id), force=force)
        except GroupError as error:
            raise CommandError(str(error)) from error
        return {}

    async def member_modify(self, id: int, **changes: Any) -> object:
        try:
            told = await self._group.member_modify(self._known(id), **changes)
        except GroupError as error:
            raise CommandError(str(error)) from error
        return {"driver-told": told}

    async def query_vhost_user_devices(self) -> object:
        return kebab(self._group.query_vhost_user_devices())

    async def quit(self) -> object:
        return Reply({}, self._group.request_stop)

    async def upgrade(self, *, python: str | None = None, force: bool = False) -> object:
        from . import upgrade

        try:
            successor = await upgrade.hand_over(self._group, python=python, force=force)
        except GroupError as error:
            raise CommandError(str(error)) from error
        return Reply(kebab(upgrade.describe(successor)), self._group.request_stop)

    # --- the owner ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _owner(self, queue: int = 0) -> AsyncIterator[OwnerDriver]:
        """What the device, or the group, refuses in here is the client's to know."""
        try:
            yield await self._group.shared_owner(queue)
        except (AdminError, GroupError, ValueError) as error:
            raise CommandError(str(error)) from error

    async def query_owner(self) -> object:
        return kebab(self._group.query_owner())

    async def owner_set_vfs(self, enable: bool | None = None, num_vfs: int | None = None) -> object:
        if enable is None and num_vfs is None:
            raise CommandError("nothing to set; allowed: enable, num-vfs")
        try:
            self._group.set_vfs(enable=enable, num_vfs=num_vfs)
        except GroupError as error:
            raise CommandError(str(error)) from error
        return {}

    async def owner_command(
        self,
        opcode: int,
        group_type: int = 1,
        member: int = 0,
        data: str = "",
        result_size: int = 0,
        queue: int = 0,
    ) -> object:
        command = Command(opcode, group_type, member, _hex(data, "data"))
        if not 0 <= result_size <= MAX_PAYLOAD:
            raise CommandError(f"Parameter 'result-size' expects a number from 0 to {MAX_PAYLOAD}")
        async with self._owner(queue) as owner:
            result = await owner.execute(command, result_size)
        return {
            "status": {"value": int(result.status), "name": result.status.name},
            "qualifier": {"value": int(result.qualifier), "name": result.qualifier.name},
            "written": len(result.result) + RESULT_HEADER_SIZE,
            "result": result.result.hex(),
        }

    async def member_legacy_read(self, id: int, space: str, offset: int, length: int) -> object:
        if not 0 <= length <= MAX_PAYLOAD:
            raise CommandError(f"Parameter 'length' expects a number from 0 to {MAX_PAYLOAD}")
        async with self._owner() as owner:
            read = owner.legacy_common_read if space == "common" else owner.legacy_device_read
            data = await read(self._known(id), offset, length)
        return {"data": data.hex(), "value": int.from_bytes(data[:8], "little")}

    async def member_legacy_write(self, id: int, space: str, offset: int, data: str) -> object:
        payload = _hex(data, "data")
        async with self._owner() as owner:
            write = owner.legacy_common_write if space == "common" else owner.legacy_device_write
            await write(self._known(id), offset, payload)
        return {}

    async def member_stop(self, id: int) -> object:
        async with self._owner() as owner:
            await owner.stop(self._known(id))
        return {}

    async def member_resume(self, id: int) -> object:
        async with self._owner() as owner:
            await owner.resume(self._known(id))
        return {}

    async def member_parts_get(self, id: int) -> object:
        async with self._owner() as owner:
            data = await owner.save_parts(self._known(id))
        return {"data": base64.b64encode(data).decode(), "parts": [_part(part) for part in parts_in(data)]}

    async def member_parts_set(self, id: int, data: str) -> object:
        try:
            parts = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise CommandError("Parameter 'data' expects base64 text") from None
        async with self._owner() as owner:
            await owner.load_parts(self._known(id), parts)
        return {}

    async def member_assign_features(self, id: int, features: int) -> object:
        if features < 0:
            raise CommandError("Parameter 'features' expects 64 bits")
        async with self._owner() as owner:
            attributes = await owner.device_management_attributes(self._known(id))
            value = await owner.assign_features(id, features)
        return {"features": value, "assignable": attributes.features}

    async def member_notify_info(self, id: int) -> object:
        async with self._owner() as owner:
            return [_notify_region(info) for info in await owner.legacy_notify_info(self._known(id))]

    async def query_trace(self, id: int | None = None, since: int = 0, limit: int = 1000) -> object:
        if id is not None:
            self._known_device(id)
        try:
            return kebab(self._group.trace(id, since=since, limit=limit))
        except GroupError as error:
            raise CommandError(str(error)) from error

    async def trace_events(self, enable: bool, id: int | None = None) -> object:
        if id is not None and enable:
            self._known_device(id)
        self._group.trace_events(id, enable=enable)
        return {}

    def _known_device(self, id: int) -> None:
        """As `_known`, but 0 is the owner."""
        if id != 0:
            self._known(id)


def _hex(text: str, name: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise CommandError(f"Parameter '{name}' expects pairs of hexadecimal digits") from None
    if len(data) > MAX_PAYLOAD:
        raise CommandError(f"Parameter '{name}' expects at most {MAX_PAYLOAD} bytes")
    return data


def _notify_region(info: NotifyInfo) -> dict[str, Any]:
    return {"place": info.place.name.lower(), "bar": info.bar, "offset": info.offset}


def _part(part: DevicePart) -> dict[str, Any]:
    header = part.header
    value = part.decoded()
    return {
        "type": part.type,
        "name": header.name,
        "index": header.index,
        "optional": part.optional,
        "data": part.value.hex(),
        "value": kebab(dataclasses.asdict(value)) if isinstance(value, (VqConfig, VqNotifyConfig)) else value,
    }
