// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ring engine (design D5): virtqueues as the device sees them.
//!
//! [`split`] holds the split ring, for legacy and modern layouts alike: both are three areas in guest memory, and
//! they differ only in how their addresses came about. [`packed`] holds the packed ring, and [`any`] is either of the
//! two, as negotiated; [`inflight`] the record of what is in flight that survives this process; [`order`] the accesses of
//! both formats whose order counts. What is common to ring formats is here.

pub mod any;
pub mod inflight;
pub mod order;
pub mod packed;
pub mod split;

use std::sync::Arc;

use crate::error::Fault;
use crate::memory::{Buffers, HostArea, MemoryMap};
use split::AddressSpace;

/// Transport and ring feature bits.
pub mod feature {
    /// Interrupt when the available ring runs empty; legacy only.
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// vhost-user only: pages that are written are logged.
    pub const LOG_ALL: u64 = 1 << 26;
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

/// One request as the driver built it: the number that names it when it is used, and its buffers.
#[derive(Default)]
pub struct Chain {
    /// Split ring: index of the first descriptor. Packed ring: the buffer ID.
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
    /// VIRTIO_F_RING_PACKED. It decides which format [`any::Ring::new`] makes; the formats themselves don't look.
    pub packed: bool,
}

/// A fault of the driver in its ring. Made on a cold path.
#[cold]
pub(crate) fn ring_fault(rule: &'static str, reason: String) -> Fault {
    Fault::new(rule, reason)
}

/// Finds one area of a ring in host memory.
///
/// # Errors
/// `ring.alignment`, `ring.address`.
fn find_area(
    map: &Arc<MemoryMap>,
    space: AddressSpace,
    name: &str,
    address: u64,
    len: u64,
    align: usize,
) -> Result<HostArea, Fault> {
    // Asked of the guest's address and of ours: front ends map with page granularity, so they agree.
    let misaligned = || {
        ring_fault(
            "ring.alignment",
            format!("{name} at {address:#x} is not {align}-byte aligned"),
        )
    };
    if !address.is_multiple_of(align as u64) {
        return Err(misaligned());
    }
    let found = match space {
        AddressSpace::User => map.area_by_user(address, len),
        AddressSpace::Guest => map.area_by_guest(address, len),
    };
    let area = found.ok_or_else(|| {
        ring_fault(
            "ring.address",
            format!("{name} of {len} bytes at {address:#x} is outside memory"),
        )
    })?;
    if area.is_aligned(align) {
        Ok(area)
    } else {
        Err(misaligned())
    }
}

/// Appends what one descriptor describes to its chain, writable or not.
///
/// # Errors
/// `ring.zero-length`, `ring.buffer-order`, `ring.buffer-address`, `ring.total-length`.
#[inline]
fn append_buffer(
    map: &Arc<MemoryMap>,
    hint: &mut usize,
    chain: &mut Chain,
    addr: u64,
    len: u32,
    writable: bool,
) -> Result<(), Fault> {
    if len == 0 {
        return Err(ring_fault(
            "ring.zero-length",
            format!("chain at {} has a descriptor of length 0", chain.head),
        ));
    }
    let buffers = if writable {
        &mut chain.writable
    } else {
        if !chain.writable.is_empty() {
            return Err(ring_fault(
                "ring.buffer-order",
                format!(
                    "chain at {} has a device-readable buffer after a device-writable one",
                    chain.head
                ),
            ));
        }
        &mut chain.readable
    };
    if !map.append(addr, u64::from(len), hint, buffers) {
        return Err(ring_fault(
            "ring.buffer-address",
            format!("buffer of {len} bytes at {addr:#x} is outside memory"),
        ));
    }
    // Lengths are sums of at most 2^15 32-bit numbers (a ring's or an indirect table's), far from wrapping 64 bits.
    if chain.readable.len() + chain.writable.len() > u64::from(u32::MAX) {
        return Err(ring_fault(
            "ring.total-length",
            format!("chain at {} is 4 GiB or longer", chain.head),
        ));
    }
    Ok(())
}
