// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Killed at any instant: a driver, the ring engine or a whole runner over memory in files, and an end at each crash point
//! of a random workload. Whoever comes next sees what a new process would see: the memory, and nothing else.
//!
//! What must hold whatever happens: the driver gets every chain back exactly once, as it was asked; each process runs what
//! the driver had not got back when it began, in the order in which that was made available, and never anything else.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use common::{descriptor, memfd, peer, Guest, Random, INDIRECT, NEXT, WRITE};
use vhu_core::crash;
use vhu_core::device::{ConfigField, Device, QueueContext, Request, Step};
use vhu_core::error::Fault;
use vhu_core::memory::{HostArea, MappingCache, MemoryMap};
use vhu_core::ring::any::Ring;
use vhu_core::ring::split::{AddressSpace, RingAddresses};
use vhu_core::ring::{feature, inflight, Chain, RingFeatures};
use vhu_core::runner::{Call, QueueSetup, QueueStats, Runner};
use vhu_core::uring::Uring;

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x4_0000;
/// What a request has, by the number that names it: up to six pieces of 64 bytes, and an indirect table.
const DATA: u64 = BASE + 0x1_0000;
const DATA_EACH: u64 = 0x400;
const PIECE: u64 = 64;
const TABLE: u64 = 0x300;

/// More than any of these workloads takes.
const STEPS: u32 = 20_000;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A ring and how it is used.
#[derive(Clone, Copy, Debug)]
struct Shape {
    packed: bool,
    event: bool,
    size: u16,
    /// Requests from the ring's first use to the test's beginning.
    start: u64,
}

impl Shape {
    fn random(random: &mut Random, packed: bool, event: bool) -> Self {
        let sizes: &[u16] = if packed {
            &[1, 2, 3, 5, 7, 8, 13, 16]
        } else {
            &[1, 2, 4, 8, 16]
        };
        let size = sizes[random.below(sizes.len() as u64) as usize];
        // Fresh, in the middle of a lap, or soon to wrap: the ring and (split) the index.
        let start = match random.below(3) {
            0 => 0,
            1 if packed => random.below(4 * u64::from(size)),
            1 => random.below(1 << 16),
            _ if packed => 2 * u64::from(size) - 1,
            _ => (1 << 16) - 1 - random.below(4),
        };
        Self {
            packed,
            event,
            size,
            start,
        }
    }

    fn features(self) -> RingFeatures {
        RingFeatures {
            event_idx: self.event,
            indirect: true,
            notify_on_empty: false,
            packed: self.packed,
        }
    }

    fn addresses(self) -> RingAddresses {
        let n = u64::from(self.size);
        let driver = BASE + 16 * n;
        let device = if self.packed {
            driver + 4
        } else {
            (driver + 6 + 2 * n).next_multiple_of(64)
        };
        RingAddresses {
            desc: BASE,
            driver,
            device,
        }
    }

    /// A place of a packed ring, counted from its first use, as positions have it.
    fn bits(self, place: u64) -> u16 {
        let n = u64::from(self.size);
        (place % n) as u16 | u16::from((place / n).is_multiple_of(2)) << 15
    }

    fn flags(self, place: u64, used: bool) -> u16 {
        match ((place / u64::from(self.size)).is_multiple_of(2), used) {
            (true, false) => AVAIL,
            (false, false) => USED,
            (true, true) => AVAIL | USED,
            (false, true) => 0,
        }
    }

    fn start_position(self) -> u32 {
        if self.packed {
            let bits = u32::from(self.bits(self.start));
            bits | bits << 16
        } else {
            u32::from(self.start as u16)
        }
    }
}

struct Sent {
    serial: u64,
    /// Descriptors it has in the ring.
    descriptors: Vec<u16>,
    /// What the device is to write.
    writable: Vec<(u64, u32)>,
}

/// The driver. It believes nothing and is never killed.
struct Driver {
    guest: Guest,
    shape: Shape,
    next: u64,
    sent: BTreeMap<u16, Sent>,
    /// Split: free descriptors. Packed: free buffer IDs.
    free: Vec<u16>,
    /// Chains made available, and used ones taken. Packed: descriptors. From the ring's first use.
    avail: u64,
    used: u64,
    /// In the order in which they came back.
    returned: Vec<u64>,
}

impl Driver {
    fn new(shape: Shape) -> Self {
        let guest = Guest::new(BASE, SIZE);
        let driver = Self {
            guest,
            shape,
            next: 1,
            sent: BTreeMap::new(),
            free: (0..shape.size).collect(),
            avail: shape.start,
            used: shape.start,
            returned: Vec::new(),
        };
        if shape.packed {
            let n = u64::from(shape.size);
            for place in shape.start.saturating_sub(n)..shape.start {
                driver.put(place, &descriptor(0, 0, 0, shape.flags(place, true)));
            }
        } else {
            let idx = (shape.start as u16).to_le_bytes();
            driver.guest.write(shape.addresses().driver + 2, &idx);
            driver.guest.write(shape.addresses().device + 2, &idx);
        }
        driver
    }

    fn put(&self, place: u64, bytes: &[u8]) {
        let at = BASE + 16 * (place % u64::from(self.shape.size));
        // The flags of a packed descriptor last.
        self.guest.write(at, &bytes[..14]);
        self.guest.write(at + 14, &bytes[14..]);
    }

    fn room(&self) -> usize {
        if self.shape.packed {
            usize::from(self.shape.size) - (self.avail - self.used) as usize
        } else {
            self.free.len()
        }
    }

    /// Makes a chain available, if there is room for one.
    fn offer(&mut self, random: &mut Random) -> bool {
        let room = self.room();
        if room == 0 || self.free.is_empty() {
            return false;
        }
        let indirect = random.chance(30);
        let count = 1 + random.below(if indirect { 5 } else { 4.min(room as u64) });
        let id = self.free.swap_remove(random.below(self.free.len() as u64) as usize);
        let data = DATA + DATA_EACH * u64::from(id);
        let readable = 1 + random.below(count);
        let serial = self.next;
        self.next += 1;
        let mut pieces = Vec::new();
        let mut writable = Vec::new();
        for n in 0..count {
            let addr = data + PIECE * n;
            if n < readable {
                self.guest.write(addr, &serial.to_le_bytes());
                pieces.push((addr, 8, 0));
            } else {
                let len = 1 + random.below(PIECE) as u32;
                self.guest.write(addr, &[0; PIECE as usize]);
                pieces.push((addr, len, WRITE));
                writable.push((addr, len));
            }
        }
        if indirect {
            let table = data + TABLE;
            for (n, &(addr, len, flags)) in pieces.iter().enumerate() {
                let entry = if self.shape.packed {
                    descriptor(addr, len, 0, flags)
                } else if n + 1 < pieces.len() {
                    descriptor(addr, len, flags | NEXT, n as u16 + 1)
                } else {
                    descriptor(addr, len, flags, 0)
                };
                self.guest.write(table + 16 * n as u64, &entry);
            }
            pieces = vec![(table, 16 * count as u32, INDIRECT)];
        }
        let descriptors = if self.shape.packed {
            self.offer_packed(id, &pieces)
        } else {
            self.offer_split(id, &pieces)
        };
        let sent = Sent {
            serial,
            descriptors,
            writable,
        };
        assert!(self.sent.insert(id, sent).is_none());
        true
    }

    fn offer_packed(&mut self, id: u16, pieces: &[(u64, u32, u16)]) -> Vec<u16> {
        for (n, &(addr, len, flags)) in pieces.iter().enumerate().rev() {
            let place = self.avail + n as u64;
            let next = if n + 1 < pieces.len() { NEXT } else { 0 };
            let flags = flags | next | self.shape.flags(place, false);
            self.put(place, &descriptor(addr, len, id, flags));
        }
        self.avail += pieces.len() as u64;
        vec![0; pieces.len()]
    }

    fn offer_split(&mut self, head: u16, pieces: &[(u64, u32, u16)]) -> Vec<u16> {
        let mut list = vec![head];
        list.extend(self.free.drain(..pieces.len() - 1));
        for (n, &(addr, len, flags)) in pieces.iter().enumerate() {
            let (next, to) = list.get(n + 1).map_or((0, 0), |&to| (NEXT, to));
            self.put(u64::from(list[n]), &descriptor(addr, len, flags | next, to));
        }
        let slot = self.avail % u64::from(self.shape.size);
        let at = self.shape.addresses().driver;
        self.guest.write(at + 4 + 2 * slot, &head.to_le_bytes());
        self.avail += 1;
        self.guest.write(at + 2, &(self.avail as u16).to_le_bytes());
        list
    }

    /// Takes back what the device has used; the number of chains.
    fn reap(&mut self) -> usize {
        let before = self.returned.len();
        while let Some((id, len)) = self.next_used() {
            let sent = self.sent.remove(&id).expect("used, but not made available");
            let mut total = 0;
            for &(addr, len) in &sent.writable {
                let bytes = self.guest.read(addr, PIECE as usize);
                let (inside, outside) = bytes.split_at(len as usize);
                assert!(
                    inside.iter().all(|&byte| byte == sent.serial as u8),
                    "not the right data"
                );
                assert!(outside.iter().all(|&byte| byte == 0));
                total += len;
            }
            assert_eq!(len, total, "request {}", sent.serial);
            self.used += if self.shape.packed {
                sent.descriptors.len() as u64
            } else {
                1
            };
            if self.shape.packed {
                self.free.push(id);
            } else {
                self.free.extend(&sent.descriptors);
            }
            self.returned.push(sent.serial);
        }
        if self.shape.event && !self.shape.packed {
            let at = self.shape.addresses().driver + 4 + 2 * u64::from(self.shape.size);
            self.guest.write(at, &(self.used as u16).to_le_bytes());
        }
        self.returned.len() - before
    }

    fn next_used(&self) -> Option<(u16, u32)> {
        let n = u64::from(self.shape.size);
        if self.shape.packed {
            let at = BASE + 16 * (self.used % n);
            let flags = self.guest.u16(at + 14);
            let used = flags & (AVAIL | USED) == self.shape.flags(self.used, true);
            return used.then(|| (self.guest.u16(at + 12), self.guest.u32(at + 8)));
        }
        let at = self.shape.addresses().device;
        let ahead = self.guest.u16(at + 2).wrapping_sub(self.used as u16);
        assert!(usize::from(ahead) <= self.sent.len(), "more used than made available");
        let element = at + 4 + 8 * (self.used % n);
        (ahead > 0).then(|| (self.guest.u32(element) as u16, self.guest.u32(element + 4)))
    }

    /// What it waits for, in the order in which it was made available.
    fn waiting(&self) -> Vec<u64> {
        let mut serials: Vec<u64> = self.sent.values().map(|sent| sent.serial).collect();
        serials.sort_unstable();
        serials
    }
}

/// What the processes that come and go run, in a file.
struct Diary {
    file: File,
}

impl Diary {
    fn new() -> Self {
        let file = memfd(1 << 16);
        Self { file }
    }

    fn count(&self) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn note(file: &File, serial: u64) {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let count = u64::from_le_bytes(bytes) + 1;
        file.write_all_at(&serial.to_le_bytes(), 8 * count).unwrap();
        file.write_all_at(&count.to_le_bytes(), 0).unwrap();
    }

    fn since(&self, count: u64) -> Vec<u64> {
        let read = |index: u64| {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, 8 * (index + 1)).unwrap();
            u64::from_le_bytes(bytes)
        };
        (count..self.count()).map(read).collect()
    }
}

/// How the device side is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The ring engine with a record.
    Ring,
    /// A runner with a record.
    Runner,
    /// A runner with a record; IN_ORDER.
    InOrder,
    /// A runner without.
    Ordered,
}

/// Everything that outlives a process.
struct World {
    kind: Kind,
    shape: Shape,
    driver: Driver,
    region: File,
    diary: Diary,
}

impl World {
    fn new(kind: Kind, shape: Shape) -> Self {
        Self {
            kind,
            shape,
            driver: Driver::new(shape),
            region: memfd(inflight::region_size(shape.size, shape.packed)),
            diary: Diary::new(),
        }
    }

    fn record(&self) -> HostArea {
        record(&self.region, self.shape)
    }

    /// What a front end that has lost its back end sends as SET_VRING_BASE. QEMU: a split ring's used index; for a packed
    /// ring it knows nothing better than what it sent the last time.
    fn base(&self) -> u32 {
        if self.shape.packed {
            self.shape.start_position()
        } else {
            u32::from(self.driver.guest.u16(self.shape.addresses().device + 2))
        }
    }

    /// Maps everything anew: nothing of the last process' is left.
    fn map(&self) -> (Arc<MemoryMap>, HostArea) {
        let cache = MappingCache::default();
        let region = cache
            .region(&peer(&self.driver.guest.file), BASE, SIZE, BASE, 0)
            .unwrap();
        (Arc::new(MemoryMap::default().with(region).unwrap()), self.record())
    }

    /// A new process.
    fn begin(&self, (map, record): (Arc<MemoryMap>, HostArea)) -> Box<dyn Engine> {
        let diary = self.diary.file.try_clone().unwrap();
        match self.kind {
            Kind::Ring => Box::new(RingEngine::new(map, self.shape, self.base(), record, diary)),
            kind => Box::new(RunnerEngine::new(
                map,
                self.shape,
                self.base(),
                (kind != Kind::Ordered).then_some(record),
                kind != Kind::Runner,
                diary,
                Arc::default(),
            )),
        }
    }
}

fn record(region: &File, shape: Shape) -> HostArea {
    let size = inflight::region_size(shape.size, shape.packed);
    let region = MappingCache::default().region(&peer(region), 0, size, 0, 0).unwrap();
    let map = Arc::new(MemoryMap::default().with(region).unwrap());
    map.area_by_guest(0, size).unwrap()
}

trait Engine {
    /// Takes some requests; some of them may be done at once.
    fn take(&mut self, random: &mut Random);
    fn in_flight(&self) -> usize;
    /// Ends one of those in flight.
    fn complete(&mut self, which: usize);
    fn publish(&mut self);
}

fn serial_of(chain: &Chain) -> u64 {
    let mut bytes = [0; 8];
    assert_eq!(chain.readable.read(&mut bytes), 8);
    u64::from_le_bytes(bytes)
}

fn carry_out(chain: &Chain, serial: u64) -> u32 {
    let len = chain.writable.len();
    assert_eq!(chain.writable.write(&vec![serial as u8; len as usize]) as u64, len);
    len as u32
}

struct RingEngine {
    map: Arc<MemoryMap>,
    ring: Ring,
    running: Vec<(Chain, u64)>,
    diary: File,
}

impl RingEngine {
    fn new(map: Arc<MemoryMap>, shape: Shape, base: u32, record: HostArea, diary: File) -> Self {
        let mut ring = Ring::new(
            &map,
            AddressSpace::Guest,
            shape.addresses(),
            shape.size,
            1024,
            shape.features(),
            base,
        )
        .unwrap();
        ring.track(record).unwrap();
        Self {
            map,
            ring,
            running: Vec::new(),
            diary,
        }
    }
}

impl Engine for RingEngine {
    fn take(&mut self, random: &mut Random) {
        self.ring.disable_notification();
        let limit = 1 + random.below(6);
        for _ in 0..limit.min(u64::from(self.ring.available().unwrap())) {
            let fresh = self.ring.unfinished() == 0;
            let mut chain = Chain::default();
            if !self.ring.pop(&self.map, &mut chain).unwrap() {
                break;
            }
            if fresh && random.chance(10) {
                self.ring.undo_pop();
                break;
            }
            let serial = serial_of(&chain);
            Diary::note(&self.diary, serial);
            self.running.push((chain, serial));
            if random.chance(20) {
                self.complete(self.running.len() - 1);
            }
        }
        self.ring.enable_notification();
    }

    fn in_flight(&self) -> usize {
        self.running.len()
    }

    fn complete(&mut self, which: usize) {
        let (chain, serial) = self.running.swap_remove(which);
        let written = carry_out(&chain, serial);
        self.ring.push_used(chain.head, written);
    }

    fn publish(&mut self) {
        if self.ring.publish() {
            self.ring.should_signal(self.running.len());
        }
    }
}

/// A device that holds on to some of its requests until it is told.
struct Keeper {
    random: Mutex<Random>,
    diary: File,
}

impl Device for Keeper {
    fn type_name(&self) -> &'static str {
        "keeper"
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
        let serial = serial_of(&request.chain);
        Diary::note(&self.diary, serial);
        if self.random.lock().unwrap().chance(30) {
            return Ok(Step::Done(carry_out(&request.chain, serial)));
        }
        let _told_the_engine_the_slot = context.waker();
        Ok(Step::Wait)
    }
    fn resume(&self, request: &mut Request, _context: &QueueContext<'_>, _result: i32) -> Step {
        Step::Done(carry_out(&request.chain, serial_of(&request.chain)))
    }
    fn counter_names(&self) -> &'static [&'static str] {
        &[]
    }
    fn failed_counter(&self) -> usize {
        0
    }
}

thread_local! {
    /// Nothing here does I/O, and one that is made takes the kernel a while to end.
    static URING: RefCell<Uring> = RefCell::new(Uring::new(4).unwrap());
}

struct RunnerEngine {
    runner: Runner,
    slots: Arc<Mutex<Vec<u16>>>,
}

impl RunnerEngine {
    fn new(
        map: Arc<MemoryMap>,
        shape: Shape,
        base: u32,
        record: Option<HostArea>,
        ordered: bool,
        diary: File,
        stats: Arc<QueueStats>,
    ) -> Self {
        let bit = |on, bit| if on { bit } else { 0 };
        let setup = QueueSetup {
            index: 0,
            size: shape.size,
            addresses: shape.addresses(),
            space: AddressSpace::Guest,
            position: base,
            driver_features: feature::VERSION_1
                | feature::INDIRECT_DESC
                | bit(shape.event, feature::EVENT_IDX)
                | bit(shape.packed, feature::RING_PACKED),
            inflight: record,
            ordered,
            log: None,
            call: Call::default(),
            stats,
        };
        let device = Keeper {
            random: Mutex::new(Random::new(u64::from(base) + 1)),
            diary,
        };
        let mut runner = Runner::new(Arc::new(device), map, setup).unwrap();
        let slots: Arc<Mutex<Vec<u16>>> = Arc::default();
        let told = Arc::clone(&slots);
        runner.set_wakers(Arc::new(move |slot| {
            told.lock().unwrap().push(slot);
            Box::new(|| {})
        }));
        Self { runner, slots }
    }
}

impl Engine for RunnerEngine {
    fn take(&mut self, _random: &mut Random) {
        self.runner.disable_notification();
        URING.with_borrow_mut(|uring| self.runner.take(uring)).unwrap();
        self.runner.enable_notification();
    }

    fn in_flight(&self) -> usize {
        self.slots.lock().unwrap().len()
    }

    fn complete(&mut self, which: usize) {
        let slot = self.slots.lock().unwrap().swap_remove(which);
        URING.with_borrow_mut(|uring| self.runner.complete(Runner::user_data(0, slot), 0, uring));
    }

    fn publish(&mut self) {
        self.runner.publish_quietly();
    }
}

/// How a process ended, and the points that it passed.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Finished(u64),
    Killed,
}

struct Killed;

/// A process: serves the ring until the driver has had `total` requests answered, or is killed at a crash point.
fn process(world: &mut World, random: &mut Random, total: u64, kill_at: Option<u64>) -> End {
    let expected: Vec<u64> = world
        .driver
        .waiting()
        .into_iter()
        .chain(world.driver.next..)
        .take(4096)
        .collect();
    let begun = world.diary.count();
    let passed = Rc::new(RefCell::new(0));
    let counter = Rc::clone(&passed);
    crash::on_points(move |_| {
        *counter.borrow_mut() += 1;
        if kill_at == Some(*counter.borrow()) {
            // Not a panic: there is nothing to be said about it.
            resume_unwind(Box::new(Killed));
        }
    });
    let served = catch_unwind(AssertUnwindSafe(|| {
        let mut engine = world.begin(world.map());
        let mut steps = 0;
        while world.driver.next <= total || !world.driver.sent.is_empty() {
            steps += 1;
            assert!(steps < STEPS, "waits for {:?}", world.driver.waiting());
            match random.below(6) {
                0 | 1 => {
                    for _ in 0..1 + random.below(4) {
                        if world.driver.next <= total {
                            world.driver.offer(random);
                        }
                    }
                }
                2 => engine.take(random),
                3 | 4 => {
                    for _ in 0..1 + random.below(3) {
                        if engine.in_flight() > 0 {
                            engine.complete(random.below(engine.in_flight() as u64) as usize);
                        }
                    }
                    if random.chance(60) {
                        engine.publish();
                    }
                }
                _ => {
                    engine.publish();
                    world.driver.reap();
                }
            }
        }
    }));
    crash::disarm();
    if let Err(reason) = served {
        if !reason.is::<Killed>() {
            resume_unwind(reason);
        }
    }
    world.driver.reap();
    let run = world.diary.since(begun);
    assert_eq!(run, expected[..run.len()], "run by one process");
    if kill_at.is_some_and(|at| *passed.borrow() >= at) {
        return End::Killed;
    }
    let points = *passed.borrow();
    End::Finished(points)
}

fn check(world: &World, total: u64) {
    let mut returned = world.driver.returned.clone();
    if world.kind == Kind::Ordered || world.kind == Kind::InOrder {
        assert!(returned.is_sorted(), "used in the order of the ring");
    }
    returned.sort_unstable();
    assert_eq!(returned, (1..=total).collect::<Vec<_>>(), "each exactly once");
}

/// Kills at every point of a workload, and some of the processes after that as well.
fn every_point(kind: Kind, shape: Shape, seed: u64) -> u64 {
    let total = 12 + u64::from(shape.size);
    for kill_at in 1.. {
        let mut world = World::new(kind, shape);
        let mut random = Random::new(seed);
        let what = format!("{kind:?} {shape:?} seed {seed} point {kill_at}");
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let mut kill_next = Some(kill_at);
            for generation in 0.. {
                let end = process(&mut world, &mut random, total, kill_next);
                if let End::Finished(points) = end {
                    check(&world, total);
                    return (generation == 0).then_some(points);
                }
                // Again soon, mostly while it still recovers; the fourth is left alone.
                let soon = 1 + random.below(40);
                kill_next = (generation < 3 && random.chance(70)).then_some(soon);
            }
            None
        }));
        match ended {
            Ok(None) => {}
            Ok(Some(points)) => return points,
            Err(reason) => {
                eprintln!("{what}");
                resume_unwind(reason);
            }
        }
    }
    0
}

fn seeds(kind: Kind, packed: bool, count: u64) {
    let mut points = 0;
    for seed in 0..count {
        for event in [false, true] {
            let shape = Shape::random(&mut Random::new(seed * 2 + u64::from(event) + 1), packed, event);
            points += every_point(kind, shape, seed + 1);
        }
    }
    // Without a record there are fewer of them, but not none.
    assert!(points > 50 * count, "only {points} points");
}

#[test]
fn split_ring_killed_at_every_point() {
    seeds(Kind::Ring, false, 12);
}

#[test]
fn packed_ring_killed_at_every_point() {
    seeds(Kind::Ring, true, 10);
}

#[test]
fn split_runner_killed_at_every_point() {
    seeds(Kind::Runner, false, 6);
}

#[test]
fn packed_runner_killed_at_every_point() {
    seeds(Kind::Runner, true, 5);
}

#[test]
fn split_runner_in_order_killed_at_every_point() {
    seeds(Kind::InOrder, false, 5);
}

#[test]
fn packed_runner_in_order_killed_at_every_point() {
    seeds(Kind::InOrder, true, 5);
}

#[test]
fn without_a_record_the_used_index_says_it_all() {
    seeds(Kind::Ordered, false, 12);
}

/// A process of its own that serves what the driver has made available, and kills itself at a crash point as if from
/// outside: nothing is unwound, nothing is dropped. False when it came to its end.
fn forked(world: &mut World, random: &mut Random, kill_at: u64) -> bool {
    let expected = world.driver.waiting();
    let begun = world.diary.count();
    // Here and not there: it takes a lock, which another thread may hold when the child is made.
    let memory = world.map();
    // SAFETY: the child has this thread only. It uses the allocator, which glibc keeps usable after fork, and no lock that
    // another thread of the tests could hold; and it ends by _exit or a signal.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // One that hangs fails the test.
        // SAFETY: no pointers.
        unsafe { libc::alarm(20) };
        let mut passed = 0;
        crash::on_points(move |_| {
            passed += 1;
            if passed == kill_at {
                // SAFETY: no pointers.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            }
        });
        let served = catch_unwind(AssertUnwindSafe(|| {
            let mut engine = world.begin(memory);
            let mut steps = 0;
            let all = begun + expected.len() as u64;
            while world.diary.count() < all || engine.in_flight() > 0 {
                engine.take(random);
                while engine.in_flight() > 0 && random.chance(70) {
                    engine.complete(random.below(engine.in_flight() as u64) as usize);
                }
                if random.chance(60) {
                    engine.publish();
                }
                steps += 1;
                assert!(steps < STEPS, "lost some");
            }
            engine.publish();
            std::mem::forget(engine);
        }));
        // SAFETY: no pointers.
        unsafe { libc::_exit(i32::from(served.is_err())) };
    }
    let mut status = 0;
    // SAFETY: writes to a live local.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
    assert!(
        killed || libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
        "status {status:#x}"
    );
    world.driver.reap();
    let run = world.diary.since(begun);
    assert_eq!(run, expected[..run.len()], "run by one process");
    assert!(killed || world.driver.sent.is_empty());
    killed
}

fn fork_at_every_point(kind: Kind, packed: bool) {
    for seed in 1..=3 {
        let shape = Shape::random(&mut Random::new(seed * 5), packed, seed % 2 == 0);
        let total = 2 * u64::from(shape.size) + 4;
        for kill_at in 1.. {
            let mut world = World::new(kind, shape);
            let mut random = Random::new(seed);
            let mut first = None;
            while world.driver.next <= total || !world.driver.sent.is_empty() {
                while world.driver.next <= total && world.driver.offer(&mut random) {}
                let at = match first {
                    None => kill_at,
                    Some(_) if random.chance(50) => 1 + random.below(60),
                    Some(_) => u64::MAX,
                };
                let killed = forked(&mut world, &mut random, at);
                first.get_or_insert(killed);
                // The child's has gone on, this one hasn't.
                random.next();
            }
            check(&world, total);
            if first == Some(false) {
                assert!(kill_at > 2);
                break;
            }
        }
    }
}

#[test]
fn split_ring_in_a_process_that_is_killed() {
    fork_at_every_point(Kind::Ring, false);
}

#[test]
fn packed_ring_in_a_process_that_is_killed() {
    fork_at_every_point(Kind::Ring, true);
}

#[test]
fn split_runner_without_a_record_in_a_process_that_is_killed() {
    fork_at_every_point(Kind::Ordered, false);
}

fn open(world: &World, base: u32) -> Result<Ring, Fault> {
    let guest = &world.driver.guest;
    let shape = world.shape;
    let mut ring = Ring::new(
        &guest.map,
        AddressSpace::Guest,
        shape.addresses(),
        shape.size,
        1024,
        shape.features(),
        base,
    )?;
    ring.track(world.record())?;
    Ok(ring)
}

fn pop(world: &World, ring: &mut Ring) -> Chain {
    let mut chain = Chain::default();
    assert!(ring.available().unwrap() > 0);
    assert!(ring.pop(&world.driver.guest.map, &mut chain).unwrap());
    chain
}

fn finish(ring: &mut Ring, chain: &Chain) {
    ring.push_used(chain.head, carry_out(chain, serial_of(chain)));
}

fn plain(packed: bool, size: u16) -> World {
    let shape = Shape {
        packed,
        event: false,
        size,
        start: 0,
    };
    World::new(Kind::Ring, shape)
}

#[test]
fn the_record_knows_better_than_the_front_end_where_to_go_on() {
    for packed in [false, true] {
        let mut world = plain(packed, 8);
        let mut random = Random::new(1);
        let base = world.base();
        let mut ring = open(&world, base).unwrap();
        for _ in 0..2 {
            while world.driver.offer(&mut random) {}
            while ring.available().unwrap() > 0 {
                let chain = pop(&world, &mut ring);
                finish(&mut ring, &chain);
            }
            ring.publish();
            world.driver.reap();
        }
        let idle = ring.position();
        drop(ring);
        // Nothing in flight: a base of some time ago, of just before, and one of a ring with something in flight.
        for guess in if packed {
            [base, 0x0001_0001, 0x8001_8003]
        } else {
            [base, idle - 1, idle + 1]
        } {
            assert_eq!(open(&world, guess).unwrap().position(), idle, "{guess:#x}");
        }
        let mut ring = open(&world, base).unwrap();
        assert!(world.driver.offer(&mut random));
        pop(&world, &mut ring);
        let busy = ring.position();
        assert_ne!(busy, idle);
        let mut ring = open(&world, base).unwrap();
        assert_eq!((ring.position(), ring.unfinished()), (busy, 1));
        assert!(ring.has_work() && ring.has_history());
        let chain = pop(&world, &mut ring);
        finish(&mut ring, &chain);
        ring.publish();
        assert_eq!(world.driver.reap(), 1);
    }
}

#[test]
fn used_descriptors_that_were_not_published_are_taken_back() {
    let mut world = plain(true, 8);
    let mut random = Random::new(3);
    let mut ring = open(&world, world.base()).unwrap();
    // Three chains of one descriptor each.
    while world.driver.sent.len() < 3 {
        let before = world.driver.avail;
        assert!(world.driver.offer(&mut random));
        if world.driver.avail != before + 1 {
            world = plain(true, 8);
            ring = open(&world, world.base()).unwrap();
        }
    }
    let chains: Vec<Chain> = (0..3).map(|_| pop(&world, &mut ring)).collect();
    chains.iter().for_each(|chain| finish(&mut ring, chain));
    // Killed before it published: the second and the third have their flags.
    drop(ring);
    let mut ring = open(&world, world.base()).unwrap();
    assert_eq!(ring.unfinished(), 3);
    let mut chains: Vec<Chain> = (0..3).map(|_| pop(&world, &mut ring)).collect();
    let last = chains.pop().unwrap();
    finish(&mut ring, &last);
    ring.publish();
    assert_eq!(world.driver.reap(), 1, "the others are in flight");
    chains.iter().for_each(|chain| finish(&mut ring, chain));
    ring.publish();
    assert_eq!(world.driver.reap(), 2);
}

#[test]
fn a_buffer_id_that_is_used_again_before_it_is_back() {
    let world = plain(true, 4);
    let offer = |place: u64| {
        world.driver.guest.write(DATA, &7u64.to_le_bytes());
        world
            .driver
            .put(place, &descriptor(DATA, 8, 2, world.shape.flags(place, false)));
    };
    let mut ring = open(&world, world.base()).unwrap();
    offer(0);
    let chain = pop(&world, &mut ring);
    finish(&mut ring, &chain);
    // The driver doesn't have it back yet.
    offer(1);
    let again = pop(&world, &mut ring);
    assert_eq!((chain.head, again.head), (2, 2));
    ring.publish();
    let position = ring.position();
    drop(ring);
    for _ in 0..2 {
        let ring = open(&world, world.base()).unwrap();
        assert_eq!((ring.unfinished(), ring.position()), (1, position), "the second one");
    }
    let mut ring = open(&world, world.base()).unwrap();
    let chain = pop(&world, &mut ring);
    finish(&mut ring, &chain);
    ring.publish();
    assert_eq!(open(&world, world.base()).unwrap().unfinished(), 0);
}

#[test]
fn a_record_of_a_ring_of_another_size() {
    for packed in [false, true] {
        let mut world = plain(packed, 16);
        let mut random = Random::new(1);
        drop(open(&world, world.base()).unwrap());
        world.shape.size = 8;
        open(&world, world.base()).expect("nothing was in flight");
        world.shape.size = 16;
        let mut ring = open(&world, world.base()).unwrap();
        assert!(world.driver.offer(&mut random));
        pop(&world, &mut ring);
        drop(ring);
        world.shape.size = 8;
        let fault = open(&world, world.base()).err().expect("one is in flight");
        assert_eq!(fault.rule, "inflight.size");
        // The front end says that the ring begins anew; and a larger one after it finds nothing of the first.
        inflight::clear(&world.record());
        open(&world, world.base()).unwrap();
        world.shape.size = 16;
        assert_eq!(open(&world, world.base()).unwrap().unfinished(), 0);
    }
}

#[test]
fn a_version_from_the_future() {
    for packed in [false, true] {
        let world = plain(packed, 8);
        world.region.write_all_at(&2u16.to_ne_bytes(), 8).unwrap();
        let fault = open(&world, world.base()).err().unwrap();
        assert_eq!(fault.rule, "inflight.version");
    }
}

#[test]
fn a_region_too_small_for_the_ring() {
    for packed in [false, true] {
        let world = plain(packed, 8);
        world.region.set_len(inflight::region_size(4, packed)).unwrap();
        let len = inflight::region_size(4, packed);
        let region = MappingCache::default()
            .region(&peer(&world.region), 0, len, 0, 0)
            .unwrap();
        let map = Arc::new(MemoryMap::default().with(region).unwrap());
        let mut shape = world.shape;
        // Rounded up to 64 bytes, there may be room for a few more.
        shape.size = 16;
        let mut ring = Ring::new(
            &world.driver.guest.map,
            AddressSpace::Guest,
            shape.addresses(),
            shape.size,
            1024,
            shape.features(),
            world.base(),
        )
        .unwrap();
        let fault = ring.track(map.area_by_guest(0, len).unwrap()).unwrap_err();
        assert_eq!(fault.rule, "inflight.size");
    }
}

/// Uses a ring for a while, whatever it says; the rule that ends it.
fn exercise(world: &World, ring: &mut Ring, random: &mut Random) -> Option<&'static str> {
    let mut held: Vec<u16> = Vec::new();
    for _ in 0..4 * usize::from(world.shape.size) + 8 {
        match ring.available() {
            Ok(0) => {}
            Ok(_) => {
                let mut chain = Chain::default();
                match ring.pop(&world.driver.guest.map, &mut chain) {
                    Ok(true) => held.push(chain.head),
                    Ok(false) => {}
                    Err(fault) => return Some(fault.rule),
                }
            }
            Err(fault) => return Some(fault.rule),
        }
        if !held.is_empty() && random.chance(60) {
            let head = held.swap_remove(random.below(held.len() as u64) as usize);
            ring.push_used(head, 0);
        }
        if random.chance(50) {
            ring.publish();
        }
        ring.enable_notification();
    }
    None
}

fn hostile_regions(packed: bool, rounds: u64) {
    let edges = [0u64, 1, 2, 7, 8, 15, 16, 17, 0x7fff, 0x8000, 0xffff, u64::MAX];
    let (mut opened, mut refused) = (0, 0);
    for seed in 1..=rounds {
        let mut random = Random::new(seed);
        let shape = Shape::random(&mut random, packed, false);
        let mut world = World::new(Kind::Ring, shape);
        let len = inflight::region_size(shape.size, packed) as usize;
        let mut bytes = vec![0; len];
        if random.chance(70) {
            // Of a process that was killed somewhere, and then a few fields are something else.
            let kill_at = 1 + random.below(300);
            process(&mut world, &mut random, 40, Some(kill_at));
            world.region.read_exact_at(&mut bytes, 0).unwrap();
            for _ in 0..1 + random.below(6) {
                let width = [1usize, 2, 2, 2, 4, 8][random.below(6) as usize];
                let at = random.below((len / width) as u64) as usize * width;
                let edge = edges[random.below(edges.len() as u64) as usize];
                let value = if random.chance(70) { edge } else { random.next() };
                bytes[at..at + width].copy_from_slice(&value.to_ne_bytes()[..width]);
            }
        } else {
            bytes.fill_with(|| random.next() as u8);
            if random.chance(80) {
                bytes[8..10].copy_from_slice(&1u16.to_ne_bytes());
                bytes[10..12].copy_from_slice(&shape.size.to_ne_bytes());
            }
            if packed && random.chance(80) {
                for at in [12, 14, 16, 18] {
                    let index = random.below(u64::from(shape.size) + 1) as u16;
                    bytes[at..at + 2].copy_from_slice(&index.to_ne_bytes());
                }
            }
        }
        world.region.write_all_at(&bytes, 0).unwrap();
        let what = format!("{shape:?} seed {seed}");
        let ended = catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..2 {
                match open(&world, world.base()) {
                    Ok(mut ring) => {
                        opened += 1;
                        assert!(ring.unfinished() <= usize::from(shape.size));
                        if let Some(rule) = exercise(&world, &mut ring, &mut random) {
                            assert!(rule.starts_with("ring."), "{rule}");
                        }
                    }
                    Err(fault) => {
                        refused += 1;
                        assert!(fault.rule.starts_with("inflight."), "{fault}");
                    }
                }
            }
        }));
        if let Err(reason) = ended {
            eprintln!("{what}");
            resume_unwind(reason);
        }
    }
    assert!(
        opened > rounds / 5 && refused > rounds / 20,
        "{opened} opened, {refused} refused"
    );
}

#[test]
fn hostile_regions_of_split_rings() {
    hostile_regions(false, 3000);
}

#[test]
fn hostile_regions_of_packed_rings() {
    hostile_regions(true, 3000);
}

#[test]
fn what_waits_for_a_request_that_was_given_up_is_run_again() {
    for packed in [false, true] {
        let mut shape = plain(packed, 16).shape;
        shape.start = if packed { 30 } else { 65_534 };
        let mut world = World::new(Kind::Ordered, shape);
        let mut random = Random::new(1);
        let stats = Arc::new(QueueStats::default());
        let (map, _) = world.map();
        let mut engine = RunnerEngine::new(
            Arc::clone(&map),
            shape,
            shape.start_position(),
            None,
            true,
            world.diary.file.try_clone().unwrap(),
            Arc::clone(&stats),
        );
        while world.driver.offer(&mut random) {}
        let all = world.driver.waiting();
        while world.diary.count() < all.len() as u64 {
            engine.take(&mut random);
        }
        engine.publish();
        let before = world.driver.reap();
        // The first that is in flight panics when it goes on; the worker gives it up and ends the others.
        let first = *engine.slots.lock().unwrap().iter().min().unwrap();
        engine.slots.lock().unwrap().retain(|&slot| slot != first);
        while engine.in_flight() > 0 {
            engine.complete(0);
        }
        engine.runner.abandon(engine.runner.in_flight());
        engine.publish();
        let after = before + world.driver.reap();
        assert!(after < all.len());
        let position = stats.position.load(std::sync::atomic::Ordering::Relaxed);
        let diary = world.diary.count();
        let mut engine = RunnerEngine::new(
            map,
            shape,
            position,
            None,
            true,
            world.diary.file.try_clone().unwrap(),
            stats,
        );
        for _ in 0..all.len() {
            engine.take(&mut random);
            while engine.in_flight() > 0 {
                engine.complete(0);
            }
            engine.publish();
            world.driver.reap();
        }
        assert!(world.driver.sent.is_empty());
        assert_eq!(world.diary.since(diary), all[after..]);
    }
}

#[test]
fn what_another_back_end_had_begun_to_take_was_not_taken() {
    // The protocol's own order: the mark comes first, then the descriptors. Until the entry leaves the free list it is
    // nobody's, whatever it says.
    let mut world = plain(true, 8);
    drop(open(&world, world.base()).unwrap());
    world.region.write_all_at(&[1], 32).unwrap();
    let mut ring = open(&world, world.base()).unwrap();
    assert_eq!((ring.unfinished(), ring.position()), (0, world.base()));
    assert!(world.driver.offer(&mut Random::new(1)));
    let chain = pop(&world, &mut ring);
    finish(&mut ring, &chain);
    ring.publish();
    assert_eq!(world.driver.reap(), 1);
    assert_eq!(open(&world, world.base()).unwrap().unfinished(), 0);
}
