// SPDX-License-Identifier: PostgreSQL
//! A library that meets tables of another version says so, and does not touch them.

use dtm_tests::cluster::Cluster;

#[tokio::test]
async fn tables_of_another_version_are_refused_with_a_hint_and_the_server_stays_up() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let pid = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("pid").get::<_, i32>(0);
    let publish =
        "SELECT dtm.publish('t', '1', id => gen_random_uuid(), deliver_at => now() + interval '1 h')";
    let page = "SELECT dtm.relay_page(dtm.start_of_era(1), dtm.start_of_era(1), 0, ARRAY['t'], NULL, 1, 1)";
    for (table, call) in [
        ("given_ids", publish),
        ("log_1", publish),
        ("delayed", publish),
        ("installation", publish),
        ("log_3", page),
    ] {
        client.batch_execute(call).await.expect("the versions match");
        for change in ["ADD COLUMN x int", "ADD COLUMN x int, ADD COLUMN y text DEFAULT 'y'"] {
            client.batch_execute("BEGIN").await.expect("BEGIN");
            client.batch_execute(&format!("ALTER TABLE dtm.{table} {change}")).await.expect("a column");
            let error = client.batch_execute(call).await.expect_err(table);
            let error = error.as_db_error().expect("an error of the database");
            assert_eq!(error.code().code(), "55000", "{table}: {error:?}");
            assert!(error.message().contains("different versions"), "{table}: {error:?}");
            assert!(error.detail().is_some_and(|detail| detail.contains(table)), "{error:?}");
            assert!(error.hint().is_some_and(|hint| hint.contains("ALTER EXTENSION")), "{error:?}");
            client.batch_execute("ROLLBACK").await.expect("ROLLBACK");
        }
        client.batch_execute(call).await.expect("the versions match again");
    }
    let same = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("pid").get::<_, i32>(0);
    assert_eq!(pid, same);
}
