//! See `leasehold_node::fuzz::index`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| leasehold_node::fuzz::index(bytes));
