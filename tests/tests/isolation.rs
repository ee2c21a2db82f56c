// SPDX-License-Identifier: PostgreSQL
//! Runs PostgreSQL's isolationtester over `tests/isolation/specs` and holds what it prints against `expected`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dtm_tests::cluster::Cluster;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("isolation")
}

fn tester() -> PathBuf {
    let path = std::env::var_os("DTM_ISOLATIONTESTER")
        .expect("DTM_ISOLATIONTESTER is not set: run this by cargo xtask");
    PathBuf::from(path)
}

fn run(cluster: &Cluster, database: &str, spec: &Path) -> String {
    let spec = std::fs::File::open(spec).expect("a spec");
    let mut command = Command::new(tester());
    command.arg(cluster.url(database)).stdin(spec).stderr(Stdio::piped());
    let output = command.output().expect("isolationtester");
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test]
async fn every_named_race_ends_as_expected() {
    let cluster = Cluster::builder().config("max_prepared_transactions", "10").start().await;
    let admin = cluster.connect("postgres").await;
    let reader = std::fs::read_to_string(folder().join("reader.sql")).expect("reader.sql");
    let mut specs: Vec<PathBuf> = std::fs::read_dir(folder().join("specs"))
        .expect("specs")
        .map(|entry| entry.expect("a spec").path())
        .collect();
    specs.sort();
    let mut wrong = Vec::new();
    for spec in &specs {
        let name = spec.file_stem().expect("a name").to_string_lossy().into_owned();
        let database = format!("iso_{}", name.replace('-', "_"));
        admin.batch_execute(&format!("CREATE DATABASE {database}")).await.expect("CREATE DATABASE");
        cluster.psql(&database, &reader);
        let found = run(&cluster, &database, spec);
        let expected =
            std::fs::read_to_string(folder().join(format!("expected/{name}.out"))).unwrap_or_default();
        if found != expected {
            wrong.push(format!("--- {name}: found\n{found}\n--- {name}: expected\n{expected}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(specs.len() >= 10, "specs are missing");
}
