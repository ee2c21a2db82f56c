// SPDX-License-Identifier: PostgreSQL
//! What a database answers, now or in the end.

use dtm_tests::process;
use tokio_postgres::Client;

use crate::numbered::DEADLINE;

/// What a query answers, which is one number.
pub async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.expect(sql).get(0)
}

/// Waits until what a query answers satisfies a condition.
pub async fn wait(client: &Client, sql: &str, holds: impl Fn(i64) -> bool) {
    let found = process::eventually(DEADLINE, || async { holds(number(client, sql).await).then_some(()) });
    assert!(found.await.is_some(), "{sql}: {}", number(client, sql).await);
}
