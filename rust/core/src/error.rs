// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong, each with a rule: a stable dotted name of the check that failed.
//!
//! Rules are part of the interface: operators see them over QMP (`broken`, `last-error`), tests name them.

use std::fmt;

/// A check that failed.
///
/// `rule` is a stable name such as `ring.avail-index`; `reason` says what was found and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Stable dotted name of the check.
    pub rule: &'static str,
    /// What was found, in words for an operator.
    pub reason: String,
    /// The queue concerned, when it is one queue's fault.
    pub queue: Option<u16>,
}

impl Fault {
    /// A fault that no single queue is to blame for.
    pub fn new(rule: &'static str, reason: impl Into<String>) -> Self {
        Self {
            rule,
            reason: reason.into(),
            queue: None,
        }
    }

    /// The same fault, laid at the door of one queue.
    #[must_use]
    pub fn on_queue(mut self, index: u16) -> Self {
        self.queue = Some(index);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.queue {
            Some(queue) => write!(f, "{}: queue {queue}: {}", self.rule, self.reason),
            None => write!(f, "{}: {}", self.rule, self.reason),
        }
    }
}

impl std::error::Error for Fault {}

/// Errors of the control side (what an operator or a front end asked for can't be done).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer broke a rule; see [`Fault`].
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The member is attached, or its rings still drain.
    #[error("member {0} is busy: {1}")]
    Busy(u32, &'static str),
    /// An image can't be used as asked.
    #[error("image {spec}: {reason}")]
    Image {
        /// The image as the operator named it.
        spec: String,
        /// Why not.
        reason: String,
    },
    /// A parameter is out of its range.
    #[error("{0}")]
    Invalid(String),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The worker pool is closed.
    #[error("the worker pool is closed")]
    Closed,
}

impl Error {
    /// The last OS error, with what was tried.
    pub fn last_os(what: &'static str) -> Self {
        Error::Os {
            what,
            source: std::io::Error::last_os_error(),
        }
    }

    /// A stable name for the kind of error; a fault's own rule where there is one.
    pub fn rule(&self) -> &'static str {
        match self {
            Error::Fault(fault) => fault.rule,
            Error::Busy(..) => "member.busy",
            Error::Image { .. } => "image",
            Error::Invalid(_) => "parameter",
            Error::Os { .. } => "os",
            Error::Closed => "pool.closed",
        }
    }
}

/// Result of the control side.
pub type Result<T> = std::result::Result<T, Error>;
