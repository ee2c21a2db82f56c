// SPDX-License-Identifier: PostgreSQL
//! An upgraded database equals a fresh one, and what was not delivered before is delivered after.

use std::collections::BTreeSet;

use dtm_tests::cluster::Cluster;
use tokio_postgres::Client;

use crate::reading::pending;

/// Everything that makes a version of the extension, a line each, by name.
const CATALOG: &str = "
    SELECT format('column %s %s %s %s %s %s', c.oid::regclass, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
                  a.attnotnull, pg_get_expr(d.adbin, d.adrelid))
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'dtm'::regnamespace AND c.relkind IN ('r', 'v', 'S')
    UNION ALL
    SELECT format('relation %s %s %s %s %s %s', c.oid::regclass, c.relkind, a.amname, c.reloptions, c.relacl,
                  obj_description(c.oid, 'pg_class'))
    FROM pg_class c LEFT JOIN pg_am a ON a.oid = c.relam WHERE c.relnamespace = 'dtm'::regnamespace
    UNION ALL
    SELECT format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE connamespace = 'dtm'::regnamespace
    UNION ALL
    SELECT format('index %s', pg_get_indexdef(i.indexrelid))
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = 'dtm'::regnamespace
    UNION ALL
    SELECT format('view %s %s', oid::regclass, pg_get_viewdef(oid))
    FROM pg_class WHERE relnamespace = 'dtm'::regnamespace AND relkind = 'v'
    UNION ALL
    SELECT format('sequence %s %s %s %s %s', seqrelid::regclass, seqtypid::regtype, seqincrement, seqcache, seqcycle)
    FROM pg_sequence JOIN pg_class c ON c.oid = seqrelid WHERE c.relnamespace = 'dtm'::regnamespace
    UNION ALL
    SELECT format('function %s %s %s %s', oid::regprocedure, pg_get_functiondef(oid), proacl, obj_description(oid, 'pg_proc'))
    FROM pg_proc WHERE pronamespace = 'dtm'::regnamespace
    UNION ALL
    SELECT format('member %s', pg_describe_object(d.classid, d.objid, d.objsubid))
    FROM pg_depend d JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
    WHERE e.extname = 'pg_dtm' AND d.deptype = 'e'
    UNION ALL
    SELECT format('dumped %s %s', dumped.relation::regclass, dumped.condition)
    FROM pg_extension e, unnest(e.extconfig, e.extcondition) AS dumped (relation, condition) WHERE e.extname = 'pg_dtm'
    UNION ALL
    SELECT format('version %s', extversion) FROM pg_extension WHERE extname = 'pg_dtm'";

async fn catalog(client: &Client) -> BTreeSet<String> {
    client.query(CATALOG, &[]).await.expect("the catalog").iter().map(|row| row.get(0)).collect()
}

async fn old_and_fresh() -> (Cluster, Client, Client) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("fresh").await;
    cluster.connect("postgres").await.batch_execute("CREATE DATABASE old").await.expect("a database");
    let old = cluster.connect("old").await;
    old.batch_execute("CREATE EXTENSION pg_dtm VERSION '0.1'").await.expect("version 0.1");
    let fresh = cluster.connect("fresh").await;
    (cluster, old, fresh)
}

#[tokio::test]
async fn an_upgraded_database_equals_a_fresh_one() {
    let (_cluster, old, fresh) = old_and_fresh().await;
    let sql = "SELECT dtm.subscribe('s', 't', 'http://127.0.0.1:9/'); \
               SELECT dtm.publish('t', '1'); SELECT dtm.publish('t', '2', key => 'k')";
    old.batch_execute(sql).await.expect("work with 0.1");
    old.batch_execute("ALTER EXTENSION pg_dtm UPDATE").await.expect("the upgrade");
    let (upgraded, fresh) = (catalog(&old).await, catalog(&fresh).await);
    assert!(fresh.len() > 400, "the catalog is read: {}", fresh.len());
    let missing: Vec<_> = fresh.difference(&upgraded).collect();
    let extra: Vec<_> = upgraded.difference(&fresh).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing: {missing:#?}\nnot in a fresh one: {extra:#?}");
}

#[tokio::test]
async fn what_was_not_delivered_before_is_delivered_after() {
    let (_cluster, old, _fresh) = old_and_fresh().await;
    old.batch_execute("SELECT dtm.publish('t', '0')").await.expect("publish");
    let sql = "SELECT dtm.subscribe('s', 't', 'http://127.0.0.1:9/'); \
               SELECT dtm.publish('t', '1'); SELECT dtm.publish('t', '2', key => 'k')";
    old.batch_execute(sql).await.expect("work with 0.1");
    old.batch_execute("ALTER EXTENSION pg_dtm UPDATE").await.expect("the upgrade");
    assert_eq!(pending(&old, "s").await, ["1", "2"]);
    let sql = "SELECT a.name, a.shards, a.revision, c.ahead IS NULL, c.acked \
               FROM dtm.relay_assign('00000000-0000-0000-0000-0000000000cc', 'test', 60) a, \
                    dtm.relay_resume(a.subscription, a.shard, a.epoch) c";
    let row = old.query_one(sql, &[]).await.expect("its only unit");
    let found: (&str, i32, i64, bool, i64) = (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
    assert_eq!(found, ("s", 1, 0, true, 0));
    let sql = "SELECT retrying, dead, shards, lag_events FROM dtm.subscriptions";
    let row = old.query_one(sql, &[]).await.expect("the view");
    let found: (i64, i64, i32, i64) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(found, (0, 0, 1, 2));
}
