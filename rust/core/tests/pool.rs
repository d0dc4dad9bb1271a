// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Members on the worker pool: rings started, stopped, broken and moved under a live driver.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{memfd, peer, Guest, Ring, NEXT, USER, WRITE};
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::event::Event;
use vhu_core::member::{feature, Member, MemberOptions};
use vhu_core::memory::Region;
use vhu_core::ring::split::RingAddresses;
use vhu_core::sys;
use vhu_core::worker::Pool;

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x10_0000;
const DATA: u64 = BASE + 0x8_0000;
const PATIENCE: Duration = Duration::from_secs(10);

struct Bed {
    pool: Arc<Pool>,
    member: Arc<Member>,
    guest: Guest,
    ring: Ring,
    kick: OwnedFd,
    call: OwnedFd,
    ended: HashSet<u64>,
    broken: Vec<(u32, &'static str)>,
}

fn device(pool: &Arc<Pool>, id: u32, queues: u16) -> Arc<Member> {
    polled(pool, id, queues, Duration::ZERO)
}

fn polled(pool: &Arc<Pool>, id: u32, queues: u16, poll: Duration) -> Arc<Member> {
    let options = BlkOptions {
        queues,
        queue_size: 64,
        blk_size: 512,
        serial: String::new(),
    };
    let blk = Blk::new(Image::open("ram:1048576", false).unwrap(), options).unwrap();
    Member::new(
        Arc::clone(pool),
        id,
        Arc::new(blk),
        MemberOptions {
            legacy: true,
            poll,
            ..MemberOptions::default()
        },
    )
}

impl Bed {
    fn new() -> Self {
        let pool = Arc::new(Pool::new(Some(2)).unwrap());
        let member = device(&pool, 1, 2);
        member.attach().unwrap();
        Self {
            pool,
            member,
            guest: Guest::new(BASE, SIZE),
            ring: Ring::legacy(BASE, 64, 4096),
            kick: sys::eventfd().unwrap(),
            call: sys::eventfd().unwrap(),
            ended: HashSet::new(),
            broken: Vec::new(),
        }
    }

    fn region(&self) -> Region {
        let fd = peer(&self.guest.file);
        self.pool.mappings().region(&fd, BASE, SIZE, BASE + USER, 0).unwrap()
    }

    fn user(&self) -> RingAddresses {
        let a = self.ring.addresses;
        RingAddresses {
            desc: a.desc + USER,
            driver: a.driver + USER,
            device: a.device + USER,
        }
    }

    fn start(&mut self) {
        let wait = self.member.set_memory(vec![self.region()]).unwrap();
        self.wait(wait);
        self.member.set_queue_size(0, 64).unwrap();
        self.member.set_queue_addresses(0, self.user()).unwrap();
        self.member
            .set_queue_call(0, Some(self.call.try_clone().unwrap()))
            .unwrap();
        self.member
            .set_queue_kick(0, Some(self.kick.try_clone().unwrap()))
            .unwrap();
    }

    fn events(&mut self) {
        for event in self.pool.events().take() {
            match event {
                Event::Done { token } => {
                    self.ended.insert(token);
                }
                Event::Broken { member, fault } => self.broken.push((member, fault.rule)),
                _ => {}
            }
        }
    }

    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "timed out: {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn wait(&mut self, token: Option<u64>) {
        if let Some(token) = token {
            self.until("completion", |bed| {
                bed.events();
                bed.ended.contains(&token)
            });
        }
    }

    fn stop(&mut self) -> u16 {
        let token = self.member.stop_queue(0).unwrap();
        self.wait(token);
        self.member.collect();
        self.member.queue_base(0).unwrap() as u16
    }

    fn kick(&self) {
        sys::eventfd_signal(&self.kick);
    }

    fn offer_read(&mut self, sector: u64) {
        let mut header = 0u32.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.guest.write(DATA, &header);
        self.ring.descriptor(&self.guest, 0, DATA, 16, NEXT, 1);
        self.ring.descriptor(&self.guest, 1, DATA + 4096, 512, NEXT | WRITE, 2);
        self.ring.descriptor(&self.guest, 2, DATA + 16, 1, WRITE, 0);
        self.ring.offer(&self.guest, 0);
    }

    fn used(&mut self, index: u16) {
        self.until("used index", |bed| bed.ring.used_idx(&bed.guest) == index);
    }

    fn called(&mut self) {
        self.until("interrupt", |bed| sys::eventfd_drain(bed.call.as_raw_fd()));
    }
}

#[test]
fn a_ring_runs_stops_and_goes_on() {
    let mut bed = Bed::new();
    bed.start();
    for n in 1..=5u16 {
        bed.offer_read(u64::from(n));
        bed.kick();
        bed.used(n);
        bed.called();
    }
    assert_eq!(bed.stop(), 5);
    bed.offer_read(0);
    bed.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.ring.used_idx(&bed.guest), 5, "a stopped ring is left alone");
    bed.member
        .set_queue_call(0, Some(bed.call.try_clone().unwrap()))
        .unwrap();
    bed.member.set_queue_base(0, 5).unwrap();
    // Not kicked again: a ring is looked at when it starts.
    let _ = sys::eventfd_drain(bed.kick.as_raw_fd());
    bed.member
        .set_queue_kick(0, Some(bed.kick.try_clone().unwrap()))
        .unwrap();
    bed.used(6);
    assert_eq!(bed.stop(), 6);
}

/// Wake-ups and turns of all workers.
fn effort(pool: &Pool) -> (u64, u64) {
    pool.statistics()
        .iter()
        .fold((0, 0), |(w, t), one| (w + one.wakeups, t + one.turns))
}

#[test]
fn a_polled_ring_needs_no_kick_and_an_idle_one_costs_nothing() {
    let mut bed = Bed::new();
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let bound = Duration::from_millis(1);
    // More than the bound is not possible.
    bed.member = polled(&pool, 1, 1, 1000 * bound);
    assert_eq!(bed.member.poll(), bound);
    bed.pool = pool;
    bed.member.attach().unwrap();
    bed.start();
    let mut n = 0;
    let mut request = |bed: &mut Bed, kick: bool| {
        n += 1;
        bed.offer_read(0);
        if kick {
            bed.kick();
        }
        let deadline = Instant::now() + Duration::from_millis(if kick { 10_000 } else { 5 });
        // Spinning: the next one has to come within the bound.
        while bed.ring.used_idx(&bed.guest) != n {
            if Instant::now() > deadline {
                bed.kick();
                bed.used(n);
                return false;
            }
            std::hint::spin_loop();
        }
        true
    };
    // A driver that thinks longer than the look before sleeping lasts. Its requests are met without kicks because the
    // worker looks; a busy machine may keep either side away for longer than the bound, so not each time.
    let (mut met, deadline) = (0, Instant::now() + PATIENCE);
    while met < 3 {
        assert!(Instant::now() < deadline, "{met} found without a kick");
        request(&mut bed, true);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_micros(100) {
            std::hint::spin_loop();
        }
        met += u32::from(request(&mut bed, false));
    }
    // Once the window has passed nothing moves any more.
    std::thread::sleep(Duration::from_millis(50));
    let before = effort(&bed.pool);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(effort(&bed.pool), before, "an idle queue is polled");
    // Kicks without work don't bring it back, and a request in a while is not worth waiting for.
    for _ in 0..5 {
        bed.kick();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(effort(&bed.pool).1 - before.1 < 100, "kicks for nothing are polled for");
    for _ in 0..3 {
        request(&mut bed, true);
        std::thread::sleep(Duration::from_millis(10));
    }
    let before = effort(&bed.pool);
    for _ in 0..5 {
        request(&mut bed, true);
        std::thread::sleep(Duration::from_millis(10));
    }
    let turns = effort(&bed.pool).1 - before.1;
    assert!(turns < 100, "{turns} turns for 5 requests, 10 ms apart");
    bed.stop();
}

#[test]
fn polling_holds_up_nobody() {
    let mut bed = Bed::new();
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    bed.member = polled(&pool, 1, 1, Duration::from_millis(1));
    bed.member.attach().unwrap();
    let mut other = Bed {
        member: device(&pool, 2, 1),
        pool: Arc::clone(&pool),
        ..Bed::new()
    };
    other.member.attach().unwrap();
    bed.pool = pool;
    bed.start();
    other.start();
    for n in 1..=200u16 {
        bed.offer_read(0);
        bed.kick();
        bed.used(n);
        // Served, stopped and started again while the first is being looked at.
        other.offer_read(0);
        other.kick();
        other.used(n);
        if n % 50 == 0 {
            let token = other.member.enable_queue(0, false).unwrap();
            other.wait(token);
            let token = other.member.enable_queue(0, true).unwrap();
            other.wait(token);
        }
    }
    assert_eq!(other.stop(), 200);
    assert_eq!(bed.stop(), 200);
}

#[test]
fn a_disabled_ring_waits() {
    let mut bed = Bed::new();
    bed.member
        .set_features(feature::PROTOCOL_FEATURES, feature::PROTOCOL_FEATURES)
        .unwrap();
    bed.start();
    bed.offer_read(0);
    bed.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.ring.used_idx(&bed.guest), 0);
    let token = bed.member.enable_queue(0, true).unwrap();
    bed.wait(token);
    bed.used(1);
    let token = bed.member.enable_queue(0, false).unwrap();
    bed.wait(token);
    bed.offer_read(0);
    bed.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.ring.used_idx(&bed.guest), 1);
    assert_eq!(bed.stop(), 1);
}

#[test]
fn a_hostile_driver_breaks_its_member_alone() {
    let mut bed = Bed::new();
    let mut good = Bed {
        pool: Arc::clone(&bed.pool),
        member: device(&bed.pool, 2, 1),
        ..Bed::new()
    };
    good.member.attach().unwrap();
    good.start();
    bed.start();
    bed.ring.offer(&bed.guest, 999);
    bed.kick();
    bed.until("broken", |bed| {
        bed.events();
        !bed.broken.is_empty()
    });
    assert_eq!(bed.broken, [(1, "ring.head-index")]);
    assert_eq!(bed.member.status() & 64, 64, "NEEDS_RESET");
    assert_eq!(bed.member.info().state, "broken");
    for n in 1..=20 {
        good.offer_read(0);
        good.kick();
        good.used(n);
        bed.kick();
    }
    bed.events();
    assert_eq!(bed.broken.len(), 1, "told once");
    assert!(good.member.owner().fault().is_none());
    // A reset mends it.
    let token = bed.member.reset();
    bed.wait(token);
    bed.member.finish_reset();
    assert_eq!(bed.member.info().state, "attached");
    assert_eq!(
        bed.member.info().last_error.map(|fault| fault.rule),
        Some("ring.head-index")
    );
    bed.guest.write(BASE, &[0; 0x3000]);
    bed.ring = Ring::legacy(BASE, 64, 4096);
    bed.start();
    bed.offer_read(0);
    bed.kick();
    bed.used(1);
    bed.stop();
    good.stop();
}

#[test]
fn memory_taken_away_and_given_back() {
    let mut bed = Bed::new();
    bed.start();
    bed.offer_read(0);
    bed.kick();
    bed.used(1);
    // QEMU removes a region and adds its successor in two messages; the ring waits in between.
    let token = bed.member.remove_memory(BASE, SIZE, BASE + USER).unwrap();
    bed.wait(token);
    bed.offer_read(0);
    bed.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.ring.used_idx(&bed.guest), 1);
    assert!(bed.member.owner().fault().is_none());
    let token = bed.member.add_memory(bed.region()).unwrap();
    bed.wait(token);
    bed.used(2);
    assert_eq!(bed.stop(), 2);
}

#[test]
fn truncated_memory_breaks_the_member() {
    let mut bed = Bed::new();
    bed.start();
    bed.guest.file.set_len(0x1000).unwrap();
    bed.kick();
    bed.until("broken", |bed| {
        bed.events();
        !bed.broken.is_empty()
    });
    assert_eq!(bed.broken, [(1, "memory.truncated")]);
    bed.stop();
    let _ = memfd(1);
}

#[test]
fn a_new_call_fd_is_rung_once() {
    let mut bed = Bed::new();
    bed.start();
    bed.offer_read(0);
    bed.kick();
    bed.used(1);
    bed.called();
    let call = sys::eventfd().unwrap();
    let token = bed.member.set_queue_call(0, Some(call.try_clone().unwrap())).unwrap();
    bed.wait(token);
    bed.call = call;
    bed.called();
    bed.offer_read(0);
    bed.kick();
    bed.called();
    let token = bed.member.set_queue_call(0, None).unwrap();
    bed.wait(token);
    bed.offer_read(0);
    bed.kick();
    bed.used(3);
    assert!(!sys::eventfd_drain(bed.call.as_raw_fd()));
    bed.stop();
}

#[test]
fn detach_and_attach_again() {
    let mut bed = Bed::new();
    assert!(bed.member.attach().is_err(), "one front end at a time");
    assert!(bed.member.close().is_err());
    bed.start();
    bed.offer_read(0);
    bed.kick();
    let token = bed.member.detach();
    assert!(bed.member.attach().is_err(), "still draining");
    bed.wait(token);
    bed.member.finish_detach();
    assert_eq!(bed.member.info().state, "detached");
    assert!(bed.pool.mappings().is_empty(), "guest memory is let go of");
    bed.member.attach().unwrap();
    assert_eq!(bed.member.info().connections, 2);
    assert!(bed.member.detach().is_none());
    bed.member.close().unwrap();
    assert!(bed.member.attach().is_err());
}

#[test]
fn a_pool_closes_with_rings_running() {
    let mut bed = Bed::new();
    bed.start();
    bed.offer_read(0);
    bed.kick();
    bed.pool.close();
    bed.pool.close();
    // What is sent to a closed pool ends at once instead of never.
    let token = bed.member.stop_queue(0).unwrap();
    bed.wait(token);
}
