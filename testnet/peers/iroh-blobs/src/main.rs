//! One side of a transfer by iroh-blobs, on loopback and without relays, from one file store to
//! another: `serve STORE FILE` imports the file and says on standard output where it can be had;
//! `fetch STORE ID ADDRESS HASH` fetches it, and says how long that took. Both then wait for the end
//! of standard input, so that whoever started them can look at them.
//!
//! The time runs from the dial to the end of the fetch, as its store gives it, and on until the file is
//! synced: iroh-blobs does not see to that itself, and ours does.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};
use iroh::endpoint::presets;
use iroh::protocol::Router;
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode};
use iroh_blobs::store::fs::FsStore;
use iroh_blobs::{BlobsProtocol, Hash};
use tokio::io::AsyncReadExt as _;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve", store, file] => serve(store, file).await,
        ["fetch", store, id, address, hash] => fetch(store, id, address, hash).await,
        _ => bail!("usage: iroh-blobs-peer serve STORE FILE | fetch STORE ID ADDRESS HASH"),
    }
}

async fn endpoint() -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::builder(presets::Minimal)
        .relay_mode(RelayMode::Disabled)
        .clear_ip_transports()
        .bind_addr("127.0.0.1:0")?
        .bind()
        .await?;
    Ok(endpoint)
}

async fn serve(store: &str, file: &str) -> anyhow::Result<()> {
    let store = FsStore::load(store).await?;
    let tag = store.blobs().add_path(std::path::absolute(Path::new(file))?).await?;
    let endpoint = endpoint().await?;
    let id = endpoint.id();
    let address = endpoint.bound_sockets().into_iter().next().context("no socket")?;
    let blobs = BlobsProtocol::new(&store, None);
    let router = Router::builder(endpoint).accept(iroh_blobs::ALPN, blobs).spawn();
    let said = serde_json::json!({
        "id": id.to_string(), "address": address, "hash": tag.hash.to_string(),
    });
    println!("{said}");
    wait().await;
    router.shutdown().await?;
    Ok(())
}

async fn fetch(dir: &str, id: &str, address: &str, hash: &str) -> anyhow::Result<()> {
    let store = FsStore::load(dir).await?;
    let endpoint = endpoint().await?;
    let id: EndpointId = id.parse()?;
    let address: SocketAddr = address.parse()?;
    let hash: Hash = hash.parse()?;
    let begun = Instant::now();
    let holder = EndpointAddr::new(id).with_ip_addr(address);
    let connection = endpoint.connect(holder, iroh_blobs::ALPN).await?;
    let stats = store.remote().fetch(connection, hash).complete().await?;
    for entry in std::fs::read_dir(Path::new(dir).join("data"))? {
        std::fs::File::open(entry?.path())?.sync_all()?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let said = serde_json::json!({ "seconds": seconds, "bytes": stats.payload_bytes_read });
    println!("{said}");
    wait().await;
    store.shutdown().await?;
    endpoint.close().await;
    Ok(())
}

/// Until whoever started this process lets go of it.
async fn wait() {
    let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
}
