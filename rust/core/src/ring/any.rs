// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A ring of either format, as negotiated.
//!
//! An enum and not a trait object: one predictable branch per call, and the calls stay inlined.

use std::sync::Arc;

use super::packed::{self, PackedRing};
use super::split::{self, AddressSpace, RingAddresses, SplitRing};
use super::{ring_fault, Chain, RingFeatures};
use crate::error::Fault;
use crate::memory::{HostArea, MemoryMap};

/// Where a ring that was never used begins, see [`Ring::position`].
pub const fn fresh_position(packed: bool) -> u32 {
    if packed {
        packed::FRESH
    } else {
        0
    }
}

/// Bytes of the three areas (descriptor, driver, device) for a queue of `size` descriptors.
pub fn area_sizes(size: u16, packed: bool) -> (u64, u64, u64) {
    if packed {
        packed::area_sizes(size)
    } else {
        split::area_sizes(size)
    }
}

/// Finds the three areas (descriptor, driver, device) of a ring in host memory.
///
/// # Errors
/// `ring.size`, `ring.alignment`, `ring.address`.
pub fn resolve(
    map: &Arc<MemoryMap>,
    space: AddressSpace,
    addresses: RingAddresses,
    size: u16,
    max_size: u16,
    packed: bool,
) -> Result<[HostArea; 3], Fault> {
    if packed {
        packed::resolve(map, space, addresses, size, max_size)
    } else {
        split::resolve(map, space, addresses, size, max_size)
    }
}

/// A running ring.
pub enum Ring {
    /// In the split format.
    Split(SplitRing),
    /// In the packed format.
    Packed(PackedRing),
}

impl Ring {
    /// Resolves a ring's areas once and for all. `features.packed` decides the format; `position` is where to go on, see
    /// [`Ring::position`] and [`fresh_position`].
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
        if features.packed {
            return PackedRing::new(map, space, addresses, size, max_size, features, position).map(Self::Packed);
        }
        let next_avail = u16::try_from(position).map_err(|_| {
            ring_fault(
                "ring.position",
                format!("position {position:#x} can't be one of a split ring: an index has 16 bits"),
            )
        })?;
        SplitRing::new(map, space, addresses, size, max_size, features, next_avail).map(Self::Split)
    }

    /// Moves the ring onto a new memory map; false when its areas aren't memory there. See [`SplitRing::rebase`].
    pub fn rebase(&mut self, map: &Arc<MemoryMap>, space: AddressSpace, addresses: RingAddresses) -> bool {
        match self {
            Self::Split(ring) => ring.rebase(map, space, addresses),
            Self::Packed(ring) => ring.rebase(map, space, addresses),
        }
    }

    /// Goes on with other features. The format stays: a ring in use can't change it.
    pub fn set_features(&mut self, features: RingFeatures) {
        match self {
            Self::Split(ring) => ring.set_features(features),
            Self::Packed(ring) => ring.set_features(features),
        }
    }

    /// Whether the ring is in the packed format.
    #[inline]
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }

    /// Next available entry (split) or descriptor (packed, wrap counter in bit 15) this side will take.
    #[inline]
    pub fn next_avail(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.next_avail(),
            Self::Packed(ring) => ring.next_avail(),
        }
    }

    /// The used index as the driver sees it (packed: wrap counter in bit 15).
    #[inline]
    pub fn used_idx(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.used_idx(),
            Self::Packed(ring) => ring.used_idx(),
        }
    }

    /// How far the driver is, for people to look at: avail.idx, or what a packed ring has instead
    /// ([`PackedRing::peek_avail_idx`]).
    #[inline]
    pub fn peek_avail_idx(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.peek_avail_idx(),
            Self::Packed(ring) => ring.peek_avail_idx(),
        }
    }

    /// Where to go on after a stop, in the code of vhost-user's GET_VRING_BASE. Split: the next available index (the used
    /// index is in guest memory). Packed: next available descriptor in bits 0 to 14 with its wrap counter in bit 15, next
    /// used one in bits 16 to 30 with its wrap counter in bit 31.
    #[inline]
    pub fn position(&self) -> u32 {
        match self {
            Self::Split(ring) => u32::from(ring.next_avail()),
            Self::Packed(ring) => ring.position(),
        }
    }

    /// As `position`, for a ring whose requests are used in order and that is to go on with the first not used.
    pub fn used_position(&self) -> u32 {
        let used = u32::from(self.used_idx());
        match self {
            Self::Split(_) => used,
            Self::Packed(_) => used | used << 16,
        }
    }

    /// Whether the driver has made something available that was not taken yet.
    #[inline]
    pub fn has_work(&self) -> bool {
        match self {
            Self::Split(ring) => ring.has_work(),
            Self::Packed(ring) => ring.has_work(),
        }
    }

    /// Looks for new chains; how many can be taken. Packed: 0 or an upper bound, `pop` knows.
    ///
    /// # Errors
    /// `ring.avail-index`.
    #[inline]
    pub fn available(&mut self) -> Result<u16, Fault> {
        match self {
            Self::Split(ring) => ring.available(),
            Self::Packed(ring) => ring.available(),
        }
    }

    /// Takes the next available chain; false when there is none. `chain` must be clear.
    ///
    /// # Errors
    /// As [`SplitRing::pop`] and [`PackedRing::pop`]. The ring must not be used any more after an error.
    #[inline]
    pub fn pop(&mut self, map: &Arc<MemoryMap>, chain: &mut Chain) -> Result<bool, Fault> {
        match self {
            Self::Split(ring) => ring.pop(map, chain),
            Self::Packed(ring) => ring.pop(map, chain),
        }
    }

    /// Puts the chain that was popped last back.
    pub fn undo_pop(&mut self) {
        match self {
            Self::Split(ring) => ring.undo_pop(),
            Self::Packed(ring) => ring.undo_pop(),
        }
    }

    /// Keeps a record of what is in flight, see [`SplitRing::track`] and [`PackedRing::track`].
    ///
    /// # Errors
    /// `inflight.*`.
    pub fn track(&mut self, area: HostArea) -> Result<(), Fault> {
        match self {
            Self::Split(ring) => ring.track(area),
            Self::Packed(ring) => ring.track(area),
        }
    }

    /// Whether the memory of the record was taken away.
    pub fn record_lost(&self) -> bool {
        match self {
            Self::Split(ring) => ring.record_lost(),
            Self::Packed(ring) => ring.record_lost(),
        }
    }

    /// The areas of the ring that the device writes, as guest addresses. For dirty logging.
    pub fn written_areas(&self, ranges: &mut Vec<(u64, u64)>) {
        match self {
            Self::Split(ring) => ring.written_areas(ranges),
            Self::Packed(ring) => ring.written_areas(ranges),
        }
    }

    /// Requests that an earlier process had in flight and that weren't taken again yet.
    #[inline]
    pub fn unfinished(&self) -> usize {
        match self {
            Self::Split(ring) => ring.unfinished(),
            Self::Packed(ring) => ring.unfinished(),
        }
    }

    /// Whether the ring may have used anything before it was opened here.
    pub fn has_history(&self) -> bool {
        match self {
            Self::Split(ring) => ring.has_history(),
            Self::Packed(ring) => ring.has_history(),
        }
    }

    /// Notes a chain as used, by its `head`, with the bytes written. The driver sees it with the next `publish`.
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        match self {
            Self::Split(ring) => ring.push_used(head, written),
            Self::Packed(ring) => ring.push_used(head, written),
        }
    }

    /// Makes what was used so far visible; false when there is nothing.
    #[inline]
    pub fn publish(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.publish(),
            Self::Packed(ring) => ring.publish(),
        }
    }

    /// After `publish`: whether the driver wants an interrupt for what was published since the last call.
    /// `in_flight` says how many requests are taken but not used.
    #[inline]
    pub fn should_signal(&mut self, in_flight: usize) -> bool {
        match self {
            Self::Split(ring) => ring.should_signal(in_flight),
            Self::Packed(ring) => ring.should_signal(in_flight),
        }
    }

    /// Asks the driver not to notify while we are looking anyway.
    #[inline]
    pub fn disable_notification(&mut self) {
        match self {
            Self::Split(ring) => ring.disable_notification(),
            Self::Packed(ring) => ring.disable_notification(),
        }
    }

    /// Asks the driver to notify again; true when something came in meanwhile and the ring must be looked at again.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.enable_notification(),
            Self::Packed(ring) => ring.enable_notification(),
        }
    }
}
