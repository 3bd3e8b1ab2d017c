//! The `leasehold` binary: warden and runner first, then the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before any thread exists: a job's warden and runner are this executable, started anew.
    if let Some(code) = leasehold_node::work::hidden(std::env::args_os().skip(1)) {
        return code;
    }
    // The kernels of models would else share one pool of threads, whose size is read from here once:
    // each model has its own.
    #[allow(unsafe_code)] // no other thread exists that could read the environment meanwhile
    unsafe {
        std::env::set_var("CANDLE_NUM_THREADS", "1");
    }
    leasehold_node::cli::main(std::env::args_os(), leasehold_node::work::Exec::default())
}
