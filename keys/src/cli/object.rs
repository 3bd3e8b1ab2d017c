//! `inspect`, `sign`, `verify`: signed objects, drafts and proofs.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write as _};
use std::path::PathBuf;

use clap::Args;
use leasehold_keys::armor::{self, ArmorError, Item};
use leasehold_keys::disk::ReadError;
use leasehold_keys::exit::Exit;
use leasehold_keys::judge::{self, NotVerified};
use leasehold_keys::view::{self, Context};
use leasehold_keys::{file, issue};
use leasehold_proto::words::object::Kind;
use leasehold_proto::words::sign::Signed;
use leasehold_proto::{FabricId, Wall};
use serde_json::{Value, json};

use super::draft::the_signed;
use super::{Answer, Failure, Unlock, existing, tell};

/// Print any object.
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A file of signed objects, drafts or proofs
    file: PathBuf,
    /// The signed charter, for the currency of amounts
    #[arg(long, value_name = "FILE")]
    charter: Option<PathBuf>,
}

/// Sign a draft.
#[derive(Debug, Args)]
pub(super) struct Sign {
    /// A file with one draft
    file: PathBuf,
    /// The key file to sign with
    #[arg(long, value_name = "KEYFILE")]
    key: PathBuf,
    /// Write the signed object to this file and print its id; without it, print the object
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The signed charter, for the currency of amounts
    #[arg(long, value_name = "FILE")]
    charter: Option<PathBuf>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    unlock: Unlock,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

/// Check a proof or signed objects.
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// A file with a proof or signed objects
    file: PathBuf,
    /// The fabric it must belong to (the id of its first charter)
    #[arg(long, value_name = "ID")]
    fabric: Option<FabricId>,
    /// The signed charter: tells whether the signer of a single object counts
    #[arg(long, value_name = "FILE")]
    charter: Option<PathBuf>,
}

fn charter(path: Option<&PathBuf>) -> Result<Option<Signed>, Failure> {
    path.map(|path| the_signed(path, Kind::Charter)).transpose()
}

impl Inspect {
    pub(super) fn run(self, now: Wall) -> Result<Answer, Failure> {
        let items = armor::read_objects(&self.file)?;
        let mut context = Context::at(now);
        context.learn_from(&items);
        if let Some(charter) = charter(self.charter.as_ref())? {
            context.learn(&charter);
        }
        let text = items.iter().map(|item| view::text(item, &context)).collect::<Vec<_>>();
        let json = match items.as_slice() {
            [item] => view::json(item),
            items => json!({ "objects": items.iter().map(view::json).collect::<Vec<_>>() }),
        };
        Ok(Answer::new(text.join("\n"), json))
    }
}

#[derive(Debug, thiserror::Error)]
enum NotSigned {
    #[error("{0} holds {1} objects where one unsigned draft is expected")]
    Count(String, usize),
    #[error("{0} is signed already: only a draft is signed")]
    Signed(String),
    #[error("no terminal to ask on: look at what is shown above and say --yes")]
    NoTerminal,
    #[error("not signed: the answer was no")]
    Declined,
}

impl Sign {
    pub(super) fn run(self, now: Wall) -> Result<Answer, Failure> {
        let name = self.file.display().to_string();
        let mut items = armor::read_objects(&self.file)?;
        let mut context = Context::at(now);
        context.learn_from(&items);
        if let Some(charter) = charter(self.charter.as_ref())? {
            context.learn(&charter);
        }
        if items.len() != 1 {
            return Err(Failure::new(Exit::Io, NotSigned::Count(name, items.len())));
        }
        let Some(Item::Draft(draft)) = items.pop() else {
            return Err(Failure::new(Exit::Policy, NotSigned::Signed(name)));
        };
        tell(&view::text(&Item::Draft(draft.clone()), &context));
        let key = file::describe(&self.key)?.id;
        let header = issue::signable(&draft, &key, now)?;
        if !self.yes {
            confirm(&format!("Sign this {} as {key}? [y/N] ", header.kind))?;
        }
        let secret = file::load(&self.key, &self.unlock.source())?;
        // What the file says about itself was not authenticated before it was opened.
        issue::signable(&draft, &secret.id(), now)?;
        let signed = secret.signer().sign(&draft).map_err(|why| Failure::new(Exit::No, why))?;
        let id = signed.id();
        let mut json = json!({ "kind": header.kind, "id": id, "signer": header.signer });
        let item = Item::Signed(signed);
        let text = armor::encode(&item)?;
        if let Some(path) = &self.out {
            armor::write_objects(path, &[item], existing(self.force))?;
            json["file"] = json!(path);
            return Ok(Answer::new(format!("{id}\n"), json));
        }
        json["signed"] = json!(text);
        Ok(Answer::new(text, json))
    }
}

/// Asks on the terminal itself: standard input may be a file.
fn confirm(question: &str) -> Result<(), Failure> {
    let no_terminal = |_| Failure::new(Exit::Usage, NotSigned::NoTerminal);
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/tty");
    let mut terminal = terminal.map_err(no_terminal)?;
    terminal.write_all(question.as_bytes()).map_err(no_terminal)?;
    let mut answer = String::new();
    BufReader::new(terminal).read_line(&mut answer).map_err(no_terminal)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::new(Exit::No, NotSigned::Declined)),
    }
}

/// A no is an answer too: with `--json` it is one object like the yes.
fn refused(error: impl Into<anyhow::Error>) -> Failure {
    let error = error.into();
    let json = json!({ "verified": false, "error": leasehold_keys::text::causes(error.as_ref()) });
    Failure { exit: Exit::No, error, json: Some(json) }
}

impl Verify {
    pub(super) fn run(self, now: Wall) -> Result<Answer, Failure> {
        let items = match armor::read_objects(&self.file) {
            Ok(items) => items,
            // What is damaged or no object at all does not verify; what cannot be read is
            // another matter.
            Err(
                why @ (ArmorError::Content { .. } | ArmorError::Read(ReadError::TooLong { .. })),
            ) => {
                return Err(refused(why));
            }
            Err(why) => return Err(why.into()),
        };
        let charter = charter(self.charter.as_ref())?;
        let mut texts = Vec::new();
        let mut values = Vec::new();
        for item in &items {
            let (text, value) = self.item(item, charter.as_ref(), now).map_err(refused)?;
            texts.push(text);
            values.push(value);
        }
        if self.fabric.is_none() && charter.is_none() {
            tell("note: whether this is the right fabric is for you to compare (--fabric ID)");
        }
        let json = match values.len() {
            1 => values.remove(0),
            _ => json!({ "verified": true, "objects": values }),
        };
        Ok(Answer::new(texts.join("\n"), json))
    }

    fn item(
        &self,
        item: &Item,
        charter: Option<&Signed>,
        now: Wall,
    ) -> Result<(String, Value), NotVerified> {
        let fabric = self.fabric.as_ref();
        let (text, mut value) = match item {
            Item::Draft(_) => return Err(NotVerified::Unsigned),
            Item::Proof(proof) => {
                let verdict = judge::proof(proof, fabric)?;
                if let Some(charter) = charter {
                    let expected = judge::object(charter, None, None, now)?.fabric;
                    if expected != verdict.fabric {
                        return Err(NotVerified::Fabric { expected, got: verdict.fabric });
                    }
                }
                (view::verdict(&verdict), json!(verdict))
            }
            Item::Equivocation(both) => {
                let convicted = judge::equivocation(both, fabric)?;
                (view::conviction(&convicted), json!(convicted.header()))
            }
            Item::Signed(signed) => {
                let held = judge::object(signed, fabric, charter, now)?;
                let admitted = match (held.kind, held.admitted) {
                    (Kind::Charter, _) => "one of the organisations it names signed it",
                    (_, Some(_)) => "the charter admits it",
                    (_, None) => "whether the signer is admitted was not checked",
                };
                let expired = if held.not_after < now { "; it has expired" } else { "" };
                let text = format!(
                    "the signature of {} {} holds\n  signed by {}\n  in fabric {}\n  \
                     {admitted}{expired}\n",
                    held.kind, held.id, held.signer, held.fabric
                );
                (text, json!(held))
            }
        };
        value["verified"] = json!(true);
        if let Item::Proof(_) = item {
            value["kind"] = json!("proof");
        }
        if let Item::Equivocation(_) = item {
            value["of"] = value["kind"].take();
            value["kind"] = json!("equivocation");
        }
        Ok((text, value))
    }
}
