# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every guest kernel with every driver mode on every QEMU, each cell a VM of its own on a member of its own.

All members belong to one group, served by ``vhu-legacy serve`` in a process of its own, as users run it. A
cell is right when what happened is what was expected: a check of the disk that passes (PASS), or a member
that must refuse its driver and does (REJECT). Anything else is FAIL, or WEDGED when there was no progress
within the bound.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from . import guest, images
from .errors import GuestError, ImagesError, VhuError
from .guest import MODES, Mode

CELL_TIMEOUT = 60.0
_IMAGE_BYTES = 16 << 20
_POLL_SECONDS = 0.25
_EXPECTED_DRIVER: dict[Mode, str] = {"legacy": "legacy", "transitional": "modern", "modern": "modern"}


class Outcome(StrEnum):
    """How a cell ended."""

    PASS = "PASS"
    REJECT = "REJECT"
    FAIL = "FAIL"
    WEDGED = "WEDGED"


@dataclass(frozen=True)
class Cell:
    """One VM to run. A cell whose member has `legacy` false and whose device is legacy-only must be
    refused.
    """

    kernel: str
    mode: Mode
    qemu: str
    legacy_member: bool = True

    @property
    def expected(self) -> Outcome:
        """What should come out."""
        return Outcome.REJECT if self.mode == "legacy" and not self.legacy_member else Outcome.PASS

    @property
    def row(self) -> str:
        """Label of the table row the cell is in."""
        return self.mode if self.legacy_member else f"{self.mode} device, legacy = false"

    @property
    def name(self) -> str:
        """The cell in one line."""
        return f"kernel {self.kernel}, {self.row}, QEMU {self.qemu}"


@dataclass(frozen=True)
class CellResult:
    """Outcome of one cell; `detail` is the reason of anything but PASS, `boot_seconds` the time to the
    guest's first line.
    """

    cell: Cell
    outcome: Outcome
    seconds: float
    detail: str = ""
    boot_seconds: float | None = None
    release: str | None = None
    qemu_version: str | None = None
    console_log: Path | None = None

    @property
    def as_expected(self) -> bool:
        """Whether the cell is right."""
        return self.outcome is self.cell.expected


@dataclass(frozen=True)
class MatrixResult:
    """All cells in the order of the table."""

    cells: tuple[CellResult, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every cell is as expected."""
        return all(result.as_expected for result in self.cells)

    def as_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        rows = []
        for result in self.cells:
            row = {**asdict(result.cell), "expected": result.cell.expected.value, "outcome": result.outcome.value}
            row |= {"seconds": result.seconds, "boot_seconds": result.boot_seconds, "detail": result.detail}
            row |= {"release": result.release, "qemu_version": result.qemu_version}
            row["console_log"] = None if result.console_log is None else str(result.console_log)
            rows.append(row)
        return {"ok": self.ok, "seconds": self.seconds, "cells": rows}


def plan(kernels: Iterable[str], modes: Iterable[Mode], qemus: Iterable[str]) -> list[Cell]:
    """The cells of a matrix, and for each QEMU one that must be refused (if legacy is among the modes)."""
    kernels, modes, qemus = list(kernels), list(modes), list(qemus)
    cells = [Cell(kernel, mode, qemu) for qemu in qemus for kernel in kernels for mode in modes]
    if "legacy" in modes:
        for qemu in qemus:
            kernel = "6.12" if "6.12" in kernels else kernels[-1]
            cells.append(Cell(kernel, "legacy", qemu, legacy_member=False))
    return cells


async def run_matrix(
    kernels: Sequence[str],
    modes: Sequence[str],
    qemus: Sequence[str],
    *,
    jobs: int = 2,
    junit: Path | None = None,
    console: Console,
    timeout: float = CELL_TIMEOUT,
    log_dir: Path | None = None,
) -> MatrixResult:
    """Run all cells, `jobs` at a time, with a live table on `console` (plain lines when it is no terminal).

    Images that are missing are built first. `junit` gets the results as JUnit XML. Logs go below `log_dir`
    (a directory of the cache if None). Raises :class:`ImagesError` or :class:`GuestError` when it cannot
    start at all; a cell that goes wrong is a result. On cancellation all VMs and the group are ended.
    """
    wanted = [mode for mode in MODES if mode in modes]
    if unknown := set(modes).difference(MODES):
        raise GuestError(f"unknown mode {unknown.pop()!r}; allowed: {', '.join(MODES)}")
    with Progress(console=console) as progress:
        await images.ensure(kernels, qemus, progress)
    cells = plan(kernels, wanted, qemus)
    view = _View(console, cells)
    started = trio.current_time()
    results: dict[Cell, CellResult] = {}
    directory = await trio.to_thread.run_sync(_directory, log_dir)
    # Short, since socket paths have little room; images are big and not wanted afterwards.
    with tempfile.TemporaryDirectory(prefix="vhu-matrix-") as scratch:
        members, sums = [], []
        for number in range(1, len(cells) + 1):
            image = Path(scratch) / f"disk{number}.raw"
            sums.append(await trio.to_thread.run_sync(guest.make_image, image, _IMAGE_BYTES, number))
            members.append(guest.MemberSpec(image, legacy=cells[number - 1].legacy_member))
        async with guest.serve_group(members, Path(scratch), name="matrix") as group:
            waiting = iter(enumerate(cells, 1))

            async def work() -> None:
                for number, cell in waiting:
                    view.start(cell)
                    image, host_sum = members[number - 1].image, sums[number - 1]
                    logs = directory / f"cell-{number}"
                    results[cell] = await _run_cell(group, number, cell, image, host_sum, timeout, logs)
                    view.finish(results[cell])

            with view:
                async with trio.open_nursery() as outer:
                    outer.start_soon(view.keep_fresh)
                    async with trio.open_nursery() as workers:
                        for _ in range(jobs):
                            workers.start_soon(work)
                    outer.cancel_scope.cancel()
        await trio.to_thread.run_sync(_keep_log, group.log, directory / "serve.log")
    result = MatrixResult(tuple(results[cell] for cell in cells), round(trio.current_time() - started, 1))
    if junit is not None:
        await trio.to_thread.run_sync(write_junit, result, junit)
    view.summary(result, directory)
    return result


def _directory(wanted: Path | None) -> Path:
    if wanted is None:
        parent = images.cache_dir() / "logs"
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="matrix-", dir=parent))
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted


def _keep_log(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        target.write_bytes(source.read_bytes())


async def _run_cell(
    group: guest.ServedGroup, member: int, cell: Cell, image: Path, host_sum: str, timeout: float, log_dir: Path
) -> CellResult:
    started = trio.current_time()
    outcome, detail = Outcome.FAIL, ""
    boot: guest.GuestResult | None = None
    broken: str | None = None
    try:
        async with _broken_watch(group, member) as watch:
            # The watch cancels this scope; the boot then ends QEMU and returns nothing.
            with watch.scope:
                boot = await guest.boot(
                    group.socket(member),
                    kernel=cell.kernel,
                    mode=cell.mode,
                    qemu=cell.qemu,
                    timeout=timeout,
                    log_dir=log_dir,
                )
        broken = watch.reason
        if boot is not None:
            outcome, detail = await _judge(cell, image, host_sum, boot)
        elif broken is not None:
            outcome, detail = await _judge_broken(group, member, cell, broken)
    except guest.GuestWedgedError as error:
        outcome, detail = Outcome.WEDGED, error.reason
    except VhuError as error:
        detail = str(error)
    return CellResult(
        cell=cell,
        outcome=outcome,
        seconds=round(trio.current_time() - started, 1),
        detail=detail,
        boot_seconds=None if boot is None else boot.seconds_to_first_line,
        release=None if boot is None else boot.release,
        qemu_version=None if boot is None else boot.qemu,
        console_log=log_dir / "console.log",
    )


@dataclass
class _Watch:
    reason: str | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@contextlib.asynccontextmanager
async def _broken_watch(group: guest.ServedGroup, member: int) -> AsyncIterator[_Watch]:
    """Cancel the watch's scope as soon as the member is marked broken: a refused guest would only sit there until its
    time is up.
    """
    watch = _Watch()

    async def look() -> None:
        while True:
            try:
                info = await group.member(member)
            except VhuError as error:
                # The group doesn't answer: that is this cell's failure, not the matrix's end.
                watch.reason = f"the group doesn't answer: {error}"
                watch.scope.cancel()
                return
            failure = info.get("broken") or info.get("last-error")
            if failure:
                watch.reason = f"{failure.get('rule')}: {failure.get('reason')}"
                watch.scope.cancel()
                return
            await trio.sleep(_POLL_SECONDS)

    error: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        try:
            yield watch
        except Exception as caught:
            # Raised again below: the nursery would wrap it into an exception group.
            error = caught
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


async def _judge(cell: Cell, image: Path, host_sum: str, boot: guest.GuestResult) -> tuple[Outcome, str]:
    """A guest that went through to the end: was that right, and is the image what it says?"""
    if cell.expected is Outcome.REJECT:
        return Outcome.FAIL, "the member took a driver that it had to refuse"
    if boot.driver_mode != _EXPECTED_DRIVER[cell.mode]:
        return Outcome.FAIL, f"the guest used its {boot.driver_mode} driver"

    def differences() -> list[str]:
        return list(guest.check_image(image, boot, host_sum))

    found = await trio.to_thread.run_sync(differences)
    return (Outcome.FAIL, "; ".join(found)) if found else (Outcome.PASS, "")


async def _judge_broken(group: guest.ServedGroup, member: int, cell: Cell, reason: str) -> tuple[Outcome, str]:
    """A member that stopped its driver: right only where it must, and only if it did so before any
    request.
    """
    if cell.expected is not Outcome.REJECT:
        return Outcome.FAIL, f"member {member} stopped the guest: {reason}"
    requests = (await group.member(member))["requests"]
    if requests["in"] or requests["out"]:
        return Outcome.FAIL, f"refused, but only after {requests['in']} reads and {requests['out']} writes"
    return Outcome.REJECT, reason


# --- showing it --------------------------------------------------------------------------------------------

_STYLE = {Outcome.PASS: "green", Outcome.REJECT: "cyan", Outcome.FAIL: "bold red", Outcome.WEDGED: "bold magenta"}


class _View:
    """A live table on a terminal, one plain line per finished cell elsewhere."""

    def __init__(self, console: Console, cells: Sequence[Cell]) -> None:
        self._console = console
        self._cells = cells
        self._running: dict[Cell, float] = {}
        self._done: dict[Cell, CellResult] = {}
        # Refreshed by a task of ours: rich's own thread would look at the cells while they change.
        self._live = Live(get_renderable=self._table, console=console, auto_refresh=False)

    def __enter__(self) -> _View:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._console.print(f"matrix: {len(self._cells)} cells")
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.refresh()
            self._live.stop()

    async def keep_fresh(self) -> None:
        while self._console.is_terminal:
            self._live.refresh()
            await trio.sleep(_POLL_SECONDS)

    def start(self, cell: Cell) -> None:
        self._running[cell] = trio.current_time()

    def finish(self, result: CellResult) -> None:
        self._running.pop(result.cell, None)
        self._done[result.cell] = result
        if not self._console.is_terminal:
            text = f"matrix: {len(self._done)}/{len(self._cells)} {result.cell.name}: {result.outcome.value}"
            text += f" ({result.seconds:.1f} s)" + ("" if result.as_expected else " UNEXPECTED")
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _table(self) -> Table:
        return matrix_table(self._cells, self._done, self._running)

    def summary(self, result: MatrixResult, logs: Path) -> None:
        if not self._console.is_terminal:
            # A pipe counts as 80 columns wide, too few for this table.
            wide = Console(file=self._console.file, width=110, color_system=None)
            wide.print(matrix_table(self._cells, self._done, {}))
        for cell in result.cells:
            if not cell.as_expected:
                self._console.print(f"{cell.cell.name}: {cell.outcome.value}", style=_STYLE[cell.outcome], markup=False)
                self._console.print(cell.detail, markup=False, highlight=False, soft_wrap=True)
        good = sum(cell.as_expected for cell in result.cells)
        self._console.print(
            f"matrix: {good} of {len(result.cells)} cells as expected in {result.seconds:.0f} s; logs in {logs}",
            soft_wrap=True,
            highlight=False,
        )


def matrix_table(
    cells: Sequence[Cell],
    done: dict[Cell, CellResult],
    running: dict[Cell, float],
) -> Table:
    """Rows: QEMU and driver mode; columns: kernels."""
    kernels = list(dict.fromkeys(cell.kernel for cell in cells))
    table = Table(title="guests x QEMU (seconds per VM)")
    table.add_column("QEMU")
    table.add_column("device")
    for kernel in kernels:
        table.add_column(f"kernel {kernel}")
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.qemu, cell.row), {})[cell.kernel] = cell
    for (qemu, row), by_kernel in sorted(rows.items(), key=lambda item: _version_key(item[0][0])):
        texts = []
        for kernel in kernels:
            found = by_kernel.get(kernel)
            if found is None:
                texts.append("")
            elif found in done:
                result = done[found]
                mark = "" if result.as_expected else " !"
                texts.append(f"[{_STYLE[result.outcome]}]{result.outcome.value}{mark}[/] {result.seconds:.1f}")
            elif found in running:
                texts.append(f"[yellow]… {trio.current_time() - running[found]:.0f}[/]")
            else:
                texts.append("[dim]-[/]")
        table.add_row(qemu, row, *texts)
    return table


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def write_junit(result: MatrixResult, path: Path) -> None:
    """The result as JUnit XML; a cell that is not as expected is a failure. Raises :class:`ImagesError`
    without junitparser.
    """
    try:
        from junitparser import Failure, JUnitXml, TestCase, TestSuite
    except ImportError as error:
        raise ImagesError("JUnit output needs the package junitparser (part of the dev extra)") from error
    suite = TestSuite("matrix")
    for cell in result.cells:
        case = TestCase(cell.cell.name, f"matrix.qemu-{cell.cell.qemu}.kernel-{cell.cell.kernel}", cell.seconds)
        case.system_out = f"expected {cell.cell.expected.value}, got {cell.outcome.value}"
        if not cell.as_expected:
            failure = Failure(f"{cell.outcome.value} instead of {cell.cell.expected.value}", cell.outcome.value)
            failure.text = _printable(cell.detail)
            case.result = [failure]
        suite.add_testcase(case)
    document = JUnitXml("vhu-legacy matrix")
    document.add_testsuite(suite)
    document.update_statistics()  # type: ignore[no-untyped-call]
    document.write(str(path), pretty=True)


def _printable(text: str) -> str:
    # XML has no place for most control characters, and a console log has them.
    return "".join(character for character in text if character in "\n\t" or ord(character) >= 32)
