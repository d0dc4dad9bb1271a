# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What each check is expected to come to, said once: a check that silently does nothing fails its test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from vhu_legacy.conformance import Outcome, Row

__all__ = ["LINUX", "judge"]

_CAPABILITIES: Final = r"opcode 0x7 is(n't| not) legal.* \(as Linux needs it: capabilities_in_sr_iov_list\)$"

LINUX: Final[Mapping[str, str]] = {
    # Without VFs, LIST_QUERY and LIST_USE work: Linux sends them before there are any.
    "LST-09": r"LIST_QUERY \(as Linux needs it: lists_without_vfs\): OK/OK instead of EINVAL",
    # The self group's commands need no LIST_USE, and are in the SR-IOV group's list, where Linux looks for them.
    "LST-01": r"group 0: opcode 0x7 before any LIST_USE \(as Linux needs it: self_group_preset\): ",
    "LST-02": _CAPABILITIES,
    "LST-03": _CAPABILITIES,
    "LST-06": _CAPABILITIES,
    "LST-11": _CAPABILITIES,
}
"""Where a group as Linux needs it, the default, goes against the letter of the specification: how that shows."""


def judge(row: Row, not_applicable: Mapping[str, str], deviations: Mapping[str, str] | None = None) -> None:
    """AssertionError unless a check has come out as it has to: PASS, or what the two tables say (patterns)."""
    wanted = Outcome.PASS
    pattern = ""
    if row.id in not_applicable:
        wanted, pattern = Outcome.NOT_APPLICABLE, not_applicable[row.id]
    elif deviations is not None and row.id in deviations:
        wanted, pattern = Outcome.FAIL, deviations[row.id]
    assert row.outcome is wanted, f"{row.id} ({row.level}, {row.title}): {row.outcome}: {row.detail}"
    assert re.search(pattern, row.detail), f"{row.id}: {row.detail!r} isn't {pattern!r}"
