//! The running node.

pub mod net;
pub mod probe;
pub mod store;
pub mod work;
