// SPDX-License-Identifier: PostgreSQL
//! Password files as libpq reads them: `host:port:database:user:password` lines.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::settings::{Server, Settings};

/// The directories of unix sockets that a password file calls `localhost`.
const DEFAULT_SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// The password for a server, from the settings or from their password file.
pub fn password(settings: &Settings, server: &Server) -> Option<String> {
    if settings.password.is_some() {
        return settings.password.clone();
    }
    let path = settings.passfile.as_deref()?;
    find(&read(path)?, settings, server)
}

fn read(path: &Path) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() {
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        let path = path.display();
        tracing::warn!("password file {path} is ignored: others can read it; run: chmod 600 {path}");
        return None;
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) => {
            tracing::warn!("password file {} is ignored: {error}", path.display());
            None
        }
    }
}

fn find(text: &str, settings: &Settings, server: &Server) -> Option<String> {
    let host = match server.host.as_str() {
        folder if DEFAULT_SOCKET_FOLDERS.contains(&folder) => "localhost",
        host => host,
    };
    let wanted = [host, &server.port.to_string(), &settings.dbname, &settings.user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut rest = line;
        for wanted in wanted {
            let (field, tail) = split_field(rest)?;
            if field != "*" && unescape(field) != wanted {
                return None;
            }
            rest = tail;
        }
        let password = unescape(split_field(rest).map_or(rest, |(password, _)| password));
        Some(password).filter(|password| !password.is_empty())
    })
}

/// The text up to the next colon that is not escaped, still escaped, and what comes after it.
fn split_field(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ':' => return Some((&text[..at], &text[at + 1..])),
            _ => {}
        }
    }
    None
}

fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => plain.extend(chars.next()),
            c => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::super::settings::ThisMachine;
    use super::*;

    fn password_of(text: &str, url: &str) -> Option<String> {
        let settings = Settings::parse(url, &ThisMachine).unwrap();
        find(text, &settings, &settings.servers[0])
    }

    #[test]
    fn the_first_line_that_matches_counts() {
        let text = "# a comment\nh:5432:d:other:no\nh:*:d:u:one\n*:*:*:*:two\n";
        assert_eq!(password_of(text, "host=h dbname=d user=u").as_deref(), Some("one"));
        assert_eq!(password_of(text, "host=x dbname=d user=u").as_deref(), Some("two"));
        assert_eq!(password_of("h:1:d:u:p", "host=h dbname=d user=u"), None);
    }

    #[test]
    fn the_default_socket_is_called_localhost() {
        let text = "localhost:5432:d:u:p";
        assert_eq!(password_of(text, "host=/tmp dbname=d user=u").as_deref(), Some("p"));
        assert_eq!(password_of("/run/x:5432:d:u:p", "host=/run/x dbname=d user=u").as_deref(), Some("p"));
    }

    #[test]
    fn colons_and_backslashes_are_escaped() {
        let text = r"\:\:1:5432:d:u:a\:b\\c";
        assert_eq!(password_of(text, "host=::1 dbname=d user=u").as_deref(), Some(r"a:b\c"));
        assert_eq!(password_of(r"\*:5432:d:u:p", "host=h dbname=d user=u"), None);
    }
}
