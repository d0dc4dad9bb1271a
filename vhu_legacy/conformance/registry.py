# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The checks by id, and how one is run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import VhuError
from ..virtio_driver import DriverError
from .report import Level, Outcome, Row

if TYPE_CHECKING:
    from .bench import Bench
    from .target import Target

__all__ = ["CHECKS", "Check", "CheckFailed", "NotApplicable", "UnknownCheck", "check", "run_check", "selected"]


class CheckFailed(VhuError):
    """The device does not do what the check asks for."""


class NotApplicable(VhuError):
    """The check can't be done with this device, or over this way to it."""


class UnknownCheck(VhuError):
    """No check has such an id."""


@dataclass(frozen=True, slots=True)
class Check:
    """One requirement and how to find out."""

    id: str
    level: Level
    title: str
    needs: tuple[str, ...]
    """What must be there, as `Bench.require` knows it."""
    function: Callable[[Bench], str | None]
    """Returns a remark, if there is one. Raises CheckFailed, NotApplicable."""


CHECKS: Final[dict[str, Check]] = {}
"""All checks, in the order of facts and sections: ADM, LST, AVQ, LEG, LIF, CAP, OBJ, PRT, MOD."""


def check(
    check_id: str, *, level: Level = Level.MUST, title: str, needs: Sequence[str] = ()
) -> Callable[[Callable[[Bench], str | None]], Callable[[Bench], str | None]]:
    """Register a check. Raises ValueError for an id that is taken or malformed."""
    if check_id in CHECKS or not re.fullmatch(r"[A-Z]{3}-\d\d", check_id):
        raise ValueError(f"check id {check_id!r} is taken or malformed")

    def register(function: Callable[[Bench], str | None]) -> Callable[[Bench], str | None]:
        CHECKS[check_id] = Check(check_id, level, title, tuple(needs), function)
        return function

    return register


def selected(only: Iterable[str] = ()) -> list[Check]:
    """The checks of these ids, or of whole families ("LEG"); all when there are none. Raises UnknownCheck."""
    wanted = [one.upper() for one in only]
    if not wanted:
        return list(CHECKS.values())
    families = {check_id.partition("-")[0] for check_id in CHECKS}
    unknown = [one for one in wanted if one not in CHECKS and one not in families]
    if unknown:
        raise UnknownCheck(f"no check is called {', '.join(unknown)}; there are {', '.join(sorted(families))}-NN")
    return [one for one in CHECKS.values() if one.id in wanted or one.id.partition("-")[0] in wanted]


def run_check(target: Target, one: Check) -> Row:
    """Restore the device, run one check on it, and say what came out. Never raises for what the device does."""
    from .bench import Bench

    started = time.monotonic()

    def row(outcome: Outcome, detail: str = "") -> Row:
        return Row(one.id, one.level, one.title, outcome, detail, (time.monotonic() - started) * 1000)

    try:
        target.restore()
    except (VhuError, OSError) as error:
        target.lost()
        return row(Outcome.ERROR, f"before the check: {error}")
    try:
        bench = Bench(target)
        for need in one.needs:
            bench.require(need)
        remark = one.function(bench)
    except NotApplicable as reason:
        return row(Outcome.NOT_APPLICABLE, str(reason))
    except (CheckFailed, DriverError) as reason:
        return row(Outcome.FAIL, str(reason))
    except TimeoutError as reason:
        # What waits for ever hangs a guest for ever. The stream may be out of step from here on.
        target.lost()
        return row(Outcome.FAIL, f"no answer: {reason}")
    except Exception as error:
        # The connection, or this suite, which has counted on something that this device doesn't do. Either way the
        # others can still be checked.
        target.lost()
        return row(Outcome.ERROR, f"{type(error).__name__}: {error}")
    return row(Outcome.PASS, remark or "")
