//! `leasehold order new`: an order for a lessee to sign on another machine.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use leasehold_keys::disk::{self, Existing};
use leasehold_keys::exit::Exit;
use leasehold_proto::words::charter::Certificate;
use serde_json::json;

use super::output::short_key;
use super::want::WantArgs;
use super::{Failure, Session};
use crate::api::body::{OrderDraft, OrderRequest};

/// The longest certificate file that is read, in bytes.
const MAX_CERTIFICATE: usize = 256 * 1024;

/// Orders for a lessee to sign elsewhere.
#[derive(Debug, Subcommand)]
pub(super) enum Order {
    /// Draft an order, to be signed with `leasehold-keys sign`
    New(Box<New>),
}

/// Draft an order, to be signed with `leasehold-keys sign`.
#[derive(Debug, Args)]
pub(super) struct New {
    #[command(flatten)]
    want: WantArgs,
    /// The key that will sign [default: the one that the certificate admits]
    #[arg(long, value_name = "KEY")]
    lessee: Option<String>,
    /// The certificate that admits it
    #[arg(long, value_name = "FILE")]
    certificate: PathBuf,
    /// Where the order is written to
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

impl Order {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::New(args) => args.run(session).await,
        }
    }
}

impl New {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let lessee = match self.lessee {
            Some(lessee) => lessee,
            None => admitted(&self.certificate)?,
        };
        let certificate = disk::read(&self.certificate, MAX_CERTIFICATE)?;
        let certificate = String::from_utf8_lossy(&certificate).into_owned();
        let want = self.want.text(session).await?;
        let request = OrderRequest { want, lessee, certificate };
        let draft: OrderDraft = session.client.post("/v1/orders", &request).await?;
        let existing = if self.force { Existing::Replace } else { Existing::Keep };
        disk::write_atomic(&self.out, draft.order.as_bytes(), 0o644, existing)?;
        let (choice, currency) = (&draft.choice, &draft.currency);
        let object = json!({ "out": self.out, "choice": choice, "currency": currency });
        session.out.answer(&object, || format!("{}\n", self.out.display()))?;
        session.out.tell(&format!(
            "the order names {} (…{}) at {} {currency}/h, at most {} {currency} in all; sign it \
             with `leasehold-keys sign {}`, then `leasehold lease request --order FILE`",
            leasehold_keys::text::shown(&choice.name),
            short_key(&choice.lessor),
            choice.rate,
            choice.worst_case,
            self.out.display(),
        ));
        Ok(Exit::Ok)
    }
}

/// The key that the certificate in `path` admits. The node checks the certificate itself.
fn admitted(path: &std::path::Path) -> Result<String, Failure> {
    let signed = crate::home::read_one(path, "certificate");
    let signed = signed.map_err(|error| Failure::new(error.exit(), error))?;
    let certificate = signed.verify_anywhere::<Certificate>();
    let certificate = certificate
        .map_err(|error| Failure::say(Exit::No, format!("{}: {error}", path.display())))?;
    Ok(certificate.body().key.to_string())
}
