# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A guest that is the back end of others: a stock vhost-user daemon in it, and vvu-bridge on its virtio-vhost-user
device.

:func:`backend_config` says what to start, :class:`BackendGuest` is what a running one can be told (images/init-backend
does it). The guest's lines are followed from a position on that each wait moves, so nothing is waited for twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from . import guest, images, initramfs
from .errors import GuestError

Daemon: TypeAlias = Literal["blk", "own-blk", "fs"]
"""qemu-storage-daemon with a disk, a member of ours with the same, virtiofsd with a directory."""
Part: TypeAlias = Literal["daemon", "bridge"]

QEMU: Final = "11.1"
KERNEL: Final = "6.12"
MEMORY_MIB: Final = 384


def backend_config(
    device: guest.VhostUserDevice | None,
    *,
    image: Path | None = None,
    store_mib: int = 64,
    start: Daemon | None = None,
    queues: int = 1,
    programs: Mapping[str, Path] | None = None,
    bridge_arguments: tuple[str, ...] = (),
    kernel: str = KERNEL,
    cpus: int = 1,
    append: tuple[str, ...] = (),
    log_dir: Path | None = None,
) -> guest.VmConfig:
    """What to start for a guest whose daemon exports a disk, with `queues` queues: the image that is the guest's
    /dev/vda, or `store_mib` MiB of the guest's memory.

    With `start` daemon and bridge run without being told, and again after a reboot. `programs` are vvu-bridge and
    others by name, by default those that `make vvu-bridge` makes; without a `device`, none. `bridge_arguments` can't
    have commas or spaces.

    Raises :class:`ImagesError` if the daemons or programs are missing, :class:`GuestError` for arguments that can't
    be told the guest. Reads files: call it from a thread.
    """
    if bad := [word for word in bridge_arguments if not word or any(c in word for c in ', \t\n"')]:
        raise GuestError(f"an argument of vvu-bridge can't have commas, spaces or quotes: {bad[0]!r}")
    if programs is None:
        programs = {} if device is None else initramfs.built_programs()
    words = [f"vhu.store={store_mib if image is None else '/dev/vda'}", f"vhu.queues={queues}"]
    words += [f"vhu.start={start}"] if start is not None else []
    words += [f"vhu.bridge={','.join(bridge_arguments)}"] if bridge_arguments else []
    devices: list[guest.OtherDevice] = [] if image is None else [guest.Drive(image)]
    devices += [device] if device is not None else []
    return guest.VmConfig(
        devices=tuple(devices),
        kernel=kernel,
        qemu=QEMU,
        # The initramfs, twice while it is unpacked, and the store.
        memory_mib=MEMORY_MIB + (store_mib if image is None else 0),
        cpus=cpus,
        append=(*words, *append),
        log_dir=log_dir,
        overlays=(images.daemons(), initramfs.backend_archive(programs)),
        init="/init-backend",
    )


class BackendGuest:
    """A running guest that is a back end; made by :func:`open_backend`. Errors are those of :class:`.guest.Vm`."""

    def __init__(self, vm: guest.Vm) -> None:
        self.vm = vm
        self._positions: dict[Part | None, int] = {}
        """Where to go on: for each part, and (None) for the guest itself. What the parts print may come before it is
        ready."""

    async def ready(self, timeout: float = 60) -> None:
        """Wait until it takes commands; after a reboot until it does so again."""
        await self._wait(None, lambda m: m.get("event") == "ready", "ready back end", timeout)
        # what was printed before this boot is of no interest any more
        ready = self._positions[None]
        boots = [number for number in range(ready) if self.vm.messages[number].get("event") == "boot"]
        for part in ("daemon", "bridge"):
            self._positions[part] = max(self._positions.get(part, 0), *boots[-1:], 0)

    async def wait_line(self, part: Part, words: str, timeout: float = 60) -> str:
        """The next line of the daemon or the bridge that has these words in it. Raises :class:`GuestError` if the
        bridge ends first; a daemon may be started again.
        """
        message = await self._wait(
            part,
            lambda m: (m.get("event") == part and words in m["line"]) or (part == "bridge" and _is_end(m, part)),
            f"line {words!r} of the {part}",
            timeout,
        )
        if _is_end(message, part):
            lines = "\n".join(self.lines(part)[-5:])
            raise GuestError(
                f"vvu-bridge ended with status {message['status']} before it said {words!r}\n{lines}",
                self.vm.console_log,
            )
        return str(message["line"])

    async def wait_ended(self, part: Part, timeout: float = 30) -> int:
        """The exit status of the daemon or the bridge when it ends next."""
        message = await self._wait(part, lambda m: _is_end(m, part), f"end of the {part}", timeout)
        return int(message["status"])

    async def _wait(
        self, part: Part | None, wanted: Callable[[guest.Message], bool], what: str, timeout: float
    ) -> guest.Message:
        start = self._positions.get(part, 0)
        message = await self.vm.wait_message(wanted, what, timeout, start=start)
        # By identity: two messages may well say the same.
        self._positions[part] = next(
            number + 1 for number, other in enumerate(self.vm.messages[start:], start) if other is message
        )
        return message

    def lines(self, part: Part) -> list[str]:
        """All that the daemon or the bridge has printed so far."""
        return [str(m["line"]) for m in self.vm.messages if m.get("event") == part]

    async def start_daemon(self, kind: Daemon, *arguments: str) -> None:
        """Start a daemon; it listens when this returns."""
        await self.vm.command(" ".join(["start daemon", kind, *arguments]))

    async def start_bridge(self, *arguments: str) -> None:
        """Start vvu-bridge."""
        await self.vm.command(" ".join(["start bridge", *arguments]))

    async def kill(self, part: Part, signal: str = "KILL") -> None:
        """Send a signal that ends it, and wait for the end."""
        await self.vm.command(f"kill {part} {signal}")

    async def restart(self, part: Part) -> None:
        """Kill it, if it runs, and start it as the last time."""
        await self.vm.command(f"restart {part}")

    async def pids(self) -> dict[Part, int | None]:
        """What runs."""
        reply = await self.vm.command("status")
        return {"daemon": reply["daemon"], "bridge": reply["bridge"]}

    async def area_sum(self, offset: int, size: int) -> str:
        """SHA-256 of a part of what qemu-storage-daemon exports (in KiB of 1024 bytes), as this guest reads it."""
        if offset % 1024 or size % 1024:
            raise GuestError("areas are counted in KiB")
        return str((await self.vm.command(f"sum {offset // 1024} {size // 1024}"))["sum"])

    async def file_sums(self) -> dict[str, str]:
        """SHA-256 of each file that virtiofsd exports, as this guest reads it."""
        files = (await self.vm.command("files"))["files"]
        assert isinstance(files, dict)
        return files

    async def run(self, *words: str) -> tuple[int, list[str]]:
        """Run a program to its end: exit status and what it printed."""
        reply = await self.vm.command(" ".join(["run", *words]))
        return int(reply["status"]), list(reply["lines"])


def _is_end(message: guest.Message, part: Part) -> bool:
    return message.get("event") == "ended" and message["what"] == part


@contextlib.asynccontextmanager
async def open_backend(
    config: guest.VmConfig, on_message: Callable[[guest.Message], Any] | None = None
) -> AsyncIterator[BackendGuest]:
    """Start a guest of :func:`backend_config`; it takes commands when the context begins. As :func:`.guest.open_vm`."""
    async with guest.open_vm(config, on_message) as vm:
        backend = BackendGuest(vm)
        await backend.ready()
        yield backend
