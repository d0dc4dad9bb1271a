// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The worker pool.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use vhu_core::event::Event;
use vhu_core::worker;

use crate::convert;
use crate::error::to_py;

/// A fixed set of worker threads.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct Pool {
    pub(crate) inner: Arc<worker::Pool>,
}

#[pymethods]
impl Pool {
    #[new]
    #[pyo3(signature = (workers=None))]
    fn new(py: Python<'_>, workers: Option<usize>) -> PyResult<Self> {
        let pool = py.detach(|| worker::Pool::new(workers)).map_err(|e| to_py(py, &e))?;
        Ok(Self { inner: Arc::new(pool) })
    }

    fn event_fd(&self) -> i32 {
        self.inner.events().fd()
    }

    fn take_events<'py>(&self, py: Python<'py>) -> PyResult<Vec<(&'static str, u32, Bound<'py, PyDict>)>> {
        self.inner
            .events()
            .take()
            .into_iter()
            .map(|event| {
                let data = PyDict::new(py);
                Ok(match event {
                    Event::Done { token } => {
                        data.set_item("token", token)?;
                        ("done", 0, data)
                    }
                    Event::Status { member, old, new } => {
                        data.set_item("old", old)?;
                        data.set_item("new", new)?;
                        ("status", member, data)
                    }
                    Event::Broken { member, fault } => {
                        let data = convert::fault(py, Some(&fault))?.unwrap_or(data);
                        ("broken", member, data)
                    }
                    Event::Config { member } => ("config", member, data),
                    Event::Relay { member } => ("relay", member, data),
                    Event::FunctionConnected {
                        member,
                        function,
                        peer_pid,
                    } => {
                        data.set_item("function", function)?;
                        data.set_item("peer_pid", peer_pid)?;
                        ("function-connected", member, data)
                    }
                    Event::FunctionDisconnected {
                        member,
                        function,
                        reason,
                    } => {
                        data.set_item("function", function)?;
                        data.set_item("reason", reason)?;
                        ("function-disconnected", member, data)
                    }
                })
            })
            .collect()
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let workers = PyList::empty(py);
        for (index, worker) in self.inner.statistics().into_iter().enumerate() {
            let entry = PyDict::new(py);
            entry.set_item("index", index)?;
            entry.set_item("queues", worker.queues)?;
            entry.set_item("wakeups", worker.wakeups)?;
            entry.set_item("turns", worker.turns)?;
            workers.append(entry)?;
        }
        let dict = PyDict::new(py);
        dict.set_item("workers", workers)?;
        dict.set_item("mappings", self.inner.mappings().len())?;
        Ok(dict)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}
