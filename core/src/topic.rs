// SPDX-License-Identifier: PostgreSQL
//! Topics and the patterns that subscriptions match them with.

mod matcher;

pub use matcher::{Matcher, Matches};

/// The longest topic and the longest pattern, in bytes: what Apache Kafka allows for a topic's name.
pub const TOPIC_BYTES_MAX: usize = 249;

/// Topics whose first segment is this one carry pg_dtm's own events.
pub const RESERVED_SEGMENT: &str = "dtm";

/// What is wrong with a topic or a pattern; the text is a full sentence without its stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// The text has no characters.
    #[error("it is empty")]
    Empty,
    /// The text is longer than [`TOPIC_BYTES_MAX`].
    #[error("it is longer than 249 bytes")]
    TooLong,
    /// Two dots in a row, or a dot at either end.
    #[error("it has an empty segment")]
    EmptySegment,
    /// A character outside `[A-Za-z0-9_-]`.
    #[error("a segment has the character {0:?}")]
    Character(char),
    /// A publisher used a topic of pg_dtm's own.
    #[error("topics under \"dtm.\" are reserved for events of pg_dtm itself")]
    Reserved,
    /// `*` or `>` beside other characters in one segment.
    #[error("a wildcard must be a segment of its own")]
    PartialWildcard,
    /// `>` before the last segment.
    #[error("\">\" can only be the last segment")]
    TailNotLast,
}

fn check_length(text: &str) -> Result<(), TopicError> {
    match text.len() {
        0 => Err(TopicError::Empty),
        n if n > TOPIC_BYTES_MAX => Err(TopicError::TooLong),
        _ => Ok(()),
    }
}

fn check_segment(segment: &str) -> Result<(), TopicError> {
    if segment.is_empty() {
        return Err(TopicError::EmptySegment);
    }
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    match segment.chars().find(|c| !allowed(c)) {
        Some(c) => Err(TopicError::Character(c)),
        None => Ok(()),
    }
}

/// Checks a topic that an event is to be published to.
pub fn check_topic(topic: &str) -> Result<(), TopicError> {
    check_length(topic)?;
    topic.split('.').try_for_each(check_segment)?;
    if topic.split('.').next() == Some(RESERVED_SEGMENT) {
        return Err(TopicError::Reserved);
    }
    Ok(())
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    /// `*`: one segment, whatever it is.
    One,
    /// `>`: one segment or more, to the end.
    Rest,
}

/// A pattern over topics: segments, of which `*` stands for any one and a final `>` for one or more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    segments: Vec<Segment>,
}

impl Pattern {
    /// Reads a pattern; a topic without wildcards is a pattern that matches itself.
    pub fn parse(pattern: &str) -> Result<Self, TopicError> {
        check_length(pattern)?;
        let count = pattern.split('.').count();
        let segment = |(at, text): (usize, &str)| match text {
            "*" => Ok(Segment::One),
            ">" if at + 1 == count => Ok(Segment::Rest),
            ">" => Err(TopicError::TailNotLast),
            _ if text.contains(['*', '>']) => Err(TopicError::PartialWildcard),
            _ => check_segment(text).map(|()| Segment::Literal(text.to_owned())),
        };
        let segments = pattern.split('.').enumerate().map(segment).collect::<Result<_, _>>()?;
        Ok(Pattern { segments })
    }

    /// Whether the topic matches. Topics of pg_dtm itself match only a pattern that begins with `dtm.`.
    pub fn matches(&self, topic: &str) -> bool {
        let named = matches!(&self.segments[0], Segment::Literal(first) if first == RESERVED_SEGMENT);
        let mut parts = topic.split('.');
        for (at, segment) in self.segments.iter().enumerate() {
            let Some(part) = parts.next() else { return false };
            if at == 0 && part == RESERVED_SEGMENT && !named {
                return false;
            }
            match segment {
                Segment::Rest => return true,
                Segment::One => {}
                Segment::Literal(literal) if literal == part => {}
                Segment::Literal(_) => return false,
            }
        }
        parts.next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_segments_of_letters_digits_underscore_and_hyphen() {
        for good in ["orders", "orders.created", "A-1.b_2.c", &"x".repeat(249)] {
            assert_eq!(check_topic(good), Ok(()), "{good}");
        }
        for (bad, error) in [
            ("", TopicError::Empty),
            ("a..b", TopicError::EmptySegment),
            (".a", TopicError::EmptySegment),
            ("a.", TopicError::EmptySegment),
            ("a b", TopicError::Character(' ')),
            ("a.*", TopicError::Character('*')),
            ("é", TopicError::Character('é')),
            ("dtm", TopicError::Reserved),
            ("dtm.x", TopicError::Reserved),
            (&"x".repeat(250), TopicError::TooLong),
        ] {
            assert_eq!(check_topic(bad), Err(error), "{bad}");
        }
        assert_eq!(check_topic("dtmx.a"), Ok(()));
    }

    #[test]
    fn patterns_match_by_segment() {
        let cases = [
            ("orders.created", "orders.created", true),
            ("orders.created", "orders.created.eu", false),
            ("orders.*", "orders.created", true),
            ("orders.*", "orders", false),
            ("orders.*", "orders.a.b", false),
            ("orders.>", "orders.a.b", true),
            ("orders.>", "orders", false),
            ("*.created", "orders.created", true),
            ("*.*.x", "a.b.x", true),
            (">", "orders.a", true),
            (">", "dtm.msg", false),
            ("*.msg", "dtm.msg", false),
            ("dtm.>", "dtm.msg", true),
            ("dtm.*", "dtm.msg", true),
        ];
        for (pattern, topic, expected) in cases {
            assert_eq!(Pattern::parse(pattern).unwrap().matches(topic), expected, "{pattern} on {topic}");
        }
    }

    #[test]
    fn malformed_patterns_are_refused() {
        for (bad, error) in [
            ("", TopicError::Empty),
            ("a.>.b", TopicError::TailNotLast),
            ("a.b*", TopicError::PartialWildcard),
            ("a..b", TopicError::EmptySegment),
            ("a.%", TopicError::Character('%')),
        ] {
            assert_eq!(Pattern::parse(bad), Err(error), "{bad}");
        }
    }
}
