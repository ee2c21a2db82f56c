// SPDX-License-Identifier: PostgreSQL
//! The receiving side's inbox: the work is done once.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::process::eventually;
use tokio_postgres::Client;
use uuid::Uuid;

async fn receive(client: &Client, consumer: &str, id: Uuid) -> bool {
    client.query_one("SELECT dtm.receive($1, $2)", &[&consumer, &id]).await.expect("receive").get(0)
}

#[tokio::test]
async fn the_first_to_commit_does_the_work_and_nobody_else() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let (first, second) = (cluster.connect("shop").await, cluster.connect("shop").await);
    let id = Uuid::now_v7();
    first.batch_execute("BEGIN").await.expect("BEGIN");
    assert!(receive(&first, "billing", id).await);
    assert!(!receive(&first, "billing", id).await, "also within the transaction");
    assert!(receive(&second, "audit", id).await, "another consumer has its own work");
    first.batch_execute("ROLLBACK").await.expect("ROLLBACK");
    assert!(receive(&first, "billing", id).await, "what was rolled back was not done");
    assert!(!receive(&second, "billing", id).await);

    // At the same time: the second waits for what becomes of the first.
    for commit in [true, false] {
        let id = Uuid::now_v7();
        first.batch_execute("BEGIN").await.expect("BEGIN");
        assert!(receive(&first, "billing", id).await);
        let waiting = cluster.connect("shop").await;
        let waiting = tokio::spawn(async move { receive(&waiting, "billing", id).await });
        let blocked =
            "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%receive%'";
        let waits = eventually(Duration::from_secs(20), || async {
            second.query_opt(blocked, &[]).await.expect("pg_stat_activity")
        });
        assert!(waits.await.is_some());
        first.batch_execute(if commit { "COMMIT" } else { "ROLLBACK" }).await.expect("its end");
        assert_eq!(waiting.await.expect("the other"), !commit);
    }
}

#[tokio::test]
async fn receipts_are_purged_by_age_and_no_sooner() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    for _ in 0..5 {
        receive(&client, "billing", Uuid::now_v7()).await;
    }
    client
        .batch_execute(
            "UPDATE dtm.receipts SET received_at = received_at - interval '31 days' \
                          WHERE id IN (SELECT id FROM dtm.receipts ORDER BY id LIMIT 3)",
        )
        .await
        .expect("age");
    let two: i64 = client.query_one("SELECT dtm.purge(2)", &[]).await.expect("purge").get(0);
    let rest: i64 = client.query_one("SELECT dtm.purge()", &[]).await.expect("purge").get(0);
    let none: i64 = client.query_one("SELECT dtm.purge()", &[]).await.expect("purge").get(0);
    assert_eq!((two, rest, none), (2, 1, 0));
    let left: i64 = client.query_one("SELECT count(*) FROM dtm.receipts", &[]).await.expect("count").get(0);
    assert_eq!(left, 2);
}
