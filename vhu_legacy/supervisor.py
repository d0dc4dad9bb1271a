# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`serve --supervise`: a parent that has everything in memory and forks the process that serves.

Most of the time from the death of a server to the next one's sockets goes into starting Python and importing. The
parent has done that once; what it forks only has to open images and sockets. So QEMUs that reconnect find their members
again within milliseconds.

A fork copies one thread, so the parent never has another one: it imports, but runs no event loop, no worker pool and no
log thread. It holds no lock, no socket and no image either: all that is the child's, and the kernel lets go of it with
the child. It waits for signals, and for its child.
"""

from __future__ import annotations

import gc
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import GroupError, StateError, VhuError, single

__all__ = ["Attempt", "Policy", "die_with_parent", "supervise"]

FAILED: Final = 1
"""Exit status of a child: another one would fail just as well."""
INTERNAL: Final = 70
"""Exit status of a child: it was our fault (EX_SOFTWARE)."""
HANDED_OVER: Final = 77
"""Exit status of a child: another process serves what it served."""
ANEW: Final = "VHU_LEGACY_ANEW"
"""Environment variable of a supervisor that was started by itself, to get to a newer version."""
RETRY: Final = 75
"""Exit status of a child: what stopped it may be gone the next time (EX_TEMPFAIL)."""
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
_READY: Final = struct.Struct("d")


@dataclass(frozen=True, slots=True)
class Policy:
    """When a child is started again."""

    quick: float = 0.25
    """A child that dies sooner, in seconds since it served, counts as one that doesn't get anywhere."""
    limit: int = 10
    """So many such deaths in a row end it all."""
    first_delay: float = 0.05
    """Seconds before the start after the second of them; doubled each time. After the first there is no delay."""
    longest_delay: float = 2.0

    def delay(self, deaths: int) -> float:
        """Seconds to wait after so many quick deaths in a row."""
        return 0.0 if deaths < 2 else min(self.first_delay * 2.0 ** (deaths - 2), self.longest_delay)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a child is to know of those before it."""

    announced: bool
    """One of them has served: the line for whoever waits has been printed, the state of before is forgotten."""
    died: str | None
    """How the last one ended; None for the first."""
    ready: Callable[[], None]
    """To be called when the sockets are there."""
    supervisor: int
    """The process that supervises."""


def supervise(serve: Callable[[Attempt], None], policy: Policy | None = None) -> int:
    """Run `serve` in a child process again and again, until it returns, or fails for good. Returns an exit status.

    SIGTERM, SIGINT and SIGHUP are passed on, and the child's end is then the end. To be called in the main thread of a
    process without others, which has imported what `serve` needs.
    """
    return _Supervisor(serve, Policy() if policy is None else policy).run()


class _Supervisor:
    def __init__(self, serve: Callable[[Attempt], None], policy: Policy) -> None:
        self._serve = serve
        self._policy = policy
        # a program that was started anew (`_adopt`) goes on where its former self was
        self._announced = os.environ.pop(ANEW, None) is not None
        self._died: str | None = None
        self._quick_deaths = 0
        self._mask: set[int | signal.Signals] = set()
        # nohup has SIGHUP ignored, and that holds for the child, too
        passed = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._passed: Final = {number for number in passed if signal.getsignal(number) is not signal.SIG_IGN}

    def run(self) -> int:
        # what is imported stays shared with the children for as long as nobody writes to it, and the collector does
        gc.collect()
        gc.freeze()
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        watched = self._passed | {signal.SIGCHLD}
        # blocked, they wait for us to ask: none is lost between a look and a wait
        before = self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        try:
            while True:
                status = self._one(before)
                if status is not None:
                    return status
                delay = self._policy.delay(self._quick_deaths)
                if delay and self._stopped_within(delay):
                    return 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            gc.unfreeze()

    def _one(self, mask: set[int | signal.Signals]) -> int | None:
        """One child, from its start to its end. An exit status, or None when there is to be another."""
        readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        parent = os.getpid()
        # what is buffered would be written by both
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(readable)
            _be_child(parent, mask, lambda: self._attempt(writable, parent))
        os.close(writable)
        try:
            stopping, code = self._wait(child)
            ended = time.monotonic()
            with suppress(BlockingIOError):
                data = os.read(readable, _READY.size)
                served_since = _READY.unpack(data)[0] if len(data) == _READY.size else None
        finally:
            os.close(readable)
        if code == HANDED_OVER:
            return self._adopt(stopping)
        if served_since is not None:
            self._announced = True
        if code in (0, FAILED) or stopping:
            return code if code >= 0 else 128 - code
        # killed in the middle of a hand-over: what it had started may have all, some or nothing of what it served
        _end_orphans()
        self._died = _describe(child, code)
        if served_since is not None and ended - served_since >= self._policy.quick:
            self._quick_deaths = 0
        self._quick_deaths += 1
        if self._quick_deaths >= self._policy.limit:
            text = f"{self._died}; {self._quick_deaths} times in a row, each within {self._policy.quick:g} s: giving up"
            print(f"vhu-legacy: {text}", file=sys.stderr, flush=True)
            return FAILED
        return None

    def _adopt(self, stopping: bool) -> int:
        """Watch the process that the last child has handed over to: an orphan that has come to us. An exit status.

        When it is killed, this program is started anew: what we have in memory is the old version's.
        """
        while True:
            orphans = _orphans()
            if not orphans:
                print("vhu-legacy: the process that had taken over is gone", file=sys.stderr, flush=True)
                return FAILED
            # the last one: others are left of attempts that failed, and are about to end
            child = orphans[-1]
            python = _interpreter_of(child)
            if stopping:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
            told, code = self._wait(child)
            stopping = stopping or told
            if code == HANDED_OVER:
                continue
            if stopping or code in (0, FAILED):
                return code if code >= 0 else 128 - code
            _end_orphans()
            print(f"vhu-legacy: {_describe(child, code)}: starting anew", file=sys.stderr, flush=True)
            os.environ[ANEW] = "1"
            # what is blocked stays so across exec, and a child of the new program would never hear of it
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            os.execv(python, [python, *sys.orig_argv[1:]])

    def _attempt(self, writable: int, parent: int) -> None:
        def ready() -> None:
            # without a parent there is nobody to tell, and SIGTERM is on its way
            with suppress(BrokenPipeError):
                os.write(writable, _READY.pack(time.monotonic()))

        try:
            self._serve(Attempt(self._announced, self._died, ready, parent))
        except BaseException as raised:
            error = single(raised)
            if not self._announced or not isinstance(error, GroupError) or isinstance(error, StateError):
                raise
            raise _TryAgain from error

    def _wait(self, child: int) -> tuple[bool, int]:
        """Wait for the end of a child, and pass signals on: whether it was told to stop, and its exit code."""
        stopping = False
        while True:
            info = signal.sigwaitinfo(self._passed | {signal.SIGCHLD})
            if info.si_signo != signal.SIGCHLD:
                stopping = True
                # a terminal sends Ctrl-C (from the kernel: no process did) to its whole foreground group
                if info.si_signo != signal.SIGINT or info.si_code <= 0:
                    os.kill(child, info.si_signo)
                continue
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return stopping, os.waitstatus_to_exitcode(status)

    def _stopped_within(self, delay: float) -> bool:
        deadline = time.monotonic() + delay
        while (left := deadline - time.monotonic()) > 0:
            info = signal.sigtimedwait(self._passed, left)
            if info is not None:
                return True
        return False


class _TryAgain(Exception):
    """A child that comes after another can't serve: images or sockets may still be held by what is left of that one."""


def _orphans() -> list[int]:
    """Children that are left to us, oldest first. Those that have ended are waited for."""
    living = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(ChildProcessError):
            if os.waitpid(int(pid), os.WNOHANG)[0] == 0:
                living.append(int(pid))
    return living


def _end_orphans() -> None:
    for pid in _orphans():
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _interpreter_of(pid: int) -> str:
    """The Python that a process was started with; ours when the kernel doesn't say."""
    with suppress(OSError):
        first = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
        if os.access(first, os.X_OK):
            return os.fsdecode(first)
    return sys.executable


def _describe(child: int, code: int) -> str:
    if code >= 0:
        return f"process {child} ended with status {code}"
    with suppress(ValueError):
        return f"process {child} was killed by {signal.Signals(-code).name}"
    return f"process {child} was killed by signal {-code}"


def _be_child(parent: int, mask: set[int | signal.Signals], serve: Callable[[], None]) -> None:
    """The child's life, without a way back into the parent's code."""
    status = INTERNAL
    try:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        serve()
        status = 0
    except _TryAgain as again:
        _say(again.__cause__)
        status = RETRY
    except BaseException as raised:
        status = _status_of(raised)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _status_of(raised: BaseException) -> int:
    error = single(raised)
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else FAILED
        case KeyboardInterrupt():
            return 130
        case VhuError():
            _say(error)
            return FAILED
        case _:
            traceback.print_exception(raised)
            return INTERNAL


def _say(error: BaseException | None) -> None:
    for line in str(error).splitlines():
        print(f"vhu-legacy: {line}", file=sys.stderr)


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process, in order, when the parent is gone: it would serve without a supervisor."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        # it died before we had asked for that
        os._exit(FAILED)


def _prctl(option: int, value: int) -> None:
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl: {os.strerror(number)}")
