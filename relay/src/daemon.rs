// SPDX-License-Identifier: PostgreSQL
//! `dtm-relay run`: all databases side by side, until a signal says to stop.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use uuid::Uuid;

use crate::config::Config;
use crate::database::{self, Stopped};
use crate::pipeline::budget::Budget;
use crate::server::serve::Server;
use crate::session::Shared;

/// What a shutdown needs beyond draining, to store cursors and give up leases.
const FAREWELL: Duration = Duration::from_secs(5);

/// Delivers until SIGTERM or SIGINT. Fails if then something that was delivered could not be stored as such.
pub async fn run(config: Config) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut signals =
        Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? };
    let names: Vec<String> = config.databases.iter().map(|database| database.name.clone()).collect();
    info!(
        version = env!("CARGO_PKG_VERSION"),
        relay = config.name,
        environment = config.environment,
        databases = names.join(", "),
        "starting"
    );
    let farewell = config.shutdown + FAREWELL;
    let budget = Budget::new(config.buffer_bytes);
    let outlets = config.outlets()?;
    let shared = Arc::new(Shared { relay: Uuid::new_v4(), outlets, budget, config });
    let stop = CancellationToken::new();
    let server = match &shared.config.dtm_server {
        Some(settings) => Some(Server::bind(settings, &shared.config, stop.clone()).await?),
        None => None,
    };
    let mut servers = JoinSet::new();
    server.map(|server| servers.spawn(server.run()));
    let mut databases = JoinSet::new();
    for database in &shared.config.databases {
        databases.spawn(database::supervise(database.clone(), shared.clone(), stop.clone()));
    }
    let received = tokio::select! {
        received = signals.next() => received,
        Some(ended) = databases.join_next() => {
            error!("a database's task ended by itself: {ended:?}");
            return Ok(ExitCode::FAILURE);
        }
    };
    info!(signal = received.name, "stopping: what is in flight is waited for");
    stop.cancel();
    let drained = async {
        while servers.join_next().await.is_some() {}
        let mut stored = true;
        while let Some(ended) = databases.join_next().await {
            stored &= ended.is_ok_and(|stopped| stopped == Stopped::Stored);
        }
        stored
    };
    let stored = tokio::select! {
        stored = drained => stored,
        () = tokio::time::sleep(farewell) => {
            error!("not everything could be stored in time");
            false
        }
        second = signals.next() => {
            info!(signal = second.name, "stopping at once");
            return Ok(ExitCode::from(128 + second.number));
        }
    };
    info!("stopped");
    Ok(if stored { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

struct Received {
    name: &'static str,
    number: u8,
}

impl Signals {
    async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.terminate.recv() => Received { name: "SIGTERM", number: 15 },
            _ = self.interrupt.recv() => Received { name: "SIGINT", number: 2 },
        }
    }
}
