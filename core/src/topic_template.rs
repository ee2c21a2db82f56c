// SPDX-License-Identifier: PostgreSQL
//! The Kafka topic of an event: one for all, or one that follows from the event's own topic.

use std::borrow::Cow;
use std::fmt;

/// The longest name of a Kafka topic.
pub const KAFKA_TOPIC_BYTES_MAX: usize = 249;

/// What stands for an event's whole topic.
const TOPIC: &str = "{topic}";
/// What stands for the first segment of an event's topic.
const FIRST: &str = "{first}";

/// The name of a Kafka topic, with at most one placeholder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicTemplate {
    before: String,
    placeholder: Option<Placeholder>,
    after: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placeholder {
    Topic,
    First,
}

impl TopicTemplate {
    /// Reads a template: letters, digits, `.`, `_` and `-` (Kafka's rule for topics), and at most one of `{topic}` and
    /// `{first}`.
    pub fn parse(text: &str) -> Option<Self> {
        let (before, placeholder, after) = match (text.split_once(TOPIC), text.split_once(FIRST)) {
            (Some((before, after)), _) => (before, Some(Placeholder::Topic), after),
            (None, Some((before, after))) => (before, Some(Placeholder::First), after),
            (None, None) => (text, None, ""),
        };
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let is_name = !matches!((placeholder, text), (None, "" | "." | ".."));
        let is_short = before.len() + after.len() <= KAFKA_TOPIC_BYTES_MAX;
        let good = plain(before) && plain(after) && is_name && is_short;
        good.then(|| TopicTemplate { before: before.to_owned(), placeholder, after: after.to_owned() })
    }

    /// The topic of an event. It can be longer than Kafka allows.
    pub fn topic_of<'a>(&'a self, event_topic: &str) -> Cow<'a, str> {
        let filling = match self.placeholder {
            None => return Cow::Borrowed(&self.before),
            Some(Placeholder::Topic) => event_topic,
            Some(Placeholder::First) => event_topic.split('.').next().unwrap_or_default(),
        };
        Cow::Owned([&self.before, filling, &self.after].concat())
    }

    /// The topic, if it is the same for all events.
    pub fn fixed(&self) -> Option<&str> {
        self.placeholder.is_none().then_some(&*self.before)
    }
}

impl fmt::Display for TopicTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let placeholder = match self.placeholder {
            None => "",
            Some(Placeholder::Topic) => TOPIC,
            Some(Placeholder::First) => FIRST,
        };
        write!(f, "{}{placeholder}{}", self.before, self.after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_takes_the_events_topic_or_its_first_segment() {
        for (template, topic) in [
            ("orders", "orders"),
            ("{topic}", "shop.orders.created"),
            ("outbox.event.{topic}", "outbox.event.shop.orders.created"),
            ("{first}-events", "shop-events"),
        ] {
            let read = TopicTemplate::parse(template).unwrap();
            assert_eq!(read.topic_of("shop.orders.created"), topic);
            assert_eq!((read.to_string().as_str(), read.fixed().is_some()), (template, template == "orders"));
        }
    }

    #[test]
    fn what_kafka_does_not_take_as_a_topic_is_refused() {
        let long = "x".repeat(250);
        for bad in ["", ".", "..", "a b", "a/b", "{key}", "{topic}{topic}", "{topic}{first}", "é", &long] {
            assert!(TopicTemplate::parse(bad).is_none(), "{bad}");
        }
    }
}
