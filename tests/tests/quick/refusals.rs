// SPDX-License-Identifier: PostgreSQL
//! Every wrong argument gets an SQLSTATE, a detail and a hint, and leaves nothing half done.

use dtm_tests::cluster::Cluster;
use tokio_postgres::Client;
use tokio_postgres::error::DbError;

async fn refusal(client: &Client, sql: &str) -> DbError {
    match client.batch_execute(sql).await {
        Ok(()) => panic!("it was accepted: {sql}"),
        Err(error) => error.as_db_error().unwrap_or_else(|| panic!("{sql}: {error}")).clone(),
    }
}

fn assert_clear(sql: &str, error: &DbError, sqlstate: &str, part: &str) {
    let (detail, hint) = (error.detail().unwrap_or_default(), error.hint().unwrap_or_default());
    let all = format!("{}: {} / {detail} / {hint}", error.code().code(), error.message());
    assert_eq!(error.code().code(), sqlstate, "{sql}: {all}");
    assert!(!detail.is_empty() && !hint.is_empty(), "{sql}: no detail or no hint: {all}");
    assert!(all.contains(part), "{sql}: {part:?} is not in {all}");
}

/// Arguments of `dtm.publish` that are wrong, with the SQLSTATE and something that the error names.
const PUBLISH: [(&str, &str, &str); 42] = [
    ("NULL, '1'", "22023", "null"),
    ("'', '1'", "22023", "empty"),
    ("'.a', '1'", "22023", "empty segment"),
    ("'a..b', '1'", "22023", "empty segment"),
    ("'a b', '1'", "22023", "' '"),
    ("'a.*', '1'", "22023", "'*'"),
    ("'a/b', '1'", "22023", "'/'"),
    ("'größe', '1'", "22023", "'ö'"),
    ("repeat('a', 250), '1'", "22023", "249"),
    ("'dtm.x', '1'", "22023", "reserved"),
    ("'dtm', '1'", "22023", "reserved"),
    ("'t', to_jsonb(repeat('x', 1048576))", "54000", "dtm.max_payload"),
    ("'t', '1', key => repeat('k', 1025)", "54000", "1024"),
    ("'t', '1', headers => '[]'", "22023", "flat"),
    ("'t', '1', headers => '\"x\"'", "22023", "flat"),
    ("'t', '1', headers => '{\"a\": 1}'", "22023", "\"a\""),
    ("'t', '1', headers => '{\"a\": null}'", "22023", "\"a\""),
    ("'t', '1', headers => '{\"a\": {\"b\": \"c\"}}'", "22023", "\"a\""),
    ("'t', '1', headers => '{\"a b\": \"c\"}'", "22023", "token"),
    ("'t', '1', headers => '{\"\": \"c\"}'", "22023", "token"),
    ("'t', '1', headers => '{\"a\": \"b\\nc\"}'", "22023", "control character"),
    ("'t', '1', headers => '{\"a\": \"x\", \"A\": \"y\"}'", "22023", "twice"),
    ("'t', '1', headers => jsonb_build_object('a', repeat('x', 17000))", "54000", "16384"),
    ("'t', '1', headers => '{\"Host\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"connection\": \"close\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"transfer-encoding\": \"chunked\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"te\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"upgrade\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"content-length\": \"1\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"Content-Type\": \"text/plain\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"authorization\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"webhook-id\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce_type\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"id\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce-id\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce-source\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce-type\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce-specversion\": \"x\", \"ce-time\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce-partitionkey\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce-datacontenttype\": \"x\"}'", "22023", "reserved"),
    ("'t', '1', headers => '{\"ce-My-Name\": \"x\"}'", "22023", "ce-subject"),
    ("'t', '1', headers => '{\"ce-subject\": \"\"}'", "22023", "empty"),
];

/// Statements that are wrong.
const STATEMENTS: [(&str, &str, &str); 45] = [
    ("SELECT dtm.publish('t', '1', deliver_at => 'infinity')", "22023", "infinity"),
    ("SELECT dtm.publish_bytes('t', 'x', NULL)", "22023", "content type"),
    ("SELECT dtm.publish_bytes('t', 'x', '')", "22023", "content type"),
    ("SELECT dtm.publish_bytes('t', 'x', E'a\\nb')", "22023", "content type"),
    ("SELECT dtm.publish_many('t', NULL)", "22023", "null"),
    ("SELECT dtm.publish_many('t', ARRAY['1', '2']::jsonb[], keys => ARRAY['a'])", "22023", "keys"),
    ("SELECT dtm.publish_many('t', ARRAY['1']::jsonb[], headers => '{}')", "22023", "headers"),
    (
        "SELECT dtm.publish_many('t', ARRAY['1']::jsonb[], ids => ARRAY[gen_random_uuid(), gen_random_uuid()])",
        "22023",
        "ids",
    ),
    ("SELECT dtm.publish_many('t', ARRAY[['1', '2'], ['3', '4']]::jsonb[])", "22023", "dimension"),
    (
        "SELECT dtm.publish_many('t', ARRAY['1', '2']::jsonb[], headers => ARRAY[NULL, '[]']::jsonb[])",
        "22023",
        "flat",
    ),
    ("SELECT dtm.subscribe(NULL, 't', 'http://h/')", "22023", "name"),
    ("SELECT dtm.subscribe('', 't', 'http://h/')", "22023", "name"),
    ("SELECT dtm.subscribe('s', NULL::text, 'http://h/')", "22023", "null"),
    ("SELECT dtm.subscribe('s', '{}'::text[], 'http://h/')", "22023", "topic"),
    ("SELECT dtm.subscribe('s', 'a.>.b', 'http://h/')", "22023", "last segment"),
    ("SELECT dtm.subscribe('s', 'a.b*', 'http://h/')", "22023", "segment of its own"),
    ("SELECT dtm.subscribe('s', 't', NULL)", "22023", "destination"),
    ("SELECT dtm.subscribe('s', 't', 'nonsense')", "22023", "http"),
    ("SELECT dtm.subscribe('s', 't', 'amqp://h/t')", "0A000", "kafka"),
    ("SELECT dtm.subscribe('s', 't', 'kafka://main')", "22023", "there is no topic"),
    ("SELECT dtm.subscribe('s', 't', 'kafka://main/{key}')", "22023", "{topic}"),
    ("SELECT dtm.subscribe('s', 't', 'kafka://main/t', '{\"timeout\": 1}')", "22023", "Kafka destination"),
    (
        "SELECT dtm.subscribe('s', 't', 'http://h/', '{\"format\": \"debezium\"}')",
        "22023",
        "HTTP destination",
    ),
    (
        "SELECT dtm.subscribe('s', 't', 'kafka://main/t', '{\"delivery\": \"exactly-once\", \"on_dead\": \"block\"}')",
        "22023",
        "exactly-once",
    ),
    ("SELECT dtm.subscribe('s', 't', 'http://u:hunter2@h/')", "22023", "credential"),
    // Not where credentials belong, and yet some that must not be repeated.
    ("SELECT dtm.subscribe('s', 't', 'u:hunter2@h/x')", "22023", "absolute URI"),
    ("SELECT dtm.subscribe('s', 't', 'https:/u:hunter2@h')", "22023", "absolute URI"),
    ("SELECT dtm.subscribe('s', 't', 'https://u:hunter2@h/' || repeat('x', 2048))", "22023", "2048"),
    ("SELECT dtm.subscribe('s', 't', 'ftp://h/u:hunter2@h')", "0A000", "ftp"),
    ("SELECT dtm.subscribe('s', 't', 'http://h/', '{\"tiemout\": 1}')", "22023", "max_in_flight"),
    ("SELECT dtm.subscribe('s', 't', 'http://h/', '{\"timeout\": \"soon\"}')", "22023", "timeout"),
    ("SELECT dtm.subscribe('s', 't', 'http://h/', '{\"max_in_flight\": 0}')", "22023", "1024"),
    ("SELECT dtm.subscribe('s', 't', 'http://h/', '{\"ordering\": \"sometimes\"}')", "22023", "none"),
    ("SELECT dtm.subscribe('s', 't', 'http://h/', '[]')", "22023", "options"),
    ("SELECT dtm.subscribe('s', 't', 'http://h/', start_at => 'soon')", "22023", "earliest"),
    ("SELECT dtm.receive('', gen_random_uuid())", "22023", "consumer"),
    ("SELECT dtm.redrive('s')", "22023", "everything => true"),
    ("SELECT dtm.discard('s', everything => NULL)", "22023", "everything => true"),
    ("SELECT dtm.redrive('s', topic => 'a..b')", "22023", "empty segment"),
    ("SELECT dtm.discard('s', everything => true, max_rows => 0)", "22023", "max_rows"),
    ("SELECT dtm.redrive('s', everything => true)", "42704", "dtm.subscriptions"),
    ("SELECT dtm.discard(NULL, ids => '{}')", "42704", "null"),
    ("SELECT dtm.shard_of('k', 1, 0)", "22023", "64"),
    ("SELECT dtm.purge(0)", "22023", "positive"),
    ("SELECT dtm.purge(NULL)", "22023", "null"),
];

#[tokio::test]
async fn every_wrong_argument_gets_an_sqlstate_a_detail_and_a_hint_and_writes_nothing() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    for (arguments, sqlstate, part) in PUBLISH {
        let sql = format!("SELECT dtm.publish({arguments})");
        assert_clear(&sql, &refusal(&client, &sql).await, sqlstate, part);
    }
    for (sql, sqlstate, part) in STATEMENTS {
        let error = refusal(&client, sql).await;
        assert_clear(sql, &error, sqlstate, part);
        assert!(!format!("{error:?}").contains("hunter2"), "a credential is shown");
    }
    for sql in ["dtm.pause('s')", "dtm.resume('s')", "dtm.unsubscribe('s')", "dtm.rewind('s', 'now')"] {
        let sql = format!("SELECT {sql}");
        assert_clear(&sql, &refusal(&client, &sql).await, "42704", "dtm.subscriptions");
    }
    let written = "SELECT (SELECT count(*) FROM dtm.log) + (SELECT count(*) FROM dtm.delayed) \
                   + (SELECT count(*) FROM dtm.given_ids) + (SELECT count(*) FROM dtm.subscription)";
    let written: i64 = client.query_one(written, &[]).await.expect("counts").get(0);
    assert_eq!(written, 0);
}

#[tokio::test]
async fn nothing_is_published_in_a_read_only_transaction_and_the_limit_of_payloads_is_a_superusers() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    client.batch_execute("BEGIN READ ONLY").await.expect("BEGIN");
    let publish = "SELECT dtm.publish('t', '1')";
    assert_clear(publish, &refusal(&client, publish).await, "25006", "read-only");
    client.batch_execute("ROLLBACK").await.expect("ROLLBACK");
    let sql = "CREATE ROLE app LOGIN; GRANT USAGE ON SCHEMA dtm TO app; GRANT EXECUTE ON FUNCTION dtm.publish TO app; \
               ALTER DATABASE shop SET dtm.max_payload = '2kB'";
    client.batch_execute(sql).await.expect("a role");
    let app = cluster.connect_as("app", "shop").await;
    let large = "SELECT dtm.publish('t', to_jsonb(repeat('x', 3000)))";
    assert_clear(large, &refusal(&app, large).await, "54000", "2048");
    let error = refusal(&app, "SET dtm.max_payload = '1GB'").await;
    assert_eq!(error.code().code(), "42501");
}
