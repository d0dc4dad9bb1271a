# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU command lines for a member, and for both sides of a virtio-vhost-user device. Pure functions; what differs
between QEMU versions is named here, once.

* `reconnect=SECONDS` of a socket chardev became `reconnect-ms=MILLISECONDS` in 9.2 and is gone in 11.0.
* `num-queues` is always given: left alone, QEMU asks for one queue for each vCPU and fails when there are
fewer.
* Guest memory has to be shared memory, or vhost-user can't map it. vfio-user could do without, by copying through its
  socket; that is slow, and 10.1 and 10.2 get the copies wrong.
* The property `in_order` of virtio devices is there since 10.0 at the latest (7.2 has none).
* `vfio-user-pci` is there since 10.1. Its socket is a nested property, which only the JSON form of `-device` can say.
* `vhost-user-test-device-pci` can show shared memory since 11.1. With `reconnect-ms` it doesn't start: it doesn't wait
  for its connection.
* Nor do most devices with a vhost-user back end: QEMU ends with "Failed to set msg fds". Only blk, net and (not in 7.2)
  scsi can reconnect.
* Ids begin with a letter, names of virtio-vhost-user devices needn't.
* QEMU options are comma-separated: a comma within a value is written twice.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

__all__ = [
    "DEFAULT_VERSION",
    "FRONT_DEVICES",
    "MODES",
    "OLDEST",
    "BackendArgs",
    "DiskArgs",
    "FrontArgs",
    "Mode",
    "RamFile",
    "backend_device",
    "chardev",
    "command_line",
    "command_line_backend",
    "command_line_front",
    "command_line_vfio",
    "device",
    "escape",
    "front_device",
    "function_device",
    "function_properties",
    "machine",
    "memory_text",
    "parse_version",
    "shell_line",
    "version_of_output",
    "vrings_of",
]

Mode = Literal["legacy", "transitional", "modern"]
MODES: Final[tuple[Mode, ...]] = ("legacy", "transitional", "modern")
OLDEST: Final = (7, 2)
DEFAULT_VERSION: Final = (11, 1)
RECONNECT_MS_SINCE: Final = (9, 2)
VFIO_USER_SINCE: Final = (10, 1)
SHARED_MEMORY_SINCE: Final = (11, 1)
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


@dataclass(frozen=True, slots=True)
class BackendArgs:
    """What the backend VM's QEMU has to be told about a virtio-vhost-user device."""

    socket: Path
    max_queues: int
    name: str
    """Of the device."""


@dataclass(frozen=True, slots=True)
class _FrontDevice:
    """A device of QEMU's that can be a vhost-user master."""

    model: str
    vrings: tuple[int, int]
    """Vrings it has in any case, and with each queue."""
    queues: str | None = None
    """The property that says how many queues; None: they can't be chosen."""
    reconnects_since: tuple[int, int] | None = None
    """The oldest QEMU that was seen to take it with a socket that reconnects."""
    modes: bool = False
    """It can be a legacy or a transitional device."""


FRONT_DEVICES: Final[Mapping[str, _FrontDevice]] = {
    "blk": _FrontDevice("vhost-user-blk-pci", (0, 1), "num-queues", OLDEST, modes=True),
    "net": _FrontDevice("virtio-net-pci", (0, 2), "queues", OLDEST, modes=True),
    "scsi": _FrontDevice("vhost-user-scsi-pci", (2, 1), "num_queues", (10, 0), modes=True),
    "fs": _FrontDevice("vhost-user-fs-pci", (1, 1), "num-request-queues"),
    "rng": _FrontDevice("vhost-user-rng-pci", (1, 0)),
    "vsock": _FrontDevice("vhost-user-vsock-pci", (2, 0)),
    "i2c": _FrontDevice("vhost-user-i2c-pci", (1, 0)),
    "gpio": _FrontDevice("vhost-user-gpio-pci", (2, 0)),
    "snd": _FrontDevice("vhost-user-snd-pci", (4, 0)),
    "input": _FrontDevice("vhost-user-input-pci", (2, 0)),
}
"""By kind. Not "gpu": its GPU_SET_SOCKET can't be passed on."""


@dataclass(frozen=True, slots=True)
class FrontArgs:
    """What the front end VM's QEMU has to be told about the device that a backend VM serves."""

    socket: Path
    kind: str
    """One of `FRONT_DEVICES`."""
    name: str
    """Of the virtio-vhost-user device."""
    queues: int = 1
    """Of net: pairs; of fs: request queues."""
    tag: str = "vvu"
    """Of fs: what the guest mounts."""


@dataclass(frozen=True, slots=True)
class RamFile:
    """The file that is to be all of a VM's memory."""

    path: Path
    size: int


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


def memory_text(size: int) -> str:
    """Bytes as QEMU's `-m` and `size=` take them; whole KiB."""
    for unit, shift in (("G", 30), ("M", 20)):
        if size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return f"{size >> 10}K"


def machine(
    memory: str = "1G", *, accel: str = "kvm:tcg", kind: str = "q35", ram_file: Path | None = None
) -> list[str]:
    """The machine with guest memory that a vhost-user back end can map; in `ram_file`, if that is to be it."""
    backend = "memory-backend-memfd" if ram_file is None else "memory-backend-file"
    path = "" if ram_file is None else f",mem-path={escape(ram_file)}"
    return [
        "-machine",
        f"{kind},accel={accel},memory-backend=mem0",
        "-m",
        memory,
        "-object",
        f"{backend},id=mem0,size={memory}{path},share=on",
    ]


def chardev(disk: DiskArgs, version: tuple[int, int], *, reconnect: bool = True) -> list[str]:
    """The socket to the member. With `reconnect` QEMU comes back by itself when the group is restarted."""
    return _chardev(disk.name, disk.socket, version, reconnect=reconnect)


def _chardev(name: str, socket: Path, version: tuple[int, int], *, reconnect: bool) -> list[str]:
    text = f"socket,id={escape(name)}-chr,path={escape(socket)}"
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


def backend_device(backend: BackendArgs, version: tuple[int, int], *, via: str = "vhost-user") -> list[str]:
    """The virtio-vhost-user device in its backend VM. Raises ValueError for a QEMU that can't have it."""
    name = f"vvu-{backend.name}"
    if via == "vfio-user":
        return function_device(backend.socket, version, name=name)
    if version < SHARED_MEMORY_SINCE:
        raise ValueError(
            f"QEMU {version[0]}.{version[1]} has no vhost-user device with shared memory; needed: 11.1 or later"
        )
    properties = [
        "vhost-user-test-device-pci",
        f"id={name}",
        f"chardev={name}-chr",
        "virtio-id=32",
        # doorbells and notifications are virtqueues to QEMU: rxq, txq, two for each queue, one for the log
        f"num_vqs={2 * backend.max_queues + 3}",
        "config_size=24",
        "vq_size=64",
    ]
    return [*_chardev(name, backend.socket, version, reconnect=False), "-device", ",".join(properties)]


def front_device(front: FrontArgs, mode: Mode, version: tuple[int, int]) -> list[str]:
    """The device in the front end VM. Raises ValueError for a kind that can't be had like this."""
    kind = FRONT_DEVICES[front.kind]
    name = f"vvu-{front.name}"
    if mode == "legacy" and not kind.modes:
        raise ValueError(f"{kind.model} is modern only")
    if front.queues > 1 and kind.queues is None:
        raise ValueError(f"{kind.model} has no choice of queues")
    reconnect = kind.reconnects_since is not None and version >= kind.reconnects_since
    options = _chardev(name, front.socket, version, reconnect=reconnect)
    properties = [kind.model, f"id={name}"]
    if front.kind == "net":
        options += ["-netdev", f"vhost-user,id={name}-net,chardev={name}-chr,queues={front.queues}"]
        properties.append(f"netdev={name}-net")
        if front.queues > 1:
            properties += ["mq=on", f"vectors={2 * front.queues + 2}"]
    else:
        properties.append(f"chardev={name}-chr")
        if kind.queues is not None:
            properties.append(f"{kind.queues}={front.queues}")
    if front.kind == "fs":
        properties.append(f"tag={escape(front.tag)}")
    if kind.modes:
        properties.append(MODE_FLAGS[mode])
    return [*options, "-device", ",".join(properties)]


def vrings_of(front: FrontArgs) -> int:
    """Queues that the device has for its back end: max_queues of the virtio-vhost-user device has to be as many."""
    fixed, each = FRONT_DEVICES[front.kind].vrings
    return fixed + each * front.queues


def command_line_backend(
    backend: BackendArgs,
    version: tuple[int, int] = DEFAULT_VERSION,
    *,
    via: str = "vhost-user",
    memory: str = "1G",
    binary: Sequence[str] = (BINARY,),
) -> list[str]:
    """The backend VM's QEMU on the terminal (Ctrl-a x ends it), with nothing to boot from yet. Raises ValueError."""
    return [*binary, *machine(memory), *backend_device(backend, version, via=via), "-nographic"]


def command_line_front(
    front: FrontArgs,
    mode: Mode = "transitional",
    version: tuple[int, int] = DEFAULT_VERSION,
    *,
    memory: str = "1G",
    ram: RamFile | None = None,
    binary: Sequence[str] = (BINARY,),
) -> list[str]:
    """The front end VM's QEMU on the terminal. Its memory is the file `ram`, if there is one, or of the size `memory`.

    Raises ValueError.
    """
    size, path = (memory, None) if ram is None else (memory_text(ram.size), ram.path)
    return [*binary, *machine(size, ram_file=path), *front_device(front, mode, version), "-nographic"]


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
