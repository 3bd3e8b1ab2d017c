//! WASI preview 1 programs in wasmtime: the engine's settings, the memory limit, and what each
//! way to end means.
//!
//! The engine has epoch interruption and nothing that a single program does not need: no
//! components, no shared memory, one memory, one instance. A store is used once and dropped.

use std::path::Path;

use wasmtime::{Config, Engine, Linker, Module, ResourceLimiter, Store, Trap};
use wasmtime_wasi::p1::{self, WasiP1Ctx};
use wasmtime_wasi::{FsPerms, I32Exit, WasiCtxBuilder, cli};

use super::spec::{NOTICE, NOTICE_VARIABLE, Outcome, Spec};

/// The longest message that an outcome carries, in bytes.
const MAX_MESSAGE: usize = 4096;
/// Elements that the program's tables may have together.
const MAX_TABLE_ELEMENTS: usize = 10_000_000;
/// What compiling one byte of program may take in memory: function bodies grow into an
/// intermediate form with dominator trees and live ranges, and into machine code beside it.
const COMPILE_FACTOR: u64 = 24;
/// What the runner needs for itself.
const RUNNER_MEMORY: u64 = 64 << 20;
/// Address space that the runner's own code, stacks and allocator arenas take without using it.
const RUNNER_SPACE: u64 = 2 << 30;
/// What wasmtime reserves for a memory that needs no bounds checks, with its guards.
const FAST_SPACE: u64 = 5 << 30;

/// How a run ended: by itself, or because [`Engine::increment_epoch`] was called.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By itself.
    With(Outcome),
    /// Interrupted from outside.
    Interrupted,
}

/// The memory that the kernel must grant a runner so that the program's own limit is met first.
pub(super) fn memory_with_runner(memory: u64, program: u64) -> u64 {
    memory.saturating_add(RUNNER_MEMORY).saturating_add(program.saturating_mul(COMPILE_FACTOR))
}

/// The address space that a runner gets. Where a cgroup bounds real memory it is generous, since
/// a reservation of 4 GiB makes the code faster; otherwise it is the only bound there is.
pub(super) fn address_space(memory: u64, program: u64, memory_bounded: bool) -> u64 {
    let base = memory_with_runner(memory, program).saturating_add(RUNNER_SPACE);
    if memory_bounded { base.saturating_add(FAST_SPACE) } else { base }
}

/// The engine, with tight reservations where address space is the only bound.
pub(super) fn engine(memory: u64, memory_bounded: bool) -> Result<Engine, Outcome> {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .wasm_component_model(false)
        .wasm_multi_memory(false)
        // Sharing initial memory between instances takes memfd_create(2), for the one there is.
        .memory_init_cow(false)
        .max_wasm_stack(1 << 20);
    if !memory_bounded {
        config
            .memory_reservation(memory)
            .memory_reservation_for_growth(0)
            .memory_guard_size(64 << 10)
            .guard_before_linear_memory(false);
    }
    Engine::new(&config).map_err(|error| not_runnable("the runtime does not start", &error))
}

/// The program's view of the world: its arguments and environment, `/in`, `/out`, clocks, chance.
pub(super) fn context(
    spec: &Spec,
    input: &Path,
    output: &Path,
    stdin: Option<std::fs::File>,
    stdout: std::fs::File,
    stderr: std::fs::File,
) -> Result<WasiP1Ctx, Outcome> {
    let mut builder = WasiCtxBuilder::new();
    builder.args(&spec.args).envs(&spec.env);
    if !spec.env.iter().any(|(name, _)| name == NOTICE_VARIABLE) {
        builder.env(NOTICE_VARIABLE, format!("/in/{NOTICE}"));
    }
    builder.stdout(cli::OutputFile::new(stdout)).stderr(cli::OutputFile::new(stderr));
    if let Some(stdin) = stdin {
        builder.stdin(cli::InputFile::new(stdin));
    }
    // The process runs one program and has nothing else to do while it reads a file.
    builder.allow_blocking_current_thread(true);
    builder
        .preopened_dir(input, "/in", FsPerms::ReadOnly)
        .map_err(|error| not_runnable("cannot open the inputs", &error))?;
    builder
        .preopened_dir(output, "/out", FsPerms::ReadWrite)
        .map_err(|error| not_runnable("cannot open the outputs", &error))?;
    Ok(builder.build_p1())
}

struct Guest {
    wasi: WasiP1Ctx,
    memory: Bound,
}

/// Holds the program to its memory, and remembers whether it ever wanted more: `memory.grow`
/// then answers -1, as it does on any host without memory, and what most programs do next is to
/// trap.
#[derive(Debug)]
struct Bound {
    limit: u64,
    memory: usize,
    elements: usize,
    refused: bool,
}

impl Bound {
    fn new(limit: u64) -> Self {
        Self { limit, memory: 0, elements: 0, refused: false }
    }
}

impl ResourceLimiter for Bound {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let all = self.memory.saturating_sub(current).saturating_add(desired);
        if u64::try_from(all).unwrap_or(u64::MAX) > self.limit {
            self.refused = true;
            return Ok(false);
        }
        self.memory = all;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        // The kernel refused what the limit would have allowed: to the program it is the same.
        self.refused = true;
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let all = self.elements.saturating_sub(current).saturating_add(desired);
        if all > MAX_TABLE_ELEMENTS {
            return Ok(false);
        }
        self.elements = all;
        Ok(true)
    }

    fn instances(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        64
    }

    fn memories(&self) -> usize {
        1
    }
}

/// Compiles and runs a program to its end.
pub(super) fn run(engine: &Engine, program: &[u8], wasi: WasiP1Ctx, memory: u64) -> Ended {
    let module = match compile(engine, program) {
        Ok(module) => module,
        Err(outcome) => return Ended::With(outcome),
    };
    let mut linker: Linker<Guest> = Linker::new(engine);
    if let Err(error) = p1::add_to_linker_sync(&mut linker, |guest| &mut guest.wasi) {
        return Ended::With(not_runnable("the runtime does not start", &error));
    }
    // The library traps on codes from 126 on; a program's code is its own, and told as it is.
    let exit = |code: i32| -> wasmtime::Result<()> { Err(I32Exit(code).into()) };
    linker.allow_shadowing(true);
    if let Err(error) = linker.func_wrap("wasi_snapshot_preview1", "proc_exit", exit) {
        return Ended::With(not_runnable("the runtime does not start", &error));
    }
    let before = match linker.instantiate_pre(&module) {
        Ok(before) => before,
        Err(error) => {
            return Ended::With(not_runnable("it wants what WASI preview 1 has not", &error));
        }
    };
    let mut store = Store::new(engine, Guest { wasi, memory: Bound::new(memory) });
    store.limiter(|guest| &mut guest.memory);
    store.set_epoch_deadline(1);
    let instance = match before.instantiate(&mut store) {
        Ok(instance) => instance,
        // A start function may already run, trap, exit or be interrupted.
        Err(error) if error.is::<Trap>() || error.is::<I32Exit>() => {
            return ended(&store, memory, Err(error));
        }
        Err(_) if store.data().memory.refused => {
            return Ended::With(Outcome::OutOfMemory { limit: memory });
        }
        Err(error) => return Ended::With(not_runnable("it cannot be set up", &error)),
    };
    let start = match instance.get_typed_func::<(), ()>(&mut store, "_start") {
        Ok(start) => start,
        Err(error) => {
            let what = "it has no `_start` function, so it is a library and no program";
            return Ended::With(not_runnable(what, &error));
        }
    };
    let result = start.call(&mut store, ());
    ended(&store, memory, result)
}

fn compile(engine: &Engine, program: &[u8]) -> Result<Module, Outcome> {
    // The preamble: magic, version, layer. Layer 1 is a component.
    if program.get(..4) != Some(b"\0asm".as_slice()) {
        return Err(Outcome::NotRunnable {
            message: "it is not WebAssembly (it does not begin with `\\0asm`); build it for \
                      wasm32-wasip1"
                .to_owned(),
        });
    }
    if program.get(6..8) == Some([1, 0].as_slice()) {
        return Err(Outcome::NotRunnable {
            message: "it is a component; build it for WASI preview 1 (wasm32-wasip1)".to_owned(),
        });
    }
    Module::from_binary(engine, program)
        .map_err(|error| not_runnable("it is not valid WebAssembly", &error))
}

fn ended(store: &Store<Guest>, limit: u64, result: wasmtime::Result<()>) -> Ended {
    let Err(error) = result else { return Ended::With(Outcome::Exited { code: 0 }) };
    if let Some(I32Exit(code)) = error.downcast_ref::<I32Exit>() {
        return Ended::With(Outcome::Exited { code: *code });
    }
    let trap = error.downcast_ref::<Trap>();
    if trap == Some(&Trap::Interrupt) {
        return Ended::Interrupted;
    }
    if store.data().memory.refused {
        return Ended::With(Outcome::OutOfMemory { limit });
    }
    let message = match trap {
        Some(trap) => trap.to_string(),
        None => error.root_cause().to_string(),
    };
    Ended::With(Outcome::Trapped { message: shorten(message) })
}

fn not_runnable(what: &str, error: &wasmtime::Error) -> Outcome {
    let cause = error.root_cause().to_string();
    Outcome::NotRunnable { message: shorten(format!("{what}: {cause}")) }
}

/// Cuts a message, which may quote the program's own names, at a sensible length.
pub(super) fn shorten(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        let mut end = MAX_MESSAGE;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_for_all_growth_together_and_remembers() {
        let mut bound = Bound::new(1000);
        assert!(bound.memory_growing(0, 600, None).expect("answers"));
        assert!(bound.memory_growing(600, 1000, None).expect("answers"));
        assert!(!bound.refused);
        assert!(!bound.memory_growing(1000, 1001, None).expect("answers"));
        assert!(bound.refused);
        assert!(!bound.memory_growing(1000, usize::MAX, None).expect("answers"));
        assert!(!bound.table_growing(0, usize::MAX, None).expect("answers"));
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let short = shorten("ä".repeat(MAX_MESSAGE));
        assert!(short.len() <= MAX_MESSAGE + 3 && short.ends_with('…'));
        assert_eq!(shorten("a".into()), "a");
    }

    #[test]
    fn address_space_has_room_for_what_is_reserved() {
        let (memory, program) = (1 << 30, 1 << 20);
        assert!(address_space(memory, program, true) > memory + FAST_SPACE);
        assert!(address_space(memory, program, false) > memory_with_runner(memory, program));
        assert_eq!(address_space(u64::MAX, u64::MAX, true), u64::MAX);
    }
}
