// SPDX-License-Identifier: PostgreSQL
//! Transfers between two databases, whose calls are repeated, late, called off before they come, rolled back and killed: in the
//! end each transfer is there on both sides or on none, and no money is lost or made.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::Signal;
use tokio_postgres::{Client, Error, NoTls};

const TRANSFERS: usize = 120;
const ACCOUNTS: usize = 7;
const SESSIONS: usize = 8;
const BALANCE: i64 = 1_000;
const DEADLINE: Duration = Duration::from_secs(60);

/// One call to a branch.
#[derive(Clone, Debug)]
struct Call {
    database: &'static str,
    gid: String,
    branch: &'static str,
    op: &'static str,
    account: i32,
    /// What an action adds; its compensation takes it away again.
    amount: i64,
    /// It is repeated until it succeeds.
    must: bool,
}

/// How a call ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Commit,
    Rollback,
    Killed,
    /// Its server process is killed by signal 9, and with it the server, which starts again.
    Crash,
}

/// Answers whether the caller is told of success.
async fn serve(client: &Client, call: &Call, level: &str, end: End) -> Result<bool, Error> {
    client.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}")).await?;
    let barrier = "SELECT dtm.barrier('saga', $1, $2, $3)";
    let work = client.query_one(barrier, &[&call.gid, &call.branch, &call.op]).await?.get(0);
    if work {
        let amount = if call.op == "action" { call.amount } else { -call.amount };
        let update = "UPDATE account SET balance = balance + $2 WHERE id = $1";
        client.execute(update, &[&call.account, &amount]).await?;
    }
    match end {
        End::Commit => client.batch_execute("COMMIT").await.map(|()| true),
        End::Rollback => client.batch_execute("ROLLBACK").await.map(|()| false),
        End::Killed => {
            client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await.map(|()| false)
        }
        End::Crash => {
            let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
            process::signal(pid.unsigned_abs(), Signal::KILL);
            client.batch_execute("SELECT pg_sleep(60)").await.map(|()| false)
        }
    }
}

/// A server that has crashed lets nobody in for a moment.
async fn connect(cluster: &Cluster, database: &str) -> Client {
    let connected = process::eventually(DEADLINE, async || {
        let (client, connection) = tokio_postgres::connect(&cluster.url(database), NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    });
    connected.await.expect("a connection")
}

/// A session of services, which takes calls from the queue until none is left.
async fn session(cluster: Arc<Cluster>, queue: Arc<Mutex<Vec<Call>>>, mut random: StdRng) {
    let mut clients: HashMap<&str, Client> = HashMap::new();
    loop {
        let Some(call) = queue.lock().expect("the queue").pop() else { return };
        if clients.get(call.database).is_none_or(Client::is_closed) {
            clients.insert(call.database, connect(&cluster, call.database).await);
        }
        let client = &clients[call.database];
        let level = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"][random.random_range(0..3)];
        let end = match random.random_range(0..200) {
            0 => End::Crash,
            1..20 => End::Killed,
            20..60 => End::Rollback,
            _ => End::Commit,
        };
        let answer = serve(client, &call, level, end).await;
        let is_success = matches!(answer, Ok(true));
        if let Err(error) = answer {
            let code = error.code().map(|code| code.code().to_owned());
            let expected = code.as_deref().is_none_or(|code| ["40001", "57P01", "57P02"].contains(&code));
            assert!(expected, "{call:?}: {error:?}");
            // One that was killed is replaced.
            let _ = client.batch_execute("ROLLBACK").await;
        }
        if call.must && !is_success {
            queue.lock().expect("the queue").insert(0, call);
        }
    }
}

async fn balances(client: &Client) -> Vec<i64> {
    let rows = client.query("SELECT balance FROM account ORDER BY id", &[]).await.expect("balances");
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_money_is_lost_or_made_whatever_is_repeated_late_called_off_or_killed() {
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = Arc::new(Cluster::builder().start().await);
    let mut expected = HashMap::new();
    for database in ["here", "there"] {
        cluster.create_database(database).await;
        let sql = format!(
            "CREATE TABLE account (id int PRIMARY KEY, balance bigint);
             INSERT INTO account SELECT n, {BALANCE} FROM generate_series(0, {ACCOUNTS} - 1) n"
        );
        cluster.connect(database).await.batch_execute(&sql).await.expect("accounts");
        expected.insert(database, vec![BALANCE; ACCOUNTS]);
    }
    let mut calls = Vec::new();
    for transfer in 0..TRANSFERS {
        let is_called_off = random.random_bool(0.5);
        let amount = random.random_range(1..100);
        for (database, branch, sign) in [("here", "01", -1), ("there", "02", 1)] {
            let account = random.random_range(0..ACCOUNTS);
            let call = Call {
                database,
                gid: format!("transfer-{transfer}"),
                branch,
                op: "action",
                account: account as i32,
                amount: sign * amount,
                must: !is_called_off,
            };
            calls.extend(vec![call.clone(); random.random_range(1..4)]);
            if is_called_off {
                let call = Call { op: "compensate", must: true, ..call };
                calls.extend(vec![call; random.random_range(1..4)]);
            } else {
                expected.get_mut(database).expect("both")[account] += sign * amount;
            }
        }
    }
    calls.shuffle(&mut random);
    let queue = Arc::new(Mutex::new(calls));
    let sessions: Vec<_> = (0..SESSIONS)
        .map(|n| {
            let random = StdRng::seed_from_u64(seed.wrapping_add(n as u64));
            tokio::spawn(session(cluster.clone(), queue.clone(), random))
        })
        .collect();
    for session in sessions {
        session.await.expect("a session");
    }
    let mut sum = 0;
    for database in ["here", "there"] {
        let found = balances(&connect(&cluster, database).await).await;
        assert_eq!(found, expected[database], "{database}");
        sum += found.iter().sum::<i64>();
    }
    assert_eq!(sum, 2 * BALANCE * ACCOUNTS as i64);
}
