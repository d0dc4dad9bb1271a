// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One plain line per event on stderr.

use std::fmt;
use std::io::{self, Write};

/// Writes a line. A stderr that is gone is no reason to stop serving.
pub fn line(text: impl fmt::Display) {
    // One write: lines of several processes on one console stay whole.
    let _ = io::stderr().write_all(format!("vvu-bridge: {text}\n").as_bytes());
}
