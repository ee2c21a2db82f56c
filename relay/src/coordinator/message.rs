// SPDX-License-Identifier: PostgreSQL
//! 2-phase messages: prepared, they are asked about; submitted, their actions are called until all have succeeded. There is no
//! way back from submitted: an action that answers FAILURE is tried again like any other that has not succeeded.

use super::machine::{Next, State, Status};

/// What is to be done next.
pub fn next(state: &mut State) -> Next {
    match state.status {
        Status::Prepared => return Next::AskWhetherCommitted,
        Status::Submitted => {}
        Status::Aborting | Status::Succeed | Status::Failed => return Next::Settle,
    }
    let mut open: Vec<usize> =
        state.branches.iter().enumerate().filter(|(_, branch)| !branch.is_done).map(|(at, _)| at).collect();
    if open.is_empty() {
        state.status = Status::Succeed;
        return Next::Settle;
    }
    if !state.concurrent {
        open.truncate(1);
    }
    Next::Call(open)
}
