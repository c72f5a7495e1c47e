//! The layer on a mock, and the state machine against a model, in simulated time.

use std::{collections::HashMap, sync::Arc};

use futures_util::StreamExt as _;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{Duration, advance},
};

use super::*;
use crate::{
    error::InvalidParams,
    identity::{Caller, Client, Principal, Scope},
    protocol::{
        Frame, McpRequest, McpResponse, Method, Notification, Params, Payload, Reply, RpcError,
        ServerRequest, code,
    },
    testing::{self, Below, Mock},
};

const WAIT: Duration = Duration::from_secs(60);

struct House {
    caller: testing::Caller<Park<Mock>>,
    below: Below,
}

impl House {
    fn new() -> House {
        Self::with(ParkLayer::new("up".parse().unwrap()).wait(WAIT))
    }

    fn with(layer: ParkLayer) -> House {
        let (caller, below) = testing::layer(layer);
        House { caller, below }
    }

    /// Calls as far as the upstream, whose hand is returned.
    async fn begin(&mut self, request: McpRequest) -> (testing::Answer, Upstream) {
        let answer = self.caller.call(request);
        let (frames, more) = mpsc::unbounded_channel();
        let more = futures_util::stream::unfold(more, |mut more| async { Some((more.recv().await?, more)) });
        self.below.answer(McpResponse::new(Payload::Stream(Box::pin(more)))).await;
        (answer, Upstream(frames))
    }

    /// A call that is parked with one question: its state, the upstream, and where its answer arrives.
    async fn parked(&mut self, request: McpRequest) -> (String, Upstream, Asking) {
        let (answer, upstream) = self.begin(request).await;
        let asking = upstream.asks("Which?");
        let result = settled(answer).await.unwrap();
        (result["requestState"].as_str().unwrap().to_owned(), upstream, asking)
    }

    async fn retry(&mut self, request: McpRequest) -> Result<Value, crate::BoxError> {
        settled(self.caller.call(request)).await
    }

    fn waiting(&self) -> usize {
        self.caller.service().waiting()
    }
}

type Asking = tokio::sync::oneshot::Receiver<Payload>;

/// The hand of the upstream within one call. Its receiver is gone when the call was ended.
struct Upstream(mpsc::UnboundedSender<Result<Frame, crate::BoxError>>);

impl Upstream {
    fn asks(&self, message: &str) -> Asking {
        self.asks_for(Method::Elicit, json!({ "message": message }))
    }

    fn asks_for(&self, method: Method, params: Value) -> Asking {
        let (reply, answer) = Reply::new();
        let request = ServerRequest { method, params: Params::from_value(&params), reply };
        self.0.send(Ok(Frame::Request(request))).unwrap();
        answer
    }

    fn progress(&self, token: Value) {
        let params = Params::from_value(&json!({ "progressToken": token, "progress": 1 }));
        self.0.send(Ok(Frame::Notification(Notification { method: Method::Progress, params }))).unwrap();
    }

    fn ends(&self, result: Value) {
        self.0.send(Ok(Frame::Final(Payload::Value(result)))).unwrap();
    }
}

/// Everything of an answer: the notifications' params, and the result.
async fn whole(answer: testing::Answer) -> Result<(Vec<Value>, Value), crate::BoxError> {
    let mut said = Vec::new();
    let mut frames = match answer.await?.into_payload() {
        Payload::Stream(frames) => frames,
        Payload::Error(error) => return Err(error.into()),
        payload => return Ok((said, payload.to_value().unwrap())),
    };
    while let Some(frame) = frames.next().await {
        match frame? {
            Frame::Notification(n) => said.push(serde_json::from_slice(n.params.as_json())?),
            Frame::Final(Payload::Error(error)) => return Err(error.into()),
            Frame::Final(payload) => return Ok((said, payload.to_value().unwrap())),
            Frame::Request(_) => panic!("a modern client was asked in the middle of a call"),
        }
    }
    Err("no result".into())
}

async fn settled(answer: testing::Answer) -> Result<Value, crate::BoxError> {
    Ok(whole(answer).await?.1)
}

fn by(principal: &str, params: Value) -> McpRequest {
    let client = Client {
        capabilities: json!({ "elicitation": { "form": {}, "url": {} }, "roots": {} }).to_string().into(),
        ..Client::gateway()
    };
    let caller = Caller { principal: Principal::named(principal), client, ..(*Caller::anonymous()).clone() };
    McpRequest::new(Method::ToolsCall, Params::from_value(&params)).with_caller(Arc::new(caller))
}

fn call() -> McpRequest {
    by("alice", json!({ "name": "t", "arguments": { "a": 1 } }))
}

fn retry(state: &str) -> McpRequest {
    retry_by("alice", 1, state, json!({ "q1": { "action": "decline" } }))
}

fn retry_by(principal: &str, a: u32, state: &str, answers: Value) -> McpRequest {
    by(
        principal,
        json!({ "name": "t", "arguments": { "a": a }, "inputResponses": answers, "requestState": state }),
    )
}

fn is_unknown(outcome: Result<Value, crate::BoxError>) -> bool {
    outcome.is_err_and(|e| e.downcast_ref::<InvalidParams>().is_some_and(|e| e.0.contains("requestState")))
}

#[tokio::test]
async fn a_question_becomes_a_result_and_the_retry_goes_on_with_the_call() {
    let mut house = House::new();
    let (answer, upstream) = house.begin(call()).await;
    let asking = upstream.asks("Which?");
    let result = settled(answer).await.unwrap();
    assert_eq!(result["resultType"], "input_required");
    let question = json!({ "method": "elicitation/create", "params": { "message": "Which?" } });
    assert_eq!(result["inputRequests"], json!({ "q1": question }));
    let goes_on = house.caller.call(retry(result["requestState"].as_str().unwrap()));
    assert_eq!(asking.await.unwrap().to_value().unwrap(), json!({ "action": "decline" }));
    upstream.ends(json!({ "content": [] }));
    assert_eq!(settled(goes_on).await.unwrap(), json!({ "content": [] }));
    assert!(house.below.is_idle(), "the upstream was called once");
}

#[tokio::test]
async fn a_state_is_good_once() {
    let mut house = House::new();
    let (state, _upstream, _asking) = house.parked(call()).await;
    let first = house.caller.call(retry(&state));
    assert!(is_unknown(house.retry(retry(&state)).await));
    drop(first);
}

#[tokio::test]
async fn of_two_retries_at_once_one_goes_on() {
    let mut house = House::new();
    let (state, upstream, _asking) = house.parked(call()).await;
    let (a, b) = (house.caller.call(retry(&state)), house.caller.call(retry(&state)));
    upstream.ends(json!({}));
    let (a, b) = tokio::join!(settled(a), settled(b));
    assert_ne!(a.is_ok(), b.is_ok());
}

#[tokio::test]
async fn it_is_good_for_nobody_and_nothing_else() {
    let mut house = House::new();
    let (state, upstream, _asking) = house.parked(call()).await;
    let answers = json!({ "q1": { "action": "accept" } });
    let mut elsewhere = retry(&state);
    let caller = Caller { scope: Scope::Group("g".into()), ..(**elsewhere.caller()).clone() };
    elsewhere = elsewhere.with_caller(Arc::new(caller));
    let params = retry(&state).params().clone();
    let other_method = McpRequest::new(Method::PromptsGet, params).with_caller(call().caller().clone());
    let mut forged = state.clone();
    forged.replace_range(20..21, if &state[20..21] == "A" { "B" } else { "A" });
    for wrong in [
        retry_by("eve", 1, &state, answers.clone()),
        retry_by("alice", 2, &state, answers),
        retry(&forged),
        elsewhere,
        other_method,
    ] {
        assert!(is_unknown(house.retry(wrong).await));
    }
    // And it is still there for whom it is meant.
    upstream.ends(json!({ "done": 1 }));
    assert_eq!(house.retry(retry(&state)).await.unwrap(), json!({ "done": 1 }));
}

#[tokio::test]
async fn a_state_of_another_gateway_is_the_upstreams_business() {
    let (state, _upstream, _asking) = House::new().parked(call()).await;
    let mut house = House::new();
    let answer = house.caller.call(retry(&state));
    let request = house.below.answer(McpResponse::raw("{}")).await;
    assert_eq!(request.params().get_string("requestState").as_deref(), Some(&*state));
    assert!(answer.await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_client_does_not_come_back_is_ended() {
    let mut house = House::new();
    let (state, upstream, asking) = house.parked(call()).await;
    advance(WAIT - Duration::from_secs(1)).await;
    let (second, other, _asking) = house.parked(call()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let Ok(Payload::Error(error)) = asking.await else { panic!("the upstream is told") };
    assert_eq!(error.code(), code::TIMED_OUT);
    assert!(upstream.0.is_closed(), "the call is ended");
    assert!(is_unknown(house.retry(retry(&state)).await));
    assert_eq!(house.waiting(), 1);
    other.ends(json!({}));
    assert!(house.retry(retry(&second)).await.is_ok(), "the other one has time left");
}

#[tokio::test]
async fn what_is_left_unanswered_is_asked_again() {
    let mut house = House::new();
    let (answer, upstream) = house.begin(call()).await;
    let (first, second) = (upstream.asks("One?"), upstream.asks_for(Method::RootsList, json!({})));
    let result = settled(answer).await.unwrap();
    assert_eq!(result["inputRequests"].as_object().unwrap().len(), 2);
    let state = result["requestState"].as_str().unwrap();
    let again = house.retry(retry_by("alice", 1, state, json!({ "q2": { "roots": [] } }))).await.unwrap();
    assert_eq!(second.await.unwrap().to_value().unwrap(), json!({ "roots": [] }));
    assert_eq!(again["inputRequests"], json!({ "q1": result["inputRequests"]["q1"] }));
    let state = again["requestState"].as_str().unwrap();
    let broken = house.retry(retry_by("alice", 1, state, json!({ "q1": 7 }))).await;
    assert!(broken.unwrap_err().to_string().contains("inputResponses.q1"));
    let goes_on = house.caller.call(retry(state));
    assert!(matches!(first.await, Ok(Payload::Raw(_))));
    upstream.ends(json!({}));
    assert!(settled(goes_on).await.is_ok());
}

#[tokio::test]
async fn progress_of_the_retry_has_the_retrys_token() {
    let with = |params: Value, token: &str| {
        let mut params = params;
        params["_meta"] = json!({ "progressToken": token });
        by("alice", params)
    };
    let mut house = House::new();
    let first = with(json!({ "name": "t" }), "first");
    let (answer, upstream) = house.begin(first).await;
    upstream.progress(json!("first"));
    let _asking = upstream.asks("Which?");
    let (said, result) = whole(answer).await.unwrap();
    assert_eq!(said[0]["progressToken"], "first");
    let answers = json!({ "q1": {} });
    let params = json!({ "name": "t", "inputResponses": answers, "requestState": result["requestState"] });
    let goes_on = house.caller.call(with(params, "second"));
    upstream.progress(json!("first"));
    upstream.ends(json!({}));
    assert_eq!(whole(goes_on).await.unwrap().0[0]["progressToken"], "second");
}

#[tokio::test]
async fn a_client_is_not_asked_what_it_did_not_declare() {
    let mut house = House::new();
    let (answer, upstream) = house.begin(call()).await;
    let asking = upstream.asks_for(Method::CreateMessage, json!({}));
    upstream.ends(json!({ "went": "on" }));
    assert_eq!(settled(answer).await.unwrap(), json!({ "went": "on" }));
    let Ok(Payload::Error(error)) = asking.await else { panic!() };
    assert_eq!(error.code(), code::MISSING_CAPABILITY);
}

#[tokio::test]
async fn legacy_clients_and_final_methods_pass() {
    let mut house = House::new();
    let mut caller = (**call().caller()).clone();
    caller.client.version = crate::protocol::ProtocolVersion::LATEST_LEGACY;
    let complete = McpRequest::bare(Method::Complete).with_caller(call().caller().clone());
    for request in [call().with_caller(Arc::new(caller)), complete] {
        let (answer, upstream) = house.begin(request).await;
        let _asking = upstream.asks("Which?");
        let Payload::Stream(mut frames) = answer.await.unwrap().into_payload() else { panic!() };
        assert!(matches!(frames.next().await, Some(Ok(Frame::Request(_)))));
    }
}

#[tokio::test]
async fn a_full_lot_refuses_the_question_and_the_call_goes_on() {
    let mut house = House::with(ParkLayer::new("up".parse().unwrap()).most(1));
    let (_state, _upstream, _asking) = house.parked(call()).await;
    let (answer, upstream) = house.begin(call()).await;
    let asking = upstream.asks("Which?");
    upstream.ends(json!({ "went": "on" }));
    assert_eq!(settled(answer).await.unwrap(), json!({ "went": "on" }));
    assert!(matches!(asking.await, Ok(Payload::Error(e)) if e.code() == code::OVERLOADED));
}

#[tokio::test]
async fn an_error_that_asks_for_a_visit_is_asked_and_the_call_made_again() {
    let mut house = House::new();
    let visit =
        json!({ "mode": "url", "elicitationId": "1", "url": "https://a.example", "message": "Log in" });
    let error = RpcError::new(code::LEGACY_URL_ELICITATION_REQUIRED, "visit first")
        .with_data(&json!({ "elicitations": [visit] }));
    let answer = house.caller.call(call());
    house.below.answer(McpResponse::error(error)).await;
    let result = settled(answer).await.unwrap();
    let question = &result["inputRequests"]["q1"];
    assert_eq!(question["method"], "elicitation/create");
    let expected = json!({ "mode": "url", "url": "https://a.example", "message": "[up] Log in" });
    assert_eq!(question["params"], expected);
    let again = house.caller.call(retry(result["requestState"].as_str().unwrap()));
    let request = house.below.answer(McpResponse::raw(r#"{"in":1}"#)).await;
    assert_eq!(request.params().as_str(), call().params().as_str());
    assert_eq!(settled(again).await.unwrap(), json!({ "in": 1 }));
}

#[tokio::test]
async fn readiness_is_the_inner_services() {
    let mut house = House::new();
    house.below.set_ready(false);
    assert!(house.caller.poll_ready().is_pending());
    house.below.set_ready(true);
    assert!(house.caller.poll_ready().is_ready());
}

/// One step of the simulation. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    Call { principal: u8, argument: u8 },
    Retry { state: usize, principal: u8, argument: u8 },
    Forge { state: usize, at: usize },
    Ask { call: usize },
    End { call: usize },
    Pass { seconds: u64 },
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..2u8, 0..2u8).prop_map(|(principal, argument)| Step::Call { principal, argument }),
        5 => (any::<usize>(), 0..2u8, 0..2u8)
            .prop_map(|(state, principal, argument)| Step::Retry { state, principal, argument }),
        1 => (any::<usize>(), any::<usize>()).prop_map(|(state, at)| Step::Forge { state, at }),
        2 => any::<usize>().prop_map(|call| Step::Ask { call }),
        1 => any::<usize>().prop_map(|call| Step::End { call }),
        2 => (1..50u64).prop_map(|seconds| Step::Pass { seconds }),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..40)
}

/// What ought to be true of a state that was given out.
struct Given {
    text: String,
    call: usize,
    house: usize,
    until: tokio::time::Instant,
    used: bool,
}

/// A call as the model knows it.
struct Known {
    principal: u8,
    argument: u8,
    upstream: Upstream,
    /// The answer of the leg that is under way, if one is.
    leg: Option<testing::Answer>,
    questions: Vec<Asking>,
}

/// Runs the steps against the model: every retry goes on with exactly the call it belongs to, or is refused.
async fn simulate(steps: Vec<Step>) {
    let mut house = House::new();
    let mut generation = 0;
    let mut calls: HashMap<usize, Known> = HashMap::new();
    let mut given: Vec<Given> = Vec::new();
    let name = |principal: u8| format!("p{principal}");
    for step in steps {
        match step {
            Step::Call { principal, argument } => {
                let params = json!({ "name": "t", "arguments": { "a": argument } });
                let (leg, upstream) = house.begin(by(&name(principal), params)).await;
                let known = Known { principal, argument, upstream, leg: Some(leg), questions: Vec::new() };
                calls.insert(calls.len(), known);
            }
            Step::Ask { call } if !calls.is_empty() => {
                let call = call % calls.len();
                let known = calls.get_mut(&call).unwrap();
                let Some(leg) = known.leg.take() else { continue };
                known.questions.push(known.upstream.asks(&format!("call {call}")));
                let result = settled(leg).await.unwrap();
                assert_eq!(result["inputRequests"]["q1"]["params"]["message"], format!("call {call}"));
                let text = result["requestState"].as_str().unwrap().to_owned();
                let until = tokio::time::Instant::now() + WAIT;
                given.push(Given { text, call, house: generation, until, used: false });
            }
            Step::End { call } if !calls.is_empty() => {
                let call = call % calls.len();
                let known = calls.get_mut(&call).unwrap();
                let Some(leg) = known.leg.take() else { continue };
                known.upstream.ends(json!({ "call": call }));
                assert_eq!(settled(leg).await.unwrap(), json!({ "call": call }), "replies are crossed");
            }
            Step::Retry { state, principal, argument } if !given.is_empty() => {
                let state = state % given.len();
                let state = &mut given[state];
                let known = calls.get_mut(&state.call).unwrap();
                let own = state.house == generation;
                let good = own
                    && !state.used
                    && tokio::time::Instant::now() < state.until
                    && (known.principal, known.argument) == (principal, argument);
                let answers = json!({ "q1": { "action": "accept", "content": { "n": state.call } } });
                let leg =
                    house.caller.call(retry_by(&name(principal), argument.into(), &state.text, answers));
                if !own {
                    // What an upstream that gave out no such state says.
                    house.below.fail(InvalidParams("requestState".into())).await;
                    assert!(is_unknown(settled(leg).await));
                    continue;
                }
                if !good {
                    assert!(is_unknown(settled(leg).await), "a bad retry went on");
                    continue;
                }
                state.used = true;
                let answer = known.questions.pop().unwrap().await.unwrap().to_value().unwrap();
                assert_eq!(answer["content"]["n"], state.call, "answers are crossed");
                known.leg = Some(leg);
            }
            Step::Forge { state, at } if !given.is_empty() => {
                let mut text = given[state % given.len()].text.clone().into_bytes();
                // Past the name of the key: what is forged says that it is ours.
                let at = 9 + at % (text.len() - 9);
                text[at] = if text[at] == b'A' { b'B' } else { b'A' };
                let known = &calls[&given[state % given.len()].call];
                let own = given[state % given.len()].house == generation;
                let text = String::from_utf8(text).unwrap();
                let request = retry_by(&name(known.principal), known.argument.into(), &text, json!({}));
                if own {
                    assert!(is_unknown(house.retry(request).await), "a forged state was taken");
                }
            }
            Step::Pass { seconds } => {
                // The clock ticks in milliseconds.
                tokio::time::sleep(Duration::from_secs(seconds) + Duration::from_millis(2)).await;
                for state in given.iter().filter(|s| !s.used && s.until <= tokio::time::Instant::now()) {
                    assert!(calls[&state.call].upstream.0.is_closed(), "an expired call goes on upstream");
                }
            }
            Step::Restart => {
                // Those who were being served are cut off with the process.
                calls.values_mut().for_each(|known| known.leg = None);
                house = House::new();
                generation += 1;
                tokio::task::yield_now().await;
                for state in given.iter().filter(|s| !s.used) {
                    assert!(calls[&state.call].upstream.0.is_closed(), "a parked call outlives its gateway");
                }
            }
            _ => {}
        }
    }
    let now = tokio::time::Instant::now();
    let waiting = given.iter().filter(|s| s.house == generation && !s.used && s.until > now).count();
    assert_eq!(house.waiting(), waiting);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn no_order_of_events_crosses_loses_or_revives_a_call(steps in steps()) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(simulate(steps));
    }
}
