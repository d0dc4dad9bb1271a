// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI functions and the vfio-user server.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use vhu_core::function;
use vhu_core::owner::forward::Forwarder;
use vhu_core::sys::PeerFd;
use vhu_core::vfio_user::function::PciFunction;
use vhu_core::vfio_user::server;

use crate::error::to_py;
use crate::member::Member;
use crate::owner::DeviceGroup;
use crate::pool::Pool;

/// A PCI function of a member, or of the owner.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct Function {
    inner: Arc<function::Function>,
}

fn made(py: Python<'_>, result: vhu_core::error::Result<Arc<function::Function>>) -> PyResult<Function> {
    result
        .map(|inner| Function { inner })
        .map_err(|error| to_py(py, &error))
}

fn forwarder(py: Python<'_>, group: &DeviceGroup, member: &Member) -> PyResult<Arc<Forwarder>> {
    Forwarder::new(Arc::clone(&group.inner), Arc::clone(&member.inner))
        .map(Arc::new)
        .map_err(|error| to_py(py, &error))
}

impl Function {
    /// One that was made, or why not.
    pub(crate) fn of(py: Python<'_>, result: vhu_core::error::Result<Arc<function::Function>>) -> PyResult<Self> {
        made(py, result)
    }
}

#[pymethods]
impl Function {
    #[staticmethod]
    fn owner(py: Python<'_>, group: &DeviceGroup, member: &Member) -> PyResult<Self> {
        let vfs = Arc::clone(&group.inner);
        made(py, function::Function::owner(Arc::clone(&member.inner), vfs))
    }

    #[staticmethod]
    fn legacy(py: Python<'_>, group: &DeviceGroup, member: &Member) -> PyResult<Self> {
        let ports = forwarder(py, group, member)?;
        made(py, function::Function::legacy(Arc::clone(&member.inner), ports))
    }

    #[staticmethod]
    fn transitional(py: Python<'_>, group: &DeviceGroup, member: &Member) -> PyResult<Self> {
        let ports = forwarder(py, group, member)?;
        made(py, function::Function::transitional(Arc::clone(&member.inner), ports))
    }

    #[staticmethod]
    #[pyo3(signature = (group, member))]
    fn modern(py: Python<'_>, group: &DeviceGroup, member: &Member) -> PyResult<Self> {
        // Named for the sake of symmetry: a virtual function's own interface doesn't go through its owner.
        let _ = group;
        made(py, function::Function::modern(Arc::clone(&member.inner)))
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = self.inner.info();
        let dict = PyDict::new(py);
        dict.set_item("kind", info.kind)?;
        dict.set_item("member", info.member)?;
        dict.set_item("vendor_id", info.identity.vendor)?;
        dict.set_item("device_id", info.identity.device)?;
        dict.set_item("revision", info.identity.revision)?;
        dict.set_item("class_code", info.identity.class)?;
        dict.set_item("subsystem_vendor_id", info.identity.subsystem_vendor)?;
        dict.set_item("subsystem_id", info.identity.subsystem)?;
        let bars = PyList::empty(py);
        for bar in &info.bars {
            let entry = PyDict::new(py);
            entry.set_item("index", bar.index)?;
            entry.set_item("size", bar.size)?;
            entry.set_item("kind", bar.kind)?;
            bars.append(entry)?;
        }
        dict.set_item("bars", bars)?;
        dict.set_item("capabilities", info.capabilities)?;
        dict.set_item("command", info.command)?;
        dict.set_item("msix_enabled", info.msix_enabled)?;
        let irqs = PyDict::new(py);
        irqs.set_item("intx", info.intx)?;
        irqs.set_item("msix", info.msix)?;
        dict.set_item("irqs", irqs)?;
        let dma = PyList::empty(py);
        for region in &info.dma {
            let entry = PyDict::new(py);
            entry.set_item("iova", region.iova)?;
            entry.set_item("size", region.size)?;
            dma.append(entry)?;
        }
        dict.set_item("dma", dma)?;
        Ok(dict)
    }
}

/// Serves one function to one client after the other.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct VfioUserServer {
    inner: Arc<server::Server>,
    pool: Arc<vhu_core::worker::Pool>,
}

#[pymethods]
impl VfioUserServer {
    #[new]
    fn new(py: Python<'_>, pool: &Pool, function: &Function, listener: i32) -> PyResult<Self> {
        // From here on the fd is ours, also when it turns out to be something else.
        let listener = PeerFd::adopt(listener)
            .and_then(PeerFd::into_unix_stream)
            .ok_or_else(|| PyValueError::new_err(format!("fd {listener} is not a UNIX stream socket")))?;
        let function = Arc::clone(&function.inner) as Arc<dyn PciFunction>;
        let inner = server::Server::new(&pool.inner, function, listener).map_err(|error| to_py(py, &error))?;
        Ok(Self {
            inner,
            pool: Arc::clone(&pool.inner),
        })
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let statistics = self.inner.statistics();
        let dict = PyDict::new(py);
        dict.set_item("connected", statistics.connected)?;
        dict.set_item("peer_pid", statistics.peer_pid)?;
        dict.set_item("connections", statistics.connections)?;
        dict.set_item("refused", statistics.refused)?;
        dict.set_item("messages", statistics.messages)?;
        dict.set_item("reads", statistics.reads)?;
        dict.set_item("writes", statistics.writes)?;
        dict.set_item("errors", statistics.errors)?;
        Ok(dict)
    }

    fn disconnect(&self, reason: &str) {
        self.inner.disconnect(reason);
    }

    fn close(&self) -> Option<u64> {
        let done = self.pool.events().completion();
        let token = done.token();
        self.inner.close(done);
        Some(token)
    }
}
