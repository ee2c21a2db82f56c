// SPDX-License-Identifier: PostgreSQL
//! The network between a program and a server, where it can be cut: nothing comes through, and nobody is told.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// A port that leads to a server. Dropping it closes all connections.
pub struct Proxy {
    port: u16,
    flows: watch::Sender<bool>,
    server: JoinHandle<()>,
}

impl Proxy {
    /// Leads to a port of this machine.
    pub async fn start(to: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let (flows, flowing) = watch::channel(true);
        let server = tokio::spawn(serve(listener, to, flowing));
        Proxy { port, flows, server }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on nothing comes through, in neither direction. Connections stay open.
    pub fn cut(&self) {
        self.flows.send_replace(false);
    }

    /// Everything comes through again, and what was held up too.
    pub fn mend(&self) {
        self.flows.send_replace(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(listener: TcpListener, to: u16, flowing: watch::Receiver<bool>) {
    // Connections end with this task, since the set is dropped with it.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(connect(client, to, flowing.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connect(client: TcpStream, to: u16, mut flowing: watch::Receiver<bool>) {
    if flowing.wait_for(|flows| *flows).await.is_err() {
        return;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
    for stream in [&client, &server] {
        stream.set_nodelay(true).ok();
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::join!(pass(from_client, to_server, flowing.clone()), pass(from_server, to_client, flowing));
}

/// Passes on what comes, its end too.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut flowing: watch::Receiver<bool>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).await.unwrap_or(0);
        if flowing.wait_for(|flows| *flows).await.is_err() {
            return;
        }
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            to.shutdown().await.ok();
            return;
        }
    }
}
