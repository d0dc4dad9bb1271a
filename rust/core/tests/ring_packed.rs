// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The packed ring: rules one by one, and against a driver that keeps its own books.
//!
//! The driver here counts places without end (`u64`) and derives indices and wrap counters from them, where the device
//! keeps what the format has; so neither can repeat the other's mistakes.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{fence, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use common::{Guest, Random, INDIRECT, NEXT, USER, WRITE};
use vhu_core::error::Fault;
use vhu_core::memory::{HostArea, MemoryMap};
use vhu_core::ring::any::{self, fresh_position, Ring};
use vhu_core::ring::packed::{self, PackedRing, FRESH};
use vhu_core::ring::split::{AddressSpace, RingAddresses};
use vhu_core::ring::{Chain, RingFeatures};

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x40_0000;
/// Indirect tables, one per buffer ID.
const TABLES: u64 = BASE + 0x10_0000;
const TABLE_SIZE: u64 = 0x200;
/// Buffers, one piece of memory per buffer ID.
const DATA: u64 = BASE + 0x20_0000;
const DATA_SIZE: u64 = 0x400;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESC: u16 = 2;

const ALL: RingFeatures = RingFeatures {
    event_idx: false,
    indirect: true,
    notify_on_empty: false,
    packed: true,
};
const EVENT: RingFeatures = RingFeatures { event_idx: true, ..ALL };

fn addresses(size: u16) -> RingAddresses {
    let driver = BASE + 16 * u64::from(size);
    RingAddresses {
        desc: BASE,
        driver,
        device: driver + 4,
    }
}

fn open(guest: &Guest, size: u16, features: RingFeatures, position: u32) -> Ring {
    Ring::new(
        &guest.map,
        AddressSpace::Guest,
        addresses(size),
        size,
        size,
        features,
        position,
    )
    .unwrap()
}

fn descriptor(addr: u64, len: u32, id: u16, flags: u16) -> Vec<u8> {
    let mut bytes = addr.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(id.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// AVAIL and USED of a descriptor made available at `place`, counted from the ring's first use.
fn available(place: u64, size: u16) -> u16 {
    if (place / u64::from(size)).is_multiple_of(2) {
        AVAIL
    } else {
        USED
    }
}

fn is_used(place: u64, size: u16, flags: u16) -> bool {
    let wrap = if (place / u64::from(size)).is_multiple_of(2) {
        AVAIL | USED
    } else {
        0
    };
    flags & (AVAIL | USED) == wrap
}

/// A place as event suppression structures and positions have it.
fn bits(place: u64, size: u16) -> u16 {
    let size = u64::from(size);
    let wrap = u16::from((place / size).is_multiple_of(2));
    (place % size) as u16 | wrap << 15
}

fn put(guest: &Guest, index: u16, addr: u64, len: u32, id: u16, flags: u16) {
    guest.write(BASE + 16 * u64::from(index), &descriptor(addr, len, id, flags));
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    addr: u64,
    len: u32,
    write: bool,
}

struct Sent {
    id: u16,
    /// Descriptors in the ring.
    count: u16,
    /// What the content is made from.
    tag: u8,
    pieces: Vec<Piece>,
}

/// The driver's side.
struct Driver<'a> {
    guest: &'a Guest,
    size: u16,
    at: RingAddresses,
    /// Places without end: next to make available, next to look for used descriptors at.
    avail: u64,
    used: u64,
    ids: Vec<u16>,
    sent: HashMap<u16, Sent>,
}

impl<'a> Driver<'a> {
    fn new(guest: &'a Guest, size: u16) -> Self {
        Self {
            guest,
            size,
            at: addresses(size),
            avail: 0,
            used: 0,
            ids: (0..size).collect(),
            sent: HashMap::new(),
        }
    }

    fn free(&self) -> u16 {
        self.size - (self.avail - self.used) as u16
    }

    fn index(&self, place: u64) -> u64 {
        place % u64::from(self.size)
    }

    fn total(pieces: &[Piece], write: bool) -> usize {
        pieces.iter().filter(|p| p.write == write).map(|p| p.len as usize).sum()
    }

    /// Makes a chain available; its buffer ID.
    fn add(&mut self, random: &mut Random, pieces: Vec<Piece>, indirect: bool, tag: u8) -> u16 {
        let which = random.below(self.ids.len() as u64) as usize;
        let id = self.ids.swap_remove(which);
        let pieces: Vec<Piece> = pieces
            .into_iter()
            .map(|p| Piece {
                addr: p.addr + DATA + DATA_SIZE * u64::from(id),
                ..p
            })
            .collect();
        let mut offset = 0u8;
        for piece in pieces.iter().filter(|p| !p.write) {
            let bytes: Vec<u8> = (0..piece.len)
                .map(|_| {
                    offset = offset.wrapping_add(1);
                    offset ^ tag
                })
                .collect();
            self.guest.write(piece.addr, &bytes);
        }
        let flag = |piece: &Piece| if piece.write { WRITE } else { 0 };
        let list: Vec<(u64, u32, u16)> = if indirect {
            let table = TABLES + TABLE_SIZE * u64::from(id);
            for (n, piece) in pieces.iter().enumerate() {
                // Everything but WRITE is to be ignored here.
                let junk = random.next() as u16 & !WRITE;
                let entry = descriptor(piece.addr, piece.len, random.next() as u16, flag(piece) | junk);
                self.guest.write(table + 16 * n as u64, &entry);
            }
            let ignored = if random.chance(50) { WRITE } else { 0 };
            vec![(table, 16 * pieces.len() as u32, INDIRECT | ignored)]
        } else {
            pieces.iter().map(|p| (p.addr, p.len, flag(p))).collect()
        };
        let count = list.len() as u64;
        assert!(count <= u64::from(self.free()));
        // The first descriptor, with its flags, is written last; only the last one's buffer ID counts.
        for (n, &(addr, len, flags)) in list.iter().enumerate().rev() {
            let place = self.avail + n as u64;
            let last = n as u64 + 1 == count;
            let next = if last { 0 } else { NEXT };
            let id = if last { id } else { random.next() as u16 };
            put(
                self.guest,
                self.index(place) as u16,
                addr,
                len,
                id,
                flags | next | available(place, self.size),
            );
        }
        self.avail += count;
        self.sent.insert(
            id,
            Sent {
                id,
                count: count as u16,
                tag,
                pieces,
            },
        );
        id
    }

    fn add_one(&mut self) -> u16 {
        let piece = Piece {
            addr: 0,
            len: 4,
            write: true,
        };
        self.add(&mut Random::new(1), vec![piece], false, 0)
    }

    fn used_now(&self) -> bool {
        let flags = self.guest.u16(self.at.desc + 16 * self.index(self.used) + 14);
        is_used(self.used, self.size, flags)
    }

    /// The next used descriptor: its chain, the bytes written.
    fn reap(&mut self) -> Option<(Sent, u32)> {
        if !self.used_now() {
            return None;
        }
        let at = self.at.desc + 16 * self.index(self.used);
        let (len, id, flags) = (self.guest.u32(at + 8), self.guest.u16(at + 12), self.guest.u16(at + 14));
        assert_eq!(flags & WRITE != 0, len > 0, "WRITE says whether anything was written");
        assert_eq!(flags & !(WRITE | AVAIL | USED), 0);
        let sent = self.sent.remove(&id).expect("a used descriptor for no chain");
        self.used += u64::from(sent.count);
        self.ids.push(id);
        Some((sent, len))
    }

    fn set_event(&self, flags: u16, place: u64) {
        self.guest.write(self.at.driver, &bits(place, self.size).to_le_bytes());
        self.guest.write(self.at.driver + 2, &flags.to_le_bytes());
    }

    /// Device event suppression: (offset and wrap counter, flags).
    fn device_event(&self) -> (u16, u16) {
        (self.guest.u16(self.at.device), self.guest.u16(self.at.device + 2))
    }

    /// Whether the device wants to be notified of what was made available since `old`, as drivers work it out.
    fn wants_kick(&self, old: u64) -> bool {
        let (event, flags) = self.device_event();
        match flags {
            ENABLE => true,
            DISABLE => false,
            DESC => {
                let wrap = bits(self.avail, self.size) >> 15;
                let new = (self.avail % u64::from(self.size)) as u16;
                let old = new.wrapping_sub((self.avail - old) as u16);
                let mut index = event & 0x7fff;
                if event >> 15 != wrap {
                    index = index.wrapping_sub(self.size);
                }
                new.wrapping_sub(index).wrapping_sub(1) < new.wrapping_sub(old)
            }
            other => panic!("device event flags {other}"),
        }
    }
}

#[test]
fn one_chain_goes_round() {
    let guest = Guest::new(BASE, SIZE);
    let mut device = open(&guest, 8, ALL, FRESH);
    assert!(device.is_packed());
    assert_eq!(device.available().unwrap(), 0, "a ring of zeroes is empty");
    assert!(!device.has_work());
    guest.write(DATA, b"hello");
    put(&guest, 1, DATA + 100, 10, 5, WRITE | AVAIL);
    let mut chain = Chain::default();
    assert!(!device.pop(&guest.map, &mut chain).unwrap(), "the first comes last");
    put(&guest, 0, DATA, 5, 77, NEXT | AVAIL);
    assert!(device.has_work());
    assert_eq!(device.peek_avail_idx(), 0x8001);
    assert!(device.available().unwrap() >= 1);
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    assert_eq!(chain.head, 5);
    let mut bytes = [0; 8];
    assert_eq!(chain.readable.read(&mut bytes), 5);
    assert_eq!(&bytes[..5], b"hello");
    assert_eq!(chain.writable.write(b"world"), 5);
    assert_eq!((device.next_avail(), device.used_idx()), (0x8002, 0x8000));
    assert_eq!(device.position(), 0x8000_8002);
    assert!(!device.publish(), "nothing to publish yet");
    device.push_used(chain.head, 5);
    assert_eq!(guest.u16(BASE + 14), NEXT | AVAIL, "invisible until published");
    assert!(device.publish());
    assert_eq!(guest.u32(BASE + 8), 5);
    assert_eq!(guest.u16(BASE + 12), 5);
    assert_eq!(guest.u16(BASE + 14), AVAIL | USED | WRITE);
    assert_eq!(guest.u16(BASE + 30), WRITE | AVAIL, "skipped, not written");
    assert_eq!(guest.read(DATA + 100, 5), b"world");
    assert!(device.should_signal(0));
    assert_eq!(device.position(), 0x8002_8002);
    chain.clear();
    assert!(!device.pop(&guest.map, &mut chain).unwrap());
    assert_eq!(device.available().unwrap(), 0);
}

#[test]
fn two_flags_and_the_lap_say_whose_a_descriptor_is() {
    let guest = Guest::new(BASE, SIZE);
    for (position, mine) in [(0x8002_8002, AVAIL), (0x0002_0002, USED)] {
        for flags in [0, AVAIL, USED, AVAIL | USED] {
            put(&guest, 2, DATA, 4, 0, flags);
            let mut device = open(&guest, 8, ALL, position);
            assert_eq!(device.has_work(), flags == mine, "{position:#x} {flags:#x}");
            let popped = device.pop(&guest.map, &mut Chain::default()).unwrap();
            assert_eq!(popped, flags == mine, "{position:#x} {flags:#x}");
        }
    }
}

#[test]
fn unpublished_descriptors_are_not_the_drivers() {
    let guest = Guest::new(BASE, SIZE);
    let mut driver = Driver::new(&guest, 2);
    let mut device = open(&guest, 2, ALL, FRESH);
    let mut chain = Chain::default();
    for _ in 0..2 {
        driver.add_one();
        chain.clear();
        assert!(device.pop(&guest.map, &mut chain).unwrap());
        device.push_used(chain.head, 0);
    }
    put(&guest, 0, DATA, 4, 0, USED);
    assert_eq!(device.available().unwrap_err().rule, "ring.avail-index");
    device.publish();
    put(&guest, 0, DATA, 4, 0, USED);
    assert_eq!(device.available().unwrap(), 2);
}

#[test]
fn a_batch_is_visible_at_once() {
    let guest = Guest::new(BASE, SIZE);
    let mut driver = Driver::new(&guest, 5);
    let mut device = open(&guest, 5, ALL, FRESH);
    let mut chain = Chain::default();
    for _ in 0..7 {
        let ids: Vec<u16> = (0..4).map(|_| driver.add_one()).collect();
        for &id in &ids {
            chain.clear();
            assert!(device.pop(&guest.map, &mut chain).unwrap());
            assert_eq!(chain.head, id);
        }
        for &id in ids.iter().rev() {
            device.push_used(id, 0);
            assert!(driver.reap().is_none());
        }
        let used = device.used_idx();
        assert!(device.publish());
        assert_ne!(device.used_idx(), used);
        for &id in ids.iter().rev() {
            let (sent, written) = driver.reap().unwrap();
            assert_eq!((sent.id, written), (id, 0));
        }
        assert!(driver.reap().is_none());
        assert!(!device.publish());
    }
}

#[test]
fn addresses_are_checked_as_a_whole() {
    let guest = Guest::new(BASE, SIZE);
    let a = addresses(256);
    let try_it = |addresses: RingAddresses, space, size| {
        PackedRing::new(&guest.map, space, addresses, size, 256, ALL, FRESH)
            .map_err(|fault| fault.rule)
            .err()
    };
    let end = BASE + SIZE;
    assert_eq!(any::area_sizes(100, true), (1600, 4, 4));
    assert_eq!(any::area_sizes(8, false), (128, 22, 70));
    for size in [1, 2, 3, 7, 100, 255, 256] {
        assert_eq!(try_it(a, AddressSpace::Guest, size), None, "{size}");
    }
    for size in [0, 257, 512, 0x8001] {
        assert_eq!(try_it(a, AddressSpace::Guest, size), Some("ring.size"), "{size}");
    }
    let largest = |size| packed::resolve(&guest.map, AddressSpace::Guest, addresses(size), size, u16::MAX);
    assert!(largest(0x8000).is_ok());
    assert_eq!(largest(0x8001).err().unwrap().rule, "ring.size");
    let user = RingAddresses {
        desc: a.desc + USER,
        driver: a.driver + USER,
        device: a.device + USER,
    };
    assert_eq!(try_it(user, AddressSpace::User, 256), None);
    assert_eq!(try_it(user, AddressSpace::Guest, 256), Some("ring.address"));
    let edge = RingAddresses {
        desc: end - 16 * 7,
        driver: end - 4,
        device: BASE,
    };
    assert_eq!(try_it(edge, AddressSpace::Guest, 7), None);
    let cases = [
        (
            RingAddresses {
                desc: end - 16 * 255,
                ..a
            },
            "ring.address",
        ),
        (RingAddresses { driver: end, ..a }, "ring.address"),
        (
            RingAddresses {
                device: u64::MAX - 3,
                ..a
            },
            "ring.address",
        ),
        (RingAddresses { desc: a.desc + 8, ..a }, "ring.alignment"),
        (
            RingAddresses {
                driver: a.driver + 2,
                ..a
            },
            "ring.alignment",
        ),
        (
            RingAddresses {
                device: a.device + 2,
                ..a
            },
            "ring.alignment",
        ),
    ];
    for (number, (addresses, rule)) in cases.into_iter().enumerate() {
        assert_eq!(try_it(addresses, AddressSpace::Guest, 256), Some(rule), "case {number}");
    }
}

#[test]
fn positions_are_checked() {
    let guest = Guest::new(BASE, SIZE);
    let try_it = |features: RingFeatures, size, position| {
        let ring = Ring::new(
            &guest.map,
            AddressSpace::Guest,
            addresses(size),
            size,
            size,
            features,
            position,
        );
        ring.map(|ring| ring.position()).map_err(|fault| fault.rule)
    };
    assert_eq!(fresh_position(true), 0x8000_8000);
    for position in [
        0x8000_8000u32,
        0,
        0x8006_8006,
        0x8000_8006,
        0x8003_0002, // avail is a lap on, less one
        0x8000_0000, // all taken, none used
        0x0003_8002,
    ] {
        assert_eq!(try_it(ALL, 7, position), Ok(position), "{position:#x}");
    }
    for position in [
        0x8007_8007u32,
        0x8000_8007,
        0x8007_8000,
        0x8000_ffff,
        0x8003_8002, // used is before avail
        0x8003_0004, // more than a lap
        0x0000_8001,
    ] {
        assert_eq!(try_it(ALL, 7, position), Err("ring.position"), "{position:#x}");
    }
    let split = RingFeatures { packed: false, ..ALL };
    assert_eq!(fresh_position(false), 0);
    assert_eq!(try_it(split, 8, 0xfffe), Ok(0xfffe));
    assert_eq!(try_it(split, 8, FRESH), Err("ring.position"));
    assert_eq!(try_it(split, 7, 0), Err("ring.size"));
}

#[test]
fn the_enum_serves_split_rings() {
    let guest = Guest::new(BASE, SIZE);
    let mut ring = common::Ring::legacy(BASE, 8, 4096);
    let features = RingFeatures { packed: false, ..ALL };
    let mut device = Ring::new(
        &guest.map,
        AddressSpace::Guest,
        ring.addresses,
        8,
        8,
        features,
        fresh_position(false),
    )
    .unwrap();
    assert!(!device.is_packed() && !device.has_work());
    device.disable_notification();
    ring.descriptor(&guest, 3, DATA, 5, 0, 0);
    ring.offer(&guest, 3);
    assert!(device.has_work() && device.enable_notification());
    assert_eq!((device.available().unwrap(), device.peek_avail_idx()), (1, 1));
    let mut chain = Chain::default();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    device.undo_pop();
    chain.clear();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    assert_eq!((chain.head, device.next_avail(), device.position()), (3, 1, 1));
    device.push_used(3, 0);
    assert!(device.publish() && device.should_signal(0));
    assert_eq!(device.used_idx(), 1);
    assert!(device.rebase(&guest.map, AddressSpace::Guest, ring.addresses));
    device.set_features(RingFeatures {
        event_idx: true,
        ..features
    });
    assert!(!device.enable_notification());
    assert_eq!(ring.avail_event(&guest), 1);
}

/// Takes chains until there is none or one is refused.
fn take_all(guest: &Guest, features: RingFeatures) -> Result<usize, Fault> {
    let mut device = open(guest, 8, features, FRESH);
    let mut taken = 0;
    let mut chain = Chain::default();
    while device.available()? > 0 {
        chain.clear();
        assert!(device.pop(&guest.map, &mut chain)?);
        taken += 1;
    }
    Ok(taken)
}

#[test]
fn broken_chains_are_named() {
    const END: u64 = BASE + SIZE;
    type Case = (&'static str, fn(&Guest));
    let cases: [Case; 27] = [
        ("ring.chain-length", |g| {
            (0..8).for_each(|n| put(g, n, DATA, 4, n, NEXT | AVAIL));
        }),
        ("ring.chain-length", |g| {
            put(g, 0, DATA, 4, 0, AVAIL);
            // It would go on over the first, which is in flight.
            (1..8).for_each(|n| put(g, n, DATA, 4, n, NEXT | AVAIL));
        }),
        ("ring.buffer-id", |g| put(g, 0, DATA, 4, 8, AVAIL)),
        ("ring.buffer-id", |g| put(g, 0, DATA, 4, u16::MAX, AVAIL)),
        ("ring.buffer-id", |g| {
            put(g, 0, DATA, 4, 3, AVAIL);
            put(g, 1, DATA, 4, 3, AVAIL);
        }),
        ("ring.zero-length", |g| put(g, 0, DATA, 0, 0, AVAIL)),
        ("ring.zero-length", |g| {
            put(g, 0, DATA, 4, 0, AVAIL | NEXT);
            put(g, 1, DATA, 0, 0, AVAIL | WRITE);
        }),
        ("ring.buffer-address", |g| put(g, 0, END - 3, 4, 0, AVAIL)),
        ("ring.buffer-address", |g| put(g, 0, u64::MAX - 1, 4, 0, AVAIL)),
        ("ring.buffer-address", |g| put(g, 0, BASE, u32::MAX, 0, AVAIL | WRITE)),
        ("ring.buffer-address", |g| put(g, 0, BASE - 1, 4, 0, AVAIL)),
        ("ring.buffer-order", |g| {
            put(g, 0, DATA, 4, 0, AVAIL | NEXT | WRITE);
            put(g, 1, DATA, 4, 0, AVAIL);
        }),
        ("ring.indirect-next", |g| {
            put(g, 0, TABLES, 16, 0, AVAIL | INDIRECT | NEXT);
        }),
        ("ring.indirect-next", |g| {
            g.write(TABLES, &descriptor(DATA, 4, 0, 0));
            put(g, 0, DATA, 4, 0, AVAIL | NEXT);
            put(g, 1, TABLES, 16, 0, AVAIL | INDIRECT);
        }),
        ("ring.indirect-length", |g| put(g, 0, TABLES, 24, 0, AVAIL | INDIRECT)),
        ("ring.indirect-length", |g| {
            put(g, 0, TABLES, 16 * 9, 0, AVAIL | INDIRECT);
        }),
        ("ring.indirect-length", |g| put(g, 0, TABLES, 0, 0, AVAIL | INDIRECT)),
        ("ring.indirect-length", |g| put(g, 0, TABLES, 15, 0, AVAIL | INDIRECT)),
        ("ring.indirect-length", |g| {
            put(g, 0, TABLES, u32::MAX - 15, 0, AVAIL | INDIRECT);
        }),
        ("ring.indirect-address", |g| {
            put(g, 0, END - 16, 32, 0, AVAIL | INDIRECT);
        }),
        ("ring.indirect-address", |g| {
            put(g, 0, u64::MAX - 15, 32, 0, AVAIL | INDIRECT);
        }),
        ("ring.buffer-address", |g| {
            g.write(TABLES, &descriptor(END, 4, 0, 0));
            put(g, 0, TABLES, 16, 0, AVAIL | INDIRECT);
        }),
        ("ring.zero-length", |g| {
            // All entries of the table count, NEXT or not.
            g.write(TABLES, &descriptor(DATA, 4, 0, 0));
            put(g, 0, TABLES, 32, 0, AVAIL | INDIRECT);
        }),
        ("ring.buffer-order", |g| {
            g.write(TABLES, &descriptor(DATA, 4, 0, WRITE));
            g.write(TABLES + 16, &descriptor(DATA, 4, 0, 0));
            put(g, 0, TABLES, 32, 0, AVAIL | INDIRECT);
        }),
        ("ring.buffer-order", |g| {
            g.write(TABLES + 4, &descriptor(DATA, 4, 0, WRITE));
            g.write(TABLES + 20, &descriptor(DATA, 4, 0, 0));
            put(g, 0, TABLES + 4, 32, 0, AVAIL | INDIRECT);
        }),
        ("ring.buffer-id", |g| {
            g.write(TABLES, &descriptor(DATA, 4, 0, 0));
            put(g, 0, TABLES, 16, 9, AVAIL | INDIRECT);
        }),
        ("ring.avail-index", |g| {
            // The device has taken all of them when it gets here again; flags as on the next lap.
            (0..8).for_each(|n| put(g, n, DATA, 4, n, AVAIL));
        }),
    ];
    for (number, (expected, build)) in cases.into_iter().enumerate() {
        let guest = Guest::new(BASE, SIZE);
        build(&guest);
        let result = if expected == "ring.avail-index" {
            let mut device = open(&guest, 8, ALL, FRESH);
            let mut chain = Chain::default();
            for _ in 0..8 {
                chain.clear();
                assert!(device.pop(&guest.map, &mut chain).unwrap());
            }
            assert_eq!(device.available().unwrap(), 0);
            put(&guest, 0, DATA, 4, 0, USED);
            assert_eq!(device.available().unwrap_err().rule, expected);
            device.pop(&guest.map, &mut chain).map(usize::from)
        } else {
            take_all(&guest, ALL)
        };
        assert_eq!(
            result.map_err(|fault| fault.rule),
            Err(expected),
            "case {number} ({expected})"
        );
    }
    let guest = Guest::new(BASE, SIZE);
    guest.write(TABLES, &descriptor(DATA, 4, 0, 0));
    put(&guest, 0, TABLES, 16, 0, AVAIL | INDIRECT);
    assert_eq!(take_all(&guest, ALL).unwrap(), 1);
    let without = RingFeatures { indirect: false, ..ALL };
    assert_eq!(
        take_all(&guest, without).unwrap_err().rule,
        "ring.indirect-not-negotiated"
    );
}

#[test]
fn four_gigabytes_are_too_many() {
    let guest = Guest::new(BASE, 64 << 20);
    for index in 0..130u16 {
        let next = if index < 129 { NEXT } else { 0 };
        put(&guest, index, BASE + 0x10_0000, 32 << 20, 0, AVAIL | WRITE | next);
    }
    let mut device = open(&guest, 256, ALL, FRESH);
    let fault = device.pop(&guest.map, &mut Chain::default()).unwrap_err();
    assert_eq!(fault.rule, "ring.total-length");
}

#[test]
fn indirect_table_at_any_place() {
    for shift in [0, 1, 2, 8, 13] {
        let guest = Guest::new(BASE, SIZE);
        guest.write(TABLES + shift, &descriptor(DATA, 16, 99, NEXT | INDIRECT));
        guest.write(TABLES + shift + 16, &descriptor(DATA + 64, 7, 2, WRITE | USED));
        guest.write(TABLES + shift + 32, &descriptor(DATA + 128, 9, 0, WRITE));
        put(&guest, 0, TABLES + shift, 48, 4, AVAIL | INDIRECT);
        let mut device = open(&guest, 8, ALL, FRESH);
        let mut chain = Chain::default();
        assert!(device.pop(&guest.map, &mut chain).unwrap());
        assert_eq!((chain.readable.len(), chain.writable.len()), (16, 16), "shift {shift}");
        assert_eq!((chain.head, device.next_avail()), (4, 0x8001));
    }
}

#[test]
fn a_table_may_be_as_long_as_the_largest_queue() {
    let guest = Guest::new(BASE, SIZE);
    for n in 0..17u64 {
        guest.write(TABLES + 16 * n, &descriptor(DATA, 4, 0, 0));
    }
    for (entries, accepted) in [(16, true), (17, false)] {
        put(&guest, 0, TABLES, 16 * entries, 0, AVAIL | INDIRECT);
        let mut device = Ring::new(&guest.map, AddressSpace::Guest, addresses(3), 3, 16, ALL, FRESH).unwrap();
        let result = device.pop(&guest.map, &mut Chain::default());
        assert_eq!(result.is_ok(), accepted, "{entries} entries");
    }
}

#[test]
fn undo_puts_a_chain_back() {
    let guest = Guest::new(BASE, SIZE);
    let mut device = open(&guest, 3, ALL, FRESH);
    let mut chain = Chain::default();
    put(&guest, 0, DATA, 4, 2, AVAIL | NEXT);
    put(&guest, 1, DATA, 4, 2, AVAIL | NEXT);
    put(&guest, 2, DATA, 4, 2, AVAIL);
    for _ in 0..3 {
        chain.clear();
        assert!(device.pop(&guest.map, &mut chain).unwrap());
        assert_eq!(device.next_avail(), 0, "over the end: the wrap counter changes");
        device.undo_pop();
        assert_eq!(device.position(), FRESH);
        device.undo_pop();
        assert_eq!(device.position(), FRESH, "there is one to put back only");
    }
    chain.clear();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    device.push_used(2, 0);
    device.undo_pop();
    assert_eq!(device.next_avail(), 0, "what is used stays used");
    assert!(device.publish());
    assert_eq!(device.position(), 0);
}

#[test]
#[should_panic(expected = "not in flight")]
fn using_what_is_not_in_flight_is_a_bug() {
    let guest = Guest::new(BASE, SIZE);
    open(&guest, 8, ALL, FRESH).push_used(3, 0);
}

#[test]
fn notifications_without_event_idx() {
    let guest = Guest::new(BASE, SIZE);
    let mut driver = Driver::new(&guest, 7);
    let mut device = open(&guest, 7, ALL, FRESH);
    device.disable_notification();
    assert_eq!(driver.device_event().1, DISABLE);
    assert!(!device.enable_notification());
    assert_eq!(driver.device_event().1, ENABLE);
    driver.add_one();
    assert!(device.enable_notification(), "something came in meanwhile");
    for (flags, expected) in [
        (DISABLE, false),
        (ENABLE, true),
        // Reserved bits are ignored, reserved values can't stop interrupts.
        (DISABLE | 0xfff0, false),
        (DESC, true),
        (3, true),
    ] {
        let mut chain = Chain::default();
        if driver.sent.is_empty() {
            driver.add_one();
        }
        assert!(device.pop(&guest.map, &mut chain).unwrap());
        device.push_used(chain.head, 0);
        device.publish();
        driver.set_event(flags, driver.used + 3);
        assert_eq!(device.should_signal(0), expected, "flags {flags}");
        driver.reap().unwrap();
    }
}

#[test]
fn event_idx_names_one_descriptor() {
    let guest = Guest::new(BASE, SIZE);
    let mut driver = Driver::new(&guest, 5);
    let mut device = open(&guest, 5, EVENT, FRESH);
    let mut signals = Vec::new();
    // Place 11 is index 1 on the third lap, whose wrap counter is 1 as on the first.
    driver.set_event(DESC, 11);
    for turn in 0..14 {
        let before = driver.avail;
        assert!(!device.enable_notification());
        assert_eq!(driver.device_event(), (bits(before, 5), DESC));
        driver.add_one();
        assert!(driver.wants_kick(before), "turn {turn}");
        device.disable_notification();
        assert!(!driver.wants_kick(before));
        let mut chain = Chain::default();
        assert!(device.pop(&guest.map, &mut chain).unwrap());
        device.push_used(chain.head, 0);
        device.publish();
        if device.should_signal(0) {
            signals.push(turn);
        }
        driver.reap().unwrap();
    }
    // The first time there is nothing to compare with. One bit doesn't tell place 1 from 11: once too often.
    assert_eq!(signals, [0, 1, 11]);
    driver.set_event(DESC, 0);
    guest.write(driver.at.driver, &5u16.to_le_bytes());
    driver.add_one();
    let mut chain = Chain::default();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    device.push_used(chain.head, 0);
    device.publish();
    assert!(
        device.should_signal(0),
        "index 5 of 5 is no place; interrupted to be safe"
    );
}

#[test]
fn event_idx_accepted_late() {
    let guest = Guest::new(BASE, SIZE);
    let mut device = open(&guest, 4, ALL, FRESH);
    assert!(!device.enable_notification());
    let mut driver = Driver::new(&guest, 4);
    let go_round = |driver: &mut Driver<'_>, device: &mut Ring| {
        driver.add_one();
        let mut chain = Chain::default();
        assert!(device.pop(&guest.map, &mut chain).unwrap());
        device.push_used(chain.head, 0);
        device.publish();
        driver.reap().unwrap();
        driver.set_event(DESC, driver.used + 1);
        device.should_signal(0)
    };
    assert!(go_round(&mut driver, &mut device));
    device.set_features(EVENT);
    assert!(
        go_round(&mut driver, &mut device),
        "what was returned before the first look at events is not counted"
    );
    assert!(!go_round(&mut driver, &mut device));
    assert!(!device.enable_notification());
    assert_eq!(driver.device_event(), (bits(driver.avail, 4), DESC));
}

#[test]
fn memory_may_go_and_come_back() {
    let guest = Guest::new(BASE, SIZE);
    let mut driver = Driver::new(&guest, 4);
    let mut device = open(&guest, 4, ALL, FRESH);
    let id = driver.add_one();
    let mut chain = Chain::default();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    let nothing = Arc::new(MemoryMap::default());
    assert!(!device.rebase(&nothing, AddressSpace::Guest, addresses(4)));
    device.push_used(id, 0);
    let fd = common::peer(&guest.file);
    let region = guest.cache.region(&fd, BASE, SIZE, BASE + USER, 0).unwrap();
    let again = Arc::new(MemoryMap::default().with(region).unwrap());
    assert!(device.rebase(&again, AddressSpace::Guest, addresses(4)));
    assert!(device.publish());
    assert_eq!(driver.reap().unwrap().0.id, id);
    assert_eq!(device.position(), 0x8001_8001);
}

/// A device goes on where another left with chains in flight: it uses what comes after, the others stay lost.
#[test]
fn going_on_with_lost_chains() {
    let guest = Guest::new(BASE, SIZE);
    let mut driver = Driver::new(&guest, 7);
    let mut device = open(&guest, 7, ALL, FRESH);
    let mut chain = Chain::default();
    driver.add_one();
    driver.add_one();
    for _ in 0..2 {
        chain.clear();
        assert!(device.pop(&guest.map, &mut chain).unwrap());
    }
    let position = device.position();
    assert_eq!(position, 0x8000_8002);
    let mut device = open(&guest, 7, ALL, position);
    for _ in 0..40 {
        let id = driver.add_one();
        assert!(device.available().unwrap() <= 5, "two are not the driver's");
        chain.clear();
        assert!(device.pop(&guest.map, &mut chain).unwrap());
        assert_eq!(chain.head, id);
        device.push_used(id, 1);
        assert!(device.publish());
        assert_eq!(driver.reap().unwrap().0.id, id);
    }
    assert_eq!(driver.sent.len(), 2);
}

/// Counts places without end on the device's side, too: what its answers are compared with.
struct Model {
    /// Chains made available and not popped, in order.
    queued: VecDeque<u16>,
    /// Popped and not used.
    in_flight: Vec<u16>,
    /// Published and not seen by the driver: buffer ID and length.
    done: VecDeque<(u16, u32)>,
    avail: u64,
    published: u64,
    /// `published` when `should_signal` was asked last.
    signalled: Option<u64>,
    /// What the driver has asked for.
    event: (u16, u64),
    /// Where the device has asked to be notified; None: not at all.
    notify: Option<u64>,
}

fn pieces(random: &mut Random, most: u64) -> Vec<Piece> {
    let count = 1 + random.below(most);
    let readable = random.below(count + 1);
    let mut addr = random.below(16);
    (0..count)
        .map(|n| {
            let len = 1 + random.below(24) as u32;
            let piece = Piece {
                addr,
                len,
                write: n >= readable,
            };
            addr += u64::from(len) + random.below(8);
            piece
        })
        .collect()
}

fn check_popped(chain: &Chain, sent: &Sent) {
    assert_eq!(chain.head, sent.id);
    let lens = |write: bool| -> Vec<usize> {
        let of = sent.pieces.iter().filter(|p| p.write == write);
        of.map(|p| p.len as usize).collect()
    };
    let found = |iov: &[libc::iovec]| -> Vec<usize> { iov.iter().map(|iov| iov.iov_len).collect() };
    assert_eq!(found(chain.readable.iovecs()), lens(false));
    assert_eq!(found(chain.writable.iovecs()), lens(true));
    let mut bytes = vec![0; chain.readable.len() as usize];
    chain.readable.read(&mut bytes);
    for (n, byte) in bytes.into_iter().enumerate() {
        assert_eq!(byte, (n as u8).wrapping_add(1) ^ sent.tag);
    }
}

fn check_written(guest: &Guest, sent: &Sent, written: u32) {
    let mut left = written as usize;
    for piece in sent.pieces.iter().filter(|p| p.write) {
        let n = left.min(piece.len as usize);
        assert!(guest.read(piece.addr, n).iter().all(|&byte| byte == !sent.tag));
        left -= n;
    }
    assert_eq!(left, 0);
}

/// Everything at random, at sizes that powers of two don't hide behind; returns the number of chains that went round.
fn random_run(size: u16, features: RingFeatures, seed: u64, steps: u32) -> u64 {
    let guest = Guest::new(BASE, SIZE);
    let mut random = Random::new(seed);
    let mut driver = Driver::new(&guest, size);
    let mut device = open(&guest, size, features, FRESH);
    let mut model = Model {
        queued: VecDeque::new(),
        in_flight: Vec::new(),
        done: VecDeque::new(),
        avail: 0,
        published: 0,
        signalled: None,
        event: (ENABLE, 0),
        notify: None,
    };
    let mut kicks_from = 0;
    let mut round = 0;
    let mut chain = Chain::default();
    device.disable_notification();
    for step in 0..steps {
        match random.below(13) {
            0..=3 => {
                for _ in 0..=random.below(6) {
                    let indirect = random.chance(30);
                    let most = if indirect {
                        u64::from(size).min(16)
                    } else {
                        u64::from(driver.free()).min(if random.chance(5) { 16 } else { 4 })
                    };
                    if driver.free() == 0 {
                        break;
                    }
                    let pieces = pieces(&mut random, most);
                    let id = driver.add(&mut random, pieces, indirect, step as u8);
                    model.queued.push_back(id);
                }
                let wanted = model
                    .notify
                    .is_some_and(|at| !features.event_idx || (kicks_from..driver.avail).contains(&at));
                let asked = driver.avail > kicks_from && driver.wants_kick(kicks_from);
                // Two laps after the device has asked it looks like new.
                let stale = model.notify.is_some_and(|at| driver.avail - at > u64::from(size));
                if driver.avail > kicks_from && !stale {
                    assert_eq!(asked, wanted, "step {step}");
                }
                kicks_from = driver.avail;
            }
            4..=6 => {
                for _ in 0..=random.below(8) {
                    assert_eq!(device.has_work(), !model.queued.is_empty());
                    let bound = device.available().unwrap();
                    assert!(usize::from(bound) >= model.queued.len() && bound <= size);
                    chain.clear();
                    let popped = device.pop(&guest.map, &mut chain).unwrap();
                    assert_eq!(popped, !model.queued.is_empty());
                    if !popped {
                        break;
                    }
                    let id = model.queued[0];
                    let sent = &driver.sent[&id];
                    check_popped(&chain, sent);
                    if random.chance(10) {
                        device.undo_pop();
                        continue;
                    }
                    model.queued.pop_front();
                    model.in_flight.push(id);
                    model.avail += u64::from(sent.count);
                    // What the device writes is there whatever comes of it.
                    chain.writable.write(&vec![!sent.tag; chain.writable.len() as usize]);
                }
                assert_eq!(device.next_avail(), bits(model.avail, size));
            }
            7..=8 => {
                let mut pushed = Vec::new();
                let mut slots = 0;
                for _ in 0..=random.below(5) {
                    if model.in_flight.is_empty() {
                        break;
                    }
                    let which = random.below(model.in_flight.len() as u64) as usize;
                    let id = model.in_flight.swap_remove(which);
                    let sent = &driver.sent[&id];
                    let room = Driver::total(&sent.pieces, true) as u64;
                    let written = random.below(room + 1) as u32;
                    device.push_used(id, written);
                    slots += u64::from(sent.count);
                    pushed.push((id, written));
                    if model.done.is_empty() {
                        assert!(!driver.used_now(), "not published yet");
                    }
                }
                assert_eq!(device.publish(), !pushed.is_empty());
                if pushed.is_empty() {
                    continue;
                }
                model.done.extend(pushed);
                model.published += slots;
                assert_eq!(device.used_idx(), bits(model.published, size));
                if random.chance(10) {
                    continue;
                }
                let signal = device.should_signal(model.in_flight.len());
                let (flags, place) = model.event;
                let wanted = match flags {
                    ENABLE => true,
                    DISABLE => false,
                    // Not asked for two laps (it was skipped above): the device can't tell any more.
                    _ => model.signalled.is_none_or(|old| {
                        model.published - old >= 2 * u64::from(size) || (old..model.published).contains(&place)
                    }),
                };
                let stale = flags == DESC && model.published > place + u64::from(size);
                if !stale {
                    assert_eq!(signal, wanted, "step {step}");
                }
                model.signalled = Some(model.published);
            }
            9..=10 => {
                for _ in 0..=random.below(6) {
                    let Some((sent, written)) = driver.reap() else {
                        assert!(model.done.is_empty());
                        break;
                    };
                    assert_eq!(model.done.pop_front(), Some((sent.id, written)));
                    check_written(&guest, &sent, written);
                    round += 1;
                }
            }
            11 => {
                let place = driver.used + random.below(u64::from(size));
                model.event = match random.below(3) {
                    0 => (DISABLE, place),
                    1 if features.event_idx => (DESC, place),
                    _ => (ENABLE, place),
                };
                driver.set_event(model.event.0, place);
            }
            _ => {
                if random.chance(30) && model.in_flight.is_empty() {
                    // Stop and start. Chains that wait in the ring are taken by the next device.
                    let position = device.position();
                    let expected = u32::from(bits(model.avail, size)) | u32::from(bits(model.published, size)) << 16;
                    assert_eq!(position, expected);
                    device = open(&guest, size, features, position);
                    model.signalled = None;
                }
                if random.chance(20) {
                    assert!(device.rebase(&guest.map, AddressSpace::Guest, addresses(size)));
                }
                if random.chance(50) {
                    device.disable_notification();
                    model.notify = None;
                } else {
                    assert_eq!(device.enable_notification(), !model.queued.is_empty());
                    model.notify = Some(model.avail);
                }
            }
        }
    }
    round
}

#[test]
fn agrees_with_an_independent_driver() {
    let mut round = 0;
    for (number, size) in [1u16, 2, 3, 5, 7, 8, 100, 255, 256, 1024].into_iter().enumerate() {
        for features in [ALL, EVENT] {
            let seed = 10 * number as u64 + u64::from(features.event_idx);
            let one = random_run(size, features, seed, 20_000);
            assert!(one > 500, "size {size}: {one} chains went round only");
            round += one;
        }
    }
    assert!(round > 100_000, "{round} chains went round only");
}

#[test]
fn random_bytes_never_panic() {
    let guest = Guest::new(BASE, SIZE);
    let mut random = Random::new(99);
    let (mut accepted, mut refused) = (0u32, 0u32);
    let mut rules: HashMap<&'static str, u32> = HashMap::new();
    for round in 0..20_000 {
        let size = 1 + random.below(20) as u16;
        let lap = random.below(2);
        let mut bytes = Vec::new();
        for index in 0..u64::from(size) + 1 {
            let mut word = || match random.below(4) {
                0 => random.next(),
                1 => BASE + random.below(SIZE + 64),
                _ => DATA + random.below(0x1000),
            };
            let addr = word();
            // Half of the rounds are noise, the others have what is needed to get further.
            let (len, id, flags) = if round % 2 == 0 {
                (random.next() as u32, random.next() as u16, random.next() as u16)
            } else {
                let kind = match random.below(10) {
                    0 => INDIRECT,
                    1..=3 => NEXT,
                    4..=5 => NEXT | WRITE,
                    _ => WRITE,
                };
                let place = lap * u64::from(size) + index;
                let id = (index as u16 + random.below(2) as u16) % (size + 1);
                (random.below(200) as u32, id, kind | available(place, size))
            };
            bytes.extend(descriptor(addr, len, id, flags));
        }
        // The last one overwrites the event suppression structures.
        guest.write(BASE, &bytes);
        if random.chance(20) {
            guest.write(DATA, &(0..0x400).map(|_| random.next() as u8).collect::<Vec<_>>());
        }
        let features = RingFeatures {
            event_idx: random.chance(50),
            indirect: random.chance(80),
            ..ALL
        };
        let position = if random.chance(50) {
            let place = bits(lap * u64::from(size) + random.below(u64::from(size)), size);
            u32::from(place) | u32::from(place) << 16
        } else {
            random.next() as u32
        };
        let ring = Ring::new(
            &guest.map,
            AddressSpace::Guest,
            addresses(size),
            size,
            size,
            features,
            position,
        );
        let mut device = match ring {
            Ok(ring) => ring,
            Err(fault) => {
                assert_eq!(fault.rule, "ring.position");
                continue;
            }
        };
        let mut in_flight = Vec::new();
        for _ in 0..40 {
            let mut chain = Chain::default();
            match random.below(6) {
                0..=2 => match device.available().and_then(|_| device.pop(&guest.map, &mut chain)) {
                    Ok(true) => {
                        accepted += 1;
                        assert!(!in_flight.contains(&chain.head) && chain.head < size);
                        in_flight.push(chain.head);
                        if random.chance(10) {
                            device.undo_pop();
                            in_flight.pop();
                        }
                        assert!(in_flight.len() <= usize::from(size));
                    }
                    Ok(false) => {}
                    Err(fault) => {
                        refused += 1;
                        *rules.entry(fault.rule).or_default() += 1;
                        break;
                    }
                },
                3 if !in_flight.is_empty() => {
                    let which = random.below(in_flight.len() as u64) as usize;
                    device.push_used(in_flight.swap_remove(which), random.next() as u32);
                }
                4 => {
                    if device.publish() {
                        device.should_signal(in_flight.len());
                    }
                }
                _ => {
                    device.disable_notification();
                    device.enable_notification();
                    device.peek_avail_idx();
                    // The driver writes on.
                    let at = BASE + random.below(16 * u64::from(size));
                    guest.write(at, &random.next().to_le_bytes()[..1 + random.below(8) as usize]);
                }
            }
        }
        device.publish();
    }
    assert!(
        accepted > 2000 && refused > 2000,
        "accepted {accepted}, refused {refused}"
    );
    assert!(rules.len() >= 8, "{rules:?}");
}

/// A notification or interrupt between the two threads below.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.heard.notify_one();
    }

    /// Waits until it was rung. That takes no time to speak of, or it was lost.
    fn wait(&self, who: &str) {
        let rung = self.rung.lock().unwrap();
        let limit = Duration::from_secs(20);
        let (mut rung, result) = self.heard.wait_timeout_while(rung, limit, |rung| !*rung).unwrap();
        assert!(!result.timed_out(), "{who} was not woken");
        *rung = false;
    }
}

/// The driver's side with the atomics that a driver in another thread needs.
struct Live {
    desc: HostArea,
    driver: HostArea,
    device: HostArea,
    size: u16,
}

impl Live {
    fn new(map: &Arc<MemoryMap>, size: u16) -> Self {
        let [desc, driver, device] = packed::resolve(map, AddressSpace::Guest, addresses(size), size, size).unwrap();
        Self {
            desc,
            driver,
            device,
            size,
        }
    }

    fn at(&self, place: u64) -> usize {
        16 * (place % u64::from(self.size)) as usize
    }

    /// Makes a chain of `count` readable descriptors available, all of the same buffer.
    fn offer(&self, place: u64, count: u64, id: u16, addr: u64, len: u32) {
        for n in (0..count).rev() {
            let at = self.at(place + n);
            let next = if n + 1 < count { NEXT } else { 0 };
            self.desc.u32(at).store((addr as u32).to_le(), Ordering::Relaxed);
            self.desc
                .u32(at + 4)
                .store(((addr >> 32) as u32).to_le(), Ordering::Relaxed);
            self.desc.u32(at + 8).store(len.to_le(), Ordering::Relaxed);
            self.desc.u16(at + 12).store(id.to_le(), Ordering::Relaxed);
            let flags = next | available(place + n, self.size);
            self.desc.u16(at + 14).store(flags.to_le(), Ordering::Release);
        }
    }

    fn used(&self, place: u64) -> Option<(u16, u32)> {
        let at = self.at(place);
        let flags = u16::from_le(self.desc.u16(at + 14).load(Ordering::Acquire));
        is_used(place, self.size, flags).then(|| {
            (
                u16::from_le(self.desc.u16(at + 12).load(Ordering::Relaxed)),
                u32::from_le(self.desc.u32(at + 8).load(Ordering::Relaxed)),
            )
        })
    }

    fn wants_kick(&self, old: u64, new: u64) -> bool {
        fence(Ordering::SeqCst);
        match u16::from_le(self.device.u16(2).load(Ordering::Acquire)) {
            DISABLE => false,
            DESC => {
                let event = u16::from_le(self.device.u16(0).load(Ordering::Relaxed));
                (old..new).any(|place| bits(place, self.size) == event)
            }
            _ => true,
        }
    }

    fn set_event(&self, flags: u16, place: u64) {
        let event = bits(place, self.size);
        self.driver.u16(0).store(event.to_le(), Ordering::Relaxed);
        self.driver.u16(2).store(flags.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

/// Driver and device in two threads that sleep whenever there is nothing to do: nobody misses the other's work, and
/// nobody sees half of it.
fn race(size: u16, features: RingFeatures, chains: u64) {
    let guest = Guest::new(BASE, SIZE);
    let (kick, call) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
    let mut device = open(&guest, size, features, FRESH);
    let worker = {
        let (kick, call, map) = (Arc::clone(&kick), Arc::clone(&call), Arc::clone(&guest.map));
        std::thread::spawn(move || {
            let mut random = Random::new(7);
            let mut chain = Chain::default();
            let mut taken = 0u64;
            let mut held = Vec::new();
            while taken < chains || !held.is_empty() {
                device.disable_notification();
                let mut busy = false;
                for _ in 0..8 {
                    device.available().unwrap();
                    chain.clear();
                    if !device.pop(&map, &mut chain).unwrap() {
                        break;
                    }
                    // Every chain's pieces have the length that goes with its turn: none is seen with old content.
                    for iov in chain.readable.iovecs() {
                        assert_eq!(iov.iov_len as u64, 1 + taken % 1000);
                    }
                    held.push((chain.head, chain.readable.len() as u32));
                    taken += 1;
                    busy = true;
                }
                while !held.is_empty() && (!busy || random.chance(70)) {
                    let (id, len) = held.swap_remove(random.below(held.len() as u64) as usize);
                    device.push_used(id, len);
                }
                if device.publish() && device.should_signal(held.len()) {
                    call.ring();
                }
                if !busy && taken < chains && !device.enable_notification() {
                    kick.wait("the device");
                }
            }
        })
    };
    let live = Live::new(&guest.map, size);
    let mut random = Random::new(8);
    let (mut avail, mut used, mut offered, mut reaped) = (0u64, 0u64, 0u64, 0u64);
    let mut ids: Vec<u16> = (0..size).collect();
    let mut sent: HashMap<u16, (u64, u32)> = HashMap::new();
    live.set_event(DISABLE, 0);
    while reaped < chains {
        let old = avail;
        for _ in 0..=random.below(8) {
            let count = 1 + random.below(3).min(u64::from(size) - 1);
            if offered == chains || avail + count > used + u64::from(size) {
                break;
            }
            let id = ids.swap_remove(random.below(ids.len() as u64) as usize);
            let len = 1 + (offered % 1000) as u32;
            live.offer(avail, count, id, DATA, len);
            sent.insert(id, (count, len * count as u32));
            avail += count;
            offered += 1;
        }
        if avail > old && live.wants_kick(old, avail) {
            kick.ring();
        }
        let mut any = false;
        while let Some((id, len)) = live.used(used) {
            let (count, expected) = sent.remove(&id).expect("used twice");
            assert_eq!(len, expected);
            used += count;
            ids.push(id);
            reaped += 1;
            any = true;
        }
        if !any && avail == old && reaped < chains {
            live.set_event(if features.event_idx { DESC } else { ENABLE }, used);
            if live.used(used).is_none() {
                call.wait("the driver");
            }
            live.set_event(DISABLE, used);
        }
    }
    worker.join().unwrap();
    assert_eq!(avail, used);
}

#[test]
fn two_threads_never_miss_each_other() {
    let begin = Instant::now();
    for size in [3, 64] {
        for features in [ALL, EVENT] {
            race(size, features, 50_000);
        }
    }
    assert!(begin.elapsed() < Duration::from_secs(60));
}
