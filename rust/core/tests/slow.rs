// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Storage that takes its time: what happens to rings while requests are in flight. The device here answers a request
//! for every byte that the test writes into a pipe.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{memfd, peer, Guest, Ring, USER};
use vhu_core::device::{ConfigField, Device, IoOp, QueueContext, Request, Step};
use vhu_core::error::Fault;
use vhu_core::event::Event;
use vhu_core::member::{Inflight, Member, MemberOptions};
use vhu_core::memory::{HostArea, MemoryMap};
use vhu_core::ring::split::RingAddresses;
use vhu_core::ring::{feature, inflight};
use vhu_core::sys::{self, PeerFd};
use vhu_core::worker::Pool;

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x40_0000;

struct Slow {
    pipe: PipeReader,
    queues: u16,
}

impl Device for Slow {
    fn type_name(&self) -> &'static str {
        "slow"
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
        self.queues
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
    fn start(&self, request: &mut Request, _context: &QueueContext<'_>) -> Result<Step, Fault> {
        if request.chain.readable.len() == 13 {
            return Err(Fault::new("slow.thirteen", "unlucky"));
        }
        let iov = request.chain.readable.iovecs();
        let fd = self.pipe.as_raw_fd();
        Ok(Step::Io(IoOp::Readv {
            fd,
            iov: iov.as_ptr(),
            count: 1,
            offset: u64::MAX,
            bytes: 1,
        }))
    }
    fn resume(&self, _request: &mut Request, _context: &QueueContext<'_>, result: i32) -> Step {
        Step::Done(u32::try_from(result).unwrap_or(0))
    }
    fn counter_names(&self) -> &'static [&'static str] {
        &[]
    }
    fn failed_counter(&self) -> usize {
        0
    }
}

struct Bed {
    pool: Arc<Pool>,
    member: Arc<Member>,
    guest: Guest,
    rings: Vec<Ring>,
    kicks: Vec<OwnedFd>,
    call: OwnedFd,
    release: PipeWriter,
    ended: HashSet<u64>,
    broken: Vec<&'static str>,
}

impl Bed {
    /// Queues of `size`, each with all descriptors of one byte.
    fn new(queues: u16, size: u16) -> Self {
        let pool = Arc::new(Pool::new(Some(1)).unwrap());
        let (pipe, release) = std::io::pipe().unwrap();
        let member = Member::new(
            Arc::clone(&pool),
            1,
            Arc::new(Slow { pipe, queues }),
            MemberOptions {
                legacy: true,
                ..MemberOptions::default()
            },
        );
        member.attach().unwrap();
        let guest = Guest::new(BASE, SIZE);
        let rings: Vec<Ring> = (0..u64::from(queues))
            .map(|i| Ring::legacy(BASE + i * 0x2_0000, size, 4096))
            .collect();
        for ring in &rings {
            for index in 0..size {
                ring.descriptor(&guest, index, BASE + SIZE - 0x1000, 1, 0, 0);
            }
        }
        let kicks = (0..queues).map(|_| sys::eventfd().unwrap()).collect();
        let call = sys::eventfd().unwrap();
        Self {
            pool,
            member,
            guest,
            rings,
            kicks,
            call,
            release,
            ended: HashSet::new(),
            broken: Vec::new(),
        }
    }

    fn start(&mut self) {
        self.start_with(|_| {});
    }

    /// `record`: what an earlier process may have left.
    fn start_with(&mut self, record: impl FnOnce(&HostArea)) {
        let left = record;
        let fd = peer(&self.guest.file);
        let region = self.pool.mappings().region(&fd, BASE, SIZE, BASE + USER, 0).unwrap();
        let token = self.member.add_memory(region).unwrap();
        assert!(token.is_none());
        // With a record of what is in flight, as QEMU has it: without, requests are used in order only.
        let size = self.rings.len() as u64 * inflight::region_size(1024, false);
        let fd = PeerFd::from(sys::shared_memory("inflight", size).unwrap());
        let record = self.pool.mappings().region(&fd, 0, size, 0, 0).unwrap();
        let map = Arc::new(MemoryMap::default().with(record).unwrap());
        let area = map.area_by_guest(0, size).unwrap();
        left(&area);
        let record = Inflight::new(area, self.rings.len() as u16).unwrap();
        self.member.set_inflight(record).unwrap();
        for (index, ring) in self.rings.iter().enumerate() {
            let index = index as u64;
            let a = ring.addresses;
            let user = RingAddresses {
                desc: a.desc + USER,
                driver: a.driver + USER,
                device: a.device + USER,
            };
            self.member.set_queue_size(index, u64::from(ring.size)).unwrap();
            self.member.set_queue_addresses(index, user).unwrap();
            self.member
                .set_queue_call(index, Some(self.call.try_clone().unwrap()))
                .unwrap();
            let kick = self.kicks[index as usize].try_clone().unwrap();
            self.member.set_queue_kick(index, Some(kick)).unwrap();
        }
    }

    fn offer(&mut self, queue: usize, count: u16) {
        for _ in 0..count {
            let head = self.rings[queue].avail_idx % self.rings[queue].size;
            self.rings[queue].offer(&self.guest, head);
        }
        sys::eventfd_signal(&self.kicks[queue]);
    }

    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition(self) {
            assert!(Instant::now() < deadline, "timed out: {what}");
            std::thread::sleep(Duration::from_micros(300));
            for event in self.pool.events().take() {
                match event {
                    Event::Done { token } => {
                        self.ended.insert(token);
                    }
                    Event::Broken { fault, .. } => self.broken.push(fault.rule),
                    _ => {}
                }
            }
        }
    }

    fn in_flight(&mut self, count: u32) {
        self.until("requests in flight", |bed| {
            let stats = bed.member.queue_stats(0);
            stats.in_flight.load(std::sync::atomic::Ordering::Relaxed) == count
        });
    }

    fn answer(&mut self, count: usize) {
        self.release.write_all(&vec![0; count]).unwrap();
    }

    fn done(&mut self, token: u64) {
        self.until("a completion", |bed| bed.ended.contains(&token));
    }

    fn used(&self, queue: usize) -> u16 {
        self.rings[queue].used_idx(&self.guest)
    }
}

#[test]
fn detaching_waits_for_a_stop_that_is_under_way() {
    let mut bed = Bed::new(1, 16);
    bed.start();
    bed.offer(0, 2);
    bed.in_flight(2);
    let stop = bed.member.stop_queue(0).unwrap().unwrap();
    let detach = bed.member.detach().expect("requests are in flight");
    assert!(bed.member.attach().is_err());
    std::thread::sleep(Duration::from_millis(20));
    bed.until("nothing", |_| true);
    assert!(bed.ended.is_empty(), "neither may end before the requests");
    bed.answer(2);
    bed.done(stop);
    bed.done(detach);
    bed.member.finish_detach();
    assert_eq!(bed.used(0), 2, "answered, although the front end has gone");
    bed.member.attach().unwrap();
}

#[test]
fn a_broken_ring_keeps_a_position_without_holes() {
    let mut bed = Bed::new(1, 16);
    bed.start();
    bed.offer(0, 2);
    bed.in_flight(2);
    // The third request is one that the device can't take.
    bed.rings[0].descriptor(&bed.guest, 2, BASE + SIZE - 0x1000, 13, 0, 0);
    bed.offer(0, 1);
    bed.until("broken", |bed| !bed.broken.is_empty());
    assert_eq!(bed.broken, ["slow.thirteen"]);
    // QEMU pauses the guest: status 0, then it asks for the position.
    let token = bed.member.set_status(0).unwrap();
    assert!(bed.member.owner().is_broken(), "not mended while its rings still run");
    bed.answer(2);
    bed.done(token);
    bed.member.finish_status();
    assert_eq!(bed.used(0), 2);
    assert_eq!(
        bed.member.queue_base(0).unwrap(),
        2,
        "the unanswered request was not taken"
    );
    // ... and lets it go on: the same request, the same fault, nothing lost in between.
    bed.member.set_queue_base(0, 2).unwrap();
    bed.member
        .set_queue_kick(0, Some(bed.kicks[0].try_clone().unwrap()))
        .unwrap();
    bed.until("broken again", |bed| bed.broken.len() == 2);
    assert_eq!(bed.used(0), 2);
}

#[test]
fn more_completions_than_the_queue_of_the_kernel_holds() {
    let mut bed = Bed::new(4, 1024);
    bed.start();
    for queue in 0..4 {
        // No interrupts: then nothing but the completions themselves calls the kernel.
        bed.rings[queue].set_avail_flags(&bed.guest, 1);
        bed.offer(queue, 1024);
    }
    bed.until("all in flight", |bed| {
        (0..4).all(|q| {
            bed.member
                .queue_stats(q)
                .in_flight
                .load(std::sync::atomic::Ordering::Relaxed)
                == 1024
        })
    });
    bed.answer(4096);
    bed.until("all answered", |bed| (0..4).all(|queue| bed.used(queue) == 1024));
}

#[test]
fn a_full_eventfd_costs_one_interrupt_and_no_more() {
    // SAFETY: no pointers; the fd is new and nobody else's. It blocks, unlike those QEMU makes.
    let call = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    let full = u64::MAX - 1;
    // SAFETY: writes eight bytes from a live local.
    assert_eq!(unsafe { libc::write(call.as_raw_fd(), (&raw const full).cast(), 8) }, 8);
    let mut bed = Bed::new(1, 16);
    bed.call = call;
    bed.start();
    for n in 1..=200u16 {
        bed.offer(0, 1);
        bed.answer(1);
        bed.until("an answer", |bed| bed.used(0) == n);
    }
    assert_eq!(
        bed.member
            .queue_stats(0)
            .calls
            .load(std::sync::atomic::Ordering::Relaxed),
        1
    );
    // The interrupt never gets through, but a stop does.
    let token = bed.member.stop_queue(0).unwrap().unwrap();
    bed.done(token);
}

/// Changes memory `rounds` times, `each` requests being offered in between and none answered.
fn churn(bed: &mut Bed, rounds: u64, each: u16) {
    let other = memfd(0x40_0000);
    for round in 0..rounds {
        let region = bed
            .pool
            .mappings()
            .region(&peer(&other), 1 << 40, 0x1000, 1 << 41, round * 0x1000)
            .unwrap();
        let token = bed.member.add_memory(region).unwrap().unwrap();
        bed.done(token);
        bed.offer(0, each);
        let token = bed.member.remove_memory(1 << 40, 0x1000, 1 << 41).unwrap().unwrap();
        bed.done(token);
        if !bed.broken.is_empty() {
            return;
        }
    }
}

#[test]
fn one_hanging_request_keeps_one_map() {
    let mut bed = Bed::new(1, 256);
    bed.start();
    bed.offer(0, 1);
    bed.in_flight(1);
    churn(&mut bed, 300, 0);
    assert!(bed.broken.is_empty());
    assert!(bed.pool.mappings().len() < 5, "{} mappings", bed.pool.mappings().len());
    let token = bed.member.detach().unwrap();
    bed.answer(1);
    bed.done(token);
}

#[test]
fn memory_that_changes_for_ever_under_hanging_storage() {
    let mut bed = Bed::new(1, 256);
    bed.start();
    bed.offer(0, 1);
    bed.in_flight(1);
    churn(&mut bed, 200, 1);
    assert_eq!(bed.broken, ["memory.churn"]);
    assert!(bed.pool.mappings().len() < 80, "{} mappings", bed.pool.mappings().len());
    let token = bed.member.detach().unwrap();
    bed.answer(256);
    bed.done(token);
    bed.member.finish_detach();
    assert!(bed.pool.mappings().is_empty());
}

#[test]
fn a_ring_whose_memory_comes_last_keeps_its_interrupt() {
    let mut bed = Bed::new(1, 16);
    let a = bed.rings[0].addresses;
    let user = RingAddresses {
        desc: a.desc + USER,
        driver: a.driver + USER,
        device: a.device + USER,
    };
    bed.member.set_queue_addresses(0, user).unwrap();
    bed.member.set_queue_size(0, 16).unwrap();
    bed.member
        .set_queue_call(0, Some(bed.call.try_clone().unwrap()))
        .unwrap();
    bed.member
        .set_queue_kick(0, Some(bed.kicks[0].try_clone().unwrap()))
        .unwrap();
    let other = bed
        .pool
        .mappings()
        .region(&peer(&memfd(0x1000)), 1 << 40, 0x1000, 1 << 41, 0)
        .unwrap();
    assert!(bed.member.add_memory(other).unwrap().is_none());
    let fd = peer(&bed.guest.file);
    let region = bed.pool.mappings().region(&fd, BASE, SIZE, BASE + USER, 0).unwrap();
    bed.member.add_memory(region).unwrap();
    bed.offer(0, 1);
    bed.answer(1);
    bed.until("an answer", |bed| bed.used(0) == 1);
    bed.until("its interrupt", |bed| sys::eventfd_drain(bed.call.as_raw_fd()));
}

#[test]
fn memory_may_change_under_a_steady_load() {
    let mut bed = Bed::new(1, 16);
    bed.start();
    let other = memfd(0x10_0000);
    bed.offer(0, 1);
    for round in 0..200u64 {
        // Always one in flight, never the same one: no map is pointed into for long.
        bed.in_flight(1);
        let region = bed
            .pool
            .mappings()
            .region(&peer(&other), 1 << 40, 0x1000, 1 << 41, 0)
            .unwrap();
        let token = bed.member.add_memory(region).unwrap().unwrap();
        bed.done(token);
        bed.offer(0, 1);
        bed.in_flight(2);
        bed.answer(1);
        let token = bed.member.remove_memory(1 << 40, 0x1000, 1 << 41).unwrap().unwrap();
        bed.done(token);
        bed.until("an answer", |bed| bed.used(0) == round as u16 + 1);
    }
    assert!(bed.broken.is_empty());
    bed.answer(1);
}

#[test]
fn a_ring_that_has_used_something_interrupts_when_it_starts() {
    let mut bed = Bed::new(1, 16);
    bed.start();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!sys::eventfd_drain(bed.call.as_raw_fd()), "a new one doesn't");
    bed.offer(0, 1);
    bed.answer(1);
    bed.until("its interrupt", |bed| sys::eventfd_drain(bed.call.as_raw_fd()));
    let token = bed.member.stop_queue(0).unwrap().unwrap();
    bed.done(token);
    bed.member.collect();
    sys::eventfd_drain(bed.call.as_raw_fd());
    // Had it been killed, the interrupt could be missing, and the guest would wait for ever.
    bed.member
        .set_queue_call(0, Some(bed.call.try_clone().unwrap()))
        .unwrap();
    bed.member
        .set_queue_kick(0, Some(bed.kicks[0].try_clone().unwrap()))
        .unwrap();
    bed.until("an interrupt", |bed| sys::eventfd_drain(bed.call.as_raw_fd()));
}

#[test]
fn stopping_ends_what_an_earlier_process_had_in_flight() {
    let mut bed = Bed::new(1, 16);
    let features = feature::PROTOCOL_FEATURES;
    bed.member.set_features(features, features).unwrap();
    // Made available by the driver: six. Taken by the earlier process: five, of which the second was used.
    for _ in 0..6 {
        bed.offer(0, 1);
    }
    let used = bed.rings[0].addresses.device;
    bed.guest.write(used + 4, &1u32.to_le_bytes());
    bed.guest.write(used + 2, &1u16.to_le_bytes());
    bed.start_with(|area| {
        let part = || area.part(0, area.len()).unwrap();
        let (mut tracker, again) = inflight::SplitTracker::recover(part(), 16, 0).unwrap();
        assert!(again.is_none());
        (0..5).for_each(|head| tracker.taken(head));
        tracker.used(1);
    });
    // It isn't enabled, and the front end wants to know where it stands: to move the guest elsewhere, without the record.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.used(0), 1);
    let token = bed.member.stop_queue(0).unwrap().unwrap();
    bed.in_flight(4);
    assert!(!bed.ended.contains(&token), "they are in flight");
    bed.answer(4);
    bed.done(token);
    bed.member.collect();
    assert_eq!(bed.used(0), 5);
    let heads: Vec<u32> = (1..5).map(|index| bed.rings[0].used(&bed.guest, index).0).collect();
    assert_eq!(HashSet::from([0, 2, 3, 4]), heads.into_iter().collect());
    assert_eq!(bed.member.queue_base(0).unwrap(), 5, "the sixth is for whoever is next");
}
