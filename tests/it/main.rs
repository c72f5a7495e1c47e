//! Stories about Portcullis as its users see it, each room's in a module. One binary, because every further one
//! costs a link.

#[cfg(feature = "daemon")]
mod byte_for_byte;
#[cfg(feature = "daemon")]
mod changes;
#[cfg(feature = "daemon")]
mod cli;
#[cfg(feature = "daemon")]
mod examples;
#[cfg(feature = "daemon")]
mod extensions;
#[cfg(feature = "daemon")]
mod faults;
#[cfg(feature = "daemon")]
mod gateway;
#[cfg(feature = "daemon")]
mod http;
#[cfg(feature = "daemon")]
mod isolation;
#[cfg(feature = "daemon")]
mod legacy;
#[cfg(feature = "daemon")]
mod modern;
#[cfg(feature = "daemon")]
mod parked;
#[cfg(feature = "daemon")]
mod rmcp_client;
#[cfg(feature = "daemon")]
mod sse_upstream;
#[cfg(feature = "daemon")]
mod stage;
#[cfg(feature = "daemon")]
mod support;
#[cfg(feature = "daemon")]
mod tasks;
#[cfg(feature = "daemon")]
mod upstream;
#[cfg(feature = "daemon")]
mod upstream_limits;
#[cfg(feature = "daemon")]
mod upstream_streams;
