# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The reactor: many descriptors, one task. And what its users make of it when things go wrong."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from vhu_legacy.reactor import Reactor

pytestmark = pytest.mark.timeout(30)


class Told:
    """A waiter that writes down what it is told."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def readable(self, fd: int) -> None:
        self.fds.append(fd)


class Failing:
    def readable(self, fd: int) -> None:
        raise RuntimeError("a bug")


@asynccontextmanager
async def running() -> AsyncIterator[Reactor]:
    reactor = Reactor()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            yield reactor
            nursery.cancel_scope.cancel()
    finally:
        reactor.close()


async def settle() -> None:
    for _ in range(5):
        await trio.testing.wait_all_tasks_blocked(0.01)


async def test_told_once_until_armed_again() -> None:
    ours, theirs = socket.socketpair()
    told = Told()
    with ours, theirs:
        async with running() as reactor:
            reactor.arm(ours.fileno(), told)
            reactor.arm(ours.fileno(), told)
            await settle()
            assert told.fds == []
            theirs.send(b"1")
            await settle()
            assert told.fds == [ours.fileno()]
            theirs.send(b"2")
            await settle()
            assert told.fds == [ours.fileno()]
            # there is something to receive still
            reactor.arm(ours.fileno(), told)
            await settle()
            assert told.fds == 2 * [ours.fileno()]
            ours.recv(10)
            theirs.close()
            reactor.arm(ours.fileno(), told)
            await settle()
            assert told.fds == 3 * [ours.fileno()]


async def test_a_bug_of_one_waiter_is_not_the_others(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    pairs = [socket.socketpair() for _ in range(3)]
    async with running() as reactor:
        for number, (ours, theirs) in enumerate(pairs):
            theirs.send(b"x")
            reactor.arm(ours.fileno(), told if number else Failing())
        await settle()
        assert sorted(told.fds) == sorted(ours.fileno() for ours, _ in pairs[1:])
        assert "a bug" in caplog.text
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


async def test_what_is_forgotten_is_not_told_of_though_another_has_the_socket() -> None:
    ours, theirs = socket.socketpair()
    again, peer = socket.socketpair()
    told = Told()
    number, other = ours.fileno(), os.dup(ours.fileno())
    with theirs, again, peer:
        async with running() as reactor:
            reactor.arm(number, told)
            reactor.forget(number)
            ours.close()
            # the number is another socket's now, on which nothing has happened
            os.dup2(again.fileno(), number)
            reactor.arm(number, told)
            theirs.send(b"x")
            await settle()
            assert told.fds == []
            peer.send(b"x")
            await settle()
            assert told.fds == [number]
            reactor.forget(number)
            reactor.forget(number)
            os.close(number)
        os.close(other)


async def test_a_descriptor_closed_behind_its_back_can_be_armed_anew() -> None:
    ours, theirs = socket.socketpair()
    again, peer = socket.socketpair()
    told = Told()
    number = ours.fileno()
    with theirs, again, peer:
        async with running() as reactor:
            reactor.arm(number, told)
            ours.close()
            os.dup2(again.fileno(), number)
            reactor.arm(number, told)
            peer.send(b"x")
            await settle()
            assert told.fds == [number]
            reactor.forget(number)
            os.close(number)


async def test_one_that_closes_another_in_the_same_turn() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    told: list[int] = []

    class Closing:
        def readable(self, fd: int) -> None:
            told.append(fd)
            for ours, _ in pairs:
                if ours.fileno() not in (-1, fd):
                    reactor.forget(ours.fileno())
                    ours.close()

    async with running() as reactor:
        for ours, theirs in pairs:
            reactor.arm(ours.fileno(), Closing())
            theirs.send(b"x")
        await settle()
        assert len(told) == 1
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


async def test_others_have_their_turn_while_many_are_readable() -> None:
    """Descriptors that are readable again and again don't keep the loop to themselves."""
    pairs = [socket.socketpair() for _ in range(200)]
    seen: set[int] = set()
    turns = 0

    class Again:
        def readable(self, fd: int) -> None:
            seen.add(fd)
            reactor.arm(fd, self)

    again = Again()
    async with running() as reactor:
        for ours, theirs in pairs:
            theirs.send(b"x")
            reactor.arm(ours.fileno(), again)
        with trio.fail_after(10):
            while len(seen) < len(pairs) or turns < 50:
                await trio.lowlevel.checkpoint()
                turns += 1
        for ours, _ in pairs:
            reactor.forget(ours.fileno())
    for ours, theirs in pairs:
        ours.close()
        theirs.close()
