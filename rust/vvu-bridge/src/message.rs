// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user messages as bytes: header, request numbers.

/// Bytes of a header: request, flags, size of the payload.
pub const HEADER: usize = 12;
/// Largest payload; VHOST_USER_MAX_MSG_SIZE of every implementation is at most this.
pub const MAX_PAYLOAD: usize = 4096;
/// Largest message.
pub const MAX_MESSAGE: usize = HEADER + MAX_PAYLOAD;

/// Bits 0-1 of flags: the protocol version, always 1.
pub const VERSION_MASK: u32 = 3;
/// The only version.
pub const VERSION: u32 = 1;
/// Flag: this is a reply.
pub const REPLY: u32 = 1 << 2;
/// Flag: the sender wants a reply (REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;

/// Bit 8 of the payload of SET_VRING_KICK, CALL and ERR: there is no fd.
pub const NO_FD: u64 = 1 << 8;
/// Bytes of SET_MEM_TABLE before the first region: count, padding.
pub const MEMORY_HEADER: usize = 8;
/// Bytes of a region: guest address, size, user address, mmap offset.
pub const MEMORY_REGION: usize = 32;
/// Most regions of a memory table (VHOST_MEMORY_BASELINE_NREGIONS).
pub const MAX_REGIONS: usize = 8;

/// Requests of the front end (master).
#[allow(missing_docs)]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_SLAVE_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const SET_VRING_ENDIAN: u32 = 23;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const CREATE_CRYPTO_SESSION: u32 = 26;
    pub const CLOSE_CRYPTO_SESSION: u32 = 27;
    pub const POSTCOPY_ADVISE: u32 = 28;
    pub const POSTCOPY_LISTEN: u32 = 29;
    pub const POSTCOPY_END: u32 = 30;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const GPU_SET_SOCKET: u32 = 33;
    pub const RESET_DEVICE: u32 = 34;
    pub const VRING_KICK: u32 = 35;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const GET_SHARED_OBJECT: u32 = 41;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
    pub const GET_SHMEM_CONFIG: u32 = 44;
}

/// A header, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked, or answered.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Bytes of payload.
    pub size: u32,
}

impl Header {
    /// The header at the start of `bytes`; None when there are fewer than [`HEADER`].
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            request: u32_at(bytes, 0)?,
            flags: u32_at(bytes, 4)?,
            size: u32_at(bytes, 8)?,
        })
    }

    /// Whether this is a reply.
    pub const fn is_reply(self) -> bool {
        self.flags & REPLY != 0
    }

    /// Whether the sender asked for a reply.
    pub const fn needs_reply(self) -> bool {
        self.flags & NEED_REPLY != 0
    }
}

/// A whole message.
pub fn build(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(&request.to_le_bytes());
    bytes.extend_from_slice(&(VERSION | flags).to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The u32 at an offset.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The u64 at an offset.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Replaces the u64 at an offset; nothing happens when it isn't inside.
pub fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = at.checked_add(8).and_then(|end| bytes.get_mut(at..end)) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}
