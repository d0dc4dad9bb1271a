// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-vhost-user devices.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use vhu_core::error::Fault;
use vhu_core::function;
use vhu_core::member::{self, MemberOptions};
use vhu_core::sys::{self, PeerFd};
use vhu_core::vvu;

use crate::convert;
use crate::error::{fault_to_py, to_py};
use crate::function::Function;
use crate::member::Member;
use crate::pool::Pool;
use crate::session::header_of;

/// Something to be mapped, or unmapped, by the front end of a device.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct SharedMemoryOperation {
    inner: vvu::Operation,
}

#[pymethods]
impl SharedMemoryOperation {
    #[getter]
    fn map(&self) -> bool {
        self.inner.map
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.inner.offset
    }

    #[getter]
    fn size(&self) -> u64 {
        self.inner.size
    }

    #[getter]
    fn fd_offset(&self) -> u64 {
        self.inner.fd_offset
    }

    /// The file's descriptor, which stays this object's.
    fn fileno(&self) -> RawFd {
        self.inner.fd.as_raw_fd()
    }
}

/// What a message of the master leaves to do.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct MasterOutcome {
    #[pyo3(get)]
    operations: Vec<Py<SharedMemoryOperation>>,
    /// Handed over when asked for; closed with this object otherwise.
    channel: Mutex<Option<OwnedFd>>,
}

#[pymethods]
impl MasterOutcome {
    fn take_channel(&self) -> Option<RawFd> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.take().map(IntoRawFd::into_raw_fd)
    }
}

fn operations(py: Python<'_>, list: Vec<vvu::Operation>) -> PyResult<Vec<Py<SharedMemoryOperation>>> {
    list.into_iter()
        .map(|inner| Py::new(py, SharedMemoryOperation { inner }))
        .collect()
}

/// A virtio-vhost-user device, with the member that has its registers.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct VhostUserDevice {
    device: Arc<vvu::VvuDevice>,
    member: Arc<member::Member>,
}

impl VhostUserDevice {
    /// Ends the session of a master that has broken a rule.
    fn send_away(&self, py: Python<'_>, session: u64, fault: Fault) -> PyErr {
        self.device.disconnect_master(session, Some(fault.clone()));
        fault_to_py(py, fault)
    }
}

#[pymethods]
impl VhostUserDevice {
    #[classattr]
    const MAX_QUEUES: u16 = vvu::MAX_QUEUES;
    #[classattr]
    const QUEUE_SIZE: u16 = vvu::QUEUE_SIZE;

    #[new]
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (pool, id, *, max_queues, uuid, shared_memory, vectors, ram_file=None))]
    fn new(
        py: Python<'_>,
        pool: &Pool,
        id: u32,
        max_queues: u16,
        uuid: [u8; 16],
        shared_memory: u64,
        vectors: u16,
        ram_file: Option<(RawFd, u64)>,
    ) -> PyResult<Self> {
        let ram_file = match ram_file {
            None => None,
            Some((fd, len)) => {
                let fd = sys::adopt(fd).ok_or_else(|| PyValueError::new_err(format!("fd {fd} is not open")))?;
                Some((fd, len))
            }
        };
        let options = vvu::Options {
            max_queues,
            uuid,
            shared_memory,
            ram_file,
        };
        let device = vvu::VvuDevice::new(Arc::clone(&pool.inner), id, options).map_err(|e| to_py(py, &e))?;
        let options = MemberOptions {
            vectors,
            ..MemberOptions::default()
        };
        let member = member::Member::new(Arc::clone(&pool.inner), id, Arc::clone(&device) as _, options);
        device.bind(&member);
        Ok(Self { device, member })
    }

    /// The member with the device's registers, for a vhost-user session.
    #[getter]
    fn member(&self) -> Member {
        Member::of(Arc::clone(&self.member))
    }

    /// The device as a PCI function.
    fn function(&self, py: Python<'_>) -> PyResult<Function> {
        Function::of(py, function::Function::modern(Arc::clone(&self.member)))
    }

    #[getter]
    fn slave_up(&self) -> bool {
        self.device.slave_up()
    }

    #[getter]
    fn ready(&self) -> bool {
        self.device.ready()
    }

    #[getter]
    fn session(&self) -> Option<u64> {
        self.device.session()
    }

    #[getter]
    fn waiting(&self) -> usize {
        self.device.waiting()
    }

    fn leftovers(&self, py: Python<'_>) -> PyResult<Vec<Py<SharedMemoryOperation>>> {
        operations(py, self.device.leftovers())
    }

    fn connect_master(&self, py: Python<'_>) -> PyResult<u64> {
        self.device.connect_master().map_err(|e| to_py(py, &e))
    }

    #[pyo3(signature = (session, rule=None, reason=None))]
    fn disconnect_master(&self, session: u64, rule: Option<&str>, reason: Option<String>) -> bool {
        let fault = rule.map(|rule| Fault::new(known_rule(rule), reason.unwrap_or_default()));
        self.device.disconnect_master(session, fault)
    }

    fn handle(
        &self,
        py: Python<'_>,
        session: u64,
        header: &[u8],
        payload: &[u8],
        fds: Vec<RawFd>,
    ) -> PyResult<MasterOutcome> {
        // Adopted before anything can fail: they are ours whatever happens.
        let fds = fds.into_iter().filter_map(PeerFd::adopt).collect();
        let header = header_of(py, header)?;
        let taken = self
            .device
            .master_message(session, &header, payload, fds)
            .map_err(|fault| self.send_away(py, session, fault))?;
        Ok(MasterOutcome {
            operations: operations(py, taken.operations)?,
            channel: Mutex::new(taken.channel),
        })
    }

    fn carried_out(&self, operation: &SharedMemoryOperation) {
        self.device.carried_out(&operation.inner);
    }

    fn commit(&self, session: u64) {
        self.device.commit(session);
    }

    fn handle_channel(&self, py: Python<'_>, session: u64, header: &[u8], payload: &[u8]) -> PyResult<()> {
        let header = header_of(py, header)?;
        self.device
            .channel_message(session, &header, payload)
            .map_err(|fault| self.send_away(py, session, fault))
    }

    /// What the slave has sent: (to the channel for its requests, header and payload).
    fn take<'py>(&self, py: Python<'py>) -> Vec<(bool, Bound<'py, PyBytes>)> {
        let outgoing = self.device.take();
        outgoing
            .into_iter()
            .map(|message| (message.channel, PyBytes::new(py, &message.bytes)))
            .collect()
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = self.device.info();
        let dict = PyDict::new(py);
        dict.set_item("status", info.status)?;
        dict.set_item("ready", info.ready)?;
        dict.set_item("paused", info.paused)?;
        dict.set_item("resets", info.resets)?;
        dict.set_item("features_offered", convert::features(py, info.features_offered)?)?;
        dict.set_item("features_accepted", convert::features(py, info.features_accepted)?)?;
        dict.set_item("protocol_slave", convert::protocol_features(py, info.protocol_slave)?)?;
        dict.set_item(
            "protocol_offered",
            convert::protocol_features(py, info.protocol_offered)?,
        )?;
        dict.set_item(
            "protocol_accepted",
            convert::protocol_features(py, info.protocol_accepted)?,
        )?;
        dict.set_item("has_channel", info.has_channel)?;
        let memory = PyList::empty(py);
        for shown in &info.memory {
            let entry = PyDict::new(py);
            entry.set_item("guest_address", shown.guest)?;
            entry.set_item("size", shown.size)?;
            entry.set_item("mmap_offset", shown.mmap_offset)?;
            entry.set_item("offset", shown.offset)?;
            entry.set_item("log", shown.log)?;
            memory.append(entry)?;
        }
        dict.set_item("memory", memory)?;
        dict.set_item("waiting", info.waiting)?;
        let last = match &info.last {
            None => None,
            Some(message) => {
                let entry = PyDict::new(py);
                entry.set_item("from", message.from)?;
                entry.set_item("request", message.request)?;
                entry.set_item("flags", message.flags)?;
                entry.set_item("size", message.size)?;
                Some(entry)
            }
        };
        dict.set_item("last_message", last)?;
        dict.set_item("last_error", convert::fault(py, info.last_error.as_ref())?)?;
        let counts = PyDict::new(py);
        counts.set_item("from_master", info.counts.from_master)?;
        counts.set_item("from_slave", info.counts.from_slave)?;
        counts.set_item("discarded", info.counts.discarded)?;
        counts.set_item("masters", info.counts.masters)?;
        dict.set_item("counts", counts)?;
        let queues = PyList::empty(py);
        for bells in &info.queues {
            let entry = PyDict::new(py);
            for (name, (rung, ignored)) in [("kick", bells.kick), ("call", bells.call), ("err", bells.err)] {
                entry.set_item(format!("{name}s"), rung)?;
                entry.set_item(format!("{name}s_ignored"), ignored)?;
            }
            entry.set_item("call_connected", bells.connected.0)?;
            entry.set_item("err_connected", bells.connected.1)?;
            queues.append(entry)?;
        }
        dict.set_item("queues", queues)?;
        dict.set_item("log_rings", info.log_bell.0)?;
        dict.set_item("log_rings_ignored", info.log_bell.1)?;
        Ok(dict)
    }
}

/// Rules that only the owner of the sockets can see broken.
fn known_rule(rule: &str) -> &'static str {
    match rule {
        "message.torn" => "message.torn",
        "message.silence" => "message.silence",
        "message.header" => "message.header",
        "message.version" => "message.version",
        "message.size" => "message.size",
        "message.fds" => "message.fds",
        "shared-memory.refused" => "shared-memory.refused",
        "shared-memory.not-negotiated" => "shared-memory.not-negotiated",
        _ => "connection",
    }
}
