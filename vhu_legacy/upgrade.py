# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Replacing the process that serves a group by a new one, while guests go on.

The running process starts the new one and hands over, member by member: what it listens on, the image with its lock,
the front end's connection. A member stands still for as long as its rings take to stop here and to start there; front
ends notice nothing, so they need no way to reconnect. (Having them reconnect was the alternative: QEMU 7.2 waits a
second before it does, and QEMUs without `reconnect` never do.)

Until the new process has said that it serves everything the old one keeps all it has, and all sockets, the run
directory and the lock are its own. What goes wrong before a member has moved has no effect. What goes wrong later, in a
new process that is still there, makes it return what it has. Only when it is killed in between, the front ends that had
moved are disconnected, and can connect to the old one again. When the old one is killed in between, the new one ends,
too, unless it has been given everything: half a group is worse than none, which a supervisor notices.

PCI functions can't be handed over: their clients are refused (or, if forced, dropped), their sockets are made anew.
So it is with virtio-vhost-user devices and both their ends: they are closed before "end", and served after it.

    old                     new
                            hello       its version
    group                               the configuration, the owner's image
    member, ...                         for each one: listener, image
                            ready       all images are open: nothing more should fail
    move                                for each one: its rings have stopped, here is its front end
                            taken       they run again
    end                                 the lock, the QMP socket
                            serving     from here on all of it is the new one's

Instead of "taken" or "serving" there may come an "error"; at any time after "ready" the old one may say "return", which
is answered by "returned" for each member, and "done".
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio

from . import _native
from .backend import Held
from .errors import GroupError, MemberError
from .handover import FORMAT, Frame, MemberParcel, Pipe, close_all, group_data, group_of, held_frame, held_of
from .rundir import RunDir
from .state import Kept

if TYPE_CHECKING:
    from .config import GroupConfig
    from .group import Group, _Device, _Slot

__all__ = ["START_PATIENCE", "Successor", "TakeOver", "hand_over"]

log = logging.getLogger(__name__)

START_PATIENCE: Final = 30.0
"""Seconds that the new process may take until it can take over."""
MOVE_PATIENCE: Final = 15.0
"""Seconds that it may take for one member."""
RETURN_PATIENCE: Final = 20.0
"""Seconds that it may take to return all of them."""


@dataclass(frozen=True, slots=True)
class Successor:
    """What has become of a hand-over."""

    pid: int
    members: int
    moved: int
    """Front ends that were handed over."""
    reconnecting: list[int]
    """Members whose front end was disconnected, by force."""
    longest_pause: float
    """Seconds that the slowest member's rings stood still."""


# --- the old process ------------------------------------------------------------------------------------------


async def hand_over(group: Group, *, python: str | None = None, force: bool = False) -> Successor:
    """Start a new process for the group and hand everything over to it. After it `group` has nothing left to serve, and
    is asked to stop within a moment.

    `python`: the interpreter that has the new version; ours by default. `force`: clients of PCI functions and both ends
    of virtio-vhost-user devices are dropped, and front ends that the new version can't go on with.

    Raises GroupError; the group is served as before then. Cancellation has no effect, but for that of the group.
    """
    if group.engine != "native":
        raise GroupError("only the native engine can hand over")
    if group.left or group.stopping.is_set():
        raise GroupError("the group is stopping")
    if group.handing_over:
        raise GroupError("a new process is taking over the group already")
    group.handing_over = True
    try:
        return await group.shielded(lambda: _hand_over(group, python, force))
    finally:
        group.handing_over = False


async def _hand_over(group: Group, python: str | None, force: bool) -> Successor:
    await group.settled()
    _check(group, force)
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours)
    process: trio.Process | None = None
    sender = _Sender(group, pipe, force)
    try:
        with theirs:
            process = await _start(group, python, theirs.fileno())
        with trio.move_on_after(START_PATIENCE) as scope:
            await sender.prepare()
        if scope.cancelled_caught:
            raise GroupError(f"the new process wasn't ready after {START_PATIENCE:g} s")
        successor = await sender.move(process.pid)
    except BaseException as raised:
        with trio.CancelScope(shield=True):
            if isinstance(raised, GroupError):
                await sender.recall()
            if process is not None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            await sender.take_back()
        raise
    finally:
        pipe.close()
        sender.close()
    log.info("process %d serves the group; %d front ends were handed over", successor.pid, successor.moved)
    return successor


def _check(group: Group, force: bool) -> None:
    """Refuse what can't be handed over, before anything has been done."""
    for member_id, device in group.devices():
        label = "the owner" if member_id == 0 else f"member {member_id}"
        info = device.member.info()
        if info["stopped"]:
            raise GroupError(f"{label} is stopped by an administration command, which can't be handed over; resume it")
        if not force and _has_client(group, member_id, device, info):
            raise GroupError(f"{label} has a client that can't be handed over; use force to drop it")
    if not force:
        _check_devices(group)


def _check_devices(group: Group) -> None:
    used = group.vhost_user_devices_in_use()
    if used:
        label = f"virtio-vhost-user device{'s' if len(used) > 1 else ''} {', '.join(used)}"
        reason = "a backend VM or a master is connected, which can't be handed over; use force to drop it"
        raise GroupError(f"{label}: {reason}")


def _has_client(group: Group, member_id: int, device: _Device, info: dict[str, Any]) -> bool:
    if any(server.statistics().connected for server in device.functions.values()):
        return True
    server = None if member_id == 0 else group.slot(member_id).server
    if server is not None and server.statistics().connected:
        return False
    # nobody on a socket, and yet a driver: it goes through administration commands
    return bool(device.member.attached or info["status"]["value"])


def _log_level() -> str:
    """The log level in force, as the command line has it."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()


async def _start(group: Group, python: str | None, fd: int) -> trio.Process:
    command = [python or sys.executable, "-m", "vhu_legacy", "serve", str(group.config.source)]
    command += ["--run-dir", str(group.run_dir), "--log-level", _log_level(), "--predecessor", str(fd)]
    if group.supervisor_pid is not None:
        command += ["--supervisor", str(group.supervisor_pid)]
    try:
        return await trio.lowlevel.open_process(command, pass_fds=(fd,), stdin=subprocess.DEVNULL)
    except OSError as error:
        raise GroupError(f"the new process can't be started: {command[0]}: {error.strerror or error}") from error


class _Sender:
    """The old process's side of one hand-over."""

    def __init__(self, group: Group, pipe: Pipe, force: bool) -> None:
        self._group = group
        self._pipe = pipe
        self._force = force
        self._slots: list[_Slot] = []
        self._features: dict[int, int | None] = {}
        self._closed: list[_Slot] = []
        """Members whose functions are closed."""
        self._held: dict[int, Held] = {}
        self._moved: set[int] = set()
        self._returned: dict[int, Held] = {}
        self._owner_closed = False
        self._devices_closed = False
        self._ended = False
        """The new process has been given everything."""
        self._ready = False

    async def prepare(self) -> None:
        """Let the new process set up all that it can without disturbing anybody."""
        group = self._group
        hello = await self._pipe.receive("hello")
        close_all(hello.fds)
        if hello.data.get("format") != FORMAT:
            version = hello.data.get("version")
            raise GroupError(f"version {version} can't take over from this one: it speaks another format")
        self._slots = [group.slot(member_id) for member_id in group.member_ids]
        owner = group.owner_image_fd()
        fds = [] if owner is None else [owner]
        try:
            data = {"members": len(self._slots), "config": group_data(group.config)}
            await self._pipe.send("group", data, fds)
        finally:
            close_all(fds)
        for slot in self._slots:
            await self._send_member(slot)
        await self._pipe.receive("ready")
        self._ready = True

    async def _send_member(self, slot: _Slot) -> None:
        assert slot.server is not None
        listener = slot.server.listener_fd()
        if listener is None:
            raise MemberError(slot.config.id, "its listener has failed; remove the member first")
        image = slot.member.image_fd()
        features = self._features[slot.config.id] = slot.member.info()["assigned_features"]
        try:
            await self._pipe.send("member", *MemberParcel(slot.config, features, listener, image).frame())
        finally:
            close_all([] if image is None else [image])

    async def move(self, pid: int) -> Successor:
        """Hand over one member after the other, then what is the group's."""
        group = self._group
        longest = 0.0
        reconnecting = []
        moved = 0
        self._owner_closed = True
        # first: a guest that drives the owner could change members
        await group.close_owner_functions()
        for slot in self._slots:
            assert slot.server is not None
            attached = slot.server.statistics().connected
            began = trio.current_time()
            with trio.move_on_after(MOVE_PATIENCE) as scope:
                if await self._move(slot):
                    moved += 1
                    longest = max(longest, trio.current_time() - began)
                elif attached:
                    reconnecting.append(slot.config.id)
            if scope.cancelled_caught:
                raise MemberError(slot.config.id, f"the new process didn't take it over within {MOVE_PATIENCE:g} s")
        await self._close_devices()
        with trio.move_on_after(MOVE_PATIENCE) as scope:
            self._ended = True
            await self._pipe.send("end", {}, [group.lock_fd, group.hold_qmp()])
            await self._pipe.receive("serving")
            # from here on it is theirs, and there is no way back
            group.left = True
        if not group.left:
            raise GroupError(f"the new process didn't serve within {MOVE_PATIENCE:g} s")
        for slot in self._slots:
            if slot.server is not None:
                slot.server.leave()
        return Successor(pid, len(self._slots), moved, reconnecting, longest)

    async def _close_devices(self) -> None:
        # last of all: a backend VM that is dropped here can't connect again by itself
        if not self._force:
            # somebody may have come while members moved
            _check_devices(self._group)
        self._devices_closed = True
        # should they be served here again, masters know them
        self._group.first = False
        await self._group.close_vhost_user_devices()

    async def _move(self, slot: _Slot) -> bool:
        """Whether it has taken a front end with it."""
        assert slot.server is not None
        member_id = slot.config.id
        self._closed.append(slot)
        await self._group.close_functions(slot)
        held = await slot.server.hold(force=self._force)
        self._held[member_id] = held
        info = slot.member.info()
        if info["assigned_features"] != self._features[member_id]:
            raise MemberError(member_id, "was assigned other features meanwhile; try again")
        data, fds = held_frame(held)
        # part of it may arrive, whatever becomes of the rest
        self._moved.add(member_id)
        writeback = bool(info["config"]["writeback"])
        await self._pipe.send("move", {"id": member_id, "writeback": writeback, "force": self._force, **data}, fds)
        answer = await self._pipe.receive("taken")
        reason = answer.data.get("dropped")
        if reason is not None:
            log.warning("member %d: its front end has to reconnect: %s", member_id, reason)
        return held.connection is not None and reason is None

    async def recall(self) -> None:
        """Have the new process return what it has got, as far as it can."""
        if not self._ready or self._pipe.torn:
            return
        with trio.move_on_after(RETURN_PATIENCE) as scope:
            try:
                await self._pipe.send("return")
                while True:
                    frame = await self._pipe.receive("returned", "done", "taken", "serving", "error")
                    if frame.kind == "done":
                        self._moved.intersection_update(frame.data["touched"])
                        return
                    if frame.kind == "returned":
                        self._returned[int(frame.data["id"])] = held_of(frame)
            except (GroupError, KeyError, TypeError, ValueError) as error:
                log.warning("the new process doesn't return what it has: %s", error)
        if scope.cancelled_caught:
            log.warning("the new process returned only some of what it has in %g s", RETURN_PATIENCE)

    async def take_back(self) -> None:
        """The new process is gone: serve everything again."""
        for slot in self._slots:
            member_id = slot.config.id
            held = self._held.get(member_id)
            if slot.server is None or held is None:
                continue
            returned = self._returned.pop(member_id, None)
            if returned is not None:
                try:
                    await slot.server.take_back(returned)
                except (_native.NativeError, OSError) as error:
                    log.warning("member %d: its front end can't be taken back: %s", member_id, error)
            elif member_id in self._moved:
                await slot.server.lose()
            else:
                slot.server.go_on(held)
        for slot in self._closed:
            self._group.listen_functions(slot)
        if self._owner_closed:
            await self._group.reopen_owner()
        if self._devices_closed:
            try:
                await self._group.serve_vhost_user_devices()
            except GroupError as error:
                # everything else is served
                log.error("%s", error)
        if self._ended:
            self._group.own_run_dir()
            self._group.release_qmp()

    def close(self) -> None:
        """Close what nobody has taken."""
        for held in self._held.values():
            if held.connection is not None:
                held.connection.close()


# --- the new process ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TakeOver:
    """The new process's side. Made by the command line, used by `open_group`."""

    pipe: Pipe
    _parcels: list[MemberParcel] = field(default_factory=list)
    _taken: list[_Slot] = field(default_factory=list)
    _touched: set[int] = field(default_factory=set)
    """Members whose rings may have run here."""
    _run_dir: RunDir | None = None
    _ready: bool = False
    _answered: bool = False
    """The old process knows how it ends."""
    owner_image: int | None = None
    """The owner's image, once `begin` has run."""
    qmp_listener: int | None = None
    """The QMP server's socket, once `finish` has run."""

    async def begin(self) -> GroupConfig:
        """Learn what there is to take over. Raises GroupError."""
        await self.pipe.send("hello", {"format": FORMAT, "version": _version(), "pid": os.getpid()})
        frame = await self.pipe.receive("group")
        self.owner_image = frame.fds[0] if frame.fds else None
        close_all(frame.fds[1:])
        config = group_of(frame.data.get("config"))
        for _ in range(int(frame.data["members"])):
            self._parcels.append(MemberParcel.of(await self.pipe.receive("member")))
        return config

    async def take(self, group: Group) -> None:
        """Serve the members, each from the moment on at which the old process has stopped. Raises GroupError."""
        # what is the group's isn't ours to remove before the end
        group.left = True
        kept = [Kept(parcel.config, parcel.features) for parcel in self._parcels]
        images = {parcel.config.id: parcel.image for parcel in self._parcels}
        slots = await group.prepare_members(kept, images)
        for parcel, slot in zip(self._parcels, slots, strict=True):
            slot.listener = parcel.listener
        await self.pipe.send("ready")
        self._ready = True
        async with self._returning():
            for slot in slots:
                await self._take(group, slot, await self._receive("move"))
        group.begin_keeping(kept)

    async def _take(self, group: Group, slot: _Slot, frame: Frame) -> None:
        assert slot.server is not None
        held = held_of(frame)
        if frame.data.get("id") != slot.config.id:
            raise GroupError(f"the other process hands over member {frame.data.get('id')}, not {slot.config.id}")
        slot.member.set_writeback(bool(frame.data["writeback"]))
        dropped = None
        self._touched.add(slot.config.id)
        try:
            await slot.server.take_over(held)
        except (_native.NativeError, OSError) as error:
            if not frame.data.get("force"):
                if slot.server.untouched:
                    self._touched.discard(slot.config.id)
                reason = f"its front end can't be taken over: {error}; or use force"
                raise MemberError(slot.config.id, reason) from error
            dropped = str(error)
            log.warning("member %d: its front end can't be taken over: %s", slot.config.id, error)
        self._taken.append(slot)
        await group.start_members([slot])
        await self.pipe.send("taken", {"id": slot.config.id, "dropped": dropped})

    async def finish(self, group: Group) -> RunDir:
        """What is the group's: the run directory, the QMP socket, the owner's functions, virtio-vhost-user devices.

        Raises GroupError.
        """
        async with self._returning():
            frame = await self._receive("end")
            if len(frame.fds) != 2:
                close_all(frame.fds)
                raise GroupError("the other process hands over no lock and no QMP socket")
            lock, self.qmp_listener = frame.fds
            await group.serve_owner()
            await group.serve_vhost_user_devices()
        self._run_dir = RunDir.adopt(group.run_dir, lock)
        return self._run_dir

    async def serving(self, group: Group) -> None:
        """Everything is served: the old process may go, and has to."""
        assert self._run_dir is not None
        for slot in self._taken:
            if slot.server is not None:
                slot.server.own()
        self._run_dir.own()
        group.left = False
        self._answered = True
        try:
            await self.pipe.send("serving")
        except GroupError as error:
            # it doesn't hang up while we are alive, so it is dead, and we have got all it had
            log.warning("%s, after it had handed over", error)
        self.pipe.close()

    async def refuse(self, reason: str) -> None:
        """Tell the old process why it has to go on, unless it knows."""
        if not self._answered:
            with suppress(GroupError):
                await self.pipe.send("error", {"reason": reason})
        self.pipe.close()

    @asynccontextmanager
    async def _returning(self) -> AsyncIterator[None]:
        """When it fails in here, what was taken is returned."""
        try:
            yield
        except (GroupError, OSError) as error:
            if not self._answered:
                await self._refuse_and_return(str(error))
            raise
        except trio.Cancelled:
            # with everything else: what was taken is about to end, and what wasn't is as it was
            with trio.CancelScope(shield=True, deadline=trio.current_time() + RETURN_PATIENCE):
                await self._refuse_and_return("the new process was told to stop", ending=True)
            raise

    async def _receive(self, kind: str) -> Frame:
        frame = await self.pipe.receive(kind, "return")
        if frame.kind == "return":
            await self._return(self._taken)
            raise GroupError("the other process goes on by itself")
        return frame

    async def _refuse_and_return(self, reason: str, *, ending: bool = False) -> None:
        self._answered = True
        with suppress(GroupError):
            await self.pipe.send("error", {"reason": reason})
            if self._ready:
                while (frame := await self.pipe.receive("return", "move", "end")).kind != "return":
                    close_all(frame.fds)
                await self._return([] if ending else self._taken)

    async def _return(self, slots: Sequence[_Slot]) -> None:
        self._answered = True
        for slot in slots:
            assert slot.server is not None
            try:
                held = await slot.server.hold()
            except GroupError as error:
                # it ends with us, and the old process disconnects the front end
                log.warning("%s", error)
                continue
            data, fds = held_frame(held)
            await self.pipe.send("returned", {"id": slot.config.id, **data}, fds)
        await self.pipe.send("done", {"touched": sorted(self._touched)})


def _version() -> str:
    from . import __version__

    return __version__


def describe(successor: Successor) -> dict[str, Any]:
    """For people and programs."""
    return asdict(successor)
