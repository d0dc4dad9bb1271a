// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What has to be checked and changed in messages on their way between the device and the daemon. No I/O here.
//!
//! The device has kept all fds, so a message from it is bytes only; [`Proxy::from_device`] says which fds of the bridge's own
//! belong to it. Names (master, slave) are those of the virtio-vhost-user text.

use std::collections::VecDeque;

use crate::message::{
    self, put_u64, request, u32_at, u64_at, Header, HEADER, MAX_PAYLOAD, MAX_REGIONS, MEMORY_HEADER, MEMORY_REGION,
    NO_FD, VERSION, VERSION_MASK,
};

/// Slave requests that may wait for the master's reply. Daemons wait for each one, so this is far from what is needed.
pub const MAX_OUTSTANDING: usize = 64;
/// Request numbers for which replies are accounted.
const REQUESTS: usize = request::GET_SHMEM_CONFIG as usize + 1;

/// The shared memory inside the file that the daemon maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Where it begins in the file (the BAR).
    pub offset: u64,
    /// Its size.
    pub length: u64,
}

/// Fds that go with a message to the daemon, or what it changes about those the bridge keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fds {
    /// None.
    None,
    /// The shared memory's file, as many times.
    Memory(usize),
    /// A kick eventfd of this queue.
    Kick(u8),
    /// None, and the queue's kick eventfd is no longer needed: the daemon will poll.
    NoKick(u8),
    /// The call eventfd of this queue.
    Call(u8),
    /// The err eventfd of this queue.
    Err(u8),
    /// The log's eventfd.
    Log,
    /// An end of a new slave channel.
    SlaveChannel,
}

/// Where a message from the device goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To the daemon's main socket.
    Request(Fds),
    /// To the slave channel: the answer to a request of the daemon.
    SlaveReply,
    /// To nobody: the answer to a request that came on a slave channel which is gone.
    Nowhere,
}

/// A message that can't be relayed; it ends the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Violation {
    #[error("message shorter than a header")]
    NoHeader,
    #[error("message {0}: version is not 1")]
    Version(u32),
    #[error("message {0}: {1} bytes of payload announced, {2} there")]
    Length(u32, u32, usize),
    #[error("message {0}: payload has a wrong size: {1}")]
    PayloadSize(u32, usize),
    #[error("message {0}: unknown request")]
    Unknown(u32),
    #[error("message {0}: needs an fd that can't cross the device")]
    NeedsFd(u32),
    #[error("message {0}: queue {1} of {2}")]
    Queue(u32, u64, u16),
    #[error("memory table: {0} regions")]
    Regions(u32),
    #[error("memory table: region {0} is not inside the shared memory")]
    Region(usize),
    #[error("log is not inside the shared memory")]
    Log,
    #[error("message {0}: reply nobody asked for")]
    Reply(u32),
    #[error("message {0} from the daemon is no reply")]
    NotAReply(u32),
    #[error("more than {MAX_OUTSTANDING} slave requests without a reply")]
    Outstanding,
}

/// What is remembered of one session's messages.
#[derive(Debug)]
pub struct Proxy {
    queues: u16,
    window: Window,
    /// End of the regions of the last memory table: where the log begins.
    regions_end: u64,
    /// Requests relayed and not answered, per number. Those that get no answer only count up.
    asked: [u32; REQUESTS],
    slave_channel: bool,
    /// Slave requests that wait for a reply, oldest first.
    outstanding: VecDeque<u32>,
    /// The same of slave channels before the present one.
    late: VecDeque<u32>,
}

impl Proxy {
    /// For a device with `queues` vhost-user queues.
    pub fn new(queues: u16, window: Window) -> Self {
        Self {
            queues,
            window,
            regions_end: 0,
            asked: [0; REQUESTS],
            slave_channel: false,
            outstanding: VecDeque::new(),
            late: VecDeque::new(),
        }
    }

    /// Checks a message from the rxq and makes its offsets those of the file that the daemon maps.
    ///
    /// # Errors
    /// [`Violation`]: the session is over.
    pub fn from_device(&mut self, message: &mut [u8]) -> Result<Route, Violation> {
        let header = check_header(message)?;
        if header.is_reply() {
            return self.slave_reply(header);
        }
        let fds = self.request(header, message)?;
        if fds == Fds::SlaveChannel {
            self.slave_channel = true;
            // Their replies can still come, and are for nobody. More than a few of them are forgotten.
            self.late.append(&mut self.outstanding);
            let excess = self.late.len().saturating_sub(MAX_OUTSTANDING);
            self.late.drain(..excess);
        }
        // In range: `request` knows the number.
        let asked = &mut self.asked[header.request as usize];
        *asked = asked.saturating_add(1);
        Ok(Route::Request(fds))
    }

    /// Checks a message from the daemon's main socket, for the txq.
    ///
    /// # Errors
    /// [`Violation`]: the session is over.
    pub fn from_daemon(&mut self, message: &mut [u8]) -> Result<(), Violation> {
        let header = check_header(message)?;
        if !header.is_reply() {
            return Err(Violation::NotAReply(header.request));
        }
        let asked = self
            .asked
            .get_mut(header.request as usize)
            .filter(|asked| **asked > 0)
            .ok_or(Violation::Reply(header.request))?;
        *asked -= 1;
        // The daemon may have more queues than the device has doorbells; a master that used them would end its session.
        if header.request == request::GET_QUEUE_NUM && header.size == 8 {
            let queues = u64_at(message, HEADER).unwrap_or(0).min(self.queues.into());
            put_u64(message, HEADER, queues);
        }
        Ok(())
    }

    /// Checks a message from the slave channel, for the txq.
    ///
    /// # Errors
    /// [`Violation`]: the session is over.
    pub fn from_slave(&mut self, message: &[u8]) -> Result<(), Violation> {
        let header = check_header(message)?;
        if header.is_reply() {
            return Err(Violation::Reply(header.request));
        }
        if header.needs_reply() {
            if self.outstanding.len() >= MAX_OUTSTANDING {
                return Err(Violation::Outstanding);
            }
            self.outstanding.push_back(header.request);
        }
        Ok(())
    }

    /// A reply from the rxq can only be to a request of the slave: the master's own requests never have the flag. Masters
    /// answer in order, but only a reply to what was never asked is wrong beyond doubt.
    fn slave_reply(&mut self, header: Header) -> Result<Route, Violation> {
        let take = |list: &mut VecDeque<u32>| {
            let place = list.iter().position(|&request| request == header.request)?;
            list.remove(place)
        };
        // Those asked for first are answered first.
        if take(&mut self.late).is_some() {
            return Ok(Route::Nowhere);
        }
        match take(&mut self.outstanding) {
            Some(_) if self.slave_channel => Ok(Route::SlaveReply),
            _ => Err(Violation::Reply(header.request)),
        }
    }

    fn request(&mut self, header: Header, message: &mut [u8]) -> Result<Fds, Violation> {
        use request::*;
        let number = header.request;
        let size = message.len() - HEADER;
        let exactly = |bytes: usize| {
            if size == bytes {
                Ok(Fds::None)
            } else {
                Err(Violation::PayloadSize(number, size))
            }
        };
        match number {
            GET_FEATURES
            | SET_OWNER
            | RESET_OWNER
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | RESET_DEVICE
            | GET_MAX_MEM_SLOTS
            | GET_STATUS
            | CHECK_DEVICE_STATE
            | GET_SHMEM_CONFIG => exactly(0),
            SET_FEATURES | SET_PROTOCOL_FEATURES | SEND_RARP | NET_SET_MTU | SET_STATUS => exactly(8),
            SET_MEM_TABLE => self.memory_table(message),
            SET_LOG_BASE => self.log_base(message),
            // Some senders give it a payload without meaning.
            SET_LOG_FD if size == 0 || size == 8 => Ok(Fds::Log),
            SET_SLAVE_REQ_FD if size == 0 || size == 8 => Ok(Fds::SlaveChannel),
            SET_LOG_FD | SET_SLAVE_REQ_FD => Err(Violation::PayloadSize(number, size)),
            SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE | SET_VRING_ENDIAN | VRING_KICK => {
                exactly(8)?;
                self.queue(number, u32_at(message, HEADER).unwrap_or(u32::MAX).into())?;
                Ok(Fds::None)
            }
            SET_VRING_ADDR => {
                exactly(40)?;
                self.queue(number, u32_at(message, HEADER).unwrap_or(u32::MAX).into())?;
                Ok(Fds::None)
            }
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
                exactly(8)?;
                let payload = u64_at(message, HEADER).unwrap_or(u64::MAX);
                // Bits above 8 mean nothing, and then they aren't a queue's either.
                let queue = self.queue(number, payload & !NO_FD)?;
                Ok(match (number, payload & NO_FD != 0) {
                    (SET_VRING_KICK, false) => Fds::Kick(queue),
                    (SET_VRING_KICK, true) => Fds::NoKick(queue),
                    (_, true) => Fds::None,
                    (SET_VRING_CALL, false) => Fds::Call(queue),
                    _ => Fds::Err(queue),
                })
            }
            // Offset, size and flags, then that many bytes: the daemon's to check, like the two that follow.
            GET_CONFIG | SET_CONFIG if size < 12 => Err(Violation::PayloadSize(number, size)),
            GET_CONFIG | SET_CONFIG | IOTLB_MSG | CREATE_CRYPTO_SESSION | CLOSE_CRYPTO_SESSION => Ok(Fds::None),
            POSTCOPY_ADVISE | POSTCOPY_LISTEN | POSTCOPY_END | GET_INFLIGHT_FD | SET_INFLIGHT_FD | GPU_SET_SOCKET
            | ADD_MEM_REG | REM_MEM_REG | GET_SHARED_OBJECT | SET_DEVICE_STATE_FD => Err(Violation::NeedsFd(number)),
            _ => Err(Violation::Unknown(number)),
        }
    }

    fn queue(&self, request: u32, index: u64) -> Result<u8, Violation> {
        match u8::try_from(index) {
            Ok(queue) if u16::from(queue) < self.queues => Ok(queue),
            _ => Err(Violation::Queue(request, index, self.queues)),
        }
    }

    /// Region k is at base(k) + mmap_offset(k) of the shared memory, where base(k) is the sum of the sizes and mmap_offsets
    /// before it: what the field says when it arrives decides, so it is read before it is replaced.
    fn memory_table(&mut self, message: &mut [u8]) -> Result<Fds, Violation> {
        let size = message.len() - HEADER;
        let wrong_size = Violation::PayloadSize(request::SET_MEM_TABLE, size);
        let count = u32_at(message, HEADER).ok_or(wrong_size)?;
        if count as usize > MAX_REGIONS {
            return Err(Violation::Regions(count));
        }
        let count = count as usize;
        if size != MEMORY_HEADER + count * MEMORY_REGION {
            return Err(wrong_size);
        }
        let mut base = 0;
        for region in 0..count {
            let at = HEADER + MEMORY_HEADER + region * MEMORY_REGION;
            let address = u64_at(message, at).ok_or(wrong_size)?;
            let length = u64_at(message, at + 8).ok_or(wrong_size)?;
            let user = u64_at(message, at + 16).ok_or(wrong_size)?;
            let mmap_offset = u64_at(message, at + 24).ok_or(wrong_size)?;
            // Daemons add the length to these two as well.
            if length == 0 || address.checked_add(length).is_none() || user.checked_add(length).is_none() {
                return Err(Violation::Region(region));
            }
            let (start, end) = self.place(base, mmap_offset, length).ok_or(Violation::Region(region))?;
            put_u64(message, at + 24, start);
            base = end;
        }
        self.regions_end = base;
        Ok(Fds::Memory(count))
    }

    fn log_base(&mut self, message: &mut [u8]) -> Result<Fds, Violation> {
        let size = message.len() - HEADER;
        let wrong_size = Violation::PayloadSize(request::SET_LOG_BASE, size);
        // Without LOG_SHMFD this is an address of the master's process (8 bytes), which is of no use to anybody.
        if size != 16 {
            return Err(wrong_size);
        }
        let length = u64_at(message, HEADER).ok_or(wrong_size)?;
        let mmap_offset = u64_at(message, HEADER + 8).ok_or(wrong_size)?;
        if length == 0 {
            return Err(Violation::Log);
        }
        let (start, _) = self
            .place(self.regions_end, mmap_offset, length)
            .ok_or(Violation::Log)?;
        put_u64(message, HEADER + 8, start);
        Ok(Fds::Memory(1))
    }

    /// Offset in the file, and end in the shared memory; None when it doesn't fit, on the way to which nothing wraps.
    fn place(&self, base: u64, mmap_offset: u64, length: u64) -> Option<(u64, u64)> {
        let start = base.checked_add(mmap_offset)?;
        let end = start.checked_add(length)?;
        if end > self.window.length {
            return None;
        }
        Some((self.window.offset.checked_add(start)?, end))
    }
}

fn check_header(message: &[u8]) -> Result<Header, Violation> {
    let header = Header::parse(message).ok_or(Violation::NoHeader)?;
    if header.flags & VERSION_MASK != VERSION {
        return Err(Violation::Version(header.request));
    }
    let payload = message.len() - HEADER;
    if header.size as usize != payload || payload > MAX_PAYLOAD {
        return Err(Violation::Length(header.request, header.size, payload));
    }
    Ok(header)
}

/// The answer to a slave request that the bridge refuses because of its fds; None when no answer is wanted.
pub fn refusal(message: &[u8]) -> Option<Vec<u8>> {
    let header = Header::parse(message).filter(|header| header.needs_reply() && !header.is_reply())?;
    Some(message::build(header.request, message::REPLY, &1u64.to_le_bytes()))
}
