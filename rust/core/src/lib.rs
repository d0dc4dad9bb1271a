// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The core of vhu_legacy: everything that moves data, and no Python.
//!
//! From the bottom up: [`memory`] (guest memory), [`ring`] (virtqueues), [`device`] (what requests mean), [`runner`] (a
//! running queue), [`worker`] (the pool), [`remote`] (queues in memory that can't be mapped), [`member`] (the register file),
//! [`session`] (vhost-user without a socket), [`owner`] (administration commands), [`pci`] and [`function`] (PCI functions),
//! [`vfio_user`] (their transport). docs/ARCHITECTURE.md says who may know what.

pub mod crash;
pub mod device;
pub mod dirty;
pub mod error;
pub mod event;
pub mod function;
pub mod member;
pub mod memory;
pub mod owner;
pub mod pci;
pub mod poll;
pub mod remote;
pub mod ring;
pub mod runner;
pub mod session;
mod sigbus;
pub mod sys;
pub mod uring;
pub mod vfio_user;
pub mod vub;
pub mod vvu;
pub mod worker;
