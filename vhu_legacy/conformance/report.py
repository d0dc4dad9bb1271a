# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a run of the conformance suite has found, as rows, JSON and a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Level", "Outcome", "Report", "Row", "render"]


class Level(StrEnum):
    """How binding a requirement is."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    MAY = "MAY"
    RECOMMENDED = "REC"
    """Not the specification's: what this project recommends where that is silent."""


class Outcome(StrEnum):
    """What came out of a check."""

    PASS = "PASS"
    FAIL = "FAIL"
    NOT_APPLICABLE = "N-A"
    """The device, or the way to it, has nothing that the check could be done with; `detail` says what is missing."""
    ERROR = "ERROR"
    """The check could not be done: the connection broke, or the suite itself has a bug."""


@dataclass(frozen=True, slots=True)
class Row:
    """One check's outcome."""

    id: str
    level: Level
    title: str
    outcome: Outcome
    detail: str
    """Why it isn't PASS; "" or a remark otherwise."""
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run, in the order of the checks' ids."""

    target: str
    rows: Sequence[Row]

    @property
    def ok(self) -> bool:
        """No MUST is broken and every check could be done. A SHOULD or MAY that fails is in the rows and no more."""
        return not any(
            row.outcome is Outcome.ERROR or (row.outcome is Outcome.FAIL and row.level is Level.MUST)
            for row in self.rows
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have which outcome; all outcomes are there."""
        found = Counter(row.outcome for row in self.rows)
        return {outcome.value: found[outcome] for outcome in Outcome}

    def row(self, check_id: str) -> Row:
        """Raises KeyError for a check that wasn't run."""
        for row in self.rows:
            if row.id == check_id:
                return row
        raise KeyError(check_id)

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "ok": self.ok,
            "counts": self.counts,
            "checks": [{**asdict(row), "milliseconds": round(row.milliseconds, 3)} for row in self.rows],
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)


_STYLE: Final = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.NOT_APPLICABLE: "dim",
    Outcome.ERROR: "bold magenta",
}


def render(report: Report, console: Console) -> None:
    """The report as a table, and a line that sums it up."""
    table = Table(title=report.target, title_justify="left", expand=False)
    table.add_column("check", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("what")
    for row in report.rows:
        outcome = Text(row.outcome.value, style=_STYLE[row.outcome])
        if row.outcome is Outcome.FAIL and row.level is not Level.MUST:
            outcome.stylize("yellow")
        what = Text(row.title)
        if row.detail:
            what.append(f"\n{row.detail}", style="dim" if row.outcome is Outcome.NOT_APPLICABLE else "italic")
        table.add_row(row.id, row.level.value, outcome, f"{row.milliseconds:.1f}", what)
    console.print(table)
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items() if count)
    verdict = "conforms" if report.ok else "does not conform"
    console.print(Text(f"{len(report.rows)} checks: {counts}: {verdict}", style="bold"))
