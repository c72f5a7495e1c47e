//! Stories over real sockets.

mod byte_for_byte;
mod gateway;
mod http;
mod legacy;
mod modern;
mod rmcp_client;
mod support;
mod upstream;
