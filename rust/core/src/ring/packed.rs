// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The packed ring (virtio 1.4, 2.8), device side.
//!
//! There is one ring of descriptors that both sides write: the driver makes descriptors available in it, and the device
//! writes one used descriptor per chain over them, in the order in which chains are done. There are no indices in
//! memory. Whose a descriptor is follows from two of its flags and from the lap the reader is in, whose lowest bit is
//! the wrap counter.
//!
//! Memory ordering, each with its counterpart in the driver:
//!
//! - `pop` loads the flags of a chain's first descriptor with acquire: pairs with the driver's write barrier between
//!   filling the chain (the rest of this descriptor, and the others as a whole) and storing these flags, which it does
//!   last. So everything else is loaded after it, without further ordering.
//! - `publish` stores the flags of the batch's first used descriptor with release: the used descriptors and the data
//!   before them are visible to a driver that sees these flags, and it looks at no later one before. Release also keeps
//!   our loads of the descriptors before it: the driver may reuse them from then on. The flags of the others are stored
//!   with release, too: a driver that asks ahead (Linux does when it wants its interrupts late) sees a used descriptor
//!   as a whole or not at all.
//! - `should_signal` and `enable_notification` start, respectively end, with a full fence: each is one half of a
//!   store-load pattern (we store used flags and load the driver event suppression structure, the driver does the
//!   opposite; and likewise the device event suppression structure against available flags), where acquire and release
//!   are not enough.
//! - In an event suppression structure the flags say whether offset and wrap counter mean anything. So the writer stores
//!   the flags last, with release, and the reader loads them first, with acquire.
//!
//! These accesses are in [`super::order`], where a model checker gets at them.
//!
//! No descriptor is believed twice: what is used of it is loaded once, except for the flags of a chain's first one, of
//! which the first load, with acquire, counts.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::Arc;

use super::inflight::{PackedChain, PackedTracker};
use super::order::packed as order;
use super::split::{AddressSpace, RingAddresses};
use super::{append_buffer, find_area, ring_fault, Chain, RingFeatures};
use crate::crash;
use crate::error::Fault;
use crate::memory::{Buffers, HostArea, MemoryMap};

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 1 << 1;
const DESC_F_INDIRECT: u16 = 1 << 2;
const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;

const DESC_SIZE: usize = 16;
const DESC_LEN: usize = 8;
const DESC_ID: usize = 12;
const DESC_FLAGS: usize = 14;

const EVENT_SIZE: u64 = 4;
const EVENT_FLAGS: usize = 2;

/// Largest ring the format allows: offsets have 15 bits.
pub const MAX_SIZE: u16 = 1 << 15;

/// Position of a ring that was never used: both indices 0, both wrap counters 1.
pub const FRESH: u32 = 0x8000_8000;

/// Bytes of the three areas for a queue of `size` descriptors: descriptor ring, driver and device event suppression.
pub fn area_sizes(size: u16) -> (u64, u64, u64) {
    (DESC_SIZE as u64 * u64::from(size), EVENT_SIZE, EVENT_SIZE)
}

/// Finds the three areas of a ring in host memory. Any size will do, not only powers of two.
///
/// # Errors
/// `ring.size`, `ring.alignment`, `ring.address`.
pub fn resolve(
    map: &Arc<MemoryMap>,
    space: AddressSpace,
    addresses: RingAddresses,
    size: u16,
    max_size: u16,
) -> Result<[HostArea; 3], Fault> {
    let max_size = max_size.min(MAX_SIZE);
    if size == 0 || size > max_size {
        return Err(ring_fault(
            "ring.size",
            format!("size {size} is not from 1 to {max_size}"),
        ));
    }
    let (desc_len, driver_len, device_len) = area_sizes(size);
    let area = |name, address, len, align| find_area(map, space, name, address, len, align);
    Ok([
        area("descriptor ring", addresses.desc, desc_len, 16)?,
        area("driver event suppression", addresses.driver, driver_len, 4)?,
        area("device event suppression", addresses.device, device_len, 4)?,
    ])
}

/// A place in the ring: a descriptor's index, and the wrap counter of who is there.
///
/// Sizes are at most 2^15 and indices less than the size, so sums of an index and a count up to the size fit into 16
/// bits, and places on two laps into 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the descriptor.
    pub index: u16,
    /// Wrap counter.
    pub wrap: bool,
}

impl Place {
    /// From 15 bits of index and one of wrap counter, as event suppression structures have it.
    #[inline]
    fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & (MAX_SIZE - 1),
            wrap: bits & MAX_SIZE != 0,
        }
    }

    #[inline]
    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `count` descriptors on, at most one lap.
    #[inline]
    fn advance(self, count: u16, size: u16) -> Self {
        let index = self.index + count;
        if index < size {
            Self { index, ..self }
        } else {
            Self {
                index: index - size,
                wrap: !self.wrap,
            }
        }
    }

    /// `count` descriptors back, at most one lap.
    #[inline]
    fn retreat(self, count: u16, size: u16) -> Self {
        if self.index >= count {
            Self {
                index: self.index - count,
                ..self
            }
        } else {
            Self {
                // Not less than 0, as count <= size; and less than size, as index < count.
                index: self.index + (size - count),
                wrap: !self.wrap,
            }
        }
    }

    /// Descriptors from `earlier` to here. One bit of wrap counter tells two laps apart: 0 to 2 * size - 1.
    #[inline]
    fn since(self, earlier: Self, size: u16) -> u32 {
        let lap = u32::from(size);
        let on_two_laps = |place: Self| u32::from(place.index) + if place.wrap { 0 } else { lap };
        let (here, there) = (on_two_laps(self), on_two_laps(earlier));
        if here >= there {
            here - there
        } else {
            here + 2 * lap - there
        }
    }

    /// Whether `event`, which is a place the driver asks for, was passed with the last `returned` descriptors before here. A
    /// place that was skipped counts as well: drivers ask for places without knowing where a used descriptor will be. True,
    /// for safety's sake, when it can't be told: after two laps, and for a place that is none.
    #[inline]
    pub fn has_passed(self, event: Self, returned: u32, size: u16) -> bool {
        returned >= 2 * u32::from(size) || event.index >= size || self.since(event, size).wrapping_sub(1) < returned
    }

    /// Whether a descriptor here, with these flags, was made available by the driver and not taken yet: AVAIL as the
    /// wrap counter, USED not.
    #[inline]
    fn is_available(self, flags: u16) -> bool {
        let (avail, used) = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
        avail == self.wrap && used != self.wrap
    }

    /// Whether a descriptor here, with these flags, was used in this lap: the driver may have made it available again since.
    #[inline]
    pub fn is_used(self, flags: u16) -> bool {
        (flags & DESC_F_USED != 0) == self.wrap
    }

    /// What marks a descriptor here as used: AVAIL and USED as the wrap counter.
    #[inline]
    fn used_flags(self) -> u16 {
        if self.wrap {
            DESC_F_AVAIL | DESC_F_USED
        } else {
            0
        }
    }
}

/// A descriptor as the driver writes it, in the ring or in an indirect table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Buffer ID.
    pub id: u16,
    /// Flags.
    pub flags: u16,
}

impl Descriptor {
    #[inline]
    fn new(addr: u64, rest: u64) -> Self {
        Self {
            addr,
            len: rest as u32,
            id: (rest >> 32) as u16,
            flags: (rest >> 48) as u16,
        }
    }

    /// One copy of the descriptor at `index`; all checks are made on the copy, since the driver may rewrite the
    /// original at any time.
    #[inline]
    fn load(table: &HostArea, index: usize) -> Self {
        let offset = index * DESC_SIZE;
        Self::new(table.load_u64(offset), table.load_u64(offset + DESC_LEN))
    }
}

/// A running packed ring.
pub struct PackedRing {
    desc: HostArea,
    driver: HostArea,
    device: HostArea,
    size: u16,
    /// Entries an indirect table may have: the device's largest queue size (a driver that chose a smaller ring may still
    /// send tables made for the larger one).
    max_chain: u16,
    features: RingFeatures,
    /// Next descriptor to take.
    avail: Place,
    /// Where the next used descriptor goes; ahead of `published` by what the batch holds.
    used: Place,
    /// Up to where the driver may look for used descriptors.
    published: Place,
    /// The batch's first used descriptor has no flags yet: they are these.
    first_flags: u16,
    /// Descriptors the batch returns.
    batch: u16,
    /// Descriptors returned since the driver was last considered for a signal. The largest number before the first time.
    unsignalled: u32,
    /// By buffer ID: the descriptors that a chain in flight has in the ring, which are skipped when it is used. 0: no such
    /// chain is in flight.
    counts: Box<[u16]>,
    /// Buffer ID of the chain that was popped last.
    last: Option<u16>,
    /// Chains that an earlier process had in flight, to be taken before all others.
    again: VecDeque<PackedChain>,
    /// The record of what is in flight, where the front end keeps one.
    tracker: Option<Box<PackedTracker>>,
    /// The record has said where to go on.
    recovered: bool,
    hint: usize,
}

impl order::Fields for PackedRing {
    type Word = AtomicU16;

    #[inline]
    fn desc_flags(&self, index: u16) -> &AtomicU16 {
        self.desc.u16(usize::from(index) * DESC_SIZE + DESC_FLAGS)
    }

    #[inline]
    fn driver_offset(&self) -> &AtomicU16 {
        self.driver.u16(0)
    }

    #[inline]
    fn driver_flags(&self) -> &AtomicU16 {
        self.driver.u16(EVENT_FLAGS)
    }

    #[inline]
    fn device_offset(&self) -> &AtomicU16 {
        self.device.u16(0)
    }

    #[inline]
    fn device_flags(&self) -> &AtomicU16 {
        self.device.u16(EVENT_FLAGS)
    }
}

impl PackedRing {
    /// Resolves a ring's areas once and for all.
    ///
    /// `position` is where to go on, coded as the vhost-user protocol does: the available side in the low 16 bits, the
    /// used side in the high ones, each an index in 15 bits and its wrap counter above; [`FRESH`] for a new ring. When
    /// the two differ there are descriptors that were taken and not used; nobody here knows them, and they stay so.
    ///
    /// # Errors
    /// `ring.size`, `ring.alignment`, `ring.address`, `ring.position`.
    pub fn new(
        map: &Arc<MemoryMap>,
        space: AddressSpace,
        addresses: RingAddresses,
        size: u16,
        max_size: u16,
        features: RingFeatures,
        position: u32,
    ) -> Result<Self, Fault> {
        let [desc, driver, device] = resolve(map, space, addresses, size, max_size)?;
        let avail = Place::from_bits(position as u16);
        let used = Place::from_bits((position >> 16) as u16);
        if avail.index >= size || used.index >= size || avail.since(used, size) > u32::from(size) {
            return Err(ring_fault(
                "ring.position",
                format!("position {position:#010x} can't be one of a ring of {size} descriptors"),
            ));
        }
        Ok(Self {
            desc,
            driver,
            device,
            size,
            max_chain: max_size,
            features,
            avail,
            used,
            published: used,
            first_flags: 0,
            batch: 0,
            unsignalled: u32::MAX,
            counts: vec![0; usize::from(size)].into_boxed_slice(),
            last: None,
            again: VecDeque::new(),
            tracker: None,
            recovered: false,
            hint: 0,
        })
    }

    /// Keeps a record of what is in flight in `area` from now on, before anything is taken. When there is a record already
    /// it says where the ring goes on: what was in flight is taken first, in the old order.
    ///
    /// # Errors
    /// `inflight.*`.
    pub fn track(&mut self, area: HostArea) -> Result<(), Fault> {
        let (tracker, recovery) = PackedTracker::recover(area, self.size, self.used, |place| {
            u16::from_le(self.flags_at(place).load(Ordering::Acquire))
        })?;
        self.tracker = Some(Box::new(tracker));
        if !recovery.known {
            return Ok(());
        }
        self.recovered = true;
        self.used = recovery.used;
        self.published = recovery.used;
        self.avail = recovery.used;
        for chain in recovery.again {
            // At least one, at most the entries of the region, no entry twice: sums stay below the size.
            let count = chain.descriptors.len() as u16;
            let slot = &mut self.counts[usize::from(chain.id)];
            if std::mem::replace(slot, count) != 0 {
                return Err(ring_fault(
                    "inflight.chain",
                    format!("buffer ID {} is in flight twice", chain.id),
                ));
            }
            self.avail = self.avail.advance(count, self.size);
            self.again.push_back(chain);
        }
        self.unmark();
        Ok(())
    }

    /// Takes back used descriptors that an earlier process has written and not published: all but the first of a batch have
    /// their flags before it is published. The driver hasn't seen them, but would as soon as something else is used at the
    /// place before, and their chains are going to be used once more.
    fn unmark(&self) {
        let mut place = self.used;
        for _ in 0..self.avail.since(self.used, self.size) {
            let field = self.flags_at(place);
            let flags = u16::from_le(field.load(Ordering::Relaxed));
            if place.is_used(flags) {
                field.store((flags ^ DESC_F_USED).to_le(), Ordering::Release);
                crash::point("packed.unmarked");
            }
            place = place.advance(1, self.size);
        }
    }

    /// The areas that the device writes, as guest addresses.
    pub fn written_areas(&self, ranges: &mut Vec<(u64, u64)>) {
        self.desc.guest_ranges(ranges);
        self.device.guest_ranges(ranges);
    }

    /// Requests that an earlier process had in flight and that weren't taken again yet.
    pub fn unfinished(&self) -> usize {
        self.again.len()
    }

    /// Whether the ring may have used anything before it was opened here.
    pub fn has_history(&self) -> bool {
        self.recovered || u32::from(self.used_idx()) != FRESH >> 16
    }

    /// Whether the record's memory was taken away.
    pub fn record_lost(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.lost())
    }

    /// Moves the ring onto a new memory map. False when its areas aren't memory there: the ring goes on using the old
    /// mapping for what is in flight and must not take more until a later map has it again.
    pub fn rebase(&mut self, map: &Arc<MemoryMap>, space: AddressSpace, addresses: RingAddresses) -> bool {
        let Ok([desc, driver, device]) = resolve(map, space, addresses, self.size, self.size) else {
            return false;
        };
        self.desc = desc;
        self.driver = driver;
        self.device = device;
        self.hint = 0;
        true
    }

    /// Goes on with other features.
    pub fn set_features(&mut self, features: RingFeatures) {
        if features.event_idx && !self.features.event_idx {
            self.unsignalled = u32::MAX;
        }
        self.features = features;
    }

    /// Next descriptor this side will take: its index, and the wrap counter in bit 15.
    pub fn next_avail(&self) -> u16 {
        self.avail.bits()
    }

    /// Where the driver will see the next used descriptor: its index, and the wrap counter in bit 15.
    pub fn used_idx(&self) -> u16 {
        self.published.bits()
    }

    /// Both in one, as [`PackedRing::new`] takes it.
    pub fn position(&self) -> u32 {
        u32::from(self.next_avail()) | u32::from(self.used_idx()) << 16
    }

    /// What there is to see of the driver's progress: `next_avail`, or one more when something is available. How much is
    /// available only a walk through the chains could tell.
    pub fn peek_avail_idx(&self) -> u16 {
        let place = if self.has_work() {
            self.avail.advance(1, self.size)
        } else {
            self.avail
        };
        place.bits()
    }

    /// Whether the driver has made something available that was not taken yet. A look at one field, without the checks
    /// of `available`.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.avail.is_available(order::peek(self, self.avail.index)) || !self.again.is_empty()
    }

    #[inline]
    fn flags_at(&self, place: Place) -> &AtomicU16 {
        order::Fields::desc_flags(self, place.index)
    }

    /// Descriptors that aren't taken, and so may be the driver's.
    #[inline]
    fn room(&self) -> u16 {
        // The difference is 0 to size: `new` checks it, and neither side passes the other.
        self.size - self.avail.since(self.published, self.size) as u16
    }

    #[cold]
    fn overrun(&self) -> Fault {
        ring_fault(
            "ring.avail-index",
            format!(
                "descriptor {} is available again, but the {} of the ring are all taken and not used",
                self.avail.index, self.size
            ),
        )
    }

    /// Looks for new chains. The ring doesn't say how many there are: 0 for none, otherwise an upper bound, and `pop`
    /// says when there are no more. (It also looks by itself, so it finds what comes after this call.)
    ///
    /// # Errors
    /// `ring.avail-index` when the driver makes descriptors available that it didn't get back.
    #[inline]
    pub fn available(&self) -> Result<u16, Fault> {
        if !self.has_work() {
            return Ok(0);
        }
        if !self.again.is_empty() {
            return Ok(self.size);
        }
        match self.room() {
            0 => Err(self.overrun()),
            room => Ok(room),
        }
    }

    /// Takes the next available chain; false when there is none. `chain` must be clear; its head becomes the buffer ID.
    ///
    /// # Errors
    /// `ring.avail-index`, `ring.chain-length`, `ring.buffer-id`, `ring.zero-length`, `ring.buffer-address`,
    /// `ring.buffer-order`, `ring.total-length`, and for indirect tables `ring.indirect-not-negotiated`,
    /// `ring.indirect-next`, `ring.indirect-length`, `ring.indirect-address`. The ring must not be used any more after an
    /// error.
    #[inline]
    pub fn pop(&mut self, map: &Arc<MemoryMap>, chain: &mut Chain) -> Result<bool, Fault> {
        if let Some(known) = self.again.pop_front() {
            return self.pop_again(map, chain, known);
        }
        let flags = order::taken(self, self.avail.index);
        if !self.avail.is_available(flags) {
            return Ok(false);
        }
        // The buffer ID comes with the last descriptor. Until then a fault names the chain by its place.
        chain.head = self.avail.index;
        if let Some(tracker) = &mut self.tracker {
            tracker.begin();
        }
        let (id, count) = self.walk(map, chain, flags)?;
        // The specification has no bound on buffer IDs, but a ring of n descriptors can't have more than n chains, its
        // example driver asserts this one, and drivers keep arrays by it. Twice in flight, one could be used twice, and
        // what is skipped then would be anything.
        match self.counts.get_mut(usize::from(id)) {
            Some(slot) if *slot == 0 => *slot = count,
            known => {
                let why = match known {
                    Some(_) => "is in flight already".into(),
                    None => format!("is not less than the queue size {}", self.size),
                };
                let reason = format!("buffer ID {id} of the chain at {} {why}", chain.head);
                return Err(ring_fault("ring.buffer-id", reason));
            }
        }
        chain.head = id;
        self.last = Some(id);
        if let Some(tracker) = &mut self.tracker {
            tracker.taken(id);
        }
        self.avail = self.avail.advance(count, self.size);
        Ok(true)
    }

    /// Takes a chain that an earlier process had in flight. Its descriptors come from the record: in the ring, used ones may
    /// have been written over them.
    #[cold]
    fn pop_again(&mut self, map: &Arc<MemoryMap>, chain: &mut Chain, known: PackedChain) -> Result<bool, Fault> {
        chain.head = known.id;
        for (index, desc) in known.descriptors.iter().enumerate() {
            if desc.flags & DESC_F_INDIRECT != 0 {
                self.walk_indirect(map, chain, *desc, index as u16 + 1)?;
            } else {
                let writable = desc.flags & DESC_F_WRITE != 0;
                append_buffer(map, &mut self.hint, chain, desc.addr, desc.len, writable)?;
            }
        }
        self.last = None;
        Ok(true)
    }

    /// Puts the chain that was popped last back, if it wasn't used meanwhile. One that an earlier process had in flight
    /// stays so in the record.
    pub fn undo_pop(&mut self) {
        if let Some(id) = self.last.take() {
            let count = std::mem::take(&mut self.counts[usize::from(id)]);
            if let Some(tracker) = self.tracker.as_mut().filter(|_| count > 0) {
                tracker.untaken(id);
            }
            self.avail = self.avail.retreat(count, self.size);
        }
    }

    /// Collects the chain's buffers; its buffer ID, and how many descriptors it has in the ring.
    ///
    /// Flags AVAIL and USED are asked of the first descriptor only, as the driver vouches with it for the whole chain.
    #[inline]
    fn walk(&mut self, map: &Arc<MemoryMap>, chain: &mut Chain, first_flags: u16) -> Result<(u16, u16), Fault> {
        let room = self.room();
        if room == 0 {
            return Err(self.overrun());
        }
        let mut place = self.avail;
        let mut seen: u16 = 0;
        loop {
            let mut desc = Descriptor::load(&self.desc, usize::from(place.index));
            if seen == 0 {
                desc.flags = first_flags;
            }
            if let Some(tracker) = &mut self.tracker {
                tracker.note(desc);
            }
            seen += 1;
            if desc.flags & DESC_F_INDIRECT != 0 {
                self.walk_indirect(map, chain, desc, seen)?;
                return Ok((desc.id, seen));
            }
            append_buffer(
                map,
                &mut self.hint,
                chain,
                desc.addr,
                desc.len,
                desc.flags & DESC_F_WRITE != 0,
            )?;
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok((desc.id, seen));
            }
            // Descriptors that are taken and not used can't be part of another chain, so this bounds it.
            if seen >= room {
                return Err(self.too_long(chain.head, room));
            }
            place = place.advance(1, self.size);
        }
    }

    #[cold]
    fn too_long(&self, at: u16, room: u16) -> Fault {
        ring_fault(
            "ring.chain-length",
            format!(
                "chain at {at} is longer than the {room} descriptors that aren't taken (queue size {})",
                self.size
            ),
        )
    }

    /// The entries of an indirect table follow each other without NEXT; of their flags only WRITE means something.
    fn walk_indirect(
        &mut self,
        map: &Arc<MemoryMap>,
        chain: &mut Chain,
        desc: Descriptor,
        seen: u16,
    ) -> Result<(), Fault> {
        let at = chain.head;
        if !self.features.indirect {
            return Err(ring_fault(
                "ring.indirect-not-negotiated",
                format!("chain at {at} has an indirect table, but INDIRECT_DESC was not negotiated"),
            ));
        }
        if desc.flags & DESC_F_NEXT != 0 || seen > 1 {
            return Err(ring_fault(
                "ring.indirect-next",
                format!("chain at {at} has an indirect table among other descriptors"),
            ));
        }
        let count = desc.len as usize / DESC_SIZE;
        let limit = usize::from(self.max_chain);
        if count == 0 || !(desc.len as usize).is_multiple_of(DESC_SIZE) || count > limit {
            return Err(ring_fault(
                "ring.indirect-length",
                format!(
                    "indirect table of {} bytes at {at}; 16 to {} in steps of 16",
                    desc.len,
                    limit * DESC_SIZE
                ),
            ));
        }
        // A table that isn't in one region as a whole is refused: no driver makes one (it is a kernel allocation).
        let table = map.table_by_guest(desc.addr, u64::from(desc.len), &mut self.hint);
        let table = table.ok_or_else(|| {
            ring_fault(
                "ring.indirect-address",
                format!(
                    "indirect table of {} bytes at {:#x} is outside memory",
                    desc.len, desc.addr
                ),
            )
        })?;
        if !table.is_aligned(16) {
            return self.walk_unaligned(map, chain, desc);
        }
        for index in 0..count {
            let offset = index * DESC_SIZE;
            let inner = Descriptor::new(table.load_u64(offset), table.load_u64(offset + DESC_LEN));
            append_buffer(
                map,
                &mut self.hint,
                chain,
                inner.addr,
                inner.len,
                inner.flags & DESC_F_WRITE != 0,
            )?;
        }
        Ok(())
    }

    /// An indirect table at an odd place: legal (the specification asks 16 of the ring only), and rare enough to be
    /// copied out.
    #[cold]
    fn walk_unaligned(&mut self, map: &Arc<MemoryMap>, chain: &mut Chain, desc: Descriptor) -> Result<(), Fault> {
        let mut source = Buffers::default();
        let mut table = vec![0u8; desc.len as usize];
        map.append(desc.addr, u64::from(desc.len), &mut self.hint, &mut source);
        source.read(&mut table);
        for entry in table.chunks_exact(DESC_SIZE) {
            let word = |from: usize| {
                let mut bytes = [0u8; 8];
                bytes.copy_from_slice(&entry[from..from + 8]);
                u64::from_le_bytes(bytes)
            };
            let inner = Descriptor::new(word(0), word(DESC_LEN));
            append_buffer(
                map,
                &mut self.hint,
                chain,
                inner.addr,
                inner.len,
                inner.flags & DESC_F_WRITE != 0,
            )?;
        }
        Ok(())
    }

    /// Writes a used descriptor for the chain in flight with buffer ID `head`, and skips what else it has in the ring.
    /// The driver sees it with the next `publish`.
    ///
    /// # Panics
    /// When no such chain is in flight: a bug of ours, caught at the worker's boundary.
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let count = std::mem::take(&mut self.counts[usize::from(head)]);
        assert!(count > 0, "buffer ID {head} is used, but not in flight");
        // WRITE says that the length means something: anything was written at all.
        let flags = self.used.used_flags() | if written > 0 { DESC_F_WRITE } else { 0 };
        let offset = usize::from(self.used.index) * DESC_SIZE;
        self.desc
            .u32(offset + DESC_LEN)
            .store(written.to_le(), Ordering::Relaxed);
        self.desc.u16(offset + DESC_ID).store(head.to_le(), Ordering::Relaxed);
        crash::point("packed.used-descriptor");
        if let Some(tracker) = &mut self.tracker {
            tracker.used(head);
        }
        if self.batch == 0 {
            self.first_flags = flags;
        } else {
            order::publish(self, self.used.index, flags);
        }
        // A batch returns descriptors of chains in flight, which were at most `size`.
        self.batch += count;
        self.used = self.used.advance(count, self.size);
    }

    /// Makes the used descriptors written so far visible, all at once; false when there are none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.batch == 0 {
            return false;
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.publishing(self.used, self.published);
        }
        order::publish(self, self.published.index, self.first_flags);
        crash::point("packed.published");
        if let Some(tracker) = &mut self.tracker {
            tracker.published(self.used);
        }
        self.published = self.used;
        self.unsignalled = self.unsignalled.saturating_add(u32::from(self.batch));
        self.batch = 0;
        true
    }

    /// After `publish`: whether the driver wants an interrupt for what was published since the last call. `in_flight` is
    /// of no importance to this format: NOTIFY_ON_EMPTY is legacy, and legacy has no packed rings.
    #[inline]
    pub fn should_signal(&mut self, _in_flight: usize) -> bool {
        // The first time it is the largest number, and everything has been passed.
        let returned = std::mem::take(&mut self.unsignalled);
        order::should_signal(self, self.features.event_idx, |event| {
            self.published.has_passed(Place::from_bits(event), returned, self.size)
        })
    }

    /// Asks the driver not to notify while we are looking anyway.
    #[inline]
    pub fn disable_notification(&mut self) {
        order::disable_notification(self);
    }

    /// Asks the driver to notify again; true when something came in meanwhile and the ring must be looked at again.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        let flags = order::enable_notification(self, self.features.event_idx, self.next_avail(), self.avail.index);
        self.avail.is_available(flags) || !self.again.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of it for small rings, against places counted without end.
    #[test]
    fn places_of_small_rings() {
        for size in 1..=7u16 {
            let n = u32::from(size);
            let place = |count: u32| Place {
                index: (count % n) as u16,
                wrap: (count / n).is_multiple_of(2),
            };
            for from in 2 * n..6 * n {
                assert_eq!(Place::from_bits(place(from).bits()), place(from));
                for count in 0..=size {
                    let to = from + u32::from(count);
                    assert_eq!(
                        place(from).advance(count, size),
                        place(to),
                        "{from} + {count} of {size}"
                    );
                    assert_eq!(place(to).retreat(count, size), place(from), "{to} - {count} of {size}");
                }
                for ahead in 0..2 * n {
                    assert_eq!(
                        place(from + ahead).since(place(from), size),
                        ahead,
                        "{from} + {ahead} of {size}"
                    );
                }
                for flags in [0, DESC_F_AVAIL, DESC_F_USED, DESC_F_AVAIL | DESC_F_USED] {
                    let (here, next) = (place(from), place(from + n));
                    // Used in one lap, available in the next: nobody may take one for the other.
                    assert!(!(here.is_available(flags) && here.is_used(flags)));
                    assert_eq!(
                        here.is_used(flags),
                        flags == here.used_flags() || next.is_available(flags)
                    );
                }
            }
        }
    }

    /// All of it for small rings: the driver is interrupted when the place it asks for is one of those that were passed, and
    /// else not.
    #[test]
    fn events_of_small_rings() {
        for size in 1..=7u16 {
            let n = u32::from(size);
            let place = |count: u32| Place {
                index: (count % n) as u16,
                wrap: (count / n).is_multiple_of(2),
            };
            for end in 4 * n..6 * n {
                for returned in 0..=3 * n {
                    for event in 0..2 * n {
                        assert_eq!(
                            place(end).has_passed(place(event), returned, size),
                            (end - returned..end).any(|passed| place(passed) == place(event)),
                            "{event} among the {returned} before {end} of {size}"
                        );
                    }
                    for (index, wrap) in [(size, false), (size, true), (MAX_SIZE - 1, false), (MAX_SIZE - 1, true)] {
                        let nowhere = Place { index, wrap };
                        assert!(place(end).has_passed(nowhere, returned, size));
                    }
                }
                for event in 0..2 * n {
                    assert!(place(end).has_passed(place(event), u32::MAX, size), "the first time");
                }
            }
        }
    }

    #[test]
    fn places_count_over_two_laps() {
        for size in [1u16, 2, 3, 7, 256, MAX_SIZE] {
            let start = Place::from_bits(FRESH as u16);
            assert_eq!((start.index, start.wrap), (0, true));
            let mut steps = vec![0, 1, size / 2, size - 1, size];
            steps.dedup();
            for &first in &steps {
                let there = start.advance(first, size);
                assert!(there.index < size);
                assert_eq!(Place::from_bits(there.bits()), there);
                assert_eq!(there.since(start, size), u32::from(first), "size {size}");
                assert_eq!(there.retreat(first, size), start);
                for &second in &steps {
                    let end = there.advance(second, size);
                    let distance = (u32::from(first) + u32::from(second)) % (2 * u32::from(size));
                    assert_eq!(end.since(start, size), distance, "size {size}");
                    assert_eq!(end.since(there, size), u32::from(second));
                    assert_eq!(end.retreat(second, size), there);
                }
            }
        }
    }
}
