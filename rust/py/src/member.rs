// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Members.

use std::os::fd::{IntoRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::{Image, SECTOR};
use vhu_core::error::Error;
use vhu_core::member::{self, AdminQueues, MemberOptions};
use vhu_core::poll::MAX_POLL;
use vhu_core::sys;

use crate::convert;
use crate::error::to_py;
use crate::owner::DeviceGroup;
use crate::pool::Pool;

/// One member of the group.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct Member {
    pub(crate) inner: Arc<member::Member>,
    /// None: it is another kind of device.
    blk: Option<Arc<Blk>>,
}

fn open(
    py: Python<'_>,
    image: &str,
    read_only: bool,
    shared: bool,
    image_fd: Option<RawFd>,
    options: BlkOptions,
) -> PyResult<Arc<Blk>> {
    let fd = image_fd.and_then(sys::adopt);
    if image_fd.is_some() && fd.is_none() {
        return Err(PyValueError::new_err("image_fd is not an open file descriptor"));
    }
    let open = |fd| match fd {
        Some(fd) => Image::adopt(image, read_only, shared, fd),
        None if shared => Image::open_shared(image, read_only),
        None => Image::open(image, read_only),
    };
    py.detach(|| open(fd).and_then(|image| Blk::new(image, options)))
        .map(Arc::new)
        .map_err(|e| to_py(py, &e))
}

fn check_vectors(vectors: u16) -> PyResult<u16> {
    if vectors <= 2048 {
        Ok(vectors)
    } else {
        Err(PyValueError::new_err(format!(
            "vectors = {vectors}; 0 to 2048 are possible"
        )))
    }
}

fn check_poll(poll_us: u32) -> PyResult<Duration> {
    let poll = Duration::from_micros(poll_us.into());
    if poll <= MAX_POLL {
        Ok(poll)
    } else {
        Err(PyValueError::new_err(format!(
            "poll_us = {poll_us}; 0 to {} are possible",
            MAX_POLL.as_micros()
        )))
    }
}

impl Member {
    /// A member that is no block device.
    pub(crate) fn of(inner: Arc<member::Member>) -> Self {
        Self { inner, blk: None }
    }

    fn disk(&self) -> vhu_core::error::Result<&Blk> {
        self.blk
            .as_deref()
            .ok_or_else(|| Error::Invalid(format!("member {} has no image", self.inner.id())))
    }
}

#[pymethods]
impl Member {
    #[staticmethod]
    #[pyo3(signature = (pool, id, image, *, read_only=false, queues=1, queue_size=256, legacy=true, blk_size=512, serial="", packed=false, in_order=false, shared=false, vectors=None, image_fd=None, poll_us=0))]
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
        packed: bool,
        in_order: bool,
        shared: bool,
        vectors: Option<u16>,
        image_fd: Option<RawFd>,
        poll_us: u32,
    ) -> PyResult<Self> {
        let options = BlkOptions {
            queues,
            queue_size,
            blk_size,
            serial: serial.to_owned(),
        };
        let blk = open(py, image, read_only, shared, image_fd, options)?;
        let device = Arc::clone(&blk);
        let options = MemberOptions {
            legacy,
            packed,
            in_order,
            vectors: check_vectors(vectors.unwrap_or(queues + 1))?,
            admin: None,
            poll: check_poll(poll_us)?,
        };
        Ok(Self {
            inner: member::Member::new(Arc::clone(&pool.inner), id, device, options),
            blk: Some(blk),
        })
    }

    /// The owner itself: member 0, with administration virtqueues behind its own.
    #[staticmethod]
    #[pyo3(signature = (pool, group, image, *, read_only=false, queues=1, queue_size=256, blk_size=512, serial="", packed=false, in_order=false, shared=false, vectors=None, image_fd=None, poll_us=0))]
    #[allow(clippy::too_many_arguments)]
    fn owner(
        py: Python<'_>,
        pool: &Pool,
        group: &DeviceGroup,
        image: &str,
        read_only: bool,
        queues: u16,
        queue_size: u16,
        blk_size: u32,
        serial: &str,
        packed: bool,
        in_order: bool,
        shared: bool,
        vectors: Option<u16>,
        image_fd: Option<RawFd>,
        poll_us: u32,
    ) -> PyResult<Self> {
        let options = BlkOptions {
            queues,
            queue_size,
            blk_size,
            serial: serial.to_owned(),
        };
        let blk = open(py, image, read_only, shared, image_fd, options)?;
        let device = Arc::clone(&blk);
        let count = group.inner.core().options.admin_queues;
        let options = MemberOptions {
            legacy: false,
            packed,
            in_order,
            vectors: check_vectors(vectors.unwrap_or(queues + count + 1))?,
            admin: Some(AdminQueues {
                device: group.inner.function_device(),
                count,
            }),
            poll: check_poll(poll_us)?,
        };
        let inner = member::Member::new(Arc::clone(&pool.inner), 0, device, options);
        let weak = Arc::downgrade(&group.inner);
        inner.set_on_reset(move || {
            if let Some(group) = weak.upgrade() {
                group.function_reset();
            }
        });
        Ok(Self { inner, blk: Some(blk) })
    }

    #[getter]
    fn id(&self) -> u32 {
        self.inner.id()
    }

    /// A duplicate of the image's fd, for a successor; None for an image that has none.
    fn image_fd(&self) -> PyResult<Option<RawFd>> {
        let Some(blk) = &self.blk else { return Ok(None) };
        let image = blk.image();
        let fd = image.file().map(|fd| fd.try_clone_to_owned()).transpose()?;
        Ok(fd.map(IntoRawFd::into_raw_fd))
    }

    fn set_writeback(&self, on: bool) {
        if let Some(blk) = &self.blk {
            blk.set_writeback(on);
        }
    }

    #[getter]
    fn attached(&self) -> bool {
        self.inner.attached()
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = convert::info(py, &self.inner)?;
        let Some(blk) = &self.blk else { return Ok(dict) };
        let image = blk.image();
        let options = blk.options();
        let config = PyDict::new(py);
        config.set_item("capacity", image.size() / SECTOR)?;
        config.set_item("blk_size", options.blk_size)?;
        config.set_item("num_queues", options.queues)?;
        config.set_item("seg_max", options.queue_size - 2)?;
        config.set_item("writeback", blk.writeback())?;
        config.set_item("read_only", blk.read_only())?;
        config.set_item("serial", blk.serial().as_str())?;
        dict.set_item("config", config)?;
        let entry = PyDict::new(py);
        entry.set_item("spec", &image.spec)?;
        entry.set_item("kind", image.kind())?;
        entry.set_item("size", image.size())?;
        entry.set_item("read_only", blk.read_only())?;
        dict.set_item("image", entry)?;
        Ok(dict)
    }

    #[pyo3(signature = (*, image=None, size=None, read_only=None, legacy=None, serial=None))]
    fn modify(
        &self,
        py: Python<'_>,
        image: Option<&str>,
        size: Option<u64>,
        read_only: Option<bool>,
        legacy: Option<bool>,
        serial: Option<&str>,
    ) -> PyResult<bool> {
        py.detach(|| {
            if serial.is_some() && self.inner.attached() {
                return Err(Error::Busy(self.inner.id(), "a front end is attached"));
            }
            if let Some(legacy) = legacy {
                self.inner.set_legacy(legacy)?;
            }
            if let Some(serial) = serial {
                self.disk()?.set_serial(serial)?;
            }
            if image.is_none() && size.is_none() && read_only.is_none() {
                return Ok(false);
            }
            self.disk()?.modify(image, size, read_only)
        })
        .map_err(|e| to_py(py, &e))
    }

    fn config_changed(&self) -> bool {
        self.inner.config_changed()
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.close().map_err(|e| to_py(py, &e))
    }
}
