// SPDX-License-Identifier: PostgreSQL
//! The barrier: a branch's work is done once, and not after it was called off; and a message's decision, once told, stays.

use dtm_tests::cluster::Cluster;
use tokio_postgres::Client;

/// Answers "true", "false" or the SQLSTATE.
async fn answer(client: &Client, call: &str) -> String {
    match client.query_one(&format!("SELECT ({call})::text"), &[]).await {
        Ok(row) => row.get(0),
        Err(error) => error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()),
    }
}

async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().config("max_prepared_transactions", "10").start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    (cluster, client)
}

#[tokio::test]
async fn work_is_done_once_and_not_after_it_was_called_off() {
    let (_cluster, client) = shop().await;
    let calls = [
        // Once.
        ("tcc", "a", "01", "try", "true"),
        ("tcc", "a", "01", "try", "false"),
        ("tcc", "a", "02", "try", "true"),
        ("tcc", "a", "01", "confirm", "true"),
        ("tcc", "a", "01", "confirm", "false"),
        // What was done is compensated, once.
        ("tcc", "b", "01", "try", "true"),
        ("tcc", "b", "01", "cancel", "true"),
        ("tcc", "b", "01", "cancel", "false"),
        // What was not done is not, and is not done later.
        ("tcc", "c", "01", "cancel", "false"),
        ("tcc", "c", "01", "try", "false"),
        ("tcc", "c", "01", "cancel", "false"),
        ("saga", "d", "01", "compensate", "false"),
        ("saga", "d", "01", "action", "false"),
        ("workflow", "e", "01", "action", "true"),
        ("workflow", "e", "01", "rollback", "true"),
        // Whoever it is.
        ("tcc", "", "01", "try", "22023"),
        ("tcc", "f", "", "try", "22023"),
        ("", "f", "01", "try", "22023"),
        ("tcc", "f", "01", "", "22023"),
    ];
    for (trans_type, gid, branch, op, expected) in calls {
        let call = format!("dtm.barrier('{trans_type}', '{gid}', '{branch}', '{op}')");
        assert_eq!(answer(&client, &call).await, expected, "{call}");
    }
    assert_eq!(
        answer(&client, "dtm.barrier('tcc', 'a', '01', 'try', '02')").await,
        "true",
        "a second one in a branch"
    );
    let long = "x".repeat(129);
    for call in [
        format!("dtm.barrier('tcc', '{long}', '01', 'try')"),
        "dtm.barrier('tcc', NULL, '01', 'try')".to_owned(),
        "dtm.barrier('tcc', 'g', '01', 'try', NULL)".to_owned(),
        format!("dtm.query_prepared('{long}')"),
        "dtm.msg_barrier(NULL)".to_owned(),
        "dtm.query_prepared(NULL)".to_owned(),
    ] {
        assert_eq!(answer(&client, &call).await, "22023", "{call}");
    }
    client.batch_execute("BEGIN READ ONLY").await.expect("BEGIN");
    assert_eq!(answer(&client, "dtm.barrier('tcc', 'r', '01', 'try')").await, "25006");
}

#[tokio::test]
async fn a_message_is_committed_or_never_will_be_and_an_open_transaction_is_not_decided() {
    let (cluster, client) = shop().await;
    let business = cluster.connect("shop").await;
    assert_eq!(answer(&client, "dtm.query_prepared('never-begun')").await, "rolled_back");
    assert_eq!(answer(&business, "dtm.msg_barrier('never-begun')").await, "23505");
    business.batch_execute("BEGIN; SELECT dtm.msg_barrier('done'); COMMIT").await.expect("a message");
    assert_eq!(answer(&client, "dtm.query_prepared('done')").await, "committed");
    assert_eq!(answer(&business, "dtm.msg_barrier('done')").await, "23505");
    business.batch_execute("BEGIN; SELECT dtm.msg_barrier('open')").await.expect("a message");
    assert_eq!(answer(&client, "dtm.query_prepared('open')").await, "55P03", "not known");
    business.batch_execute("PREPARE TRANSACTION 'open'").await.expect("PREPARE TRANSACTION");
    assert_eq!(answer(&client, "dtm.query_prepared('open')").await, "55P03", "not known");
    business.batch_execute("COMMIT PREPARED 'open'").await.expect("COMMIT PREPARED");
    assert_eq!(answer(&client, "dtm.query_prepared('open')").await, "committed");
    client.batch_execute("BEGIN READ ONLY").await.expect("BEGIN");
    assert_eq!(answer(&client, "dtm.query_prepared('other')").await, "25006", "as on a standby");
    client.batch_execute("ROLLBACK; BEGIN; SELECT dtm.msg_barrier('own')").await.expect("a message");
    assert_eq!(answer(&client, "dtm.query_prepared('own')").await, "25001", "it may still be rolled back");
}

#[tokio::test]
async fn what_was_told_of_a_message_survives_a_crash_also_where_commits_are_asynchronous() {
    let asynchronous = [("synchronous_commit", "off"), ("wal_writer_delay", "10s")];
    let builder =
        asynchronous.iter().fold(Cluster::builder(), |builder, (name, value)| builder.config(name, value));
    let mut cluster = builder.start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    client.batch_execute("CREATE TABLE orders (gid text); CHECKPOINT").await.expect("a table");
    let business = "BEGIN; SELECT dtm.msg_barrier('done'); INSERT INTO orders VALUES ('done'); COMMIT";
    client.batch_execute(business).await.expect("a business transaction");
    assert_eq!(answer(&client, "dtm.query_prepared('done')").await, "committed");
    assert_eq!(answer(&client, "dtm.query_prepared('never')").await, "rolled_back");
    cluster.kill9().await;
    cluster.start().await;
    let client = cluster.connect("shop").await;
    assert_eq!(answer(&client, "SELECT count(*) FROM orders").await, "1");
    assert_eq!(answer(&client, "dtm.query_prepared('done')").await, "committed");
    assert_eq!(answer(&client, "dtm.msg_barrier('never')").await, "23505");
}

#[tokio::test]
async fn barriers_are_purged_by_age_and_no_sooner_also_those_that_have_none() {
    let (_cluster, client) = shop().await;
    let old = "SELECT count(dtm.barrier('tcc', 'g', n::text, 'try')) FROM generate_series(1, 5) n;
               UPDATE dtm_barrier.barrier SET create_time = now() - interval '31 days' WHERE branch_id::int > 2;
               INSERT INTO dtm_barrier.barrier (gid, create_time) VALUES ('of a client that tells no time', NULL)";
    client.batch_execute(old).await.expect("barriers");
    assert_eq!(answer(&client, "dtm.purge(2)").await, "2");
    assert_eq!(answer(&client, "dtm.purge()").await, "1");
    assert_eq!(answer(&client, "dtm.purge()").await, "0");
    assert_eq!(
        answer(&client, "SELECT count(*) FROM dtm_barrier.barrier WHERE create_time IS NOT NULL").await,
        "3"
    );
    client.batch_execute("SET dtm.barriers_kept = '1 s'; SELECT pg_sleep(2.5)").await.expect("time");
    assert_eq!(answer(&client, "dtm.purge()").await, "3");
}

#[tokio::test]
async fn who_may_call_the_barrier_needs_and_has_no_rights_on_its_table() {
    let (cluster, client) = shop().await;
    let grants = "CREATE ROLE service LOGIN; GRANT USAGE ON SCHEMA dtm TO service;
                  GRANT EXECUTE ON FUNCTION dtm.barrier, dtm.msg_barrier, dtm.query_prepared TO service";
    client.batch_execute(grants).await.expect("grants");
    let service = cluster.connect_as("service", "shop").await;
    assert_eq!(answer(&service, "dtm.barrier('tcc', 'g', '01', 'try')").await, "true");
    assert_eq!(answer(&service, "dtm.query_prepared('m')").await, "rolled_back");
    assert_eq!(answer(&service, "dtm.purge_barriers(1)").await, "42501");
    assert_eq!(answer(&service, "SELECT count(*) FROM dtm_barrier.barrier").await, "42501");
}
