// SPDX-License-Identifier: PostgreSQL
//! Who used the processors.

use std::collections::HashMap;
use std::time::Instant;

use crate::cluster::Cluster;

/// Linux counts in hundredths of a second, wherever it runs.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time of the server's processes, of a relay, of a sink and of this process, since it was begun.
pub struct Watch {
    postmaster: u32,
    others: [u32; 3],
    server: HashMap<u32, u64>,
    before: [u64; 3],
    begun: Instant,
}

/// Processors used on average: 1.0 is one of them all the time.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    /// PostgreSQL's processes.
    pub server: f64,
    /// The relay.
    pub relay: f64,
    /// The process that receives.
    pub sink: f64,
    /// This process: the clients.
    pub bench: f64,
}

impl Watch {
    /// Begins to count.
    pub fn begin(cluster: &Cluster, relay: u32, sink: u32) -> Watch {
        let postmaster = cluster.pid();
        let others = [relay, sink, std::process::id()];
        let (server, before) = (server_ticks(postmaster), others.map(ticks));
        Watch { postmaster, others, server, before, begun: Instant::now() }
    }

    /// Ends counting. Processes of the server that have ended meanwhile are not counted.
    pub fn end(self) -> Shares {
        let seconds = self.begun.elapsed().as_secs_f64() * TICKS_PER_SECOND;
        let server: u64 = server_ticks(self.postmaster)
            .iter()
            .map(|(pid, now)| now.saturating_sub(self.server.get(pid).copied().unwrap_or(0)))
            .sum();
        let now = self.others.map(ticks);
        let share = |at: usize| now[at].saturating_sub(self.before[at]) as f64 / seconds;
        Shares { server: server as f64 / seconds, relay: share(0), sink: share(1), bench: share(2) }
    }
}

fn server_ticks(postmaster: u32) -> HashMap<u32, u64> {
    let path = format!("/proc/{postmaster}/task/{postmaster}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.chain([postmaster]).map(|pid: u32| (pid, ticks(pid))).collect()
}

/// Processor time of one process in seconds; 0 if it is gone.
pub fn seconds(pid: u32) -> f64 {
    ticks(pid) as f64 / TICKS_PER_SECOND
}

/// Processor time of one process; 0 if it is gone.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].iter().filter_map(|&at| fields.get(at)?.parse::<u64>().ok()).sum()
}
