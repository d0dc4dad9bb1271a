# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A running group: its run directory, its members and their listeners, its events.

Nesting, from the outside in: the run directory's lock; the native pool; the event hub's task; the members'
tasks. Everything inside is gone before what is around it goes, also when the whole is cancelled: a member
that lets go of its front end waits for rings to drain, which the hub has to report, so the hub is shielded
until the last one is out.

An operation on a member (`member_add`, `member_del`, `member_modify`) runs in a task of the group. Whoever
asked for it may be cancelled in the middle (a QMP client that hangs up); the operation itself still ends in a
known state.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import resource
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import outcome
import trio

from . import _native
from .backend import VhostUserServer
from .config import (
    MAX_MEMBER_ID,
    GroupConfig,
    MemberConfig,
    image_identity,
    parse_member,
    resolve_image,
)
from .doorbells import EventHub
from .errors import ConfigError, GroupError, MemberError, Problem, single
from .rundir import QMP_SOCKET, RunDir, default_run_dir, socket_name, too_long

__all__ = ["ENGINES", "Engine", "EventStream", "Group", "GroupEvent", "open_group"]

log = logging.getLogger(__name__)
T = TypeVar("T")

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
DRAIN_TIMEOUT: Final = 10.0
"""Seconds that a member gets to finish what its rings have in flight, before it is reported as still
draining.
"""
CLOSE_TIMEOUT: Final = 10.0
LISTEN_TIMEOUT: Final = 5.0
RESERVED_FDS: Final = 128
"""Descriptors for everything that isn't a member: the pool, the QMP clients, Python."""


@dataclass(frozen=True, slots=True)
class GroupEvent:
    """Something happened to a member.

    Kinds: "added", "deleted", "connected" {peer_pid}, "disconnected" {reason}, "status" {old, new},
    "broken" {rule, reason, queue}, "config" {}.
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


@dataclass(eq=False, slots=True)
class _Slot:
    """One member and what serves it."""

    config: MemberConfig
    member: _native.Member
    path: Path
    server: VhostUserServer | None
    identity: tuple[int, int] | None
    """Of the image: two members with the same one share the file, whatever they call it."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    stopped: trio.Event = field(default_factory=trio.Event)
    lock: trio.Lock = field(default_factory=trio.Lock)
    peer_pid: int | None = None
    broken_logged: float = -math.inf
    gone: bool = False


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
        self._slots: dict[int, _Slot] = {}
        self._reserved: set[int] = set()
        self._promised_ids: set[int] = set()
        self._fds_promised = 0
        self._callbacks: list[Callable[[GroupEvent], None]] = []
        self._event_count = 0
        self._paces: dict[tuple[str, int], _Pace] = {}
        self._held: dict[tuple[str, int], dict[str, Any]] = {}
        self._held_some = trio.Event()
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
        slot = self._slots.get(member_id)
        if slot is None or kind not in ("status", "broken", "config"):
            return
        if kind == "broken":
            self._log_broken(slot, data)
        self._emit_paced(kind, member_id, data)

    def _connection_event(self, kind: str, member_id: int, data: dict[str, Any]) -> None:
        slot = self._slots.get(member_id)
        if slot is None:
            return
        if kind == "connected":
            slot.peer_pid = data.get("peer_pid")
        elif kind == "disconnected":
            slot.peer_pid = None
        told = self._emit_paced(kind, member_id, data)
        if told and kind == "connected":
            log.info("member %d: connected, pid %s", member_id, slot.peer_pid)
        elif told and kind == "disconnected":
            log.info("member %d: disconnected: %s", member_id, data.get("reason"))

    def _log_broken(self, slot: _Slot, data: Mapping[str, Any]) -> None:
        # a guest can break its device as often as it likes: the log shall not be its to fill
        now = trio.current_time()
        if now - slot.broken_logged >= 10.0:
            slot.broken_logged = now
            log.warning("member %d: broken: %s: %s", slot.config.id, data.get("rule"), data.get("reason"))

    def _emit_paced(self, kind: str, member_id: int, data: Mapping[str, Any]) -> bool:
        """Emit an event that a guest or a front end can cause as often as it likes; False when it is held back.

        A burst passes. Beyond it events of one kind and member are held and merged, and told at a steady pace: whoever
        listens sees the last state and where it began, but can't be drowned (a QMP client that is, is dropped).
        """
        key = (kind, member_id)
        pace = self._paces.get(key)
        if pace is None:
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
                log.exception("member %d: an event listener failed", member_id)

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

    def query_members(self) -> list[dict[str, Any]]:
        """One line for each member: what a table shows."""
        return [self._summary(self._slots[member_id]) for member_id in self.member_ids]

    def query_member(self, member_id: int) -> dict[str, Any]:
        """Everything about one member. Raises MemberError when there is none."""
        slot = self._slot(member_id)
        info = slot.member.info()
        return {**info, **self._place(slot)}

    async def query_statistics(self) -> dict[str, Any]:
        """Counters of the group: pool, descriptors, events, and the sums of its members' requests."""
        totals = dict.fromkeys(REQUEST_COUNTERS, 0)
        for slot in self._slots.values():
            requests = slot.member.info()["requests"]
            for name in REQUEST_COUNTERS:
                totals[name] += requests[name]
        used = await trio.to_thread.run_sync(_open_fds)
        return {
            "uptime": time.time() - self.started_at,
            "members": len(self._slots),
            "events": self._event_count,
            "fds": {"used": used, "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0]},
            "requests": totals,
            "pool": self._pool.statistics(),
        }

    def _place(self, slot: _Slot) -> dict[str, Any]:
        connection = None if slot.server is None else dataclasses.asdict(slot.server.statistics())
        return {"vhost_user": str(slot.path), "peer_pid": slot.peer_pid, "connection": connection}

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
            "vhost_user": str(slot.path),
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
    ) -> bool:
        """Swap a member's image, resize it, or change whether it can be written.

        Returns whether an attached front end was told. Raises MemberError; nothing has changed then.
        """
        return await self._finish(lambda: self._member_modify(member_id, image, size, read_only))

    async def _finish(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation in the group's own nursery and wait for it; our cancellation isn't its
        cancellation.
        """
        if self._nursery is None or self.stopping.is_set():
            raise GroupError("the group is stopping")
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
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if not results:
            raise GroupError("the group is stopping")
        return results[0].unwrap()

    async def _member_add(self, config: MemberConfig) -> Path:
        member_id = config.id
        self._promised_ids.discard(member_id)
        if not 1 <= member_id <= MAX_MEMBER_ID:
            raise MemberError(None, f"member id {member_id} is out of range; allowed: 1 to {MAX_MEMBER_ID}")
        if member_id in self._slots or member_id in self._reserved:
            raise MemberError(member_id, "there is already a member with this id")
        path = self.run_dir / socket_name(member_id)
        if too_long(path):
            raise MemberError(member_id, f"{path} is too long for a Unix socket; use a shorter run directory")
        self._check_limits(config)
        self._reserved.add(member_id)
        self._fds_promised += self._fds(config)
        try:
            identity = await self._check_image(config)
            member = await trio.to_thread.run_sync(self._open_member, config)
            try:
                slot = self._make_slot(config, member, path, identity)
                # before its task starts, so that no event of a first connection is missed
                self._slots[member_id] = slot
                await self._start(slot)
            except BaseException:
                self._slots.pop(member_id, None)
                await _in_thread_shielded(member.close)
                raise
        except BaseException:
            self._fds_promised -= self._fds(config)
            raise
        finally:
            self._reserved.discard(member_id)
        self._emit("added", member_id, {"type": config.type})
        log.info("member %d: %s %s at %s", member_id, config.type, config.image, path)
        return path

    def _make_slot(
        self, config: MemberConfig, member: _native.Member, path: Path, identity: tuple[int, int] | None
    ) -> _Slot:
        server = None
        if self.engine == "native":
            server = VhostUserServer(member, path, self._hub, self._connection_event)
        return _Slot(config, member, path, server, identity)

    async def _start(self, slot: _Slot) -> None:
        assert self._nursery is not None
        try:
            await self._nursery.start(self._serve, slot)
        except Exception as raised:
            error = single(raised)
            if not isinstance(error, (OSError, _native.NativeError)):
                raise
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise MemberError(slot.config.id, f"can't listen on {slot.path}: {reason}") from error

    def _open_member(self, config: MemberConfig) -> _native.Member:
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
            )
        except (_native.NativeError, ValueError, OSError) as error:
            raise MemberError(config.id, str(error)) from error

    async def _member_del(self, member_id: int, force: bool) -> None:
        slot = self._slot(member_id)
        async with slot.lock:
            if slot.gone:
                raise MemberError(member_id, "there is no such member")
            if slot.member.attached and not force and not slot.stopped.is_set():
                who = "" if slot.peer_pid is None else f" (pid {slot.peer_pid})"
                reason = f"attached to a front end{who}; unplug it there first, or use force to cut it off"
                raise MemberError(member_id, reason)
            if slot.server is not None and slot.member.attached and not slot.stopped.is_set():
                with trio.move_on_after(DRAIN_TIMEOUT):
                    await slot.server.disconnect("the member is being deleted")
            slot.scope.cancel()
            await slot.stopped.wait()
            await self._close_member(slot)
            slot.gone = True
            del self._slots[member_id]
            for key in [key for key in self._paces if key[1] == member_id]:
                del self._paces[key]
                self._held.pop(key, None)
            self._fds_promised -= self._fds(slot.config)
        self._emit("deleted", member_id, {})
        log.info("member %d: deleted", member_id)

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

    async def _member_modify(self, member_id: int, image: str | None, size: int | None, read_only: bool | None) -> bool:
        slot = self._slot(member_id)
        if image is None and size is None and read_only is None:
            raise MemberError(member_id, "nothing to change; allowed: image, size, read_only")
        async with slot.lock:
            if slot.gone:
                raise MemberError(member_id, "there is no such member")
            wanted = slot.config
            if read_only is not None:
                wanted = replace(wanted, read_only=read_only)
            if image is not None:
                wanted = replace(wanted, image=await self._resolve(wanted, image))
            identity = await self._check_image(wanted)
            if size is not None and (size <= 0 or size % wanted.blk_size):
                allowed = f"a positive multiple of {wanted.blk_size} bytes"
                raise MemberError(member_id, f"size {size} can't be served; allowed: {allowed}")
            try:
                tell = await trio.to_thread.run_sync(
                    lambda: slot.member.modify(
                        image=None if image is None else wanted.image, size=size, read_only=read_only
                    )
                )
            except (_native.NativeError, ValueError, OSError) as error:
                raise MemberError(member_id, str(error)) from error
            slot.config = wanted
            slot.identity = identity
            log.info("member %d: modified: image=%s size=%s read_only=%s", member_id, image, size, read_only)
            # the native side reports what a driver changes; this change is ours
            self._emit("config", member_id, {})
            return bool(tell and slot.server is not None and await slot.server.config_changed())

    async def _resolve(self, config: MemberConfig, image: str) -> str:
        base = self.config.source.absolute().parent
        text = image.replace("{n}", str(config.id))
        try:
            return await trio.to_thread.run_sync(
                lambda: resolve_image(text, base, read_only=config.read_only, blk_size=config.blk_size)
            )
        except ValueError as error:
            raise MemberError(config.id, str(error)) from None

    async def _check_image(self, config: MemberConfig) -> tuple[int, int] | None:
        """One writer for each image: MemberError when another member uses it and one of the two would write.

        Returns the image's identity.
        """
        identity = await trio.to_thread.run_sync(image_identity, config.image)
        for other in self._slots.values():
            if identity is None or other.identity != identity or other.config.id == config.id or other.gone:
                continue
            if not (config.read_only and other.config.read_only):
                reason = f"image {config.image} is used by member {other.config.id}"
                raise MemberError(config.id, f"{reason}; allowed: one writer, or read-only for all")
        return identity

    def _check_limits(self, config: MemberConfig) -> None:
        needed = RESERVED_FDS + self._fds(config) + self._fds_promised
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY and needed > limit:
            count = len(self._slots) + 1
            reason = f"{count} members need up to {needed} file descriptors, the limit is {limit}"
            raise MemberError(config.id, f"{reason}; raise the hard limit of open files (ulimit -Hn)")

    def _fds(self, config: MemberConfig) -> int:
        """What a member can hold at most: listener, connection, back-end channel, image, and 3 for each
        queue.
        """
        fixed = 6 if self.engine == "native" else 12
        return fixed + 3 * config.queues

    # --- tasks --------------------------------------------------------------------------------------------

    async def _serve(self, slot: _Slot, *, task_status: trio.TaskStatus[None]) -> None:
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

        try:
            with slot.scope:
                if slot.server is not None:
                    await slot.server.run(task_status=Started())
                else:
                    await self._serve_daemon(slot, Started())
        except Exception as error:
            if not listening:
                raise
            log.exception("member %d: its listener failed; nothing can connect to it any more", member_id)
            reason = f"{type(error).__name__}: {error}"
            self._emit("broken", member_id, {"rule": "backend.listener", "reason": reason, "queue": None})
        finally:
            slot.stopped.set()

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
                await nursery.start(self._tell_held)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self.stopping.set()
            await _in_thread_shielded(self._close_members)

    def _close_members(self) -> None:
        for slot in self._slots.values():
            try:
                slot.member.close()
            except _native.NativeError as error:
                log.warning("member %d: not closed cleanly: %s", slot.config.id, error)


@asynccontextmanager
async def open_group(
    config: GroupConfig, *, run_dir: Path | None = None, engine: Engine = "native"
) -> AsyncIterator[Group]:
    """Serve a group's members for as long as the context lasts.

    Raises GroupError (and its kinds RunDirBusyError, MemberError) when it can't be started. On exit and on
    cancellation front ends are disconnected, rings drained, images let go of and all sockets removed; this
    takes a bounded time. The run directory is removed if it was made here and is empty.
    """
    if config.owner is not None:
        if config.owner.vfio_user:
            raise GroupError(
                f"{config.source}: [owner] vfio_user = true: this version doesn't serve the owner; allowed: false"
            )
        log.warning("[owner] is read, but not served by this version")
    if engine not in ENGINES:
        raise GroupError(f"engine {engine!r} is unknown; allowed: {', '.join(ENGINES)}")
    directory = (run_dir or config.run_dir or default_run_dir(config.name)).absolute()
    _raise_fd_limit()
    claim = await trio.to_thread.run_sync(RunDir.claim, directory)
    try:
        async with _serve_group(config, directory, engine) as group:
            yield group
    except BaseExceptionGroup as errors:
        # the nurseries in here are nobody's business: one thing went wrong, so one thing is raised
        error = single(errors)
        raise error from error.__cause__
    finally:
        await _in_thread_shielded(claim.release)


@asynccontextmanager
async def _serve_group(config: GroupConfig, directory: Path, engine: Engine) -> AsyncIterator[Group]:
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
                    for member in config.members:
                        await group.member_add(member)
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
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # members are cheap but for their descriptors; the hard limit is what the administrator means to allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
