// SPDX-License-Identifier: PostgreSQL
#[cfg(not(panic = "unwind"))]
compile_error!("PostgreSQL errors unwind through Rust frames: build with panic = \"unwind\"");
pgrx::pg_module_magic!();
