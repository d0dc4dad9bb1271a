// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Members.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::{Image, SECTOR};
use vhu_core::member;

use crate::convert;
use crate::error::to_py;
use crate::pool::Pool;

/// One member of the group.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct Member {
    pub(crate) inner: Arc<member::Member>,
    blk: Arc<Blk>,
}

#[pymethods]
impl Member {
    #[staticmethod]
    #[pyo3(signature = (pool, id, image, *, read_only=false, queues=1, queue_size=256, legacy=true, blk_size=512, serial=""))]
    #[allow(clippy::too_many_arguments)]
    fn blk(
        py: Python<'_>,
        pool: &Pool,
        id: u32,
        image: &str,
        read_only: bool,
        queues: u16,
        queue_size: u16,
        legacy: bool,
        blk_size: u32,
        serial: &str,
    ) -> PyResult<Self> {
        let options = BlkOptions {
            queues,
            queue_size,
            blk_size,
            serial: serial.to_owned(),
        };
        let blk = py
            .detach(|| Image::open(image, read_only).and_then(|image| Blk::new(image, options)))
            .map_err(|e| to_py(py, &e))?;
        let blk = Arc::new(blk);
        let device = Arc::clone(&blk);
        Ok(Self {
            inner: member::Member::new(
                Arc::clone(&pool.inner),
                id,
                device,
                member::MemberOptions {
                    legacy,
                    ..member::MemberOptions::default()
                },
            ),
            blk,
        })
    }

    #[getter]
    fn id(&self) -> u32 {
        self.inner.id()
    }

    #[getter]
    fn attached(&self) -> bool {
        self.inner.attached()
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = convert::info(py, &self.inner)?;
        let image = self.blk.image();
        let options = self.blk.options();
        let config = PyDict::new(py);
        config.set_item("capacity", image.size() / SECTOR)?;
        config.set_item("blk_size", options.blk_size)?;
        config.set_item("num_queues", options.queues)?;
        config.set_item("seg_max", options.queue_size - 2)?;
        config.set_item("writeback", self.blk.writeback())?;
        config.set_item("read_only", self.blk.read_only())?;
        config.set_item("serial", &options.serial)?;
        dict.set_item("config", config)?;
        let entry = PyDict::new(py);
        entry.set_item("spec", &image.spec)?;
        entry.set_item("kind", image.kind())?;
        entry.set_item("size", image.size())?;
        entry.set_item("read_only", self.blk.read_only())?;
        dict.set_item("image", entry)?;
        Ok(dict)
    }

    #[pyo3(signature = (*, image=None, size=None, read_only=None))]
    fn modify(
        &self,
        py: Python<'_>,
        image: Option<&str>,
        size: Option<u64>,
        read_only: Option<bool>,
    ) -> PyResult<bool> {
        py.detach(|| self.blk.modify(image, size, read_only))
            .map_err(|e| to_py(py, &e))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.close().map_err(|e| to_py(py, &e))
    }
}
