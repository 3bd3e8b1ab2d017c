//! testnet
pub mod bench;
