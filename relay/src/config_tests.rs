// SPDX-License-Identifier: PostgreSQL

use super::*;

/// Loads settings from the text of a file and a URL on the command line.
#[allow(clippy::result_large_err)]
fn load(text: &str, url: Option<&str>) -> Result<Config, String> {
    let mut loaded = Err(String::new());
    figment::Jail::expect_with(|jail| {
        jail.clear_env();
        jail.create_file("relay.toml", text)?;
        let file = Some(PathBuf::from("relay.toml"));
        let overrides = Overrides { file, database_url: url.map(str::to_owned), ..Overrides::default() };
        loaded = Config::load(&overrides).map_err(|error| error.to_string());
        Ok(())
    });
    loaded
}

const DATABASE: &str = "[database.main]\nurl = \"postgres://u@h/d\"\n";

#[test]
fn defaults_are_those_of_the_documentation() {
    let config = load(DATABASE, None).unwrap();
    assert_eq!(config.environment, "default");
    assert_eq!(config.lease, Duration::from_secs(3));
    assert_eq!(config.shutdown, Duration::from_secs(10));
    assert!(config.name.ends_with(&format!(":{}", std::process::id())));
    assert_eq!(config.databases.len(), 1);
}

#[test]
fn durations_are_seconds_or_have_a_unit() {
    let config =
        load(&format!("lease = 5\nshutdown = \"500ms\"\npoll_idle = 0.05\n{DATABASE}"), None).unwrap();
    assert_eq!(config.lease, Duration::from_secs(5));
    assert_eq!(config.shutdown, Duration::from_millis(500));
    assert_eq!(config.poll_idle, Duration::from_millis(50));
}

#[test]
fn a_url_on_the_command_line_is_the_database_named_default() {
    let config = load(DATABASE, Some("postgres://u@other/d")).unwrap();
    let names: Vec<&str> = config.databases.iter().map(|database| database.name.as_str()).collect();
    assert_eq!(names, ["default", "main"]);
    let file = "[database.default]\nurl = \"postgres://u@h/d\"";
    let config = load(file, Some("postgres://u@other/d")).unwrap();
    assert_eq!(config.databases[0].settings.servers[0].host, "other");
}

#[test]
#[allow(clippy::result_large_err)]
fn flags_come_over_environment_over_file() {
    figment::Jail::expect_with(|jail| {
        jail.clear_env();
        jail.create_file(
            "relay.toml",
            &format!("environment = \"file\"\nlease = 4\nshutdown = 4\n{DATABASE}"),
        )?;
        jail.set_env("DTM_LEASE", "5s");
        jail.set_env("DTM_PG_HOME", "somebody else's");
        let file = Some(PathBuf::from("relay.toml"));
        let overrides = Overrides { file, environment: Some("flag".into()), ..Overrides::default() };
        let config = Config::load(&overrides).unwrap();
        assert_eq!(config.environment, "flag");
        assert_eq!(config.lease, Duration::from_secs(5));
        assert_eq!(config.shutdown, Duration::from_secs(4));
        jail.set_env("DTM_LEASE", "soon");
        let error = Config::load(&overrides).unwrap_err().to_string();
        assert!(error.starts_with("DTM_LEASE: lease: ") && error.contains("soon"), "{error}");
        Ok(())
    });
}

#[test]
fn what_is_wrong_is_told_in_one_line_with_file_and_key() {
    for (text, parts) in [
        ("leese = 3", vec!["relay.toml", "leese: there is no such setting", "lease"]),
        ("[database.main]\nur1 = \"x\"", vec!["relay.toml", "database.main.ur1: there is no such setting"]),
        ("[database.main]", vec!["relay.toml", "database.main.url: it is missing"]),
        ("lease = \"soon\"", vec!["relay.toml", "lease: ", "soon"]),
        ("lease = true", vec!["relay.toml", "lease: "]),
        ("lease = 0", vec!["relay.toml", "lease: 0ns is not between 1s and 300s"]),
        ("log_format = \"xml\"", vec!["relay.toml", "log_format: ", "text"]),
        ("threads = 0", vec!["relay.toml", "threads: 0 is not between"]),
        ("environment = \"\"", vec!["relay.toml", "environment: it is empty"]),
        ("", vec!["no database to deliver from"]),
        (
            "[database.main]\nurl = \"postgres://u:hunter2@h/d?sslmode=no\"",
            vec!["relay.toml", "database.main.url: connection URL: sslmode=no is none of disable"],
        ),
        ("[database.main]\nurl = \"postgres://u:hunter2@h", vec!["relay.toml", "line 2"]),
        ("[postgres.stock]", vec!["relay.toml", "postgres.stock.url: it is missing"]),
        (
            "[postgres.stock]\nurl = \"postgres://u:hunter2@h/d?sslmode=no\"",
            vec!["relay.toml", "postgres.stock.url: connection URL: sslmode=no is none of disable"],
        ),
        (
            "[postgres.stock]\nurl = \"postgres://u@h/d\"\nconnections = 65",
            vec!["relay.toml", "postgres.stock.connections: 65 is not between 1 and 64"],
        ),
        (
            "[postgres.\"a b\"]\nurl = \"postgres://u@h/d\"",
            vec!["relay.toml", "postgres.a b: a name has 1 to 64 letters"],
        ),
    ] {
        let error = load(text, None).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part:?} in {error:?} of {text:?}");
        }
        assert!(!error.contains("hunter2") && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn secrets_are_read_from_where_they_stand_and_shown_nowhere() {
    let url = "[database.main]\nurl = \"postgres://u@h/d\"\n";
    let config = load(&format!("{url}[secret.path]\nfile = \"relay.toml\""), None).unwrap();
    assert!(!config.secrets["path"].reveal().is_empty() && format!("{config:?}").contains("Secret(…)"));
    for (text, parts) in [
        ("[secret.a]", vec!["relay.toml", "secret.a: it needs either env or file"]),
        ("[secret.a]\nenv = \"DTM_NO_SUCH\"", vec!["secret.a: the variable DTM_NO_SUCH is not set"]),
        ("[secret.a]\nfile = \"/nowhere/x\"", vec!["secret.a: /nowhere/x"]),
        ("[secret.\"a b\"]\nfile = \"relay.toml\"", vec!["secret.a b: a name has"]),
        ("[secret.a]\nvalue = \"x\"", vec!["secret.a.value: there is no such setting"]),
    ] {
        let error = load(&format!("{url}{text}"), None).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part:?} in {error:?} of {text:?}");
        }
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let overrides = Overrides { file: Some("/nowhere/relay.toml".into()), ..Overrides::default() };
    assert!(Config::load(&overrides).unwrap_err().to_string().starts_with("/nowhere/relay.toml: "));
}
