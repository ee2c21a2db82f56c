// SPDX-License-Identifier: PostgreSQL
//! Many patterns at once: what they are worth is found segment by segment, without a look at each of them.

use std::collections::BTreeMap;

use super::{Pattern, RESERVED_SEGMENT, Segment, TopicError};

/// Patterns with a value each. A look-up costs what the topic has of segments, not what there is of patterns.
#[derive(Clone, Debug)]
pub struct Matcher<T> {
    root: Node<T>,
}

/// What patterns that begin alike go on with.
#[derive(Clone, Debug)]
struct Node<T> {
    literals: BTreeMap<String, Node<T>>,
    one: Option<Box<Node<T>>>,
    /// Values of patterns that end here.
    here: Vec<T>,
    /// Values of patterns that end with `>` here.
    rest: Vec<T>,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Node { literals: BTreeMap::new(), one: None, here: Vec::new(), rest: Vec::new() }
    }
}

impl<T> Default for Matcher<T> {
    fn default() -> Self {
        Matcher { root: Node::default() }
    }
}

impl<T> Matcher<T> {
    /// Adds a pattern. The same one may be added again: then it has several values.
    pub fn insert(&mut self, pattern: &str, value: T) -> Result<(), TopicError> {
        let mut node = &mut self.root;
        for segment in Pattern::parse(pattern)?.segments {
            node = match segment {
                Segment::Literal(literal) => node.literals.entry(literal).or_default(),
                Segment::One => node.one.get_or_insert_default(),
                Segment::Rest => {
                    node.rest.push(value);
                    return Ok(());
                }
            };
        }
        node.here.push(value);
        Ok(())
    }

    /// The values of all patterns that match (as [`Pattern::matches`] says), each once for each time it was added.
    pub fn matches<'a>(&'a self, topic: &'a str) -> Matches<'a, T> {
        Matches { next: Some((&self.root, Some(topic))), ahead: Vec::new(), found: [].iter(), at_root: true }
    }

    /// Whether any pattern matches.
    pub fn is_match(&self, topic: &str) -> bool {
        self.matches(topic).next().is_some()
    }
}

/// See [`Matcher::matches`].
#[derive(Debug)]
pub struct Matches<'a, T> {
    /// Where to go on, and what is left of the topic there; none: its end.
    next: Option<(&'a Node<T>, Option<&'a str>)>,
    /// Ways that were passed by.
    ahead: Vec<(&'a Node<T>, Option<&'a str>)>,
    found: std::slice::Iter<'a, T>,
    at_root: bool,
}

impl<'a, T> Matches<'a, T> {
    /// One segment further: what ends here, and the ways that lead on.
    fn step(&mut self, node: &'a Node<T>, left: Option<&'a str>) {
        let at_root = std::mem::replace(&mut self.at_root, false);
        let Some(left) = left else {
            self.found = node.here.iter();
            return;
        };
        let (segment, left) = left.split_once('.').map_or((left, None), |(head, tail)| (head, Some(tail)));
        let literal = node.literals.get(segment);
        // Topics of pg_dtm itself are matched by name alone.
        if at_root && segment == RESERVED_SEGMENT {
            self.next = literal.map(|node| (node, left));
            return;
        }
        self.found = node.rest.iter();
        let one = node.one.as_deref().map(|node| (node, left));
        match literal {
            Some(node) => {
                self.next = Some((node, left));
                self.ahead.extend(one);
            }
            None => self.next = one,
        }
    }
}

impl<'a, T> Iterator for Matches<'a, T> {
    type Item = &'a T;

    fn next(&mut self) -> Option<&'a T> {
        loop {
            if let Some(value) = self.found.next() {
                return Some(value);
            }
            let (node, left) = self.next.take().or_else(|| self.ahead.pop())?;
            self.step(node, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(patterns: &[&str]) -> Matcher<usize> {
        let mut matcher = Matcher::default();
        for (value, pattern) in patterns.iter().enumerate() {
            matcher.insert(pattern, value).unwrap();
        }
        matcher
    }

    fn found(matcher: &Matcher<usize>, topic: &str) -> Vec<usize> {
        let mut values: Vec<usize> = matcher.matches(topic).copied().collect();
        values.sort_unstable();
        values
    }

    #[test]
    fn every_pattern_that_matches_gives_its_value_once() {
        let matcher =
            matcher(&["orders.created", "orders.*", "orders.>", "*.created", ">", "orders.*", "orders"]);
        assert_eq!(found(&matcher, "orders.created"), [0, 1, 2, 3, 4, 5]);
        assert_eq!(found(&matcher, "orders.a.b"), [2, 4]);
        assert_eq!(found(&matcher, "orders"), [4, 6]);
        assert_eq!(found(&matcher, "x.created"), [3, 4]);
        assert!(matcher.is_match("anything"));
    }

    #[test]
    fn topics_of_pg_dtm_match_by_name_alone() {
        let matcher = matcher(&[">", "*.msg", "dtm.>", "dtm.*", "*.>", "dtm.msg"]);
        assert_eq!(found(&matcher, "dtm.msg"), [2, 3, 5]);
        assert_eq!(found(&matcher, "a.dtm"), [0, 4], "dtm is reserved as the first segment alone");
    }

    #[test]
    fn nothing_matches_without_patterns_and_malformed_ones_are_refused() {
        let mut matcher = Matcher::default();
        assert!(!matcher.is_match("a"));
        assert_eq!(matcher.insert("a.>.b", 1), Err(TopicError::TailNotLast));
        assert!(!matcher.is_match("a.x.b"), "a refused pattern leaves nothing behind");
    }

    fn pattern() -> impl Strategy<Value = String> {
        (proptest::collection::vec("a|b|dtm|\\*", 1..4), any::<bool>()).prop_map(|(mut segments, rest)| {
            segments.extend(rest.then(|| ">".to_owned()));
            segments.join(".")
        })
    }

    proptest! {
        #[test]
        fn it_says_what_each_pattern_says(
            patterns in proptest::collection::vec(prop_oneof![pattern(), Just(">".to_owned())], 0..12),
            topic in proptest::collection::vec("a|b|c|dtm", 1..5),
        ) {
            let topic = topic.join(".");
            let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
            let one_by_one = |(at, pattern): (usize, &&str)| Pattern::parse(pattern).unwrap().matches(&topic).then_some(at);
            let expected: Vec<usize> = patterns.iter().enumerate().filter_map(one_by_one).collect();
            prop_assert_eq!(found(&matcher(&patterns), &topic), expected);
        }
    }
}
