# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Real guests, and the group process that serves their disks: a stock kernel under a stock QEMU whose disks are members
over vhost-user (:class:`Disk`) or whole PCI functions over vfio-user (:class:`Function`).

`boot` runs one task in a fresh guest and returns what the guest saw. `open_vm` gives a running `Vm` to work
with: commands to the guest, QMP to its QEMU, hot-plug and unplug.

The guest runs images/init, which prints JSON lines on its second serial port and takes commands there; the
first one carries the kernel's console, so a kernel message never tears a line apart. Both end up in files of
the VM's log directory. QEMU gets its end of the control and QMP connections as inherited socket pairs: no
socket files, nothing to clean up, no race to connect.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket as stdlib_socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import trio
import trio_asyncio  # type: ignore[import-untyped]
from qemu.qmp import ExecuteError, QMPClient, QMPError

from . import images, initramfs, qemu_args
from .errors import GuestError
from .rundir import device_socket_name

Mode: TypeAlias = Literal["legacy", "transitional", "modern"]
MODES: Final[tuple[Mode, ...]] = ("legacy", "transitional", "modern")
Kind: TypeAlias = Literal["owner", "legacy", "transitional", "modern"]
KINDS: Final[tuple[Kind, ...]] = ("owner", "legacy", "transitional", "modern")
"""The PCI functions a group serves over vfio-user."""
Via: TypeAlias = Literal["vhost-user", "vfio-user"]
TASKS: Final = ("verify", "reboot", "rw-loop")
"""What :func:`boot` can have a guest do; a :class:`VmConfig` may also have ``idle``, ``load`` and ``fs``."""

HOST_KIB: Final = 1024
GUEST_KIB: Final = 4096
MIN_IMAGE_BYTES: Final = (HOST_KIB + GUEST_KIB + 4) * 1024
"""An image must be at least this big for the guest's checks with the default areas."""

VHOST_USER_DEVICE_SINCE: Final = (11, 1)
"""The QEMU series whose generic vhost-user device has shared memory."""

_TAIL_LINES = 15
_LINE_LIMIT = 1 << 16
_KEPT_LOGS = 20

Message: TypeAlias = dict[str, Any]


class GuestWedgedError(GuestError):
    """The guest made no progress within the bound (it neither failed nor finished)."""


@dataclass(frozen=True)
class Disk:
    """One vhost-user-blk-pci device.

    `queues` is always given to QEMU: by default it takes one per CPU and fails when the back end has fewer. `packed`
    and `in_order` are the device's; the guest gets them if the member offers them, too. QEMU 7.2 has no `in_order`.
    """

    socket: Path
    mode: Mode = "modern"
    id: str = "disk0"
    queues: int = 1
    reconnect: bool = True
    packed: bool = False
    in_order: bool = False


@dataclass(frozen=True)
class Function:
    """One vfio-user-pci device: a whole PCI function, with a disk on it.

    It sits on pcie.0 (on the PCI bus of machine pc), or with `port` behind a PCIe root port of its own.
    """

    socket: Path
    id: str = "function0"
    port: bool = False
    boot_index: int | None = None


@dataclass(frozen=True)
class Drive:
    """A disk of QEMU's own: a virtio-blk-pci on a raw image."""

    image: Path
    id: str = "drive0"


@dataclass(frozen=True)
class FileSystem:
    """One vhost-user-fs-pci device."""

    socket: Path
    tag: str = "vhu"
    id: str = "fs0"
    queues: int = 1


@dataclass(frozen=True)
class VhostUserDevice:
    """A virtio-vhost-user device, through which this guest is the back end of others.

    `max_queues` has to be that of the group file: over vhost-user QEMU makes a queue for each doorbell.
    """

    socket: Path
    max_queues: int
    via: Via = "vhost-user"
    id: str = "vvu0"


Device: TypeAlias = Disk | Function
OtherDevice: TypeAlias = Drive | FileSystem | VhostUserDevice


@dataclass(frozen=True)
class VmConfig:
    """What to start. `qemu` None is the machine's own QEMU; `task` is one of images/init's.

    `append` goes to the end of the kernel command line: ``pci=nomsi`` for INTx, ``virtio_pci.force_legacy=1`` for the
    legacy driver on a transitional device. With `from_disk` QEMU isn't given the kernel: the firmware has to find it on
    a disk (with a `boot_index`) that :func:`make_boot_image` has made. Without `shared_memory` a back end can't map the
    guest's memory: vfio-user then goes through its socket, vhost-user can't do at all. With `memory_file` that memory
    is a file, so that others can know it before QEMU runs, who makes it if it isn't there.

    `devices` come after the disks. `overlays` are archives (or their bytes) that are laid over the kernel's initramfs,
    in order, and `init` the program to start instead of its own; see :mod:`.backend_guest`.
    """

    disks: tuple[Device, ...] = ()
    devices: tuple[OtherDevice, ...] = ()
    kernel: str = "6.12"
    qemu: str | None = None
    machine: Literal["q35", "pc"] = "q35"
    task: str = "idle"
    memory_mib: int = 256
    cpus: int = 1
    hotplug_ports: int = 0
    host_kib: int = HOST_KIB
    guest_kib: int = GUEST_KIB
    writers: int = 4
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    log_dir: Path | None = None
    append: tuple[str, ...] = ()
    from_disk: bool = False
    shared_memory: bool = True
    memory_file: Path | None = None
    overlays: tuple[Path | bytes, ...] = ()
    init: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def disk_count(self) -> int:
        """How many disks the guest will find."""
        return len(self.disks) + sum(isinstance(device, Drive) for device in self.devices)


@dataclass(frozen=True)
class GuestResult:
    """What one guest did and saw.

    `driver_mode` is the guest driver's own view (VERSION_1 acknowledged or not), `interrupts` the kind it has for the
    disk ("msix", "intx") with `vectors` of them (0 for INTx), and `interrupt_counts` how many had come by name when the
    guest found the disk. `complaints` are the kernel's own lines of level error or worse and those of virtio that speak
    of errors or admin commands, over all boots. The sums are SHA-256 of the areas as the guest read them; compare them
    with the image by :func:`area_sum`.
    """

    kernel: str
    release: str
    qemu: str
    mode: Mode
    task: str
    driver_mode: str
    features: int
    disk_bytes: int
    read_only: bool
    boots: int
    rounds: int
    seconds_to_first_line: float
    seconds: float
    host_sum: str
    host_offset: int
    host_bytes: int
    guest_sum: str | None
    guest_offset: int
    guest_bytes: int
    console_log: Path
    interrupts: str
    vectors: int
    interrupt_counts: dict[str, int]
    complaints: tuple[str, ...]


def device_arguments(disk: Device, qemu: images.QemuCommand, bus: str | None = None) -> list[str]:
    """QEMU's arguments for one disk, as that version wants them. Raises :class:`GuestError` for a function on a QEMU
    that has no vfio-user-pci.
    """
    if isinstance(disk, Function):
        return ["-device", json.dumps(_function_properties(disk, qemu, bus))]
    chardev = f"socket,id=char-{disk.id},path={qemu_args.escape(disk.socket)}"
    if disk.reconnect:
        chardev += ",{}={}".format(*_reconnect(qemu))
    device = f"vhost-user-blk-pci,id={disk.id},chardev=char-{disk.id},num-queues={disk.queues}"
    device += (",packed=on" if disk.packed else "") + (",in_order=on" if disk.in_order else "")
    device += f",{qemu_args.MODE_FLAGS[disk.mode]}" + (f",bus={bus}" if bus is not None else "")
    return ["-chardev", chardev, "-device", device]


def other_device_arguments(device: OtherDevice, qemu: images.QemuCommand) -> list[str]:
    """QEMU's arguments for a device that is no member's disk. Raises :class:`GuestError` for one that QEMU lacks."""
    match device:
        case Drive():
            node = f"node-{device.id}"
            file = f"driver=raw,node-name={node},file.driver=file,file.filename={qemu_args.escape(device.image)}"
            return ["-blockdev", file, "-device", f"virtio-blk-pci,id={device.id},drive={node}"]
        case FileSystem():
            # No reconnecting: QEMU doesn't start a file system again that it has lost.
            chardev = f"socket,id=char-{device.id},path={qemu_args.escape(device.socket)}"
            what = f"vhost-user-fs-pci,id={device.id},chardev=char-{device.id},tag={qemu_args.escape(device.tag)}"
            return ["-chardev", chardev, "-device", f"{what},num-request-queues={device.queues}"]
        case VhostUserDevice(via="vfio-user"):
            return ["-device", json.dumps(_function_properties(Function(device.socket, device.id), qemu, None))]
        case _:
            if qemu.series < VHOST_USER_DEVICE_SINCE:
                wanted = ".".join(map(str, VHOST_USER_DEVICE_SINCE))
                raise GuestError(
                    f"QEMU {qemu.version} has no vhost-user device with shared memory; needed: {wanted} or later"
                )
            # rxq, txq, two doorbells for each queue, and that of the log. Connected already when QEMU makes the device,
            # and never again: this device of QEMU's can't reconnect.
            what = f"vhost-user-test-device-pci,id={device.id},chardev=char-{device.id},virtio-id=32"
            what += f",num_vqs={2 * device.max_queues + 3},config_size=24,vq_size=64"
            chardev = f"socket,id=char-{device.id},path={qemu_args.escape(device.socket)}"
            return ["-chardev", chardev, "-device", what]


def _reconnect(qemu: images.QemuCommand) -> tuple[str, int]:
    """How this version is told to come back when the group is restarted: option and value."""
    return ("reconnect-ms", 200) if qemu.series >= qemu_args.RECONNECT_MS_SINCE else ("reconnect", 1)


def _function_properties(function: Function, qemu: images.QemuCommand, bus: str | None) -> dict[str, object]:
    try:
        return qemu_args.function_properties(
            function.socket, qemu.series, name=function.id, bus=bus, boot_index=function.boot_index
        )
    except ValueError as error:
        raise GuestError(str(error)) from error


def kernel_arguments(config: VmConfig) -> str:
    """The guest's kernel command line."""
    return " ".join(
        [
            "console=ttyS0 loglevel=5 panic=-1 no_timer_check tsc=unstable random.trust_cpu=on",
            f"vhu.port=ttyS1 vhu.task={config.task} vhu.disks={config.disk_count} vhu.run={config.run}",
            f"vhu.host={config.host_kib} vhu.guest={config.guest_kib} vhu.writers={config.writers}",
            *([f"rdinit={config.init}"] if config.init is not None else []),
            *config.append,
        ]
    )


def make_boot_image(path: Path, config: VmConfig, size: int) -> tuple[VmConfig, str]:
    """A raw image of so many bytes that a guest boots from, as if `config` had given its kernel to QEMU.

    Returns `config` for that guest (the host's area is what it boots from), and the SHA-256 of the host's area. Raises
    :class:`GuestError` when the image is too small, :class:`ImagesError` when the kernel is missing. Call it from a
    thread.
    """
    kernel = images.kernel(config.kernel)
    # The guest reads its areas in blocks of 64 KiB.
    host_kib = -(-len(images.boot_blocks(kernel, "")) // 65536) * 64
    config = replace(config, from_disk=True, host_kib=host_kib)
    blocks = images.boot_blocks(kernel, kernel_arguments(config)).ljust(host_kib * 1024, b"\0")
    if size < len(blocks) + (config.guest_kib + 4) * 1024:
        raise GuestError(f"{path}: {size} bytes are too few for a kernel of {len(blocks)} bytes and the guest's area")
    with path.open("wb") as file:
        file.truncate(size)
        file.write(blocks)
    return config, hashlib.sha256(blocks).hexdigest()


def vm_arguments(config: VmConfig, qemu: images.QemuCommand, kernel: images.GuestKernel, log_dir: Path) -> list[str]:
    """QEMU's whole command line but for the inherited control and QMP sockets."""
    ports: list[str] = []
    behind = [disk for disk in config.disks if isinstance(disk, Function) and disk.port]
    if config.machine == "q35":
        names = [f"port{number}" for number in range(config.hotplug_ports)] + [f"port-{disk.id}" for disk in behind]
        for number, name in enumerate(names, 1):
            # An I/O window of its own: a legacy device that comes later needs one.
            ports += ["-device", f"pcie-root-port,id={name},chassis={number},slot={number},io-reserve=4k"]
    elif behind:
        raise GuestError("machine pc has no PCIe root ports")
    argv = [*qemu.argv, "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-machine", f"{config.machine},accel=tcg,memory-backend=ram"]
    # vhost-user needs guest memory that can be handed over as an fd; vfio-user would have to copy through its socket.
    backend = "memory-backend-memfd,share=on" if config.shared_memory else "memory-backend-ram"
    if config.memory_file is not None:
        backend = f"memory-backend-file,share=on,mem-path={qemu_args.escape(config.memory_file)}"
    argv += ["-object", f"{backend},id=ram,size={config.memory_mib}M"]
    argv += ["-m", f"{config.memory_mib}M", "-smp", str(config.cpus)]
    if not config.from_disk:
        initrd = log_dir / "initrd" if config.overlays else kernel.initramfs
        argv += ["-kernel", str(kernel.vmlinuz), "-initrd", str(initrd), "-append", kernel_arguments(config)]
    argv += [
        "-chardev",
        f"file,id=console,path={qemu_args.escape(log_dir / 'console.log')}",
        "-serial",
        "chardev:console",
    ]
    argv += ["-serial", "chardev:control", "-mon", "chardev=qmp,mode=control"]
    if config.task == "verify":
        # A panic or an unexpected reboot ends QEMU instead of starting over.
        argv += ["-no-reboot"]
    argv += ports
    for disk in config.disks:
        bus = f"port-{disk.id}" if isinstance(disk, Function) and disk.port else None
        argv += device_arguments(disk, qemu, bus)
    for device in config.devices:
        argv += other_device_arguments(device, qemu)
    return [*argv, *config.extra]


class _Qmp:
    """qemu.qmp's client under trio, in the asyncio loop given, or that is current when it is made."""

    def __init__(self, name: str, loop: trio_asyncio.BaseTrioEventLoop | None = None) -> None:
        self._client = QMPClient(name)
        # Kept: a caller may sit inside another VM's loop when it uses this one.
        self._loop = trio_asyncio.current_loop.get() if loop is None else loop

    async def connect(self, address: str | stdlib_socket.socket, timeout: float) -> None:
        """Raises what qemu.qmp raises, or :class:`trio.TooSlowError`."""
        with trio.fail_after(timeout):
            await trio_asyncio.aio_as_trio(self._client.connect, loop=self._loop)(address)

    async def execute(self, command: str, arguments: dict[str, object] | None, timeout: float) -> Any:
        """Raises what qemu.qmp raises, or :class:`trio.TooSlowError`."""
        with trio.fail_after(timeout):
            return await trio_asyncio.aio_as_trio(self._client.execute, loop=self._loop)(command, arguments)

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[Callable[[], Awaitable[dict[str, Any]]]]:
        """Within the context, calling the result waits for the next of these events."""
        with self._client.listener(names) as listener:
            yield trio_asyncio.aio_as_trio(listener.get, loop=self._loop)

    async def close(self) -> None:
        """Bounded; errors of a connection that is gone already don't matter."""
        with trio.move_on_after(2), contextlib.suppress(Exception):
            await trio_asyncio.aio_as_trio(self._client.disconnect, loop=self._loop)()


class Vm:
    """A running guest; made by :func:`open_vm`.

    Its methods raise :class:`GuestError` with the end of the console log when the guest or its QEMU fails,
    and :class:`GuestWedgedError` when a bound runs out. All of them can be cancelled; the VM stays usable,
    except that the answer to a cancelled command is dropped when it comes.
    """

    def __init__(
        self,
        config: VmConfig,
        qemu: images.QemuCommand,
        kernel: images.GuestKernel,
        log_dir: Path,
        on_message: Callable[[Message], None] | None = None,
    ) -> None:
        self.config = config
        self.qemu = qemu
        self.kernel = kernel
        self.log_dir = log_dir
        self.messages: list[Message] = []
        self.started = trio.current_time()
        self.first_message: float | None = None
        self._on_message = on_message
        self._changed = trio.Event()
        self._process: trio.Process | None = None
        self._control: trio.SocketStream | None = None
        self._client: _Qmp | None = None
        self._exit_status: int | None = None
        self._exited = trio.Event()
        self._commands = 0
        self._plugged: dict[str, str] = {}
        self._plugged_functions: set[str] = set()

    # -- start and stop

    @property
    def console_log(self) -> Path:
        """The kernel's console."""
        return self.log_dir / "console.log"

    @property
    def pid(self) -> int | None:
        """QEMU's process id while it runs."""
        return self._process.pid if self._process is not None and self._exit_status is None else None

    async def _start(self, nursery: trio.Nursery) -> None:
        argv = vm_arguments(self.config, self.qemu, self.kernel, self.log_dir)
        if self.config.overlays:
            parts = (self.kernel.initramfs, *self.config.overlays)
            await trio.to_thread.run_sync(_write_initrd, self.log_dir / "initrd", parts)
        control, control_peer = stdlib_socket.socketpair()
        qmp, qmp_peer = stdlib_socket.socketpair()
        try:
            fds = (control_peer.fileno(), qmp_peer.fileno())
            argv += ["-chardev", f"socket,id=control,fd={fds[0]}", "-chardev", f"socket,id=qmp,fd={fds[1]}"]
            await trio.Path(self.log_dir / "command").write_text(shlex.join(argv) + "\n")
            output = await trio.to_thread.run_sync(_open_log, self.log_dir / "qemu.log")
            try:
                self._process = await trio.lowlevel.open_process(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=fds,
                    # Ctrl-C goes to us, who then stop QEMU in order.
                    start_new_session=True,
                    env={**os.environ, **self.qemu.env},
                )
            except OSError as error:
                raise GuestError(f"cannot start {argv[0]}: {error}") from error
            finally:
                os.close(output)
            self._control = trio.SocketStream(trio.socket.from_stdlib_socket(control))
        except BaseException:
            control.close()
            qmp.close()
            raise
        finally:
            control_peer.close()
            qmp_peer.close()
        nursery.start_soon(self._reap)
        nursery.start_soon(self._read_control)
        self._client = _Qmp(f"vm-{self._process.pid}")
        try:
            await self._client.connect(qmp, 30)
        except trio.TooSlowError:
            raise self._error(GuestWedgedError, "QEMU did not answer on QMP within 30 s") from None
        except (QMPError, OSError, EOFError) as error:
            with trio.move_on_after(2):
                await self._exited.wait()
            raise self._error(GuestError, f"QEMU gave no QMP connection: {error}") from error
        # QEMU has read it. The others in the log directory are kept, and small.
        (self.log_dir / "initrd").unlink(missing_ok=True)

    async def _stop(self) -> None:
        """End QEMU, by force if it must be, and reap it. Runs shielded and bounded."""
        process = self._process
        if process is not None:
            if self._exit_status is None and self._client is not None:
                with contextlib.suppress(QMPError, OSError, EOFError, trio.TooSlowError):
                    await self._client.execute("quit", None, 2)
                with trio.move_on_after(3):
                    await self._exited.wait()
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._exit_status is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(number)
                    with trio.move_on_after(5):
                        await self._exited.wait()
        if self._client is not None:
            await self._client.close()
        if self._control is not None:
            await self._control.aclose()

    async def _reap(self) -> None:
        assert self._process is not None
        # Also when the VM is given up: _stop makes the process end, and nobody else waits for it.
        with trio.CancelScope(shield=True):
            self._exit_status = await self._process.wait()
            self._exited.set()
            # Lines that QEMU wrote last are still in the socket; the reader announces the end once it has
            # them.

    async def _read_control(self) -> None:
        assert self._control is not None
        pending = b""
        with (self.log_dir / "control.log").open("ab", buffering=0) as log:
            while True:
                try:
                    data = await self._control.receive_some(1 << 16)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    data = b""
                if not data:
                    break
                log.write(data)
                pending += data
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    self._take_line(line)
                if len(pending) > _LINE_LIMIT:
                    pending = b""
        await self._exited.wait()
        self._announce()

    def _take_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        if not text.startswith("VHU "):
            return
        try:
            message = json.loads(text[4:])
        except ValueError:
            message = {"event": "error", "reason": f"malformed line from the guest: {text[:200]}"}
        if self.first_message is None:
            self.first_message = trio.current_time()
        self.messages.append(message)
        if self._on_message is not None:
            self._on_message(message)
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- what the guest says

    def _error(self, kind: type[GuestError], reason: str) -> GuestError:
        parts = [reason]
        if self._exit_status is not None:
            parts[0] += f" (QEMU ended with status {self._exit_status})"
        for name in ("qemu.log", "control.log", "console.log"):
            lines = _tail(self.log_dir / name)
            if lines:
                parts.append(f"-- end of {name}:\n" + "\n".join(lines))
        return kind("\n".join(parts), self.console_log)

    async def wait_message(
        self, wanted: Callable[[Message], bool], what: str, timeout: float, *, start: int = 0
    ) -> Message:
        """The first message from position `start` on that `wanted` accepts.

        Raises :class:`GuestError` if the guest reports an error or QEMU ends first,
        :class:`GuestWedgedError` after `timeout` s.
        """
        position = start
        with trio.move_on_after(timeout):
            while True:
                for message in self.messages[position:]:
                    position += 1
                    if wanted(message):
                        return message
                    if message.get("event") == "error":
                        raise self._error(GuestError, f"the guest failed: {message.get('reason')}")
                if self._exit_status is not None and self._control_is_drained():
                    raise self._error(GuestError, f"QEMU ended while waiting for {what}")
                await self._changed.wait()
        raise self._error(GuestWedgedError, f"no {what} within {timeout:.0f} s")

    def _control_is_drained(self) -> bool:
        # After the exit the reader announces once more when it has read to the end; before that a line may
        # still come.
        return self._exited.is_set()

    async def wait_event(self, name: str, timeout: float = 60, *, start: int = 0) -> Message:
        """The first message from `start` on whose event is `name`; errors as :meth:`wait_message`."""
        return await self.wait_message(lambda m: m.get("event") == name, f"event {name!r}", timeout, start=start)

    async def command(self, text: str, timeout: float = 60) -> Message:
        """Run one of the guest's commands (``verify vdb``, ``info vda``, …); its reply.

        Raises :class:`GuestError` with the guest's reason if it refuses or fails; otherwise as
        :meth:`wait_message`.
        """
        assert self._control is not None
        self._commands += 1
        number = self._commands
        start = len(self.messages)
        try:
            await self._control.send_all(f"{number} {text}\n".encode())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._error(GuestError, f"cannot send {text!r} to the guest") from error
        reply = await self.wait_message(
            lambda m: m.get("event") == "reply" and m.get("seq") == number,
            f"answer to {text!r}",
            timeout,
            start=start,
        )
        if not reply.get("ok"):
            raise self._error(GuestError, f"guest command {text!r} failed: {reply.get('reason')}")
        return reply

    async def wait_exit(self, timeout: float = 30) -> int:
        """QEMU's exit status once it ends by itself (after a guest's power-off)."""
        with trio.move_on_after(timeout):
            await self._exited.wait()
        if self._exit_status is None:
            raise self._error(GuestWedgedError, f"QEMU did not end within {timeout:.0f} s")
        return self._exit_status

    # -- QMP to the guest's QEMU

    async def qmp(self, command: str, arguments: dict[str, object] | None = None, timeout: float = 30) -> Any:
        """One QMP command to QEMU; what it returned."""
        assert self._client is not None
        try:
            return await self._client.execute(command, arguments, timeout)
        except trio.TooSlowError:
            raise self._error(GuestWedgedError, f"QMP {command}: no answer within {timeout:.0f} s") from None
        except ExecuteError as error:
            raise GuestError(f"QMP {command}: {error.error.error.desc}", self.console_log) from error
        except (QMPError, OSError, EOFError) as error:
            raise self._error(GuestError, f"QMP {command}: {error}") from error

    async def stop(self) -> None:
        """Pause the guest's CPUs (its devices stop their rings)."""
        await self.qmp("stop")

    async def cont(self) -> None:
        """Let a paused guest go on."""
        await self.qmp("cont")

    async def system_reset(self) -> None:
        """Press the reset button; the guest boots again in the same QEMU."""
        await self.qmp("system_reset")

    async def kill(self) -> None:
        """Kill QEMU (SIGKILL), and wait for its end."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self.wait_exit()

    async def load_goes_on(self, operations: int = 50, timeout: float = 60) -> Message:
        """Wait until the load (task ``load``) has done so many operations more than when it last spoke here; where it
        stands then. Errors as :meth:`wait_message`.
        """
        start = len(self.messages)
        done = 0
        for message in self.messages:
            if message.get("event") in ("load-begins", "load"):
                done = _operations(message) if message["event"] == "load" else 0
        goal = done + operations
        return await self.wait_message(
            lambda m: m.get("event") == "load" and _operations(m) >= goal,
            f"{operations} more operations of the load",
            timeout,
            start=start,
        )

    async def end_load(self, timeout: float = 60) -> tuple[Message, Message]:
        """Stop the load, which then checks all it knows; what it has done, and the area's sum as the guest reads it."""
        start = len(self.messages)
        await self.command("stop", timeout)
        ended = await self.wait_event("load-ended", timeout, start=start)
        return ended, await self.wait_event("load-sum", timeout, start=start)

    async def quit(self) -> int:
        """End QEMU at once; its exit status."""
        with contextlib.suppress(GuestError):
            await self.qmp("quit")
        return await self.wait_exit()

    async def complaints(self) -> list[str]:
        """The kernel's lines of level error or worse, and those of virtio that speak of errors or admin commands."""
        lines = (await self.command("kernel"))["lines"]
        assert isinstance(lines, list)
        return lines

    async def hot_plug(self, disk: Device) -> None:
        """Plug a disk into the running guest (which notices by itself; see the command ``wait``).

        On q35 a free root port is needed (`hotplug_ports`). A device that QEMU refuses leaves no chardev
        behind.
        """
        if isinstance(disk, Function):
            bus = self._free_bus()
            await self.qmp("device_add", _function_properties(disk, self.qemu, bus))
            self._plugged[disk.id] = bus
            self._plugged_functions.add(disk.id)
            return
        backend: dict[str, object] = {
            "type": "socket",
            "data": {"addr": {"type": "unix", "data": {"path": str(disk.socket)}}, "server": False},
        }
        if disk.reconnect:
            data = backend["data"]
            assert isinstance(data, dict)
            key, value = _reconnect(self.qemu)
            data[key] = value
        arguments: dict[str, object] = {
            "driver": "vhost-user-blk-pci",
            "id": disk.id,
            "chardev": f"char-{disk.id}",
            "num-queues": disk.queues,
            "disable-legacy": "on" if disk.mode == "modern" else "off",
            "disable-modern": disk.mode == "legacy",
            "packed": disk.packed,
            "bus": self._free_bus(),
        }
        if disk.in_order:
            arguments["in_order"] = True
        await self.qmp("chardev-add", {"id": f"char-{disk.id}", "backend": backend})
        try:
            await self.qmp("device_add", arguments)
        except BaseException:
            with trio.move_on_after(5) as scope:
                scope.shield = True
                with contextlib.suppress(GuestError):
                    await self.qmp("chardev-remove", {"id": f"char-{disk.id}"})
            raise
        self._plugged[disk.id] = str(arguments["bus"])

    def _free_bus(self) -> str:
        if self.config.machine == "pc":
            return "pci.0"
        for number in range(self.config.hotplug_ports):
            if f"port{number}" not in self._plugged.values():
                return f"port{number}"
        raise GuestError(f"no free root port (the VM has {self.config.hotplug_ports})", self.console_log)

    async def unplug(self, disk_id: str, timeout: float = 30) -> None:
        """Take a hot-plugged disk out again; returns when the guest has let go of it and the connection is
        closed.

        QEMU 11.1 aborts when a vfio-user function with an MSI-X capability is unplugged: only one without can be.
        """
        assert self._client is not None
        with self._client.events("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") as next_event:
            await self.qmp("device_del", {"id": disk_id})
            with trio.move_on_after(timeout) as scope:
                while True:
                    event = await next_event()
                    data = event.get("data", {})
                    if isinstance(data, dict) and data.get("device") == disk_id:
                        if event["event"] == "DEVICE_UNPLUG_GUEST_ERROR":
                            raise self._error(GuestError, f"the guest refused to give up {disk_id}")
                        break
            if scope.cancelled_caught:
                reason = f"the guest did not give up {disk_id} within {timeout:.0f} s"
                raise self._error(GuestWedgedError, reason)
        self._plugged.pop(disk_id, None)
        if disk_id in self._plugged_functions:
            self._plugged_functions.remove(disk_id)
            return
        # The device lets go of its chardev only after the event, in QEMU's next idle moment.
        with trio.move_on_after(5):
            while True:
                try:
                    await self.qmp("chardev-remove", {"id": f"char-{disk_id}"})
                except GuestError as error:
                    if "busy" not in error.reason:
                        raise
                    await trio.sleep(0.05)
                else:
                    return
        raise self._error(GuestError, f"QEMU keeps the chardev of {disk_id}")


def _write_initrd(path: Path, parts: Sequence[Path | bytes]) -> None:
    with path.open("wb") as file:
        initramfs.join(file, parts)


def _open_log(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def _new_log_dir(wanted: Path | None) -> Path:
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        # The console log of an earlier VM in the same directory would only confuse.
        for name in ("console.log", "control.log", "qemu.log", "command"):
            (wanted / name).unlink(missing_ok=True)
        return wanted
    logs = images.cache_dir() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    old = sorted(logs.glob("vm-*"), key=lambda path: path.stat().st_mtime)
    for path in old[:-_KEPT_LOGS]:
        shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="vm-", dir=logs))


@contextlib.asynccontextmanager
async def open_vm(config: VmConfig, on_message: Callable[[Message], None] | None = None) -> AsyncIterator[Vm]:
    """Start a guest; on leaving, QEMU is ended (asked first, then killed) and reaped, also on errors and
    cancellation.

    `on_message` sees each message of the guest at once, in the trio thread. Raises :class:`GuestError` if
    QEMU does not come up, :class:`ImagesError` if the kernel or the QEMU is not in the cache.
    """
    qemu = await trio.to_thread.run_sync(images.qemu_command, config.qemu)
    kernel = await trio.to_thread.run_sync(images.kernel, config.kernel)
    try:
        log_dir = await trio.to_thread.run_sync(_new_log_dir, config.log_dir)
    except OSError as error:
        raise GuestError(f"cannot make a log directory: {error}") from error
    for disk in config.disks:
        if not await trio.Path(disk.socket).is_socket():
            # With reconnecting on, QEMU would wait for it for ever, deaf to everything else.
            raise GuestError(f"nobody listens on {disk.socket}")
        if isinstance(disk, Function):
            # Also here, before anything is started.
            device_arguments(disk, qemu)
    for device in config.devices:
        other_device_arguments(device, qemu)
        if isinstance(device, Drive):
            if not await trio.Path(device.image).exists():
                raise GuestError(f"there is no image {device.image}")
        elif not await trio.Path(device.socket).is_socket():
            raise GuestError(f"nobody listens on {device.socket}")
    failure: Exception | None = None
    async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
        vm = Vm(config, qemu, kernel, log_dir, on_message)
        try:
            await vm._start(nursery)
            yield vm
        except Exception as error:
            # Raised again below: crossing the nursery would wrap it into an exception group.
            failure = error
        finally:
            with trio.CancelScope(shield=True):
                await vm._stop()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def boot(
    socket: Path,
    *,
    kernel: str = "6.12",
    mode: Mode = "modern",
    qemu: str | None = None,
    task: str = "verify",
    queues: int = 1,
    machine: Literal["q35", "pc"] = "q35",
    via: Via = "vhost-user",
    port: bool = False,
    packed: bool = False,
    in_order: bool = False,
    cpus: int | None = None,
    append: Sequence[str] = (),
    rounds: int = 3,
    host_kib: int = HOST_KIB,
    guest_kib: int = GUEST_KIB,
    timeout: float = 60,
    log_dir: Path | None = None,
    on_message: Callable[[Message], None] | None = None,
) -> GuestResult:
    """Boot a guest whose disk is the device at `socket`, have it do `task`, and power it off.

    With `via` "vfio-user" the socket is a PCI function's, and `mode` says only what it is (which driver the guest takes
    is the function's and the kernel's choice); `port` puts it behind a root port. Over vhost-user `packed` and
    `in_order` are QEMU's, too (see :class:`Disk`). `cpus` are those of the guest, by default one for each of `queues`:
    Linux takes no more MSI-X vectors for its queues, an administration virtqueue among them, than it has CPUs. `append`
    are further words for the kernel command line.

    `task` is ``verify``, ``reboot`` (verify, reboot in the same QEMU, verify again) or ``rw-loop`` (`rounds`
    times verify). `timeout` bounds each step: from start to the first check's end, and each further one.
    Raises :class:`GuestError` when the guest reports a failure or dies, :class:`GuestWedgedError` when it
    makes no progress, :class:`ImagesError` when images are missing. On cancellation QEMU is ended and
    reaped.
    """
    if task not in TASKS:
        raise GuestError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}")
    if mode not in MODES:
        raise GuestError(f"unknown mode {mode!r}; allowed: {', '.join(MODES)}")
    disk_device: Device = Disk(socket, mode, queues=queues, packed=packed, in_order=in_order)
    if via == "vfio-user":
        disk_device = Function(socket, port=port)
    config = VmConfig(
        disks=(disk_device,),
        kernel=kernel,
        qemu=qemu,
        machine=machine,
        task=task,
        cpus=min(queues, os.cpu_count() or 1) if cpus is None else cpus,
        host_kib=host_kib,
        guest_kib=guest_kib,
        log_dir=log_dir,
        append=tuple(append),
    )
    async with open_vm(config, on_message) as vm:
        await vm.wait_event("boot", timeout)
        disk = await vm.wait_event("disk", timeout)
        done_rounds, complaints = 1, list[str]()
        match task:
            case "rw-loop":
                for number in range(1, rounds + 1):
                    wanted = functools.partial(_is_round, number)
                    last = await vm.wait_message(wanted, f"round {number}", timeout)
                await vm.command("stop", timeout)
                # The loop may have been amid a further round; its sum is the one on the disk now.
                last = [m for m in vm.messages if m.get("event") == "round"][-1]
                done_rounds = last["round"]
                complaints = await vm.complaints()
                await vm.command("poweroff", timeout)
            case "reboot":
                await vm.wait_event("rebooting", timeout)
                await vm.wait_event("survived", timeout)
                await vm.wait_event("done", timeout)
                last = [m for m in vm.messages if m.get("event") == "verified"][-1]
                done_rounds = 2
            case _:
                last = await vm.wait_event("verified", timeout)
                await vm.wait_event("done", timeout)
        if task != "rw-loop":
            complaints = [line for m in vm.messages if m.get("event") == "kernel" for line in m["lines"]]
        seconds = trio.current_time() - vm.started
        status = await vm.wait_exit(timeout)
        if status != 0:
            raise vm._error(GuestError, "QEMU failed after the guest was done")
        boots = [m for m in vm.messages if m.get("event") == "boot"]
        assert vm.first_message is not None
        return GuestResult(
            kernel=kernel,
            release=boots[0]["release"],
            qemu=vm.qemu.version,
            mode=mode,
            task=task,
            driver_mode=disk["mode"],
            features=feature_bits(disk["features"]),
            disk_bytes=disk["size"],
            read_only=disk["read_only"],
            boots=len(boots),
            rounds=done_rounds,
            seconds_to_first_line=round(vm.first_message - vm.started, 2),
            seconds=round(seconds, 2),
            host_sum=last["host_sum"],
            host_offset=last["host_offset"],
            host_bytes=last["host_bytes"],
            guest_sum=last["guest_sum"],
            guest_offset=last["guest_offset"],
            guest_bytes=last["guest_bytes"],
            console_log=vm.console_log,
            interrupts=disk["interrupts"],
            vectors=disk["vectors"],
            interrupt_counts=disk["interrupt_counts"],
            complaints=tuple(complaints),
        )


def _operations(message: Message) -> int:
    return sum(int(message[key]) for key in ("writes", "reads", "flushes", "kept"))


def _is_round(number: int, message: Message) -> bool:
    return message.get("event") == "round" and message.get("round") == number


def feature_bits(text: str) -> int:
    """Features from the kernel's sysfs form (one character a bit, bit 0 first)."""
    return sum(1 << number for number, character in enumerate(text) if character == "1")


def write_host_area(image: Path, kib: int = HOST_KIB, seed: int = 0) -> str:
    """Fill the start of an image with reproducible noise, as the guest's checks expect it; its SHA-256."""
    data = random.Random(seed).randbytes(kib * 1024)
    with image.open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def area_sum(image: Path, offset: int, size: int) -> str:
    """SHA-256 of a part of an image, to compare with what the guest saw there."""
    digest = hashlib.sha256()
    with image.open("rb") as file:
        file.seek(offset)
        while size > 0:
            data = file.read(min(size, 1 << 20))
            if not data:
                raise GuestError(f"{image} is shorter than expected")
            digest.update(data)
            size -= len(data)
    return digest.hexdigest()


def make_image(path: Path, size: int = 16 << 20, seed: int = 0) -> str:
    """A raw image for the guest's checks; the SHA-256 of its host-written area."""
    with path.open("wb") as file:
        file.truncate(size)
    return write_host_area(path, seed=seed)


ADMIN_COMMANDS: Final[dict[str, tuple[str, ...]]] = {
    "5.10": (),
    "6.1": (),
    "6.12": ("LIST_QUERY", "LIST_USE"),
    "7.2": ("LIST_QUERY", "LIST_USE", "CAP_ID_LIST_QUERY", "DEVICE_CAP_GET", "DRIVER_CAP_SET"),
}
"""The administration commands that each guest kernel sends to an owner, once for each time its driver starts."""


def owner_problems(before: dict[str, Any], after: dict[str, Any], kernel: str, starts: int = 1) -> list[str]:
    """What is wrong with the administration commands an owner got between two answers of ``query-owner``, if a guest of
    this kernel has started its driver so many times meanwhile.
    """
    wanted = dict.fromkeys(ADMIN_COMMANDS[kernel], starts)
    problems = []
    if (commands := commands_between(before["commands"], after["commands"])) != wanted:
        problems.append(f"the owner got the commands {commands} instead of {wanted}")
    if failed := after["failed"] - before["failed"]:
        problems.append(f"{failed} administration commands failed")
    return problems


def commands_between(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Which commands were counted between two answers, and how many of each."""
    counts = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in counts.items() if count}


def legacy_command_problems(commands: dict[str, int]) -> list[str]:
    """What is missing among the commands (name and number) that a guest's use of a legacy function takes."""
    wanted = (
        "LEGACY_COMMON_CFG_WRITE",
        "LEGACY_COMMON_CFG_READ",
        "LEGACY_DEV_CFG_READ",
    )
    return [f"no {name} command" for name in wanted if not commands.get(name)]


def check_image(image: Path, result: GuestResult, host_sum: str | None = None) -> Iterable[str]:
    """What in the image differs from what the guest reported (nothing when all is well)."""
    actual = area_sum(image, result.host_offset, result.host_bytes)
    if host_sum is not None and actual != host_sum:
        yield f"host area was changed: {actual} instead of {host_sum}"
    if actual != result.host_sum:
        yield f"host area: the guest read {result.host_sum}, the image has {actual}"
    if result.guest_sum is not None:
        actual = area_sum(image, result.guest_offset, result.guest_bytes)
        if actual != result.guest_sum:
            yield f"guest area: the guest wrote {result.guest_sum}, the image has {actual}"


# --- the other side: a group in a process of its own -------------------------------------------------------


@dataclass(frozen=True)
class MemberSpec:
    """One member of a :class:`ServedGroup`. `vfio_user` serves it as PCI functions, too; with `vectors` None the group
    chooses the number of MSI-X vectors, 0 means INTx.
    """

    image: Path
    legacy: bool = True
    read_only: bool = False
    queues: int = 1
    vfio_user: bool = False
    packed: bool = False
    in_order: bool = False
    shared: bool = False
    vectors: int | None = None


@dataclass(frozen=True)
class OwnerSpec:
    """The owner of a :class:`ServedGroup`, with a disk of its own; served as a PCI function."""

    image: Path
    admin_queues: int = 1
    queues: int = 1
    packed: bool = False
    vectors: int | None = None
    read_only: bool = False


@dataclass(frozen=True)
class VhostUserDeviceSpec:
    """A virtio-vhost-user device of a :class:`ServedGroup`: to one guest a PCI device over vhost-user, with `vfio_user`
    another over vfio-user, to others a back end. `ram_file` is the memory of the guest that is the front end, if that
    is a file known beforehand, and `ram_mib` its size.
    """

    name: str
    max_queues: int = 1
    shared_memory: str = "4GiB"
    vfio_user: bool = False
    ram_file: Path | None = None
    ram_mib: int = 0


class ServedGroup:
    """A group served by ``vhu-legacy serve`` as users start it; made by :func:`serve_group`."""

    def __init__(self, directory: Path, engine: str) -> None:
        self.directory = directory
        self.engine = engine
        self.ready: dict[str, Any] = {}
        self.exit_status: int | None = None
        self._process: trio.Process | None = None
        self._qmp: _Qmp | None = None
        # Kept: when it is started again, the caller may sit inside a VM's loop.
        self._loop = trio_asyncio.current_loop.get()

    @property
    def log(self) -> Path:
        """What the process writes to stderr."""
        return self.directory / "serve.log"

    @property
    def run_dir(self) -> Path:
        """The group's run directory."""
        return Path(self.ready["run_dir"])

    def socket(self, member: int) -> Path:
        """Where a member listens for a vhost-user front end."""
        for entry in self.ready["members"]:
            if entry["id"] == member:
                return Path(entry["vhost_user"])
        raise GuestError(f"the group has no member {member}", self.log)

    def function_socket(self, member: int, kind: Kind) -> Path:
        """Where a PCI function listens for a vfio-user client: of a member, or the owner's (member 0)."""
        name = "owner.vfio-user.sock" if kind == "owner" else f"member-{member}.{kind}.vfio-user.sock"
        path = self.run_dir / name
        if (kind == "owner") != (member == 0) or not path.is_socket():
            what = "owner" if member == 0 else f"member {member}"
            raise GuestError(f"the group serves no {kind} function of {what}: no {path}", self.log)
        return path

    def owner_socket(self) -> Path:
        """Where the owner, the PF, listens for a vfio-user client."""
        return self.function_socket(0, "owner")

    def vhost_user_device_socket(self, name: str, via: Via) -> Path:
        """Where a virtio-vhost-user device listens for the QEMU of the guest that is the back end."""
        return self.run_dir / device_socket_name(name, via)

    def front_end_socket(self, name: str) -> Path:
        """Where a virtio-vhost-user device listens for the front end, the QEMU of the other guest."""
        return self.run_dir / device_socket_name(name, "front")

    def log_complaints(self) -> list[str]:
        """The log's lines of level warning or worse, over all processes that served the group, and what is no log line.
        Call it from a thread.
        """
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if not re.match(r"\d{4}-\S+ \S+ (INFO|DEBUG) ", line)]

    def _error(self, reason: str) -> GuestError:
        return GuestError("\n".join([reason, *_tail(self.log)]), self.log)

    async def _start(
        self,
        members: Sequence[MemberSpec],
        name: str,
        owner: OwnerSpec | None,
        vhost_user_devices: Sequence[VhostUserDeviceSpec],
    ) -> None:
        text = group_file(members, name, owner, vhost_user_devices)
        await trio.Path(self.directory / "group.toml").write_text(text)
        await self._launch()

    async def _launch(self) -> None:
        argv = [
            sys.executable,
            "-m",
            "vhu_legacy",
            "serve",
            str(self.directory / "group.toml"),
            "--run-dir",
            str(self.directory / "run"),
        ]
        if self.engine != "native":
            argv += ["--engine", self.engine]
        output = await trio.to_thread.run_sync(_open_log, self.log)
        try:
            self._process = await trio.lowlevel.open_process(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        finally:
            os.close(output)
        stdout = self._process.stdout
        assert stdout is not None
        line = b""
        with trio.move_on_after(30) as scope:
            while not line.endswith(b"\n"):
                data = await stdout.receive_some(1 << 16)
                if not data:
                    break
                line += data
        if scope.cancelled_caught:
            raise self._error("vhu-legacy serve was not ready within 30 s")
        try:
            self.ready = json.loads(line)
        except ValueError:
            raise self._error(f"vhu-legacy serve did not start: {line.decode(errors='replace')[:500]}") from None
        self._qmp = _Qmp("group", self._loop)
        try:
            await self._qmp.connect(str(self.ready["qmp"]), 10)
        except (QMPError, OSError, EOFError, trio.TooSlowError) as error:
            raise self._error(f"no QMP connection to the group: {error}") from error

    async def qmp(self, command: str, arguments: dict[str, object] | None = None, timeout: float = 10) -> Any:
        """One QMP command to the group. Raises :class:`GuestError`."""
        assert self._qmp is not None
        try:
            return await self._qmp.execute(command, arguments, timeout)
        except ExecuteError as error:
            raise GuestError(f"QMP {command}: {error.error.error.desc}", self.log) from error
        except (QMPError, OSError, EOFError, trio.TooSlowError) as error:
            raise self._error(f"QMP {command}: {error}") from error

    async def member(self, member: int) -> dict[str, Any]:
        """``query-member``."""
        answer = await self.qmp("query-member", {"id": member})
        assert isinstance(answer, dict)
        return answer

    async def device(self, member: int) -> dict[str, Any]:
        """``query-member``, or for member 0 the owner's own device."""
        return await self.member(member) if member != 0 else (await self.owner())["device"]

    async def owner(self) -> dict[str, Any]:
        """``query-owner``."""
        answer = await self.qmp("query-owner")
        assert isinstance(answer, dict)
        return answer

    async def kill(self) -> None:
        """Kill the process (SIGKILL) and reap it."""
        assert self._process is not None
        with trio.CancelScope(shield=True):
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            if self._process.stdout is not None:
                await self._process.stdout.aclose()
            self._process = None
            if self._qmp is not None:
                await self._qmp.close()
                self._qmp = None

    async def restart(self) -> None:
        """Serve again in the same run directory, after :meth:`kill`."""
        assert self._process is None
        await self._launch()

    async def stop(self) -> int:
        """End the process (SIGTERM, after 10 s SIGKILL); its exit status. May be called twice. Runs to its
        end when cancelled.
        """
        with trio.CancelScope(shield=True):
            if self._qmp is not None:
                await self._qmp.close()
                self._qmp = None
            if self._process is not None and self.exit_status is None:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        self._process.send_signal(number)
                    with trio.move_on_after(10):
                        self.exit_status = await self._process.wait()
                        break
                if self._process.stdout is not None:
                    await self._process.stdout.aclose()
        return self.exit_status if self.exit_status is not None else -signal.SIGKILL


def group_file(
    members: Sequence[MemberSpec],
    name: str,
    owner: OwnerSpec | None = None,
    vhost_user_devices: Sequence[VhostUserDeviceSpec] = (),
) -> str:
    """The text of a group file."""
    text = f"[group]\nname = {json.dumps(name)}\n"
    if owner is not None:
        text += f'\n[owner]\ntype = "blk"\nimage = {json.dumps(str(owner.image))}\nvfio_user = true\n'
        text += f"read_only = {json.dumps(owner.read_only)}\nqueues = {owner.queues}\n"
        text += f"admin_queues = {owner.admin_queues}\npacked = {json.dumps(owner.packed)}\n"
        text += "" if owner.vectors is None else f"vectors = {owner.vectors}\n"
    for member in members:
        text += f'\n[[members]]\ntype = "blk"\nimage = {json.dumps(str(member.image))}\n'
        text += f"legacy = {json.dumps(member.legacy)}\nread_only = {json.dumps(member.read_only)}\n"
        text += f"queues = {member.queues}\n"
        # Only what was asked for, so a group file is as plain as its group.
        text += "vfio_user = true\n" if member.vfio_user else ""
        text += "packed = true\n" if member.packed else ""
        text += "in_order = true\n" if member.in_order else ""
        text += "shared = true\n" if member.shared else ""
        text += "" if member.vectors is None else f"vectors = {member.vectors}\n"
    for device in vhost_user_devices:
        text += f"\n[[vhost_user_devices]]\nname = {json.dumps(device.name)}\nmax_queues = {device.max_queues}\n"
        text += f"shared_memory = {json.dumps(device.shared_memory)}\n"
        text += "vfio_user = true\n" if device.vfio_user else ""
        if device.ram_file is not None:
            text += f'ram_file = {json.dumps(str(device.ram_file))}\nram_size = "{device.ram_mib}MiB"\n'
    return text


@contextlib.asynccontextmanager
async def serve_group(
    members: Sequence[MemberSpec],
    directory: Path,
    *,
    name: str = "guests",
    engine: str = "native",
    owner: OwnerSpec | None = None,
    vhost_user_devices: Sequence[VhostUserDeviceSpec] = (),
) -> AsyncIterator[ServedGroup]:
    """Serve these members and devices from `directory` (group file, run directory and log go there) until the context
    is left.

    Members get the ids 1, 2, … in order. Raises :class:`GuestError` when the group does not come up. On
    errors and cancellation the process is ended and reaped.
    """
    failure: Exception | None = None
    async with trio_asyncio.open_loop():
        group = ServedGroup(directory, engine)
        try:
            await group._start(members, name, owner, vhost_user_devices)
            yield group
        except Exception as error:
            # Raised again below: crossing the loop's nursery could wrap it.
            failure = error
        finally:
            await group.stop()
    if failure is not None:
        raise failure


# --- a load under which the group is killed -----------------------------------------------------------------


@dataclass(frozen=True)
class LoadResult:
    """What became of a load whose group was killed again and again.

    `driver_mode` and `features` are the guest driver's, `done` is the load's last count (writes, reads, flushes; kept:
    pages read; checked: blocks and pages that were found to be right), `problems` all that was not as it should be: in
    the image, the kernel's log, the group's log.
    """

    kernel: str
    release: str
    qemu: str
    mode: Mode
    driver_mode: str
    features: int
    kills: int
    done: Message
    queue_requests: tuple[int, ...]
    seconds_to_first_line: float
    console_log: Path
    problems: tuple[str, ...]


async def load_under_kills(
    member: MemberSpec,
    directory: Path,
    *,
    kernel: str = "6.12",
    mode: Mode = "modern",
    qemu: str | None = None,
    kills: int = 5,
    seed: int = 0,
    timeout: float = 60,
    log_dir: Path | None = None,
) -> LoadResult:
    """Serve a member from `directory`, have a guest put a verified load on it, and kill the group (SIGKILL) so many
    times meanwhile, at random instants; it is started again each time, and the guest has to go on.

    Some kills come while QEMU is still at its handshake. The device is packed, or in order, if the member is. `timeout`
    bounds each step. Raises as :func:`boot`.
    """
    instants = random.Random(seed)
    async with serve_group([member], directory, name="load") as group:
        disk = Disk(group.socket(1), mode, queues=member.queues, packed=member.packed, in_order=member.in_order)
        config = VmConfig(
            disks=(disk,),
            kernel=kernel,
            qemu=qemu,
            task="load",
            cpus=min(member.queues, os.cpu_count() or 1),
            writers=8,
            guest_kib=8192,
            log_dir=log_dir,
        )
        async with open_vm(config) as vm:
            boot_message = await vm.wait_event("boot", timeout)
            found = await vm.wait_event("disk", timeout)
            await vm.wait_event("load-begins", timeout)
            await vm.load_goes_on(timeout=timeout)
            for number in range(kills):
                await trio.sleep(instants.uniform(0, 0.5))
                await group.kill()
                await group.restart()
                # Every third time the next kill doesn't wait for the guest, so QEMU may just be connecting.
                if number % 3 != 1 or number == kills - 1:
                    await vm.load_goes_on(timeout=timeout)
            done, area = await vm.end_load(timeout)
            problems = await vm.complaints()
            problems += await load_problems(group, member.image, area)
            queue_requests = tuple(queue["requests"] for queue in (await group.member(1))["queues"])
            await vm.command("poweroff", timeout)
            if (status := await vm.wait_exit(timeout)) != 0:
                problems.append(f"QEMU ended with status {status}")
        assert vm.first_message is not None
        return LoadResult(
            kernel=kernel,
            release=boot_message["release"],
            qemu=vm.qemu.version,
            mode=mode,
            driver_mode=found["mode"],
            features=feature_bits(found["features"]),
            kills=kills,
            done=done,
            queue_requests=queue_requests,
            seconds_to_first_line=round(vm.first_message - vm.started, 2),
            console_log=vm.console_log,
            problems=tuple(problems),
        )


async def load_problems(group: ServedGroup, image: Path, area: Message, member: int = 1) -> list[str]:
    """What is wrong after a load: with the image, whose area the guest has read as `area` says, with the member, and in
    the group's log.
    """
    problems = []
    actual = await trio.to_thread.run_sync(area_sum, image, area["guest_offset"], area["guest_bytes"])
    if actual != area["guest_sum"]:
        problems.append(f"the guest reads {area['guest_sum']}, the image has {actual}")
    info = await group.member(member)
    problems += [f"member {member}: {info[key]}" for key in ("broken", "last-error") if info[key]]
    return problems + await trio.to_thread.run_sync(group.log_complaints)
