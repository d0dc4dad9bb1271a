// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The packed ring against a model of the specification, step by step.
//!
//! The model counts places without end and derives indices and wrap counters from them; it walks through the same bytes as the
//! ring, says which rule a chain breaks, and keeps its own copy of what the device has to write. The driver is hostile: it
//! writes what it likes, where it likes.

#![no_main]

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vhu_core::ring::any::{fresh_position, Ring};
use vhu_core::ring::packed::area_sizes;
use vhu_core::ring::split::{AddressSpace, RingAddresses};
use vhu_core::ring::{Chain, RingFeatures};
use vhu_fuzz::arena::{descriptor, in_one_region, Arena, Piece, Pieces, Place, INDIRECT, NEXT, RINGS, WRITE};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const DISABLE: u16 = 1;
const DESC: u16 = 2;
const MOST_OPS: usize = 256;

#[derive(Arbitrary, Debug)]
struct Desc {
    addr: Place,
    len: u16,
    long: bool,
    id: u8,
    flags: u8,
    /// AVAIL and USED as for a descriptor that is available at this time; otherwise as `flags` says.
    available: bool,
}

#[derive(Arbitrary, Debug)]
struct Buffer {
    addr: Place,
    len: u8,
    write: bool,
}

#[derive(Arbitrary, Debug)]
enum Op {
    // The driver's.
    /// Relative to where the device is.
    Descriptor {
        ahead: u8,
        desc: Desc,
    },
    Table {
        at: Place,
        entries: Vec<Desc>,
    },
    /// A chain as good as its buffers.
    Offer {
        id: Option<u8>,
        buffers: Vec<Buffer>,
        table: Option<Place>,
        /// More than it got back, over what the device has.
        greedy: bool,
    },
    DriverEvent {
        flags: u8,
        ahead: i8,
        wrap: bool,
    },
    AnyDriverEvent([u8; 4]),
    Poke {
        at: Place,
        bytes: [u8; 4],
    },
    // The device's.
    Look,
    Take {
        fill: bool,
    },
    TakeAll,
    Undo,
    Use {
        which: u8,
        written: u32,
    },
    UseAll,
    Publish,
    Signal,
    Disable,
    Enable,
    Reopen,
    Rebase,
    Features(u8),
}

#[derive(Arbitrary, Debug)]
struct Input {
    wild: Option<([Place; 3], u16, u16)>,
    size: u8,
    max: u8,
    features: u8,
    /// Where the ring begins; None: fresh.
    position: Option<u32>,
    ops: Vec<Op>,
}

fn features(bits: u8) -> RingFeatures {
    RingFeatures {
        event_idx: bits & 1 != 0,
        indirect: bits & 2 != 0,
        notify_on_empty: bits & 4 != 0,
        packed: true,
    }
}

/// A place in the ring, counted from its first use.
type Count = u64;

struct Bed<'a> {
    arena: &'a Arena,
    at: RingAddresses,
    size: u16,
    max: u16,
    features: RingFeatures,
    ring: Ring,
    /// Next descriptor to take.
    avail: Count,
    /// Where the next used descriptor goes.
    used: Count,
    published: Count,
    /// Flags of the batch's first used descriptor, which come last.
    held_back: Option<u16>,
    /// Buffer IDs in flight, and the descriptors of each.
    flight: Vec<u16>,
    counts: HashMap<u16, u16>,
    last: Option<u16>,
    /// Up to where the driver was considered for a signal.
    signalled: Option<Count>,
    /// Where the driver makes its next chain available; it follows the device when that was broken off.
    driver: Count,
}

impl<'a> Bed<'a> {
    /// None when the position is none of this ring.
    fn new(arena: &'a Arena, input: &Input) -> Option<Self> {
        let size = u16::from(input.size % 40) + 1;
        let max = size + u16::from(input.max % 40);
        let driver = RINGS + area_sizes(size).0;
        let at = RingAddresses {
            desc: RINGS,
            driver,
            device: driver + 4,
        };
        let position = input.position.unwrap_or(fresh_position(true));
        let features = features(input.features);
        let ring = Ring::new(&arena.map, AddressSpace::Guest, at, size, max, features, position);
        let place = |bits: u32| {
            let index = Count::from(bits & 0x7fff);
            let lap = if bits & 0x8000 != 0 { 0 } else { Count::from(size) };
            (index < Count::from(size)).then_some(index + lap)
        };
        let both = place(position).zip(place(position >> 16));
        let both = both.map(|(avail, used)| {
            // The device takes before it uses.
            let avail = if avail < used {
                avail + 2 * Count::from(size)
            } else {
                avail
            };
            (avail, used)
        });
        let Some((avail, used)) = both.filter(|(avail, used)| avail - used <= Count::from(size)) else {
            let fault = ring.err().expect("a position that can't be was taken");
            assert_eq!(fault.rule, "ring.position");
            return None;
        };
        let ring = ring.expect("a ring");
        assert_eq!(ring.position(), position);
        Some(Self {
            arena,
            at,
            size,
            max,
            features,
            ring,
            avail,
            used,
            published: used,
            held_back: None,
            flight: Vec::new(),
            counts: HashMap::new(),
            last: None,
            signalled: None,
            driver: avail,
        })
    }

    fn wrap(&self, place: Count) -> bool {
        (place / Count::from(self.size)).is_multiple_of(2)
    }

    fn index(&self, place: Count) -> u16 {
        (place % Count::from(self.size)) as u16
    }

    fn bits(&self, place: Count) -> u16 {
        self.index(place) | if self.wrap(place) { 0x8000 } else { 0 }
    }

    fn desc(&self, place: Count) -> u64 {
        self.at.desc + 16 * u64::from(self.index(place))
    }

    fn available_flags(&self, place: Count) -> u16 {
        if self.wrap(place) {
            AVAIL
        } else {
            USED
        }
    }

    fn is_available(&self) -> bool {
        let flags = self.arena.u16(self.desc(self.avail) + 14);
        flags & (AVAIL | USED) == self.available_flags(self.avail)
    }

    /// Descriptors that aren't the device's.
    fn room(&self) -> Count {
        Count::from(self.size) - (self.avail - self.published)
    }

    fn look(&mut self) -> Option<u16> {
        let result = self.ring.available();
        if !self.is_available() {
            assert_eq!(result, Ok(0));
            return Some(0);
        }
        if self.room() == 0 {
            assert_eq!(result.expect_err("the ring was overrun").rule, "ring.avail-index");
            return None;
        }
        let count = result.expect("something is available");
        assert!(count > 0 && Count::from(count) <= self.room(), "{count}");
        Some(count)
    }

    /// Walks through the next chain: buffer ID and descriptors, or the rule it breaks.
    fn walk(&self, pieces: &mut Pieces) -> Result<(u16, u16), &'static str> {
        if self.room() == 0 {
            return Err("ring.avail-index");
        }
        let mut seen = 0;
        let (id, count) = loop {
            let at = self.desc(self.avail + seen);
            let (addr, len) = (self.arena.u64(at), self.arena.u32(at + 8));
            let (id, flags) = (self.arena.u16(at + 12), self.arena.u16(at + 14));
            seen += 1;
            if flags & INDIRECT != 0 {
                if !self.features.indirect {
                    return Err("ring.indirect-not-negotiated");
                }
                if flags & NEXT != 0 || seen > 1 {
                    return Err("ring.indirect-next");
                }
                if len == 0 || len % 16 != 0 || len / 16 > u32::from(self.max) {
                    return Err("ring.indirect-length");
                }
                if !in_one_region(addr, len.into()) {
                    return Err("ring.indirect-address");
                }
                for entry in 0..u64::from(len / 16) {
                    let at = addr + 16 * entry;
                    pieces.add(Piece {
                        addr: self.arena.u64(at),
                        len: self.arena.u32(at + 8),
                        write: self.arena.u16(at + 14) & WRITE != 0,
                    })?;
                }
                break (id, seen as u16);
            }
            let write = flags & WRITE != 0;
            pieces.add(Piece { addr, len, write })?;
            if flags & NEXT == 0 {
                break (id, seen as u16);
            }
            if seen >= self.room() {
                return Err("ring.chain-length");
            }
        };
        if id >= self.size || self.counts.contains_key(&id) {
            return Err("ring.buffer-id");
        }
        Ok((id, count))
    }

    fn take(&mut self, fill: bool) -> Option<bool> {
        let mut chain = Chain::default();
        if !self.is_available() {
            assert_eq!(
                self.ring.pop(&self.arena.map, &mut chain),
                Ok(false),
                "more than was made available"
            );
            return Some(false);
        }
        let mut pieces = Pieces::default();
        let expected = self.walk(&mut pieces);
        let result = self.ring.pop(&self.arena.map, &mut chain);
        let (id, count) = match expected {
            Ok(found) => found,
            Err(rule) => {
                let fault = result.expect_err("a broken chain was taken");
                assert_eq!(fault.rule, rule, "{fault}");
                return None;
            }
        };
        assert_eq!(result, Ok(true), "a good chain was refused");
        assert_eq!(chain.head, id);
        self.arena.check_buffers(&chain.readable, &pieces.list, false);
        self.arena.check_buffers(&chain.writable, &pieces.list, true);
        self.avail += Count::from(count);
        self.driver = self.driver.max(self.avail);
        self.counts.insert(id, count);
        self.flight.push(id);
        self.last = Some(id);
        if fill {
            self.arena.fill(&chain.writable, &pieces.list, id as u8);
        }
        Some(true)
    }

    fn give(&mut self, which: usize, written: u32) {
        if self.flight.is_empty() {
            return;
        }
        let id = self.flight.swap_remove(which % self.flight.len());
        let count = self.counts.remove(&id).expect("a chain in flight");
        self.ring.push_used(id, written);
        let at = self.desc(self.used);
        let wrap = if self.wrap(self.used) { AVAIL | USED } else { 0 };
        let flags = wrap | if written > 0 { WRITE } else { 0 };
        self.arena.note(at + 8, &written.to_le_bytes());
        self.arena.note(at + 12, &id.to_le_bytes());
        if self.held_back.is_none() {
            self.held_back = Some(flags);
        } else {
            self.arena.note(at + 14, &flags.to_le_bytes());
        }
        self.used += Count::from(count);
        if self.last == Some(id) {
            self.last = None;
        }
    }

    fn publish(&mut self) {
        assert_eq!(self.ring.publish(), self.held_back.is_some());
        if let Some(flags) = self.held_back.take() {
            self.arena.note(self.desc(self.published) + 14, &flags.to_le_bytes());
            self.published = self.used;
        }
        assert_eq!(self.ring.used_idx(), self.bits(self.published));
    }

    fn signal(&mut self) {
        let ours = self.ring.should_signal(self.flight.len());
        let before = self.signalled.replace(self.published);
        let (event, flags) = (self.arena.u16(self.at.driver), self.arena.u16(self.at.driver + 2) & 3);
        let expected = match flags {
            DISABLE => false,
            DESC if self.features.event_idx => {
                // Was the descriptor it names among those returned since? One of those skipped counts, and what can't be
                // told is signalled.
                before.is_none_or(|before| (before..self.published).any(|place| self.bits(place) == event))
                    || event & 0x7fff >= self.size
            }
            _ => true,
        };
        assert_eq!(ours, expected, "event {event:#x}, flags {flags}");
    }

    fn run(&mut self, op: &Op) -> Option<()> {
        match op {
            Op::Descriptor { ahead, desc } => {
                let place = self.avail + Count::from(*ahead);
                self.arena.write(self.desc(place), &self.bytes(desc, place));
            }
            Op::Table { at, entries } => {
                let bytes: Vec<u8> = entries.iter().take(80).flat_map(|desc| self.bytes(desc, 0)).collect();
                self.arena.write(at.get(), &bytes);
            }
            Op::Offer {
                id,
                buffers,
                table,
                greedy,
            } => self.offer(*id, buffers, *table, *greedy),
            Op::DriverEvent { flags, ahead, wrap } => {
                let place = self.used.saturating_add_signed((*ahead).into());
                let bits = self.bits(place) ^ if *wrap { 0x8000 } else { 0 };
                self.arena.write(self.at.driver, &bits.to_le_bytes());
                self.arena
                    .write(self.at.driver + 2, &u16::from(*flags % 4).to_le_bytes());
            }
            Op::AnyDriverEvent(bytes) => self.arena.write(self.at.driver, bytes),
            Op::Poke { at, bytes } => self.arena.write(at.get(), bytes),
            Op::Look => {
                self.look()?;
            }
            Op::Take { fill } => {
                self.take(*fill)?;
            }
            Op::TakeAll => {
                let mut most = self.look()?;
                while self.take(false)? {
                    assert!(most > 0, "more chains than the ring holds");
                    most -= 1;
                }
            }
            Op::Undo => {
                self.ring.undo_pop();
                if let Some(id) = self.last.take() {
                    let count = self.counts.remove(&id).expect("a chain in flight");
                    self.avail -= Count::from(count);
                    self.flight.retain(|this| *this != id);
                }
            }
            Op::Use { which, written } => self.give((*which).into(), *written),
            Op::UseAll => (0..self.flight.len()).for_each(|n| self.give(0, n as u32)),
            Op::Publish => self.publish(),
            Op::Signal => self.signal(),
            Op::Disable => {
                self.ring.disable_notification();
                self.arena.note(self.at.device + 2, &DISABLE.to_le_bytes());
            }
            Op::Enable => {
                let more = self.ring.enable_notification();
                if self.features.event_idx {
                    self.arena.note(self.at.device, &self.bits(self.avail).to_le_bytes());
                    self.arena.note(self.at.device + 2, &DESC.to_le_bytes());
                } else {
                    self.arena.note(self.at.device + 2, &[0, 0]);
                }
                assert_eq!(more, self.is_available());
            }
            Op::Reopen => {
                self.publish();
                // What was in flight is lost, and the ring goes on without it.
                let position = self.ring.position();
                let ring = Ring::new(
                    &self.arena.map,
                    AddressSpace::Guest,
                    self.at,
                    self.size,
                    self.max,
                    self.features,
                    position,
                );
                self.ring = ring.expect("a ring");
                self.flight.clear();
                self.counts.clear();
                (self.last, self.signalled) = (None, None);
            }
            Op::Rebase => assert!(self.ring.rebase(&self.arena.map, AddressSpace::Guest, self.at)),
            Op::Features(bits) => {
                let new = features(*bits);
                if new.event_idx && !self.features.event_idx {
                    self.signalled = None;
                }
                self.ring.set_features(new);
                self.features = new;
            }
        }
        assert_eq!(self.ring.has_work(), self.is_available());
        assert_eq!(
            self.ring.position(),
            u32::from(self.bits(self.avail)) | u32::from(self.bits(self.published)) << 16
        );
        Some(())
    }

    fn bytes(&self, desc: &Desc, place: Count) -> [u8; 16] {
        let len = u32::from(desc.len) << if desc.long { 16 } else { 0 };
        let own = if desc.available {
            self.available_flags(place)
        } else {
            u16::from(desc.flags & 8) << 4 | u16::from(desc.flags & 16) << 11
        };
        descriptor(desc.addr.get(), len, desc.id.into(), u16::from(desc.flags & 7) | own)
    }

    fn offer(&mut self, id: Option<u8>, buffers: &[Buffer], table: Option<Place>, greedy: bool) {
        let count = (buffers.len() as u64).min(self.size.into());
        let in_ring = if table.is_some() { 1 } else { count };
        // A greedy driver begins where the device is, so that what it writes is looked at.
        self.driver = if greedy {
            self.avail
        } else {
            self.driver.max(self.avail)
        };
        let too_many = self.driver + in_ring - self.published > Count::from(self.size);
        if count == 0 || (too_many && !greedy) {
            return;
        }
        let free = (0..self.size).find(|id| !self.counts.contains_key(id));
        let id = id.map(u16::from).or(free).unwrap_or(0);
        let mut readable_first: Vec<&Buffer> = buffers.iter().take(count as usize).collect();
        readable_first.sort_by_key(|buffer| buffer.write);
        for (n, buffer) in (0..).zip(readable_first) {
            let mut flags = if buffer.write { WRITE } else { 0 };
            let at = match table {
                Some(table) => table.get().wrapping_add(16 * n),
                None => {
                    flags |= if n + 1 < count { NEXT } else { 0 } | self.available_flags(self.driver + n);
                    self.desc(self.driver + n)
                }
            };
            let bytes = descriptor(buffer.addr.get(), u32::from(buffer.len) + 1, id, flags);
            self.arena.write(at, &bytes);
        }
        if let Some(table) = table {
            let flags = INDIRECT | self.available_flags(self.driver);
            let bytes = descriptor(table.get(), 16 * count as u32, id, flags);
            self.arena.write(self.desc(self.driver), &bytes);
        }
        self.driver += in_ring;
    }
}

/// Addresses and sizes that are anything: a ring only where there is room for one.
fn check_addresses(arena: &Arena, places: [Place; 3], size: u16, max: u16) {
    let [desc, driver, device] = places.map(Place::get);
    let at = RingAddresses { desc, driver, device };
    let features = features(0);
    let position = fresh_position(true);
    let fault = Ring::new(&arena.map, AddressSpace::Guest, at, size, max, features, position).err();
    let expected = if size == 0 || size > max.min(1 << 15) {
        Some("ring.size")
    } else {
        let areas = [(desc, 16 * u64::from(size), 16), (driver, 4, 4), (device, 4, 4)];
        areas.into_iter().find_map(|(addr, len, align)| {
            if addr % align != 0 {
                Some("ring.alignment")
            } else {
                (!in_one_region(addr, len)).then_some("ring.address")
            }
        })
    };
    assert_eq!(fault.map(|fault| fault.rule), expected, "{at:x?} {size} {max}");
}

fuzz_target!(|input: Input| {
    static ARENA: OnceLock<Mutex<Arena>> = OnceLock::new();
    let arena = ARENA
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    arena.clear();
    if let Some((places, size, max)) = input.wild {
        check_addresses(&arena, places, size, max);
    }
    let Some(mut bed) = Bed::new(&arena, &input) else {
        return;
    };
    let _ = input.ops.iter().take(MOST_OPS).try_for_each(|op| bed.run(op));
    // Also after a fault: what was done before it stays.
    bed.publish();
    arena.compare();
    arena.check_borders();
});
