// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One mapping from the core's errors to Python's exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyOSError, PyValueError};
use pyo3::prelude::*;
use vhu_core::error::{Error, Fault};

create_exception!(vhu_legacy._native, NativeError, PyException);
create_exception!(vhu_legacy._native, ProtocolError, NativeError);
create_exception!(vhu_legacy._native, BusyError, NativeError);
create_exception!(vhu_legacy._native, ImageError, NativeError);

/// The exception for an error of the core, with its rule as attribute.
pub fn to_py(py: Python<'_>, error: &Error) -> PyErr {
    let text = error.to_string();
    let exception = match error {
        Error::Fault(_) => ProtocolError::new_err(text),
        Error::Busy(..) => BusyError::new_err(text),
        Error::Image { .. } => ImageError::new_err(text),
        Error::Invalid(_) => return PyValueError::new_err(text),
        Error::Os { source, .. } => {
            return match source.raw_os_error() {
                Some(errno) => PyOSError::new_err((errno, text)),
                None => PyOSError::new_err(text),
            };
        }
        Error::Closed => NativeError::new_err(text),
    };
    // An exception without its rule is still the right exception.
    let _ = exception.value(py).setattr("rule", error.rule());
    exception
}

/// The exception for a broken rule.
pub fn fault_to_py(py: Python<'_>, fault: Fault) -> PyErr {
    to_py(py, &Error::Fault(fault))
}
