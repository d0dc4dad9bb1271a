# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A software virtio device group for stock QEMU: members over vhost-user, legacy guests, QMP to steer it.

::

    async with open_group(await trio.to_thread.run_sync(load, Path("group.toml"))) as group:
        await trio.sleep_forever()
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import CheckResult, CompatConfig, GroupConfig, MemberConfig, OwnerConfig, check, load
from .errors import (
    ClientError,
    ConfigError,
    GroupError,
    GuestError,
    ImagesError,
    MemberError,
    Problem,
    RunDirBusyError,
    StateError,
    VhuError,
)

if TYPE_CHECKING:
    from .admin import AdminError
    from .group import Group, open_group
    from .owner import OwnerDriver

    __version__: str

__all__ = [
    "AdminError",
    "CheckResult",
    "ClientError",
    "CompatConfig",
    "ConfigError",
    "Group",
    "GroupConfig",
    "GroupError",
    "GuestError",
    "ImagesError",
    "MemberConfig",
    "MemberError",
    "OwnerConfig",
    "OwnerDriver",
    "Problem",
    "RunDirBusyError",
    "StateError",
    "VhuError",
    "__version__",
    "check",
    "load",
    "open_group",
]


def __getattr__(name: str) -> Any:
    # `vhu-legacy validate` and `qemu-args` need neither trio nor the native module: those come with the group
    module = {"AdminError": "admin", "Group": "group", "OwnerDriver": "owner", "open_group": "group"}.get(name)
    if module is not None:
        return getattr(import_module(f".{module}", __name__), name)
    if name == "__version__":
        return _find_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _find_version() -> str:
    # costs a third of what all of trio does, and hardly anybody asks
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vhu-legacy")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0"
