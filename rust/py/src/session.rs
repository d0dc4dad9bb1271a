// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user sessions.

use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vhu_core::error::Fault;
use vhu_core::session;
use vhu_core::sys::PeerFd;

use crate::error::{fault_to_py, to_py};
use crate::member::Member;

/// What a session wants done after a message.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct Outcome {
    reply: Option<Py<PyBytes>>,
    #[pyo3(get)]
    pending: Option<u64>,
    /// Handed over when asked for; closed with this object otherwise.
    reply_fd: Mutex<Option<OwnedFd>>,
    /// As `reply_fd`.
    backend_channel: Mutex<Option<OwnedFd>>,
    #[pyo3(get)]
    config_changed: bool,
    error: Option<Fault>,
}

impl Outcome {
    fn new(py: Python<'_>, outcome: session::Outcome) -> Self {
        Self {
            reply: outcome.reply.map(|bytes| PyBytes::new(py, &bytes).unbind()),
            pending: outcome.pending,
            reply_fd: Mutex::new(outcome.reply_fd),
            backend_channel: Mutex::new(outcome.backend_channel),
            config_changed: outcome.config_changed,
            error: outcome.error,
        }
    }
}

#[pymethods]
impl Outcome {
    #[getter]
    fn reply<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.reply.as_ref().map(|bytes| bytes.bind(py).clone())
    }

    fn take_reply_fd(&self) -> Option<RawFd> {
        self.reply_fd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .map(IntoRawFd::into_raw_fd)
    }

    fn take_backend_channel(&self) -> Option<RawFd> {
        self.backend_channel
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .map(IntoRawFd::into_raw_fd)
    }

    #[getter]
    fn error(&self) -> Option<String> {
        self.error.as_ref().map(Fault::to_string)
    }
}

/// Header, payload, fds.
type Whole<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>, Vec<RawFd>);

/// The back-end side of one vhost-user connection, without the socket.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct Session {
    inner: Mutex<session::Session>,
}

impl Session {
    fn lock(&self) -> MutexGuard<'_, session::Session> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn header_of(py: Python<'_>, header: &[u8]) -> PyResult<[u8; session::HEADER_SIZE]> {
    header.try_into().map_err(|_| {
        let reason = format!("a header of {} bytes; it has {}", header.len(), session::HEADER_SIZE);
        fault_to_py(py, Fault::new("message.header", reason))
    })
}

#[pymethods]
impl Session {
    #[classattr]
    const HEADER_SIZE: usize = session::HEADER_SIZE;
    #[classattr]
    const MAX_FDS: usize = session::MAX_FDS;

    #[new]
    fn new(py: Python<'_>, member: &Member) -> PyResult<Self> {
        let inner = session::Session::new(member.inner.clone()).map_err(|e| to_py(py, &e))?;
        Ok(Self {
            inner: Mutex::new(inner),
        })
    }

    #[staticmethod]
    fn payload_size(py: Python<'_>, header: &[u8]) -> PyResult<usize> {
        session::payload_size(&header_of(py, header)?).map_err(|fault| fault_to_py(py, fault))
    }

    fn handle(&self, py: Python<'_>, header: &[u8], payload: &[u8], fds: Vec<RawFd>) -> PyResult<Outcome> {
        // Adopted before anything can fail: they are ours whatever happens.
        let fds = fds.into_iter().filter_map(PeerFd::adopt).collect();
        let header = header_of(py, header)?;
        Ok(Outcome::new(py, self.lock().handle(&header, payload, fds)))
    }

    fn resume(&self, py: Python<'_>, token: u64) -> Outcome {
        Outcome::new(py, self.lock().resume(token))
    }

    fn fail(&self, rule: &str, reason: String) {
        self.lock().fail(Fault::new(known_rule(rule), reason));
    }

    fn config_change<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.lock().config_change().map(|bytes| PyBytes::new(py, &bytes))
    }

    /// The message that has the front end map or unmap shared memory; None: not now.
    fn shared_memory<'py>(
        &self,
        py: Python<'py>,
        map: bool,
        offset: u64,
        size: u64,
        fd_offset: u64,
    ) -> Option<Bound<'py, PyBytes>> {
        let message = self.lock().shared_memory(map, offset, size, fd_offset);
        message.map(|bytes| PyBytes::new(py, &bytes))
    }

    #[getter]
    fn has_shared_memory(&self) -> bool {
        self.lock().has_shared_memory()
    }

    fn backend_reply(&self, py: Python<'_>, header: &[u8], payload: &[u8]) -> PyResult<Option<bool>> {
        let header = header_of(py, header)?;
        self.lock()
            .backend_reply(&header, payload)
            .map_err(|fault| fault_to_py(py, fault))
    }

    fn freeze(&self) -> Option<u64> {
        self.lock().freeze()
    }

    /// The messages that make another session what this one is: (state, rings), each a list of (header, payload, fds).
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<(Vec<Whole<'py>>, Vec<Whole<'py>>)> {
        let replay = self.lock().snapshot().map_err(|e| to_py(py, &e))?;
        let whole = |(bytes, fds): session::Whole| {
            let (header, payload) = bytes.split_at(session::HEADER_SIZE);
            let fds = fds.into_iter().map(IntoRawFd::into_raw_fd).collect();
            (PyBytes::new(py, header), PyBytes::new(py, payload), fds)
        };
        let state = replay.state.into_iter().map(whole).collect();
        Ok((state, replay.rings.into_iter().map(whole).collect()))
    }

    #[getter]
    fn config_read(&self) -> bool {
        self.lock().config_read()
    }

    #[getter]
    fn config_pending(&self) -> bool {
        self.lock().config_pending()
    }

    fn take_over(&self, config_read: bool) {
        self.lock().take_over(config_read);
    }

    fn taken_over(&self) {
        self.lock().taken_over();
    }

    fn detach(&self) -> Option<u64> {
        self.lock().detach()
    }
}

/// Closes fds that came from a front end, without ever waiting for it.
#[pyfunction]
pub fn discard(fds: Vec<RawFd>) {
    drop(fds.into_iter().filter_map(PeerFd::adopt).collect::<Vec<_>>());
}

/// Rules that only the owner of the socket can see broken. Rules are static names, so that the set stays a known one.
fn known_rule(rule: &str) -> &'static str {
    match rule {
        "message.torn" => "message.torn",
        "message.silence" => "message.silence",
        "message.header" => "message.header",
        "message.version" => "message.version",
        "message.size" => "message.size",
        "message.fds" => "message.fds",
        "drain.timeout" => "drain.timeout",
        "backend-channel" => "backend-channel",
        _ => "connection",
    }
}
