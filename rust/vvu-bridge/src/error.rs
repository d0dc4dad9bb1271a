// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can fail outside of a session.

use std::io;

/// Why the bridge can't go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or a file.
    #[error("{0}: {1}")]
    Io(String, #[source] io::Error),
    /// Something about this machine or the command line that another attempt won't change.
    #[error("{0}")]
    Setup(String),
    /// The device does what no device may do, or asks for a reset. A reset may help.
    #[error("device: {0}")]
    Device(String),
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Says what was being done when an I/O error came.
pub trait Context<T> {
    /// Names the operation.
    ///
    /// # Errors
    /// The I/O error, if there was one, with `what` in front.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io(what(), error))
    }
}
