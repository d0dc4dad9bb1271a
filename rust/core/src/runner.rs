// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One running queue: its ring, the device behind it, and the requests in flight.
//!
//! A runner belongs to one thread at a time (a worker, or the adapter of the vhost-user-backend crate) and takes no
//! lock. Its owner drives it in passes: `take` a batch of requests, submit what they queued, `complete` what has ended,
//! `publish`.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::{Counters, Device, IoOp, QueueContext, Request, Step};
use crate::dirty::DirtyLog;
use crate::error::Fault;
use crate::event::Waker;
use crate::memory::{HostArea, MemoryMap};
use crate::poll::Polling;
use crate::ring::any::Ring;
use crate::ring::split::{AddressSpace, RingAddresses};
use crate::ring::{feature, RingFeatures, MAX_QUEUE_SIZE};
use crate::uring::Uring;

/// Requests taken in one pass before others get their turn.
///
/// Few enough that the driver works on the first while the device works on the next: with everything in one batch the two
/// take turns, and each waits for the other (docs/PERFORMANCE.md).
pub const BATCH: u16 = 8;
/// How long to look at an empty ring before going to sleep.
const LOOK: Duration = Duration::from_micros(16);
/// Passes after an interrupt in which each request that ends at once is shown to the driver at once, and not with the rest
/// of its batch. Whether to interrupt is still decided once for the batch.
///
/// A driver that sleeps when it finds nothing is faster than its device: with a batch shown at a time it sleeps after
/// each, and to wake it costs both sides more than the batch. So there is always something for it to find. One that polls
/// only pays for it, with its cache lines going back and forth (docs/PERFORMANCE.md).
const EAGER: u32 = 64;
/// Vain looks in a row after which it is left.
const PATIENCE: u32 = 4;
/// Passes after which it is tried again.
const RETRY: u32 = 64;
/// Bytes after which a pass takes no more, for the same reason.
pub const BATCH_BYTES: u64 = 2 << 20;
/// Memory maps that requests in flight may hold on to. A front end that goes on changing its memory while the storage
/// hangs would otherwise fill the process with mappings.
const MAX_RETIRED: usize = 64;

/// Low half of the user data of an interrupt; requests have their slot there, which is less.
const SIGNAL: u64 = 0xffff;
/// The same of a request to cancel one; its completion says nothing.
const CANCEL: u64 = 0xfffe;

/// What the rest of the process may know of a queue. Written by the queue's worker only.
#[derive(Default)]
pub struct QueueStats {
    /// Where to go on after a stop ([`Ring::position`]).
    pub position: AtomicU32,
    /// Next available entry to take.
    pub last_avail: AtomicU16,
    /// The driver's available index when last seen.
    pub avail_idx: AtomicU16,
    /// Published used index.
    pub used_idx: AtomicU16,
    /// Requests taken and not yet used.
    pub in_flight: AtomicU32,
    /// Notifications received.
    pub kicks: AtomicU64,
    /// Interrupts sent.
    pub calls: AtomicU64,
    /// Requests used.
    pub requests: AtomicU64,
    /// The device's own counters.
    pub counters: Counters,
}

impl QueueStats {
    #[inline]
    fn bump(counter: &AtomicU64, n: u64) {
        // One writer: no read-modify-write needed.
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Counts a notification.
    #[inline]
    pub fn kicked(&self) {
        Self::bump(&self.kicks, 1);
    }
}

/// How a queue interrupts its driver.
#[derive(Clone, Default)]
pub struct Call {
    /// Signalled for each interrupt; None: the driver polls.
    pub fd: Option<Arc<OwnedFd>>,
    /// The ISR status register, where the interrupt is to be seen there (PCI without MSI-X), and the bits that are set before
    /// the signal.
    pub isr: Option<(Arc<AtomicU8>, u8)>,
}

impl Call {
    /// A plain eventfd.
    pub fn eventfd(fd: Option<OwnedFd>) -> Self {
        Self {
            fd: fd.map(Arc::new),
            isr: None,
        }
    }
}

/// Makes the waker of a request that waits for something else than its own I/O, from the number of its slot.
pub type WakerFactory = Arc<dyn Fn(u16) -> Waker + Send + Sync>;

/// Everything a queue needs to start.
pub struct QueueSetup {
    /// Index of the queue in its member.
    pub index: u16,
    /// Size negotiated.
    pub size: u16,
    /// Ring areas.
    pub addresses: RingAddresses,
    /// Address space of `addresses`.
    pub space: AddressSpace,
    /// Where to go on ([`Ring::position`]).
    pub position: u32,
    /// All features the driver accepted.
    pub driver_features: u64,
    /// Where what is in flight is recorded, if anywhere.
    pub inflight: Option<HostArea>,
    /// Requests are used in the order in which they were made available. Then the used index says all there is to know
    /// about what is done, also after this process was killed.
    pub ordered: bool,
    /// Pages that are written are marked here.
    pub log: Option<Arc<DirtyLog>>,
    /// Interrupts go here.
    pub call: Call,
    /// Counters.
    pub stats: Arc<QueueStats>,
}

/// Ring features in a set of virtio features.
pub fn ring_features(features: u64) -> RingFeatures {
    let has = |bit| features & bit != 0;
    RingFeatures {
        event_idx: has(feature::EVENT_IDX),
        indirect: has(feature::INDIRECT_DESC),
        notify_on_empty: has(feature::NOTIFY_ON_EMPTY),
        packed: has(feature::RING_PACKED),
    }
}

/// A request in flight, with what the runner has to know of it.
#[derive(Default)]
struct Slot {
    request: Request,
    /// The memory map it points into: the number of changes before it.
    generation: u64,
    /// It goes on with a copy, not with a result.
    copying: bool,
    /// What it may write, in guest addresses; only while a log is kept.
    writes: Vec<(u64, u64)>,
}

/// A request that waits to be used in its turn: the number it is used by, and what was written, once it is done.
struct Turn {
    head: u16,
    written: Option<u32>,
}

/// A memory map that was replaced while requests pointed into it.
struct Retired {
    map: Arc<MemoryMap>,
    generation: u64,
    requests: usize,
}

/// A running queue.
pub struct Runner {
    device: Arc<dyn Device>,
    ring: Ring,
    map: Arc<MemoryMap>,
    /// Changes of the memory map so far.
    generation: u64,
    /// Requests in flight that point into the present map.
    current: usize,
    /// Maps that other requests in flight still point into.
    retired: Vec<Retired>,
    /// Requests in flight that are being copied.
    copying: usize,
    space: AddressSpace,
    addresses: RingAddresses,
    driver_features: u64,
    index: u16,
    call: Call,
    /// Wakes requests that wait; set by the worker.
    wakers: Option<WakerFactory>,
    /// One request at a time, in the order of the ring.
    serial: bool,
    /// The device says when it can do with another request.
    gated: bool,
    /// High half of the user data of everything this queue submits.
    tag: u64,
    /// An interrupt is on its way: there is never more than one, so that a full eventfd can't pile them up.
    signalling: bool,
    /// Another one is due when it has arrived.
    signal_again: bool,
    /// An earlier call eventfd that the interrupt under way goes to.
    old_call: Option<Arc<OwnedFd>>,
    stats: Arc<QueueStats>,
    /// Requests. Made on demand: a queue that never has more than a few in flight needs a few. Growing moves them, but
    /// not what the kernel works on: guest memory, and scatter lists on the heap.
    slots: Vec<Slot>,
    free: Vec<u16>,
    size: u16,
    in_flight: usize,
    /// Used elements pushed since the last `publish`.
    pushed: u64,
    /// Some of them have been made visible already.
    shown: bool,
    /// Passes in which used elements are still shown one by one, see [`EAGER`].
    eager: u32,
    /// Whether to go on looking at the ring when it is empty.
    polling: Polling,
    /// Vain looks (see `look_again`) that are still allowed.
    patience: u32,
    /// Times it was not looked since.
    skipped: u32,
    /// The ring's areas are not in the memory map at the moment.
    suspended: bool,
    /// Nothing new is taken any more, only what an earlier process had in flight.
    closing: bool,
    /// Requests not used yet, in the order of the ring; None: they are used as they end.
    turns: Option<VecDeque<Turn>>,
    /// Pages that are written are marked here.
    log: Option<Arc<DirtyLog>>,
    /// The ring areas that are written, in guest addresses; only while a log is kept.
    ring_writes: Vec<(u64, u64)>,
}

impl Runner {
    /// Resolves the ring and makes the slots.
    ///
    /// # Errors
    /// As [`Ring::new`], with the queue named.
    pub fn new(device: Arc<dyn Device>, map: Arc<MemoryMap>, setup: QueueSetup) -> Result<Self, Fault> {
        let mut ring = Ring::new(
            &map,
            setup.space,
            setup.addresses,
            setup.size,
            MAX_QUEUE_SIZE,
            ring_features(setup.driver_features),
            setup.position,
        )
        .map_err(|fault| fault.on_queue(setup.index))?;
        if let Some(area) = setup.inflight {
            ring.track(area).map_err(|fault| fault.on_queue(setup.index))?;
        }
        let (serial, gated) = (device.serial(), device.gated());
        let mut runner = Self {
            device,
            ring,
            map,
            generation: 0,
            current: 0,
            retired: Vec::new(),
            copying: 0,
            space: setup.space,
            addresses: setup.addresses,
            driver_features: setup.driver_features,
            index: setup.index,
            call: setup.call,
            wakers: None,
            serial,
            gated,
            tag: 0,
            signalling: false,
            signal_again: false,
            old_call: None,
            stats: setup.stats,
            slots: Vec::new(),
            free: Vec::new(),
            size: setup.size,
            in_flight: 0,
            pushed: 0,
            shown: false,
            eager: 0,
            polling: Polling::default(),
            patience: PATIENCE,
            skipped: 0,
            suspended: false,
            closing: false,
            turns: setup.ordered.then(VecDeque::new),
            log: None,
            ring_writes: Vec::new(),
        };
        runner.set_log(setup.log);
        runner.note_positions();
        Ok(runner)
    }

    /// Index of the queue in its member.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether the kernel works on nothing of this queue's: it may be dropped.
    pub fn idle(&self) -> bool {
        self.in_flight == 0 && !self.signalling
    }

    /// Sets the number that the queue is known by in user data.
    pub fn set_tag(&mut self, number: usize) {
        self.tag = (number as u64) << 16;
    }

    /// Sets how requests that wait are woken.
    pub fn set_wakers(&mut self, wakers: WakerFactory) {
        self.wakers = Some(wakers);
    }

    /// Has the ring looked at for up to this long when it is empty, if that seems to pay (see [`Polling`]).
    pub fn set_poll(&mut self, bound: Duration) {
        self.polling = Polling::new(bound);
    }

    /// The user data of a slot of the queue with this number.
    pub fn user_data(number: usize, slot: u16) -> u64 {
        (number as u64) << 16 | u64::from(slot)
    }

    /// The number in user data.
    pub fn number_of(user_data: u64) -> usize {
        (user_data >> 16) as usize
    }

    /// The counters.
    pub fn stats(&self) -> &QueueStats {
        &self.stats
    }

    /// Next available entry to take.
    pub fn next_avail(&self) -> u16 {
        self.ring.next_avail()
    }

    /// The used index as the driver sees it.
    pub fn used_idx(&self) -> u16 {
        self.ring.used_idx()
    }

    /// Whether the ring may be looked at.
    pub fn suspended(&self) -> bool {
        self.suspended
    }

    /// The ring is going to stop. What an earlier process had in flight is in flight still: only then does a position say
    /// where to go on.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Requests that an earlier process had in flight and that weren't taken again yet.
    pub fn unfinished(&self) -> usize {
        self.ring.unfinished()
    }

    /// An earlier process may have been killed between making used elements visible and the interrupt for them. One too
    /// many does no harm, where it isn't to be seen in a register.
    pub fn remind(&mut self, uring: &mut Uring) {
        if self.call.isr.is_none() && self.ring.has_history() {
            self.signal(uring);
        }
    }

    fn note_positions(&self) {
        // What waits behind a request that was given up is done, but not used: it is for whoever goes on.
        let position = if self.in_flight == 0 && self.held() > 0 {
            self.ring.used_position()
        } else {
            self.ring.position()
        };
        self.stats.position.store(position, Ordering::Relaxed);
        self.stats.last_avail.store(self.ring.next_avail(), Ordering::Relaxed);
        self.stats.used_idx.store(self.ring.used_idx(), Ordering::Relaxed);
        self.stats
            .avail_idx
            .store(self.ring.peek_avail_idx(), Ordering::Relaxed);
        self.stats.in_flight.store(self.in_flight as u32, Ordering::Relaxed);
    }

    /// Replaces the call eventfd. With a new one an interrupt is sent at once: one raised between the front end's
    /// decision and ours went to the old one, and QEMU 7.2 doesn't wait for an answer here. A spurious interrupt does no
    /// harm, a lost one stops the guest.
    pub fn set_call(&mut self, call: Call, uring: &mut Uring) {
        let old = std::mem::replace(&mut self.call, call);
        // With INTx before and after, the ISR status says whether an interrupt is due; to make one up would make the next
        // each time it is unmasked.
        let due = match (&old.isr, &self.call.isr) {
            (Some(_), Some((isr, bits))) => isr.load(Ordering::Acquire) & bits != 0,
            _ => self.ring.used_idx() != 0 || self.stats.calls.load(Ordering::Relaxed) != 0,
        };
        if self.signalling {
            // Kept open until the kernel is done with it; one that doesn't get through is given up.
            self.old_call = self.old_call.take().or(old.fd);
            self.give_up(uring);
        }
        if due {
            self.signal(uring);
        }
    }

    /// Goes on with a new memory map.
    ///
    /// # Errors
    /// `memory.churn` when requests in flight hold on to too many maps.
    pub fn set_memory(&mut self, map: Arc<MemoryMap>) -> Result<(), Fault> {
        if self.current > 0 {
            if self.retired.len() >= MAX_RETIRED {
                let reason = format!("requests are in flight into {MAX_RETIRED} earlier memory maps");
                return Err(Fault::new("memory.churn", reason).on_queue(self.index));
            }
            self.retired.push(Retired {
                map: Arc::clone(&self.map),
                generation: self.generation,
                requests: self.current,
            });
        }
        self.generation += 1;
        self.current = 0;
        self.suspended = !self.ring.rebase(&map, self.space, self.addresses);
        self.map = map;
        self.note_ring_writes();
        Ok(())
    }

    /// Keeps a log of the pages written from now on, or no more.
    pub fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        let before = std::mem::replace(&mut self.log, log).is_some();
        self.note_ring_writes();
        // A log in the place of another: what requests in flight may write is known from the start, and a part that is
        // written already was in neither log.
        if self.log.is_none() || before {
            return;
        }
        // What is in flight already. Buffers that were done with before are in the guest's memory, which the front end
        // copies as a whole after this.
        for slot in &mut self.slots {
            let retired = self
                .retired
                .iter()
                .find(|retired| retired.generation == slot.generation);
            let map = retired.map_or(&self.map, |retired| &retired.map);
            slot.writes.clear();
            map.guest_ranges(&slot.request.chain.writable, &mut slot.writes);
            if let Some(status) = &slot.request.scratch.status {
                map.guest_byte(status, &mut slot.writes);
            }
        }
    }

    fn note_ring_writes(&mut self) {
        self.ring_writes.clear();
        if self.log.is_some() {
            self.ring.written_areas(&mut self.ring_writes);
            // Whoever had the ring before may have left something unmarked: its last event fields.
            self.log_ring();
        }
    }

    /// The ring has been written.
    #[inline]
    fn log_ring(&self) {
        if let Some(log) = &self.log {
            log.mark_all(&self.ring_writes);
        }
    }

    /// The fault to report when something went wrong: memory taken away by its owner explains everything else.
    pub fn explain(&self, fault: Fault) -> Fault {
        self.lost().unwrap_or_else(|| fault.on_queue(self.index))
    }

    /// Goes on with other accepted features. Legacy drivers may write theirs after they have begun to use the ring.
    pub fn set_features(&mut self, features: u64) {
        self.driver_features = features;
        self.ring.set_features(ring_features(features));
    }

    /// Whether memory was taken away.
    #[inline]
    pub fn lost(&self) -> Option<Fault> {
        let log_lost = self.log.as_ref().is_some_and(|log| log.lost());
        (self.map.lost() || self.ring.record_lost() || log_lost).then(|| {
            Fault::new(
                "memory.truncated",
                "the front end's memory file shrank under its mapping",
            )
            .on_queue(self.index)
        })
    }

    /// Asks the driver not to notify.
    #[inline]
    pub fn disable_notification(&mut self) {
        self.ring.disable_notification();
    }

    /// Whether the ring is to be looked at again, without asking the driver to notify. `alone`: nobody else waits.
    ///
    /// Polling waits in the worker's turns, so everybody else gets theirs; while there is no window to wait for, it is the
    /// bounded look that comes first, as for everybody.
    #[inline]
    pub fn keep_looking(&mut self, alone: bool) -> bool {
        if !self.polling.is_on() {
            return alone && self.gate_open() && self.look_again();
        }
        if !self.gate_open() {
            return false;
        }
        let work = self.ring.has_work() && self.held() < self.limit();
        work || self.polling.empty(Instant::now()) || (alone && self.look_again())
    }

    /// Looks at the ring a moment longer before the driver is asked to notify again.
    ///
    /// Going to sleep and being woken costs a worker as much CPU as this look, and the driver a kick and some 20 us; one
    /// that polls, or reacts to its interrupt at once, is back sooner (docs/PERFORMANCE.md). The look is bounded, comes
    /// only after work, and whether at all depends on how it went before: a driver that isn't back in time isn't waited
    /// for any more, but for one try in [`RETRY`]. So an idle ring costs nothing.
    #[inline]
    pub fn look_again(&mut self) -> bool {
        if self.in_flight > 0 {
            return false;
        }
        if self.ring.has_work() {
            // Not idle: nothing to be learned from.
            return true;
        }
        if self.patience == 0 {
            self.skipped += 1;
            if self.skipped < RETRY {
                return false;
            }
            self.skipped = 0;
        }
        let begin = Instant::now();
        while begin.elapsed() < LOOK {
            for _ in 0..16 {
                if self.ring.has_work() {
                    self.patience = PATIENCE;
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        self.patience = self.patience.saturating_sub(1);
        false
    }

    /// Asks the driver to notify again; true when there is already something that can be taken.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        let more = self.ring.enable_notification();
        self.log_ring();
        more && self.held() < self.limit() && self.gate_open()
    }

    /// Whether the device can do with another request. While it can't, whoever changes that has the ring looked at.
    #[inline]
    fn gate_open(&self) -> bool {
        !self.gated || self.device.may_take(self.index)
    }

    /// Requests taken and not used.
    fn held(&self) -> usize {
        self.turns.as_ref().map_or(self.in_flight, VecDeque::len)
    }

    /// Requests that may be in flight at once.
    fn limit(&self) -> usize {
        if self.serial {
            1
        } else {
            usize::from(self.size)
        }
    }

    /// Takes up to [`BATCH`] requests, or [`BATCH_BYTES`], and starts them; those that need I/O are queued on `uring`.
    /// Returns how many were taken.
    ///
    /// # Errors
    /// A fault of the driver: the member must be broken.
    #[inline]
    pub fn take(&mut self, uring: &mut Uring) -> Result<u16, Fault> {
        if self.serial && self.in_flight > 0 {
            return Ok(0);
        }
        let count = if self.closing {
            self.ring.unfinished() as u16
        } else {
            self.ring.available()?
        };
        let count = count.min(BATCH);
        let mut taken = 0;
        let mut bytes = 0;
        // One long copy at a time: it is made in pieces, and each piece is everybody's waiting time.
        while taken < count && bytes < BATCH_BYTES && self.copying == 0 {
            // A driver that reuses descriptors before they are used can have more in flight than the ring has
            // entries; it waits.
            if self.held() >= self.limit() {
                break;
            }
            if !self.gate_open() {
                break;
            }
            let Some(slot) = self.slot() else { break };
            if self.serial && self.in_flight > 0 {
                self.free.push(slot);
                break;
            }
            let Slot {
                request,
                generation,
                copying,
                writes,
            } = &mut self.slots[usize::from(slot)];
            request.chain.clear();
            request.scratch.clear();
            match self.ring.pop(&self.map, &mut request.chain) {
                Ok(true) => {}
                Ok(false) => {
                    self.free.push(slot);
                    break;
                }
                Err(fault) => {
                    self.free.push(slot);
                    return Err(fault);
                }
            }
            if self.log.is_some() {
                writes.clear();
                self.map.guest_ranges(&request.chain.writable, writes);
            }
            // Taken, and not only there: a driver with too much in flight must not be waited for without bound.
            if self.polling.was_empty() {
                self.polling.work(Instant::now());
            }
            taken += 1;
            bytes += request.chain.readable.len() + request.chain.writable.len();
            let context = QueueContext {
                queue: self.index,
                driver_features: self.driver_features,
                counters: &self.stats.counters,
                waker: self.wakers.as_ref().map(|wakers| (wakers, slot)),
            };
            match self.device.start(request, &context) {
                Ok(Step::Done(written)) => {
                    let head = request.chain.head;
                    if let Some(log) = &self.log {
                        log.mark_all(writes);
                    }
                    match &mut self.turns {
                        Some(turns) if !turns.is_empty() => turns.push_back(Turn {
                            head,
                            written: Some(written),
                        }),
                        _ => {
                            self.ring.push_used(head, written);
                            self.pushed += 1;
                        }
                    }
                    self.free.push(slot);
                }
                Ok(Step::Io(op)) => {
                    if let Some(turns) = &mut self.turns {
                        let head = request.chain.head;
                        turns.push_back(Turn { head, written: None });
                    }
                    *generation = self.generation;
                    *copying = matches!(op, IoOp::Yield);
                    self.copying += usize::from(*copying);
                    self.current += 1;
                    self.in_flight += 1;
                    uring.queue(&op, self.tag | u64::from(slot));
                }
                Ok(Step::Wait) => {
                    if let Some(turns) = &mut self.turns {
                        let head = request.chain.head;
                        turns.push_back(Turn { head, written: None });
                    }
                    *generation = self.generation;
                    *copying = false;
                    self.current += 1;
                    self.in_flight += 1;
                }
                Err(fault) => {
                    // Not answered, so not taken: the position stays before it.
                    self.ring.undo_pop();
                    self.free.push(slot);
                    return Err(fault);
                }
            }
            if self.eager > 0 {
                self.shown |= self.ring.publish();
            }
        }
        Ok(taken)
    }

    /// Something of this queue's has ended with `result`: an interrupt, or an operation of a request, which goes on.
    pub fn complete(&mut self, user_data: u64, result: i32, uring: &mut Uring) {
        match user_data & 0xffff {
            SIGNAL => self.signalled(uring),
            CANCEL => {}
            slot => self.resume(slot as u16, result, uring),
        }
    }

    fn resume(&mut self, slot: u16, result: i32, uring: &mut Uring) {
        let Some(Slot {
            request,
            generation,
            copying,
            writes,
        }) = self.slots.get_mut(usize::from(slot))
        else {
            return;
        };
        let generation = *generation;
        let context = QueueContext {
            queue: self.index,
            driver_features: self.driver_features,
            counters: &self.stats.counters,
            waker: self.wakers.as_ref().map(|wakers| (wakers, slot)),
        };
        match self.device.resume(request, &context, result) {
            Step::Io(op) => uring.queue(&op, self.tag | u64::from(slot)),
            Step::Wait => {}
            Step::Done(written) => {
                let head = request.chain.head;
                if let Some(log) = &self.log {
                    log.mark_all(writes);
                }
                self.free.push(slot);
                if std::mem::take(copying) {
                    self.copying -= 1;
                }
                self.used(head, written);
                self.landed(generation);
            }
        }
    }

    /// A request that was in flight is done: it is used, at once or in its turn.
    fn used(&mut self, head: u16, written: u32) {
        let Some(turns) = &mut self.turns else {
            self.ring.push_used(head, written);
            self.pushed += 1;
            return;
        };
        // Heads of requests in flight are the driver's: should it use one twice, either will do.
        if let Some(turn) = turns
            .iter_mut()
            .find(|turn| turn.head == head && turn.written.is_none())
        {
            turn.written = Some(written);
        }
        while let Some(&Turn {
            head,
            written: Some(written),
        }) = turns.front()
        {
            turns.pop_front();
            self.ring.push_used(head, written);
            self.pushed += 1;
        }
    }

    /// A request that pointed into a map is not in flight any more.
    fn landed(&mut self, generation: u64) {
        self.in_flight -= 1;
        if generation == self.generation {
            self.current -= 1;
            return;
        }
        self.retired.retain_mut(|retired| {
            retired.requests -= usize::from(retired.generation == generation);
            retired.requests > 0
        });
    }

    /// Whether a completion only says that the next piece of a copy may be made.
    pub fn is_copy(&self, user_data: u64) -> bool {
        self.slots
            .get((user_data & 0xffff) as usize)
            .is_some_and(|slot| slot.copying)
    }

    /// A panic has cut `complete` short: the request is given up. `before`: how many were in flight then.
    pub fn abandon(&mut self, before: usize) {
        if self.in_flight == before && before > 0 {
            // Its map, if it was replaced meanwhile, stays with the runner.
            self.in_flight -= 1;
        }
    }

    /// Makes the used elements visible, once for the whole pass, and interrupts the driver if it wants that.
    #[inline]
    pub fn publish(&mut self, uring: &mut Uring) {
        if self.publish_quietly() {
            self.signal(uring);
        }
    }

    /// As `publish`, but leaves the interrupt to the caller; true when the driver wants one.
    #[inline]
    pub fn publish_quietly(&mut self) -> bool {
        let published = self.ring.publish() | std::mem::take(&mut self.shown);
        if published {
            self.log_ring();
            QueueStats::bump(&self.stats.requests, self.pushed);
            self.pushed = 0;
        }
        self.note_positions();
        let signal = published && self.ring.should_signal(self.in_flight);
        self.eager = if signal { EAGER } else { self.eager.saturating_sub(1) };
        signal
    }

    /// A free slot, made if there are fewer than the ring has entries.
    #[inline]
    fn slot(&mut self) -> Option<u16> {
        self.free.pop().or_else(|| {
            let next = u16::try_from(self.slots.len()).ok().filter(|&next| next < self.size)?;
            self.slots.push(Slot::default());
            Some(next)
        })
    }

    fn signal(&mut self, uring: &mut Uring) {
        if let Some((isr, bits)) = &self.call.isr {
            // Before the interrupt: its handler looks there. After `publish`, which came with a release: what the handler
            // finds in the ring is at least as new.
            isr.fetch_or(*bits, Ordering::Release);
        }
        if self.signalling {
            self.signal_again = true;
        } else if let Some(call) = &self.call.fd {
            self.signalling = true;
            uring.signal(call.as_raw_fd(), self.tag | SIGNAL);
            QueueStats::bump(&self.stats.calls, 1);
        }
    }

    fn signalled(&mut self, uring: &mut Uring) {
        self.signalling = false;
        self.old_call = None;
        if std::mem::take(&mut self.signal_again) {
            self.signal(uring);
        }
    }

    /// Gives up an interrupt that doesn't get through (the front end has filled its eventfd and made it blocking).
    pub fn give_up(&mut self, uring: &mut Uring) {
        self.signal_again = false;
        if self.signalling {
            uring.cancel(self.tag | SIGNAL, self.tag | CANCEL);
        }
    }
}
