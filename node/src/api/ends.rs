//! Waiting for the ends of leases: however many clients ask, again and again, the loop is asked
//! once per lease.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use leasehold_proto::LeaseId;
use leasehold_proto::core::{Command, Ended, Failure, Reply};
use tokio::sync::watch;

use super::error::ApiError;
use crate::handle::{AskError, Handle};

/// What was heard: nothing yet, an end, or that there will be none.
type Heard = Option<Result<Ended, Failure>>;

/// The leases whose ends are awaited now.
#[derive(Clone, Debug, Default)]
pub(super) struct Ends {
    awaited: Arc<Mutex<BTreeMap<LeaseId, watch::Receiver<Heard>>>>,
}

impl Ends {
    /// The end of a held lease, once it has one. Dropping this stops nothing but this wait.
    pub(super) async fn of(&self, handle: &Handle, lease: LeaseId) -> Result<Ended, ApiError> {
        let mut heard = self.subscribe(handle, lease);
        match heard.wait_for(Option::is_some).await {
            Ok(heard) => match heard.as_ref() {
                Some(Ok(ended)) => Ok(ended.clone()),
                Some(Err(failure)) => Err(failure.clone().into()),
                None => Err(ApiError::stopping()),
            },
            // The task that asked is gone without an answer: so is the loop.
            Err(_) => Err(ApiError::stopping()),
        }
    }

    fn subscribe(&self, handle: &Handle, lease: LeaseId) -> watch::Receiver<Heard> {
        // What the lock guards is whole between any two steps, so a poisoned one holds no harm.
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = awaited.get(&lease) {
            return waiting.clone();
        }
        let (tell, hear) = watch::channel(None);
        awaited.insert(lease, hear.clone());
        let (ends, handle) = (self.clone(), handle.clone());
        tokio::spawn(async move {
            let reply = handle.ask(Command::AwaitEnd(lease)).await;
            ends.awaited.lock().unwrap_or_else(PoisonError::into_inner).remove(&lease);
            match reply {
                Ok(Reply::Ended(ended)) => drop(tell.send(Some(Ok(ended)))),
                Err(AskError::Failed(failure)) => drop(tell.send(Some(Err(failure)))),
                Ok(_) | Err(AskError::Stopped) => {}
            }
        });
        hear
    }
}
