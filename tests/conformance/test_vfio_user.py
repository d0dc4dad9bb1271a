# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The conformance suite through the owner's PCI function, with a scripted driver over vfio-user."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import pytest
from rich.console import Console

from tests.conftest import GroupFactory, RunningGroup
from vhu_legacy.conformance import (
    CHECKS,
    Outcome,
    Report,
    UnknownCheck,
    VfioTarget,
    main_run,
    render,
    run_check,
    run_on,
)
from vhu_legacy.vfio_client import VfioError
from vhu_legacy.virtio_driver import Framing

from .judge import LINUX, judge

CONFIG: Final = """
    [group]
    name = "conformance"
    strict = {strict}

    [owner]
    type = "blk"
    image = "ram:1MiB"
    admin_queues = 2
    vfio_user = true
    packed = {packed}
    {vectors}

    [[members]]
    count = 2
    type = "blk"
    image = "disk{{n}}.raw"
    queues = 2
    queue_size = 64
    vfio_user = true
"""

NOT_APPLICABLE: Final = {
    "LIF-16": "the member is no network device",
}


class Served:
    """A group, and where its functions are."""

    def __init__(self, start: GroupFactory, *, strict: bool, packed: bool = False, intx: bool = False) -> None:
        pattern = bytes(i * 167 + (i >> 8) & 0xFF for i in range(1 << 16))
        for number in (1, 2):
            (start.directory / f"disk{number}.raw").write_bytes(pattern * 16)
        text = CONFIG.format(
            strict=str(strict).lower(), packed=str(packed).lower(), vectors="vectors = 0" if intx else ""
        )
        self.group: RunningGroup = start(text)
        self.directory: Path = self.group.directory / "run"

    @property
    def owner(self) -> Path:
        return self.directory / "owner.vfio-user.sock"

    @property
    def members(self) -> dict[int, Path]:
        """The first by itself, the second with both interfaces in one function."""
        return {
            1: self.directory / "member-1.modern.vfio-user.sock",
            2: self.directory / "member-2.transitional.vfio-user.sock",
        }

    def target(
        self,
        *,
        interrupts: Literal["msix", "intx", "poll"] = "msix",
        packed: bool = False,
        framing: Framing | None = None,
        shared: bool = True,
    ) -> VfioTarget:
        return VfioTarget(
            self.owner, self.members, interrupts=interrupts, packed=packed, framing=framing, shared=shared
        )


@pytest.fixture(scope="module")
def served(start_module_group: GroupFactory) -> Served:
    return Served(start_module_group, strict=True)


@pytest.fixture(scope="module")
def strict(served: Served) -> Iterator[VfioTarget]:
    target = served.target()
    yield target
    target.close()


@pytest.fixture(scope="module")
def linux(start_module_group: GroupFactory) -> Iterator[VfioTarget]:
    target = Served(start_module_group, strict=False).target()
    yield target
    target.close()


@pytest.mark.parametrize("check_id", CHECKS)
def test_conformance(strict: VfioTarget, check_id: str) -> None:
    """By the letter of the specification."""
    judge(run_check(strict, CHECKS[check_id]), NOT_APPLICABLE)


@pytest.mark.parametrize("check_id", CHECKS)
def test_linux_compatible(linux: VfioTarget, check_id: str) -> None:
    """As the default is: what differs, and nothing else."""
    judge(run_check(linux, CHECKS[check_id]), NOT_APPLICABLE, LINUX)


COMMANDS: Final = ["ADM", "LST", "LEG-03", "LEG-10", "PRT-02", "MOD-04"]


def judge_all(report: Report) -> None:
    for row in report.rows:
        judge(row, {})


FRAMINGS: Final = {
    "one each": Framing(),
    "Linux": Framing((24,), (8,)),
    "growing": Framing((1, 2, 3, 4, 5, 6, 7), (1, 1, 1)),
    "two bytes each": Framing((2,) * 12, (2,) * 4),
    "cut before the header ends": Framing((23,), (7,)),
    "data in pieces": Framing((24, 1, 7), (8, 1)),
    "indirect": Framing((24,), (8,), indirect=True),
    "two direct, the rest indirect": Framing((5, 5, 5), (3, 3), indirect=2),
}


@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS)
def test_framing(served: Served, strict: VfioTarget, framing: Framing) -> None:
    """The same commands, cut into descriptors in any way."""
    strict.lost()
    target = served.target(framing=framing)
    try:
        judge_all(run_on(target, COMMANDS))
    finally:
        target.close()


@pytest.mark.parametrize("interrupts", ["intx", "poll"])
def test_interrupts(start_group: GroupFactory, interrupts: Literal["intx", "poll"]) -> None:
    target = Served(start_group, strict=True, intx=True).target(interrupts=interrupts)
    try:
        judge_all(run_on(target, [*COMMANDS, "AVQ"]))
    finally:
        target.close()


def test_packed(start_group: GroupFactory) -> None:
    """The owner's administration queues as packed rings."""
    target = Served(start_group, strict=True, packed=True).target(packed=True)
    try:
        judge_all(run_on(target, [*COMMANDS, "AVQ", "LEG", "CAP", "OBJ"]))
    finally:
        target.close()


def test_memory_without_fd(served: Served, strict: VfioTarget) -> None:
    """Rings and buffers that the devices have to ask for, piece by piece."""
    strict.lost()
    target = served.target(shared=False)
    try:
        judge_all(run_on(target, [*COMMANDS, "AVQ-06", "AVQ-08", "LIF-07", "LIF-08", "LIF-14", "MOD-01", "MOD-02"]))
    finally:
        target.close()


def test_owner_alone(served: Served, strict: VfioTarget) -> None:
    """Without members' sockets: what needs a member's memory, interrupts or registers says so."""
    strict.lost()
    report = main_run(served.owner, {}, ["LEG", "LIF", "MOD"])
    assert report.ok
    missing = {row.id for row in report.rows if row.outcome is Outcome.NOT_APPLICABLE}
    assert missing == {
        *("LEG-05", "LEG-06", "LEG-15"),
        *("LIF-01", "LIF-02", "LIF-04", "LIF-05", "LIF-07", "LIF-09", "LIF-10", "LIF-11"),
        *("LIF-13", "LIF-14", "LIF-15", "LIF-16"),
        *("MOD-01", "MOD-02"),
    }
    for row in report.rows:
        assert row.outcome in (Outcome.PASS, Outcome.NOT_APPLICABLE), row
        assert row.outcome is Outcome.PASS or "member" in row.detail


def test_report(served: Served, strict: VfioTarget) -> None:
    strict.lost()
    report = main_run(served.owner, served.members, ["adm-01", "LIF-16"])
    assert [row.id for row in report.rows] == ["ADM-01", "LIF-16"]
    assert report.ok
    assert report.counts == {"PASS": 1, "FAIL": 0, "N-A": 1, "ERROR": 0}
    value = json.loads(report.as_json())
    assert value["checks"][0]["outcome"] == "PASS"
    assert value["checks"][1]["detail"] == "the member is no network device"
    text = io.StringIO()
    render(report, Console(file=text, width=120))
    assert "ADM-01" in text.getvalue()
    assert "2 checks: 1 PASS, 1 N-A: conforms" in text.getvalue()


def test_unknown_check(tmp_path: Path) -> None:
    with pytest.raises(UnknownCheck, match="ADM-99"):
        main_run(tmp_path / "none.sock", {}, ["ADM-99"])


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(VfioError, match="No such file"):
        main_run(tmp_path / "none.sock", {}, [])


def test_member_in_use(served: Served, strict: VfioTarget) -> None:
    """A member serves one front end: the second is told at once, and the first goes on."""
    strict.restore()
    with pytest.raises(VfioError):
        main_run(served.owner, {1: served.members[1]}, ["ADM-01"])
    judge(run_check(strict, CHECKS["ADM-01"]), {})
