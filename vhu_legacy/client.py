# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A client of a running group: find it, talk QMP to it. What the command line and other programs use.

The protocol is done by `qemu.qmp`, which is asyncio; `trio-asyncio` bridges to it. The event history that
`QMPClient` would keep without bound is switched off.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import trio
import trio_asyncio  # type: ignore[import-untyped]
from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from .errors import ClientError, single
from .rundir import QMP_SOCKET, default_run_dir, pid_of_lock, run_base, running_groups

__all__ = ["EventFeed", "GroupClient", "connect", "find_group"]

CONNECT_TIMEOUT: Final = 5.0
REPLY_TIMEOUT: Final = 60.0
"""Longer than anything a group lets a command take, so that its own message about the delay arrives first."""
EVENT_LIMIT: Final = 4096

# its loggers report as errors what is raised here anyway
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


def find_group(name: str | None = None, run_dir: Path | None = None) -> Path:
    """The run directory of a running group: by directory, by name, or the only one there is.

    Raises ClientError, which says what was looked for, where, and what is running. Touches the file system.
    """
    if run_dir is not None:
        if not (run_dir / QMP_SOCKET).exists():
            raise ClientError(f"no group is running in {run_dir}: there is no {QMP_SOCKET}")
        return run_dir
    if name is not None:
        directory = default_run_dir(name)
        if pid_of_lock(directory) is None:
            others = [group.name for group in running_groups()]
            hint = f"; running: {', '.join(others)}" if others else ""
            raise ClientError(f"no group {name!r} is running in {directory}{hint}; or use --run-dir DIR")
        return directory
    groups = running_groups()
    if not groups:
        hint = "start one with `vhu-legacy serve FILE`, or use --run-dir DIR"
        raise ClientError(f"no group is running in {run_base()}; {hint}")
    if len(groups) > 1:
        names = ", ".join(group.name for group in groups)
        raise ClientError(f"several groups are running: {names}; choose one with --group NAME")
    return groups[0].run_dir


class EventFeed:
    """The events from now on, bounded; async iteration ends with the connection."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[dict[str, Any]](EVENT_LIMIT)
        self.listener = _Listener(self._send)

    @property
    def lost(self) -> int:
        """Events that nobody fetched in time."""
        return self.listener.lost

    def end(self) -> None:
        """No more will come; what is there can still be fetched."""
        self._send.close()

    def __aiter__(self) -> EventFeed:
        return self

    async def __anext__(self) -> dict[str, Any]:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class _Listener(EventListener):
    """Hands events over to trio instead of keeping them."""

    def __init__(self, channel: trio.MemorySendChannel[dict[str, Any]]) -> None:
        super().__init__()
        self._channel = channel
        self.lost = 0

    async def put(self, event: Message) -> None:
        # called by the connection's reader: waiting here would hold up the replies, too
        try:
            self._channel.send_nowait(dict(event))
        except trio.WouldBlock:
            self.lost += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


class GroupClient:
    """A connection to a group. Made by `connect`."""

    def __init__(self, client: QMPClient, path: Path) -> None:
        self._client = client
        self.path = path

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Run a command and return what it returns.

        Raises ClientError when the group refuses it, or goes away. When cancelled, the command may still be
        done.
        """
        try:
            with trio.fail_after(REPLY_TIMEOUT):
                return await trio_asyncio.aio_as_trio(self._client.execute)(command, arguments)
        except ExecuteError as error:
            raise ClientError(str(error), error_class=error.error_class) from error
        except trio.TooSlowError:
            raise ClientError(f"the group at {self.path} gave no answer within {REPLY_TIMEOUT:.0f} s") from None
        except (QMPError, OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
            raise ClientError(f"lost the connection to the group at {self.path}: {reason}") from error

    async def query_group(self) -> dict[str, Any]:
        """The group as a whole."""
        answer: dict[str, Any] = await self.execute("query-group")
        return answer

    async def query_members(self) -> list[dict[str, Any]]:
        """One summary for each member."""
        answer: list[dict[str, Any]] = await self.execute("query-members")
        return answer

    async def query_member(
        self, member_id: int, *, qemu_qmp: str | None = None, qom_path: str | None = None
    ) -> dict[str, Any]:
        """Everything about one member, with QEMU's side of its queues if QEMU's monitor is named."""
        arguments: dict[str, object] = {"id": member_id}
        if qemu_qmp is not None:
            arguments["qemu-qmp"] = qemu_qmp
        if qom_path is not None:
            arguments["qom-path"] = qom_path
        answer: dict[str, Any] = await self.execute("query-member", arguments)
        return answer

    async def query_vhost_user_devices(self) -> list[dict[str, Any]]:
        """Everything about each virtio-vhost-user device."""
        answer: list[dict[str, Any]] = await self.execute("query-vhost-user-devices")
        return answer

    async def query_statistics(self) -> dict[str, Any]:
        """Counters of the group."""
        answer: dict[str, Any] = await self.execute("query-statistics")
        return answer

    async def member_add(self, **values: object) -> dict[str, Any]:
        """Add a member; the arguments are those of `member-add`, with '_' for '-'."""
        arguments = {key.replace("_", "-"): value for key, value in values.items()}
        answer: dict[str, Any] = await self.execute("member-add", arguments)
        return answer

    async def member_del(self, member_id: int, *, force: bool = False) -> None:
        """Remove a member."""
        await self.execute("member-del", {"id": member_id, "force": force})

    async def member_modify(self, member_id: int, **values: object) -> bool:
        """Change a member's image, size or read_only, or provision it (legacy, serial, features).

        Returns whether its driver was told.
        """
        arguments = {"id": member_id} | {key.replace("_", "-"): value for key, value in values.items()}
        return bool((await self.execute("member-modify", arguments))["driver-told"])

    # --- the owner ----------------------------------------------------------------------------------------

    async def query_owner(self) -> dict[str, Any]:
        """The owner: groups, lists, objects, queues, and its own device."""
        answer: dict[str, Any] = await self.execute("query-owner")
        return answer

    async def owner_set_vfs(self, *, enable: bool | None = None, num_vfs: int | None = None) -> None:
        """Set VF Enable and NumVFs."""
        arguments = {"enable": enable, "num-vfs": num_vfs}
        await self.execute("owner-set-vfs", {key: value for key, value in arguments.items() if value is not None})

    async def owner_command(
        self,
        opcode: int,
        *,
        group_type: int = 1,
        member: int = 0,
        data: bytes = b"",
        result_size: int = 0,
        queue: int = 0,
    ) -> dict[str, Any]:
        """One administration command as it is; status, qualifier and result (hexadecimal), whatever they are."""
        arguments: dict[str, object] = {
            "opcode": opcode,
            "group-type": group_type,
            "member": member,
            "data": data.hex(),
            "result-size": result_size,
            "queue": queue,
        }
        answer: dict[str, Any] = await self.execute("owner-command", arguments)
        return answer

    async def legacy_read(
        self, member_id: int, offset: int, length: int, *, space: Literal["common", "device"] = "common"
    ) -> bytes:
        """A legacy register, or a part of one; or the device configuration, one field or a part of one."""
        arguments: dict[str, object] = {"id": member_id, "space": space, "offset": offset, "length": length}
        return bytes.fromhex((await self.execute("member-legacy-read", arguments))["data"])

    async def legacy_write(
        self, member_id: int, offset: int, data: bytes, *, space: Literal["common", "device"] = "common"
    ) -> None:
        """As a write of these bytes to I/O BAR0."""
        arguments: dict[str, object] = {"id": member_id, "space": space, "offset": offset, "data": data.hex()}
        await self.execute("member-legacy-write", arguments)

    async def member_stop(self, member_id: int) -> None:
        """Stop a member."""
        await self.execute("member-stop", {"id": member_id})

    async def member_resume(self, member_id: int) -> None:
        """Let it go on."""
        await self.execute("member-resume", {"id": member_id})

    async def parts_get(self, member_id: int) -> tuple[bytes, list[dict[str, Any]]]:
        """A member's device parts: as they are, and taken apart."""
        answer = await self.execute("member-parts-get", {"id": member_id})
        return base64.b64decode(answer["data"]), answer["parts"]

    async def parts_set(self, member_id: int, parts: bytes) -> None:
        """Set the parts of a stopped member."""
        await self.execute("member-parts-set", {"id": member_id, "data": base64.b64encode(parts).decode()})

    async def assign_features(self, member_id: int, features: int) -> dict[str, Any]:
        """Choose the feature bits a member offers: `features` as they are now, and those that are `assignable`."""
        answer: dict[str, Any] = await self.execute("member-assign-features", {"id": member_id, "features": features})
        return answer

    async def notify_info(self, member_id: int) -> list[dict[str, Any]]:
        """Where queue notifications of a member may be written: `place`, `bar` and `offset` of each."""
        answer: list[dict[str, Any]] = await self.execute("member-notify-info", {"id": member_id})
        return answer

    async def query_trace(self, member_id: int | None = None, *, since: int = 0, limit: int = 1000) -> dict[str, Any]:
        """Register accesses from number `since` on: `entries`, `next` and `lost`."""
        arguments: dict[str, object] = {"since": since, "limit": limit}
        if member_id is not None:
            arguments["id"] = member_id
        answer: dict[str, Any] = await self.execute("query-trace", arguments)
        return answer

    async def trace_events(self, member_id: int | None = None, *, enable: bool) -> None:
        """Have REGISTER_ACCESS events sent to all clients, or no more."""
        arguments: dict[str, object] = {"enable": enable}
        if member_id is not None:
            arguments["id"] = member_id
        await self.execute("trace-events", arguments)

    async def quit(self) -> None:
        """End the group."""
        await self.execute("quit")

    @asynccontextmanager
    async def events(self) -> AsyncIterator[EventFeed]:
        """The group's events from now on: `async for event in feed`. It ends when the group does."""
        feed = EventFeed()
        self._client.register_listener(feed.listener)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_with_connection, feed)
                yield feed
                nursery.cancel_scope.cancel()
        finally:
            self._client.remove_listener(feed.listener)
            feed.end()

    async def _end_with_connection(self, feed: EventFeed) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await trio_asyncio.aio_as_trio(self._client.runstate_changed)()
        feed.end()


@asynccontextmanager
async def connect(run_dir: Path) -> AsyncIterator[GroupClient]:
    """Connect to the group in this run directory. Raises ClientError when nobody answers there."""
    try:
        async with _connect(run_dir / QMP_SOCKET) as client:
            yield client
    except BaseExceptionGroup as errors:
        # the asyncio loop's nurseries wrap what was raised in them
        error = single(errors)
        raise error from error.__cause__


@asynccontextmanager
async def _connect(path: Path) -> AsyncIterator[GroupClient]:
    async with trio_asyncio.open_loop():
        client = QMPClient("vhu-legacy")
        client.events.event_filter = lambda event: False
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await trio_asyncio.aio_as_trio(client.connect)(str(path))
        except trio.TooSlowError:
            raise ClientError(f"the group at {path} gave no answer within {CONNECT_TIMEOUT:.0f} s") from None
        except (QMPError, OSError, EOFError) as error:
            cause = getattr(error, "exc", error)
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            raise ClientError(f"can't connect to the group at {path}: {reason}") from error
        try:
            yield GroupClient(client, path)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CONNECT_TIMEOUT):
                await _disconnect(client)


async def _disconnect(client: QMPClient) -> None:
    # a group that ended first is no error here: whoever waited for an answer has been told
    with suppress(QMPError, OSError, EOFError):
        await trio_asyncio.aio_as_trio(client.disconnect)()
