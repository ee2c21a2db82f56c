// SPDX-License-Identifier: PostgreSQL
//! What became of events that failed: a relay's reports, as SQL stores them, and what users do about them.

use bytes::Bytes;
use dtm_core::page::Page;
use dtm_tests::cluster::Cluster;
use serde_json::{Value, json};
use tokio_postgres::{Client, Row};

/// A database with one subscription, `s`, of everything, that a relay owns.
struct Shop {
    cluster: Cluster,
    client: Client,
    id: i64,
    token: i64,
}

/// What became of an event: what, its number, attempts, seconds until the next, and what the last attempt saw.
type Settlement<'a> = (&'a str, i64, i32, Option<f64>, Value);

/// What a report was answered: the cursors that were refused, and those to be reported again.
type Answer = (Vec<i32>, Vec<i32>);

const ASSIGN: &str = "SELECT subscription, token, epoch, revision \
     FROM dtm.relay_assign('00000000-0000-0000-0000-0000000000cc', 'test', 60)";

impl Shop {
    async fn open(options: Value) -> Shop {
        let cluster = Cluster::builder().start().await;
        cluster.create_database("shop").await;
        let client = cluster.connect("shop").await;
        let sql = "SELECT dtm.subscribe('s', '>', 'http://127.0.0.1:9/', $1)";
        client.execute(sql, &[&options]).await.expect("subscribe");
        let row = client.query_one(ASSIGN, &[]).await.expect("its unit");
        Shop { cluster, id: row.get(0), token: row.get(1), client }
    }

    async fn publish(&self, topic: &str, key: Option<&str>) -> i64 {
        let sql = "SELECT dtm.publish($1, jsonb_build_object('of', $1::text), $2)";
        self.client.execute(sql, &[&topic, &key]).await.expect("publish");
        self.number("SELECT max(seq) FROM dtm.log").await
    }

    async fn number(&self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).await.expect(sql).get(0)
    }

    async fn numbers(&self, sql: &str) -> Vec<i64> {
        self.client.query(sql, &[]).await.expect(sql).iter().map(|row| row.get(0)).collect()
    }

    async fn report(&self, epoch: i64, acked: i64, settlements: &[Settlement<'_>]) -> Answer {
        report(&self.client, (self.id, epoch, self.token), acked, settlements).await.expect("a report")
    }

    /// Makes dead letters of events; each was tried once.
    async fn bury(&self, seqs: &[i64]) {
        let all: Vec<Settlement<'_>> = seqs.iter().map(|seq| ("bury", *seq, 1, None, attempt(500))).collect();
        assert_eq!(self.report(1, 0, &all).await, (vec![], vec![]));
    }

    async fn acked(&self) -> i64 {
        self.number("SELECT acked FROM dtm.cursor_log ORDER BY id DESC LIMIT 1").await
    }

    async fn revision(&self) -> i64 {
        self.number("SELECT revision FROM dtm.subscription").await
    }

    async fn parked(&self) -> Vec<Row> {
        let sql = "SELECT seq, key, bytes, attempts, next_in, blocks FROM dtm.relay_parked($1, 0, 1)";
        self.client.query(sql, &[&self.id]).await.expect("what is parked")
    }

    /// Number, whether it is due, and whether it blocks its key.
    async fn waiting(&self) -> Vec<(i64, Option<bool>, bool)> {
        let due = |row: &Row| row.get::<_, Option<f64>>(4).map(|next_in| next_in == 0.0);
        self.parked().await.iter().map(|row| (row.get(0), due(row), row.get(5))).collect()
    }
}

fn attempt(status: i32) -> Value {
    json!([{"at": "2026-01-31T12:00:00Z", "status": status, "error": format!("status {status}"), "body": "no"}])
}

async fn report(
    client: &Client,
    (subscription, epoch, token): (i64, i64, i64),
    acked: i64,
    settlements: &[Settlement<'_>],
) -> Result<Answer, tokio_postgres::Error> {
    let of = vec![1_i32; settlements.len()];
    let seqs: Vec<i64> = settlements.iter().map(|s| s.1).collect();
    let what: Vec<&str> = settlements.iter().map(|s| s.0).collect();
    let attempts: Vec<i32> = settlements.iter().map(|s| s.2).collect();
    let next_in: Vec<Option<f64>> = settlements.iter().map(|s| s.3).collect();
    let histories: Vec<&Value> = settlements.iter().map(|s| &s.4).collect();
    let sql = "SELECT fenced, busy FROM dtm.relay_store(ARRAY['1|9|9|9:9:|'], ARRAY[$1::bigint], ARRAY[0], ARRAY[$2::bigint], \
               ARRAY[$3::bigint], ARRAY[-1], ARRAY[NULL::bigint], ARRAY[$4::bigint], ARRAY[NULL::text], $5, $6, $7, $8, $9, $10)";
    let row = client
        .query_one(
            sql,
            &[&subscription, &epoch, &token, &acked, &of, &seqs, &what, &attempts, &next_in, &histories],
        )
        .await?;
    Ok((row.get(0), row.get(1)))
}

#[tokio::test]
async fn each_kind_of_settlement_is_stored_with_the_cursor() {
    let shop = Shop::open(json!({})).await;
    let mut seqs = Vec::new();
    for key in [Some("a"), Some("a"), Some("b"), None] {
        seqs.push(shop.publish("t", key).await);
    }
    let [first, second, third, fourth] = seqs[..] else { unreachable!() };
    let answer = shop
        .report(
            1,
            fourth,
            &[
                ("park", second, 0, None, json!([])),
                ("park", first, 1, Some(30.0), attempt(500)),
                ("bury", third, 3, None, attempt(422)),
                ("park", fourth, 1, Some(0.0), attempt(500)),
            ],
        )
        .await;
    assert_eq!((answer, shop.acked().await), ((vec![], vec![]), fourth));
    let parked = shop.parked().await;
    let found: Vec<(i64, i32)> = parked.iter().map(|row| (row.get(0), row.get(3))).collect();
    assert_eq!(found, [(second, 0), (first, 1), (fourth, 1)], "in the order in which they were parked");
    let next: Vec<Option<f64>> = parked.iter().map(|row| row.get(4)).collect();
    assert!(next[0] == Some(0.0) && next[1].is_some_and(|t| (25.0..=30.0).contains(&t)), "{next:?}");
    assert_eq!(parked[2].get::<_, Option<&str>>(1), None);
    assert!(parked[0].get::<_, i32>(2) > 10, "its size");

    shop.report(
        1,
        fourth,
        &[
            ("again", first, 2, Some(60.0), attempt(503)),
            ("die", fourth, 25, None, attempt(410)),
            ("done", second, 0, None, json!([])),
        ],
    )
    .await;
    assert_eq!(shop.numbers("SELECT seq FROM dtm.retries").await, [first]);
    let row = shop
        .client
        .query_one("SELECT last_status, last_error, history, attempts, waits_behind FROM dtm.retries", &[]);
    let row = row.await.expect("a retry");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, &str>(1)), (503, "status 503"));
    assert_eq!(row.get::<_, Value>(2).as_array().map(Vec::len), Some(2), "each attempt is in its history");
    assert_eq!((row.get::<_, i32>(3), row.get::<_, bool>(4)), (2, false));
    let sql = "SELECT seq, attempts, last_status, jsonb_array_length(history), name, payload ->> 'of', topic \
               FROM dtm.dead_letters ORDER BY seq";
    let rows = shop.client.query(sql, &[]).await.expect("dead letters");
    let found: Vec<(i64, i32, i32, i32)> =
        rows.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3))).collect();
    assert_eq!(found, [(third, 3, 422, 1), (fourth, 25, 410, 2)]);
    assert_eq!(
        (rows[0].get::<_, &str>(4), rows[0].get::<_, &str>(5), rows[0].get::<_, &str>(6)),
        ("s", "t", "t")
    );
    let row =
        shop.client.query_one("SELECT retrying, dead FROM dtm.subscriptions", &[]).await.expect("the view");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1, 2));
    // What is gone needs nothing more.
    let gone = [
        ("again", second, 2, Some(1.0), json!([])),
        ("die", second, 2, None, json!([])),
        ("done", second, 0, None, json!([])),
    ];
    assert_eq!(shop.report(1, fourth, &gone).await, (vec![], vec![]));
    assert_eq!(shop.number("SELECT count(*) FROM dtm.retry").await, 1);
}

#[tokio::test]
async fn a_parked_event_is_what_was_published() {
    let shop = Shop::open(json!({})).await;
    let sql = "SELECT dtm.publish_bytes('bytes', '\\x00ff', 'application/x', 'Zürich', '{\"a\": \"b\"}'), dtm.publish('json', '{\"a\": 1}')";
    shop.client.execute(sql, &[]).await.expect("publish");
    let seqs = shop.numbers("SELECT seq FROM dtm.log ORDER BY seq").await;
    let all: Vec<Settlement<'_>> =
        seqs.iter().rev().map(|seq| ("park", *seq, 1, Some(0.0), json!([]))).collect();
    shop.report(1, 0, &all).await;
    let sql = "SELECT dtm.relay_parked_events($1, $2), dtm.relay_page((SELECT \"position\" FROM dtm.relay_cursor($1, 0, 1)), \
               dtm.relay_poll(NULL), 0, ARRAY['>'], NULL, 100, 100000)";
    shop.client.execute("DELETE FROM dtm.cursor_log_1 WHERE token > 0", &[]).await.expect("the first cursor");
    let row = shop.client.query_one(sql, &[&shop.id, &seqs]).await.expect("pages");
    let parked = Page::decode(Bytes::from(row.get::<_, Vec<u8>>(0))).expect("a page");
    let log = Page::decode(Bytes::from(row.get::<_, Vec<u8>>(1))).expect("a page");
    assert_eq!((parked.scanned, parked.done), (0, true));
    let parked: Vec<_> = parked.events.into_iter().rev().collect();
    assert_eq!(parked, log.events, "as the log has them, in the order in which they were parked");
    let sql = "SELECT dtm.relay_parked_events($1, '{999}')";
    let row = shop.client.query_one(sql, &[&shop.id]).await.expect("a page");
    assert!(Page::decode(Bytes::from(row.get::<_, Vec<u8>>(0))).expect("a page").events.is_empty());
}

#[tokio::test]
async fn what_is_fenced_or_busy_changes_nothing_at_all() {
    let shop = Shop::open(json!({})).await;
    let seq = shop.publish("t", Some("k")).await;
    let park = [("park", seq, 1, Some(1.0), json!([]))];
    for (epoch, token) in [(1, shop.token + 1), (0, shop.token)] {
        let answer = report(&shop.client, (shop.id, epoch, token), seq, &park).await.expect("a report");
        assert_eq!(answer, (vec![1], vec![]));
    }
    let other = shop.cluster.connect("shop").await;
    other.batch_execute("BEGIN; SELECT dtm.redrive('s', everything => true)").await.expect("a user at work");
    assert_eq!(shop.report(1, seq, &park).await, (vec![], vec![1]), "busy");
    assert_eq!(shop.number("SELECT count(*) FROM dtm.cursor_log WHERE token > 0").await, 0);
    assert_eq!(shop.number("SELECT count(*) FROM dtm.retry").await, 0);
    assert_eq!(shop.report(1, 0, &[]).await, (vec![], vec![]), "a cursor alone does not mind");
    other.batch_execute("COMMIT").await.expect("COMMIT");
    assert_eq!(shop.report(1, seq, &park).await, (vec![], vec![]));
    assert_eq!((shop.acked().await, shop.number("SELECT count(*) FROM dtm.retry").await), (seq, 1));
}

#[tokio::test]
async fn an_event_that_the_log_does_not_have_holds_up_its_own_cursor_alone() {
    let shop = Shop::open(json!({})).await;
    let seq = shop.publish("t", None).await;
    let sql = "SELECT fenced, busy, broken FROM dtm.relay_store(ARRAY['1|9|9|9:9:|'], ARRAY[$1::bigint, $1], '{0,0}', '{1,1}', \
               ARRAY[$2::bigint, $2], '{-1,-1}', '{-1,-1}', '{5,6}', '{NULL,NULL}', '{1,1,2}', \
               ARRAY[$3::bigint, $3 + 1, $3], '{park,bury,park}', '{1,1,1}', '{1,1,1}', ARRAY[NULL, NULL, NULL]::jsonb[])";
    let row = shop.client.query_one(sql, &[&shop.id, &shop.token, &seq]).await.expect("a report");
    let places = |column: usize| row.get::<_, Vec<i32>>(column);
    assert_eq!((places(0), places(1), places(2)), (vec![], vec![], vec![1]));
    assert_eq!((shop.acked().await, shop.numbers("SELECT seq FROM dtm.retry").await), (6, vec![seq]));
    assert_eq!(shop.number("SELECT count(*) FROM dtm.cursor_log WHERE token > 0").await, 1);
    let unknown = [("forget", seq, 1, None, json!([]))];
    let error =
        report(&shop.client, (shop.id, 1, shop.token), seq, &unknown).await.expect_err("no such report");
    assert_eq!(error.code().map(|code| code.code()), Some("22023"));
}

#[tokio::test]
async fn one_report_of_several_cursors_settles_those_that_move() {
    let shop = Shop::open(json!({})).await;
    let (first, second) = (shop.publish("t", None).await, shop.publish("t", None).await);
    let sql = "SELECT fenced, busy, position_ids FROM dtm.relay_store(ARRAY['1|9|9|9:9:|'], ARRAY[$1::bigint, $1, $1], '{0,0,7}', \
               '{1,0,1}', ARRAY[$2::bigint, $2, $2], '{-1,-1,-1}', '{-1,NULL,NULL}', '{5,5,5}', '{\"{7,9}\",NULL,NULL}', \
               '{1,2,3}', ARRAY[$3::bigint, $4::bigint, $4::bigint], '{park,park,park}', '{1,1,1}', '{1,1,1}', \
               ARRAY[NULL, NULL, NULL]::jsonb[])";
    let row = shop.client.query_one(sql, &[&shop.id, &shop.token, &first, &second]).await.expect("a report");
    assert_eq!((row.get::<_, Vec<i32>>(0), row.get::<_, Vec<i32>>(1)), (vec![2, 3], vec![]));
    let ids: Vec<i64> = row.get(2);
    assert_eq!(shop.numbers("SELECT seq FROM dtm.retry").await, [first]);
    let sql = "SELECT acked, ahead, target FROM dtm.cursor_log ORDER BY id DESC LIMIT 1";
    let row = shop.client.query_one(sql, &[]).await.expect("a cursor");
    assert_eq!(
        (row.get::<_, i64>(0), row.get::<_, Vec<i64>>(1), row.get::<_, i64>(2)),
        (5, vec![7, 9], ids[0])
    );
    let sql = "SELECT ahead, target FROM dtm.relay_resume($1, 0, 1)";
    let row = shop.client.query_one(sql, &[&shop.id]).await.expect("where it goes on");
    assert_eq!((row.get::<_, Vec<i64>>(0), row.get::<_, &str>(1)), (vec![7, 9], "1|9|9|9:9:|"));
}

#[tokio::test]
async fn dead_letters_are_redriven_by_filter_oldest_first_and_keep_their_history() {
    let shop = Shop::open(json!({})).await;
    let mut seqs = Vec::new();
    for topic in ["orders.created", "orders.paid", "users.created", "orders.eu.paid"] {
        seqs.push(shop.publish(topic, Some("k")).await);
    }
    shop.bury(&seqs).await;
    let redrive = |filter: &'static str| {
        let client = &shop.client;
        async move {
            let sql = format!("SELECT dtm.redrive('s', {filter})");
            client.query_one(&sql, &[]).await.expect(filter).get::<_, i64>(0)
        }
    };
    assert_eq!(redrive("ids => '{}'").await, 0);
    assert_eq!(
        (redrive("since => now() + interval '1 h'").await, shop.revision().await),
        (0, 0),
        "nothing: no revision"
    );
    assert_eq!(redrive("topic => 'orders.*', max_rows => 1").await, 1);
    assert_eq!(shop.numbers("SELECT seq FROM dtm.retry").await, seqs[..1], "the oldest");
    assert_eq!(shop.revision().await, 1);
    assert_eq!(redrive("ids => ARRAY(SELECT id FROM dtm.events WHERE topic = 'orders.eu.paid')").await, 1);
    assert_eq!(redrive("topic => 'orders.>', since => '-infinity'").await, 1);
    assert_eq!(redrive("everything => true").await, 1);
    assert_eq!(redrive("everything => true").await, 0);
    assert_eq!(shop.revision().await, 4);
    let waiting = shop.waiting().await;
    let due: Vec<_> = seqs.iter().map(|seq| (*seq, Some(true), false)).collect();
    assert_eq!(waiting, due, "in their old order, due now");
    let sql = "SELECT bool_and(attempts = 0 AND history -> 0 ->> 'status' = '500'), bool_or(waits_behind) FROM dtm.retries";
    let row = shop.client.query_one(sql, &[]).await.expect("retries");
    assert_eq!((row.get::<_, bool>(0), row.get::<_, bool>(1)), (true, true));
    // It fails again: its history goes on.
    shop.report(1, 0, &[("die", seqs[0], 1, None, attempt(404))]).await;
    assert_eq!(shop.number("SELECT jsonb_array_length(history)::bigint FROM dtm.dead_letters").await, 2);
}

#[tokio::test]
async fn dead_letters_are_discarded_by_filter() {
    let shop = Shop::open(json!({})).await;
    let seqs =
        [shop.publish("a", None).await, shop.publish("b", None).await, shop.publish("c", Some("k")).await];
    shop.bury(&seqs).await;
    assert_eq!(shop.number("SELECT dtm.discard('s', topic => 'b')").await, 1);
    assert_eq!(shop.numbers("SELECT seq FROM dtm.dead_letters ORDER BY seq").await, [seqs[0], seqs[2]]);
    assert_eq!(shop.number("SELECT dtm.discard('s', everything => true)").await, 2);
    assert_eq!(
        shop.number("SELECT count(*) FROM dtm.dead_letter").await
            + shop.number("SELECT count(*) FROM dtm.retry").await,
        0
    );
    assert_eq!(shop.revision().await, 2);
}

#[tokio::test]
async fn a_dead_letter_blocks_its_key_if_it_should() {
    let shop = Shop::open(json!({"on_dead": "block"})).await;
    let mut seqs = Vec::new();
    for key in [Some("a"), Some("a"), Some("a"), Some("a"), Some("b"), None] {
        seqs.push(shop.publish("t", key).await);
    }
    shop.report(
        1,
        seqs[5],
        &[
            ("bury", seqs[0], 1, None, json!([])),
            ("park", seqs[1], 1, None, json!([])),
            ("bury", seqs[2], 1, None, json!([])),
            ("park", seqs[3], 0, None, json!([])),
            ("park", seqs[4], 0, None, json!([])),
            ("bury", seqs[5], 1, None, json!([])),
        ],
    )
    .await;
    let [first, second, third, fourth, of_b, _] = seqs[..] else { unreachable!() };
    // Of a key's dead letters the first is enough: what is behind it waits in any case.
    let blocked =
        [(first, None, true), (second, None, false), (fourth, None, false), (of_b, Some(true), false)];
    assert_eq!(shop.waiting().await, blocked, "a dead letter without a key blocks nothing");
    let waiting = "SELECT seq FROM dtm.retries WHERE waits_behind ORDER BY seq";
    assert_eq!(shop.numbers(waiting).await, [second, fourth]);
    let next = "SELECT seq FROM dtm.retry WHERE next_at IS NOT NULL ORDER BY n";
    shop.number(&format!(
        "SELECT dtm.discard('s', ids => ARRAY(SELECT id FROM dtm.dead_letter WHERE seq = {third}))"
    ))
    .await;
    assert!(shop.numbers(next).await.is_empty(), "the first one blocks it still");
    shop.number(&format!(
        "SELECT dtm.discard('s', ids => ARRAY(SELECT id FROM dtm.dead_letter WHERE seq = {first}))"
    ))
    .await;
    assert_eq!(shop.numbers(next).await, [second], "the first of its key goes on");
    assert_eq!(shop.numbers(waiting).await, [fourth]);
    assert_eq!(shop.waiting().await[..2], [(second, Some(true), false), (fourth, None, false)]);
}

#[tokio::test]
async fn what_is_parked_belongs_to_the_shard_that_reads_its_key() {
    let shop = Shop::open(json!({})).await;
    let mut all = Vec::new();
    for n in 0..40 {
        let key = format!("key-{}", n / 2);
        all.push(shop.publish("t", (n % 5 != 0).then_some(&*key)).await);
    }
    let parks: Vec<Settlement<'_>> = all.iter().map(|seq| ("park", *seq, 1, Some(9.0), json!([]))).collect();
    shop.report(1, 0, &parks).await;
    let mut found = Vec::new();
    for shard in 0..3_i32 {
        let sql = "SELECT seq FROM dtm.relay_parked($1, $2, 3)";
        let parked: Vec<i64> = shop
            .client
            .query(sql, &[&shop.id, &shard])
            .await
            .expect("it")
            .iter()
            .map(|row| row.get(0))
            .collect();
        let sql = "SELECT dtm.relay_page(dtm.start_of_era(era), dtm.relay_poll(NULL), 0, ARRAY['>'], NULL, 100, 100000, $1, 3) \
                   FROM dtm.installation";
        let page: Vec<u8> = shop.client.query_one(sql, &[&shard]).await.expect("a page").get(0);
        let page = Page::decode(page.into()).expect("a page");
        assert!(!parked.is_empty());
        assert_eq!(parked, page.events.iter().map(|event| event.seq).collect::<Vec<_>>(), "shard {shard}");
        found.extend(parked);
    }
    found.sort_unstable();
    assert_eq!(found, all);
}

#[tokio::test]
async fn rewind_drops_what_failed_and_comes_again_and_unsubscribe_drops_all() {
    let shop = Shop::open(json!({})).await;
    let mut seqs = Vec::new();
    for _ in 0..4 {
        seqs.push(shop.publish("t", None).await);
    }
    let count = "SELECT (SELECT count(*) FROM dtm.retry) * 10 + (SELECT count(*) FROM dtm.dead_letter)";
    let fail = |epoch| {
        let (shop, seqs) = (&shop, &seqs);
        async move {
            let all = [
                ("park", seqs[0], 1, Some(9.0), json!([])),
                ("bury", seqs[1], 1, None, json!([])),
                ("park", seqs[2], 1, Some(9.0), json!([])),
                ("bury", seqs[3], 1, None, json!([])),
            ];
            assert_eq!(shop.report(epoch, 0, &all).await, (vec![], vec![]));
        }
    };
    fail(1).await;
    shop.client.execute("SELECT dtm.rewind('s', 'now')", &[]).await.expect("rewind");
    assert_eq!(shop.number(count).await, 22, "nothing comes again");
    let sql = format!(
        "SELECT dtm.rewind('s', (SELECT published_at::text FROM dtm.events WHERE seq = {}))",
        seqs[2]
    );
    shop.client.execute(&sql, &[]).await.expect("rewind");
    assert_eq!(
        shop.numbers("SELECT seq FROM dtm.retry UNION ALL SELECT seq FROM dtm.dead_letter").await,
        seqs[..2]
    );
    // What the log no longer has does not come again.
    shop.client.execute("DELETE FROM dtm.log_1 WHERE seq = $1", &[&seqs[0]]).await.expect("a gap");
    shop.client.execute("SELECT dtm.rewind('s', 'earliest')", &[]).await.expect("rewind");
    assert_eq!(shop.number(count).await, 10);
    shop.client.execute("SELECT dtm.unsubscribe('s')", &[]).await.expect("unsubscribe");
    assert_eq!(shop.number(count).await, 0);
    assert_eq!(shop.report(4, 0, &[("bury", seqs[3], 1, None, json!([]))]).await, (vec![1], vec![]));
}

#[tokio::test]
async fn what_is_parked_already_stays_and_what_dies_twice_has_both_histories() {
    let shop = Shop::open(json!({})).await;
    let seq = shop.publish("t", None).await;
    shop.report(1, 0, &[("park", seq, 7, Some(9.0), attempt(500))]).await;
    shop.report(1, 0, &[("park", seq, 1, Some(1.0), attempt(501))]).await;
    assert_eq!(shop.number("SELECT attempts::bigint FROM dtm.retry").await, 7);
    shop.report(1, 0, &[("bury", seq, 3, None, attempt(422))]).await;
    shop.report(1, 0, &[("die", seq, 8, None, attempt(404))]).await;
    assert_eq!(shop.number("SELECT count(*) FROM dtm.retry").await, 0);
    let sql = "SELECT attempts, history #>> '{0,status}', history #>> '{1,status}', history #>> '{2,status}' FROM dtm.dead_letter";
    let row = shop.client.query_one(sql, &[]).await.expect("one dead letter");
    let found: (i32, &str, &str, &str) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(found, (8, "422", "500", "404"));
    // It is redriven while it is being tried already.
    shop.report(1, 0, &[("park", seq, 2, Some(9.0), json!([]))]).await;
    assert_eq!(shop.number("SELECT dtm.redrive('s', everything => true)").await, 1);
    let sql = "SELECT 10 * (SELECT count(*) FROM dtm.dead_letter) + (SELECT count(*) FROM dtm.retry)";
    assert_eq!(shop.number(sql).await, 1);
}

#[tokio::test]
async fn the_owner_disables_a_subscription_and_resume_ends_that() {
    let shop = Shop::open(json!({})).await;
    let disable = "SELECT dtm.relay_disable($1, $2, $3, 0, 'gone (410)')";
    for (epoch, token, expected) in
        [(2_i64, shop.token, false), (1, shop.token + 1, false), (1, shop.token, true)]
    {
        let row = shop.client.query_one(disable, &[&shop.id, &epoch, &token]).await.expect("disable");
        assert_eq!(row.get::<_, bool>(0), expected);
    }
    let row = shop.client.query_one("SELECT state, reason FROM dtm.subscriptions", &[]).await.expect("it");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, &str>(1)), ("disabled", "gone (410)"));
    assert_eq!(shop.revision().await, 1, "a relay sees it also if it is resumed before it looks");
    assert!(shop.client.query(ASSIGN, &[]).await.expect("units").is_empty());
    shop.client.execute("SELECT dtm.resume('s')", &[]).await.expect("resume");
    let row = shop.client.query_one(ASSIGN, &[]).await.expect("its unit");
    assert_eq!(row.get::<_, i64>(1), shop.token, "it is still the same relay's");
    // It does not wait for a user.
    let other = shop.cluster.connect("shop").await;
    other.batch_execute("BEGIN; SELECT dtm.pause('s')").await.expect("a user at work");
    let row = shop.client.query_one(disable, &[&shop.id, &1_i64, &shop.token]).await.expect("disable");
    assert!(!row.get::<_, bool>(0));
}
