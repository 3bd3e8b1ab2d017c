//! node

pub mod net;
pub mod probe;
pub mod work;
