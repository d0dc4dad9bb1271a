// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhu_legacy._native`: what Python sees of the core. Thin on purpose: conversions and one error mapping, no decision.
//!
//! The signatures are in `vhu_legacy/_native.pyi`, checked against this by stubtest.

use pyo3::prelude::*;

mod convert;
mod daemon;
mod error;
mod function;
mod member;
mod owner;
mod pool;
mod session;
mod vvu;

/// The export list.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::daemon::VhostUserDaemon;
    #[pymodule_export]
    use crate::error::{BusyError, ImageError, NativeError, ProtocolError};
    #[pymodule_export]
    use crate::function::{Function, VfioUserServer};
    #[pymodule_export]
    use crate::member::Member;
    #[pymodule_export]
    use crate::owner::DeviceGroup;
    #[pymodule_export]
    use crate::pool::Pool;
    #[pymodule_export]
    use crate::session::{discard, Outcome, Session};
    #[pymodule_export]
    use crate::vvu::{MasterOutcome, SharedMemoryOperation, VhostUserDevice};
}
