// SPDX-License-Identifier: PostgreSQL
//! Databases that are not in UTF-8: what goes over the wire is, and what cannot be is refused when it is published.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

async fn database(cluster: &Cluster, encoding: &str) -> (String, Client) {
    let name = encoding.to_lowercase();
    let sql = format!(
        "CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    );
    cluster.connect("postgres").await.batch_execute(&sql).await.expect("CREATE DATABASE");
    let client = cluster.connect(&name).await;
    client.batch_execute("CREATE EXTENSION pg_dtm").await.expect("CREATE EXTENSION");
    (name, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn umlauts_arrive_as_utf8_from_a_database_of_any_encoding() {
    let cluster = Cluster::builder().start().await;
    for encoding in ["SQL_ASCII", "LATIN1", "UTF8"] {
        let (name, client) = database(&cluster, encoding).await;
        let receiver = Receiver::start().await;
        client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
        let message = format!(
            r#"SELECT dtm.msg_send('[{{"action": "{}", "payload": {{"ö": ["ß", 1e400]}}}}]', 'Zürich')"#,
            receiver.url()
        );
        client.batch_execute(&message).await.expect("msg_send");
        // At once and when due, in one call and in many: each way into the log.
        let sql = "SELECT dtm.publish('t', '{\"ö\": \"ß\"}', 'Zürich', '{\"x-ort\": \"Köln\", \"ce-subject\": \"ä\"}'), \
                   dtm.publish('t', '{\"ö\": \"ß\"}', 'Zürich', '{\"x-ort\": \"Köln\", \"ce-subject\": \"ä\"}', \
                               deliver_at => now() + interval '100 ms'), \
                   dtm.publish_many('t', ARRAY['{\"ö\": \"ß\"}']::jsonb[], ARRAY['Zürich'], \
                               ARRAY['{\"x-ort\": \"Köln\", \"ce-subject\": \"ä\"}']::jsonb[])";
        client.execute(sql, &[]).await.expect("publish");
        let mut relay = Relay::start(&cluster.url(&name));
        receiver.wait_for(4).await;
        assert!(relay.terminate().await.success());
        let (messages, events): (Vec<_>, Vec<_>) =
            receiver.received().into_iter().partition(|request| request.target.contains("gid=Z%C3%BCrich"));
        let body = String::from_utf8(messages[0].body.to_vec()).expect("UTF-8");
        assert!(messages.len() == 1 && body.starts_with("{\"ö\": [\"ß\", 1000"), "{encoding}: {body}");
        for request in events {
            assert_eq!(request.header("ce-partitionkey"), "Z%C3%BCrich", "{encoding}");
            assert_eq!(request.header("ce-subject"), "%C3%A4", "{encoding}");
            let tenant = request.headers.get("x-ort").expect("x-ort").as_bytes();
            assert_eq!(tenant, "Köln".as_bytes(), "{encoding}");
            assert_eq!(request.body, "{\"ö\": \"ß\"}".as_bytes(), "{encoding}");
        }
        // And in the view, as the database's own text.
        let sql = "SELECT count(*) FROM dtm.events \
                   WHERE (key, payload, headers) = ('Zürich', '{\"ö\": \"ß\"}', '{\"x-ort\": \"Köln\", \"ce-subject\": \"ä\"}')";
        assert_eq!(client.query_one(sql, &[]).await.expect("events").get::<_, i64>(0), 3, "{encoding}");
        let sql = "SELECT dtm.publish_bytes('t', '\\x22e282ac22', 'application/json')";
        client.execute(sql, &[]).await.expect("publish");
        let sql = "SELECT count(*), count(payload) FROM dtm.events WHERE topic = 't'";
        let row = client.query_one(sql, &[]).await.expect("a euro sign does not spoil the view");
        let shown = if encoding == "LATIN1" { 3 } else { 4 };
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (4, shown), "{encoding}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_the_database_has_no_characters_for_is_kept_without_them_and_holds_up_nobody() {
    let cluster = Cluster::builder().start().await;
    for encoding in ["SQL_ASCII", "LATIN1", "UTF8"] {
        let (name, client) = database(&cluster, encoding).await;
        let receiver = Receiver::start_with(|r| match &*r.body {
            b"1" => Reply::Body(422, "costs 5 €".into()),
            _ => Reply::status(200),
        })
        .await;
        client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
        let sql = "SELECT dtm.publish('t', to_jsonb(n % 2)) FROM generate_series(1, 6) n";
        client.execute(sql, &[]).await.expect("publish");
        let mut relay = Relay::start(&cluster.url(&name));
        let sql = "SELECT count(*) FROM dtm.dead_letters WHERE history -> -1 ->> 'body' LIKE 'costs 5 _'";
        let dead = process::eventually(Duration::from_secs(30), || async {
            // Somebody else's success tells whose fault it is.
            client.execute("SELECT dtm.publish('t', '0')", &[]).await.expect("publish");
            let dead: i64 = client.query_one(sql, &[]).await.expect("dead letters").get(0);
            (dead == 3).then_some(())
        });
        assert!(dead.await.is_some(), "{encoding}: {}", relay.log());
        assert!(relay.terminate().await.success());
    }
}

#[tokio::test]
async fn what_has_no_utf8_is_refused_when_it_is_published() {
    let cluster = Cluster::builder().start().await;
    let (_, client) = database(&cluster, "SQL_ASCII").await;
    for (arguments, what) in [
        ("'t', '1', key => E'\\xff'", "key"),
        ("'t', '1', headers => jsonb_build_object('x', E'\\xff')", "headers"),
        ("'t', to_jsonb(E'\\xff'::text)", "payload"),
        ("'t', '1', key => E'\\xff', deliver_at => now() + interval '1 h'", "key"),
    ] {
        let error = client.batch_execute(&format!("SELECT dtm.publish({arguments})")).await;
        let error = error.expect_err(arguments);
        let error = error.as_db_error().expect("an error of the database");
        assert_eq!(error.code().code(), "22021", "{arguments}: {error:?}");
        assert!(error.message().contains(what), "{arguments}: {error:?}");
        assert!(error.detail().is_some() && error.hint().is_some(), "{arguments}: {error:?}");
    }
    let sql = "SELECT (SELECT count(*) FROM dtm.log) + (SELECT count(*) FROM dtm.delayed)";
    assert_eq!(client.query_one(sql, &[]).await.expect("counts").get::<_, i64>(0), 0);
    client.batch_execute("SELECT dtm.publish('t', '1', key => 'k')").await.expect("the session goes on");
    // In LATIN1 every byte is a character: 1,024 of them are a key of 2,048 bytes on the wire.
    let (_, client) = database(&cluster, "LATIN1").await;
    let error = client.batch_execute("SELECT dtm.publish('t', '1', key => repeat('ü', 1024))").await;
    let error = error.expect_err("a key of 2,048 bytes");
    assert_eq!(error.code().map(|code| code.code()), Some("54000"));
    // A refusal that shows what it was given is a text of the database, too.
    let error =
        client.batch_execute("SELECT dtm.publish('größe', '1')").await.expect_err("a malformed topic");
    assert_eq!(error.code().map(|code| code.code()), Some("22023"));
}
