// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The order of accesses to rings under loom: the functions of `ring::order`, as the rings use them, against a driver that
//! does what Linux does, in all interleavings and with all values that loads may see under the memory model of C11.
//!
//! Loom has fences, SeqCst ones among them, acquire and release, and lets loads see old values. Two things it is too strict
//! about, and would not find: a load is never delayed until after a store that follows it, and a SeqCst fence orders all that
//! is before an earlier one, data as well. So what data need is checked without fences.
//!
//! Every model is also run with functions that lack what it is about, and must find that.

#![allow(missing_docs, clippy::unwrap_used)]

use loom::sync::atomic::{fence, AtomicBool, AtomicU16, Ordering};
use loom::sync::Arc;
use loom::thread;
use vhu_core::ring::order::split::need_event;
use vhu_core::ring::order::{packed, split, Word};
use vhu_core::ring::packed::Place;

/// What the device's accesses lack.
const INTACT: u8 = 0;
/// Its full fences are only acquire and release.
const WEAK_FENCE: u8 = 1;
const NO_RELEASE: u8 = 2;
const NO_ACQUIRE: u8 = 3;

/// A field of the ring. The driver uses what is inside, which lacks nothing.
struct Shared<const LACKS: u8>(AtomicU16);

impl<const LACKS: u8> Word for Shared<LACKS> {
    fn read(&self, order: Ordering) -> u16 {
        self.0.load(if LACKS == NO_ACQUIRE { Ordering::Relaxed } else { order })
    }

    fn write(&self, value: u16, order: Ordering) {
        let order = if LACKS == NO_RELEASE { Ordering::Relaxed } else { order };
        self.0.store(value, order);
    }

    fn full_fence() {
        fence(if LACKS == WEAK_FENCE {
            Ordering::AcqRel
        } else {
            Ordering::SeqCst
        });
    }
}

/// Most batches of a model.
const BATCHES: usize = 2;

/// Runs a model with one batch of one buffer, in all ways there are; and with two, where the second comes while the other
/// side is busy with the first, or asleep after it. Two have too many ways for every test run: all with so many preemptions,
/// or as many as LOOM_MAX_PREEMPTIONS says.
fn explore(model: impl Fn(usize) + Copy + Send + Sync + 'static) {
    for (batches, preemptions) in [(1, None), (BATCHES, Some(4))] {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = builder.preemption_bound.or(preemptions);
        builder.check(move || model(batches));
    }
}

/// A buffer each. They are written and read without order, and 1 when they are complete.
struct Data([AtomicU16; BATCHES]);

impl Data {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU16::new(0)))
    }

    fn fill(&self, n: usize) {
        self.0[n].store(1, Ordering::Relaxed);
    }

    fn check(&self, n: usize) {
        assert_eq!(self.0[n].load(Ordering::Relaxed), 1, "data isn't there yet");
    }
}

/// An interrupt or a notification on its way, which a sleeper wakes up from. It carries no order back to the sender.
struct Bell(AtomicBool);

impl Bell {
    fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    fn ring(&self) {
        // A swap, as loom doesn't put a plain store behind an `answer` that hasn't seen it.
        self.0.swap(true, Ordering::Release);
    }

    fn answer(&self) -> bool {
        self.0.swap(false, Ordering::Acquire)
    }
}

// --- split ring ------------------------------------------------------------------------------------------------------

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Where all indices begin; they wrap on the way.
const START: u16 = u16::MAX;

struct Split<const LACKS: u8> {
    avail_flags: Shared<LACKS>,
    avail_idx: Shared<LACKS>,
    used_event: Shared<LACKS>,
    used_flags: Shared<LACKS>,
    used_idx: Shared<LACKS>,
    avail_event: Shared<LACKS>,
    data: Data,
    bell: Bell,
}

impl<const LACKS: u8> Split<LACKS> {
    /// Both sides are busy and want to hear nothing; with EVENT_IDX, as their events have been passed.
    fn new() -> Arc<Self> {
        let word = |value| Shared(AtomicU16::new(value));
        Arc::new(Self {
            avail_flags: word(AVAIL_F_NO_INTERRUPT),
            avail_idx: word(START),
            used_event: word(START - 1),
            used_flags: word(USED_F_NO_NOTIFY),
            used_idx: word(START),
            avail_event: word(START - 1),
            data: Data::new(),
            bell: Bell::new(),
        })
    }
}

impl<const LACKS: u8> split::Fields for Split<LACKS> {
    type Word = Shared<LACKS>;

    fn avail_flags(&self) -> &Self::Word {
        &self.avail_flags
    }

    fn avail_idx(&self) -> &Self::Word {
        &self.avail_idx
    }

    fn used_event(&self) -> &Self::Word {
        &self.used_event
    }

    fn used_flags(&self) -> &Self::Word {
        &self.used_flags
    }

    fn used_idx(&self) -> &Self::Word {
        &self.used_idx
    }

    fn avail_event(&self) -> &Self::Word {
        &self.avail_event
    }
}

/// The `n`th index from the start on.
fn index(n: usize) -> u16 {
    START.wrapping_add(n as u16)
}

/// The device uses buffers while the driver takes them back until there are no more and goes to sleep. It may not sleep
/// while there is one, with no interrupt on its way.
fn split_interrupts<const LACKS: u8>(event_idx: bool) {
    explore(move |batches| {
        let ring = Split::<LACKS>::new();
        let device = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                for n in 0..batches {
                    ring.data.fill(n);
                    split::publish(&*ring, index(n + 1));
                    if split::should_signal(&*ring, event_idx, None, Some(index(n)), index(n + 1)) {
                        ring.bell.ring();
                    }
                }
            }
        });

        let mut taken = 0;
        loop {
            let used_idx = ring.used_idx.0.load(Ordering::Acquire);
            while index(taken) != used_idx {
                ring.data.check(taken);
                taken += 1;
            }
            if event_idx {
                ring.used_event.0.store(used_idx, Ordering::Relaxed);
            } else {
                ring.avail_flags.0.store(0, Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            if ring.used_idx.0.load(Ordering::Relaxed) == used_idx && !ring.bell.answer() {
                break;
            }
            if !event_idx {
                ring.avail_flags.0.store(AVAIL_F_NO_INTERRUPT, Ordering::Relaxed);
            }
        }
        device.join().unwrap();
        assert!(taken == batches || ring.bell.answer(), "the driver sleeps for ever");
    });
}

/// The driver makes buffers available while the device takes them until there are no more and goes to sleep. It may not
/// sleep while there is one, with no notification on its way.
fn split_notifications<const LACKS: u8>(event_idx: bool) {
    explore(move |batches| {
        let ring = Split::<LACKS>::new();
        let driver = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                for n in 0..batches {
                    ring.data.fill(n);
                    ring.avail_idx.0.store(index(n + 1), Ordering::Release);
                    fence(Ordering::SeqCst);
                    let wanted = if event_idx {
                        ring.avail_event.0.load(Ordering::Relaxed) == index(n)
                    } else {
                        ring.used_flags.0.load(Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
                    };
                    if wanted {
                        ring.bell.ring();
                    }
                }
            }
        });

        let mut taken = 0;
        loop {
            split::disable_notification(&*ring, event_idx);
            let avail_idx = split::available(&*ring);
            while index(taken) != avail_idx {
                ring.data.check(taken);
                taken += 1;
            }
            if !split::enable_notification(&*ring, event_idx, avail_idx) && !ring.bell.answer() {
                break;
            }
        }
        driver.join().unwrap();
        assert!(taken == batches || ring.bell.answer(), "the device sleeps for ever");
    });
}

/// A driver that only polls: no fence, no interrupt, nothing but the index.
fn split_polled<const LACKS: u8>() {
    loom::model(|| {
        let ring = Split::<LACKS>::new();
        let device = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                for n in 0..BATCHES {
                    ring.data.fill(n);
                    split::publish(&*ring, index(n + 1));
                }
            }
        });
        let used = ring.used_idx.0.load(Ordering::Acquire).wrapping_sub(START);
        for n in 0..usize::from(used) {
            ring.data.check(n);
        }
        device.join().unwrap();
    });
}

#[test]
fn split_interrupts_are_not_lost() {
    split_interrupts::<INTACT>(true);
    split_interrupts::<INTACT>(false);
}

#[test]
#[should_panic(expected = "the driver sleeps for ever")]
fn split_event_interrupts_need_the_fence() {
    split_interrupts::<WEAK_FENCE>(true);
}

#[test]
#[should_panic(expected = "the driver sleeps for ever")]
fn split_flag_interrupts_need_the_fence() {
    split_interrupts::<WEAK_FENCE>(false);
}

#[test]
fn split_notifications_are_not_lost() {
    split_notifications::<INTACT>(true);
    split_notifications::<INTACT>(false);
}

#[test]
#[should_panic(expected = "the device sleeps for ever")]
fn split_event_notifications_need_the_fence() {
    split_notifications::<WEAK_FENCE>(true);
}

#[test]
#[should_panic(expected = "the device sleeps for ever")]
fn split_flag_notifications_need_the_fence() {
    split_notifications::<WEAK_FENCE>(false);
}

#[test]
#[should_panic(expected = "data isn't there yet")]
fn split_available_needs_acquire() {
    split_notifications::<NO_ACQUIRE>(true);
}

#[test]
fn split_data_come_with_the_index() {
    split_polled::<INTACT>();
}

#[test]
#[should_panic(expected = "data isn't there yet")]
fn split_publish_needs_release() {
    split_polled::<NO_RELEASE>();
}

// --- packed ring -----------------------------------------------------------------------------------------------------

const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

const SIZE: u16 = 4;

/// The `n`th place from the start on, which is the last of a lap.
fn place(n: usize) -> Place {
    let count = n as u16 + SIZE - 1;
    Place {
        index: count % SIZE,
        wrap: count < SIZE,
    }
}

fn bits(place: Place) -> u16 {
    place.index | u16::from(place.wrap) << 15
}

fn from_bits(bits: u16) -> Place {
    Place {
        index: bits & 0x7fff,
        wrap: bits >> 15 == 1,
    }
}

fn used_flags(wrap: bool) -> u16 {
    if wrap {
        DESC_F_AVAIL | DESC_F_USED
    } else {
        0
    }
}

fn available_flags(wrap: bool) -> u16 {
    if wrap {
        DESC_F_AVAIL
    } else {
        DESC_F_USED
    }
}

struct Packed<const LACKS: u8> {
    desc_flags: [Shared<LACKS>; SIZE as usize],
    driver_offset: Shared<LACKS>,
    driver_flags: Shared<LACKS>,
    device_offset: Shared<LACKS>,
    device_flags: Shared<LACKS>,
    data: Data,
    bell: Bell,
}

impl<const LACKS: u8> Packed<LACKS> {
    /// Both sides are busy and want to hear nothing. Descriptors from the start on are available or not: used a lap before.
    fn new(available: bool) -> Arc<Self> {
        let word = |value| Shared(AtomicU16::new(value));
        let passed = Place {
            index: SIZE - 2,
            wrap: true,
        };
        Arc::new(Self {
            desc_flags: std::array::from_fn(|index| {
                let wrap = index == usize::from(SIZE) - 1;
                word(if available {
                    available_flags(wrap)
                } else {
                    used_flags(!wrap)
                })
            }),
            driver_offset: word(bits(passed)),
            driver_flags: word(EVENT_DISABLE),
            device_offset: word(bits(passed)),
            device_flags: word(EVENT_DISABLE),
            data: Data::new(),
            bell: Bell::new(),
        })
    }

    /// The flags at a place, as the driver loads and stores them.
    fn at(&self, n: usize) -> &AtomicU16 {
        &self.desc_flags[usize::from(place(n).index)].0
    }
}

impl<const LACKS: u8> packed::Fields for Packed<LACKS> {
    type Word = Shared<LACKS>;

    fn desc_flags(&self, index: u16) -> &Self::Word {
        &self.desc_flags[usize::from(index)]
    }

    fn driver_offset(&self) -> &Self::Word {
        &self.driver_offset
    }

    fn driver_flags(&self) -> &Self::Word {
        &self.driver_flags
    }

    fn device_offset(&self) -> &Self::Word {
        &self.device_offset
    }

    fn device_flags(&self) -> &Self::Word {
        &self.device_flags
    }
}

/// As [`split_interrupts`].
fn packed_interrupts<const LACKS: u8>(event_idx: bool) {
    explore(move |batches| {
        let ring = Packed::<LACKS>::new(true);
        let device = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                for n in 0..batches {
                    ring.data.fill(n);
                    packed::publish(&*ring, place(n).index, used_flags(place(n).wrap));
                    let passed = |event| place(n + 1).has_passed(from_bits(event), 1, SIZE);
                    if packed::should_signal(&*ring, event_idx, passed) {
                        ring.bell.ring();
                    }
                }
            }
        });

        let mut taken = 0;
        let used = |n, order| ring.at(n).load(order) == used_flags(place(n).wrap);
        loop {
            while used(taken, Ordering::Acquire) {
                ring.data.check(taken);
                taken += 1;
            }
            if event_idx {
                ring.driver_offset.0.store(bits(place(taken)), Ordering::Relaxed);
                ring.driver_flags.0.store(EVENT_DESC, Ordering::Release);
            } else {
                ring.driver_flags.0.store(EVENT_ENABLE, Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            if !used(taken, Ordering::Relaxed) && !ring.bell.answer() {
                break;
            }
            ring.driver_flags.0.store(EVENT_DISABLE, Ordering::Relaxed);
        }
        device.join().unwrap();
        assert!(taken == batches || ring.bell.answer(), "the driver sleeps for ever");
    });
}

/// As [`split_notifications`].
fn packed_notifications<const LACKS: u8>(event_idx: bool) {
    explore(move |batches| {
        let ring = Packed::<LACKS>::new(false);
        let driver = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                for n in 0..batches {
                    ring.data.fill(n);
                    ring.at(n).store(available_flags(place(n).wrap), Ordering::Release);
                    fence(Ordering::SeqCst);
                    let wanted = match ring.device_flags.0.load(Ordering::Acquire) {
                        EVENT_ENABLE => true,
                        EVENT_DESC => ring.device_offset.0.load(Ordering::Relaxed) == bits(place(n)),
                        _ => false,
                    };
                    if wanted {
                        ring.bell.ring();
                    }
                }
            }
        });

        let mut taken = 0;
        let available = |n, flags| flags == available_flags(place(n).wrap);
        loop {
            packed::disable_notification(&*ring);
            while available(taken, packed::taken(&*ring, place(taken).index)) {
                ring.data.check(taken);
                taken += 1;
            }
            let next = place(taken);
            let flags = packed::enable_notification(&*ring, event_idx, bits(next), next.index);
            if !available(taken, flags) && !ring.bell.answer() {
                break;
            }
        }
        driver.join().unwrap();
        assert!(taken == batches || ring.bell.answer(), "the device sleeps for ever");
    });
}

/// A driver that only polls.
fn packed_polled<const LACKS: u8>() {
    loom::model(|| {
        let ring = Packed::<LACKS>::new(true);
        let device = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                for n in 0..BATCHES {
                    ring.data.fill(n);
                    packed::publish(&*ring, place(n).index, used_flags(place(n).wrap));
                }
            }
        });
        for n in 0..BATCHES {
            if ring.at(n).load(Ordering::Acquire) != used_flags(place(n).wrap) {
                break;
            }
            ring.data.check(n);
        }
        device.join().unwrap();
    });
}

/// The device looks at the driver's event suppression structure while the driver asks for a place in it, for the first time:
/// what else is in the offset means nothing.
fn packed_driver_event<const LACKS: u8>() {
    loom::model(|| {
        let ring = Packed::<LACKS>::new(true);
        let driver = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                ring.driver_offset.0.store(bits(place(1)), Ordering::Relaxed);
                ring.driver_flags.0.store(EVENT_DESC, Ordering::Release);
            }
        });
        packed::should_signal(&*ring, true, |event| {
            assert_eq!(from_bits(event), place(1), "an offset from before the flags");
            true
        });
        driver.join().unwrap();
    });
}

/// The same with the sides changed.
fn packed_device_event<const LACKS: u8>() {
    loom::model(|| {
        let ring = Packed::<LACKS>::new(false);
        let device = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                let next = place(1);
                packed::enable_notification(&*ring, true, bits(next), next.index);
            }
        });
        if ring.device_flags.0.load(Ordering::Acquire) == EVENT_DESC {
            let event = ring.device_offset.0.load(Ordering::Relaxed);
            assert_eq!(from_bits(event), place(1), "an offset from before the flags");
        }
        device.join().unwrap();
    });
}

#[test]
fn packed_interrupts_are_not_lost() {
    packed_interrupts::<INTACT>(true);
    packed_interrupts::<INTACT>(false);
}

#[test]
#[should_panic(expected = "the driver sleeps for ever")]
fn packed_event_interrupts_need_the_fence() {
    packed_interrupts::<WEAK_FENCE>(true);
}

#[test]
#[should_panic(expected = "the driver sleeps for ever")]
fn packed_flag_interrupts_need_the_fence() {
    packed_interrupts::<WEAK_FENCE>(false);
}

#[test]
fn packed_notifications_are_not_lost() {
    packed_notifications::<INTACT>(true);
    packed_notifications::<INTACT>(false);
}

#[test]
#[should_panic(expected = "the device sleeps for ever")]
fn packed_event_notifications_need_the_fence() {
    packed_notifications::<WEAK_FENCE>(true);
}

#[test]
#[should_panic(expected = "the device sleeps for ever")]
fn packed_flag_notifications_need_the_fence() {
    packed_notifications::<WEAK_FENCE>(false);
}

#[test]
#[should_panic(expected = "data isn't there yet")]
fn packed_taking_needs_acquire() {
    packed_notifications::<NO_ACQUIRE>(true);
}

#[test]
fn packed_data_come_with_the_flags() {
    packed_polled::<INTACT>();
}

#[test]
#[should_panic(expected = "data isn't there yet")]
fn packed_publish_needs_release() {
    packed_polled::<NO_RELEASE>();
}

#[test]
fn packed_events_are_whole() {
    packed_driver_event::<INTACT>();
    packed_device_event::<INTACT>();
}

#[test]
#[should_panic(expected = "an offset from before the flags")]
fn packed_driver_events_need_acquire() {
    packed_driver_event::<NO_ACQUIRE>();
}

#[test]
#[should_panic(expected = "an offset from before the flags")]
fn packed_device_events_need_release() {
    packed_device_event::<NO_RELEASE>();
}

// --- index arithmetic ------------------------------------------------------------------------------------------------

/// From 0 on nothing wraps, so there the definition is a comparison: entries 0 to new - 1 were passed. All of it in a release
/// build, 2^32 cases; a part with all the borders in a debug build.
#[test]
fn events_from_zero_on() {
    let step = if cfg!(debug_assertions) { 251 } else { 1 };
    for new in 0..=u16::MAX {
        let check = |event: u16| {
            assert_eq!(
                need_event(event, new, 0),
                event < new,
                "{event} on the way from 0 to {new}"
            )
        };
        for event in (new % step..=u16::MAX).step_by(usize::from(step)) {
            check(event);
        }
        for distance in 0..3 {
            for border in [0, new, 1 << 15] {
                check(border.wrapping_add(distance));
                check(border.wrapping_sub(distance));
            }
        }
    }
}

/// Elsewhere it is the same, moved: only distances count.
#[test]
fn events_from_anywhere_on() {
    let places = [0, 1, 2, 255, 256, 257, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff];
    for old in 0..=u16::MAX {
        for new in places {
            for event in places {
                let moved = |place: u16| place.wrapping_add(old);
                assert_eq!(
                    need_event(moved(event), moved(new), old),
                    event < new,
                    "{event} on the way to {new}, all from {old} on"
                );
            }
        }
    }
}
