//! `tools`: what clients see.

use anyhow::Result;

use super::{
    DataDir, args,
    control::{Missing, Tool},
    note, say, view,
};
use crate::protocol::RawObject;

pub(super) async fn run(args: &args::Tools, dir: &DataDir) -> Result<()> {
    let found = dir.control().await?.tools(args.wait.wait).await?;
    if args.json {
        let definitions = Vec::from_iter(found.tools.iter().map(|tool| &tool.definition));
        say(serde_json::to_string_pretty(&definitions)?)?;
    } else if found.servers == 0 {
        say("No servers yet. Add one: portcullis add NAME URL, or portcullis add NAME -- COMMAND ARGS..")?;
    } else if found.tools.is_empty() {
        say("No tools.")?;
    } else {
        let rows = found.tools.iter().map(|tool| {
            let (name, description) = name_and_description(tool);
            (name, tool.server.as_str(), description)
        });
        say(view::text(&view::tools(rows)))?;
    }
    say_missing(&found.missing);
    Ok(())
}

/// On stderr, for whoever misses a tool.
pub(super) fn say_missing(missing: &[Missing]) {
    for Missing { name, why } in missing {
        note(format!("server `{name}` {}", view::plain(why)));
    }
}

fn name_and_description(tool: &Tool) -> (String, String) {
    let Ok(definition) = RawObject::parse(tool.definition.get().to_owned().into()) else {
        return Default::default();
    };
    let text = |member| definition.get_string(member).map(String::from);
    let name = text("name").unwrap_or_default();
    let description = text("description").or_else(|| text("title")).unwrap_or_default();
    let first = description.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    (name, cut(first))
}

fn cut(line: &str) -> String {
    match line.chars().count() > WIDEST {
        true => line.chars().take(WIDEST - 1).chain(['…']).collect(),
        false => line.to_owned(),
    }
}

/// As much of a description as helps to choose.
const WIDEST: usize = 120;
