//! node
pub mod payload;
