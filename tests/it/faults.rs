//! Upstreams and clients that misbehave, in front of and behind a daemon that runs as a process of its own.
//!
//! The promise, for each fault: the call ends in one clean error, in bounded time and memory, the healthy upstream
//! answers all the while, and nothing is left behind. Seen from outside, as the kernel sees it: resident memory,
//! descriptors, processes. What the error says in detail is told in `upstream`, where a gateway is cheap to make.

mod bursts;
mod forged;
mod house;
mod http;
mod questions;
mod stdio;
