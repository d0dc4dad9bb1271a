# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``make demo``: a stock guest with a legacy driver on a member of ours, from end to end.

A group with one blk member is served by ``vhu-legacy serve``; the machine's own QEMU boots Debian's 6.12
cloud kernel with a legacy-only vhost-user-blk-pci; the guest reads what the host wrote, writes, flushes and
compares; the member's state is read over QMP while the guest runs; afterwards the image is compared with
what the guest saw. The last line is ``demo: PASS`` or ``demo: FAIL <reason>``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import guest, images
from .errors import GuestError, VhuError, single
from .running import run

KERNEL = "6.12"
_IMAGE_BYTES = 64 << 20


class _Story:
    """What happened, told while it happens and kept for the table."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = trio.current_time()
        self.rows: list[tuple[str, str]] = []

    def say(self, text: str) -> None:
        seconds = trio.current_time() - self._started
        self._console.print(f"demo: {seconds:5.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)

    def add(self, what: str, value: object) -> None:
        self.rows.append((what, str(value)))


async def run_demo(console: Console) -> int:
    """Run the demo; 0 when everything was right, 1 otherwise (the reason is in the last line).

    Missing images are built first. On cancellation the guest and the group are ended and nothing is left
    behind.
    """
    story = _Story(console)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            await images.ensure([KERNEL], [], progress)
        with tempfile.TemporaryDirectory(prefix="vhu-demo-") as scratch:
            await _play(story, Path(scratch))
    except (VhuError, OSError, BaseExceptionGroup) as raised:
        error = single(raised)
        if not isinstance(error, (VhuError, OSError)):
            raise
        reason, *more = str(error).splitlines() or [type(error).__name__]
        for line in more:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(f"demo: FAIL {reason}", highlight=False, markup=False, soft_wrap=True)
        return 1
    table = Table(title="a legacy guest on a member", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for row in story.rows:
        table.add_row(*row)
    # A pipe counts as 80 columns wide; there is no need to squeeze the table into that.
    wide = console if console.is_terminal else Console(file=console.file, width=110, color_system=None)
    wide.print(table)
    console.print("demo: PASS", highlight=False)
    return 0


async def _play(story: _Story, directory: Path) -> None:
    image = directory / "disk1.raw"
    host_sum = await trio.to_thread.run_sync(guest.make_image, image, _IMAGE_BYTES, 1)
    async with guest.serve_group([guest.MemberSpec(image)], directory, name="demo") as group:
        socket = group.socket(1)
        story.say(f"group 'demo' is served; member 1 (blk, {_IMAGE_BYTES >> 20} MiB) listens on {socket}")
        config = guest.VmConfig(disks=(guest.Disk(socket, "legacy"),), kernel=KERNEL)
        async with guest.open_vm(config) as vm:
            story.say(f"QEMU {vm.qemu.version} runs: vhost-user-blk-pci,disable-modern=on; booting {vm.kernel.release}")
            await vm.wait_event("ready")
            disk = await vm.command("info vda")
            story.say(f"the guest found vda, {disk['size'] >> 20} MiB, with its {disk['mode']} driver")
            _require(disk["mode"] == "legacy", f"the guest drives the disk as {disk['mode']}")
            _require(disk["size"] == _IMAGE_BYTES, f"the guest sees {disk['size']} bytes")
            report = await vm.command("verify vda")
            story.say("the guest read, wrote, flushed and compared")
            member = await group.member(1)
            _check_running(member)
            await vm.command("poweroff")
            await vm.wait_exit()
            boot_seconds = (vm.first_message or vm.started) - vm.started
            console_log = vm.console_log
        story.say("the guest is off")
        after = await _detached(group)
        status = await group.stop()
        _require(status == 0, f"vhu-legacy serve ended with status {status}")
        left = [path.name for path in group.run_dir.glob("*.sock")] if group.run_dir.is_dir() else []
        _require(not left, f"the group left sockets behind: {', '.join(left)}")
    actual_host = await trio.to_thread.run_sync(guest.area_sum, image, report["host_offset"], report["host_bytes"])
    actual_guest = await trio.to_thread.run_sync(guest.area_sum, image, report["guest_offset"], report["guest_bytes"])
    story.say("the image is checked on the host")
    _require(report["host_sum"] == host_sum, "the guest did not read what the host had written")
    _require(actual_host == host_sum, "the host's area of the image was changed")
    _require(actual_guest == report["guest_sum"], "the image does not hold what the guest wrote")
    story.add("guest", f"Linux {vm.kernel.release}, first line after {boot_seconds:.1f} s")
    story.add("QEMU", f"{vm.qemu.version}, vhost-user-blk-pci,disable-modern=on (PCI {disk['pci_device']}, legacy)")
    _describe(story, member)
    story.add("after power-off", f"{after['state']}, {_requests(after)}")
    story.add("host wrote, guest read", f"{report['host_bytes'] >> 10} KiB, sha256 {host_sum[:16]}… equal")
    story.add("guest wrote, image holds", f"{report['guest_bytes'] >> 10} KiB, sha256 {actual_guest[:16]}… equal")
    story.add("guest's console", console_log)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise GuestError(reason)


def _check_running(member: dict[str, Any]) -> None:
    """The member's own view while the guest runs must agree with the guest's."""
    _require(member["state"] == "running", f"the member is {member['state']} while the guest runs")
    _require(member["driver-mode"] == "legacy", f"the member sees a {member['driver-mode']} driver")
    _require(member["broken"] is None, f"the member is broken: {member['broken']}")
    _require("DRIVER_OK" in member["status"]["names"], f"status is {member['status']['names']}")
    queue = member["queues"][0]
    _require(queue["layout"] == "legacy", f"the ring has the {queue['layout']} layout")
    requests = member["requests"]
    _require(requests["in"] > 0 and requests["out"] > 0 and requests["flush"] > 0, f"requests served: {requests}")
    _require(requests["failed"] == 0, f"{requests['failed']} requests failed")


async def _detached(group: guest.ServedGroup) -> dict[str, Any]:
    """The member once QEMU's connection is gone."""
    with trio.move_on_after(5):
        while True:
            member = await group.member(1)
            if member["state"] == "detached":
                return member
            await trio.sleep(0.05)
    raise GuestError(f"the member is still {member['state']} after QEMU has ended")


def _describe(story: _Story, member: dict[str, Any]) -> None:
    status, queue = member["status"], member["queues"][0]
    story.add("member 1, while running", f"{member['state']}, {member['driver-mode']} driver")
    story.add("status", f"{status['value']:#x} {' '.join(status['names'])}")
    story.add("negotiated features", _names(member["driver-features"]))
    story.add("vhost-user protocol", _names(member["protocol-features"]))
    story.add(
        "ring 0",
        f"{queue['size']} entries, {queue['layout']}, avail {queue['avail-idx']} used {queue['used-idx']}"
        f" in flight {queue['in-flight']}, kicks {queue['kicks']} calls {queue['calls']}",
    )
    story.add("requests served", _requests(member))


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
