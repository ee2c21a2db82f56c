// SPDX-License-Identifier: PostgreSQL
//! Reading as a relay does, without one.

use bytes::Bytes;
use dtm_core::page::Page;
use tokio_postgres::Client;

/// The payloads of a window that match, as text, in the order of the log.
pub async fn window(client: &Client, from: &str, to: &str, after: i64, topics: &[String]) -> Vec<String> {
    let (mut after, mut payloads) = (after, Vec::new());
    loop {
        let sql = "SELECT dtm.relay_page($1, $2, $3, $4, (SELECT NULL::timestamptz), 2, 1000000)";
        let row = client.query_one(sql, &[&from, &to, &after, &topics]).await.expect("a page");
        let page = Page::decode(Bytes::from(row.get::<_, Vec<u8>>(0))).expect("a page");
        let text =
            |payload: Option<Bytes>| String::from_utf8(payload.unwrap_or_default().into()).expect("UTF-8");
        payloads.extend(page.events.into_iter().map(|event| text(event.payload)));
        after = page.scanned;
        if page.done {
            return payloads;
        }
    }
}

/// What a subscription would be sent: from its stored cursor to the head. Its cursor stays.
pub async fn pending(client: &Client, subscription: &str) -> Vec<String> {
    let sql = "SELECT c.\"position\", c.target, c.acked, s.topics, dtm.relay_poll(NULL) \
               FROM dtm.subscription s, dtm.relay_cursor(s.id, 0, s.epoch) c WHERE s.name = $1";
    let row = client.query_one(sql, &[&subscription]).await.expect("a cursor");
    let (position, target, acked): (String, Option<String>, i64) = (row.get(0), row.get(1), row.get(2));
    let (topics, head): (Vec<String>, String) = (row.get(3), row.get(4));
    match target {
        Some(target) => {
            let mut payloads = window(client, &position, &target, acked, &topics).await;
            payloads.extend(window(client, &target, &head, 0, &topics).await);
            payloads
        }
        None => window(client, &position, &head, 0, &topics).await,
    }
}

/// Moves every cursor to the head of the log.
pub async fn deliver_everything(client: &Client) {
    let lease = "SELECT count(*) FROM dtm.relay_assign('00000000-0000-0000-0000-0000000000cc', 'test', 60)";
    client.execute(lease, &[]).await.expect("leases");
    let save = "SELECT dtm.relay_move(ARRAY[dtm.relay_poll(NULL)], array_agg(s.id), array_agg(o.shard), array_agg(s.epoch), \
                array_agg(o.token), array_agg(-1::bigint), array_agg(NULL::bigint), array_agg(0::bigint)) \
                FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id";
    client.execute(save, &[]).await.expect("cursors");
}
