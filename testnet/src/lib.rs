//! Fleets of nodes on one machine: one scenario language, two worlds, one set of checks.
//!
//! ```text
//! scenario      who is there, what they ask, what goes wrong: plain data from one seed
//! check         the invariants of the design, over a history of what was seen
//! judge         the same checks, over the histories that real nodes wrote
//! relay         between the UDP sockets of real nodes: cuts, delays, loses
//! virtual_world many cores in virtual time in one process
//! bench         the subcommand that measures, with real processes
//! fleet         real node processes on loopback, and nothing of them left behind
//! demo          the subcommand that shows one lease from end to end
//! up            the subcommand that runs a fleet until it is told to stop
//! chaos         the subcommand that lets real nodes run into everything that can go wrong
//! sim           the subcommand that runs scenarios in the virtual world
//! ```

pub mod bench;
pub mod chaos;
pub mod check;
pub mod demo;
pub mod fleet;
pub mod judge;
pub mod relay;
pub mod report;
pub mod scenario;
pub mod signal;
pub mod sim;
pub mod up;
pub mod virtual_world;
