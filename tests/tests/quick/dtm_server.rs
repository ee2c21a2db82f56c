// SPDX-License-Identifier: PostgreSQL
//! The server for DTM's clients: each endpoint's answers, and what becomes of the messages that are made by it.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::dtm_api::DtmServer;
use dtm_tests::receiver::{Receiver, Reply};
use http::Method;
use serde_json::{Value, json};

pub async fn shop() -> (Cluster, Receiver) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    (cluster, Receiver::start().await)
}

/// A message of one step, in the form of DTM's Go client.
pub fn message(gid: &str, receiver: &Receiver) -> Value {
    json!({
        "gid": gid, "trans_type": "msg", "concurrent": false, "protocol": "", "query_prepared": receiver.url(),
        "steps": [{"action": receiver.url()}], "payloads": ["{\"amount\": 30}"],
    })
}

fn with(mut message: Value, name: &str, value: Value) -> Value {
    message[name] = value;
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_prepared_submitted_and_called_and_each_answer_has_dtms_form() {
    let (cluster, receiver) = shop().await;
    let mut server = DtmServer::start(&cluster, "").await;
    let made = server.get("newGid").await.json();
    assert_eq!(made["dtm_result"], "SUCCESS");
    let gid = made["gid"].as_str().expect("a text").to_owned();
    let message = message(&gid, &receiver);
    for time in ["first", "second"] {
        let prepared = server.post("prepare", &message).await;
        assert_eq!((prepared.status, prepared.json()), (200, json!({"dtm_result": "SUCCESS"})), "{time}");
    }
    let found = server.get(&format!("query?gid={gid}")).await.json();
    let transaction = &found["transaction"];
    assert_eq!(
        [
            &transaction["gid"],
            &transaction["status"],
            &transaction["trans_type"],
            &transaction["query_prepared"]
        ],
        [gid.as_str(), "prepared", "msg", receiver.url().as_str()]
    );
    assert_eq!(
        (&transaction["options"], &transaction["concurrent"]),
        (&json!("{\"concurrent\": false}"), &json!(false))
    );
    let branch = &found["branches"][0];
    assert_eq!(
        [&branch["branch_id"], &branch["op"], &branch["status"], &branch["url"], &branch["bin_data"]],
        ["01", "action", "prepared", receiver.url().as_str(), "eyJhbW91bnQiOiAzMH0="]
    );
    assert_eq!(receiver.count(), 0);
    let submitted = server.post("submit", &message).await;
    assert_eq!((submitted.status, submitted.json()), (200, json!({"dtm_result": "SUCCESS"})));
    server.wait_for_status(&gid, "succeed").await;
    let called = &receiver.received()[0];
    let expected = format!("/events?gid={gid}&trans_type=msg&branch_id=01&op=action");
    assert_eq!((called.method.as_str(), called.target.as_str()), ("POST", expected.as_str()));
    assert_eq!(&called.body[..], b"{\"amount\": 30}");
    for name in ["prepare", "submit"] {
        let late = server.post(name, &message).await;
        assert_eq!((late.status, &late.json()["dtm_result"]), (409, &json!("FAILURE")));
        let told = format!("current status 'succeed', cannot {name}. FAILURE");
        assert_eq!(late.json()["message"], told);
    }
    assert_eq!(receiver.count(), 1);
    assert!(server.relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn submitting_again_what_is_being_called_neither_calls_it_twice_nor_loses_it() {
    let (cluster, receiver) = shop().await;
    let server = DtmServer::start(&cluster, "").await;
    receiver.behave(|_| Reply::slow(200, Duration::from_millis(500)));
    let message = message("slow", &receiver);
    for _ in 0..5 {
        assert_eq!(server.post("submit", &message).await.status, 200);
    }
    server.wait_for_status("slow", "succeed").await;
    assert_eq!(receiver.count(), 1);
    // Only 200 is success to DTM, and words in the body count.
    receiver.behave(|request| match request.target.contains("created") {
        true => Reply::status(201),
        false => Reply::Body(200, "{\"dtm_result\": \"ONGOING\"}".into()),
    });
    for gid in ["created", "ongoing"] {
        let message = with(
            with(self::message(gid, &receiver), "retry_interval", json!(3600)),
            "wait_result",
            json!(true),
        );
        let waited = server.post("submit", &message).await;
        assert_eq!((waited.status, &waited.json()["dtm_result"]), (425, &json!("ONGOING")), "{waited:?}");
    }
    // Wherever they stand in it, also in the answer of whoever knows that the business transaction is rolled back.
    let far = format!("{{\"x\": \"{}\", \"dtm_result\": \"FAILURE\"}}", "y".repeat(30_000));
    receiver.behave(move |_| Reply::Body(200, far.clone()));
    let asked = with(self::message("asked", &receiver), "timeout_to_fail", json!(1));
    assert_eq!(server.post("prepare", &asked).await.status, 200);
    server.wait_for_status("asked", "failed").await;
    receiver.behave(|_| Reply::status(200));
    for gid in ["created", "ongoing"] {
        assert_eq!(server.post("resetNextCronTime", &json!({"gid": gid})).await.status, 200);
        server.wait_for_status(gid, "succeed").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_the_result_has_it_after_one_pass() {
    let (cluster, receiver) = shop().await;
    let server = DtmServer::start(&cluster, "").await;
    let submit = async |gid: &str, delay: Value| {
        let message = with(with(message(gid, &receiver), "wait_result", json!(true)), "custom_data", delay);
        server.post("submit", &message).await
    };
    let done = submit("done", Value::Null).await;
    assert_eq!((done.status, done.text.contains("FAILURE")), (200, false), "{done:?}");
    server.wait_for_status("done", "succeed").await;
    let delayed = submit("delayed", json!("{\"delay\":3600}")).await;
    assert_eq!(delayed.status, 425, "{delayed:?}");
    let found = server.get("query?gid=delayed").await.json();
    assert_eq!(found["transaction"]["custom_data"], "{\"delay\": 3600}");
    // Nothing is hurried that waits for its time.
    assert_eq!(server.post("resetNextCronTime", &json!({"gid": "delayed"})).await.status, 200);
    let none = server.get("resetCronTime?timeout=0").await.json();
    assert_eq!(none, json!({"succeed_count": 0, "has_remaining": false}));
    receiver.behave(|_| Reply::status(500));
    let message =
        with(with(message("failing", &receiver), "wait_result", json!(true)), "retry_interval", json!(3600));
    let failing = server.post("submit", &message).await;
    assert_eq!(failing.status, 425, "{failing:?}");
    assert!(failing.json()["message"].as_str().expect("a reason").contains("500"), "{failing:?}");
    receiver.behave(|_| Reply::status(200));
    let late = server.get("resetCronTime?timeout=1").await.json();
    assert_eq!(late, json!({"succeed_count": 1, "has_remaining": false}));
    server.wait_for_status("failing", "succeed").await;
    let targets: Vec<String> = receiver.received().iter().map(|request| request.target.clone()).collect();
    assert!(!targets.iter().any(|target| target.contains("delayed")), "{targets:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delay_that_is_told_with_the_submission_counts() {
    let (cluster, receiver) = shop().await;
    let server = DtmServer::start(&cluster, "").await;
    let message = message("later", &receiver);
    assert_eq!(server.post("prepare", &message).await.status, 200);
    let submitted = server.post("submit", &with(message, "custom_data", json!("{\"delay\":2}"))).await;
    assert_eq!(submitted.status, 200);
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(receiver.count(), 0);
    server.wait_for_status("later", "succeed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_aborted_or_stopped_is_not_called() {
    let (cluster, receiver) = shop().await;
    let server = DtmServer::start(&cluster, "").await;
    server.post("prepare", &message("off", &receiver)).await;
    let abort = json!({"gid": "off", "trans_type": "msg", "rollback_reason": "no stock"});
    for _ in 0..2 {
        assert_eq!(server.post("abort", &abort).await.status, 200);
    }
    let found = server.get("query?gid=off").await.json();
    assert_eq!(
        [&found["transaction"]["status"], &found["transaction"]["rollback_reason"]],
        ["failed", "no stock"]
    );
    assert_eq!(server.post("submit", &message("off", &receiver)).await.status, 409);
    assert_eq!(server.post("forceStop", &json!({"gid": "off"})).await.status, 409);

    server.post("prepare", &message("halt", &receiver)).await;
    assert_eq!(server.post("forceStop", &json!({"gid": "halt"})).await.status, 200);
    server.wait_for_status("halt", "failed").await;
    server.post("submit", &message("gone", &receiver)).await;
    server.wait_for_status("gone", "succeed").await;
    let late = server.post("abort", &json!({"gid": "gone", "trans_type": "msg"})).await;
    let told = "trans type: 'msg' current status 'succeed', cannot abort. FAILURE";
    assert_eq!((late.status, &late.json()["message"]), (409, &json!(told)));
    for name in ["abort", "forceStop", "resetNextCronTime"] {
        let unknown = server.post(name, &json!({"gid": "none", "trans_type": "msg"})).await;
        assert_eq!(unknown.status, 500, "{name}");
        assert!(unknown.json()["message"].is_string() && unknown.json()["dtm_result"].is_null());
    }
    assert_eq!(receiver.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_are_listed_page_by_page() {
    let (cluster, receiver) = shop().await;
    let server = DtmServer::start(&cluster, "").await;
    for n in 1..=5 {
        server.post("prepare", &message(&format!("g{n}"), &receiver)).await;
    }
    let gids = |page: &Value| -> Vec<String> {
        let page = page["transactions"].as_array().expect("an array");
        page.iter().map(|t| t["gid"].as_str().expect("a gid").to_owned()).collect()
    };
    let first = server.get("all?limit=2").await.json();
    assert_eq!(gids(&first), ["g5", "g4"]);
    let position = first["next_position"].as_str().expect("a text").to_owned();
    let rest = server.get(&format!("all?limit=10&position={position}")).await.json();
    assert_eq!(
        (gids(&rest), &rest["next_position"]),
        (["g3", "g2", "g1"].map(String::from).to_vec(), &json!(""))
    );
    assert_eq!(gids(&server.get("all?gid=g2&position=&limit=1").await.json()), ["g2"]);
    let past = "all?status=prepared&transType=msg&createTimeStart=0&createTimeEnd=4102444800000";
    assert_eq!(gids(&server.get(past).await.json()).len(), 5);
    for none in ["all?status=succeed", "all?transType=saga", "all?createTimeEnd=1000"] {
        let page = server.get(none).await.json();
        assert_eq!(page, json!({"transactions": [], "next_position": ""}), "{none}");
    }
    let none = server.get("query?gid=none").await;
    assert_eq!((none.status, none.json()), (200, json!({"transaction": null, "branches": []})));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_to_a_topic_goes_to_its_subscribers() {
    let (cluster, receiver) = shop().await;
    let server = DtmServer::start(&cluster, "").await;
    let url = |name: &str| format!("{}/{name}", receiver.url());
    let subscribe = |name: &str| format!("subscribe?topic=paid&url={}&remark=r", url(name));
    for name in ["a", "b"] {
        assert_eq!(server.get(&subscribe(name)).await.status, 200);
    }
    let twice = server.get(&subscribe("a")).await;
    assert_eq!((twice.status, &twice.json()["message"]), (500, &json!("this url exists")));
    let kv = server.get("queryKV?cat=topics&key=paid").await.json();
    let key = &kv["kv"][0];
    assert_eq!((&key["cat"], &key["k"], &key["version"]), (&json!("topics"), &json!("paid"), &json!(2)));
    let subscribers: Value = serde_json::from_str(key["v"].as_str().expect("a text")).expect("JSON");
    assert_eq!(subscribers, json!([{"url": url("a"), "remark": "r"}, {"url": url("b"), "remark": "r"}]));
    let message = with(message("fan", &receiver), "steps", json!([{"action": "topic://paid"}]));
    assert_eq!(server.post("submit", &message).await.status, 200);
    server.wait_for_status("fan", "succeed").await;
    let targets: Vec<String> = receiver.received().iter().map(|request| request.target.clone()).collect();
    let of = |name: &str, branch: &str| {
        format!("/events/{name}?gid=fan&trans_type=msg&branch_id={branch}&op=action")
    };
    assert_eq!(targets, [of("a", "01-01"), of("b", "01-02")]);

    let unsubscribe = |name: &str| format!("unsubscribe?topic=paid&url={}", url(name));
    assert_eq!(server.get(&unsubscribe("a")).await.status, 200);
    for (target, told) in [
        (unsubscribe("a"), "no such an url"),
        ("unsubscribe?topic=none&url=http://h/".into(), "no such a topic"),
        ("subscribe?url=http://h/".into(), "empty topic"),
        ("subscribe?topic=paid&url=".into(), "empty url"),
    ] {
        let refused = server.get(&target).await;
        assert_eq!((refused.status, &refused.json()["message"]), (500, &json!(told)), "{target}");
    }
    server.get("subscribe?topic=other&url=http://h/").await;
    let page = server.get("scanKV?cat=topics&limit=1").await.json();
    assert_eq!((&page["kv"][0]["k"], page["next_position"] == ""), (&json!("other"), false));
    let delete = async || server.call(Method::DELETE, "/api/dtmsvr/topic/paid", "").await;
    assert_eq!(delete().await.status, 200);
    let again = delete().await;
    assert_eq!((again.status, &again.json()["message"]), (500, &json!("storage: NotFound")));
    assert_eq!(server.get("scanKV?cat=other").await.json(), json!({"kv": [], "next_position": ""}));
    assert_eq!(server.post("submit", &with(message, "gid", json!("lonely"))).await.status, 400);
}
