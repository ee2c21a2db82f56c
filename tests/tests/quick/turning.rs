// SPDX-License-Identifier: PostgreSQL
//! Segments turn over in two steps: a dump that is made in between finds for each cursor what it needs, and nobody who has no
//! rights on the extension's tables can hold them up.

use dtm_tests::cluster::Cluster;
use tokio_postgres::Client;

use crate::reading::deliver_everything;

/// A database whose events are needless as soon as they are delivered.
async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().config("max_prepared_transactions", "5").start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let settings =
        "SELECT dtm.library_protocol(); SET dtm.retention = 0; SELECT * FROM dtm.relay_hello('default')";
    client.batch_execute(settings).await.expect("settings");
    (cluster, client)
}

async fn subscribe(client: &Client, name: &str) {
    let sql = "SELECT dtm.subscribe($1, 't', 'http://127.0.0.1:9/')";
    client.execute(sql, &[&name]).await.expect("subscribe");
}

async fn publish(client: &Client, count: i32) {
    let sql = "SELECT dtm.publish('t', to_jsonb(n)) FROM generate_series(1, $1) AS n";
    client.execute(sql, &[&count]).await.expect("publish");
}

async fn rotate(client: &Client, what: &str) -> String {
    let sql = format!("SELECT coalesce(dtm.{what}, 'nothing')");
    client.query_one(&sql, &[]).await.expect(&sql).get(0)
}

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.expect(sql).get(0)
}

/// A dump begins: it looks at tables with the snapshot of now.
async fn begin_dump(cluster: &Cluster) -> Client {
    let dump = cluster.connect("shop").await;
    dump.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.expect("a snapshot");
    dump
}

#[tokio::test]
async fn a_dump_between_the_two_steps_finds_the_events_that_a_rewind_has_made_needed_again() {
    let (cluster, client) = shop().await;
    subscribe(&client, "s").await;
    publish(&client, 3).await;
    deliver_everything(&client).await;
    assert_eq!(rotate(&client, "rotate_log()").await, "rotated");
    assert_eq!(rotate(&client, "rotate_log()").await, "retired");
    client.execute("SELECT dtm.rewind('s', 'earliest')", &[]).await.expect("rewind");
    let dump = begin_dump(&cluster).await;
    deliver_everything(&client).await;
    assert_eq!(rotate(&client, "rotate_log()").await, "kept");
    for step in ["retired", "nothing", "nothing"] {
        assert_eq!(rotate(&client, "rotate_log()").await, step, "a dump needs the segment");
    }
    assert_eq!(count(&dump, "SELECT count(*) FROM dtm.log").await, 3);
    dump.batch_execute("COMMIT").await.expect("COMMIT");
    assert_eq!(rotate(&client, "rotate_log()").await, "emptied");
}

#[tokio::test]
async fn a_segment_that_a_publisher_has_is_not_retired_before_the_publisher_has_ended() {
    let (cluster, client) = shop().await;
    subscribe(&client, "s").await;
    publish(&client, 3).await;
    deliver_everything(&client).await;
    let publisher = cluster.connect("shop").await;
    publisher.batch_execute("BEGIN; SELECT dtm.publish('t', '4')").await.expect("publish");
    deliver_everything(&client).await;
    assert_eq!(rotate(&client, "rotate_log()").await, "rotated");
    assert_eq!(rotate(&client, "rotate_log()").await, "nothing", "a publisher is there");
    publisher.batch_execute("PREPARE TRANSACTION 'p'").await.expect("PREPARE");
    assert_eq!(rotate(&client, "rotate_log()").await, "nothing", "a prepared one is, too");
    publisher.batch_execute("COMMIT PREPARED 'p'").await.expect("COMMIT");
    let dump = begin_dump(&cluster).await;
    deliver_everything(&client).await;
    for step in ["retired", "nothing"] {
        assert_eq!(rotate(&client, "rotate_log()").await, step, "a dump needs the segment");
    }
    assert_eq!(count(&dump, "SELECT count(*) FROM dtm.log").await, 4);
    dump.batch_execute("COMMIT").await.expect("COMMIT");
    assert_eq!(rotate(&client, "rotate_log()").await, "emptied");
}

#[tokio::test]
async fn a_cursor_that_an_old_snapshot_sets_stands_in_the_segment_that_is_written() {
    let (cluster, client) = shop().await;
    subscribe(&client, "first").await;
    let old = begin_dump(&cluster).await;
    assert_eq!(rotate(&client, "rotate_control(0)").await, "rotated");
    subscribe(&old, "second").await;
    old.batch_execute("COMMIT").await.expect("COMMIT");
    let dump = begin_dump(&cluster).await;
    publish(&client, 1).await;
    deliver_everything(&client).await;
    while ["retired", "emptied"].contains(&rotate(&client, "rotate_control(0)").await.as_str()) {}
    let cursors = "SELECT count(*) FROM dtm.subscription s, dtm.relay_resume(s.id, 0, s.epoch)";
    assert_eq!(count(&dump, cursors).await, 2, "the dump has a subscription without a cursor");
}

#[tokio::test]
async fn who_was_in_the_way_once_is_not_waited_for_again_at_once() {
    let (cluster, client) = shop().await;
    publish(&client, 1).await;
    assert_eq!(rotate(&client, "rotate_log()").await, "rotated");
    assert_eq!(rotate(&client, "rotate_log()").await, "retired");
    let reader = cluster.connect("shop").await;
    reader.batch_execute("BEGIN; SELECT count(*) FROM dtm.log").await.expect("a reader");
    assert_eq!(rotate(&client, "rotate_log()").await, "nothing");
    let held_up = "SELECT log_held_up[1]::text FROM dtm.rotation";
    let at: String = client.query_one(held_up, &[]).await.expect("rotation").get(0);
    client.batch_execute("SET dtm.retention = '1h'").await.expect("a pause of a minute");
    assert_eq!(rotate(&client, "rotate_log()").await, "nothing");
    assert_eq!(client.query_one(held_up, &[]).await.expect("rotation").get::<_, String>(0), at);
    reader.batch_execute("COMMIT").await.expect("COMMIT");
    client.batch_execute("SET dtm.retention = 0").await.expect("no pause");
    assert_eq!(rotate(&client, "rotate_log()").await, "emptied");
}

#[tokio::test]
async fn a_role_without_rights_holds_up_neither_segments_nor_delayed_events_nor_reports() {
    let (cluster, client) = shop().await;
    client.batch_execute("CREATE ROLE nobody LOGIN").await.expect("a role");
    subscribe(&client, "s").await;
    publish(&client, 1).await;
    let later = "SELECT dtm.publish('t', '2', deliver_at => clock_timestamp() + interval '1 h')";
    client.execute(later, &[]).await.expect("publish");
    client.execute("UPDATE dtm.delayed SET due = clock_timestamp()", &[]).await.expect("it is due");
    // Every lock that it can have which an earlier version took, and which has no owner.
    let nobody = cluster.connect_as("nobody", "shop").await;
    let locks = "SELECT pg_advisory_lock(28275509949658469), pg_advisory_lock(28275509949658470), \
                 pg_advisory_lock(1685351795, 1)";
    nobody.execute(locks, &[]).await.expect("advisory locks");
    client.batch_execute("SET statement_timeout = '20s'").await.expect("no hanging");
    assert_eq!(rotate(&client, "rotate_log()").await, "rotated");
    let moved: i32 = client.query_one("SELECT moved FROM dtm.relay_due(10)", &[]).await.expect("due").get(0);
    assert_eq!(moved, 1);
    let free = "SELECT dtm.try_settlements(id) FROM dtm.subscription";
    assert!(client.query_one(free, &[]).await.expect("settlements").get::<_, bool>(0));
    client.execute("SELECT dtm.rewind('s', 'now')", &[]).await.expect("rewind");
    for table in ["subscription", "turn", "rotation", "lease_log_1", "log_1"] {
        let lock = format!("BEGIN; LOCK TABLE dtm.{table} IN ACCESS SHARE MODE");
        let error = nobody.batch_execute(&lock).await.expect_err(table);
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{table}");
        nobody.batch_execute("ROLLBACK").await.expect("ROLLBACK");
    }
}

#[tokio::test]
async fn one_session_at_a_time_moves_delayed_events_and_another_does_not_wait() {
    let (cluster, client) = shop().await;
    let later = "SELECT dtm.publish('t', '2', deliver_at => clock_timestamp() + interval '1 h')";
    client.execute(later, &[]).await.expect("publish");
    client.execute("UPDATE dtm.delayed SET due = clock_timestamp()", &[]).await.expect("it is due");
    let other = cluster.connect("shop").await;
    let due = "SELECT moved FROM dtm.relay_due(10)";
    other.batch_execute("BEGIN").await.expect("BEGIN");
    assert_eq!(other.query_one(due, &[]).await.expect("due").get::<_, i32>(0), 1);
    assert_eq!(client.query_one(due, &[]).await.expect("due").get::<_, i32>(0), 0);
    other.batch_execute("ROLLBACK").await.expect("ROLLBACK");
    assert_eq!(client.query_one(due, &[]).await.expect("due").get::<_, i32>(0), 1);
}

#[tokio::test]
async fn adopting_gives_up_while_transactions_are_open_and_names_them() {
    let (cluster, client) = shop().await;
    let publisher = cluster.connect("shop").await;
    let pid: i32 = publisher.query_one("SELECT pg_backend_pid()", &[]).await.expect("pid").get(0);
    publisher.batch_execute("BEGIN; SELECT dtm.publish('t', '1')").await.expect("publish");
    client.batch_execute("SET statement_timeout = '20s'").await.expect("no hanging");
    for in_the_way in [format!("session {pid}"), "prepared transaction 'old'".to_owned()] {
        let error = client.execute("SELECT dtm.adopt('staging')", &[]).await.expect_err("it is open");
        let error = error.as_db_error().expect("a database's error");
        assert_eq!(error.code().code(), "55P03");
        assert_eq!(error.detail(), Some(format!("In the way are: {in_the_way}.").as_str()));
        assert!(error.hint().expect("a hint").contains("ROLLBACK PREPARED"));
        if in_the_way.starts_with("session") {
            publisher.batch_execute("PREPARE TRANSACTION 'old'").await.expect("PREPARE");
        }
    }
    client.batch_execute("ROLLBACK PREPARED 'old'").await.expect("ROLLBACK");
    client.execute("SELECT dtm.adopt('staging')", &[]).await.expect("adopted");
}

#[tokio::test]
async fn a_cursor_does_not_move_to_a_position_that_is_gone() {
    let (_cluster, client) = shop().await;
    subscribe(&client, "s").await;
    deliver_everything(&client).await;
    let cursors = "SELECT count(*) FROM dtm.cursor_log";
    let before = count(&client, cursors).await;
    for (position, target) in [("999999", "NULL"), ("c.\"position\"", "999999")] {
        let sql = format!(
            "SELECT m.fenced FROM dtm.owners o, \
             LATERAL (SELECT \"position\" FROM dtm.cursor_log ORDER BY id DESC LIMIT 1) c, \
             dtm.relay_move('{{}}', ARRAY[o.subscription], ARRAY[0], ARRAY[1::bigint], ARRAY[o.token], \
                            ARRAY[{position}]::bigint[], ARRAY[{target}]::bigint[], ARRAY[0::bigint]) m"
        );
        let fenced: Vec<i64> = client.query_one(&sql, &[]).await.expect(&sql).get(0);
        assert_eq!(fenced.len(), 1, "{sql}");
    }
    assert_eq!(count(&client, cursors).await, before);
}

#[tokio::test]
async fn where_eras_begin_is_found_without_reading_the_log() {
    let (cluster, client) = shop().await;
    publish(&client, 5_000).await;
    // As if it had come through three databases that no relay ever met.
    let eras = "UPDATE dtm.log_1 SET era = CASE WHEN seq <= 1000 THEN 1 WHEN seq <= 1001 THEN 2 ELSE 3 END; DELETE FROM dtm.eras";
    client.batch_execute(eras).await.expect("eras");
    // A session of its own: what it reads is counted.
    let mut relay = cluster.connect("shop").await;
    let transaction = relay.transaction().await.expect("BEGIN");
    let hello = "SELECT eras[:3] FROM dtm.relay_hello('default')";
    let found: Vec<i32> = transaction.query_one(hello, &[]).await.expect("hello").get(0);
    assert_eq!(found, [1, 2, 3]);
    let read = "SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint \
                FROM pg_stat_xact_user_tables WHERE schemaname = 'dtm' AND relname LIKE 'log\\_%'";
    let rows: i64 = transaction.query_one(read, &[]).await.expect("statistics").get(0);
    assert!(rows < 200, "{rows} rows were read of 5000");
}
