# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""placeholder"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import VhostUserDeviceConfig


def describe(config: VhostUserDeviceConfig, info: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a device."""
    return {"name": config.name, **info, **place}
