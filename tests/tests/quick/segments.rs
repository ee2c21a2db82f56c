// SPDX-License-Identifier: PostgreSQL
//! The rings of segments: who writes and who reads goes on while another segment becomes the current one.

use dtm_tests::cluster::Cluster;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

async fn switch(client: &Client, log: i32, control: i32) {
    let sql = format!(
        "UPDATE dtm.installation SET log_segment = {log}, control_segment = {control}; SELECT dtm.installation_changed()"
    );
    client.batch_execute(&sql).await.expect("a switch");
}

async fn publish(client: &Client, n: i32) {
    let sql = "SELECT dtm.publish('t', to_jsonb($1::int), key => 'k')";
    client.execute(sql, &[&n]).await.expect("publish");
}

async fn rows(client: &Client, table: &str) -> i64 {
    client.query_one(&format!("SELECT count(*) FROM dtm.{table}"), &[]).await.expect(table).get(0)
}

#[tokio::test]
async fn a_publisher_hears_of_a_switch_while_its_transaction_is_open_and_keeps_the_segment_that_it_has_locked()
 {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let (admin, writer) = (cluster.connect("shop").await, cluster.connect("shop").await);
    publish(&writer, 1).await;
    for (n, segment) in [(2, 2), (4, 3), (6, 1)] {
        writer.batch_execute("BEGIN").await.expect("BEGIN");
        writer.batch_execute("SELECT pg_current_xact_id()").await.expect("an id");
        switch(&admin, segment, 1).await;
        publish(&writer, n).await;
        // Whoever would empty this segment waits for the transaction.
        switch(&admin, segment % 3 + 1, 1).await;
        publish(&writer, n + 1).await;
        writer.batch_execute("COMMIT").await.expect("COMMIT");
    }
    for (segment, expected) in [(1, "1 6 7"), (2, "2 3"), (3, "4 5")] {
        let sql = format!(
            "SELECT string_agg(convert_from(payload, 'UTF8'), ' ' ORDER BY seq) FROM dtm.log_{segment}"
        );
        let found: String = admin.query_one(&sql, &[]).await.expect("a segment").get(0);
        assert_eq!(found, expected, "dtm.log_{segment}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_delivers_across_switches_and_over_a_restart_each_event_once_and_in_order() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&cluster.url("shop"));
    let mut n = 0;
    for round in 0..8 {
        switch(&client, round % 3 + 1, round % 2 + 1).await;
        for _ in 0..20 {
            n += 1;
            publish(&client, n).await;
        }
        receiver.wait_for(usize::try_from(n).expect("a count") - 5).await;
        if round % 3 == 1 {
            // Its cursor stands in the segment that is left with the next switch, and so does the lease that it takes anew:
            // it has it once something arrives.
            assert!(relay.terminate().await.success());
            relay.restart();
            n += 1;
            publish(&client, n).await;
            receiver.wait_for(usize::try_from(n).expect("a count")).await;
        }
    }
    receiver.wait_for(usize::try_from(n).expect("a count")).await;
    assert!(relay.terminate().await.success());
    let found: Vec<_> = receiver.received().iter().map(|request| request.body.clone()).collect();
    let expected: Vec<_> = (1..=n).map(|n: i32| n.to_string()).collect();
    assert_eq!(found, expected);
    for table in
        ["log_1", "log_2", "log_3", "cursor_log_2", "position_log_2", "lease_log_2", "heartbeat_log_2"]
    {
        assert!(rows(&client, table).await > 0, "dtm.{table} was never written");
    }
}
