// SPDX-License-Identifier: PostgreSQL
//! A page of events as one packed value: what the extension sends and the relay takes apart without copying.
//!
//! All integers are big-endian. A page is a version byte (1), a flag byte (1: the window ends here), the last sequence
//! number looked at (i64) and the number of events (u32), then each event: sequence number (i64), time of publishing
//! (i64, microseconds since the Unix epoch), id (16 bytes), and topic, key, content type, headers and payload, each as
//! a length (i32, -1 for none) and its bytes. Texts are UTF-8. No content type stands for `application/json`.

use bytes::{Buf, BufMut, Bytes};
use bytestring::ByteString;
use uuid::Uuid;

const VERSION: u8 = 1;
const DONE: u8 = 1;

/// The content type of an event that has none stored.
pub const DEFAULT_CONTENT_TYPE: &str = "application/json";

/// An event of the log. Texts and payload are slices of the page that it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its place in the log.
    pub seq: i64,
    /// When it was published, in microseconds since the Unix epoch.
    pub published_at_us: i64,
    /// Constant over retries, restarts and replays.
    pub id: Uuid,
    /// Dot-separated segments.
    pub topic: ByteString,
    /// Events of one key keep their order.
    pub key: Option<ByteString>,
    /// The media type of the payload.
    pub content_type: ByteString,
    /// A JSON object of strings.
    pub headers: Option<ByteString>,
    /// The body as it goes over the wire; `None` is no body, which is not an empty one.
    pub payload: Option<Bytes>,
}

impl Event {
    /// How many bytes its texts and its payload have, the content type left out: as dtm.relay_parked counts them.
    pub fn size(&self) -> usize {
        let length = |text: &Option<ByteString>| text.as_ref().map_or(0, |text| text.len());
        self.topic.len()
            + length(&self.key)
            + length(&self.headers)
            + self.payload.as_ref().map_or(0, Bytes::len)
    }

    /// A copy that shares no memory with the page that the event came in.
    pub fn detached(&self) -> Self {
        let copy = |text: &ByteString| ByteString::from(&**text);
        Event {
            topic: copy(&self.topic),
            key: self.key.as_ref().map(copy),
            content_type: copy(&self.content_type),
            headers: self.headers.as_ref().map(copy),
            payload: self.payload.as_ref().map(|payload| Bytes::copy_from_slice(payload)),
            ..*self
        }
    }
}

/// Some events of a window, in the order of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The last sequence number looked at: the next page begins after it.
    pub scanned: i64,
    /// Nothing more lies in the window.
    pub done: bool,
    /// The events that matched.
    pub events: Vec<Event>,
}

/// A value that is no page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedPage {
    /// Written by a version that this one does not know.
    #[error("page version {0} is unknown to this relay")]
    Version(u8),
    /// It ends too early, or goes on behind its end.
    #[error("page is cut short or has bytes left over")]
    Length,
    /// A text that is not UTF-8.
    #[error("page has a text that is not UTF-8")]
    Encoding,
}

/// The fields of an event on its way into a page.
#[derive(Clone, Copy, Debug)]
pub struct EventRef<'a> {
    /// See [`Event`].
    pub seq: i64,
    /// See [`Event`].
    pub published_at_us: i64,
    /// See [`Event`].
    pub id: &'a [u8; 16],
    /// See [`Event`].
    pub topic: &'a [u8],
    /// See [`Event`].
    pub key: Option<&'a [u8]>,
    /// `None` stands for [`DEFAULT_CONTENT_TYPE`].
    pub content_type: Option<&'a [u8]>,
    /// See [`Event`].
    pub headers: Option<&'a [u8]>,
    /// See [`Event`].
    pub payload: Option<&'a [u8]>,
}

const HEADER_BYTES: usize = 14;

/// Packs a page, event by event.
#[derive(Debug)]
pub struct PageWriter {
    bytes: Vec<u8>,
    events: u32,
}

impl Default for PageWriter {
    fn default() -> Self {
        let mut bytes = Vec::with_capacity(4_096);
        bytes.resize(HEADER_BYTES, 0);
        PageWriter { bytes, events: 0 }
    }
}

impl PageWriter {
    /// Adds an event.
    pub fn push(&mut self, event: EventRef<'_>) {
        self.events += 1;
        self.bytes.put_i64(event.seq);
        self.bytes.put_i64(event.published_at_us);
        self.bytes.put_slice(event.id);
        for field in [Some(event.topic), event.key, event.content_type, event.headers, event.payload] {
            self.bytes.put_i32(field.map_or(-1, |bytes| bytes.len() as i32));
            self.bytes.put_slice(field.unwrap_or_default());
        }
    }

    /// How many bytes the page has by now.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// How many events it has by now.
    pub fn len(&self) -> usize {
        self.events as usize
    }

    /// Whether it has no event yet.
    pub fn is_empty(&self) -> bool {
        self.events == 0
    }

    /// The packed page: `scanned` is the last sequence number looked at, `done` says that the window ends here.
    pub fn finish(mut self, scanned: i64, done: bool) -> Vec<u8> {
        let mut header = &mut self.bytes[..HEADER_BYTES];
        header.put_u8(VERSION);
        header.put_u8(if done { DONE } else { 0 });
        header.put_i64(scanned);
        header.put_u32(self.events);
        self.bytes
    }
}

impl Page {
    /// Takes a packed page apart. Its events share the page's memory.
    pub fn decode(mut bytes: Bytes) -> Result<Page, MalformedPage> {
        let bytes = &mut bytes;
        let version = bytes.try_get_u8().map_err(|_| MalformedPage::Length)?;
        if version != VERSION {
            return Err(MalformedPage::Version(version));
        }
        let done = bytes.try_get_u8().map_err(|_| MalformedPage::Length)? & DONE != 0;
        let scanned = bytes.try_get_i64().map_err(|_| MalformedPage::Length)?;
        let count = bytes.try_get_u32().map_err(|_| MalformedPage::Length)?;
        let mut events = Vec::with_capacity((count as usize).min(bytes.remaining()));
        for _ in 0..count {
            events.push(event(bytes)?);
        }
        if bytes.has_remaining() { Err(MalformedPage::Length) } else { Ok(Page { scanned, done, events }) }
    }
}

fn event(bytes: &mut Bytes) -> Result<Event, MalformedPage> {
    let cut = |_| MalformedPage::Length;
    let seq = bytes.try_get_i64().map_err(cut)?;
    let published_at_us = bytes.try_get_i64().map_err(cut)?;
    let id = Uuid::from_u128(bytes.try_get_u128().map_err(cut)?);
    Ok(Event {
        seq,
        published_at_us,
        id,
        topic: text(bytes)?.ok_or(MalformedPage::Length)?,
        key: text(bytes)?,
        content_type: text(bytes)?.unwrap_or(ByteString::from_static(DEFAULT_CONTENT_TYPE)),
        headers: text(bytes)?,
        payload: field(bytes)?,
    })
}

fn field(bytes: &mut Bytes) -> Result<Option<Bytes>, MalformedPage> {
    match bytes.try_get_i32().map_err(|_| MalformedPage::Length)? {
        -1 => Ok(None),
        n if n >= 0 && n as usize <= bytes.remaining() => Ok(Some(bytes.split_to(n as usize))),
        _ => Err(MalformedPage::Length),
    }
}

fn text(bytes: &mut Bytes) -> Result<Option<ByteString>, MalformedPage> {
    let Some(field) = field(bytes)? else { return Ok(None) };
    ByteString::try_from(field).map(Some).map_err(|_| MalformedPage::Encoding)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Vec<u8> {
        let mut writer = PageWriter::default();
        let bare = EventRef {
            seq: 7,
            published_at_us: 1_700_000_000_000_000,
            id: &[9; 16],
            topic: b"orders.created",
            key: None,
            content_type: None,
            headers: None,
            payload: None,
        };
        writer.push(bare);
        writer.push(EventRef {
            seq: 9,
            key: Some(b"k"),
            content_type: Some(b"text/plain"),
            headers: Some(b"{\"a\": \"b\"}"),
            payload: Some(b""),
            ..bare
        });
        writer.finish(12, true)
    }

    #[test]
    fn a_page_survives_its_packing() {
        let page = Page::decode(page().into()).unwrap();
        assert_eq!((page.scanned, page.done, page.events.len()), (12, true, 2));
        let [bare, full] = &page.events[..] else { unreachable!() };
        assert_eq!((bare.seq, &*bare.topic, &*bare.content_type), (7, "orders.created", "application/json"));
        assert_eq!((&bare.key, &bare.headers, &bare.payload), (&None, &None, &None));
        assert_eq!(full.key.as_deref(), Some("k"));
        assert_eq!(full.payload.as_deref(), Some(&b""[..]), "an empty body is not no body");
    }

    #[test]
    fn a_damaged_page_is_refused_and_never_panics() {
        let whole = page();
        for cut in 0..whole.len() {
            assert!(Page::decode(whole[..cut].to_vec().into()).is_err(), "cut at {cut}");
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert_eq!(Page::decode(longer.into()), Err(MalformedPage::Length));
        let mut other = whole;
        other[0] = 2;
        assert_eq!(Page::decode(other.into()), Err(MalformedPage::Version(2)));
    }
}
