# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The demo behind ``make demo-vvu``: a guest serves a disk and a file system to another guest, stock parts all around.

A group with one virtio-vhost-user device is served by ``vhu-legacy serve``. Guest B, under QEMU 11.1, has that device
and runs Debian's daemons, unmodified, with vvu-bridge between the two. Guest A's QEMU, the machine's own, knows nothing
of that: it connects to a vhost-user socket, and a stock 6.12 kernel in it uses

* a disk of qemu-storage-daemon's,
* the same disk with a legacy-only driver, served by vhu-blk: the library of qemu-storage-daemon refuses such drivers,
* a file system of virtiofsd's.

Guest A reads, writes, flushes and compares; what it saw is compared with what guest B reads, and with the image on the
host that is B's disk. All of it twice: B's device comes over vhost-user, then over vfio-user with A's memory in a file.
The last line is ``demo: PASS`` or ``demo: FAIL <reason>``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio
from rich.console import Console
from rich.progress import Progress

from . import backend_guest, guest, images
from .backend_guest import BackendGuest, Daemon
from .demo import Story, check_image, require, tell
from .errors import GuestError, ImagesError
from .guest import Via
from .running import run

KERNEL: Final = "6.12"
CARRIERS: Final[tuple[Via, ...]] = ("vhost-user", "vfio-user")
_DEVICE: Final = "vvu"
_IMAGE_BYTES: Final = 64 << 20
_MEMORY_MIB: Final = 256
_QUEUES: Final = 4
# Two guests at once, without KVM, one waiting for the other.
_CHECK_SECONDS: Final = 180


@dataclass(frozen=True)
class _Stage:
    """What guest A meets."""

    story: Story
    via: Via
    group: guest.ServedGroup
    back: BackendGuest
    front: guest.VmConfig
    image: Path
    host_sum: str


async def run_demo(console: Console, carriers: Sequence[Via] = CARRIERS) -> int:
    """Run the demo; 0 when everything was right, 1 otherwise (the reason is in the last line).

    Missing images are built first. On cancellation the guests and the group are ended and nothing is left behind.
    """
    return await tell(console, functools.partial(_play, carriers))


async def _play(carriers: Sequence[Via], story: Story, directory: Path) -> None:
    missing = await trio.to_thread.run_sync(_missing)
    if missing:
        story.say(f"{' and '.join(missing)} must be fetched first: once, from this machine's Debian mirror")
    with Progress(console=Console(stderr=True)) as progress:
        await images.ensure([KERNEL], [backend_guest.QEMU], progress, daemons=images.DAEMONS)
    for number, via in enumerate(carriers, 1):
        scratch = directory / str(number)
        scratch.mkdir()
        story.table(f"guest B's device over {via}")
        await _play_carrier(story, scratch, via)


def _missing() -> list[str]:
    missing = []
    for what, look in (
        (f"Linux {KERNEL} (about 30 MB)", functools.partial(images.kernel, KERNEL)),
        (f"QEMU {backend_guest.QEMU} (about 40 MB)", functools.partial(images.qemu_command, backend_guest.QEMU)),
        ("the daemons (about 20 MB)", images.daemons),
    ):
        try:
            look()
        except ImagesError:
            missing.append(what)
    return missing


@contextlib.contextmanager
def _memory_file(via: Via) -> Iterator[Path | None]:
    """Guest A's memory as a file: over vfio-user its place in the device's BAR is known before A runs."""
    if via == "vhost-user":
        yield None
        return
    # It has to be memory in earnest, or a guest's stores go to a disk.
    shared = Path("/dev/shm")
    descriptor, name = tempfile.mkstemp(prefix="vhu-demo-", dir=shared if shared.is_dir() else None)
    try:
        os.truncate(descriptor, _MEMORY_MIB << 20)
        yield Path(name)
    finally:
        os.close(descriptor)
        Path(name).unlink()


async def _play_carrier(story: Story, directory: Path, via: Via) -> None:
    image = directory / "disk.raw"
    host_sum = await trio.to_thread.run_sync(guest.make_image, image, _IMAGE_BYTES, 1)
    with _memory_file(via) as memory:
        spec = guest.VhostUserDeviceSpec(
            _DEVICE, _QUEUES, vfio_user=memory is not None, ram_file=memory, ram_mib=_MEMORY_MIB
        )
        async with guest.serve_group([], directory, name="demo", vhost_user_devices=[spec]) as group:
            story.say(f"group 'demo' is served, with the virtio-vhost-user device '{_DEVICE}'")
            device = guest.VhostUserDevice(group.vhost_user_device_socket(_DEVICE, via), _QUEUES, via)
            # QEMU's vfio code takes a BAR's mapping away for a second after each INTx interrupt, to see the driver
            # acknowledge it; every access to guest A's memory would be a message then.
            arguments = ("--interrupts", "poll") if via == "vfio-user" else ()
            config = await trio.to_thread.run_sync(
                functools.partial(
                    backend_guest.backend_config, device, image=image, kernel=KERNEL, bridge_arguments=arguments
                )
            )
            front = guest.VmConfig(kernel=KERNEL, memory_mib=_MEMORY_MIB, memory_file=memory)
            async with backend_guest.open_backend(config) as back:
                await _play_guests(_Stage(story, via, group, back, front, image, host_sum))
            status = await group.stop()
            require(status == 0, f"vhu-legacy serve ended with status {status}")
            left = [path.name for path in group.run_dir.glob("*.sock")] if group.run_dir.is_dir() else []
            require(not left, f"the group left sockets behind: {', '.join(left)}")


async def _play_guests(stage: _Stage) -> None:
    story, back, via = stage.story, stage.back, stage.via
    vm = back.vm
    story.say(f"guest B runs: QEMU {vm.qemu.version}, {_device_name(via)}; Linux {vm.kernel.release}")
    story.add("guest B", f"Linux {vm.kernel.release}, QEMU {vm.qemu.version}, {_device_name(via)}")
    await _serve(stage, "blk", "qemu-storage-daemon")
    story.add("vvu-bridge", _interrupts(back))
    await _use_disk(stage, "modern")
    # The bridge offers the daemon to the next front end by itself.
    await back.wait_line("bridge", "slave up")
    await _stop_serving(back)
    await _serve(stage, "own-blk", "vhu-blk")
    await _use_disk(stage, "legacy")
    await back.wait_line("bridge", "slave up")
    await _stop_serving(back)
    await _serve(stage, "fs", "virtiofsd")
    await _use_file_system(stage)
    complaints = await vm.complaints()
    require(not complaints, f"guest B's kernel complains: {'; '.join(complaints)}")
    await vm.command("poweroff")
    await vm.wait_exit()
    story.say("guest B is off")
    story.add("guest B's console", vm.console_log)


def _device_name(via: Via) -> str:
    return "vhost-user-test-device-pci" if via == "vhost-user" else "vfio-user-pci"


def _interrupts(back: BackendGuest) -> str:
    lines = (line.partition("interrupts: ")[2] for line in back.lines("bridge"))
    return f"interrupts: {next(filter(None, lines), 'not told')}"


async def _serve(stage: _Stage, daemon: Daemon, name: str) -> None:
    await stage.back.start_daemon(daemon)
    await stage.back.start_bridge()
    await stage.back.wait_line("bridge", "slave up")
    stage.story.say(f"in guest B: {name} listens, vvu-bridge has brought it up")


async def _stop_serving(back: BackendGuest) -> None:
    await back.kill("bridge", "TERM")
    status = await back.wait_ended("bridge")
    require(status == 0, f"vvu-bridge ended with status {status}")
    await back.kill("daemon")


async def _front_end_socket(group: guest.ServedGroup) -> Path:
    """Where guest A connects. While B is down there is nothing, and what the bridge says may be here first."""
    path = group.front_end_socket(_DEVICE)
    with trio.move_on_after(5):
        while not await trio.Path(path).is_socket():
            await trio.sleep(0.02)
        return path
    raise GuestError(f"the group doesn't listen on {path}")


async def _device_state(stage: _Stage) -> str:
    """The device's own view while guest A runs."""
    devices = await stage.group.qmp("query-vhost-user-devices")
    device = next((device for device in devices if device["name"] == _DEVICE), None)
    require(device is not None, f"the group tells of no device {_DEVICE}")
    assert device is not None
    require(device["state"] == "connected", f"the device is {device['state']} while guest A runs")
    require(device["carrier"] == stage.via, f"the device's carrier is {device['carrier']}")
    kicks, calls = (sum(queue[what] for queue in device["queues"]) for what in ("kicks", "calls"))
    require(kicks > 0 and calls > 0, f"{kicks} kicks and {calls} calls went through the device")
    return f"{device['state']}, {kicks} kicks, {calls} calls"


async def _use_disk(stage: _Stage, mode: guest.Mode) -> None:
    """Guest A on the disk; what it saw, what guest B reads and what the host has must be the same."""
    story, back = stage.story, stage.back
    config = replace(stage.front, disks=(guest.Disk(await _front_end_socket(stage.group), mode),))
    async with guest.open_vm(config) as vm:
        story.say(f"guest A runs: QEMU {vm.qemu.version}, vhost-user-blk-pci, {mode}; booting {vm.kernel.release}")
        await vm.wait_event("ready")
        disk = await vm.command("info vda")
        require(disk["mode"] == mode, f"guest A drives the disk as {disk['mode']}")
        require(disk["size"] == _IMAGE_BYTES, f"guest A sees {disk['size']} bytes")
        report = await vm.command("verify vda", _CHECK_SECONDS)
        device = await _device_state(stage)
        await _power_off(vm)
    story.say(f"guest A read, wrote, flushed and compared, with its {mode} driver")
    for what in ("host", "guest"):
        seen = await back.area_sum(report[f"{what}_offset"], report[f"{what}_bytes"])
        wanted = report[f"{what}_sum"]
        require(seen == wanted, f"in the {what}'s area guest B reads {seen}, guest A {wanted}")
    await trio.to_thread.run_sync(check_image, report, stage.image, stage.host_sum)
    story.say("guest B and the host have the same")
    story.add(f"guest A, {mode}", f"QEMU {vm.qemu.version}, vhost-user-blk-pci, {disk['interrupts']}")
    story.add("  device, while A ran", device)
    story.add("  host wrote, A read", _sum(report["host_bytes"], report["host_sum"]))
    story.add("  A wrote, B and host have", _sum(report["guest_bytes"], report["guest_sum"]))


async def _use_file_system(stage: _Stage) -> None:
    """Guest A on the file system: the files that B has, and one of A's that B then has, too."""
    story, back = stage.story, stage.back
    files = await back.file_sums()
    system = guest.FileSystem(await _front_end_socket(stage.group), _DEVICE)
    async with guest.open_vm(replace(stage.front, devices=(system,))) as vm:
        story.say(f"guest A runs: QEMU {vm.qemu.version}, vhost-user-fs-pci; booting {vm.kernel.release}")
        await vm.wait_event("ready")
        report = await vm.command(f"fs {_DEVICE}", _CHECK_SECONDS)
        device = await _device_state(stage)
        await _power_off(vm)
    require(report["files"] == files, f"guest A reads {report['files']}, guest B {files}")
    after = await back.file_sums()
    require(after.get(report["file"]) == report["guest_sum"], "guest B does not have what guest A has written")
    story.say("guest A mounted it, read the files, wrote one, and found it again; guest B has the same")
    story.add("guest A, virtiofs", f"QEMU {vm.qemu.version}, vhost-user-fs-pci, {len(files)} files")
    story.add("  device, while A ran", device)
    story.add("  A wrote, B has", _sum(report["guest_bytes"], report["guest_sum"]))


async def _power_off(vm: guest.Vm) -> None:
    complaints = await vm.complaints()
    require(not complaints, f"guest A's kernel complains: {'; '.join(complaints)}")
    await vm.command("poweroff")
    status = await vm.wait_exit()
    require(status == 0, f"guest A's QEMU ended with status {status}")


def _sum(size: Any, digest: Any) -> str:
    return f"{size >> 10} KiB, sha256 {digest[:16]}… equal"


def main(argv: Sequence[str] = ()) -> int:
    """``python -m vhu_legacy.demo_vvu [vhost-user|vfio-user]``."""
    carriers = tuple(via for via in CARRIERS if not argv or via in argv)
    if unknown := [word for word in argv if word not in CARRIERS]:
        print(f"usage: python -m vhu_legacy.demo_vvu [{'|'.join(CARRIERS)}] (not {unknown[0]})", file=sys.stderr)
        return 2
    status = 1
    try:
        status = run(run_demo, Console(), carriers)
    except* KeyboardInterrupt:
        print("demo: FAIL interrupted")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
