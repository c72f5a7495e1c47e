//! The layer around the lot.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use pin_project_lite::pin_project;
use serde_json::json;
use tower::{Layer, Service};

use super::{
    asked::{Asked, without_answers},
    lot::{Lot, Parking, Question, Rest, Resumed},
};
use crate::{
    BoxError, McpService,
    error::InvalidParams,
    protocol::{
        Frame, FrameStream, McpRequest, McpResponse, Method, Params, Payload, RawObject, RpcError,
        ServerName, ServerRequest, code, sign_question,
    },
};

/// A person may think this long over one question.
const WAIT: Duration = Duration::from_secs(10 * 60);
/// Questions of one round; the others wait for the next.
const AT_ONCE: usize = 16;
/// Each holds an answer that is not read to its end.
const MOST: usize = 4096;

/// Turns the questions that an upstream asks in the middle of a call into results that ask for input, for clients that
/// cannot be asked otherwise. It stands right around the client of one upstream, inside of everything that counts or
/// times its calls: a call that waits for a person is not under way.
///
/// ```
/// # use portcullis::upstream::ParkLayer;
/// let layer = ParkLayer::new("files".parse()?).most(100).wait(std::time::Duration::from_secs(60));
/// # Ok::<_, portcullis::protocol::InvalidName>(())
/// ```
#[derive(Clone)]
#[must_use]
pub struct ParkLayer {
    upstream: ServerName,
    most: usize,
    wait: Duration,
}

impl ParkLayer {
    /// For one upstream, whose name its questions carry.
    pub fn new(upstream: ServerName) -> Self {
        ParkLayer { upstream, most: MOST, wait: WAIT }
    }

    /// At most this many calls wait; the questions of more are refused. 4,096 by default.
    pub fn most(self, most: usize) -> Self {
        ParkLayer { most, ..self }
    }

    /// How long a call waits for its client. 10 minutes by default.
    pub fn wait(self, wait: Duration) -> Self {
        ParkLayer { wait, ..self }
    }
}

impl<S> Layer<S> for ParkLayer {
    type Service = Park<S>;

    fn layer(&self, inner: S) -> Park<S> {
        let lot = Arc::new(Lot::new(self.most, self.wait));
        Park { inner, place: Place { lot, upstream: self.upstream.clone() } }
    }
}

/// Made by [`ParkLayer`].
#[derive(Clone)]
pub struct Park<S> {
    inner: S,
    place: Place,
}

#[cfg(test)]
impl<S> Park<S> {
    /// How many calls wait.
    pub(super) fn waiting(&self) -> usize {
        self.place.lot.len()
    }
}

/// What all clones of the service share.
#[derive(Clone)]
struct Place {
    lot: Arc<Lot>,
    upstream: ServerName,
}

impl<S: McpService> Service<McpRequest> for Park<S> {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = ParkFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: McpRequest) -> Self::Future {
        let Some(asked) = Asked::of(&request) else {
            return ParkFuture { state: State::Called { inner: self.inner.call(request), watch: None } };
        };
        if let Some(resumed) = self.place.resume(&asked, request.params()) {
            match resumed {
                Ok(Resumed::Anew) => request.set_params(without_answers(request.params().clone())),
                Ok(Resumed::Goes(rest)) => {
                    let frames = self.place.clone().watch(rest, asked);
                    return ParkFuture::done(Ok(McpResponse::new(Payload::Stream(frames))));
                }
                Ok(Resumed::Again(result)) => return ParkFuture::done(Ok(McpResponse::raw(result))),
                Err(error) => return ParkFuture::done(Err(error.into())),
            }
        }
        let watch = Some((self.place.clone(), asked));
        ParkFuture { state: State::Called { inner: self.inner.call(request), watch } }
    }
}

pin_project! {
    /// Made by [`Park`].
    pub struct ParkFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = Projected]
    enum State<F> {
        // The upstream was called; `watch` when what it asks may have to be turned.
        Called { #[pin] inner: F, watch: Option<(Place, Asked)> },
        // It was not.
        Done { outcome: Option<Result<McpResponse, BoxError>> },
    }
}

impl<F> ParkFuture<F> {
    fn done(outcome: Result<McpResponse, BoxError>) -> Self {
        ParkFuture { state: State::Done { outcome: Some(outcome) } }
    }
}

impl<F, E> Future for ParkFuture<F>
where
    F: Future<Output = Result<McpResponse, E>>,
    E: Into<BoxError>,
{
    type Output = Result<McpResponse, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            Projected::Done { outcome } => {
                Poll::Ready(outcome.take().expect("a future is not polled after it is done"))
            }
            Projected::Called { inner, watch } => {
                let response = ready!(inner.poll(cx)).map_err(Into::into)?;
                let Some((place, asked)) = watch.take() else { return Poll::Ready(Ok(response)) };
                let (payload, extensions) = response.into_parts();
                let payload = match payload {
                    Payload::Stream(frames) => {
                        let rest = Rest { frames, next: None, token: asked.token() };
                        as_said(place.watch(rest, asked))
                    }
                    Payload::Error(error) => place.turned(&asked, error),
                    payload => payload,
                };
                Poll::Ready(Ok(McpResponse::from_parts(payload, extensions)))
            }
        }
    }
}

impl Place {
    /// Goes on with the call that the params name, if they name one of ours.
    fn resume(&self, asked: &Asked, params: &Params) -> Option<Result<Resumed, InvalidParams>> {
        let state = params.get_string("requestState")?;
        let answers = params.get_object("inputResponses").unwrap_or_else(RawObject::empty);
        self.lot.resume(asked, &state, &answers)
    }

    /// The frames, up to the first question: there the call is parked.
    fn watch(self, rest: Rest, asked: Asked) -> FrameStream {
        let watched = Watched { token: asked.token(), place: self, rest, asked };
        Box::pin(stream::unfold(Some(watched), |watched| async move { watched?.next().await }))
    }

    /// A legacy upstream's error that asks for a URL to be visited first (MCP 2025-11-25, elicitation) as what asks
    /// the same of a modern client: input is wanted, and then the call again.
    fn turned(&self, asked: &Asked, error: RpcError) -> Payload {
        let Some(wanted) = visits(&error) else { return Payload::Error(error) };
        let mut questions = Vec::new();
        for (i, visit) in wanted.into_iter().enumerate() {
            let mut params = sign_question(&self.upstream, &Method::Elicit, visit);
            if let Err(error) = asked.caller.client.can_answer(&Method::Elicit, &params) {
                return Payload::Error(error);
            }
            params.object_mut().remove("elicitationId");
            let mut request = RawObject::empty();
            request.set("method", json!(Method::Elicit.as_str()).to_string());
            request.set("params", params.as_str());
            questions.push(Question::of_ended(i + 1, request));
        }
        match self.lot.park(asked, questions, None) {
            Parking::Waits(result) => Payload::Raw(result),
            Parking::Full(_) => Payload::Error(error),
        }
    }
}

/// A stream that has nothing to say but its result is no stream.
fn as_said(mut frames: FrameStream) -> Payload {
    match frames.next().now_or_never() {
        Some(Some(Ok(Frame::Final(payload)))) => payload,
        Some(Some(frame)) => Payload::Stream(Box::pin(stream::iter([frame]).chain(frames))),
        Some(None) => Payload::Stream(Box::pin(stream::empty())),
        None => Payload::Stream(frames),
    }
}

/// The visits that an error asks for: `data.elicitations`, each by URL. `None` for any other error.
fn visits(error: &RpcError) -> Option<Vec<Params>> {
    if error.code() != code::LEGACY_URL_ELICITATION_REQUIRED {
        return None;
    }
    let data = RawObject::parse(error.as_bytes().clone()).ok()?.get_object("data")?;
    let wanted: Vec<Box<serde_json::value::RawValue>> = data.get_as("elicitations")?.ok()?;
    let visits: Vec<Params> = wanted
        .iter()
        .map(|visit| Params::parse(Bytes::copy_from_slice(visit.get().as_bytes())))
        .collect::<Result<_, _>>()
        .ok()?;
    let by_url = |visit: &Params| visit.get_string("mode").as_deref() == Some("url");
    (!visits.is_empty() && visits.iter().all(by_url)).then_some(visits)
}

/// The frames of one call.
struct Watched {
    place: Place,
    rest: Rest,
    asked: Asked,
    /// The token under which the client wants progress now.
    token: Option<Bytes>,
}

/// What became of a call that asks.
enum Asking {
    Waits(Bytes),
    GoesOn(Box<Watched>),
}

impl Watched {
    async fn next(mut self) -> Option<(Result<Frame, BoxError>, Option<Watched>)> {
        loop {
            let frame = match self.rest.next.take() {
                Some(frame) => frame,
                None => self.rest.frames.next().await?,
            };
            match frame {
                Ok(Frame::Request(first)) => match self.ask(first) {
                    Asking::Waits(result) => return Some((Ok(Frame::Final(Payload::Raw(result))), None)),
                    Asking::GoesOn(watched) => self = *watched,
                },
                Ok(Frame::Notification(mut notification)) => {
                    if notification.method == Method::Progress && self.token != self.rest.token {
                        // The retry is another request, and its token another token.
                        let Some(token) = &self.token else { continue };
                        notification.params.object_mut().set(
                            "progressToken",
                            std::str::from_utf8(token).expect("JSON that was parsed is UTF-8"),
                        );
                    }
                    return Some((Ok(Frame::Notification(notification)), Some(self)));
                }
                Ok(Frame::Final(Payload::Error(error))) => {
                    let payload = self.place.turned(&self.asked, error);
                    return Some((Ok(Frame::Final(payload)), None));
                }
                Ok(Frame::Final(payload)) => return Some((Ok(Frame::Final(payload)), None)),
                Err(error) => return Some((Err(error), None)),
            }
        }
    }

    /// Parks the call with its question, and with those that are there already. The call goes on when nothing of it
    /// can be asked.
    fn ask(mut self, first: ServerRequest) -> Asking {
        let mut questions = Vec::new();
        let mut request = first;
        loop {
            match self.asked.caller.client.can_answer(&request.method, &request.params) {
                Ok(()) => questions.push(Question::new(questions.len() + 1, request)),
                Err(error) => request.reply.refuse(error),
            }
            if questions.len() == AT_ONCE {
                break;
            }
            match self.rest.frames.next().now_or_never() {
                Some(Some(Ok(Frame::Request(next)))) => request = next,
                Some(Some(other)) => {
                    self.rest.next = Some(other);
                    break;
                }
                Some(None) => {
                    // Nothing more comes, and nobody may ask again.
                    self.rest.frames = Box::pin(stream::empty());
                    break;
                }
                None => break,
            }
        }
        if questions.is_empty() {
            return Asking::GoesOn(Box::new(self));
        }
        let Watched { place, rest, asked, token } = self;
        match place.lot.park(&asked, questions, Some(rest)) {
            Parking::Waits(result) => Asking::Waits(result),
            Parking::Full(rest) => {
                Asking::GoesOn(Box::new(Watched { place, rest: rest.unwrap_or_default(), asked, token }))
            }
        }
    }
}

impl fmt::Debug for ParkLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParkLayer")
            .field("upstream", &self.upstream)
            .field("most", &self.most)
            .field("wait", &self.wait)
            .finish()
    }
}

impl<S: fmt::Debug> fmt::Debug for Park<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Park").field("inner", &self.inner).finish_non_exhaustive()
    }
}
