// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log of written pages: what is marked, when, and what is not.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{memfd, peer, Guest, Ring, NEXT, USER, WRITE};
use vhu_core::device::{ConfigField, Device, QueueContext, Request, Step};
use vhu_core::dirty::DirtyLog;
use vhu_core::error::Fault;
use vhu_core::event::Event;
use vhu_core::member::{Member, MemberOptions};
use vhu_core::memory::{MappingCache, MemoryMap};
use vhu_core::ring::any::fresh_position;
use vhu_core::ring::feature;
use vhu_core::ring::split::{AddressSpace, RingAddresses};
use vhu_core::runner::{Call, QueueSetup, QueueStats, Runner};
use vhu_core::sys;
use vhu_core::uring::Uring;
use vhu_core::worker::Pool;

const PAGE: u64 = 4096;
const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x10_0000;
/// The ring; its used part is in the second page.
const RING: u64 = BASE;
/// Buffers, three pages for each descriptor.
const DATA: u64 = BASE + 0x4_0000;
const NONE: [u64; 0] = [];

/// Waits, then writes its status, as the block device does.
struct Waiter;

impl Device for Waiter {
    fn type_name(&self) -> &'static str {
        "waiter"
    }
    fn device_id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        0
    }
    fn known_features(&self) -> u64 {
        0
    }
    fn queues(&self) -> u16 {
        1
    }
    fn queue_size(&self) -> u16 {
        1024
    }
    fn config_fields(&self) -> &'static [ConfigField] {
        &[]
    }
    fn config_size(&self) -> usize {
        0
    }
    fn legacy_config_size(&self) -> usize {
        0
    }
    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }
    fn write_config(&self, _offset: usize, _data: &[u8]) -> Result<bool, Fault> {
        Ok(false)
    }
    fn fresh(&self) {}
    fn start(&self, request: &mut Request, context: &QueueContext<'_>) -> Result<Step, Fault> {
        request.scratch.status = request.chain.writable.pop_last_byte();
        if context.waker.is_none() {
            return Ok(Self::end(request));
        }
        let _slot = context.waker();
        Ok(Step::Wait)
    }
    fn resume(&self, request: &mut Request, _context: &QueueContext<'_>, result: i32) -> Step {
        if result > 0 {
            // A part is done; the rest comes.
            request.chain.writable.trim_front(result as u64);
            return Step::Wait;
        }
        Self::end(request)
    }
    fn counter_names(&self) -> &'static [&'static str] {
        &[]
    }
    fn failed_counter(&self) -> usize {
        0
    }
}

impl Waiter {
    fn end(request: &Request) -> Step {
        if let Some(status) = &request.scratch.status {
            status.set(0);
        }
        Step::Done(request.chain.writable.len() as u32 + 1)
    }
}

struct Log {
    file: File,
    log: Arc<DirtyLog>,
}

impl Log {
    fn new(pages: u64) -> Self {
        let size = pages.div_ceil(8);
        let file = memfd(size);
        let log = DirtyLog::map(&MappingCache::default(), &peer(&file), size, 0).unwrap();
        Self {
            file,
            log: Arc::new(log),
        }
    }

    fn all() -> Self {
        Self::new((BASE + SIZE) / PAGE)
    }

    /// The pages that are marked, as addresses; no more afterwards.
    fn take(&self) -> Vec<u64> {
        let len = self.file.metadata().unwrap().len();
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        self.file.write_all_at(&vec![0; len as usize], 0).unwrap();
        (0..8 * len)
            .filter(|bit| bytes[(bit / 8) as usize] & 1 << (bit % 8) != 0)
            .map(|page| page * PAGE)
            .collect()
    }
}

struct Bed {
    guest: Guest,
    ring: Ring,
    runner: Runner,
    uring: Uring,
    slots: Arc<Mutex<Vec<u16>>>,
    /// The page of the used ring.
    used: u64,
}

impl Bed {
    fn new(log: Option<&Log>, ordered: bool) -> Self {
        let guest = Guest::new(BASE, SIZE);
        let ring = Ring::legacy(RING, 16, PAGE);
        let setup = QueueSetup {
            index: 0,
            size: 16,
            addresses: ring.addresses,
            space: AddressSpace::Guest,
            position: fresh_position(false),
            driver_features: feature::VERSION_1 | feature::EVENT_IDX,
            inflight: None,
            ordered,
            log: log.map(|log| Arc::clone(&log.log)),
            call: Call::default(),
            stats: Arc::new(QueueStats::default()),
        };
        let mut runner = Runner::new(Arc::new(Waiter), Arc::clone(&guest.map), setup).unwrap();
        let slots: Arc<Mutex<Vec<u16>>> = Arc::default();
        let told = Arc::clone(&slots);
        runner.set_wakers(Arc::new(move |slot| {
            told.lock().unwrap().push(slot);
            Box::new(|| {})
        }));
        let used = ring.addresses.device;
        Self {
            guest,
            ring,
            runner,
            uring: Uring::new(4).unwrap(),
            slots,
            used,
        }
    }

    fn data(index: u16) -> u64 {
        DATA + 3 * PAGE * u64::from(index)
    }

    /// A request: a readable page, a writable page, a status byte in a third. Taken at once.
    fn offer(&mut self, index: u16) {
        let (data, first) = (Self::data(index), 3 * index);
        self.ring.descriptor(&self.guest, first, data, 16, NEXT, first + 1);
        self.ring.descriptor(
            &self.guest,
            first + 1,
            data + PAGE,
            PAGE as u32,
            NEXT | WRITE,
            first + 2,
        );
        self.ring
            .descriptor(&self.guest, first + 2, data + 2 * PAGE, 1, WRITE, 0);
        self.ring.offer(&self.guest, first);
        assert_eq!(self.runner.take(&mut self.uring).unwrap(), 1);
    }

    fn resume(&mut self, which: usize, result: i32) {
        let slot = self.slots.lock().unwrap()[which];
        self.runner
            .complete(Runner::user_data(0, slot), result, &mut self.uring);
    }

    fn written(index: u16) -> [u64; 2] {
        [Self::data(index) + PAGE, Self::data(index) + 2 * PAGE]
    }

    fn map(&self, guest_file: &File, offset: u64) -> Arc<MemoryMap> {
        let region = MappingCache::default()
            .region(&peer(guest_file), BASE, SIZE - offset, BASE + USER, offset)
            .unwrap();
        Arc::new(MemoryMap::default().with(region).unwrap())
    }
}

#[test]
fn what_a_request_writes_and_the_used_ring() {
    for ordered in [false, true] {
        let log = Log::all();
        let mut bed = Bed::new(Some(&log), ordered);
        assert_eq!(
            log.take(),
            [bed.used],
            "whoever had the ring before may have left it unmarked"
        );
        bed.offer(0);
        bed.offer(1);
        assert_eq!(log.take(), NONE, "nothing was written yet");
        bed.resume(1, 0);
        assert_eq!(
            log.take(),
            Bed::written(1),
            "marked when it is written, whenever it is used"
        );
        bed.runner.publish(&mut bed.uring);
        assert_eq!(log.take(), if ordered { vec![] } else { vec![bed.used] });
        bed.resume(0, 0);
        bed.runner.publish(&mut bed.uring);
        let [data, status] = Bed::written(0);
        assert_eq!(log.take(), [bed.used, data, status]);
        bed.runner.enable_notification();
        assert_eq!(log.take(), [bed.used], "avail_event");
    }
}

#[test]
fn on_and_off_while_requests_are_in_flight() {
    let mut bed = Bed::new(None, false);
    let log = Log::all();
    bed.offer(0);
    bed.offer(1);
    bed.offer(2);
    bed.runner.set_log(Some(Arc::clone(&log.log)));
    assert_eq!(log.take(), [bed.used]);
    bed.resume(0, 0);
    assert_eq!(log.take(), Bed::written(0), "taken before there was a log");
    bed.runner.set_log(None);
    bed.resume(1, 0);
    bed.runner.publish(&mut bed.uring);
    bed.runner.enable_notification();
    assert_eq!(log.take(), NONE, "switched off");
    bed.offer(3);
    bed.runner.set_log(Some(Arc::clone(&log.log)));
    log.take();
    bed.resume(3, 0);
    bed.resume(2, 0);
    assert_eq!(log.take(), [Bed::written(2), Bed::written(3)].concat());
}

#[test]
fn a_log_in_the_place_of_another_has_what_neither_was_told_yet() {
    let first = Log::all();
    let mut bed = Bed::new(Some(&first), false);
    bed.offer(0);
    // The page is written, the request isn't done: QEMU makes a larger log when memory is plugged.
    bed.resume(0, PAGE as i32);
    let second = Log::all();
    bed.runner.set_log(Some(Arc::clone(&second.log)));
    first.take();
    second.take();
    bed.resume(0, 0);
    assert_eq!(first.take(), NONE);
    assert_eq!(second.take(), Bed::written(0));
}

#[test]
fn memory_changes_while_requests_are_in_flight() {
    for early in [true, false] {
        let log = Log::all();
        let mut bed = Bed::new(early.then_some(&log), false);
        bed.offer(0);
        bed.offer(1);
        // The same memory at another place in this process.
        let map = bed.map(&bed.guest.file, 0);
        bed.runner.set_memory(map).unwrap();
        assert!(!bed.runner.suspended());
        if !early {
            bed.runner.set_log(Some(Arc::clone(&log.log)));
        }
        log.take();
        bed.resume(0, 0);
        assert_eq!(
            log.take(),
            Bed::written(0),
            "it has written to the old mapping, of the same memory"
        );
        // Without the ring for a while: it is used where it was, which is the guest's memory all the same.
        let elsewhere = bed.map(&bed.guest.file, 0x8_0000);
        bed.runner.set_memory(elsewhere).unwrap();
        let without = Arc::new(MemoryMap::default());
        bed.runner.set_memory(without).unwrap();
        assert!(bed.runner.suspended());
        log.take();
        bed.resume(1, 0);
        bed.runner.publish(&mut bed.uring);
        let [data, status] = Bed::written(1);
        assert_eq!(log.take(), [bed.used, data, status]);
    }
}

#[test]
fn pages_beyond_the_end_of_the_log() {
    let log = Log::new(BASE / PAGE + 8);
    log.log.mark(BASE + 7 * PAGE, 3 * PAGE);
    assert_eq!(log.take(), [BASE + 7 * PAGE], "it has no bit for the next");
    log.log.mark(u64::MAX, 1);
    log.log.mark(u64::MAX, 2);
    log.log.mark(BASE, 0);
    assert_eq!(log.take(), NONE);
    log.log.mark(BASE + PAGE - 1, 2);
    assert_eq!(log.take(), [BASE, BASE + PAGE]);
}

#[test]
fn a_log_that_shrinks_breaks_its_member_only() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let mut members = Vec::new();
    for id in [1, 2] {
        let options = MemberOptions {
            legacy: true,
            ..MemberOptions::default()
        };
        let member = Member::new(Arc::clone(&pool), id, Arc::new(Waiter), options);
        member.attach().unwrap();
        let guest = Guest::new(BASE, SIZE);
        let ring = Ring::legacy(RING, 16, PAGE);
        let region = pool
            .mappings()
            .region(&peer(&guest.file), BASE, SIZE, BASE + USER, 0)
            .unwrap();
        member.add_memory(region).unwrap();
        let log = Log::all();
        assert!(member
            .set_log(
                DirtyLog::map(pool.mappings(), &peer(&log.file), log.file.metadata().unwrap().len(), 0).unwrap(),
                true
            )
            .unwrap()
            .is_none());
        member.set_features(feature::LOG_ALL, feature::LOG_ALL).unwrap();
        let a = ring.addresses;
        let user = RingAddresses {
            desc: a.desc + USER,
            driver: a.driver + USER,
            device: a.device + USER,
        };
        member.set_queue_size(0, 16).unwrap();
        member.set_queue_addresses(0, user).unwrap();
        let kick = sys::eventfd().unwrap();
        member.set_queue_kick(0, Some(kick.try_clone().unwrap())).unwrap();
        members.push((member, guest, ring, log, kick));
    }
    let until = |what: &str, condition: &mut dyn FnMut() -> bool| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !condition() {
            assert!(std::time::Instant::now() < deadline, "timed out: {what}");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    };
    for (_, _, _, log, _) in &members {
        until("the ring is marked", &mut || !log.take().is_empty());
    }
    members[0].3.file.set_len(0).unwrap();
    // With the first request the mark that says the driver is to notify can't be made; the next turn finds out, at the latest that
    // of the second.
    for request in 0..2 {
        for (member, guest, ring, _, kick) in &mut members {
            ring.descriptor(guest, request, DATA, PAGE as u32, WRITE, 0);
            ring.offer(guest, request);
            sys::eventfd_signal(kick);
            let stats = member.queue_stats(0);
            until("it is taken", &mut || {
                stats.in_flight.load(Ordering::Relaxed) == u32::from(request) + 1 || member.owner().is_broken()
            });
        }
    }
    let mut broken = Vec::new();
    until("the first is broken", &mut || {
        broken.extend(pool.events().take().into_iter().filter_map(|event| match event {
            Event::Broken { member, fault } => Some((member, fault.rule)),
            _ => None,
        }));
        !broken.is_empty()
    });
    assert_eq!(broken, [(1, "memory.truncated")]);
    assert!(!members[1].0.owner().is_broken());
    // They wait for ever, and the pool would wait for them.
    std::mem::forget(pool);
}
