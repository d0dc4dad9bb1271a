// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Values of the core as plain Python dicts.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use vhu_core::error::Fault;
use vhu_core::member::{feature, Info, QueueInfo};

use std::sync::atomic::Ordering::Relaxed;

const RING_FEATURES: [(u32, &str); 10] = [
    (24, "NOTIFY_ON_EMPTY"),
    (27, "ANY_LAYOUT"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (32, "VERSION_1"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (37, "SR_IOV"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
];
const BLK_FEATURES: [(u32, &str); 9] = [
    (2, "SEG_MAX"),
    (5, "RO"),
    (6, "BLK_SIZE"),
    (9, "FLUSH"),
    (10, "TOPOLOGY"),
    (11, "CONFIG_WCE"),
    (12, "MQ"),
    (13, "DISCARD"),
    (14, "WRITE_ZEROES"),
];
const PROTOCOL_FEATURES: [(u32, &str); 23] = [
    (0, "MQ"),
    (1, "LOG_SHMFD"),
    (2, "RARP"),
    (3, "REPLY_ACK"),
    (4, "MTU"),
    (5, "BACKEND_REQ"),
    (6, "CROSS_ENDIAN"),
    (7, "CRYPTO_SESSION"),
    (8, "PAGEFAULT"),
    (9, "CONFIG"),
    (10, "BACKEND_SEND_FD"),
    (11, "HOST_NOTIFIER"),
    (12, "INFLIGHT_SHMFD"),
    (13, "RESET_DEVICE"),
    (14, "INBAND_NOTIFICATIONS"),
    (15, "CONFIGURE_MEM_SLOTS"),
    (16, "STATUS"),
    (17, "XEN_MMAP"),
    (18, "SHARED_OBJECT"),
    (19, "DEVICE_STATE"),
    (20, "GET_VRING_BASE_INFLIGHT"),
    (21, "GPA_ADDRESSES"),
    (22, "SHMEM"),
];
const STATUS: [(u32, &str); 6] = [
    (0, "ACKNOWLEDGE"),
    (1, "DRIVER"),
    (2, "DRIVER_OK"),
    (3, "FEATURES_OK"),
    (6, "DEVICE_NEEDS_RESET"),
    (7, "FAILED"),
];

/// A set of bits: its value and the names of the bits, unknown ones by number.
fn bits<'py>(py: Python<'py>, value: u64, tables: &[&[(u32, &str)]]) -> PyResult<Bound<'py, PyDict>> {
    let names = PyList::empty(py);
    for bit in (0..u64::BITS).filter(|bit| value & (1 << bit) != 0) {
        let name = tables
            .iter()
            .flat_map(|table| table.iter())
            .find(|(known, _)| *known == bit);
        match name {
            Some((_, name)) => names.append(name)?,
            None => names.append(format!("BIT_{bit}"))?,
        }
    }
    let dict = PyDict::new(py);
    dict.set_item("value", value)?;
    dict.set_item("names", names)?;
    Ok(dict)
}

/// vhost-user protocol features, if they are known.
pub fn protocol_features<'py>(py: Python<'py>, value: Option<u64>) -> PyResult<Option<Bound<'py, PyDict>>> {
    value.map(|value| bits(py, value, &[&PROTOCOL_FEATURES])).transpose()
}

/// Feature bits of a device of any kind, if they are known.
pub fn features<'py>(py: Python<'py>, value: Option<u64>) -> PyResult<Option<Bound<'py, PyDict>>> {
    value.map(|value| bits(py, value, &[&RING_FEATURES])).transpose()
}

/// A fault, or None.
pub fn fault<'py>(py: Python<'py>, fault: Option<&Fault>) -> PyResult<Option<Bound<'py, PyDict>>> {
    fault
        .map(|fault| {
            let dict = PyDict::new(py);
            dict.set_item("rule", fault.rule)?;
            dict.set_item("reason", &fault.reason)?;
            dict.set_item("queue", fault.queue)?;
            Ok(dict)
        })
        .transpose()
}

fn queue<'py>(
    py: Python<'py>,
    index: usize,
    info: &Info,
    queue: &QueueInfo,
    max: u16,
    failed: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let stats = &queue.stats;
    let legacy = info.driver_features & feature::VERSION_1 == 0;
    let addresses = queue.addresses.unwrap_or_default();
    dict.set_item("index", index)?;
    dict.set_item("size", queue.size)?;
    dict.set_item("max_size", max)?;
    dict.set_item("started", queue.started)?;
    dict.set_item("enabled", queue.enabled)?;
    dict.set_item("running", queue.started && queue.enabled && info.broken.is_none())?;
    dict.set_item("worker", queue.worker)?;
    dict.set_item(
        "layout",
        queue.started.then_some(if legacy { "legacy" } else { "modern" }),
    )?;
    dict.set_item("desc", addresses.desc)?;
    dict.set_item("driver", addresses.driver)?;
    dict.set_item("device", addresses.device)?;
    dict.set_item("avail_idx", queue.started.then(|| stats.avail_idx.load(Relaxed)))?;
    dict.set_item("used_idx", queue.started.then(|| stats.used_idx.load(Relaxed)))?;
    dict.set_item("last_avail_idx", queue.next_avail)?;
    dict.set_item("in_flight", stats.in_flight.load(Relaxed))?;
    dict.set_item("kicks", stats.kicks.load(Relaxed))?;
    dict.set_item("calls", stats.calls.load(Relaxed))?;
    dict.set_item("requests", stats.requests.load(Relaxed))?;
    dict.set_item("errors", stats.counters.get(failed))?;
    dict.set_item("event_idx", info.driver_features & feature::EVENT_IDX != 0)?;
    dict.set_item("indirect", info.driver_features & feature::INDIRECT_DESC != 0)?;
    Ok(dict)
}

const VIRTIO_ID_BLOCK: u32 = 2;

/// A member's info; see docs/QMP.md.
pub fn info<'py>(py: Python<'py>, member: &vhu_core::member::Member) -> PyResult<Bound<'py, PyDict>> {
    let info = member.info();
    let device = member.device();
    let own: &[(u32, &str)] = if device.device_id() == VIRTIO_ID_BLOCK {
        &BLK_FEATURES
    } else {
        &[]
    };
    let tables: [&[(u32, &str)]; 2] = [&RING_FEATURES, own];
    let mode = if info.driver_features & feature::VERSION_1 != 0 {
        "modern"
    } else {
        "legacy"
    };
    let dict = PyDict::new(py);
    dict.set_item("id", member.id())?;
    dict.set_item("type", device.type_name())?;
    dict.set_item("legacy", member.legacy())?;
    dict.set_item("state", info.state)?;
    dict.set_item("broken", fault(py, info.broken.as_ref())?)?;
    dict.set_item("last_error", fault(py, info.last_error.as_ref())?)?;
    dict.set_item("connections", info.connections)?;
    dict.set_item("device_features", bits(py, info.device_features, &tables)?)?;
    dict.set_item("driver_features", bits(py, info.driver_features, &tables)?)?;
    dict.set_item(
        "protocol_features",
        bits(py, info.protocol_features, &[&PROTOCOL_FEATURES])?,
    )?;
    dict.set_item("driver_mode", info.features_written.then_some(mode))?;
    dict.set_item("status", bits(py, u64::from(info.status), &[&STATUS])?)?;
    let queues = PyList::empty(py);
    let requests = PyDict::new(py);
    let names = device.counter_names();
    let mut totals = vec![0u64; names.len()];
    for (index, entry) in info.queues.iter().enumerate() {
        queues.append(queue(
            py,
            index,
            &info,
            entry,
            device.queue_size(),
            device.failed_counter(),
        )?)?;
        for (which, total) in totals.iter_mut().enumerate() {
            *total = total.wrapping_add(entry.stats.counters.get(which));
        }
    }
    for (name, total) in names.iter().zip(totals) {
        requests.set_item(name, total)?;
    }
    dict.set_item("queues", queues)?;
    let memory = PyList::empty(py);
    for region in &info.memory {
        let entry = PyDict::new(py);
        entry.set_item("guest_address", region.guest)?;
        entry.set_item("size", region.size)?;
        entry.set_item("user_address", region.user)?;
        entry.set_item("mmap_offset", region.mmap_offset)?;
        memory.append(entry)?;
    }
    dict.set_item("front", info.front.map(|front| front.name()))?;
    dict.set_item("stopped", info.stopped)?;
    dict.set_item("isr", info.isr)?;
    let msix = PyDict::new(py);
    msix.set_item("enabled", info.msix_enabled)?;
    msix.set_item("vectors", member.vectors())?;
    dict.set_item("msix", msix)?;
    dict.set_item("poll_us", member.poll().as_micros())?;
    dict.set_item("inflight_tracking", info.inflight_tracking)?;
    dict.set_item("dirty_log", info.dirty_log)?;
    dict.set_item("assigned_features", info.assigned)?;
    dict.set_item("config_generation", info.config_generation)?;
    dict.set_item("memory", memory)?;
    dict.set_item("requests", requests)?;
    Ok(dict)
}
