// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest side of virtio-vhost-user: drives the device from user space and is a vhost-user front end towards an
//! unmodified daemon in the same VM.
//!
//! Who may know what: [`message`] and [`proxy`] are pure (bytes in, bytes and decisions out); [`ring`] and [`driver`] know
//! virtio and see the function only through [`registers::Registers`] and DMA memory; [`sysfs`], [`memory`] and [`interrupts`]
//! are Linux's; [`channel`] is the daemon's socket; [`bridge`] puts them together in one loop. All `unsafe` is in `sys`.
//!
//! Neither side is trusted: messages from the device were written by another VM, those from the daemon by a process that
//! serves that VM. What makes no sense ends the session, never the process.

#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("the rings, registers and messages are little-endian, and so has to be the machine");

pub mod bridge;
pub mod channel;
pub mod driver;
pub mod error;
pub mod interrupts;
pub mod log;
pub mod memory;
pub mod message;
pub mod options;
pub mod pci;
pub mod proxy;
pub mod registers;
pub mod ring;
#[allow(unsafe_code)]
pub mod sys;
pub mod sysfs;
