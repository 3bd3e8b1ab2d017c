//! What was sold, asked once more: the answers are the model's, and the tokens were counted right.

use serde_json::{Value, json};
use tokio::process::Command;

use super::fabric::{ENTRY, Fabric, price};
use super::hello;
use leasehold_testnet::fleet::leasehold;

const HOST: usize = 1;

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_is_answered_again_and_counted_alike() {
    let room = tempfile::tempdir().expect("room");
    let transcripts = room.path().join("transcripts");
    let keep = transcripts.clone();
    let fabric = Fabric::with(&["host"], move |config| config.models.transcripts = keep).await;
    fabric.tiny(HOST, "tiny", price("1", "4")).await;
    fabric.offered("tiny", 1).await;
    let web = fabric.web();
    let chance = {
        let mut body = hello("tiny");
        (body["temperature"], body["seed"]) = (json!(1.0), Value::Null);
        body
    };
    for body in [&hello("tiny"), &chance] {
        assert_eq!(web.chat(body).await.status, 200);
    }
    let streamed = web.stream(&hello("tiny")).await.all().await;
    assert!(streamed.done, "{streamed:?}");
    let lease = fabric.held("tiny").await.lease.expect("granted");
    fabric.proven(HOST, &lease, 3).await;
    let proof = room.path().join("lease.proof");
    let text = fabric.client(ENTRY).text(&format!("/v1/leases/{lease}/proof")).await;
    std::fs::write(&proof, text.expect("exported")).expect("written");
    // The one who checks has the same weights.
    fabric.tiny(ENTRY, "same", price("1", "4")).await;
    let member = fabric.fleet.member(ENTRY).expect("there");
    let mut command = Command::from(leasehold(fabric.fleet.program()));
    command.args(["model", "replay", "--json"]).arg(&proof).arg("--transcripts").arg(&transcripts);
    command.arg("--dir").arg(member.dir()).arg("--api").arg(member.api().expect("runs"));
    let output = command.kill_on_drop(true).output().await.expect("it runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}"));
    assert_eq!(
        (&said["matches"], &said["counted"], &said["mismatches"], &said["other_counts"]),
        (&json!(2), &json!(1), &json!(0), &json!(0)),
        "{said} {errors}"
    );
    assert!(output.status.success(), "{errors}");
    fabric.stop().await;
}
