// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The split ring against virtio-queue, step by step.
//!
//! The driver is hostile: it writes what it likes, where it likes. For each chain a walk through the same bytes that follows the
//! specification says which rule it breaks, if any. We must say the same, and take just the buffers of chains that
//! break none. virtio-queue must take those as well, in the same order, from the same places; of what we refuse it must
//! either stop, too, or be known to let it pass (`tolerated`).

#![no_main]

use std::sync::{Mutex, OnceLock, PoisonError};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vhu_core::ring::any::Ring;
use vhu_core::ring::split::{area_sizes, AddressSpace, RingAddresses};
use vhu_core::ring::{Chain, RingFeatures};
use vhu_fuzz::arena::{descriptor, in_one_region, Arena, Piece, Pieces, Place, INDIRECT, NEXT, RINGS, WRITE};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

const MAX_SIZE: u16 = 64;
const MOST_OPS: usize = 256;

/// What we refuse and virtio-queue passes on to the device.
fn tolerated(rule: &str) -> bool {
    matches!(
        rule,
        // It leaves lengths, addresses and the order of buffers to the device.
        "ring.zero-length" | "ring.buffer-address" | "ring.buffer-order"
        // It follows indirect tables whatever was negotiated, up to 65535 entries long, also when NEXT is set beside
        // INDIRECT, and when they cross regions.
        | "ring.indirect-not-negotiated" | "ring.indirect-next" | "ring.indirect-length" | "ring.indirect-address"
    )
}

#[derive(Arbitrary, Debug)]
struct Desc {
    addr: Place,
    len: u16,
    /// Lengths are small as a rule.
    long: bool,
    flags: u8,
    next: u8,
}

impl Desc {
    fn bytes(&self) -> [u8; 16] {
        let len = u32::from(self.len) << if self.long { 16 } else { 0 };
        descriptor(self.addr.get(), len, u16::from(self.flags % 8), u16::from(self.next))
    }
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
    Descriptor {
        index: u8,
        desc: Desc,
    },
    Table {
        at: Place,
        entries: Vec<Desc>,
    },
    /// A chain as good as its buffers, and made available.
    Offer {
        first: u8,
        buffers: Vec<Buffer>,
        table: Option<Place>,
    },
    /// An entry of the available ring, and the index so many on.
    Entry {
        head: u8,
        count: u8,
    },
    AvailIndex(u16),
    AvailFlags(u16),
    /// Relative to the used index.
    UsedEvent(i8),
    Poke {
        at: Place,
        bytes: [u8; 4],
    },
    // The device's.
    Take {
        look: bool,
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
    /// Wild addresses: they are only checked.
    wild: Option<([Place; 3], u16, u16)>,
    size: u8,
    max: u8,
    features: u8,
    start: u16,
    used: u16,
    ops: Vec<Op>,
}

fn features(bits: u8) -> RingFeatures {
    RingFeatures {
        event_idx: bits & 1 != 0,
        indirect: bits & 2 != 0,
        notify_on_empty: bits & 4 != 0,
        packed: false,
    }
}

struct Bed<'a> {
    arena: &'a Arena,
    at: RingAddresses,
    size: u16,
    max: u16,
    features: RingFeatures,
    ring: Ring,
    oracle: Queue,
    /// Next entry to take.
    next: u16,
    /// avail.idx when the ring looked last.
    seen: u16,
    /// Next used element to write.
    used: u16,
    published: u16,
    unpublished: Vec<(u16, u32)>,
    flight: Vec<u16>,
    /// The chain that can be put back.
    last: Option<u16>,
    /// No signal was considered yet: then we always signal.
    first: bool,
}

impl<'a> Bed<'a> {
    fn new(arena: &'a Arena, input: &Input) -> Self {
        let size = 1u16 << (input.size % 6);
        let max = (size << (input.max % 3)).min(MAX_SIZE);
        let (desc, driver, _) = area_sizes(size);
        let at = RingAddresses {
            desc: RINGS,
            driver: RINGS + desc,
            device: (RINGS + desc + driver).next_multiple_of(4),
        };
        arena.write(at.driver + 2, &input.start.to_le_bytes());
        arena.write(at.device + 2, &input.used.to_le_bytes());
        let features = features(input.features);
        let ring = open(arena, at, size, max, features, input.start);
        let mut oracle = Queue::new(MAX_SIZE).expect("a queue");
        oracle.try_set_size(size).expect("a size");
        oracle
            .try_set_desc_table_address(GuestAddress(at.desc))
            .expect("an address");
        oracle
            .try_set_avail_ring_address(GuestAddress(at.driver))
            .expect("an address");
        oracle
            .try_set_used_ring_address(GuestAddress(at.device))
            .expect("an address");
        oracle.set_event_idx(features.event_idx);
        oracle.set_next_avail(input.start);
        oracle.set_next_used(input.used);
        oracle.set_ready(true);
        let bed = Self {
            arena,
            at,
            size,
            max,
            features,
            ring,
            oracle,
            next: input.start,
            seen: input.start,
            used: input.used,
            published: input.used,
            unpublished: Vec::new(),
            flight: Vec::new(),
            last: None,
            first: true,
        };
        bed.flag_is_zero();
        bed
    }

    fn flag_is_zero(&self) {
        if self.features.event_idx {
            self.arena.note(self.at.device, &[0, 0]);
        }
    }

    fn avail_index(&self) -> u16 {
        self.arena.u16(self.at.driver + 2)
    }

    fn slot(&self, index: u16) -> u64 {
        self.at.driver + 4 + 2 * u64::from(index % self.size)
    }

    /// Walks through a chain as the specification says; the rule it breaks.
    fn walk(&self, head: u16) -> (Pieces, Result<(), &'static str>) {
        let mut pieces = Pieces::default();
        let result = self.walk_into(head, &mut pieces);
        (pieces, result)
    }

    fn walk_into(&self, head: u16, pieces: &mut Pieces) -> Result<(), &'static str> {
        if head >= self.size {
            return Err("ring.head-index");
        }
        let (mut table, mut entries, mut indirect, mut index, mut seen) = (self.at.desc, self.size, false, head, 0u16);
        loop {
            let at = table + 16 * u64::from(index);
            let (addr, len, flags, next) = (
                self.arena.u64(at),
                self.arena.u32(at + 8),
                self.arena.u16(at + 12),
                self.arena.u16(at + 14),
            );
            seen += 1;
            if flags & INDIRECT != 0 {
                if indirect {
                    return Err("ring.indirect-nested");
                }
                if !self.features.indirect {
                    return Err("ring.indirect-not-negotiated");
                }
                if flags & NEXT != 0 {
                    return Err("ring.indirect-next");
                }
                // What a chain has before its table counts.
                let room = u32::from(self.max) - u32::from(seen - 1);
                if len == 0 || len % 16 != 0 || len / 16 > room {
                    return Err("ring.indirect-length");
                }
                if !in_one_region(addr, len.into()) {
                    return Err("ring.indirect-address");
                }
                (table, entries, indirect, index, seen) = (addr, (len / 16) as u16, true, 0, 0);
                continue;
            }
            pieces.add(Piece {
                addr,
                len,
                write: flags & WRITE != 0,
            })?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            // Of the two the ring asks for the length first in its own table, and last in an indirect one.
            let (long, outside) = (seen >= entries, next >= entries);
            match (long, outside) {
                (true, true) if indirect => return Err("ring.next-index"),
                (true, _) => return Err("ring.chain-length"),
                (false, true) => return Err("ring.next-index"),
                (false, false) => index = next,
            }
        }
    }

    /// Looks for entries; false when the driver has broken the ring.
    fn look(&mut self) -> bool {
        let ahead = self.avail_index().wrapping_sub(self.next);
        let theirs = self.oracle.iter(&self.arena.model).is_ok();
        assert_eq!(theirs, ahead <= self.size, "what virtio-queue says of the index");
        match self.ring.available() {
            Ok(count) => {
                assert_eq!(count, ahead);
                assert!(count <= self.size);
                self.seen = self.avail_index();
                true
            }
            Err(fault) => {
                assert_eq!(fault.rule, "ring.avail-index");
                assert!(ahead > self.size);
                false
            }
        }
    }

    /// Takes a chain: Some(true) when there was one, None when it was refused.
    fn take(&mut self, fill: bool) -> Option<bool> {
        let mut chain = Chain::default();
        if self.next == self.seen {
            assert_eq!(
                self.ring.pop(&self.arena.map, &mut chain),
                Ok(false),
                "more than was published"
            );
            return Some(false);
        }
        let head = self.arena.u16(self.slot(self.next));
        let (pieces, expected) = self.walk(head);
        // It looks at the index each time, so it can only be asked while that hasn't moved.
        let asked = self.avail_index() == self.seen;
        let theirs = asked.then(|| {
            let chain = self
                .oracle
                .pop_descriptor_chain(&self.arena.model)
                .expect("virtio-queue has no chain");
            assert_eq!(chain.head_index(), head);
            let list = chain.map(|desc| (desc.addr().0, desc.len(), desc.is_write_only(), desc.has_next()));
            list.collect::<Vec<_>>()
        });
        let result = self.ring.pop(&self.arena.map, &mut chain);
        if let Err(rule) = expected {
            let fault = result.expect_err("a broken chain was taken");
            assert_eq!(fault.rule, rule, "{fault}");
            if let Some(theirs) = theirs {
                // Stopping means: nothing at all, or a last descriptor that says there is another.
                let stopped = theirs.last().is_none_or(|last| last.3) || self.oracle_stops_at_table(&theirs);
                assert!(stopped || tolerated(rule), "{rule}: virtio-queue takes {theirs:?}");
            }
            return None;
        }
        assert_eq!(result, Ok(true), "a good chain was refused");
        assert_eq!(chain.head, head);
        if let Some(theirs) = theirs {
            let theirs: Vec<_> = theirs
                .into_iter()
                .map(|(addr, len, write, _)| Piece { addr, len, write })
                .collect();
            assert_eq!(theirs, pieces.list, "virtio-queue sees another chain");
        } else {
            self.oracle.set_next_avail(self.next.wrapping_add(1));
        }
        self.arena.check_buffers(&chain.readable, &pieces.list, false);
        self.arena.check_buffers(&chain.writable, &pieces.list, true);
        self.next = self.next.wrapping_add(1);
        assert_eq!(self.ring.next_avail(), self.next);
        self.flight.push(head);
        self.last = Some(head);
        if fill {
            self.arena.fill(&chain.writable, &pieces.list, self.next as u8);
        }
        Some(true)
    }

    /// It takes what comes before a table it can't read and says no more: then the last piece has NEXT, which is told by
    /// `has_next`; a table that is the first has no piece before it.
    fn oracle_stops_at_table(&self, theirs: &[(u64, u32, bool, bool)]) -> bool {
        theirs.is_empty()
    }

    fn give(&mut self, which: usize, written: u32) {
        if self.flight.is_empty() {
            return;
        }
        let head = self.flight.swap_remove(which % self.flight.len());
        if self.unpublished.len() == usize::from(self.size) {
            self.publish();
        }
        self.ring.push_used(head, written);
        let at = self.element(self.used);
        self.arena.note(at, &u32::from(head).to_le_bytes());
        self.arena.note(at + 4, &written.to_le_bytes());
        self.used = self.used.wrapping_add(1);
        self.unpublished.push((head, written));
        self.last = None;
    }

    fn element(&self, index: u16) -> u64 {
        self.at.device + 4 + 8 * u64::from(index % self.size)
    }

    fn publish(&mut self) {
        assert_eq!(self.ring.publish(), !self.unpublished.is_empty());
        if self.unpublished.is_empty() {
            return;
        }
        // virtio-queue writes elements and the index in one go. A driver may have overwritten ours meanwhile, so what
        // it writes is compared and then put back.
        for (n, (head, written)) in (0..).zip(std::mem::take(&mut self.unpublished)) {
            let at = self.element(self.published.wrapping_add(n));
            let before = self.arena.bytes::<8>(at);
            self.oracle
                .add_used(&self.arena.model, head, written)
                .expect("an element");
            assert_eq!((self.arena.u32(at), self.arena.u32(at + 4)), (u32::from(head), written));
            self.arena.note(at, &before);
        }
        assert_eq!(
            self.arena.u16(self.at.device + 2),
            self.used,
            "virtio-queue's used index"
        );
        self.published = self.used;
        assert_eq!(self.ring.used_idx(), self.published);
    }

    fn signal(&mut self) {
        let ours = self.ring.should_signal(self.flight.len());
        let theirs = self.oracle.needs_notification(&self.arena.model).expect("an answer");
        let first = std::mem::take(&mut self.first);
        let empty = self.flight.is_empty() && self.avail_index() == self.next;
        if self.features.notify_on_empty && empty {
            assert!(ours, "NOTIFY_ON_EMPTY");
        } else if self.features.event_idx {
            // The first time there is no old index to compare with: an interrupt too many does no harm.
            assert_eq!(ours, theirs || first, "used_event");
        } else {
            // It doesn't know this flag.
            assert_eq!(ours, self.arena.u16(self.at.driver) & 1 == 0, "NO_INTERRUPT");
        }
    }

    fn set_features(&mut self, new: RingFeatures) {
        let late = new.event_idx && !self.features.event_idx;
        self.ring.set_features(new);
        self.oracle.set_event_idx(new.event_idx);
        self.features = new;
        if late {
            self.first = true;
            self.flag_is_zero();
        }
    }

    fn run(&mut self, op: &Op) -> Option<()> {
        match op {
            Op::Descriptor { index, desc } => {
                let index = u64::from(*index) % u64::from(self.size);
                self.arena.write(self.at.desc + 16 * index, &desc.bytes());
            }
            Op::Table { at, entries } => {
                let bytes: Vec<u8> = entries.iter().take(80).flat_map(Desc::bytes).collect();
                self.arena.write(at.get(), &bytes);
            }
            Op::Offer { first, buffers, table } => self.offer(*first, buffers, *table),
            Op::Entry { head, count } => {
                let index = self.avail_index();
                self.arena.write(self.slot(index), &u16::from(*head).to_le_bytes());
                let index = index.wrapping_add(u16::from(*count));
                self.arena.write(self.at.driver + 2, &index.to_le_bytes());
            }
            Op::AvailIndex(index) => self.arena.write(self.at.driver + 2, &index.to_le_bytes()),
            Op::AvailFlags(flags) => self.arena.write(self.at.driver, &flags.to_le_bytes()),
            Op::UsedEvent(ahead) => {
                let event = self.published.wrapping_add_signed((*ahead).into());
                let at = self.at.driver + 4 + 2 * u64::from(self.size);
                self.arena.write(at, &event.to_le_bytes());
            }
            Op::Poke { at, bytes } => self.arena.write(at.get(), bytes),
            Op::Take { look, fill } => {
                if *look && !self.look() {
                    return None;
                }
                self.take(*fill)?;
            }
            Op::TakeAll => {
                if !self.look() {
                    return None;
                }
                let mut most = self.size;
                while self.take(false)? {
                    assert!(most > 0, "more chains than the ring holds");
                    most -= 1;
                }
            }
            Op::Undo => {
                if let Some(head) = self.last.take() {
                    self.ring.undo_pop();
                    self.oracle.go_to_previous_position();
                    self.next = self.next.wrapping_sub(1);
                    assert_eq!(self.flight.pop(), Some(head));
                }
            }
            Op::Use { which, written } => self.give((*which).into(), *written),
            Op::UseAll => (0..self.flight.len()).for_each(|n| self.give(0, n as u32)),
            Op::Publish => self.publish(),
            Op::Signal => self.signal(),
            Op::Disable => {
                self.ring.disable_notification();
                self.oracle.disable_notification(&self.arena.model).expect("memory");
            }
            Op::Enable => {
                let theirs = self.oracle.enable_notification(&self.arena.model).expect("memory");
                assert_eq!(self.ring.enable_notification(), theirs);
                assert_eq!(theirs, self.avail_index() != self.next);
            }
            Op::Reopen => {
                self.publish();
                self.ring = open(self.arena, self.at, self.size, self.max, self.features, self.next);
                self.flag_is_zero();
                // The driver's memory says how much was used.
                self.used = self.arena.u16(self.at.device + 2);
                self.published = self.used;
                self.oracle.set_next_used(self.used);
                (self.seen, self.first, self.last) = (self.next, true, None);
                self.flight.clear();
            }
            Op::Rebase => {
                assert!(self.ring.rebase(&self.arena.map, AddressSpace::Guest, self.at));
                self.flag_is_zero();
            }
            Op::Features(bits) => self.set_features(features(*bits)),
        }
        assert_eq!(self.ring.has_work(), self.avail_index() != self.next);
        assert_eq!(self.ring.position(), u32::from(self.next));
        Some(())
    }

    fn offer(&mut self, first: u8, buffers: &[Buffer], table: Option<Place>) {
        let count = (buffers.len() as u64).min(self.size.into());
        if count == 0 {
            return;
        }
        let first = u64::from(first) % u64::from(self.size);
        let mut readable_first: Vec<&Buffer> = buffers.iter().take(count as usize).collect();
        readable_first.sort_by_key(|buffer| buffer.write);
        let index = |n: u64| (first + n) % u64::from(self.size);
        for (n, buffer) in (0..).zip(readable_first) {
            let next = if table.is_some() { n + 1 } else { index(n + 1) };
            let flags = if n + 1 < count { NEXT } else { 0 } | if buffer.write { WRITE } else { 0 };
            let len = u32::from(buffer.len) + 1;
            let bytes = descriptor(buffer.addr.get(), len, flags, next as u16);
            let at = table.map_or(self.at.desc + 16 * index(n), |table| table.get().wrapping_add(16 * n));
            self.arena.write(at, &bytes);
        }
        if let Some(table) = table {
            let bytes = descriptor(table.get(), 16 * count as u32, INDIRECT, 0);
            self.arena.write(self.at.desc + 16 * first, &bytes);
        }
        let avail = self.avail_index();
        self.arena.write(self.slot(avail), &(first as u16).to_le_bytes());
        self.arena
            .write(self.at.driver + 2, &avail.wrapping_add(1).to_le_bytes());
    }
}

fn open(arena: &Arena, at: RingAddresses, size: u16, max: u16, features: RingFeatures, next: u16) -> Ring {
    Ring::new(&arena.map, AddressSpace::Guest, at, size, max, features, next.into()).expect("a ring")
}

/// Addresses and sizes that are anything: a ring only where there is room for one.
fn check_addresses(arena: &Arena, places: [Place; 3], size: u16, max: u16) {
    let [desc, driver, device] = places.map(Place::get);
    let at = RingAddresses { desc, driver, device };
    let fault = Ring::new(
        &arena.map,
        AddressSpace::Guest,
        at,
        size,
        max,
        RingFeatures::default(),
        0,
    )
    .err();
    let areas = || {
        let (a, b, c) = area_sizes(size);
        [(desc, a, 16), (driver, b, 2), (device, c, 4)]
    };
    let expected = if !size.is_power_of_two() || size > max {
        Some("ring.size")
    } else {
        // In their order, each first by its alignment.
        areas().into_iter().find_map(|(addr, len, align)| {
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
    let mut bed = Bed::new(&arena, &input);
    let _ = input.ops.iter().take(MOST_OPS).try_for_each(|op| bed.run(op));
    // Also after a fault: what was done before it stays.
    bed.publish();
    arena.compare();
    arena.check_borders();
});
