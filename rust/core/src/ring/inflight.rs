// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests in flight, recorded in memory that outlives this process (vhost-user, "Inflight I/O tracking").
//!
//! The front end keeps a file for it and hands it to whoever serves its rings next. Each queue has a region in it; the
//! layouts are the protocol's (QueueRegionSplit, QueueRegionPacked), so that another back end can go on where we were
//! killed, and the other way round.
//!
//! While a ring runs the region is only written: what is true is in this process. It is read once, when a ring starts,
//! and every number in it is checked then; it belongs to the front end.
//!
//! A process can be killed between any two stores, so their order is the point here. They need no barriers for that:
//! what a killed thread has stored is what its program had stored up to that point. Only the compiler must not reorder
//! them, hence release.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use super::packed::{Descriptor, Place};
use super::ring_fault;
use crate::crash;
use crate::error::Fault;
use crate::memory::HostArea;

const VERSION: u16 = 1;
/// Regions of queues begin at multiples of this.
const ALIGN: u64 = 64;

const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;

const SPLIT_HEADER: usize = 16;
const SPLIT_ENTRY: usize = 16;
const SPLIT_LAST_BATCH: usize = 12;
const SPLIT_USED_IDX: usize = 14;
const SPLIT_NEXT: usize = 6;
const SPLIT_COUNTER: usize = 8;

const PACKED_HEADER: usize = 32;
const PACKED_ENTRY: usize = 32;
const PACKED_FREE_HEAD: usize = 12;
const PACKED_OLD_FREE_HEAD: usize = 14;
/// Four fields in one word: used_idx, old_used_idx (16 bits each), used_wrap_counter, old_used_wrap_counter (8 each).
const PACKED_USED_IDX: usize = 16;
const PACKED_NEXT: usize = 2;
const PACKED_LAST: usize = 4;
const PACKED_NUM: usize = 6;
const PACKED_COUNTER: usize = 8;
const PACKED_ID: usize = 16;
const PACKED_FLAGS: usize = 18;
const PACKED_LEN: usize = 20;
const PACKED_ADDR: usize = 24;

/// Bytes of a queue's region for rings of up to `size` descriptors, in either format when `packed`.
pub fn region_size(size: u16, packed: bool) -> u64 {
    let (header, entry) = if packed {
        (PACKED_HEADER, PACKED_ENTRY)
    } else {
        (SPLIT_HEADER, SPLIT_ENTRY)
    };
    (header as u64 + entry as u64 * u64::from(size)).next_multiple_of(ALIGN)
}

/// Where the region of a queue is, when a file of `total` bytes holds those of `queues` queues: (offset, bytes).
///
/// The protocol doesn't say how they are laid out; every back end divides the file evenly.
pub fn region_place(total: u64, queues: u16, index: u16) -> Option<(u64, u64)> {
    let each = (total / u64::from(queues.max(1))) / ALIGN * ALIGN;
    (index < queues && each > 0).then(|| (u64::from(index) * each, each))
}

/// Largest ring that a queue's region has room for.
pub fn capacity(area: &HostArea, packed: bool) -> usize {
    let (header, entry) = if packed {
        (PACKED_HEADER, PACKED_ENTRY)
    } else {
        (SPLIT_HEADER, SPLIT_ENTRY)
    };
    area.len().saturating_sub(header) / entry
}

/// Forgets all records: the ring begins anew, and whatever was in flight is void.
pub fn clear(area: &HostArea) {
    if area.len() > DESC_NUM_AT + 2 {
        area.u16(VERSION_AT).store(0, Ordering::Release);
    }
}

#[cold]
fn damaged(rule: &'static str, reason: String) -> Fault {
    ring_fault(rule, reason)
}

fn check_version(area: &HostArea, size: u16, room: usize) -> Result<bool, Fault> {
    if usize::from(size) > room {
        return Err(damaged(
            "inflight.size",
            format!("a region for {room} descriptors; the ring has {size}"),
        ));
    }
    match area.u16(VERSION_AT).load(Ordering::Acquire) {
        0 => Ok(false),
        VERSION => Ok(true),
        other => Err(damaged(
            "inflight.version",
            format!("version {other} of the in-flight region; {VERSION} is known here"),
        )),
    }
}

/// The record of a split ring.
pub struct SplitTracker {
    area: HostArea,
    counter: u64,
    /// Head of the list of the batch that isn't published yet.
    last_batch: u16,
    /// Heads in that batch.
    batch: Vec<u16>,
}

impl SplitTracker {
    /// Goes on from what the region says; the heads that were in flight, in the order in which they were taken. None: it
    /// says nothing of this ring.
    ///
    /// # Errors
    /// `inflight.*`.
    pub fn recover(area: HostArea, size: u16, used_idx: u16) -> Result<(Self, Option<VecDeque<u16>>), Fault> {
        let known = check_version(&area, size, capacity(&area, false))?;
        let mut tracker = Self {
            area,
            counter: 0,
            last_batch: 0,
            batch: Vec::new(),
        };
        if !known {
            tracker.begin(size, used_idx);
            return Ok((tracker, None));
        }
        let mut again = tracker.scan(size);
        let recorded = tracker.area.u16(SPLIT_USED_IDX).load(Ordering::Relaxed);
        let batch = used_idx.wrapping_sub(recorded);
        if batch > size && !again.is_empty() {
            return Err(damaged(
                "inflight.used-index",
                format!("used index {used_idx} in the ring, {recorded} in the in-flight region of {size}"),
            ));
        }
        if batch > size || usize::from(tracker.area.u16(DESC_NUM_AT).load(Ordering::Relaxed)) != usize::from(size) {
            if again.is_empty() {
                // Nothing was in flight, so this is another ring than the one that was recorded.
                tracker.begin(size, used_idx);
                return Ok((tracker, None));
            }
            return Err(damaged(
                "inflight.size",
                format!("requests in flight of a ring of another size than {size}"),
            ));
        }
        if batch > 0 {
            // Killed after the batch was published, but before it was struck off: it must not run again.
            let mut head = tracker.area.u16(SPLIT_LAST_BATCH).load(Ordering::Relaxed);
            for _ in 0..batch {
                if head >= size {
                    return Err(damaged(
                        "inflight.index",
                        format!("the last batch names descriptor {head} of {size}"),
                    ));
                }
                tracker.flag(head, 0);
                crash::point("inflight.recover");
                head = tracker
                    .area
                    .u16(SPLIT_HEADER + SPLIT_ENTRY * usize::from(head) + SPLIT_NEXT)
                    .load(Ordering::Relaxed);
            }
            tracker.area.u16(SPLIT_USED_IDX).store(used_idx, Ordering::Release);
            again = tracker.scan(size);
        }
        again.sort_unstable();
        tracker.counter = again.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        tracker.last_batch = tracker.area.u16(SPLIT_LAST_BATCH).load(Ordering::Relaxed);
        Ok((tracker, Some(again.into_iter().map(|(_, head)| head).collect())))
    }

    fn begin(&self, size: u16, used_idx: u16) {
        // Half-way through, the record is of no ring.
        clear(&self.area);
        // Also those of a larger ring before this one: there may be another after it.
        let recorded = self.area.u16(DESC_NUM_AT).load(Ordering::Relaxed);
        let end = usize::from(size.max(recorded)).min(capacity(&self.area, false));
        for head in (0..end as u16).filter(|&head| self.flagged(head)) {
            self.flag(head, 0);
        }
        self.area.u64(0).store(0, Ordering::Release);
        self.area.u16(DESC_NUM_AT).store(size, Ordering::Release);
        self.area.u16(SPLIT_LAST_BATCH).store(0, Ordering::Release);
        self.area.u16(SPLIT_USED_IDX).store(used_idx, Ordering::Release);
        self.area.u16(VERSION_AT).store(VERSION, Ordering::Release);
    }

    fn entry(head: u16) -> usize {
        SPLIT_HEADER + SPLIT_ENTRY * usize::from(head)
    }

    fn flagged(&self, head: u16) -> bool {
        self.area.u8(Self::entry(head)).load(Ordering::Relaxed) != 0
    }

    fn flag(&self, head: u16, value: u8) {
        self.area.u8(Self::entry(head)).store(value, Ordering::Release);
    }

    fn scan(&self, size: u16) -> Vec<(u64, u16)> {
        (0..size)
            .filter(|&head| self.flagged(head))
            .map(|head| {
                let counter = self.area.u64(Self::entry(head) + SPLIT_COUNTER);
                (counter.load(Ordering::Relaxed), head)
            })
            .collect()
    }

    /// A chain was taken.
    #[inline]
    pub fn taken(&mut self, head: u16) {
        self.area
            .u64(Self::entry(head) + SPLIT_COUNTER)
            .store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        crash::point("inflight.counter");
        self.flag(head, 1);
        crash::point("inflight.taken");
    }

    /// A chain that was taken is put back.
    pub fn untaken(&mut self, head: u16) {
        self.flag(head, 0);
    }

    /// A chain's used element was written, and will be published with the batch.
    #[inline]
    pub fn used(&mut self, head: u16) {
        self.area
            .u16(Self::entry(head) + SPLIT_NEXT)
            .store(self.last_batch, Ordering::Release);
        crash::point("inflight.link");
        self.area.u16(SPLIT_LAST_BATCH).store(head, Ordering::Release);
        self.last_batch = head;
        self.batch.push(head);
        crash::point("inflight.last-batch");
    }

    /// The batch was published: `used_idx` is in the ring.
    #[inline]
    pub fn published(&mut self, used_idx: u16) {
        for &head in &self.batch {
            self.area.u8(Self::entry(head)).store(0, Ordering::Release);
            crash::point("inflight.struck-off");
        }
        self.batch.clear();
        self.area.u16(SPLIT_USED_IDX).store(used_idx, Ordering::Release);
        crash::point("inflight.used-index");
    }

    /// Whether the front end has taken the memory away.
    pub fn lost(&self) -> bool {
        self.area.lost()
    }
}

/// A chain of a packed ring that was in flight, with the descriptors that the ring may not have any more.
pub struct PackedChain {
    /// Buffer ID.
    pub id: u16,
    /// Descriptors as the driver wrote them.
    pub descriptors: Vec<Descriptor>,
}

/// Where a packed ring goes on, and with what.
pub struct PackedRecovery {
    /// The region knows this ring.
    pub known: bool,
    /// The next used descriptor goes here.
    pub used: Place,
    /// Chains in flight, in the order in which they were taken.
    pub again: VecDeque<PackedChain>,
}

/// The record of a packed ring.
pub struct PackedTracker {
    area: HostArea,
    size: u16,
    counter: u64,
    /// First free entry; `size`: there is none.
    free: u16,
    /// By entry: the one after it, on the free list and in a chain. What the region has, but for what the front end may
    /// have written there.
    next: Box<[u16]>,
    /// By buffer ID of a chain in flight: its first and last entry.
    chains: Box<[(u16, u16)]>,
    /// The chain that is being taken: entries so far, the last one, and the first that is free after it.
    taking: (u16, u16, u16),
    /// First and last entries of the chains in the batch that isn't published yet. Not their buffer IDs: a driver that goes
    /// wrong may use one again before it has got it back.
    batch: Vec<(u16, u16)>,
}

impl PackedTracker {
    /// Goes on from what the region says, or from `used` if it says nothing. `flags_at`: the flags of a descriptor in the
    /// ring.
    ///
    /// # Errors
    /// `inflight.*`.
    pub fn recover(
        area: HostArea,
        size: u16,
        used: Place,
        flags_at: impl Fn(Place) -> u16,
    ) -> Result<(Self, PackedRecovery), Fault> {
        let mut known = check_version(&area, size, capacity(&area, true))?;
        let recorded = area.u16(DESC_NUM_AT).load(Ordering::Relaxed);
        let all = usize::from(size.max(recorded)).min(capacity(&area, true)) as u16;
        let mut tracker = Self {
            area,
            size,
            counter: 0,
            free: size,
            next: vec![0; usize::from(size)].into_boxed_slice(),
            chains: vec![(0, 0); usize::from(size)].into_boxed_slice(),
            taking: (0, 0, 0),
            batch: Vec::new(),
        };
        if known && recorded != size {
            if (0..all).any(|entry| tracker.flagged(entry)) {
                return Err(damaged(
                    "inflight.size",
                    format!("requests in flight of a ring of another size than {size}"),
                ));
            }
            // Nothing was in flight, so this is another ring than the one that was recorded.
            known = false;
        }
        let mut recovery = PackedRecovery {
            known,
            used,
            again: VecDeque::new(),
        };
        let mut taken = vec![false; usize::from(size)];
        if known {
            recovery.used = tracker.settle(flags_at)?;
            crash::point("inflight.recover");
            recovery.again = tracker.collect(&mut taken)?;
        } else {
            clear(&tracker.area);
            for entry in (0..all).filter(|&entry| tracker.flagged(entry)) {
                tracker.flag(entry, 0);
            }
            tracker.area.u64(0).store(0, Ordering::Release);
            tracker.store_used(used, used);
        }
        tracker.rewrite_free(&taken);
        tracker.area.u16(DESC_NUM_AT).store(size, Ordering::Release);
        tracker.area.u16(VERSION_AT).store(VERSION, Ordering::Release);
        Ok((tracker, recovery))
    }

    fn entry(entry: u16) -> usize {
        PACKED_HEADER + PACKED_ENTRY * usize::from(entry)
    }

    fn u16_of(&self, entry: u16, field: usize) -> u16 {
        self.area.u16(Self::entry(entry) + field).load(Ordering::Relaxed)
    }

    #[inline]
    fn set_u16_of(&self, entry: u16, field: usize, value: u16) {
        self.area
            .u16(Self::entry(entry) + field)
            .store(value, Ordering::Release);
    }

    fn flagged(&self, entry: u16) -> bool {
        self.area.u8(Self::entry(entry)).load(Ordering::Relaxed) != 0
    }

    #[inline]
    fn flag(&self, entry: u16, value: u8) {
        self.area.u8(Self::entry(entry)).store(value, Ordering::Release);
    }

    fn header(&self, field: usize) -> u16 {
        self.area.u16(field).load(Ordering::Relaxed)
    }

    #[inline]
    fn set_header(&self, field: usize, value: u16) {
        self.area.u16(field).store(value, Ordering::Release);
    }

    /// used_idx with its wrap counter, and the old ones.
    fn load_used(&self) -> Result<(Place, Place), Fault> {
        let bytes = self.area.u64(PACKED_USED_IDX).load(Ordering::Acquire).to_ne_bytes();
        let place = |at: usize, wrap: usize| Place {
            index: u16::from_ne_bytes([bytes[at], bytes[at + 1]]),
            wrap: bytes[wrap] != 0,
        };
        let (new, old) = (place(0, 4), place(2, 5));
        if new.index >= self.size || old.index >= self.size {
            return Err(damaged(
                "inflight.used-index",
                format!(
                    "used descriptors {} and {} of {} in the in-flight region",
                    new.index, old.index, self.size
                ),
            ));
        }
        Ok((new, old))
    }

    /// In one store: an index without its wrap counter would be another place.
    #[inline]
    fn store_used(&self, new: Place, old: Place) {
        let ([a, b], [c, d]) = (new.index.to_ne_bytes(), old.index.to_ne_bytes());
        let bytes = [a, b, c, d, u8::from(new.wrap), u8::from(old.wrap), 0, 0];
        self.area
            .u64(PACKED_USED_IDX)
            .store(u64::from_ne_bytes(bytes), Ordering::Release);
    }

    /// Ends or takes back what the last process was doing; where the ring's used side stands.
    fn settle(&self, flags_at: impl Fn(Place) -> u16) -> Result<Place, Fault> {
        let (new, old) = self.load_used()?;
        if new == old {
            return Ok(old);
        }
        // The driver sees the batch when the flags of its first used descriptor have changed, and it may have made that
        // one available again since, in its next lap.
        if !old.is_used(flags_at(old)) {
            self.store_used(old, old);
            return Ok(old);
        }
        let (free_head, old_free_head) = (self.header(PACKED_FREE_HEAD), self.header(PACKED_OLD_FREE_HEAD));
        let mut entry = free_head;
        for _ in 0..self.size {
            if entry == old_free_head {
                break;
            }
            let last = if entry < self.size {
                self.u16_of(entry, PACKED_LAST)
            } else {
                u16::MAX
            };
            if last >= self.size {
                return Err(damaged(
                    "inflight.index",
                    format!("the last batch names entry {entry} of {}", self.size),
                ));
            }
            self.flag(entry, 0);
            crash::point("inflight.recover");
            entry = self.u16_of(last, PACKED_NEXT);
        }
        self.set_header(PACKED_OLD_FREE_HEAD, free_head);
        crash::point("inflight.recover");
        self.store_used(new, new);
        Ok(new)
    }

    /// The chains in flight; their entries are marked in `taken`.
    fn collect(&mut self, taken: &mut [bool]) -> Result<VecDeque<PackedChain>, Fault> {
        // What the last process was taking when it was killed is still on the free list.
        let mut entry = self.header(PACKED_OLD_FREE_HEAD);
        for _ in 0..self.size {
            if entry >= self.size {
                break;
            }
            if self.flagged(entry) {
                self.flag(entry, 0);
            }
            entry = self.u16_of(entry, PACKED_NEXT);
        }
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|&entry| self.flagged(entry))
            .map(|entry| {
                let counter = self.area.u64(Self::entry(entry) + PACKED_COUNTER);
                (counter.load(Ordering::Relaxed), entry)
            })
            .collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| self.chain(head, taken)).collect()
    }

    fn chain(&mut self, head: u16, taken: &mut [bool]) -> Result<PackedChain, Fault> {
        let refuse = |reason: String| damaged("inflight.chain", reason);
        let mut descriptors = Vec::new();
        let (mut entry, mut last) = (head, head);
        for _ in 0..self.u16_of(head, PACKED_NUM) {
            let Some(mark) = taken.get_mut(usize::from(entry)).filter(|mark| !**mark) else {
                let reason = format!("the chain at entry {head} goes on at {entry} of {}", self.size);
                return Err(refuse(reason));
            };
            // So the loop ends after `size` steps, whatever the count.
            *mark = true;
            let at = Self::entry(entry);
            descriptors.push(Descriptor {
                addr: self.area.u64(at + PACKED_ADDR).load(Ordering::Relaxed),
                len: self.area.u32(at + PACKED_LEN).load(Ordering::Relaxed),
                id: self.u16_of(entry, PACKED_ID),
                flags: self.u16_of(entry, PACKED_FLAGS),
            });
            last = entry;
            entry = self.u16_of(entry, PACKED_NEXT);
            self.next[usize::from(last)] = entry;
        }
        let Some(id) = descriptors.last().map(|descriptor| descriptor.id) else {
            return Err(refuse(format!("the chain at entry {head} has no descriptors")));
        };
        match self.chains.get_mut(usize::from(id)) {
            Some(chain) => *chain = (head, last),
            None => return Err(refuse(format!("buffer ID {id} of the chain at entry {head}"))),
        }
        Ok(PackedChain { id, descriptors })
    }

    /// Writes the list of free entries. Nothing is in flight in them, so being killed half-way does no harm.
    fn rewrite_free(&mut self, taken: &[bool]) {
        let mut next = self.size;
        for entry in (0..self.size).rev().filter(|&entry| !taken[usize::from(entry)]) {
            self.next[usize::from(entry)] = next;
            self.set_u16_of(entry, PACKED_NEXT, next);
            crash::point("inflight.rewrite");
            next = entry;
        }
        self.free = next;
        self.set_header(PACKED_FREE_HEAD, next);
        crash::point("inflight.rewrite");
        self.set_header(PACKED_OLD_FREE_HEAD, next);
    }

    /// Begins to take a chain. One that was begun before and not taken is forgotten.
    #[inline]
    pub fn begin(&mut self) {
        self.taking = (0, self.size, self.free);
    }

    /// Records a descriptor of the chain that is being taken.
    #[inline]
    pub fn note(&mut self, descriptor: Descriptor) {
        let entry = self.taking.2;
        // The ring bounds chains by what isn't in flight, which is as many as there are free entries.
        let Some(&next) = self.next.get(usize::from(entry)) else {
            return;
        };
        let at = Self::entry(entry);
        self.area
            .u64(at + PACKED_ADDR)
            .store(descriptor.addr, Ordering::Release);
        self.area.u32(at + PACKED_LEN).store(descriptor.len, Ordering::Release);
        self.set_u16_of(entry, PACKED_FLAGS, descriptor.flags);
        self.set_u16_of(entry, PACKED_ID, descriptor.id);
        self.taking = (self.taking.0 + 1, entry, next);
        crash::point("inflight.descriptor");
    }

    /// The chain was taken.
    #[inline]
    pub fn taken(&mut self, id: u16) {
        let (count, last, next) = self.taking;
        if count == 0 {
            return;
        }
        let head = self.free;
        self.set_u16_of(head, PACKED_NUM, count);
        self.set_u16_of(head, PACKED_LAST, last);
        self.area
            .u64(Self::entry(head) + PACKED_COUNTER)
            .store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        crash::point("inflight.counter");
        self.flag(head, 1);
        crash::point("inflight.taken");
        // From here on it is in flight: until then its entries are on the free list, where a flag doesn't count.
        self.free = next;
        self.set_header(PACKED_FREE_HEAD, next);
        crash::point("inflight.free-head");
        self.set_header(PACKED_OLD_FREE_HEAD, next);
        crash::point("inflight.old-free-head");
        self.chains[usize::from(id)] = (head, last);
        self.begin();
    }

    /// A chain that was taken is put back.
    pub fn untaken(&mut self, id: u16) {
        let chain = self.chains[usize::from(id)];
        self.flag(chain.0, 0);
        crash::point("inflight.untaken");
        self.release(chain);
        self.set_header(PACKED_FREE_HEAD, self.free);
        crash::point("inflight.untaken");
        self.set_header(PACKED_OLD_FREE_HEAD, self.free);
    }

    /// Puts the entries of a chain in front of the free list. They are linked to each other already.
    #[inline]
    fn release(&mut self, (head, last): (u16, u16)) {
        self.next[usize::from(last)] = self.free;
        self.set_u16_of(last, PACKED_NEXT, self.free);
        self.free = head;
    }

    /// A chain's used descriptor was written, and will be published with the batch.
    #[inline]
    pub fn used(&mut self, id: u16) {
        self.batch.push(self.chains[usize::from(id)]);
    }

    /// The batch is about to be published. The next used descriptor goes to `used` after it, and went to `before` so far.
    #[inline]
    pub fn publishing(&mut self, used: Place, before: Place) {
        for index in 0..self.batch.len() {
            self.release(self.batch[index]);
            crash::point("inflight.link");
        }
        self.set_header(PACKED_FREE_HEAD, self.free);
        crash::point("inflight.free-head");
        self.store_used(used, before);
        crash::point("inflight.used");
    }

    /// It was.
    #[inline]
    pub fn published(&mut self, used: Place) {
        for &(head, _) in &self.batch {
            self.flag(head, 0);
            crash::point("inflight.struck-off");
        }
        self.batch.clear();
        self.set_header(PACKED_OLD_FREE_HEAD, self.free);
        crash::point("inflight.old-free-head");
        self.store_used(used, used);
        crash::point("inflight.old-used");
    }

    /// Whether the front end has taken the memory away.
    pub fn lost(&self) -> bool {
        self.area.lost()
    }
}
