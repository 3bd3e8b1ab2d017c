//! Fleets of nodes on one machine: one scenario language, two worlds, one set of checks.
//!
//! ```text
//! scenario      who is there, what they ask, what goes wrong: plain data from one seed
//! check         the invariants of the design, over a history of what was seen
//! virtual_world many cores in virtual time in one process
//! bench         the subcommand that measures, with real processes
//! sim           the subcommand that runs scenarios in the virtual world
//! ```

pub mod bench;
pub mod check;
pub mod scenario;
pub mod sim;
pub mod virtual_world;
