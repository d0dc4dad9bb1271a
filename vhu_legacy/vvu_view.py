# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio-vhost-user device for `query-vhost-user-devices`: what the native half knows of it, and what the relay does.

Plain values with '_' in their names; `docs/QMP.md` describes them. Masters and slaves send what numbers they like, so
names of requests are looked up, and may be null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .config import VhostUserDeviceConfig

__all__ = ["describe", "request_name"]

SLAVE_UP: Final = 1
MASTER_UP: Final = 2
REPLY: Final = 1 << 2
"""Among the flags of a message."""

MASTER_REQUESTS: Final[Mapping[int, str]] = {
    1: "GET_FEATURES",
    2: "SET_FEATURES",
    3: "SET_OWNER",
    4: "RESET_OWNER",
    5: "SET_MEM_TABLE",
    6: "SET_LOG_BASE",
    7: "SET_LOG_FD",
    8: "SET_VRING_NUM",
    9: "SET_VRING_ADDR",
    10: "SET_VRING_BASE",
    11: "GET_VRING_BASE",
    12: "SET_VRING_KICK",
    13: "SET_VRING_CALL",
    14: "SET_VRING_ERR",
    15: "GET_PROTOCOL_FEATURES",
    16: "SET_PROTOCOL_FEATURES",
    17: "GET_QUEUE_NUM",
    18: "SET_VRING_ENABLE",
    19: "SEND_RARP",
    20: "NET_SET_MTU",
    21: "SET_BACKEND_REQ_FD",
    22: "IOTLB_MSG",
    23: "SET_VRING_ENDIAN",
    24: "GET_CONFIG",
    25: "SET_CONFIG",
    26: "CREATE_CRYPTO_SESSION",
    27: "CLOSE_CRYPTO_SESSION",
    28: "POSTCOPY_ADVISE",
    29: "POSTCOPY_LISTEN",
    30: "POSTCOPY_END",
    31: "GET_INFLIGHT_FD",
    32: "SET_INFLIGHT_FD",
    33: "GPU_SET_SOCKET",
    34: "RESET_DEVICE",
    35: "VRING_KICK",
    36: "GET_MAX_MEM_SLOTS",
    37: "ADD_MEM_REG",
    38: "REM_MEM_REG",
    39: "SET_STATUS",
    40: "GET_STATUS",
    41: "GET_SHARED_OBJECT",
    42: "SET_DEVICE_STATE_FD",
    43: "CHECK_DEVICE_STATE",
    44: "GET_SHMEM_CONFIG",
}
SLAVE_REQUESTS: Final[Mapping[int, str]] = {
    1: "IOTLB_MSG",
    2: "CONFIG_CHANGE_MSG",
    3: "VRING_HOST_NOTIFIER_MSG",
    4: "VRING_CALL",
    5: "VRING_ERR",
    6: "SHARED_OBJECT_ADD",
    7: "SHARED_OBJECT_REMOVE",
    8: "SHARED_OBJECT_LOOKUP",
    9: "SHMEM_MAP",
    10: "SHMEM_UNMAP",
}


def request_name(sender: str, request: int, flags: int) -> str | None:
    """The name of a request of the protocol; None for one that has none. A reply has that of what it answers."""
    of_master = (sender == "master") != bool(flags & REPLY)
    return (MASTER_REQUESTS if of_master else SLAVE_REQUESTS).get(request)


def describe(config: VhostUserDeviceConfig, info: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """One device. `info`: what `VhostUserDevice.info()` says. `place`: what the relay does: `sockets` ("vhost_user",
    "vfio_user", "front"), `state`, `carrier`, `peer_pid`, `master_pid`, `broken`.
    """
    sockets = place["sockets"]
    return {
        "name": config.name,
        "uuid": config.uuid_text,
        "max_queues": config.max_queues,
        "shared_memory": config.shared_memory,
        "ram_file": None if config.ram_file is None else str(config.ram_file),
        "ram_size": None if config.ram_file is None else config.ram_size,
        "sockets": {
            "vhost_user": str(sockets["vhost_user"]),
            "vfio_user": None if sockets["vfio_user"] is None else str(sockets["vfio_user"]),
            "front": str(sockets["front"]),
        },
        "state": place["state"],
        "carrier": place["carrier"],
        "peer_pid": place["peer_pid"],
        "master_pid": place["master_pid"],
        "broken": place["broken"],
        "status": _status(info["status"]),
        "ready": info["ready"],
        "paused": info["paused"],
        "resets": info["resets"],
        "slave": {"features": info["features_offered"], "protocol_features": info["protocol_slave"]},
        "passed_on": info["protocol_offered"],
        "master": {"features": info["features_accepted"], "protocol_features": info["protocol_accepted"]},
        "slave_channel": info["has_channel"],
        "memory": [dict(region) for region in info["memory"]],
        "waiting": info["waiting"],
        "last_message": _message(info["last_message"]),
        "last_error": info["last_error"],
        "messages": dict(info["counts"]),
        "queues": [_queue(index, queue) for index, queue in enumerate(info["queues"])],
        "log": {
            "doorbell": 2 * config.max_queues + 2,
            "rings": info["log_rings"],
            "rings_ignored": info["log_rings_ignored"],
        },
    }


def _status(status: int) -> dict[str, Any]:
    names = [name for bit, name in ((SLAVE_UP, "SLAVE_UP"), (MASTER_UP, "MASTER_UP")) if status & bit]
    return {"value": status, "names": names}


def _message(message: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if message is None:
        return None
    name = request_name(message["from"], message["request"], message["flags"])
    return {**message, "name": name, "reply": bool(message["flags"] & REPLY)}


def _queue(index: int, queue: Mapping[str, Any]) -> dict[str, Any]:
    """With the special virtqueue indices by which the driver reaches it: calls and kicks have one in common."""
    return {"index": index, "call_doorbell": 2 * index + 2, "err_doorbell": 2 * index + 3, **queue}
