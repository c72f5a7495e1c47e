//! The layer around the predicate.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use arc_swap::ArcSwap;
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use super::{AccessRules, Directory, gate::Gate, watch::Watch};
use crate::{
    BoxError, McpService,
    protocol::{ItemKind, McpRequest, McpResponse, Method, Payload},
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

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;

    fn layer(&self, inner: S) -> Access<S> {
        Access { inner, gate: Arc::new(Gate::new(self.directory.clone(), self.rules.clone())) }
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
                let judge = match request.method() {
                    // Before the call: what changes while the subscription is opened is told, too.
                    Method::Listen => Judge::Frames(Box::new(Watch::new(&self.gate, &request))),
                    method if ItemKind::of(method).is_some() => Judge::List(self.gate.clone()),
                    _ => Judge::Nothing,
                };
                AccessFuture {
                    state: State::Admitted { inner: self.inner.call(request), judge: Some(judge) },
                }
            }
        }
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
        // For this caller; what of the answer is, is judged.
        Admitted { #[pin] inner: F, judge: Option<Judge> },
    }
}

/// What of an answer is held against the rules.
enum Judge {
    Nothing,
    List(Arc<Gate>),
    Frames(Box<Watch>),
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
            Projected::Admitted { inner, judge } => {
                let response = ready!(inner.poll(cx)).map_err(Into::into)?;
                let judge = judge.take().expect("a future is not polled after it is done");
                if matches!(judge, Judge::Nothing) {
                    return Poll::Ready(Ok(response));
                }
                let (payload, extensions) = response.into_parts();
                let payload = match (judge, payload) {
                    (Judge::List(gate), Payload::Items(list)) => Payload::Items(gate.filter(list)),
                    (Judge::Frames(watch), Payload::Stream(frames)) => Payload::Stream(watch.over(frames)),
                    (_, Payload::Error(error)) => Payload::Error(error),
                    (Judge::Frames(_), payload) => payload,
                    // A list that is not made of items cannot be judged, and what cannot be judged is not shown.
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
    use std::sync::Mutex;

    use futures_util::FutureExt as _;

    use super::*;
    use crate::{
        error::Unknown,
        identity::Caller,
        layers::{InForce, Route, TaskRoute},
        protocol::{Frame, FrameStream, ItemList, Notification, Params, ServerName, Target},
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
    async fn an_unknown_method_goes_on_with_the_rules_it_must_keep() {
        let (layer, rules) = denying("delete");
        let (mut service, mut inner) = testing::layer(layer);
        let unknown = || McpRequest::bare(Method::from("vendor/delete"));
        let _open = service.call(unknown());
        let sent = inner.next_request().await.request;
        assert!(sent.extensions().get::<InForce>().unwrap().0.restricts(&mock()));
        rules.store(Arc::new(AccessRules::default()));
        let _open = service.call(unknown());
        assert!(inner.next_request().await.request.extensions().get::<InForce>().is_none());
    }

    /// A directory whose list of tools changes.
    struct Changing(Mutex<ItemList>);

    impl Changing {
        fn set(&self, tools: &[&str]) {
            let Payload::Items(list) = testing::tools(tools).into_payload() else { panic!() };
            *self.0.lock().unwrap() = list;
        }
    }

    impl Directory for Changing {
        fn find(&self, target: &Target) -> Option<Route> {
            Everything.find(target)
        }

        fn list(&self, kind: ItemKind) -> Option<ItemList> {
            (kind == ItemKind::Tools).then(|| self.0.lock().unwrap().clone())
        }

        fn task(&self, id: &str, _: &Caller) -> Option<TaskRoute> {
            let (tool, exposed) = (id.into(), id.into());
            Some(TaskRoute { route: Everything.find(&Target::Task(id.into()))?, tool, exposed })
        }
    }

    /// An open subscription: what the upstream side says, and what the client is told.
    struct Subscribed {
        directory: Arc<Changing>,
        rules: Arc<ArcSwap<AccessRules>>,
        say: tokio::sync::mpsc::UnboundedSender<Notification>,
        told: FrameStream,
    }

    impl Subscribed {
        async fn to(filter: serde_json::Value, deny: &str, tools: &[&str]) -> Self {
            let Payload::Items(list) = testing::tools(tools).into_payload() else { panic!() };
            let directory = Arc::new(Changing(Mutex::new(list)));
            let (_, rules) = denying(deny);
            let layer = AccessLayer::new(directory.clone(), rules.clone());
            let (mut service, mut inner) = testing::layer(layer);
            let params = Params::from_value(&serde_json::json!({ "notifications": filter }));
            let answer = service.call(McpRequest::new(Method::Listen, params));
            let (say, said) = tokio::sync::mpsc::unbounded_channel::<Notification>();
            let frames = futures_util::stream::unfold(said, |mut said| async {
                Some((Ok(Frame::Notification(said.recv().await?)), said))
            });
            inner.answer(McpResponse::new(Payload::Stream(Box::pin(frames)))).await;
            let Payload::Stream(told) = answer.await.unwrap().into_payload() else { panic!() };
            Subscribed { directory, rules, say, told }
        }

        fn deny(&self, glob: &str) {
            self.rules.store(denying(glob).1.load_full());
        }

        fn say(&self, method: Method, params: serde_json::Value) {
            self.say.send(Notification { method, params: Params::from_value(&params) }).unwrap();
        }

        /// Everything the client was told by now.
        fn told(&mut self) -> Vec<Method> {
            let next = |told: &mut FrameStream| futures_util::StreamExt::next(told).now_or_never().flatten();
            std::iter::from_fn(|| match next(&mut self.told) {
                Some(Ok(Frame::Notification(n))) => Some(n.method),
                _ => None,
            })
            .collect()
        }
    }

    #[tokio::test]
    async fn a_change_nobody_may_see_is_told_to_nobody() {
        let filter = serde_json::json!({ "toolsListChanged": true });
        let mut open = Subscribed::to(filter, "secret*", &["read"]).await;
        let nothing = serde_json::json!({});
        open.say(Method::Acknowledged, nothing.clone());
        assert_eq!(open.told(), [Method::Acknowledged]);
        open.directory.set(&["read", "secret"]);
        open.say(Method::ToolsChanged, nothing.clone());
        assert_eq!(open.told(), []);
        open.directory.set(&["read", "secret", "write"]);
        open.say(Method::ToolsChanged, nothing.clone());
        open.say(Method::ToolsChanged, nothing.clone());
        assert_eq!(open.told(), [Method::ToolsChanged]);
        open.say(Method::PromptsChanged, nothing);
        assert_eq!(open.told(), []);
    }

    #[tokio::test]
    async fn a_change_of_rules_is_told_to_those_who_see_it() {
        let filter = serde_json::json!({ "toolsListChanged": true });
        let mut open = Subscribed::to(filter, "x", &["read", "delete"]).await;
        let nothing = serde_json::json!({});
        // While the subscription was being opened.
        open.deny("delete");
        open.say(Method::Acknowledged, nothing.clone());
        assert_eq!(open.told(), [Method::Acknowledged, Method::ToolsChanged]);
        open.deny("del*");
        open.say(Method::ToolsChanged, nothing.clone());
        assert_eq!(open.told(), []);
        open.deny("read");
        open.say(Method::ToolsChanged, nothing);
        assert_eq!(open.told(), [Method::ToolsChanged]);
    }

    #[tokio::test]
    async fn new_rules_end_updates_of_what_they_hide() {
        let filter = serde_json::json!({ "resourceSubscriptions": ["a:secret"] });
        let mut open = Subscribed::to(filter, "x", &[]).await;
        let update = serde_json::json!({ "uri": "a:secret" });
        let task = serde_json::json!({ "taskId": "secret" });
        open.say(Method::ResourceUpdated, update.clone());
        open.say(Method::TaskChanged, task.clone());
        assert_eq!(open.told(), [Method::ResourceUpdated, Method::TaskChanged]);
        open.deny("*secret");
        open.say(Method::ResourceUpdated, update);
        open.say(Method::TaskChanged, task.clone());
        open.say(Method::LegacyTaskChanged, task);
        assert_eq!(open.told(), []);
    }

    #[tokio::test]
    async fn a_denied_tools_task_leads_nowhere() {
        let directory = Arc::new(Changing(Mutex::new(ItemList::new(ItemKind::Tools, Vec::new()))));
        let layer = AccessLayer::new(directory, denying("secret").1);
        let (mut service, mut inner) = testing::layer(layer);
        for (id, leads) in [("secret", false), ("open", true)] {
            let params = Params::from_value(&serde_json::json!({ "taskId": id }));
            let _open = service.call(McpRequest::new(Method::TasksGet, params));
            let sent = inner.next_request().await.request;
            assert_eq!(sent.extensions().get::<Route>().is_some(), leads, "{id}");
            assert!(sent.extensions().get::<InForce>().is_some());
        }
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
