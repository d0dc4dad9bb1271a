// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What Rust has to tell Python: a queue of events behind one eventfd, and completions that many may have to report.

use std::collections::HashMap;
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
    /// A virtio-vhost-user device has something for its relay.
    Relay {
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

/// Events of a kind that a guest can cause as fast as it likes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Status,
    Broken,
    Config,
    Relay,
    Connected(&'static str),
    Disconnected(&'static str),
}

/// Events of one kind and member that may wait; beyond, the last one stands for the rest.
const MOST: usize = 16;

/// Events that wait, at most a few for each member: what a guest can repeat is merged.
#[derive(Default)]
struct Queue {
    events: Vec<Option<Event>>,
    /// How many there are of a kind, and where the last one is.
    places: HashMap<(u32, Kind), (usize, usize)>,
    /// Places whose event is gone.
    holes: usize,
}

impl Queue {
    fn push(&mut self, event: Event) {
        let key = match &event {
            Event::Done { .. } => {
                self.events.push(Some(event));
                return;
            }
            Event::Status { member, .. } => (*member, Kind::Status),
            Event::Broken { member, .. } => (*member, Kind::Broken),
            Event::Config { member } => (*member, Kind::Config),
            Event::Relay { member } => (*member, Kind::Relay),
            Event::FunctionConnected { member, function, .. } => (*member, Kind::Connected(function)),
            Event::FunctionDisconnected { member, function, .. } => (*member, Kind::Disconnected(function)),
        };
        match key.1 {
            // It says nothing but that there is something.
            Kind::Relay if self.places.contains_key(&key) => {}
            Kind::Relay => self.add(key, event),
            // The last one is what counts; of a status also where it began.
            Kind::Status | Kind::Broken | Kind::Config => {
                let full = self.places.get(&key).filter(|(count, _)| *count >= MOST);
                let waiting = full.and_then(|&(_, place)| self.events[place].as_mut());
                match (waiting, event) {
                    (Some(Event::Status { new, .. }), Event::Status { new: now, .. }) => *new = now,
                    (Some(waiting), event) => *waiting = event,
                    (None, event) => self.add(key, event),
                }
            }
            // Of clients that came and left while nobody looked one is told of.
            Kind::Connected(function) => {
                let left = (key.0, Kind::Disconnected(function));
                if self.places.contains_key(&key) && self.places.contains_key(&left) {
                    self.forget(key);
                    self.forget(left);
                }
                self.add(key, event);
            }
            Kind::Disconnected(function) => {
                if self.places.contains_key(&key) {
                    self.forget((key.0, Kind::Connected(function)));
                } else {
                    self.add(key, event);
                }
            }
        }
    }

    fn add(&mut self, key: (u32, Kind), event: Event) {
        let entry = self.places.entry(key).or_default();
        *entry = (entry.0 + 1, self.events.len());
        self.events.push(Some(event));
    }

    fn forget(&mut self, key: (u32, Kind)) {
        if let Some((_, place)) = self.places.remove(&key) {
            self.events[place] = None;
            self.holes += 1;
            if self.holes > MOST && self.holes > self.events.len() / 2 {
                self.compact();
            }
        }
    }

    /// Closes the holes, which a client could otherwise make for ever.
    fn compact(&mut self) {
        let mut moved = HashMap::new();
        let mut kept = Vec::new();
        for (place, event) in std::mem::take(&mut self.events).into_iter().enumerate() {
            if event.is_some() {
                moved.insert(place, kept.len());
                kept.push(event);
            }
        }
        for (_, place) in self.places.values_mut() {
            if let Some(new) = moved.get(place) {
                *place = *new;
            }
        }
        self.events = kept;
        self.holes = 0;
    }
}

/// The event queue of a group. Events are control-plane only.
pub struct Events {
    fd: OwnedFd,
    queue: Mutex<Queue>,
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
            queue: Mutex::default(),
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

    /// Places that events take, those included whose event is gone.
    pub fn room(&self) -> usize {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).events.len()
    }

    /// Events that wait to be read.
    pub fn len(&self) -> usize {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.events.iter().flatten().count()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All events so far. The eventfd is drained first, so that an event pushed meanwhile wakes the reader again.
    pub fn take(&self) -> Vec<Event> {
        sys::eventfd_drain(self.fd.as_raw_fd());
        let queue = std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner));
        queue.events.into_iter().flatten().collect()
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
