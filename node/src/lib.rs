//! node
pub mod data;
pub mod payload;
