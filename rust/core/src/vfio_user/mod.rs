// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI functions over vfio-user (design D7).
//!
//! [`function`] says what a PCI function is to the transport.

pub mod function;
