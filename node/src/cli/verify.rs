//! `leasehold verify`: checks proofs and signed objects with no node and no network, as
//! `leasehold-keys verify` does.

use std::path::PathBuf;

use clap::Args;
use leasehold_keys::armor::{self, Item};
use leasehold_keys::exit::Exit;
use leasehold_keys::{judge, view};
use leasehold_proto::FabricId;
use leasehold_proto::words::sign::Signed;
use serde_json::{Value, json};

use super::Failure;
use super::output::Out;
use crate::clock;

/// Check proofs and signed objects, with no node and no network.
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// The file with proofs or signed objects
    file: PathBuf,
    /// Demand that they belong to this fabric
    #[arg(long, value_name = "ID")]
    fabric: Option<FabricId>,
    /// Check single objects against this charter
    #[arg(long, value_name = "FILE")]
    charter: Option<PathBuf>,
}

impl Verify {
    pub(super) fn run(self, out: &Out) -> Result<Exit, Failure> {
        let charter = match &self.charter {
            Some(path) => Some(charter(armor::read_objects(path)?)?),
            None => None,
        };
        let items = armor::read_objects(&self.file)?;
        let mut text = String::new();
        let mut checked = Vec::new();
        let mut all = true;
        for (nth, item) in (1u64..).zip(&items) {
            match check(item, self.fabric.as_ref(), charter.as_ref()) {
                Ok((said, object)) => {
                    text.push_str(&said);
                    checked.push(object);
                }
                Err(why) => {
                    all = false;
                    out.error(&format!("item {nth} of {}: {why}", self.file.display()));
                    checked.push(json!({ "verified": false, "error": why.to_string() }));
                }
            }
        }
        out.answer(&json!({ "verified": all, "items": checked }), || text)?;
        if all && self.fabric.is_none() {
            out.tell(
                "whether the fabric is the right one is for you to know: compare its id, or say \
                 it with --fabric",
            );
        }
        Ok(if all { Exit::Ok } else { Exit::No })
    }
}

fn charter(items: Vec<Item>) -> Result<Signed, Failure> {
    match <[Item; 1]>::try_from(items) {
        Ok([Item::Signed(signed)]) => Ok(signed),
        _ => Err(Failure::say(Exit::Usage, "--charter wants a file with one signed charter")),
    }
}

/// What an item shows, in words and as JSON.
fn check(
    item: &Item,
    fabric: Option<&FabricId>,
    charter: Option<&Signed>,
) -> Result<(String, Value), judge::NotVerified> {
    match item {
        Item::Proof(proof) => {
            let founded = charter
                .map(|charter| judge::object(charter, None, None, clock::now().wall))
                .transpose()?;
            let founded = founded.map(|founded| founded.fabric);
            let verdict = judge::proof(proof, fabric.or(founded.as_ref()))?;
            let mut object = serde_json::to_value(&verdict).unwrap_or_default();
            object["verified"] = true.into();
            Ok((view::verdict(&verdict), object))
        }
        Item::Signed(signed) => {
            let held = judge::object(signed, fabric, charter, clock::now().wall)?;
            let admitted = match held.admitted {
                Some(true) => ", admitted by the charter",
                _ => "",
            };
            let said = format!("{} {}: signed by {}{admitted}\n", held.kind, held.id, held.signer);
            let mut object = serde_json::to_value(&held).unwrap_or_default();
            object["verified"] = true.into();
            Ok((said, object))
        }
        Item::Equivocation(both) => {
            let convicted = judge::equivocation(both, fabric)?;
            let mut object = serde_json::to_value(convicted.header()).unwrap_or_default();
            object["verified"] = true.into();
            Ok((view::conviction(&convicted), object))
        }
        Item::Draft(_) => Err(judge::NotVerified::Unsigned),
    }
}
