# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A conformance suite for owners of SR-IOV device groups: one check for each requirement on the device side of virtio
1.4's administration commands, of the legacy interface behind them, and of the queue they travel through.

Each check has the id of that requirement (ADM-01, LEG-03...). It restores the device, runs, and ends as PASS, FAIL,
N-A (with a reason: what is missing to do it) or ERROR. Checks only ever read from disks, but reset everything they are
given: not for devices in use.

`run_conformance` drives an owner over its vfio-user socket; `native.InProcessTarget` is the same for a group in this
process. Everything here blocks, with a time limit on every wait: call it in a thread from async code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# For their effect: each registers its checks, in the order in which they are run.
from . import commands, legacy, objects
from .registry import CHECKS, Check, CheckFailed, NotApplicable, UnknownCheck, run_check, selected
from .report import Level, Outcome, Report, Row, render
from .target import CannotReach, Target, VfioTarget

__all__ = [
    "CHECKS",
    "CannotReach",
    "Check",
    "CheckFailed",
    "Level",
    "NotApplicable",
    "Outcome",
    "Report",
    "Row",
    "Target",
    "UnknownCheck",
    "VfioTarget",
    "commands",
    "legacy",
    "main_run",
    "objects",
    "render",
    "run_check",
    "run_conformance",
    "run_on",
    "selected",
]


def run_on(target: Target, only: Sequence[str] = ()) -> Report:
    """Run checks on a target, which stays open. `only`: ids or families, default all. Raises UnknownCheck."""
    return Report(target.name, [run_check(target, one) for one in selected(only)])


def run_conformance(owner: Path, members: Mapping[int, Path] | None = None, only: Sequence[str] = ()) -> Report:
    """Run checks on an owner behind a vfio-user socket, with members' own functions behind theirs, by member number.

    `only`: ids ("LEG-03") or families ("LEG"), default all. Blocks, a few seconds for all.

    Raises:
        UnknownCheck: there is no check of such a name.
        VfioError, DriverError, TimeoutError: the owner or a member can't be reached at all.
    """
    chosen = selected(only)
    target = VfioTarget(owner, members)
    try:
        # A wrong path, or a device in use, is no result of a check.
        target.restore()
        return Report(target.name, [run_check(target, one) for one in chosen])
    finally:
        target.close()


main_run = run_conformance
"""What the command `vhu-legacy conformance` calls."""
