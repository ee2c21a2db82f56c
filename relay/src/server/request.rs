// SPDX-License-Identifier: PostgreSQL
//! A transaction as DTM's clients describe it. What is null counts as absent, and what is not known is passed over.

use std::collections::BTreeMap;

use dtm_core::transaction::Decider;
use serde::Deserialize;
use serde_json::{Map, Number, Value, json};

use super::answer::Refusal;
use crate::source::dtm_api::NewMessage;

/// The body of prepare, submit, abort, forceStop and resetNextCronTime.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TransRequest {
    gid: Option<String>,
    trans_type: Option<String>,
    steps: Option<Vec<Step>>,
    payloads: Option<Vec<Option<String>>>,
    query_prepared: Option<String>,
    protocol: Option<String>,
    custom_data: Option<String>,
    wait_result: Option<bool>,
    timeout_to_fail: Option<i64>,
    request_timeout: Option<i64>,
    retry_interval: Option<i64>,
    branch_headers: Option<BTreeMap<String, String>>,
    concurrent: Option<bool>,
    rollback_reason: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Step {
    action: Option<String>,
    /// Where old clients put the payload.
    data: Option<String>,
}

/// What of `custom_data` concerns a message.
#[derive(Debug, Default, Deserialize)]
struct CustomData {
    delay: Option<Number>,
}

impl TransRequest {
    /// Reads a body.
    pub fn read(body: &[u8]) -> Result<Self, Refusal> {
        serde_json::from_slice(body)
            .map_err(|error| Refusal::bad(format!("the body cannot be read: {error}")))
    }

    /// Without what would break lines of logs and the names of barriers, as DTM has it.
    pub fn gid(&self) -> Result<String, Refusal> {
        let gid = self.gid.as_deref().unwrap_or_default().replace(['\n', '\r', ';'], "");
        if gid.is_empty() { Err(Refusal::bad("no gid specified")) } else { Ok(gid) }
    }

    /// Whether the client waits until the transaction has ended.
    pub fn waits(&self) -> bool {
        self.wait_result == Some(true)
    }

    /// Why it is aborted.
    pub fn reason(&self) -> Option<&str> {
        self.rollback_reason.as_deref().filter(|reason| !reason.is_empty())
    }

    /// The kind of transaction, as the client calls it.
    pub fn kind(&self) -> &str {
        self.trans_type.as_deref().unwrap_or_default()
    }

    /// Who is asked whether a prepared message is committed.
    pub fn query_prepared(&self) -> Result<&str, Refusal> {
        let url = self.query_prepared.as_deref().unwrap_or_default();
        Decider::parse(url).map(|_| url).map_err(|error| Refusal::bad(error.to_string()))
    }

    /// The message that it describes. `with_secrets`: headers may stand for secrets of the relay.
    pub fn message(&self, with_secrets: bool) -> Result<NewMessage, Refusal> {
        let steps = self.steps.as_deref().unwrap_or_default();
        let payloads = self.payloads.as_deref().unwrap_or_default();
        let body = |(at, step): (usize, &Step)| {
            let payload = payloads.get(at).cloned().flatten().or_else(|| step.data.clone());
            payload.filter(|payload| !payload.is_empty()).map(String::into_bytes)
        };
        let action = |step: &Step| json!({"action": step.action.as_deref().unwrap_or_default()});
        Ok(NewMessage {
            gid: self.gid()?,
            steps: steps.iter().map(action).collect(),
            bodies: steps.iter().enumerate().map(body).collect(),
            options: Value::Object(self.options(with_secrets)?),
        })
    }

    /// Refuses what this server does not do.
    pub fn check_supported(&self) -> Result<(), Refusal> {
        let refuse = |what: String| Err(Refusal::error(http::StatusCode::NOT_IMPLEMENTED, what));
        match (self.kind(), self.protocol.as_deref().unwrap_or_default()) {
            ("msg", "" | "http") => Ok(()),
            ("msg", other) => refuse(format!("protocol {other:?} is not supported yet; http is")),
            (other, _) => refuse(format!("trans_type {other:?} is not supported yet; msg is")),
        }
    }

    /// DTM's rules of what an answer means are a part of every transaction that is made here.
    fn options(&self, with_secrets: bool) -> Result<Map<String, Value>, Refusal> {
        let mut options = Map::new();
        options.insert("success_status".into(), "200".into());
        options.insert("outcome_in_body".into(), true.into());
        let numbers = [
            ("timeout_to_fail", self.timeout_to_fail),
            ("request_timeout", self.request_timeout),
            ("retry_interval", self.retry_interval),
        ];
        for (name, value) in numbers {
            if let Some(value) = value.filter(|value| *value != 0) {
                options.insert(name.into(), value.into());
            }
        }
        if let Some(delay) = self.delay()?.filter(|delay| delay.as_f64() != Some(0.0)) {
            options.insert("delay".into(), Value::Number(delay));
        }
        if let Some(concurrent) = self.concurrent {
            options.insert("concurrent".into(), concurrent.into());
        }
        let headers = self.branch_headers.as_ref().filter(|headers| !headers.is_empty());
        if let Some(headers) = headers {
            if !with_secrets && headers.values().any(|value| value.starts_with("secret:")) {
                let why = "branch_headers: secrets are looked up only where the server has a token";
                return Err(Refusal::bad(why));
            }
            options.insert("branch_headers".into(), json!(headers));
        }
        Ok(options)
    }

    fn delay(&self) -> Result<Option<Number>, Refusal> {
        let Some(text) = self.custom_data.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
        let custom: Option<CustomData> =
            serde_json::from_str(text).map_err(|error| Refusal::bad(format!("custom_data: {error}")))?;
        Ok(custom.and_then(|custom| custom.delay))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &Value) -> TransRequest {
        TransRequest::read(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn what_the_clients_send_is_read() {
        // Python's client.
        let request = read(&json!({
            "gid": "a;\r\nb", "trans_type": "msg", "custom_data": null, "steps": [{"action": "http://h/a"}],
            "payloads": ["{\"n\": 1}"], "query_prepared": null, "protocol": null, "wait_result": false,
            "timeout_to_fail": 0, "request_timeout": 8, "retry_interval": 0, "passthrough_headers": [],
            "branch_headers": {}, "concurrent": false,
        }));
        request.check_supported().unwrap();
        let message = request.message(false).unwrap();
        assert_eq!(message.gid, "ab");
        assert_eq!(message.steps, json!([{"action": "http://h/a"}]));
        assert_eq!(message.bodies, [Some(b"{\"n\": 1}".to_vec())]);
        let expected = json!({"success_status": "200", "outcome_in_body": true, "request_timeout": 8, "concurrent": false});
        assert_eq!(message.options, expected);
        assert!(!request.waits());
        // Payloads where old clients put them; a step that has none; a delay.
        let request = read(&json!({
            "gid": "g", "trans_type": "msg", "custom_data": "{\"delay\":3}",
            "steps": [{"action": "http://h/a", "data": "{}"}, {"action": "http://h/b", "compensate": ""}],
        }));
        let message = request.message(false).unwrap();
        assert_eq!(message.bodies, [Some(b"{}".to_vec()), None]);
        assert_eq!(message.options["delay"], json!(3));
    }

    #[test]
    fn what_is_wrong_or_not_supported_is_refused() {
        assert_eq!(TransRequest::read(b"{").unwrap_err().status().as_u16(), 400);
        assert_eq!(TransRequest::read(br#"{"gid": 1}"#).unwrap_err().status().as_u16(), 400);
        for (json, status) in [
            (json!({"trans_type": "msg"}), 400),
            (json!({"gid": ";", "trans_type": "msg"}), 400),
            (json!({"gid": "g", "trans_type": "msg", "custom_data": "x"}), 400),
            (json!({"gid": "g", "trans_type": "msg", "branch_headers": {"x": "secret:a"}}), 400),
            (json!({"gid": "g", "trans_type": "saga"}), 501),
            (json!({"gid": "g", "trans_type": "msg", "protocol": "grpc"}), 501),
        ] {
            let request = read(&json);
            let refused = request.check_supported().and_then(|()| request.message(false).map(drop));
            assert_eq!(refused.unwrap_err().status().as_u16(), status, "{json}");
        }
        for url in ["", "h", "kafka://a/b", "http://u:p@h/"] {
            assert!(read(&json!({"query_prepared": url})).query_prepared().is_err(), "{url}");
        }
    }
}
