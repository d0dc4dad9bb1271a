// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user messages as the relay between a master and a slave sees them: what comes with descriptors, what it makes
//! available to the slave (virtio-vhost-user v5, "Availability of Additional Resources"), and what can't be passed on.

use crate::error::Fault;

/// Bytes of a header: request, flags, payload size, each a little-endian u32.
pub const HEADER: usize = 12;
/// Most bytes of a payload.
pub const MAX_PAYLOAD: usize = 4096;
/// Most descriptors that come with a message.
pub const MAX_FDS: usize = super::layout::MAX_REGIONS;

/// Flags: the protocol's version.
pub const VERSION: u32 = 1;
/// Flags: an answer.
pub const REPLY: u32 = 4;
/// Flags: an answer is wanted.
pub const NEED_REPLY: u32 = 8;
/// In the payload of kick, call and err: there is no descriptor.
pub const NO_FD: u64 = 1 << 8;

/// Requests of the master, by number.
#[allow(missing_docs)]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const GET_CONFIG: u32 = 24;
    pub const CREATE_CRYPTO_SESSION: u32 = 26;
    pub const POSTCOPY_ADVISE: u32 = 28;
    pub const GPU_SET_SOCKET: u32 = 33;
    pub const RESET_DEVICE: u32 = 34;
    pub const VRING_KICK: u32 = 35;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const GET_SHARED_OBJECT: u32 = 41;
    pub const GET_SHMEM_CONFIG: u32 = 44;
}

/// Protocol features that work without descriptors from the slave, and without messages that have no meaning here: MQ,
/// LOG_SHMFD, RARP, REPLY_ACK, MTU, BACKEND_REQ, CROSS_ENDIAN, CRYPTO_SESSION, CONFIG, RESET_DEVICE, STATUS.
///
/// The others are taken out of the slave's answer (v5 09/10 does so with those that pass descriptors): PAGEFAULT,
/// BACKEND_SEND_FD, HOST_NOTIFIER, INFLIGHT_SHMFD, SHARED_OBJECT, DEVICE_STATE and SHMEM pass some, CONFIGURE_MEM_SLOTS has
/// messages for which no layout is defined, INBAND_NOTIFICATIONS has doorbells in its place, addresses of GPA_ADDRESSES and
/// XEN_MMAP aren't those of the shared memory. What isn't known yet may pass descriptors, too.
pub const PROTOCOL_FEATURES: u64 =
    1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 13 | 1 << 16;
/// LOG_SHMFD.
pub const LOG_SHMFD: u64 = 1 << 1;

/// What a request of the master means to the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// Passed on.
    Plain,
    /// SET_MEM_TABLE.
    Memory,
    /// SET_LOG_BASE.
    Log,
    /// SET_LOG_FD.
    LogBell,
    /// SET_VRING_KICK.
    Kick,
    /// SET_VRING_CALL.
    Call,
    /// SET_VRING_ERR.
    Err,
    /// SET_BACKEND_REQ_FD.
    Channel,
    /// SET_PROTOCOL_FEATURES.
    ProtocolFeatures,
    /// SET_FEATURES.
    Features,
}

/// Bytes of a payload; None: any.
fn payload_size(meaning: Meaning) -> Option<usize> {
    match meaning {
        Meaning::Plain | Meaning::Memory => None,
        Meaning::Log => Some(16),
        Meaning::LogBell | Meaning::Channel => Some(0),
        Meaning::Kick | Meaning::Call | Meaning::Err | Meaning::ProtocolFeatures | Meaning::Features => Some(8),
    }
}

/// Descriptors that come with it, fewest and most.
fn fds(meaning: Meaning) -> (usize, usize) {
    match meaning {
        Meaning::Plain | Meaning::ProtocolFeatures | Meaning::Features => (0, 0),
        Meaning::Memory => (0, MAX_FDS),
        // Without LOG_SHMFD the address of a log that nobody else can see.
        Meaning::Log => (1, 1),
        Meaning::LogBell | Meaning::Channel => (1, 1),
        Meaning::Kick | Meaning::Call | Meaning::Err => (0, 1),
    }
}

/// A header's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Bytes of the payload.
    pub size: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    if let Some(part) = bytes.get(at..at + 4) {
        word.copy_from_slice(part);
    }
    u32::from_le_bytes(word)
}

/// A little-endian u64 of a payload; 0 beyond its end.
pub fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

impl Header {
    /// Reads a header; what is missing is 0.
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            request: word(bytes, 0),
            flags: word(bytes, 4),
            size: word(bytes, 8),
        }
    }

    /// Whether it is marked as an answer.
    pub fn is_reply(&self) -> bool {
        self.flags & REPLY != 0
    }

    /// Checks what holds for every message, of either side.
    ///
    /// # Errors
    /// `message.version`, `message.size`.
    pub fn check(&self, payload: usize) -> Result<(), Fault> {
        if self.flags & 3 != VERSION {
            return Err(Fault::new(
                "message.version",
                format!("header flags {:#x}; version 1 is spoken here", self.flags),
            ));
        }
        if self.size as usize != payload || payload > MAX_PAYLOAD {
            return Err(Fault::new(
                "message.size",
                format!(
                    "request {} announces {} bytes and has {payload}; up to {MAX_PAYLOAD} are possible",
                    self.request, self.size
                ),
            ));
        }
        Ok(())
    }
}

/// What a request of the master means.
///
/// # Errors
/// `message.flags`, `message.not-possible`, `message.size`, `message.fds`.
pub fn meaning(header: &Header, payload: &[u8], count: usize) -> Result<Meaning, Fault> {
    use request as r;
    let number = header.request;
    if header.is_reply() {
        return Err(Fault::new(
            "message.flags",
            format!("request {number} of the master is marked as a reply"),
        ));
    }
    let meaning = match number {
        r::SET_MEM_TABLE => Meaning::Memory,
        r::SET_LOG_BASE => Meaning::Log,
        r::SET_LOG_FD => Meaning::LogBell,
        r::SET_VRING_KICK => Meaning::Kick,
        r::SET_VRING_CALL => Meaning::Call,
        r::SET_VRING_ERR => Meaning::Err,
        r::SET_BACKEND_REQ_FD => Meaning::Channel,
        r::SET_PROTOCOL_FEATURES => Meaning::ProtocolFeatures,
        r::SET_FEATURES => Meaning::Features,
        // POSTCOPY_*, GET_INFLIGHT_FD, SET_INFLIGHT_FD, GPU_SET_SOCKET; VRING_KICK, GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG;
        // GET_SHARED_OBJECT, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE, GET_SHMEM_CONFIG: their features were never offered.
        r::POSTCOPY_ADVISE..=r::GPU_SET_SOCKET
        | r::VRING_KICK..=r::REM_MEM_REG
        | r::GET_SHARED_OBJECT..=r::GET_SHMEM_CONFIG => {
            return Err(Fault::new(
                "message.not-possible",
                format!("request {number} needs a protocol feature that isn't offered"),
            ));
        }
        _ => Meaning::Plain,
    };
    if payload_size(meaning).is_some_and(|size| size != payload.len()) {
        return Err(Fault::new(
            "message.size",
            format!("request {number} with {} bytes of payload", payload.len()),
        ));
    }
    let (low, high) = fds(meaning);
    if !(low..=high).contains(&count) {
        return Err(Fault::new(
            "message.fds",
            format!("request {number} with {count} file descriptors; {low} to {high} are right"),
        ));
    }
    Ok(meaning)
}

/// Whether the slave may answer a request: it has an answer of its own, or one was asked for. Of requests that nobody knows
/// yet it may.
pub fn may_be_answered(header: &Header) -> bool {
    use request as r;
    header.flags & NEED_REPLY != 0
        || header.request > r::GET_SHMEM_CONFIG
        || matches!(
            header.request,
            r::GET_FEATURES
                | r::SET_LOG_BASE
                | r::GET_VRING_BASE
                | r::GET_PROTOCOL_FEATURES
                | r::GET_QUEUE_NUM
                | r::IOTLB_MSG
                | r::GET_CONFIG
                | r::CREATE_CRYPTO_SESSION
                | r::GET_STATUS
        )
}

/// Whether a request of the slave's can be passed on: those that come with a descriptor can't.
pub fn slave_request_possible(request: u32) -> bool {
    // VRING_HOST_NOTIFIER_MSG; SHARED_OBJECT_ADD, _REMOVE, _LOOKUP; SHMEM_MAP, SHMEM_UNMAP.
    !matches!(request, 3 | 6..=10)
}
