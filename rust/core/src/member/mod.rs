// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A member: one register file, whoever writes to it (design D1).
//!
//! Registers are behind one small mutex. Changes that concern a running queue are sent to its worker, and what has to
//! be waited for is reported by a [`Completion`]; nothing here blocks. The register file knows no device type and no
//! transport: a vhost-user session, administration commands and accesses to the BARs of a PCI function are callers alike.
//! This file holds the state, the life cycle and what vhost-user sets; [`lens`] the legacy and the modern view of the
//! registers, [`parts`] the device parts of a migration.
//!
//! A completion that calls back into the member may end at once, on this thread. So completions made here are dropped only
//! after the mutex has been let go of: see [`Member::with`].

pub mod lens;
pub mod parts;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::device::Device;
use crate::dirty::DirtyLog;
use crate::error::{Error, Fault, Result};
use crate::event::{Completion, Event};
use crate::memory::{HostArea, MemoryMap, Region};
use crate::poll::MAX_POLL;
use crate::remote::{RemoteRunner, RemoteStart};
use crate::ring::any::{self, fresh_position};
use crate::ring::inflight;
use crate::ring::split::{self, AddressSpace, RingAddresses};
use crate::ring::MAX_QUEUE_SIZE;
use crate::runner::{ring_features, Call, QueueSetup, QueueStats, Runner};
use crate::sys;
use crate::worker::{Owner, Pool, QueueHandle, SourceHandle, Start};

pub use crate::ring::feature;

/// Guest memory from which letting go of it takes a while.
const LARGE_MEMORY: u64 = 1 << 30;

/// ISR status: a queue has used buffers.
const QUEUE_ISR: u8 = 1;
/// ISR status: a kick notification (virtio-vhost-user v5).
const KICK_ISR: u8 = 4;

/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xffff;

/// What is attached to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    /// A vhost-user front end.
    VhostUser,
    /// A client of its legacy PCI function.
    Legacy,
    /// A client of its transitional PCI function.
    Transitional,
    /// A client of the member itself as a PCI function.
    Modern,
    /// A client of the owner's PCI function.
    Owner,
}

impl Front {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::VhostUser => "vhost-user",
            Self::Legacy => "legacy",
            Self::Transitional => "transitional",
            Self::Modern => "modern",
            Self::Owner => "owner",
        }
    }
}

/// How far an operation on the registers has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Carried out.
    Done,
    /// Rings have to stop first; the waker is called when they have.
    Later,
}

/// Device status bits.
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// The device is broken and wants a reset.
    pub const NEEDS_RESET: u8 = 64;
}

/// A running ring, seen from here.
enum Handle {
    /// A worker's queue.
    Worker(QueueHandle),
    /// In memory that came without an fd: it has a thread of its own.
    Thread(RemoteRunner),
    /// No ring: an index whose notifications the device takes itself.
    Doorbell(DoorbellHandle),
}

/// An index of [`Doorbells`](crate::device::Doorbells) that the driver has set up.
struct DoorbellHandle {
    device: Arc<dyn Device>,
    pool: Arc<Pool>,
    /// Among the doorbells.
    index: u16,
    kick: Mutex<Option<Arc<OwnedFd>>>,
    call: Mutex<Call>,
}

impl DoorbellHandle {
    fn connect(&self, on: bool) {
        let kick = self.kick.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let call = self.call.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(doorbells) = self.device.doorbells() {
            if on {
                doorbells.connect(self.index, kick, call);
            } else {
                doorbells.disconnect(self.index);
            }
        }
    }

    fn set_call(&self, call: Call) {
        self.call
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&call);
        if let Some(doorbells) = self.device.doorbells() {
            doorbells.set_call(self.index, call);
        }
    }

    fn set_kick(&self, kick: Arc<OwnedFd>) {
        *self.kick.lock().unwrap_or_else(PoisonError::into_inner) = Some(kick);
        self.connect(true);
    }

    /// Whoever waits is told from a worker: our caller may hold a lock that they want.
    fn later(&self, done: Completion) {
        self.pool.after(Duration::ZERO, Box::new(move || drop(done)));
    }
}

impl Handle {
    fn stop(&self, done: Completion) {
        match self {
            Self::Worker(queue) => queue.stop(done),
            Self::Thread(queue) => queue.stop(done),
            Self::Doorbell(doorbell) => {
                doorbell.connect(false);
                doorbell.later(done);
            }
        }
    }

    fn enable(&self, on: bool, done: Completion) {
        match self {
            Self::Worker(queue) => queue.enable(on, done),
            Self::Thread(queue) => queue.enable(on, done),
            Self::Doorbell(doorbell) => {
                doorbell.connect(on);
                doorbell.later(done);
            }
        }
    }

    /// Has the ring looked at.
    fn look(&self) {
        match self {
            Self::Worker(queue) => queue.look(),
            Self::Thread(queue) => queue.look(),
            Self::Doorbell(_) => {}
        }
    }

    fn set_call(&self, call: Call, done: Completion) {
        match self {
            Self::Worker(queue) => queue.set_call(call, done),
            Self::Thread(queue) => queue.set_call(call, done),
            Self::Doorbell(doorbell) => {
                doorbell.set_call(call);
                doorbell.later(done);
            }
        }
    }

    /// As `set_call`, for those who don't wait.
    fn rewire(&self, call: Call) {
        match self {
            Self::Worker(queue) => queue.rewire(call),
            Self::Thread(queue) => queue.set_call(call, Completion::call(|| {})),
            Self::Doorbell(doorbell) => doorbell.set_call(call),
        }
    }

    fn set_kick(&self, kick: Arc<OwnedFd>, done: Completion) {
        match self {
            Self::Worker(queue) => queue.set_kick(kick, done),
            Self::Thread(queue) => queue.set_kick(kick, done),
            Self::Doorbell(doorbell) => {
                doorbell.set_kick(kick);
                doorbell.later(done);
            }
        }
    }

    fn set_features(&self, features: u64, done: Completion) {
        match self {
            Self::Worker(queue) => queue.set_features(features, done),
            Self::Thread(queue) => queue.set_features(features, done),
            Self::Doorbell(doorbell) => doorbell.later(done),
        }
    }

    fn set_memory(&self, map: Arc<MemoryMap>, done: Completion) {
        match self {
            Self::Worker(queue) => queue.set_memory(map, done),
            Self::Thread(queue) => queue.set_memory(map, done),
            Self::Doorbell(doorbell) => doorbell.later(done),
        }
    }

    fn set_log(&self, log: Option<Arc<DirtyLog>>, done: Completion) {
        match self {
            Self::Worker(queue) => queue.set_log(log, done),
            // Only PCI functions have these, and nobody asks them for a log.
            Self::Thread(_) => drop(done),
            Self::Doorbell(doorbell) => doorbell.later(done),
        }
    }

    fn worker(&self) -> Option<u32> {
        match self {
            Self::Worker(queue) => Some(queue.worker_index),
            Self::Thread(_) | Self::Doorbell(_) => None,
        }
    }
}

/// Whether a ring runs.
enum Run {
    /// Nobody touches it; the position is in the registers.
    Stopped,
    /// A worker serves it.
    Running(Handle),
    /// It has been told to stop; the position will be in the queue's stats. It can be told again, by somebody else who
    /// wants to know when it has.
    Stopping(Handle),
}

/// One queue's registers.
struct Queue {
    size: u16,
    addresses: Option<RingAddresses>,
    /// Where to go on; None: at the beginning.
    position: Option<u32>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    /// vhost-user: what a ring that runs, or ran until it was paused, has for kick and call.
    wires: (Option<Arc<OwnedFd>>, Option<Arc<OwnedFd>>),
    enabled: bool,
    run: Run,
    /// Times it has been started: tells the end of an old ring from that of its successor.
    starts: u64,
    stats: Arc<QueueStats>,
    /// Where the front end was told to go on. Another position that it then sets is its own choice: the record of what is in
    /// flight says nothing about it.
    told: Option<u32>,
    /// Requests that were in flight before are none of this ring's.
    begins_anew: bool,
    /// vhost-user: the front end wants it to go on where it was told that it has stopped.
    continues: bool,
    /// PCI: queue_enable, or a PFN other than 0.
    active: bool,
    /// PCI: MSI-X vector.
    vector: u16,
    /// PCI: what notifications go through while the ring runs.
    bell: Option<Arc<OwnedFd>>,
    /// PCI: set up through the legacy view, by a PFN.
    by_pfn: bool,
    /// PCI: a legacy driver has notified; it may do so long before DRIVER_OK, and the ring runs from then on.
    notified: bool,
    /// PCI: the position is not known but from the used index (after a migration).
    from_used: bool,
    /// PCI: queue_reset reads 1.
    resetting: bool,
    /// The position where the ring stops doesn't matter: it was reset.
    discard: bool,
}

impl Queue {
    /// Whether a started ring may take requests: without VHOST_USER_F_PROTOCOL_FEATURES there is no enable message, and
    /// a started ring is enabled.
    fn may_run(&self, driver_features: u64) -> bool {
        self.enabled || driver_features & feature::PROTOCOL_FEATURES == 0
    }

    fn snapshot(&self) -> QueueSnapshot {
        let shared = |waiting: &Option<OwnedFd>, wire: &Option<Arc<OwnedFd>>| {
            let waiting = waiting.as_ref().and_then(|fd| fd.try_clone().ok()).map(Arc::new);
            waiting.or_else(|| wire.clone())
        };
        QueueSnapshot {
            size: self.size,
            position: self.position,
            addresses: self.addresses,
            kick: shared(&self.kick, &self.wires.0),
            call: shared(&self.call, &self.wires.1),
            enabled: self.enabled,
        }
    }

    fn running(&self) -> Option<&Handle> {
        match &self.run {
            Run::Running(handle) => Some(handle),
            _ => None,
        }
    }

    /// Tells the ring to stop, if it is not stopped already; `done` is called for only then.
    fn stop(&mut self, done: impl FnOnce() -> Completion) {
        self.run = match std::mem::replace(&mut self.run, Run::Stopped) {
            Run::Stopped => return,
            Run::Running(handle) | Run::Stopping(handle) => {
                handle.stop(done());
                Run::Stopping(handle)
            }
        };
    }

    /// The ring has stopped: takes over its position.
    fn collect(&mut self) {
        if matches!(self.run, Run::Stopping(_)) {
            self.run = Run::Stopped;
            self.bell = None;
            if !std::mem::take(&mut self.discard) {
                self.position = Some(self.stats.position.load(Ordering::Relaxed));
                self.told = self.position;
            }
        }
    }

    /// Registers as after power-up. A ring that runs must have been told to stop; it stays known until it has.
    fn clear(&mut self, size: u16) {
        let stats = Arc::clone(&self.stats);
        let run = std::mem::replace(&mut self.run, Run::Stopped);
        let discard = !matches!(run, Run::Stopped);
        *self = Self {
            stats,
            run,
            starts: self.starts,
            discard,
            ..Self::new(size)
        };
    }

    fn new(size: u16) -> Self {
        Self {
            size,
            addresses: None,
            position: None,
            kick: None,
            call: None,
            wires: (None, None),
            enabled: false,
            run: Run::Stopped,
            starts: 0,
            stats: Arc::default(),
            told: None,
            begins_anew: false,
            continues: false,
            active: false,
            vector: NO_VECTOR,
            bell: None,
            by_pfn: false,
            notified: false,
            from_used: false,
            resetting: false,
            discard: false,
        }
    }
}

/// Where interrupts of a PCI function go.
#[derive(Default)]
struct Lines {
    /// The client's connection: to be woken when there are `signals`.
    client: Option<SourceHandle>,
    msix_enabled: bool,
    vectors: Vec<Option<Arc<OwnedFd>>>,
    intx: Option<Arc<OwnedFd>>,
    /// The ISR status register.
    isr: Arc<AtomicU8>,
    /// Interrupts that the client's connection is to send.
    signals: Vec<Arc<OwnedFd>>,
}

impl Lines {
    fn vector(&self, vector: u16) -> Option<Arc<OwnedFd>> {
        self.vectors.get(usize::from(vector)).cloned().flatten()
    }

    /// How a queue with this vector interrupts; `bits` are those of the ISR status that say so.
    fn call(&self, vector: u16, bits: u8) -> Call {
        if self.msix_enabled {
            Call {
                fd: self.vector(vector),
                isr: None,
            }
        } else {
            Call {
                fd: self.intx.clone(),
                isr: Some((Arc::clone(&self.isr), bits)),
            }
        }
    }
}

struct Registers {
    attached: bool,
    front: Option<Front>,
    lines: Lines,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    config_vector: u16,
    config_generation: u8,
    /// Bytes of a legacy register that was written in pieces.
    latch: [u8; 24],
    /// A reset is under way; until then the status reads as before.
    resetting: Option<u8>,
    /// Stopped by its owner (DEV_MODE_SET).
    stopped: bool,
    /// A configuration change is to be told when it goes on.
    config_pending: bool,
    /// Features that its owner lets it offer.
    assigned: Option<u64>,
    draining: bool,
    closed: bool,
    connections: u64,
    driver_features: u64,
    features_written: bool,
    protocol_features: u64,
    status: u8,
    map: Arc<MemoryMap>,
    /// Where what is in flight is recorded.
    inflight: Option<Inflight>,
    /// The log of written pages, kept while the front end asks for it.
    log: Option<Arc<DirtyLog>>,
    logging: bool,
    queues: Vec<Queue>,
}

impl Registers {
    /// The record of a queue, if there is one with room for its ring.
    fn record(&self, index: u64, size: u16, packed: bool) -> Option<HostArea> {
        let inflight = self.inflight.as_ref()?;
        let index = u16::try_from(index).ok()?;
        let (offset, len) = inflight::region_place(inflight.area.len() as u64, inflight.queues, index)?;
        let area = inflight.area.part(offset as usize, len as usize)?;
        (inflight::capacity(&area, packed) >= usize::from(size)).then_some(area)
    }

    /// The log, if it is to be kept.
    fn active_log(&self) -> Option<Arc<DirtyLog>> {
        self.log.clone().filter(|_| self.logging)
    }
}

/// The front end's memory for requests in flight.
pub struct Inflight {
    area: HostArea,
    queues: u16,
}

impl Inflight {
    /// Uses mapped memory for the records of so many queues.
    ///
    /// # Errors
    /// `inflight.alignment`, `inflight.queues`.
    pub fn new(area: HostArea, queues: u16) -> std::result::Result<Self, Fault> {
        if !area.is_aligned(8) {
            return Err(Fault::new(
                "inflight.alignment",
                "the in-flight region is not 8-byte aligned",
            ));
        }
        if queues == 0 {
            return Err(Fault::new("inflight.queues", "an in-flight region for no queue at all"));
        }
        Ok(Self { area, queues })
    }
}

/// A member of the group.
pub struct Member {
    pool: Arc<Pool>,
    owner: Arc<Owner>,
    device: Arc<dyn Device>,
    legacy: AtomicBool,
    packed: bool,
    in_order: bool,
    vectors: u16,
    poll: Duration,
    admin: Option<AdminQueues>,
    on_reset: OnceLock<Box<dyn Fn() + Send + Sync>>,
    registers: Mutex<Registers>,
}

/// The administration virtqueues of an owner.
#[derive(Clone)]
pub struct AdminQueues {
    /// Executes the commands.
    pub device: Arc<dyn Device>,
    /// How many there are.
    pub count: u16,
}

/// How a member is to be.
#[derive(Default)]
pub struct MemberOptions {
    /// Legacy drivers are welcome.
    pub legacy: bool,
    /// Packed rings are offered.
    pub packed: bool,
    /// IN_ORDER is offered.
    pub in_order: bool,
    /// Size of the MSI-X table; 0: there is none.
    pub vectors: u16,
    /// It is an owner, with these.
    pub admin: Option<AdminQueues>,
    /// How long its queues may be polled when they are empty, at most ([`Polling`](crate::poll::Polling)); 0: not at all.
    pub poll: Duration,
}

/// A place in a file of the front end's: bytes, offset, and the region that maps it.
pub type Place = (u64, u64, Region);

/// What a vhost-user front end has set, for a successor of this process.
pub struct Snapshot {
    /// Accepted features, LOG_ALL among them; None: none were written.
    pub features: Option<u64>,
    /// The device status register.
    pub status: u8,
    /// Guest memory.
    pub memory: Vec<Region>,
    /// Memory for requests in flight, and of how many queues.
    pub inflight: Option<(Place, u16)>,
    /// The log of written pages.
    pub log: Option<Place>,
    /// The queues.
    pub queues: Vec<QueueSnapshot>,
}

/// A queue in a [`Snapshot`].
pub struct QueueSnapshot {
    /// Size.
    pub size: u16,
    /// Where to go on, if it is known.
    pub position: Option<u32>,
    /// Ring areas.
    pub addresses: Option<RingAddresses>,
    /// Notifications come here.
    pub kick: Option<Arc<OwnedFd>>,
    /// Interrupts go here.
    pub call: Option<Arc<OwnedFd>>,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
}

/// State of a queue, for people.
pub struct QueueInfo {
    /// Negotiated size.
    pub size: u16,
    /// Whether it has a kick fd and a ring.
    pub started: bool,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// The worker that serves it.
    pub worker: Option<u32>,
    /// Ring areas in front-end addresses.
    pub addresses: Option<RingAddresses>,
    /// Where to go on, while stopped.
    pub next_avail: u16,
    /// Live numbers.
    pub stats: Arc<QueueStats>,
}

/// A region of guest memory, for people.
pub struct RegionInfo {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Front-end address.
    pub user: u64,
    /// Offset in its file.
    pub mmap_offset: u64,
}

/// State of a member, for people.
pub struct Info {
    /// "broken", "running", "attached", "draining" or "detached".
    pub state: &'static str,
    /// Why it is broken.
    pub broken: Option<Fault>,
    /// Why it was broken the last time.
    pub last_error: Option<Fault>,
    /// Front ends so far.
    pub connections: u64,
    /// Offered.
    pub device_features: u64,
    /// Accepted.
    pub driver_features: u64,
    /// Whether features were ever written.
    pub features_written: bool,
    /// vhost-user protocol features accepted.
    pub protocol_features: u64,
    /// Device status register.
    pub status: u8,
    /// Queues.
    pub queues: Vec<QueueInfo>,
    /// Guest memory.
    pub memory: Vec<RegionInfo>,
    /// What is attached.
    pub front: Option<Front>,
    /// Stopped by its owner.
    pub stopped: bool,
    /// ISR status.
    pub isr: u8,
    /// Whether its PCI function has MSI-X enabled.
    pub msix_enabled: bool,
    /// Features assigned by its owner.
    pub assigned: Option<u64>,
    /// Changes of the configuration so far, modulo 256.
    pub config_generation: u8,
    /// Whether the front end keeps a record of what is in flight.
    pub inflight_tracking: bool,
    /// Whether pages that are written are logged.
    pub dirty_log: bool,
}

impl Member {
    /// A member with a device.
    pub fn new(pool: Arc<Pool>, id: u32, device: Arc<dyn Device>, options: MemberOptions) -> Arc<Self> {
        let mut queues: Vec<Queue> = (0..device.queues()).map(|_| Queue::new(device.queue_size())).collect();
        if let Some(doorbells) = device.doorbells() {
            // There is no such device with an administration virtqueue: the indices would have to be shared out.
            queues.extend((0..doorbells.count()).map(|_| Queue::new(device.queue_size())));
        } else if let Some(admin) = &options.admin {
            queues.extend((0..admin.count).map(|_| Queue::new(admin.device.queue_size())));
        }
        let owner = Arc::new(Owner::new(id, Arc::clone(pool.events())));
        Arc::new(Self {
            pool,
            owner,
            device,
            legacy: AtomicBool::new(options.legacy),
            packed: options.packed,
            in_order: options.in_order,
            vectors: options.vectors,
            poll: options.poll.min(MAX_POLL),
            admin: options.admin,
            on_reset: OnceLock::new(),
            registers: Mutex::new(Registers {
                attached: false,
                front: None,
                lines: Lines::default(),
                device_feature_select: 0,
                driver_feature_select: 0,
                queue_select: 0,
                config_vector: NO_VECTOR,
                config_generation: 0,
                latch: [0; 24],
                resetting: None,
                stopped: false,
                config_pending: false,
                assigned: None,
                draining: false,
                closed: false,
                connections: 0,
                driver_features: 0,
                features_written: false,
                protocol_features: 0,
                status: 0,
                map: Arc::default(),
                inflight: None,
                log: None,
                logging: false,
                queues,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the registers. What is put into the second argument is dropped after the registers have been let go of: the
    /// end of a completion may call back into the member.
    fn with<R>(&self, work: impl FnOnce(&mut Registers, &mut Option<Completion>) -> R) -> R {
        let mut done = None;
        let mut registers = self.lock();
        let result = work(&mut registers, &mut done);
        drop(registers);
        drop(done);
        result
    }

    /// Has a function called at each reset.
    pub fn set_on_reset(&self, on_reset: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_reset.set(Box::new(on_reset));
    }

    /// What is attached, if anything.
    pub fn front(&self) -> Option<Front> {
        self.lock().front
    }

    /// Number in the group.
    pub fn id(&self) -> u32 {
        self.owner.id
    }

    /// The device model.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Whether legacy drivers are welcome.
    pub fn legacy(&self) -> bool {
        self.legacy.load(Ordering::Relaxed)
    }

    /// Whether legacy drivers are to be welcome from now on.
    ///
    /// # Errors
    /// [`Error::Busy`] while a front end is attached.
    pub fn set_legacy(&self, legacy: bool) -> Result<()> {
        let registers = self.lock();
        if registers.attached || registers.draining {
            return Err(Error::Busy(self.id(), "a front end is attached"));
        }
        self.legacy.store(legacy, Ordering::Relaxed);
        Ok(())
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Who is marked broken when something goes wrong.
    pub fn owner(&self) -> &Arc<Owner> {
        &self.owner
    }

    /// Feature bits offered, the transport's included.
    pub fn offered_features(&self) -> u64 {
        let assigned = self.lock().assigned;
        self.offered_over_vhost_user(assigned)
    }

    fn offered_over_vhost_user(&self, assigned: Option<u64>) -> u64 {
        let offered = self.device.features() | self.transport_features();
        // ANY_LAYOUT stays: a transitional device must offer it.
        offered & assigned.map_or(u64::MAX, |mask| mask | feature::ANY_LAYOUT)
    }

    /// Features of the ring and the transport, over vhost-user.
    fn transport_features(&self) -> u64 {
        let modern = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::VERSION_1;
        let legacy = feature::NOTIFY_ON_EMPTY | feature::ANY_LAYOUT;
        modern | self.ring_formats() | if self.legacy() { legacy } else { 0 }
    }

    /// What an operator lets it offer for rings.
    fn ring_formats(&self) -> u64 {
        let packed = if self.packed { feature::RING_PACKED } else { 0 };
        packed | if self.in_order { feature::IN_ORDER } else { 0 }
    }

    /// Takes the member for one front end.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub fn attach(&self) -> Result<()> {
        let mut registers = self.lock();
        if registers.closed {
            return Err(Error::Busy(self.id(), "it is being removed"));
        }
        if registers.draining {
            return Err(Error::Busy(
                self.id(),
                "requests of the last front end are still in flight",
            ));
        }
        if registers.attached {
            return Err(Error::Busy(self.id(), "another front end is attached"));
        }
        // Its owner may have written registers with nobody attached.
        self.forget(&mut registers);
        registers.attached = true;
        registers.front = Some(Front::VhostUser);
        registers.connections += 1;
        self.owner.mend();
        Ok(())
    }

    /// Lets go of the front end: stops the rings. Some when that takes until the completion's end, after which
    /// `finish_detach` must be called.
    pub fn detach(&self) -> Option<u64> {
        let mut registers = self.lock();
        registers.draining = true;
        let token = self.stop_all(&mut registers);
        if token.is_none() {
            self.forget(&mut registers);
        }
        token
    }

    /// The rings have stopped: back to the state after power-up.
    pub fn finish_detach(&self) {
        self.forget(&mut self.lock());
    }

    fn forget(&self, registers: &mut Registers) {
        self.device.reset();
        self.set_status_register(registers, 0);
        registers.attached = false;
        registers.draining = false;
        registers.driver_features = 0;
        registers.features_written = false;
        registers.protocol_features = 0;
        registers.inflight = None;
        registers.log = None;
        registers.logging = false;
        let memory = std::mem::take(&mut registers.map);
        if memory.size() > LARGE_MEMORY {
            // When QEMU has died ours is the last mapping, and unmapping it frees the whole guest.
            sys::drop_later(memory);
        }
        registers.front = None;
        registers.lines = Lines::default();
        registers.stopped = false;
        self.clear_function(registers);
        for queue in &mut registers.queues {
            queue.run = Run::Stopped;
            queue.discard = false;
        }
    }

    /// What a reset clears of the state that only PCI functions have, and all queues.
    fn clear_function(&self, registers: &mut Registers) {
        registers.device_feature_select = 0;
        registers.driver_feature_select = 0;
        registers.queue_select = 0;
        registers.config_vector = NO_VECTOR;
        registers.latch = [0; 24];
        registers.config_pending = false;
        registers.resetting = None;
        registers.lines.isr.store(0, Ordering::Relaxed);
        registers.lines.signals.clear();
        let devices = usize::from(self.device.queues());
        for (index, queue) in registers.queues.iter_mut().enumerate() {
            let size = match &self.admin {
                Some(admin) if index >= devices => admin.device.queue_size(),
                _ => self.device.queue_size(),
            };
            queue.clear(size);
        }
    }

    /// Whether a driver's features have been written since power-up or reset.
    pub fn features_written(&self) -> bool {
        self.lock().features_written
    }

    /// Whether a front end is attached or its requests still drain.
    pub fn attached(&self) -> bool {
        let registers = self.lock();
        registers.attached || registers.draining
    }

    /// No front end may attach any more.
    ///
    /// # Errors
    /// [`Error::Busy`] while one is attached.
    pub fn close(&self) -> Result<()> {
        let mut registers = self.lock();
        if registers.attached || registers.draining {
            return Err(Error::Busy(self.id(), "a front end is attached"));
        }
        registers.closed = true;
        Ok(())
    }

    /// The features the driver accepted. Running rings take over those of the device: a driver may use its queues first
    /// and write its features later, or never (legacy firmware does both). Some: wait until they have.
    ///
    /// # Errors
    /// `features.not-offered`, `features.legacy-refused`, `features.running`.
    pub fn set_features(&self, features: u64, transport: u64) -> std::result::Result<Option<u64>, Fault> {
        // Known rather than offered now: see Device::known_features.
        let assigned = self.lock().assigned;
        let known = self.device.known_features() & assigned.unwrap_or(u64::MAX);
        let offered = self.offered_over_vhost_user(assigned) | known | transport;
        if features & !offered != 0 {
            return Err(Fault::new(
                "features.not-offered",
                format!("features {features:#x} accepted, of {offered:#x} offered"),
            ));
        }
        if features & feature::VERSION_1 == 0 && !self.legacy() {
            return Err(Fault::new(
                "features.legacy-refused",
                "a legacy driver (no VERSION_1) on a member with legacy = false",
            ));
        }
        let mut registers = self.lock();
        let running = registers.queues.iter().any(|queue| queue.running().is_some());
        if running && ring_features(features) != ring_features(registers.driver_features) {
            return Err(Fault::new("features.running", "ring features change while a ring runs"));
        }
        registers.features_written = true;
        // Not a feature of the driver's: the front end switches it on and off while the driver goes on.
        let logging = features & feature::LOG_ALL != 0;
        let features = features & !feature::LOG_ALL;
        let same_log = std::mem::replace(&mut registers.logging, logging) == logging;
        if std::mem::replace(&mut registers.driver_features, features) == features && same_log {
            return Ok(None);
        }
        let log = registers.active_log();
        Ok(self.tell_running(&registers, |handle, done| {
            handle.set_features(features, done.clone());
            handle.set_log(log.clone(), done);
        }))
    }

    /// The front end's log of written pages; it is kept while LOG_ALL is accepted. Some: wait until all rings have it.
    ///
    /// `whole`: all of memory is marked when no ring serves yet. A log that comes before the rings do is that of a migration
    /// which began with another process, now dead. What that one marked last is lost when its connection breaks (seen with QEMU
    /// 11.1.3: pages of a migrated guest were old), and which pages those were nobody knows.
    ///
    /// # Errors
    /// `log.size`.
    pub fn set_log(&self, log: DirtyLog, whole: bool) -> std::result::Result<Option<u64>, Fault> {
        let mut registers = self.lock();
        log.covers(&registers.map)?;
        let features = registers.driver_features;
        let serves = |queue: &Queue| queue.running().is_some() && queue.may_run(features);
        if whole && registers.logging && !registers.queues.iter().any(serves) {
            for region in registers.map.regions() {
                log.mark(region.guest, region.size);
            }
        }
        registers.log = Some(Arc::new(log));
        let log = registers.active_log();
        Ok(self.tell_running(&registers, |handle, done| handle.set_log(log.clone(), done)))
    }

    /// Where the rings record what they have in flight, from their next start on.
    ///
    /// # Errors
    /// `inflight.running`.
    pub fn set_inflight(&self, inflight: Inflight) -> std::result::Result<(), Fault> {
        let mut registers = self.lock();
        if registers.queues.iter().any(|queue| queue.running().is_some()) {
            return Err(Fault::new("inflight.running", "SET_INFLIGHT_FD while a ring runs"));
        }
        registers.inflight = Some(inflight);
        Ok(())
    }

    /// The vhost-user protocol features in force, for people.
    pub fn set_protocol_features(&self, features: u64) {
        self.lock().protocol_features = features;
    }

    fn set_status_register(&self, registers: &mut Registers, new: u8) {
        let old = std::mem::replace(&mut registers.status, new);
        if old != new {
            self.pool.events().push(Event::Status {
                member: self.id(),
                old,
                new,
            });
        }
    }

    /// The device status register; NEEDS_RESET is ours to set.
    pub fn status(&self) -> u8 {
        let broken = if self.owner.is_broken() { status::NEEDS_RESET } else { 0 };
        self.lock().status | broken
    }

    /// Writes the device status register. Writing 0 stops the rings, keeping their positions: QEMU 7.2 writes 0 when it
    /// pauses a guest and asks for the positions afterwards. Some: wait, then
    /// `finish_status`.
    pub fn set_status(&self, value: u8) -> Option<u64> {
        let mut registers = self.lock();
        self.set_status_register(&mut registers, value & !status::NEEDS_RESET);
        if value != 0 {
            return None;
        }
        let token = self.stop_all(&mut registers);
        if token.is_none() {
            self.owner.mend();
        }
        token
    }

    /// Device reset: registers and rings as after power-up; memory and connection stay. Some: wait, then `finish_reset`.
    pub fn reset(&self) -> Option<u64> {
        let mut registers = self.lock();
        let token = self.stop_all(&mut registers);
        if token.is_none() {
            self.clear(&mut registers);
        }
        token
    }

    /// The rings have stopped: finishes `reset`.
    pub fn finish_reset(&self) {
        self.clear(&mut self.lock());
    }

    fn clear(&self, registers: &mut Registers) {
        self.device.reset();
        self.set_status_register(registers, 0);
        // The front end goes on speaking vhost-user with protocol features.
        registers.driver_features &= feature::PROTOCOL_FEATURES;
        registers.logging = false;
        if let Some(inflight) = &registers.inflight {
            // The driver knows of no request any more.
            for index in 0..inflight.queues {
                let place = inflight::region_place(inflight.area.len() as u64, inflight.queues, index);
                let area = place.and_then(|(offset, len)| inflight.area.part(offset as usize, len as usize));
                if let Some(area) = area {
                    inflight::clear(&area);
                }
            }
        }
        registers.features_written = false;
        for queue in &mut registers.queues {
            let stats = Arc::clone(&queue.stats);
            // QEMU sets call fds before the first reset. Those of a ring that ran went to its worker, and have to be
            // sent again as after GET_VRING_BASE.
            let call = queue.call.take();
            *queue = Queue {
                stats,
                call,
                starts: queue.starts,
                ..Queue::new(queue.size)
            };
        }
        self.owner.mend();
    }

    /// Tells all running rings something; the token of the completion, if any runs.
    fn tell_running(&self, registers: &Registers, tell: impl Fn(&Handle, Completion)) -> Option<u64> {
        let mut done: Option<Completion> = None;
        for handle in registers.queues.iter().filter_map(Queue::running) {
            tell(
                handle,
                done.get_or_insert_with(|| self.pool.events().completion()).clone(),
            );
        }
        done.map(|done| done.token())
    }

    /// Stops all rings; the token of the completion, if any ran.
    fn stop_all(&self, registers: &mut Registers) -> Option<u64> {
        let mut done: Option<Completion> = None;
        for queue in &mut registers.queues {
            queue.stop(|| done.get_or_insert_with(|| self.pool.events().completion()).clone());
        }
        done.map(|done| done.token())
    }

    /// Rings that were told to stop have stopped: takes over their positions.
    pub fn collect(&self) {
        self.lock().queues.iter_mut().for_each(Queue::collect);
    }

    /// The rings have stopped: finishes `set_status(0)`. A driver that writes 0 has given up on a broken device, or its
    /// front end is only pausing it: then it meets the same fault again.
    pub fn finish_status(&self) {
        self.collect();
        self.owner.mend();
    }

    fn queue(registers: &mut Registers, index: u64) -> std::result::Result<&mut Queue, Fault> {
        let count = registers.queues.len();
        usize::try_from(index)
            .ok()
            .and_then(|index| registers.queues.get_mut(index))
            .ok_or_else(|| Fault::new("vring.index", format!("queue {index} of {count}")))
    }

    /// Queue size.
    ///
    /// # Errors
    /// `vring.index`, `vring.size`, `vring.running`.
    pub fn set_queue_size(&self, index: u64, size: u64) -> std::result::Result<(), Fault> {
        let max = MAX_QUEUE_SIZE;
        let mut registers = self.lock();
        let packed = registers.driver_features & feature::RING_PACKED != 0;
        let queue = Self::queue(&mut registers, index)?;
        let wanted = u16::try_from(size)
            .ok()
            .filter(|size| (size.is_power_of_two() || packed) && (1..=max).contains(size));
        let Some(size) = wanted else {
            return Err(Fault::new(
                "vring.size",
                format!("size {size}; a power of two up to {max} is allowed"),
            )
            .on_queue(index as u16));
        };
        if queue.running().is_some() && queue.size != size {
            return Err(running(index));
        }
        queue.size = size;
        Ok(())
    }

    /// Where the ring is, in front-end addresses. Checked at once when memory is known, else when the ring starts.
    ///
    /// # Errors
    /// `vring.index`, `vring.running`, `ring.address`, `ring.alignment`.
    pub fn set_queue_addresses(&self, index: u64, addresses: RingAddresses) -> std::result::Result<(), Fault> {
        let mut registers = self.lock();
        let map = Arc::clone(&registers.map);
        let features = registers.driver_features;
        let queue = Self::queue(&mut registers, index)?;
        if queue.running().is_some() {
            // The same again is fine: QEMU repeats the message to switch logging flags.
            return if queue.addresses == Some(addresses) {
                Ok(())
            } else {
                Err(running(index))
            };
        }
        if !map.is_empty() && !self.is_doorbell(index) {
            resolve(&map, AddressSpace::User, addresses, queue.size, features)
                .map_err(|fault| fault.on_queue(index as u16))?;
        }
        queue.addresses = Some(addresses);
        self.try_start(&mut registers, index)
    }

    /// Where to go on, see [`crate::ring::any::Ring::position`].
    ///
    /// # Errors
    /// `vring.index`, `vring.base`, `vring.running`.
    pub fn set_queue_base(&self, index: u64, base: u64) -> std::result::Result<(), Fault> {
        let mut registers = self.lock();
        let packed = registers.driver_features & feature::RING_PACKED != 0;
        let queue = Self::queue(&mut registers, index)?;
        let base = match u32::try_from(base) {
            Ok(base) if packed || base <= u32::from(u16::MAX) => base,
            _ => {
                let fault = Fault::new("vring.base", format!("base {base}; at most 65535 for a split ring"));
                return Err(fault.on_queue(index as u16));
            }
        };
        if queue.running().is_some() {
            return Err(running(index));
        }
        let told = queue.told.take();
        queue.begins_anew |= told.is_some_and(|told| told != base);
        queue.continues = told == Some(base);
        queue.position = Some(base);
        Ok(())
    }

    /// Stops a ring. Ok(None): it has stopped, ask `queue_base`; Ok(Some): wait, `collect`, then ask.
    ///
    /// # Errors
    /// `vring.index`.
    pub fn stop_queue(&self, index: u64) -> std::result::Result<Option<u64>, Fault> {
        let mut registers = self.lock();
        let queue = Self::queue(&mut registers, index)?;
        queue.kick = None;
        queue.call = None;
        queue.wires = (None, None);
        let mut token = None;
        queue.stop(|| {
            let done = self.pool.events().completion();
            token = Some(done.token());
            done
        });
        Ok(token)
    }

    /// Stops all rings for a successor to go on. Some: wait, then `collect`.
    pub fn pause(&self) -> Option<u64> {
        self.stop_all(&mut self.lock())
    }

    /// What a vhost-user front end has set, for a successor. The rings must have stopped.
    pub fn snapshot(&self) -> Snapshot {
        let registers = self.lock();
        let area = |area: &HostArea| {
            let region = area.map().regions().first();
            region.map(|region| (area.len() as u64, region.mmap_offset, region.clone()))
        };
        Snapshot {
            features: registers
                .features_written
                .then_some(registers.driver_features | if registers.logging { feature::LOG_ALL } else { 0 }),
            status: registers.status,
            memory: registers.map.regions().to_vec(),
            inflight: registers
                .inflight
                .as_ref()
                .and_then(|inflight| area(&inflight.area).map(|place| (place, inflight.queues))),
            log: registers.log.as_ref().and_then(|log| area(log.bits())),
            queues: registers.queues.iter().map(Queue::snapshot).collect(),
        }
    }

    /// Position of a stopped ring.
    ///
    /// # Errors
    /// `vring.index`.
    pub fn queue_base(&self, index: u64) -> std::result::Result<u32, Fault> {
        let mut registers = self.lock();
        let packed = registers.driver_features & feature::RING_PACKED != 0;
        let queue = Self::queue(&mut registers, index)?;
        Ok(queue.position.unwrap_or_else(|| fresh_position(packed)))
    }

    /// The eventfd that notifies the device; starts the ring.
    ///
    /// # Errors
    /// `vring.index`, `vring.kick`, and what starting finds wrong.
    pub fn set_queue_kick(&self, index: u64, kick: Option<OwnedFd>) -> std::result::Result<Option<u64>, Fault> {
        let mut registers = self.lock();
        let queue = Self::queue(&mut registers, index)?;
        let refuse = |reason: &str| Err(Fault::new("vring.kick", reason).on_queue(index as u16));
        let Some(kick) = kick else {
            return refuse("no kick fd: a ring that must be polled is not supported");
        };
        if let Some(handle) = queue.running() {
            let done = self.pool.events().completion();
            let token = done.token();
            let kick = Arc::new(kick);
            handle.set_kick(Arc::clone(&kick), done);
            queue.wires.0 = Some(kick);
            return Ok(Some(token));
        }
        queue.kick = Some(kick);
        self.try_start(&mut registers, index).map(|()| None)
    }

    /// The eventfd that interrupts the driver; None: it polls.
    ///
    /// # Errors
    /// `vring.index`.
    pub fn set_queue_call(&self, index: u64, call: Option<OwnedFd>) -> std::result::Result<Option<u64>, Fault> {
        let mut registers = self.lock();
        let queue = Self::queue(&mut registers, index)?;
        Ok(match queue.running() {
            Some(handle) => {
                let done = self.pool.events().completion();
                let token = done.token();
                let call = Call::eventfd(call);
                handle.set_call(call.clone(), done);
                queue.wires.1 = call.fd;
                Some(token)
            }
            None => {
                queue.call = call;
                None
            }
        })
    }

    /// Has a queue's ring looked at: the device can do with another request ([`Device::may_take`]).
    pub fn look(&self, index: u16) {
        let registers = self.lock();
        if let Some(handle) = registers.queues.get(usize::from(index)).and_then(Queue::running) {
            handle.look();
        }
    }

    /// Whether an index is one of [`Device::doorbells`].
    fn is_doorbell(&self, index: u64) -> bool {
        index >= u64::from(self.device.queues()) && self.device.doorbells().is_some()
    }

    /// Whether all of the device works: rings of all queues run and (over vhost-user) every index may.
    pub fn ready(&self) -> bool {
        !self.owner.is_broken() && Self::all_run(&self.lock(), &*self.device)
    }

    fn all_run(registers: &Registers, device: &dyn Device) -> bool {
        let devices = usize::from(device.queues());
        let rings = registers
            .queues
            .iter()
            .take(devices)
            .all(|queue| queue.running().is_some());
        let features = registers.driver_features;
        rings
            && !registers.draining
            && match registers.front {
                Some(Front::VhostUser) => registers.queues.iter().all(|queue| queue.may_run(features)),
                Some(_) => registers.status & status::DRIVER_OK != 0 && registers.resetting.is_none(),
                None => false,
            }
    }

    /// A queue's counters; those of no queue at all for an index out of range.
    pub fn queue_stats(&self, index: u16) -> Arc<QueueStats> {
        self.lock()
            .queues
            .get(usize::from(index))
            .map(|queue| Arc::clone(&queue.stats))
            .unwrap_or_default()
    }

    /// How long its queues may be polled when they are empty.
    pub fn poll(&self) -> Duration {
        self.poll
    }

    /// Checks a queue index.
    ///
    /// # Errors
    /// `vring.index`.
    pub fn check_queue(&self, index: u64) -> std::result::Result<(), Fault> {
        Self::queue(&mut self.lock(), index).map(|_| ())
    }

    /// Allows or forbids a ring to take requests.
    ///
    /// # Errors
    /// `vring.index`, and what starting finds wrong.
    pub fn enable_queue(&self, index: u64, on: bool) -> std::result::Result<Option<u64>, Fault> {
        let mut registers = self.lock();
        let queue = Self::queue(&mut registers, index)?;
        queue.enabled = on;
        if let Some(handle) = queue.running() {
            let done = self.pool.events().completion();
            let token = done.token();
            handle.enable(on, done);
            self.device.rings_changed(Self::all_run(&registers, &*self.device));
            return Ok(Some(token));
        }
        self.try_start(&mut registers, index)?;
        self.device.rings_changed(Self::all_run(&registers, &*self.device));
        Ok(None)
    }

    /// Starts a ring that has everything it needs. Over vhost-user that is addresses and a kick fd, and whether it takes
    /// requests is `enabled`. For a PCI function the driver's registers say.
    fn try_start(&self, registers: &mut Registers, index: u64) -> std::result::Result<(), Fault> {
        let map = Arc::clone(&registers.map);
        let driver_features = registers.driver_features;
        let packed = driver_features & feature::RING_PACKED != 0;
        let vhost_user = registers.front == Some(Front::VhostUser);
        let doorbells = self
            .device
            .doorbells()
            .map_or(u64::MAX, |_| u64::from(self.device.queues()));
        if !vhost_user && !registers.may_start(index, doorbells) {
            return Ok(());
        }
        let log = registers.active_log();
        let size = usize::try_from(index)
            .ok()
            .and_then(|index| registers.queues.get(index));
        let record = size.and_then(|queue| registers.record(index, queue.size, packed));
        let lines = &registers.lines;
        let count = registers.queues.len();
        let queue = usize::try_from(index)
            .ok()
            .and_then(|index| registers.queues.get_mut(index))
            .ok_or_else(|| Fault::new("vring.index", format!("queue {index} of {count}")))?;
        if !matches!(queue.run, Run::Stopped) || map.is_empty() {
            return Ok(());
        }
        let doorbell = self.is_doorbell(index);
        if doorbell {
            let (kick, call) = match queue.kick.take() {
                Some(kick) => (Some(Arc::new(kick)), Call::eventfd(queue.call.take())),
                None if vhost_user => return Ok(()),
                None => (None, lines.call(queue.vector, KICK_ISR)),
            };
            queue.wires = (kick.clone(), call.fd.clone().filter(|_| vhost_user));
            let handle = DoorbellHandle {
                device: Arc::clone(&self.device),
                pool: Arc::clone(&self.pool),
                index: (index - u64::from(self.device.queues())) as u16,
                kick: Mutex::new(kick),
                call: Mutex::new(call),
            };
            handle.connect(!vhost_user || queue.may_run(driver_features));
            queue.starts += 1;
            queue.run = Run::Running(Handle::Doorbell(handle));
            return Ok(());
        }
        let Some(addresses) = queue.addresses else {
            return Ok(());
        };
        if vhost_user && queue.kick.is_none() {
            return Ok(());
        }
        let space = if vhost_user {
            AddressSpace::User
        } else {
            AddressSpace::Guest
        };
        let on_queue = |fault: Fault| fault.on_queue(index as u16);
        // Where the driver may have put anything into memory that can't be mapped, a worker would have to wait.
        let remote = map.needs_remote();
        let map = if remote { Arc::new(map.with_shadows()) } else { map };
        // Before anything is taken: a ring that isn't in memory yet keeps everything for the next try.
        resolve(&map, space, addresses, queue.size, driver_features).map_err(on_queue)?;
        if queue.from_used && remote {
            let reason = "a migrated ring in memory that came without an fd: its used index can't be asked for";
            return Err(on_queue(Fault::new("ring.position", reason)));
        }
        if queue.from_used {
            let used = split::used_idx(&map, space, addresses, queue.size, MAX_QUEUE_SIZE).map_err(on_queue)?;
            queue.position = Some(u32::from(used));
        }
        let (kick, call) = if vhost_user {
            let Some(kick) = queue.kick.take() else { return Ok(()) };
            let (kick, call) = (Arc::new(kick), Call::eventfd(queue.call.take()));
            queue.wires = (Some(Arc::clone(&kick)), call.fd.clone());
            (kick, call)
        } else {
            let bell = sys::eventfd()
                .map_err(|e| on_queue(Fault::new("vring.kick", format!("no eventfd for notifications: {e}"))))?;
            let bell = Arc::new(bell);
            queue.bell = Some(Arc::clone(&bell));
            (bell, lines.call(queue.vector, QUEUE_ISR))
        };
        let device = match &self.admin {
            Some(admin) if index >= u64::from(self.device.queues()) => &admin.device,
            _ => &self.device,
        };
        if std::mem::take(&mut queue.begins_anew) {
            if let Some(area) = &record {
                inflight::clear(area);
            }
        }
        let setup = QueueSetup {
            index: index as u16,
            size: queue.size,
            addresses,
            space,
            position: queue.position.unwrap_or_else(|| fresh_position(packed)),
            driver_features,
            // Without a record it is the used index that tells the next process what is done.
            ordered: driver_features & feature::IN_ORDER != 0 || (vhost_user && record.is_none()),
            inflight: record,
            log,
            call,
            stats: Arc::clone(&queue.stats),
        };
        let enabled = !vhost_user || queue.may_run(driver_features);
        let (owner, device) = (Arc::clone(&self.owner), Arc::clone(device));
        let handle = if remote {
            let start = RemoteStart {
                owner,
                device,
                map,
                setup,
                kick,
                enabled,
            };
            let started = RemoteRunner::start(start).map_err(|error| match error {
                Error::Fault(fault) => fault,
                other => on_queue(Fault::new("ring.thread", format!("no thread for the queue: {other}"))),
            })?;
            Handle::Thread(started)
        } else {
            let mut runner = Runner::new(device, map, setup)?;
            if let Some(inflight) = &registers.inflight {
                // A member that does nothing should cost nothing; of this page it has read and written the head.
                inflight.area.rest();
            }
            if index < u64::from(self.device.queues()) {
                runner.set_poll(self.poll);
            }
            Handle::Worker(self.pool.start(Start {
                owner,
                runner,
                kick,
                enabled,
            }))
        };
        queue.from_used = false;
        queue.starts += 1;
        queue.run = Run::Running(handle);
        let continues = std::mem::take(&mut queue.continues);
        if vhost_user {
            self.device.ring_starts(index as u16, continues);
        }
        Ok(())
    }

    /// Starts all rings of a PCI function that may run and don't yet. One that can't marks the member broken.
    fn start_ready(&self, registers: &mut Registers) {
        for index in 0..registers.queues.len() as u64 {
            if let Err(fault) = self.try_start(registers, index) {
                self.owner.break_it(fault);
            }
        }
        self.tell_ready(registers);
    }

    /// A PCI function's device learns that all of its rings run; that they don't any more it learns by a reset.
    fn tell_ready(&self, registers: &Registers) {
        if Self::all_run(registers, &*self.device) {
            self.device.rings_changed(true);
        }
    }

    /// Replaces all of guest memory.
    ///
    /// # Errors
    /// `memory.*`, and what starting a waiting ring finds wrong.
    pub fn set_memory(&self, regions: Vec<Region>) -> std::result::Result<Option<u64>, Fault> {
        let mut map = MemoryMap::default();
        for region in regions {
            map = map.with(region)?;
        }
        self.replace_memory(&mut self.lock(), map, true)
    }

    /// Adds a region of guest memory.
    ///
    /// # Errors
    /// `memory.*`, and what starting a waiting ring finds wrong.
    pub fn add_memory(&self, region: Region) -> std::result::Result<Option<u64>, Fault> {
        let mut registers = self.lock();
        let map = registers.map.with(region)?;
        self.replace_memory(&mut registers, map, false)
    }

    /// As `add_memory`, for those who need no event: workers learn of the region in their own time.
    ///
    /// # Errors
    /// `memory.*`.
    pub fn add_function_memory(&self, region: Region) -> std::result::Result<(), Fault> {
        let mut registers = self.lock();
        let map = Arc::new(registers.map.with(region)?);
        registers.map = Arc::clone(&map);
        for handle in registers.queues.iter().filter_map(Queue::running) {
            handle.set_memory(Arc::clone(&map), Completion::call(|| {}));
        }
        for index in 0..registers.queues.len() as u64 {
            match self.try_start(&mut registers, index) {
                Ok(()) => {}
                // The one with the ring may be the next.
                Err(fault) if fault.rule == "ring.address" => {}
                Err(fault) => self.owner.break_it(fault),
            }
        }
        self.tell_ready(&registers);
        Ok(())
    }

    /// Removes a region of guest memory. When the returned completion has ended, no worker looks there any more (I/O
    /// already in flight into it may still end; the mapping stays until then).
    ///
    /// # Errors
    /// `memory.unknown-region`.
    pub fn remove_memory(&self, guest: u64, size: u64, user: u64) -> std::result::Result<Option<u64>, Fault> {
        let mut registers = self.lock();
        let map = registers.map.without(guest, size, user)?;
        self.replace_memory(&mut registers, map, false)
    }

    /// As `remove_memory`, with something of the caller's own instead of an event: `done` ends when no worker looks there any
    /// more.
    ///
    /// # Errors
    /// `memory.unknown-region`.
    pub fn remove_memory_then(
        &self,
        guest: u64,
        size: u64,
        user: u64,
        done: Completion,
    ) -> std::result::Result<(), Fault> {
        self.with(|registers, last| {
            let map = Arc::new(registers.map.without(guest, size, user)?);
            registers.map = Arc::clone(&map);
            for queue in &registers.queues {
                match &queue.run {
                    Run::Stopped => {}
                    Run::Running(handle) => handle.set_memory(Arc::clone(&map), done.clone()),
                    // It takes nothing any more, but what it has taken may still be written there.
                    Run::Stopping(handle) => handle.stop(done.clone()),
                }
            }
            *last = Some(done);
            Ok(())
        })
    }

    fn replace_memory(
        &self,
        registers: &mut Registers,
        map: MemoryMap,
        whole: bool,
    ) -> std::result::Result<Option<u64>, Fault> {
        let map = Arc::new(map);
        registers.map = Arc::clone(&map);
        let token = self.tell_running(registers, |handle, done| handle.set_memory(Arc::clone(&map), done));
        // Rings that had everything but memory.
        for index in 0..registers.queues.len() as u64 {
            match self.try_start(registers, index) {
                // Regions come one by one: the one with the ring may be the next.
                Err(fault) if !whole && fault.rule == "ring.address" => {}
                started => started?,
            }
        }
        Ok(token)
    }

    /// Whether the driver can see the device work: some ring runs, and (where the front end tells) DRIVER_OK is set.
    pub fn live(&self, has_status: bool) -> bool {
        let registers = self.lock();
        (!has_status || registers.status & status::DRIVER_OK != 0)
            && registers
                .queues
                .iter()
                .any(|queue| queue.running().is_some() && queue.may_run(registers.driver_features))
    }

    /// Everything about the member, for people.
    pub fn info(&self) -> Info {
        let broken = self.owner.fault();
        let registers = self.lock();
        let device_features = match registers.front {
            None | Some(Front::VhostUser) if self.id() != 0 => self.offered_over_vhost_user(registers.assigned),
            _ => self.function_features(&registers),
        };
        let running = registers.queues.iter().any(|queue| queue.running().is_some());
        let state = match () {
            () if registers.draining => "draining",
            () if broken.is_some() => "broken",
            () if running => "running",
            () if registers.attached => "attached",
            () => "detached",
        };
        let broken_bit = if broken.is_some() { status::NEEDS_RESET } else { 0 };
        Info {
            state,
            broken,
            last_error: self.owner.last_fault(),
            connections: registers.connections,
            device_features,
            driver_features: registers.driver_features & !feature::PROTOCOL_FEATURES,
            features_written: registers.features_written,
            protocol_features: registers.protocol_features,
            status: registers.resetting.unwrap_or(registers.status) | broken_bit,
            queues: registers
                .queues
                .iter()
                .map(|queue| QueueInfo {
                    size: queue.size,
                    started: queue.running().is_some(),
                    enabled: queue.may_run(registers.driver_features),
                    worker: queue.running().and_then(Handle::worker),
                    addresses: queue.addresses,
                    next_avail: match queue.running() {
                        Some(_) => queue.stats.last_avail.load(Ordering::Relaxed),
                        None => queue.position.unwrap_or(0) as u16,
                    },
                    stats: Arc::clone(&queue.stats),
                })
                .collect(),
            front: registers.front,
            stopped: registers.stopped,
            isr: registers.lines.isr.load(Ordering::Relaxed),
            msix_enabled: registers.lines.msix_enabled,
            assigned: registers.assigned,
            config_generation: registers.config_generation,
            inflight_tracking: registers.inflight.is_some(),
            dirty_log: registers.active_log().is_some(),
            memory: registers
                .map
                .regions()
                .iter()
                .map(|region| RegionInfo {
                    guest: region.guest,
                    size: region.size,
                    user: region.user,
                    mmap_offset: region.mmap_offset,
                })
                .collect(),
        }
    }
}

/// Checks that a ring's areas are memory.
fn resolve(
    map: &Arc<MemoryMap>,
    space: AddressSpace,
    addresses: RingAddresses,
    size: u16,
    features: u64,
) -> std::result::Result<(), Fault> {
    let packed = features & feature::RING_PACKED != 0;
    any::resolve(map, space, addresses, size, MAX_QUEUE_SIZE, packed).map(|_| ())
}

fn running(index: u64) -> Fault {
    Fault::new("vring.running", "the ring runs; stop it with GET_VRING_BASE first").on_queue(index as u16)
}
