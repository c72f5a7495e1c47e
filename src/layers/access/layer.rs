//! The layer around the predicate.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use arc_swap::ArcSwap;
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use super::{AccessRules, Directory};
use crate::{
    BoxError, McpService,
    error::{Unimplemented, Unknown},
    protocol::{ItemKind, ItemList, McpRequest, McpResponse, Method, Payload, Target},
};

/// Hides what the rules deny, everywhere. It stands inside `rescue` and outside everything that asks a person or
/// costs anything: what is denied is not worth either. The rules are live: store new ones and the next request
/// goes by them.
#[derive(Clone)]
#[must_use]
pub struct AccessLayer {
    directory: Arc<dyn Directory>,
    rules: Arc<ArcSwap<AccessRules>>,
}

impl AccessLayer {
    /// With names looked up in `directory`, judged by `rules`.
    pub fn new(directory: Arc<dyn Directory>, rules: Arc<ArcSwap<AccessRules>>) -> Self {
        AccessLayer { directory, rules }
    }
}

/// Made by [`AccessLayer`].
#[derive(Clone)]
pub struct Access<S> {
    inner: S,
    gate: Arc<Gate>,
}

/// What all clones of the service share.
struct Gate {
    directory: Arc<dyn Directory>,
    rules: Arc<ArcSwap<AccessRules>>,
    filtered: [Mutex<Option<Filtered>>; 4],
}

/// The last list filtered: as long as list and rules are the same, so is the outcome.
struct Filtered {
    rules: Arc<AccessRules>,
    whole: ItemList,
    visible: ItemList,
}

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;

    fn layer(&self, inner: S) -> Access<S> {
        let (directory, rules) = (self.directory.clone(), self.rules.clone());
        Access { inner, gate: Arc::new(Gate { directory, rules, filtered: Default::default() }) }
    }
}

impl<S: McpService> Service<McpRequest> for Access<S> {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = AccessFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: McpRequest) -> Self::Future {
        match self.gate.admit(&mut request) {
            Err(refusal) => AccessFuture { state: State::Refused { refusal: Some(refusal) } },
            Ok(()) => {
                let gate = ItemKind::of(request.method()).map(|_| self.gate.clone());
                AccessFuture { state: State::Admitted { inner: self.inner.call(request), gate } }
            }
        }
    }
}

impl Gate {
    /// Lets the request pass, with the route of what it names, or says why not.
    fn admit(&self, request: &mut McpRequest) -> Result<(), BoxError> {
        let rules = self.rules.load();
        if let Some(target) = request.target().cloned() {
            let route = self.directory.find(&target).filter(|r| rules.allows_route(r, target.name()));
            let route = match (route, &target) {
                (Some(route), _) => route,
                // A task is not in any catalog; the router knows, or does not.
                (None, Target::Task(_)) => return Ok(()),
                (None, _) => return Err(Unknown(target).into()),
            };
            request.extensions_mut().insert(route);
            return Ok(());
        }
        match request.method() {
            Method::Listen => self.narrow(request, &rules),
            // What an unknown method addresses, nobody here can tell. With any rule in force it could be a way
            // around that rule.
            Method::Other(_)
                if !rules.is_empty() && (request.id().is_some() || !request.method().is_notification()) =>
            {
                return Err(Unimplemented(request.method().clone()).into());
            }
            _ => {}
        }
        Ok(())
    }

    /// Drops the resources that may not be seen from a subscription: as if they were not there.
    fn narrow(&self, request: &mut McpRequest, rules: &AccessRules) {
        let Some(mut filter) = request.params().get_object("notifications") else { return };
        let Some(Ok(wanted)) = filter.get_as::<Vec<String>>("resourceSubscriptions") else { return };
        let visible: Vec<&String> = wanted
            .iter()
            .filter(|uri| {
                let route = self.directory.find(&Target::Resource(uri.as_str().into()));
                route.is_some_and(|r| rules.allows_route(&r, uri))
            })
            .collect();
        if visible.len() == wanted.len() {
            return;
        }
        filter.set("resourceSubscriptions", serde_json::to_string(&visible).expect("strings are JSON"));
        let mut params = request.params().clone();
        params.object_mut().set("notifications", filter.as_str());
        request.set_params(params);
    }

    /// What of the list may be seen. In the steady state that is a comparison of two pointers.
    fn filter(&self, list: ItemList) -> ItemList {
        let rules = self.rules.load_full();
        if rules.is_empty() {
            return list;
        }
        let slot = &self.filtered[list.kind() as usize];
        let mut last = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref().filter(|l| Arc::ptr_eq(&l.rules, &rules) && l.whole.is_same(&list))
        {
            return last.visible.clone();
        }
        let visible = list.filter(|item| rules.allows(&item.server, &item.own, &item.exposed));
        *last = Some(Filtered { rules, whole: list, visible: visible.clone() });
        visible
    }
}

pin_project! {
    /// Made by [`Access`].
    pub struct AccessFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = Projected]
    enum State<F> {
        // Not for this caller.
        Refused { refusal: Option<BoxError> },
        // For this caller; `gate` when there is a list to filter.
        Admitted { #[pin] inner: F, gate: Option<Arc<Gate>> },
    }
}

impl<F, E> Future for AccessFuture<F>
where
    F: Future<Output = Result<McpResponse, E>>,
    E: Into<BoxError>,
{
    type Output = Result<McpResponse, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            Projected::Refused { refusal } => {
                Poll::Ready(Err(refusal.take().expect("a future is not polled after it is done")))
            }
            Projected::Admitted { inner, gate } => {
                let response = ready!(inner.poll(cx)).map_err(Into::into)?;
                let Some(gate) = gate else { return Poll::Ready(Ok(response)) };
                let (payload, extensions) = response.into_parts();
                let payload = match payload {
                    Payload::Items(list) => Payload::Items(gate.filter(list)),
                    // A list that is not made of items cannot be judged, and what cannot be judged is not shown.
                    Payload::Error(error) => Payload::Error(error),
                    _ => return Poll::Ready(Err("a list came in a form that cannot be filtered".into())),
                };
                Poll::Ready(Ok(McpResponse::from_parts(payload, extensions)))
            }
        }
    }
}

impl fmt::Debug for AccessLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessLayer").field("rules", &self.rules.load()).finish_non_exhaustive()
    }
}

impl<S: fmt::Debug> fmt::Debug for Access<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        layers::Route,
        protocol::{Params, ServerName},
        testing,
    };

    /// Knows everything, all of it at `mock`.
    struct Everything;

    impl Directory for Everything {
        fn find(&self, target: &Target) -> Option<Route> {
            Some(Route { server: mock(), own: target.name().clone(), template: None, definition: None })
        }
    }

    fn mock() -> ServerName {
        "mock".parse().unwrap()
    }

    fn denying(glob: &str) -> (AccessLayer, Arc<ArcSwap<AccessRules>>) {
        let mut rules = AccessRules::default();
        rules.set_server(mock(), None, &[glob.to_owned()]).unwrap();
        let rules = Arc::new(ArcSwap::from_pointee(rules));
        (AccessLayer::new(Arc::new(Everything), rules.clone()), rules)
    }

    async fn listed(layer: AccessLayer) -> ItemList {
        let (mut service, mut inner) = testing::layer(layer);
        let answer = service.call(McpRequest::bare(Method::ToolsList));
        inner.answer(testing::tools(&["read", "delete"])).await;
        let Payload::Items(list) = answer.await.unwrap().into_payload() else { panic!() };
        list
    }

    #[tokio::test]
    async fn a_denied_tool_is_in_no_list_and_unknown_by_name() {
        let (layer, _) = denying("delete");
        assert_eq!(&listed(layer.clone()).await.items_json()[..], br#"[{"name":"read"}]"#);
        let (mut service, mut inner) = testing::layer(layer);
        let error = service.call(testing::call("delete")).await.unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&Unknown(Target::Tool("delete".into()))));
        assert!(inner.is_idle());
    }

    #[tokio::test]
    async fn completion_and_subscriptions_are_governed_too() {
        let (layer, _) = denying("*secret*");
        let (mut service, mut inner) = testing::layer(layer);
        let reference = serde_json::json!({ "ref": { "type": "ref/prompt", "name": "secret" } });
        let completion = McpRequest::new(Method::Complete, Params::from_value(&reference));
        assert!(service.call(completion).await.unwrap_err().is::<Unknown>());
        let filter = serde_json::json!({ "notifications": { "resourceSubscriptions": ["a:1", "a:secret"] } });
        let _open = service.call(McpRequest::new(Method::Listen, Params::from_value(&filter)));
        let request = inner.next_request().await.request;
        let filter = request.params().get_object("notifications").unwrap();
        assert_eq!(filter.get("resourceSubscriptions"), Some(r#"["a:1"]"#));
    }

    #[tokio::test]
    async fn new_rules_hold_for_the_next_request() {
        let (layer, rules) = denying("delete");
        let (mut service, mut inner) = testing::layer(layer);
        assert!(service.call(testing::call("delete")).await.is_err());
        rules.store(Arc::new(AccessRules::default()));
        let answer = service.call(testing::call("delete"));
        let request = inner.answer(McpResponse::raw("{}")).await;
        assert!(answer.await.is_ok());
        assert_eq!(request.extensions().get::<Route>().unwrap().server, mock());
    }

    #[tokio::test]
    async fn an_unknown_method_is_no_way_around_a_rule() {
        let (layer, rules) = denying("delete");
        let (mut service, _inner) = testing::layer(layer);
        let unknown = || McpRequest::bare(Method::from("vendor/delete"));
        assert!(service.call(unknown()).await.unwrap_err().is::<Unimplemented>());
        rules.store(Arc::new(AccessRules::default()));
        let _open = service.call(unknown());
    }

    #[tokio::test]
    async fn readiness_is_the_inner_services() {
        let (layer, _) = denying("x");
        let (mut service, mut inner) = testing::layer(layer);
        inner.set_ready(false);
        assert!(service.poll_ready().is_pending());
        inner.set_ready(true);
        assert!(service.poll_ready().is_ready());
    }
}
