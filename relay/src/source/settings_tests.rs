// SPDX-License-Identifier: PostgreSQL

use super::*;

/// A machine with these variables and files.
struct Machine(&'static [(&'static str, &'static str)], &'static [&'static str]);

impl Surroundings for Machine {
    fn variable(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
    }

    fn exists(&self, path: &Path) -> bool {
        self.1.iter().any(|file| Path::new(file) == path)
    }
}

const BARE: Machine = Machine(&[("USER", "me"), ("HOME", "/home/me")], &["/tmp"]);

fn of(text: &str) -> Settings {
    Settings::parse(text, &BARE).unwrap()
}

fn error(text: &str) -> String {
    Settings::parse(text, &BARE).unwrap_err().to_string()
}

#[test]
fn what_is_absent_has_its_default() {
    let settings = of("postgres://");
    assert_eq!(settings.servers, [Server { host: "/tmp".into(), address: None, port: 5432 }]);
    assert!(settings.servers[0].is_local_socket());
    assert_eq!((settings.user.as_str(), settings.dbname.as_str()), ("me", "me"));
    assert_eq!(settings.sslmode, SslMode::Prefer);
    assert_eq!(settings.application_name, "dtm-relay");
    assert_eq!(settings.connect_timeout, Duration::from_secs(10));
    assert_eq!(settings.passfile, Some("/home/me/.pgpass".into()));
}

#[test]
fn the_environment_stands_behind_the_url() {
    let machine = Machine(
        &[
            ("PGUSER", "env"),
            ("PGPASSWORD", "pw"),
            ("PGHOST", "h1,h2"),
            ("PGPORT", "7"),
            ("PGSSLMODE", "disable"),
        ],
        &[],
    );
    let settings = Settings::parse("user=url dbname=d", &machine).unwrap();
    assert_eq!((settings.user.as_str(), settings.password.as_deref()), ("url", Some("pw")));
    assert_eq!(
        settings.servers.iter().map(|s| (s.host.as_str(), s.port)).collect::<Vec<_>>(),
        [("h1", 7), ("h2", 7)]
    );
    assert_eq!(settings.sslmode, SslMode::Disable);
}

#[test]
fn several_servers_have_their_own_ports_and_addresses() {
    let settings = of("host=a,b hostaddr=10.0.0.1,::1 port=1,2");
    let server =
        |host: &str, address: &str, port| Server { host: host.into(), address: address.parse().ok(), port };
    assert_eq!(settings.servers, [server("a", "10.0.0.1", 1), server("b", "::1", 2)]);
    assert!(error("host=a,b port=1,2,3").contains("port lists 3 entries for 2 servers"));
    assert!(error("host=a,b hostaddr=10.0.0.1").contains("hostaddr lists 1 entries for 2 servers"));
    assert!(error("hostaddr=nowhere").contains("no IP address"));
    assert!(error("port=70000").contains("no port"));
}

#[test]
fn root_certificates_decide_how_far_a_mode_goes() {
    assert_eq!(of("sslmode=require").sslmode, SslMode::Require);
    assert_eq!(of("sslmode=require sslrootcert=/ca.crt").sslmode, SslMode::VerifyCa);
    assert_eq!(of("sslrootcert=system").sslmode, SslMode::VerifyFull);
    assert_eq!(of("sslrootcert=/ca.crt").sslmode, SslMode::Prefer);
    assert!(error("sslrootcert=system sslmode=require").contains("verify-full"));
    assert!(error("sslmode=verify-full").contains("needs sslrootcert"));
    let machine = Machine(&[("USER", "me"), ("HOME", "/h")], &["/h/.postgresql/root.crt"]);
    let settings = Settings::parse("sslmode=require", &machine).unwrap();
    assert_eq!(settings.roots, Roots::File("/h/.postgresql/root.crt".into()));
    assert_eq!(settings.sslmode, SslMode::VerifyCa);
}

#[test]
fn a_relay_wants_the_primary() {
    for fine in ["any", "primary", "read-write"] {
        of(&format!("target_session_attrs={fine}"));
    }
    assert!(error("target_session_attrs=read-only").contains("a relay needs the primary"));
    assert!(error("target_session_attrs=nonsense").contains("none of any, primary"));
}

#[test]
fn unknown_parameters_and_values_are_named() {
    assert!(error("hots=x").contains("\"hots\""));
    assert!(error("sslmode=maybe").contains("sslmode=maybe is none of disable, allow"));
    assert!(error("connect_timeout=soon").contains("connect_timeout=soon"));
    assert!(error("service=x").contains("\"service\" is unknown or not supported"));
    assert!(error("gssencmode=require").contains("gssencmode"));
    of("gssencmode=prefer client_encoding=UTF8");
}

#[test]
fn a_password_is_never_shown() {
    assert!(!format!("{:?}", of("postgres://u:secret@h/db")).contains("secret"));
}
