// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The accesses to rings whose order counts, of both formats: what tells the driver that something is used, and who wakes
//! whom.
//!
//! They stand apart from the rings, and are generic over the word they access, so that `tests/ring_order.rs` can run just
//! these functions against a driver under loom, in all orders that a weak memory model allows, and see that they fail with
//! a fence or a release left out.

use std::sync::atomic::{fence, AtomicU16, Ordering};

/// A 16-bit little-endian field that the driver accesses, too.
pub trait Word {
    /// Its value, in our byte order.
    fn read(&self, order: Ordering) -> u16;

    /// Sets it to a value in our byte order.
    fn write(&self, value: u16, order: Ordering);

    /// Keeps all accesses before it before all after it, stores before loads included.
    fn full_fence();
}

impl Word for AtomicU16 {
    #[inline]
    fn read(&self, order: Ordering) -> u16 {
        u16::from_le(self.load(order))
    }

    #[inline]
    fn write(&self, value: u16, order: Ordering) {
        self.store(value.to_le(), order);
    }

    #[inline]
    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

/// The split ring.
pub mod split {
    use super::{Ordering, Word};

    const AVAIL_F_NO_INTERRUPT: u16 = 1;
    const USED_F_NO_NOTIFY: u16 = 1;

    /// The fields of the available and the used ring, without the entries.
    pub trait Fields {
        /// How they are accessed.
        type Word: Word;

        /// avail.flags
        fn avail_flags(&self) -> &Self::Word;
        /// avail.idx
        fn avail_idx(&self) -> &Self::Word;
        /// avail.used_event
        fn used_event(&self) -> &Self::Word;
        /// used.flags
        fn used_flags(&self) -> &Self::Word;
        /// used.idx
        fn used_idx(&self) -> &Self::Word;
        /// used.avail_event
        fn avail_event(&self) -> &Self::Word;
    }

    /// Whether `event` was passed on the way from `old` to `new`: whether the entry with this index is one of those between
    /// (vring_need_event of the specification).
    #[inline]
    pub fn need_event(event: u16, new: u16, old: u16) -> bool {
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// avail.idx, and with it the entries and descriptors before it.
    #[inline]
    pub fn available<F: Fields>(ring: &F) -> u16 {
        ring.avail_idx().read(Ordering::Acquire)
    }

    /// avail.idx alone.
    #[inline]
    pub fn peek<F: Fields>(ring: &F) -> u16 {
        ring.avail_idx().read(Ordering::Relaxed)
    }

    /// Makes the used elements before `used_idx`, and the data before them, visible.
    #[inline]
    pub fn publish<F: Fields>(ring: &F, used_idx: u16) {
        ring.used_idx().write(used_idx, Ordering::Release);
    }

    /// After `publish`: whether the driver wants an interrupt for what was published from `old` to `new`, in any case the
    /// first time, without an `old`. `empty_at` is for NOTIFY_ON_EMPTY with nothing in flight: it wants one, too, when
    /// avail.idx is that.
    #[inline]
    pub fn should_signal<F: Fields>(
        ring: &F,
        event_idx: bool,
        empty_at: Option<u16>,
        old: Option<u16>,
        new: u16,
    ) -> bool {
        F::Word::full_fence();
        if empty_at.is_some_and(|next_avail| peek(ring) == next_avail) {
            return true;
        }
        if event_idx {
            let event = ring.used_event().read(Ordering::Relaxed);
            old.is_none_or(|old| need_event(event, new, old))
        } else {
            ring.avail_flags().read(Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver not to notify. With EVENT_IDX the old avail_event does that by itself: the driver has passed it.
    #[inline]
    pub fn disable_notification<F: Fields>(ring: &F, event_idx: bool) {
        if !event_idx {
            ring.used_flags().write(USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the driver to notify when there is more than was taken up to `next_avail`; true when there is already.
    #[inline]
    pub fn enable_notification<F: Fields>(ring: &F, event_idx: bool, next_avail: u16) -> bool {
        if event_idx {
            ring.avail_event().write(next_avail, Ordering::Relaxed);
        } else {
            ring.used_flags().write(0, Ordering::Relaxed);
        }
        F::Word::full_fence();
        peek(ring) != next_avail
    }
}

/// The packed ring.
pub mod packed {
    use super::{Ordering, Word};

    const EVENT_FLAGS_MASK: u16 = 3;
    const EVENT_ENABLE: u16 = 0;
    const EVENT_DISABLE: u16 = 1;
    const EVENT_DESC: u16 = 2;

    /// The flags of descriptors, and the two event suppression structures.
    pub trait Fields {
        /// How they are accessed.
        type Word: Word;

        /// Flags of the descriptor at `index`.
        fn desc_flags(&self, index: u16) -> &Self::Word;
        /// Offset and wrap counter in the driver's event suppression structure.
        fn driver_offset(&self) -> &Self::Word;
        /// Flags in the driver's.
        fn driver_flags(&self) -> &Self::Word;
        /// Offset and wrap counter in the device's.
        fn device_offset(&self) -> &Self::Word;
        /// Flags in the device's.
        fn device_flags(&self) -> &Self::Word;
    }

    /// Flags of the descriptor at `index`, and with them the rest of it and of its chain.
    #[inline]
    pub fn taken<F: Fields>(ring: &F, index: u16) -> u16 {
        ring.desc_flags(index).read(Ordering::Acquire)
    }

    /// Flags of the descriptor at `index` alone.
    #[inline]
    pub fn peek<F: Fields>(ring: &F, index: u16) -> u16 {
        ring.desc_flags(index).read(Ordering::Relaxed)
    }

    /// Marks the descriptor at `index` with `flags`: whatever was written before, it and the data, is visible with them.
    #[inline]
    pub fn publish<F: Fields>(ring: &F, index: u16, flags: u16) {
        ring.desc_flags(index).write(flags, Ordering::Release);
    }

    /// After `publish`: whether the driver wants an interrupt. `passed` says it of a descriptor that it asks for, which it
    /// may with EVENT_IDX only.
    #[inline]
    pub fn should_signal<F: Fields>(ring: &F, event_idx: bool, passed: impl FnOnce(u16) -> bool) -> bool {
        F::Word::full_fence();
        match ring.driver_flags().read(Ordering::Acquire) & EVENT_FLAGS_MASK {
            EVENT_DISABLE => false,
            EVENT_DESC if event_idx => passed(ring.driver_offset().read(Ordering::Relaxed)),
            // ENABLE; or DESC without EVENT_IDX, and the reserved value, which drivers must not use: an interrupt too
            // many does no harm, one too few stops the guest.
            _ => true,
        }
    }

    /// Asks the driver not to notify.
    #[inline]
    pub fn disable_notification<F: Fields>(ring: &F) {
        ring.device_flags().write(EVENT_DISABLE, Ordering::Relaxed);
    }

    /// Asks the driver to notify when it makes the descriptor at `index` available, which with its wrap counter is
    /// `next_avail`; the flags that this descriptor has already.
    #[inline]
    pub fn enable_notification<F: Fields>(ring: &F, event_idx: bool, next_avail: u16, index: u16) -> u16 {
        let flags = if event_idx {
            ring.device_offset().write(next_avail, Ordering::Relaxed);
            EVENT_DESC
        } else {
            EVENT_ENABLE
        };
        ring.device_flags().write(flags, Ordering::Release);
        F::Word::full_fence();
        peek(ring, index)
    }
}
