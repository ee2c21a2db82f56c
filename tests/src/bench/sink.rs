// SPDX-License-Identifier: PostgreSQL
//! The endpoint of a benchmark: a process of its own, so that taking events does not stand in the way of publishing them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::arrivals::{ARRIVALS, Arrival, COUNT, decode};
use crate::process;

/// A running endpoint. Dropping it ends it.
pub struct Sink {
    child: Child,
    port: u16,
}

impl Sink {
    /// Starts one.
    pub fn start() -> Sink {
        let program = std::env::var_os("DTM_RECEIVER").map(PathBuf::from);
        let program = program.expect("DTM_RECEIVER is not set: run this by cargo xtask");
        let mut child =
            Command::new(program).arg("--record").stdout(Stdio::piped()).spawn().expect("the receiver");
        let mut line = String::new();
        let output = child.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut line).expect("its port");
        let port = line.trim().parse().expect("a port");
        Sink { child, port }
    }

    /// Where events go.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/events", self.port)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many events have arrived.
    pub fn count(&self) -> usize {
        String::from_utf8(self.get(COUNT)).ok().and_then(|text| text.parse().ok()).expect("a number")
    }

    /// Waits until so many have arrived.
    pub async fn wait_for(&self, count: usize, deadline: Duration) {
        let arrived = process::holds_within(deadline, || self.count() >= count).await;
        assert!(arrived, "{} of {count} arrived within {deadline:?}", self.count());
    }

    /// What has arrived, from a number on.
    pub fn arrivals(&self, from: usize) -> Vec<Arrival> {
        decode(&self.get(&format!("{ARRIVALS}?{from}")))
    }

    /// The body of an answer. A client library would be one more thing that takes time.
    fn get(&self, target: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).expect("the receiver");
        let request = format!("GET {target} HTTP/1.1\r\nhost: receiver\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("a request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        let end_of_head = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
        answer.split_off(end_of_head + 4)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
