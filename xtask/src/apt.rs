// SPDX-License-Identifier: PostgreSQL
//! Installing packages as root without touching anybody's servers: none is restarted, created or left running.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::progress::say;
use crate::workspace::{Workspace, command_ok, command_output, make_dir};
use crate::{Result, job};

const POLICY: &str = "/usr/sbin/policy-rc.d";
const CLUSTER_SETTINGS: &str = "/etc/postgresql-common/createcluster.d";

/// Installs the packages named. Refuses where that would restart a running cluster.
pub fn install(workspace: &Workspace, missing: &[&str]) -> Result<()> {
    say(&format!("installing {}", missing.join(", ")));
    job::must(workspace, "apt-update", apt_get().arg("update"), false)?;
    let plan =
        command_output(apt_get().args(["-s", "install", "-y", "--no-install-recommends"]).args(missing))?;
    let listed = command_output(Command::new("pg_lsclusters").arg("-h")).unwrap_or_default();
    if let Some((cluster, package)) = restarted(&upgraded(&plan), &online(&listed)) {
        return Err(format!(
            "installing packages would upgrade {package} and restart the running cluster {cluster}; \
             when that suits you, run: {}",
            by_hand(missing)
        ));
    }
    let _quiet = QuietServices::begin()?;
    if missing.iter().any(|name| name.starts_with("postgresql-15")) {
        // By itself first: its settings say whether the server's package makes a cluster.
        get(workspace, "apt-common", &["postgresql-common"])?;
        let _no_cluster = NoCluster::begin()?;
        get(workspace, "apt-install", missing)?;
    } else {
        get(workspace, "apt-install", missing)?;
    }
    if missing.contains(&"pgbouncer") {
        // The tests start their own: the system's is not to start at boot because of us.
        command_ok(Command::new("update-rc.d").args(["pgbouncer", "disable"]))?;
    }
    Ok(())
}

/// The command for a person to copy.
pub fn by_hand(packages: &[&str]) -> String {
    format!("sudo apt-get install -y --no-install-recommends {}", packages.join(" "))
}

fn get(workspace: &Workspace, log: &str, packages: &[&str]) -> Result<()> {
    job::must(
        workspace,
        log,
        apt_get().args(["install", "-y", "--no-install-recommends"]).args(packages),
        false,
    )
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command
}

/// The packages that a simulated installation replaces: `Inst NAME [OLD] (NEW ...)`; new ones have no `[OLD]`.
fn upgraded(plan: &str) -> Vec<&str> {
    plan.lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split_once(' '))
        .filter(|(_, versions)| versions.starts_with('['))
        .map(|(name, _)| name)
        .collect()
}

/// The running clusters in the list of `pg_lsclusters -h`, as (major, name).
fn online(listed: &str) -> Vec<(&str, &str)> {
    listed
        .lines()
        .filter_map(|line| {
            let mut columns = line.split_whitespace();
            let (major, name, status) = (columns.next()?, columns.next()?, columns.nth(1)?);
            status.starts_with("online").then_some((major, name))
        })
        .collect()
}

/// The first cluster whose server package would be replaced, with that package.
fn restarted(upgraded: &[&str], online: &[(&str, &str)]) -> Option<(String, String)> {
    online.iter().find_map(|(major, name)| {
        let package = format!("postgresql-{major}");
        upgraded.contains(&package.as_str()).then(|| (format!("{major}/{name}"), package))
    })
}

/// While it lives, installing a server's package does not start the server.
struct QuietServices {
    _file: Option<Passing>,
}

impl QuietServices {
    fn begin() -> Result<Self> {
        let path = Path::new(POLICY);
        let ours = fs::read_to_string(path).is_ok_and(|text| text.contains("pg_dtm"));
        if path.exists() && !ours {
            return Ok(Self { _file: None });
        }
        // Says nothing once we are gone, however we went.
        let text = format!(
            "#!/bin/sh\n# pg_dtm is installing packages; this file goes away with that.\n\
             [ -d /proc/{} ] || exit 0\n\
             case \"$*\" in *postgresql*|*pgbouncer*) exit 101;; esac\nexit 0\n",
            std::process::id()
        );
        Ok(Self { _file: Some(Passing::write(path, &text, 0o755)?) })
    }
}

/// While it lives, installing PostgreSQL makes no cluster.
struct NoCluster {
    _file: Passing,
    made_dir: bool,
}

impl NoCluster {
    fn begin() -> Result<Self> {
        let dir = Path::new(CLUSTER_SETTINGS);
        let made_dir = !dir.exists();
        make_dir(dir)?;
        let file = Passing::write(&dir.join("pg_dtm.conf"), "create_main_cluster = false\n", 0o644)?;
        Ok(Self { _file: file, made_dir })
    }
}

impl Drop for NoCluster {
    fn drop(&mut self) {
        self._file.remove();
        if self.made_dir {
            // Stays if somebody has put something there in the meantime.
            let _ = fs::remove_dir(CLUSTER_SETTINGS);
        }
    }
}

/// A file that goes away with its owner.
struct Passing(PathBuf);

impl Passing {
    fn write(path: &Path, text: &str, mode: u32) -> Result<Self> {
        let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
        fs::write(path, text).map_err(failed)?;
        let file = Self(path.to_path_buf());
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
        Ok(file)
    }

    fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("xtask: cannot remove {}: {error}", self.0.display());
        }
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = "\
Reading package lists...
Building dependency tree...
The following NEW packages will be installed:
  postgresql-server-dev-15
The following packages will be upgraded:
  postgresql-15 postgresql-client-15
Inst postgresql-15 [15.18-0+deb12u1] (15.20-0+deb12u1 Debian-Security:12/stable-security [amd64]) []
Inst postgresql-client-15 [15.18-0+deb12u1] (15.20-0+deb12u1 Debian-Security:12/stable-security [amd64])
Inst postgresql-server-dev-15 (15.20-0+deb12u1 Debian-Security:12/stable-security [amd64])
Conf postgresql-15 (15.20-0+deb12u1 Debian-Security:12/stable-security [amd64])
";

    const CLUSTERS: &str = "\
14 main 5431 online           postgres /var/lib/postgresql/14/main /var/log/14.log
15 main 5432 down             postgres /var/lib/postgresql/15/main /var/log/15.log
15 copy 5433 online,recovery  postgres /var/lib/postgresql/15/copy /var/log/15c.log
";

    #[test]
    fn upgrades_are_the_lines_with_an_old_version() {
        assert_eq!(upgraded(PLAN), ["postgresql-15", "postgresql-client-15"]);
        assert!(upgraded("0 upgraded, 0 newly installed\n").is_empty());
    }

    #[test]
    fn running_clusters() {
        assert_eq!(online(CLUSTERS), [("14", "main"), ("15", "copy")]);
        assert!(online("").is_empty());
    }

    #[test]
    fn only_an_upgrade_under_a_running_cluster_is_refused() {
        let running = online(CLUSTERS);
        let refused = Some(("15/copy".to_owned(), "postgresql-15".to_owned()));
        assert_eq!(restarted(&upgraded(PLAN), &running), refused);
        assert_eq!(restarted(&upgraded(PLAN), &[("15", "main")]).map(|r| r.0).as_deref(), Some("15/main"));
        assert_eq!(restarted(&upgraded(PLAN), &[("14", "main")]), None);
        assert_eq!(restarted(&[], &running), None);
    }

    #[test]
    fn a_line_to_copy() {
        assert_eq!(by_hand(&["gcc", "clang"]), "sudo apt-get install -y --no-install-recommends gcc clang");
    }
}
