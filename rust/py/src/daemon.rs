// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stock daemon of the crate vhost-user-backend.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use vhu_core::vub::Daemon;

use crate::error::to_py;
use crate::member::Member;

/// A member behind the stock daemon of the crate vhost-user-backend.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct VhostUserDaemon {
    inner: Daemon,
}

#[pymethods]
impl VhostUserDaemon {
    #[new]
    fn new(py: Python<'_>, member: &Member, path: PathBuf) -> PyResult<Self> {
        let inner = Daemon::new(Arc::clone(&member.inner), &path).map_err(|e| to_py(py, &e))?;
        Ok(Self { inner })
    }

    fn run(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.run()).map_err(|e| to_py(py, &e))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}
