// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The front end's half of a vhost-user connection: as much as a block device needs.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
const HEADER: usize = 12;
const MAX_PAYLOAD: usize = 4096;

/// Longest wait for the answer to one message.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Message numbers.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const SET_STATUS: u32 = 39;
}

/// Feature bits that this front end knows.
pub mod feature {
    #![allow(missing_docs)]
    pub const BLK_FLUSH: u64 = 1 << 9;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Protocol feature bits that this front end knows.
pub mod protocol {
    #![allow(missing_docs)]
    pub const MQ: u64 = 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const STATUS: u64 = 1 << 16;
}

/// Where a back end notes what it has in flight: its own memory, which the front end keeps for it.
pub struct Inflight {
    fd: File,
    /// Size, offset, number of queues and their size, as the back end gave them.
    description: Vec<u8>,
}

/// One connection.
pub struct Connection {
    stream: UnixStream,
    reply_ack: bool,
}

impl Connection {
    /// As `open`, with patience: a virtio-vhost-user device listens for masters only while its slave is up, which may just have
    /// begun.
    ///
    /// # Errors
    /// As `open`, after 5 s.
    pub fn open_patiently(path: &Path) -> io::Result<Self> {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            match Self::open(path) {
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
                opened => return opened,
            }
        }
    }

    /// Connects to a back end's socket.
    ///
    /// # Errors
    /// What connect says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        Ok(Self {
            stream,
            reply_ack: false,
        })
    }

    /// The socket, to be waited for.
    pub fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// From now on each message without an answer of its own asks for an acknowledgement.
    pub fn use_reply_ack(&mut self) {
        self.reply_ack = true;
    }

    fn send(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let size = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + payload.len());
        for word in [request, VERSION | flags, size] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(payload);
        let sent = self
            .stream
            .send_with_fds(&[&message[..]], fds)
            .map_err(io::Error::from)?;
        if sent == message.len() {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "message {request}: sent {sent} of {} bytes",
                message.len()
            )))
        }
    }

    fn receive(&mut self, request: u32) -> io::Result<Vec<u8>> {
        self.receive_with_fd(request).map(|(payload, _)| payload)
    }

    fn receive_with_fd(&mut self, request: u32) -> io::Result<(Vec<u8>, Option<File>)> {
        let context = |what: &str| io::Error::other(format!("answer to message {request}: {what}"));
        let mut header = [0u8; HEADER];
        // An fd comes with the first byte.
        let (got, fd) = self
            .stream
            .recv_with_fd(&mut header)
            .map_err(|e| context(&io::Error::from(e).to_string()))?;
        if got == 0 {
            return Err(context("the back end has closed the connection"));
        }
        self.stream
            .read_exact(&mut header[got..])
            .map_err(|e| context(&e.to_string()))?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (number, flags, size) = (word(0), word(4), word(8) as usize);
        if number != request || flags & FLAG_REPLY == 0 || size > MAX_PAYLOAD {
            return Err(context(&format!("number {number}, flags {flags:#x}, size {size}")));
        }
        let mut payload = vec![0u8; size];
        self.stream
            .read_exact(&mut payload)
            .map_err(|e| context(&e.to_string()))?;
        Ok((payload, fd))
    }

    /// Asks for memory to note requests in flight in.
    ///
    /// # Errors
    /// The socket's errors, and an answer without such memory.
    pub fn get_inflight(&mut self, queues: u16, size: u16) -> io::Result<Inflight> {
        // Size and offset are the back end's to fill in; the struct ends with 4 bytes of padding.
        let mut payload = vec![0u8; 16];
        payload.extend_from_slice(&words(&[u32::from(queues) | u32::from(size) << 16, 0]));
        self.send(request::GET_INFLIGHT_FD, 0, &payload, &[])?;
        match self.receive_with_fd(request::GET_INFLIGHT_FD)? {
            (description, Some(fd)) if description.len() == payload.len() => Ok(Inflight { fd, description }),
            (description, fd) => Err(io::Error::other(format!(
                "answer to GET_INFLIGHT_FD: {} bytes, {} fd",
                description.len(),
                if fd.is_some() { "with an" } else { "without an" }
            ))),
        }
    }

    /// Hands it back, before the rings start.
    ///
    /// # Errors
    /// As [`Connection::set`].
    pub fn set_inflight(&mut self, inflight: &Inflight) -> io::Result<()> {
        let fd = inflight.fd.as_raw_fd();
        self.set(request::SET_INFLIGHT_FD, &inflight.description, &[fd])
    }

    /// Sends a message that has no answer of its own, and waits for the acknowledgement when there is one.
    ///
    /// # Errors
    /// The socket's errors, and the back end's refusal.
    pub fn set(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> io::Result<()> {
        self.send(request, if self.reply_ack { FLAG_NEED_REPLY } else { 0 }, payload, fds)?;
        if self.reply_ack {
            let answer = number(&self.receive(request)?)?;
            if answer != 0 {
                return Err(io::Error::other(format!(
                    "the back end refuses message {request} ({answer})"
                )));
            }
        }
        Ok(())
    }

    /// Sends a message with a number in it.
    ///
    /// # Errors
    /// As [`Connection::set`].
    pub fn set_u64(&mut self, request: u32, value: u64) -> io::Result<()> {
        self.set(request, &value.to_le_bytes(), &[])
    }

    /// Sends a vring message: index and number.
    ///
    /// # Errors
    /// As [`Connection::set`].
    pub fn set_vring(&mut self, request: u32, index: u32, value: u32) -> io::Result<()> {
        self.set(request, &words(&[index, value]), &[])
    }

    /// Sends a message that is answered.
    ///
    /// # Errors
    /// The socket's errors, and an answer that is none.
    pub fn get(&mut self, request: u32, payload: &[u8]) -> io::Result<Vec<u8>> {
        self.send(request, 0, payload, &[])?;
        self.receive(request)
    }

    /// Sends a message that is answered by a number.
    ///
    /// # Errors
    /// As [`Connection::get`].
    pub fn get_u64(&mut self, request: u32) -> io::Result<u64> {
        number(&self.get(request, &[])?)
    }

    /// Bytes of the device configuration.
    ///
    /// # Errors
    /// As [`Connection::get`], and an answer of another size.
    pub fn config(&mut self, offset: u32, size: usize) -> io::Result<Vec<u8>> {
        let mut payload = words(&[offset, size as u32, 0]);
        payload.resize(HEADER + size, 0);
        let answer = self.get(request::GET_CONFIG, &payload)?;
        if answer.len() != HEADER + size {
            return Err(io::Error::other(format!(
                "GET_CONFIG of {size} bytes: {} in the answer",
                answer.len()
            )));
        }
        Ok(answer[HEADER..].to_vec())
    }
}

/// Little-endian words as bytes.
pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn number(payload: &[u8]) -> io::Result<u64> {
    let bytes: [u8; 8] = payload
        .try_into()
        .map_err(|_| io::Error::other(format!("{} bytes where 8 are due", payload.len())))?;
    Ok(u64::from_le_bytes(bytes))
}
