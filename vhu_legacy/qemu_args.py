# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU command lines for a member. Pure functions; what differs between QEMU versions is named here, once.

* `reconnect=SECONDS` of a socket chardev became `reconnect-ms=MILLISECONDS` in 9.2 and is gone in 11.0.
* `num-queues` is always given: left alone, QEMU asks for one queue for each vCPU and fails when there are
fewer.
* Guest memory has to be shared memory, or vhost-user can't map it. vfio-user could do without, by copying through its
  socket; that is slow, and 10.1 and 10.2 get the copies wrong.
* The property `in_order` of virtio devices is there since 10.0 at the latest (7.2 has none).
* `vfio-user-pci` is there since 10.1. Its socket is a nested property, which only the JSON form of `-device` can say.
* QEMU options are comma-separated: a comma within a value is written twice.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

__all__ = [
    "DEFAULT_VERSION",
    "MODES",
    "OLDEST",
    "DiskArgs",
    "Mode",
    "chardev",
    "command_line",
    "command_line_vfio",
    "device",
    "escape",
    "function_device",
    "function_properties",
    "machine",
    "parse_version",
    "shell_line",
    "version_of_output",
]

Mode = Literal["legacy", "transitional", "modern"]
MODES: Final[tuple[Mode, ...]] = ("legacy", "transitional", "modern")
OLDEST: Final = (7, 2)
DEFAULT_VERSION: Final = (11, 1)
RECONNECT_MS_SINCE: Final = (9, 2)
VFIO_USER_SINCE: Final = (10, 1)
IN_ORDER_SINCE: Final = (10, 0)
BINARY: Final = "qemu-system-x86_64"
MAX_QUEUE_SIZE: Final = 1024

MODE_FLAGS: Final[dict[Mode, str]] = {
    "legacy": "disable-modern=on,disable-legacy=off",
    "transitional": "disable-modern=off,disable-legacy=off",
    "modern": "disable-modern=off,disable-legacy=on",
}


@dataclass(frozen=True, slots=True)
class DiskArgs:
    """What QEMU has to be told about a blk member."""

    socket: Path
    queues: int = 1
    queue_size: int = 256
    name: str = "vhu1"
    """Begins the ids of the chardev and the device."""


def parse_version(text: str) -> tuple[int, int]:
    """(7, 2) from "7.2" or "7.2.22". Raises ValueError for what isn't a version, or is older than 7.2."""
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(\.\d{1,4})*", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a QEMU version such as 7.2, 10.0 or 11.1")
    version = (int(match[1]), int(match[2]))
    if version < OLDEST:
        raise ValueError(f"QEMU {text} is too old; needed: {OLDEST[0]}.{OLDEST[1]} or later")
    return version


def version_of_output(text: str) -> tuple[int, int]:
    """The version in what `qemu-system-x86_64 --version` prints. Raises ValueError."""
    match = re.search(r"version (\d+\.\d+)", text)
    if match is None:
        raise ValueError(f"no version in {text[:80]!r}")
    return parse_version(match[1])


def escape(value: str | Path) -> str:
    """A value for QEMU's `key=value,key=value` syntax."""
    return str(value).replace(",", ",,")


def machine(memory: str = "1G", *, accel: str = "kvm:tcg", kind: str = "q35") -> list[str]:
    """The machine with guest memory that a vhost-user back end can map."""
    return [
        "-machine",
        f"{kind},accel={accel},memory-backend=mem0",
        "-m",
        memory,
        "-object",
        f"memory-backend-memfd,id=mem0,size={memory},share=on",
    ]


def chardev(disk: DiskArgs, version: tuple[int, int], *, reconnect: bool = True) -> list[str]:
    """The socket to the member. With `reconnect` QEMU comes back by itself when the group is restarted."""
    text = f"socket,id={escape(disk.name)}-chr,path={escape(disk.socket)}"
    if reconnect:
        text += ",reconnect-ms=1000" if version >= RECONNECT_MS_SINCE else ",reconnect=1"
    return ["-chardev", text]


def device(disk: DiskArgs, mode: Mode, *, extra: Sequence[str] = ()) -> list[str]:
    """The PCI device; `extra` are more `key=value` properties, such as "bootindex=1" or "bus=rp0"."""
    properties = [
        "vhost-user-blk-pci",
        f"id={escape(disk.name)}",
        f"chardev={escape(disk.name)}-chr",
        f"num-queues={disk.queues}",
        f"queue-size={disk.queue_size}",
        MODE_FLAGS[mode],
        *extra,
    ]
    return ["-device", ",".join(properties)]


def command_line(
    disk: DiskArgs,
    mode: Mode,
    version: tuple[int, int] = DEFAULT_VERSION,
    *,
    memory: str = "1G",
    binary: Sequence[str] = (BINARY,),
) -> list[str]:
    """A whole QEMU that boots from the member, on the terminal (Ctrl-a x ends it)."""
    return [
        *binary,
        *machine(memory),
        *chardev(disk, version),
        *device(disk, mode, extra=["bootindex=1"]),
        "-nographic",
    ]


def function_properties(
    socket: Path,
    version: tuple[int, int],
    *,
    name: str = "vhu1",
    bus: str | None = None,
    boot_index: int | None = None,
) -> dict[str, object]:
    """The properties of a PCI function over vfio-user, for `-device` in its JSON form and for QMP's `device_add`.

    Raises ValueError for a QEMU without vfio-user.
    """
    if version < VFIO_USER_SINCE:
        raise ValueError(
            f"QEMU {version[0]}.{version[1]} has no vfio-user-pci; needed: 10.1 or later, better 11.0 or later"
            " (10.1 and 10.2 have a defect in DMA_READ: there guest memory must be shared memory)"
        )
    properties: dict[str, object] = {
        "driver": "vfio-user-pci",
        "id": name,
        "socket": {"type": "unix", "path": str(socket)},
    }
    if bus is not None:
        properties["bus"] = bus
    if boot_index is not None:
        properties["bootindex"] = boot_index
    return properties


def function_device(socket: Path, version: tuple[int, int], **properties: Any) -> list[str]:
    """`-device` for a PCI function over vfio-user; arguments and errors as :func:`function_properties`."""
    return ["-device", json.dumps(function_properties(socket, version, **properties))]


def command_line_vfio(
    socket: Path,
    version: tuple[int, int] = DEFAULT_VERSION,
    *,
    memory: str = "1G",
    binary: Sequence[str] = (BINARY,),
    name: str = "vhu1",
    boot: bool = True,
) -> list[str]:
    """A whole QEMU with a PCI function over vfio-user, on the terminal (Ctrl-a x ends it); with `boot` the firmware
    tries its disk first.

    Raises ValueError for a QEMU before 10.1, which has no vfio-user.
    """
    return [
        *binary,
        *machine(memory),
        *function_device(socket, version, name=name, boot_index=1 if boot else None),
        "-nographic",
    ]


def shell_line(argv: Sequence[str], *, width: int = 100) -> str:
    """For pasting into a shell: quoted, an option with its value on each line."""
    lines: list[str] = []
    for word in argv:
        quoted = shlex.quote(word)
        starts_option = word.startswith("-") or not lines
        if starts_option or len(lines[-1]) + len(quoted) >= width * 4:
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return " \\\n  ".join(lines)
