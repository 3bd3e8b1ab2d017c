//! Weights that are their owner's own: peers who know their root do not get them, from the first byte
//! on, after a restart, and when the model is not here any more.

use leasehold_node::api::model::ModelSpec;
use leasehold_node::model::embedded::tiny::Tiny;
use leasehold_testnet::fleet::leasehold;
use serde_json::Value;
use tokio::process::Command;

use super::PATIENCE;
use super::fabric::{ENTRY, Fabric};
use super::web::until;

const HOST: usize = 1;

/// What the entry node comes to when it is to fetch a payload: whether it has it.
async fn fetched(fabric: &Fabric, root: &str, size: u64) -> Result<(), String> {
    let path = format!("/v1/payloads/{root}/fetch?size={size}");
    let answer = fabric.web().send("POST", &path, "").await.whole().await;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    let last: Value =
        text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    if answer.status == 200 && text.contains("\"done\"") { Ok(()) } else { Err(last.to_string()) }
}

/// Runs a command of the host's operator.
async fn operator(fabric: &Fabric, args: &[&str]) {
    let member = fabric.fleet.member(HOST).expect("there");
    let mut command = Command::from(leasehold(fabric.fleet.program()));
    command.args(args).arg("--dir").arg(member.dir()).arg("--api").arg(member.api().expect("runs"));
    let output = command.kill_on_drop(true).output().await.expect("it runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn private_weights_are_nobody_elses() {
    let mut fabric = Fabric::start(&["host"]).await;
    let room = tempfile::tempdir().expect("room");
    let path = room.path().join("own.gguf");
    Tiny::default().write(&path).expect("written");
    let file = path.to_str().expect("a text");
    operator(&fabric, &["model", "add", file, "--private", "--serve", "--as-is"]).await;
    fabric.offered("own", 1).await;
    let line = fabric.model(HOST, "own").await;
    let size = std::fs::metadata(&path).expect("there").len();
    assert!(line.private);
    let refused = fetched(&fabric, &line.digest, size).await;
    assert!(refused.as_ref().is_err_and(|why| why.contains("failed")), "{refused:?}");
    // A node that is killed keeps it so, also of a model that is removed.
    fabric.fleet.kill(HOST).expect("runs");
    fabric.fleet.start_one(HOST).await.expect("starts");
    fabric.fleet.map(PATIENCE).await.expect("all see all");
    assert!(fetched(&fabric, &line.digest, size).await.is_err());
    operator(&fabric, &["model", "rm", "own"]).await;
    assert!(fetched(&fabric, &line.digest, size).await.is_err());
    // Added again as it is, it is still private; its owner may say otherwise.
    operator(&fabric, &["model", "add", file, "--as-is"]).await;
    assert!(fabric.model(HOST, "own").await.private);
    assert!(fetched(&fabric, &line.digest, size).await.is_err());
    let spec = ModelSpec { private: Some(false), ..ModelSpec::default() };
    assert!(!fabric.put(HOST, "own", &spec).await.private);
    until("the weights", PATIENCE, || fetched(&fabric, &line.digest, size)).await;
    let held = fabric.client(ENTRY).has(&format!("/v1/payloads/{}", line.digest)).await;
    assert!(held.expect("answers"));
    fabric.stop().await;
}
