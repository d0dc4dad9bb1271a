// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the fuzz targets share.
//!
//! [`arena`] is guest memory for the ring targets, with a model beside it; [`driver`] fills rings of running members. [`host`] is a pool and what can be asked of a
//! process from outside: whether it waits for ever, whether it keeps fds.

pub mod arena;
pub mod driver;
pub mod host;

use libfuzzer_sys::arbitrary::{self, Arbitrary};

/// A number that is in range as a rule, at a border often, and sometimes anything.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Number {
    Small(u8),
    Short(u16),
    /// 2^n - 1, 2^n or 2^n + 1.
    Border(u8, u8),
    Any(u64),
}

impl Number {
    pub fn get(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::Short(value) => value.into(),
            Self::Border(power, side) => (1u64 << (power % 64)).wrapping_add(u64::from(side % 3)).wrapping_sub(1),
            Self::Any(value) => value,
        }
    }
}
