//! Where a name leads.

use std::sync::Arc;

use bytes::Bytes;

use super::ServerName;

/// What a name stands for. [`access`](crate::layers::access) leaves it in the request's extensions, for the
/// layers further in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The upstream.
    pub server: ServerName,
    /// The name, URI or id at the upstream.
    pub own: Arc<str>,
    /// The template a resource nobody lists is an instance of, or the skill it is a file of, as the upstream spells it.
    pub template: Option<Arc<str>>,
    /// The definition as listed, when it was listed.
    pub definition: Option<Bytes>,
}
