// SPDX-License-Identifier: PostgreSQL
//! Apache Kafka for the tests, the demo and the benchmarks: its programs, fetched by Maven once. Tests start brokers of them
//! in folders of their own; nothing is installed.

use std::path::PathBuf;
use std::process::Command;

use crate::progress::say;
use crate::tree::{is_stamped, make_tree};
use crate::workspace::Workspace;
use crate::{Result, job, packages};

/// The variable that tells a program of the kit where Kafka's programs are.
pub const VARIABLE: &str = "DTM_KAFKA_LIBS";

/// Which version, and what it needs to run.
const POM: &str = include_str!("../kafka/pom.xml");
const COPY: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies";

/// Makes sure of Java and of Kafka's programs. Answers the folder of those.
pub fn prepare(workspace: &Workspace) -> Result<PathBuf> {
    packages::ensure_kafka(workspace)?;
    let _lock = workspace.lock()?;
    let tree = workspace.state.join("kafka");
    if !is_stamped(&tree, POM) {
        say("fetching Apache Kafka");
        make_tree(workspace, &tree, POM, |new| {
            let pom = new.join("pom.xml");
            std::fs::write(&pom, POM).map_err(|e| format!("{}: {e}", pom.display()))?;
            let mut maven = Command::new("mvn");
            maven.args(["-B", "-q", COPY, "-DincludeScope=runtime", "-f"]).arg(&pom);
            maven.arg(format!("-DoutputDirectory={}", new.join("libs").display()));
            job::must(workspace, "maven", &mut maven, false)
        })?;
    }
    Ok(tree.join("libs"))
}
