# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`serve --supervise`: a server that dies is there again at once, one that can't serve ends, and nobody is orphaned."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vhu_legacy.supervisor import Policy

from .conftest import QmpClient
from .frontend import PAGE, BlkDriver, ConnectionLost, wait_until

MIB = 1 << 20
FILE = """
    [group]
    name = "supervised"
    [[members]]
    type = "blk"
    image = "disk.raw"
    [[members]]
    type = "blk"
    image = "null:1GiB"
"""


class Supervised:
    """A `vhu-legacy serve --supervise` process."""

    def __init__(self, directory: Path, config: str = FILE, *options: str) -> None:
        self.run_dir = directory / "run"
        self.log_path = directory / "serve.log"
        self.file = directory / "group.toml"
        self.file.write_text(textwrap.dedent(config))
        command = [sys.executable, "-m", "vhu_legacy", "serve", str(self.file), "--run-dir", str(self.run_dir)]
        with self.log_path.open("ab") as log:
            # a session of its own, as a terminal makes: what is sent to its group reaches parent and child
            self.process = subprocess.Popen(
                [*command, "--supervise", *options], stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        self.ready = json.loads(line)
        return self.ready

    def child(self) -> int:
        """The process that serves."""
        return int((self.run_dir / "group.lock").read_text())

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def kill_child(self) -> float:
        """Kill the server and wait until the next one answers. Seconds that took."""
        (child,) = self.children()
        since = time.monotonic()
        os.kill(child, signal.SIGKILL)
        while True:
            with suppress(OSError, ConnectionLost), BlkDriver(self.socket(1)) as driver:
                driver.connection.get_u64(1)
                break
            time.sleep(0.0005)
        took = time.monotonic() - since
        assert self.children() != [child]
        return took

    def socket(self, member: int) -> Path:
        return self.run_dir / f"member-{member}.vhost-user.sock"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_logged(self, text: str) -> None:
        wait_until(lambda: text in self.log(), what=f"logged: {text}")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


Start = Callable[..., Supervised]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Supervised] = []
    (tmp_path / "disk.raw").write_bytes(bytes(4 * MIB))

    def begin(*arguments: str) -> Supervised:
        started.append(Supervised(tmp_path, *arguments))
        return started[-1]

    yield begin
    for supervised in started:
        supervised.kill()
        assert "Traceback" not in supervised.log(), supervised.log()


def gone(pid: int) -> bool:
    try:
        # a zombie that nobody has waited for is as good as gone
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_killed_again_and_again_under_writes(start: Start) -> None:
    """What was acknowledged is on the disk, whichever server acknowledged it."""
    supervised = start()
    supervised.wait_ready()
    written: dict[int, bytes] = {}
    took = []
    for round_ in range(8):
        with BlkDriver(supervised.socket(1)) as driver:
            driver.start()
            for sector, data in written.items():
                assert driver.read(sector, PAGE) == data
            for number in range(4):
                sector, data = (round_ * 4 + number) * 8, os.urandom(PAGE)
                driver.write(sector, data)
                written[sector] = data
            # long enough that it doesn't count as one that can't serve, which would be started after a delay
            time.sleep(0.3)
            took.append(supervised.kill_child())
    # the bar is 100 ms, on a machine that does nothing else
    assert statistics.median(took) < 0.5
    print(f"kill to first answer: median {statistics.median(took) * 1000:.1f} ms, longest {max(took) * 1000:.1f} ms")
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.process.wait(10) == 0
    assert supervised.log().count("was killed by SIGKILL: serving again") == 8
    # just the first one says that it is ready
    assert supervised.process.stdout is not None
    assert supervised.process.stdout.read() == b""
    assert not list(supervised.run_dir.glob("*.sock"))


def test_the_state_outlives_the_child(start: Start) -> None:
    supervised = start()
    client = QmpClient(supervised.wait_ready()["qmp"])
    assert client.execute("query-group")["pid"] == supervised.child() != supervised.process.pid
    client.execute("member-add", type="blk", image="null:1MiB", id=9)
    client.execute("member-del", id=2)
    supervised.kill_child()
    client.close()
    wait_until(supervised.socket(9).exists, what="member 9 there")
    supervised.wait_logged("members are served again")
    client = QmpClient(supervised.ready["qmp"])
    assert [member["id"] for member in client.execute("query-members")] == [1, 9]
    assert not supervised.socket(2).exists()
    client.close()


def test_fresh_is_for_the_first_one_only(start: Start) -> None:
    first = start()
    client = QmpClient(first.wait_ready()["qmp"])
    client.execute("member-add", type="blk", image="null:1MiB", id=9)
    client.close()
    first.kill()
    wait_until(lambda: all(gone(pid) for pid in [first.process.pid]), what="gone")
    supervised = start(FILE, "--fresh")
    assert [member["id"] for member in supervised.wait_ready()["members"]] == [1, 2]
    client = QmpClient(supervised.ready["qmp"])
    client.execute("member-add", type="blk", image="null:1MiB", id=10)
    client.close()
    supervised.kill_child()
    supervised.wait_logged("3 members are served again")
    assert supervised.socket(10).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_in_order(start: Start, number: int) -> None:
    supervised = start()
    supervised.wait_ready()
    (child,) = supervised.children()
    supervised.process.send_signal(number)
    assert supervised.process.wait(10) == 0
    assert gone(child)
    assert not list(supervised.run_dir.glob("*.sock"))
    assert "serving again" not in supervised.log()


def test_a_signal_to_all_of_them_ends_it_in_order(start: Start) -> None:
    """As systemd does, and a shell that ends."""
    supervised = start()
    supervised.wait_ready()
    os.killpg(supervised.process.pid, signal.SIGTERM)
    assert supervised.process.wait(10) in (0, 130)
    assert not list(supervised.run_dir.glob("*.sock"))
    assert "serving again" not in supervised.log()


def test_quit_ends_it(start: Start) -> None:
    supervised = start()
    client = QmpClient(supervised.wait_ready()["qmp"])
    client.execute("quit")
    client.close()
    assert supervised.process.wait(10) == 0
    assert not supervised.run_dir.exists()


def test_an_ordered_end_of_the_child_ends_it(start: Start) -> None:
    supervised = start()
    supervised.wait_ready()
    os.kill(supervised.child(), signal.SIGTERM)
    assert supervised.process.wait(10) == 0


def test_the_supervisors_death_ends_the_child(start: Start) -> None:
    supervised = start()
    supervised.wait_ready()
    (child,) = supervised.children()
    supervised.process.kill()
    supervised.process.wait(10)
    wait_until(lambda: gone(child), 10, "the child gone")
    # in order: it has let go of what it had
    assert not list(supervised.run_dir.glob("*.sock"))


def test_the_parent_holds_nothing(start: Start) -> None:
    supervised = start()
    supervised.wait_ready()
    pid = supervised.process.pid
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    held = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert not [name for name in held if name.startswith("socket:") or "run" in name or "disk" in name]


def test_a_bad_group_file_ends_it(start: Start) -> None:
    supervised = start("[group]\nname = 1\n")
    assert supervised.process.wait(10) == 1
    assert supervised.log().count("[group] name: found 1, not a string") == 1
    assert supervised.log().startswith("vhu-legacy: ")


def test_a_run_directory_in_use_ends_it(start: Start) -> None:
    first = start()
    first.wait_ready()
    second = start()
    assert second.process.wait(10) == 1
    assert f"is in use by process {first.child()}" in second.log()
    assert first.process.poll() is None


def test_a_group_file_that_went_bad_ends_it_at_the_next_death(start: Start) -> None:
    supervised = start()
    supervised.wait_ready()
    supervised.file.write_text("[group]\n")
    os.kill(supervised.child(), signal.SIGKILL)
    assert supervised.process.wait(10) == 1
    assert "[group] name: missing" in supervised.log()


SCRIPT = """
import os, signal, sys
sys.path[:0] = {path!r}
from vhu_legacy.supervisor import Policy, supervise

def serve(attempt):
    with open({log!r}, "a") as log:
        log.write(f"{{attempt.announced}} {{attempt.died is not None}}\\n")
    {body}

sys.exit(supervise(serve, Policy({policy})))
"""


def script(tmp_path: Path, body: str, policy: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    log = tmp_path / "attempts"
    text = SCRIPT.format(path=sys.path, log=str(log), body=body, policy=policy)
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=False)
    return ended, log.read_text().splitlines()


def test_one_that_always_dies_is_given_up(tmp_path: Path) -> None:
    since = time.monotonic()
    ended, attempts = script(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)", "limit=5, first_delay=0.05")
    assert ended.returncode == 1
    assert attempts == ["False False"] + ["False True"] * 4
    assert "was killed by SIGSEGV; 5 times in a row, each within 0.25 s: giving up" in ended.stderr
    # 0, then 50, 100 and 200 ms
    assert time.monotonic() - since > 0.35


def test_internal_errors_are_retried_and_shown(tmp_path: Path) -> None:
    ended, attempts = script(tmp_path, "attempt.ready(); 1 / 0", "limit=3, first_delay=0.01")
    assert ended.returncode == 1
    assert attempts == ["False False", "True True", "True True"]
    assert ended.stderr.count("ZeroDivisionError: division by zero\n") == 3
    assert "ended with status 70; 3 times in a row" in ended.stderr


def test_one_that_served_for_a_while_starts_anew(tmp_path: Path) -> None:
    body = "import time; attempt.ready(); time.sleep(0.05); os.kill(os.getpid(), signal.SIGKILL)"
    lived, attempts = script(
        tmp_path,
        f"len(open({str(tmp_path / 'attempts')!r}).readlines()) > 8 and os._exit(0); {body}",
        "quick=0.02, limit=3",
    )
    assert lived.returncode == 0
    assert len(attempts) == 9


def test_a_signal_during_the_delay_ends_it(tmp_path: Path) -> None:
    text = SCRIPT.format(
        path=sys.path, log=str(tmp_path / "attempts"), body="os._exit(75)", policy="first_delay=20, longest_delay=20"
    )
    process = subprocess.Popen([sys.executable, "-c", text])
    attempts, children = tmp_path / "attempts", Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def two_have_died() -> bool:
        return attempts.exists() and attempts.read_text().count("\n") == 2 and not children.read_text()

    wait_until(two_have_died, what="the second death")
    process.terminate()
    assert process.wait(5) == 0


def test_delays() -> None:
    policy = Policy(first_delay=0.05, longest_delay=2)
    assert [policy.delay(deaths) for deaths in range(6)] == [0, 0, 0.05, 0.1, 0.2, 0.4]
    assert policy.delay(1000) == 2
