//! The `leasehold` binary: warden and runner first, then the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before any thread exists: a job's warden and runner are this executable, started anew.
    if let Some(code) = leasehold_node::work::hidden(std::env::args_os().skip(1)) {
        return code;
    }
    leasehold_node::cli::main(std::env::args_os(), leasehold_node::work::Exec::default())
}
