#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Times a guest's boot from the legacy function of a member against the same boot from QEMU's own legacy virtio disk.

Both sides are the same QEMU, kernel and disk content, and both boot in earnest: the firmware reads the boot sector,
the kernel and the initramfs from the disk, the kernel drives it with its legacy driver. On one side the disk is
`vfio-user-pci`, each access to whose I/O BAR becomes an administration command; on the other it is
`virtio-blk-pci,disable-modern=on` on a file. A round has one boot of each, in turning order; ratios are taken within a
round. Three times are taken: until the kernel's first program runs (`kernel`: what the firmware read), until the disk
is found (`disk`: the driver's initialisation, too), and the guest's check of the disk by itself (`check`).

Nothing here passes or fails by a number. Exit status 1: something didn't run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import trio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vhu_legacy import guest, images
from vhu_legacy.errors import GuestError, VhuError, single
from vhu_legacy.running import run

OURS: Final = "legacy function"
BASELINE: Final = "QEMU's own"
TIMES: Final = ("kernel", "disk", "check")
IMAGE_BYTES: Final = 64 << 20


async def boot_seconds(config: guest.VmConfig) -> dict[str, float]:
    """Boot this guest once: seconds from QEMU's start to the kernel's first program and to its having found the disk,
    and seconds of its check. Raises :class:`GuestError`, also when its driver isn't the legacy one.
    """
    async with guest.open_vm(config) as vm:
        await vm.wait_event("boot")
        kernel = trio.current_time() - vm.started
        await vm.wait_event("ready")
        disk = trio.current_time() - vm.started
        if (await vm.command("info vda"))["mode"] != "legacy":
            raise GuestError("the guest doesn't use its legacy driver")
        started = trio.current_time()
        await vm.command("verify vda")
        return {"kernel": kernel, "disk": disk, "check": trio.current_time() - started}


async def measure(kernel: str, qemu: str, rounds: int, console: Console) -> list[dict[str, dict[str, float]]]:
    """One result a round: times of both sides by name. Raises :class:`VhuError`."""
    samples = []
    with tempfile.TemporaryDirectory(prefix="vhu-bench-") as scratch:
        directory = Path(scratch)
        own, other = directory / "ours.raw", directory / "qemu.raw"
        # The word is for QEMU's own disk, which isn't among `disks`.
        config = guest.VmConfig(kernel=kernel, qemu=qemu, append=("vhu.disks=1",), log_dir=directory / "vm")
        config, _ = await trio.to_thread.run_sync(guest.make_boot_image, own, config, IMAGE_BYTES)
        await trio.to_thread.run_sync(shutil.copyfile, own, other)
        async with guest.serve_group([guest.MemberSpec(own, vfio_user=True)], directory, name="bench") as group:
            function = guest.Function(group.function_socket(1, "legacy"), boot_index=1)
            drive = f"file={other},format=raw,if=none,id=disk"
            device = "virtio-blk-pci,drive=disk,disable-modern=on,disable-legacy=off,bootindex=1"
            sides = {
                OURS: replace(config, disks=(function,)),
                BASELINE: replace(config, extra=("-drive", drive, "-device", device)),
            }
            for number in range(rounds):
                names = list(sides) if number % 2 == 0 else list(reversed(sides))
                samples.append({name: await boot_seconds(sides[name]) for name in names})
                text = ", ".join(f"{name} {samples[-1][name]['disk']:.2f} s" for name in sides)
                console.print(f"round {number + 1} of {rounds}: disk found after: {text}", highlight=False)
    return samples


def ratios(samples: list[dict[str, dict[str, float]]], time: str) -> list[float]:
    """Ours over the other's, round by round."""
    return [sample[OURS][time] / sample[BASELINE][time] for sample in samples]


def summary(samples: list[dict[str, dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """For each of the times: medians of both sides, and the ratios' minimum, median and maximum."""
    for time in TIMES:
        found = ratios(samples, time)
        medians = {name: statistics.median(sample[name][time] for sample in samples) for name in (OURS, BASELINE)}
        yield {
            "time": time,
            "seconds": medians,
            "ratio": {"min": min(found), "median": statistics.median(found), "max": max(found)},
        }


async def bench(kernel: str, qemu: str, rounds: int, output: Path | None) -> int:
    """Measure and print. 1 when something didn't run."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            await images.ensure([kernel], [qemu], progress)
        version = (await trio.to_thread.run_sync(images.qemu_command, qemu)).version
        release = (await trio.to_thread.run_sync(images.kernel, kernel)).release
        samples = await measure(kernel, qemu, rounds, console)
    except (VhuError, OSError, BaseExceptionGroup) as raised:
        error = single(raised)
        if not isinstance(error, (VhuError, OSError)):
            raise
        console.print(f"boot: {error}", highlight=False, markup=False)
        return 1
    rows = list(summary(samples))
    load = os.getloadavg()[0]
    table = Table(title=f"guest boot: Linux {release}, QEMU {version} (TCG), {rounds} rounds, load {load:.1f}")
    for heading in ("time", OURS, BASELINE, "ratio min", "median", "max"):
        table.add_column(heading, justify="left" if heading == "time" else "right")
    for row in rows:
        values = [f"{row['seconds'][name]:.2f} s" for name in (OURS, BASELINE)]
        table.add_row(row["time"], *values, *(f"{row['ratio'][key]:.2f}" for key in ("min", "median", "max")))
    console.print(table)
    if output is not None:
        text = json.dumps({"kernel": release, "qemu": version, "rows": rows, "samples": samples}, indent=1)
        await trio.Path(output).write_text(text + "\n")
    return 0


def main() -> int:
    """`benches/boot.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kernel", default="6.12", choices=images.KERNELS)
    parser.add_argument("--qemu", default="11.1", help="QEMU series, 10.1 or later (default 11.1)")
    parser.add_argument("--rounds", type=int, default=5, help="boots of each side (default 5)")
    parser.add_argument("--quick", action="store_true", help="one round: shows that it works")
    parser.add_argument("--output", type=Path, help="write all samples here, as JSON")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    return run(bench, options.kernel, options.qemu, 1 if options.quick else options.rounds, options.output)


if __name__ == "__main__":
    sys.exit(main())
