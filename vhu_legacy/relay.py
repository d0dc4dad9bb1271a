# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The relay of a virtio-vhost-user device: between a master's socket and the device's rxq and txq (design D8).

A master is any vhost-user front end: another VM's QEMU. The slave is the driver of the device in the backend VM. The
device itself (`_native.VhostUserDevice`) knows what a message means and makes it fit for the other side; here whole
messages are moved, one at a time, and what has to be waited for is waited for: that the driver takes a message, and
that the backend VM's QEMU maps memory. Kicks, calls and the memory itself don't come here.

Who may connect when. Before the slave has been up for the first time a master waits in the listener's backlog, so the
two VMs can be started in any order, and a QEMU that can't reconnect waits, too. Later, while the slave is down, and
from the start if this process has come after another one, there is no listener. A QEMU that waits for its back end to
answer does so with all its vCPUs stopped, and one whose connection breaks before it was answered may never try again
(vhost-user-blk of 7.2); one that is refused comes back by itself, with `reconnect-ms`.

A session ends when the master leaves or breaks a rule, when the slave goes down or is reset, and when its carrier is
gone. Then everything of it is gone but what the driver may still be looking at: shared memory stays until the slave is
up again.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import trio

from . import _native
from .backend import Host, VhostUserServer
from .channel import Channel, ConnectionEnd, TornMessage
from .config import VhostUserDeviceConfig
from .functions import FunctionServer
from .rundir import bind_unix, device_socket_name, unlink_bound

__all__ = ["Carrier", "DeviceServer", "RelayDevice"]

logger = logging.getLogger(__name__)

Carrier = Literal["vhost-user", "vfio-user"]

_BACKLOG: Final = 8
_SLAVE_REQUESTS: Final = 64
"""Requests of a slave that may wait for a master who doesn't read them; then they have no channel any more."""
_LOG_INTERVAL: Final = 10.0
"""Seconds between log lines about masters of one device that broke a rule."""


class DeviceServer(VhostUserServer):
    """The device's own vhost-user socket: its carrier is QEMU's vhost-user device."""

    __slots__ = ("_path",)

    def __init__(self, member: _native.Member, host: Host, path: Path) -> None:
        super().__init__(member, host)
        self._path: Final = path

    @property
    def path(self) -> Path:
        """The socket's."""
        return self._path


class _End(Exception):
    """The session is over: why, and the rule that was broken, if any."""

    def __init__(self, reason: str, rule: str | None = None) -> None:
        super().__init__(reason)
        self.rule = rule


class RelayDevice:
    """One virtio-vhost-user device of a group, with its sockets. `start`, then `run` in a task, then `aclose`."""

    def __init__(
        self,
        config: VhostUserDeviceConfig,
        number: int,
        pool: _native.Pool,
        host: Host,
        on_event: Callable[[str, dict[str, Any]], None],
        *,
        first: bool = True,
    ) -> None:
        """Make the device. `number` is its member number in native events; `on_event(kind, data)` is told "slave-up",
        "slave-down", "master-up", "master-down" and "broken". `first`: no process before this one has served it, so
        masters may wait for its slave.

        Raises NativeError, OSError (the RAM file).
        """
        self.config: Final = config
        self.number: Final = number
        self._pool: Final = pool
        self._tell: Final = on_event
        self._host: Final = replace(host, on_event=self._carrier_event, on_failure=self._failed)
        self.native: Final = _native.VhostUserDevice(
            pool,
            number,
            max_queues=config.max_queues,
            uuid=config.uuid,
            shared_memory=config.shared_memory,
            vectors=config.vector_count,
            ram_file=_open_ram_file(config),
        )
        self._server: DeviceServer | None = None
        self._function: FunctionServer | None = None
        self._listener: socket.socket | None = None
        self._identity = (0, 0)
        self._changed = trio.Event()
        """Set, and replaced, when the native device has something new."""
        self._was_up = False
        self._session: trio.CancelScope | None = None
        self._master_pid: int | None = None
        self._carrier: Carrier | None = None
        self._peer_pid: int | None = None
        self._logged = -_LOG_INTERVAL
        self._waiting: deque[Channel] = deque()
        """Masters that had connected when the slave went down: they wait (see above)."""
        self._first = first
        self._down = ""
        """Why the slave went down, when a session's end has told us."""

    # --- for the group ------------------------------------------------------------------------------------

    def socket_path(self, kind: str) -> Path:
        """Of "vhost-user", "vfio-user" or "front"."""
        return self._host.directory / device_socket_name(self.config.name, kind)

    def start(self) -> None:
        """Bind the sockets. Raises OSError, NativeError; then none is left."""
        try:
            self._server = DeviceServer(self.native.member, self._host, self.socket_path("vhost-user"))
            self._server.start()
            if self.config.vfio_user:
                path = self.socket_path("vfio-user")
                self._function = FunctionServer(self._pool, self.native.function(), "modern", path, self._host.hub)
            if self._first:
                self._listen()
        except BaseException:
            self._unlisten()
            raise

    async def aclose(self) -> None:
        """Let nobody connect any more, and drop who is. Bounded, and not cancelled. Idempotent."""
        if self._session is not None:
            self._session.cancel()
        self._unlisten()
        while self._waiting:
            self._waiting.popleft().close()
        with trio.CancelScope(shield=True):
            if self._server is not None:
                await self._server.aclose()
            if self._function is not None:
                await self._function.aclose()
        with suppress(_native.NativeError):
            self.native.member.close()

    @property
    def in_use(self) -> bool:
        """Whether a backend VM or a master is connected, or a master waits to be."""
        if self._carrier is not None or self._session is not None or self._waiting:
            return True
        return self._listener is not None and bool(select.select([self._listener], [], [], 0)[0])

    def native_event(self, kind: str, data: dict[str, Any]) -> None:
        """An event of the native device."""
        if kind == "function-connected":
            self._carrier_event("connected", self.number, data)
        elif kind == "function-disconnected":
            self._carrier_event("disconnected", self.number, data)
        elif kind == "broken":
            self._tell("broken", data)
            self.native.member.config_changed()
            if self._session is not None:
                self._session.cancel()
        self._wake()

    def _carrier_event(self, kind: str, number: int, data: dict[str, Any]) -> None:
        if kind == "connected":
            self._carrier = "vhost-user" if data.get("function") is None else "vfio-user"
            self._peer_pid = data.get("peer_pid")
            logger.info("device %s: backend VM connected (%s), pid %s", self.config.name, self._carrier, self._peer_pid)
        else:
            self._carrier = None
            self._peer_pid = None
            logger.info("device %s: backend VM disconnected: %s", self.config.name, data.get("reason"))
        self._wake()

    def _failed(self, number: int, error: Exception) -> None:
        logger.error("device %s: its listener failed; no backend VM can connect", self.config.name, exc_info=error)
        if self._server is not None:
            self._host.spawn(self._server.aclose)

    @property
    def maps_memory(self) -> bool:
        """Whether the carrier has agreed to map shared memory."""
        return self._server is not None and self._server.maps_memory

    def place(self) -> dict[str, Any]:
        """Where it is and how it is doing, for `query-vhost-user-devices`."""
        info = self.native.info()
        member = self.native.member.info()
        function = None if self._function is None else str(self._function.path)
        if member["broken"] is not None:
            state = "broken"
        elif self._session is not None:
            state = "paused" if info["paused"] else "connected"
        elif self.native.slave_up:
            state = "slave-up"
        else:
            state = "paused" if info["paused"] else "waiting"
        return {
            "sockets": {
                "vhost_user": str(self.socket_path("vhost-user")),
                "vfio_user": function,
                "front": str(self.socket_path("front")),
            },
            "state": state,
            "carrier": self._carrier,
            "peer_pid": self._peer_pid,
            "master_pid": self._master_pid,
            "broken": member["broken"],
        }

    # --- the listener -------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._listener is not None:
            return
        path = self.socket_path("front")
        listener = bind_unix(path, _BACKLOG)
        status = path.lstat()
        self._identity = (status.st_dev, status.st_ino)
        self._listener = listener

    def _unlisten(self) -> None:
        """Let no master connect. Those that have done so keep their connection, for when the slave is up again."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        unlink_bound(self.socket_path("front"), self._identity)
        with suppress(OSError):
            while len(self._waiting) < _BACKLOG:
                self._waiting.append(Channel(listener.accept()[0]))
        trio.lowlevel.notify_closing(listener)
        # connections that wait to be accepted go with it, and closing what was sent on them may take long
        _native.discard([listener.detach()])

    # --- sessions -----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def run(self) -> None:
        """Serve one master after the other, until cancelled."""
        while True:
            await self._until_up()
            if not await self._clear_leftovers():
                continue
            channel = await self._accept()
            if channel is not None:
                await self._serve(channel)

    async def _until_up(self) -> None:
        if self.native.slave_up:
            return
        if self._was_up:
            self._was_up = False
            self._tell("slave-down", {"reason": self._why_down()})
            self._unlisten()
        await self._until(lambda: self.native.slave_up)

    def _why_down(self) -> str:
        down, self._down = self._down, ""
        if self._carrier is None:
            return "the backend VM has disconnected"
        if self.native.member.info()["broken"] is not None:
            return "its driver broke a rule"
        return down or "its driver said so, or the device was reset"

    async def _clear_leftovers(self) -> bool:
        """Unmap what the last master has left; False when the slave isn't up any more."""
        if not self._was_up:
            self._was_up = True
            self._tell("slave-up", {})
        while self.native.slave_up and self._server is not None and self._server.is_sharing:
            # of the last master's memory: the answer decides what there is to unmap
            await trio.sleep(0.01)
        for operation in self.native.leftovers():
            if not await self._share(operation, lambda: self.native.slave_up):
                if self.native.slave_up:
                    logger.error(
                        "device %s: the backend VM's QEMU doesn't unmap an earlier master's memory; "
                        "no master can connect until the slave has been down",
                        self.config.name,
                    )
                    await self._until(lambda: not self.native.slave_up)
                return False
        return self.native.slave_up

    async def _accept(self) -> Channel | None:
        """The next master; None when the slave goes down before one comes."""
        try:
            self._listen()
        except OSError as error:
            logger.error("device %s: can't listen for masters: %s", self.config.name, error)
            await trio.sleep(1)
            return None
        if self._waiting:
            return self._waiting.popleft()
        listener = self._listener
        assert listener is not None
        found: list[socket.socket] = []

        async def accept(scope: trio.CancelScope) -> None:
            while True:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(listener)
                try:
                    found.append(listener.accept()[0])
                except BlockingIOError:
                    continue
                except OSError as error:
                    logger.warning("device %s: accept: %s", self.config.name, error)
                    await trio.sleep(0.2)
                    continue
                scope.cancel()
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, nursery.cancel_scope)
            await self._until(lambda: not self.native.slave_up)
            nursery.cancel_scope.cancel()
        if not found:
            return None
        channel = Channel(found[0])
        if not self.native.slave_up:
            self._waiting.appendleft(channel)
            return None
        return channel

    async def _serve(self, channel: Channel) -> None:
        """One master, from its first message to its last."""
        if channel.hung_up():
            # it has waited in vain: no reason to end the slave's session with it
            channel.close()
            return
        peer_pid = channel.peer_pid()
        try:
            session = self.native.connect_master()
        except _native.BusyError:
            # the slave has just gone down
            self._waiting.appendleft(channel)
            await trio.lowlevel.checkpoint()
            return
        self._master_pid = peer_pid
        self._down = ""
        self._tell("master-up", {"peer_pid": peer_pid})
        logger.info("device %s: master connected, pid %s", self.config.name, peer_pid)
        end = _End("the slave went down")
        try:
            with trio.CancelScope() as self._session:
                await self._tell_driver()
                end = await _Session(self, session, channel).run()
        finally:
            self._session = None
            self._master_pid = None
            # first: the master comes back as soon as it has seen the end
            self._unlisten()
            channel.close()
            # With a rule that the native device has seen broken, it has ended the session itself.
            if self.native.disconnect_master(session, end.rule, str(end)) or end.rule is not None:
                self._down = f"its master has gone: {end}"
                with trio.CancelScope(shield=True):
                    await self._tell_driver()
            self._tell("master-down", {"reason": str(end)})
            self._log_end(end)

    def _log_end(self, end: _End) -> None:
        now = trio.current_time()
        if end.rule is None:
            logger.info("device %s: master gone: %s", self.config.name, end)
        elif now - self._logged >= _LOG_INTERVAL:
            # masters can connect and break a rule as often as they like
            self._logged = now
            logger.warning("device %s: master sent away: %s", self.config.name, end)

    async def _tell_driver(self) -> None:
        """The status field has changed. A PCI function's driver has been told by the native device."""
        if self._server is not None:
            await self._server.config_changed()

    async def _share(self, operation: _native.SharedMemoryOperation, wanted: Callable[[], bool]) -> bool:
        """Have the carrier change its view of the shared memory; False when it refuses, or nobody wants it any more."""
        while wanted():
            if self._server is None or not self.native.ready:
                # paused: the carrier dies of requests now
                await self._changed.wait()
                continue
            # noted as soon as it is answered, whoever has stopped waiting for it
            done = await self._server.share_memory(operation, functools.partial(self.native.carried_out, operation))
            if done is None:
                # an answer is still to come, or there is no channel: nothing tells us when
                await trio.sleep(0.01)
                continue
            return done
        return False


class _Session:
    """A connected master."""

    def __init__(self, device: RelayDevice, number: int, channel: Channel) -> None:
        self._device: Final = device
        self._native: Final = device.native
        self._number: Final = number
        self._channel: Final = channel
        self._slave_channel: Channel | None = None
        self._requests: trio.MemorySendChannel[bytes] | None = None
        """What the slave has to say on it."""
        self._slave_scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._end: _End | None = None

    async def run(self) -> _End:
        """Until it ends; why it did."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._guard, self._from_master)
                self._nursery.start_soon(self._guard, self._from_slave)
                await self._device._until(lambda: not self._alive())
                self._over(_End("the slave went down, or its device was reset"))
        finally:
            self._close_slave_channel()
        assert self._end is not None
        return self._end

    def _alive(self) -> bool:
        return self._native.session == self._number

    def _over(self, end: _End) -> None:
        if self._end is None:
            self._end = end
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a part of the session; its end is that of the whole."""
        try:
            await work()
        except _End as end:
            self._over(end)
        except ConnectionEnd:
            self._over(_End("closed by the master"))
        except TornMessage as error:
            self._over(_End(str(error), error.rule))
        except _native.NativeError as error:
            self._over(_End(str(error).removeprefix(f"{error.rule}: "), error.rule))
        except (OSError, trio.ClosedResourceError, trio.BrokenResourceError) as error:
            self._over(_End(f"connection broke: {error}"))

    async def _from_master(self) -> None:
        channel, native = self._channel, self._native
        while True:
            # one at a time: what follows stays in the socket until the driver has taken this
            await self._device._until(lambda: native.waiting == 0 or not self._alive())
            if not self._alive():
                return
            message = await channel.receive()
            if message is None:
                await trio.lowlevel.wait_readable(channel.fileno())
                continue
            outcome = native.handle(self._number, message.header, message.payload, message.fds)
            fd = outcome.take_channel()
            if fd is not None:
                self._open_slave_channel(fd)
            operations = outcome.operations
            if operations and not self._device.maps_memory:
                raise _End("the backend VM's QEMU can't map memory", "shared-memory.not-negotiated")
            for operation in operations:
                if not await self._device._share(operation, self._alive):
                    if not self._alive():
                        return
                    raise _End("the backend VM's QEMU doesn't map the master's memory", "shared-memory.refused")
            if operations:
                native.commit(self._number)
            await trio.lowlevel.checkpoint()

    async def _from_slave(self) -> None:
        while True:
            # before looking: what comes while something is being sent sets this one
            changed = self._device._changed
            messages = self._native.take()
            if not messages:
                await changed.wait()
            for to_channel, data in messages:
                if not to_channel:
                    await self._channel.send(data)
                elif self._requests is not None:
                    # Not waited for: a master that waits for an answer reads no requests.
                    try:
                        self._requests.send_nowait(data)
                    except trio.WouldBlock:
                        logger.info("device %s: the master doesn't read the slave's requests", self._device.config.name)
                        self._close_slave_channel()

    def _open_slave_channel(self, fd: int) -> None:
        assert self._nursery is not None
        self._close_slave_channel()
        self._slave_channel = channel = Channel.from_fd(fd)
        self._requests, requests = trio.open_memory_channel[bytes](_SLAVE_REQUESTS)
        self._nursery.start_soon(self._guard, functools.partial(self._from_channel, channel))
        self._nursery.start_soon(self._guard, functools.partial(self._to_channel, channel, requests))

    def _close_slave_channel(self) -> None:
        channel, self._slave_channel = self._slave_channel, None
        requests, self._requests = self._requests, None
        if requests is not None:
            requests.close()
        if channel is not None:
            channel.close()

    async def _to_channel(self, channel: Channel, requests: trio.MemoryReceiveChannel[bytes]) -> None:
        """Requests of the slave, in their order."""
        try:
            async for data in requests:
                await channel.send(data)
        except (OSError, trio.ClosedResourceError) as error:
            logger.info("device %s: slave's channel: %s", self._device.config.name, error)
            if self._slave_channel is channel:
                self._close_slave_channel()

    async def _from_channel(self, channel: Channel) -> None:
        """Answers of the master to requests of the slave's."""
        try:
            while True:
                await self._device._until(lambda: self._native.waiting == 0 or not self._alive())
                message = await channel.receive()
                if message is None:
                    await trio.lowlevel.wait_readable(channel.fileno())
                    continue
                if message.fds:
                    _native.discard(message.fds)
                    raise _End("file descriptors with an answer on the slave's channel", "message.fds")
                self._native.handle_channel(self._number, message.header, message.payload)
                await trio.lowlevel.checkpoint()
        except (ConnectionEnd, OSError, trio.ClosedResourceError):
            # the master goes on without it
            if self._slave_channel is channel:
                self._close_slave_channel()


def _open_ram_file(config: VhostUserDeviceConfig) -> tuple[int, int] | None:
    """The file that the front end VM will have its memory in, made if it isn't there. Raises OSError."""
    if config.ram_file is None:
        return None
    fd = os.open(config.ram_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(fd).st_size < config.ram_size:
            os.ftruncate(fd, config.ram_size)
    except BaseException:
        os.close(fd)
        raise
    return fd, config.ram_size
