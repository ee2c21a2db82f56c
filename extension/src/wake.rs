// SPDX-License-Identifier: PostgreSQL
//! Wake-up: a transaction that published sets, once it has committed, the latches of the backends that wait for it. This
//! needs shared memory, hence the library preloaded; without it relays poll.
//!
//! No NOTIFY: it holds a lock of the whole cluster across the commit's flush, and does not go with PREPARE TRANSACTION.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use pgrx::lwlock::PgLwLock;
use pgrx::prelude::*;
use pgrx::shmem::PGRXSharedMemory;

/// How many backends can wait at once, in all databases of the cluster.
const WAITERS_MAX: usize = 64;

/// A backend that waits: its latch (0: the place is free) and its database.
#[derive(Default)]
struct Waiter {
    latch: AtomicUsize,
    database: AtomicU32,
}

struct Waiters {
    places: [Waiter; WAITERS_MAX],
}

impl Default for Waiters {
    fn default() -> Self {
        Waiters { places: std::array::from_fn(|_| Waiter::default()) }
    }
}

// SAFETY: atomics only, without pointers that mean anything outside shared memory: latches lie in shared memory, at the same
// address in every backend.
unsafe impl PGRXSharedMemory for Waiters {}

// SAFETY: the name is this extension's own.
static WAITERS: PgLwLock<Waiters> = unsafe { PgLwLock::new(c"pg_dtm_waiters") };

thread_local! {
    static PRELOADED: Cell<bool> = const { Cell::new(false) };
    static PUBLISHED: Cell<bool> = const { Cell::new(false) };
    static EXIT_HOOKED: Cell<bool> = const { Cell::new(false) };
}

/// Called when the library is loaded.
pub fn init() {
    // SAFETY: a variable of the process that loads the library.
    if unsafe { !pg_sys::process_shared_preload_libraries_in_progress } {
        return;
    }
    pgrx::pg_shmem_init!(WAITERS);
    PRELOADED.set(true);
    // SAFETY: the callback lives as long as the library, which is never unloaded; backends inherit it.
    unsafe { pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut()) };
}

/// Whether commits wake waiting backends.
#[pg_extern]
fn library_preloaded() -> bool {
    PRELOADED.get()
}

/// Says that this transaction has published: its commit wakes who waits.
pub fn at_commit() {
    PUBLISHED.set(true);
}

#[pg_guard]
unsafe extern "C-unwind" fn transaction_ends(
    event: pg_sys::XactEvent::Type,
    _argument: *mut std::ffi::c_void,
) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    match event {
        XACT_EVENT_COMMIT if PUBLISHED.replace(false) => wake_waiters(),
        XACT_EVENT_ABORT | XACT_EVENT_PREPARE => PUBLISHED.set(false),
        _ => {}
    }
}

fn wake_waiters() {
    // SAFETY: a variable of the backend.
    let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
    for waiter in &WAITERS.share().places {
        let latch = waiter.latch.load(Ordering::Acquire);
        if latch != 0 && waiter.database.load(Ordering::Relaxed) == database {
            // SAFETY: the address of a latch in shared memory. A place can be given up at this moment: to set the latch of a
            // backend that no longer waits does no harm.
            unsafe { pg_sys::SetLatch(latch as *mut pg_sys::Latch) };
        }
    }
}

/// A place among the waiting, given up when dropped.
pub struct Listening(());

/// Takes a place among the waiting; none if the library is not preloaded or all places are taken.
pub fn listen() -> Option<Listening> {
    if !PRELOADED.get() {
        return None;
    }
    if !EXIT_HOOKED.replace(true) {
        // SAFETY: the callback lives as long as the library. A terminated backend does not unwind.
        unsafe { pg_sys::before_shmem_exit(Some(backend_exits), pg_sys::Datum::from(0)) };
    }
    let latch = own_latch();
    // SAFETY: a variable of the backend.
    let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
    let waiters = WAITERS.exclusive();
    let free = waiters.places.iter().find(|waiter| waiter.latch.load(Ordering::Relaxed) == 0)?;
    free.database.store(database, Ordering::Relaxed);
    free.latch.store(latch, Ordering::Release);
    Some(Listening(()))
}

fn own_latch() -> usize {
    // SAFETY: a variable of the backend.
    unsafe { pg_sys::MyLatch as usize }
}

fn leave() {
    let latch = own_latch();
    for waiter in &WAITERS.exclusive().places {
        if waiter.latch.load(Ordering::Relaxed) == latch {
            waiter.latch.store(0, Ordering::Release);
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        leave();
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn backend_exits(_code: i32, _argument: pg_sys::Datum) {
    leave();
}
