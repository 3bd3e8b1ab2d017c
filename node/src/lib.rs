//! node

pub mod net;
pub mod probe;
