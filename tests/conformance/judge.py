# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What each check is expected to come to, said once: a check that silently does nothing fails its test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from vhu_legacy.conformance import Outcome, Row

__all__ = ["LINUX", "judge"]

_LISTED: Final = r"opcode 0x7\b.*"

LINUX: Final[Mapping[str, str]] = {
    # A1, lists_without_vfs
    "LST-09": r"LIST_QUERY \(A1: .*\): OK/OK instead of EINVAL",
    # A3, self_group_preset
    "LST-01": r"group 0: opcode 0x7 before any LIST_USE \(A3: .*\)",
    "LST-06": r"LIST_USE of group 0 takes opcode 0x7 away from|opcode 0x7",
    # A3, capabilities_in_sr_iov_list: they are listed in the SR-IOV group, but are commands of the self group
    "LST-02": r"group 1, list 0, 1, 0x.*opcode 0x7 is not legal|group 1.*opcode 0x[789] is not legal",
    "LST-03": r"group 1: opcode 0x7 isn't legal though listed",
    "LST-11": r"group 1: after a refused list, opcode 0x7 is not legal",
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
