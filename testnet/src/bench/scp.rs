//! scp, a peer of the benchmark of payloads: an OpenSSH server of its own on loopback, with keys and
//! configuration made for it, and one file copied from it.
//!
//! What scp is timed for has the start of two processes and the handshake in it, some tenths of a
//! second; the copy is synced, as a payload is.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

use super::{
    peer::{self, Running},
    temporary,
};

/// What it is called in the lines.
pub(super) const NAME: &str = "scp";
/// The cipher that both sides are told to use: the one that payloads are sent with.
pub(super) const CIPHER: &str = "aes128-gcm@openssh.com";
/// Where the server lies where it is installed; it wants to be started by its whole path.
const SERVER: &str = "/usr/sbin/sshd";
/// How long it may take to start.
const STARTS: Duration = Duration::from_secs(10);

/// An OpenSSH that is installed.
#[derive(Debug)]
pub(super) struct OpenSsh {
    pub(super) version: String,
    user: String,
}

impl OpenSsh {
    /// The one of this machine, if server and client are there.
    pub(super) fn find() -> Option<Self> {
        let said = |program: &str, args: &[&str]| {
            Command::new(program).args(args).stdin(Stdio::null()).output().ok()
        };
        ["scp", "ssh-keygen"]
            .iter()
            .all(|program| said(program, &["-?"]).is_some())
            .then_some(())?;
        let version = String::from_utf8_lossy(&said("ssh", &["-V"])?.stderr).trim().to_owned();
        let user = String::from_utf8_lossy(&said("id", &["-un"])?.stdout).trim().to_owned();
        Path::new(SERVER).exists().then_some(Self { version, user })
    }

    /// Starts a server whose files are below `base`, and waits until it listens.
    pub(super) fn start(&self, base: &Path) -> anyhow::Result<Server> {
        let dir = temporary(base)?;
        let at = |name: &str| dir.path().join(name);
        for name in ["host", "user"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(at(name))
                .status()
                .context("cannot run ssh-keygen")?;
            ensure!(made.success(), "ssh-keygen made no key");
        }
        // It takes no port 0. One that was free just now is most likely free still.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = free.local_addr()?;
        drop(free);
        let config = format!(
            "ListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nCiphers {CIPHER}\n\
             Subsystem sftp internal-sftp\n",
            at("host").display(),
            at("user.pub").display(),
        );
        std::fs::write(at("config"), config)?;
        // The server keeps what it separates from itself there, and does not make it.
        let _ = std::fs::create_dir("/run/sshd");
        let log = File::create(at("log"))?;
        let mut command = peer::command(SERVER);
        command.args(["-D", "-e", "-f"]).arg(at("config"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
        let process = Running::start(&mut command).context("cannot start sshd")?;
        let mut server = Server { process, address, user: self.user.clone(), dir };
        server.ready()?;
        Ok(server)
    }
}

/// A server that runs; it ends, and its keys go, when dropped.
#[derive(Debug)]
pub(super) struct Server {
    process: Running,
    address: SocketAddr,
    user: String,
    dir: TempDir,
}

impl Server {
    fn ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + STARTS;
        while TcpStream::connect(self.address).is_err() {
            self.process.runs(&self.dir.path().join("log")).context("sshd")?;
            ensure!(Instant::now() < deadline, "sshd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Copies `from` to `to`, synced. Gives the seconds it took.
    pub(super) fn copy(&self, from: &Path, to: &Path) -> anyhow::Result<f64> {
        let key: PathBuf = self.dir.path().join("user");
        let mut command = Command::new(NAME);
        command.args(["-q", "-B", "-F", "none", "-c", CIPHER, "-P"]);
        command.arg(self.address.port().to_string()).arg("-i").arg(key);
        for option in [
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
        ] {
            command.args(["-o", option]);
        }
        command.arg(format!("{}@{}:{}", self.user, self.address.ip(), from.display())).arg(to);
        let begun = Instant::now();
        let copied = command.stdin(Stdio::null()).status().context("cannot run scp")?;
        ensure!(copied.success(), "scp ended with {copied}");
        File::open(to)?.sync_all()?;
        Ok(begun.elapsed().as_secs_f64())
    }
}
