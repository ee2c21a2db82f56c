// SPDX-License-Identifier: PostgreSQL
//! DTM's own table, where there is one before the extension: it is taken over with what is in it, and nobody who had it can make
//! the extension's functions run their code.

use std::process::Command;

use dtm_tests::cluster::{Cluster, bin_dir};
use dtm_tests::process;
use tokio_postgres::Client;

/// As DTM's documentation has it.
const DTM: &str = "
    CREATE SCHEMA dtm_barrier;
    CREATE SEQUENCE dtm_barrier.barrier_seq;
    CREATE TABLE dtm_barrier.barrier (
        id bigint NOT NULL DEFAULT NEXTVAL('dtm_barrier.barrier_seq'),
        trans_type varchar(45) DEFAULT '', gid varchar(128) DEFAULT '', branch_id varchar(128) DEFAULT '',
        op varchar(45) DEFAULT '', barrier_id varchar(45) DEFAULT '', reason varchar(45) DEFAULT '',
        create_time timestamp(0) with time zone DEFAULT NULL, update_time timestamp(0) with time zone DEFAULT NULL,
        PRIMARY KEY (id), CONSTRAINT uniq_barrier UNIQUE (gid, branch_id, op, barrier_id));";

/// What DTM's clients write.
const WRITE: &str = "INSERT INTO dtm_barrier.barrier (trans_type, gid, branch_id, op, barrier_id, reason)
    VALUES ('tcc', 'g', '01', 'try', '01', 'try') ON CONFLICT ON CONSTRAINT uniq_barrier DO NOTHING";

/// How often the extension's barrier says that the same is new.
const CALL: &str = "SELECT count(*) FROM (SELECT dtm.barrier('tcc', 'g', '01', 'try') AS new) c WHERE new";

async fn code(client: &Client, sql: &str) -> String {
    match client.batch_execute(sql).await {
        Ok(()) => "done".to_owned(),
        Err(error) => error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()),
    }
}

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.expect("a number").get(0)
}

/// A database without the extension whose role `svc` may make schemas, and that role.
async fn database_of_svc(cluster: &Cluster, name: &str) -> (Client, Client) {
    let admin = cluster.connect("postgres").await;
    admin.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("CREATE DATABASE");
    let admin = cluster.connect(name).await;
    admin.batch_execute(&format!("GRANT CREATE ON DATABASE {name} TO svc")).await.expect("GRANT");
    let svc = cluster.connect_as("svc", name).await;
    (admin, svc)
}

async fn cluster_with_svc() -> Cluster {
    let cluster = Cluster::builder().start().await;
    let admin = cluster.connect("postgres").await;
    admin.batch_execute("CREATE ROLE svc LOGIN; CREATE ROLE other LOGIN").await.expect("roles");
    cluster
}

#[tokio::test]
async fn dtms_table_is_taken_over_and_its_owner_goes_on_writing_and_can_change_nothing() {
    let cluster = cluster_with_svc().await;
    let (admin, svc) = database_of_svc(&cluster, "shop").await;
    svc.batch_execute(DTM).await.expect("DTM's table");
    svc.batch_execute("GRANT ALL ON dtm_barrier.barrier TO other WITH GRANT OPTION").await.expect("GRANT");
    let limits = "GRANT ALL ON dtm_barrier.barrier_seq TO other; ALTER TABLE dtm_barrier.barrier ALTER id DROP DEFAULT;
                  ALTER SEQUENCE dtm_barrier.barrier_seq MAXVALUE 3 CYCLE";
    svc.batch_execute(WRITE).await.expect("a row");
    svc.batch_execute(limits).await.expect("a sequence that comes round");
    admin.batch_execute("CREATE EXTENSION pg_dtm").await.expect("CREATE EXTENSION");
    assert_eq!(count(&admin, CALL).await, 0, "the row counts");
    svc.batch_execute(&WRITE.replace("'01', 'try', '01'", "'02', 'try', '01'"))
        .await
        .expect("a client of DTM's writes");
    assert_eq!(count(&svc, "SELECT count(*) FROM dtm_barrier.barrier").await, 2);
    let many =
        "SELECT count(*) FROM generate_series(1, 5) n WHERE dtm.barrier('tcc', 'many', n::text, 'try')";
    assert_eq!(count(&admin, many).await, 5);
    let other = cluster.connect_as("other", "shop").await;
    assert_eq!(code(&other, "SELECT setval('dtm_barrier.barrier_seq', 1)").await, "42501");
    for client in [&svc, &other] {
        for sql in [
            "CREATE TRIGGER t BEFORE INSERT ON dtm_barrier.barrier EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "ALTER TABLE dtm_barrier.barrier ADD CHECK (true)",
            "ALTER SCHEMA dtm_barrier RENAME TO elsewhere",
            "DROP SCHEMA dtm_barrier CASCADE",
            "DROP TABLE dtm_barrier.barrier",
            "TRUNCATE dtm_barrier.barrier",
        ] {
            assert_eq!(code(client, sql).await, "42501", "{sql}");
        }
    }
}

#[tokio::test]
async fn a_table_that_could_run_somebody_elses_code_is_refused() {
    let cluster = cluster_with_svc().await;
    let function = "CREATE SCHEMA mine; CREATE FUNCTION mine.f() RETURNS varchar LANGUAGE plpgsql AS $$ BEGIN
                    RAISE EXCEPTION 'as %', current_user; END $$;
                    CREATE FUNCTION mine.t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'";
    let additions = [
        "CREATE TRIGGER t BEFORE INSERT ON dtm_barrier.barrier FOR EACH ROW EXECUTE FUNCTION mine.t()",
        "CREATE RULE r AS ON INSERT TO dtm_barrier.barrier DO ALSO SELECT mine.f()",
        "CREATE POLICY p ON dtm_barrier.barrier USING (mine.f() IS NULL)",
        "ALTER TABLE dtm_barrier.barrier ENABLE ROW LEVEL SECURITY",
        "CREATE TABLE mine.child () INHERITS (dtm_barrier.barrier)",
        "ALTER TABLE dtm_barrier.barrier ALTER reason SET DEFAULT mine.f()",
        "ALTER TABLE dtm_barrier.barrier ALTER create_time SET DEFAULT clock_timestamp()",
        "ALTER TABLE dtm_barrier.barrier ADD CHECK (mine.f() IS NULL)",
        "ALTER TABLE dtm_barrier.barrier ADD EXCLUDE (gid WITH =)",
        "CREATE INDEX i ON dtm_barrier.barrier (upper(gid))",
        "CREATE INDEX i ON dtm_barrier.barrier (op) WHERE op = 'x'",
        "CREATE INDEX i ON dtm_barrier.barrier (op)",
        "CREATE STATISTICS mine.s ON gid, op FROM dtm_barrier.barrier",
        "CREATE TABLE mine.refers (id bigint REFERENCES dtm_barrier.barrier)",
        "GRANT REFERENCES (id) ON dtm_barrier.barrier TO other",
        "ALTER TABLE dtm_barrier.barrier ADD COLUMN more text",
        "ALTER TABLE dtm_barrier.barrier ADD COLUMN more text GENERATED ALWAYS AS (gid) STORED",
        "ALTER TABLE dtm_barrier.barrier ALTER gid TYPE text",
        "ALTER TABLE dtm_barrier.barrier DROP CONSTRAINT uniq_barrier",
        "CREATE UNIQUE INDEX barrier_create_time ON dtm_barrier.barrier (create_time)",
        "ALTER TABLE dtm_barrier.barrier ALTER gid TYPE varchar(128) COLLATE \"C\"",
        "ALTER TABLE dtm_barrier.barrier SET UNLOGGED",
        "DROP TABLE dtm_barrier.barrier; CREATE VIEW dtm_barrier.barrier AS SELECT mine.f()",
        "ALTER TABLE dtm_barrier.barrier ALTER id DROP DEFAULT; DROP SEQUENCE dtm_barrier.barrier_seq",
    ];
    let (admin, svc) = database_of_svc(&cluster, "shop").await;
    svc.batch_execute(function).await.expect("functions");
    for addition in additions {
        svc.batch_execute(&format!("{DTM} {addition}")).await.expect(addition);
        assert_eq!(code(&admin, "CREATE EXTENSION pg_dtm").await, "55000", "{addition}");
        let left = "SELECT count(*) FROM pg_namespace WHERE nspname = 'dtm' OR nspname = 'dtm_barrier' AND nspowner <> 'svc'::regrole";
        assert_eq!(count(&admin, left).await, 0, "nothing half done: {addition}");
        svc.batch_execute("DROP SCHEMA dtm_barrier CASCADE; DROP TABLE IF EXISTS mine.refers")
            .await
            .expect("DROP");
    }
    svc.batch_execute(DTM).await.expect("DTM's table");
    assert_eq!(code(&admin, "CREATE EXTENSION pg_dtm").await, "done", "without any of these");
}

#[tokio::test]
async fn a_dump_has_the_barriers_whoever_made_the_table_and_detached_it_outlives_the_extension() {
    let cluster = cluster_with_svc().await;
    let (admin, svc) = database_of_svc(&cluster, "adopted").await;
    svc.batch_execute(DTM).await.expect("DTM's table");
    admin.batch_execute("CREATE EXTENSION pg_dtm").await.expect("CREATE EXTENSION");
    cluster.create_database("made").await;
    let made = cluster.connect("made").await;
    for (name, client) in [("adopted", &admin), ("made", &made)] {
        client.batch_execute(WRITE).await.expect("a row");
        let dump = process::run(Command::new(bin_dir().join("pg_dump")).args(["-d", &cluster.url(name)]));
        let restored = format!("{name}_restored");
        admin.batch_execute(&format!("CREATE DATABASE {restored}")).await.expect("CREATE DATABASE");
        cluster.psql(&restored, &dump);
        let restored = cluster.connect(&restored).await;
        assert_eq!(count(&restored, CALL).await, 0, "{name}");
        assert_eq!(count(&restored, &CALL.replace("'g'", "'h'")).await, 1, "the sequence goes on: {name}");
    }
    let detach = "ALTER EXTENSION pg_dtm DROP TABLE dtm_barrier.barrier;
                  ALTER EXTENSION pg_dtm DROP SEQUENCE dtm_barrier.barrier_seq;
                  ALTER EXTENSION pg_dtm DROP SCHEMA dtm_barrier;
                  DROP EXTENSION pg_dtm";
    for client in [&admin, &made] {
        assert_eq!(count(client, CALL).await, 0);
        client.batch_execute(detach).await.expect("detach");
        assert_eq!(count(client, "SELECT count(*) FROM dtm_barrier.barrier").await, 1);
        client.batch_execute("CREATE EXTENSION pg_dtm").await.expect("CREATE EXTENSION again");
        assert_eq!(count(client, CALL).await, 0, "also in a session that called it before");
        client
            .batch_execute("DROP EXTENSION pg_dtm; CREATE EXTENSION pg_dtm")
            .await
            .expect("a table of its own");
        assert_eq!(count(client, CALL).await, 1, "also in a session that knew another table");
    }
}
