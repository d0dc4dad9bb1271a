// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device group's owner.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use vhu_core::event::Event;
use vhu_core::member::lens::LEGACY_REGISTERS;
use vhu_core::owner::command::{self, opcode_name};
use vhu_core::owner::local::{Full, Submitted, Ticket, LONG};
use vhu_core::owner::trace::{Begun, Entry, Origin};
use vhu_core::owner::{Compat, GroupOptions, Object, OBJECT_LIMIT, TOTAL_VFS};
use vhu_core::{member, owner};

use crate::error::{to_py, BusyError};
use crate::member::Member;
use crate::pool::Pool;

/// The owner and what its in-process driver has under way.
#[pyclass(frozen, module = "vhu_legacy._native")]
pub struct DeviceGroup {
    pub(crate) inner: Arc<owner::DeviceGroup>,
    strict: bool,
    pending: Mutex<HashMap<u64, (usize, Ticket)>>,
}

/// Offsets of legacy registers don't depend on the command but for the space they are in.
pub(crate) fn register_name(member: Option<&member::Member>, entry: &Entry) -> String {
    let offset = usize::from(entry.offset);
    let within = |name: &str, skip: usize| {
        if skip == 0 {
            name.to_owned()
        } else {
            format!("{name}+{skip}")
        }
    };
    match entry.opcode {
        None => "queue_notify".to_owned(),
        Some(command::LEGACY_COMMON_CFG_READ | command::LEGACY_COMMON_CFG_WRITE) => LEGACY_REGISTERS
            .iter()
            .find(|register| (register.offset..register.offset + register.size).contains(&offset))
            .map_or_else(
                || format!("common+{offset}"),
                |register| within(register.name, offset - register.offset),
            ),
        Some(command::LEGACY_DEV_CFG_READ | command::LEGACY_DEV_CFG_WRITE) => member
            .and_then(|member| {
                let fields = member.device().config_fields();
                let field = fields
                    .iter()
                    .find(|field| (field.offset..field.offset + field.size).contains(&offset))?;
                Some(within(field.name, offset - field.offset))
            })
            .unwrap_or_else(|| format!("config+{offset}")),
        Some(_) => String::new(),
    }
}

fn opcodes(bits: u64) -> Vec<u32> {
    (0..u64::BITS).filter(|bit| bits & (1 << bit) != 0).collect()
}

pub(crate) fn commands<'py>(py: Python<'py>, counts: &[(u16, u64)]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (opcode, count) in counts {
        dict.set_item(opcode_name(*opcode), count)?;
    }
    Ok(dict)
}

#[pymethods]
impl DeviceGroup {
    #[new]
    #[pyo3(signature = (pool, *, strict=false, feature_management=false, admin_queues=1, notify_region=true, compat=None))]
    fn new(
        py: Python<'_>,
        pool: &Pool,
        strict: bool,
        feature_management: bool,
        admin_queues: u16,
        notify_region: bool,
        compat: Option<HashMap<String, bool>>,
    ) -> PyResult<Self> {
        let mut switches = Compat::new(strict);
        for (name, value) in compat.unwrap_or_default() {
            *match name.as_str() {
                "lists_without_vfs" => &mut switches.lists_without_vfs,
                "capabilities_in_sr_iov_list" => &mut switches.capabilities_in_sr_iov_list,
                "self_group_preset" => &mut switches.self_group_preset,
                "pfn_zero_resets_device" => &mut switches.pfn_zero_resets_device,
                _ => return Err(PyValueError::new_err(format!("there is no switch {name:?}"))),
            } = value;
        }
        let options = GroupOptions {
            compat: switches,
            feature_management,
            notify_region,
            admin_queues,
        };
        let inner = owner::DeviceGroup::new(Arc::clone(&pool.inner), options).map_err(|error| to_py(py, &error))?;
        Ok(Self {
            inner,
            strict,
            pending: Mutex::default(),
        })
    }

    fn add(&self, py: Python<'_>, member: &Member) -> PyResult<()> {
        self.inner
            .add(Arc::clone(&member.inner))
            .map_err(|error| to_py(py, &error))
    }

    fn remove(&self, member_id: u32) -> PyResult<()> {
        if self.inner.remove(member_id) {
            Ok(())
        } else {
            Err(PyKeyError::new_err(member_id))
        }
    }

    #[pyo3(signature = (*, enable=None, num_vfs=None))]
    fn set_vfs(&self, enable: Option<bool>, num_vfs: Option<u16>) {
        let (enabled, count) = self.inner.core().vfs();
        self.inner
            .core()
            .set_vfs(enable.unwrap_or(enabled), num_vfs.unwrap_or(count));
    }

    fn reset(&self) {
        self.inner.reset();
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = self.inner.info();
        let dict = PyDict::new(py);
        dict.set_item("vf_enable", info.vf_enable)?;
        dict.set_item("num_vfs", info.num_vfs)?;
        dict.set_item("total_vfs", TOTAL_VFS)?;
        dict.set_item("strict", self.strict)?;
        dict.set_item("feature_management", info.options.feature_management)?;
        dict.set_item("notify_region", info.options.notify_region)?;
        dict.set_item("admin_queues", info.options.admin_queues)?;
        let compat = PyDict::new(py);
        let switches = info.options.compat;
        compat.set_item("lists_without_vfs", switches.lists_without_vfs)?;
        compat.set_item("capabilities_in_sr_iov_list", switches.capabilities_in_sr_iov_list)?;
        compat.set_item("self_group_preset", switches.self_group_preset)?;
        compat.set_item("pfn_zero_resets_device", switches.pfn_zero_resets_device)?;
        dict.set_item("compat", compat)?;
        let lists = |[own, vfs]: [u64; 2]| -> PyResult<Bound<'py, PyDict>> {
            let lists = PyDict::new(py);
            lists.set_item("self", opcodes(own))?;
            lists.set_item("sr_iov", opcodes(vfs))?;
            Ok(lists)
        };
        let objects = |objects: &[(u32, Object)]| -> PyResult<Bound<'py, PyList>> {
            let list = PyList::empty(py);
            for (id, object) in objects {
                let entry = PyDict::new(py);
                entry.set_item("type", 0)?;
                entry.set_item("id", id)?;
                entry.set_item("member", object.member)?;
                entry.set_item("operation", if object.operation == 0 { "get" } else { "set" })?;
                list.append(entry)?;
            }
            Ok(list)
        };
        let capabilities = |limits: (u8, u8)| -> PyResult<Bound<'py, PyDict>> {
            let entry = PyDict::new(py);
            entry.set_item("get_limit", limits.0)?;
            entry.set_item("set_limit", limits.1)?;
            Ok(entry)
        };
        dict.set_item("supported", lists(info.supported)?)?;
        dict.set_item("device_capabilities", capabilities((OBJECT_LIMIT, OBJECT_LIMIT))?)?;
        dict.set_item("used_lists", lists(info.used[0])?)?;
        dict.set_item("capabilities", capabilities(info.limits[0])?)?;
        dict.set_item("objects", objects(&info.objects[0])?)?;
        let function = PyDict::new(py);
        function.set_item("used_lists", lists(info.used[1])?)?;
        function.set_item("capabilities", capabilities(info.limits[1])?)?;
        function.set_item("objects", objects(&info.objects[1])?)?;
        dict.set_item("function", function)?;
        dict.set_item("commands", commands(py, &info.commands)?)?;
        dict.set_item("failed", info.failed)?;
        let queues = |queues: &[(u64, u64)]| -> PyResult<Bound<'py, PyList>> {
            let list = PyList::empty(py);
            for (index, (submitted, completed)) in queues.iter().enumerate() {
                let entry = PyDict::new(py);
                entry.set_item("index", index)?;
                entry.set_item("submitted", submitted)?;
                entry.set_item("completed", completed)?;
                list.append(entry)?;
            }
            Ok(list)
        };
        dict.set_item("queues", queues(&info.queues)?)?;
        dict.set_item("forwarded", info.forwarded)?;
        Ok(dict)
    }

    fn submit<'py>(
        &self,
        py: Python<'py>,
        queue: usize,
        readable: &[u8],
        writable: usize,
    ) -> PyResult<(u64, Option<Bound<'py, PyBytes>>)> {
        let Some(local) = self.inner.queue(queue) else {
            return Err(PyValueError::new_err(format!("there is no admin queue {queue}")));
        };
        if readable.is_empty() || readable.len() > LONG || writable > LONG {
            return Err(PyValueError::new_err(format!(
                "parts of {} and {writable} bytes; 1 to {LONG} can be read, up to {LONG} written",
                readable.len()
            )));
        }
        let events = self.inner.core().pool.events();
        let token = events.token();
        let wake = || -> vhu_core::event::Waker {
            let events = Arc::clone(events);
            Box::new(move || events.push(Event::Done { token }))
        };
        let mut out = vec![0; writable];
        match local.submit(&[readable], &mut out, Origin::Admin, Begun::now(), wake) {
            Ok(Submitted::Done(written)) => Ok((token, Some(PyBytes::new(py, &out[..written])))),
            Ok(Submitted::Later(ticket)) => {
                self.pending
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(token, (queue, ticket));
                Ok((token, None))
            }
            Err(Full::Queue) => Err(BusyError::new_err(format!("admin queue {queue} is full"))),
            Err(Full::Length) => Err(PyValueError::new_err("a part is too long")),
        }
    }

    fn result<'py>(&self, py: Python<'py>, token: u64) -> PyResult<Bound<'py, PyBytes>> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let found = pending
            .get(&token)
            .and_then(|(queue, ticket)| self.inner.queue(*queue)?.take_all(*ticket));
        match found {
            Some(bytes) => {
                pending.remove(&token);
                Ok(PyBytes::new(py, &bytes))
            }
            None => Err(PyKeyError::new_err(token)),
        }
    }

    fn abandon(&self, token: u64) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((queue, ticket)) = pending.remove(&token) {
            if let Some(queue) = self.inner.queue(queue) {
                queue.abandon(ticket);
            }
        }
    }

    #[pyo3(signature = (since=0, limit=1000, member=None))]
    fn trace<'py>(
        &self,
        py: Python<'py>,
        since: u64,
        limit: usize,
        member: Option<u32>,
    ) -> PyResult<(u64, u64, Vec<Bound<'py, PyDict>>)> {
        let (next, lost, entries) = self.inner.core().trace.read(since, limit, member);
        let mut members: HashMap<u32, Option<Arc<member::Member>>> = HashMap::new();
        let mut list = Vec::with_capacity(entries.len());
        for (number, entry) in entries {
            let named = members
                .entry(entry.member)
                .or_insert_with(|| self.inner.member(entry.member));
            let dict = PyDict::new(py);
            dict.set_item("seq", number)?;
            let at = entry.at.duration_since(UNIX_EPOCH).unwrap_or_default();
            dict.set_item("at", at.as_secs_f64())?;
            dict.set_item("member", entry.member)?;
            let (origin, offset) = match entry.origin {
                Origin::Bar0(offset) => ("bar0", offset),
                Origin::Admin => ("admin", entry.offset),
            };
            dict.set_item("origin", origin)?;
            dict.set_item("write", entry.write)?;
            dict.set_item("register", register_name(named.as_deref(), &entry))?;
            dict.set_item("offset", offset)?;
            dict.set_item("width", entry.width)?;
            dict.set_item("value", entry.value)?;
            dict.set_item("opcode", entry.opcode)?;
            dict.set_item("opcode_name", entry.opcode.map_or("notify region", opcode_name))?;
            dict.set_item("status", entry.status)?;
            dict.set_item("qualifier", entry.qualifier)?;
            dict.set_item("microseconds", entry.nanoseconds as f64 / 1000.0)?;
            list.push(dict);
        }
        Ok((next, lost, list))
    }

    fn member_commands<'py>(&self, py: Python<'py>, member_id: u32) -> PyResult<Bound<'py, PyDict>> {
        commands(py, &self.inner.member_commands(member_id))
    }

    /// For symmetry with the other long-lived objects: there is nothing of the group's own that needs an end.
    fn close(&self) {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
