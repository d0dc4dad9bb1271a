# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A running group: its run directory, its members and their listeners, its events.

Nesting, from the outside in: the run directory's lock; the native pool; the event hub's task; the tasks of the owner
and the members. Everything inside is gone before what is around it goes, also when the whole is cancelled: a member
that lets go of its front end waits for rings to drain, which the hub has to report, so the hub is shielded
until the last one is out.

Sockets go first, then what is behind them: a PCI function's client is dropped and drained before its member is closed,
and all members before the device group and the pool.

An operation on a member (`member_add`, `member_del`, `member_modify`) runs in a task of the group. Whoever
asked for it may be cancelled in the middle (a QMP client that hangs up); the operation itself still ends in a
known state.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import resource
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import outcome
import trio

from . import _native, state
from .admin import AdminError, Command, Opcode
from .backend import Host, VhostUserServer
from .config import (
    MAX_MEMBER_ID,
    SERIAL_BYTES,
    GroupConfig,
    MemberConfig,
    OwnerConfig,
    image_identity,
    is_serial,
    parse_member,
    resolve_image,
)
from .doorbells import EventHub
from .errors import ConfigError, GroupError, MemberError, Problem, StateError, single
from .functions import MEMBER_FUNCTIONS, FunctionKind, FunctionServer, function_kinds
from .owner import OwnerDriver, OwnerLink
from .reactor import Reactor
from .relay import RelayDevice
from .rundir import QMP_SOCKET, RunDir, default_run_dir, function_socket_name, socket_name, too_long
from .state import Kept
from .vvu_view import describe

__all__ = ["ENGINES", "Engine", "EventStream", "Group", "GroupEvent", "open_group"]

log = logging.getLogger(__name__)
T = TypeVar("T")

if TYPE_CHECKING:
    from .qmp import QMPServer
    from .upgrade import TakeOver

Engine = Literal["native", "rust-vmm"]
ENGINES: Final[tuple[Engine, ...]] = ("native", "rust-vmm")

REQUEST_COUNTERS: Final = (
    "in",
    "out",
    "flush",
    "get_id",
    "discard",
    "write_zeroes",
    "unsupported",
    "failed",
    "bytes_read",
    "bytes_written",
)
EVENT_BURST: Final = 32
"""Events of one kind and member that are told at once; beyond, they are merged and paced."""
EVENT_RATE: Final = 10
"""Events of one kind and member a second, then."""
PACES: Final = 256
"""Kinds and members whose pace is kept before it is looked whether that is still needed."""
DRAIN_TIMEOUT: Final = 10.0
"""Seconds that a member gets to finish what its rings have in flight, before it is reported as still
draining.
"""
CLOSE_TIMEOUT: Final = 10.0
LISTEN_TIMEOUT: Final = 5.0
LISTEN_ERRORS: Final = (OSError, ValueError, _native.NativeError)
OWNER: Final = 0
"""The owner's number among the devices of a group; members begin at 1."""
FIRST_RELAY: Final = 1 << 20
"""Numbers of virtio-vhost-user devices in native events; members' have 16 bits."""
TRACE_INTERVAL: Final = 0.1
"""Seconds between two events with register accesses, while there are any."""
TRACE_BATCH: Final = 500
"""Register accesses in one event."""
NOBODY: Final = 0xFFFFFFFF
"""A number that no member can have."""
MAX_TRACE: Final = 4096
"""Register accesses in one answer."""
OPEN_BATCH: Final = 256
"""Members that are opened together at the start."""
LOCK_PATIENCE: Final = 5.0
"""Seconds that an image may stay locked by requests of a process that was killed."""
LOCK_INTERVAL: Final = 0.002
IN_USE: Final = "in use by another member or process"
ASSIGNMENT_INTERVAL: Final = 1.0
"""Seconds between two looks at what a guest that drives the owner has assigned."""
RESERVED_FDS: Final = 128
"""Descriptors for everything that isn't a member: the pool, the QMP clients, Python."""
MANY_FDS: Final = RESERVED_FDS + 4096 * 18
"""What 4,096 members with four queues may need. A hard limit below it is raised by who may."""


@dataclass(frozen=True, slots=True)
class GroupEvent:
    """Something happened to a member.

    Kinds: "added", "deleted", "connected" {peer_pid, function}, "disconnected" {reason, function}, "status" {old, new},
    "broken" {rule, reason, queue}, "config" {}. `function` is there when it was one of the member's PCI functions.

    Of the owner (member 0): "owner-connected", "owner-disconnected", "owner-status", "owner-broken", "owner-config",
    with the same data. Of the group (member 0): "trace" {entries, lost}.
    """

    kind: str
    member: int
    data: Mapping[str, Any]
    at: float = field(default_factory=time.time)


class EventStream:
    """A bounded view of a group's events: `async for event in stream`. The oldest go first when nobody reads."""

    def __init__(self, limit: int) -> None:
        self._events: deque[GroupEvent] = deque(maxlen=limit)
        self._waiting = trio.lowlevel.ParkingLot()
        self.lost = 0
        """Events that were thrown away because the stream was full."""

    def put(self, event: GroupEvent) -> None:
        if len(self._events) == self._events.maxlen:
            self.lost += 1
        self._events.append(event)
        self._waiting.unpark()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> GroupEvent:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._events:
            await self._waiting.park()
        return self._events.popleft()


class _Pace:
    """How often something may happen: a burst, then a steady rate."""

    __slots__ = ("_since", "_tokens")

    def __init__(self) -> None:
        self._tokens = float(EVENT_BURST)
        self._since: float | None = None

    def take(self, now: float) -> bool:
        if self._since is not None:
            self._tokens = min(EVENT_BURST, self._tokens + (now - self._since) * EVENT_RATE)
        self._since = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def rested(self, now: float) -> bool:
        """Whether it is as good as new."""
        return self._since is None or self._tokens + (now - self._since) * EVENT_RATE >= EVENT_BURST


@dataclass(eq=False, slots=True)
class _Device:
    """What owner and members have in common: a native device, its image, its PCI functions."""

    member: _native.Member
    identity: tuple[int, int] | None
    """Of the image: two devices with the same one share the file, whatever they call it."""
    functions: dict[FunctionKind, FunctionServer] = field(default_factory=dict, kw_only=True)
    scope: trio.CancelScope | None = field(default=None, kw_only=True)
    """Of its task, where it has one: the owner, and members that the stock daemon serves."""
    ended: trio.Event | None = field(default=None, kw_only=True)
    """That task's end."""
    stopped: bool = field(default=False, kw_only=True)
    """Nothing can connect to it any more."""
    peer_pid: int | None = field(default=None, kw_only=True)
    peer_function: FunctionKind | None = field(default=None, kw_only=True)
    """Which function that process is a client of; None for the vhost-user socket."""
    broken_logged: float = field(default=-math.inf, kw_only=True)


@dataclass(eq=False, slots=True)
class _Owner(_Device):
    """The owner's own device."""

    config: OwnerConfig


@dataclass(eq=False, slots=True)
class _Slot(_Device):
    """One member and what serves it."""

    config: MemberConfig
    directory: Path
    """Where its sockets are."""
    server: VhostUserServer | None
    changing: trio.Lock | None = field(default=None, kw_only=True)
    """Held by who changes it; made by the first."""
    gone: bool = field(default=False, kw_only=True)
    listener: int | None = field(default=None, kw_only=True)
    """The listening socket that a predecessor has handed over."""
    serving: bool = field(default=False, kw_only=True)
    """It has been started, and the group sees to its end."""

    @property
    def path(self) -> Path:
        """Its vhost-user socket; not kept, since a path takes more memory than all of this."""
        return self.directory / socket_name(self.config.id)

    @property
    def lock(self) -> trio.Lock:
        """For who changes it."""
        if self.changing is None:
            self.changing = trio.Lock()
        return self.changing


class _Keeper:
    """Has the differences against the group file on disk (`state`), for who serves this run directory next."""

    def __init__(self, config: GroupConfig, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self._kept: dict[int, Kept] = {}
        self._lock = trio.Lock()
        self._asked = 0
        self._written = 0

    def begin(self, kept: Iterable[Kept]) -> None:
        """What is served from the start."""
        self._kept = {entry.config.id: entry for entry in kept}

    def features(self, member_id: int) -> int | None:
        """The features that a member is kept with."""
        entry = self._kept.get(member_id)
        return None if entry is None else entry.features

    async def keep(self, config: MemberConfig, features: int | None) -> None:
        """A member is served like this from now on. Returns when that is on disk.

        Raises OSError: it isn't yet, but will be with whatever is kept next.
        """
        self._kept[config.id] = Kept(config, features)
        await self.save()

    async def keep_features(self, found: Mapping[int, int | None]) -> None:
        """These members are assigned these features. As `keep`."""
        changes = {
            member_id: replace(entry, features=features)
            for member_id, features in found.items()
            if (entry := self._kept.get(member_id)) is not None and entry.features != features
        }
        if changes:
            self._kept.update(changes)
            await self.save()

    async def forget(self, member_id: int) -> None:
        """A member isn't served any more. As `keep`."""
        if self._kept.pop(member_id, None) is not None:
            await self.save()

    def drop(self, member_id: int) -> None:
        """As `forget`, for a member that never got to the disk."""
        self._kept.pop(member_id, None)

    async def save(self) -> None:
        """Returns when the disk has what was kept at the time of the call. Who asks while a file is being written is
        served by the next one, together with all others that wait."""
        self._asked += 1
        mine = self._asked
        async with self._lock:
            if self._written >= mine:
                return
            covered = self._asked
            differences = state.difference(self._config.members, self._kept)
            # a thread can't be cancelled, and isn't left behind: the next writer comes after it
            await trio.to_thread.run_sync(state.write, self._directory, differences, self._config.name)
            self._written = covered


class Group:
    """A group being served. Made by `open_group`; methods are for the trio thread."""

    def __init__(self, config: GroupConfig, run_dir: Path, engine: Engine, pool: _native.Pool, hub: EventHub) -> None:
        self.config = config
        self.run_dir = run_dir
        self.engine: Engine = engine
        self.started_at = time.time()
        self.stopping = trio.Event()
        """Set by `request_stop`: whoever holds the group open is asked to close it."""
        self._pool = pool
        self._hub = hub
        self._nursery: trio.Nursery | None = None
        self._reactor = Reactor()
        self._host = Host(run_dir, hub, self._reactor, self._spawn, self._connection_event, self._server_failed)
        self._slots: dict[int, _Slot] = {}
        self._reserved: set[int] = set()
        self._promised_ids: set[int] = set()
        self._fds_promised = 0
        self._image_users: dict[tuple[int, int], dict[int, bool]] = {}
        """Who uses an image, by what makes it the same one; and whether only to read."""
        self._callbacks: list[Callable[[GroupEvent], None]] = []
        self._event_count = 0
        self._paces: dict[tuple[str, int], _Pace] = {}
        self._most_paces = PACES
        self._held: dict[tuple[str, int], dict[str, Any]] = {}
        self._held_some = trio.Event()
        self._owner: _Owner | None = None
        self._traced: set[int | None] = set()
        self._traced_some = trio.Event()
        self._keeper = _Keeper(config, run_dir)
        self.handing_over = False
        """A new process is about to take over: members can't be changed."""
        self.left = False
        """A new process serves all of it."""
        self.first = True
        """No other process has served it before, of which front ends could know."""
        self.lock_fd = -1
        """The lock file's descriptor, while the run directory is ours."""
        self.qmp_fd: int | None = None
        """The listening socket for QMP that a predecessor has handed over; None: it is to be bound."""
        self.qmp: QMPServer | None = None
        """The server on it."""
        self.supervisor_pid: int | None = None
        self._relays: dict[int, RelayDevice] = {}
        """virtio-vhost-user devices by their number in native events, which no member can have."""
        self._relays_logged: dict[int, float] = {}
        """When it was last logged that one is broken."""
        self._relay_scopes: dict[int, tuple[trio.CancelScope, trio.Event]] = {}
        """Of their tasks, and these tasks' ends."""
        self._operations = 0
        self._settled = trio.Event()
        self._patient_until = -math.inf
        """How long an image may be in use by what is left of a killed process."""
        try:
            self._device = _native.DeviceGroup(
                pool,
                strict=config.strict,
                feature_management=config.feature_management,
                admin_queues=config.admin_queues,
                notify_region=config.notify_region,
                compat=config.switches.as_dict(),
            )
        except (_native.NativeError, ValueError, OSError) as error:
            raise GroupError(f"the device group can't be made: {error}") from error
        self._link = OwnerLink(self._device, hub, self._spawn, self._after_command)
        hub.subscribe(self._native_event)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def qmp_path(self) -> Path:
        """Where the group's QMP socket belongs."""
        return self.run_dir / QMP_SOCKET

    @property
    def member_ids(self) -> tuple[int, ...]:
        return tuple(sorted(self._slots))

    def socket_path(self, member_id: int) -> Path:
        """A member's vhost-user socket. Raises MemberError when there is no such member."""
        return self._slot(member_id).path

    def function_path(self, member_id: int, kind: FunctionKind) -> Path:
        """The vfio-user socket of one of a member's PCI functions; of the owner's for member 0 and "owner".

        Raises MemberError (GroupError for the owner) when there is no such function.
        """
        device: _Device | None = self._owner if member_id == OWNER else self._slot(member_id)
        server = None if device is None else device.functions.get(kind)
        if server is not None:
            return server.path
        if member_id == OWNER:
            raise GroupError("the owner isn't served over vfio-user; its table needs vfio_user = true")
        raise MemberError(member_id, f"there is no {kind} function; its table needs vfio_user = true")

    def owner_driver(self, queue: int = 0) -> AbstractAsyncContextManager[OwnerDriver]:
        """A driver on one of the owner's in-process administration virtqueues: `async with ... as owner`.

        On entering, it puts all commands of both groups in use. Any number may be open at a time. Raises GroupError
        for a queue that the owner doesn't have.
        """
        self._check_admin_queue(queue)
        return self._link.driver(queue)

    async def shared_owner(self, queue: int = 0) -> OwnerDriver:
        """As `owner_driver`, but one that stays open: for commands that come one by one. Raises GroupError."""
        self._check_admin_queue(queue)
        return await self._link.shared(queue)

    def _check_admin_queue(self, queue: int) -> None:
        if not 0 <= queue < self.config.admin_queues:
            allowed = f"0 to {self.config.admin_queues - 1}"
            raise GroupError(f"administration queue {queue} isn't there; allowed: {allowed}")

    def _spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        # without a nursery the group is ending, and with it whatever there is to clean up
        if self._nursery is not None:
            self._nursery.start_soon(task)

    def request_stop(self) -> None:
        """Ask for the end of the group (QMP `quit`). Returns at once."""
        self.stopping.set()

    # --- events -------------------------------------------------------------------------------------------

    def subscribe(self, callback: Callable[[GroupEvent], None]) -> Callable[[], None]:
        """Have a function called for each event, on the trio thread; it must neither block nor raise.

        Returns a function that ends the subscription.
        """
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    @contextmanager
    def listen(self, limit: int = 256) -> Iterator[EventStream]:
        """A stream of the events from now on, of bounded size."""
        stream = EventStream(limit)
        end = self.subscribe(stream.put)
        try:
            yield stream
        finally:
            end()

    def _native_event(self, kind: str, member_id: int, data: dict[str, Any]) -> None:
        relay = self._relays.get(member_id)
        if relay is not None:
            relay.native_event(kind, data)
            return
        device = self._device_of(member_id)
        if device is None:
            return
        if kind in ("function-connected", "function-disconnected"):
            self._connection_event(kind.removeprefix("function-"), member_id, data)
            return
        if kind not in ("status", "broken", "config"):
            return
        if kind == "broken":
            self._log_broken(device, member_id, data)
            # DEVICE_NEEDS_RESET comes with a configuration interrupt
            device.member.config_changed()
        self._emit_paced(_kind_of(kind, member_id), member_id, data)

    def _connection_event(self, kind: str, member_id: int, data: dict[str, Any]) -> None:
        device = self._device_of(member_id)
        if device is None:
            return
        function = data.get("function")
        if kind == "connected":
            device.peer_pid = data.get("peer_pid")
            device.peer_function = function
        elif device.peer_function == function:
            # of vhost-user we hear at once, of functions a moment later: the next one may be there already
            device.peer_pid = None
        if not self._emit_paced(_kind_of(kind, member_id), member_id, data):
            return
        where = f" ({function})" if member_id != OWNER and function is not None else ""
        if kind == "connected":
            log.info("%s%s: connected, pid %s", _label(member_id), where, data.get("peer_pid"))
        else:
            log.info("%s%s: disconnected: %s", _label(member_id), where, data.get("reason"))

    def _device_of(self, member_id: int) -> _Device | None:
        return self._owner if member_id == OWNER else self._slots.get(member_id)

    # --- virtio-vhost-user devices ------------------------------------------------------------------------

    async def serve_vhost_user_devices(self) -> None:
        """Serve those of the group file that aren't served. Raises GroupError; those before it are served then."""
        # as for the owner: without the tasks' nursery nobody would close them
        await trio.lowlevel.checkpoint()
        if self._nursery is None:
            raise GroupError("the group is stopping")
        for number, config in enumerate(self.config.vhost_user_devices, FIRST_RELAY):
            if number in self._relays:
                continue
            try:
                relay = RelayDevice(
                    config,
                    number,
                    self._pool,
                    self._host,
                    functools.partial(self._relay_event, number, config.name),
                    first=self.first,
                )
                self._relays[number] = relay
                relay.start()
            except (_native.NativeError, OSError, ValueError) as error:
                started = self._relays.pop(number, None)
                if started is not None:
                    await started.aclose()
                raise GroupError(f"virtio-vhost-user device {config.name}: {error}") from error
            scope, ended = self._relay_scopes[number] = (trio.CancelScope(), trio.Event())
            self._spawn(functools.partial(self._run_relay, relay, scope, ended))
            log.info("device %s: masters at %s", config.name, relay.socket_path("front"))

    async def _run_relay(self, relay: RelayDevice, scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            with scope:
                await relay.run()
        except Exception:
            # a bug; the other devices and members go on
            log.exception("device %s: its relay failed; no master can connect any more", relay.config.name)
        finally:
            await relay.aclose()
            ended.set()

    async def close_vhost_user_devices(self) -> None:
        """Close their sockets, and drop who is connected. Bounded; not cancelled."""
        with trio.CancelScope(shield=True):
            for number, (scope, ended) in list(self._relay_scopes.items()):
                scope.cancel()
                await ended.wait()
                self._relays.pop(number, None)
                self._relay_scopes.pop(number, None)

    def vhost_user_devices_in_use(self) -> list[str]:
        """Names of those that a backend VM or a master is connected to."""
        return [relay.config.name for relay in self._relays.values() if relay.in_use]

    def query_vhost_user_devices(self) -> list[dict[str, Any]]:
        """Everything about the virtio-vhost-user devices."""
        return [describe(relay.config, relay.native.info(), relay.place()) for relay in self._relays.values()]

    def _relay_event(self, number: int, name: str, kind: str, data: Mapping[str, Any]) -> None:
        kind = "device-broken" if kind == "broken" else kind
        now = trio.current_time()
        # as of members: the log shall not be a guest's to fill
        if kind == "device-broken" and now - self._relays_logged.get(number, -math.inf) >= 10.0:
            self._relays_logged[number] = now
            log.warning("device %s: broken: %s: %s", name, data.get("rule"), data.get("reason"))
        self._emit_paced(kind, number, {"name": name, **data})

    def _log_broken(self, device: _Device, member_id: int, data: Mapping[str, Any]) -> None:
        # a guest can break its device as often as it likes: the log shall not be its to fill
        now = trio.current_time()
        if now - device.broken_logged >= 10.0:
            device.broken_logged = now
            log.warning("%s: broken: %s: %s", _label(member_id), data.get("rule"), data.get("reason"))

    def _emit_paced(self, kind: str, member_id: int, data: Mapping[str, Any]) -> bool:
        """Emit an event that a guest or a front end can cause as often as it likes; False when it is held back.

        A burst passes. Beyond it events of one kind and member are held and merged, and told at a steady pace: whoever
        listens sees the last state and where it began, but can't be drowned (a QMP client that is, is dropped).
        """
        key = (kind, member_id)
        pace = self._paces.get(key)
        if pace is None:
            if len(self._paces) >= self._most_paces:
                self._forget_paces()
            pace = self._paces[key] = _Pace()
        if key not in self._held and pace.take(trio.current_time()):
            self._emit(kind, member_id, data)
            return True
        held = self._held.get(key)
        merged = dict(data)
        if held is not None and "old" in held:
            merged["old"] = held["old"]
        self._held[key] = merged
        self._held_some.set()
        return False

    def _forget_paces(self) -> None:
        """Of most members nothing has been heard for long."""
        now = trio.current_time()
        self._paces = {key: pace for key, pace in self._paces.items() if key in self._held or not pace.rested(now)}
        self._most_paces = max(PACES, 2 * len(self._paces))

    async def _tell_held(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Emit held events when their time has come, until cancelled."""
        task_status.started()
        while True:
            await self._held_some.wait()
            await trio.sleep(1 / EVENT_RATE)
            now = trio.current_time()
            for key in list(self._held):
                if self._paces[key].take(now):
                    self._emit(*key, self._held.pop(key))
            if not self._held:
                self._held_some = trio.Event()

    def _emit(self, kind: str, member_id: int, data: Mapping[str, Any]) -> None:
        event = GroupEvent(kind, member_id, dict(data))
        self._event_count += 1
        for callback in tuple(self._callbacks):
            try:
                callback(event)
            except Exception:
                log.exception("%s: an event listener failed", _label(member_id))

    # --- the register trace -------------------------------------------------------------------------------

    def trace(self, member_id: int | None = None, *, since: int = 0, limit: int = 1000) -> dict[str, Any]:
        """Register accesses and administration commands, oldest first, of one member or of all.

        Returns `entries` from number `since` on, `limit` of them at most; `next`, to be given as `since` the next time;
        and `lost`, how many of those asked for had been overwritten before. Raises MemberError, GroupError.
        """
        if member_id not in (None, OWNER):
            self._slot(member_id)
        if not 0 <= since < 1 << 64:
            raise GroupError(f"since {since} is out of range; allowed: 0, or what the last answer had as next")
        if not 1 <= limit <= MAX_TRACE:
            raise GroupError(f"limit {limit} is out of range; allowed: 1 to {MAX_TRACE}")
        following, lost, entries = self._device.trace(since, limit, member_id)
        return {"next": following, "lost": lost, "entries": entries}

    def trace_events(self, member_id: int | None = None, *, enable: bool) -> None:
        """Have "trace" events emitted from now on, for one member or for all; or no more. Raises MemberError.

        There are at most 10 events a second, each with up to 500 accesses. Enabling twice is as good as once. All are
        what one member is part of: disabling a member changes nothing while all are enabled.
        """
        if enable:
            if member_id not in (None, OWNER):
                self._slot(member_id)
            self._traced.add(member_id)
            self._traced_some.set()
        else:
            self._traced.discard(member_id)

    async def _tell_traces(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Emit the register accesses that somebody asked for, until cancelled."""
        task_status.started()
        while True:
            await self._traced_some.wait()
            # of a member that can't be there is nothing, so what is returned is the next number there will be
            since = self._device.trace(0, 1, NOBODY)[0]
            while self._traced:
                await trio.sleep(TRACE_INTERVAL)
                since, lost, entries = self._device.trace(since, TRACE_BATCH, None)
                if None not in self._traced:
                    entries = [entry for entry in entries if entry["member"] in self._traced]
                if entries or lost:
                    self._emit("trace", OWNER, {"entries": entries, "lost": lost})
            self._traced_some = trio.Event()

    # --- what there is ------------------------------------------------------------------------------------

    def query_group(self) -> dict[str, Any]:
        """The group as a whole, as plain values."""
        config = self.config
        return {
            "name": config.name,
            "source": str(config.source),
            "run_dir": str(self.run_dir),
            "qmp": str(self.qmp_path),
            "pid": os.getpid(),
            "engine": self.engine,
            "strict": config.strict,
            "feature_management": config.feature_management,
            "members": len(self._slots),
            "attached": sum(1 for slot in self._slots.values() if slot.member.attached),
            "started_at": self.started_at,
        }

    def query_owner(self) -> dict[str, Any]:
        """The owner: its groups and queues, and its own device if it has one. Plain values."""
        info = self._device.info()
        # what the PCI function's driver has negotiated is of no interest where there is none
        driver = info.pop("function")
        device = None
        function = None
        if self._owner is not None:
            device = self._device_info(self._owner, OWNER)
            function = next(({**server, **driver} for server in self._functions(self._owner)), None)
        return {
            **info,
            "device": device,
            "function": function,
            "peer_pid": None if self._owner is None else self._owner.peer_pid,
        }

    def set_vfs(self, *, enable: bool | None = None, num_vfs: int | None = None) -> None:
        """Set VF Enable and NumVFs of the owner, as if its SR-IOV capability were written.

        The next member that is added or removed sets both again: NumVFs is the highest number of a member, VF Enable
        says whether there are any. Raises GroupError for a number out of range.
        """
        total: int = self._device.info()["total_vfs"]
        if num_vfs is not None and not 0 <= num_vfs <= total:
            raise GroupError(f"NumVFs {num_vfs} is out of range; allowed: 0 to {total}")
        self._device.set_vfs(enable=enable, num_vfs=num_vfs)

    def query_members(self) -> list[dict[str, Any]]:
        """One line for each member: what a table shows."""
        return [self._summary(self._slots[member_id]) for member_id in self.member_ids]

    def query_member(self, member_id: int) -> dict[str, Any]:
        """Everything about one member. Raises MemberError when there is none."""
        slot = self._slot(member_id)
        return {**self._device_info(slot, member_id), **self._place(slot)}

    async def query_statistics(self) -> dict[str, Any]:
        """Counters of the group: pool, descriptors, events, and the sums of its members' requests."""
        totals = dict.fromkeys(REQUEST_COUNTERS, 0)
        for slot in self._slots.values():
            requests = slot.member.info()["requests"]
            for name in REQUEST_COUNTERS:
                totals[name] += requests[name]
        used = await trio.to_thread.run_sync(_open_fds)
        group = self._device.info()
        return {
            "uptime": time.time() - self.started_at,
            "members": len(self._slots),
            "events": self._event_count,
            "fds": {"used": used, "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0]},
            "requests": totals,
            "admin": {"commands": group["commands"], "failed": group["failed"]},
            "pool": self._pool.statistics(),
        }

    def _device_info(self, device: _Device, member_id: int) -> dict[str, Any]:
        return {**device.member.info(), "admin_commands": self._device.member_commands(member_id)}

    def _place(self, slot: _Slot) -> dict[str, Any]:
        connection = None if slot.server is None else dataclasses.asdict(slot.server.statistics())
        return {
            "vhost_user": str(slot.path),
            "peer_pid": slot.peer_pid,
            "connection": connection,
            "functions": self._functions(slot),
        }

    def _functions(self, device: _Device) -> list[dict[str, Any]]:
        return [
            {
                "function": server.kind,
                "socket": str(server.path),
                **dataclasses.asdict(server.statistics()),
                "pci": server.function.info(),
            }
            for server in device.functions.values()
        ]

    def _summary(self, slot: _Slot) -> dict[str, Any]:
        info = slot.member.info()
        queues = info["queues"]
        return {
            "id": slot.config.id,
            "type": info["type"],
            "legacy": info["legacy"],
            "state": info["state"],
            "driver_mode": info["driver_mode"],
            "broken": info["broken"],
            "connections": info["connections"],
            "queues": len(queues),
            "queue_size": slot.config.queue_size,
            "running_queues": sum(1 for queue in queues if queue["running"]),
            "served": sum(queue["requests"] for queue in queues),
            "errors": sum(queue["errors"] for queue in queues),
            "image": info["image"],
            "front": info["front"],
            "stopped": info["stopped"],
            "vhost_user": str(slot.path),
            "functions": [{"function": server.kind, "socket": str(server.path)} for server in slot.functions.values()],
            "peer_pid": slot.peer_pid,
        }

    def _slot(self, member_id: int) -> _Slot:
        slot = self._slots.get(member_id)
        if slot is None:
            raise MemberError(member_id, "there is no such member")
        return slot

    # --- changing members ---------------------------------------------------------------------------------

    def free_id(self) -> int:
        """The smallest member number that nobody has. Raises GroupError when there is none."""
        for member_id in range(1, MAX_MEMBER_ID + 1):
            if member_id not in self._slots and member_id not in self._reserved | self._promised_ids:
                return member_id
        raise GroupError(f"all {MAX_MEMBER_ID} member ids are taken")

    async def parse_member(self, values: Mapping[str, Any], member_id: int | None = None) -> MemberConfig:
        """A member from the keys of a `[[members]]` table; paths are relative to the group file.

        Raises MemberError that names every mistake.
        """
        chosen = self.free_id() if member_id is None else member_id
        # kept for `member_add`, so that two who ask at the same time get two numbers
        self._promised_ids.add(chosen)
        base = self.config.source.absolute().parent
        try:
            return await trio.to_thread.run_sync(
                lambda: parse_member(values, member_id=chosen, base=base, label="member-add")
            )
        except BaseException as raised:
            self._promised_ids.discard(chosen)
            if not isinstance(raised, ConfigError):
                raise
            error = raised
            raise MemberError(member_id, "; ".join(_without_place(p) for p in error.problems)) from None

    async def member_add(self, config: MemberConfig) -> Path:
        """Start serving a member and return its socket's path.

        Raises MemberError; then there is no trace of it.
        """
        return await self._finish(lambda: self._member_add(config))

    async def member_del(self, member_id: int, *, force: bool = False) -> None:
        """Stop serving a member. Raises MemberError: no such member, or attached to a front end and not
        forced.

        Forced, the front end is disconnected first; what its rings have in flight is finished.
        """
        await self._finish(lambda: self._member_del(member_id, force))

    async def member_modify(
        self,
        member_id: int,
        *,
        image: str | None = None,
        size: int | None = None,
        read_only: bool | None = None,
        legacy: bool | None = None,
        serial: str | None = None,
        features: int | None = None,
    ) -> bool:
        """Swap a member's image, resize it, or change whether it can be written.

        Or provision it before and between uses, which is refused while a front end is attached: whether a legacy driver
        may drive it, its serial, and the feature bits it offers (a subset of what it can; by an administration command,
        so the group needs `feature_management`).

        Returns whether an attached front end was told. Raises MemberError; nothing has changed then.
        """
        return await self._finish(
            lambda: self._member_modify(member_id, image, size, read_only, legacy, serial, features)
        )

    async def _finish(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation in the group's own nursery and wait for it; our cancellation isn't its
        cancellation.
        """
        if self._nursery is None or self.stopping.is_set():
            # who is cancelled together with the group is told that, and nothing else
            await trio.lowlevel.checkpoint_if_cancelled()
            raise GroupError("the group is stopping")
        if self.handing_over or self.left:
            raise GroupError("a new process is taking over the group; try again in a moment")
        done = trio.Event()
        results: list[outcome.Maybe[T]] = []

        async def run() -> None:
            try:
                value = await operation()
            except Exception as error:
                results.append(outcome.Error(error))
            else:
                results.append(outcome.Value(value))
            finally:
                self._operations -= 1
                self._settled.set()
                done.set()

        self._operations += 1
        self._nursery.start_soon(run)
        await done.wait()
        if not results:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise GroupError("the group is stopping")
        # not kept in a variable: an error's traceback refers to this frame, and that would keep all that is in it
        return results.pop().unwrap()

    async def _member_add(self, config: MemberConfig) -> Path:
        await self._open([Kept(config)])
        try:
            await self._keeper.keep(config, None)
        except OSError as error:
            # what would be forgotten isn't promised
            self._keeper.drop(config.id)
            await self._member_del(config.id, force=True)
            raise MemberError(config.id, f"not added: {self._unkept(error)}") from error
        return self.run_dir / socket_name(config.id)

    def _unkept(self, error: OSError) -> str:
        return f"{self.run_dir / state.STATE_FILE} can't be written: {error.strerror or error}"

    async def _open(self, batch: Sequence[Kept]) -> None:
        """Start serving members. Raises MemberError; then there is no trace of the one it is about.

        What touches files goes to a thread: once for all of them, since a hop costs more than opening an image.
        """
        configs = [kept.config for kept in batch]
        identities = await trio.to_thread.run_sync(lambda: [image_identity(config.image) for config in configs])
        reserved: list[MemberConfig] = []
        opened: list[_native.Member] = []
        slots: list[_Slot] = []
        try:
            for config, identity in zip(configs, identities, strict=True):
                self._reserve(config, identity)
                reserved.append(config)
            opened = await trio.to_thread.run_sync(self._open_members, configs)
            slots = [
                self._make_slot(config, member, identity)
                for config, member, identity in zip(configs, opened, identities, strict=True)
            ]
            for kept, slot in zip(batch, slots, strict=True):
                # before its task starts, so that no event of a first connection is missed
                self._slots[kept.config.id] = slot
                self._device.add(slot.member)
                if kept.features is not None:
                    # a front end that reconnects shall find them, so before there is a socket
                    await self._restore_features(kept.config.id, kept.features)
            await self._start(slots)
        except BaseException:
            for config, identity in zip(reserved, identities, strict=False):
                self._withdraw(config, identity)
            idle = [slot.member for slot in slots if not slot.serving] if slots else list(opened)
            # an image is let go of with the last reference to its member, and tracebacks keep the variables of frames
            slots.clear()
            opened.clear()
            await _in_thread_shielded(functools.partial(_close_all, idle))
            raise
        finally:
            self._reserved.difference_update(config.id for config in reserved)
        for slot in slots:
            config = slot.config
            self._emit("added", config.id, {"type": config.type})
            log.info("member %d: %s %s at %s", config.id, config.type, config.image, slot.path)

    def _reserve(self, config: MemberConfig, identity: tuple[int, int] | None) -> None:
        """Its number, its image and its descriptors are the member's from here on. Raises MemberError."""
        member_id = config.id
        self._promised_ids.discard(member_id)
        if not 1 <= member_id <= MAX_MEMBER_ID:
            raise MemberError(None, f"member id {member_id} is out of range; allowed: 1 to {MAX_MEMBER_ID}")
        if member_id in self._slots or member_id in self._reserved:
            raise MemberError(member_id, "there is already a member with this id")
        path = self.run_dir / socket_name(member_id)
        longest = self.run_dir / function_socket_name(member_id, "transitional") if config.vfio_user else path
        if too_long(longest):
            raise MemberError(member_id, f"{longest} is too long for a Unix socket; use a shorter run directory")
        self._check_limits(config)
        self._check_sharing(config, identity)
        self._reserved.add(member_id)
        self._fds_promised += self._fds(config)
        self._use_image(member_id, identity, config.read_only)

    def _withdraw(self, config: MemberConfig, identity: tuple[int, int] | None) -> None:
        """Undo `_reserve`, and what came after it, for a member that isn't served."""
        if config.id in self._slots and self._slots[config.id].serving:
            return
        self._slots.pop(config.id, None)
        self._leave_group(config.id)
        self._fds_promised -= self._fds(config)
        self._leave_image(config.id, identity)

    def _open_members(self, configs: Sequence[MemberConfig]) -> list[_native.Member]:
        opened: list[_native.Member] = []
        try:
            for config in configs:
                opened.append(self._open_patiently(config))
        except BaseException:
            _close_all(opened)
            raise
        return opened

    def _open_patiently(self, config: MemberConfig) -> _native.Member:
        """Open a member.

        Requests that a killed process had in flight go on in the kernel, and hold the image's lock meanwhile: what they
        write must not come after what is written now.
        """
        while True:
            try:
                return self._open_member(config)
            except MemberError as error:
                if time.monotonic() > self._patient_until or not error.detail.endswith(IN_USE):
                    raise
            time.sleep(LOCK_INTERVAL)

    def _make_slot(self, config: MemberConfig, member: _native.Member, identity: tuple[int, int] | None) -> _Slot:
        server = None
        if self.engine == "native":
            server = VhostUserServer(member, self._host)
        return _Slot(member, identity, config, self.run_dir, server)

    def _leave_group(self, member_id: int) -> None:
        with suppress(KeyError):
            self._device.remove(member_id)

    async def _start(self, slots: Sequence[_Slot]) -> None:
        """Have tasks serve them, all started at once; MemberError for the first that can't listen."""
        errors: list[MemberError] = []

        async def start(slot: _Slot) -> None:
            assert self._nursery is not None
            try:
                if slot.server is None:
                    await self._nursery.start(self._serve, slot)
                else:
                    await self._listen(slot, slot.server)
                slot.serving = True
            except Exception as raised:
                error = single(raised)
                if not isinstance(error, LISTEN_ERRORS):
                    raise
                path = slot.path if not isinstance(error, OSError) or error.filename is None else error.filename
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                refused = MemberError(slot.config.id, f"can't listen on {path}: {reason}")
                refused.__cause__ = error
                errors.append(refused)

        if self.engine == "native":
            # who is cancelled while the group ends opens no more sockets
            await trio.lowlevel.checkpoint()
            for slot in slots:
                await start(slot)
        else:
            async with trio.open_nursery() as nursery:
                for slot in slots:
                    nursery.start_soon(start, slot)
        if errors:
            raise min(errors, key=lambda error: error.member_id or 0)

    async def _listen(self, slot: _Slot, server: VhostUserServer) -> None:
        """Serve a member from now on. Raises OSError, NativeError; its sockets are gone then."""
        listener, slot.listener = slot.listener, None
        try:
            self._listen_functions(slot)
            taken, listener = listener, None
            server.start(taken)
        except BaseException:
            if listener is not None:
                os.close(listener)
            await self._stop(slot)
            raise

    async def _stop(self, slot: _Slot) -> None:
        """Let nothing connect to a member any more, and drop who is. Ends in a bounded time, whoever is cancelled."""
        if slot.scope is not None:
            slot.scope.cancel()
        with trio.CancelScope(shield=True):
            if slot.server is not None:
                # a function's client is dropped, too, when the vhost-user listener has failed: the member is out of use
                await slot.server.aclose()
                await self._close_functions(slot)
                slot.stopped = True
            elif slot.ended is not None:
                await slot.ended.wait()

    def _server_failed(self, member_id: int, error: Exception) -> None:
        text = "member %d: its listener failed; nothing can connect to it any more"
        log.error(text, member_id, exc_info=error)
        slot = self._slots.get(member_id)
        if slot is None or slot.stopped:
            return
        reason = f"{type(error).__name__}: {error}"
        self._emit("broken", member_id, {"rule": "backend.listener", "reason": reason, "queue": None})
        self._spawn(functools.partial(self._stop, slot))

    def _listen_functions(self, slot: _Slot) -> None:
        """Have just those functions served that the member has. Raises OSError, NativeError."""
        wanted = function_kinds(legacy=slot.config.legacy) if slot.config.vfio_user else ()
        for kind in wanted:
            if kind not in slot.functions:
                slot.functions[kind] = self._function_server(slot.member, slot.config.id, kind)

    def _function_server(self, member: _native.Member, member_id: int, kind: FunctionKind) -> FunctionServer:
        make = {
            "owner": _native.Function.owner,
            "legacy": _native.Function.legacy,
            "transitional": _native.Function.transitional,
            "modern": _native.Function.modern,
        }[kind]
        path = self.run_dir / function_socket_name(member_id, kind)
        return FunctionServer(self._pool, make(self._device, member), kind, path, self._hub)

    async def _close_functions(self, device: _Device, *, keep: tuple[FunctionKind, ...] = ()) -> None:
        """Close the functions' sockets, all at once: each may have to wait for requests in flight."""
        if not device.functions:
            return
        async with trio.open_nursery() as nursery:
            for kind in [kind for kind in device.functions if kind not in keep]:
                nursery.start_soon(device.functions.pop(kind).aclose)

    def _open_member(self, config: MemberConfig, image_fd: int | None = None) -> _native.Member:
        try:
            return _native.Member.blk(
                self._pool,
                config.id,
                config.image,
                read_only=config.read_only,
                queues=config.queues,
                queue_size=config.queue_size,
                legacy=config.legacy,
                blk_size=config.blk_size,
                serial=config.serial,
                packed=config.packed,
                in_order=config.in_order,
                shared=config.shared,
                vectors=config.vector_count,
                image_fd=image_fd,
                poll_us=config.poll_us,
            )
        except (_native.NativeError, ValueError, OSError) as error:
            raise MemberError(config.id, str(error)) from error

    # --- the owner ----------------------------------------------------------------------------------------

    async def _open_owner(self, config: OwnerConfig) -> None:
        """Make the owner's device, and serve it if it shall be. Raises GroupError; then there is no trace of it."""
        await self._prepare_owner(config, None)
        await self.serve_owner()

    async def _prepare_owner(self, config: OwnerConfig, image_fd: int | None) -> None:
        """Make the owner's device. Raises GroupError."""
        path = self.run_dir / function_socket_name(OWNER, "owner")
        if config.vfio_user and too_long(path):
            raise GroupError(f"owner: {path} is too long for a Unix socket; use a shorter run directory")
        # nobody can be in its way: it is the first
        identity = await trio.to_thread.run_sync(image_identity, config.image)
        try:
            member = await trio.to_thread.run_sync(self._make_owner, config, image_fd)
        except (_native.NativeError, ValueError, OSError) as refused:
            raise GroupError(f"owner: {refused}") from refused
        self._owner = _Owner(member, identity, config)
        self._use_image(OWNER, identity, config.read_only)
        self._fds_promised += self._fds(config)

    async def serve_owner(self) -> None:
        """Serve the owner as a PCI function, if it shall be and isn't yet. Raises GroupError."""
        owner = self._owner
        if owner is None or not owner.config.vfio_user or owner.functions:
            return
        # who is cancelled while the group ends opens no more sockets
        await trio.lowlevel.checkpoint()
        if self._nursery is None:
            raise GroupError("the group is stopping")
        config, path = owner.config, self.run_dir / function_socket_name(OWNER, "owner")
        try:
            await self._nursery.start(self._serve_owner, owner)
        except Exception as raised:
            error = single(raised)
            if not isinstance(error, LISTEN_ERRORS):
                raise
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise GroupError(f"owner: can't listen on {path}: {reason}") from error
        log.info("owner: %s %s at %s", config.type, config.image, path)

    def _make_owner(self, config: OwnerConfig, image_fd: int | None) -> _native.Member:
        return _native.Member.owner(
            self._pool,
            self._device,
            config.image,
            read_only=config.read_only,
            queues=config.queues,
            queue_size=config.queue_size,
            blk_size=config.blk_size,
            serial=config.serial,
            packed=config.packed,
            in_order=config.in_order,
            shared=config.shared,
            vectors=config.vector_count,
            image_fd=image_fd,
        )

    async def _serve_owner(self, owner: _Owner, *, task_status: trio.TaskStatus[None]) -> None:
        owner.scope = trio.CancelScope()
        owner.ended = trio.Event()
        try:
            with owner.scope:
                owner.functions["owner"] = self._function_server(owner.member, OWNER, "owner")
                task_status.started()
                await trio.sleep_forever()
        finally:
            await self._close_functions(owner)
            owner.ended.set()

    # --- for `upgrade` ------------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Wait until no operation on members goes on. The caller sees to it that none begins."""
        while self._operations:
            self._settled = trio.Event()
            await self._settled.wait()

    async def shielded(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation of which only the end of the group is the end. When it is followed by that of the group, and
        nobody is left to say so, it is said here."""
        result: list[T] = []
        errors: list[GroupError] = []

        async def watch(scope: trio.CancelScope) -> None:
            await self.stopping.wait()
            scope.cancel()

        with trio.CancelScope(shield=True) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, scope)
                try:
                    result.append(await operation())
                except GroupError as error:
                    errors.append(error)
                nursery.cancel_scope.cancel()
        if self.left:
            self._spawn(self._stop_soon)
        if errors:
            raise errors.pop()
        if not result:
            raise GroupError("the group is stopping")
        return result.pop()

    async def _stop_soon(self) -> None:
        # the client that asked is to have its answer before
        await trio.sleep(1)
        self.request_stop()

    def hold_qmp(self) -> int:
        """Have no QMP client accepted any more; returns the listening socket's descriptor. Raises GroupError."""
        if self.qmp is None:
            raise GroupError("the group has no QMP socket that could be handed over")
        self.qmp.hold()
        return self.qmp.listener_fd()

    def release_qmp(self) -> None:
        """The end of `hold_qmp`."""
        if self.qmp is not None:
            self.qmp.release()

    def own_run_dir(self) -> None:
        """Say in the lock file again that the run directory is this process's."""
        RunDir.adopt(self.run_dir, self.lock_fd).own()

    def slot(self, member_id: int) -> _Slot:
        """What there is of a member. Raises MemberError."""
        return self._slot(member_id)

    def devices(self) -> list[tuple[int, _Device]]:
        """The owner, if it has a device, and the members, by number."""
        owner: list[tuple[int, _Device]] = [] if self._owner is None else [(OWNER, self._owner)]
        return [*owner, *sorted(self._slots.items())]

    def owner_image_fd(self) -> int | None:
        """A duplicate of the descriptor of the owner's image."""
        return None if self._owner is None else self._owner.member.image_fd()

    async def close_functions(self, slot: _Slot) -> None:
        """Remove a member's vfio-user sockets, and drop their clients."""
        await self._close_functions(slot)

    def listen_functions(self, slot: _Slot) -> None:
        """Serve a member's PCI functions again. What can't be is logged."""
        try:
            self._listen_functions(slot)
        except LISTEN_ERRORS as error:
            log.error("member %d: its PCI functions can't be served: %s", slot.config.id, error)

    async def close_owner_functions(self) -> None:
        """Remove the owner's vfio-user socket, and drop its client."""
        if self._owner is not None and self._owner.functions:
            assert self._owner.scope is not None
            assert self._owner.ended is not None
            self._owner.scope.cancel()
            await self._owner.ended.wait()

    async def reopen_owner(self) -> None:
        """The end of `close_owner_functions`. What can't be served is logged."""
        try:
            await self.serve_owner()
        except GroupError as error:
            log.error("%s", error)

    async def prepare_members(self, batch: Sequence[Kept], images: Mapping[int, int | None]) -> list[_Slot]:
        """Make members on images that a predecessor has open, without serving them. Raises MemberError."""
        configs = [kept.config for kept in batch]
        identities = await trio.to_thread.run_sync(lambda: [image_identity(config.image) for config in configs])
        for config, identity in zip(configs, identities, strict=True):
            self._reserve(config, identity)
        self._reserved.difference_update(config.id for config in configs)
        members = await trio.to_thread.run_sync(
            lambda: [self._open_member(config, images.get(config.id)) for config in configs]
        )
        slots = []
        for kept, member, identity in zip(batch, members, identities, strict=True):
            config = kept.config
            slot = self._make_slot(config, member, identity)
            self._slots[config.id] = slot
            self._device.add(member)
            if kept.features is not None:
                await self._restore_features(config.id, kept.features)
            slots.append(slot)
        return slots

    async def start_members(self, slots: Sequence[_Slot]) -> None:
        """Serve members that were prepared. Raises MemberError."""
        await self._start(slots)

    def begin_keeping(self, kept: Iterable[Kept]) -> None:
        """What a predecessor served is on disk already."""
        self._keeper.begin(kept)

    # --- members again ------------------------------------------------------------------------------------

    async def _member_del(self, member_id: int, force: bool) -> None:
        slot = self._slot(member_id)
        async with slot.lock:
            if slot.gone:
                raise MemberError(member_id, "there is no such member")
            if slot.member.attached and not force and not slot.stopped:
                who = "" if slot.peer_pid is None else f" (pid {slot.peer_pid})"
                reason = f"attached to a front end{who}; unplug it there first, or use force to cut it off"
                raise MemberError(member_id, reason)
            if slot.member.attached and not slot.stopped:
                reason = "the member is being deleted"
                for function in slot.functions.values():
                    function.disconnect(reason)
                if slot.server is not None:
                    with trio.move_on_after(DRAIN_TIMEOUT):
                        await slot.server.disconnect(reason)
            await self._stop(slot)
            # from here on commands to it are answered as to any member that isn't there
            self._leave_group(member_id)
            await self._close_member(slot)
            slot.gone = True
            del self._slots[member_id]
            self._leave_image(member_id, slot.identity)
            self._traced.discard(member_id)
            for key in [key for key in self._paces if key[1] == member_id]:
                del self._paces[key]
                self._held.pop(key, None)
            self._fds_promised -= self._fds(slot.config)
        self._emit("deleted", member_id, {})
        log.info("member %d: deleted", member_id)
        try:
            await self._keeper.forget(member_id)
        except OSError as error:
            reason = f"deleted, but it comes again after a restart: {self._unkept(error)}"
            raise MemberError(member_id, reason) from error

    async def _close_member(self, slot: _Slot) -> None:
        """Let go of the image once the rings have drained; MemberError when they don't within DRAIN_TIMEOUT."""
        with trio.move_on_after(DRAIN_TIMEOUT):
            while True:
                try:
                    await trio.to_thread.run_sync(slot.member.close)
                except _native.BusyError:
                    await trio.sleep(0.02)
                else:
                    return
        reason = f"still draining after {DRAIN_TIMEOUT:.0f} s; it takes no new front end: try member-del again"
        raise MemberError(slot.config.id, reason)

    async def _member_modify(
        self,
        member_id: int,
        image: str | None,
        size: int | None,
        read_only: bool | None,
        legacy: bool | None,
        serial: str | None,
        features: int | None,
    ) -> bool:
        slot = self._slot(member_id)
        if all(change is None for change in (image, size, read_only, legacy, serial, features)):
            allowed = "image, size, read_only, legacy, serial, features"
            raise MemberError(member_id, f"nothing to change; allowed: {allowed}")
        async with slot.lock:
            if slot.gone:
                raise MemberError(member_id, "there is no such member")
            if any(change is not None for change in (legacy, serial, features)) and slot.member.attached:
                what = "legacy, serial and features are set before or between uses"
                raise MemberError(member_id, f"attached to a front end; {what}")
            wanted = slot.config
            if read_only is not None:
                wanted = replace(wanted, read_only=read_only)
            if image is not None:
                wanted = replace(wanted, image=await self._resolve(wanted, image))
            if legacy is not None:
                wanted = replace(wanted, legacy=legacy)
            if serial is not None:
                if not is_serial(serial):
                    allowed = f"up to {SERIAL_BYTES} printable ASCII characters"
                    raise MemberError(member_id, f"serial {serial!r} can't be served; allowed: {allowed}")
                wanted = replace(wanted, serial=serial)
            identity = await trio.to_thread.run_sync(image_identity, wanted.image)
            self._check_sharing(wanted, identity)
            if size is not None and (size <= 0 or size % wanted.blk_size):
                allowed = f"a positive multiple of {wanted.blk_size} bytes"
                raise MemberError(member_id, f"size {size} can't be served; allowed: {allowed}")
            asked: dict[str, Any] = {
                "image": None if image is None else wanted.image,
                "size": size,
                "read_only": read_only,
                "legacy": legacy,
                "serial": serial,
            }
            changes = {name: value for name, value in asked.items() if value is not None}
            before = None if features is None else await self._assign_features(member_id, features)
            try:
                tell = bool(changes) and await trio.to_thread.run_sync(lambda: slot.member.modify(**changes))
            except (_native.NativeError, ValueError, OSError) as error:
                if before is not None:
                    await self._assign_features(member_id, before)
                raise MemberError(member_id, str(error)) from error
            if size is not None and wanted.image.startswith(("ram:", "null:")):
                wanted = replace(wanted, image=f"{wanted.image.partition(':')[0]}:{size}")
            slot.config = wanted
            self._leave_image(member_id, slot.identity)
            slot.identity = identity
            self._use_image(member_id, identity, wanted.read_only)
            if features is not None:
                changes["features"] = f"0x{features:x}"
            log.info("member %d: modified: %s", member_id, " ".join(f"{name}={changes[name]}" for name in changes))
            if legacy is not None:
                await self._change_functions(slot)
            # the native side reports what a driver changes; this change is ours
            self._emit("config", member_id, {})
            told = False
            if tell:
                told = slot.member.config_changed()
                told = bool(slot.server is not None and await slot.server.config_changed()) or told
            try:
                await self._keeper.keep(wanted, slot.member.info()["assigned_features"])
            except OSError as error:
                reason = f"modified, but it is as before after a restart: {self._unkept(error)}"
                raise MemberError(member_id, reason) from error
            return told

    async def _assign_features(self, member_id: int, features: int) -> int:
        """Assign the bits that a member offers; returns those it offered before. Raises MemberError."""
        try:
            owner = await self.shared_owner()
            before = await owner.assigned_features(member_id)
            await owner.assign_features(member_id, features)
            return before
        except (AdminError, ValueError) as error:
            text = str(error).removeprefix(f"member {member_id}: ")
            raise MemberError(member_id, f"features 0x{features:x} can't be assigned: {text}") from error

    async def _restore_features(self, member_id: int, features: int) -> None:
        """Assign what a member was assigned before. Raises MemberError."""
        try:
            owner = await self.shared_owner()
            attributes = await owner.device_management_attributes(member_id)
            possible = features if attributes.features is None else features & attributes.features
            if possible != features:
                # bits for legacy drivers, on a member that has none any more
                text = "member %d: was assigned features 0x%x, of which it has 0x%x"
                log.warning(text, member_id, features, possible)
            await owner.assign_features(member_id, possible)
        except (AdminError, ValueError) as error:
            text = str(error).removeprefix(f"member {member_id}: ")
            raise MemberError(member_id, f"features 0x{features:x} can't be assigned: {text}") from error

    async def _after_command(self, readable: bytes) -> None:
        """Assigned features outlive the process, whoever assigned them. Raises MemberError: not on disk."""
        if not self.config.feature_management:
            return
        command = Command.unpack(readable)
        if command.opcode == Opcode.DEVICE_MGMT:
            await self._keep_features([command.group_member_id])

    async def _keep_features(self, member_ids: Iterable[int]) -> None:
        slots = [slot for member_id in member_ids if (slot := self._slots.get(member_id)) is not None]
        try:
            await self._keeper.keep_features(
                {slot.config.id: slot.member.info()["assigned_features"] for slot in slots}
            )
        except OSError as error:
            reason = f"features are assigned, but forgotten by a restart: {self._unkept(error)}"
            raise MemberError(slots[0].config.id, reason) from error

    async def _watch_assignments(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what a guest that drives the owner assigns, until cancelled: nobody tells of its commands."""
        task_status.started()
        seen = 0
        while True:
            await trio.sleep(ASSIGNMENT_INTERVAL)
            count = self._device.info()["commands"].get("DEVICE_MGMT", 0)
            if count == seen:
                continue
            seen = count
            try:
                await self._keep_features(self.member_ids)
            except MemberError as error:
                log.error("%s", error)
                seen = 0

    async def _open_all(self, restored: state.State, left_behind: bool) -> None:
        """Serve what the group file says and what was changed since then. Raises GroupError."""
        path = self.run_dir / state.STATE_FILE
        members, notes = await trio.to_thread.run_sync(state.merge, restored, self.config, path)
        for note in notes:
            log.warning("%s: %s", path, note)
        if left_behind:
            self._patient_until = time.monotonic() + LOCK_PATIENCE
        for start in range(0, len(members), OPEN_BATCH):
            batch = members[start : start + OPEN_BATCH]
            try:
                await self._finish(functools.partial(self._open, batch))
            except MemberError as error:
                kept = next((kept for kept in batch if kept.config.id == error.member_id), None)
                if kept is None or not (
                    kept.features is not None or kept.config.id in restored.added or kept.config.id in restored.changed
                ):
                    raise
                raise StateError(path, str(error)) from error
        self._keeper.begin(members)
        if restored:
            log.info("%s: %s", path, restored)
        if notes:
            try:
                await self._keeper.save()
            except OSError as error:
                raise GroupError(self._unkept(error)) from error

    async def _change_functions(self, slot: _Slot) -> None:
        """After `legacy` has changed: serve those functions that the member has now."""
        if slot.stopped:
            return
        keep = function_kinds(legacy=slot.config.legacy)
        await self._close_functions(slot, keep=keep)
        try:
            self._listen_functions(slot)
        except LISTEN_ERRORS as error:
            raise MemberError(slot.config.id, f"modified, but can't listen: {error}") from error

    async def _resolve(self, config: MemberConfig, image: str) -> str:
        base = self.config.source.absolute().parent
        text = image.replace("{n}", str(config.id))
        try:
            return await trio.to_thread.run_sync(
                lambda: resolve_image(text, base, read_only=config.read_only, blk_size=config.blk_size)
            )
        except ValueError as error:
            raise MemberError(config.id, str(error)) from None

    def _check_sharing(self, config: MemberConfig, identity: tuple[int, int] | None) -> None:
        """One writer for each image: MemberError when another member uses it and one of the two would write."""
        users = {} if identity is None else self._image_users.get(identity, {})
        for user, read_only in users.items():
            if user != config.id and not (config.read_only and read_only):
                reason = f"image {config.image} is used by {'the owner' if user == OWNER else _label(user)}"
                raise MemberError(config.id, f"{reason}; allowed: one writer, or read-only for all")

    def _use_image(self, user: int, identity: tuple[int, int] | None, read_only: bool) -> None:
        if identity is not None:
            self._image_users.setdefault(identity, {})[user] = read_only

    def _leave_image(self, user: int, identity: tuple[int, int] | None) -> None:
        users = {} if identity is None else self._image_users.get(identity, {})
        users.pop(user, None)
        if identity is not None and not users:
            self._image_users.pop(identity, None)

    def _check_limits(self, config: MemberConfig) -> None:
        needed = RESERVED_FDS + self._fds(config) + self._fds_promised
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY and needed > limit:
            count = len(self._slots) + 1
            reason = f"{count} members need up to {needed} file descriptors, the limit is {limit}"
            raise MemberError(config.id, f"{reason}; raise the hard limit of open files (ulimit -Hn)")

    def _fds(self, config: MemberConfig | OwnerConfig) -> int:
        """What a device can hold at most: listener, connection, back-end channel, image, and 3 for each queue. As PCI
        functions a listener for each, and for one of them a connection and an eventfd for each interrupt.
        """
        fixed = 6 if self.engine == "native" else 12
        functions = len(MEMBER_FUNCTIONS) + 1 + 3 + config.vector_count if config.vfio_user else 0
        return fixed + 3 * config.queues + functions

    # --- tasks --------------------------------------------------------------------------------------------

    async def _serve(self, slot: _Slot, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve a member by the stock daemon."""
        member_id = slot.config.id
        listening = False

        class Started:
            """Remembers that the listener is up: an error before it is the caller's, one after it is the
            member's.
            """

            def started(self, value: None = None) -> None:
                nonlocal listening
                listening = True
                task_status.started()

        slot.scope = trio.CancelScope()
        slot.ended = trio.Event()
        try:
            with slot.scope:
                self._listen_functions(slot)
                await self._serve_daemon(slot, Started())
        except Exception as error:
            if not listening:
                raise
            log.exception("member %d: its listener failed; nothing can connect to it any more", member_id)
            reason = f"{type(error).__name__}: {error}"
            self._emit("broken", member_id, {"rule": "backend.listener", "reason": reason, "queue": None})
        finally:
            await self._close_functions(slot)
            slot.stopped = True
            slot.ended.set()

    async def _serve_daemon(self, slot: _Slot, task_status: trio.TaskStatus[None]) -> None:
        """Serve by the stock daemon, in a thread of the member's own. It reports no connections."""
        daemon = _native.VhostUserDaemon(slot.member, str(slot.path))
        try:
            async with trio.open_nursery() as nursery:
                ended = trio.Event()
                # not of the shared limiter: these threads stay for as long as their member does
                nursery.start_soon(self._run_daemon, daemon, trio.CapacityLimiter(1), ended)
                await self._wait_listening(slot, ended)
                task_status.started()
        finally:
            slot.path.unlink(missing_ok=True)

    async def _run_daemon(
        self, daemon: _native.VhostUserDaemon, limiter: trio.CapacityLimiter, ended: trio.Event
    ) -> None:
        try:
            # a thread can't be cancelled: it is left, told to end by close(), and joined by that
            await trio.to_thread.run_sync(daemon.run, limiter=limiter, abandon_on_cancel=True)
        finally:
            ended.set()
            with trio.move_on_after(CLOSE_TIMEOUT) as scope:
                scope.shield = True
                await trio.to_thread.run_sync(daemon.close, abandon_on_cancel=True)
            if scope.cancelled_caught:
                log.error("the daemon's threads didn't end within %.0f s", CLOSE_TIMEOUT)

    async def _wait_listening(self, slot: _Slot, ended: trio.Event) -> None:
        """The daemon binds in its own thread and tells nobody when it is done: the kernel's socket list does."""
        deadline = trio.current_time() + LISTEN_TIMEOUT
        while not await trio.to_thread.run_sync(_is_listening, slot.path):
            if ended.is_set():
                return
            if trio.current_time() > deadline:
                raise OSError(0, f"no listener after {LISTEN_TIMEOUT:.0f} s")
            await trio.sleep(0.01)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The members' nursery. Cancelled when the group ends; the members are closed on the way out."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._reactor.run)
                await nursery.start(self._tell_held)
                await nursery.start(self._tell_traces)
                if self.config.feature_management and self.config.owner is not None and self.config.owner.vfio_user:
                    await nursery.start(self._watch_assignments)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    await self._stop_all()
        finally:
            self._nursery = None
            self.stopping.set()
            self._reactor.close()
            await _in_thread_shielded(self._close_members)

    async def _stop_all(self) -> None:
        """Stop all members, together: each may have to wait for requests in flight."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.close_vhost_user_devices)
                for slot in self._slots.values():
                    nursery.start_soon(self._stop, slot)

    def _close_members(self) -> None:
        devices: list[tuple[int, _Device]] = [(slot.config.id, slot) for slot in self._slots.values()]
        if self._owner is not None:
            devices.append((OWNER, self._owner))
        for member_id, device in devices:
            self._leave_group(member_id)
            try:
                device.member.close()
            except _native.NativeError as error:
                log.warning("%s: not closed cleanly: %s", _label(member_id), error)
        # an image is let go of with the last reference to its member, and this group is part of cycles
        self._slots.clear()
        self._owner = None
        self._device.close()


@asynccontextmanager
async def open_group(
    config: GroupConfig,
    *,
    run_dir: Path | None = None,
    engine: Engine = "native",
    fresh: bool = False,
    predecessor: TakeOver | None = None,
) -> AsyncIterator[Group]:
    """Serve a group's members for as long as the context lasts.

    What a former process in the same run directory was told about members (added, deleted, changed) still holds, unless
    `fresh` has it forgotten: its `state.json` is renamed to `state.json.old` then.

    `predecessor`: a process that serves the group, and hands it over (`upgrade`).

    Raises GroupError (and its kinds RunDirBusyError, MemberError, StateError) when it can't be started. On exit and on
    cancellation front ends are disconnected, rings drained, images let go of and all sockets removed; this
    takes a bounded time. The run directory is removed if it was made here and is empty.
    """
    if engine not in ENGINES:
        raise GroupError(f"engine {engine!r} is unknown; allowed: {', '.join(ENGINES)}")
    directory = (run_dir or config.run_dir or default_run_dir(config.name)).absolute()
    _raise_fd_limit()
    claim: RunDir | None = None
    # a predecessor's, too, until it has left
    left = predecessor is not None
    try:
        if predecessor is None:
            claim = await trio.to_thread.run_sync(RunDir.claim, directory)
            restored = await trio.to_thread.run_sync(_restore, directory, config.name, fresh)
            serving = _serve_group(config, directory, engine, restored, claim.left_behind)
        else:
            serving = _take_over_group(config, directory, engine, predecessor)
        async with serving as group:
            if predecessor is not None:
                claim = await predecessor.finish(group)
                group.qmp_fd = predecessor.qmp_listener
            assert claim is not None
            group.lock_fd = claim.fd
            try:
                yield group
            finally:
                left = group.left
    except BaseExceptionGroup as errors:
        # the nurseries in here are nobody's business: one thing went wrong, so one thing is raised
        error = single(errors)
        raise error from error.__cause__
    finally:
        if claim is not None:
            await _in_thread_shielded(claim.leave if left else claim.release)


def _restore(directory: Path, name: str, fresh: bool) -> state.State:
    path = directory / state.STATE_FILE
    try:
        if fresh and state.set_aside(directory):
            log.info("%s: forgotten, kept as %s", path, state.OLD_STATE_FILE)
        return state.read(directory, name) or state.State()
    except OSError as error:
        raise GroupError(f"{path}: {error.strerror or error}") from error


@asynccontextmanager
async def _serve_group(
    config: GroupConfig, directory: Path, engine: Engine, restored: state.State, left_behind: bool
) -> AsyncIterator[Group]:
    async with _empty_group(config, directory, engine) as group:
        if config.owner is not None:
            await group._open_owner(config.owner)
        group.first = not left_behind
        await group._open_all(restored, left_behind)
        await group.serve_vhost_user_devices()
        yield group


@asynccontextmanager
async def _take_over_group(
    config: GroupConfig, directory: Path, engine: Engine, predecessor: TakeOver
) -> AsyncIterator[Group]:
    async with _empty_group(config, directory, engine) as group:
        if config.owner is not None:
            await group._prepare_owner(config.owner, predecessor.owner_image)
        group.first = False
        await predecessor.take(group)
        yield group


@asynccontextmanager
async def _empty_group(config: GroupConfig, directory: Path, engine: Engine) -> AsyncIterator[Group]:
    pool = await trio.to_thread.run_sync(_native.Pool, config.workers)
    try:
        hub = EventHub(pool)
        async with trio.open_nursery() as outer:
            hub_scope = trio.CancelScope()
            await outer.start(_run_hub, hub, hub_scope)
            # not before it runs: a shielded task whose start is cancelled could never be ended
            hub_scope.shield = True
            try:
                group = Group(config, directory, engine, pool, hub)
                async with trio.open_nursery() as inner:
                    await inner.start(group._run)
                    yield group
                    inner.cancel_scope.cancel()
            finally:
                hub_scope.cancel()
    finally:
        await _in_thread_shielded(pool.close)


async def _run_hub(hub: EventHub, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    with scope:
        await hub.run(task_status=task_status)


async def _in_thread_shielded(function: Callable[[], None]) -> None:
    """Clean-up that has to happen also when we are being cancelled, but may not take for ever."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT) as scope:
        await trio.to_thread.run_sync(function, abandon_on_cancel=True)
    if scope.cancelled_caught:
        log.error("%s didn't end within %.0f s", getattr(function, "__qualname__", function), CLOSE_TIMEOUT)


def _close_all(members: list[_native.Member]) -> None:
    while members:
        members.pop().close()


def _label(member_id: int) -> str:
    return "owner" if member_id == OWNER else f"member {member_id}"


def _kind_of(kind: str, member_id: int) -> str:
    """The kind of an event, told apart for the owner."""
    return f"owner-{kind}" if member_id == OWNER else kind


def _without_place(problem: Problem) -> str:
    text = problem.found if problem.key is None else f"{problem.key.replace('_', '-')}: {problem.found}"
    return text if problem.allowed is None else f"{text}; allowed: {problem.allowed}"


def _open_fds() -> int:
    # one of them is the listing's own
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1


def _is_listening(path: Path) -> bool:
    """Whether somebody of this network namespace listens at this path (flag __SO_ACCEPTCON of
    /proc/net/unix).
    """
    wanted = os.fsencode(path)
    for line in Path("/proc/net/unix").read_bytes().splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & 0x10000:
            return True
    return False


def _raise_fd_limit() -> None:
    """As far as it may be, and members may want it: they are cheap but for their descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MANY_FDS:
        # beyond the hard limit only root gets, and not even root everywhere (CAP_SYS_RESOURCE)
        with suppress(OSError, ValueError):
            highest = min(MANY_FDS, int(Path("/proc/sys/fs/nr_open").read_text()))
            if highest > hard:
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
                return
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
