// SPDX-License-Identifier: PostgreSQL
//! What an error of a producer means: for the record, for the topic, or for none of them.

use rdkafka::types::RDKafkaErrorCode as Code;

use crate::calls::outcome::{Class, Outcome};

/// What came of a record. `alone`: it was the only one in its batch, so that what the broker says is said of it. A broker has
/// looked at the record, other than a gateway in front of an HTTP endpoint: what it refuses it always will.
pub fn of_record(topic: &str, code: Code, alone: bool) -> Outcome {
    Outcome::without_answer(class(code, alone), format!("topic {topic}: {code}"))
}

/// Whether a broker has judged a record or its topic: it works.
pub fn is_judgement(code: Code) -> bool {
    matches!(class(code, true), Class::Unsendable | Class::Unsent)
}

fn class(code: Code, alone: bool) -> Class {
    match code {
        Code::InvalidRecord
        | Code::InvalidMessage
        | Code::InvalidMessageSize
        | Code::InvalidTimestamp
        | Code::MessageBatchTooLarge
        | Code::MessageSizeTooLarge
        | Code::PolicyViolation
        | Code::BadMessage
            if alone =>
        {
            Class::Unsendable
        }
        Code::ClusterAuthorizationFailed
        | Code::InvalidTopic
        | Code::TopicAuthorizationFailed
        | Code::UnknownPartition
        | Code::UnknownTopic
        | Code::UnknownTopicOrPartition => Class::Unsent,
        code if !is_of_broker(code) => Class::Withdrawn,
        // Of a batch nobody knows whose fault it is: each of its records is sent again, alone.
        _ if !alone => Class::Withdrawn,
        _ => Class::Failed,
    }
}

/// Whether an error was a broker's word on a record or its topic, and not the end of a producer or of another record.
pub fn is_of_broker(code: Code) -> bool {
    !matches!(
        code,
        Code::Fatal
            | Code::Fenced
            | Code::GaplessGuarantee
            | Code::InvalidDifferentRecord
            | Code::PurgeInflight
            | Code::PurgeQueue
            | Code::State
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_counts_only_for_a_record_that_was_alone() {
        for code in [Code::InvalidRecord, Code::MessageSizeTooLarge] {
            assert_eq!(of_record("t", code, true).class, Class::Unsendable);
            assert_eq!(of_record("t", code, false).class, Class::Withdrawn);
        }
        assert_eq!(of_record("t", Code::PurgeQueue, true).class, Class::Withdrawn);
        assert_eq!(of_record("t", Code::TopicAuthorizationFailed, false).class, Class::Unsent);
        assert_eq!(of_record("t", Code::InvalidRequiredAcks, true).class, Class::Failed);
    }
}
