# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every guest kernel with every driver mode on every QEMU, each cell a VM of its own on a member of its own: over
vhost-user, and where the QEMU can do it over vfio-user, as a PCI function of the member's or as the group's owner.

All members belong to one group, served by ``vhu-legacy serve`` in a process of its own, as users run it; a group has
one owner, so each cell with the owner has a group of its own. A cell is right when what happened is what was expected:
a check of the disk that passes (PASS), or a member that must refuse its driver and does (REJECT). Anything else is
FAIL, or WEDGED when there was no progress within the bound. Over vfio-user a guest that checks its disk well still
fails its cell when its kernel complains, takes other interrupts than it should, or when an administration command of
it failed or is missing. A cell with kills has a group of its own, too, which is killed under a verified load again and
again.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from . import guest, images, qemu_args
from .errors import GuestError, ImagesError, VhuError
from .guest import MODES, Kind, Mode, Via

CELL_TIMEOUT = 60.0
_IMAGE_BYTES = 16 << 20
_POLL_SECONDS = 0.25
_EXPECTED_DRIVER: dict[Mode, str] = {"legacy": "legacy", "transitional": "modern", "modern": "modern"}
VIAS: tuple[Via, ...] = ("vhost-user", "vfio-user")
RING_PACKED = 34
IN_ORDER = 35
IN_ORDER_KERNELS = ("7.2",)
"""Kernels whose driver takes IN_ORDER."""
KILLS = 4
FORCE_LEGACY = "virtio_pci.force_legacy=1"


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

    Over vfio-user `kind` is the function's, `vectors` its MSI-X vectors (0: INTx; None: as many as it wants) and
    `force_legacy` has the guest take its legacy driver although it could do better. `packed` and `in_order` are the
    member's and, over vhost-user, QEMU's. So many `kills` come under load.
    """

    kernel: str
    mode: Mode
    qemu: str
    legacy_member: bool = True
    kind: Kind | None = None
    vectors: int | None = None
    packed: bool = False
    in_order: bool = False
    force_legacy: bool = False
    kills: int = 0

    @property
    def via(self) -> Via:
        """How the guest's QEMU reaches the device."""
        return "vhost-user" if self.kind is None else "vfio-user"

    @property
    def expected(self) -> Outcome:
        """What should come out."""
        return Outcome.REJECT if self.mode == "legacy" and not self.legacy_member else Outcome.PASS

    @property
    def driver(self) -> str:
        """The driver that the guest should take."""
        return "legacy" if self.force_legacy else _EXPECTED_DRIVER[self.mode]

    @property
    def cpus(self) -> int | None:
        """CPUs of the guest; with one, Linux would have no vector for the administration virtqueue alone."""
        return 2 if self.kind == "owner" and self.vectors is None else None

    @property
    def row(self) -> str:
        """Label of the table row the cell is in."""
        if not self.legacy_member:
            return f"{self.mode} device, legacy = false"
        words = [self.mode] if self.kind is None else ["owner"] if self.kind == "owner" else ["vfio", self.kind]
        if self.vectors is not None:
            words += [f"{self.vectors} vectors"] if self.vectors else ["INTx"]
        words += ["packed"] if self.packed else []
        words += ["in order"] if self.in_order else []
        words += ["legacy driver"] if self.force_legacy else []
        words += [f"{self.kills} kills"] if self.kills else []
        return " ".join(words)

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
            row = {**asdict(result.cell), "via": result.cell.via, "row": result.cell.row}
            row |= {"expected": result.cell.expected.value, "outcome": result.outcome.value}
            row |= {"seconds": result.seconds, "boot_seconds": result.boot_seconds, "detail": result.detail}
            row |= {"release": result.release, "qemu_version": result.qemu_version}
            row["console_log"] = None if result.console_log is None else str(result.console_log)
            rows.append(row)
        return {"ok": self.ok, "seconds": self.seconds, "cells": rows}


def plan(kernels: Iterable[str], modes: Iterable[Mode], qemus: Iterable[str], vias: Iterable[Via] = VIAS) -> list[Cell]:
    """The cells of a matrix.

    For each QEMU one of them must be refused (if legacy is among the modes); those over vfio-user come with each QEMU
    that has it. The owner counts as modern.
    """
    kernels, modes, qemus, vias = list(kernels), list(modes), list(qemus), list(vias)
    cells: list[Cell] = []
    if "vhost-user" in vias:
        cells += [Cell(kernel, mode, qemu) for qemu in qemus for kernel in kernels for mode in modes]
        if "legacy" in modes:
            for qemu in qemus:
                kernel = "6.12" if "6.12" in kernels else kernels[-1]
                cells.append(Cell(kernel, "legacy", qemu, legacy_member=False))
        cells += [
            replace(cell, kernel=kernel, qemu=qemu)
            for qemu in qemus
            for cell in _DISK_ROWS
            if cell.mode in modes
            for kernel in kernels
            if not cell.in_order
            or (kernel in IN_ORDER_KERNELS and qemu_args.parse_version(qemu) >= qemu_args.IN_ORDER_SINCE)
        ]
    if "vfio-user" in vias:
        able = [qemu for qemu in qemus if qemu_args.parse_version(qemu) >= qemu_args.VFIO_USER_SINCE]
        cells += [
            replace(cell, kernel=kernel, qemu=qemu)
            for qemu in able
            for cell in _FUNCTION_ROWS
            if cell.mode in modes
            for kernel in kernels
        ]
    return cells


_DISK_ROWS = (
    Cell("", "modern", "", packed=True),
    Cell("", "modern", "", in_order=True),
    Cell("", "modern", "", packed=True, in_order=True),
    Cell("", "legacy", "", kills=KILLS),
    Cell("", "modern", "", packed=True, kills=KILLS),
    Cell("", "modern", "", in_order=True, kills=KILLS),
)
_FUNCTION_ROWS = (
    Cell("", "legacy", "", kind="legacy"),
    Cell("", "legacy", "", kind="legacy", vectors=0),
    Cell("", "transitional", "", kind="transitional"),
    Cell("", "transitional", "", kind="transitional", force_legacy=True),
    Cell("", "modern", "", kind="modern"),
    Cell("", "modern", "", kind="owner"),
    Cell("", "modern", "", kind="owner", vectors=2),
    Cell("", "modern", "", kind="owner", vectors=0),
    Cell("", "modern", "", kind="owner", packed=True),
)


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
    via: Sequence[str] = VIAS,
) -> MatrixResult:
    """Run all cells, `jobs` at a time, with a live table on `console` (plain lines when it is no terminal).

    `via` has the ways to a member that are wanted: vhost-user, vfio-user. Images that are missing are built first.
    `junit` gets the results as JUnit XML. Logs go below `log_dir` (a directory of the cache if None). Raises
    :class:`ImagesError` or :class:`GuestError` when it cannot
    start at all; a cell that goes wrong is a result. On cancellation all VMs and the group are ended.
    """
    wanted = [mode for mode in MODES if mode in modes]
    if unknown := set(modes).difference(MODES):
        raise GuestError(f"unknown mode {unknown.pop()!r}; allowed: {', '.join(MODES)}")
    if unknown := set(via).difference(VIAS):
        raise GuestError(f"unknown way {unknown.pop()!r}; allowed: {', '.join(VIAS)}")
    cells = plan(kernels, wanted, qemus, [way for way in VIAS if way in via])
    if not cells:
        raise GuestError("nothing to run: vfio-user needs QEMU 10.1 or later")
    with Progress(console=console) as progress:
        await images.ensure(kernels, qemus, progress)
    view = _View(console, cells)
    started = trio.current_time()
    results: dict[Cell, CellResult] = {}
    directory = await trio.to_thread.run_sync(_directory, log_dir)
    # Short, since socket paths have little room; images are big and not wanted afterwards.
    with tempfile.TemporaryDirectory(prefix="vhu-matrix-") as scratch:
        disks: list[_CellDisk] = []
        members: list[guest.MemberSpec] = []
        for number, cell in enumerate(cells, 1):
            image = Path(scratch) / f"disk{number}.raw"
            host_sum = await trio.to_thread.run_sync(guest.make_image, image, _IMAGE_BYTES, number)
            if not (alone := cell.kind == "owner" or bool(cell.kills)):
                members.append(_member_spec(cell, image))
            disks.append(_CellDisk(0 if alone else len(members), image, host_sum))
        async with guest.serve_group(members, Path(scratch), name="matrix") as group:
            waiting = iter(enumerate(cells))

            async def work() -> None:
                for number, cell in waiting:
                    view.start(cell)
                    logs = directory / f"cell-{number + 1}"
                    if cell.kind == "owner":
                        place = Path(scratch) / f"o{number + 1}"
                        results[cell] = await _run_owner_cell(place, disks[number], cell, timeout, logs)
                    elif cell.kills:
                        place = Path(scratch) / f"k{number + 1}"
                        results[cell] = await _run_killed_cell(place, disks[number], cell, number, timeout, logs)
                    else:
                        results[cell] = await _run_cell(group, disks[number], cell, timeout, logs)
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


@dataclass(frozen=True)
class _CellDisk:
    """What a cell's guest gets: a member (0: the owner), its image, and the SHA-256 of what the host wrote there."""

    member: int
    image: Path
    host_sum: str


def _member_spec(cell: Cell, image: Path) -> guest.MemberSpec:
    return guest.MemberSpec(
        image,
        legacy=cell.legacy_member,
        vfio_user=cell.kind is not None,
        packed=cell.packed,
        in_order=cell.in_order,
        vectors=cell.vectors,
    )


async def _run_owner_cell(place: Path, disk: _CellDisk, cell: Cell, timeout: float, log_dir: Path) -> CellResult:
    """A cell whose guest drives the owner: of a group of its own."""
    started = trio.current_time()
    owner = guest.OwnerSpec(disk.image, packed=cell.packed, vectors=cell.vectors)
    try:
        await trio.Path(place).mkdir()
        async with guest.serve_group([], place, name="owner", owner=owner) as group:
            result = await _run_cell(group, disk, cell, timeout, log_dir)
        await trio.to_thread.run_sync(_keep_log, group.log, log_dir / "serve.log")
    except VhuError as error:
        return CellResult(cell, Outcome.FAIL, round(trio.current_time() - started, 1), str(error))
    return result


async def _run_killed_cell(
    place: Path, disk: _CellDisk, cell: Cell, number: int, timeout: float, log_dir: Path
) -> CellResult:
    """A cell whose group, one of its own, is killed under load."""
    started = trio.current_time()
    # Two, so that rings are recovered that stand at different places.
    spec = replace(_member_spec(cell, disk.image), queues=2)
    load: guest.LoadResult | None = None
    outcome, detail = Outcome.FAIL, ""
    try:
        await trio.Path(place).mkdir()
        load = await guest.load_under_kills(
            spec,
            place,
            kernel=cell.kernel,
            mode=cell.mode,
            qemu=cell.qemu,
            kills=cell.kills,
            seed=number,
            timeout=timeout,
            log_dir=log_dir,
        )
        problems = [*load.problems, *_driver_problems(cell, load.driver_mode, load.features)]
        outcome, detail = (Outcome.FAIL, "; ".join(problems)) if problems else (Outcome.PASS, "")
    except guest.GuestWedgedError as error:
        outcome, detail = Outcome.WEDGED, error.reason
    except VhuError as error:
        detail = str(error)
    await trio.to_thread.run_sync(_keep_log, place / "serve.log", log_dir / "serve.log")
    return CellResult(
        cell=cell,
        outcome=outcome,
        seconds=round(trio.current_time() - started, 1),
        detail=detail,
        boot_seconds=None if load is None else load.seconds_to_first_line,
        release=None if load is None else load.release,
        qemu_version=None if load is None else load.qemu,
        console_log=log_dir / "console.log",
    )


async def _run_cell(group: guest.ServedGroup, disk: _CellDisk, cell: Cell, timeout: float, log_dir: Path) -> CellResult:
    started = trio.current_time()
    outcome, detail = Outcome.FAIL, ""
    boot: guest.GuestResult | None = None
    broken: str | None = None
    try:
        socket = group.socket(disk.member) if cell.kind is None else group.function_socket(disk.member, cell.kind)
        before = await group.owner() if cell.kind == "owner" else {}
        async with _broken_watch(group, disk.member) as watch:
            # The watch cancels this scope; the boot then ends QEMU and returns nothing.
            with watch.scope:
                boot = await guest.boot(
                    socket,
                    kernel=cell.kernel,
                    mode=cell.mode,
                    qemu=cell.qemu,
                    via=cell.via,
                    packed=cell.packed,
                    in_order=cell.in_order,
                    cpus=cell.cpus,
                    append=[FORCE_LEGACY] if cell.force_legacy else [],
                    timeout=timeout,
                    log_dir=log_dir,
                )
        broken = watch.reason
        if boot is not None:
            outcome, detail = await _judge(cell, disk, boot)
            if outcome is Outcome.PASS:
                problems = [*_driver_problems(cell, boot.driver_mode, boot.features)]
                if cell.kind is not None:
                    problems += [*_boot_problems(cell, boot), *await _admin_problems(group, disk, cell, before)]
                outcome, detail = (Outcome.FAIL, "; ".join(problems)) if problems else (outcome, detail)
        elif broken is not None:
            outcome, detail = await _judge_broken(group, disk.member, cell, broken)
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


def _boot_problems(cell: Cell, boot: guest.GuestResult) -> Iterator[str]:
    """What a guest's kernel made of a PCI function, apart from the disk's content."""
    yield from boot.complaints
    interrupts = "intx" if cell.vectors == 0 else "msix"
    if boot.interrupts != interrupts:
        yield f"the guest uses {boot.interrupts} instead of {interrupts}"
    vectors = cell.vectors
    if vectors is None:
        vectors = 3 if cell.kind == "owner" and guest.ADMIN_COMMANDS[cell.kernel] else 2
    if boot.vectors != vectors:
        yield f"the guest uses {boot.vectors} vectors instead of {vectors}"


def _driver_problems(cell: Cell, driver_mode: str, features: int) -> Iterator[str]:
    """What the guest's driver should have taken, or left."""
    if driver_mode != cell.driver:
        yield f"the guest used its {driver_mode} driver"
    if (packed := bool(features >> RING_PACKED & 1)) != cell.packed:
        yield f"the guest's driver takes {'packed' if packed else 'split'} rings"
    if (in_order := bool(features >> IN_ORDER & 1)) != cell.in_order:
        yield f"the guest's driver takes IN_ORDER: {in_order}"


async def _admin_problems(group: guest.ServedGroup, disk: _CellDisk, cell: Cell, before: dict[str, Any]) -> list[str]:
    """What is wrong with the administration commands that a cell's boot took; `before` is the owner before it."""
    if cell.kind == "owner":
        return guest.owner_problems(before, await group.owner(), cell.kernel)
    if cell.kind != "legacy":
        return []
    member = await group.member(disk.member)
    return guest.legacy_command_problems(member["admin-commands"])


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
                info = await group.device(member)
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


async def _judge(cell: Cell, disk: _CellDisk, boot: guest.GuestResult) -> tuple[Outcome, str]:
    """A guest that went through to the end: was that right, and is the image what it says?"""
    if cell.expected is Outcome.REJECT:
        return Outcome.FAIL, "the member took a driver that it had to refuse"

    def differences() -> list[str]:
        return list(guest.check_image(disk.image, boot, disk.host_sum))

    found = await trio.to_thread.run_sync(differences)
    return (Outcome.FAIL, "; ".join(found)) if found else (Outcome.PASS, "")


async def _judge_broken(group: guest.ServedGroup, member: int, cell: Cell, reason: str) -> tuple[Outcome, str]:
    """A member that stopped its driver: right only where it must, and only if it did so before any
    request.
    """
    if cell.expected is not Outcome.REJECT:
        return Outcome.FAIL, f"member {member} stopped the guest: {reason}"
    requests = (await group.device(member))["requests"]
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
