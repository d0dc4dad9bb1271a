# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The conformance suite through the group's in-process administration queues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from vhu_legacy.conformance import CHECKS, run_check
from vhu_legacy.conformance.native import InProcessTarget

from .judge import LINUX, judge

NOT_APPLICABLE: Final = {
    "LIF-16": "the member is no network device",
}


@pytest.fixture(scope="module")
def strict() -> Iterator[InProcessTarget]:
    target = InProcessTarget(strict=True)
    yield target
    target.close()


@pytest.fixture(scope="module")
def linux() -> Iterator[InProcessTarget]:
    target = InProcessTarget(strict=False)
    yield target
    target.close()


@pytest.mark.parametrize("check_id", CHECKS)
def test_conformance(strict: InProcessTarget, check_id: str) -> None:
    """By the letter of the specification."""
    judge(run_check(strict, CHECKS[check_id]), NOT_APPLICABLE)


@pytest.mark.parametrize("check_id", CHECKS)
def test_linux_compatible(linux: InProcessTarget, check_id: str) -> None:
    """As the default is: what differs, and nothing else."""
    judge(run_check(linux, CHECKS[check_id]), NOT_APPLICABLE, LINUX)


@pytest.mark.parametrize("switch", ["lists_without_vfs", "capabilities_in_sr_iov_list", "self_group_preset"])
def test_single_switch(switch: str) -> None:
    """One switch of a strict group changes the checks that are about it, and no other."""
    about = {
        "lists_without_vfs": {"LST-09"},
        "capabilities_in_sr_iov_list": {"LST-02", "LST-03", "LST-06", "LST-11"},
        "self_group_preset": {"LST-01"},
    }[switch]
    target = InProcessTarget(strict=True, compat={switch: True})
    try:
        for check_id in sorted(LINUX):
            row = run_check(target, CHECKS[check_id])
            judge(row, {}, {check_id: LINUX[check_id]} if check_id in about else None)
    finally:
        target.close()
