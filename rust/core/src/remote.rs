// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues in memory that came without an fd.
//!
//! Such memory can't be mapped; it is read and written by messages, each of which is waited for. A worker can't wait, so a
//! queue whose driver may have put anything there gets a thread of its own. The ring engine and the device work on shadows
//! (see [`Region::shadow`](crate::memory::Region::shadow)), which the thread keeps up to date around them:
//!
//! - before a chain is taken, what the driver wrote is fetched in the order in which it would be loaded: first what says
//!   that there is something (avail.idx, or a packed descriptor's flags), then the rest of the ring, then indirect tables,
//!   then the buffers that the device reads;
//! - when a request is done, the buffers that the device wrote are stored, then the used element, then what makes it
//!   visible (used.idx, or the flags), each when the one before has been answered. What of the ring has to be stored is
//!   found by comparing with what was last known to be there;
//! - event suppression is fetched each time it is asked, and stored before the ring is looked at once more.
//!
//! It is meant to be correct, not fast: a request takes about ten messages. Shadows hold on to what was in them, up to as
//! much as the guest has memory, until the client unmaps it or leaves.
//!
//! A command interrupts a fetch: nothing is lost by that, it is tried again. It doesn't interrupt a store. QEMU answers from
//! its main loop, which may be waiting for the very thing that a command is about; then that comes when the answer to QEMU's
//! own message has timed out (`vfio_user::server::DEADLINE`).

use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender, TryRecvError};
use std::sync::Arc;
use std::time::Duration;

use crate::device::{Device, QueueContext, Request, Step};
use crate::error::{Error, Fault, Result};
use crate::event::{Completion, Waker};
use crate::memory::{HostArea, MemoryMap, RemoteMemory, ShadowPiece};
use crate::ring::any::{self, Ring};
use crate::ring::split::RingAddresses;
use crate::ring::MAX_QUEUE_SIZE;
use crate::runner::{ring_features, Call, QueueSetup, WakerFactory};
use crate::sys;
use crate::uring::Uring;
use crate::worker::Owner;

/// User data of an interrupt; requests have their slot there, which is less.
const SIGNAL: u64 = 0xffff;
/// The same of a request to cancel one.
const CANCEL: u64 = 0xfffe;
/// How soon to try again what the kernel didn't take.
const RETRY: Duration = Duration::from_millis(1);

const DESC_SIZE: usize = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_INDIRECT: u16 = 4;

/// A queue on its way to a thread of its own.
pub struct RemoteStart {
    /// Its member.
    pub owner: Arc<Owner>,
    /// The device.
    pub device: Arc<dyn Device>,
    /// The memory; shadows count.
    pub map: Arc<MemoryMap>,
    /// The queue.
    pub setup: QueueSetup,
    /// Notifications come here.
    pub kick: Arc<OwnedFd>,
    /// Whether it may take requests at once.
    pub enabled: bool,
}

enum Command {
    Stop(Completion),
    Enable(bool, Completion),
    SetCall(Call, Completion),
    SetKick(Arc<OwnedFd>, Completion),
    SetMemory(Arc<MemoryMap>, Completion),
    SetFeatures(u64, Completion),
    Resume(u16),
    Look,
}

/// How the thread is talked to.
#[derive(Clone)]
struct Line {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    /// Somebody waits: fetches under way are given up.
    hurry: Arc<AtomicBool>,
}

impl Line {
    fn send(&self, command: Command) {
        if let Err(unsent) = self.commands.send(command) {
            // The thread is gone. The command's completion may call somebody who wants a lock that our caller holds.
            sys::drop_later(unsent.0);
            return;
        }
        self.hurry.store(true, Ordering::Release);
        sys::eventfd_signal(&self.wake);
    }
}

/// A queue that runs on a thread of its own, seen from the control side; as [`QueueHandle`](crate::worker::QueueHandle),
/// except that dropping it stops the queue.
pub struct RemoteRunner(Line);

impl RemoteRunner {
    /// Starts the thread.
    ///
    /// # Errors
    /// `ring.*` when the ring's areas can't be where they are said to be, [`Error::Os`].
    pub fn start(start: RemoteStart) -> Result<Self> {
        let os = |what| move |source| Error::Os { what, source };
        let RemoteStart {
            owner,
            device,
            map,
            setup,
            kick,
            enabled,
        } = start;
        let wake = Arc::new(sys::eventfd().map_err(os("eventfd"))?);
        let (commands, receiver) = channel();
        let line = Line {
            commands,
            wake: Arc::clone(&wake),
            hurry: Arc::new(AtomicBool::new(false)),
        };
        let index = setup.index;
        let map = Arc::new(map.with_shadows());
        let areas = Areas::new(&map, &setup).map_err(|fault| fault.on_queue(index))?;
        let wakers = {
            // Not with the handle's: the thread ends when nobody has one any more.
            let (wake, hurry) = (Arc::clone(&wake), Arc::clone(&line.hurry));
            let (resume, resumed) = channel();
            let wakers: WakerFactory = Arc::new(move |slot| -> Waker {
                let (wake, hurry, resume) = (Arc::clone(&wake), Arc::clone(&hurry), resume.clone());
                Box::new(move || {
                    // Nobody waits for a request of a queue that is gone.
                    let _ = resume.send(Command::Resume(slot));
                    hurry.store(true, Ordering::Release);
                    sys::eventfd_signal(&wake);
                })
            });
            (wakers, resumed)
        };
        setup.stats.position.store(setup.position, Ordering::Relaxed);
        let hurry = Arc::clone(&line.hurry);
        let failed = Arc::clone(&owner);
        let make = move |uring| Queue {
            serial: device.serial() || setup.ordered,
            owner,
            device,
            map,
            setup,
            kick,
            enabled,
            areas: Some(areas),
            stale: true,
            ring: None,
            uring,
            wake,
            hurry,
            wakers: wakers.0,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            unfinished: Vec::new(),
            stopping: Vec::new(),
            stopped: false,
            gone: false,
            look: true,
            published: false,
            signalling: false,
            signal_again: false,
            old_call: None,
            ended: Vec::new(),
        };
        // An io_uring belongs to the thread that made it. Nobody waits to see how that goes: we may be on a worker.
        std::thread::Builder::new()
            .name(format!("vhu-remote-{index}"))
            .spawn(move || match Uring::new(64) {
                Ok(uring) => run(make(uring), &receiver, &wakers.1),
                Err(e) => {
                    let fault = Fault::new("internal.io-uring", e.to_string());
                    failed.break_it(fault.on_queue(index));
                }
            })
            .map_err(os("starting a queue's thread"))?;
        Ok(Self(line))
    }

    /// Takes no more requests, ends those in flight, then lets go of the ring; the position is in the queue's stats when
    /// `done` ends.
    pub fn stop(&self, done: Completion) {
        self.0.send(Command::Stop(done));
    }

    /// Allows or forbids taking requests; those in flight go on.
    pub fn enable(&self, on: bool, done: Completion) {
        self.0.send(Command::Enable(on, done));
    }

    /// Has the ring looked at: the device can do with another request.
    pub fn look(&self) {
        self.0.send(Command::Look);
    }

    /// Replaces the way the driver is interrupted.
    pub fn set_call(&self, call: Call, done: Completion) {
        self.0.send(Command::SetCall(call, done));
    }

    /// Replaces the kick eventfd.
    pub fn set_kick(&self, kick: Arc<OwnedFd>, done: Completion) {
        self.0.send(Command::SetKick(kick, done));
    }

    /// Replaces the memory map.
    pub fn set_memory(&self, map: Arc<MemoryMap>, done: Completion) {
        self.0.send(Command::SetMemory(map, done));
    }

    /// Replaces the accepted features.
    pub fn set_features(&self, features: u64, done: Completion) {
        self.0.send(Command::SetFeatures(features, done));
    }
}

impl Drop for RemoteRunner {
    fn drop(&mut self) {
        self.stop(Completion::call(|| ()));
    }
}

/// Why a pass was cut short.
enum Trouble {
    /// Somebody waits; again later.
    Interrupted,
    /// The client is gone, or doesn't let us at its memory. What that means for the queue others decide.
    Gone,
    /// Something is wrong.
    Fault(Fault),
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        match fault.rule {
            "dma.cancelled" => Trouble::Interrupted,
            // Without bus mastering what is under way is lost, as it would be with a real device; a reset is coming.
            "dma.disconnected" | "dma.no-master" => Trouble::Gone,
            _ => Trouble::Fault(fault),
        }
    }
}

type Outcome<T> = std::result::Result<T, Trouble>;

/// One area of a ring.
struct Area {
    host: HostArea,
    guest: u64,
    /// None: the memory itself is mapped.
    remote: Option<Arc<dyn RemoteMemory>>,
    /// What is there remotely, as far as we know.
    image: Vec<u8>,
}

impl Area {
    fn new(map: &MemoryMap, host: HostArea, guest: u64, len: u64) -> Self {
        let remote = map.remote_at(guest).cloned();
        let len = if remote.is_some() { len as usize } else { 0 };
        Self {
            host,
            guest,
            remote,
            image: vec![0; len],
        }
    }

    /// Fetches `len` bytes at `offset`.
    fn fetch(&mut self, offset: usize, len: usize, hurry: &AtomicBool) -> Outcome<()> {
        if let Some(remote) = &self.remote {
            let image = &mut self.image[offset..offset + len];
            remote.read_unless(self.guest + offset as u64, image, hurry)?;
            self.host.write(offset, image);
        }
        Ok(())
    }

    fn fetch_all(&mut self, hurry: &AtomicBool) -> Outcome<()> {
        self.fetch(0, self.image.len(), hurry)
    }

    /// What is at `offset` remotely isn't known any more, so that it will be stored: it may be what it is to become, and then
    /// again the driver may have cleared it meanwhile.
    fn forget(&mut self, offset: usize, len: usize) {
        let mut now = vec![0; len];
        if let Some(image) = self.image.get_mut(offset..offset + len) {
            self.host.read(offset, &mut now);
            for (known, byte) in image.iter_mut().zip(now) {
                *known = !byte;
            }
        }
    }

    /// Stores what has been changed here, in units of four bytes: fields that belong together arrive together.
    fn store(&mut self) -> Outcome<()> {
        const UNIT: usize = 4;
        let Some(remote) = &self.remote else { return Ok(()) };
        let mut now = vec![0; self.image.len()];
        self.host.read(0, &mut now);
        let mut at = 0;
        let pairs = now.chunks(UNIT).zip(self.image.chunks(UNIT));
        let runs: Vec<(bool, usize)> = pairs.map(|(new, old)| (new != old, new.len())).collect();
        for run in runs.chunk_by(|a, b| a.0 == b.0) {
            let len: usize = run.iter().map(|(_, len)| len).sum();
            if run[0].0 {
                remote.write(self.guest + at as u64, &now[at..at + len])?;
            }
            at += len;
        }
        self.image = now;
        Ok(())
    }
}

/// The areas of a ring.
struct Areas {
    desc: Area,
    driver: Area,
    device: Area,
}

impl Areas {
    fn new(map: &Arc<MemoryMap>, setup: &QueueSetup) -> std::result::Result<Self, Fault> {
        let packed = ring_features(setup.driver_features).packed;
        let RingAddresses { desc, driver, device } = setup.addresses;
        let hosts = any::resolve(map, setup.space, setup.addresses, setup.size, MAX_QUEUE_SIZE, packed)?;
        let (desc_len, driver_len, device_len) = any::area_sizes(setup.size, packed);
        let [desc_host, driver_host, device_host] = hosts;
        Ok(Self {
            desc: Area::new(map, desc_host, desc, desc_len),
            driver: Area::new(map, driver_host, driver, driver_len),
            device: Area::new(map, device_host, device, device_len),
        })
    }

    fn store(&mut self) -> Outcome<()> {
        self.desc.store()?;
        self.device.store()
    }
}

/// A request in flight.
struct Slot {
    request: Request,
    /// What its buffers point into.
    map: Arc<MemoryMap>,
    /// What the device may have written when it is done.
    stores: Vec<ShadowPiece>,
    /// Bytes of the request's writable part.
    room: u64,
    /// It is in flight.
    busy: bool,
}

struct Queue {
    owner: Arc<Owner>,
    device: Arc<dyn Device>,
    map: Arc<MemoryMap>,
    setup: QueueSetup,
    kick: Arc<OwnedFd>,
    enabled: bool,
    /// None while they aren't in the memory map.
    areas: Option<Areas>,
    /// Nothing of the areas has been fetched yet.
    stale: bool,
    /// Made when the areas have been fetched for the first time.
    ring: Option<Ring>,
    uring: Uring,
    wake: Arc<OwnedFd>,
    hurry: Arc<AtomicBool>,
    wakers: WakerFactory,
    /// One request at a time.
    serial: bool,
    slots: Vec<Slot>,
    free: Vec<u16>,
    in_flight: usize,
    /// Requests that are done, but could not be said to be yet: the ring is not in memory. Slot, bytes written.
    unfinished: Vec<(u16, u32)>,
    stopping: Vec<Completion>,
    stopped: bool,
    gone: bool,
    /// The ring is to be looked at.
    look: bool,
    /// Something was published since the driver was last considered for an interrupt.
    published: bool,
    signalling: bool,
    signal_again: bool,
    /// Kept open for the interrupt under way.
    old_call: Option<Arc<OwnedFd>>,
    ended: Vec<(u64, i32)>,
}

fn run(mut queue: Queue, commands: &Receiver<Command>, resumed: &Receiver<Command>) {
    let outcome = catch_unwind(AssertUnwindSafe(|| queue.run(commands, resumed)));
    let stopping = std::mem::take(&mut queue.stopping);
    if outcome.is_err() {
        // The panic's message is on stderr.
        let fault = Fault::new("internal.panic", "a bug in vhu_legacy; see the log");
        queue.owner.break_it(fault.on_queue(queue.setup.index));
        if queue.in_flight > 0 {
            // The kernel may still write to the requests' buffers: they are left to it, with all they need.
            std::mem::forget(queue);
            return;
        }
    }
    // The ring's memory is let go of before anybody is told.
    drop(queue);
    drop(stopping);
}

impl Queue {
    fn run(&mut self, commands: &Receiver<Command>, resumed: &Receiver<Command>) {
        loop {
            self.hurry.store(false, Ordering::Release);
            sys::eventfd_drain(self.wake.as_raw_fd());
            loop {
                match commands.try_recv() {
                    Ok(command) => self.handle(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.stopped = true;
                        break;
                    }
                }
            }
            while let Ok(command) = resumed.try_recv() {
                self.handle(command);
            }
            self.reap();
            if !self.unfinished.is_empty() {
                self.finish_rest();
            }
            if self.has_ended() {
                if !self.signalling {
                    return;
                }
                self.signal_again = false;
                self.uring.cancel(SIGNAL, CANCEL);
            }
            if self.look && self.may_take() {
                self.look = false;
                let taken = self.pass();
                self.judge(taken);
            }
            if self.published {
                let told = self.tell();
                self.judge(told);
            }
            self.note_positions();
            self.uring.submit();
            if !(self.look && self.may_take()) {
                let time = self.uring.has_queued().then_some(RETRY);
                let fds = [self.wake.as_raw_fd(), self.uring.fd(), self.kick.as_raw_fd()];
                sys::wait_readable_for(&fds, time);
            }
            if sys::eventfd_drain(self.kick.as_raw_fd()) {
                self.setup.stats.kicked();
                self.look = true;
            }
        }
    }

    /// Whether nothing is left to do but to let the last interrupt arrive.
    fn has_ended(&self) -> bool {
        // What can't be said any more isn't waited for.
        let unfinished = !self.unfinished.is_empty() && self.areas.is_some() && !self.gone;
        self.stopped && self.in_flight == 0 && !unfinished && !self.published
    }

    fn may_take(&self) -> bool {
        self.enabled && !self.stopped && !self.gone && self.areas.is_some() && !self.owner.is_broken()
    }

    fn judge(&mut self, outcome: Outcome<()>) {
        match outcome {
            Ok(()) => {}
            Err(Trouble::Interrupted) => self.look = true,
            Err(Trouble::Gone) => self.gone = true,
            Err(Trouble::Fault(fault)) => self.owner.break_it(fault.on_queue(self.setup.index)),
        }
        if self.map.lost() {
            let reason = "the front end's memory file shrank under its mapping";
            let fault = Fault::new("memory.truncated", reason);
            self.owner.break_it(fault.on_queue(self.setup.index));
        }
    }

    fn note_positions(&self) {
        let stats = &self.setup.stats;
        stats.in_flight.store(self.in_flight as u32, Ordering::Relaxed);
        if let Some(ring) = &self.ring {
            stats.position.store(ring.position(), Ordering::Relaxed);
            stats.last_avail.store(ring.next_avail(), Ordering::Relaxed);
            stats.used_idx.store(ring.used_idx(), Ordering::Relaxed);
            stats.avail_idx.store(ring.peek_avail_idx(), Ordering::Relaxed);
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Stop(done) => {
                self.stopped = true;
                self.stopping.push(done);
            }
            Command::Enable(on, _done) => {
                self.enabled = on;
                self.look = true;
            }
            Command::Look => self.look = true,
            Command::SetCall(call, _done) => {
                let old = std::mem::replace(&mut self.setup.call, call);
                if self.signalling {
                    self.old_call = self.old_call.take().or(old.fd);
                    self.signal_again = false;
                    self.uring.cancel(SIGNAL, CANCEL);
                }
                // One that was raised meanwhile went to the old one.
                if self.setup.stats.calls.load(Ordering::Relaxed) != 0 {
                    self.signal();
                }
            }
            Command::SetKick(kick, _done) => {
                self.kick = kick;
                self.look = true;
            }
            Command::SetMemory(map, _done) => {
                self.map = Arc::new(map.with_shadows());
                self.areas = Areas::new(&self.map, &self.setup).ok();
                if let Some(ring) = &mut self.ring {
                    // Where the areas are there, so is the ring.
                    ring.rebase(&self.map, self.setup.space, self.setup.addresses);
                }
                self.stale = true;
                self.look = true;
            }
            Command::SetFeatures(features, _done) => {
                self.setup.driver_features = features;
                if let Some(ring) = &mut self.ring {
                    ring.set_features(ring_features(features));
                }
                self.look = true;
            }
            Command::Resume(slot) => self.resume(slot, 0),
        }
    }

    fn reap(&mut self) {
        let mut ended = std::mem::take(&mut self.ended);
        self.uring.reap(&mut ended);
        for (user_data, result) in ended.drain(..) {
            match user_data {
                SIGNAL => self.signalled(),
                CANCEL => {}
                slot => self.resume(slot as u16, result),
            }
        }
        self.ended = ended;
    }

    /// Takes what there is, and asks for notification of more.
    fn pass(&mut self) -> Outcome<()> {
        self.open()?;
        loop {
            while self.in_flight < self.limit() && self.gate_open() && self.fetch_ring()? {
                self.take()?;
            }
            if self.in_flight >= self.limit() || !self.gate_open() {
                return Ok(());
            }
            let (Some(areas), Some(ring)) = (&mut self.areas, &mut self.ring) else {
                return Ok(());
            };
            ring.enable_notification();
            areas.store()?;
            if !self.fetch_ring()? {
                return Ok(());
            }
        }
    }

    fn gate_open(&self) -> bool {
        !self.device.gated() || self.device.may_take(self.setup.index)
    }

    fn limit(&self) -> usize {
        if self.serial {
            1
        } else {
            usize::from(self.setup.size)
        }
    }

    /// Fetches the areas as a whole, before anything is believed of them.
    fn open(&mut self) -> Outcome<()> {
        let Some(areas) = &mut self.areas else { return Ok(()) };
        if self.stale {
            areas.desc.fetch_all(&self.hurry)?;
            areas.driver.fetch_all(&self.hurry)?;
            areas.device.fetch_all(&self.hurry)?;
            self.stale = false;
        }
        if self.ring.is_none() {
            let QueueSetup {
                space,
                addresses,
                size,
                driver_features,
                position,
                ..
            } = self.setup;
            let features = ring_features(driver_features);
            self.ring = Some(Ring::new(
                &self.map,
                space,
                addresses,
                size,
                MAX_QUEUE_SIZE,
                features,
                position,
            )?);
        }
        Ok(())
    }

    /// Fetches what is needed to take the next chains; false when there are none.
    fn fetch_ring(&mut self) -> Outcome<bool> {
        if self.hurry.load(Ordering::Acquire) {
            return Err(Trouble::Interrupted);
        }
        let (Some(areas), Some(ring)) = (&mut self.areas, &self.ring) else {
            return Ok(false);
        };
        let (size, next) = (usize::from(self.setup.size), ring.next_avail());
        if ring.is_packed() {
            let index = usize::from(next & 0x7fff);
            areas.desc.fetch(index * DESC_SIZE + 14, 2, &self.hurry)?;
            if !ring.has_work() {
                return Ok(false);
            }
            // The flags of a chain's first descriptor are written last; the others' in no order. So this holds for one
            // chain, and is done again for the next.
            areas.desc.fetch_all(&self.hurry)?;
            return Ok(true);
        }
        areas.driver.fetch(0, 4, &self.hurry)?;
        let ahead = usize::from(ring.peek_avail_idx().wrapping_sub(next));
        if ahead == 0 {
            return Ok(false);
        }
        // More than the size is the engine's to complain about.
        let count = ahead.min(size);
        let first = usize::from(next) % size;
        let whole = count.min(size - first);
        areas.driver.fetch(4 + 2 * first, 2 * whole, &self.hurry)?;
        if count > whole {
            areas.driver.fetch(4, 2 * (count - whole), &self.hurry)?;
        }
        areas.desc.fetch_all(&self.hurry)?;
        Ok(true)
    }

    /// Takes the chains that were fetched.
    fn take(&mut self) -> Outcome<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let mut count = ring.available()?;
        if ring.is_packed() {
            count = count.min(1);
        }
        for _ in 0..count {
            if self.in_flight >= self.limit() || !self.take_one()? {
                break;
            }
        }
        Ok(())
    }

    fn take_one(&mut self) -> Outcome<bool> {
        if self.hurry.load(Ordering::Acquire) {
            return Err(Trouble::Interrupted);
        }
        self.fetch_table()?;
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.slots.push(Slot {
                    request: Request::default(),
                    map: Arc::clone(&self.map),
                    stores: Vec::new(),
                    room: 0,
                    busy: false,
                });
                (self.slots.len() - 1) as u16
            }
        };
        let started = self.start_one(number);
        if !matches!(started, Ok(Some(_))) {
            self.free.push(number);
        }
        match started? {
            None => return Ok(false),
            Some(Step::Done(written)) => self.finish(number, written)?,
            Some(step) => {
                self.slots[usize::from(number)].busy = true;
                self.in_flight += 1;
                if let Step::Io(op) = step {
                    self.uring.queue(&op, u64::from(number));
                }
            }
        }
        Ok(true)
    }

    /// Pops a chain, fetches what the device reads, and starts the request; None when there was no chain.
    fn start_one(&mut self, number: u16) -> Outcome<Option<Step>> {
        let Some(ring) = &mut self.ring else { return Ok(None) };
        let slot = &mut self.slots[usize::from(number)];
        slot.request.chain.clear();
        slot.request.scratch.clear();
        slot.map = Arc::clone(&self.map);
        if !ring.pop(&self.map, &mut slot.request.chain)? {
            return Ok(None);
        }
        for piece in self.map.shadows(&slot.request.chain.readable) {
            if let Err(fault) = piece.fetch(&self.hurry) {
                ring.undo_pop();
                return Err(fault.into());
            }
        }
        slot.stores = self.map.shadows(&slot.request.chain.writable);
        // Before the device takes pieces of it.
        slot.room = slot.request.chain.writable.len();
        for piece in &slot.stores {
            // What is stored in the end may be a bit more than the device wrote; nothing old shall be among that.
            piece.clear();
        }
        let context = QueueContext {
            queue: self.setup.index,
            driver_features: self.setup.driver_features,
            counters: &self.setup.stats.counters,
            waker: Some((&self.wakers, number)),
        };
        match self.device.start(&mut slot.request, &context) {
            Ok(step) => Ok(Some(step)),
            Err(fault) => {
                ring.undo_pop();
                Err(fault.into())
            }
        }
    }

    /// Fetches the indirect table of the next chain, if it has one. What is wrong with it the engine will say.
    fn fetch_table(&mut self) -> Outcome<()> {
        let (Some(areas), Some(ring)) = (&self.areas, &self.ring) else {
            return Ok(());
        };
        let size = usize::from(self.setup.size);
        let next = ring.next_avail();
        let mut index = if ring.is_packed() {
            usize::from(next & 0x7fff)
        } else {
            let entry = areas.driver.host.u16(4 + 2 * (usize::from(next) % size));
            usize::from(u16::from_le(entry.load(Ordering::Relaxed)))
        };
        for _ in 0..size {
            if index >= size {
                return Ok(());
            }
            let address = areas.desc.host.load_u64(index * DESC_SIZE);
            let rest = areas.desc.host.load_u64(index * DESC_SIZE + 8);
            let (len, low, high) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            // The two formats have flags and the rest the other way round.
            let (flags, following) = if ring.is_packed() {
                (high, index + 1)
            } else {
                (low, usize::from(high))
            };
            if flags & DESC_F_INDIRECT != 0 {
                if len as usize > DESC_SIZE * usize::from(MAX_QUEUE_SIZE) {
                    return Ok(());
                }
                let mut table = crate::memory::Buffers::default();
                if self.map.append(address, u64::from(len), &mut 0, &mut table) {
                    for piece in self.map.shadows(&table) {
                        piece.fetch(&self.hurry)?;
                    }
                }
                return Ok(());
            }
            // A packed chain has a table in its first descriptor or not at all.
            if flags & DESC_F_NEXT == 0 || ring.is_packed() {
                return Ok(());
            }
            index = following;
        }
        Ok(())
    }

    /// Goes on with a request.
    fn resume(&mut self, number: u16, result: i32) {
        let Some(slot) = self.slots.get_mut(usize::from(number)).filter(|slot| slot.busy) else {
            return;
        };
        let context = QueueContext {
            queue: self.setup.index,
            driver_features: self.setup.driver_features,
            counters: &self.setup.stats.counters,
            waker: Some((&self.wakers, number)),
        };
        match self.device.resume(&mut slot.request, &context, result) {
            Step::Io(op) => self.uring.queue(&op, u64::from(number)),
            Step::Wait => {}
            Step::Done(written) => {
                slot.busy = false;
                self.in_flight -= 1;
                // There is room for another.
                self.look = true;
                let finished = self.finish(number, written);
                self.judge(finished);
            }
        }
    }

    /// Goes on with requests that could not be said to be done.
    fn finish_rest(&mut self) {
        for (number, written) in std::mem::take(&mut self.unfinished) {
            let finished = self.finish(number, written);
            self.judge(finished);
        }
    }

    /// Stores what a request has brought, then says so in the ring.
    fn finish(&mut self, number: u16, written: u32) -> Outcome<()> {
        match self.open() {
            Ok(()) if self.areas.is_some() => {}
            Ok(()) | Err(Trouble::Interrupted) => {
                self.unfinished.push((number, written));
                return Ok(());
            }
            Err(trouble) => return Err(trouble),
        }
        let slot = &mut self.slots[usize::from(number)];
        // What was written, and the place of a status behind it; not what the device was only given room for.
        let tail = slot.room.saturating_sub(u64::from(self.device.tail()));
        for piece in slot.stores.drain(..) {
            piece.store(0, u64::from(written))?;
            piece.store(tail.max(u64::from(written)), slot.room)?;
        }
        let head = slot.request.chain.head;
        slot.request.scratch.clear();
        let (Some(areas), Some(ring)) = (&mut self.areas, &mut self.ring) else {
            return Ok(());
        };
        let element = 4 + 8 * (usize::from(ring.used_idx()) % usize::from(self.setup.size));
        ring.push_used(head, written);
        if !ring.is_packed() {
            areas.device.forget(element, 8);
        }
        areas.store()?;
        ring.publish();
        areas.store()?;
        self.free.push(number);
        self.setup.stats.requests.fetch_add(1, Ordering::Relaxed);
        self.published = true;
        Ok(())
    }

    /// Interrupts the driver for what was published, if it wants that.
    fn tell(&mut self) -> Outcome<()> {
        self.published = false;
        let (Some(areas), Some(ring)) = (&mut self.areas, &mut self.ring) else {
            return Ok(());
        };
        let fetched = if ring.is_packed() {
            // Flags first: they say whether the rest means anything.
            let flags = areas.driver.fetch(2, 2, &self.hurry);
            flags.and_then(|()| areas.driver.fetch(0, 2, &self.hurry))
        } else {
            let event = 4 + 2 * usize::from(self.setup.size);
            let flags = areas.driver.fetch(0, 4, &self.hurry);
            flags.and_then(|()| areas.driver.fetch(event, 2, &self.hurry))
        };
        let wanted = ring.should_signal(self.in_flight);
        match fetched {
            Ok(()) if !wanted => {}
            // An interrupt too many does no harm.
            Ok(()) | Err(Trouble::Interrupted) => self.signal(),
            Err(trouble) => return Err(trouble),
        }
        Ok(())
    }

    fn signal(&mut self) {
        if let Some((isr, bits)) = &self.setup.call.isr {
            // Before the interrupt: its handler looks there.
            isr.fetch_or(*bits, Ordering::Release);
        }
        if self.signalling {
            self.signal_again = true;
        } else if let Some(call) = &self.setup.call.fd {
            // Not a plain write: the eventfd is the client's, which can make that block.
            self.signalling = true;
            self.uring.signal(call.as_raw_fd(), SIGNAL);
            self.setup.stats.calls.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn signalled(&mut self) {
        self.signalling = false;
        self.old_call = None;
        if std::mem::take(&mut self.signal_again) {
            self.signal();
        }
    }
}
