# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Fixtures: groups served by a real `vhu-legacy serve` process, and what a test wants to ask it."""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

START_TIMEOUT = 20.0
MATRIX = frozenset(
    {
        "test_guest.py::test_boot[transitional]",
        "test_guest.py::test_guest_reboot[modern]",
        "test_guest.py::test_hot_plug_and_unplug[pc-legacy]",
        "test_guest.py::test_hot_plug_and_unplug[pc-transitional]",
        "test_guest.py::test_hot_plug_and_unplug[q35-legacy]",
        "test_guest.py::test_modern_only_member_refuses_a_legacy_driver",
        "test_guest.py::test_qemu_restart_on_the_same_socket",
        "test_guest_backend.py::test_a_back_end_comes_back",
        "test_guest_backend.py::test_file_system[5.10]",
        "test_guest_migration.py::test_migration_under_load[6.12-legacy-False-1]",
        "test_guest_recovery.py::test_killed_under_load[7.2-11.1-modern-True-True-1]",
        "test_guest_recovery.py::test_kills_around_stop_and_reset[7.2-modern-True-True]",
        "test_guest_vfio.py::test_driver_taken_away_and_function_reset[owner]",
        "test_guest_vfio.py::test_firmware_boots_from_a_function[legacy-None]",
        "test_guest_vfio.py::test_firmware_boots_from_a_function[modern-None]",
        "test_guest_vfio.py::test_firmware_boots_from_a_function[owner-None]",
        "test_guest_vfio.py::test_front_ends_take_turns",
        "test_guest_vfio.py::test_legacy_function[7.2-None-append3-True-msix]",
        "test_guest_vfio.py::test_matrix_cells",
        "test_guest_vfio.py::test_memory_that_is_not_shared[legacy-6.12-False]",
        "test_guest_vfio.py::test_memory_that_is_not_shared[owner-7.2-True]",
        "test_guest_vfio.py::test_one_front_end_at_a_time",
        "test_guest_vfio.py::test_owner[6.12-owner1-msix-2]",
        "test_guest_vfio.py::test_owner[6.12-owner3-intx-0]",
        "test_guest_vfio.py::test_owner_after_a_reboot[7.2]",
        "test_guest_vfio.py::test_resize_is_seen_by_the_running_guest[legacy-0]",
        "test_guest_vfio.py::test_resize_is_seen_by_the_running_guest[modern-None]",
        "test_guest_vfio.py::test_stopped_and_resumed_amid_io[modern]",
        "test_guest_vfio.py::test_two_queues_of_a_legacy_function",
        "test_guest_vvu.py::test_every_access_trapped",
        "test_guest_vvu.py::test_who_has_to_be_started_again[vfio-user]",
        "test_guest_vvu.py::test_who_may_die[vfio-user]",
    }
)
"""Guests that are too many for `make test`, which runs others like them; `make matrix` runs these (marker `matrix`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `make matrix`."""
    for item in items:
        if item.nodeid.removeprefix("tests/") in MATRIX:
            item.add_marker(pytest.mark.matrix)


STOP_TIMEOUT = 20.0


class QmpClient:
    """Commands to the group's QMP socket, one at a time. The stock clients have tests of their own."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._socket.connect(path)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        greeting = self._line()
        assert "QMP" in greeting
        self.execute("qmp_capabilities")

    def _line(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError("the group has closed its QMP socket")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        value = json.loads(line)
        assert isinstance(value, dict)
        return value

    def execute(self, command: str, **arguments: Any) -> Any:
        """A command's answer. AssertionError when it is an error."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._line()
            if "event" in answer:
                self.events.append(answer)
                continue
            assert "return" in answer, f"{command}: {answer}"
            return answer["return"]

    def close(self) -> None:
        self._socket.close()


class RunningGroup:
    """A `vhu-legacy serve` process."""

    def __init__(self, directory: Path, config: str, engine: str = "native") -> None:
        self.directory = directory
        self.log_path = directory / "serve.log"
        file = directory / "group.toml"
        file.write_text(textwrap.dedent(config))
        command = [sys.executable, "-m", "vhu_legacy", "serve", str(file), "--run-dir", str(directory / "run")]
        if engine != "native":
            command += ["--engine", engine]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        self.qmp: QmpClient | None = None
        try:
            self.ready = self._wait_ready()
            self.qmp = QmpClient(self.ready["qmp"])
        except BaseException:
            self.kill()
            raise

    def _wait_ready(self) -> dict[str, Any]:
        # the line comes soon or the process ends; one that hangs is ended by the caller
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            raise RuntimeError(f"the group isn't ready:\n{self.log()}")
        value = json.loads(line)
        assert isinstance(value, dict)
        assert value["event"] == "ready"
        return value

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_lines(self, member: int, pattern: str = "") -> list[str]:
        """What was logged about a member, as far as it matches."""
        named = re.compile(rf"\bmember {member}\b")
        wanted = re.compile(pattern)
        return [line for line in self.log().splitlines() if named.search(line) and wanted.search(line)]

    def wait_logged(self, member: int, pattern: str) -> list[str]:
        """As `log_lines`, once there is one: the log is written by a thread of its own."""
        deadline = time.monotonic() + 5
        while not (lines := self.log_lines(member, pattern)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"member {member}: nothing logged like {pattern!r}")
            time.sleep(0.01)
        return lines

    def socket(self, member: int) -> Path:
        """A member's vhost-user socket."""
        for entry in self.ready["members"]:
            if entry["id"] == member:
                return Path(entry["vhost_user"])
        raise KeyError(member)

    def execute(self, command: str, **arguments: Any) -> Any:
        assert self.qmp is not None
        return self.qmp.execute(command, **arguments)

    def member(self, member: int) -> dict[str, Any]:
        """`query-member`."""
        answer = self.execute("query-member", id=member)
        assert isinstance(answer, dict)
        return answer

    def wait_member(
        self, member: int, condition: Callable[[dict[str, Any]], object], what: str, timeout: float = 5.0
    ) -> dict[str, Any]:
        """Ask until a member's state fulfils a condition. TimeoutError otherwise."""
        deadline = time.monotonic() + timeout
        while True:
            state = self.member(member)
            if condition(state):
                return state
            if time.monotonic() > deadline:
                raise TimeoutError(f"member {member}: not {what} within {timeout} s: {state}")
            time.sleep(0.01)

    def wait_detached(self, member: int) -> dict[str, Any]:
        """Wait until no front end is attached. A broken member stays marked as such until the next one comes."""

        def gone(state: dict[str, Any]) -> bool:
            connection = state["connection"]
            return state["state"] in ("detached", "broken") and not (connection and connection["connected"])

        return self.wait_member(member, gone, "detached")

    def open_fds(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def stop(self) -> int:
        """End it as an operator does. Its exit status; AssertionError when it leaves a socket behind."""
        if self.qmp is not None:
            self.qmp.close()
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT)
        finally:
            self.kill()
        left = list((self.directory / "run").glob("*.sock"))
        assert not left, f"sockets left behind: {left}"
        return status

    def kill(self) -> None:
        if self.qmp is not None:
            self.qmp.close()
        if self.alive():
            self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if self.process.stdout is not None:
            self.process.stdout.close()


class GroupFactory(Protocol):
    """Starts a group from the text of a group file; paths in it are relative to `directory`."""

    directory: Path

    def __call__(self, config: str, *, engine: str = "native") -> RunningGroup: ...


class _Factory:
    def __init__(self, make: Callable[[], Path]) -> None:
        self._make = make
        self.directory = make()
        self.started: list[RunningGroup] = []

    def __call__(self, config: str, *, engine: str = "native") -> RunningGroup:
        directory, self.directory = self.directory, self._make()
        group = RunningGroup(directory, config, engine)
        self.started.append(group)
        return group

    def stop(self) -> None:
        problems = []
        for group in self.started:
            if not group.alive():
                problems.append(f"the process ended with status {group.process.poll()}:\n{group.log()}")
                group.kill()
                continue
            status = group.stop()
            if status != 0:
                problems.append(f"exit status {status}:\n{group.log()}")
            # whatever a test does to a member, it must not surprise the program
            if "Traceback" in group.log() or "panicked" in group.log():
                problems.append(f"an unexpected error in the log:\n{group.log()}")
        assert not problems, "\n".join(problems)


@pytest.fixture
def start_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupFactory]:
    """Starts groups that end with the test; they must end well."""
    factory = _Factory(lambda: tmp_path_factory.mktemp("group"))
    try:
        yield factory
    finally:
        factory.stop()


@pytest.fixture(scope="module")
def start_module_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupFactory]:
    """Starts groups that are shared by the tests of a module; they must end well."""
    factory = _Factory(lambda: tmp_path_factory.mktemp("group"))
    try:
        yield factory
    finally:
        factory.stop()
