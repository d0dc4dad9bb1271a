# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Replacing the process that serves a group by a new one, while guests go on.

The running process starts the new one and hands over, member by member: what it listens on, the image with its lock,
the front end's connection. A member stands still for as long as its rings take to stop here and to start there; front
ends notice nothing, so they need no way to reconnect. (Having them reconnect was the alternative: QEMU 7.2 waits a
second before it does, and QEMUs without `reconnect` never do.)

Until the new process has said that it serves everything the old one keeps all it has. When the new one fails before a
member has moved, nothing has happened; when it fails in between, the front ends of members that have moved are
disconnected and can connect to the old one again, as after its death.

PCI functions can't be handed over: their clients are refused (or, if forced, dropped), their sockets are made anew.

This module is one with `group`: it works on the parts of a `Group`, from the outside only to keep that file readable.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio

from . import _native
from .backend import HeldConnection
from .errors import GroupError
from .handover import FORMAT, Frame, MemberParcel, Pipe, close_all, close_held, held_frame, held_of
from .rundir import RunDir
from .state import Kept

if TYPE_CHECKING:
    from .group import Group, _Slot

__all__ = ["START_PATIENCE", "Successor", "TakeOver", "hand_over"]

log = logging.getLogger(__name__)

START_PATIENCE: Final = 30.0
"""Seconds that the new process may take until it can take over."""
MOVE_PATIENCE: Final = 15.0
"""Seconds that it may take for one member."""


@dataclass(frozen=True, slots=True)
class Successor:
    """What has become of a hand-over."""

    pid: int
    members: int
    moved: int
    """Front ends that were handed over."""
    reconnecting: list[int]
    """Members whose front end had to be disconnected."""
    longest_pause: float
    """Seconds that the slowest member's rings stood still."""


# --- the old process ------------------------------------------------------------------------------------------


async def hand_over(group: Group, *, python: str | None = None, force: bool = False) -> Successor:
    """Start a new process for the group and hand everything over to it. After it `group` has nothing left to serve.

    `python`: the interpreter that has the new version; ours by default. `force`: clients of PCI functions are dropped.

    Raises GroupError; the group is served as before then, but for front ends that had to be disconnected. When
    cancelled, likewise.
    """
    if group.engine != "native":
        raise GroupError("only the native engine can hand over")
    if group.stopping.is_set() or group.handing_over:
        raise GroupError("the group is stopping, or being handed over already")
    clients = [member_id for member_id, device in group.devices() if device.functions and _has_client(device)]
    if clients and not force:
        which = ", ".join("the owner" if member_id == 0 else f"member {member_id}" for member_id in clients)
        raise GroupError(f"clients of PCI functions can't be handed over ({which}); use force to drop them")
    group.handing_over = True
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours)
    process: trio.Process | None = None
    sender = _Sender(group, pipe)
    try:
        try:
            with theirs:
                process = await _start(group, python, theirs.fileno())
            with trio.move_on_after(START_PATIENCE) as scope:
                await sender.prepare()
            if scope.cancelled_caught:
                raise GroupError(f"the new process wasn't ready after {START_PATIENCE:g} s")
            return await sender.move(process.pid)
        except BaseException:
            with trio.CancelScope(shield=True):
                if process is not None:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
                await sender.take_back()
            raise
    finally:
        group.handing_over = False
        pipe.close()


def group_log_level() -> str:
    """The log level in force, as the command line has it."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()


def _has_client(device: Any) -> bool:
    return any(server.statistics().connected for server in device.functions.values())


async def _start(group: Group, python: str | None, fd: int) -> trio.Process:
    command = [python or sys.executable, "-m", "vhu_legacy", "serve", str(group.config.source)]
    command += ["--run-dir", str(group.run_dir), "--log-level", group_log_level(), "--predecessor", str(fd)]
    if group.supervisor_pid is not None:
        command += ["--supervisor", str(group.supervisor_pid)]
    try:
        return await trio.lowlevel.open_process(command, pass_fds=(fd,), stdin=subprocess.DEVNULL)
    except OSError as error:
        raise GroupError(f"the new process can't be started: {command[0]}: {error.strerror or error}") from error


class _Sender:
    """The old process's side of one hand-over."""

    def __init__(self, group: Group, pipe: Pipe) -> None:
        self._group = group
        self._pipe = pipe
        self._slots: list[_Slot] = []
        self._moved: set[int] = set()
        self._held: dict[int, HeldConnection | None] = {}
        self._closed_functions = False

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
            await self._pipe.send("group", {"members": len(self._slots)}, fds)
        finally:
            close_all(fds)
        for slot in self._slots:
            await self._send_member(slot)
        await self._pipe.receive("ready")

    async def _send_member(self, slot: _Slot) -> None:
        assert slot.server is not None
        listener = slot.server.listener_fd()
        if listener is None:
            raise GroupError(f"member {slot.config.id}: its listener has failed; remove the member first")
        image = slot.member.image_fd()
        info = slot.member.info()
        parcel = MemberParcel(slot.config, info["assigned_features"], info["config"]["writeback"], listener, image)
        try:
            await self._pipe.send("member", *parcel.frame())
        finally:
            close_all([] if image is None else [image])

    async def move(self, pid: int) -> Successor:
        """Hand over one member after the other, then what is the group's."""
        group = self._group
        longest = 0.0
        reconnecting = []
        moved = 0
        for slot in self._slots:
            with trio.move_on_after(MOVE_PATIENCE) as scope:
                began = trio.current_time()
                attached = slot.server is not None and slot.server.statistics().connected
                outcome = await self._move(slot)
                if outcome == "moved":
                    moved += 1
                    longest = max(longest, trio.current_time() - began)
                elif attached:
                    reconnecting.append(slot.config.id)
            if scope.cancelled_caught:
                raise GroupError(f"the new process didn't take over member {slot.config.id} in {MOVE_PATIENCE:g} s")
        await group.close_owner_functions()
        self._closed_functions = True
        await self._pipe.send("end", {}, [group.lock_fd, group.qmp_listener()])
        with trio.fail_after(MOVE_PATIENCE):
            await self._pipe.receive("serving")
        # from here on it is theirs, and there is no way back
        for slot in self._slots:
            if slot.server is not None:
                slot.server.leave()
        group.left = True
        group.successor_pid = pid
        log.info("process %d serves the group; %d front ends were handed over", pid, moved)
        return Successor(pid, len(self._slots), moved, reconnecting, longest)

    async def _move(self, slot: _Slot) -> str:
        assert slot.server is not None
        member_id = slot.config.id
        await self._group.close_functions(slot)
        held = await slot.server.hold()
        self._held[member_id] = held
        if held is None:
            await self._pipe.send("idle", {"id": member_id})
        else:
            try:
                data, fds = held_frame(held)
                await self._pipe.send("connection", {"id": member_id, **data}, fds)
            finally:
                for message in held.state:
                    close_all(message.fds)
                    message.fds.clear()
        self._moved.add(member_id)
        answer = await self._pipe.receive("taken")
        if answer.data.get("dropped") is not None:
            log.warning("member %d: its front end has to reconnect: %s", member_id, answer.data["dropped"])
            return "dropped"
        return "idle" if held is None else "moved"

    async def take_back(self) -> None:
        """The new process is gone: serve everything again."""
        for slot in self._slots:
            member_id = slot.config.id
            if slot.server is None or member_id not in self._held:
                continue
            held = self._held[member_id]
            try:
                await slot.server.go_on(held, moved=member_id in self._moved)
            finally:
                if held is not None:
                    close_held(held)
            self._group.listen_functions(slot)
        if self._closed_functions:
            await self._group.reopen_owner()


# --- the new process ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TakeOver:
    """The new process's side. Made by the command line, used by `open_group`."""

    pipe: Pipe
    _parcels: list[MemberParcel] = field(default_factory=list)
    owner_image: int | None = None
    """The owner's image, once `begin` has run."""
    qmp_listener: int | None = None
    """The QMP server's socket, once `finish` has run."""

    async def begin(self) -> None:
        """Learn what there is to take over. Raises GroupError."""
        await self.pipe.send("hello", {"format": FORMAT, "version": _version(), "pid": os.getpid()})
        frame = await self.pipe.receive("group")
        self.owner_image = frame.fds[0] if frame.fds else None
        close_all(frame.fds[1:])
        for _ in range(int(frame.data["members"])):
            self._parcels.append(MemberParcel.of(await self.pipe.receive("member")))

    async def take(self, group: Group) -> None:
        """Serve the members, each from the moment on at which the old process has stopped. Raises GroupError."""
        kept = [Kept(parcel.config, parcel.features) for parcel in self._parcels]
        images = {parcel.config.id: parcel.image for parcel in self._parcels}
        slots = await group.prepare_members(kept, images)
        for parcel, slot in zip(self._parcels, slots, strict=True):
            slot.member.set_writeback(parcel.writeback)
            slot.listener = parcel.listener
        await self.pipe.send("ready")
        for slot in slots:
            await self._take(group, slot)
        group.begin_keeping(kept)

    async def _take(self, group: Group, slot: _Slot) -> None:
        frame = await self.pipe.receive("connection", "idle")
        dropped = await self._connect(slot, frame)
        await group.start_members([slot])
        await self.pipe.send("taken", {"id": slot.config.id, "dropped": dropped})

    async def _connect(self, slot: _Slot, frame: Frame) -> str | None:
        assert slot.server is not None
        if frame.data.get("id") != slot.config.id:
            close_all(frame.fds)
            raise GroupError(f"the other process hands over member {frame.data.get('id')}, not {slot.config.id}")
        if frame.kind == "idle":
            return None
        try:
            await slot.server.take_over(held_of(frame))
        except (_native.NativeError, OSError) as error:
            log.warning("member %d: its front end can't be taken over: %s", slot.config.id, error)
            return str(error)
        return None

    async def finish(self, group: Group) -> RunDir:
        """The run directory, from now on ours. Raises GroupError."""
        frame = await self.pipe.receive("end")
        if len(frame.fds) != 2:
            close_all(frame.fds)
            raise GroupError("the other process hands over no lock and no QMP socket")
        lock, self.qmp_listener = frame.fds
        return RunDir.adopt(group.run_dir, lock)

    async def serving(self) -> None:
        """Everything is served: the old process may go."""
        await self.pipe.send("serving")
        self.pipe.close()

    async def refuse(self, reason: str) -> None:
        """Tell the old process why it has to go on."""
        with suppress(GroupError):
            await self.pipe.send("error", {"reason": reason})
        self.pipe.close()


def _version() -> str:
    from . import __version__

    return __version__


def describe(successor: Successor) -> dict[str, Any]:
    """For people and programs."""
    return {
        "pid": successor.pid,
        "members": successor.members,
        "moved": successor.moved,
        "reconnecting": successor.reconnecting,
        "longest_pause": successor.longest_pause,
    }
