// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The split ring (virtio 1.4, 2.7), device side.
//!
//! Memory ordering, each with its counterpart in the driver:
//!
//! - `available` loads avail.idx with acquire: pairs with the driver's write barrier between filling the ring entry
//!   (and descriptors) and storing idx.
//! - `publish` stores used.idx with release: the used elements and the data before them are visible to a driver
//!   that reads the new idx.
//! - `should_signal` and `enable_notification` start with a full fence: each is one half of a store-load pattern
//!   (we store used.idx and load used_event / avail.flags, the driver does the opposite; and likewise avail_event
//!   against avail.idx), where acquire and release are not enough.
//!
//! These accesses are in [`super::order`], where a model checker gets at them.
//!
//! Index arithmetic is modulo 2^16 (`wrapping_*`), as the specification counts; positions in the ring are masked by
//! the size, a power of two.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::Arc;

use super::inflight::SplitTracker;
use super::order::split as order;
use super::{append_buffer, find_area, ring_fault, Chain, RingFeatures};
use crate::crash;
use crate::error::Fault;
use crate::memory::{HostArea, MemoryMap};

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;

const DESC_SIZE: u64 = 16;

/// Where the three areas of a ring are, in the front end's addresses or in guest-physical ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Driver area (available ring).
    pub driver: u64,
    /// Device area (used ring).
    pub device: u64,
}

/// Which address space [`RingAddresses`] are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSpace {
    /// The front end's process (vhost-user SET_VRING_ADDR).
    User,
    /// Guest physical.
    Guest,
}

/// Bytes of the three areas for a queue of `size` descriptors: table, available ring, used ring. The event fields
/// are counted whether negotiated or not, as the legacy layout reserves them.
pub fn area_sizes(size: u16) -> (u64, u64, u64) {
    let n = u64::from(size);
    (DESC_SIZE * n, 6 + 2 * n, 6 + 8 * n)
}

/// Finds the three areas of a ring in host memory.
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
    if !size.is_power_of_two() || size > max_size {
        return Err(ring_fault(
            "ring.size",
            format!("size {size} is not a power of two from 1 to {max_size}"),
        ));
    }
    let (desc_len, avail_len, used_len) = area_sizes(size);
    let area = |name, address, len, align| find_area(map, space, name, address, len, align);
    Ok([
        area("descriptor table", addresses.desc, desc_len, 16)?,
        area("available ring", addresses.driver, avail_len, 2)?,
        area("used ring", addresses.device, used_len, 4)?,
    ])
}

/// The used index in a ring's memory: where a device that has used all it took went on.
///
/// # Errors
/// As [`resolve`].
pub fn used_idx(
    map: &Arc<MemoryMap>,
    space: AddressSpace,
    addresses: RingAddresses,
    size: u16,
    max_size: u16,
) -> Result<u16, Fault> {
    let [_, _, used] = resolve(map, space, addresses, size, max_size)?;
    Ok(u16::from_le(used.u16(2).load(Ordering::Acquire)))
}

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// One copy of the descriptor at `index`; all checks are made on the copy, since the driver may rewrite the
    /// original at any time.
    #[inline]
    fn load(table: &HostArea, index: usize) -> Self {
        let at = index * DESC_SIZE as usize;
        Self::new(table.load_u64(at), table.load_u64(at + 8))
    }

    #[inline]
    fn new(addr: u64, rest: u64) -> Self {
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// A running split ring.
pub struct SplitRing {
    desc: HostArea,
    avail: HostArea,
    used: HostArea,
    size: u16,
    mask: u16,
    /// Descriptors a chain may have: the device's largest queue size (a driver that chose a smaller ring may still
    /// send indirect tables made for the larger one).
    max_chain: u16,
    features: RingFeatures,
    /// Next available entry to take.
    next_avail: u16,
    /// avail.idx as last seen.
    avail_idx: u16,
    /// Next used entry to write; ahead of the published index by what the batch holds.
    next_used: u16,
    /// used.idx as the driver sees it.
    published: u16,
    /// used.idx when the driver was last considered for a signal; None before the first time.
    signalled: Option<u16>,
    /// Heads that an earlier process had in flight, to be taken before all others.
    again: VecDeque<u16>,
    /// The head that was popped last, and whether it came from there.
    last: (u16, bool),
    /// The record of what is in flight, where the front end keeps one.
    tracker: Option<Box<SplitTracker>>,
    hint: usize,
}

impl order::Fields for SplitRing {
    type Word = AtomicU16;

    #[inline]
    fn avail_flags(&self) -> &AtomicU16 {
        self.avail.u16(0)
    }

    #[inline]
    fn avail_idx(&self) -> &AtomicU16 {
        self.avail.u16(2)
    }

    #[inline]
    fn used_event(&self) -> &AtomicU16 {
        self.avail.u16(4 + 2 * usize::from(self.size))
    }

    #[inline]
    fn used_flags(&self) -> &AtomicU16 {
        self.used.u16(0)
    }

    #[inline]
    fn used_idx(&self) -> &AtomicU16 {
        self.used.u16(2)
    }

    #[inline]
    fn avail_event(&self) -> &AtomicU16 {
        self.used.u16(4 + 8 * usize::from(self.size))
    }
}

impl SplitRing {
    /// Resolves a ring's areas once and for all. `next_avail` is where to go on; the used index continues from what
    /// guest memory says, which for a fresh ring is 0 and after a reconnect what the driver has seen.
    ///
    /// # Errors
    /// `ring.size`, `ring.alignment`, `ring.address`.
    pub fn new(
        map: &Arc<MemoryMap>,
        space: AddressSpace,
        addresses: RingAddresses,
        size: u16,
        max_size: u16,
        features: RingFeatures,
        next_avail: u16,
    ) -> Result<Self, Fault> {
        let [desc, avail, used] = resolve(map, space, addresses, size, max_size)?;
        let used_idx = u16::from_le(used.u16(2).load(Ordering::Acquire));
        if features.event_idx {
            // The flag has no meaning then and must be 0; an earlier driver of the same memory may have left it set.
            used.u16(0).store(0, Ordering::Relaxed);
        }
        Ok(Self {
            desc,
            avail,
            used,
            size,
            mask: size - 1,
            max_chain: max_size,
            features,
            next_avail,
            avail_idx: next_avail,
            next_used: used_idx,
            published: used_idx,
            signalled: None,
            again: VecDeque::new(),
            last: (0, false),
            tracker: None,
            hint: 0,
        })
    }

    /// Keeps a record of what is in flight in `area` from now on, before anything is taken. What it has in flight already is
    /// taken first, in the old order; the ring then goes on behind it, wherever it was told to go on: a front end that has
    /// lost a back end only guesses.
    ///
    /// # Errors
    /// `inflight.*`.
    pub fn track(&mut self, area: HostArea) -> Result<(), Fault> {
        let (tracker, again) = SplitTracker::recover(area, self.size, self.published)?;
        self.tracker = Some(Box::new(tracker));
        if let Some(again) = again {
            // What was taken and not used, and nothing else, lies between the two indices. At most `size`, one each.
            self.next_avail = self.published.wrapping_add(again.len() as u16);
            self.avail_idx = self.next_avail;
            self.again = again;
        }
        Ok(())
    }

    /// The areas that the device writes, as guest addresses.
    pub fn written_areas(&self, ranges: &mut Vec<(u64, u64)>) {
        self.used.guest_ranges(ranges);
    }

    /// Requests that an earlier process had in flight and that weren't taken again yet.
    pub fn unfinished(&self) -> usize {
        self.again.len()
    }

    /// Whether the ring has used anything before it was opened here. The index alone doesn't say after 2^16 requests; the
    /// element before it does, as a new ring has a 0 there.
    pub fn has_history(&self) -> bool {
        let last = 4 + 8 * usize::from(self.published.wrapping_sub(1) & self.mask);
        let element = [last, last + 4].map(|at| self.used.u32(at).load(Ordering::Relaxed));
        self.published != 0 || element != [0, 0]
    }

    /// Whether the record's memory was taken away.
    pub fn record_lost(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.lost())
    }

    /// Moves the ring onto a new memory map. False when its areas aren't memory there: the ring goes on using the
    /// old mapping for what is in flight and must not take more until a later map has it again (QEMU removes a
    /// region and adds its successor in two messages while the device runs).
    pub fn rebase(&mut self, map: &Arc<MemoryMap>, space: AddressSpace, addresses: RingAddresses) -> bool {
        let ring = Self::new(
            map,
            space,
            addresses,
            self.size,
            self.max_chain.max(self.size),
            self.features,
            self.next_avail,
        );
        let Ok(ring) = ring else { return false };
        self.desc = ring.desc;
        self.avail = ring.avail;
        self.used = ring.used;
        self.hint = 0;
        true
    }

    /// Goes on with other features: a legacy driver may write them after it has begun to use the ring.
    pub fn set_features(&mut self, features: RingFeatures) {
        if features.event_idx && !self.features.event_idx {
            self.used.u16(0).store(0, Ordering::Relaxed);
            self.signalled = None;
        }
        self.features = features;
    }

    /// Next available entry this side will take.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index as the driver sees it.
    pub fn used_idx(&self) -> u16 {
        self.published
    }

    /// avail.idx as the driver has it now.
    pub fn peek_avail_idx(&self) -> u16 {
        order::peek(self)
    }

    /// Whether the driver has made something available that was not taken yet. A look at one field, without the checks
    /// of `available`.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.peek_avail_idx() != self.next_avail || !self.again.is_empty()
    }

    /// Looks for new entries; the number that can be taken.
    ///
    /// # Errors
    /// `ring.avail-index` when the driver's index is more than the ring's size ahead.
    #[inline]
    pub fn available(&mut self) -> Result<u16, Fault> {
        self.avail_idx = order::available(self);
        let count = self.avail_idx.wrapping_sub(self.next_avail);
        if count > self.size {
            return Err(ring_fault(
                "ring.avail-index",
                format!(
                    "available index {} is {count} ahead of {}, more than the queue size {}",
                    self.avail_idx, self.next_avail, self.size
                ),
            ));
        }
        if self.again.is_empty() {
            Ok(count)
        } else {
            Ok(count.saturating_add(self.again.len() as u16))
        }
    }

    /// Takes the next available chain; false when `available` has no more. `chain` must be clear.
    ///
    /// # Errors
    /// `ring.head-index`, `ring.next-index`, `ring.chain-length`, `ring.zero-length`, `ring.buffer-address`,
    /// `ring.buffer-order`, `ring.total-length`, and for indirect tables `ring.indirect-not-negotiated`,
    /// `ring.indirect-nested`, `ring.indirect-next`, `ring.indirect-length`, `ring.indirect-address`. The ring must
    /// not be used any more after an error.
    #[inline]
    pub fn pop(&mut self, map: &Arc<MemoryMap>, chain: &mut Chain) -> Result<bool, Fault> {
        if let Some(&head) = self.again.front() {
            chain.head = head;
            self.walk(map, chain)?;
            self.again.pop_front();
            self.last = (head, true);
            return Ok(true);
        }
        if self.next_avail == self.avail_idx {
            return Ok(false);
        }
        let slot = usize::from(self.next_avail & self.mask);
        let head = u16::from_le(self.avail.u16(4 + 2 * slot).load(Ordering::Relaxed));
        if head >= self.size {
            return Err(ring_fault(
                "ring.head-index",
                format!("available entry names descriptor {head} of {}", self.size),
            ));
        }
        chain.head = head;
        self.walk(map, chain)?;
        if let Some(tracker) = &mut self.tracker {
            tracker.taken(head);
        }
        self.last = (head, false);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.look_ahead(map);
        Ok(true)
    }

    /// Has the first buffer of the next chain, the header of most requests, brought into the cache while the device works
    /// on this one. It comes from the driver's CPU, and would have to be waited for then. Only a hint:
    /// what is read here is read again, and checked, by `pop`.
    #[inline]
    fn look_ahead(&mut self, map: &Arc<MemoryMap>) {
        if self.next_avail == self.avail_idx {
            return;
        }
        let slot = usize::from(self.next_avail & self.mask);
        let head = u16::from_le(self.avail.u16(4 + 2 * slot).load(Ordering::Relaxed));
        if head >= self.size {
            return;
        }
        let desc = Descriptor::load(&self.desc, usize::from(head));
        let mut first = desc.addr;
        if desc.flags & DESC_F_INDIRECT != 0 {
            match map.table_by_guest(desc.addr, DESC_SIZE, &mut self.hint) {
                Some(table) if table.is_aligned(16) => first = table.load_u64(0),
                _ => return,
            }
        }
        map.prefetch(first, &mut self.hint);
    }

    /// Puts the chain that was popped last back, once.
    pub fn undo_pop(&mut self) {
        let (head, again) = self.last;
        if again {
            // In the record it stays in flight.
            self.again.push_front(head);
            return;
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.untaken(head);
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    fn walk(&mut self, map: &Arc<MemoryMap>, chain: &mut Chain) -> Result<(), Fault> {
        let mut index = chain.head;
        // Descriptors seen, in the ring's own table first. A chain can't be longer than the table without visiting
        // a descriptor twice, so this bounds loops too.
        let mut seen: u16 = 0;
        loop {
            let desc = Descriptor::load(&self.desc, usize::from(index));
            seen += 1;
            if desc.flags & DESC_F_INDIRECT != 0 {
                return self.walk_indirect(map, chain, desc, seen);
            }
            Self::append(map, &mut self.hint, chain, desc)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            if seen >= self.size {
                return Err(ring_fault(
                    "ring.chain-length",
                    format!("chain at {} is longer than the queue size {}", chain.head, self.size),
                ));
            }
            if desc.next >= self.size {
                return Err(ring_fault(
                    "ring.next-index",
                    format!("descriptor {index} goes on at {} of {}", desc.next, self.size),
                ));
            }
            index = desc.next;
        }
    }

    fn walk_indirect(
        &mut self,
        map: &Arc<MemoryMap>,
        chain: &mut Chain,
        desc: Descriptor,
        seen: u16,
    ) -> Result<(), Fault> {
        let head = chain.head;
        if !self.features.indirect {
            return Err(ring_fault(
                "ring.indirect-not-negotiated",
                format!("chain at {head} has an indirect table, but INDIRECT_DESC was not negotiated"),
            ));
        }
        if desc.flags & DESC_F_NEXT != 0 {
            return Err(ring_fault(
                "ring.indirect-next",
                format!("chain at {head} has a descriptor with both INDIRECT and NEXT"),
            ));
        }
        let count = u64::from(desc.len) / DESC_SIZE;
        let limit = u64::from(self.max_chain).saturating_sub(u64::from(seen - 1));
        if count == 0 || !u64::from(desc.len).is_multiple_of(DESC_SIZE) || count > limit {
            return Err(ring_fault(
                "ring.indirect-length",
                format!(
                    "indirect table of {} bytes at {head}; 16 to {} in steps of 16",
                    desc.len,
                    limit * 16
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
            return self.walk_unaligned(map, chain, desc, count);
        }
        let mut index = 0u64;
        for _ in 0..count {
            let at = index as usize * DESC_SIZE as usize;
            let inner = Descriptor::new(table.load_u64(at), table.load_u64(at + 8));
            match Self::indirect_step(map, &mut self.hint, chain, inner, count)? {
                Some(next) => index = next,
                None => return Ok(()),
            }
        }
        Err(Self::indirect_loop(head, count))
    }

    /// An indirect table at an odd place: legal (the specification asks 16 of the ring's own table only), and rare
    /// enough to be copied out.
    #[cold]
    fn walk_unaligned(
        &mut self,
        map: &Arc<MemoryMap>,
        chain: &mut Chain,
        desc: Descriptor,
        count: u64,
    ) -> Result<(), Fault> {
        let mut source = crate::memory::Buffers::default();
        let mut table = vec![0u8; desc.len as usize];
        map.append(desc.addr, u64::from(desc.len), &mut self.hint, &mut source);
        source.read(&mut table);
        let mut index = 0u64;
        for _ in 0..count {
            let at = (index * DESC_SIZE) as usize;
            let word = |from: usize| {
                let mut bytes = [0u8; 8];
                bytes.copy_from_slice(&table[from..from + 8]);
                u64::from_le_bytes(bytes)
            };
            let rest = word(at + 8);
            let inner = Descriptor {
                addr: word(at),
                len: rest as u32,
                flags: (rest >> 32) as u16,
                next: (rest >> 48) as u16,
            };
            match Self::indirect_step(map, &mut self.hint, chain, inner, count)? {
                Some(next) => index = next,
                None => return Ok(()),
            }
        }
        Err(Self::indirect_loop(chain.head, count))
    }

    #[inline]
    fn indirect_step(
        map: &Arc<MemoryMap>,
        hint: &mut usize,
        chain: &mut Chain,
        desc: Descriptor,
        count: u64,
    ) -> Result<Option<u64>, Fault> {
        if desc.flags & DESC_F_INDIRECT != 0 {
            return Err(ring_fault(
                "ring.indirect-nested",
                format!("chain at {} has an indirect table inside an indirect table", chain.head),
            ));
        }
        Self::append(map, hint, chain, desc)?;
        if desc.flags & DESC_F_NEXT == 0 {
            return Ok(None);
        }
        let next = u64::from(desc.next);
        if next >= count {
            return Err(ring_fault(
                "ring.next-index",
                format!(
                    "chain at {} goes on at {next} of {count} in its indirect table",
                    chain.head
                ),
            ));
        }
        Ok(Some(next))
    }

    #[cold]
    fn indirect_loop(head: u16, count: u64) -> Fault {
        ring_fault(
            "ring.chain-length",
            format!("chain at {head} is longer than its indirect table of {count}"),
        )
    }

    #[inline]
    fn append(map: &Arc<MemoryMap>, hint: &mut usize, chain: &mut Chain, desc: Descriptor) -> Result<(), Fault> {
        append_buffer(map, hint, chain, desc.addr, desc.len, desc.flags & DESC_F_WRITE != 0)
    }

    /// Writes a used element. The driver sees it with the next `publish`.
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & self.mask);
        self.used
            .u32(4 + 8 * slot)
            .store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used.u32(8 + 8 * slot).store(written.to_le(), Ordering::Relaxed);
        crash::point("split.used-element");
        // Heads are less than the size: `pop` has checked them.
        if let Some(tracker) = &mut self.tracker {
            tracker.used(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes the used elements written so far visible; false when there are none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.next_used == self.published {
            return false;
        }
        order::publish(self, self.next_used);
        crash::point("split.published");
        if let Some(tracker) = &mut self.tracker {
            tracker.published(self.next_used);
        }
        self.published = self.next_used;
        true
    }

    /// After `publish`: whether the driver wants an interrupt for what was published since the last call.
    /// `in_flight` says how many requests are taken but not used (NOTIFY_ON_EMPTY asks for none of either).
    #[inline]
    pub fn should_signal(&mut self, in_flight: usize) -> bool {
        let old = self.signalled.replace(self.published);
        let empty_at = (self.features.notify_on_empty && in_flight == 0).then_some(self.next_avail);
        order::should_signal(self, self.features.event_idx, empty_at, old, self.published)
    }

    /// Asks the driver not to notify while we are looking anyway.
    #[inline]
    pub fn disable_notification(&mut self) {
        order::disable_notification(self, self.features.event_idx);
    }

    /// Asks the driver to notify again; true when something came in meanwhile and the ring must be looked at again.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        order::enable_notification(self, self.features.event_idx, self.next_avail) || !self.again.is_empty()
    }
}
