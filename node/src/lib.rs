//! node
pub mod work;
