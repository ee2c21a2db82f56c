// SPDX-License-Identifier: PostgreSQL
//! `dtm.publish` and its relatives: arguments in, checked events into the log, ids out.

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;

use crate::event::{self, NewEvent};
use crate::id;
use crate::log::append;
use crate::refusal::Refusal;
use crate::wake;

/// The places of the arguments: the same in all four functions but for the content type, which only the two for bytes have.
struct Layout {
    content_type: Option<usize>,
    key: usize,
}

const JSON: Layout = Layout { content_type: None, key: 2 };
const BYTES: Layout = Layout { content_type: Some(2), key: 3 };

#[pg_extern]
fn publish(fcinfo: FunctionCallInfo) -> pgrx::Uuid {
    // SAFETY: called with the arguments that 03-publish.sql declares.
    unsafe { one(fcinfo, &JSON) }
}

#[pg_extern]
fn publish_bytes(fcinfo: FunctionCallInfo) -> pgrx::Uuid {
    // SAFETY: as above.
    unsafe { one(fcinfo, &BYTES) }
}

#[pg_extern]
fn publish_many(fcinfo: FunctionCallInfo) -> Vec<pgrx::Uuid> {
    // SAFETY: as above.
    unsafe { many(fcinfo, &JSON) }
}

#[pg_extern]
fn publish_bytes_many(fcinfo: FunctionCallInfo) -> Vec<pgrx::Uuid> {
    // SAFETY: as above.
    unsafe { many(fcinfo, &BYTES) }
}

/// The arguments of one event.
struct Arguments {
    payload: Option<pg_sys::Datum>,
    key: Option<pg_sys::Datum>,
    headers: Option<pg_sys::Datum>,
    id: Option<pg_sys::Datum>,
    deliver_at: Option<pg_sys::Datum>,
}

/// What all events of one call share.
struct Shared {
    topic: pg_sys::Datum,
    content_type: Option<pg_sys::Datum>,
    now: pg_sys::TimestampTz,
}

/// An argument of a function; `None`: null.
///
/// # Safety
/// The function is declared with so many.
pub(crate) unsafe fn argument(fcinfo: FunctionCallInfo, at: usize) -> Option<pg_sys::Datum> {
    // SAFETY: the caller passes an index that the function was declared with.
    unsafe {
        let argument = (*fcinfo).args.as_slice((*fcinfo).nargs as usize)[at];
        (!argument.isnull).then_some(argument.value)
    }
}

fn refuse_read_only() -> Result<(), Refusal> {
    // SAFETY: reads a variable of the backend, and shared memory.
    let (read_only, standby) = unsafe { (pg_sys::XactReadOnly, pg_sys::RecoveryInProgress()) };
    if !read_only && !standby {
        return Ok(());
    }
    let (detail, hint) = if standby {
        ("The server is a standby.", "Connect to the primary.")
    } else {
        (
            "The transaction is read-only.",
            "Begin it with BEGIN READ WRITE, or see who set default_transaction_read_only.",
        )
    };
    let code = PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION;
    Err(Refusal::new(code, "cannot publish in a read-only transaction", detail, hint))
}

unsafe fn shared(fcinfo: FunctionCallInfo, layout: &Layout) -> Result<Shared, Refusal> {
    // SAFETY: the first argument is the topic, a text, and so is the content type where there is one.
    unsafe {
        refuse_read_only()?;
        let topic = event::check_topic(argument(fcinfo, 0))?;
        let content_type =
            layout.content_type.map(|at| event::check_content_type(argument(fcinfo, at))).transpose()?;
        Ok(Shared { topic, content_type, now: pg_sys::GetCurrentTimestamp() })
    }
}

unsafe fn check(shared: &Shared, arguments: Arguments) -> Result<NewEvent, Refusal> {
    // SAFETY: the arguments have the types that 03-publish.sql declares.
    unsafe {
        let bytes = match shared.content_type {
            Some(_) => arguments.payload,
            None => arguments.payload.map(|jsonb| event::json_body(jsonb)).transpose()?,
        };
        let given = arguments.id.map(|id| *id.cast_mut_ptr::<[u8; 16]>());
        let deliver_at = arguments.deliver_at.map(|at| at.value() as i64).filter(|&at| at > shared.now);
        if deliver_at == Some(i64::MAX) {
            let hint = "Pass the time at which the event shall be delivered.";
            return Err(Refusal::argument("deliver_at is never", "It is infinity.", hint));
        }
        Ok(NewEvent {
            id: given.unwrap_or_else(|| id::new(shared.now)),
            id_given: given.is_some(),
            topic: shared.topic,
            key: arguments.key.map(|key| event::check_key(key)).transpose()?,
            content_type: shared.content_type,
            headers: arguments.headers.map(|headers| event::check_headers(headers)).transpose()?.flatten(),
            payload: bytes.map(|payload| event::check_payload(payload)).transpose()?,
            deliver_at,
        })
    }
}

unsafe fn one(fcinfo: FunctionCallInfo, layout: &Layout) -> pgrx::Uuid {
    // SAFETY: the places of the arguments are those of 03-publish.sql.
    let event = unsafe {
        shared(fcinfo, layout).and_then(|shared| {
            let arguments = Arguments {
                payload: argument(fcinfo, 1),
                key: argument(fcinfo, layout.key),
                headers: argument(fcinfo, layout.key + 1),
                id: argument(fcinfo, layout.key + 2),
                deliver_at: argument(fcinfo, layout.key + 3),
            };
            Ok((check(&shared, arguments)?, shared.now))
        })
    };
    let (event, now) = event.unwrap_or_else(|refusal| refusal.raise());
    append::append(std::slice::from_ref(&event), now);
    wake::at_commit();
    pgrx::Uuid::from_bytes(event.id)
}

unsafe fn many(fcinfo: FunctionCallInfo, layout: &Layout) -> Vec<pgrx::Uuid> {
    // SAFETY: as in `one`, with arrays in the place of single values.
    let events = unsafe {
        shared(fcinfo, layout).and_then(|shared| Ok((check_many(fcinfo, layout, &shared)?, shared.now)))
    };
    let (events, now) = events.unwrap_or_else(|refusal| refusal.raise());
    append::append(&events, now);
    wake::at_commit();
    events.iter().map(|event| pgrx::Uuid::from_bytes(event.id)).collect()
}

/// # Safety
/// `fcinfo` has the arguments of one of the two functions for many events.
unsafe fn check_many(
    fcinfo: FunctionCallInfo,
    layout: &Layout,
    shared: &Shared,
) -> Result<Vec<NewEvent>, Refusal> {
    // SAFETY: by this function's contract.
    unsafe {
        let Some(payloads) = elements(fcinfo, 1, "payloads")? else {
            let hint = "Pass an array; an element of it may be null and is an event without a body.";
            return Err(Refusal::argument("the payloads are missing", "The array is null.", hint));
        };
        let optional = |at: usize, name: &str| -> Result<Vec<Option<pg_sys::Datum>>, Refusal> {
            let Some(elements) = elements(fcinfo, at, name)? else { return Ok(vec![None; payloads.len()]) };
            if elements.len() == payloads.len() {
                return Ok(elements);
            }
            let detail = format!("There are {} payloads and {} {name}.", payloads.len(), elements.len());
            Err(Refusal::argument(
                "the arrays differ in length",
                detail,
                "Pass one element for each payload, or null for none at all.",
            ))
        };
        let keys = optional(layout.key, "keys")?;
        let headers = optional(layout.key + 1, "headers")?;
        let ids = optional(layout.key + 2, "ids")?;
        let times = optional(layout.key + 3, "deliver_at")?;
        let arguments = |i: usize| Arguments {
            payload: payloads[i],
            key: keys[i],
            headers: headers[i],
            id: ids[i],
            deliver_at: times[i],
        };
        (0..payloads.len()).map(|i| check(shared, arguments(i))).collect()
    }
}

/// The elements of an array argument; none if the argument is null.
///
/// # Safety
/// Argument `at` is an array.
unsafe fn elements(
    fcinfo: FunctionCallInfo,
    at: usize,
    name: &str,
) -> Result<Option<Vec<Option<pg_sys::Datum>>>, Refusal> {
    // SAFETY: by this function's contract; deconstruct_array fills in as many datums and flags as it says.
    unsafe {
        let Some(datum) = argument(fcinfo, at) else { return Ok(None) };
        let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::ArrayType>();
        if (*array).ndim > 1 {
            let detail = format!("{name} has {} dimensions.", (*array).ndim);
            return Err(Refusal::argument(
                "an array has several dimensions",
                detail,
                "Pass a one-dimensional array.",
            ));
        }
        let (mut length, mut by_value, mut align) = (0i16, false, 0 as std::ffi::c_char);
        pg_sys::get_typlenbyvalalign((*array).elemtype, &mut length, &mut by_value, &mut align);
        let (mut values, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        pg_sys::deconstruct_array(
            array,
            (*array).elemtype,
            i32::from(length),
            by_value,
            align,
            &mut values,
            &mut nulls,
            &mut count,
        );
        Ok(Some((0..count as usize).map(|i| (!*nulls.add(i)).then(|| *values.add(i))).collect()))
    }
}

/// For events that were checked when they were published: no event without the checks above comes from anywhere else.
#[pg_extern]
fn append(fcinfo: FunctionCallInfo) -> i64 {
    // SAFETY: called with the arguments that 07-relay.sql declares, id and topic among them.
    unsafe {
        let (Some(id), Some(topic)) = (argument(fcinfo, 0), argument(fcinfo, 1)) else {
            let hint = "Publish by dtm.publish.";
            Refusal::argument("an event needs an id and a topic", "One of them is null.", hint).raise()
        };
        let event = NewEvent {
            id: *id.cast_mut_ptr::<[u8; 16]>(),
            id_given: false,
            topic,
            key: argument(fcinfo, 2),
            content_type: argument(fcinfo, 3),
            headers: argument(fcinfo, 4),
            payload: argument(fcinfo, 5),
            deliver_at: None,
        };
        append::append(&[event], pg_sys::GetCurrentTimestamp());
        wake::at_commit();
    }
    1
}
