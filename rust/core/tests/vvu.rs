// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtio-vhost-user device between a master and a slave that keep to the rules or don't: messages, what they make
//! available, and every rule that is named when one is broken. The slave is a driver behind a PCI function; where the front end
//! has to map the shared memory, it is one behind vhost-user.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/vfio.rs"]
mod vfio;
#[path = "common/vvu.rs"]
mod vvu;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use common::{memfd, peer, Guest, Ring, USER, WRITE as WRITE_FLAG};
use vfio::{longs, until, words};
use vhu_core::error::Error;
use vhu_core::member::{feature, Member};
use vhu_core::ring::split::RingAddresses;
use vhu_core::sys::{self, PeerFd};
use vhu_core::vvu::message::PROTOCOL_FEATURES;
use vhu_core::vvu::{Operation, Options, VvuDevice, MASTER_UP, MAX_QUEUES, SLAVE_UP};
use vhu_core::worker::Pool;
use vvu::*;

fn rule(result: Result<vhu_core::vvu::Taken, vhu_core::error::Fault>) -> &'static str {
    result.err().expect("a rule was broken").rule
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

// --- options

#[test]
fn options_that_make_no_sense() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let file = memfd(0x2000);
    let with_ram = |fd: OwnedFd, len| Options {
        ram_file: Some((fd, len)),
        ..options()
    };
    let clone = || OwnedFd::from(file.try_clone().unwrap());
    let cases = [
        Options {
            max_queues: 0,
            ..options()
        },
        Options {
            max_queues: MAX_QUEUES + 1,
            ..options()
        },
        Options {
            shared_memory: 0,
            ..options()
        },
        Options {
            shared_memory: 0x800,
            ..options()
        },
        Options {
            shared_memory: 0x3000,
            ..options()
        },
        with_ram(clone(), 0),
        with_ram(clone(), 0x1800),
        with_ram(clone(), 2 * REGION),
    ];
    for (case, options) in cases.into_iter().enumerate() {
        let error = VvuDevice::new(Arc::clone(&pool), 1, options).err();
        assert!(matches!(error, Some(Error::Invalid(_))), "case {case}: {error:?}");
    }
    // Clients are going to map all of it.
    for (options, rule) in [
        (with_ram(clone(), 0x3000), "memory.fd-short"),
        (with_ram(sys::eventfd().unwrap(), 0x1000), "memory.fd-kind"),
    ] {
        let error = VvuDevice::new(Arc::clone(&pool), 1, options).err().unwrap();
        assert_eq!(error.rule(), rule);
    }
    assert!(VvuDevice::new(pool, 1, with_ram(clone(), 0x2000)).is_ok());
}

// --- rxq and txq (7.2)

#[test]
fn messages_come_in_their_order_and_too_small_buffers_need_a_reset() {
    let bed = Bed::new();
    let (mut slave, vectors) = bed.up();
    let master = bed.master();
    for size in [RX_SIZE, 12, 19, RX_SIZE] {
        slave.post(size);
    }
    master.say(1000, &[1, 2, 3], vec![]);
    master.say(SET_OWNER, &[], vec![]);
    assert_eq!(slave.take(), message(1000, VERSION, &[1, 2, 3]));
    wait_signal("rxq", &vectors[1]);
    assert_eq!(slave.take(), message(SET_OWNER, VERSION, &[]));
    assert_eq!(bed.broken(), None);
    // A byte too small; no other buffer is tried.
    master.number(SET_FEATURES, 0x1_5000_0000, vec![]);
    until("rxq.size", || bed.broken() == Some("rxq.size"));
    assert_eq!(slave.device_status() & 0x40, 0x40);
    assert!(!bed.device.ready());
    assert!(!slave.has_message());
}

#[test]
fn a_buffer_that_just_fits() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    slave.post(20);
    master.number(SET_FEATURES, 7, vec![]);
    assert_eq!(slave.take(), message(SET_FEATURES, VERSION, &7u64.to_le_bytes()));
    slave.post(RX_SIZE);
    let longest = vec![0x5a; 4096];
    master.say(24, &longest, vec![]);
    assert_eq!(slave.take(), message(24, VERSION, &longest));
    assert_eq!(bed.broken(), None);
}

#[test]
fn messages_wait_for_buffers() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    master.say(SET_OWNER, &[], vec![]);
    master.say(GET_FEATURES, &[], vec![]);
    assert_eq!(bed.device.waiting(), 2);
    assert!(!slave.has_message());
    assert_eq!(slave.receive(), message(SET_OWNER, VERSION, &[]));
    assert_eq!(bed.device.waiting(), 1);
    assert_eq!(slave.receive(), message(GET_FEATURES, VERSION, &[]));
    until("all taken", || bed.device.waiting() == 0);
    let last = bed.device.info().last.unwrap();
    assert_eq!((last.from, last.request), ("master", GET_FEATURES));
}

#[test]
fn answers_reach_the_master_in_their_order() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    for request in [GET_FEATURES, GET_QUEUE_NUM] {
        master.say(request, &[], vec![]);
        slave.receive();
    }
    let answers = [
        message(GET_FEATURES, REPLY, &longs(&[0x1_4000_0000])),
        message(GET_QUEUE_NUM, REPLY, &longs(&[2])),
    ];
    slave.offer(&answers[0]);
    slave.offer_in_two(&answers[1], 5);
    slave.notify(1);
    until("txq's end", || slave.tx.used_idx(&slave.guest) == slave.tx.avail_idx);
    assert_eq!(slave.tx.used(&slave.guest, 0).1, 0, "nothing is written");
    let taken = bed.device.take();
    assert!(taken.iter().all(|message| !message.channel));
    let bytes: Vec<_> = taken.into_iter().map(|message| message.bytes).collect();
    assert_eq!(bytes, answers);
    assert_eq!(bed.device.info().features_offered, Some(0x1_4000_0000));
}

#[test]
fn answers_that_nobody_asked_for_are_discarded() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let answer = message(GET_FEATURES, REPLY, &longs(&[1]));
    slave.send(&answer);
    let master = bed.master();
    slave.send(&answer);
    master.say(GET_FEATURES, &[], vec![]);
    // No answer of its own, and none was asked for.
    master.say(SET_OWNER, &[], vec![]);
    slave.send(&message(SET_OWNER, REPLY, &longs(&[0])));
    slave.send(&answer);
    slave.send(&answer);
    let taken = bed.device.take();
    assert_eq!(taken.len(), 1);
    assert_eq!(taken[0].bytes, answer);
    assert_eq!(bed.device.info().counts.discarded, 4);
    // NEED_REPLY.
    let header = head(SET_OWNER, VERSION | 8, 0);
    bed.device.master_message(master.session, &header, &[], vec![]).unwrap();
    slave.send(&message(SET_OWNER, REPLY, &longs(&[0])));
    assert_eq!(bed.device.take().len(), 1);
}

#[test]
fn wrong_messages_in_txq_need_a_reset() {
    let mut torn = message(GET_FEATURES, REPLY, &[0; 8]);
    torn.truncate(19);
    let mut more = message(GET_FEATURES, REPLY, &[0; 8]);
    more.push(0);
    let cases: [(Vec<u8>, &str); 7] = [
        (vec![0; 11], "message.size"),
        (torn, "message.size"),
        (more, "message.size"),
        (message(GET_FEATURES, REPLY, &[0; 4097]), "message.size"),
        (head(GET_FEATURES, REPLY, u32::MAX).to_vec(), "message.size"),
        (message(GET_FEATURES, 4, &[0; 8]), "message.version"),
        (message(GET_FEATURES, 4 | 2, &[0; 8]), "message.version"),
    ];
    for (bytes, rule) in cases {
        let bed = Bed::new();
        let (mut slave, _) = bed.up();
        bed.master();
        slave.offer(&bytes);
        slave.notify(1);
        until("broken", || bed.broken().is_some());
        assert_eq!(bed.broken(), Some(rule), "{bytes:?}");
        assert_ne!(slave.device_status() & 0x40, 0);
        assert!(bed.device.take().is_empty());
        assert!(!bed.device.slave_up());
        slave.start();
        slave.set_status(1);
        assert!(bed.device.slave_up());
    }
}

/// What the relay hasn't taken yet is bounded; the rest stays in txq.
#[test]
fn a_flood_of_answers() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    for _ in 0..40 {
        master.say(GET_FEATURES, &[], vec![]);
    }
    for n in 0..40u64 {
        slave.offer(&message(GET_FEATURES, REPLY, &longs(&[n])));
    }
    slave.notify(1);
    until("some", || slave.tx.used_idx(&slave.guest) >= 16);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(slave.tx.used_idx(&slave.guest), 16);
    let mut seen = Vec::new();
    until("all", || {
        seen.extend(bed.device.take().iter().map(|message| quad(&message.bytes, 12)));
        seen.len() == 40
    });
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    // One that leaves before it has taken them doesn't get in the next one's way.
    for n in 0..40u64 {
        master.say(GET_FEATURES, &[], vec![]);
        slave.offer(&message(GET_FEATURES, REPLY, &longs(&[n])));
    }
    slave.notify(1);
    until("some", || slave.tx.used_idx(&slave.guest) == 56);
    master.leave();
    until("the rest is discarded", || slave.tx.used_idx(&slave.guest) == 80);
    slave.set_status(1);
    let master = bed.master();
    master.say(GET_FEATURES, &[], vec![]);
    assert!(bed.device.take().is_empty());
}

// --- interception (7.2)

#[test]
fn protocol_features_that_pass_descriptors_are_taken_out() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    master.say(GET_PROTOCOL_FEATURES, &[], vec![]);
    slave.send(&message(GET_PROTOCOL_FEATURES, REPLY, &longs(&[u64::MAX])));
    let bytes = bed.device.take().remove(0).bytes;
    assert_eq!(
        bytes,
        message(GET_PROTOCOL_FEATURES, REPLY, &longs(&[PROTOCOL_FEATURES]))
    );
    // PAGEFAULT, BACKEND_SEND_FD, HOST_NOTIFIER, INFLIGHT_SHMFD, SHARED_OBJECT, DEVICE_STATE, SHMEM.
    for bit in [8, 10, 11, 12, 18, 19, 22] {
        assert_eq!(PROTOCOL_FEATURES & 1 << bit, 0, "bit {bit}");
        assert_eq!(
            rule(master.send(SET_PROTOCOL_FEATURES, &longs(&[1 << bit]), vec![])),
            "protocol-features.not-offered"
        );
    }
    master.number(SET_PROTOCOL_FEATURES, 0x29, vec![]);
    let info = bed.device.info();
    assert_eq!(
        (info.protocol_slave, info.protocol_accepted),
        (Some(u64::MAX), Some(0x29))
    );
    // What the slave doesn't have isn't added.
    master.say(GET_PROTOCOL_FEATURES, &[], vec![]);
    slave.send(&message(GET_PROTOCOL_FEATURES, REPLY, &longs(&[1 << 3])));
    assert_eq!(quad(&bed.device.take()[0].bytes, 12), 1 << 3);
    assert_eq!(
        rule(master.send(SET_PROTOCOL_FEATURES, &longs(&[1]), vec![])),
        "protocol-features.not-offered"
    );
    master.say(GET_PROTOCOL_FEATURES, &[], vec![]);
    slave.send_broken(&message(GET_PROTOCOL_FEATURES, REPLY, &[0; 4]));
    until("broken", || bed.broken() == Some("message.size"));
}

#[test]
fn protocol_features_without_asking() {
    let bed = Bed::new();
    let (_slave, _) = bed.up();
    let master = bed.master();
    assert_eq!(
        rule(master.send(SET_PROTOCOL_FEATURES, &longs(&[1 << 3]), vec![])),
        "protocol-features.not-offered"
    );
    master.number(SET_PROTOCOL_FEATURES, 0, vec![]);
}

#[test]
fn requests_of_the_slave_need_the_masters_channel() {
    const CONFIG_CHANGE: u32 = 2;
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let request = message(CONFIG_CHANGE, VERSION, &[]);
    slave.send(&request);
    assert!(bed.device.take().is_empty());
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let taken = master
        .send(SET_BACKEND_REQ_FD, &[], vec![OwnedFd::from(ours).into()])
        .unwrap();
    assert!(taken.channel.is_some());
    assert_eq!(slave.receive(), message(SET_BACKEND_REQ_FD, VERSION, &[]));
    slave.send(&request);
    // Those that come with a descriptor can't be.
    for impossible in [3, 6, 7, 8, 9, 10] {
        slave.send(&message(impossible, VERSION, &[]));
    }
    let outgoing = bed.device.take();
    assert_eq!(outgoing.len(), 1);
    assert!(outgoing[0].channel);
    assert_eq!(outgoing[0].bytes, request);
    // The master's answer, and what isn't one.
    let answer = head(CONFIG_CHANGE, REPLY, 8);
    bed.device
        .channel_message(master.session, &answer, &longs(&[0]))
        .unwrap();
    assert_eq!(slave.receive(), message(CONFIG_CHANGE, REPLY, &longs(&[0])));
    let refused = |header: [u8; 12], payload: &[u8]| {
        bed.device
            .channel_message(master.session, &header, payload)
            .unwrap_err()
            .rule
    };
    assert_eq!(refused(head(CONFIG_CHANGE, VERSION, 0), &[]), "slave-channel");
    assert_eq!(refused(head(CONFIG_CHANGE, 4, 0), &[]), "message.version");
    assert_eq!(refused(head(CONFIG_CHANGE, REPLY, 4), &[]), "message.size");
    // A new session begins without.
    master.leave();
    bed.device
        .channel_message(master.session, &answer, &longs(&[0]))
        .unwrap();
    slave.set_status(1);
    bed.master();
    assert_eq!(bed.device.waiting(), 0, "a late answer to the last session");
    slave.send(&request);
    assert!(bed.device.take().is_empty());
}

// --- what a master must not do

#[test]
fn wrong_messages_of_the_master() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let (stream, _other) = UnixStream::pair().unwrap();
    let socket = || PeerFd::from(OwnedFd::from(stream.try_clone().unwrap()));
    let number = |value: u64| value.to_le_bytes().to_vec();
    let cases: Vec<(u32, Vec<u8>, Vec<PeerFd>, &str)> = vec![
        (SET_OWNER, vec![], vec![eventfd()], "message.fds"),
        (SET_FEATURES, vec![0; 4], vec![], "message.size"),
        (SET_FEATURES, number(1), vec![eventfd()], "message.fds"),
        (24, vec![0; 4097], vec![], "message.size"),
        // POSTCOPY_ADVISE, GET_INFLIGHT_FD, VRING_KICK, ADD_MEM_REG, GET_SHARED_OBJECT, GET_SHMEM_CONFIG.
        (28, vec![], vec![], "message.not-possible"),
        (31, vec![], vec![], "message.not-possible"),
        (35, vec![0; 8], vec![], "message.not-possible"),
        (37, vec![0; 40], vec![memfd_peer()], "message.not-possible"),
        (41, vec![], vec![], "message.not-possible"),
        (44, vec![], vec![], "message.not-possible"),
        // Unknown ones, with a descriptor that nobody could be given.
        (1000, vec![], vec![eventfd()], "message.fds"),
        (SET_VRING_KICK, number(0), vec![], "message.fds"),
        (SET_VRING_KICK, number(1 << 8), vec![eventfd()], "message.fds"),
        (SET_VRING_CALL, number(0), vec![eventfd(), eventfd()], "message.fds"),
        (SET_VRING_CALL, vec![0; 9], vec![eventfd()], "message.size"),
        (SET_VRING_ERR, number(N.into()), vec![eventfd()], "vring.index"),
        (SET_VRING_KICK, number(0xff), vec![eventfd()], "vring.index"),
        (SET_VRING_KICK, number(1 << 9), vec![eventfd()], "vring.fd"),
        (SET_VRING_CALL, number(1 << 63), vec![eventfd()], "vring.fd"),
        (SET_VRING_KICK, number(0), vec![memfd_peer()], "vring.fd"),
        (SET_VRING_CALL, number(1), vec![pipe()], "vring.fd"),
        (SET_VRING_ERR, number(1), vec![socket()], "vring.fd"),
        (SET_LOG_FD, vec![], vec![], "message.fds"),
        (SET_LOG_FD, vec![], vec![memfd_peer()], "log.fd"),
        (SET_BACKEND_REQ_FD, vec![], vec![], "message.fds"),
        (SET_BACKEND_REQ_FD, vec![0; 8], vec![socket()], "message.size"),
        (SET_BACKEND_REQ_FD, vec![], vec![eventfd()], "slave-channel"),
    ];
    for (request, payload, fds, wanted) in cases {
        let found = rule(master.send(request, &payload, fds));
        assert_eq!(found, wanted, "request {request}, {payload:x?}");
    }
    let header = |request, flags, size| {
        let result = bed
            .device
            .master_message(master.session, &head(request, flags, size), &[], vec![]);
        rule(result)
    };
    assert_eq!(header(SET_OWNER, 0, 0), "message.version");
    assert_eq!(header(SET_OWNER, 2, 0), "message.version");
    assert_eq!(header(SET_OWNER, VERSION, 1), "message.size");
    assert_eq!(header(SET_OWNER, VERSION, u32::MAX), "message.size");
    assert_eq!(header(GET_FEATURES, REPLY, 0), "message.flags");
    let result = bed
        .device
        .master_message(master.session + 1, &head(SET_OWNER, VERSION, 0), &[], vec![]);
    assert_eq!(rule(result), "message.order");
    // The driver has seen nothing of all that.
    assert_eq!(bed.device.waiting(), 0);
    let queues = bed.device.info().queues;
    assert!(queues.iter().all(|queue| queue.connected == (false, false)));
    // What nobody knows yet is passed on.
    master.say(1000, &[1, 2, 3], vec![]);
    assert_eq!(slave.receive(), message(1000, VERSION, &[1, 2, 3]));
}

fn memfd_peer() -> PeerFd {
    peer(&memfd(0x1000))
}

#[test]
fn one_master_at_a_time() {
    let bed = Bed::new();
    assert!(matches!(bed.device.connect_master(), Err(Error::Busy(7, _))));
    let (mut slave, _) = bed.up();
    let master = bed.master();
    assert!(matches!(bed.device.connect_master(), Err(Error::Busy(7, _))));
    assert!(bed.device.leftovers().is_empty());
    master.say(GET_FEATURES, &[], vec![]);
    let fault = vhu_core::error::Fault::new("message.torn", "in the middle");
    assert!(bed.device.disconnect_master(master.session, Some(fault)));
    let info = bed.device.info();
    assert_eq!((info.status, info.waiting), (0, 0));
    assert_eq!(info.last_error.unwrap().rule, "message.torn");
    slave.set_status(SLAVE_UP);
    let next = bed.master();
    assert_ne!(next.session, master.session);
    assert!(!master.leave(), "not the next one's session");
    assert_eq!(slave.status(), SLAVE_UP | MASTER_UP);
    assert_eq!(rule(master.send(SET_OWNER, &[], vec![])), "message.order");
    slave.send(&message(GET_FEATURES, REPLY, &longs(&[1])));
    assert!(bed.device.take().is_empty(), "the last one has asked");
    assert_eq!(bed.device.info().counts.masters, 2);
    assert!(bed.device.info().last_error.is_none());
}

// --- memory (7.5)

#[test]
fn regions_in_the_masters_order_then_the_log() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let files = [memfd(0x1_0000), memfd(0x1_0000)];
    let log = memfd(0x1000);
    let table = [
        (0x4000_0000, 0x3000, 0x5000, &files[1]),
        (0, 0x2000, 0, &files[0]),
        (0x10_0000, 0x1000, 0x8000, &files[0]),
    ];
    assert!(master.memory(&table).unwrap().operations.is_empty());
    let seen = slave.receive();
    assert_eq!(seen.len(), 12 + 8 + 3 * 32);
    assert_eq!(seen[..12], head(SET_MEM_TABLE, VERSION, 8 + 3 * 32));
    for (row, (guest, size, _, _)) in table.iter().enumerate() {
        let at = 20 + 32 * row;
        let fields = [guest, size, &0x7fff_0000_0000, &0];
        for (field, wanted) in fields.into_iter().enumerate() {
            assert_eq!(quad(&seen, at + 8 * field), *wanted, "row {row}, field {field}");
        }
    }
    // The log may have any size.
    master.log(0x123, 0, &log).unwrap();
    let seen = slave.receive();
    assert_eq!(seen, message(SET_LOG_BASE, VERSION, &longs(&[0x123, 0])));
    let places = |bed: &Bed| -> Vec<_> {
        let memory = bed.device.info().memory;
        memory.iter().map(|it| (it.guest, it.size, it.offset, it.log)).collect()
    };
    let wanted = [
        (0x4000_0000, 0x3000, 0, false),
        (0, 0x2000, 0x3000, false),
        (0x10_0000, 0x1000, 0x5000, false),
        (0, 0x123, 0x6000, true),
    ];
    assert_eq!(places(&bed), wanted);
    // Another log takes its place; memory that shrinks leaves it there, and memory that grows over it can't be while it is
    // kept. When it isn't, it is in nobody's way.
    master.log(0x456, 0, &log).unwrap();
    master.memory(&table[..1]).unwrap();
    assert_eq!(places(&bed), [wanted[0], (0, 0x456, 0x6000, true)]);
    let long = [(0, 0x7000, 0, &files[0])];
    master.memory(&long).unwrap();
    assert_eq!(places(&bed), [(0, 0x7000, 0, false)]);
    master.memory(&table[..1]).unwrap();
    master.number(SET_FEATURES, 1 << 26, vec![]);
    master.log(0x456, 0, &log).unwrap();
    assert_eq!(rule(master.memory(&long)), "shared-memory.log-overlap");
    master.memory(&[]).unwrap();
    assert_eq!(places(&bed), [(0, 0x456, 0x3000, true)]);
}

#[test]
fn memory_that_can_not_be_shown() {
    let bed = Bed::new();
    let (_slave, _) = bed.up();
    let master = bed.master();
    let file = memfd(0x10_0000);
    let cases: Vec<(Vec<Row<'_>>, &str)> = vec![
        (vec![(0, 0, 0, &file)], "memory.region-size"),
        (vec![(u64::MAX - 0xfff, 0x2000, 0, &file)], "memory.region-wrap"),
        (
            vec![(0, 0x2000, 0, &file), (0x1000, 0x1000, 0, &file)],
            "memory.overlap",
        ),
        (vec![(0, 0x1001, 0, &file)], "shared-memory.alignment"),
        (vec![(0, 0x1000, 0x800, &file)], "shared-memory.alignment"),
        (vec![(0, 2 * REGION, 0, &file)], "shared-memory.size"),
        (
            vec![(0, REGION, 0, &file), (REGION, 0x1000, 0, &file)],
            "shared-memory.size",
        ),
        (vec![(0, 0x2000, 0xf_f000, &file)], "memory.fd-short"),
        (vec![(0, 0x1000, u64::MAX - 0xfff, &file)], "memory.region-wrap"),
        (vec![(0, 0x1000, 0, &file); 9], "message.fds"),
    ];
    for (table, wanted) in cases {
        assert_eq!(rule(master.memory(&table)), wanted, "{table:x?}");
    }
    let (payload, _) = table(&[(0, 0x1000, 0, &file)]);
    let send = |payload: &[u8], fds| rule(master.send(SET_MEM_TABLE, payload, fds));
    assert_eq!(send(&payload, vec![]), "message.fds");
    assert_eq!(send(&payload, vec![peer(&file), peer(&file)]), "message.fds");
    assert_eq!(send(&payload[..39], vec![peer(&file)]), "message.size");
    assert_eq!(send(&payload[..8], vec![peer(&file)]), "message.size");
    assert_eq!(send(&[], vec![]), "message.size");
    assert_eq!(send(&payload, vec![eventfd()]), "memory.fd-kind");
    assert_eq!(send(&payload, vec![pipe()]), "memory.fd-kind");
    let mut many = payload.clone();
    many[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(send(&many, vec![peer(&file)]), "message.size");
    let log = |size, offset| rule(master.log(size, offset, &file));
    assert_eq!(log(0, 0), "memory.region-size");
    assert_eq!(log(REGION + 1, 0), "shared-memory.size");
    assert_eq!(log(0x100, 1), "shared-memory.alignment");
    assert_eq!(log(0x1000, 0x10_0000), "memory.fd-short");
    assert_eq!(log(0x1000, u64::MAX - 0xfff), "memory.region-wrap");
    assert_eq!(rule(master.send(SET_LOG_BASE, &[0; 16], vec![])), "message.fds");
    assert_eq!(bed.device.waiting(), 0);
    assert!(bed.device.info().memory.is_empty());
}

#[test]
fn a_ram_file_can_not_be_moved() {
    let file = memfd(0x1_0000);
    let bed = Bed::with_ram(&file, 0x8000);
    let (_slave, _) = bed.up();
    let master = bed.master();
    let cases: [&[Row<'_>]; 3] = [
        &[(0, 0x1000, 0x2000, &file), (0x1000, 0x1000, 0, &file)],
        &[(0, 0x2000, 0x7000, &file)],
        &[(0, 0x1000, 0x8000, &file)],
    ];
    for table in cases {
        assert_eq!(rule(master.memory(table)), "shared-memory.order");
    }
    // Other files go behind it.
    let other = memfd(0x1000);
    master
        .memory(&[(0, 0x1000, 0, &file), (0x10_0000, 0x1000, 0, &other)])
        .unwrap();
    let offsets: Vec<_> = bed.device.info().memory.iter().map(|it| it.offset).collect();
    assert_eq!(offsets, [0, 0x8000]);
}

// --- behind a vhost-user front end

/// The front end, and the driver behind it.
struct Remote {
    pool: Arc<Pool>,
    device: Arc<VvuDevice>,
    member: Arc<Member>,
    guest: Guest,
    rings: [Ring; 2],
    kicks: Vec<Arc<OwnedFd>>,
    calls: Vec<OwnedFd>,
    seen: u16,
}

const GUEST: u64 = 0x10_0000;

impl Remote {
    fn new() -> Self {
        let pool = Arc::new(Pool::new(Some(2)).unwrap());
        let (device, member) = device(&pool, options(), 0);
        let guest = Guest::new(GUEST, 0x10_0000);
        member.attach().unwrap();
        let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        member.set_features(features, feature::PROTOCOL_FEATURES).unwrap();
        let fd = peer(&guest.file);
        let region = pool.mappings().region(&fd, GUEST, guest.size, GUEST + USER, 0).unwrap();
        member.set_memory(vec![region]).unwrap();
        let rings = [Ring::legacy(GUEST, 64, 4096), Ring::legacy(GUEST + 0x4000, 64, 4096)];
        Self {
            pool,
            device,
            member,
            guest,
            rings,
            kicks: Vec::new(),
            calls: Vec::new(),
            seen: 0,
        }
    }

    /// What the front end does at DRIVER_OK, or when it goes on.
    fn start(&mut self, bases: [u64; 2]) {
        (self.kicks, self.calls) = (Vec::new(), Vec::new());
        for index in 0..u64::from(2 * N + 3) {
            // Special indices share a ring that is none.
            let addresses = self
                .rings
                .get(index as usize)
                .map_or(GUEST + 0x8000, |ring| ring.addresses.desc);
            let ring = Ring::legacy(addresses + USER, 64, 4096).addresses;
            let RingAddresses { desc, driver, device } = ring;
            let base = bases.get(index as usize).copied().unwrap_or(0);
            let (kick, call) = (sys::eventfd().unwrap(), sys::eventfd().unwrap());
            self.member.set_queue_size(index, 64).unwrap();
            self.member.set_queue_base(index, base).unwrap();
            let addresses = RingAddresses { desc, driver, device };
            self.member.set_queue_addresses(index, addresses).unwrap();
            self.member
                .set_queue_call(index, Some(call.try_clone().unwrap()))
                .unwrap();
            self.member
                .set_queue_kick(index, Some(kick.try_clone().unwrap()))
                .unwrap();
            self.kicks.push(Arc::new(kick));
            self.calls.push(call);
            assert!(!self.device.ready());
        }
        for index in 0..u64::from(2 * N + 3) {
            assert!(!self.device.ready(), "before {index} is enabled");
            self.member.enable_queue(index, true).unwrap();
        }
        assert!(self.device.ready());
    }

    /// What it does when its guest is stopped, or reset.
    fn stop(&mut self) -> [u64; 2] {
        for index in 0..u64::from(2 * N + 3) {
            self.member.enable_queue(index, false).unwrap();
        }
        assert!(!self.device.ready());
        for index in 0..u64::from(2 * N + 3) {
            if let Some(token) = self.member.stop_queue(index).unwrap() {
                let events = self.pool.events();
                until("a ring's end", || {
                    let is_it = |event: &_| matches!(event, vhu_core::event::Event::Done { token: t } if *t == token);
                    events.take().iter().any(is_it)
                });
                self.member.collect();
            }
        }
        [0, 1].map(|index| self.member.queue_base(index).unwrap().into())
    }

    fn up(&mut self) -> Master {
        self.member.config_write(0, &words(&[SLAVE_UP]));
        assert!(self.device.slave_up());
        Master {
            device: Arc::clone(&self.device),
            session: self.device.connect_master().unwrap(),
        }
    }

    fn receive(&mut self) -> Vec<u8> {
        let slot = self.rings[0].avail_idx % 64;
        self.rings[0].descriptor(&self.guest, slot, GUEST + 0x2_0000, RX_SIZE, WRITE_FLAG, 0);
        self.rings[0].offer(&self.guest, slot);
        sys::eventfd_signal(&self.kicks[0]);
        until("a message", || self.rings[0].used_idx(&self.guest) != self.seen);
        let (_, len) = self.rings[0].used(&self.guest, self.seen);
        self.seen = self.seen.wrapping_add(1);
        self.guest.read(GUEST + 0x2_0000, len as usize)
    }
}

fn shape(operations: &[Operation]) -> Vec<(bool, u64, u64, u64)> {
    operations
        .iter()
        .map(|it| (it.map, it.offset, it.size, it.fd_offset))
        .collect()
}

#[test]
fn the_front_end_maps_before_the_driver_sees_the_message() {
    let mut remote = Remote::new();
    remote.start([0, 0]);
    let master = remote.up();
    let files = [memfd(0x1_0000), memfd(0x1_0000)];
    let table = [(0, 0x2000, 0x1000, &files[0]), (0x10_0000, 0x1000, 0, &files[1])];
    let taken = master.memory(&table).unwrap();
    let maps = [(true, 0, 0x2000, 0x1000), (true, 0x2000, 0x1000, 0)];
    assert_eq!(shape(&taken.operations), maps);
    assert_eq!(remote.device.waiting(), 1, "held back");
    assert!(remote.device.info().memory.is_empty());
    assert_eq!(rule(master.send(SET_OWNER, &[], vec![])), "message.order");
    for (done, operation) in (1..).zip(&taken.operations) {
        remote.device.carried_out(operation);
        assert_eq!(remote.device.info().memory.len(), done);
    }
    remote.device.commit(master.session + 1);
    assert_eq!(remote.device.info().waiting, 0, "another session's");
    remote.device.commit(master.session);
    let seen = remote.receive();
    assert_eq!(quad(&seen, 20 + 24), 0);
    // What stays is left alone; what moves or goes is unmapped before anything is mapped.
    let taken = master.memory(&[table[1], table[0]]).unwrap();
    assert_eq!(
        shape(&taken.operations),
        [
            (false, 0, 0x2000, 0x1000),
            (false, 0x2000, 0x1000, 0),
            (true, 0, 0x1000, 0),
            (true, 0x1000, 0x2000, 0x1000)
        ]
    );
    for operation in &taken.operations {
        remote.device.carried_out(operation);
    }
    remote.device.commit(master.session);
    remote.receive();
    let taken = master
        .memory(&[table[1], (0x20_0000, 0x2000, 0x1000, &files[0])])
        .unwrap();
    assert!(taken.operations.is_empty(), "the same places, another address");
    remote.receive();
    assert_eq!(remote.device.info().memory[1].guest, 0x20_0000);
    let taken = master.log(0x100, 0, &files[1]).unwrap();
    assert_eq!(shape(&taken.operations), [(true, 0x3000, 0x100, 0)]);
    // The master leaves before that is done: what is mapped is unmapped before the next one comes.
    assert!(master.leave());
    remote.device.commit(master.session);
    let left = remote.device.leftovers();
    assert_eq!(shape(&left), [(false, 0, 0x1000, 0), (false, 0x1000, 0x2000, 0x1000)]);
    for operation in &left {
        remote.device.carried_out(operation);
    }
    assert!(remote.device.leftovers().is_empty());
    assert_eq!(remote.device.waiting(), 0);
}

#[test]
fn doorbells_and_kicks_are_eventfds() {
    let mut remote = Remote::new();
    remote.start([0, 0]);
    let master = remote.up();
    let bells: Vec<OwnedFd> = (0..u64::from(2 * N))
        .map(|n| {
            let (theirs, ours) = pair();
            let request = [SET_VRING_CALL, SET_VRING_ERR][(n % 2) as usize];
            master.number(request, n / 2, vec![theirs]);
            ours
        })
        .collect();
    for (n, bell) in bells.iter().enumerate() {
        sys::eventfd_signal(&remote.kicks[2 + n]);
        wait_signal("the doorbell", bell);
        assert!(bells.iter().all(|other| !signalled(other)));
    }
    let (theirs, log) = pair();
    master.say(SET_LOG_FD, &[], vec![theirs]);
    sys::eventfd_signal(&remote.kicks[usize::from(2 * N + 2)]);
    wait_signal("the log's doorbell", &log);
    let (theirs, kick) = pair();
    master.number(SET_VRING_KICK, 1, vec![theirs]);
    sys::eventfd_signal(&kick);
    wait_signal("the kick", &remote.calls[4]);
    // Disabled: neither comes through.
    remote.member.enable_queue(4, false).unwrap();
    sys::eventfd_signal(&remote.kicks[4]);
    sys::eventfd_signal(&kick);
    assert!(quiet(&bells[2]));
    assert!(quiet(&remote.calls[4]));
    remote.member.enable_queue(4, true).unwrap();
    wait_signal("what came meanwhile", &bells[2]);
    wait_signal("the kick that was kept", &remote.calls[4]);
}

#[test]
fn a_pause_is_no_reset() {
    let mut remote = Remote::new();
    remote.start([0, 0]);
    let master = remote.up();
    master.say(SET_OWNER, &[], vec![]);
    remote.receive();
    let bases = remote.stop();
    assert_eq!(bases, [1, 0]);
    assert!(remote.device.info().paused);
    assert!(!remote.device.slave_up());
    assert_eq!(remote.device.session(), Some(master.session));
    master.say(GET_FEATURES, &[], vec![]);
    remote.start(bases);
    let info = remote.device.info();
    assert_eq!(
        (info.paused, info.status, info.resets),
        (false, SLAVE_UP | MASTER_UP, 0)
    );
    assert_eq!(remote.receive(), message(GET_FEATURES, VERSION, &[]));
    // From the beginning: another driver.
    remote.stop();
    for ring in &mut remote.rings {
        remote.guest.write(ring.addresses.desc, &[0; 0x3000]);
        ring.avail_idx = 0;
    }
    remote.start([0, 0]);
    let info = remote.device.info();
    assert_eq!((info.paused, info.status, info.resets), (false, 0, 1));
    assert_eq!(remote.device.session(), None);
    assert!(!master.leave());
}

#[test]
fn a_stopped_guest_reads_no_configuration() {
    let mut remote = Remote::new();
    remote.start([0, 0]);
    let master = remote.up();
    remote.stop();
    let mut status = [0; 4];
    remote.member.config_read(0, &mut status);
    assert_eq!(status, [0; 4]);
    assert_eq!((remote.device.session(), remote.device.info().resets), (None, 1));
    assert!(!master.leave());
    // Nor after a device reset, which is one whatever comes next.
    remote.start([0, 0]);
    remote.up();
    if let Some(token) = remote.member.reset() {
        let events = remote.pool.events();
        until("the rings' end", || {
            let is_it = |event: &_| matches!(event, vhu_core::event::Event::Done { token: t } if *t == token);
            events.take().iter().any(is_it)
        });
        remote.member.finish_reset();
    }
    let info = remote.device.info();
    assert_eq!((info.status, info.resets, info.paused), (0, 2, false));
    for index in 0..u64::from(2 * N + 3) {
        remote.member.enable_queue(index, false).unwrap();
    }
    assert!(!remote.device.info().paused);
}
