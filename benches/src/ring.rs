// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of one virtqueue, split or packed, in order or not.
//!
//! A slot is one request with its place in memory; its buffers never move. Chains and descriptors are counted without
//! end, indices and wrap counters follow from that.

use std::io;
use std::sync::atomic::{fence, Ordering};

use crate::ram::Ram;

/// Descriptor flag: another one follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// Where the three areas are in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Areas {
    /// Descriptors.
    pub desc: usize,
    /// Available ring, or driver event suppression.
    pub driver: usize,
    /// Used ring, or device event suppression.
    pub device: usize,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Descriptors in the ring, a power of two.
    pub size: u16,
    /// RING_PACKED.
    pub packed: bool,
    /// IN_ORDER.
    pub in_order: bool,
    /// EVENT_IDX.
    pub event_idx: bool,
}

/// A buffer as the device sees it.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// NEXT, WRITE.
    pub flags: u16,
}

/// Bytes of the driver and the device area; descriptors are 16 bytes each in both formats.
pub fn area_sizes(format: Format) -> (usize, usize) {
    let n = usize::from(format.size);
    if format.packed {
        (4, 4)
    } else {
        (6 + 2 * n, 6 + 8 * n)
    }
}

/// Writes a split table: the descriptors of one chain from `first` on, wrapping at `size`.
fn write_split(ram: &Ram, table: usize, parts: &[Part], first: usize, size: usize) {
    for (i, part) in parts.iter().enumerate() {
        let at = table + (first + i) % size * 16;
        let next = if part.flags & NEXT != 0 {
            (first + i + 1) % size
        } else {
            0
        };
        ram.u64(at).store(part.addr, Ordering::Relaxed);
        ram.u64(at + 8).store(
            u64::from(part.len) | u64::from(part.flags) << 32 | (next as u64) << 48,
            Ordering::Relaxed,
        );
    }
}

/// One virtqueue.
pub struct Ring {
    areas: Areas,
    format: Format,
    /// Descriptors of each slot in the ring.
    slots: Vec<Vec<Part>>,
    /// Chains made available, and how many of them were published (split).
    added: u64,
    published: u64,
    /// Chains that the device was seen to have used.
    taken: u64,
    /// Split: the used index as last looked at.
    end: u16,
    /// Descriptors made available: the place of the next one.
    avail: u64,
    /// Packed: `avail` at the last decision about a kick.
    decided: u64,
    /// Packed: the place of the next used descriptor.
    used: u64,
    /// IN_ORDER: the slot that the device named last and that was not yet reached, with its length.
    batch: Option<(usize, u32)>,
}

impl Ring {
    /// Lays the ring out in memory. `slots` are each slot's buffers; with `tables` they go into an indirect table per slot
    /// (offset and guest address).
    pub fn new(
        ram: &Ram,
        areas: Areas,
        format: Format,
        slots: Vec<Vec<Part>>,
        tables: Option<&dyn Fn(usize) -> (usize, u64)>,
    ) -> Self {
        let slots: Vec<Vec<Part>> = slots
            .into_iter()
            .enumerate()
            .map(|(slot, mut parts)| {
                let Some(tables) = tables else { return parts };
                let (at, addr) = tables(slot);
                let len = 16 * parts.len() as u32;
                if format.packed {
                    parts.iter_mut().for_each(|part| part.flags &= !NEXT);
                    for (i, part) in parts.iter().enumerate() {
                        write_packed(ram, at + 16 * i, *part, 0, part.flags);
                    }
                } else {
                    write_split(ram, at, &parts, 0, parts.len());
                }
                vec![Part {
                    addr,
                    len,
                    flags: INDIRECT,
                }]
            })
            .collect();
        let ring = Self {
            areas,
            format,
            slots,
            added: 0,
            published: 0,
            taken: 0,
            end: 0,
            avail: 0,
            decided: 0,
            used: 0,
            batch: None,
        };
        if !format.packed && !format.in_order {
            // They stay where they are: only the sectors in the headers change.
            for (slot, parts) in ring.slots.iter().enumerate() {
                write_split(ram, areas.desc, parts, slot * parts.len(), usize::from(format.size));
            }
        }
        ring
    }

    /// Where the device begins, or goes on after it was lost (SET_VRING_BASE): behind what was taken. All that is in
    /// flight is available from there on.
    pub fn position(&self) -> u32 {
        if self.format.packed {
            u32::from(self.bits(self.used)) * 0x1_0001
        } else {
            u32::from(self.taken as u16)
        }
    }

    /// Chains in the device's hands.
    pub fn in_flight(&self) -> u64 {
        self.added - self.taken
    }

    fn mask(&self, count: u64) -> usize {
        (count & u64::from(self.format.size - 1)) as usize
    }

    /// The wrap counter of a place in a packed ring.
    fn wrap(&self, place: u64) -> bool {
        (place / u64::from(self.format.size)).is_multiple_of(2)
    }

    /// A place as event suppression structures have it.
    fn bits(&self, place: u64) -> u16 {
        self.mask(place) as u16 | u16::from(self.wrap(place)) << 15
    }

    /// Puts a slot into the ring. A split ring shows it with `publish`, a packed one at once.
    pub fn push(&mut self, ram: &Ram, slot: usize) {
        let parts = &self.slots[slot];
        let count = parts.len() as u64;
        if self.format.packed {
            let mut first_flags = 0;
            for (i, part) in parts.iter().enumerate() {
                let place = self.avail + i as u64;
                let flags = part.flags | if self.wrap(place) { AVAIL } else { USED };
                let at = self.areas.desc + 16 * self.mask(place);
                if i == 0 {
                    first_flags = flags;
                    write_packed_body(ram, at, *part, slot as u16);
                } else {
                    write_packed(ram, at, *part, slot as u16, flags);
                }
            }
            let first = self.areas.desc + 16 * self.mask(self.avail) + 14;
            ram.u16(first).store(first_flags, Ordering::Release);
        } else {
            let head = if self.format.in_order {
                // "The driver MUST use descriptors in ring order."
                let first = self.mask(self.avail);
                write_split(ram, self.areas.desc, parts, first, usize::from(self.format.size));
                first
            } else {
                slot * parts.len()
            };
            let at = self.areas.driver + 4 + 2 * self.mask(self.added);
            ram.u16(at).store(head as u16, Ordering::Relaxed);
        }
        self.avail += count;
        self.added += 1;
    }

    /// Shows what was pushed; whether the device wants a kick for it.
    pub fn publish(&mut self, ram: &Ram) -> bool {
        if self.format.packed {
            return self.packed_kick(ram);
        }
        let (old, new) = (self.published as u16, self.added as u16);
        self.published = self.added;
        ram.u16(self.areas.driver + 2).store(new, Ordering::Release);
        // The index before the look at whether a kick is wanted.
        fence(Ordering::SeqCst);
        if self.format.event_idx {
            let at = self.areas.device + 4 + 8 * usize::from(self.format.size);
            let event = ram.u16(at).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            ram.u16(self.areas.device).load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    fn packed_kick(&mut self, ram: &Ram) -> bool {
        // The descriptors before the look at whether a kick is wanted.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.decided, self.avail);
        match ram.u16(self.areas.device + 2).load(Ordering::Acquire) & 3 {
            EVENT_ENABLE => true,
            EVENT_DESC => {
                let event = ram.u16(self.areas.device).load(Ordering::Relaxed);
                // One bit of wrap counter tells two laps apart, and at most one lap was added.
                let size = u64::from(self.format.size);
                let event = u64::from(event & 0x7fff) + if event & 0x8000 != 0 { 0 } else { size };
                let behind = (self.avail + 4 * size - event) % (2 * size);
                (1..=self.avail - old).contains(&behind)
            }
            _ => false,
        }
    }

    /// Tells the device when to call next: at the next completion, or never.
    pub fn ask(&self, ram: &Ram, never: bool) {
        if self.format.packed {
            let flags = if never {
                EVENT_DISABLE
            } else if self.format.event_idx {
                ram.u16(self.areas.driver)
                    .store(self.bits(self.used), Ordering::Relaxed);
                EVENT_DESC
            } else {
                EVENT_ENABLE
            };
            ram.u16(self.areas.driver + 2).store(flags, Ordering::Release);
        } else if self.format.event_idx {
            // Half the number circle away, and moved along with each round: never reached.
            let event = (self.taken as u16).wrapping_add(if never { 0x8000 } else { 0 });
            let at = self.areas.driver + 4 + 2 * usize::from(self.format.size);
            ram.u16(at).store(event, Ordering::Relaxed);
        } else {
            ram.u16(self.areas.driver)
                .store(if never { NO_INTERRUPT } else { 0 }, Ordering::Relaxed);
        }
    }

    /// Whether there is a completion.
    pub fn has_used(&self, ram: &Ram) -> bool {
        if self.batch.is_some() {
            return true;
        }
        if self.format.packed {
            let at = self.areas.desc + 16 * self.mask(self.used) + 14;
            let flags = ram.u16(at).load(Ordering::Acquire);
            let wanted = if self.wrap(self.used) { AVAIL | USED } else { 0 };
            return flags & (AVAIL | USED) == wanted;
        }
        self.used_idx(ram) != self.taken as u16
    }

    fn used_idx(&self, ram: &Ram) -> u16 {
        ram.u16(self.areas.device + 2).load(Ordering::Acquire)
    }

    /// Before a series of `pop`: looks how far the device is.
    ///
    /// # Errors
    /// A used index beyond what there is.
    pub fn look(&mut self, ram: &Ram) -> io::Result<()> {
        if !self.format.packed {
            self.end = self.used_idx(ram);
            let count = self.end.wrapping_sub(self.taken as u16);
            if u64::from(count) > self.in_flight() {
                return Err(io::Error::other(format!(
                    "{count} completions of {} requests",
                    self.in_flight()
                )));
            }
        }
        Ok(())
    }

    /// The next completion: its slot, and the length written if the device says it. (In order, it may name only the last
    /// of a batch.)
    ///
    /// # Errors
    /// A completion of what isn't in flight.
    pub fn pop(&mut self, ram: &Ram) -> io::Result<Option<(usize, Option<u32>)>> {
        if self.in_flight() == 0 {
            return Ok(None);
        }
        let more = if self.format.packed {
            self.has_used(ram)
        } else {
            self.end != self.taken as u16
        };
        if !more {
            return Ok(None);
        }
        let (slot, len) = if self.format.in_order {
            self.in_order(ram)?
        } else {
            let (id, len) = self.used_element(ram);
            (self.slot(id)?, Some(len))
        };
        self.taken += 1;
        self.used += self.slots[slot].len() as u64;
        Ok(Some((slot, len)))
    }

    /// The element at the place where the device writes next: id and length.
    fn used_element(&self, ram: &Ram) -> (usize, u32) {
        if self.format.packed {
            let at = self.areas.desc + 16 * self.mask(self.used);
            let id = ram.u16(at + 12).load(Ordering::Relaxed);
            (usize::from(id), ram.u32(at + 8).load(Ordering::Relaxed))
        } else {
            let at = self.areas.device + 4 + 8 * self.mask(self.taken);
            let id = ram.u32(at).load(Ordering::Relaxed);
            (id as usize, ram.u32(at + 4).load(Ordering::Relaxed))
        }
    }

    fn slot(&self, id: usize) -> io::Result<usize> {
        let slot = if self.format.packed {
            id
        } else if self.format.in_order {
            // The chain that begins at this descriptor: all are equally long.
            let behind = (id + usize::from(self.format.size) - self.mask(self.used)) % usize::from(self.format.size);
            let chain = self.taken + (behind / self.slots[0].len()) as u64;
            (chain % self.slots.len() as u64) as usize
        } else {
            id / self.slots[0].len()
        };
        if slot < self.slots.len() {
            Ok(slot)
        } else {
            Err(io::Error::other(format!("used element with id {id}")))
        }
    }

    /// All slots are filled again in the order in which they completed, so they take turns.
    fn in_order(&mut self, ram: &Ram) -> io::Result<(usize, Option<u32>)> {
        let next = (self.taken % self.slots.len() as u64) as usize;
        let (last, len) = match self.batch {
            Some(batch) => batch,
            None => {
                let (id, len) = self.used_element(ram);
                (self.slot(id)?, len)
            }
        };
        if next == last {
            self.batch = None;
            return Ok((next, Some(len)));
        }
        self.batch = Some((last, len));
        Ok((next, None))
    }
}

fn write_packed_body(ram: &Ram, at: usize, part: Part, id: u16) {
    ram.u64(at).store(part.addr, Ordering::Relaxed);
    ram.u32(at + 8).store(part.len, Ordering::Relaxed);
    ram.u16(at + 12).store(id, Ordering::Relaxed);
}

fn write_packed(ram: &Ram, at: usize, part: Part, id: u16, flags: u16) {
    write_packed_body(ram, at, part, id);
    ram.u16(at + 14).store(flags, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::fd::{BorrowedFd, OwnedFd};
    use std::sync::Arc;

    use super::*;
    use vhu_core::memory::{MappingCache, MemoryMap};
    use vhu_core::ring::any::{self, fresh_position};
    use vhu_core::ring::split::{AddressSpace, RingAddresses};
    use vhu_core::ring::{Chain, RingFeatures};

    const AREAS: Areas = Areas {
        desc: 0,
        driver: 0x1000,
        device: 0x2000,
    };
    const TABLES: usize = 0x3000;
    const DATA: usize = 0x4000;
    const SLOTS: usize = 5;

    fn requests() -> Vec<Vec<Part>> {
        (0..SLOTS)
            .map(|slot| {
                let part = |skip: u64, len, flags| Part {
                    addr: (DATA + slot * 256) as u64 + skip,
                    len,
                    flags,
                };
                vec![part(0, 16, NEXT), part(16, 64, NEXT | WRITE), part(80, 1, WRITE)]
            })
            .collect()
    }

    /// Our driver on our device, over many laps of a small ring; every third time nothing is kicked or called for in vain.
    #[test]
    fn goes_round_in_every_format() {
        for bits in 0..16 {
            let format = Format {
                size: 16,
                packed: bits & 1 != 0,
                event_idx: bits & 2 != 0,
                in_order: bits & 4 != 0,
            };
            let ram = Ram::new(0x8000).unwrap();
            // SAFETY: `ram` keeps the fd open for longer than this borrow.
            let fd: OwnedFd = unsafe { BorrowedFd::borrow_raw(ram.fd()) }
                .try_clone_to_owned()
                .unwrap();
            let region = MappingCache::default()
                .region(&fd.into(), 0, ram.len() as u64, 0, 0)
                .unwrap();
            let map = Arc::new(MemoryMap::default().with(region).unwrap());
            let table = |slot: usize| (TABLES + slot * 64, (TABLES + slot * 64) as u64);
            let tables: Option<&dyn Fn(usize) -> (usize, u64)> = if bits & 8 != 0 { Some(&table) } else { None };
            let mut driver = Ring::new(&ram, AREAS, format, requests(), tables);
            let addresses = RingAddresses {
                desc: AREAS.desc as u64,
                driver: AREAS.driver as u64,
                device: AREAS.device as u64,
            };
            let features = RingFeatures {
                event_idx: format.event_idx,
                indirect: true,
                packed: format.packed,
                ..RingFeatures::default()
            };
            let start = driver.position();
            assert_eq!(start, fresh_position(format.packed), "{format:?}");
            let mut device = any::Ring::new(&map, AddressSpace::Guest, addresses, 16, 16, features, start).unwrap();
            assert!(!device.enable_notification());
            let mut free: Vec<usize> = (0..SLOTS).rev().collect();
            for round in 0..200 {
                let count = 1 + round % SLOTS;
                for _ in 0..count.min(free.len()) {
                    driver.push(&ram, free.pop().unwrap());
                }
                assert!(driver.publish(&ram), "{format:?}: the device sleeps");
                driver.ask(&ram, round % 3 == 0);
                let (mut chain, mut heads) = (Chain::default(), Vec::new());
                while device.available().unwrap() > 0 && device.pop(&map, &mut chain).unwrap() {
                    assert_eq!((chain.readable.len(), chain.writable.len()), (16, 65));
                    heads.push(chain.head);
                    chain.clear();
                }
                assert_eq!(heads.len() as u64, driver.in_flight());
                if !format.in_order {
                    heads.reverse();
                }
                assert!(!driver.has_used(&ram));
                for head in heads {
                    device.push_used(head, 65);
                }
                assert!(device.publish());
                if round > 0 {
                    assert_eq!(device.should_signal(0), round % 3 != 0, "{format:?}, round {round}");
                }
                assert!(!device.enable_notification());
                assert!(driver.has_used(&ram));
                driver.look(&ram).unwrap();
                let mut done = Vec::new();
                while let Some((slot, len)) = driver.pop(&ram).unwrap() {
                    assert_eq!(len, Some(65));
                    done.push(slot);
                }
                assert_eq!(driver.in_flight(), 0);
                free.extend(done.into_iter().rev());
                free.sort_by_key(|slot| std::cmp::Reverse((slot + SLOTS - driver.taken as usize % SLOTS) % SLOTS));
                // Everything is used, so this is where a device that is lost now would be started again.
                assert_eq!(driver.position(), device.position(), "{format:?}");
            }
        }
    }

    #[test]
    fn a_batch_in_order_has_one_used_element() {
        for packed in [false, true] {
            let format = Format {
                size: 16,
                packed,
                in_order: true,
                event_idx: false,
            };
            let ram = Ram::new(0x8000).unwrap();
            let mut driver = Ring::new(&ram, AREAS, format, requests(), None);
            for slot in 0..4 {
                driver.push(&ram, slot);
            }
            driver.publish(&ram);
            // Of three chains of three descriptors only the last is named, at the first one's place.
            if packed {
                ram.u16(AREAS.desc + 12).store(2, Ordering::Relaxed);
                ram.u32(AREAS.desc + 8).store(65, Ordering::Relaxed);
                ram.u16(AREAS.desc + 14).store(AVAIL | USED, Ordering::Relaxed);
            } else {
                ram.u32(AREAS.device + 4).store(6, Ordering::Relaxed);
                ram.u32(AREAS.device + 8).store(65, Ordering::Relaxed);
                ram.u16(AREAS.device + 2).store(3, Ordering::Relaxed);
            }
            driver.look(&ram).unwrap();
            let done: Vec<_> = std::iter::from_fn(|| driver.pop(&ram).unwrap()).collect();
            assert_eq!(done, [(0, None), (1, None), (2, Some(65))], "packed {packed}");
            assert_eq!(driver.in_flight(), 1);
        }
    }
}
