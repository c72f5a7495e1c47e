//! What was called, and by whom: all that a retry must repeat.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use crate::{
    identity::Caller,
    protocol::{Era, McpRequest, Method, Params, RawObject},
};

/// The members of a retry that the call did not have.
const OF_RETRY: [&str; 2] = ["inputResponses", "requestState"];

/// One call, as far as its retry must be the same.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) caller: Arc<Caller>,
    pub(super) method: Method,
    params: Bytes,
}

impl Asked {
    /// `None` for what cannot be parked: calls of legacy clients, and of methods whose result must be final.
    pub(super) fn of(request: &McpRequest) -> Option<Self> {
        let caller = request.caller();
        let may_wait = caller.client.version.era() == Era::Modern
            && matches!(request.method(), Method::ToolsCall | Method::PromptsGet | Method::ResourcesRead);
        may_wait.then(|| Asked {
            caller: caller.clone(),
            method: request.method().clone(),
            params: request.params().as_json().clone(),
        })
    }

    /// The progress token of the request, as JSON.
    pub(super) fn token(&self) -> Option<Bytes> {
        Params::parse(self.params.clone()).ok()?.progress_token()
    }

    /// What a state is sealed for.
    pub(super) fn binding(&self) -> [Vec<u8>; 4] {
        [
            self.caller.principal.as_str().into(),
            self.caller.scope.to_string().into(),
            self.method.as_str().into(),
            canonical(self.params.clone()),
        ]
    }
}

/// The params that count, in one form: a client may write the retry's members in another order. `_meta` does not
/// count, for it is about the one request.
fn canonical(params: Bytes) -> Vec<u8> {
    let Ok(mut object) = RawObject::parse(params.clone()) else { return params.into() };
    OF_RETRY.iter().chain(&["_meta"]).for_each(|member| object.remove(member));
    match serde_json::from_slice::<Value>(object.as_bytes()) {
        Ok(mut value) => {
            value.sort_all_objects();
            value.to_string().into()
        }
        // A number that no float holds, for one: then the bytes must be the same.
        Err(_) => object.into_bytes().into(),
    }
}

/// The params without what only a retry has.
pub(super) fn without_answers(mut params: Params) -> Params {
    OF_RETRY.iter().for_each(|member| params.object_mut().remove(member));
    params
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_meta_do_not_count_and_everything_else_does() {
        let of = |text: &'static str| canonical(Bytes::from_static(text.as_bytes()));
        let first = of(r#"{"name":"t","arguments":{"a":{"x":1,"y":2},"b":[1,2]}}"#);
        let again = r#"{"arguments":{"b":[1,2],"a":{"y":2,"x":1}},"requestState":"s","_meta":{"a":1},"inputResponses":{},"name":"t"}"#;
        assert_eq!(first, of(again));
        assert_ne!(first, of(r#"{"name":"t","arguments":{"a":{"x":1,"y":2},"b":[2,1]}}"#));
        assert_ne!(first, of(r#"{"name":"t","arguments":{"a":{"x":1,"y":2},"b":[1,2]},"z":null}"#));
        assert_ne!(of(r#"{"n":1e400}"#), of(r#"{"n":1e401}"#));
    }
}
