//! Which of the server's threads this is.
//!
//! A connection stays on one thread, and what it needs of others should be there, too: upstream clients keep a pool of
//! connections for each lane.

use std::cell::Cell;

thread_local! {
    static LANE: Cell<usize> = const { Cell::new(0) };
}

/// Makes this thread the lane `index`.
#[cfg(feature = "server")]
pub(crate) fn enter(index: usize) {
    LANE.set(index + 1);
}

/// The lane of this thread; 0 on any other thread.
#[cfg(feature = "client")]
pub(crate) fn current() -> usize {
    LANE.get()
}
