//! `leasehold outputs`: fetches what a job left behind, also of one that was started with `-d`.

use std::path::PathBuf;

use clap::Args;
use leasehold_keys::exit::Exit;
use leasehold_proto::words::contract::is_file_name;
use serde_json::json;

use super::follow::{self, Sink};
use super::{Failure, Session, find, transfer};
use crate::api::want::PayloadText;

/// Fetch the declared outputs of a job that has ended, checked against their roots.
#[derive(Debug, Args)]
pub(super) struct Outputs {
    /// The lease, or its first digits
    lease: String,
    /// Only this file; may be repeated
    #[arg(long, value_name = "NAME")]
    name: Vec<String>,
    /// Where they go
    #[arg(long, value_name = "DIR", default_value = ".")]
    output_dir: PathBuf,
}

/// What the job printed is for `leasehold logs`.
struct Unheard;

impl Sink for Unheard {
    fn stdout(&mut self, _: &[u8]) -> Result<(), Failure> {
        Ok(())
    }

    fn stderr(&mut self, _: &[u8]) -> Result<(), Failure> {
        Ok(())
    }
}

impl Outputs {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let Some(end) = follow::so_far(&session.client, &lease, &mut Unheard).await? else {
            let message = "the job has not ended: `leasehold logs -f` follows it to its end";
            return Err(Failure::say(Exit::No, message));
        };
        let wanted = |name: &str| self.name.is_empty() || self.name.iter().any(|one| one == name);
        if let Some(missing) =
            self.name.iter().find(|name| !end.outputs.iter().any(|file| file.name == **name))
        {
            let message = format!("the job kept no output named '{missing}'");
            return Err(Failure::say(Exit::No, message));
        }
        let (mut fetched, mut text) = (Vec::new(), String::new());
        for file in end.outputs.iter().filter(|file| wanted(&file.name)) {
            // The name is the lessor's word: it must name one file and no way anywhere.
            if !is_file_name(&file.name) {
                let message = "the lessor names an output that is no plain file name";
                return Err(Failure::say(Exit::No, message));
            }
            let payload = PayloadText::of(&file.payload);
            let path =
                transfer::download(session, &lease, &file.name, &payload, &self.output_dir).await?;
            text.push_str(&format!("{}\n", path.display()));
            fetched.push(transfer::line(&file.name, &path, &payload));
        }
        session.out.answer(&json!({ "lease": lease, "outputs": fetched }), || text)?;
        Ok(Exit::Ok)
    }
}
