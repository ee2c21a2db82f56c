// SPDX-License-Identifier: PostgreSQL
//! What publishing writes, wherever it is called from.

use std::collections::HashSet;

use dtm_tests::cluster::Cluster;
use futures_util::future::join_all;
use tokio_postgres::Client;
use uuid::Uuid;

async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().config("max_prepared_transactions", "10").start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    (cluster, client)
}

async fn topics(client: &Client) -> Vec<String> {
    let rows = client.query("SELECT topic FROM dtm.events ORDER BY seq", &[]).await.expect("dtm.events");
    rows.iter().map(|row| row.get(0)).collect()
}

/// Statement by statement, each a message of its own: what is sent as one string is one transaction.
async fn each(client: &Client, statements: &[&str]) {
    for statement in statements {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

#[tokio::test]
async fn a_payload_is_stored_as_the_bytes_that_are_delivered() {
    let (_cluster, client) = shop().await;
    let large = "x".repeat(500_000);
    for (call, content_type, body) in [
        (
            "dtm.publish('t', '{\"b\":  1, \"a\": [1.50, true]}')".to_owned(),
            "application/json",
            Some(b"{\"a\": [1.50, true], \"b\": 1}".to_vec()),
        ),
        ("dtm.publish('t', NULL)".to_owned(), "application/json", None),
        ("dtm.publish('t', 'null')".to_owned(), "application/json", Some(b"null".to_vec())),
        ("dtm.publish_bytes('t', '\\x00ff', 'image/png')".to_owned(), "image/png", Some(vec![0, 255])),
        ("dtm.publish_bytes('t', '', 'text/plain')".to_owned(), "text/plain", Some(vec![])),
        ("dtm.publish_bytes('t', NULL, 'text/plain')".to_owned(), "text/plain", None),
        (
            format!("dtm.publish('t', to_jsonb('{large}'::text))"),
            "application/json",
            Some(format!("\"{large}\"").into_bytes()),
        ),
    ] {
        let id: Uuid = client.query_one(&format!("SELECT {call}"), &[]).await.expect("publish").get(0);
        let row = "SELECT content_type, body FROM dtm.events WHERE id = $1";
        let row = client.query_one(row, &[&id]).await.expect("the event");
        let found: Option<Vec<u8>> = row.get(1);
        assert_eq!(row.get::<_, &str>(0), content_type);
        assert!(found == body, "another body than {call:.60}");
    }
}

#[tokio::test]
async fn all_columns_of_an_event_are_what_was_given() {
    let (_cluster, client) = shop().await;
    let sql = "SELECT dtm.publish('a.b-c.D_1', '{\"n\": 1}', 'kéy', '{\"x-a\": \"ü\", \"ce-subject\": \"s\"}', \
               '018f2f6e-7c1a-7cc0-a3a5-1f0a3c2b9d11')";
    client.batch_execute(sql).await.expect("publish");
    let sql = "SELECT (topic, key, payload, headers, id) = ('a.b-c.D_1', 'kéy', '{\"n\": 1}'::jsonb, \
               '{\"x-a\": \"ü\", \"ce-subject\": \"s\"}'::jsonb, '018f2f6e-7c1a-7cc0-a3a5-1f0a3c2b9d11'::uuid) \
               AND abs(extract(epoch FROM clock_timestamp() - published_at)) < 60 AND xid IS NOT NULL \
               AND era = (SELECT era FROM dtm.installation) FROM dtm.events";
    assert!(client.query_one(sql, &[]).await.expect("the event").get::<_, bool>(0));
}

#[tokio::test]
async fn ids_are_uuidv7_and_differ_over_all_sessions() {
    let (cluster, _client) = shop().await;
    let sessions = (0..8).map(|_| async {
        // Fresh backends, forked from one postmaster.
        let client = cluster.connect("shop").await;
        let sql = "SELECT dtm.publish('t', '1') FROM generate_series(1, 500) \
                   UNION ALL SELECT unnest(dtm.publish_many('t', array_fill('1'::jsonb, ARRAY[500])))";
        let rows = client.query(sql, &[]).await.expect("publish");
        rows.iter().map(|row| row.get::<_, Uuid>(0)).collect::<Vec<_>>()
    });
    let ids: Vec<Uuid> = join_all(sessions).await.concat();
    assert!(ids.iter().all(|id| id.get_version_num() == 7 && id.get_variant() == uuid::Variant::RFC4122));
    let distinct: HashSet<&[u8]> = ids.iter().map(|id| &id.as_bytes()[8..]).collect();
    assert_eq!(distinct.len(), 8_000, "the random half of an id came twice");
}

#[tokio::test]
async fn a_given_id_is_published_once_within_the_retention() {
    let (cluster, client) = shop().await;
    let id = Uuid::new_v4();
    let publish = format!("SELECT dtm.publish('t', '1', id => '{id}')");
    each(&client, &["BEGIN", &publish, "ROLLBACK", &publish]).await;
    let error = client.batch_execute(&publish).await.expect_err("it was published before");
    let error = error.as_db_error().expect("an error of the database").clone();
    assert_eq!(error.code().code(), "23505");
    assert!(error.detail().is_some_and(|detail| detail.contains(&id.to_string())) && error.hint().is_some());
    for again in [
        format!("SELECT dtm.publish_bytes('t', 'x', 'text/plain', id => '{id}')"),
        format!("SELECT dtm.publish('t', '1', id => '{id}', deliver_at => now() + interval '1 h')"),
        format!("SELECT dtm.publish_many('t', ARRAY['1', '2']::jsonb[], ids => ARRAY[NULL, '{id}']::uuid[])"),
        "SELECT dtm.publish_many('t', ARRAY['1', '2']::jsonb[], ids => array_fill(gen_random_uuid(), ARRAY[2]))".to_owned(),
    ] {
        let error = client.batch_execute(&again).await.expect_err("it was published before");
        assert_eq!(error.code().map(|code| code.code()), Some("23505"), "{again}");
    }
    assert_eq!(topics(&client).await.len(), 1);
    // Known for as long as the retention says; others are not touched.
    client.batch_execute("ALTER DATABASE shop SET dtm.retention = '1s'").await.expect("a setting");
    let later = cluster.connect("shop").await;
    let purged = dtm_tests::process::eventually(std::time::Duration::from_secs(20), || async {
        let purged: i64 = later.query_one("SELECT dtm.purge()", &[]).await.expect("purge").get(0);
        (purged > 0).then_some(())
    });
    assert!(purged.await.is_some());
    each(&later, &[&publish]).await;
}

#[tokio::test]
async fn publish_many_is_publish_many_times_in_the_order_of_the_array() {
    let (_cluster, client) = shop().await;
    let id = Uuid::new_v4();
    let sql = "SELECT dtm.publish_many('t', ARRAY['1', NULL, 'null']::jsonb[], keys => ARRAY['a', NULL, 'c'], \
               headers => ARRAY[NULL, '{\"x\": \"y\"}', '{}']::jsonb[], ids => ARRAY[NULL, $1, NULL]::uuid[])";
    let ids: Vec<Uuid> = client.query_one(sql, &[&id]).await.expect("publish_many").get(0);
    let rows = client
        .query("SELECT id, key, body, headers FROM dtm.events ORDER BY seq", &[])
        .await
        .expect("events");
    let stored: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!((&stored, stored[1]), (&ids, id));
    let keys: Vec<Option<&str>> = rows.iter().map(|row| row.get(1)).collect();
    assert_eq!(keys, [Some("a"), None, Some("c")]);
    let bodies: Vec<Option<&[u8]>> = rows.iter().map(|row| row.get(2)).collect();
    assert_eq!(bodies, [Some(&b"1"[..]), None, Some(&b"null"[..])]);
    let headers: Vec<bool> =
        rows.iter().map(|row| row.get::<_, Option<serde_json::Value>>(3).is_some()).collect();
    assert_eq!(headers, [false, true, false]);
    let none: Vec<Uuid> =
        client.query_one("SELECT dtm.publish_many('t', '{}')", &[]).await.expect("none").get(0);
    assert!(none.is_empty());
    let sql = "SELECT dtm.publish_bytes_many('t', ARRAY['\\x00', '\\xff']::bytea[], 'image/png')";
    let ids: Vec<Uuid> = client.query_one(sql, &[]).await.expect("publish_bytes_many").get(0);
    assert_eq!((ids.len(), topics(&client).await.len()), (2, 5));
}

#[tokio::test]
async fn subtransactions_exceptions_and_prepared_transactions_publish_what_commits() {
    let (_cluster, client) = shop().await;
    each(
        &client,
        &[
            "BEGIN", "SELECT dtm.publish('kept.1', '1')", "SAVEPOINT a", "SELECT dtm.publish('undone', '1')",
            "SAVEPOINT b", "SELECT dtm.publish('undone', '1')", "RELEASE b", "ROLLBACK TO a",
            "SELECT dtm.publish('kept.2', '1')", "SAVEPOINT c", "SELECT dtm.publish('kept.3', '1')", "RELEASE c", "COMMIT",
            "BEGIN", "SELECT dtm.publish('undone', '1')", "ROLLBACK",
            "DO $$ BEGIN FOR n IN 1..3 LOOP BEGIN PERFORM dtm.publish('kept.loop' || n, '1'); \
                IF n = 2 THEN RAISE 'no'; END IF; EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$",
            "BEGIN", "SELECT dtm.publish('kept.prepared', '1')", "PREPARE TRANSACTION 'p'",
            "BEGIN", "SELECT dtm.publish('undone', '1')", "PREPARE TRANSACTION 'q'",
            "ROLLBACK PREPARED 'q'",
        ],
    )
    .await;
    assert_eq!(topics(&client).await, ["kept.1", "kept.2", "kept.3", "kept.loop1", "kept.loop3"]);
    each(&client, &["COMMIT PREPARED 'p'"]).await;
    assert_eq!(topics(&client).await.len(), 6);
}

#[tokio::test]
async fn triggers_functions_cursors_and_prepared_statements_publish() {
    let (cluster, client) = shop().await;
    let schema = "
        CREATE TABLE orders (id int PRIMARY KEY, customer text);
        CREATE FUNCTION each_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM dtm.publish('row.' || lower(TG_OP), to_jsonb(coalesce(NEW, OLD)), key => (coalesce(NEW, OLD)).customer);
            RETURN NULL; END $$;
        CREATE FUNCTION each_statement() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM dtm.publish_many('statement.insert', (SELECT array_agg(to_jsonb(n) ORDER BY id) FROM new_rows n));
            RETURN NULL; END $$;
        CREATE TRIGGER a AFTER INSERT OR UPDATE OR DELETE ON orders FOR EACH ROW EXECUTE FUNCTION each_row();
        CREATE TRIGGER b AFTER INSERT ON orders REFERENCING NEW TABLE AS new_rows
            FOR EACH STATEMENT EXECUTE FUNCTION each_statement();
        CREATE CONSTRAINT TRIGGER c AFTER DELETE ON orders DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION each_row()";
    client.batch_execute(schema).await.expect("triggers");
    cluster.psql("shop", "COPY orders FROM stdin;\n1\tann\n2\tbob\n3\tann\n\\.\n");
    assert_eq!(topics(&client).await.iter().filter(|topic| *topic == "row.insert").count(), 3);
    assert_eq!(topics(&client).await.iter().filter(|topic| *topic == "statement.insert").count(), 3);
    each(
        &client,
        &[
            "BEGIN",
            "DELETE FROM orders WHERE id = 1",
            "COMMIT",
            "UPDATE orders SET customer = 'cid' WHERE id = 2",
        ],
    )
    .await;
    assert_eq!(
        topics(&client).await[6..],
        ["row.delete", "row.delete", "row.update"],
        "deferred triggers too"
    );
    each(
        &client,
        &[
            "PREPARE p AS SELECT dtm.publish($1, '1')",
            "EXECUTE p('prepared')",
            "DEALLOCATE p",
            "BEGIN",
            "DECLARE c CURSOR FOR SELECT dtm.publish('cursor', to_jsonb(n)) FROM generate_series(1, 5) n",
            "FETCH 2 FROM c",
            "COMMIT",
            "CREATE TABLE made AS SELECT dtm.publish('made', '1') AS id",
            "INSERT INTO orders SELECT 10, dtm.publish('inserted', '1')::text",
        ],
    )
    .await;
    assert_eq!(topics(&client).await[9..14], ["prepared", "cursor", "cursor", "made", "inserted"]);
}
