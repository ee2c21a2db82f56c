// SPDX-License-Identifier: PostgreSQL
//! What options take and refuse.

use serde_json::json;

use super::*;

#[test]
fn absent_options_have_their_defaults() {
    assert_eq!(Options::from_json(&json!({})), Ok(Options::default()));
}

#[test]
fn the_last_attempt_comes_after_all_pauses() {
    let seconds = Duration::from_secs;
    let doubling = Retry::Exponential { base: seconds(1), cap: seconds(5), attempts: 5 };
    assert_eq!(doubling.longest(), seconds(1 + 2 + 4 + 5));
    assert_eq!(Retry::Schedule(vec![seconds(5), seconds(60)]).longest(), seconds(65));
}

#[test]
fn options_are_read() {
    let json = json!({"timeout": "500ms", "max_in_flight": 4, "ordering": "none", "retry_base": 0.1,
                      "retry_cap": "10min", "retry_attempts": 3, "on_restore": "continue", "rate_limit": 0.5,
                      "on_dead": "block", "shards": 8});
    let options = Options::from_json(&json).unwrap();
    assert_eq!(options.timeout, Duration::from_millis(500));
    assert_eq!(options.max_in_flight, 4);
    assert_eq!(options.ordering, Ordering::None);
    let (base, cap) = (Duration::from_millis(100), Duration::from_secs(600));
    assert_eq!(options.retry, Retry::Exponential { base, cap, attempts: 3 });
    assert_eq!(options.on_restore, OnRestore::Continue);
    assert_eq!((options.rate_limit, options.on_dead, options.shards), (Some(0.5), OnDead::Block, 8));
    let listed = Options::from_json(&json!({"retry_schedule": [0, "5s", "1h"]})).unwrap().retry;
    assert_eq!(listed, Retry::Schedule([0, 5, 3_600].map(Duration::from_secs).into()));
}

#[test]
fn options_have_to_go_with_the_destination() {
    let http = Destination::parse("http://host/").unwrap();
    let kafka = Destination::parse("kafka://main/orders").unwrap();
    let function = Destination::parse("postgres://stock/public.take").unwrap();
    let read = |json: Value, to: &Destination| Options::for_destination(&json, to);
    assert_eq!(read(json!({}), &http).unwrap().max_in_flight, 32);
    assert_eq!(read(json!({}), &kafka).unwrap().max_in_flight, KAFKA_IN_FLIGHT);
    assert!(read(json!({"max_in_flight": 1_025}), &http).is_err());
    assert_eq!(read(json!({"max_in_flight": 1_025}), &kafka).unwrap().max_in_flight, 1_025);
    assert!(read(json!({"format": "binary"}), &http).is_err());
    assert!(read(json!({"timeout": 1}), &kafka).is_err());
    assert_eq!(read(json!({"timeout": 1}), &function).unwrap().timeout, Duration::from_secs(1));
    assert!(read(json!({"max_in_flight": 1_025}), &function).is_err());
    for bad in
        [json!({"headers": {"x": "1"}}), json!({"format": "binary"}), json!({"delivery": "at-least-once"})]
    {
        assert!(matches!(read(bad.clone(), &function), Err(OptionError::Mismatch { .. })), "{bad}");
    }
    let once = |more: Value| {
        let mut json = json!({"delivery": "exactly-once"});
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        read(json, &kafka)
    };
    assert_eq!(once(json!({"format": "debezium"})).unwrap().delivery, Guarantee::ExactlyOnce);
    for bad in [json!({"on_dead": "block"}), json!({"rate_limit": 5}), json!({"max_in_flight": 1})] {
        assert!(matches!(once(bad.clone()), Err(OptionError::Mismatch { .. })), "{bad}");
    }
}

#[test]
fn headers_are_texts_or_name_secrets_and_credentials_are_never_texts() {
    let read =
        |headers: Value| Options::from_json(&json!({ "headers": headers })).map(|options| options.headers);
    let found = read(json!({"X-Tenant": "7", "Authorization": "secret:billing-token"})).unwrap();
    assert_eq!(found["x-tenant"], HeaderSource::Text("7".into()));
    assert_eq!(found["authorization"], HeaderSource::Secret("billing-token".into()));
    for bad in [
        json!([]),
        json!({"x": 1}),
        json!({"x": "secret:"}),
        json!({"x": "secret:a b"}),
        json!({"authorization": "Bearer abc"}),
        json!({"X-Api-Key": "abc"}),
        json!({"Cookie": "a=b"}),
        json!({"x": "a\nb"}),
        json!({"a b": "c"}),
        json!({"ce-id": "1"}),
        json!({"content-type": "x"}),
        json!({"x": "1", "X": "2"}),
    ] {
        assert!(read(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn unknown_names_and_bad_values_are_refused() {
    assert_eq!(Options::from_json(&json!([])), Err(OptionError::NotAnObject));
    assert_eq!(Options::from_json(&json!({"timeuot": 1})), Err(OptionError::Unknown("timeuot".into())));
    for bad in [
        json!({"timeout": 0}),
        json!({"timeout": "2h"}),
        json!({"max_in_flight": 0}),
        json!({"max_in_flight": 1.5}),
        json!({"max_in_flight": 100_001}),
        json!({"format": "avro"}),
        json!({"delivery": "at-most-once"}),
        json!({"ordering": "fifo"}),
        json!({"rate_limit": 0}),
        json!({"rate_limit": "many"}),
        json!({"retry_base": "soon"}),
        json!({"retry_cap": 0.5}),
        json!({"retry_attempts": 0}),
        json!({"retry_schedule": []}),
        json!({"retry_schedule": ["soon"]}),
        json!({"retry_schedule": [1], "retry_attempts": 2}),
        json!({"on_dead": "stop"}),
        json!({"shards": 65}),
        json!({"on_restore": null}),
    ] {
        assert!(matches!(Options::from_json(&bad), Err(OptionError::Value { .. })), "{bad}");
    }
}
