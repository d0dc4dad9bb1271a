// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Places where tests kill the process: between the stores that others rely on after a crash.
//!
//! Without the feature `crash-points`, which only tests have, nothing is left of a point.

#[cfg(feature = "crash-points")]
mod armed {
    use std::cell::RefCell;

    type Hook = Box<dyn FnMut(&'static str)>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// Has a function called at each point that this thread passes.
    pub fn on_points(hook: impl FnMut(&'static str) + 'static) {
        HOOK.with(|slot| *slot.borrow_mut() = Some(Box::new(hook)));
    }

    /// No more.
    pub fn disarm() {
        HOOK.with(|slot| *slot.borrow_mut() = None);
    }

    /// Passes a point.
    pub fn point(name: &'static str) {
        // Taken out meanwhile: the hook may unwind, or pass points itself.
        let hook = HOOK.with(|slot| slot.borrow_mut().take());
        if let Some(mut hook) = hook {
            hook(name);
            HOOK.with(|slot| *slot.borrow_mut() = Some(hook));
        }
    }
}

#[cfg(feature = "crash-points")]
pub use armed::{disarm, on_points, point};

/// Passes a point.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub fn point(_name: &'static str) {}
