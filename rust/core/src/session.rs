// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end side of one vhost-user connection, without the socket (design D2).
//!
//! Whole messages with their fds go in, an [`Outcome`] comes out: a reply to send, or a token to wait for first. Whoever
//! owns the socket (a trio task) moves the bytes. Messages are decoded into the structs of the `vhost` crate by one
//! table ([`rule`]), which also says how long a message is and how many fds come with it.
//!
//! Errors are of two kinds. A front end that breaks the protocol gets a negative answer if it asked for one, the member
//! is marked broken with the rule, and the connection is closed. Two requests can be refused without harm, as the
//! protocol provides: GET_CONFIG out of range (an empty reply) and SET_CONFIG of a read-only field (a negative answer).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr, VhostUserVringState,
    MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE,
};
use vm_memory::ByteValued;

use crate::dirty::DirtyLog;
use crate::error::{Error, Fault, Result};
use crate::member::{feature, Inflight, Member};
use crate::memory::{MemoryMap, MAX_REGIONS};
use crate::ring::inflight;
use crate::ring::split::RingAddresses;
use crate::ring::MAX_QUEUE_SIZE;
use crate::sys::{self, PeerFd};

/// Bytes of a message header: request, flags, payload size, each a little-endian u32.
pub const HEADER_SIZE: usize = 12;
/// Most fds that may come with one message.
pub const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;
/// Largest device configuration that can be asked for (VHOST_USER_MAX_CONFIG_SIZE of QEMU).
pub const MAX_CONFIG: u32 = 256;

/// Features of the connection, not of the driver.
const TRANSPORT: u64 = feature::PROTOCOL_FEATURES | feature::LOG_ALL;

const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
/// In the payload of kick, call and err: there is no fd.
const VRING_NOFD: u64 = 1 << 8;

/// Bytes of an in-flight description without the padding that QEMU's has.
const INFLIGHT_BYTES: usize = 20;

/// Protocol features we implement; never a bit whose message isn't in the table.
pub fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::STATUS
}

/// Those for a device with shared memory. Nothing of it can be migrated, nor is anything in flight when its rings stop. STATUS is
/// missing: QEMU's front end for any device (vhost-user-test-device, 11.1) never says DRIVER_OK by it, so that it would only
/// mislead.
fn shared_memory_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::BACKEND_SEND_FD
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::SHMEM
}

/// What is to be done after a message.
#[derive(Default)]
pub struct Outcome {
    /// Send this on the connection.
    pub reply: Option<Vec<u8>>,
    /// With this fd.
    pub reply_fd: Option<OwnedFd>,
    /// Wait for the completion with this token, then call [`Session::resume`]; no other message before.
    pub pending: Option<u64>,
    /// The channel for back-end requests.
    pub backend_channel: Option<OwnedFd>,
    /// A configuration change held back until now may be told: call [`Session::config_change`].
    pub config_changed: bool,
    /// Close the connection after sending `reply`.
    pub error: Option<Fault>,
}

/// A whole message with its fds.
pub type Whole = (Vec<u8>, Vec<OwnedFd>);

/// Messages that make a session what another one is.
#[derive(Default)]
pub struct Replay {
    /// Everything but the rings.
    pub state: Vec<Whole>,
    /// The rings.
    pub rings: Vec<Whole>,
}

impl Replay {
    fn state(&mut self, request: FrontendReq, payload: &[u8], fd: Option<OwnedFd>) {
        self.state
            .push((message(request as u32, 0, payload), fd.into_iter().collect()));
    }

    fn ring(&mut self, request: FrontendReq, payload: &[u8], fd: Option<OwnedFd>) {
        self.rings
            .push((message(request as u32, 0, payload), fd.into_iter().collect()));
    }
}

/// What a message must look like.
struct Rule {
    /// Payload bytes, smallest and largest.
    size: (usize, usize),
    /// Fds, fewest and most.
    fds: (usize, usize),
    /// Protocol features that must be negotiated.
    needs: VhostUserProtocolFeatures,
    /// Whether it has a reply of its own (and so never gets an acknowledgement).
    replies: bool,
}

/// The table. None: not a request we take.
fn rule(request: FrontendReq) -> Option<Rule> {
    use FrontendReq as R;
    let none = VhostUserProtocolFeatures::empty();
    let exact = |size: usize, fds: (usize, usize), needs| Rule {
        size: (size, size),
        fds,
        needs,
        replies: false,
    };
    let asks = |size: usize, needs| Rule {
        size: (size, size),
        fds: (0, 0),
        needs,
        replies: true,
    };
    let region = size_of::<VhostUserMemoryRegion>();
    let memory = size_of::<VhostUserMemory>();
    Some(match request {
        R::GET_FEATURES | R::GET_PROTOCOL_FEATURES => asks(0, none),
        R::GET_QUEUE_NUM => asks(0, VhostUserProtocolFeatures::MQ),
        R::GET_MAX_MEM_SLOTS => asks(0, VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS),
        R::GET_STATUS => asks(0, VhostUserProtocolFeatures::STATUS),
        R::GET_VRING_BASE => asks(8, none),
        R::GET_SHMEM_CONFIG => asks(0, VhostUserProtocolFeatures::SHMEM),
        R::SET_OWNER | R::RESET_OWNER => exact(0, (0, 0), none),
        R::RESET_DEVICE => exact(0, (0, 0), VhostUserProtocolFeatures::RESET_DEVICE),
        R::SET_FEATURES | R::SET_PROTOCOL_FEATURES => exact(8, (0, 0), none),
        R::SET_STATUS => exact(8, (0, 0), VhostUserProtocolFeatures::STATUS),
        R::SET_VRING_NUM | R::SET_VRING_BASE | R::SET_VRING_ENABLE => exact(8, (0, 0), none),
        R::SET_VRING_ADDR => exact(size_of::<VhostUserVringAddr>(), (0, 0), none),
        R::SET_VRING_KICK | R::SET_VRING_CALL | R::SET_VRING_ERR => exact(8, (0, 1), none),
        R::SET_MEM_TABLE => Rule {
            size: (memory, memory + MAX_FDS * region),
            fds: (0, MAX_FDS),
            needs: none,
            replies: false,
        },
        R::ADD_MEM_REG => {
            let size = size_of::<VhostUserSingleMemoryRegion>();
            exact(size, (1, 1), VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
        }
        // Old QEMUs send the fd along; it is closed.
        R::REM_MEM_REG => {
            let size = size_of::<VhostUserSingleMemoryRegion>();
            exact(size, (0, 1), VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
        }
        R::SET_LOG_BASE => Rule {
            size: (size_of::<VhostUserLog>(), size_of::<VhostUserLog>()),
            fds: (1, 1),
            needs: VhostUserProtocolFeatures::LOG_SHMFD,
            replies: true,
        },
        R::SET_LOG_FD => exact(0, (1, 1), VhostUserProtocolFeatures::LOG_SHMFD),
        R::GET_INFLIGHT_FD => Rule {
            size: (INFLIGHT_BYTES, size_of::<VhostUserInflight>()),
            fds: (0, 0),
            needs: VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            replies: true,
        },
        R::SET_INFLIGHT_FD => Rule {
            size: (INFLIGHT_BYTES, size_of::<VhostUserInflight>()),
            fds: (1, 1),
            needs: VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            replies: false,
        },
        R::SET_BACKEND_REQ_FD => exact(0, (1, 1), VhostUserProtocolFeatures::BACKEND_REQ),
        R::GET_CONFIG | R::SET_CONFIG => Rule {
            size: (size_of::<VhostUserConfig>(), MAX_MSG_SIZE),
            fds: (0, 0),
            needs: VhostUserProtocolFeatures::CONFIG,
            replies: matches!(request, R::GET_CONFIG),
        },
        _ => return None,
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    if let Some(slice) = bytes.get(at..at + 4) {
        word.copy_from_slice(slice);
    }
    u32::from_le_bytes(word)
}

/// Copies a plain struct out of a payload whose size the table has checked.
fn decode<T: ByteValued + Default>(payload: &[u8]) -> T {
    let mut value = T::default();
    let n = size_of::<T>().min(payload.len());
    value.as_mut_slice()[..n].copy_from_slice(&payload[..n]);
    value
}

/// The region of ADD_MEM_REG and REM_MEM_REG: the struct of the crate keeps it private, behind eight bytes of padding.
fn single_region(payload: &[u8]) -> VhostUserMemoryRegion {
    let padding = size_of::<VhostUserSingleMemoryRegion>() - size_of::<VhostUserMemoryRegion>();
    decode(payload.get(padding..).unwrap_or_default())
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
    bytes.extend_from_slice(&request.to_le_bytes());
    bytes.extend_from_slice(&(VERSION | flags).to_le_bytes());
    // Payloads are at most MAX_MSG_SIZE.
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Length of the payload a header announces.
///
/// # Errors
/// `message.size`, `message.version`.
pub fn payload_size(header: &[u8; HEADER_SIZE]) -> std::result::Result<usize, Fault> {
    let flags = u32_at(header, 4);
    let size = u32_at(header, 8) as usize;
    if flags & 3 != VERSION {
        return Err(Fault::new(
            "message.version",
            format!("header flags {flags:#x}; version 1 is spoken here"),
        ));
    }
    if size > MAX_MSG_SIZE {
        return Err(Fault::new(
            "message.size",
            format!(
                "request {} announces {size} bytes, more than {MAX_MSG_SIZE}",
                u32_at(header, 0)
            ),
        ));
    }
    Ok(size)
}

/// What to do when the rings, or the memory, are as a request wants them.
#[derive(Clone, Copy)]
enum After {
    /// Nothing more.
    Nothing,
    /// The rings have stopped: `Member::finish_status`.
    Status,
    /// The rings have stopped: `Member::finish_reset`.
    Reset,
    /// The ring has stopped: answer GET_VRING_BASE.
    Base(u64),
    /// All rings have the log: answer SET_LOG_BASE.
    Log,
    /// The connection is over: `Member::finish_detach`.
    Detach,
    /// The rings have stopped for a successor.
    Freeze,
}

/// A request that waits for a completion.
struct Pending {
    token: u64,
    after: After,
    request: u32,
    wants_ack: bool,
}

/// What a handled message leaves to do.
enum Done {
    /// Acknowledge if asked to.
    Ok,
    /// Send this payload.
    Reply(Vec<u8>),
    /// Send this payload and an fd.
    ReplyFd(Vec<u8>, OwnedFd),
    /// Acknowledge with 1, if asked to; the connection goes on.
    Refused,
    /// Wait.
    Pending(u64, After),
    /// The back-end channel has come.
    Channel(OwnedFd),
}

type Handled = std::result::Result<Done, Fault>;

/// One connection.
pub struct Session {
    member: Arc<Member>,
    acked: VhostUserProtocolFeatures,
    pending: Option<Pending>,
    has_channel: bool,
    /// The request about shared memory that the front end hasn't answered.
    asked: Option<BackendReq>,
    config_pending: bool,
    config_read: bool,
    detached: bool,
    taken_over: bool,
}

impl Session {
    /// Attaches to the member.
    ///
    /// # Errors
    /// [`crate::error::Error::Busy`].
    pub fn new(member: Arc<Member>) -> Result<Self> {
        member.attach()?;
        Ok(Self {
            member,
            acked: VhostUserProtocolFeatures::empty(),
            pending: None,
            has_channel: false,
            asked: None,
            config_pending: false,
            config_read: false,
            detached: false,
            taken_over: false,
        })
    }

    fn negotiated(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.acked.contains(feature)
    }

    /// Marks the member broken for something seen outside (a torn message, a silent peer).
    pub fn fail(&self, fault: Fault) {
        self.member.owner().break_it(fault);
    }

    /// Takes one whole message. The fds are consumed.
    pub fn handle(&mut self, header: &[u8; HEADER_SIZE], payload: &[u8], fds: Vec<PeerFd>) -> Outcome {
        let request = u32_at(header, 0);
        let wants_ack =
            u32_at(header, 4) & FLAG_NEED_REPLY != 0 && self.negotiated(VhostUserProtocolFeatures::REPLY_ACK);
        let was_live = self.live();
        let (replies, handled) = self.dispatch(request, header, payload, fds);
        let wants_ack = wants_ack && !replies;
        let mut outcome = Outcome::default();
        match handled {
            Ok(Done::Ok) => outcome.reply = wants_ack.then(|| self.ack(request, 0)),
            Ok(Done::Refused) => outcome.reply = wants_ack.then(|| self.ack(request, 1)),
            Ok(Done::Reply(bytes)) => outcome.reply = Some(message(request, FLAG_REPLY, &bytes)),
            Ok(Done::ReplyFd(bytes, fd)) => {
                outcome.reply = Some(message(request, FLAG_REPLY, &bytes));
                outcome.reply_fd = Some(fd);
            }
            Ok(Done::Channel(fd)) => {
                outcome.backend_channel = Some(fd);
                outcome.reply = wants_ack.then(|| self.ack(request, 0));
            }
            Ok(Done::Pending(token, after)) => {
                self.pending = Some(Pending {
                    token,
                    after,
                    request,
                    wants_ack,
                });
                outcome.pending = Some(token);
            }
            Err(fault) => {
                self.fail(fault.clone());
                outcome.reply = wants_ack.then(|| self.ack(request, 1));
                outcome.error = Some(fault);
            }
        }
        outcome.config_changed = self.config_pending && !was_live && self.live();
        outcome
    }

    fn ack(&self, request: u32, value: u64) -> Vec<u8> {
        message(request, FLAG_REPLY, &value.to_le_bytes())
    }

    /// Goes on after the completion `token` has ended.
    pub fn resume(&mut self, token: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(pending) = self.pending.take_if(|pending| pending.token == token) else {
            return outcome;
        };
        outcome.reply = pending.wants_ack.then(|| self.ack(pending.request, 0));
        match pending.after {
            After::Nothing => {}
            After::Status => self.member.finish_status(),
            After::Reset => self.member.finish_reset(),
            After::Base(index) => {
                self.member.collect();
                match self.base_reply(index) {
                    Ok(payload) => outcome.reply = Some(message(pending.request, FLAG_REPLY, &payload)),
                    Err(fault) => outcome.error = Some(fault),
                }
            }
            After::Log => outcome.reply = Some(self.ack(pending.request, 0)),
            After::Detach => self.member.finish_detach(),
            After::Freeze => self.member.collect(),
        }
        outcome.config_changed = self.config_pending && self.live();
        outcome
    }

    fn base_reply(&self, index: u64) -> std::result::Result<Vec<u8>, Fault> {
        let base = self.member.queue_base(index)?;
        // The index fits: it named a queue.
        Ok(VhostUserVringState::new(index as u32, base).as_slice().to_vec())
    }

    /// Checks a message against the table and carries it out. The bool: it has a reply of its own.
    fn dispatch(
        &mut self,
        request: u32,
        header: &[u8; HEADER_SIZE],
        payload: &[u8],
        fds: Vec<PeerFd>,
    ) -> (bool, Handled) {
        let unknown = || Fault::new("message.unknown", format!("request {request} is not known here"));
        let Ok(code) = FrontendReq::try_from(request) else {
            return (false, Err(unknown()));
        };
        let Some(rule) = rule(code) else {
            return (false, Err(unknown()));
        };
        let checked = self.check(code, &rule, header, payload, &fds);
        (rule.replies, checked.and_then(|()| self.carry_out(code, payload, fds)))
    }

    fn check(
        &self,
        code: FrontendReq,
        rule: &Rule,
        header: &[u8; HEADER_SIZE],
        payload: &[u8],
        fds: &[PeerFd],
    ) -> std::result::Result<(), Fault> {
        if self.detached || self.pending.is_some() {
            return Err(Fault::new(
                "message.order",
                format!("{code:?} while the last request is unfinished"),
            ));
        }
        if u32_at(header, 4) & FLAG_REPLY != 0 {
            return Err(Fault::new("message.flags", format!("{code:?} is marked as a reply")));
        }
        if payload.len() != u32_at(header, 8) as usize || !(rule.size.0..=rule.size.1).contains(&payload.len()) {
            let (low, high) = rule.size;
            let allowed = if low == high {
                format!("{low}")
            } else {
                format!("{low} to {high}")
            };
            return Err(Fault::new(
                "message.size",
                format!("{code:?} with {} bytes of payload; {allowed} are right", payload.len()),
            ));
        }
        if !(rule.fds.0..=rule.fds.1).contains(&fds.len()) {
            let (low, high) = rule.fds;
            let allowed = if low == high {
                format!("{low}")
            } else {
                format!("{low} to {high}")
            };
            return Err(Fault::new(
                "message.fds",
                format!("{code:?} with {} file descriptors; {allowed} are right", fds.len()),
            ));
        }
        if !self.acked.contains(rule.needs) {
            return Err(Fault::new(
                "message.not-negotiated",
                format!("{code:?} without protocol feature {:?}", rule.needs),
            ));
        }
        Ok(())
    }

    fn carry_out(&mut self, code: FrontendReq, payload: &[u8], fds: Vec<PeerFd>) -> Handled {
        use FrontendReq as R;
        let member = Arc::clone(&self.member);
        let value = || decode::<VhostUserU64>(payload).value;
        let vring = || {
            let state = decode::<VhostUserVringState>(payload);
            (u64::from(state.index), u64::from(state.num))
        };
        let reply = |value: u64| Ok(Done::Reply(value.to_le_bytes().to_vec()));
        let wait = |token: Option<u64>| token.map_or(Done::Ok, |token| Done::Pending(token, After::Nothing));
        match code {
            R::GET_FEATURES => reply(member.offered_features() | TRANSPORT),
            R::SET_FEATURES => member.set_features(value(), TRANSPORT).map(wait),
            R::GET_PROTOCOL_FEATURES => reply(self.offered().bits()),
            R::SET_PROTOCOL_FEATURES => self.set_protocol_features(value()),
            R::GET_QUEUE_NUM => {
                let doorbells = member.device().doorbells().map_or(0, |doorbells| doorbells.count());
                reply(u64::from(member.device().queues() + doorbells))
            }
            R::GET_SHMEM_CONFIG => {
                // One region, of id 0.
                let size = member.device().shared_memory().map_or(0, |memory| memory.size());
                let mut payload = u64::from(size != 0).to_le_bytes().to_vec();
                payload.extend_from_slice(&size.to_le_bytes());
                Ok(Done::Reply(payload))
            }
            R::GET_MAX_MEM_SLOTS => reply(MAX_REGIONS as u64),
            R::SET_OWNER => Ok(Done::Ok),
            // Deprecated: meant to disable all rings, but sent by old front ends when they go away. RESET_DEVICE does it.
            R::RESET_OWNER | R::RESET_DEVICE => Ok(match member.reset() {
                Some(token) => Done::Pending(token, After::Reset),
                None => Done::Ok,
            }),
            R::GET_STATUS => reply(u64::from(member.status())),
            R::SET_STATUS => self.set_status(value()),
            R::SET_VRING_NUM => {
                let (index, size) = vring();
                member.set_queue_size(index, size).map(|()| Done::Ok)
            }
            R::SET_VRING_BASE => {
                let (index, base) = vring();
                member.set_queue_base(index, base).map(|()| Done::Ok)
            }
            R::SET_VRING_ENABLE => {
                let (index, on) = vring();
                if on > 1 {
                    return Err(Fault::new("vring.enable", format!("enable = {on}; 0 or 1 is allowed")));
                }
                member.enable_queue(index, on == 1).map(wait)
            }
            R::GET_VRING_BASE => {
                let (index, _) = vring();
                match member.stop_queue(index)? {
                    Some(token) => Ok(Done::Pending(token, After::Base(index))),
                    None => self.base_reply(index).map(Done::Reply),
                }
            }
            R::SET_VRING_ADDR => {
                let addr = decode::<VhostUserVringAddr>(payload);
                // Bit 0 asks for the ring itself to be logged. It is whenever there is a log, at the addresses that it has
                // in memory; the one in the message is not needed.
                let flags = addr.flags;
                if flags & !1 != 0 {
                    return Err(Fault::new(
                        "vring.flags",
                        format!("flags {flags:#x}; 0 or 1 is allowed"),
                    ));
                }
                let addresses = RingAddresses {
                    desc: addr.descriptor,
                    driver: addr.available,
                    device: addr.used,
                };
                member
                    .set_queue_addresses(u64::from(addr.index), addresses)
                    .map(|()| Done::Ok)
            }
            R::SET_VRING_KICK => {
                let (index, fd) = Self::vring_fd(code, value(), fds)?;
                member
                    .set_queue_kick(index, Self::eventfd(fd, index, "vring.kick")?)
                    .map(wait)
            }
            R::SET_VRING_CALL => {
                let (index, fd) = Self::vring_fd(code, value(), fds)?;
                member
                    .set_queue_call(index, Self::eventfd(fd, index, "vring.call")?)
                    .map(wait)
            }
            R::SET_VRING_ERR => {
                // Errors are told over QMP and by NEEDS_RESET; the fd is closed here, not kept.
                let (index, _fd) = Self::vring_fd(code, value(), fds)?;
                member.check_queue(index).map(|()| Done::Ok)
            }
            R::SET_MEM_TABLE => self.set_mem_table(payload, &fds).map(wait),
            R::ADD_MEM_REG => {
                let region = single_region(payload);
                let region = Self::map_region(&member, &region, fds.first())?;
                member.add_memory(region).map(wait)
            }
            R::REM_MEM_REG => {
                let region = single_region(payload);
                member
                    .remove_memory(region.guest_phys_addr, region.memory_size, region.user_addr)
                    .map(wait)
            }
            R::SET_LOG_BASE => {
                let log = decode::<VhostUserLog>(payload);
                let fd = fds
                    .first()
                    .ok_or_else(|| Fault::new("message.fds", "a log without its fd"))?;
                let mappings = member.pool().mappings();
                let token = member.set_log(
                    DirtyLog::map(mappings, fd, log.mmap_size, log.mmap_offset)?,
                    !self.taken_over,
                )?;
                Ok(match token {
                    Some(token) => Done::Pending(token, After::Log),
                    None => Done::Reply(0u64.to_le_bytes().to_vec()),
                })
            }
            // To be told of each page: nobody does any more. The fd is closed here, not kept.
            R::SET_LOG_FD => Ok(Done::Ok),
            R::GET_INFLIGHT_FD => Self::get_inflight(&member, payload),
            R::SET_INFLIGHT_FD => Self::set_inflight(&member, payload, fds.first()),
            R::SET_BACKEND_REQ_FD => match fds.into_iter().next().and_then(PeerFd::into_unix_stream) {
                Some(fd) => {
                    self.has_channel = true;
                    Ok(Done::Channel(fd))
                }
                None => Err(Fault::new("backend-channel", "the fd is not a UNIX stream socket")),
            },
            R::GET_CONFIG => self.get_config(payload),
            R::SET_CONFIG => self.set_config(payload),
            _ => Err(Fault::new("message.unknown", format!("{code:?} is not known here"))),
        }
    }

    /// Protocol features offered.
    fn offered(&self) -> VhostUserProtocolFeatures {
        match self.member.device().shared_memory() {
            Some(_) => shared_memory_features(),
            None => protocol_features(),
        }
    }

    fn set_protocol_features(&mut self, value: u64) -> Handled {
        let offered = self.offered();
        match VhostUserProtocolFeatures::from_bits(value) {
            Some(acked) if offered.contains(acked) => {
                self.acked = acked;
                self.member.set_protocol_features(value);
                Ok(Done::Ok)
            }
            _ => Err(Fault::new(
                "protocol-features.not-offered",
                format!(
                    "protocol features {value:#x} accepted, of {:#x} offered",
                    offered.bits()
                ),
            )),
        }
    }

    fn set_status(&self, value: u64) -> Handled {
        let Ok(status) = u8::try_from(value) else {
            return Err(Fault::new("status", format!("status {value:#x}; it has 8 bits")));
        };
        Ok(match self.member.set_status(status) {
            Some(token) => Done::Pending(token, After::Status),
            None => Done::Ok,
        })
    }

    /// Queue index and fd of a kick, call or err message.
    fn vring_fd(code: FrontendReq, value: u64, fds: Vec<PeerFd>) -> std::result::Result<(u64, Option<PeerFd>), Fault> {
        let fd = fds.into_iter().next();
        if value & !(0xff | VRING_NOFD) != 0 {
            return Err(Fault::new(
                "vring.fd",
                format!("{code:?} with payload {value:#x}; 9 bits are defined"),
            ));
        }
        if (value & VRING_NOFD != 0) != fd.is_none() {
            let found = if fd.is_some() { "one" } else { "none" };
            return Err(Fault::new(
                "message.fds",
                format!("{code:?} with payload {value:#x} and {found} fd"),
            ));
        }
        Ok((value & 0xff, fd))
    }

    fn eventfd(fd: Option<PeerFd>, index: u64, rule: &'static str) -> std::result::Result<Option<OwnedFd>, Fault> {
        fd.map(|fd| {
            fd.into_eventfd()
                .ok_or_else(|| Fault::new(rule, "the fd is not an eventfd").on_queue(index as u16))
        })
        .transpose()
    }

    fn map_region(
        member: &Member,
        region: &VhostUserMemoryRegion,
        fd: Option<&PeerFd>,
    ) -> std::result::Result<crate::memory::Region, Fault> {
        let fd = fd.ok_or_else(|| Fault::new("message.fds", "a memory region without its fd"))?;
        member.pool().mappings().region(
            fd,
            region.guest_phys_addr,
            region.memory_size,
            region.user_addr,
            region.mmap_offset,
        )
    }

    /// The description of an in-flight region, with or without padding.
    fn inflight(code: FrontendReq, payload: &[u8]) -> std::result::Result<VhostUserInflight, Fault> {
        let padded = size_of::<VhostUserInflight>();
        if payload.len() != INFLIGHT_BYTES && payload.len() != padded {
            let reason = format!(
                "{code:?} with {} bytes of payload; {INFLIGHT_BYTES} or {padded} are right",
                payload.len()
            );
            return Err(Fault::new("message.size", reason));
        }
        Ok(decode(payload))
    }

    /// Makes memory for the records of what is in flight; the front end keeps it.
    fn get_inflight(member: &Member, payload: &[u8]) -> Handled {
        let mut wanted = Self::inflight(FrontendReq::GET_INFLIGHT_FD, payload)?;
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if !(1..=member.device().queues()).contains(&queues) || !(1..=MAX_QUEUE_SIZE).contains(&size) {
            return Err(Fault::new(
                "inflight.queues",
                format!(
                    "memory for {queues} queues of {size}; up to {} of {MAX_QUEUE_SIZE} are served",
                    member.device().queues()
                ),
            ));
        }
        wanted.mmap_offset = 0;
        // QEMU 10.0 asks for rings of `queue-size` entries (128) and lets the driver have up to 1024; it takes the size of
        // the memory from the reply. Pages that are never touched cost nothing.
        wanted.mmap_size = u64::from(queues) * inflight::region_size(MAX_QUEUE_SIZE, member.packed());
        let fd = sys::shared_memory("vhost-user-inflight", wanted.mmap_size)
            .map_err(|e| Fault::new("inflight.memory", format!("no memory for requests in flight: {e}")))?;
        Ok(Done::ReplyFd(wanted.as_slice()[..payload.len()].to_vec(), fd))
    }

    fn set_inflight(member: &Member, payload: &[u8], fd: Option<&PeerFd>) -> Handled {
        let given = Self::inflight(FrontendReq::SET_INFLIGHT_FD, payload)?;
        let fd = fd.ok_or_else(|| Fault::new("message.fds", "an in-flight region without its fd"))?;
        let region = member
            .pool()
            .mappings()
            .region(fd, 0, given.mmap_size, 0, given.mmap_offset)?;
        let area = Arc::new(MemoryMap::default().with(region)?).area_by_guest(0, given.mmap_size);
        let area = area.ok_or_else(|| Fault::new("inflight.size", "an in-flight region that can't be mapped"))?;
        member.set_inflight(Inflight::new(area, given.num_queues)?)?;
        Ok(Done::Ok)
    }

    fn set_mem_table(&self, payload: &[u8], fds: &[PeerFd]) -> std::result::Result<Option<u64>, Fault> {
        let count = decode::<VhostUserMemory>(payload).num_regions as usize;
        let rows = &payload[size_of::<VhostUserMemory>()..];
        let row = size_of::<VhostUserMemoryRegion>();
        if count > MAX_FDS || rows.len() != count * row {
            return Err(Fault::new(
                "message.size",
                format!(
                    "SET_MEM_TABLE of {count} regions in {} bytes; up to {MAX_FDS} of {row}",
                    rows.len()
                ),
            ));
        }
        if fds.len() != count {
            return Err(Fault::new(
                "message.fds",
                format!("SET_MEM_TABLE of {count} regions with {} file descriptors", fds.len()),
            ));
        }
        // What the front end has mapped for the device is among its regions, and belongs to a master who may have shortened the
        // file since: no fault of this front end's, and no place for rings.
        let foreign = self.member.device().shared_memory().is_some();
        let regions = rows
            .chunks_exact(row)
            .zip(fds)
            .filter_map(
                |(bytes, fd)| match Self::map_region(&self.member, &decode(bytes), Some(fd)) {
                    Err(fault) if foreign && fault.rule == "memory.fd-short" => {
                        log::debug!("member {}: left out: {}", self.member.id(), fault.reason);
                        None
                    }
                    result => Some(result),
                },
            )
            .collect::<std::result::Result<Vec<_>, _>>()?;
        self.member.set_memory(regions)
    }

    fn get_config(&mut self, payload: &[u8]) -> Handled {
        let config = decode::<VhostUserConfig>(payload);
        let (offset, size) = (config.offset, config.size);
        let fits = offset.checked_add(size).is_some_and(|end| end <= MAX_CONFIG);
        if !fits || size == 0 {
            // "An empty reply indicates an error."
            return Ok(Done::Reply(Vec::new()));
        }
        // The payload has room for the answer; some front ends send it, some don't.
        let room = payload.len() - size_of::<VhostUserConfig>();
        if room != 0 && room != size as usize {
            return Err(Fault::new(
                "message.size",
                format!("GET_CONFIG of {size} bytes carries {room}"),
            ));
        }
        // Before a driver has written features: a front end that only reconnects reads it later, if at all.
        if !std::mem::replace(&mut self.config_read, true) && !self.member.features_written() {
            self.member.device().fresh();
        }
        let mut data = vec![0; size as usize];
        self.member.device().read_config(offset as usize, &mut data);
        let mut reply = config.as_slice().to_vec();
        reply.extend_from_slice(&data);
        Ok(Done::Reply(reply))
    }

    fn set_config(&mut self, payload: &[u8]) -> Handled {
        self.config_read = true;
        let config = decode::<VhostUserConfig>(payload);
        let data = &payload[size_of::<VhostUserConfig>()..];
        let (offset, size) = (config.offset, config.size);
        if data.len() != size as usize {
            return Err(Fault::new(
                "message.size",
                format!("SET_CONFIG of {size} bytes carries {}", data.len()),
            ));
        }
        if offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG) {
            return Ok(Done::Refused);
        }
        match self.member.device().write_config(offset as usize, data) {
            Ok(true) => {
                let member = self.member.id();
                self.member.pool().events().push(crate::event::Event::Config { member });
                Ok(Done::Ok)
            }
            Ok(false) => Ok(Done::Ok),
            Err(fault) => {
                log::warn!("member {}: SET_CONFIG refused: {fault}", self.member.id());
                Ok(Done::Refused)
            }
        }
    }

    /// Whether the front end can take a CONFIG_CHANGE: QEMU ignores it, or crashes, on a device that isn't started.
    fn live(&self) -> bool {
        if self.member.device().doorbells().is_some() {
            return self.member.ready();
        }
        self.member.live(self.negotiated(VhostUserProtocolFeatures::STATUS))
    }

    /// The CONFIG_CHANGE message for the back-end channel. None when there is no channel, or the device isn't started:
    /// then a later outcome says `config_changed`.
    pub fn config_change(&mut self) -> Option<Vec<u8>> {
        let able = self.has_channel
            && self.negotiated(VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG);
        if !able || self.detached {
            return None;
        }
        self.config_pending = !self.live();
        if self.config_pending {
            return None;
        }
        let flags = if self.negotiated(VhostUserProtocolFeatures::REPLY_ACK) {
            FLAG_NEED_REPLY
        } else {
            0
        };
        Some(message(BackendReq::CONFIG_CHANGE_MSG as u32, flags, &[]))
    }

    /// The message that has the front end map part of a file into the device's shared memory region, or unmap what was mapped
    /// there; a map goes with the file's descriptor. None: not now. QEMU 11.1.3 dies of one that it gets before the device
    /// starts, or after it has stopped, so the caller has to send it before it takes another message of the front end's; and
    /// it never has more than one to do.
    pub fn shared_memory(&mut self, map: bool, offset: u64, size: u64, fd_offset: u64) -> Option<Vec<u8>> {
        let needs = VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::SHMEM;
        if !self.has_channel || self.detached || self.asked.is_some() || !self.negotiated(needs) || !self.live() {
            return None;
        }
        let request = if map {
            BackendReq::SHMEM_MAP
        } else {
            BackendReq::SHMEM_UNMAP
        };
        // Region 0; writable.
        let payload: Vec<u8> = [0, fd_offset, offset, size, u64::from(map)]
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        self.asked = Some(request);
        Some(message(request as u32, FLAG_NEED_REPLY, &payload))
    }

    /// Whether the front end can be asked to map shared memory at all.
    pub fn has_shared_memory(&self) -> bool {
        self.negotiated(
            VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::SHMEM,
        )
    }

    /// Checks an answer on the back-end channel. Some: it is the one to `shared_memory`, and says whether that was done.
    ///
    /// # Errors
    /// `backend-channel`.
    pub fn backend_reply(
        &mut self,
        header: &[u8; HEADER_SIZE],
        payload: &[u8],
    ) -> std::result::Result<Option<bool>, Fault> {
        let (request, flags) = (u32_at(header, 0), u32_at(header, 4));
        let is_reply = flags & FLAG_REPLY != 0 && payload.len() == 8;
        if is_reply && self.asked.is_some_and(|asked| asked as u32 == request) {
            self.asked = None;
            return Ok(Some(decode::<VhostUserU64>(payload).value == 0));
        }
        let right = request == BackendReq::CONFIG_CHANGE_MSG as u32 && is_reply;
        if !right {
            return Err(Fault::new(
                "backend-channel",
                format!(
                    "request {request}, flags {flags:#x}, {} bytes is not an answer to ours",
                    payload.len()
                ),
            ));
        }
        let value = decode::<VhostUserU64>(payload).value;
        if value != 0 {
            log::warn!(
                "member {}: the front end refused CONFIG_CHANGE ({value})",
                self.member.id()
            );
        }
        Ok(None)
    }

    /// Stops the rings, so that a successor can go on. Some: wait for this completion, then `resume`. After that `snapshot`,
    /// and then either `detach` or the ring messages of the snapshot, which start the rings again.
    pub fn freeze(&mut self) -> Option<u64> {
        if self.detached || self.pending.is_some() {
            return None;
        }
        let Some(token) = self.member.pause() else {
            self.member.collect();
            return None;
        };
        self.pending = Some(Pending {
            token,
            after: After::Freeze,
            request: 0,
            wants_ack: false,
        });
        Some(token)
    }

    /// The messages by which another session comes to the state that this one is in: what the front end would have to send.
    /// So the protocol itself is the format of a hand-over, and every number is checked where it always is.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it can't be done: a region's file isn't kept open.
    pub fn snapshot(&self) -> Result<Replay> {
        let snapshot = self.member.snapshot();
        let missing = || Error::Invalid("the file of some of its memory isn't kept open".into());
        let dup = |fd: &OwnedFd| {
            fd.try_clone().map_err(|source| Error::Os {
                what: "duplicating a descriptor",
                source,
            })
        };
        let file = |region: &crate::memory::Region| region.file().ok_or_else(missing).and_then(dup);
        let mut replay = Replay::default();
        replay.state(
            FrontendReq::SET_PROTOCOL_FEATURES,
            &self.acked.bits().to_le_bytes(),
            None,
        );
        if let Some(features) = snapshot.features {
            replay.state(FrontendReq::SET_FEATURES, &features.to_le_bytes(), None);
        }
        let place = |size: u64, offset: u64| [size.to_le_bytes(), offset.to_le_bytes()].concat();
        if let Some(((size, offset, region), queues)) = &snapshot.inflight {
            let mut payload = place(*size, *offset);
            payload.extend_from_slice(&queues.to_le_bytes());
            payload.extend_from_slice(&0u16.to_le_bytes());
            replay.state(FrontendReq::SET_INFLIGHT_FD, &payload, Some(file(region)?));
        }
        let mut rows = Vec::new();
        let mut fds = Vec::new();
        for region in &snapshot.memory {
            let row: Vec<u8> = [region.guest, region.size, region.user, region.mmap_offset]
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect();
            if self.negotiated(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
                let payload = [&[0u8; 8][..], &row].concat();
                replay.state(FrontendReq::ADD_MEM_REG, &payload, Some(file(region)?));
            } else {
                rows.extend_from_slice(&row);
                fds.push(file(region)?);
            }
        }
        if !fds.is_empty() {
            // As many as one such message has brought.
            let mut payload = (fds.len() as u64).to_le_bytes().to_vec();
            payload.extend_from_slice(&rows);
            replay
                .state
                .push((message(FrontendReq::SET_MEM_TABLE as u32, 0, &payload), fds));
        }
        if let Some((size, offset, region)) = &snapshot.log {
            replay.state(FrontendReq::SET_LOG_BASE, &place(*size, *offset), Some(file(region)?));
        }
        if self.negotiated(VhostUserProtocolFeatures::STATUS) {
            replay.state(FrontendReq::SET_STATUS, &u64::from(snapshot.status).to_le_bytes(), None);
        }
        for (index, queue) in snapshot.queues.iter().enumerate() {
            let index = index as u32;
            let pair = |value: u32| [index.to_le_bytes(), value.to_le_bytes()].concat();
            replay.ring(FrontendReq::SET_VRING_NUM, &pair(u32::from(queue.size)), None);
            if let Some(position) = queue.position {
                replay.ring(FrontendReq::SET_VRING_BASE, &pair(position), None);
            }
            if let Some(addresses) = queue.addresses {
                let mut payload = pair(0);
                for address in [addresses.desc, addresses.device, addresses.driver, 0] {
                    payload.extend_from_slice(&address.to_le_bytes());
                }
                replay.ring(FrontendReq::SET_VRING_ADDR, &payload, None);
            }
            let number = u64::from(index).to_le_bytes();
            if let Some(call) = &queue.call {
                replay.ring(FrontendReq::SET_VRING_CALL, &number, Some(dup(call)?));
            }
            if let Some(kick) = &queue.kick {
                replay.ring(FrontendReq::SET_VRING_KICK, &number, Some(dup(kick)?));
            }
            if queue.enabled {
                replay.ring(FrontendReq::SET_VRING_ENABLE, &pair(1), None);
            }
        }
        Ok(replay)
    }

    /// Whether the front end has read the configuration.
    pub fn config_read(&self) -> bool {
        self.config_read
    }

    /// Whether the front end is still to be told of a configuration change.
    pub fn config_pending(&self) -> bool {
        self.config_pending
    }

    /// What comes next is the snapshot of a predecessor's session, and not the front end's. `config_read`: the front end had
    /// read the configuration from it.
    pub fn take_over(&mut self, config_read: bool) {
        self.taken_over = true;
        self.config_read = config_read;
    }

    /// The snapshot has been replayed; from here on it is the front end that speaks.
    pub fn taken_over(&mut self) {
        self.taken_over = false;
    }

    /// Lets go of the member. Some: wait for this completion, then `resume`. Idempotent.
    pub fn detach(&mut self) -> Option<u64> {
        if std::mem::replace(&mut self.detached, true) {
            return None;
        }
        let token = self.member.detach()?;
        self.pending = Some(Pending {
            token,
            after: After::Detach,
            request: 0,
            wants_ack: false,
        });
        Some(token)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Whoever owns the socket detaches and waits; this is for the case that it couldn't.
        if self.detach().is_some() {
            log::error!("member {}: a session was dropped with rings running", self.member.id());
        }
    }
}
