// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtio-vhost-user device (v5; design D8): a guest's driver is the slave of a vhost-user master outside.
//!
//! What the device is, without sockets: configuration, rxq and txq, doorbells and kick notifications ([`bell`]), shared
//! memory ([`layout`]), and the rules of the messages that are passed on ([`message`]). Whoever owns the master's socket (the
//! relay) hands whole messages in and takes out what goes to the master; [`Event::Relay`] says that there is something.
//!
//! The same device has two carriers (docs/VIRTIO-VHOST-USER.md). As a PCI function of ours everything above is registers and
//! BARs. Behind QEMU's vhost-user device rings, doorbells and notifications are virtqueues' kick and call descriptors, and
//! shared memory has to be mapped by the front end: then [`VvuDevice::master_message`] returns what to map before the message may
//! be seen by the driver.
//!
//! Locks: the device's own is taken with the member's held ([`Device::reset`] and its like), never the other way round.

pub mod bell;
pub mod layout;
pub mod message;

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::device::{ConfigField, Device, Doorbells, QueueContext, Request, SharedMemory, Step};
use crate::error::{Error, Fault, Result};
use crate::event::Event;
use crate::member::{feature, Front, Member};
use crate::memory::{MemoryMap, Region};
use crate::runner::Call;
use crate::sys::{self, PeerFd};
use crate::worker::Pool;

use bell::Bell;
use layout::{Direct, FileId, Place, Wanted, Window};
use message::{Header, Meaning, HEADER, MAX_PAYLOAD};

/// Virtio device id of the v5 series.
pub const DEVICE_ID: u32 = 32;
/// Bytes of the configuration: status u32, max_vhost_queues u32, uuid.
pub const CONFIG_SIZE: usize = 24;
/// Status: the slave is there; a master may connect.
pub const SLAVE_UP: u32 = 1;
/// Status: a master is connected.
pub const MASTER_UP: u32 = 2;
/// Most vhost-user queues: QEMU names at most 256 virtqueues in its messages, and there are 2N + 3.
pub const MAX_QUEUES: u16 = 126;
/// Entries of rxq and txq, at most.
pub const QUEUE_SIZE: u16 = 64;
/// Messages of the slave that wait for the relay; more stay in txq.
const TX_WAITING: usize = 16;
/// Requests of the master that are remembered until they are answered. Of those that need no answer, and get none, the oldest
/// are forgotten.
const OUTSTANDING: usize = 64;

const RXQ: u16 = 0;
const TXQ: u16 = 1;

const FIELDS: [ConfigField; 3] = [
    ConfigField {
        name: "status",
        offset: 0,
        size: 4,
    },
    ConfigField {
        name: "max_vhost_queues",
        offset: 4,
        size: 4,
    },
    ConfigField {
        name: "uuid",
        offset: 8,
        size: 16,
    },
];

/// How a device is to be.
pub struct Options {
    /// max_vhost_queues.
    pub max_queues: u16,
    /// Nil: none.
    pub uuid: [u8; 16],
    /// Bytes of the shared memory region, a power of two.
    pub shared_memory: u64,
    /// The file that its first bytes show for good, and how many: the RAM of the one VM that will be the master's guest.
    pub ram_file: Option<(OwnedFd, u64)>,
}

/// Something that the front end of the device itself has to do with its view of the shared memory region.
pub struct Operation {
    /// Map rather than unmap.
    pub map: bool,
    /// Where in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// The file to map.
    pub fd: Arc<OwnedFd>,
    /// Where in the file.
    pub fd_offset: u64,
    shown: Shown,
    /// Resets before it was made: each has dropped all mappings.
    epoch: u64,
}

/// What a message of the master leaves to do.
#[derive(Default)]
pub struct Taken {
    /// To be carried out one by one, each followed by [`VvuDevice::carried_out`]; then [`VvuDevice::commit`]. If there are
    /// none the message is on its way.
    pub operations: Vec<Operation>,
    /// The channel for requests of the slave.
    pub channel: Option<OwnedFd>,
}

/// A message for the master.
pub struct Outgoing {
    /// It goes to the channel for requests of the slave.
    pub channel: bool,
    /// Header and payload.
    pub bytes: Vec<u8>,
}

/// Memory of the master in the region.
#[derive(Clone)]
struct Shown {
    offset: u64,
    wanted: Wanted,
    fd: Arc<OwnedFd>,
    region: Region,
    log: bool,
}

impl Shown {
    fn end(&self) -> u64 {
        // Compared with the region's size when it was placed.
        self.offset + self.wanted.size
    }

    fn same(&self, other: &Shown) -> bool {
        self.offset == other.offset
            && self.wanted.size == other.wanted.size
            && self.wanted.file == other.wanted.file
            && self.wanted.mmap_offset == other.wanted.mmap_offset
    }

    fn operation(&self, map: bool, epoch: u64) -> Operation {
        Operation {
            shown: self.clone(),
            epoch,
            map,
            offset: self.offset,
            size: self.wanted.size,
            fd: Arc::clone(&self.fd),
            fd_offset: self.wanted.mmap_offset,
        }
    }
}

/// A message, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastMessage {
    /// "master" or "slave": who sent it.
    pub from: &'static str,
    /// Request.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Bytes of the payload.
    pub size: u32,
}

impl LastMessage {
    fn new(from: &'static str, header: Header) -> Self {
        Self {
            from,
            request: header.request,
            flags: header.flags,
            size: header.size,
        }
    }
}

/// A master that is connected.
#[derive(Default)]
struct Master {
    /// Requests that may be answered, in their order.
    outstanding: VecDeque<u32>,
    /// Protocol features that the slave has offered, as the master was told.
    protocol_offered: Option<u64>,
    protocol_slave: Option<u64>,
    protocol_accepted: Option<u64>,
    features_offered: Option<u64>,
    features_accepted: Option<u64>,
    has_channel: bool,
    /// A message that the driver may see when the region is as it says, and what is to be there then.
    held: Option<(Vec<u8>, Vec<Shown>)>,
}

#[derive(Default)]
struct State {
    slave_up: bool,
    master: Option<Master>,
    generation: u64,
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Outgoing>,
    shown: Vec<Shown>,
    window: Arc<MemoryMap>,
    /// Over vhost-user: all rings run.
    ready: bool,
    /// Over vhost-user: rings were stopped, and whether by a pause or by a reset isn't known yet.
    paused: bool,
    resets: u64,
    /// Times the front end has dropped its mappings by itself.
    epoch: u64,
    last: Option<LastMessage>,
    last_error: Option<Fault>,
}

/// Numbers of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages of masters.
    pub from_master: u64,
    /// Messages of slaves that were passed on.
    pub from_slave: u64,
    /// Messages of slaves that were discarded.
    pub discarded: u64,
    /// Masters that were connected.
    pub masters: u64,
}

#[derive(Default)]
struct Counters {
    from_master: AtomicU64,
    from_slave: AtomicU64,
    discarded: AtomicU64,
    masters: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Doorbells and notifications of one vhost-user queue: how often each was rung, and how often in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueBells {
    /// Kicks of the master.
    pub kick: (u64, u64),
    /// Calls of the slave.
    pub call: (u64, u64),
    /// Errors told by the slave.
    pub err: (u64, u64),
    /// The master has given descriptors for call and err.
    pub connected: (bool, bool),
}

/// Memory that the driver can see, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownInfo {
    /// The master's guest's physical address; 0 for the log.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
    /// Where it is in the shared memory region.
    pub offset: u64,
    /// It is the log.
    pub log: bool,
}

/// State of a device, for people.
#[derive(Clone, Debug)]
pub struct Info {
    /// The status field.
    pub status: u32,
    /// Driver and rings are ready.
    pub ready: bool,
    /// Over vhost-user: stopped, perhaps only paused.
    pub paused: bool,
    /// Times the slave's side was reset.
    pub resets: u64,
    /// Feature bits of the slave, as it offered them.
    pub features_offered: Option<u64>,
    /// Feature bits that the master accepted.
    pub features_accepted: Option<u64>,
    /// Protocol features of the slave.
    pub protocol_slave: Option<u64>,
    /// What the master was told of them.
    pub protocol_offered: Option<u64>,
    /// Protocol features that the master accepted.
    pub protocol_accepted: Option<u64>,
    /// The slave may send requests.
    pub has_channel: bool,
    /// Shared memory.
    pub memory: Vec<ShownInfo>,
    /// Messages for the slave that wait in front of rxq.
    pub waiting: usize,
    /// The last message.
    pub last: Option<LastMessage>,
    /// Why the last session ended, if something was wrong.
    pub last_error: Option<Fault>,
    /// Numbers.
    pub counts: Counts,
    /// Bells of queues.
    pub queues: Vec<QueueBells>,
    /// The log's doorbell.
    pub log_bell: (u64, u64),
}

/// The device.
pub struct VvuDevice {
    id: u32,
    pool: Arc<Pool>,
    max_queues: u16,
    uuid: [u8; 16],
    window: Window,
    ram_file: Option<(Arc<OwnedFd>, u64)>,
    /// What of the region is there without a master: the RAM file.
    always: Arc<MemoryMap>,
    member: OnceLock<Weak<Member>>,
    state: Mutex<State>,
    kicks: Vec<Arc<Bell>>,
    calls: Vec<Arc<Bell>>,
    errs: Vec<Arc<Bell>>,
    log: Arc<Bell>,
    counters: Counters,
}

fn file_id(fd: &OwnedFd) -> std::result::Result<FileId, Fault> {
    let info = sys::file_info(fd.as_fd())
        .map_err(|e| Fault::new("memory.fd-kind", format!("the region's fd can't be examined: {e}")))?;
    Ok(FileId {
        dev: info.dev,
        ino: info.ino,
    })
}

impl VvuDevice {
    /// A device, before anybody drives it. [`VvuDevice::bind`] comes next.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn new(pool: Arc<Pool>, id: u32, options: Options) -> Result<Arc<Self>> {
        let Options {
            max_queues,
            uuid,
            shared_memory,
            ram_file,
        } = options;
        if !(1..=MAX_QUEUES).contains(&max_queues) {
            return Err(Error::Invalid(format!(
                "{max_queues} vhost-user queues; 1 to {MAX_QUEUES} are possible"
            )));
        }
        if !shared_memory.is_power_of_two() || shared_memory < layout::PAGE {
            return Err(Error::Invalid(format!(
                "a shared memory region of {shared_memory} bytes; a power of two from {} on is possible",
                layout::PAGE
            )));
        }
        let mut direct = None;
        let mut always = MemoryMap::default();
        if let Some((fd, len)) = &ram_file {
            // Clients map it: they can do so in pages of its file system.
            let page = sys::backing_page_size(fd.as_fd()).unwrap_or(layout::PAGE);
            if *len == 0 || len % page != 0 || *len > shared_memory {
                return Err(Error::Invalid(format!(
                    "a RAM file of {len} bytes; whole pages of {page} up to {shared_memory} bytes are possible"
                )));
            }
            let ours = fd
                .try_clone()
                .map_err(|_| Error::last_os("duplicating the RAM file's fd"))?;
            always = always.with(pool.mappings().region(&ours.into(), 0, *len, 0, 0)?)?;
            direct = Some(Direct {
                file: file_id(fd)?,
                len: *len,
            });
        }
        let always = Arc::new(always);
        let state = State {
            window: Arc::clone(&always),
            ..State::default()
        };
        let bells = || (0..max_queues).map(|_| Arc::default()).collect();
        Ok(Arc::new(Self {
            id,
            pool,
            max_queues,
            uuid,
            window: Window {
                size: shared_memory,
                direct,
            },
            ram_file: ram_file.map(|(fd, len)| (Arc::new(fd), len)),
            member: OnceLock::new(),
            always,
            state: Mutex::new(state),
            kicks: (0..max_queues).map(|_| Arc::new(Bell::patient())).collect(),
            calls: bells(),
            errs: bells(),
            log: Arc::default(),
            counters: Counters::default(),
        }))
    }

    /// Says whose device it is; once.
    pub fn bind(&self, member: &Arc<Member>) {
        let _ = self.member.set(Arc::downgrade(member));
    }

    /// max_vhost_queues.
    pub fn max_queues(&self) -> u16 {
        self.max_queues
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn member(&self) -> Option<Arc<Member>> {
        self.member.get().and_then(Weak::upgrade)
    }

    fn tell_relay(&self) {
        self.pool.events().push(Event::Relay { member: self.id });
    }

    fn look(&self, queue: u16) {
        if let Some(member) = self.member() {
            member.look(queue);
        }
    }

    fn status(state: &State) -> u32 {
        let slave = if state.slave_up { SLAVE_UP } else { 0 };
        slave | if state.master.is_some() { MASTER_UP } else { 0 }
    }

    // --- the relay ----------------------------------------------------------------------------------------

    /// Whether the driver has set SLAVE_UP and can be reached.
    pub fn slave_up(&self) -> bool {
        // The member first: never with the device's lock held.
        self.ready() && self.lock().slave_up
    }

    /// Whether rings run, so that the driver and the front end can be sent something. False after a stop until the next start,
    /// and from a fault of the driver's to its reset.
    pub fn ready(&self) -> bool {
        self.member().is_some_and(|member| member.ready())
    }

    /// The number of the connected master's session.
    pub fn session(&self) -> Option<u64> {
        let state = self.lock();
        state.master.is_some().then_some(state.generation)
    }

    /// What an earlier master has left in the shared memory region. It stays until the driver is ready for the next one, since
    /// it may still be looking there. To be carried out as what `master_message` returns.
    pub fn leftovers(&self) -> Vec<Operation> {
        let remote = self.maps_remotely();
        let mut state = self.lock();
        if state.master.is_some() {
            return Vec::new();
        }
        if !remote {
            self.clear_window(&mut state);
        }
        state
            .shown
            .iter()
            .map(|shown| shown.operation(false, state.epoch))
            .collect()
    }

    /// A master has connected. Returns the number of its session.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub fn connect_master(&self) -> Result<u64> {
        if !self.slave_up() {
            return Err(Error::Busy(self.id, "the slave isn't up"));
        }
        let generation = {
            let mut state = self.lock();
            if state.master.is_some() {
                return Err(Error::Busy(self.id, "another master is connected"));
            }
            if !state.slave_up {
                return Err(Error::Busy(self.id, "the slave isn't up"));
            }
            state.master = Some(Master::default());
            state.generation += 1;
            state.rx.clear();
            state.tx.clear();
            state.last_error = None;
            state.generation
        };
        count(&self.counters.masters);
        self.config_changed();
        Ok(generation)
    }

    /// A PCI function's driver is told by us; one behind a vhost-user front end by the relay.
    fn config_changed(&self) {
        if let Some(member) = self.member() {
            member.config_changed();
        }
    }

    /// The master has gone, or is sent away because of `fault`: the slave goes down with it and may come up again. False when
    /// it has gone before.
    pub fn disconnect_master(&self, session: u64, fault: Option<Fault>) -> bool {
        {
            let mut state = self.lock();
            if state.master.is_none() || state.generation != session {
                return false;
            }
            if fault.is_some() {
                state.last_error = fault;
            }
            state.slave_up = false;
            self.drop_master(&mut state);
        }
        // What txq still holds was said to this master: it is discarded before the next one is there.
        self.look(TXQ);
        self.config_changed();
        true
    }

    fn drop_master(&self, state: &mut State) {
        state.master = None;
        state.rx.clear();
        state.tx.clear();
        self.silence();
    }

    /// Kicks, calls and errors of the master end.
    fn silence(&self) {
        for bell in &self.kicks {
            bell.set_from(&self.pool, None);
        }
        for bell in self.calls.iter().chain(&self.errs) {
            bell.set_to(None);
        }
        self.log.set_to(None);
    }

    /// Takes a message of the master's; its descriptors are consumed.
    ///
    /// # Errors
    /// `message.*`, `vring.*`, `memory.*`, `shared-memory.*`, `protocol-features.not-offered`, `slave-channel`: the master is
    /// to be sent away.
    pub fn master_message(
        &self,
        session: u64,
        header: &[u8; HEADER],
        payload: &[u8],
        fds: Vec<PeerFd>,
    ) -> std::result::Result<Taken, Fault> {
        let head = Header::of(header);
        head.check(payload.len())?;
        let meaning = message::meaning(&head, payload, fds.len())?;
        let bytes = [header, payload].concat();
        let remote = self.maps_remotely();
        let mut taken = Taken::default();
        {
            let mut state = self.lock();
            state.last = Some(LastMessage::new("master", head));
            count(&self.counters.from_master);
            let state = &mut *state;
            let gone = || Fault::new("message.order", "a message of a master that isn't connected");
            let master = match &mut state.master {
                Some(master) if state.generation == session => master,
                _ => return Err(gone()),
            };
            if master.held.is_some() {
                return Err(Fault::new(
                    "message.order",
                    "a message while the last one still waits for its memory",
                ));
            }
            if message::may_be_answered(&head) {
                if master.outstanding.len() >= OUTSTANDING {
                    master.outstanding.pop_front();
                }
                master.outstanding.push_back(head.request);
            }
            let mut forward = true;
            match meaning {
                Meaning::Plain => {}
                Meaning::Features => master.features_accepted = Some(message::quad(payload, 0)),
                Meaning::ProtocolFeatures => {
                    let accepted = message::quad(payload, 0);
                    // Without having asked it can't know of any.
                    let offered = master.protocol_offered.unwrap_or(0);
                    if accepted & !offered != 0 {
                        return Err(Fault::new(
                            "protocol-features.not-offered",
                            format!("protocol features {accepted:#x} accepted, of {offered:#x} offered"),
                        ));
                    }
                    master.protocol_accepted = Some(accepted);
                }
                Meaning::Channel => {
                    let fd = fds.into_iter().next().and_then(PeerFd::into_unix_stream);
                    taken.channel =
                        Some(fd.ok_or_else(|| Fault::new("slave-channel", "the fd is not a UNIX stream socket"))?);
                    master.has_channel = true;
                }
                Meaning::LogBell => {
                    let fd = fds.into_iter().next().and_then(PeerFd::into_eventfd);
                    let fd = fd.ok_or_else(|| Fault::new("log.fd", "the fd is not an eventfd"))?;
                    self.log.set_to(Some(Call::eventfd(Some(fd))));
                }
                Meaning::Kick | Meaning::Call | Meaning::Err => self.vring_fd(meaning, payload, fds)?,
                Meaning::Memory => {
                    let (rewritten, mut wanted) = self.memory_table(bytes.clone(), payload, &fds)?;
                    let end = wanted.last().map_or(0, Shown::end);
                    for log in state.shown.iter().filter(|shown| shown.log) {
                        if log.offset < end {
                            let logging = |features: u64| features & feature::LOG_ALL != 0;
                            if !master.features_accepted.is_some_and(logging) {
                                // Of a migration that came to nothing: it is unmapped.
                                continue;
                            }
                            return Err(Fault::new(
                                "shared-memory.log-overlap",
                                "memory grows over the place of the log in the shared memory region",
                            ));
                        }
                        wanted.push(log.clone());
                    }
                    taken.operations = self.show(state, rewritten, wanted, remote)?;
                    forward = false;
                }
                Meaning::Log => {
                    let mut wanted: Vec<Shown> = state.shown.iter().filter(|shown| !shown.log).cloned().collect();
                    let cursor = wanted.iter().map(Shown::end).max().unwrap_or(0);
                    let (rewritten, log) = self.log_area(bytes.clone(), payload, &fds, cursor)?;
                    wanted.push(log);
                    taken.operations = self.show(state, rewritten, wanted, remote)?;
                    forward = false;
                }
            }
            if forward {
                state.rx.push_back(bytes);
            }
        }
        if taken.operations.is_empty() {
            self.look(RXQ);
        }
        Ok(taken)
    }

    fn vring_fd(&self, meaning: Meaning, payload: &[u8], fds: Vec<PeerFd>) -> std::result::Result<(), Fault> {
        let value = message::quad(payload, 0);
        if value & !(0xff | message::NO_FD) != 0 {
            return Err(Fault::new(
                "vring.fd",
                format!("{meaning:?} with payload {value:#x}; 9 bits are defined"),
            ));
        }
        let index = (value & 0xff) as u16;
        if index >= self.max_queues {
            return Err(Fault::new(
                "vring.index",
                format!("{meaning:?} of queue {index}; there are {}", self.max_queues),
            ));
        }
        if (value & message::NO_FD != 0) != fds.is_empty() {
            return Err(Fault::new(
                "message.fds",
                format!("{meaning:?} with payload {value:#x} and {} fds", fds.len()),
            )
            .on_queue(index));
        }
        let fd = fds
            .into_iter()
            .next()
            .map(|fd| {
                fd.into_eventfd()
                    .map(Arc::new)
                    .ok_or_else(|| Fault::new("vring.fd", "the fd is not an eventfd").on_queue(index))
            })
            .transpose()?;
        let index = usize::from(index);
        let to = |fd| Some(Call { fd, isr: None });
        match meaning {
            Meaning::Kick => self.kicks[index].set_from(&self.pool, fd),
            Meaning::Call => self.calls[index].set_to(to(fd)),
            _ => self.errs[index].set_to(to(fd)),
        }
        Ok(())
    }

    /// Memory that a message describes: checked, and mapped here.
    fn wanted(
        &self,
        fd: &PeerFd,
        wanted: [u64; 3],
        place: impl FnOnce(&Wanted) -> std::result::Result<Place, Fault>,
        log: bool,
    ) -> std::result::Result<(Shown, u64), Fault> {
        let [guest, size, mmap_offset] = wanted;
        let file = fd.memory_file().map_err(|why| Fault::new("memory.fd-kind", why))?;
        let wanted = Wanted {
            guest,
            size,
            mmap_offset,
            file: file_id(file)?,
        };
        let Place { offset, gap } = place(&wanted)?;
        let region = self.pool.mappings().region(fd, offset, size, offset, mmap_offset)?;
        let fd = file
            .try_clone()
            .map_err(|e| Fault::new("memory.fd-kind", format!("duplicating the region's fd: {e}")))?;
        let shown = Shown {
            offset,
            wanted,
            fd: Arc::new(fd),
            region,
            log,
        };
        Ok((shown, gap))
    }

    /// SET_MEM_TABLE: the message as the driver is to see it, and the regions.
    fn memory_table(
        &self,
        mut bytes: Vec<u8>,
        payload: &[u8],
        fds: &[PeerFd],
    ) -> std::result::Result<(Vec<u8>, Vec<Shown>), Fault> {
        const ROW: usize = 32;
        let rows = payload.get(8..).unwrap_or_default();
        let count = message::quad(payload, 0) & 0xffff_ffff;
        if payload.len() < 8 || rows.len() % ROW != 0 || count != (rows.len() / ROW) as u64 {
            return Err(Fault::new(
                "message.size",
                format!("SET_MEM_TABLE of {count} regions in {} bytes", payload.len()),
            ));
        }
        if fds.len() as u64 != count {
            return Err(Fault::new(
                "message.fds",
                format!("SET_MEM_TABLE of {count} regions with {} file descriptors", fds.len()),
            ));
        }
        let mut table = Vec::with_capacity(fds.len());
        for (row, fd) in rows.chunks_exact(ROW).zip(fds) {
            let file = fd.memory_file().map_err(|why| Fault::new("memory.fd-kind", why))?;
            table.push(Wanted {
                guest: message::quad(row, 0),
                size: message::quad(row, 8),
                mmap_offset: message::quad(row, 24),
                file: file_id(file)?,
            });
        }
        let places = self.window.table(&table)?;
        let mut shown = Vec::with_capacity(fds.len());
        for (index, ((fd, wanted), place)) in fds.iter().zip(&table).zip(&places).enumerate() {
            let place = *place;
            let numbers = [wanted.guest, wanted.size, wanted.mmap_offset];
            let (region, gap) = self.wanted(fd, numbers, |_| Ok(place), false)?;
            let at = HEADER + 8 + index * ROW + 24;
            bytes[at..at + 8].copy_from_slice(&gap.to_le_bytes());
            shown.push(region);
        }
        Ok((bytes, shown))
    }

    /// SET_LOG_BASE, likewise.
    fn log_area(
        &self,
        mut bytes: Vec<u8>,
        payload: &[u8],
        fds: &[PeerFd],
        cursor: u64,
    ) -> std::result::Result<(Vec<u8>, Shown), Fault> {
        let fd = fds
            .first()
            .ok_or_else(|| Fault::new("message.fds", "a log without its fd"))?;
        let numbers = [0, message::quad(payload, 0), message::quad(payload, 8)];
        let (log, gap) = self.wanted(fd, numbers, |wanted| self.window.log(cursor, wanted), true)?;
        let at = HEADER + 8;
        bytes[at..at + 8].copy_from_slice(&gap.to_le_bytes());
        Ok((bytes, log))
    }

    /// Whether the shared memory region is the front end's to fill.
    fn maps_remotely(&self) -> bool {
        self.member()
            .is_some_and(|member| member.front() == Some(Front::VhostUser))
    }

    /// Has the region show `wanted`, and then the driver see the message.
    fn show(
        &self,
        state: &mut State,
        bytes: Vec<u8>,
        wanted: Vec<Shown>,
        remote: bool,
    ) -> std::result::Result<Vec<Operation>, Fault> {
        let mut operations = Vec::new();
        if remote {
            let stays = |shown: &&Shown| !wanted.iter().any(|other| other.same(shown));
            operations.extend(
                state
                    .shown
                    .iter()
                    .filter(stays)
                    .map(|shown| shown.operation(false, state.epoch)),
            );
            let new = |shown: &&Shown| !state.shown.iter().any(|other| other.same(shown));
            operations.extend(
                wanted
                    .iter()
                    .filter(new)
                    .map(|shown| shown.operation(true, state.epoch)),
            );
        } else {
            let window = Arc::new(self.map_of(&wanted)?);
            let before = (
                std::mem::replace(&mut state.shown, wanted.clone()),
                std::mem::replace(&mut state.window, window),
            );
            if !before.0.is_empty() {
                sys::drop_later(before);
            }
        }
        if let Some(master) = &mut state.master {
            master.held = Some((bytes, wanted));
        }
        if operations.is_empty() {
            Self::release(state);
        }
        Ok(operations)
    }

    fn map_of(&self, shown: &[Shown]) -> std::result::Result<MemoryMap, Fault> {
        // What is in the RAM file is where it always is.
        let file = self.window.direct.map(|direct| direct.file);
        shown
            .iter()
            .filter(|shown| Some(shown.wanted.file) != file)
            .try_fold((*self.always).clone(), |map, shown| map.with(shown.region.clone()))
    }

    /// Nothing of a master's memory is to be seen any more.
    fn clear_window(&self, state: &mut State) {
        let memory = (
            std::mem::take(&mut state.shown),
            std::mem::replace(&mut state.window, Arc::clone(&self.always)),
        );
        if !memory.0.is_empty() {
            // It may be the last mapping of a guest that is gone: that takes a while, and a lock is held.
            sys::drop_later(memory);
        }
    }

    /// The message that was held back goes on; whoever calls this has rxq looked at.
    fn release(state: &mut State) {
        if let Some((bytes, wanted)) = state.master.as_mut().and_then(|master| master.held.take()) {
            // Descriptions of what stays where it was may have changed.
            state.shown = wanted;
            state.rx.push_back(bytes);
        }
    }

    /// The front end has mapped or unmapped this.
    pub fn carried_out(&self, operation: &Operation) {
        let mut state = self.lock();
        if state.epoch != operation.epoch {
            return;
        }
        if operation.map {
            // Also when the master has gone meanwhile: it is there, and has to be taken down before the next one's.
            state.shown.push(operation.shown.clone());
        } else {
            let place = |shown: &Shown| shown.offset == operation.offset && shown.wanted.size == operation.size;
            state.shown.retain(|shown| !place(shown));
        }
    }

    /// Everything a message asked for is mapped: the driver may see it.
    pub fn commit(&self, session: u64) {
        {
            let mut state = self.lock();
            if state.generation != session {
                return;
            }
            Self::release(&mut state);
        }
        self.look(RXQ);
    }

    /// Has rxq looked at, if there is something for it.
    pub fn push(&self) {
        if !self.lock().rx.is_empty() {
            self.look(RXQ);
        }
    }

    /// Takes an answer of the master's to a request of the slave's.
    ///
    /// # Errors
    /// `message.*`, `slave-channel`.
    pub fn channel_message(
        &self,
        session: u64,
        header: &[u8; HEADER],
        payload: &[u8],
    ) -> std::result::Result<(), Fault> {
        let head = Header::of(header);
        head.check(payload.len())?;
        if !head.is_reply() {
            return Err(Fault::new(
                "slave-channel",
                format!("request {} on the channel for the slave's requests", head.request),
            ));
        }
        {
            let mut state = self.lock();
            if state.master.is_none() || state.generation != session {
                return Ok(());
            }
            state.last = Some(LastMessage::new("master", head));
            count(&self.counters.from_master);
            state.rx.push_back([header, payload].concat());
        }
        self.look(RXQ);
        Ok(())
    }

    /// Messages that the driver hasn't taken yet. The relay reads no further one of the master's until there are none.
    pub fn waiting(&self) -> usize {
        let state = self.lock();
        let held = state.master.as_ref().is_some_and(|master| master.held.is_some());
        state.rx.len() + usize::from(held)
    }

    /// Takes what the slave has sent.
    pub fn take(&self) -> Vec<Outgoing> {
        let messages: Vec<_> = self.lock().tx.drain(..).collect();
        if messages.len() >= TX_WAITING {
            // Others may have been left in the ring.
            self.look(TXQ);
        }
        messages
    }

    /// Everything about the device, for people.
    pub fn info(&self) -> Info {
        let ready = self.ready();
        let state = self.lock();
        let master = state.master.as_ref();
        let queue = |index: usize| QueueBells {
            kick: self.kicks[index].counts(),
            call: self.calls[index].counts(),
            err: self.errs[index].counts(),
            connected: (self.calls[index].is_connected(), self.errs[index].is_connected()),
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Info {
            status: Self::status(&state),
            ready,
            paused: state.paused,
            resets: state.resets,
            features_offered: master.and_then(|master| master.features_offered),
            features_accepted: master.and_then(|master| master.features_accepted),
            protocol_slave: master.and_then(|master| master.protocol_slave),
            protocol_offered: master.and_then(|master| master.protocol_offered),
            protocol_accepted: master.and_then(|master| master.protocol_accepted),
            has_channel: master.is_some_and(|master| master.has_channel),
            memory: state
                .shown
                .iter()
                .map(|shown| ShownInfo {
                    guest: shown.wanted.guest,
                    size: shown.wanted.size,
                    mmap_offset: shown.wanted.mmap_offset,
                    offset: shown.offset,
                    log: shown.log,
                })
                .collect(),
            waiting: state.rx.len(),
            last: state.last.clone(),
            last_error: state.last_error.clone(),
            counts: Counts {
                from_master: read(&self.counters.from_master),
                from_slave: read(&self.counters.from_slave),
                discarded: read(&self.counters.discarded),
                masters: read(&self.counters.masters),
            },
            queues: (0..usize::from(self.max_queues)).map(queue).collect(),
            log_bell: self.log.counts(),
        }
    }

    // --- the slave ----------------------------------------------------------------------------------------

    fn reset_state(&self, state: &mut State) {
        if state.slave_up || state.master.is_some() {
            state.resets += 1;
        }
        state.slave_up = false;
        state.paused = false;
        // All rings have stopped, or have been told to.
        state.ready = false;
        // The front end has dropped its mappings by itself, if it had any.
        state.epoch += 1;
        self.clear_window(state);
        self.drop_master(state);
        self.tell_relay();
    }

    /// A stopped guest reads and writes no configuration: if there was a stop, it was a reset.
    fn driver_is_there(&self, state: &mut State) {
        if state.paused {
            self.start_over(state);
        }
    }

    /// A reset that only we know of: over vhost-user there is no message for it. A driver that resets its device has given up
    /// on a broken one.
    fn start_over(&self, state: &mut State) {
        self.reset_state(state);
        if let Some(member) = self.member() {
            member.owner().mend();
        }
    }

    /// A message from txq.
    fn take_message(&self, bytes: Vec<u8>) -> std::result::Result<(), Fault> {
        let head = Header::of(&bytes);
        if bytes.len() < HEADER {
            return Err(Fault::new("message.size", format!("{} bytes are no message", bytes.len())).on_queue(TXQ));
        }
        head.check(bytes.len() - HEADER).map_err(|fault| fault.on_queue(TXQ))?;
        let mut state = self.lock();
        state.last = Some(LastMessage::new("slave", head));
        let wanted = match &mut state.master {
            None => None,
            Some(master) if head.is_reply() => {
                Self::answer(master, &head, bytes)?.map(|bytes| Outgoing { channel: false, bytes })
            }
            Some(master) => (master.has_channel && message::slave_request_possible(head.request))
                .then_some(Outgoing { channel: true, bytes }),
        };
        let Some(outgoing) = wanted else {
            drop(state);
            count(&self.counters.discarded);
            log::debug!("device {}: request {} of the slave is discarded", self.id, head.request);
            return Ok(());
        };
        count(&self.counters.from_slave);
        state.tx.push_back(outgoing);
        drop(state);
        self.tell_relay();
        Ok(())
    }

    /// An answer of the slave's, as the master is to see it. None: nobody has asked (a late answer to a master that has gone).
    fn answer(master: &mut Master, head: &Header, mut bytes: Vec<u8>) -> std::result::Result<Option<Vec<u8>>, Fault> {
        let Some(at) = master.outstanding.iter().position(|&request| request == head.request) else {
            return Ok(None);
        };
        // Those before needed no answer.
        master.outstanding.drain(..=at);
        let payload = &bytes[HEADER..];
        match head.request {
            message::request::GET_FEATURES if payload.len() == 8 => {
                master.features_offered = Some(message::quad(payload, 0));
            }
            message::request::GET_PROTOCOL_FEATURES => {
                if payload.len() != 8 {
                    return Err(
                        Fault::new("message.size", format!("protocol features in {} bytes", payload.len()))
                            .on_queue(TXQ),
                    );
                }
                let slave = message::quad(payload, 0);
                let offered = slave & message::PROTOCOL_FEATURES;
                master.protocol_slave = Some(slave);
                master.protocol_offered = Some(offered);
                bytes[HEADER..].copy_from_slice(&offered.to_le_bytes());
            }
            _ => {}
        }
        Ok(Some(bytes))
    }
}

impl Device for VvuDevice {
    fn type_name(&self) -> &'static str {
        "vhost-user"
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn known_features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        2
    }

    fn queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn gated(&self) -> bool {
        true
    }

    fn may_take(&self, queue: u16) -> bool {
        let state = self.lock();
        match queue {
            RXQ => !state.rx.is_empty(),
            _ => state.tx.len() < TX_WAITING,
        }
    }

    fn doorbells(&self) -> Option<&dyn Doorbells> {
        Some(self)
    }

    fn shared_memory(&self) -> Option<&dyn SharedMemory> {
        Some(self)
    }

    fn reset(&self) {
        self.reset_state(&mut self.lock());
    }

    fn ring_starts(&self, _queue: u16, continues: bool) {
        let mut state = self.lock();
        if state.paused && !continues {
            self.start_over(&mut state);
        }
    }

    fn rings_changed(&self, ready: bool) {
        let mut state = self.lock();
        if ready != state.ready {
            state.ready = ready;
            state.paused = !ready;
        }
        // Even so: a ring of a PCI function that is reset by itself stops without a word.
        self.tell_relay();
    }

    fn config_fields(&self) -> &'static [ConfigField] {
        &FIELDS
    }

    fn config_size(&self) -> usize {
        CONFIG_SIZE
    }

    fn legacy_config_size(&self) -> usize {
        0
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let status = {
            let mut state = self.lock();
            self.driver_is_there(&mut state);
            Self::status(&state)
        };
        let mut config = [0; CONFIG_SIZE];
        config[..4].copy_from_slice(&status.to_le_bytes());
        config[4..8].copy_from_slice(&u32::from(self.max_queues).to_le_bytes());
        config[8..].copy_from_slice(&self.uuid);
        data.fill(0);
        if let Some(tail) = config.get(offset..) {
            let n = tail.len().min(data.len());
            data[..n].copy_from_slice(&tail[..n]);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> std::result::Result<bool, Fault> {
        let mut state = self.lock();
        self.driver_is_there(&mut state);
        let before = Self::status(&state);
        let mut status = before.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            let Some(place) = status.get_mut(at) else { break };
            *place = *byte;
        }
        let status = u32::from_le_bytes(status);
        if status & !(SLAVE_UP | MASTER_UP) != 0 {
            let noticed = state.ready;
            drop(state);
            let fault = Fault::new("config.status", format!("status {status:#x}; bits 0 and 1 are defined"));
            // As the prototypes have it: DEVICE_NEEDS_RESET. Over vhost-user a reset before the rings run can't be noticed.
            if let Some(member) = self.member().filter(|_| noticed || !self.maps_remotely()) {
                member.owner().break_it(fault.clone());
            }
            return Err(fault);
        }
        // MASTER_UP is the device's. Front ends repeat what they have read of the rest.
        let up = status & SLAVE_UP != 0;
        if up == state.slave_up {
            return Ok(false);
        }
        state.slave_up = up;
        if !up {
            self.drop_master(&mut state);
        }
        drop(state);
        if !up {
            self.look(TXQ);
        }
        self.tell_relay();
        Ok(true)
    }

    fn fresh(&self) {}

    fn start(&self, request: &mut Request, context: &QueueContext<'_>) -> std::result::Result<Step, Fault> {
        if context.queue == RXQ {
            let Some(message) = self.lock().rx.pop_front() else {
                // The session has ended in between. Nothing was written, and drivers pass over that.
                return Ok(Step::Done(0));
            };
            let room = request.chain.writable.len();
            if room < message.len() as u64 {
                return Err(Fault::new(
                    "rxq.size",
                    format!("a buffer of {room} bytes for a message of {}", message.len()),
                )
                .on_queue(RXQ));
            }
            let written = request.chain.writable.write(&message);
            context.counters.add(0, 1);
            self.tell_relay();
            return Ok(Step::Done(written as u32));
        }
        let length = request.chain.readable.len();
        if length > (HEADER + MAX_PAYLOAD) as u64 {
            let reason = format!("a message of {length} bytes; {} are possible", HEADER + MAX_PAYLOAD);
            return Err(Fault::new("message.size", reason).on_queue(TXQ));
        }
        let mut bytes = vec![0; length as usize];
        request.chain.readable.read(&mut bytes);
        self.take_message(bytes)?;
        context.counters.add(0, 1);
        Ok(Step::Done(0))
    }

    fn resume(&self, _request: &mut Request, _context: &QueueContext<'_>, _result: i32) -> Step {
        Step::Done(0)
    }

    fn counter_names(&self) -> &'static [&'static str] {
        &["messages", "failed"]
    }

    fn failed_counter(&self) -> usize {
        1
    }
}

/// What an index behind the queues is.
enum Special {
    /// Call doorbell and kick notification of a queue.
    Call(usize),
    /// Err doorbell of a queue.
    Err(usize),
    /// The log's doorbell.
    Log,
}

impl VvuDevice {
    fn special(&self, index: u16) -> Option<Special> {
        let queue = usize::from(index / 2);
        match index {
            _ if index == 2 * self.max_queues => Some(Special::Log),
            _ if queue >= usize::from(self.max_queues) => None,
            _ if index.is_multiple_of(2) => Some(Special::Call(queue)),
            _ => Some(Special::Err(queue)),
        }
    }

    fn doorbell(&self, special: &Special) -> &Arc<Bell> {
        match special {
            Special::Call(queue) => &self.calls[*queue],
            Special::Err(queue) => &self.errs[*queue],
            Special::Log => &self.log,
        }
    }
}

impl Doorbells for VvuDevice {
    fn count(&self) -> u16 {
        2 * self.max_queues + 1
    }

    fn interrupts(&self, index: u16) -> bool {
        matches!(self.special(index), Some(Special::Call(_)))
    }

    fn connect(&self, index: u16, kick: Option<Arc<OwnedFd>>, call: Call) {
        let Some(special) = self.special(index) else { return };
        self.doorbell(&special).set_from(&self.pool, kick);
        self.set_call(index, call);
    }

    fn set_call(&self, index: u16, call: Call) {
        if let Some(Special::Call(queue)) = self.special(index) {
            self.kicks[queue].set_to(Some(call));
        }
    }

    fn disconnect(&self, index: u16) {
        let Some(special) = self.special(index) else { return };
        self.doorbell(&special).set_from(&self.pool, None);
        if let Special::Call(queue) = special {
            self.kicks[queue].set_to(None);
        }
    }

    fn ring(&self, index: u16, signals: &mut Vec<Arc<OwnedFd>>) {
        if let Some(special) = self.special(index) {
            signals.extend(self.doorbell(&special).ring());
        }
    }
}

impl SharedMemory for VvuDevice {
    fn size(&self) -> u64 {
        self.window.size
    }

    fn file(&self) -> Option<(Arc<OwnedFd>, u64)> {
        self.ram_file.as_ref().map(|(fd, len)| (Arc::clone(fd), *len))
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let map = Arc::clone(&self.lock().window);
        if let Some(area) = map.area_by_guest(offset, data.len() as u64) {
            // In one piece: it may be an index that the master's driver is writing.
            match data.len() {
                2 if area.is_aligned(2) => data.copy_from_slice(&area.u16(0).load(Ordering::Acquire).to_le_bytes()),
                4 if area.is_aligned(4) => data.copy_from_slice(&area.u32(0).load(Ordering::Acquire).to_le_bytes()),
                8 if area.is_aligned(8) => data.copy_from_slice(&area.u64(0).load(Ordering::Acquire).to_le_bytes()),
                _ => area.read(0, data),
            }
            return;
        }
        for (offset, part) in pieces(&map, offset, data.len()) {
            if let Some(area) = map.area_by_guest(offset, part.len() as u64) {
                area.read(0, &mut data[part]);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let map = Arc::clone(&self.lock().window);
        if let Some(area) = map.area_by_guest(offset, data.len() as u64) {
            match *data {
                [a, b] if area.is_aligned(2) => area.u16(0).store(u16::from_le_bytes([a, b]), Ordering::Release),
                [a, b, c, d] if area.is_aligned(4) => {
                    area.u32(0).store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
                }
                [a, b, c, d, e, f, g, h] if area.is_aligned(8) => {
                    let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                    area.u64(0).store(value, Ordering::Release);
                }
                _ => area.write(0, data),
            }
            return;
        }
        for (offset, part) in pieces(&map, offset, data.len()) {
            if let Some(area) = map.area_by_guest(offset, part.len() as u64) {
                area.write(0, &data[part]);
            }
        }
    }
}

/// The parts of an access that lie in a region each: where that is, and which bytes of the access.
fn pieces(map: &MemoryMap, offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> + '_ {
    // The range has been checked against the size of the shared memory region: no sum wraps.
    let end = offset + len as u64;
    map.regions().iter().filter_map(move |region| {
        let (from, to) = (offset.max(region.guest), end.min(region.guest + region.size));
        // Both lie within the access.
        (from < to).then(|| (from, (from - offset) as usize..(to - offset) as usize))
    })
}
