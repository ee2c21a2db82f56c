// SPDX-License-Identifier: PostgreSQL
//! Connection strings as libpq reads them: URIs and `key=value` pairs, into a list of parameters.
//!
//! [`super::settings`] says what the parameters mean.

use std::collections::BTreeMap;

/// Parameters by libpq's names.
pub type Parameters = BTreeMap<String, String>;

/// What is wrong with a connection string. The text never has the string itself in it: that may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("connection URL: {0}")]
pub struct UrlError(pub String);

fn wrong<T>(text: impl Into<String>) -> Result<T, UrlError> {
    Err(UrlError(text.into()))
}

/// Splits a connection string into its parameters, without looking at their names.
pub fn parameters(text: &str) -> Result<Parameters, UrlError> {
    for scheme in ["postgres://", "postgresql://"] {
        if let Some(rest) = text.strip_prefix(scheme) {
            return uri(rest);
        }
    }
    if text.split(['=', '/']).next().is_some_and(|scheme| scheme.ends_with(':')) {
        return wrong("its scheme is neither postgres:// nor postgresql://");
    }
    pairs(text)
}

/// `[user[:password]@][host[:port],…][/dbname][?key=value&…]`
fn uri(rest: &str) -> Result<Parameters, UrlError> {
    let mut found = Parameters::new();
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let authority_end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    let (credentials, hosts) = authority.rsplit_once('@').map_or((None, authority), |(c, h)| (Some(c), h));
    if let Some(credentials) = credentials {
        let (user, password) = credentials.split_once(':').map_or((credentials, None), |(u, p)| (u, Some(p)));
        set(&mut found, "user", decode(user)?);
        set(&mut found, "password", decode(password.unwrap_or_default())?);
    }
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = host_and_port(host)?;
        names.push(decode(name)?);
        ports.push(decode(port)?);
    }
    if names.iter().any(|name| !name.is_empty()) {
        found.insert("host".into(), names.join(","));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        found.insert("port".into(), ports.join(","));
    }
    set(&mut found, "dbname", decode(path.strip_prefix('/').unwrap_or_default())?);
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return wrong(format!("the query parameter {pair:?} has no value"));
        };
        let (key, value) = (decode(key)?, decode(value)?);
        if key == "ssl" && value == "true" {
            found.insert("sslmode".into(), "require".into());
        } else {
            found.insert(key, value);
        }
    }
    Ok(found)
}

fn host_and_port(host: &str) -> Result<(&str, &str), UrlError> {
    let Some(bracketed) = host.strip_prefix('[') else {
        return Ok(host.split_once(':').unwrap_or((host, "")));
    };
    match bracketed.split_once(']') {
        Some((name, "")) => Ok((name, "")),
        Some((name, port)) if port.starts_with(':') => Ok((name, &port[1..])),
        _ => wrong("an IPv6 address is written [address] or [address]:port"),
    }
}

fn set(found: &mut Parameters, key: &str, value: String) {
    if !value.is_empty() {
        found.insert(key.to_owned(), value);
    }
}

fn decode(text: &str) -> Result<String, UrlError> {
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = tail;
            continue;
        }
        let digits = tail.get(..2).and_then(|digits| str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(0) => return wrong("it has a percent-encoded null byte"),
            Some(byte) => bytes.push(byte),
            None => {
                return wrong("after a \"%\" come two hexadecimal digits; \"%\" itself is written \"%25\"");
            }
        }
        rest = &tail[2..];
    }
    String::from_utf8(bytes).or_else(|_| wrong("a percent-encoded part is not UTF-8"))
}

/// `key = value key2 = 'quoted value'`, with backslash escapes.
fn pairs(text: &str) -> Result<Parameters, UrlError> {
    let mut found = Parameters::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(found);
        }
        let mut key = String::new();
        while let Some(c) = chars.next_if(|&c| c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.next_if_eq(&'=').is_none() {
            return wrong("it is neither a URI (postgres://…) nor a list of key=value pairs");
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let value = value(&mut chars)?;
        set(&mut found, &key, value);
    }
}

fn value(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<String, UrlError> {
    let quoted = chars.next_if_eq(&'\'').is_some();
    let mut value = String::new();
    loop {
        match chars.next() {
            Some('\'') if quoted => return Ok(value),
            Some(c) if !quoted && c.is_whitespace() => return Ok(value),
            Some('\\') => value.extend(chars.next()),
            Some(c) => value.push(c),
            None if quoted => return wrong("a quoted value has no closing quote"),
            None => return Ok(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<(String, String)> {
        parameters(text).unwrap().into_iter().collect()
    }

    fn list(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn uris_are_read_as_libpq_does() {
        assert_eq!(of("postgres://"), []);
        assert_eq!(
            of("postgresql://u%40x:p%3Aw@h1:1,h2,[::1]:3/db?sslmode=require&options=-c%20a%3Db"),
            list(&[
                ("dbname", "db"),
                ("host", "h1,h2,::1"),
                ("options", "-c a=b"),
                ("password", "p:w"),
                ("port", "1,,3"),
                ("sslmode", "require"),
                ("user", "u@x"),
            ])
        );
        assert_eq!(of("postgres:///db?host=/run/pg"), list(&[("dbname", "db"), ("host", "/run/pg")]));
        assert_eq!(of("postgres://%2Frun%2Fpg/db"), list(&[("dbname", "db"), ("host", "/run/pg")]));
        assert_eq!(of("postgres://h/?ssl=true"), list(&[("host", "h"), ("sslmode", "require")]));
    }

    #[test]
    fn pairs_are_read_as_libpq_does() {
        assert_eq!(
            of(r"host = h  dbname='a \'b\\' user=x\ y password="),
            list(&[("dbname", r"a 'b\"), ("host", "h"), ("user", "x y")])
        );
        assert_eq!(of(""), []);
    }

    #[test]
    fn what_is_neither_is_refused_without_showing_it() {
        for bad in [
            "mysql://u:secret@h/db",
            "secret",
            "host=h password='secret",
            "postgres://u:secret%4@h",
            "postgres://u:secret%00@h",
            "postgres://u:secret@[::1/db",
            "postgres://u:secret@h?sslmode",
        ] {
            let error = parameters(bad).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
