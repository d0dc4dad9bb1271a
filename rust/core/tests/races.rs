// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must hold whatever comes at the same time: commands that wait, rings that stop, clients that leave, guests that
//! flood. Each on real members and workers.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/owner.rs"]
mod fixture;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use common::{peer, Guest, Random, Ring, NEXT, WRITE};
use fixture::{blk, never, options, request, wait_until, Bed, Calls, Quiet, BASE, DATA, OK, SIZE};
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::error::Fault;
use vhu_core::event::{Event, Events, Waker};
use vhu_core::function::{Function, IoPorts, VfControl, COMMON_OFFSET, NOTIFY_OFFSET};
use vhu_core::member::parts::Part;
use vhu_core::member::{AdminQueues, Front, Member, MemberOptions, Progress};
use vhu_core::owner::command;
use vhu_core::owner::forward::Forwarder;
use vhu_core::owner::local::{header, Submitted, Ticket};
use vhu_core::owner::trace::{Begun, Entry, Origin, Trace};
use vhu_core::owner::GroupOptions;
use vhu_core::sys;
use vhu_core::vfio_user::function::{Access, IrqChange, PciFunction, CONFIG_REGION, IRQ_INTX, IRQ_MSIX};
use vhu_core::worker::{Flow, Interest, Pool, Source, SourceIo};

/// BARs of functions.
const LEGACY_BAR: u32 = 0;
const MODERN_BAR: u32 = 2;
/// Of the modern common configuration.
const DEVICE_STATUS: u64 = COMMON_OFFSET as u64 + 20;
/// Status of a command that found its device busy.
const BUSY: u16 = 16;
/// How long things that must not happen are waited for.
const A_WHILE: Duration = Duration::from_millis(100);

fn legacy_function(bed: &Bed, member: &Arc<Member>) -> Arc<Function> {
    let ports = Forwarder::new(Arc::clone(&bed.group), Arc::clone(member)).unwrap();
    Function::legacy(Arc::clone(member), Arc::new(ports)).unwrap()
}

/// The owner, with as many administration queues in its guest's memory, which its reset resets.
fn owner_with(bed: &Bed, packed: bool, count: u16) -> Arc<Member> {
    let options = MemberOptions {
        packed,
        vectors: 4,
        admin: Some(AdminQueues {
            device: bed.group.function_device(),
            count,
        }),
        ..MemberOptions::default()
    };
    let owner = Member::new(Arc::clone(&bed.pool), 0, blk("ram:1048576"), options);
    let group = Arc::downgrade(&bed.group);
    owner.set_on_reset(move || {
        if let Some(group) = group.upgrade() {
            group.function_reset();
        }
    });
    owner
}

// --- events ---------------------------------------------------------------------------------------------------

/// Events that nobody reads stay few, however often a guest writes its status, and end with what is the case.
#[test]
fn a_guest_cannot_fill_the_event_queue() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let function = Function::modern(Arc::clone(&member)).unwrap();
    function.attach(bed.line()).unwrap();
    bed.pool.events().take();
    for n in 0..100_000u32 {
        function.write(MODERN_BAR, DEVICE_STATUS, &[1 + (n as u8 & 1) * 2], &never);
        if n % 1000 == 0 {
            assert!(bed.pool.events().len() <= 32, "{} after {n}", bed.pool.events().len());
        }
    }
    let events = bed.pool.events().take();
    assert!(events.len() <= 32, "{}", events.len());
    let last = events.iter().rev().find_map(|event| match event {
        Event::Status { new, .. } => Some(*new),
        _ => None,
    });
    assert_eq!(last, Some(member.info().status));
}

/// Beyond the 16 that may wait, the last status event takes in those that come: each begins where the one before ended, the
/// first with the first `old`, the last with the last `new`. Other members' events and completions are not touched.
#[test]
fn status_events_merge_into_a_chain() {
    let events = Events::new().unwrap();
    let status = |member: u32, old: u8, new: u8| Event::Status { member, old, new };
    for n in 0..40 {
        events.push(status(1, n, n + 1));
        events.push(Event::Done { token: u64::from(n) });
        events.push(Event::Config { member: 1 });
    }
    events.push(status(2, 7, 0));
    for rule in ["ring.index"; 40] {
        events.push(Event::Broken {
            member: 2,
            fault: Fault::new(rule, "first"),
        });
    }
    events.push(Event::Broken {
        member: 2,
        fault: Fault::new("ring.chain", "last"),
    });
    assert_eq!(events.len(), 16 + 40 + 16 + 1 + 16);
    let all = events.take();
    assert!(events.is_empty());
    let chain = |of: u32| -> Vec<(u8, u8)> {
        let changes = all.iter().filter_map(|event| match *event {
            Event::Status { member, old, new } if member == of => Some((old, new)),
            _ => None,
        });
        changes.collect()
    };
    let first = chain(1);
    assert_eq!(first.len(), 16);
    assert_eq!((first[0].0, first[15]), (0, (15, 40)));
    assert!(first.windows(2).all(|pair| pair[0].1 == pair[1].0), "{first:?}");
    assert_eq!(chain(2), [(7, 0)]);
    let tokens = all.iter().filter_map(|event| match event {
        Event::Done { token } => Some(*token),
        _ => None,
    });
    assert!(tokens.eq(0..40), "completions are all told, in order");
    let mut faults = all.iter().filter_map(|event| match event {
        Event::Broken { fault, .. } => Some(fault.rule),
        _ => None,
    });
    assert_eq!(faults.next_back(), Some("ring.chain"));
    // What was read makes room again.
    events.push(status(1, 40, 0));
    assert!(matches!(events.take()[..], [Event::Status { old: 40, new: 0, .. }]));
}

/// Of clients that came and left while nobody looked only the last may be told of. What is told of a function, from one
/// look to the next, is coming and leaving in turn, at most one of each, and ends with what is the case.
#[test]
fn connections_that_nobody_saw_vanish() {
    let events = Events::new().unwrap();
    let come = |member: u32, function: &'static str, pid: i32| {
        events.push(Event::FunctionConnected {
            member,
            function,
            peer_pid: Some(pid),
        });
    };
    let go = |member: u32, function: &'static str| {
        events.push(Event::FunctionDisconnected {
            member,
            function,
            reason: "gone".into(),
        });
    };
    // With the client's process, when it is there.
    let told = || -> Vec<(u32, &'static str, Option<i32>)> {
        let told = events.take().into_iter().filter_map(|event| match event {
            Event::FunctionConnected {
                member,
                function,
                peer_pid,
            } => Some((member, function, peer_pid)),
            Event::FunctionDisconnected { member, function, .. } => Some((member, function, None)),
            _ => None,
        });
        told.collect()
    };
    come(1, "legacy", 10);
    go(1, "legacy");
    // Others are told apart, by member and by function.
    come(2, "legacy", 11);
    come(1, "modern", 12);
    come(1, "legacy", 13);
    assert_eq!(
        told(),
        [
            (2, "legacy", Some(11)),
            (1, "modern", Some(12)),
            (1, "legacy", Some(13))
        ]
    );
    // Whose coming has been read is told to have left; those after it come and go unseen.
    go(1, "legacy");
    for pid in 20..200 {
        come(1, "legacy", pid);
        go(1, "legacy");
    }
    go(1, "modern");
    assert_eq!(told(), [(1, "legacy", None), (1, "modern", None)]);
    go(2, "legacy");
    assert_eq!(told(), [(2, "legacy", None)]);
    // In any order, with looks in between.
    let mut random = Random::new(1);
    let mut now = [None; 4];
    let mut known = [None; 4];
    for pid in 1000..20_000 {
        let which = random.below(4) as usize;
        let (member, function) = (1 + which as u32 / 2, ["legacy", "modern"][which % 2]);
        if now[which].take().is_some() {
            go(member, function);
        } else {
            now[which] = Some(pid);
            come(member, function, pid);
        }
        if random.chance(90) {
            continue;
        }
        assert!(events.len() <= 8);
        for (member, function, client) in told() {
            let which = (member as usize - 1) * 2 + usize::from(function == "modern");
            assert_ne!(known[which].is_some(), client.is_some(), "twice the same, before {pid}");
            known[which] = client;
        }
        assert_eq!(known, now, "before {pid}");
    }
}

// --- commands that wait ---------------------------------------------------------------------------------------

/// A command that may go on does so, also when somebody else is busy with its queue at that moment.
#[test]
fn no_wake_is_lost_to_those_who_look() {
    let bed = Bed::new();
    let mut busy = bed.busy(1);
    let stop = Arc::new(AtomicBool::new(false));
    let queue = Arc::clone(bed.group.queue(0).unwrap());
    let looking = {
        let (stop, queue) = (Arc::clone(&stop), Arc::clone(&queue));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = queue.take(Ticket::default(), &mut []);
            }
        })
    };
    let mut lost = None;
    for round in 0..200 {
        let reset = bed.start_write(1, 18, &[0]);
        assert!(reset.ticket.is_some());
        busy.answer(1);
        let begun = Instant::now();
        while !reset.ready() && begun.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_micros(100));
        }
        if !reset.ready() {
            lost = Some(round);
            break;
        }
        assert_eq!(bed.finish(reset).0, OK);
        busy.empty_ring();
        bed.drive(1);
        let before = busy.device.started();
        busy.request(&bed, 0);
        wait_until("in flight", || busy.device.started() == before + 1);
    }
    stop.store(true, Ordering::Relaxed);
    looking.join().unwrap();
    busy.answer(1);
    assert_eq!(
        lost, None,
        "a command was never completed, though its rings had stopped"
    );
}

/// Members whose rings don't stop hold up only themselves: the I/O BAR of another one answers at once.
#[test]
fn a_member_that_waits_holds_up_no_other() {
    let bed = Bed::with(GroupOptions {
        admin_queues: 1,
        ..options()
    });
    let mut hung: Vec<_> = [1, 2].into_iter().map(|id| bed.busy(id)).collect();
    let bars: Vec<_> = hung
        .iter()
        .map(|busy| Forwarder::new(Arc::clone(&bed.group), Arc::clone(&busy.member)).unwrap())
        .collect();
    let other = bed.add(3, blk("ram:1048576"));
    let bar = Forwarder::new(Arc::clone(&bed.group), other).unwrap();
    for bar in &bars {
        assert_eq!(bar.write(18, &[0], &never), Access::Later);
    }
    let mut data = [0xff];
    assert_eq!(bar.read(18, &mut data, &never), Access::Done);
    assert_eq!(data, [0]);
    for busy in &mut hung {
        busy.answer(1);
    }
}

/// DEV_MODE_SET(stop) that fails has stopped nothing: the device serves what comes.
#[test]
fn a_stop_that_failed_has_not_stopped() {
    let bed = Bed::new();
    let mut busy = bed.busy(1);
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[1], 0).0, BUSY);
    busy.answer(1);
    wait_until("used", || busy.ring.used_idx(&busy.guest) == 1);
    assert!(!busy.member.stopped());
    busy.request(&bed, 1);
    wait_until("in flight", || busy.device.started() == 2);
    busy.answer(1);
    wait_until("used", || busy.ring.used_idx(&busy.guest) == 2);
}

/// A ring is told to be stopped only when it has: each command that asks for it has to wait, and fails while it runs.
#[test]
fn a_second_stop_waits_as_the_first() {
    let bed = Bed::new();
    let mut busy = bed.busy(1);
    for _ in 0..2 {
        assert_eq!(bed.write(1, 8, &[0; 4]), BUSY, "the ring still holds its memory");
    }
    busy.answer(1);
    wait_until("stopped", || bed.write(1, 8, &[0; 4]) == OK);
    assert_eq!(busy.ring.used_idx(&busy.guest), 1);
}

/// A reset is over when the ring that runs at its time has ended, whatever older rings report meanwhile. The moment looked
/// at is when the end of the first ring is being told: by then a new ring may run, and be told to stop by another reset.
#[test]
fn the_end_of_a_ring_is_not_that_of_its_successor() {
    let mut seen = false;
    // The successor's worker must not be the one that tells the end of the ring before: one of the two is another.
    for skip in 0..2 {
        let bed = Bed::new();
        let mut busy = bed.busy(1);
        for _ in 0..skip {
            bed.line();
        }
        let third = Arc::new(Mutex::new(None));
        let told = {
            let (member, device, third) = (Arc::clone(&busy.member), Arc::clone(&busy.device), Arc::clone(&third));
            move || -> Waker {
                let (member, device, third) = (Arc::clone(&member), Arc::clone(&device), Arc::clone(&third));
                Box::new(move || {
                    let begun = Instant::now();
                    while device.started() < 2 && begun.elapsed() < Duration::from_millis(300) {
                        std::thread::yield_now();
                    }
                    let progress =
                        (device.started() == 2).then(|| member.legacy_write(18, &[0], false, &never).unwrap());
                    *third.lock().unwrap() = Some(progress);
                })
            }
        };
        assert_eq!(
            busy.member.legacy_write(18, &[0], false, &told).unwrap(),
            Progress::Later
        );
        assert!(busy.member.legacy_write(18, &[0], false, &never).is_ok());
        // The driver goes on with another ring.
        let at = BASE + 0x1_0000;
        let mut next = Ring::legacy(at, 64, 4096);
        request(&busy.guest, &mut next, 1, 0, 0, &[0; 512]);
        bed.write(1, 8, &((at >> 12) as u32).to_le_bytes());
        bed.write(1, 18, &[7]);
        busy.answer(1);
        wait_until("told", || third.lock().unwrap().is_some());
        if *third.lock().unwrap() == Some(Some(Progress::Later)) {
            seen = true;
            std::thread::sleep(A_WHILE);
            assert_eq!(next.used_idx(&busy.guest), 0);
            assert_ne!(bed.read(1, 18, 1), 0, "reset, with a request in flight");
            busy.answer(1);
            wait_until("reset", || bed.read(1, 18, 1) == 0);
            assert_eq!(next.used_idx(&busy.guest), 1, "what was in flight was used");
        } else {
            busy.answer(1);
        }
    }
    assert!(seen, "no successor was running when the end of the first ring was told");
}

// --- clients that come and go ---------------------------------------------------------------------------------

/// What registers say when nobody is attached sets nothing going in the memory of the next client.
#[test]
fn a_new_client_begins_with_a_device_at_rest() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    bed.write(1, 8, &((BASE >> 12) as u32).to_le_bytes());
    bed.write(1, 18, &[7]);
    let guest = Guest::new(BASE, SIZE);
    let mut ring = Ring::legacy(BASE, 64, 4096);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.attach(&member, &guest);
    bed.write(1, 16, &[0, 0]);
    std::thread::sleep(A_WHILE);
    assert!(!member.info().queues[0].started, "its driver hasn't done anything");
    assert_eq!(ring.used_idx(&guest), 0);
}

/// A client gives up accesses that take too long, makes more, and leaves with all of them in its forwarder's queue. They
/// aren't carried out on the device of the client after it, be it that its rings end before its reset has failed or later.
#[test]
fn commands_of_a_client_end_with_it() {
    for later in [false, true] {
        let bed = Bed::new();
        let mut function = None;
        let mut busy = bed.busy_by(1, |member, guest| {
            let legacy = legacy_function(&bed, member);
            legacy.attach(bed.line()).unwrap();
            legacy.dma_map(bed.memory(guest)).unwrap();
            function = Some(legacy);
        });
        let function = function.unwrap();
        let (from, _, _) = bed.group.core().trace.read(0, usize::MAX, Some(1));
        let queued: [(u64, &[u8]); 6] = [
            (18, &[0]),
            (18, &[0x80]),
            (8, &((BASE >> 12) as u32).to_le_bytes()),
            (4, &[0xff; 4]),
            (20, &[1, 0]),
            (18, &[0]),
        ];
        for (offset, data) in queued {
            assert_eq!(function.write(LEGACY_BAR, offset, data, &never), Access::Later);
            function.give_up();
        }
        let mut data = [0; 2];
        assert_eq!(function.read(LEGACY_BAR, 18, &mut data[..1], &never), Access::Later);
        let gone = Calls::default();
        function.detach(gone.completion());
        if later {
            // Longer than a reset waits.
            std::thread::sleep(Duration::from_millis(700));
        }
        assert_eq!(gone.count(), 0, "a request is in flight");
        busy.answer(1);
        wait_until("gone", || gone.count() == 1);
        let modern = Function::modern(Arc::clone(&busy.member)).unwrap();
        modern.attach(bed.line()).unwrap();
        let read = |offset: u64| {
            let mut status = [0xff];
            assert_eq!(modern.read(MODERN_BAR, offset, &mut status, &never), Access::Done);
            status[0]
        };
        assert_eq!(read(DEVICE_STATUS), 0);
        modern.write(MODERN_BAR, 8, &1u32.to_le_bytes(), &never);
        modern.write(MODERN_BAR, 12, &1u32.to_le_bytes(), &never);
        for status in [1, 3, 11, 15] {
            modern.write(MODERN_BAR, DEVICE_STATUS, &[status], &never);
        }
        assert_eq!(read(DEVICE_STATUS), 15);
        std::thread::sleep(A_WHILE);
        assert_eq!(read(DEVICE_STATUS), 15);
        assert!(!busy.member.info().queues[0].started);
        let (_, _, entries) = bed.group.core().trace.read(from, usize::MAX, Some(1));
        let carried_out: Vec<_> = entries
            .iter()
            .filter(|(_, entry)| matches!(entry.origin, Origin::Bar0(_)))
            .map(|(_, entry)| (entry.offset, entry.write))
            .collect();
        assert!(carried_out.len() <= 1, "only the reset had been begun: {carried_out:?}");
        // The forwarder is as good as new for the next one of its kind.
        let gone = Calls::default();
        modern.detach(gone.completion());
        wait_until("gone", || gone.count() == 1);
        function.attach(bed.line()).unwrap();
        assert_eq!(function.read(LEGACY_BAR, 18, &mut data[..1], &never), Access::Done);
        assert_eq!(data[0], 0);
        assert_eq!(function.write(LEGACY_BAR, 18, &[1], &never), Access::Done);
        assert_eq!(bed.read(1, 18, 1), 1);
    }
}

/// Memory is told to be free when nothing uses it any more, also by rings that had been told to stop before; from then on
/// nothing is written there.
#[test]
fn unmapping_waits_for_rings_that_are_stopping() {
    let bed = Bed::new();
    let mut function = None;
    let mut busy = bed.busy_by(1, |member, guest| {
        let legacy = legacy_function(&bed, member);
        legacy.attach(bed.line()).unwrap();
        legacy.dma_map(bed.memory(guest)).unwrap();
        function = Some(legacy);
    });
    let function = function.unwrap();
    assert_eq!(function.reset(&never), Access::Later);
    function.give_up();
    let ended = Calls::default();
    let unmap = function.dma_unmap(BASE, SIZE, &|| ended.waker());
    assert!(matches!(unmap, Ok(Access::Later)), "{unmap:?}");
    std::thread::sleep(A_WHILE);
    assert_eq!(ended.count(), 0, "the storage hasn't answered");
    busy.answer(1);
    wait_until("unmapped", || ended.count() == 1);
    let before = busy.guest.read(BASE, SIZE as usize);
    assert_eq!(function.resume(&mut [], &never), Access::Done);
    std::thread::sleep(A_WHILE);
    let after = busy.guest.read(BASE, SIZE as usize);
    let written = before.iter().zip(&after).position(|(before, after)| before != after);
    assert_eq!(
        written, None,
        "offset of what was written after the memory had been let go of"
    );
}

/// What the owner's guest had asked for before its reset isn't in force after it: none of the commands in its queue are
/// carried out when the reset is over.
#[test]
fn no_command_outlives_the_owners_reset() {
    let bed = Bed::new();
    bed.add(1, blk("ram:1048576"));
    let owner = owner_with(&bed, false, 1);
    let guest = Guest::new(BASE, SIZE);
    owner.attach_function(Front::Owner, bed.line()).unwrap();
    owner.add_memory(bed.memory(&guest)).unwrap();
    let put = |offset: usize, data: &[u8]| {
        owner.modern_write(offset, data, &never);
    };
    let begun = Instant::now();
    let mut round = 0u64;
    while begun.elapsed() < Duration::from_secs(3) {
        round += 1;
        let mut ring = Ring::legacy(BASE, 128, 4096);
        guest.write(ring.addresses.driver, &[0; 4]);
        guest.write(ring.addresses.device, &[0; 4]);
        put(20, &[3]);
        put(8, &1u32.to_le_bytes());
        put(12, &(1u32 | 1 << 9).to_le_bytes());
        put(20, &[11]);
        put(22, &[2, 0]);
        put(32, &ring.addresses.desc.to_le_bytes());
        put(40, &ring.addresses.driver.to_le_bytes());
        put(48, &ring.addresses.device.to_le_bytes());
        put(28, &[1, 0]);
        put(20, &[15]);
        // Lists with more than those that are used after reset.
        guest.write(DATA, &header(command::LIST_USE, command::SR_IOV, 0));
        guest.write(DATA + 24, &(command::LEGACY | 3).to_le_bytes());
        for n in 0..60u16 {
            ring.descriptor(&guest, n * 2, DATA, 32, NEXT, n * 2 + 1);
            ring.descriptor(&guest, n * 2 + 1, DATA + 64, 8, WRITE, 0);
            ring.offer(&guest, n * 2);
        }
        owner.notify(2);
        // The reset comes at all times of the queue's work.
        let spin = Instant::now();
        while spin.elapsed() < Duration::from_nanos(500 * (round % 200)) {
            std::hint::spin_loop();
        }
        put(20, &[0]);
        let mut status = [1];
        let asked = Instant::now();
        while status != [0] {
            assert!(
                asked.elapsed() < Duration::from_secs(5),
                "round {round}: the reset never ends"
            );
            owner.modern_read(20, &mut status);
        }
        let used = bed.group.info().used[1][1];
        assert_eq!(used, 3, "round {round}");
    }
    assert!(round > 10);
}

// --- interrupts -----------------------------------------------------------------------------------------------

/// Masking and unmasking INTx while nothing is pending interrupts nobody; while something is, it does.
#[test]
fn unmasking_interrupts_only_for_what_is_pending() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    let function = legacy_function(&bed, &member);
    function.attach(bed.line()).unwrap();
    function.dma_map(bed.memory(&guest)).unwrap();
    let intx = Arc::new(sys::eventfd().unwrap());
    let fds = vec![Some(Arc::clone(&intx))];
    let (index, start) = (IRQ_INTX, 0);
    assert!(function.set_irqs(IrqChange::Assign { index, start, fds }).is_ok());
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[1; 512]);
    function.write(LEGACY_BAR, 16, &[0, 0], &never);
    wait_until("used", || ring.used_idx(&guest) == 1);
    wait_until("interrupted", || sys::eventfd_drain(intx.as_raw_fd()));
    let isr = || {
        let mut isr = [0];
        assert_eq!(function.read(LEGACY_BAR, 19, &mut isr, &never), Access::Done);
        isr[0]
    };
    assert_eq!(isr(), 1);
    let disable = |on: bool| {
        function.write(CONFIG_REGION, 4, &[0x07, if on { 0x04 } else { 0 }], &never);
    };
    let interrupts = || {
        std::thread::sleep(Duration::from_millis(5));
        let mut signals = Vec::new();
        function.take_signals(&mut signals);
        sys::eventfd_drain(intx.as_raw_fd()) || !signals.is_empty()
    };
    // As a VMM in a guest does: disabled in the interrupt, the ISR read by the driver, enabled again.
    for round in 0..10 {
        disable(true);
        assert_eq!(isr(), 0);
        disable(false);
        assert!(!interrupts(), "round {round}: nothing was pending");
    }
    disable(true);
    request(&guest, &mut ring, 1, 0, 0, &[1; 512]);
    function.write(LEGACY_BAR, 16, &[0, 0], &never);
    wait_until("used", || ring.used_idx(&guest) == 2);
    assert!(!interrupts(), "disabled");
    disable(false);
    wait_until("interrupted", interrupts);
    assert_eq!(isr(), 1);
}

/// A client that triggers all vectors, as often as a visit of its worker lets it.
struct Flood {
    fd: OwnedFd,
    function: Arc<Function>,
    seen: Arc<Mutex<Option<(Duration, usize, usize)>>>,
}

impl Source for Flood {
    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
    fn interest(&self) -> Interest {
        Interest {
            read: true,
            write: false,
        }
    }
    fn ready(&mut self, io: &mut SourceIo<'_>) -> Flow {
        let begun = Instant::now();
        // As many messages as a visit of the server's takes; then the signals.
        for _ in 0..32 {
            let (index, start, count) = (IRQ_MSIX, 0, 2048);
            let _ = self.function.set_irqs(IrqChange::Trigger { index, start, count });
        }
        let mut signals = Vec::new();
        self.function.take_signals(&mut signals);
        for fd in &signals {
            io.signal(fd);
        }
        let took = begun.elapsed();
        let count = signals.len();
        signals.sort_by_key(Arc::as_ptr);
        signals.dedup_by(|one, other| Arc::ptr_eq(one, other));
        self.seen.lock().unwrap().get_or_insert((took, count, signals.len()));
        Flow::Wait
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn end(&mut self) {}
}

/// However often vectors are triggered, each is signalled at most once when signals are taken, and its worker isn't held.
#[test]
fn triggered_vectors_are_signalled_once() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let options = MemberOptions {
        legacy: true,
        vectors: 2048,
        ..MemberOptions::default()
    };
    let member = Member::new(Arc::clone(&pool), 1, blk("ram:1048576"), options);
    let function = Function::modern(Arc::clone(&member)).unwrap();
    let line = pool.add_source(|_| Box::new(Quiet(sys::eventfd().unwrap())));
    function.attach(line).unwrap();
    // SAFETY: plain numbers.
    unsafe {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max.min(8192);
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
    let fds: Vec<_> = (0..2048).map(|_| Some(Arc::new(sys::eventfd().unwrap()))).collect();
    let assign = IrqChange::Assign {
        index: IRQ_MSIX,
        start: 0,
        fds: fds.clone(),
    };
    assert!(function.set_irqs(assign).is_ok());
    let seen = Arc::new(Mutex::new(None));
    let flood = Flood {
        fd: sys::eventfd().unwrap(),
        function,
        seen: Arc::clone(&seen),
    };
    pool.add_source(|_| Box::new(flood));
    wait_until("visited", || seen.lock().unwrap().is_some());
    let (took, signals, vectors) = seen.lock().unwrap().unwrap();
    assert_eq!((signals, vectors), (2048, 2048));
    assert!(took < Duration::from_secs(1), "one visit held the worker for {took:?}");
    // All of them do arrive.
    for fd in fds.iter().flatten() {
        wait_until("signalled", || sys::eventfd_drain(fd.as_raw_fd()));
    }
}

/// Changes of a member's interrupt, as fast as they can be made and for many rings, leave the workers to others too.
#[test]
fn changes_of_interrupts_hold_up_no_other_member() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let make = |id: u32, queues: u16| {
        let options = BlkOptions {
            queues,
            queue_size: 16,
            blk_size: 512,
            serial: String::new(),
        };
        let device = Arc::new(Blk::new(Image::open("ram:1048576", false).unwrap(), options).unwrap());
        let options = MemberOptions {
            legacy: true,
            vectors: 0,
            ..MemberOptions::default()
        };
        let member = Member::new(Arc::clone(&pool), id, device, options);
        let guest = Guest::new(BASE, SIZE);
        let line = pool.add_source(|_| Box::new(Quiet(sys::eventfd().unwrap())));
        member.attach_function(Front::Legacy, line).unwrap();
        let fd = peer(&guest.file);
        let region = pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap();
        member.add_memory(region).unwrap();
        for queue in 0..queues {
            let pfn = ((BASE + u64::from(queue) * 0x2000) >> 12) as u32;
            member.legacy_write(14, &queue.to_le_bytes(), false, &never).unwrap();
            member.legacy_write(8, &pfn.to_le_bytes(), false, &never).unwrap();
        }
        member.legacy_write(18, &[7], false, &never).unwrap();
        (member, guest)
    };
    let (restless, _memory) = make(1, 32);
    let (other, guest) = make(2, 1);
    let mut ring = Ring::legacy(BASE, 16, 4096);
    let intx = Arc::new(sys::eventfd().unwrap());
    let stop = AtomicBool::new(false);
    let (mut worst, mut count) = (Duration::ZERO, 0u16);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                restless.set_intx(None);
                restless.set_intx(Some(Arc::clone(&intx)));
            }
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(1500) {
            request(&guest, &mut ring, count % 5, 0, 0, &[0; 512]);
            count = count.wrapping_add(1);
            let sent = Instant::now();
            other.notify(0);
            while ring.used_idx(&guest) != count && sent.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_micros(50));
            }
            worst = worst.max(sent.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        worst < Duration::from_secs(2),
        "the slowest of {count} requests took {worst:?}"
    );
    assert_eq!(ring.used_idx(&guest), count);
}

/// The driver hears of a configuration change that came while its device was stopped, once it goes on.
#[test]
fn a_configuration_change_waits_for_a_stopped_device() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    bed.drive(1);
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[1], 0).0, OK);
    member.config_changed();
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[0], 0).0, OK);
    wait_until("told", || bed.read(1, 19, 1) & 2 == 2);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.read(1, 19, 1), 0, "told once");
}

// --- the owner's books ----------------------------------------------------------------------------------------

fn entry() -> Entry {
    Entry {
        at: SystemTime::now(),
        member: 1,
        origin: Origin::Admin,
        write: false,
        opcode: Some(3),
        offset: 0,
        width: 1,
        value: None,
        status: 0,
        qualifier: 0,
        nanoseconds: 0,
    }
}

/// `lost` counts entries that were asked for and have been overwritten, and no others.
#[test]
fn lost_trace_entries_are_those_asked_for() {
    let trace = Trace::default();
    let entry = entry();
    // Eight queues, evenly: twice the capacity. Numbers below 65536 are forgotten.
    for n in 0..(1usize << 17) {
        trace.push(n % 8, entry);
    }
    for (since, lost) in [(0, 65_536), (60_000, 5_536), (65_535, 1), (65_536, 0), (100_000, 0)] {
        let (_, counted, entries) = trace.read(since, 10, None);
        assert_eq!((counted, entries[0].0), (lost, since.max(65_536)));
    }
}

/// Any limit will do.
#[test]
fn a_trace_can_be_read_without_limit() {
    let trace = Trace::default();
    assert_eq!(trace.read(0, usize::MAX, None).2.len(), 0);
    trace.push(0, entry());
    for since in [0, 1, u64::MAX] {
        assert_eq!(trace.read(since, usize::MAX, None).2.len(), usize::from(since == 0));
        assert_eq!(trace.read(since, 0, None).2.len(), 0);
    }
}

/// Where notifications go is known once LEGACY_NOTIFY_INFO could be asked, not before: with VF Enable = 0 it can't be.
#[test]
fn the_notify_region_is_found_when_it_is_there() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let bar = Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap();
    bed.group.core().set_vfs(false, 1);
    bar.write(16, &[0, 0], &never);
    bed.group.core().set_vfs(true, 1);
    assert_eq!(bar.write(16, &[0, 0], &never), Access::Done);
    let (_, _, trace) = bed.group.core().trace.read(0, 1000, Some(1));
    assert_eq!(trace.last().unwrap().1.opcode, None, "not by a command");
}

/// Parts that don't go together are refused, also when they come one after the other.
#[test]
fn parts_are_checked_against_those_before() {
    let bed = Bed::new();
    let options = MemberOptions {
        legacy: true,
        packed: true,
        vectors: 3,
        ..MemberOptions::default()
    };
    let member = Member::new(Arc::clone(&bed.pool), 1, blk("ram:1048576"), options);
    bed.group.add(Arc::clone(&member)).unwrap();
    let part = |part_type: u16, value: Vec<u8>| Part {
        part_type,
        flags: 0,
        selector: [0; 8],
        value,
    };
    member.stop_device(&never);
    // An enabled queue, as it is for a split ring: a packed one has positions.
    let mut queue = vec![0u8; 32];
    queue[..6].copy_from_slice(&[64, 0, 0xff, 0xff, 1, 0]);
    queue[8..16].copy_from_slice(&BASE.to_le_bytes());
    queue[16..24].copy_from_slice(&(BASE + 0x1000).to_le_bytes());
    queue[24..32].copy_from_slice(&(BASE + 0x2000).to_le_bytes());
    let queue = part(0x104, queue);
    let features = part(0x101, ((1u64 << 32) | (1 << 34)).to_le_bytes().to_vec());
    assert!(member.set_parts(&[features.clone(), queue.clone()]).is_err());
    assert!(member.set_parts(&[queue]).is_ok());
    assert!(
        member.set_parts(&[features]).is_err(),
        "a packed ring without a position"
    );
}

// --- everything at once ---------------------------------------------------------------------------------------

/// Accesses and commands that never end are found after this.
const NEVER: Duration = Duration::from_secs(5);

/// Registers that do something, of the BARs: offset and width.
const MODERN_FIELDS: [(u64, usize); 18] = [
    (0, 4),
    (4, 4),
    (8, 4),
    (12, 4),
    (16, 2),
    (20, 1),
    (20, 1),
    (20, 1),
    (22, 2),
    (24, 2),
    (26, 2),
    (28, 2),
    (28, 2),
    (32, 8),
    (40, 8),
    (48, 8),
    (58, 2),
    (NOTIFY_OFFSET as u64, 2),
];
const LEGACY_FIELDS: [(u64, usize); 12] = [
    (4, 4),
    (8, 4),
    (8, 4),
    (14, 2),
    (16, 2),
    (16, 2),
    (18, 1),
    (18, 1),
    (18, 1),
    (19, 1),
    (20, 2),
    (22, 2),
];

/// A client that does anything a client, its guest and the owner's driver can, in any order.
struct Anyone<'a> {
    bed: &'a Bed,
    function: &'a Function,
    random: Random,
    guest: Guest,
    mapped: Vec<(u64, u64)>,
    woken: Calls,
    data: [u8; 8],
    width: usize,
}

impl Anyone<'_> {
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.random.below(of.len() as u64) as usize]
    }

    fn run(&mut self, end: Instant) {
        let line = self.bed.line();
        let mut attached = false;
        while Instant::now() < end {
            if !attached {
                if self.function.attach(line.clone()).is_err() {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                attached = true;
                self.mapped.clear();
            }
            if self.random.chance(1) {
                let gone = Calls::default();
                self.function.detach(gone.completion());
                wait_until("detached", || gone.count() == 1);
                attached = false;
                continue;
            }
            let before = self.woken.count();
            if self.act() == Access::Later {
                self.go_on(before);
            }
            let mut signals = Vec::new();
            self.function.take_signals(&mut signals);
            self.bed.pool.events().take();
        }
        if attached {
            let gone = Calls::default();
            self.function.detach(gone.completion());
            wait_until("detached", || gone.count() == 1);
        }
    }

    fn act(&mut self) -> Access {
        let woken = self.woken.clone();
        let wake = move || woken.waker();
        self.width = self.pick(&[1, 2, 4, 8]);
        match self.random.below(100) {
            0..=3 => self.map(),
            4 => match self.mapped.pop() {
                Some((at, size)) => return self.function.dma_unmap(at, size, &wake).unwrap(),
                None => return Access::Done,
            },
            5 => return self.function.reset(&wake),
            6..=9 => self.interrupts(),
            10..=19 => self.scribble(),
            20..=29 => self.command(),
            30..=39 => self.move_parts(),
            40..=54 => return self.config(&wake),
            55..=74 => return self.bar(MODERN_BAR, &wake),
            _ => return self.bar(LEGACY_BAR, &wake),
        }
        Access::Done
    }

    /// Waits for the access, if the client has the patience.
    fn go_on(&mut self, before: usize) {
        let begun = Instant::now();
        let mut seen = before;
        loop {
            let count = self.woken.count();
            if count > seen {
                seen = count;
                let woken = self.woken.clone();
                let again = self.function.resume(&mut self.data[..self.width], &|| woken.waker());
                if again != Access::Later {
                    return;
                }
            }
            if self.random.below(10_000) == 0 {
                self.function.give_up();
                return;
            }
            let kind = self.function.kind();
            assert!(begun.elapsed() < NEVER, "an access to a {kind} function never ends");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn map(&mut self) {
        let at = BASE + self.random.below(8) * 0x2_0000;
        let size = 0x2_0000 * (1 + self.random.below(3));
        if at + size > BASE + SIZE {
            return;
        }
        let fd = peer(&self.guest.file);
        let mappings = self.bed.pool.mappings();
        let region = mappings.region(&fd, at, size, at, at - BASE).unwrap();
        if self.function.dma_map(region).is_ok() {
            self.mapped.push((at, size));
        }
    }

    fn interrupts(&mut self) {
        let index = self.pick(&[IRQ_INTX, IRQ_MSIX, 1]);
        let (start, count) = (self.random.below(4) as u32, self.random.below(4) as u32);
        let fds = || (0..count).map(|_| Some(Arc::new(sys::eventfd().unwrap()))).collect();
        let change = match self.random.below(5) {
            0 => IrqChange::Assign {
                index,
                start,
                fds: fds(),
            },
            1 => IrqChange::Disable { index },
            2 => IrqChange::Mask { index, start, count },
            3 => IrqChange::Unmask { index, start, count },
            _ => IrqChange::Trigger { index, start, count },
        };
        // Kinds and vectors that aren't there are refused.
        let _ = self.function.set_irqs(change);
    }

    /// Something where rings may be.
    fn scribble(&mut self) {
        let at = BASE + self.random.below(8) * 0x1000 + self.random.below(0x1000 - 16);
        let mut bytes = [0; 16];
        if self.random.chance(50) {
            bytes[..8].copy_from_slice(&self.random.next().to_le_bytes());
            bytes[8..].copy_from_slice(&self.random.next().to_le_bytes());
        }
        self.guest.write(at, &bytes);
    }

    /// A command of the owner's driver.
    fn command(&mut self) {
        let opcode = match self.random.below(10) {
            0 => 0x3e + self.random.below(3) as u16,
            _ => self.random.below(0x12) as u16,
        };
        let kind = u16::from(self.random.chance(85));
        let id = match self.function.member_id() {
            id if id != 0 && self.random.chance(50) => u64::from(id),
            _ => self.random.below(5),
        };
        let mut body = vec![0u8; self.random.below(80) as usize];
        for byte in &mut body {
            if self.random.chance(30) {
                *byte = (self.random.below(4) * self.random.below(30)) as u8;
            }
        }
        if let (Some(first), true) = (body.first_mut(), opcode < 6) {
            *first = self.random.below(26) as u8;
        }
        if opcode == command::LIST_USE {
            body = self.bed.group.core().supported(kind).to_le_bytes().to_vec();
        }
        let room = self.random.below(700) as usize;
        let mut out = vec![0xaa; room];
        let queue = self.bed.group.queue(self.random.below(2) as usize).unwrap();
        let done = Calls::default();
        let head = header(opcode, kind, id);
        let begun = Instant::now();
        match queue.submit(&[&head, &body], &mut out, Origin::Admin, Begun::now(), || done.waker()) {
            Ok(Submitted::Done(written)) => assert!(written <= room),
            Ok(Submitted::Later(ticket)) => {
                while done.count() == 0 {
                    assert!(begun.elapsed() < NEVER, "command {opcode:#x} on {id} never ends");
                    std::thread::sleep(Duration::from_micros(50));
                }
                assert!(queue.take_all(ticket).is_some());
                assert_eq!(done.count(), 1);
            }
            // The queue is full: others have much to do.
            Err(_) => {}
        }
    }

    /// Some parts of a member for another, changed a bit.
    fn move_parts(&mut self) {
        let from = self.bed.group.member(1 + self.random.below(3) as u32).unwrap();
        let mut data = vec![0, 0, 0, 0, 1, 0, 0, 0];
        for part in from.parts() {
            if self.random.chance(80) {
                data.extend(part.header());
                data.extend(&part.value);
            }
        }
        if self.random.chance(50) {
            let at = self.random.below(data.len() as u64) as usize;
            data[at] = self.random.next() as u8;
        }
        let to = 1 + self.random.below(3);
        let mut create = vec![0; 24];
        (create[4], create[16]) = (1, 1);
        let stop = u8::from(self.random.chance(70));
        self.send(0x9, command::SELF, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 4, 4]);
        self.send(0xa, command::SR_IOV, to, &create);
        self.send(0x11, command::SR_IOV, to, &[stop]);
        self.send(0x10, command::SR_IOV, to, &data);
        self.send(0x11, command::SR_IOV, to, &[0]);
    }

    /// A command whose result nobody asks for.
    fn send(&self, opcode: u16, kind: u16, member: u64, data: &[u8]) {
        let head = header(opcode, kind, member);
        let queue = self.bed.group.queue(0).unwrap();
        let submitted = queue.submit(&[&head, data], &mut [0; 8], Origin::Admin, Begun::now(), never);
        if let Ok(Submitted::Later(ticket)) = submitted {
            queue.abandon(ticket);
        }
    }

    fn value(&mut self) -> u64 {
        match self.random.below(6) {
            0 => self.random.next(),
            1 => 0,
            2 => 1 << self.random.below(64),
            3 => BASE >> 12,
            4 => BASE + self.random.below(16) * 0x1000,
            _ => self.random.below(32),
        }
    }

    fn access(&mut self, write: bool, region: u32, offset: u64, value: u64, wake: &dyn Fn() -> Waker) -> Access {
        self.data = value.to_le_bytes();
        let data = &mut self.data[..self.width];
        if write {
            self.function.write(region, offset, data, wake)
        } else {
            self.function.read(region, offset, data, wake)
        }
    }

    fn config(&mut self, wake: &dyn Fn() -> Waker) -> Access {
        let offset = if self.random.chance(60) {
            self.random.below(0x110)
        } else {
            self.pick(&[4, 0x40, 0x60, 0x108, 0x110]) + self.random.below(64)
        };
        self.width = self.width.min(4);
        let value = self.value();
        let write = self.random.chance(50);
        self.access(write, CONFIG_REGION, offset, value, wake)
    }

    fn bar(&mut self, bar: u32, wake: &dyn Fn() -> Waker) -> Access {
        let size = self.function.region(bar).size;
        let offset = match (self.random.chance(70), bar) {
            (true, MODERN_BAR) => {
                let (offset, width) = self.pick(&MODERN_FIELDS);
                self.width = width;
                offset
            }
            (true, _) => {
                let (offset, width) = self.pick(&LEGACY_FIELDS);
                self.width = width;
                offset
            }
            (false, MODERN_BAR) => self.pick(&[0, 0, 0, 0x1000, 0x2000, 0x3000]) + self.random.below(64),
            (false, _) => self.random.below(84),
        };
        // The function may have no such BAR. What lies beyond is kept away by the server.
        if offset + self.width as u64 > size {
            return Access::Done;
        }
        let value = match offset {
            0x3000 | 14 | 16 | 22 => self.random.below(5),
            18 | 20 if self.random.chance(80) => self.pick(&[0, 1, 3, 7, 11, 15]),
            24 => 1 << self.random.below(11),
            28 | 58 => 1,
            _ => self.value(),
        };
        let write = self.random.chance(75);
        self.access(write, bar, offset, value, wake)
    }
}

/// Whatever clients and drivers do, and at the same time: nothing panics, each access and each command ends, and so does
/// each client's leaving.
#[test]
fn anything_at_any_time() {
    const SEED: u64 = 1;
    let panics = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&panics);
    let print = std::panic::take_hook();
    // Workers survive panics, so they are looked for here.
    std::panic::set_hook(Box::new(move |info| {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(info.to_string());
        print(info);
    }));
    let bed = Bed::new();
    let mut functions = Vec::new();
    for id in 1..=3 {
        let options = MemberOptions {
            legacy: true,
            packed: id != 1,
            vectors: 3,
            ..MemberOptions::default()
        };
        let member = Member::new(Arc::clone(&bed.pool), id, blk("ram:1048576"), options);
        bed.group.add(Arc::clone(&member)).unwrap();
        let ports: Arc<dyn IoPorts> = Arc::new(Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap());
        functions.push(match id {
            1 => Function::legacy(member, ports).unwrap(),
            2 => Function::transitional(member, ports).unwrap(),
            _ => Function::modern(member).unwrap(),
        });
    }
    let owner = owner_with(&bed, true, 2);
    functions.push(Function::owner(owner, Arc::clone(&bed.group) as Arc<dyn VfControl>).unwrap());
    let end = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        for (index, function) in functions.iter().enumerate() {
            let bed = &bed;
            scope.spawn(move || {
                let mut anyone = Anyone {
                    bed,
                    function,
                    random: Random::new(SEED * 100 + index as u64),
                    guest: Guest::new(BASE, SIZE),
                    mapped: Vec::new(),
                    woken: Calls::default(),
                    data: [0; 8],
                    width: 0,
                };
                anyone.run(end);
            });
        }
    });
    let _ = std::panic::take_hook();
    let panics = panics.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(panics.is_empty(), "{panics:?}");
    let commands = bed.group.info().commands;
    assert!(commands.len() >= 18, "not everything was done: {commands:?}");
}

#[test]
fn functions_that_come_and_go_in_turn_take_no_room() {
    let events = Events::new().unwrap();
    for _ in 0..10_000 {
        for function in ["modern", "legacy"] {
            events.push(Event::FunctionConnected {
                member: 1,
                function,
                peer_pid: None,
            });
        }
        for function in ["modern", "legacy"] {
            events.push(Event::FunctionDisconnected {
                member: 1,
                function,
                reason: String::new(),
            });
        }
    }
    assert!(events.room() < 100, "{}", events.room());
    let left = events.take();
    assert!(
        matches!(left.last(), Some(Event::FunctionDisconnected { .. })),
        "{left:?}"
    );
    assert!(left.len() <= 4, "{left:?}");
}
