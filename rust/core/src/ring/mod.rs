// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ring engine (design D5): virtqueues as the device sees them.
//!
//! [`split`] holds the split ring, for legacy and modern layouts alike: both are three areas in guest memory, and
//! they differ only in how their addresses came about. What is common to ring formats is here.

pub mod split;

use crate::error::Fault;
use crate::memory::Buffers;

/// Transport and ring feature bits.
pub mod feature {
    /// Interrupt when the available ring runs empty; legacy only.
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// Any descriptor framing; implied by VERSION_1.
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// Indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// used_event and avail_event.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user only, never seen by a driver.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// virtio 1.0 and later; a driver that doesn't accept it is a legacy driver.
    pub const VERSION_1: u64 = 1 << 32;
    /// The packed ring format.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// The device has the SR-IOV capability; the driver wants to enable virtual functions.
    pub const SR_IOV: u64 = 1 << 37;
    /// Queues can be reset one by one.
    pub const RING_RESET: u64 = 1 << 40;
    /// The device has administration virtqueues.
    pub const ADMIN_VQ: u64 = 1 << 41;
}

/// Largest queue of any member. A front end may choose any size up to this over vhost-user, whatever the member's own
/// queue_size says: QEMU 10.0 makes every vhost-user-blk queue 1024 entries large.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// One request as the driver built it: the head that names it in the used ring, and its buffers.
#[derive(Default)]
pub struct Chain {
    /// Index of the first descriptor.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

impl Chain {
    /// Empties the chain, keeps its allocations.
    #[inline]
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }
}

/// What was negotiated for a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_NOTIFY_ON_EMPTY.
    pub notify_on_empty: bool,
}

/// A fault of the driver in its ring. Made on a cold path.
#[cold]
pub(crate) fn ring_fault(rule: &'static str, reason: String) -> Fault {
    Fault::new(rule, reason)
}
