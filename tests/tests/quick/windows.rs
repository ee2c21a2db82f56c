// SPDX-License-Identifier: PostgreSQL
//! The log's promise, against random interleavings on real sessions: what a cursor reads is what was committed, each event
//! once, a key's events in the order of the commits; while segments turn over, dumps are made, and cursors are rewound. `DTM_SCHEDULES` sets how many
//! schedules run, `DTM_SEED` the first seed.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use dtm_core::page::Page;
use dtm_tests::cluster::Cluster;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::reading::pending;
use crate::schedule::{INSIDE, Published, Writers};

const SCHEDULES_IN_CI: u64 = 300;
const NAIVE_SCHEDULES: u64 = 60;
const STEPS: usize = 70;
const LAST_SEQ: &str = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.event_seq";
const RELAY: &str = "'00000000-0000-0000-0000-0000000000aa'::uuid";

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

/// A reader takes one step at a time, so that writers get between any two of them.
trait Reader {
    async fn step(&mut self, random: &mut StdRng);
    /// Reads to the end and answers everything that was read under a saved cursor.
    async fn finish(self) -> Vec<i64>;
    /// What has been read under a saved cursor by now.
    fn saved(&self) -> Vec<i64>;
}

/// Reads as the relay does: polls, reads pages of a few rows, saves its cursor, and is restarted, also within a window. Now and
/// then it is rewound to where it has begun.
struct CursorReader<'a> {
    client: &'a Client,
    subscription: i64,
    epoch: i64,
    token: i64,
    begun_at: String,
    known: Option<String>,
    position: String,
    target: Option<String>,
    acked: i64,
    unsaved: Vec<i64>,
    saved: Vec<i64>,
    /// The ids that positions are stored under.
    ids: HashMap<String, i64>,
    /// What has a greater number is to be read.
    begun_after: i64,
}

impl<'a> CursorReader<'a> {
    async fn begin(client: &'a Client) -> CursorReader<'a> {
        let subscribe = "SELECT dtm.subscribe('s', 't.*', 'http://127.0.0.1:9/')";
        let subscription: i64 = client.query_one(subscribe, &[]).await.expect("subscribe").get(0);
        let lease =
            format!("SELECT token FROM dtm.relay_assign({RELAY}, 'test', 3600) WHERE subscription = $1");
        let token = client.query_one(&lease, &[&subscription]).await.expect("lease").get(0);
        let now = "SELECT clock_timestamp()::text";
        let mut reader = CursorReader {
            client,
            subscription,
            epoch: 1,
            token,
            begun_at: client.query_one(now, &[]).await.expect("the time").get(0),
            known: None,
            position: String::new(),
            target: None,
            acked: 0,
            unsaved: Vec::new(),
            saved: Vec::new(),
            ids: HashMap::new(),
            begun_after: client.query_one(LAST_SEQ, &[]).await.expect("a number").get(0),
        };
        reader.restart().await;
        reader
    }

    /// Forgets everything that is not saved.
    async fn restart(&mut self) {
        let sql = "SELECT * FROM dtm.relay_cursor($1, 0, $2)";
        let row = self.client.query_one(sql, &[&self.subscription, &self.epoch]).await.expect("cursor");
        self.position = row.get(0);
        self.target = row.get(1);
        self.acked = row.get(2);
        self.known = None;
        self.unsaved.clear();
    }

    /// What the log has still is read again.
    async fn rewind(&mut self) {
        let sql = "SELECT payload FROM dtm.log WHERE published_at >= $1::text::timestamptz";
        let rows = self.client.query(sql, &[&self.begun_at]).await.expect("rows");
        let again: Vec<i64> = rows.iter().map(|row| number(row.get::<_, &[u8]>(0))).collect();
        self.client.execute("SELECT dtm.rewind('s', $1)", &[&self.begun_at]).await.expect("rewind");
        self.epoch += 1;
        self.saved.retain(|n| !again.contains(n));
        self.restart().await;
    }

    async fn poll(&mut self) -> bool {
        let head = self.client.query_one("SELECT dtm.relay_poll($1)", &[&self.known]).await.expect("poll");
        let head: Option<String> = head.get(0);
        let moved = head.is_some();
        self.known = head.or(self.known.take());
        moved
    }

    /// One page of the window; opens a window to the head that is known if there is none.
    async fn page(&mut self, rows: i32) {
        if self.target.is_none() {
            self.target = self.known.clone().filter(|head| *head != self.position);
            self.acked = 0;
        }
        let Some(target) = self.target.clone() else { return };
        // Rewound to a time, it passes over what was published before.
        let since = Some(&self.begun_at).filter(|_| self.epoch > 1);
        let sql = "SELECT dtm.relay_page($1, $2, $3, ARRAY['t.*'], $5::text::timestamptz, $4, 100000)";
        let page: [&(dyn ToSql + Sync); 5] = [&self.position, &target, &self.acked, &rows, &since];
        let row = self.client.query_one(sql, &page).await.expect("page");
        let page = Page::decode(Bytes::from(row.get::<_, Vec<u8>>(0))).expect("a page");
        self.unsaved
            .extend(page.events.iter().map(|event| number(event.payload.as_ref().expect("a payload"))));
        self.acked = page.scanned;
        if page.done {
            self.position = target;
            self.target = None;
            self.acked = 0;
        }
    }

    /// The lag is that of the first event that can be read and was not. (After a rewind, what is passed over counts, too.)
    async fn check_lag(&self) {
        if self.epoch > 1 {
            return;
        }
        let sql = "SELECT (SELECT p.next_seq FROM dtm.progress p WHERE p.subscription = $1), min(seq) FROM dtm.log \
                   WHERE seq > $2 AND NOT convert_from(payload, 'UTF8')::bigint = ANY ($3)";
        let row = self
            .client
            .query_one(sql, &[&self.subscription, &self.begun_after, &self.saved])
            .await
            .expect("lag");
        assert_eq!(row.get::<_, Option<i64>>(0), row.get::<_, Option<i64>>(1), "the first that was not read");
    }

    async fn save(&mut self) {
        while !self.store().await {}
        self.saved.append(&mut self.unsaved);
    }

    /// False: a position that had been stored is gone, and has to be told anew.
    async fn store(&mut self) -> bool {
        let mut new: Vec<String> = Vec::new();
        let mut refer = |position: &String| {
            self.ids.get(position).copied().unwrap_or_else(|| {
                new.push(position.clone());
                -(new.len() as i64)
            })
        };
        let position = refer(&self.position);
        let target = self.target.as_ref().map(&mut refer);
        let sql = "SELECT fenced, stale, position_ids FROM dtm.relay_store($1, ARRAY[$2::bigint], ARRAY[0], ARRAY[$7::bigint], \
                   ARRAY[$3::bigint], ARRAY[$4::bigint], ARRAY[$5::bigint], ARRAY[$6::bigint], ARRAY[NULL], '{}', '{}', '{}', \
                   '{}', '{}', '{}')";
        let moved: [&(dyn ToSql + Sync); 7] =
            [&new, &self.subscription, &self.token, &position, &target, &self.acked, &self.epoch];
        let row = self.client.query_one(sql, &moved).await.expect("move");
        assert!(row.get::<_, Vec<i32>>(0).is_empty(), "fenced");
        self.ids.extend(new.into_iter().zip(row.get::<_, Vec<i64>>(2)));
        let is_stored = row.get::<_, Vec<i32>>(1).is_empty();
        if !is_stored {
            self.ids.clear();
        }
        is_stored
    }
}

impl Reader for CursorReader<'_> {
    async fn step(&mut self, random: &mut StdRng) {
        self.check_lag().await;
        match random.random_range(0..30) {
            0..=8 => drop(self.poll().await),
            9..=20 => self.page(random.random_range(1..=5)).await,
            21..=26 => self.save().await,
            27 | 28 => self.restart().await,
            _ => self.rewind().await,
        }
    }

    async fn finish(mut self) -> Vec<i64> {
        loop {
            let moved = self.poll().await;
            self.page(1_000).await;
            if !moved && self.target.is_none() && self.known.as_ref() == Some(&self.position) {
                break;
            }
        }
        self.save().await;
        self.client.execute("SELECT dtm.unsubscribe('s')", &[]).await.expect("unsubscribe");
        self.saved
    }

    fn saved(&self) -> Vec<i64> {
        self.saved.clone()
    }
}

/// Reads in the way that looks right: the highest sequence number and the snapshot; what the snapshot lists as running may
/// lie below that number, everything else lies above it.
struct NaiveReader<'a> {
    client: &'a Client,
    position: (i64, String),
    read: Vec<i64>,
}

const NAIVE_POSITION: &str =
    "SELECT CASE WHEN is_called THEN last_value ELSE 0 END, pg_current_snapshot()::text FROM dtm.event_seq";

impl<'a> NaiveReader<'a> {
    async fn begin(client: &'a Client) -> NaiveReader<'a> {
        let row = client.query_one(NAIVE_POSITION, &[]).await.expect("position");
        NaiveReader { client, position: (row.get(0), row.get(1)), read: Vec::new() }
    }

    async fn read(&mut self) {
        let row = self.client.query_one(NAIVE_POSITION, &[]).await.expect("position");
        let next: (i64, String) = (row.get(0), row.get(1));
        let sql = "SELECT payload FROM dtm.log \
                   WHERE (seq > $1 OR xid IN (SELECT pg_snapshot_xip($2::text::pg_snapshot))) \
                   AND NOT pg_visible_in_snapshot(xid, $2::text::pg_snapshot) \
                   AND pg_visible_in_snapshot(xid, $3::text::pg_snapshot) ORDER BY seq";
        let rows =
            self.client.query(sql, &[&self.position.0, &self.position.1, &next.1]).await.expect("rows");
        self.read.extend(rows.iter().map(|row| number(row.get::<_, &[u8]>(0))));
        self.position = next;
    }
}

impl Reader for NaiveReader<'_> {
    async fn step(&mut self, _random: &mut StdRng) {
        self.read().await;
    }

    async fn finish(mut self) -> Vec<i64> {
        self.read().await;
        self.read
    }

    fn saved(&self) -> Vec<i64> {
        self.read.clone()
    }
}

fn number(payload: &[u8]) -> i64 {
    str::from_utf8(payload).expect("UTF-8").parse().expect("a number")
}

struct Sessions {
    _cluster: Cluster,
    writers: Vec<Client>,
    reader: Client,
    switch: Client,
    dump: Client,
}

async fn sessions() -> Sessions {
    let cluster = Cluster::builder().config("max_prepared_transactions", "50").start().await;
    cluster.create_database("windows").await;
    let reader = cluster.connect("windows").await;
    let aggregates =
        "CREATE TABLE aggregate (id int PRIMARY KEY); INSERT INTO aggregate SELECT generate_series(0, 9)";
    reader.batch_execute(aggregates).await.expect("aggregates");
    let mut writers = Vec::new();
    for _ in 0..Writers::sessions() {
        writers.push(cluster.connect("windows").await);
    }
    let (switch, dump) = (cluster.connect("windows").await, cluster.connect("windows").await);
    // Writers that hold a segment are not waited for.
    let impatient = "SELECT dtm.library_protocol(); SET dtm.retention = 0; ALTER FUNCTION dtm.rotate_log SET lock_timeout = '1ms'; \
                     ALTER FUNCTION dtm.rotate_control SET lock_timeout = '1ms'";
    switch.batch_execute(impatient).await.expect("settings");
    Sessions { _cluster: cluster, writers, reader, switch, dump }
}

/// How segments change in a schedule.
enum Turning<'a> {
    /// Others are written, and none is emptied.
    Switch,
    /// As relays do it. Counts what was done.
    Rotate(&'a mut BTreeMap<String, usize>),
}

impl Turning<'_> {
    async fn turn(&mut self, client: &Client, random: &mut StdRng) {
        let Turning::Rotate(steps) = self else { return switch_segments(client, random).await };
        for (of, sql) in [("log", "SELECT dtm.rotate_log()"), ("control", "SELECT dtm.rotate_control(0)")] {
            for _ in 0..random.random_range(0..4) {
                let step: Option<String> = client.query_one(sql, &[]).await.expect("a step").get(0);
                *steps.entry(format!("{of} {}", step.unwrap_or_default())).or_default() += 1;
            }
        }
    }
}

/// A dump: its snapshot is taken, and tables are looked at a good deal later.
struct Dump {
    /// What was committed and not read when it began.
    expected: Vec<i64>,
    steps_left: usize,
}

impl Dump {
    async fn begin(client: &Client, committed: &[Published], saved: &[i64], steps_left: usize) -> Dump {
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
        client.batch_execute(begin).await.expect("a snapshot");
        let is_unread = |n: &i64| !saved.contains(n);
        Dump { expected: committed.iter().map(|event| event.n).filter(is_unread).collect(), steps_left }
    }

    /// Whoever restores it can go on where it stood.
    async fn check(self, client: &Client, seed: u64) {
        let cursor =
            "SELECT count(*) FROM dtm.subscription s, dtm.relay_cursor(s.id, 0, s.epoch) WHERE s.name = 's'";
        let cursors: i64 = client.query_one(cursor, &[]).await.expect("cursors").get(0);
        assert_eq!(cursors, 1, "DTM_SEED={seed} DTM_SCHEDULES=1: the dump has no cursor");
        let rows = client.query("SELECT payload FROM dtm.log", &[]).await.expect("rows");
        let dumped: Vec<i64> = rows.iter().map(|row| number(row.get::<_, &[u8]>(0))).collect();
        let missing: Vec<&i64> = self.expected.iter().filter(|n| !dumped.contains(n)).collect();
        assert!(missing.is_empty(), "DTM_SEED={seed} DTM_SCHEDULES=1: not in the dump: {missing:?}");
        client.batch_execute("COMMIT").await.expect("COMMIT");
    }
}

/// Has the log and the control tables written in other segments from now on.
async fn switch_segments(client: &Client, random: &mut StdRng) {
    let (log, control) = (random.random_range(1..=3), random.random_range(1..=2));
    let sql = format!(
        "UPDATE dtm.installation SET log_segment = {log}, control_segment = {control}; SELECT dtm.installation_changed()"
    );
    client.batch_execute(&sql).await.expect("a switch");
}

/// What one schedule has brought about.
struct Outcome {
    /// In the order of the commits.
    committed: Vec<Published>,
    read: Vec<i64>,
    /// What a subscription made within the schedule should get, and gets.
    inside: Option<(Vec<i64>, Vec<i64>)>,
}

async fn read_inside(sessions: &Sessions, committed: &[Published], behind: usize) -> (Vec<i64>, Vec<i64>) {
    let found = pending(&sessions.reader, INSIDE).await;
    sessions.reader.execute("SELECT dtm.unsubscribe($1)", &[&INSIDE]).await.expect("unsubscribe");
    let expected = committed[behind..].iter().map(|event| event.n).collect();
    (expected, found.iter().map(|payload| number(payload.as_bytes())).collect())
}

/// Runs one schedule.
async fn run(sessions: &Sessions, mut reader: impl Reader, seed: u64, mut turning: Turning<'_>) -> Outcome {
    let mut random = StdRng::seed_from_u64(!seed);
    let mut writers = Writers::new(&sessions.writers, seed);
    let mut dump: Option<Dump> = None;
    for _ in 0..STEPS {
        match random.random_range(0..40) {
            0..=3 => turning.turn(&sessions.switch, &mut random).await,
            4 if dump.is_none() && matches!(turning, Turning::Rotate(_)) => {
                let (committed, saved) = (&writers.truth.committed, reader.saved());
                dump = Some(Dump::begin(&sessions.dump, committed, &saved, random.random_range(1..30)).await);
            }
            5..=26 => writers.step().await,
            _ => reader.step(&mut random).await,
        }
        if let Some(dump) = &mut dump {
            dump.steps_left = dump.steps_left.saturating_sub(1);
        }
        if let Some(ended) = dump.take_if(|dump| dump.steps_left == 0) {
            ended.check(&sessions.dump, seed).await;
        }
    }
    writers.end_all().await;
    turning.turn(&sessions.switch, &mut random).await;
    if let Some(dump) = dump {
        dump.check(&sessions.dump, seed).await;
    }
    let committed = writers.truth.committed;
    let read = reader.finish().await;
    let inside = match writers.truth.subscribed_behind {
        Some(behind) => Some(read_inside(sessions, &committed, behind).await),
        None => None,
    };
    Outcome { committed, read, inside }
}

fn sorted(mut numbers: Vec<i64>) -> Vec<i64> {
    numbers.sort_unstable();
    numbers
}

fn of_key(committed: &[Published], read: &[i64], key: &str) -> (Vec<i64>, Vec<i64>) {
    let in_key = |n: &i64| committed.iter().any(|event| event.n == *n && event.key.as_deref() == Some(key));
    let expected = committed.iter().filter(|event| event.key.as_deref() == Some(key)).map(|event| event.n);
    (expected.collect(), read.iter().copied().filter(in_key).collect())
}

#[tokio::test]
async fn every_committed_event_is_read_exactly_once_and_a_key_in_commit_order() {
    let sessions = sessions().await;
    let first = setting("DTM_SEED", rand::random::<u32>().into());
    let schedules = setting("DTM_SCHEDULES", SCHEDULES_IN_CI);
    println!("{schedules} schedules from seed {first}");
    let (mut events, mut subscribed, mut steps) = (0, 0, BTreeMap::new());
    for seed in first..first + schedules {
        let reader = CursorReader::begin(&sessions.reader).await;
        let Outcome { committed, read, inside } =
            run(&sessions, reader, seed, Turning::Rotate(&mut steps)).await;
        let numbers = committed.iter().map(|event| event.n).collect();
        assert_eq!(
            sorted(numbers),
            sorted(read.clone()),
            "DTM_SEED={seed} DTM_SCHEDULES=1: lost, repeated or invented"
        );
        for key in committed.iter().filter_map(|event| event.key.as_deref()) {
            let (expected, found) = of_key(&committed, &read, key);
            assert_eq!(expected, found, "DTM_SEED={seed} DTM_SCHEDULES=1: order of key {key}");
        }
        if let Some((expected, found)) = inside {
            assert_eq!(sorted(expected), sorted(found), "DTM_SEED={seed} DTM_SCHEDULES=1: subscribed inside");
            subscribed += 1;
        }
        events += committed.len();
    }
    println!("{steps:?}");
    println!("{events} events, each read once; {subscribed} subscriptions made within a schedule");
    assert!(events as u64 > schedules, "the schedules hardly committed anything");
    if schedules >= 100 {
        assert!(subscribed > 10, "the schedules hardly subscribed");
        for step in ["log rotated", "log retired", "log emptied", "control rotated", "control emptied"] {
            assert!(steps.get(step).is_some_and(|times| *times > 10), "{step} is hardly among {steps:?}");
        }
    }
}

#[tokio::test]
async fn the_naive_position_loses_events_in_the_same_schedules() {
    let sessions = sessions().await;
    let mut losses = 0;
    for seed in 0..NAIVE_SCHEDULES {
        let reader = NaiveReader::begin(&sessions.reader).await;
        let Outcome { committed, read, .. } = run(&sessions, reader, seed, Turning::Switch).await;
        losses += u64::from(committed.iter().any(|event| !read.contains(&event.n)));
    }
    println!("the naive position lost events in {losses} of {NAIVE_SCHEDULES} schedules");
    assert!(losses * 2 >= NAIVE_SCHEDULES, "these schedules hardly tell a wrong position from a right one");
}
