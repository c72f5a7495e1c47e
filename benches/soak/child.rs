//! A server on stdio: one tool that gives back its nonce, now or later.

use std::{collections::HashMap, time::Duration};

use anyhow::Result;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    sync::mpsc,
    task::AbortHandle,
};

/// Speaks until its input ends.
pub(crate) fn main(modern: bool) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (say, mut said) = mpsc::unbounded_channel::<String>();
        tokio::spawn(async move {
            let mut stdout = tokio::io::stdout();
            while let Some(mut line) = said.recv().await {
                line.push('\n');
                let written = stdout.write_all(line.as_bytes()).await;
                if written.is_err() || (said.is_empty() && stdout.flush().await.is_err()) {
                    return;
                }
            }
        });
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        let mut running: HashMap<String, AbortHandle> = HashMap::new();
        while let Some(line) = lines.next_line().await? {
            let message: Value = serde_json::from_str(&line)?;
            let id = message["id"].clone();
            let result = match message["method"].as_str().unwrap_or_default() {
                "notifications/cancelled" => {
                    let id = message["params"]["requestId"].to_string();
                    running.remove(&id).inspect(AbortHandle::abort);
                    continue;
                }
                "tools/call" => {
                    running.retain(|_, call| !call.is_finished());
                    let call = tokio::spawn(call(message["params"].clone(), id.clone(), say.clone()));
                    running.insert(id.to_string(), call.abort_handle());
                    continue;
                }
                method => crate::upstream::general(method, modern),
            };
            if !id.is_null() {
                say.send(crate::upstream::answer(&id, result))?;
            }
        }
        Ok(())
    })
}

async fn call(params: Value, id: Value, say: mpsc::UnboundedSender<String>) {
    let arguments = &params["arguments"];
    if let (true, Some(token)) = (arguments["stream"] == true, params["_meta"].get("progressToken")) {
        let _ = say.send(crate::upstream::progress(token, arguments));
    }
    if let Some(ms) = arguments["ms"].as_u64() {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    let _ = say.send(crate::upstream::answer(&id, Some(crate::upstream::echo(arguments))));
}

/// What a tool is, wherever it is.
pub(crate) fn tools() -> Value {
    json!({ "tools": [{ "name": "echo", "inputSchema": { "type": "object" } }] })
}
