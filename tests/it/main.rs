//! Stories about Portcullis as its users see it, each room's in a module. One binary, because every further one
//! costs a link.

#[cfg(feature = "daemon")]
mod cli;
#[cfg(feature = "daemon")]
mod support;
