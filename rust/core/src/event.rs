// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What Rust has to tell Python: a queue of events behind one eventfd, and completions that many may have to report.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Fault, Result};
use crate::sys;

/// Called once, from any thread, when something that was waited for is there. Must not block, and must not take locks that
/// its caller's caller may hold; as a rule it sets a flag and wakes somebody.
pub type Waker = Box<dyn FnOnce() + Send>;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The operation with this token has ended everywhere.
    Done {
        /// Which.
        token: u64,
    },
    /// The device status register changed.
    Status {
        /// Member.
        member: u32,
        /// Before.
        old: u8,
        /// After.
        new: u8,
    },
    /// A member was marked broken.
    Broken {
        /// Member.
        member: u32,
        /// Why.
        fault: Fault,
    },
    /// The device configuration changed.
    Config {
        /// Member.
        member: u32,
    },
    /// A client has connected to a PCI function.
    FunctionConnected {
        /// Member; 0 is the owner.
        member: u32,
        /// Kind of function.
        function: &'static str,
        /// The client's process.
        peer_pid: Option<i32>,
    },
    /// A client has left a PCI function, and everything of it has ended.
    FunctionDisconnected {
        /// Member; 0 is the owner.
        member: u32,
        /// Kind of function.
        function: &'static str,
        /// Why.
        reason: String,
    },
}

/// The event queue of a group. Events are control-plane only and bounded by what a front end can trigger per message.
pub struct Events {
    fd: OwnedFd,
    queue: Mutex<Vec<Event>>,
    tokens: AtomicU64,
}

impl Events {
    /// An empty queue.
    ///
    /// # Errors
    /// [`Error::Os`] when no eventfd can be made.
    pub fn new() -> Result<Self> {
        let fd = sys::eventfd().map_err(|source| Error::Os {
            what: "eventfd",
            source,
        })?;
        Ok(Self {
            fd,
            queue: Mutex::new(Vec::new()),
            tokens: AtomicU64::new(1),
        })
    }

    /// The eventfd that is readable while there are events. Stays ours.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Adds an event and wakes the reader.
    pub fn push(&self, event: Event) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        sys::eventfd_signal(&self.fd);
    }

    /// All events so far. The eventfd is drained first, so that an event pushed meanwhile wakes the reader again.
    pub fn take(&self) -> Vec<Event> {
        sys::eventfd_drain(self.fd.as_raw_fd());
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A completion whose `Done` event comes when its last clone is dropped.
    pub fn completion(self: &Arc<Self>) -> Completion {
        let token = self.token();
        let events = Arc::clone(self);
        Completion(Arc::new(Pending {
            token,
            then: Mutex::new(Some(Box::new(move || events.push(Event::Done { token })))),
        }))
    }

    /// A token of its own, for a `Done` event that somebody else will push.
    pub fn token(&self) -> u64 {
        self.tokens.fetch_add(1, Ordering::Relaxed)
    }
}

/// One operation that several workers take part in. Each holds a clone and drops it when its part is done, also when it
/// panics or goes away, so the end is always reported.
#[derive(Clone)]
pub struct Completion(Arc<Pending>);

impl Completion {
    /// A completion that calls `then` when its last clone is dropped.
    pub fn call(then: impl FnOnce() + Send + 'static) -> Self {
        Self(Arc::new(Pending {
            token: 0,
            then: Mutex::new(Some(Box::new(then))),
        }))
    }

    /// The token of the `Done` event; 0 for a completion that calls something instead.
    pub fn token(&self) -> u64 {
        self.0.token
    }
}

struct Pending {
    token: u64,
    /// Behind a mutex only so that the whole can be shared; it is taken once, in drop.
    then: Mutex<Option<Waker>>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        let then = self.then.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(then) = then {
            then();
        }
    }
}
