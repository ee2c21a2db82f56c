-- SPDX-License-Identifier: PostgreSQL
-- Global transactions: what is to be done, how far it is, and when it is tried again. The relay's coordinator drives them to their
-- end. One that is submitted announces itself by an event of the topic dtm.transactions, to which the coordinator has the
-- subscription of that name; only what is prepared, delayed or has failed waits in dtm.due.

CREATE SEQUENCE dtm.transaction_id_seq AS bigint;
-- A row is written when it is made and when it ends; the room for the second version is kept free beside it.
CREATE TABLE dtm.transaction (
    id             bigint      NOT NULL DEFAULT pg_catalog.nextval('dtm.transaction_id_seq'),
    gid            text        PRIMARY KEY,
    trans_type     text        NOT NULL CHECK (trans_type IN ('msg')),
    status         text        NOT NULL CHECK (status IN ('prepared', 'submitted', 'aborting', 'succeed', 'failed')),
    branches       jsonb       NOT NULL,   -- [{"branch_id", "op", "action", "key", "headers"}, …] in the order of their calls
    payloads       bytea[]     NOT NULL,   -- of each branch, as it goes over the wire; null: none
    payload_bytes  int         NOT NULL,   -- of all of them together
    query_prepared text,                   -- who is asked whether a prepared one is committed
    options        jsonb       NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    finished_at    timestamptz,
    reason         text,                   -- why it failed
    failures       int         NOT NULL DEFAULT 0,  -- since it last got ahead: how long the pause to the next attempt is
    last_error     text,                   -- of asking whether it is committed
    stuck_since    timestamptz             -- it waits for somebody's decision
) WITH (fillfactor = 60);
CREATE UNIQUE INDEX transaction_id ON dtm.transaction (id);
CREATE INDEX transaction_stuck ON dtm.transaction (gid) WHERE stuck_since IS NOT NULL;

-- Branches of which there is more to tell than their transaction's status does.
CREATE TABLE dtm.branch (
    gid             text        NOT NULL,
    branch_id       text        NOT NULL,
    op              text        NOT NULL,
    status          text        NOT NULL CHECK (status IN ('prepared', 'succeed', 'failed')),
    attempts        int         NOT NULL,
    last_status     int,                   -- of the last answer, where it was HTTP's
    last_error      text,
    first_attempt_at timestamptz NOT NULL, -- that is told of, or since somebody decided to go on
    last_attempt_at timestamptz NOT NULL,
    finished_at     timestamptz,
    PRIMARY KEY (gid, branch_id, op)
);

-- What is done when its time has come.
CREATE TABLE dtm.due (
    gid           text        PRIMARY KEY,
    due_at        timestamptz NOT NULL,
    endpoint      text,                         -- whose turn it waits for: no more are taken up than that takes
    failed_before boolean     NOT NULL DEFAULT false -- it may be to blame itself
);
CREATE INDEX due_endpoint ON dtm.due (endpoint, failed_before, due_at);

SELECT pg_catalog.pg_extension_config_dump('dtm.transaction_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.transaction', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.branch', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.due', '');
