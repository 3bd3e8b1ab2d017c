//! The runner: a process that opens what the job needs, gives up everything else, and runs one
//! program.
//!
//! ```text
//! started by the warden, control line on standard input
//!    | closes what it inherited, asks to die with its parent
//!    v
//! waits for Go  ---- line closed: exits
//!    | opens program, stdin, /in, /out
//!    | confines itself (module `confine`); from here on nothing else can be opened
//!    v
//! says Confined, compiles, runs  ---- Stop: epoch interruption; line closed: exits
//!    v
//! says Ended or Interrupted, waits for Bye, exits
//! ```
//!
//! Nothing that it says is believed about anything but its own program: deadline, usage and
//! outputs are the warden's.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::spec::{JobFile, MAX_JSON, MAX_PROGRAM, Outcome, Said, Spec, Tell, file, read_json};
use super::wasm::{self, Ended};
use super::{confine, process};

/// How long an interrupted program may still be in a host call before the process ends itself.
const INTERRUPT: Duration = Duration::from_millis(250);
/// How long to wait for the warden to note the end.
const BYE: Duration = Duration::from_secs(2);

/// Runs the runner of the job in this directory. To be called from `main`, before any thread is
/// started, in a process whose standard input is the warden's control line.
pub fn runner_main(dir: &Path) -> ExitCode {
    match runner(dir) {
        Ok(()) => ExitCode::SUCCESS,
        // There is nobody to tell but the warden, and the line to it is what failed.
        Err(_) => ExitCode::FAILURE,
    }
}

/// The control line, as both ends read it.
pub(super) struct Line<T> {
    reader: BufReader<T>,
}

impl<T: Read> Line<T> {
    pub(super) fn new(stream: T) -> Self {
        Self { reader: BufReader::new(stream) }
    }

    /// The next message; none when the other end is gone.
    pub(super) fn next<M: DeserializeOwned>(&mut self) -> io::Result<Option<M>> {
        let mut line = Vec::new();
        // The other end may be hostile: no more than a bounded line is ever held.
        (&mut self.reader).take(MAX_JSON).read_until(b'\n', &mut line)?;
        match line.strip_suffix(b"\n") {
            Some(line) => Ok(Some(serde_json::from_slice(line)?)),
            None if line.is_empty() => Ok(None),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "message is cut or too long")),
        }
    }
}

/// Writes one message.
pub(super) fn send<M: serde::Serialize>(mut stream: impl Write, message: &M) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn runner(dir: &Path) -> io::Result<()> {
    process::close_inherited()?;
    confine::die_with_parent()?;
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut line = Line::new(control.try_clone()?);
    // Whoever was the parent when the kernel was asked above, the line tells if it is gone.
    let Some(Tell::Go { uid, memory_bounded, cgroup }) = line.next()? else { return Ok(()) };

    let run = match prepare(dir, uid, memory_bounded, cgroup) {
        Ok(prepared) => prepared.run(&control, line)?,
        Err(outcome) => {
            let done = finish(&control, Ended::With(outcome));
            let _ = control.set_read_timeout(Some(BYE));
            let _ = line.next::<Tell>();
            return done;
        }
    };
    finish(&control, run.ended)?;
    let _ = run.bye.recv_timeout(BYE);
    Ok(())
}

fn finish(control: &UnixStream, ended: Ended) -> io::Result<()> {
    let said = match ended {
        Ended::With(outcome) => Said::Ended { outcome },
        Ended::Interrupted => Said::Interrupted,
    };
    send(control, &said)
}

/// All that is opened before the cage closes.
struct Prepared {
    spec: Spec,
    program: Vec<u8>,
    wasi: wasmtime_wasi::p1::WasiP1Ctx,
    memory_bounded: bool,
    isolation: Vec<String>,
}

struct Run {
    ended: Ended,
    bye: mpsc::Receiver<()>,
}

fn prepare(
    dir: &Path,
    uid: Option<u32>,
    memory_bounded: bool,
    cgroup: Option<String>,
) -> Result<Prepared, Outcome> {
    let failed = |what: &str, error: &io::Error| Outcome::NotRunnable {
        message: format!("{what}: {error}"),
    };
    let job: JobFile =
        read_json(&dir.join(file::JOB)).map_err(|e| failed("cannot read the job", &e))?;
    let spec = job.spec;
    let program = read_program(&spec.program).map_err(|e| failed("cannot read the program", &e))?;
    let stdin = spec.stdin.as_ref().map(File::open).transpose();
    let stdin = stdin.map_err(|e| failed("cannot open standard input", &e))?;
    let inherit = |fd: io::Result<std::os::fd::OwnedFd>| {
        fd.map(File::from).map_err(|e| failed("cannot open standard output", &e))
    };
    let stdout = inherit(io::stdout().as_fd().try_clone_to_owned())?;
    let stderr = inherit(io::stderr().as_fd().try_clone_to_owned())?;
    let (read, write) = (dir.join(file::IN), dir.join(file::OUT));
    let wasi = wasm::context(&spec, &read, &write, stdin, stdout, stderr)?;

    let size = u64::try_from(program.len()).unwrap_or(u64::MAX);
    let mut isolation = vec!["wasm".to_owned()];
    isolation.extend(cgroup);
    isolation.extend(confine::enter(&confine::Cage {
        read: &read,
        write: &write,
        uid,
        file_size: spec.disk,
        address_space: wasm::address_space(spec.memory, size, memory_bounded),
        probing: false,
    }));
    if let Some(word) = spec.require.iter().find(|word| !isolation.contains(word)) {
        let got = isolation.join(" ");
        return Err(Outcome::NotRunnable {
            message: format!("the lease requires isolation {word:?}, this host gave: {got}"),
        });
    }
    Ok(Prepared { spec, program, wasi, memory_bounded, isolation })
}

fn read_program(path: &Path) -> io::Result<Vec<u8>> {
    let mut program = Vec::new();
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    file.take(MAX_PROGRAM + 1).read_to_end(&mut program)?;
    if u64::try_from(program.len()).unwrap_or(u64::MAX) > MAX_PROGRAM {
        let message = format!("it is larger than {MAX_PROGRAM} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(program)
}

impl Prepared {
    fn run(self, control: &UnixStream, line: Line<UnixStream>) -> io::Result<Run> {
        let (say_bye, bye) = mpsc::sync_channel(1);
        let engine = match wasm::engine(self.spec.memory, self.memory_bounded) {
            Ok(engine) => engine,
            Err(outcome) => return Ok(Run { ended: Ended::With(outcome), bye }),
        };
        // WASI's clocks need timers, and timers a thread that drives them; nothing here needs
        // more than one.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(2)
            .enable_time()
            .build()?;
        send(control, &Said::Confined { isolation: self.isolation })?;
        let listener = Listener { line, engine: engine.clone(), control: control.try_clone()? };
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || listener.listen(&say_bye))?;
        let guard = runtime.enter();
        let ended = wasm::run(&engine, &self.program, self.wasi, self.spec.memory);
        drop(guard);
        // A timer that the program left behind must not hold the process up.
        runtime.shutdown_background();
        Ok(Run { ended, bye })
    }
}

/// Listens to the warden while the program runs.
struct Listener {
    line: Line<UnixStream>,
    engine: wasmtime::Engine,
    control: UnixStream,
}

impl Listener {
    fn listen(mut self, bye: &mpsc::SyncSender<()>) {
        loop {
            match self.line.next::<Tell>() {
                Ok(Some(Tell::Stop)) => {
                    self.engine.increment_epoch();
                    let quiet = self.control.set_read_timeout(Some(INTERRUPT));
                    if quiet.is_err() || !matches!(self.line.next::<Tell>(), Ok(Some(Tell::Bye))) {
                        // The program sleeps or waits in a host call, where no epoch is looked
                        // at, or is still being compiled. It has nothing that must be saved.
                        let _ = send(&self.control, &Said::Interrupted);
                        std::process::exit(0);
                    }
                    let _ = bye.try_send(());
                    return;
                }
                Ok(Some(Tell::Bye)) => {
                    let _ = bye.try_send(());
                    return;
                }
                Ok(Some(Tell::Go { .. })) => {}
                // The warden is gone, or talks nonsense: nobody watches the deadline any more.
                Ok(None) | Err(_) => std::process::exit(1),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_whole_and_bounded() {
        let text = b"{\"tell\":\"stop\"}\n{\"tell\":\"bye\"}\n{\"tell\":";
        let mut line = Line::new(text.as_slice());
        assert!(matches!(line.next().expect("a line"), Some(Tell::Stop)));
        assert!(matches!(line.next().expect("a line"), Some(Tell::Bye)));
        assert!(line.next::<Tell>().is_err(), "a cut line is no message");
        assert!(Line::new(b"".as_slice()).next::<Tell>().expect("the end").is_none());
        assert!(Line::new(b"nonsense\n".as_slice()).next::<Tell>().is_err());
        let endless = io::repeat(b'x');
        assert!(Line::new(endless).next::<Tell>().is_err());
    }
}
