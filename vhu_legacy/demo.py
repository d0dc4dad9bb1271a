# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``make demo``: stock guests with legacy drivers on members of ours, from end to end.

A group with two blk members is served by ``vhu-legacy serve``. The machine's own QEMU boots Debian's 6.12 cloud kernel
with a legacy-only vhost-user-blk-pci on member 1; the guest reads what the host wrote, writes, flushes and compares.

Then QEMU 11.1 gets nothing but a PCI function: member 2's legacy function over vfio-user. The firmware finds it, reads
the boot sector, kernel and initramfs from it through its I/O BAR and rings; the kernel drives it with its own legacy
driver. Each access to the I/O BAR travels through the owner's administration virtqueue as a command, and the table
counts them.

The members' state is read over QMP while the guests run; afterwards the images are compared with what the guests saw.
The last line is ``demo: PASS`` or ``demo: FAIL <reason>``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import guest, images
from .admin import Opcode
from .errors import GuestError, ImagesError, VhuError, single
from .running import run

KERNEL = "6.12"
FUNCTION_QEMU = "11.1"
"""The QEMU series of the second guest: vfio-user needs 10.1 or later."""
_IMAGE_BYTES = 64 << 20
_TRACED = 8


class Story:
    """What happened, told while it happens and kept for the tables."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = trio.current_time()
        self.tables: list[tuple[str, list[tuple[str, str]]]] = []

    def say(self, text: str) -> None:
        seconds = trio.current_time() - self._started
        self._console.print(f"demo: {seconds:5.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)

    def table(self, title: str) -> None:
        self.tables.append((title, []))

    def add(self, what: str, value: object) -> None:
        self.tables[-1][1].append((what, str(value)))

    def print_tables(self) -> None:
        # A pipe counts as 80 columns wide; there is no need to squeeze the tables into that.
        console = self._console
        wide = console if console.is_terminal else Console(file=console.file, width=120, color_system=None)
        for title, rows in self.tables:
            table = Table(title=title, show_header=False)
            table.add_column(style="bold", no_wrap=True)
            table.add_column()
            for row in rows:
                table.add_row(*row)
            wide.print(table)


async def tell(console: Console, play: Callable[[Story, Path], Awaitable[None]]) -> int:
    """Have a story played in a scratch directory and say how it ended: 0 when everything was right, 1 otherwise (the
    reason is in the last line).
    """
    story = Story(console)
    try:
        with tempfile.TemporaryDirectory(prefix="vhu-demo-") as scratch:
            await play(story, Path(scratch))
    except (VhuError, OSError, BaseExceptionGroup) as raised:
        error = single(raised)
        if not isinstance(error, (VhuError, OSError)):
            raise
        reason, *more = str(error).splitlines() or [type(error).__name__]
        for line in more:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(f"demo: FAIL {reason}", highlight=False, markup=False, soft_wrap=True)
        return 1
    story.print_tables()
    console.print("demo: PASS", highlight=False)
    return 0


async def run_demo(console: Console) -> int:
    """Run the demo; 0 when everything was right, 1 otherwise (the reason is in the last line).

    Missing images are built first. On cancellation the guests and the group are ended and nothing is left
    behind.
    """
    return await tell(console, _fetch_and_play)


async def _fetch_and_play(story: Story, directory: Path) -> None:
    await _fetch(story)
    await _play(story, directory)


async def _fetch(story: Story) -> None:
    missing = await trio.to_thread.run_sync(_missing)
    if missing:
        story.say(f"{' and '.join(missing)} must be fetched first: once, from this machine's Debian mirror")
    with Progress(console=Console(stderr=True)) as progress:
        await images.ensure([KERNEL], [FUNCTION_QEMU], progress)


def _missing() -> list[str]:
    missing = []
    try:
        images.kernel(KERNEL)
    except ImagesError:
        missing.append(f"Linux {KERNEL} (about 30 MB)")
    try:
        images.qemu_command(FUNCTION_QEMU)
    except ImagesError:
        missing.append(f"QEMU {FUNCTION_QEMU} (about 40 MB, unpacked 150 MB)")
    return missing


@dataclass(frozen=True)
class _Seen:
    """What a guest told, and its member's state while it ran and once its QEMU was gone."""

    vm: guest.Vm
    disk: dict[str, Any]
    report: dict[str, Any]
    running: dict[str, Any]
    after: dict[str, Any]


async def _play(story: Story, directory: Path) -> None:
    first_image, second_image = directory / "disk1.raw", directory / "disk2.raw"
    host_sum = await trio.to_thread.run_sync(guest.make_image, first_image, _IMAGE_BYTES, 1)
    members = [guest.MemberSpec(first_image), guest.MemberSpec(second_image, vfio_user=True)]
    second = guest.VmConfig(kernel=KERNEL, qemu=FUNCTION_QEMU)
    # The kernel's command line stands on the disk; where its socket is is nothing that the guest must know.
    second, boot_sum = await trio.to_thread.run_sync(
        guest.make_boot_image, second_image, _with_disk(second, Path("later")), _IMAGE_BYTES
    )
    async with guest.serve_group(members, directory, name="demo") as group:
        story.say(f"group 'demo' is served; its members 1 and 2 are disks of {_IMAGE_BYTES >> 20} MiB")
        one = await _first_guest(story, group)
        two, trace = await _second_guest(story, group, _with_disk(second, group.function_socket(2, "legacy")))
        owner = await group.owner()
        require(owner["failed"] == 0, f"{owner['failed']} administration commands failed")
        status = await group.stop()
        require(status == 0, f"vhu-legacy serve ended with status {status}")
        left = [path.name for path in group.run_dir.glob("*.sock")] if group.run_dir.is_dir() else []
        require(not left, f"the group left sockets behind: {', '.join(left)}")
    for seen, image, wanted in ((one, first_image, host_sum), (two, second_image, boot_sum)):
        await trio.to_thread.run_sync(check_image, seen.report, image, wanted)
    story.say("the images are checked on the host")
    story.table("a legacy guest on member 1, over vhost-user")
    _describe(story, one, "vhost-user-blk-pci,disable-modern=on")
    story.table("a guest that has booted from member 2, through its legacy function and the administration virtqueue")
    _describe(story, two, "vfio-user-pci")
    _describe_commands(story, two, trace)


def _with_disk(config: guest.VmConfig, socket: Path) -> guest.VmConfig:
    return replace(config, disks=(guest.Function(socket, boot_index=1),))


async def _first_guest(story: Story, group: guest.ServedGroup) -> _Seen:
    config = guest.VmConfig(disks=(guest.Disk(group.socket(1), "legacy"),), kernel=KERNEL)
    async with guest.open_vm(config) as vm:
        story.say(f"QEMU {vm.qemu.version} runs: vhost-user-blk-pci,disable-modern=on; booting {vm.kernel.release}")
        return await _use_disk(story, group, vm, 1)


async def _second_guest(story: Story, group: guest.ServedGroup, config: guest.VmConfig) -> tuple[_Seen, list[Any]]:
    async with guest.open_vm(config) as vm:
        story.say(f"QEMU {vm.qemu.version} runs: vfio-user-pci, no kernel given; the firmware boots from member 2")
        # Taken while it is fresh: later accesses push the first ones out.
        trace = await _first_accesses(group, 2)
        await vm.wait_event("boot")
        firmware = await group.member(2)
        story.say(
            f"{vm.kernel.release} runs, loaded by the firmware with {firmware['requests']['in']} reads"
            f" ({firmware['requests']['bytes-read'] >> 10} KiB)"
        )
        seen = await _use_disk(story, group, vm, 2)
    problems = guest.legacy_command_problems(seen.running["admin-commands"])
    require(not problems, "; ".join(problems))
    return seen, trace


async def _first_accesses(group: guest.ServedGroup, member: int) -> list[Any]:
    with trio.move_on_after(20):
        while True:
            trace = await group.qmp("query-trace", {"id": member, "limit": _TRACED})
            if len(trace["entries"]) == _TRACED:
                return list(trace["entries"])
            await trio.sleep(0.05)
    raise GuestError("the firmware does not look at the function")


async def _use_disk(story: Story, group: guest.ServedGroup, vm: guest.Vm, member: int) -> _Seen:
    """What both guests do with their disk, and what their members say to that."""
    await vm.wait_event("ready")
    disk = await vm.command("info vda")
    story.say(f"the guest found vda, {disk['size'] >> 20} MiB, with its {disk['mode']} driver")
    require(disk["mode"] == "legacy", f"the guest drives the disk as {disk['mode']}")
    require(disk["size"] == _IMAGE_BYTES, f"the guest sees {disk['size']} bytes")
    report = await vm.command("verify vda")
    story.say("the guest read, wrote, flushed and compared")
    running = await group.member(member)
    _check_running(running)
    complaints = await vm.complaints()
    require(not complaints, f"the guest's kernel complains: {'; '.join(complaints)}")
    await vm.command("poweroff")
    await vm.wait_exit()
    story.say("the guest is off")
    return _Seen(vm, disk, report, running, await _detached(group, member))


def require(condition: bool, reason: str) -> None:
    """Raises :class:`GuestError` unless the condition holds."""
    if not condition:
        raise GuestError(reason)


def _check_running(member: dict[str, Any]) -> None:
    """The member's own view while the guest runs must agree with the guest's."""
    require(member["state"] == "running", f"the member is {member['state']} while the guest runs")
    require(member["driver-mode"] == "legacy", f"the member sees a {member['driver-mode']} driver")
    require(member["broken"] is None, f"the member is broken: {member['broken']}")
    require("DRIVER_OK" in member["status"]["names"], f"status is {member['status']['names']}")
    queue = member["queues"][0]
    require(queue["layout"] == "legacy", f"the ring has the {queue['layout']} layout")
    requests = member["requests"]
    require(requests["in"] > 0 and requests["out"] > 0 and requests["flush"] > 0, f"requests served: {requests}")
    require(requests["failed"] == 0, f"{requests['failed']} requests failed")


def check_image(report: dict[str, Any], image: Path, host_sum: str) -> None:
    """What the guest saw, what the image holds, and what the host had written must be the same."""
    require(report["host_sum"] == host_sum, f"{image.name}: the guest did not read what the host had written")
    actual = guest.area_sum(image, report["host_offset"], report["host_bytes"])
    require(actual == host_sum, f"{image.name}: the host's area was changed")
    actual = guest.area_sum(image, report["guest_offset"], report["guest_bytes"])
    require(actual == report["guest_sum"], f"{image.name}: not what the guest wrote")


async def _detached(group: guest.ServedGroup, number: int) -> dict[str, Any]:
    """The member once QEMU's connection is gone."""
    with trio.move_on_after(5):
        while True:
            member = await group.member(number)
            if member["state"] == "detached":
                return member
            await trio.sleep(0.05)
    raise GuestError(f"member {number} is still {member['state']} after QEMU has ended")


def _describe(story: Story, seen: _Seen, device: str) -> None:
    vm, disk, member, report = seen.vm, seen.disk, seen.running, seen.report
    first_line = (vm.first_message or vm.started) - vm.started
    story.add("guest", f"Linux {vm.kernel.release}, first line after {first_line:.1f} s")
    story.add("QEMU", f"{vm.qemu.version}, {device}")
    revision = int(disk["pci_revision"], 16)
    interrupts = "INTx" if disk["interrupts"] == "intx" else f"{disk['vectors']} MSI-X vectors"
    story.add(
        "PCI device", f"{disk['pci_vendor']}:{disk['pci_device']} revision {revision}, {interrupts}, legacy driver"
    )
    status, queue = member["status"], member["queues"][0]
    story.add("member, while running", f"{member['state']}, {member['driver-mode']} driver")
    story.add("status", f"{status['value']:#x} {' '.join(status['names'])}")
    story.add("negotiated features", _names(member["driver-features"]))
    if member["protocol-features"]["names"]:
        story.add("vhost-user protocol", _names(member["protocol-features"]))
    story.add(
        "ring 0",
        f"{queue['size']} entries, {queue['layout']}, avail {queue['avail-idx']} used {queue['used-idx']}"
        f" in flight {queue['in-flight']}, kicks {queue['kicks']} calls {queue['calls']}",
    )
    story.add("requests served", _requests(member))
    story.add("after power-off", f"{seen.after['state']}, {_requests(seen.after)}")
    story.add("host wrote, guest read", f"{report['host_bytes'] >> 10} KiB, sha256 {report['host_sum'][:16]}… equal")
    story.add(
        "guest wrote, image holds", f"{report['guest_bytes'] >> 10} KiB, sha256 {report['guest_sum'][:16]}… equal"
    )
    story.add("guest's console", vm.console_log)


def _describe_commands(story: Story, seen: _Seen, trace: list[Any]) -> None:
    """The administration commands of each opcode, and how the register trace begins."""
    counts = seen.after["admin-commands"]
    for opcode in Opcode:
        if counts.get(opcode.name):
            story.add(f"{opcode.name} commands", counts[opcode.name])
    for number, entry in enumerate(trace):
        story.add("register trace, its start" if number == 0 else "", trace_line(entry))
    story.add("", "(all of it from a running group: vhu-legacy trace 2)")


def trace_line(entry: dict[str, Any]) -> str:
    """An entry of ``query-trace`` in one line."""
    value = "?" if entry["value"] is None else f"{entry['value']:#x}"
    access = (
        f"{'write' if entry['write'] else 'read':5} {entry['width']} at {entry['offset']:<3} {entry['register']:16}"
    )
    command = "notify region" if entry["opcode"] is None else entry["opcode-name"]
    return f"{access} {'<-' if entry['write'] else '->'} {value:10} {command}, {entry['microseconds']:.0f} us"


def _names(features: dict[str, Any]) -> str:
    return f"{features['value']:#x} {' '.join(features['names'])}"


def _requests(member: dict[str, Any]) -> str:
    requests = member["requests"]
    return (
        f"{requests['in']} reads ({requests['bytes-read'] >> 10} KiB), {requests['out']} writes"
        f" ({requests['bytes-written'] >> 10} KiB), {requests['flush']} flushes"
    )


def main(argv: Sequence[str] = ()) -> int:
    """``python -m vhu_legacy.demo``."""
    if argv:
        print("usage: python -m vhu_legacy.demo", file=sys.stderr)
        return 2
    status = 1
    try:
        status = run(run_demo, Console())
    except* KeyboardInterrupt:
        print("demo: FAIL interrupted")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
