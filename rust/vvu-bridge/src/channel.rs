// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whole vhost-user messages over a stream socket that never waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::message::{Header, HEADER, MAX_MESSAGE, MAX_PAYLOAD};
use crate::sys;

/// Messages that may wait for room. The bridge stops to take others long before.
const MAX_WAITING: usize = 256;

/// A message that arrived.
#[derive(Debug)]
pub struct Incoming {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// Fds that came along, closed.
    pub fds: usize,
}

/// Why a channel is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer has closed it.
    #[error("closed")]
    Closed,
    /// The peer wrote what isn't a message.
    #[error("a message of {0} bytes")]
    TooLong(u32),
    /// The peer doesn't read.
    #[error("it doesn't read")]
    Stuck,
    /// Anything else.
    #[error("{0}")]
    Io(#[from] io::Error),
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    input: Vec<u8>,
    input_fds: usize,
    output: VecDeque<Outgoing>,
}

impl Channel {
    /// Takes over a connected stream socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            input: Vec::new(),
            input_fds: 0,
            output: VecDeque::new(),
        }
    }

    /// Whether everything has been written.
    pub fn is_flushed(&self) -> bool {
        self.output.is_empty()
    }

    /// The next message; None when it isn't complete yet.
    ///
    /// # Errors
    /// [`ChannelError`]: the channel is of no more use.
    pub fn receive(&mut self) -> Result<Option<Incoming>, ChannelError> {
        loop {
            let wanted = match Header::parse(&self.input) {
                None => HEADER,
                Some(header) if header.size as usize > MAX_PAYLOAD => return Err(ChannelError::TooLong(header.size)),
                Some(header) => HEADER + header.size as usize,
            };
            let have = self.input.len();
            if have == wanted && have >= HEADER {
                let bytes = std::mem::take(&mut self.input);
                let fds = std::mem::take(&mut self.input_fds);
                return Ok(Some(Incoming { bytes, fds }));
            }
            // Never beyond this message, so that its fds aren't taken for the next one's.
            let mut buffer = [0; MAX_MESSAGE];
            match sys::receive(&self.socket, &mut buffer[..wanted - have]) {
                Ok(received) => {
                    self.input_fds += received.fds;
                    if received.bytes == 0 {
                        return Err(ChannelError::Closed);
                    }
                    self.input.extend_from_slice(&buffer[..received.bytes]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_hang_up(&error) => return Err(ChannelError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes a message, or keeps it for [`Channel::flush`].
    ///
    /// # Errors
    /// [`ChannelError`]: the channel is of no more use.
    pub fn send(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Result<(), ChannelError> {
        if self.output.len() >= MAX_WAITING {
            return Err(ChannelError::Stuck);
        }
        self.output.push_back(Outgoing { bytes, sent: 0, fds });
        self.flush()
    }

    /// Writes what waits, as far as there is room.
    ///
    /// # Errors
    /// [`ChannelError`]: the channel is of no more use.
    pub fn flush(&mut self) -> Result<(), ChannelError> {
        while let Some(message) = self.output.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(AsFd::as_fd).collect();
            match sys::send(&self.socket, &message.bytes[message.sent..], &fds) {
                Ok(sent) => {
                    // Fds go with the first byte.
                    message.fds.clear();
                    message.sent += sent;
                    if message.sent == message.bytes.len() {
                        self.output.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_hang_up(&error) => return Err(ChannelError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
