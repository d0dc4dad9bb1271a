# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A member's queues as QEMU sees them, for `query-member`.

Of QEMU's `x-query-virtio*` family only two commands
are safe to ask of a running vhost-user device: `x-query-virtio-status` aborts QEMU 11.1, and `x-query-virtio-
queue-status` makes QEMU send GET_VRING_BASE, which stops the ring it asks about. `x-query-virtio-vhost-queue-
status` and `x-query-virtio-queue-element` only read QEMU's own state and guest memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

import trio
import trio_asyncio  # type: ignore[import-untyped]
from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from .errors import single
from .qmp import CommandError

__all__ = ["ask_qemu"]

# what its loggers report as errors is raised here anyway, with more to go by
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

QEMU_TIMEOUT: Final = 5.0
"""Seconds for QEMU's greeting; a monitor that another client holds never sends one."""
QEMU_TOTAL: Final = 20.0
QUEUE_KEYS: Final = ("index", "num", "desc-phys", "avail-phys", "used-phys", "avail-idx", "used-idx", "problem")


async def ask_qemu(qmp: str, qom_path: str | None, member: Mapping[str, Any]) -> dict[str, Any]:
    """What QEMU knows of the queues of the device that this member (an answer of `query-member`) serves.

    Raises CommandError when QEMU can't be reached, or has no such device. Cancellation disconnects from QEMU.
    """
    try:
        with trio.fail_after(QEMU_TOTAL):
            async with trio_asyncio.open_loop():
                answer: dict[str, Any] = await trio_asyncio.aio_as_trio(_ask_qemu)(qmp, qom_path, member)
                return answer
    except trio.TooSlowError:
        raise CommandError(f"QEMU at {qmp}: no answer within {QEMU_TOTAL:.0f} s") from None
    except BaseExceptionGroup as errors:
        # the loop's nurseries wrap what was raised in it
        error = single(errors)
        raise error from error.__cause__


async def _ask_qemu(qmp: str, qom_path: str | None, member: Mapping[str, Any]) -> dict[str, Any]:
    """The asyncio side of `ask_qemu`."""
    client = QMPClient("vhu-legacy")
    try:
        try:
            await asyncio.wait_for(client.connect(qmp), QEMU_TIMEOUT)
        except TimeoutError:
            hint = "is another client connected to it? give QEMU one more -qmp"
            raise CommandError(f"QEMU at {qmp}: no greeting within {QEMU_TIMEOUT:.0f} s; {hint}") from None
        try:
            return await _query_queues(client, qom_path, member)
        finally:
            await client.disconnect()
    except ExecuteError as error:
        raise CommandError(f"QEMU at {qmp}: {error}") from error
    except ConnectError as error:
        reason = getattr(error.exc, "strerror", None) or str(error.exc) or type(error.exc).__name__
        raise CommandError(f"QEMU at {qmp}: {reason}") from error
    except (KeyError, TypeError, IndexError) as error:
        # whatever listens there answers with something else than a QEMU does
        raise CommandError(f"QEMU at {qmp}: an answer of unexpected shape ({error!r})") from error
    except (QMPError, OSError, EOFError) as error:
        raise CommandError(f"QEMU at {qmp}: {str(error) or type(error).__name__}") from error


async def _query_queues(client: QMPClient, qom_path: str | None, member: Mapping[str, Any]) -> dict[str, Any]:
    devices = [device["path"] for device in await _execute(client, "x-query-virtio")]
    if qom_path is None:
        path = await _find_device(client, devices, member)
    else:
        # the PCI proxy is what people name; the virtio device is its child
        named = [p for p in (qom_path, f"{qom_path}/virtio-backend") if p in devices]
        if not named:
            raise CommandError(f"QEMU has no realized virtio device at {qom_path}; it has {', '.join(devices)}")
        path = named[0]
    entries = [await _query_queue(client, path, index) for index in range(len(member["queues"]))]
    qemu = (await _execute(client, "query-version"))["qemu"]
    return {
        "version": "{major}.{minor}.{micro}".format(**qemu),
        "qom-path": path,
        "started": any(entry["num"] is not None for entry in entries),
        "queues": entries,
    }


async def _find_device(client: QMPClient, devices: list[str], member: Mapping[str, Any]) -> str:
    """The device that this member serves.

    QEMU doesn't tell the path that a client socket is connected to. Where its rings are in guest memory both
    sides know, and no two devices have theirs at the same place. A lone vhost-user device needs no such
    proof.
    """
    candidates = []
    for path in devices:
        try:
            await _execute(client, "qom-get", {"path": path, "property": "chardev"})
        except ExecuteError:
            continue
        candidates.append(path)
    if len(candidates) == 1:
        return candidates[0]
    ours = {_guest_address(member, queue["desc"]) for queue in member["queues"] if queue["started"]} - {None}
    for path in candidates:
        if (await _query_queue(client, path, 0))["desc-phys"] in ours:
            return path
    raise CommandError(
        f"can't tell which of QEMU's {len(candidates)} vhost-user devices is member {member['id']}; use 'qom-path'"
    )


def _guest_address(member: Mapping[str, Any], user_address: int) -> int | None:
    """A front-end address as a guest-physical one, by the memory table that the front end sent."""
    for region in member["memory"]:
        offset: int = user_address - region["user-address"]
        if 0 <= offset < region["size"]:
            return int(region["guest-address"]) + offset
    return None


async def _query_queue(client: QMPClient, path: str, index: int) -> dict[str, Any]:
    where = {"path": path, "queue": index}
    entry: dict[str, Any] = dict.fromkeys(QUEUE_KEYS)
    entry["index"] = index
    try:
        vhost = await _execute(client, "x-query-virtio-vhost-queue-status", where)
        for key in ("num", "desc-phys", "avail-phys", "used-phys"):
            entry[key] = vhost[key]
        element = await _execute(client, "x-query-virtio-queue-element", where)
        entry["avail-idx"] = element["avail"]["idx"]
        entry["used-idx"] = element["used"]["idx"]
    except ExecuteError as error:
        entry["problem"] = str(error)
    return entry


async def _execute(client: QMPClient, command: str, arguments: dict[str, object] | None = None) -> Any:
    return await asyncio.wait_for(client.execute(command, arguments), QEMU_TIMEOUT)
