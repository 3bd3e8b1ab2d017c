//! Leases on models: requests counted on both sides, and who sells what.

use super::{Command, CommandId, Core, Effect, Failure, Kept, Reply, Seller};
use crate::base::id::LeaseId;
use crate::base::time::Now;
use crate::words::model::{Served, Service};
use crate::words::sign::Verified;

impl Command {
    /// Whether it only counts what was used: that is taken to the very end.
    pub(super) const fn counts(&self) -> bool {
        matches!(self, Self::Serve(..) | Self::Consume(_))
    }
}

impl Core {
    /// A request was served under a lease granted here: its record is kept, and handed back to be
    /// signed.
    pub(super) fn serve(
        &mut self,
        now: Now,
        command: CommandId,
        (lease, service): (LeaseId, Service),
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let (number, draft) = self.book.serve(now, &lease, service).ok_or(Failure::Over)?;
        self.counters.served += 1;
        out.push(Effect::Keep(Kept::Served(lease, number, draft.clone())));
        out.push(Effect::Answer(command, Ok(Reply::Served(draft))));
        Ok(())
    }

    /// A request was made under a lease held here, and its record says of it what this node knows:
    /// it is kept, and a receipt that covers it will be countersigned.
    pub(super) fn consume(
        &mut self,
        command: CommandId,
        served: &Verified<Served>,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let agreed = self.holdings.consume(served).map_err(Failure::BadRecord)?;
        for served in agreed {
            self.counters.consumed += 1;
            let (lease, number) = (served.body().lease, served.body().number);
            out.push(Effect::Keep(Kept::Consumed(lease, number, served.signed().clone())));
        }
        out.push(Effect::Answer(command, Ok(Reply::Consumed)));
        Ok(())
    }

    /// Every node, with the models that it sells, if any.
    pub(super) fn sellers(&self, now: Now) -> Vec<Seller> {
        let hosts = self.spread.hosts().map(|host| {
            let key = host.signer();
            let (offer, heard) = self.spread.offer(&key).unzip();
            let offer = offer.map(Verified::body);
            let believed = !self.conduct.is_quarantined(&key);
            Seller {
                key,
                name: host.body().name.clone(),
                up: believed && self.is_up(&key, heard, now.boot),
                max_term: offer.map(|offer| offer.max_term).unwrap_or_default(),
                models: offer.map(|offer| offer.models.clone()).unwrap_or_default(),
                addresses: host.body().addresses.data.clone(),
            }
        });
        hosts.collect()
    }
}
