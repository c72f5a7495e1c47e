//! The examples do what they say.

use std::{path::PathBuf, process::Command};

/// Runs one without arguments, the way that shows what it can do and ends.
fn run(name: &str) -> String {
    let mut path: PathBuf = std::env::current_exe().expect("this test has a path");
    path.pop();
    path.set_file_name("examples");
    path.push(name);
    let output = Command::new(&path).output().unwrap_or_else(|e| {
        panic!("{} cannot be run, is it built? `cargo build --examples`: {e}", path.display())
    });
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("examples print text")
}

#[test]
fn quickstart_shows_what_may_be_seen_and_refuses_the_rest() {
    let said = run("quickstart");
    assert!(said.contains("files_read") && said.contains("Unknown tool: files_delete"), "{said}");
}

#[test]
fn mount_in_axum_serves() {
    assert!(run("mount_in_axum").contains("/mcp"));
}

#[test]
fn custom_layer_spends_its_budget() {
    let said = run("custom_layer");
    let answers: Vec<&str> = said.lines().collect();
    assert_eq!(answers.len(), 3, "{said}");
    assert!(!answers[1].contains("budget_spent") && answers[2].contains("budget_spent"), "{said}");
}

#[test]
fn stack_by_hand_calls_what_is_allowed() {
    let said = run("stack_by_hand");
    assert!(said.contains("math_add: Raw") && said.contains("Unknown tool: math_divide"), "{said}");
}
