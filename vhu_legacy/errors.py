# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The exceptions this package raises on purpose. All carry their data as attributes, so nobody has to parse
texts.

::

    VhuError
     +-- ConfigError     a group file has problems (all of them, in `problems`)
     +-- GroupError      a group can't be started or can't do what was asked
     |    +-- RunDirBusyError    another process serves the same run directory
     |    +-- MemberError        one member can't be added, changed or removed
     |    +-- StateError         what a former process left in `state.json` can't be used
     +-- ClientError     a running group can't be found, reached, or refuses a command
     +-- GuestError      a guest didn't boot or failed its task
     +-- ImagesError     guest kernels or QEMU packages can't be fetched or built
     +-- AdminError      an administration command failed; one class for each status (in `admin`)
     +-- VfioError       a vfio-user server is gone, breaks the protocol or refuses a request (in `vfio_client`)
     +-- DriverError     the scripted PCI driver can't do what it was asked to (in `virtio_driver`)

What the native half raises (`_native.NativeError` and below) is turned into one of these where the message is
for the person at the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ClientError",
    "ConfigError",
    "GroupError",
    "GuestError",
    "ImagesError",
    "MemberError",
    "Problem",
    "RunDirBusyError",
    "StateError",
    "VhuError",
    "single",
]


class VhuError(Exception):
    """Root of the errors of this package; `str()` is one clear line (`ConfigError`: one for each problem)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a group file: where it is, what was found there, and what is allowed instead."""

    file: Path
    """The group file."""
    table: str | None
    """"[group]", "[owner]", "[[members]] #2"; None for the file as a whole."""
    key: str | None
    """The key within the table; None when the table itself is at fault."""
    found: str
    """What is wrong with what was found."""
    allowed: str | None
    """What would be right; None when there is nothing to choose."""

    def __str__(self) -> str:
        place = str(self.file)
        if self.table is not None:
            place += f": {self.table}"
        if self.key is not None:
            place += f" {self.key}"
        text = f"{place}: {self.found}"
        return text if self.allowed is None else f"{text}; allowed: {self.allowed}"

    def as_dict(self) -> dict[str, str | None]:
        """The same as plain values, for `--json`."""
        return {
            "file": str(self.file),
            "table": self.table,
            "key": self.key,
            "found": self.found,
            "allowed": self.allowed,
        }


class ConfigError(VhuError):
    """A group file can't be used. `problems` has every mistake that was found, not just the first."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class GroupError(VhuError):
    """A group can't be started, or can't do what was asked of it. `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RunDirBusyError(GroupError):
    """Another process serves a group in the same run directory; `pid` is None when it can't be told."""

    def __init__(self, run_dir: Path, pid: int | None) -> None:
        who = "another process" if pid is None else f"process {pid}"
        super().__init__(f"run directory {run_dir} is in use by {who}; stop it, or give this group another --run-dir")
        self.run_dir = run_dir
        self.pid = pid


class MemberError(GroupError):
    """One member can't be added, changed or removed. `member_id` is None when it has none yet."""

    def __init__(self, member_id: int | None, reason: str) -> None:
        super().__init__(reason if member_id is None else f"member {member_id}: {reason}")
        self.member_id = member_id
        self.detail = reason


class StateError(GroupError):
    """The state that a former process left in the run directory can't be used. `path` is its file."""

    def __init__(self, path: Path, problem: str, remedy: str | None = None) -> None:
        fresh = "start with --fresh to forget it (the file is kept, as state.json.old)"
        super().__init__(f"{path}: {problem}; {fresh if remedy is None else f'{remedy}, or {fresh}'}")
        self.path = path
        self.problem = problem


class ClientError(VhuError):
    """A running group can't be found or reached, or refused a command (`error_class` is then its QMP error
    class).
    """

    def __init__(self, reason: str, *, error_class: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error_class = error_class


class GuestError(VhuError):
    """A guest didn't boot, or failed its task. `log` is its console log, when there is one."""

    def __init__(self, reason: str, log: Path | None = None) -> None:
        super().__init__(reason if log is None else f"{reason} (console log: {log})")
        self.reason = reason
        self.log = log


class ImagesError(VhuError):
    """Guest kernels or QEMU packages can't be fetched, verified or built."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def single(error: BaseException) -> BaseException:
    """The only exception within nested exception groups, or the group itself when there are several in it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
