// SPDX-License-Identifier: PostgreSQL
//! Who events are from: the same from every relay, whatever its role and its session say.

use dtm_tests::cluster::Cluster;
use tokio_postgres::{Client, NoTls};

async fn source(client: &Client) -> String {
    client.query_one("SELECT dtm.source()", &[]).await.expect("dtm.source").get(0)
}

/// Asks as a role whose own setting says otherwise, in a session whose options say otherwise, too.
async fn source_for_a_wilful_relay(cluster: &Cluster, database: &str) -> String {
    let url = format!("{}?options=-c%20dtm.source%3D/options", cluster.url_as("wilful", database));
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("a session");
    tokio::spawn(connection);
    client.batch_execute("SET dtm.source = '/session'").await.expect("SET");
    source(&client).await
}

#[tokio::test]
async fn it_is_what_the_database_says_else_the_server_else_its_name_as_a_uri() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let admin = cluster.connect("shop").await;
    let sql = "CREATE ROLE wilful LOGIN; ALTER ROLE wilful SET dtm.source = '/role'; \
               ALTER ROLE wilful IN DATABASE shop SET dtm.source = '/role-in-database'; \
               GRANT USAGE ON SCHEMA dtm TO wilful; GRANT EXECUTE ON FUNCTION dtm.source TO wilful";
    admin.batch_execute(sql).await.expect("a role");
    assert_eq!(source(&cluster.connect("shop").await).await, "/pg_dtm/shop");
    assert_eq!(source_for_a_wilful_relay(&cluster, "shop").await, "/pg_dtm/shop");

    admin.batch_execute("ALTER SYSTEM SET dtm.source = 'https://server/=1'").await.expect("ALTER SYSTEM");
    admin.batch_execute("SELECT pg_reload_conf()").await.expect("reload");
    let known = dtm_tests::process::eventually(std::time::Duration::from_secs(20), || async {
        (source(&cluster.connect("shop").await).await == "https://server/=1").then_some(())
    });
    assert!(known.await.is_some(), "the server's setting");
    assert_eq!(source_for_a_wilful_relay(&cluster, "shop").await, "https://server/=1");

    admin.batch_execute("ALTER DATABASE shop SET dtm.source = '/shop?a=b'").await.expect("ALTER DATABASE");
    assert_eq!(source(&cluster.connect("shop").await).await, "/shop?a=b");
    assert_eq!(source_for_a_wilful_relay(&cluster, "shop").await, "/shop?a=b");

    admin.batch_execute("ALTER DATABASE shop SET dtm.source = ''").await.expect("ALTER DATABASE");
    assert_eq!(source(&cluster.connect("shop").await).await, "/pg_dtm/shop", "empty: the default");
}

#[tokio::test]
async fn a_name_that_is_no_uri_is_percent_encoded() {
    let cluster = Cluster::builder().start().await;
    let admin = cluster.connect("postgres").await;
    admin.batch_execute("CREATE DATABASE \"My größe/1%?~_.-\"").await.expect("CREATE DATABASE");
    let client = cluster.connect("My%20gr%C3%B6%C3%9Fe%2F1%25%3F~_.-").await;
    client.batch_execute("CREATE EXTENSION pg_dtm").await.expect("CREATE EXTENSION");
    assert_eq!(source(&client).await, "/pg_dtm/My%20gr%C3%B6%C3%9Fe%2F1%25%3F~_.-");
}
