// SPDX-License-Identifier: PostgreSQL
//! Where a subscription delivers to: one URI, whatever the sink.

use std::fmt;

use http::Uri;

use crate::names::is_name;
use crate::topic_template::TopicTemplate;

/// The longest destination, in bytes.
pub const DESTINATION_BYTES_MAX: usize = 2_048;

/// Schemes that there is a sink for.
pub const SCHEMES: [&str; 4] = ["http", "https", "kafka", "postgres"];

/// A destination that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An HTTP endpoint: each event is a POST to this absolute URI.
    Http(Uri),
    /// A Kafka cluster by its name in the relay's configuration, and the topic of each record.
    Kafka {
        /// `[kafka.NAME]`.
        cluster: String,
        /// See there.
        topic: TopicTemplate,
    },
    /// A function in another database, by the name of that in the relay's configuration.
    Postgres {
        /// `[postgres.NAME]`.
        target: String,
        /// Where the function is.
        schema: String,
        /// What it is called.
        function: String,
    },
}

/// What is wrong with a destination; the text is a full sentence without its stop.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// Not an absolute URI with a host.
    #[error("it is no absolute URI with a host")]
    Malformed,
    /// Longer than [`DESTINATION_BYTES_MAX`].
    #[error("it is longer than 2048 bytes")]
    TooLong,
    /// `user:password@host`: it would stand in tables and logs.
    #[error("it has credentials in it, which would stand in tables and logs")]
    Credentials,
    /// `#fragment`, which is never sent.
    #[error("it has a fragment, which is never sent")]
    Fragment,
    /// A scheme that this version has no sink for.
    #[error("there is no sink for the scheme {0:?}")]
    Scheme(String),
    /// Not `postgres://TARGET/schema.function`.
    #[error("it is not postgres://TARGET/schema.function: {0}")]
    Postgres(&'static str),
    /// Not `kafka://CLUSTER/TOPIC`.
    #[error("it is not kafka://CLUSTER/TOPIC: {0}")]
    Kafka(&'static str),
}

impl Destination {
    /// Checks a destination: an absolute URI of a scheme that has a sink, without credentials and without a fragment.
    pub fn parse(text: &str) -> Result<Self, DestinationError> {
        if text.len() > DESTINATION_BYTES_MAX {
            return Err(DestinationError::TooLong);
        }
        let (scheme, rest) = text.split_once("://").ok_or(DestinationError::Malformed)?;
        let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
        if !scheme_ok {
            return Err(DestinationError::Malformed);
        }
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        if authority.contains('@') {
            return Err(DestinationError::Credentials);
        }
        let scheme = scheme.to_ascii_lowercase();
        if !SCHEMES.contains(&scheme.as_str()) {
            return Err(DestinationError::Scheme(scheme));
        }
        if text.contains('#') {
            return Err(DestinationError::Fragment);
        }
        if scheme == "kafka" {
            return kafka(rest);
        }
        if scheme == "postgres" {
            return postgres(rest);
        }
        let uri: Uri = text.parse().map_err(|_| DestinationError::Malformed)?;
        let has_host = uri.host().is_some_and(|host| !host.is_empty());
        let port_ok =
            uri.authority().is_some_and(|a| a.port().is_some() == a.as_str()[a.host().len()..].contains(':'));
        if !has_host || !port_ok || uri.port_u16() == Some(0) {
            return Err(DestinationError::Malformed);
        }
        Ok(Destination::Http(uri))
    }
}

/// The rest of `kafka://CLUSTER/TOPIC`.
fn kafka(rest: &str) -> Result<Destination, DestinationError> {
    let why = |why| Err(DestinationError::Kafka(why));
    let Some((cluster, topic)) = rest.split_once('/') else { return why("there is no topic") };
    if !is_name(cluster) {
        return why("a cluster's name has 1 to 64 letters, digits, _, - and .");
    }
    match TopicTemplate::parse(topic) {
        Some(topic) => Ok(Destination::Kafka { cluster: cluster.to_owned(), topic }),
        None => {
            why("a topic has 1 to 249 letters, digits, ., _ and -, and may have {topic} or {first} in it")
        }
    }
}

/// The rest of `postgres://TARGET/schema.function`.
fn postgres(rest: &str) -> Result<Destination, DestinationError> {
    let why = |why| Err(DestinationError::Postgres(why));
    let Some((target, function)) = rest.split_once('/') else { return why("there is no function") };
    if !is_name(target) {
        return why("a target's name has 1 to 64 letters, digits, _, - and .");
    }
    match function.split_once('.') {
        Some((schema, function)) if is_identifier(schema) && is_identifier(function) => {
            Ok(Destination::Postgres {
                target: target.to_owned(),
                schema: schema.to_owned(),
                function: function.to_owned(),
            })
        }
        _ => why("a function is schema.function, each of 1 to 63 letters, digits, _ and $, as it is stored"),
    }
}

/// Whether a text is an identifier that is fit for a URI.
fn is_identifier(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_$".contains(&b);
    (1..=63).contains(&text.len()) && text.bytes().all(allowed) && !text.as_bytes()[0].is_ascii_digit()
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Destination::Http(uri) => uri.fmt(f),
            Destination::Kafka { cluster, topic } => write!(f, "kafka://{cluster}/{topic}"),
            Destination::Postgres { target, schema, function } => {
                write!(f, "postgres://{target}/{schema}.{function}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_and_https_are_destinations() {
        for good in [
            "http://127.0.0.1:8080/events",
            "https://billing.internal/a?b=c",
            "http://[::1]:80/",
            "HTTP://host",
        ] {
            assert!(Destination::parse(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn kafka_destinations_name_a_cluster_and_a_topic() {
        for good in ["kafka://main/orders", "kafka://main/{topic}", "kafka://eu-1/outbox.event.{first}"] {
            assert_eq!(Destination::parse(good).unwrap().to_string(), good);
        }
        for bad in [
            "kafka:///orders",
            "kafka://main/",
            "kafka://main/a/b",
            "kafka://main/a?b=c",
            "kafka://main/{key}",
        ] {
            assert!(matches!(Destination::parse(bad), Err(DestinationError::Kafka(_))), "{bad}");
        }
    }

    #[test]
    fn postgres_destinations_name_a_target_and_a_function() {
        for good in
            ["postgres://stock/public.take", "postgres://eu-1/app.on_order_2", "postgres://stock/_a.B$1"]
        {
            assert_eq!(Destination::parse(good).unwrap().to_string(), good);
        }
        for bad in [
            "postgres://stock",
            "postgres:///public.take",
            "postgres://stock/take",
            "postgres://stock/a.b.c",
            "postgres://stock/a.1",
            "postgres://stock/a.b?c=d",
            "postgres://stock:5432/a.b",
        ] {
            assert!(matches!(Destination::parse(bad), Err(DestinationError::Postgres(_))), "{bad}");
        }
    }

    #[test]
    fn a_wrong_destination_says_what_is_wrong() {
        use DestinationError as E;
        let long = format!("http://host/{}", "x".repeat(2_048));
        for (bad, error) in [
            ("", E::Malformed),
            ("billing.internal/events", E::Malformed),
            ("http://", E::Malformed),
            ("http:///path", E::Malformed),
            ("http://ho st/", E::Malformed),
            ("http://host:99999/", E::Malformed),
            ("http://user:secret@host/", E::Credentials),
            ("kafka://user@main/orders", E::Credentials),
            ("http://host/#top", E::Fragment),
            ("amqp://main/orders", E::Scheme("amqp".into())),
            ("kafka://main", E::Kafka("there is no topic")),
            ("kafka://ma:in/orders", E::Kafka("a cluster's name has 1 to 64 letters, digits, _, - and .")),
            ("ftp://host/", E::Scheme("ftp".into())),
            (&long, E::TooLong),
        ] {
            assert_eq!(Destination::parse(bad), Err(error), "{bad}");
        }
    }
}
