//! Secret keys on disk, and what is done with them away from any network.
//!
//! ```text
//! text      durations, times and shown text          (leaf)
//! exit      the exit codes of every command           (leaf)
//! disk      reading with a cap, writing all or nothing
//! passphrase  where a passphrase comes from
//! file      key files: create, load, show            uses disk, passphrase, pem
//! pem       the text blocks that keys and objects travel in
//! armor     signed objects, drafts and proofs as text files
//! issue     drafts of charters, certificates and mandates; what may be signed
//! judge     verify: proofs and single objects, against a charter
//! view      any object as a person reads it, and as JSON
//! pkcs8     keys of other tools (RFC 8410)
//! ```
//!
//! No network code. Time comes in as an argument; only the binary reads a clock. The node uses
//! [`mod@file`] for its own key and [`armor`], [`judge`] and [`view`] for its commands.

pub mod armor;
pub mod disk;
pub mod exit;
pub mod file;
pub mod issue;
pub mod judge;
pub mod passphrase;
pub mod pem;
pub mod pkcs8;
pub mod text;
pub mod view;
