// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole bridge between a device in memory and a daemon on a socket.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{eventually, is_device_error, Carrier, Prepare, Setup, World, QUEUES, SPECIALS, WINDOW};
use vvu_bridge::error::Error;
use vvu_bridge::message::{build, request::*, u64_at, HEADER, NEED_REPLY, REPLY};
use vvu_bridge::registers::{config, status};
use vvu_bridge::sys::{eventfd_add, eventfd_take};

const CONFIG_CHANGE: u32 = 2;

fn word(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

/// All carriers with and without interrupts.
fn everywhere(check: impl Fn(&World)) {
    for carrier in [Carrier::VhostUser, Carrier::VfioUser] {
        for line in [true, false] {
            println!("{carrier:?}, interrupts: {line}");
            check(&World::new(Setup {
                carrier,
                line,
                ..Setup::default()
            }));
        }
    }
}

#[test]
fn the_device_is_initialized_by_the_book() {
    for carrier in [Carrier::VhostUser, Carrier::VfioUser] {
        let world = World::new(Setup {
            carrier,
            ..Setup::default()
        });
        let _daemon = world.accept();
        world.device.wait_for_slave();
        let state = world.device.state();
        let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        assert_eq!(state.status, ok);
        assert_eq!(state.features, 1 << 32, "VERSION_1 alone, whatever is offered");
        let real = if carrier == Carrier::VhostUser { SPECIALS } else { 2 };
        assert_eq!(state.queues.len(), usize::from(real));
        for (index, queue) in &state.queues {
            assert!(
                queue.enabled && queue.desc != 0 && queue.driver != 0 && queue.device != 0,
                "{index}"
            );
            if *index >= 2 {
                assert_eq!(
                    (queue.desc, queue.size),
                    (state.queues[&2].desc, 64),
                    "special indices share a ring"
                );
            }
        }
        assert_ne!(state.queues[&0].desc, state.queues[&1].desc);
        assert_eq!(state.doorbells, [0], "rx buffers are announced, nothing else is");
    }
}

#[test]
fn requests_go_to_the_daemon_and_replies_to_the_master() {
    everywhere(|world| {
        let daemon = world.session();
        for round in 0..200u64 {
            let ask = build(GET_FEATURES, 0, &[]);
            assert_eq!(world.request(&daemon, &ask, 0).0, ask);
            let answer = build(GET_FEATURES, REPLY, &word(round));
            daemon.send(&answer);
            assert_eq!(world.device.receive(), answer);
        }
        assert!(world.device.take_doorbells().is_empty());
    });
}

#[test]
fn the_largest_messages_cross_both_ways() {
    everywhere(|world| {
        let daemon = world.session();
        let payload: Vec<u8> = (0..4096u32).map(|at| at as u8 ^ (at >> 8) as u8).collect();
        let ask = build(SET_CONFIG, NEED_REPLY, &payload);
        assert_eq!(world.request(&daemon, &ask, 0).0, ask);
        let answer = build(SET_CONFIG, REPLY, &payload);
        // In pieces, as a stream may.
        for piece in answer.chunks(1000) {
            daemon.send(piece);
        }
        assert_eq!(world.device.receive(), answer);
    });
}

#[test]
fn the_daemon_maps_regions_and_log_at_their_place_in_the_shared_memory() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    let regions = [
        0u64,
        0x1000,
        0x7f00_0000_0000,
        0,
        0x1_0000,
        0x2000,
        0x7f00_0001_0000,
        0x3000,
    ];
    let mut payload = word(2).to_vec();
    payload.extend(regions.iter().flat_map(|&field| word(field)));
    let (message, fds) = world.request(&daemon, &build(SET_MEM_TABLE, 0, &payload), 2);
    let places = [0, 1].map(|region| u64_at(&message, HEADER + 8 + 32 * region + 24).unwrap());
    assert_eq!(places, [WINDOW.offset, WINDOW.offset + 0x1000 + 0x3000]);
    let (log, log_fds) = world.request(&daemon, &build(SET_LOG_BASE, 0, &[word(0x1000), word(0)].concat()), 1);
    let log_place = u64_at(&log, HEADER + 8).unwrap();
    assert_eq!(log_place, WINDOW.offset + 0x6000);
    for (fd, place) in fds.into_iter().chain(log_fds).zip([places[0], places[1], log_place]) {
        let text = format!("here is {place:#x}");
        world.file.write_all_at(text.as_bytes(), place).unwrap();
        let mut seen = vec![0; text.len()];
        std::fs::File::from(fd).read_exact_at(&mut seen, place).unwrap();
        assert_eq!(seen, text.as_bytes(), "the fd is the shared memory");
    }
}

#[test]
fn kicks_are_signalled_and_start_signalled() {
    everywhere(|world| {
        let daemon = world.session();
        let kicks: Vec<_> = (0..2u64)
            .map(|queue| {
                world
                    .request(&daemon, &build(SET_VRING_KICK, 0, &word(queue)), 1)
                    .1
                    .remove(0)
            })
            .collect();
        for kick in &kicks {
            assert!(eventfd_take(kick), "a kick may have come before the message");
        }
        for _ in 0..20 {
            world.device.kick();
            for kick in &kicks {
                eventually("a kick", || eventfd_take(kick));
            }
        }
        world.request(&daemon, &build(SET_VRING_KICK, 0, &word(0x100)), 0);
        world.device.kick();
        eventually("a kick of the other queue", || eventfd_take(&kicks[1]));
        // The kick of that moment may have been on its way.
        eventfd_take(&kicks[0]);
        world.device.kick();
        eventually("a kick of the other queue", || eventfd_take(&kicks[1]));
        assert!(!eventfd_take(&kicks[0]), "its queue is polled now");
    });
}

#[test]
fn each_kick_message_brings_a_new_eventfd() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    let ask = build(SET_VRING_KICK, 0, &word(1));
    let old = world.request(&daemon, &ask, 1).1.remove(0);
    let new = world.request(&daemon, &ask, 1).1.remove(0);
    assert!(eventfd_take(&old) && eventfd_take(&new));
    world.device.kick();
    eventually("a kick", || eventfd_take(&new));
    assert!(!eventfd_take(&old));
}

#[test]
fn calls_errs_and_the_log_ring_their_doorbells() {
    everywhere(|world| {
        let daemon = world.session();
        for queue in 0..u64::from(QUEUES) {
            let index = 2 * queue as u16 + 2;
            let call = world
                .request(&daemon, &build(SET_VRING_CALL, 0, &word(queue)), 1)
                .1
                .remove(0);
            eventfd_add(&call);
            world.device.expect_doorbell(index);
            let err = world
                .request(&daemon, &build(SET_VRING_ERR, 0, &word(queue)), 1)
                .1
                .remove(0);
            eventfd_add(&err);
            world.device.expect_doorbell(index + 1);
        }
        let log = world.request(&daemon, &build(SET_LOG_FD, 0, &[]), 1).1.remove(0);
        eventfd_add(&log);
        world.device.expect_doorbell(2 * QUEUES + 2);
    });
}

#[test]
fn a_call_on_an_eventfd_that_has_been_replaced_is_not_lost() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    let ask = build(SET_VRING_CALL, 0, &word(1));
    let old = world.request(&daemon, &ask, 1).1.remove(0);
    let new = world.request(&daemon, &ask, 1).1.remove(0);
    eventfd_add(&old);
    world.device.expect_doorbell(4);
    eventfd_add(&new);
    world.device.expect_doorbell(4);
}

#[test]
fn slave_requests_and_their_replies_have_their_channel() {
    everywhere(|world| {
        let daemon = world.session();
        let slave = common::Daemon(
            world
                .request(&daemon, &build(SET_SLAVE_REQ_FD, 0, &[]), 1)
                .1
                .remove(0)
                .into(),
        );
        let ask = build(CONFIG_CHANGE, NEED_REPLY, &[]);
        slave.send(&ask);
        assert_eq!(world.device.receive(), ask);
        let answer = build(CONFIG_CHANGE, REPLY, &word(0));
        world.device.send(&answer);
        assert_eq!(slave.receive().0, answer);
        // A new channel replaces it.
        let other = common::Daemon(
            world
                .request(&daemon, &build(SET_SLAVE_REQ_FD, 0, &[]), 1)
                .1
                .remove(0)
                .into(),
        );
        slave.expect_end();
        other.send(&ask);
        assert_eq!(world.device.receive(), ask);
    });
}

#[test]
fn a_slave_channel_can_be_closed_by_the_daemon() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    drop(world.request(&daemon, &build(SET_SLAVE_REQ_FD, 0, &[]), 1));
    let ask = build(GET_FEATURES, 0, &[]);
    assert_eq!(world.request(&daemon, &ask, 0).0, ask, "the session goes on");
}

#[test]
fn fds_from_the_daemon_are_closed() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    let slave = common::Daemon(
        world
            .request(&daemon, &build(SET_SLAVE_REQ_FD, 0, &[]), 1)
            .1
            .remove(0)
            .into(),
    );
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    slave.send_with_fd(&build(9, NEED_REPLY, &[0; 40]), theirs);
    assert_eq!(
        slave.receive().0,
        build(9, REPLY, &word(1)),
        "the daemon is told that it failed"
    );
    common::Daemon(ours).expect_end();
    let ask = build(GET_CONFIG, 0, &[0; 12]);
    world.request(&daemon, &ask, 0);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let answer = build(GET_CONFIG, REPLY, &[0; 12]);
    daemon.send_with_fd(&answer, theirs);
    assert_eq!(
        world.device.receive(),
        answer,
        "nothing of the refused request was sent, and the reply is"
    );
    common::Daemon(ours).expect_end();
}

#[test]
fn a_daemon_that_does_not_read_holds_up_the_master_and_loses_nothing() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    let message = |number: u64| build(SET_CONFIG, 0, &[&word(number)[..], &[7; 4000]].concat());
    let mut sent = 0;
    let mut refused = 0;
    // The socket's buffer and all rx buffers are full in the end.
    while refused < 50 {
        if world.device.try_send(&message(sent)) {
            sent += 1;
            refused = 0;
        } else {
            refused += 1;
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    assert!(sent > 32, "{sent}");
    for number in 0..sent {
        assert_eq!(daemon.receive().0, message(number));
    }
    let ask = build(GET_FEATURES, 0, &[]);
    assert_eq!(world.request(&daemon, &ask, 0).0, ask);
}

#[test]
fn a_master_that_does_not_read_holds_up_the_daemon_and_loses_nothing() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    let count = 300u64;
    let writer = {
        let stream = daemon.0.try_clone().unwrap();
        std::thread::spawn(move || {
            let daemon = common::Daemon(stream);
            for number in 0..count {
                assert_eq!(daemon.receive().0, build(GET_STATUS, 0, &[]));
                daemon.send(&build(GET_STATUS, REPLY, &word(number)));
            }
        })
    };
    for _ in 0..count {
        world.device.send(&build(GET_STATUS, 0, &[]));
    }
    // Only now the master reads: 32 messages are in the txq, the others wait in the socket.
    for number in 0..count {
        assert_eq!(world.device.receive(), build(GET_STATUS, REPLY, &word(number)));
    }
    writer.join().unwrap();
}

#[test]
fn the_next_master_gets_a_new_daemon_connection() {
    everywhere(|world| {
        for round in 0..3u64 {
            let daemon = world.session();
            let ask = build(SET_FEATURES, 0, &word(round));
            assert_eq!(world.request(&daemon, &ask, 0).0, ask);
            world.device.disconnect();
            daemon.expect_end();
        }
        assert_eq!(world.device.state().resets, 1, "for which the device needs no reset");
    });
}

#[test]
fn a_message_that_nobody_read_stays_in_its_session() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    world.request(&daemon, &build(GET_FEATURES, 0, &[]), 0);
    // Whether the daemon still gets it depends on who is faster; the next one must not.
    world.device.send(&build(SET_FEATURES, 0, &word(1)));
    world.device.disconnect();
    daemon.expect_end();
    let daemon = world.session();
    let ask = build(SET_FEATURES, 0, &word(2));
    assert_eq!(world.request(&daemon, &ask, 0).0, ask);
}

#[test]
fn a_reply_left_in_the_txq_keeps_the_slave_down_until_it_is_gone() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    world.request(&daemon, &build(GET_FEATURES, 0, &[]), 0);
    daemon.send(&build(GET_FEATURES, REPLY, &word(1)));
    eventually("the reply's notification", || {
        world.device.state().doorbells.contains(&1)
    });
    world.device.disconnect();
    daemon.expect_end();
    let _next = world.accept();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(world.device.state().link, 0);
    world.device.receive();
    world.device.wait_for_slave();
}

#[test]
fn a_device_that_keeps_messages_of_the_last_session_is_reset() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    world.request(&daemon, &build(GET_FEATURES, 0, &[]), 0);
    daemon.send(&build(GET_FEATURES, REPLY, &word(1)));
    eventually("the reply's notification", || {
        world.device.state().doorbells.contains(&1)
    });
    world.device.disconnect();
    eventually("a reset", || world.device.state().resets == 2);
    world.device.wait_for_slave();
    assert_eq!(world.device.try_receive(), None);
}

#[test]
fn a_daemon_that_goes_takes_the_slave_down_until_it_is_back() {
    everywhere(|world| {
        let daemon = world.session();
        drop(daemon);
        let daemon = world.session();
        let ask = build(GET_FEATURES, 0, &[]);
        assert_eq!(world.request(&daemon, &ask, 0).0, ask);
    });
}

#[test]
fn the_slave_is_not_up_before_the_daemon_is_there() {
    let mut world = World::new(Setup {
        listening: false,
        ..Setup::default()
    });
    eventually("DRIVER_OK", || world.device.state().status & status::DRIVER_OK != 0);
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(world.device.state().link, 0);
    world.listen();
    let _daemon = world.accept();
    world.device.wait_for_slave();
}

#[test]
fn waiting_for_the_daemon_has_the_bound_asked_for() {
    let mut world = World::new(Setup {
        listening: false,
        wait: Some(Duration::from_millis(50)),
        ..Setup::default()
    });
    let error = world.result().unwrap_err();
    assert!(error.to_string().starts_with("no daemon on "), "{error}");
    assert_eq!(world.device.state().status, 0, "the device is left reset");
}

#[test]
fn a_master_that_makes_no_sense_ends_its_session_not_the_bridge() {
    for bad in [
        build(SET_VRING_KICK, 0, &word(QUEUES.into())),
        build(SET_MEM_TABLE, 0, &word(9)),
        build(ADD_MEM_REG, 0, &[0; 40]),
        build(CONFIG_CHANGE, REPLY, &word(0)),
        build(4711, 0, &[]),
        vec![1, 2, 3],
    ] {
        let world = World::new(Setup::default());
        let daemon = world.session();
        world.device.send(&bad);
        daemon.expect_end();
        let daemon = world.session();
        let ask = build(GET_FEATURES, 0, &[]);
        assert_eq!(world.request(&daemon, &ask, 0).0, ask);
        assert_eq!(world.device.state().resets, 1);
    }
}

/// The device uses up a buffer like that when a master goes in the middle of a message.
#[test]
fn an_empty_message_is_passed_over() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    world.device.send(&[]);
    let ask = build(GET_FEATURES, 0, &[]);
    assert_eq!(world.request(&daemon, &ask, 0).0, ask);
}

#[test]
fn a_daemon_that_makes_no_sense_ends_the_session_not_the_bridge() {
    let mut version = build(GET_FEATURES, REPLY, &word(0));
    version[4] = REPLY as u8;
    let mut huge = build(GET_FEATURES, REPLY, &[]);
    huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    for bad in [
        build(GET_FEATURES, REPLY, &word(0)),
        build(GET_FEATURES, 0, &[]),
        version,
        huge,
    ] {
        let world = World::new(Setup::default());
        let daemon = world.session();
        daemon.send(&bad);
        daemon.expect_end();
        let _next = world.session();
        assert_eq!(world.device.try_receive(), None, "the master gets nothing of it");
    }
}

#[test]
fn a_device_that_breaks_the_ring_is_reset_and_serves_again() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    world.device.misuse();
    daemon.expect_end();
    let daemon = world.session();
    assert_eq!(world.device.state().resets, 2);
    let ask = build(GET_FEATURES, 0, &[]);
    assert_eq!(world.request(&daemon, &ask, 0).0, ask);
}

#[test]
fn a_device_that_asks_for_a_reset_gets_it() {
    let world = World::new(Setup::default());
    let daemon = world.session();
    world.device.state().status |= status::NEEDS_RESET;
    daemon.expect_end();
    let _daemon = world.session();
    assert_eq!(world.device.state().resets, 2);
}

#[test]
fn a_device_that_stays_broken_is_given_up() {
    let mut world = World::new(Setup {
        prepare: |state| state.offered = 0,
        ..Setup::default()
    });
    let error = world.result().unwrap_err();
    assert_eq!(error.to_string(), "device: doesn't offer VERSION_1");
    let mut world = World::new(Setup {
        prepare: |state| state.link = 0x10,
        ..Setup::default()
    });
    // The undefined bit is back after each reset.
    let device = world.device.clone();
    let setter = std::thread::spawn(move || {
        while device.state().resets < 8 {
            device.state().link = 0x10;
            std::thread::yield_now();
        }
    });
    let result = world.result();
    world.device.state().resets = 8;
    setter.join().unwrap();
    assert!(is_device_error(&result), "{result:?}");
}

#[test]
fn impossible_devices_are_refused() {
    let cases: [(Prepare, &str); 4] = [
        (
            |state| state.max_queues = 0,
            "device: 0 vhost-user queues are not possible",
        ),
        (
            |state| state.max_queues = 0x8000,
            "device: 32768 vhost-user queues are not possible",
        ),
        (
            |state| state.max_queues = u32::MAX,
            "device: 4294967295 vhost-user queues are not possible",
        ),
        (
            |state| state.notify_length -= 4,
            "device: the doorbell of index 8 is not in the notification structure",
        ),
    ];
    for (prepare, reason) in cases {
        let mut world = World::new(Setup {
            prepare,
            ..Setup::default()
        });
        match world.result() {
            Err(Error::Setup(text)) => assert_eq!(text, reason),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn stopping_disconnects_the_master_and_resets_the_device() {
    let mut world = World::new(Setup::default());
    let daemon = world.session();
    world.stop().unwrap();
    daemon.expect_end();
    let state = world.device.state();
    assert_eq!((state.status, state.link & config::SLAVE_UP), (0, 0));
}

#[test]
fn once_ends_after_a_session_with_a_master() {
    let mut world = World::new(Setup {
        once: true,
        ..Setup::default()
    });
    // A daemon that goes before there is a master doesn't count.
    drop(world.accept());
    let daemon = world.session();
    let ask = build(GET_FEATURES, 0, &[]);
    assert_eq!(world.request(&daemon, &ask, 0).0, ask);
    world.device.disconnect();
    world.result().unwrap();
    daemon.expect_end();
}

#[test]
fn a_line_that_brings_no_interrupts_is_given_up_for_polling() {
    let world = World::new(Setup {
        prepare: |state| state.mute = true,
        ..Setup::default()
    });
    let daemon = world.session();
    let kick = world
        .request(&daemon, &build(SET_VRING_KICK, 0, &word(0)), 1)
        .1
        .remove(0);
    assert!(eventfd_take(&kick));
    // Each is found by looking, once a second.
    for _ in 0..4 {
        world.device.kick();
        eventually("a kick", || eventfd_take(&kick));
    }
    let start = std::time::Instant::now();
    for _ in 0..10 {
        world.device.kick();
        eventually("a kick", || eventfd_take(&kick));
    }
    assert!(start.elapsed() < Duration::from_secs(3), "now it polls");
}
