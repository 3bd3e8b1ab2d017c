//! A LiteLLM proxy, a peer of the gateway: one worker with its own defaults, before the same upstream.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use super::{client::Target, mock::MODEL};
use crate::bench::{
    peer::{self, Running},
    temporary,
};

/// What it is called.
pub(super) const NAME: &str = "litellm";
/// How long it may take to start: it loads a great deal.
const STARTS: Duration = Duration::from_secs(120);
/// How often it is asked meanwhile.
const LOOK: Duration = Duration::from_millis(200);
/// Whoever knows it may ask.
const KEY: &str = "sk-bench";

/// A proxy that runs; it ends when dropped, or when this process does.
#[derive(Debug)]
pub(super) struct LiteLlm {
    process: Running,
    at: SocketAddr,
    pub(super) version: Option<String>,
    dir: TempDir,
}

impl LiteLlm {
    /// Starts it before an upstream, and waits until it answers.
    pub(super) async fn start(program: &Path, upstream: SocketAddr) -> anyhow::Result<Self> {
        let dir = temporary(&std::env::temp_dir())?;
        // It takes no port 0. One that was free just now is most likely free still.
        let at = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let config = dir.path().join("config.yaml");
        let text = format!(
            "model_list:\n  - model_name: {MODEL}\n    litellm_params:\n      model: openai/{MODEL}\n      \
             api_base: http://{upstream}/v1\n      api_key: none\n\
             general_settings:\n  master_key: {KEY}\n"
        );
        std::fs::write(&config, text)?;
        let log = dir.path().join("log");
        let mut command = peer::command(program);
        command.arg("--config").arg(&config).args(["--host", "127.0.0.1"]);
        command.args(["--port", &at.port().to_string()]);
        // It asks nobody else what models cost.
        command.env("LITELLM_LOCAL_MODEL_COST_MAP", "True").env("LITELLM_LOG", "ERROR");
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log)?).process_group(0);
        let process = Running::start(&mut command)?;
        let mut proxy = Self { process, at, version: version(program), dir };
        proxy.ready().await?;
        Ok(proxy)
    }

    pub(super) fn target(&self) -> Target {
        Target::new(self.at, KEY, MODEL)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let (target, log) = (self.target(), self.dir.path().join("log"));
        let asked = async || target.open().await?.whole().await;
        self.process.answers(&log, (LOOK, STARTS), asked).await
    }
}

/// Which one it is: the last word of what it says of that.
fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.to_lowercase().contains("version"))?;
    Some(line.split_whitespace().last()?.to_owned())
}
