// SPDX-License-Identifier: PostgreSQL
//! Variable-length values of PostgreSQL as byte slices, and back.

use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;

use crate::refusal::Refusal;

/// The bytes of a text, bytea or jsonb value, detoasted if it must be.
///
/// # Safety
/// `datum` is a non-null varlena of PostgreSQL; the slice is used no longer than the current memory context lives.
pub unsafe fn bytes<'a>(datum: pg_sys::Datum) -> &'a [u8] {
    // SAFETY: by this function's contract; the detoasted copy lives in the current memory context.
    unsafe {
        let varlena = pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr());
        pgrx::varlena::varlena_to_byte_slice(varlena)
    }
}

/// A new text or bytea value in the current memory context.
pub fn from_bytes(bytes: &[u8]) -> pg_sys::Datum {
    // SAFETY: copies the slice into a palloc'd varlena of its length.
    unsafe {
        pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(bytes.as_ptr().cast(), bytes.len() as i32))
    }
}

/// The text of a jsonb value as a varlena, in the database's encoding.
///
/// # Safety
/// `datum` is a non-null jsonb value.
pub unsafe fn json_text(datum: pg_sys::Datum) -> pg_sys::Datum {
    const VARHDRSZ: i32 = 4;
    // SAFETY: by this function's contract. The text is written behind room for the varlena's header, which is filled in
    // afterwards: StringInfo data is palloc'd, hence aligned, and enlarged by PostgreSQL itself.
    unsafe {
        let jsonb = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::Jsonb>();
        let length = pgrx::varlena::varsize_any(jsonb.cast()) as i32;
        let mut out = pg_sys::StringInfoData::default();
        pg_sys::initStringInfo(&mut out);
        pg_sys::appendBinaryStringInfo(&mut out, [0u8; VARHDRSZ as usize].as_ptr().cast(), VARHDRSZ);
        pg_sys::JsonbToCString(&mut out, &mut (*jsonb).root, length);
        pgrx::varlena::set_varsize_4b(out.data.cast(), out.len);
        pg_sys::Datum::from(out.data)
    }
}

/// A text of the database in UTF-8. Raises PostgreSQL's error where there is none: what comes from a user is checked by
/// [`check_utf8`] before it is stored.
pub fn to_utf8(text: &[u8]) -> &[u8] {
    if database_is_utf8() {
        return text;
    }
    // SAFETY: converts `len` bytes; answers its argument or a palloc'd, zero-terminated copy.
    unsafe {
        let length = text.len() as i32;
        let converted =
            pg_sys::pg_server_to_any(text.as_ptr().cast(), length, pg_sys::pg_enc::PG_UTF8 as i32);
        if converted.cast_const() == text.as_ptr().cast() {
            return text;
        }
        std::ffi::CStr::from_ptr(converted).to_bytes()
    }
}

/// A text of the database in UTF-8, which is what goes over the wire; `what` names it in the refusal where there is none.
pub fn check_utf8<'a>(text: &'a [u8], what: &str) -> Result<&'a [u8], Refusal> {
    if database_is_utf8() {
        return Ok(text);
    }
    let refused = |_error: CaughtError| {
        Err(Refusal::new(
            PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
            format!("the {what} cannot be converted to UTF-8"),
            "Events are delivered in UTF-8, which has no such character or byte sequence.",
            "Encode it as UTF-8, or publish it as bytes.",
        ))
    };
    // The conversion holds no resources, so that nothing is left behind where its error is caught.
    PgTryBuilder::new(std::panic::AssertUnwindSafe(|| Ok(to_utf8(text))))
        .catch_when(PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE, refused)
        .catch_when(PgSqlErrorCode::ERRCODE_UNTRANSLATABLE_CHARACTER, refused)
        .execute()
}

/// Whether texts of the database are UTF-8.
pub fn database_is_utf8() -> bool {
    // SAFETY: reads a setting of the session.
    unsafe { pg_sys::GetDatabaseEncoding() == pg_sys::pg_enc::PG_UTF8 as i32 }
}
