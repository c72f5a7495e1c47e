//! Calls that wait for their client's answer.
//!
//! A legacy upstream asks in the middle of a call: sampling, elicitation, roots. A modern client cannot be asked in the
//! middle of anything; it gets a result that says what is wanted, and calls again with the answers (MCP 2026-07-28,
//! basic/patterns/mrtr). So the call is *parked*: what it has yet to say stays here, unread, and the client gets
//! `input_required` with a sealed `requestState` that names it. The retry answers the questions and goes on where the
//! call stopped.
//!
//! The state is good once, for ten minutes, for the same principal and scope, and for the same method with the same
//! params; all that is bound into its authentication ([`Seal`](crate::seal::Seal)). A call whose client does not come
//! back is refused its answers and ended at the upstream. It costs no permit while it waits, for the layer stands
//! inside of what counts them.
//!
//! Calls of legacy clients pass: they are asked on the call's own stream, by their door.

mod asked;
mod layer;
mod lot;
#[cfg(test)]
mod tests;

pub use layer::{Park, ParkFuture, ParkLayer};
