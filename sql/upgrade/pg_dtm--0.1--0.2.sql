-- SPDX-License-Identifier: PostgreSQL
\echo Use "ALTER EXTENSION pg_dtm UPDATE TO '0.2'" to load this file. \quit

-- From 0.1: what was delivered, and what was not, stays as it is. What this makes and what sql/install makes is the same; a test
-- compares the two.

ALTER TABLE dtm.subscription DROP CONSTRAINT subscription_state_check;
ALTER TABLE dtm.subscription ADD CHECK (state IN ('active', 'paused', 'disabled', 'dropped'));
ALTER TABLE dtm.subscription ADD COLUMN revision bigint NOT NULL DEFAULT 0;
ALTER TABLE dtm.subscription ADD COLUMN started_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp();
ALTER TABLE dtm.subscription ADD COLUMN state_before text;
ALTER TABLE dtm.subscription ADD COLUMN reason_before text;
ALTER TABLE dtm.subscription ADD COLUMN era int;
-- Those of a database that was restored and that no relay has met since are left to be met.
UPDATE dtm.subscription SET era = i.era
FROM dtm.installation i
WHERE i.era IN (SELECT e.era FROM dtm.eras e)
   OR NOT EXISTS (SELECT FROM dtm.position_log_1 p WHERE p.era <> i.era)
      AND NOT EXISTS (SELECT FROM dtm.position_log_2 p WHERE p.era <> i.era);
ALTER TABLE dtm.eras DROP CONSTRAINT eras_ordinal_key;
DROP FUNCTION dtm.register_era(int);
ALTER TABLE dtm.cursor_log_1 ADD COLUMN ahead bigint[];
ALTER TABLE dtm.cursor_log_2 ADD COLUMN ahead bigint[];
ALTER TABLE dtm.cursor_log_1 ADD COLUMN windows uuid[];
ALTER TABLE dtm.cursor_log_2 ADD COLUMN windows uuid[];
ALTER TABLE dtm.heartbeat_log_1 ADD COLUMN shares boolean NOT NULL DEFAULT false;
-- Named as CREATE TABLE … LIKE names it, from PostgreSQL 18 on.
ALTER TABLE dtm.heartbeat_log_2 ADD COLUMN shares boolean CONSTRAINT heartbeat_log_1_shares_not_null NOT NULL DEFAULT false;
CREATE INDEX heartbeat_log_1_expires ON dtm.heartbeat_log_1 (expires_at);
CREATE INDEX heartbeat_log_2_expires_at_idx ON dtm.heartbeat_log_2 (expires_at);

CREATE OR REPLACE VIEW dtm.heartbeat_log AS SELECT * FROM dtm.heartbeat_log_1 UNION ALL SELECT * FROM dtm.heartbeat_log_2;

-- How far the turning over of the log and of control data is (13-rotation.sql). Whoever writes control data holds a lock on this
-- table, so that the segment does not change under it. Not dumped: what is restored begins anew.
CREATE TABLE dtm.rotation (
    only_row        boolean  PRIMARY KEY DEFAULT true CHECK (only_row),
    log_retired     bigint[] NOT NULL DEFAULT '{NULL,NULL,NULL}', -- by segment: the transaction that found it needed by nobody
    log_starts      bigint[] NOT NULL DEFAULT '{0,0,0}', -- by segment: dtm.start_seq at that time
    log_held_up     timestamptz[] NOT NULL DEFAULT '{NULL,NULL,NULL}', -- by segment: when somebody was in the way
    control_retired bigint,                   -- the transaction that copied what is needed out of the segment that is not written
    control_held_up timestamptz
);
INSERT INTO dtm.rotation DEFAULT VALUES;

-- How often subscriptions were set to a place, be it by transactions that have not ended: what is needed of the log may have
-- become more.
CREATE SEQUENCE dtm.start_seq AS bigint CACHE 1;

-- What one relay does at a time: it locks the row. No advisory locks: every role of the database could take those.
CREATE TABLE dtm.turn (name text PRIMARY KEY);
INSERT INTO dtm.turn VALUES ('rotation'), ('delayed');

-- False: another relay is at it.
CREATE FUNCTION dtm.take_turn(name text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM FROM dtm.turn t WHERE t.name = take_turn.name FOR UPDATE SKIP LOCKED;
    RETURN FOUND;
END
$$;


-- Subscriptions, positions and cursors.

-- A cursor and the positions that it names stand in the same segment.
CREATE OR REPLACE VIEW dtm.position_log AS
SELECT *, 1::smallint AS segment FROM dtm.position_log_1 UNION ALL SELECT *, 2::smallint FROM dtm.position_log_2;
CREATE OR REPLACE VIEW dtm.cursor_log AS
SELECT *, 1::smallint AS segment FROM dtm.cursor_log_1 UNION ALL SELECT *, 2::smallint FROM dtm.cursor_log_2;

-- The segment that is written, which stays so until the transaction ends: rotation waits for the lock that this takes. An old
-- snapshot does not count, that of a REPEATABLE READ transaction for one: it is the segment of now.
CREATE FUNCTION dtm.control_segment() RETURNS smallint
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'control_segment_wrapper';


CREATE OR REPLACE FUNCTION dtm.store_positions(bodies text[]) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ids bigint[];
    segment smallint;
BEGIN
    IF cardinality(bodies) = 0 THEN
        RETURN '{}';
    END IF;
    segment := dtm.control_segment();
    ids := ARRAY(SELECT nextval('dtm.position_id_seq') FROM generate_subscripts(bodies, 1));
    INSERT INTO dtm.position_log_1 (id, era, seq, low, body)
    SELECT p.id, dtm.position_era(p.body), dtm.position_seq(p.body), dtm.position_low(p.body), p.body
    FROM unnest(ids, bodies) AS p (id, body) WHERE segment = 1;
    INSERT INTO dtm.position_log_2 (id, era, seq, low, body)
    SELECT p.id, dtm.position_era(p.body), dtm.position_seq(p.body), dtm.position_low(p.body), p.body
    FROM unnest(ids, bodies) AS p (id, body) WHERE segment = 2;
    RETURN ids;
END
$$;

-- Makes sure that positions stand in the segment that is written. Answers those that are nowhere any more.
CREATE FUNCTION dtm.keep_positions(ids bigint[]) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    written smallint := dtm.control_segment();
    missing bigint[] := ARRAY(
        SELECT DISTINCT n.id FROM unnest(ids) AS n (id)
        WHERE n.id > 0 AND NOT EXISTS (SELECT FROM dtm.position_log p WHERE p.id = n.id AND p.segment = written));
BEGIN
    IF missing = '{}' THEN
        RETURN missing;
    END IF;
    -- ON CONFLICT: another relay is at it, too.
    INSERT INTO dtm.position_log_1 SELECT * FROM dtm.position_log_2 p WHERE p.id = ANY (missing) AND written = 1
    ON CONFLICT DO NOTHING;
    INSERT INTO dtm.position_log_2 SELECT * FROM dtm.position_log_1 p WHERE p.id = ANY (missing) AND written = 2
    ON CONFLICT DO NOTHING;
    RETURN ARRAY(SELECT unnest(missing) EXCEPT SELECT p.id FROM dtm.position_log p WHERE p.id = ANY (missing));
END
$$;

-- A dropped subscription has lost events: nobody shall go on past that without saying so.
-- The row stays locked: else it could be dropped between this and what its caller does.
CREATE FUNCTION dtm.check_not_dropped(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    state text;
    why text;
BEGIN
    SELECT s.state, s.reason INTO state, why FROM dtm.subscription s WHERE s.name = check_not_dropped.name FOR NO KEY UPDATE;
    IF state = 'dropped' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'the subscription was dropped',
            DETAIL = format('%s.', why),
            HINT = 'dtm.rewind brings it back: to ''now'', to ''earliest'', or to a time.';
    END IF;
END
$$;

-- Positions of one era were read in the order of this.
CREATE FUNCTION dtm.position_order(body text) RETURNS bigint[]
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'position_order_wrapper';

-- A subscription begins where start_at says: 'now', 'earliest', or a time. Sets a cursor for each shard, and the time it skips
-- to. The transaction has written its row, so that rotation waits for it, or is told by dtm.start_seq.
CREATE OR REPLACE FUNCTION dtm.start_subscription(subscription_id bigint, start_at text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    body text;
    start_time timestamptz;
    position_id bigint;
    segment smallint := dtm.control_segment();
BEGIN
    IF start_at = 'now' THEN
        body := dtm.current_position(dtm.latest_position());
    ELSE
        IF start_at <> 'earliest' THEN
            start_time := start_at::timestamptz;
        END IF;
        -- Restored data that no relay has met yet has its eras, too.
        body := dtm.start_of_era(coalesce(
            (SELECT e.era FROM dtm.eras e WHERE e.era <> (SELECT i.era FROM dtm.installation i) ORDER BY e.ordinal, e.era LIMIT 1),
            (SELECT era FROM dtm.unregistered_eras() AS era LIMIT 1),
            (SELECT era FROM dtm.installation)));
    END IF;
    PERFORM nextval('dtm.start_seq');
    UPDATE dtm.subscription SET since = start_time WHERE id = subscription_id AND since IS DISTINCT FROM start_time;
    position_id := (dtm.store_positions(ARRAY[body]))[1];
    INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", acked)
    SELECT nextval('dtm.cursor_id_seq'), s.id, shard, s.epoch, 0, position_id, 0
    FROM dtm.subscription s, generate_series(0, coalesce((s.options ->> 'shards')::int, 1) - 1) AS shard
    WHERE s.id = subscription_id AND segment = 1;
    INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", acked)
    SELECT nextval('dtm.cursor_id_seq'), s.id, shard, s.epoch, 0, position_id, 0
    FROM dtm.subscription s, generate_series(0, coalesce((s.options ->> 'shards')::int, 1) - 1) AS shard
    WHERE s.id = subscription_id AND segment = 2;
END
$$;

CREATE OR REPLACE FUNCTION dtm.subscribe(
    name text, topics text[], destination text, options jsonb DEFAULT '{}', start_at text DEFAULT 'now'
) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint;
BEGIN
    PERFORM dtm.check_subscription(name, topics, destination, options);
    PERFORM dtm.check_start_at(start_at);
    -- Until it is there or made: another session may unsubscribe between the two.
    LOOP
        INSERT INTO dtm.subscription AS s (name, topics, destination, options, era)
        VALUES (subscribe.name, subscribe.topics, subscribe.destination, subscribe.options, (SELECT era FROM dtm.installation))
        ON CONFLICT ON CONSTRAINT subscription_name_key DO NOTHING
        RETURNING s.id INTO subscription_id;
        IF FOUND THEN
            PERFORM dtm.start_subscription(subscription_id, start_at);
            RETURN subscription_id;
        END IF;
        PERFORM dtm.reshard(name, options);
        UPDATE dtm.subscription AS s
        SET topics = subscribe.topics, destination = subscribe.destination, options = subscribe.options
        WHERE s.name = subscribe.name
        RETURNING s.id INTO subscription_id;
        IF FOUND THEN
            RETURN subscription_id;
        END IF;
    END LOOP;
END
$$;

-- The coordinator's subscription may be paused and resumed, and that is all: what it passes over would never end.
CREATE FUNCTION dtm.check_not_internal(name text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF name = 'dtm.transactions' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = 'this subscription is pg_dtm''s own',
            DETAIL = 'It brings global transactions to the relays'' coordinator.',
            HINT = 'It can be paused and resumed. dtm.force_stop ends a transaction.';
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION dtm.unsubscribe(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint := dtm.lock_settlements(name);
BEGIN
    PERFORM dtm.check_not_internal(name);
    DELETE FROM dtm.subscription AS s WHERE s.id = subscription_id;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
    DELETE FROM dtm.retry r WHERE r.subscription = subscription_id;
    DELETE FROM dtm.dead_letter d WHERE d.subscription = subscription_id;
END
$$;

CREATE OR REPLACE FUNCTION dtm.pause(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.check_not_dropped(name);
    UPDATE dtm.subscription AS s SET state = 'paused', reason = NULL WHERE s.name = pause.name;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION dtm.resume(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.check_not_dropped(name);
    UPDATE dtm.subscription AS s SET state = 'active', reason = NULL WHERE s.name = resume.name;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION dtm.rewind(name text, start_at text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint;
BEGIN
    PERFORM dtm.check_not_internal(name);
    PERFORM dtm.check_start_at(start_at);
    subscription_id := dtm.lock_settlements(name);
    UPDATE dtm.subscription AS s
    SET epoch = s.epoch + 1, started_at = clock_timestamp(),
        state = CASE s.state WHEN 'dropped' THEN s.state_before ELSE s.state END,
        reason = CASE s.state WHEN 'dropped' THEN s.reason_before ELSE s.reason END,
        state_before = NULL, reason_before = NULL
    WHERE s.id = subscription_id;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
    PERFORM dtm.start_subscription(subscription_id, start_at);
    PERFORM dtm.forget_failures(subscription_id, start_at);
END
$$;

COMMENT ON FUNCTION dtm.rewind(text, text) IS
    'Sets a subscription''s cursor: ''now'', ''earliest'', or a time. Drops what failed and is delivered again from there.';

-- Leases.

-- The newest lease of each subscription, or of each of its shards, and whether its relay lives. (Shards are counted so that the
-- planner expects one: most have no more, and of generate_series it expects a thousand.)
CREATE OR REPLACE VIEW dtm.owners AS
SELECT s.id AS subscription, unit.shard, lease.token, lease.relay, heartbeat.name,
       coalesce(heartbeat.expires_at > pg_catalog.clock_timestamp(), false) AS alive,
       coalesce((s.options ->> 'shards')::int, 1) AS shards, coalesce(heartbeat.shares, false) AS shares,
       s.state = 'active' AND s.era = (SELECT i.era FROM dtm.installation i) AS active  -- not one of a restore that nobody has met
FROM dtm.subscription s
CROSS JOIN LATERAL (
    SELECT (n.th - 1)::int AS shard
    FROM unnest(array_fill(true, ARRAY[coalesce((s.options ->> 'shards')::int, 1)])) WITH ORDINALITY AS n (is_there, th)
    LIMIT coalesce((s.options ->> 'shards')::int, 1)) unit
LEFT JOIN LATERAL (
    SELECT l.token, l.relay FROM dtm.lease_log l
    WHERE l.subscription = s.id AND l.shard = unit.shard ORDER BY l.token DESC LIMIT 1) lease ON true
LEFT JOIN LATERAL (
    SELECT h.name, h.expires_at, h.shares FROM dtm.heartbeat_log h
    WHERE h.relay = lease.relay ORDER BY h.id DESC LIMIT 1) heartbeat ON true;

CREATE FUNCTION dtm.heartbeat(relay uuid, relay_name text, expires_at timestamptz, shares boolean) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF dtm.control_segment() = 1 THEN
        INSERT INTO dtm.heartbeat_log_1 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at, shares);
    ELSE
        INSERT INTO dtm.heartbeat_log_2 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at, shares);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION dtm.heartbeat(relay uuid, relay_name text, expires_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.heartbeat(relay, relay_name, expires_at, false);
END
$$;

-- For relays of version 0.1: renews all leases of a relay, takes those that are free, and answers what it now has to deliver.
-- They know of no shards: a subscription that has some is not for them.
CREATE OR REPLACE FUNCTION dtm.relay_lease(relay uuid, relay_name text, lease_seconds float8)
RETURNS TABLE (subscription bigint, shard int, name text, topics text[], destination text, options jsonb,
               since timestamptz, epoch bigint, token bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
BEGIN
    PERFORM dtm.heartbeat(relay_lease.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds));
    IF EXISTS (SELECT FROM dtm.owners o WHERE NOT o.alive AND o.shards = 1 AND o.active) THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        segment := dtm.control_segment();
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND o.shards = 1 AND o.active AND segment = 1;
        INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND o.shards = 1 AND o.active AND segment = 2;
    END IF;
    RETURN QUERY
    SELECT s.id, o.shard, s.name, s.topics, s.destination, s.options, s.since, s.epoch, o.token
    FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
    WHERE o.relay = relay_lease.relay AND o.shards = 1 AND o.active;
    -- Last, for it takes locks that others wait for.
    PERFORM dtm.meet_restored();
END
$$;

-- What a relay calls.

-- Refuses a database that this relay must not deliver from; names the eras of its log, oldest first.
CREATE OR REPLACE FUNCTION dtm.relay_hello(environment text)
RETURNS TABLE (era int, eras int[], source text, version text, preloaded boolean)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    here dtm.installation;
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'the server is a standby',
            DETAIL = 'A standby''s snapshots do not tell which transactions have ended on the primary.',
            HINT = 'Connect the relay to the primary; with several hosts in its URL it finds it.';
    END IF;
    SELECT * INTO STRICT here FROM dtm.installation;
    IF here.database <> (SELECT oid FROM pg_database WHERE datname = current_database()) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'this database is a copy of another one',
            DETAIL = 'Its subscriptions and cursors are those of the original, which delivers the same events.',
            HINT = 'If it shall deliver on its own from here on, run "dtm-relay adopt".';
    END IF;
    IF here.environment IS NULL THEN
        UPDATE dtm.installation SET environment = relay_hello.environment WHERE environment IS NULL;
        SELECT * INTO STRICT here FROM dtm.installation;
    END IF;
    IF here.environment <> relay_hello.environment THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'this database belongs to another environment',
            DETAIL = format('It belongs to %L, the relay to %L.', here.environment, relay_hello.environment),
            HINT = 'If the database is a copy that shall deliver on its own, run "dtm-relay adopt"; else correct the relay''s setting "environment".';
    END IF;
    PERFORM dtm.meet_restored();
    RETURN QUERY SELECT here.era, dtm.all_eras(), dtm.source(),
        (SELECT extversion FROM pg_extension WHERE extname = 'pg_dtm'), dtm.library_preloaded();
END
$$;

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
    last_attempt_at timestamptz NOT NULL,
    finished_at     timestamptz,
    PRIMARY KEY (gid, branch_id, op)
);

-- What is done when its time has come.
CREATE TABLE dtm.due (
    gid      text        PRIMARY KEY,
    due_at   timestamptz NOT NULL,
    endpoint text                          -- of the call that failed: when it works again, nobody waits any longer
);
CREATE INDEX due_due_at ON dtm.due (due_at);
CREATE INDEX due_endpoint ON dtm.due (endpoint) WHERE endpoint IS NOT NULL;

SELECT pg_catalog.pg_extension_config_dump('dtm.transaction_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.transaction', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.branch', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.due', '');

-- Whether rows bear numbers that their sequences have not given out: a restore is under way, for all sequences are set after all
-- rows. Until then it is not known what else will come, so nothing is delivered of it, moved, or taken for needless.
-- enable_seqscan: rows that were just restored have no statistics. jit: reading a sequence counts as a great cost then.
CREATE FUNCTION dtm.is_restoring() RETURNS boolean
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
RETURN EXISTS (
    SELECT FROM (
        SELECT (SELECT max(id) FROM dtm.subscription), (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.subscription_id_seq)
        UNION ALL
        SELECT greatest((SELECT max(id) FROM dtm.cursor_log_1), (SELECT max(id) FROM dtm.cursor_log_2)),
               (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.cursor_id_seq)
        UNION ALL
        SELECT greatest((SELECT max(id) FROM dtm.position_log_1), (SELECT max(id) FROM dtm.position_log_2)),
               (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.position_id_seq)
        UNION ALL
        SELECT greatest((SELECT max(seq) FROM dtm.log_1), (SELECT max(seq) FROM dtm.log_2), (SELECT max(seq) FROM dtm.log_3)),
               (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.event_seq)
        UNION ALL
        SELECT (SELECT n FROM dtm.delayed ORDER BY due, n LIMIT 1),
               (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.delayed_seq)
        UNION ALL
        SELECT (SELECT max(id) FROM dtm.transaction),
               (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.transaction_id_seq)
    ) AS of_table (greatest, given_out)
    WHERE of_table.greatest > of_table.given_out);

-- All eras, oldest first: this database's own is the last.
CREATE FUNCTION dtm.all_eras() RETURNS int[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN ARRAY(SELECT e.era FROM dtm.eras e WHERE e.era <> (SELECT i.era FROM dtm.installation i) ORDER BY e.ordinal, e.era)
       || (SELECT i.era FROM dtm.installation i);

-- The eras of a segment of the log in their order, each with its first number. Numbers go on over a restore, so an era's events
-- stand together, and the index finds where the next begins.
CREATE FUNCTION dtm.eras_of_segment(segment int) RETURNS TABLE (era int, seq bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    from_here CONSTANT text := format('SELECT l.seq, l.era FROM dtm.log_%s l WHERE l.seq >= $1 ORDER BY l.seq LIMIT 1', segment);
    last record;
    low bigint;   -- of this era …
    high bigint;  -- … and at or above this one comes another
    middle bigint;
    found record;
BEGIN
    EXECUTE format('SELECT l.seq, l.era FROM dtm.log_%s l ORDER BY l.seq DESC LIMIT 1', segment) INTO last;
    EXECUTE from_here INTO seq, era USING 0::bigint;
    WHILE seq IS NOT NULL LOOP
        RETURN NEXT;
        EXIT WHEN era = last.era;
        low := seq;
        high := last.seq;
        WHILE high - low > 1 LOOP
            middle := low + (high - low) / 2;
            EXECUTE from_here INTO found USING middle;
            IF found.era = era THEN
                low := found.seq;
            ELSE
                high := middle;
            END IF;
        END LOOP;
        EXECUTE from_here INTO seq, era USING high;
    END LOOP;
END
$$;

-- The eras in restored data that no relay has met, oldest first. Numbers of events and positions go on over a restore, so
-- every row of a later era has a greater one; where an era has left nothing but positions, their ids tell.
CREATE OR REPLACE FUNCTION dtm.unregistered_eras() RETURNS SETOF int
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT f.era
    FROM (SELECT l.era, l.seq - 1 AS seq, NULL::bigint AS id
          FROM generate_series(1, 3) AS segment, dtm.eras_of_segment(segment) l
          UNION ALL
          SELECT p.era, min(p.seq), min(p.id) FROM dtm.position_log p GROUP BY p.era) f
    WHERE NOT EXISTS (SELECT FROM dtm.eras e WHERE e.era = f.era)
    GROUP BY f.era
    ORDER BY min(f.seq), min(f.id) NULLS LAST;
END;

-- Gives all eras their places, the given one the last. The data may have come through several databases that no relay ever
-- saw: their eras go behind those that some relay has met.
CREATE FUNCTION dtm.order_eras(last_era int) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE dtm.eras IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO dtm.eras AS e (era, ordinal)
    SELECT a.era, row_number() OVER (ORDER BY a.era = last_era, a.ordinal NULLS LAST, a.n, a.era)
    FROM (SELECT known.era, known.ordinal, 0 AS n FROM dtm.eras known WHERE known.era <> last_era
          UNION ALL
          SELECT found.era, NULL, found.n FROM dtm.unregistered_eras() WITH ORDINALITY AS found (era, n) WHERE found.era <> last_era
          UNION ALL
          SELECT last_era, NULL, 0) a
    ON CONFLICT (era) DO UPDATE SET ordinal = excluded.ordinal WHERE e.ordinal <> excluded.ordinal;
END
$$;

-- Subscriptions that came from elsewhere wait for dtm.resume unless they say otherwise: a copy of production must not call
-- production's customers.
CREATE FUNCTION dtm.take_over_subscriptions(new_era int) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    why CONSTANT text := 'the database was restored or copied';
BEGIN
    UPDATE dtm.subscription s
    SET state = 'paused', reason = why
    WHERE s.era IS DISTINCT FROM new_era AND s.state = 'active' AND s.options ->> 'on_restore' IS DISTINCT FROM 'continue';
    -- Nor does one that was dropped, when it is rewound.
    UPDATE dtm.subscription s
    SET state_before = 'paused', reason_before = why
    WHERE s.era IS DISTINCT FROM new_era AND s.state_before = 'active' AND s.options ->> 'on_restore' IS DISTINCT FROM 'continue';
    UPDATE dtm.subscription s SET era = new_era WHERE s.era IS DISTINCT FROM new_era;
    IF FOUND THEN
        UPDATE dtm.eras SET began_at = clock_timestamp() WHERE era = new_era;  -- nothing has waited for them before
    END IF;
END
$$;

-- Locks the log, the segment that is written last: whoever publishes waits for the last of these locks only.
CREATE FUNCTION dtm.lock_log(mode text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    segment int;
BEGIN
    FOR segment IN SELECT n FROM generate_series(1, 3) AS n, dtm.installation i ORDER BY n = i.log_segment, n LOOP
        EXECUTE format('LOCK TABLE dtm.log_%s IN %s MODE', segment, mode);
    END LOOP;
END
$$;

-- Whether nothing is there that came with a restore and that no relay has met. The settings: as above.
CREATE FUNCTION dtm.is_met() RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
RETURN (
    SELECT EXISTS (SELECT FROM dtm.eras e WHERE e.era = here.era
                   AND NOT EXISTS (SELECT FROM dtm.eras o WHERE o.era <> e.era AND o.ordinal >= e.ordinal))
       AND NOT EXISTS (SELECT FROM dtm.subscription s WHERE s.era IS DISTINCT FROM here.era)
       AND NOT EXISTS (
           SELECT FROM (SELECT (SELECT era FROM dtm.log_1 ORDER BY seq LIMIT 1)
                        UNION ALL SELECT (SELECT era FROM dtm.log_1 ORDER BY seq DESC LIMIT 1)
                        UNION ALL SELECT (SELECT era FROM dtm.log_2 ORDER BY seq LIMIT 1)
                        UNION ALL SELECT (SELECT era FROM dtm.log_2 ORDER BY seq DESC LIMIT 1)
                        UNION ALL SELECT (SELECT era FROM dtm.log_3 ORDER BY seq LIMIT 1)
                        UNION ALL SELECT (SELECT era FROM dtm.log_3 ORDER BY seq DESC LIMIT 1)) AS of_segment (era)
           WHERE of_segment.era IS NOT NULL AND NOT EXISTS (SELECT FROM dtm.eras e WHERE e.era = of_segment.era))
    FROM dtm.installation here);

-- Gives what came with a restore its place, if it is complete: the eras, and the subscriptions. Relays may be there before all
-- of it is, and come back to this until it is done. False: there is something that has not been met, or was met just now; the
-- caller's transaction should end soon, for the log is locked.
CREATE FUNCTION dtm.meet_restored() RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    here int := (SELECT era FROM dtm.installation);
BEGIN
    IF dtm.is_restoring() THEN
        RETURN false;
    END IF;
    IF dtm.is_met() THEN
        RETURN true;
    END IF;
    BEGIN
        PERFORM dtm.order_eras(here);
        IF EXISTS (SELECT FROM dtm.subscription s WHERE s.era IS DISTINCT FROM here) THEN
            LOCK TABLE dtm.subscription IN EXCLUSIVE MODE;
            -- A restore over several connections can have set the sequences while it still copies events.
            PERFORM dtm.lock_log('SHARE');
            IF NOT dtm.is_restoring() THEN
                PERFORM dtm.take_over_subscriptions(here);
            END IF;
        END IF;
    EXCEPTION WHEN lock_not_available THEN
        NULL;  -- somebody is writing there: the next call may find nobody
    END;
    RETURN false;
END
$$;

-- Makes a copy of a database one of its own: a new era, this environment.
CREATE OR REPLACE FUNCTION dtm.adopt(environment text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    new_era int := ('x' || left(md5(gen_random_uuid()::text), 8))::bit(32)::int;
    in_the_way text;
BEGIN
    IF dtm.is_restoring() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'the database is being restored',
            DETAIL = 'Rows are there whose sequences are not set yet.',
            HINT = 'Try again when the restore is complete. If it was broken off, restore into an empty database.';
    END IF;
    BEGIN
        PERFORM FROM dtm.installation FOR UPDATE;
        PERFORM dtm.order_eras((SELECT era FROM dtm.installation));
        LOCK TABLE dtm.subscription IN EXCLUSIVE MODE;
        -- Every publisher of the old era has ended once these locks are held; the next ones read the new era. Nobody waits for
        -- long: others wait behind this.
        PERFORM dtm.lock_log('SHARE ROW EXCLUSIVE');
    EXCEPTION WHEN lock_not_available THEN
        SELECT string_agg(DISTINCT CASE WHEN l.pid IS NULL THEN format('prepared transaction %L', p.gid)
                                        ELSE format('session %s', l.pid) END, ', ')
        INTO in_the_way
        FROM pg_locks l
        -- What a prepared one has locked bears no id but that of its session's; the lock on its own id tells.
        LEFT JOIN pg_locks own ON l.pid IS NULL AND own.pid IS NULL AND own.locktype = 'transactionid' AND own.mode = 'ExclusiveLock'
                              AND own.virtualtransaction = l.virtualtransaction
        LEFT JOIN pg_prepared_xacts p ON p.transaction = own.transactionid
        WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid() AND l.mode <> 'AccessShareLock'
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND l.relation IN ('dtm.log_1'::regclass, 'dtm.log_2'::regclass, 'dtm.log_3'::regclass, 'dtm.eras'::regclass,
                             'dtm.subscription'::regclass);
        RAISE EXCEPTION USING
            ERRCODE = 'lock_not_available',
            MESSAGE = 'transactions that have published, or changed subscriptions, are still open',
            DETAIL = format('In the way are: %s.', coalesce(in_the_way, 'some that have ended by now')),
            HINT = 'Try again when they have ended. ROLLBACK PREPARED ends a prepared one whose program is not there in a copy.';
    END;
    UPDATE dtm.installation
    SET era = new_era, environment = adopt.environment,
        database = (SELECT oid FROM pg_database WHERE datname = current_database());
    PERFORM dtm.installation_changed();
    INSERT INTO dtm.eras (era, ordinal) SELECT new_era, max(ordinal) + 1 FROM dtm.eras;
    PERFORM dtm.take_over_subscriptions(new_era);
END
$$;

-- Moves events that are due into the log. next_in: seconds until the next one is, null if none waits. One relay at a time
-- moves them: two that took a part each could swap events of one key.
CREATE OR REPLACE FUNCTION dtm.relay_due(max_rows int, OUT moved int, OUT next_in float8)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    moved := 0;
    SELECT extract(epoch FROM min(due) - clock_timestamp()) INTO next_in FROM dtm.delayed;
    IF next_in IS NULL OR next_in > 0 THEN
        RETURN;
    END IF;
    IF dtm.is_restoring() THEN
        next_in := 1;  -- what is moved could take a number that a row has which is not restored yet
        RETURN;
    END IF;
    IF NOT dtm.take_turn('delayed') THEN
        next_in := 0.1;  -- whoever has the turn moves what is due
        RETURN;
    END IF;
    WITH due AS (
        DELETE FROM dtm.delayed d WHERE d.ctid = ANY (ARRAY(
            SELECT w.ctid FROM dtm.delayed w WHERE w.due <= clock_timestamp() ORDER BY w.due, w.n LIMIT max_rows))
        RETURNING d.*
    )
    SELECT count(dtm.append(o.id, o.topic, o.key, o.content_type, o.headers, o.payload)) INTO moved
    FROM (SELECT * FROM due ORDER BY due.due, due.n) o;
    SELECT extract(epoch FROM min(due) - clock_timestamp()) INTO next_in FROM dtm.delayed;
END
$$;

-- Where a subscription goes on, what is delivered beyond acked, and through which eras it goes. No row: it has no cursor, and must
-- not be delivered.
CREATE FUNCTION dtm.relay_resume(subscription bigint, shard int, epoch bigint)
RETURNS TABLE ("position" text, target text, acked bigint, ahead bigint[], eras int[], windows uuid[])
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.body, t.body, c.acked, c.ahead, dtm.all_eras(), c.windows
    FROM (SELECT * FROM dtm.cursor_log l
          WHERE l.subscription = relay_resume.subscription AND l.shard = relay_resume.shard AND l.epoch = relay_resume.epoch
          ORDER BY l.id DESC LIMIT 1) c
    JOIN dtm.position_log p ON p.id = c."position" AND p.segment = c.segment
    LEFT JOIN dtm.position_log t ON t.id = c.target AND t.segment = c.segment
    WHERE c.target IS NULL OR t.id IS NOT NULL;
END;

-- The same for relays of version 0.1.
CREATE OR REPLACE FUNCTION dtm.relay_cursor(subscription bigint, shard int, epoch bigint)
RETURNS TABLE ("position" text, target text, acked bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT r."position", r.target, r.acked
    FROM dtm.relay_resume(relay_cursor.subscription, relay_cursor.shard, relay_cursor.epoch) r;
END;

-- Moves cursors, all in one statement. A position is a stored one's id, or -k for the k-th of the new ones. Refuses those
-- whose epoch or token is not the newest, or that name positions which are no longer stored, and says which.
CREATE OR REPLACE FUNCTION dtm.relay_move(
    new_positions text[], subscriptions bigint[], shards int[], epochs bigint[], tokens bigint[],
    positions bigint[], targets bigint[], acked bigint[], OUT position_ids bigint[], OUT fenced bigint[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := dtm.control_segment();
    unknown bigint[];
    moved bigint[];
BEGIN
    -- Against a lease that is being taken over at this moment.
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    unknown := dtm.keep_positions(positions || targets);
    position_ids := dtm.store_positions(new_positions);
    WITH asked AS (
        SELECT m.subscription, m.shard, m.epoch, m.token, m.acked,
               CASE WHEN m."position" < 0 THEN position_ids[-m."position"] ELSE m."position" END AS "position",
               CASE WHEN m.target < 0 THEN position_ids[-m.target] ELSE m.target END AS target
        FROM unnest(subscriptions, shards, epochs, tokens, positions, targets, relay_move.acked)
             AS m (subscription, shard, epoch, token, "position", target, acked)
        WHERE (m."position" = ANY (unknown) OR m.target = ANY (unknown)) IS NOT TRUE
    ), granted AS MATERIALIZED (
        SELECT nextval('dtm.cursor_id_seq') AS id, a.*
        FROM asked a
        JOIN dtm.subscription s ON s.id = a.subscription AND s.epoch = a.epoch
        WHERE a.token = (SELECT l.token FROM dtm.lease_log l
                         WHERE l.subscription = a.subscription AND l.shard = a.shard ORDER BY l.token DESC LIMIT 1)
    ), first AS (
        INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", target, acked)
        SELECT id, subscription, shard, epoch, token, "position", target, acked FROM granted WHERE segment = 1
    ), second AS (
        INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", target, acked)
        SELECT id, subscription, shard, epoch, token, "position", target, acked FROM granted WHERE segment = 2
    )
    SELECT coalesce(array_agg(subscription), '{}') INTO moved FROM granted;
    fenced := ARRAY(SELECT unnest(subscriptions) EXCEPT SELECT unnest(moved));
END
$$;

-- The same of one shard: events of others are passed over.
CREATE FUNCTION dtm.relay_page(from_position text, to_position text, after bigint, topics text[], since timestamptz,
                               max_rows int, max_bytes int, shard int, shards int) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'relay_page_of_shard_wrapper';

-- Events that could not be delivered: those that are tried again, and those that are given up. Each is a full copy, which
-- holds no segment of the log. Nothing is written here for an event that is delivered at once.

CREATE SEQUENCE dtm.retry_seq AS bigint;
CREATE TABLE dtm.retry (
    subscription bigint      NOT NULL,
    seq          bigint      NOT NULL,        -- of the log: an event is here once for each subscription
    n            bigint      NOT NULL DEFAULT pg_catalog.nextval('dtm.retry_seq'), -- the order of delivery within a key
    era          int         NOT NULL,
    published_at timestamptz NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,
    headers      text,
    payload      bytea,
    attempts     int         NOT NULL,
    next_at      timestamptz,                 -- null: waits behind an earlier event of its key
    history      jsonb       NOT NULL DEFAULT '[]', -- an object for each attempt: at, status, error, body
    parked_at    timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (subscription, seq)
);

CREATE TABLE dtm.dead_letter (
    subscription bigint      NOT NULL,
    seq          bigint      NOT NULL,
    n            bigint      NOT NULL DEFAULT pg_catalog.nextval('dtm.retry_seq'), -- kept: redriven, it takes its old place
    era          int         NOT NULL,
    published_at timestamptz NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,
    headers      text,
    payload      bytea,
    attempts     int         NOT NULL,
    history      jsonb       NOT NULL DEFAULT '[]',
    parked_at    timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    died_at      timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (subscription, seq)
);
CREATE INDEX dead_letter_oldest ON dtm.dead_letter (subscription, n);

SELECT pg_catalog.pg_extension_config_dump('dtm.retry_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.retry', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.dead_letter', '');

-- Which shard an event belongs to: by its key, or by its number where it has none (core/src/shard.rs). Pages are read by the
-- same code.
CREATE FUNCTION dtm.shard_of(key text, seq bigint, shards int) RETURNS int
LANGUAGE c IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'shard_of_wrapper';

-- What a relay reports about failures and what a user does about them must not meet half way. Users lock a subscription to its
-- relays' reports until their transaction ends; relays do not wait, but report again later. The lock is that of its row: users
-- have it as for a deletion, relays share it as a foreign key does, which lets other changes of the row pass. Null: there is no
-- such subscription.
CREATE FUNCTION dtm.lock_settlements(subscription_name text) RETURNS bigint
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.id FROM dtm.subscription s WHERE s.name = subscription_name FOR UPDATE;
END;
-- One that is gone is nobody's.
CREATE FUNCTION dtm.try_settlements(subscription bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM FROM dtm.subscription s WHERE s.id = try_settlements.subscription FOR KEY SHARE SKIP LOCKED;
    RETURN FOUND OR NOT EXISTS (SELECT FROM dtm.subscription s WHERE s.id = try_settlements.subscription);
END
$$;

-- Any number of relays share what is to be delivered: units, which are subscriptions or shards of them, as evenly as it goes.

-- The relays whose newest heartbeat holds. Who wrote any that still holds is found by its index (the time is a subquery for
-- that), however many there are that no longer do.
CREATE VIEW dtm.live_relays AS
SELECT newest.relay, newest.name, newest.shares
FROM (SELECT DISTINCT h.relay FROM dtm.heartbeat_log h WHERE h.expires_at > (SELECT pg_catalog.clock_timestamp())) lately
CROSS JOIN LATERAL (
    SELECT h.relay, h.name, h.shares, h.expires_at FROM dtm.heartbeat_log h
    WHERE h.relay = lately.relay ORDER BY h.id DESC LIMIT 1) newest
WHERE newest.expires_at > pg_catalog.clock_timestamp();

-- What each relay that lives owns and should own, and how many units nobody owns. All relays find the same: of u units r relays
-- get u / r each, and the first u % r of them, those that own the most, one more: nothing moves that need not. Units of a
-- relay of version 0.1 are its own until it ends.
CREATE VIEW dtm.shares AS
WITH unit AS (
    SELECT o.relay, o.alive
    FROM dtm.owners o
    WHERE o.active AND (o.shares OR NOT o.alive)
), total AS (
    SELECT count(*) AS units, count(*) FILTER (WHERE NOT u.alive) AS free FROM unit u
), owner AS (
    SELECT u.relay, count(*) AS owned FROM unit u WHERE u.alive GROUP BY u.relay
), holder AS (
    SELECT l.relay, coalesce(o.owned, 0) AS owned
    FROM dtm.live_relays l LEFT JOIN owner o ON o.relay = l.relay WHERE l.shares
)
SELECT h.relay, h.owned, t.free,
       t.units / count(*) OVER ()
       + CASE WHEN row_number() OVER (ORDER BY h.owned DESC, h.relay) <= t.units % count(*) OVER () THEN 1 ELSE 0 END AS target
FROM holder h CROSS JOIN total t;

-- Renews all leases of a relay, takes what is free up to its share, and answers what it now has to deliver. What it owns
-- beyond its share comes with release: it should end that in peace and give it back. jit: it is called every second, and is
-- done before a compiler would be.
CREATE FUNCTION dtm.relay_assign(relay uuid, relay_name text, lease_seconds float8)
RETURNS TABLE (subscription bigint, shard int, shards int, name text, topics text[], destination text, options jsonb,
               since timestamptz, epoch bigint, revision bigint, token bigint, release boolean)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
    lacking bigint;  -- how many units it may take; below 0: how many it should give
BEGIN
    PERFORM dtm.heartbeat(relay_assign.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds), true);
    IF NOT EXISTS (SELECT FROM dtm.subscription s WHERE s.name = 'dtm.transactions') AND EXISTS (SELECT FROM dtm.transaction)
       AND NOT dtm.is_restoring() THEN
        PERFORM dtm.start_coordinator();
    END IF;
    SELECT least(s.target - s.owned, s.free) INTO lacking FROM dtm.shares s WHERE s.relay = relay_assign.relay;
    IF lacking > 0 THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused. And for
        -- other relays that take: then it counts anew.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        segment := dtm.control_segment();
        SELECT least(s.target - s.owned, s.free) INTO lacking FROM dtm.shares s WHERE s.relay = relay_assign.relay;
        WITH taken AS MATERIALIZED (
            SELECT o.subscription, o.shard
            FROM dtm.owners o
            WHERE NOT o.alive AND o.active
            ORDER BY o.subscription, o.shard LIMIT greatest(lacking, 0)
        ), first AS (
            INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
            SELECT nextval('dtm.lease_token_seq'), t.subscription, t.shard, relay_assign.relay FROM taken t WHERE segment = 1
        )
        INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), t.subscription, t.shard, relay_assign.relay FROM taken t WHERE segment = 2;
    END IF;
    RETURN QUERY
    SELECT s.id, o.shard, o.shards, s.name, s.topics, s.destination, s.options, s.since, s.epoch, s.revision, o.token,
           coalesce(row_number() OVER (ORDER BY o.token DESC) <= -lacking, false)
    FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
    WHERE o.relay = relay_assign.relay AND o.active
    ORDER BY s.id, o.shard;
    -- Last, for it takes locks that others wait for.
    PERFORM dtm.meet_restored();
END
$$;

-- A relay begins a session: all that it owns gets new leases. What an earlier session of it has sent and the server has not
-- come to yet is refused; what was stored before is read.
CREATE FUNCTION dtm.relay_begin(relay uuid) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
BEGIN
    LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
    segment := dtm.control_segment();
    WITH own AS MATERIALIZED (
        SELECT o.subscription, o.shard FROM dtm.owners o WHERE o.relay = relay_begin.relay
    ), first AS (
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, o.shard, relay_begin.relay FROM own o WHERE segment = 1
    )
    INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
    SELECT nextval('dtm.lease_token_seq'), o.subscription, o.shard, relay_begin.relay FROM own o WHERE segment = 2;
END
$$;

-- Gives units back, those whose newest lease is still the given one: another relay may take them at once.
CREATE FUNCTION dtm.relay_give(relay uuid, subscriptions bigint[], shards int[], tokens bigint[]) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
BEGIN
    IF cardinality(tokens) = 0 THEN
        RETURN;
    END IF;
    LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
    segment := dtm.control_segment();
    WITH given AS MATERIALIZED (
        SELECT g.subscription, g.shard
        FROM unnest(subscriptions, shards, tokens) AS g (subscription, shard, token)
        CROSS JOIN LATERAL (
            SELECT l.token, l.relay FROM dtm.lease_log l
            WHERE l.subscription = g.subscription AND l.shard = g.shard ORDER BY l.token DESC LIMIT 1) newest
        WHERE newest.token = g.token AND newest.relay = relay_give.relay
    ), first AS (
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), g.subscription, g.shard, nobody FROM given g WHERE segment = 1
    )
    INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
    SELECT nextval('dtm.lease_token_seq'), g.subscription, g.shard, nobody FROM given g WHERE segment = 2;
END
$$;

-- Gives a subscription another number of shards, if it has another by now. Keys change their shards, so each of the new ones
-- begins where the slowest of the old ones stood: what others had delivered past it is delivered again. Where all stood in one
-- window, as a single one does, the window goes on.
CREATE FUNCTION dtm.reshard(subscription_name text, new_options jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint;
    old dtm.subscription;
    old_shards int;
    new_shards int := coalesce((new_options ->> 'shards')::int, 1);
    segment smallint := dtm.control_segment();
    start record;
BEGIN
    -- Not FOR UPDATE: relays go on reporting, unless the number of shards changes.
    SELECT * INTO old FROM dtm.subscription s WHERE s.name = subscription_name FOR NO KEY UPDATE;
    old_shards := coalesce((old.options ->> 'shards')::int, 1);
    IF old.id IS NULL OR old_shards = new_shards THEN
        RETURN;
    END IF;
    subscription_id := dtm.lock_settlements(subscription_name);
    SELECT count(*) AS cursors, (array_agg(c."position" ORDER BY e.ordinal, dtm.position_order(p.body)))[1] AS "position",
           count(DISTINCT (c."position", c.target)) = 1 AS together,
           min(c.target) AS target, min(c.acked) AS acked, min(c.ahead) AS ahead
    INTO start
    FROM generate_series(0, old_shards - 1) AS unit (shard)
    CROSS JOIN LATERAL (
        SELECT l."position", l.target, l.acked, l.ahead, l.segment FROM dtm.cursor_log l
        WHERE l.subscription = subscription_id AND l.shard = unit.shard AND l.epoch = old.epoch
        ORDER BY l.id DESC LIMIT 1) c
    JOIN dtm.position_log p ON p.id = c."position" AND p.segment = c.segment
    LEFT JOIN dtm.eras e ON e.era = p.era;
    IF start.cursors <> old_shards THEN
        RAISE EXCEPTION USING
            ERRCODE = 'data_corrupted',
            MESSAGE = 'a shard of the subscription has no cursor',
            DETAIL = format('%s of %s have one: where the others stood is not known.', start.cursors, old_shards),
            HINT = 'Set its cursor with dtm.rewind, then subscribe again.';
    END IF;
    UPDATE dtm.subscription s SET epoch = s.epoch + 1, revision = s.revision + 1 WHERE s.id = subscription_id;
    PERFORM nextval('dtm.start_seq');  -- an old snapshot finds cursors that have moved on since
    PERFORM dtm.keep_positions(ARRAY[start."position", start.target]);
    WITH cursor AS (
        SELECT nextval('dtm.cursor_id_seq') AS id, shard, start."position",
               CASE WHEN start.together THEN start.target END AS target,
               CASE WHEN start.together THEN start.acked ELSE 0 END AS acked,
               CASE WHEN old_shards = 1 THEN start.ahead END AS ahead
        FROM generate_series(0, new_shards - 1) AS shard
    ), first AS (
        INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", target, acked, ahead)
        SELECT c.id, subscription_id, c.shard, old.epoch + 1, 0, c."position", c.target, c.acked, c.ahead
        FROM cursor c WHERE segment = 1
    )
    INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", target, acked, ahead)
    SELECT c.id, subscription_id, c.shard, old.epoch + 1, 0, c."position", c.target, c.acked, c.ahead
    FROM cursor c WHERE segment = 2;
END
$$;

-- What became of events: a relay's reports, and what it has to know of earlier ones when it begins.

-- Moves cursors and settles events, all in one statement: an event is parked in the transaction that moves the cursor past it.
-- A position is a stored one's id, or -k for the k-th of the new ones. "of" says, counted from 1, which cursor a settlement
-- goes with: both are applied or neither. Fenced are those whose epoch or token is not the newest, busy those whose
-- subscription a user works on just now, broken those that speak of an event that is not in the log, stale those that name
-- positions which are no longer stored: they have to be told anew. windows: those of exactly-once delivery.
CREATE FUNCTION dtm.relay_store(
    new_positions text[], subscriptions bigint[], shards int[], epochs bigint[], tokens bigint[],
    positions bigint[], targets bigint[], acked bigint[], ahead text[],
    "of" int[], seqs bigint[], what text[], attempts int[], next_in float8[], histories jsonb[],
    windows text[] DEFAULT NULL,
    OUT position_ids bigint[], OUT fenced int[], OUT busy int[], OUT broken int[], OUT stale int[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := dtm.control_segment();
    moved int[];
    unknown bigint[];
BEGIN
    -- What Kafka's positions speak of has to be known after a failover, too: as durable as the database's users have it, while
    -- the relay's session does not wait for standbys.
    IF EXISTS (SELECT FROM unnest(relay_store.windows) AS w (stored) WHERE w.stored <> '{}') THEN
        SET LOCAL synchronous_commit TO DEFAULT;
        IF current_setting('synchronous_commit') = 'off' THEN
            SET LOCAL synchronous_commit TO local;
        END IF;
    END IF;
    -- Against a lease that is being taken over at this moment.
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    position_ids := dtm.store_positions(new_positions);
    unknown := dtm.keep_positions(positions || targets);
    stale := ARRAY(SELECT m.at::int FROM unnest(positions, targets) WITH ORDINALITY AS m ("position", target, at)
                   WHERE m."position" = ANY (unknown) OR m.target = ANY (unknown));
    busy := '{}';
    broken := '{}';
    IF cardinality("of") > 0 THEN
        -- Before epochs are looked at: a user who is done by now has raised them.
        busy := ARRAY(SELECT o.at FROM (SELECT DISTINCT unnest("of") AS at) o
                      WHERE NOT dtm.try_settlements(subscriptions[o.at]) ORDER BY o.at);
        broken := dtm.without_event("of", seqs, what);
    END IF;
    WITH asked AS (
        SELECT m.at::int AS at, m.subscription, m.shard, m.epoch, m.token, m.acked, m.ahead::bigint[] AS ahead,
               m.windows::uuid[] AS windows,
               CASE WHEN m."position" < 0 THEN position_ids[-m."position"] ELSE m."position" END AS "position",
               CASE WHEN m.target < 0 THEN position_ids[-m.target] ELSE m.target END AS target
        FROM unnest(subscriptions, shards, epochs, tokens, positions, targets, relay_store.acked, relay_store.ahead,
                    relay_store.windows)
             WITH ORDINALITY AS m (subscription, shard, epoch, token, "position", target, acked, ahead, windows, at)
        WHERE m.at <> ALL (busy || broken || stale)
    ), granted AS MATERIALIZED (
        SELECT nextval('dtm.cursor_id_seq') AS id, a.*
        FROM asked a
        JOIN dtm.subscription s ON s.id = a.subscription AND s.epoch = a.epoch
        WHERE a.token = (SELECT l.token FROM dtm.lease_log l
                         WHERE l.subscription = a.subscription AND l.shard = a.shard ORDER BY l.token DESC LIMIT 1)
    ), first AS (
        INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", target, acked, ahead, windows)
        SELECT id, subscription, shard, epoch, token, "position", target, acked, ahead, windows FROM granted WHERE segment = 1
    ), second AS (
        INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", target, acked, ahead, windows)
        SELECT id, subscription, shard, epoch, token, "position", target, acked, ahead, windows FROM granted WHERE segment = 2
    )
    SELECT coalesce(array_agg(at), '{}') INTO moved FROM granted;
    fenced := ARRAY(SELECT generate_subscripts(subscriptions, 1) EXCEPT SELECT unnest(moved)
                    EXCEPT SELECT unnest(busy || broken || stale) ORDER BY 1);
    IF cardinality("of") > 0 THEN
        PERFORM dtm.settle(moved, subscriptions, "of", seqs, what, attempts, next_in, histories);
    END IF;
END
$$;

-- The cursors that settlements go with whose event should be in the log and is not: somebody has truncated it by hand.
-- enable_seqscan: a plan that was made while the log was empty must not read all of it a moment later.
CREATE FUNCTION dtm.without_event("of" int[], seqs bigint[], what text[]) RETURNS int[]
LANGUAGE sql STABLE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
RETURN ARRAY(
    SELECT DISTINCT a."of" FROM unnest(without_event."of", without_event.seqs, without_event.what) AS a ("of", seq, what)
    WHERE a.what IN ('park', 'bury') AND NOT EXISTS (SELECT FROM dtm.log l WHERE l.seq = a.seq));

-- Settles events of those cursors that were moved.
--   park   copies an event from the log, to be tried again
--   bury   copies it from the log, as a dead letter
--   again  says of a parked one when it is tried next
--   die    makes a dead letter of a parked one
--   done   forgets a parked one
-- What is no longer parked was discarded meanwhile, or its subscription rewound: nothing is left to be done for it. What is
-- parked already, because its shard has begun anew before it, stays as it is. enable_seqscan: as above.
CREATE FUNCTION dtm.settle(
    granted int[], subscriptions bigint[],
    "of" int[], seqs bigint[], what text[], attempts int[], next_in float8[], histories jsonb[]) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    IF NOT what <@ ARRAY['park', 'bury', 'again', 'die', 'done'] THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'malformed report of a relay',
            DETAIL = format('What became of events is %s.', what),
            HINT = 'Use a relay of a matching version.';
    END IF;
    IF what && ARRAY['park', 'bury'] THEN
        WITH fresh AS MATERIALIZED (
            SELECT nextval('dtm.retry_seq') AS n, subscriptions[a."of"] AS subscription, a.seq, a.what, a.attempts,
                   clock_timestamp() + make_interval(secs => a.next_in) AS next_at, coalesce(a.history, '[]') AS history,
                   l.era, l.published_at, l.id, l.topic, l.key, l.content_type, l.headers, l.payload
            FROM unnest(settle."of", seqs, settle.what, settle.attempts, settle.next_in, histories)
                 WITH ORDINALITY AS a ("of", seq, what, attempts, next_in, history, at)
            CROSS JOIN LATERAL (SELECT * FROM dtm.log e WHERE e.seq = a.seq LIMIT 1) l
            WHERE a."of" = ANY (granted) AND a.what IN ('park', 'bury')
            ORDER BY a.at
        ), parked AS (
            INSERT INTO dtm.retry (subscription, seq, n, era, published_at, id, topic, key, content_type, headers, payload,
                                   attempts, next_at, history)
            SELECT f.subscription, f.seq, f.n, f.era, f.published_at, f.id, f.topic, f.key, f.content_type, f.headers, f.payload,
                   f.attempts, f.next_at, f.history
            FROM fresh f WHERE f.what = 'park'
            ON CONFLICT DO NOTHING
        )
        INSERT INTO dtm.dead_letter AS d (subscription, seq, n, era, published_at, id, topic, key, content_type, headers,
                                          payload, attempts, history)
        SELECT f.subscription, f.seq, f.n, f.era, f.published_at, f.id, f.topic, f.key, f.content_type, f.headers,
               f.payload, f.attempts, f.history
        FROM fresh f WHERE f.what = 'bury'
        ON CONFLICT (subscription, seq) DO UPDATE
        SET attempts = excluded.attempts, history = d.history || excluded.history, died_at = excluded.died_at;
    END IF;
    IF what && ARRAY['again'] THEN
        UPDATE dtm.retry r
        SET attempts = a.attempts, next_at = clock_timestamp() + make_interval(secs => a.next_in),
            history = r.history || coalesce(a.history, '[]')
        FROM unnest(settle."of", seqs, settle.what, settle.attempts, settle.next_in, histories) AS a ("of", seq, what, attempts, next_in, history)
        WHERE a."of" = ANY (granted) AND a.what = 'again' AND r.subscription = subscriptions[a."of"] AND r.seq = a.seq;
    END IF;
    IF what && ARRAY['die'] THEN
        WITH dying AS (
            DELETE FROM dtm.retry r
            USING unnest(settle."of", seqs, settle.what, settle.attempts, histories) AS a ("of", seq, what, attempts, history)
            WHERE a."of" = ANY (granted) AND a.what = 'die' AND r.subscription = subscriptions[a."of"] AND r.seq = a.seq
            RETURNING r.*, a.attempts AS attempts_made, r.history || coalesce(a.history, '[]') AS whole_history
        )
        INSERT INTO dtm.dead_letter AS d (subscription, seq, n, era, published_at, id, topic, key, content_type, headers,
                                          payload, attempts, history, parked_at)
        SELECT g.subscription, g.seq, g.n, g.era, g.published_at, g.id, g.topic, g.key, g.content_type, g.headers,
               g.payload, g.attempts_made, g.whole_history, g.parked_at
        FROM dying g
        ON CONFLICT (subscription, seq) DO UPDATE
        SET attempts = excluded.attempts, history = d.history || excluded.history, died_at = excluded.died_at;
    END IF;
    IF what && ARRAY['done'] THEN
        DELETE FROM dtm.retry r
        USING unnest(settle."of", seqs, settle.what) AS a ("of", seq, what)
        WHERE a."of" = ANY (granted) AND a.what = 'done' AND r.subscription = subscriptions[a."of"] AND r.seq = a.seq;
    END IF;
END
$$;

-- What is parked of a shard, in the order in which it is delivered; and, where a dead letter blocks its key, that (blocks).
-- next_in: seconds until it is tried; null: it waits behind what comes before it of its key.
CREATE FUNCTION dtm.relay_parked(subscription bigint, shard int, shards int)
RETURNS TABLE (seq bigint, key text, bytes int, attempts int, next_in float8, blocks boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH parked AS (
        SELECT r.n, r.seq, r.key, r.topic, r.headers, r.payload, r.attempts, r.next_at, false AS blocks
        FROM dtm.retry r WHERE r.subscription = relay_parked.subscription
        UNION ALL
        -- The first of a key: when that is gone, all is read anew.
        (SELECT DISTINCT ON (d.key) d.n, d.seq, d.key, d.topic, d.headers, d.payload, d.attempts, NULL::timestamptz, true
         FROM dtm.dead_letter d JOIN dtm.subscription s ON s.id = d.subscription
         WHERE d.subscription = relay_parked.subscription AND d.key IS NOT NULL AND s.options ->> 'on_dead' = 'block'
         ORDER BY d.key, d.n)
    )
    SELECT p.seq, p.key,
           octet_length(p.topic) + coalesce(octet_length(p.key), 0) + coalesce(octet_length(p.headers), 0)
           + coalesce(octet_length(p.payload), 0),
           p.attempts,
           CASE WHEN p.blocks THEN NULL
                WHEN p.next_at IS NOT NULL THEN greatest(extract(epoch FROM p.next_at - clock_timestamp()), 0)
                -- Nothing is before it any more.
                WHEN p.key IS NULL OR row_number() OVER (PARTITION BY p.key ORDER BY p.n) = 1 THEN 0 END::float8,
           p.blocks
    FROM parked p
    WHERE dtm.shard_of(p.key, p.seq, relay_parked.shards) = relay_parked.shard
    ORDER BY p.n;
END;

-- Parked events, packed as a page, in the order in which they are delivered. Those that are gone are left out.
CREATE FUNCTION dtm.relay_parked_events(subscription bigint, seqs bigint[]) RETURNS bytea
LANGUAGE c STABLE STRICT SET search_path = pg_catalog, pg_temp AS 'MODULE_PATHNAME', 'relay_parked_events_wrapper';

-- Ends a subscription whose endpoint is gone for good, until dtm.resume. False: it is not this relay's any more, it is not active,
-- or a transaction is changing it; then relay_assign tells, and the relay may ask again.
CREATE FUNCTION dtm.relay_disable(subscription bigint, epoch bigint, token bigint, shard int, reason text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- It does not wait for a user's transaction: other relays would wait for its lock on the leases.
    PERFORM FROM dtm.subscription s WHERE s.id = relay_disable.subscription FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    -- The revision: if it is resumed before the relay looks again, that must see that something has happened.
    UPDATE dtm.subscription s SET state = 'disabled', reason = relay_disable.reason, revision = s.revision + 1
    WHERE s.id = relay_disable.subscription AND s.epoch = relay_disable.epoch AND s.state = 'active'
      AND relay_disable.token = (SELECT l.token FROM dtm.lease_log l
                                 WHERE l.subscription = s.id AND l.shard = relay_disable.shard ORDER BY l.token DESC LIMIT 1);
    RETURN FOUND;
END
$$;

-- What users do about events that failed.

-- Whether a topic matches a pattern; raises an error with a hint if that is none.
CREATE FUNCTION dtm.topic_matches(pattern text, topic text) RETURNS boolean
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'topic_matches_wrapper';

-- Checks what dtm.redrive and dtm.discard are called with, keeps the subscription's relays from reporting until the transaction
-- ends, and picks the dead letters, oldest first.
CREATE FUNCTION dtm.choose_dead_letters(
    subscription text, ids uuid[], topic text, since timestamptz, max_rows int, everything boolean,
    OUT subscription_id bigint, OUT seqs bigint[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF ids IS NULL AND topic IS NULL AND since IS NULL AND everything IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'which dead letters?',
            DETAIL = 'There is neither ids nor topic nor since.',
            HINT = 'Pass one of them, or everything => true for all dead letters of the subscription.';
    END IF;
    IF max_rows IS NULL OR max_rows < 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'max_rows must be positive',
            DETAIL = format('It is %s.', coalesce(max_rows::text, 'null')),
            HINT = 'Pass how many dead letters one call may take, such as 1000, and call it until it answers 0.';
    END IF;
    PERFORM dtm.topic_matches(topic, 'any');  -- is it a pattern?
    subscription_id := dtm.lock_settlements(subscription);
    IF subscription_id IS NULL THEN
        PERFORM dtm.raise_no_subscription(subscription);
    END IF;
    seqs := ARRAY(
        SELECT d.seq FROM dtm.dead_letter d
        WHERE d.subscription = subscription_id
          AND (ids IS NULL OR d.id = ANY (ids))
          AND (choose_dead_letters.topic IS NULL OR dtm.topic_matches(choose_dead_letters.topic, d.topic))
          AND (since IS NULL OR d.published_at >= since)
        ORDER BY d.n LIMIT max_rows);
END
$$;

CREATE FUNCTION dtm.redrive(
    subscription text, ids uuid[] DEFAULT NULL, topic text DEFAULT NULL, since timestamptz DEFAULT NULL,
    max_rows int DEFAULT 1000, everything boolean DEFAULT false) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    chosen record;
    redriven bigint;
BEGIN
    SELECT * INTO chosen FROM dtm.choose_dead_letters(
        redrive.subscription, ids, redrive.topic, since, max_rows, everything);
    WITH gone AS (
        DELETE FROM dtm.dead_letter d
        WHERE d.subscription = chosen.subscription_id AND d.seq = ANY (chosen.seqs)
        RETURNING d.*
    ), parked AS (
        INSERT INTO dtm.retry (subscription, seq, n, era, published_at, id, topic, key, content_type, headers, payload,
                               attempts, next_at, history, parked_at)
        SELECT g.subscription, g.seq, g.n, g.era, g.published_at, g.id, g.topic, g.key, g.content_type, g.headers, g.payload,
               0, clock_timestamp(), g.history, g.parked_at
        FROM gone g
        ON CONFLICT DO NOTHING  -- it is being tried again already
    )
    SELECT count(*) INTO redriven FROM gone;
    IF redriven > 0 THEN
        UPDATE dtm.subscription s SET revision = s.revision + 1 WHERE s.id = chosen.subscription_id;
    END IF;
    RETURN redriven;
END
$$;

CREATE FUNCTION dtm.discard(
    subscription text, ids uuid[] DEFAULT NULL, topic text DEFAULT NULL, since timestamptz DEFAULT NULL,
    max_rows int DEFAULT 1000, everything boolean DEFAULT false) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    chosen record;
    discarded bigint;
    freed text[];
BEGIN
    SELECT * INTO chosen FROM dtm.choose_dead_letters(
        discard.subscription, ids, discard.topic, since, max_rows, everything);
    WITH gone AS (
        DELETE FROM dtm.dead_letter d
        WHERE d.subscription = chosen.subscription_id AND d.seq = ANY (chosen.seqs)
        RETURNING d.key
    )
    SELECT count(*), array_agg(DISTINCT g.key) INTO discarded, freed FROM gone g;
    IF discarded > 0 THEN
        -- Where a dead letter blocks its key: what waited behind one of these goes on, unless behind another, too.
        UPDATE dtm.retry r SET next_at = clock_timestamp()
        WHERE r.subscription = chosen.subscription_id AND r.key = ANY (freed) AND r.next_at IS NULL
          AND r.n = (SELECT min(f.n) FROM dtm.retry f WHERE f.subscription = r.subscription AND f.key = r.key)
          AND NOT EXISTS (SELECT FROM dtm.dead_letter d
                          WHERE d.subscription = r.subscription AND d.key = r.key AND d.n < r.n)
          AND (SELECT s.options ->> 'on_dead' = 'block' FROM dtm.subscription s WHERE s.id = r.subscription);
        UPDATE dtm.subscription s SET revision = s.revision + 1 WHERE s.id = chosen.subscription_id;
    END IF;
    RETURN discarded;
END
$$;

-- Drops what failed and is delivered again from the log, since the subscription begins anew before it. What the log no longer
-- has lies before every beginning, and stays.
CREATE FUNCTION dtm.forget_failures(subscription_id bigint, start_at text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    start_time timestamptz;
BEGIN
    IF start_at = 'now' THEN
        RETURN;
    END IF;
    start_time := CASE start_at WHEN 'earliest' THEN '-infinity' ELSE start_at END;
    DELETE FROM dtm.retry r
    WHERE r.subscription = subscription_id AND r.published_at >= start_time
      AND EXISTS (SELECT FROM dtm.log l WHERE l.seq = r.seq);
    DELETE FROM dtm.dead_letter d
    WHERE d.subscription = subscription_id AND d.published_at >= start_time
      AND EXISTS (SELECT FROM dtm.log l WHERE l.seq = d.seq);
END
$$;

COMMENT ON FUNCTION dtm.redrive(text, uuid[], text, timestamptz, int, boolean) IS
    'Tries dead letters again: by id, by topic (a pattern), published at a time or later. They may come after later ones of a key.';
COMMENT ON FUNCTION dtm.discard(text, uuid[], text, timestamptz, int, boolean) IS
    'Deletes dead letters: by id, by topic (a pattern), published at a time or later.';

-- Above which number all lies that a position has not seen and that can be read by now: above its own, or above the floor (in the
-- fifth part of its text) of a publisher that has committed since. Those that are still open hide nothing from whoever looks now.
CREATE FUNCTION dtm.unseen_above(body text) RETURNS bigint
LANGUAGE sql STABLE STRICT
BEGIN ATOMIC
    SELECT least(dtm.position_seq(body), min(floor.seq))
    FROM (SELECT pg_catalog.split_part(f.text, '>', 1)::pg_catalog.xid8 AS xid, pg_catalog.split_part(f.text, '>', 2)::bigint AS seq
          FROM pg_catalog.string_to_table(nullif(pg_catalog.split_part(body, '|', 5), ''), ',') AS f (text)) floor
    -- In another era everybody has ended, and transaction ids say nothing here.
    WHERE CASE WHEN dtm.position_era(body) = (SELECT era FROM dtm.installation)
               THEN pg_catalog.pg_visible_in_snapshot(floor.xid, pg_catalog.pg_current_snapshot())
                    AND pg_catalog.pg_xact_status(floor.xid) IS DISTINCT FROM 'aborted'
               ELSE true END;
END;

-- The newest cursor of a subscription, or of a shard. It has seen what its position's snapshot sees (the fourth part of its
-- text), and in the window after it what lies up to acked; all that it has not lies above low, and what of it can be read by now
-- above look_above.
CREATE FUNCTION dtm.cursor_at(subscription bigint, shard int, epoch bigint)
RETURNS TABLE (era int, low bigint, acked bigint, moved_at timestamptz, seen pg_snapshot, seen_then pg_snapshot, look_above bigint)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT p.era,
           CASE WHEN p.seq = 9223372036854775807 THEN 0  -- the end of an era: all of the next one lies before it
                ELSE least(CASE WHEN c.acked = 0 THEN p.low ELSE c.acked END, t.low) END,
           c.acked, c.moved_at,
           pg_catalog.split_part(p.body, '|', 4)::pg_catalog.pg_snapshot,
           pg_catalog.split_part(t.body, '|', 4)::pg_catalog.pg_snapshot,
           CASE WHEN p.seq = 9223372036854775807 THEN 0
                ELSE least(CASE WHEN c.acked = 0 THEN dtm.unseen_above(p.body) ELSE c.acked END, dtm.unseen_above(t.body)) END
    FROM dtm.cursor_log c
    JOIN dtm.position_log p ON p.id = c."position" AND p.segment = c.segment
    LEFT JOIN dtm.position_log t ON t.id = c.target AND t.segment = c.segment
    WHERE c.subscription = cursor_at.subscription AND c.shard = cursor_at.shard AND c.epoch = cursor_at.epoch
    ORDER BY c.id DESC LIMIT 1;
END;

-- The first and the last event of each segment of the log, and its size.
CREATE FUNCTION dtm.log_segments()
RETURNS TABLE (segment int, first_seq bigint, first_at timestamptz, last_seq bigint, last_at timestamptz, bytes bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    FOR n IN 1 .. 3 LOOP
        segment := n;
        EXECUTE format('SELECT f.seq, f.published_at, l.seq, l.published_at, pg_table_size(''dtm.log_%1$s'')
                        FROM (SELECT seq, published_at FROM dtm.log_%1$s ORDER BY seq LIMIT 1) f,
                             (SELECT seq, published_at FROM dtm.log_%1$s ORDER BY seq DESC LIMIT 1) l', segment)
        INTO first_seq, first_at, last_seq, last_at, bytes;
        RETURN NEXT;
    END LOOP;
END
$$;

-- How many bytes of the log lie above a number, about: events are taken for evenly large.
CREATE FUNCTION dtm.log_bytes_above(seq bigint) RETURNS bigint
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT coalesce(sum(s.bytes * least(1, (s.last_seq - log_bytes_above.seq)::float8 / (s.last_seq - s.first_seq + 1))), 0)::bigint
    FROM dtm.log_segments() s WHERE s.last_seq > log_bytes_above.seq;
END;

-- How far each subscription, or each of its shards, is. The lag is counted from the first event that it has not had. lag_events
-- counts sequence numbers, so it is an upper bound: rolled-back events, other topics, other shards, what was delivered before a
-- transaction that began earlier has ended, and what lies before the time that it begins at, count too. Null: there is no cursor.
CREATE VIEW dtm.progress AS
SELECT s.id AS subscription, o.shard,
       CASE WHEN o.alive THEN o.name END AS owner,
       CASE WHEN cursor.low IS NULL THEN NULL
            ELSE coalesce(extract(epoch FROM pg_catalog.clock_timestamp() - behind.published_at), 0) END::float8 AS lag_seconds,
       CASE WHEN cursor.low IS NULL THEN NULL
            WHEN behind.seq IS NULL THEN 0 ELSE head.seq - (behind.seq - 1) END AS lag_events,
       cursor.moved_at,
       CASE WHEN cursor.low IS NULL THEN NULL
            WHEN behind.seq IS NULL THEN 0 ELSE dtm.log_bytes_above(behind.seq - 1) END AS lag_bytes,
       behind.seq AS next_seq  -- the first that is not delivered
FROM dtm.subscription s
JOIN dtm.owners o ON o.subscription = s.id
CROSS JOIN LATERAL (
    SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS seq FROM dtm.event_seq) head
LEFT JOIN LATERAL dtm.cursor_at(s.id, o.shard, s.epoch) cursor ON true
LEFT JOIN dtm.eras ON eras.era = cursor.era
-- The first that is not delivered: of the position's era, or of a later one.
LEFT JOIN LATERAL (
    SELECT l.seq, l.published_at FROM dtm.log l
    WHERE l.seq > cursor.look_above
      AND CASE WHEN l.era <> cursor.era
               THEN coalesce((SELECT e.ordinal > coalesce(eras.ordinal, 2147483647) FROM dtm.eras e WHERE e.era = l.era), true)
               ELSE NOT pg_catalog.pg_visible_in_snapshot(l.xid, cursor.seen)
                    AND (l.seq > cursor.acked OR NOT pg_catalog.pg_visible_in_snapshot(l.xid, cursor.seen_then)) END
    ORDER BY l.seq LIMIT 1) behind ON true;

-- The lag is that of the slowest shard; next_seq is the first event that it has not had.
CREATE OR REPLACE VIEW dtm.subscriptions AS
SELECT s.name, s.topics, s.destination, s.options, s.state, s.reason,
       progress.owner, progress.lag_seconds, progress.lag_events, progress.moved_at,
       s.epoch, s.since, s.created_at, s.id,
       (SELECT count(*) FROM dtm.retry r WHERE r.subscription = s.id) AS retrying,
       (SELECT count(*) FROM dtm.dead_letter d WHERE d.subscription = s.id) AS dead,
       progress.shards, progress.lag_bytes, progress.next_seq
FROM dtm.subscription s
CROSS JOIN LATERAL (
    SELECT pg_catalog.string_agg(DISTINCT p.owner, ', ' ORDER BY p.owner) AS owner,
           CASE WHEN bool_and(p.lag_seconds IS NOT NULL) THEN max(p.lag_seconds) END AS lag_seconds,
           CASE WHEN bool_and(p.lag_events IS NOT NULL) THEN max(p.lag_events) END AS lag_events,
           CASE WHEN bool_and(p.lag_events IS NOT NULL) THEN max(p.lag_bytes) END AS lag_bytes,
           max(p.moved_at) AS moved_at, count(*)::int AS shards, min(p.next_seq) AS next_seq
    FROM dtm.progress p WHERE p.subscription = s.id) progress;

COMMENT ON VIEW dtm.subscriptions IS
    'Every subscription: what it matches, where it goes, its state, owner and lag, and how much of it failed.';

CREATE VIEW dtm.retries AS
SELECT s.name, r.id, r.topic, r.key, r.attempts, r.next_at,
       r.key IS NOT NULL AND s.options ->> 'ordering' IS DISTINCT FROM 'none' AND (
           row_number() OVER (PARTITION BY r.subscription, r.key ORDER BY r.n) > 1
           OR s.options ->> 'on_dead' = 'block' AND EXISTS (
               SELECT FROM dtm.dead_letter d
               WHERE d.subscription = r.subscription AND d.key = r.key AND d.n < r.n)) AS waits_behind,
       CASE WHEN pg_catalog.jsonb_typeof(r.history -> -1 -> 'status') = 'number'
            THEN (r.history -> -1 ->> 'status')::int END AS last_status,
       r.history -> -1 ->> 'error' AS last_error, r.history, r.published_at, r.parked_at,
       CASE WHEN r.content_type IS NULL THEN pg_catalog.convert_from(r.payload, 'UTF8')::jsonb
            WHEN r.content_type ~* '^[^;]*[/+]json\s*(;|$)' THEN dtm.json_or_null(r.payload) END AS payload,
       r.payload AS body,
       coalesce(r.content_type, 'application/json') AS content_type,
       r.headers::jsonb AS headers, r.seq, r.era
FROM dtm.retry r JOIN dtm.subscription s ON s.id = r.subscription;

COMMENT ON VIEW dtm.retries IS 'What is tried again: why, and when next. waits_behind: after an earlier event of its key.';

CREATE VIEW dtm.dead_letters AS
SELECT s.name, d.id, d.topic, d.key, d.attempts, d.died_at,
       CASE WHEN pg_catalog.jsonb_typeof(d.history -> -1 -> 'status') = 'number'
            THEN (d.history -> -1 ->> 'status')::int END AS last_status,
       d.history -> -1 ->> 'error' AS last_error, d.history,
       CASE WHEN d.content_type IS NULL THEN pg_catalog.convert_from(d.payload, 'UTF8')::jsonb
            WHEN d.content_type ~* '^[^;]*[/+]json\s*(;|$)' THEN dtm.json_or_null(d.payload) END AS payload,
       d.payload AS body,
       coalesce(d.content_type, 'application/json') AS content_type,
       d.headers::jsonb AS headers, d.published_at, d.parked_at, d.seq, d.era
FROM dtm.dead_letter d JOIN dtm.subscription s ON s.id = d.subscription;

COMMENT ON VIEW dtm.dead_letters IS 'What was given up. dtm.redrive tries it again, dtm.discard deletes it.';

-- Turning over. The log is a ring of three segments, control data (cursors, positions, leases, heartbeats) one of two. Publishers go
-- on in an empty segment when the one they write has half of the retention time in it; a segment whose last event is older than
-- the retention time, and that every subscription has had, is emptied by TRUNCATE. Nobody waits for any of this for longer than
-- the lock_timeout that stands at these functions.
--
-- TRUNCATE is seen by snapshots that were taken before it. A dump could find cursors that need a segment, and the segment
-- empty. So it happens in two transactions: one writes down that nobody needs the segment, and another empties it once no
-- snapshot is held that does not see the first. Snapshots that are taken in between find that nobody needs it either: the first
-- lets nobody write there or set a subscription to a place meanwhile, and what does so later makes it begin anew.

-- Every transaction with a smaller id has ended, as all snapshots that are held in this database see it.
CREATE FUNCTION dtm.horizon() RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'horizon_wrapper';

-- An old snapshot does not see what has to be kept.
CREATE FUNCTION dtm.require_read_committed() RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'segments are turned over in READ COMMITTED transactions only',
            DETAIL = format('This one is %s.', upper(current_setting('transaction_isolation'))),
            HINT = 'Call it outside a transaction block, or begin one with ISOLATION LEVEL READ COMMITTED.';
    END IF;
END
$$;

-- Up to which number each subscription, or each of its shards, needs nothing of the log any more. Null: it has no cursor, and needs all.
CREATE VIEW dtm.needs AS
SELECT s.id AS subscription, o.shard, c.low
FROM dtm.subscription s
JOIN dtm.owners o ON o.subscription = s.id
LEFT JOIN LATERAL dtm.cursor_at(s.id, o.shard, s.epoch) c ON true
WHERE s.state <> 'dropped';

-- How long whoever reads or writes a segment is left alone that was in the way once: an idle transaction may stay for long, and
-- while it is waited for, others wait.
CREATE FUNCTION dtm.is_held_up(since timestamptz) RETURNS boolean
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
RETURN coalesce(since > clock_timestamp() - least(dtm.retention() / 10, interval '1 min'), false);

-- Goes one step on with the log, if there is one to go. Answers what it did: 'rotated', 'retired', 'emptied', or
-- 'kept', where what was retired is needed again; null: nothing.
-- SECURITY DEFINER: a relay needs no right to truncate.
CREATE FUNCTION dtm.rotate_log() RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    here dtm.installation;
    turning dtm.rotation;
    horizon bigint;
    old int;
    next int;
    starts bigint;
BEGIN
    PERFORM dtm.require_read_committed();
    IF NOT dtm.take_turn('rotation') OR NOT dtm.meet_restored() THEN
        RETURN NULL;
    END IF;
    SELECT * INTO STRICT here FROM dtm.installation;
    SELECT * INTO STRICT turning FROM dtm.rotation;
    horizon := dtm.horizon();
    FOR old IN SELECT n FROM generate_series(1, 3) AS n WHERE n <> here.log_segment AND NOT dtm.is_held_up(turning.log_held_up[n]) LOOP
        IF turning.log_retired[old] < horizon THEN
            BEGIN
                -- It waits for whoever reads or writes the segment; not for long, since others wait behind it.
                EXECUTE format('LOCK TABLE dtm.log_%s IN ACCESS EXCLUSIVE MODE', old);
            EXCEPTION WHEN lock_not_available THEN
                UPDATE dtm.rotation SET log_held_up[old] = clock_timestamp();
                CONTINUE;
            END;
            SELECT CASE WHEN is_called THEN last_value ELSE 0 END INTO starts FROM dtm.start_seq;
            UPDATE dtm.rotation SET log_retired[old] = NULL;
            -- Subscriptions were set to a place since: one may need it, or may have for a snapshot that is held.
            IF starts <> turning.log_starts[old] OR NOT dtm.is_needless(old) THEN
                RETURN 'kept';
            END IF;
            EXECUTE format('TRUNCATE dtm.log_%s', old);
            RETURN 'emptied';
        ELSIF turning.log_retired[old] IS NULL AND dtm.is_needless(old) THEN
            BEGIN
                -- Whoever writes there still, or sets a subscription to a place, has ended.
                EXECUTE format('LOCK TABLE dtm.subscription, dtm.log_%s IN SHARE MODE', old);
            EXCEPTION WHEN lock_not_available THEN
                UPDATE dtm.rotation SET log_held_up[old] = clock_timestamp();
                CONTINUE;
            END;
            SELECT CASE WHEN is_called THEN last_value ELSE 0 END INTO starts FROM dtm.start_seq;
            IF dtm.is_needless(old) THEN
                UPDATE dtm.rotation SET log_retired[old] = pg_current_xact_id()::text::bigint, log_starts[old] = starts;
                RETURN 'retired';
            END IF;
        END IF;
    END LOOP;
    SELECT s.segment INTO next FROM dtm.log_segments() s
    WHERE s.segment <> here.log_segment AND s.last_seq IS NULL
    ORDER BY (s.segment - here.log_segment + 3) % 3 LIMIT 1;
    IF next IS NOT NULL
       AND EXISTS (SELECT FROM dtm.log_segments() s
                   WHERE s.segment = here.log_segment AND s.first_at < clock_timestamp() - dtm.retention() / 2) THEN
        UPDATE dtm.installation SET log_segment = next;
        PERFORM dtm.installation_changed();
        RETURN 'rotated';
    END IF;
    RETURN NULL;
END
$$;

-- Whether there is something in a segment of the log, and nothing of it is wanted: by the retention time, by a subscription, or
-- by one that is still being restored.
CREATE FUNCTION dtm.is_needless(segment int) RETURNS boolean
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
RETURN EXISTS (
    SELECT FROM dtm.log_segments() last
    WHERE last.segment = is_needless.segment AND last.last_at < clock_timestamp() - dtm.retention()
      AND NOT EXISTS (SELECT FROM dtm.needs n WHERE n.low IS NULL OR n.low < last.last_seq)
      AND NOT dtm.is_restoring());

-- Copies from a segment of control data to the other one what is the newest of its kind and is not there; answers how much.
CREATE FUNCTION dtm.copy_control(source int, target int) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    copied bigint := 0;
    n bigint;
    statement text;
BEGIN
    FOREACH statement IN ARRAY ARRAY[
        'INSERT INTO dtm.cursor_log_%2$s
         SELECT c.* FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
         CROSS JOIN LATERAL (SELECT * FROM dtm.cursor_log_%1$s l
                             WHERE l.subscription = s.id AND l.shard = o.shard AND l.epoch = s.epoch
                             ORDER BY l.id DESC LIMIT 1) c
         WHERE NOT EXISTS (SELECT FROM dtm.cursor_log_%2$s l
                           WHERE l.subscription = c.subscription AND l.shard = c.shard AND l.epoch = c.epoch AND l.id >= c.id)',
        -- What cursors name, and what the next head is read from.
        'INSERT INTO dtm.position_log_%2$s
         SELECT p.* FROM dtm.position_log_%1$s p
         WHERE (p.id IN (SELECT unnest(ARRAY[c."position", c.target]) FROM dtm.cursor_log_%2$s c)
                OR p.id = (SELECT max(id) FROM dtm.position_log))
           AND NOT EXISTS (SELECT FROM dtm.position_log_%2$s o WHERE o.id = p.id)
         ON CONFLICT DO NOTHING',
        'INSERT INTO dtm.lease_log_%2$s
         SELECT newest.* FROM (SELECT DISTINCT ON (l.subscription, l.shard) l.* FROM dtm.lease_log_%1$s l
                               ORDER BY l.subscription, l.shard, l.token DESC) newest
         WHERE EXISTS (SELECT FROM dtm.subscription s WHERE s.id = newest.subscription)
           AND NOT EXISTS (SELECT FROM dtm.lease_log_%2$s l
                           WHERE l.subscription = newest.subscription AND l.shard = newest.shard AND l.token >= newest.token)',
        'INSERT INTO dtm.heartbeat_log_%2$s
         SELECT newest.* FROM (SELECT DISTINCT ON (h.relay) h.* FROM dtm.heartbeat_log_%1$s h
                               ORDER BY h.relay, h.id DESC) newest
         WHERE newest.expires_at > clock_timestamp()
           AND NOT EXISTS (SELECT FROM dtm.heartbeat_log_%2$s h WHERE h.relay = newest.relay AND h.id >= newest.id)'
    ] LOOP
        EXECUTE format(statement, source, target);
        GET DIAGNOSTICS n = ROW_COUNT;
        copied := copied + n;
    END LOOP;
    RETURN copied;
END
$$;

-- Locks tables of control data as a LOCK TABLE statement says. False: somebody is in the way, and is left alone for a while.
CREATE FUNCTION dtm.try_lock_control(tables text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    BEGIN
        EXECUTE 'LOCK TABLE ' || tables;
    EXCEPTION WHEN lock_not_available THEN
        UPDATE dtm.rotation SET control_held_up = clock_timestamp();
        RETURN false;
    END;
    RETURN true;
END
$$;

-- Goes one step on with control data: once the segment that is written has grown beyond max_bytes. Answers as rotate_log does.
CREATE FUNCTION dtm.rotate_control(max_bytes bigint DEFAULT 33554432) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    here dtm.installation;
    turning dtm.rotation;
    old int;
    is_empty boolean;
    bytes bigint;
BEGIN
    PERFORM dtm.require_read_committed();
    -- Relays of version 0.1 name positions that may have gone.
    IF NOT dtm.take_turn('rotation') OR NOT dtm.meet_restored() OR EXISTS (SELECT FROM dtm.live_relays WHERE NOT shares) THEN
        RETURN NULL;
    END IF;
    SELECT * INTO STRICT here FROM dtm.installation;
    SELECT * INTO STRICT turning FROM dtm.rotation;
    IF dtm.is_held_up(turning.control_held_up) THEN
        RETURN NULL;
    END IF;
    old := 3 - here.control_segment;
    EXECUTE format('SELECT NOT (EXISTS (SELECT FROM dtm.cursor_log_%1$s) OR EXISTS (SELECT FROM dtm.position_log_%1$s)
                                OR EXISTS (SELECT FROM dtm.lease_log_%1$s) OR EXISTS (SELECT FROM dtm.heartbeat_log_%1$s))', old)
    INTO is_empty;
    IF is_empty THEN
        EXECUTE format('SELECT pg_relation_size(''dtm.cursor_log_%1$s'') + pg_relation_size(''dtm.position_log_%1$s'')
                               + pg_relation_size(''dtm.lease_log_%1$s'') + pg_relation_size(''dtm.heartbeat_log_%1$s'')',
                       here.control_segment) INTO bytes;
        IF bytes <= max_bytes THEN
            RETURN NULL;
        END IF;
        -- Whoever writes control data has ended, and whoever comes next reads the new segment.
        IF NOT dtm.try_lock_control('dtm.rotation IN EXCLUSIVE MODE') THEN
            RETURN NULL;
        END IF;
        UPDATE dtm.installation SET control_segment = old;
        PERFORM dtm.copy_control(here.control_segment, old);
        UPDATE dtm.rotation SET control_retired = pg_current_xact_id()::text::bigint;
        RETURN 'rotated';
    ELSIF turning.control_retired IS NULL THEN
        IF NOT dtm.try_lock_control('dtm.rotation IN EXCLUSIVE MODE') THEN
            RETURN NULL;
        END IF;
        PERFORM dtm.copy_control(old, here.control_segment);
        UPDATE dtm.rotation SET control_retired = pg_current_xact_id()::text::bigint;
        RETURN 'retired';
    ELSIF turning.control_retired < dtm.horizon() THEN
        IF NOT dtm.try_lock_control(format(
            'dtm.cursor_log_%1$s, dtm.position_log_%1$s, dtm.lease_log_%1$s, dtm.heartbeat_log_%1$s IN ACCESS EXCLUSIVE MODE', old)) THEN
            RETURN NULL;
        END IF;
        IF dtm.is_restoring() THEN
            RETURN NULL;  -- cursors, before their subscriptions
        END IF;
        IF dtm.copy_control(old, here.control_segment) > 0 THEN
            -- Written with an old snapshot since: for those that are held now it must stay.
            UPDATE dtm.rotation SET control_retired = pg_current_xact_id()::text::bigint;
            RETURN 'retired';
        END IF;
        EXECUTE format('TRUNCATE dtm.cursor_log_%1$s, dtm.position_log_%1$s, dtm.lease_log_%1$s, dtm.heartbeat_log_%1$s', old);
        UPDATE dtm.rotation SET control_retired = NULL;
        RETURN 'emptied';
    END IF;
    RETURN NULL;
EXCEPTION WHEN lock_not_available THEN
    RETURN NULL;
END
$$;

-- A subscriber that is away holds the log, also where its subscription is paused or disabled. How far it may lag behind is an
-- option, and whether it is dropped then. Relays look, and drop what lags too far at several looks and does not catch up between
-- them: one look does not tell who is away from who was kept waiting.

CREATE FUNCTION dtm.lag_policy(options jsonb, OUT drops boolean, OUT max_seconds float8, OUT max_bytes bigint) RETURNS SETOF record
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE ROWS 1 AS 'MODULE_PATHNAME', 'lag_policy_wrapper';

INSERT INTO dtm.turn VALUES ('lag');

-- How far each subscription that is not dropped lags behind, beside how far it may.
CREATE VIEW dtm.lag AS
SELECT s.id, s.name, s.state,
       -- Others than before: somebody has done something about it, and an earlier look says nothing any more.
       pg_catalog.hashtextextended(pg_catalog.format('%s %s %s', s.epoch, s.state, s.options), 0) AS terms,
       s.lag_seconds, s.lag_events, s.lag_bytes, s.next_seq,
       s.lag_events IS NOT NULL AS has_cursor,
       coalesce(s.lag_seconds > policy.max_seconds OR s.lag_bytes > policy.max_bytes, false) AS is_late,
       -- Events that are older than the subscription, or came with a restore, have not waited for it for all their age.
       policy.drops AND coalesce(
           least(s.lag_seconds, extract(epoch FROM pg_catalog.clock_timestamp() - greatest(begun.started_at, era.began_at)))
               > policy.max_seconds
           OR s.lag_bytes > policy.max_bytes, false) AS may_be_dropped
FROM dtm.subscriptions s
JOIN dtm.subscription begun ON begun.id = s.id
CROSS JOIN LATERAL dtm.lag_policy(s.options) policy
LEFT JOIN (SELECT e.began_at FROM dtm.eras e JOIN dtm.installation i ON i.era = e.era) era ON true
WHERE s.state <> 'dropped';

-- Subscriptions that lag behind further than they may, and those that have no cursor (and hold all of the log). A row of nulls:
-- nobody was looked at, since another relay is looking, or a restore is not complete.
CREATE FUNCTION dtm.watch_lag()
RETURNS TABLE (id bigint, name text, state text, terms bigint, lag_seconds float8, lag_events bigint, lag_bytes bigint,
               has_cursor boolean, may_be_dropped boolean)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT dtm.take_turn('lag') OR NOT dtm.meet_restored() THEN
        RETURN NEXT;
        RETURN;
    END IF;
    RETURN QUERY
    SELECT l.id, l.name, l.state, l.terms, l.lag_seconds, l.lag_events, l.lag_bytes, l.has_cursor, l.may_be_dropped
    FROM dtm.lag l WHERE l.is_late OR NOT l.has_cursor ORDER BY l.name;
END
$$;

-- Drops a subscription if it lags too far behind still, by at least so many events, on the terms of that look. Its cursor stays
-- where it is, but holds nothing any more. Answers what it has lost; null: it is not dropped.
CREATE FUNCTION dtm.drop_late(subscription bigint, terms bigint, least_events bigint) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    late dtm.lag;
    lost text;
BEGIN
    -- Whoever has it locked is changing it.
    PERFORM FROM dtm.subscription s WHERE s.id = drop_late.subscription FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- A statement of its own: it sees what was changed until the row was locked.
    SELECT * INTO late FROM dtm.lag l
    WHERE l.id = drop_late.subscription AND l.terms = drop_late.terms AND l.may_be_dropped AND l.lag_events >= least_events;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    lost := format('events %s to %s', late.next_seq,
                   (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.event_seq));
    UPDATE dtm.subscription s
    SET state = 'dropped', state_before = s.state, reason_before = s.reason, revision = s.revision + 1,
        reason = format('it lagged %s s and %s bytes behind, and has lost %s', round(late.lag_seconds), late.lag_bytes, lost)
    WHERE s.id = drop_late.subscription;
    RETURN lost;
END
$$;

-- The barrier: work of a branch of a global transaction happens once, and not after it was called off. DTM's algorithm on DTM's
-- relation, so that services with DTM's own clients and those that call these functions share it.

-- Makes the relation, or makes DTM's, where there is one, the extension's. Whoever owns a table, or may put a trigger on it, has
-- code run by those who write to it, and dtm.barrier writes as the extension's owner: a table that is adopted has no code of
-- anybody else's, and nobody else can give it any from then on.
DO $adopt$
DECLARE
    path text := current_setting('search_path');
    adopted oid;
    sequence oid;
    owner oid;
    schema_owner oid;
    wrong text;
    granted record;
BEGIN
    SET LOCAL search_path = pg_catalog, pg_temp;
    IF to_regnamespace('dtm_barrier') IS NULL THEN
        CREATE SCHEMA dtm_barrier;
    ELSE
        -- Who owns it could give the name to another schema, with another table.
        schema_owner := (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'dtm_barrier');
        ALTER SCHEMA dtm_barrier OWNER TO CURRENT_USER;
        ALTER EXTENSION pg_dtm ADD SCHEMA dtm_barrier;
    END IF;
    adopted := to_regclass('dtm_barrier.barrier');
    sequence := to_regclass('dtm_barrier.barrier_seq');
    IF adopted IS NULL AND sequence IS NULL THEN
        CREATE SEQUENCE dtm_barrier.barrier_seq;
        CREATE TABLE dtm_barrier.barrier (
            id          bigint       NOT NULL DEFAULT nextval('dtm_barrier.barrier_seq') PRIMARY KEY,
            trans_type  varchar(45)  DEFAULT '',
            gid         varchar(128) DEFAULT '',
            branch_id   varchar(128) DEFAULT '',
            op          varchar(45)  DEFAULT '',
            barrier_id  varchar(45)  DEFAULT '',
            reason      varchar(45)  DEFAULT '',
            create_time timestamp(0) with time zone DEFAULT now(),
            update_time timestamp(0) with time zone DEFAULT now(),
            CONSTRAINT uniq_barrier UNIQUE (gid, branch_id, op, barrier_id)
        );
        CREATE INDEX barrier_create_time ON dtm_barrier.barrier (create_time);
    ELSE
        IF adopted IS NOT NULL THEN
            -- From here on nobody changes it.
            LOCK TABLE dtm_barrier.barrier IN ACCESS EXCLUSIVE MODE;
            adopted := to_regclass('dtm_barrier.barrier');
        END IF;
        wrong := CASE
            WHEN adopted IS NULL OR sequence IS NULL THEN 'there is only one of the table and its sequence'
            WHEN NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = adopted AND c.relkind = 'r' AND c.relpersistence = 'p'
                                 AND NOT c.relispartition AND c.reloftype = 0)
                THEN 'it is not a plain table that survives a crash'
            WHEN NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = sequence AND c.relkind = 'S' AND c.relpersistence = 'p')
                THEN 'barrier_seq is not a sequence that survives a crash'
            WHEN EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid IN (adopted, sequence)
                             AND d.deptype = 'e')
                THEN 'it belongs to another extension'
            WHEN EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = adopted)
                THEN 'it has triggers, or foreign keys refer to it'
            WHEN EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = adopted) THEN 'it has rules'
            WHEN EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = adopted)
              OR EXISTS (SELECT FROM pg_class c WHERE c.oid = adopted AND c.relrowsecurity) THEN 'it has row security'
            WHEN EXISTS (SELECT FROM pg_inherits i WHERE adopted IN (i.inhrelid, i.inhparent)) THEN 'it inherits, or is inherited from'
            WHEN EXISTS (SELECT FROM pg_statistic_ext s WHERE s.stxrelid = adopted) THEN 'it has extended statistics'
            WHEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = adopted AND a.attnum > 0 AND NOT a.attisdropped
                             AND a.attacl IS NOT NULL) THEN 'it has privileges on columns'
            -- Types are told with their schema unless they are PostgreSQL's own.
            WHEN ARRAY(SELECT format('%s %s%s', a.attname, format_type(a.atttypid, a.atttypmod),
                                     CASE WHEN a.attidentity <> '' OR a.attgenerated <> '' THEN ' generated' END)
                       FROM pg_attribute a WHERE a.attrelid = adopted AND a.attnum > 0 AND NOT a.attisdropped
                       ORDER BY a.attnum)
                 <> ARRAY['id bigint', 'trans_type character varying(45)', 'gid character varying(128)',
                          'branch_id character varying(128)', 'op character varying(45)',
                          'barrier_id character varying(45)', 'reason character varying(45)',
                          'create_time timestamp(0) with time zone', 'update_time timestamp(0) with time zone']
                THEN 'its columns are not DTM''s'
            WHEN EXISTS (
                SELECT FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
                WHERE d.adrelid = adopted AND NOT CASE
                    WHEN a.attname = 'id' THEN
                        pg_get_expr(d.adbin, adopted) = 'nextval(''dtm_barrier.barrier_seq''::regclass)'
                    WHEN a.attname IN ('create_time', 'update_time') THEN
                        pg_get_expr(d.adbin, adopted) IN ('now()', 'NULL::timestamp with time zone')
                    ELSE pg_get_expr(d.adbin, adopted) = '''''::character varying' END)
                THEN 'it has defaults that are not DTM''s'
            WHEN EXISTS (SELECT FROM pg_constraint c WHERE c.conrelid = adopted AND c.contype NOT IN ('p', 'u', 'n'))
                THEN 'it has constraints that are not DTM''s'
            WHEN ARRAY(SELECT pg_get_constraintdef(c.oid) FROM pg_constraint c
                       WHERE c.conrelid = adopted AND (c.contype = 'p' OR c.contype = 'u' AND c.conname = 'uniq_barrier')
                       ORDER BY c.contype::text)
                 <> ARRAY['PRIMARY KEY (id)', 'UNIQUE (gid, branch_id, op, barrier_id)']
                THEN 'it does not have the primary key (id) and the constraint uniq_barrier on (gid, branch_id, op, barrier_id)'
            WHEN EXISTS (
                SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                WHERE i.indrelid = adopted AND NOT (
                    i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
                    AND (i.indisprimary OR c.relname IN ('uniq_barrier', 'barrier_create_time'))
                    AND pg_get_indexdef(i.indexrelid) ~ ' USING btree \((id|gid, branch_id, op, barrier_id|create_time)\)$'))
                THEN 'it has indexes that are not DTM''s'
        END;
        IF wrong IS NOT NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = 'dtm_barrier.barrier cannot be made a part of the extension: ' || wrong,
                DETAIL = 'Functions of the extension write to it with the rights of the extension''s owner.',
                HINT = 'Give it DTM''s definition and nothing else, or rename it or drop it: then the extension makes it.';
        END IF;
        owner := (SELECT c.relowner FROM pg_class c WHERE c.oid = adopted);
        ALTER TABLE dtm_barrier.barrier OWNER TO CURRENT_USER;
        ALTER SEQUENCE dtm_barrier.barrier_seq OWNER TO CURRENT_USER;
        -- What lets others attach code, or empty it at once.
        FOR granted IN
            SELECT DISTINCT a.grantee, a.privilege_type
            FROM pg_class c, aclexplode(c.relacl) a
            WHERE c.oid = adopted AND a.grantee <> c.relowner
              AND a.privilege_type NOT IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
        LOOP
            EXECUTE format('REVOKE %s ON dtm_barrier.barrier FROM %s CASCADE', granted.privilege_type,
                           CASE granted.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(granted.grantee)) END);
        END LOOP;
        IF owner <> (SELECT c.relowner FROM pg_class c WHERE c.oid = adopted) THEN
            EXECUTE format('GRANT USAGE ON SCHEMA dtm_barrier TO %I', pg_get_userbyid(owner));
            EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON dtm_barrier.barrier TO %I', pg_get_userbyid(owner));
            EXECUTE format('GRANT USAGE ON SEQUENCE dtm_barrier.barrier_seq TO %I', pg_get_userbyid(owner));
            RAISE NOTICE USING
                MESSAGE = format('dtm_barrier.barrier is a part of the extension from now on; %s, who owned it, may go on using it',
                                 pg_get_userbyid(owner)),
                HINT = 'A dump does not have these grants: repeat them in a database that is restored.';
        END IF;
        ALTER TABLE dtm_barrier.barrier
            ALTER create_time SET DEFAULT now(), ALTER update_time SET DEFAULT now();
        IF to_regclass('dtm_barrier.barrier_create_time') IS NULL THEN
            CREATE INDEX barrier_create_time ON dtm_barrier.barrier (create_time);
        END IF;
        ALTER EXTENSION pg_dtm ADD TABLE dtm_barrier.barrier;
        ALTER EXTENSION pg_dtm ADD SEQUENCE dtm_barrier.barrier_seq;
    END IF;
    IF schema_owner <> (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'dtm_barrier') THEN
        EXECUTE format('GRANT USAGE, CREATE ON SCHEMA dtm_barrier TO %I', pg_get_userbyid(schema_owner));
    END IF;
    PERFORM set_config('search_path', path, true);
END
$adopt$;

SELECT pg_catalog.pg_extension_config_dump('dtm_barrier.barrier', '');
SELECT pg_catalog.pg_extension_config_dump('dtm_barrier.barrier_seq', '');

-- To be called first in the transaction that does a branch's work. SECURITY DEFINER: services need no rights on the table; it
-- looks nothing up by the caller's search_path.
CREATE FUNCTION dtm.barrier(trans_type text, gid text, branch_id text, op text, barrier_id text DEFAULT '01') RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER AS 'MODULE_PATHNAME', 'barrier_wrapper';

COMMENT ON FUNCTION dtm.barrier(text, text, text, text, text) IS
    'True: do the branch''s work in this transaction. False: it is done already or must not be done; commit and answer success.';

-- The barrier of a prepared message: its first row is the decision.
CREATE FUNCTION dtm.msg_barrier(gid text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.barrier('msg', gid, '00', 'msg');
END
$$;

COMMENT ON FUNCTION dtm.msg_barrier(text) IS
    'In the business transaction of a prepared message: it is committed if and only if this transaction is.';

-- Whether the business transaction of a message is committed. If it is not, it never will be: the row stands in its way. It is
-- waited for while it is open or prepared. Whatever error there is (55P03 when that takes too long, 40001, 25006 on a standby)
-- means: not known, ask later. What it answers counts once its own transaction is committed.
CREATE FUNCTION dtm.query_prepared(gid text) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    decision text;
BEGIN
    IF (length(gid) BETWEEN 1 AND 128) IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'a message has a gid of 1 to 128 characters',
            DETAIL = format('It is %s.', coalesce(quote_literal(left(gid, 150)), 'null')),
            HINT = 'Pass the gid that the message was prepared with.';
    END IF;
    INSERT INTO dtm_barrier.barrier (trans_type, gid, branch_id, op, barrier_id, reason)
    VALUES ('msg', query_prepared.gid, '00', 'msg', '01', 'rollback')
    ON CONFLICT ON CONSTRAINT uniq_barrier DO NOTHING;
    -- A statement of its own: at READ COMMITTED it sees what the first one has waited for.
    SELECT CASE b.reason WHEN 'rollback' THEN 'rolled_back' ELSE 'committed' END INTO decision
    FROM dtm_barrier.barrier b
    WHERE b.gid = query_prepared.gid AND b.branch_id = '00' AND b.op = 'msg' AND b.barrier_id = '01';
    IF decision IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'serialization_failure',
            MESSAGE = format('it is not known whether message %s is committed', gid),
            HINT = 'Ask again.';
    END IF;
    RETURN decision;
END
$$;

COMMENT ON FUNCTION dtm.query_prepared(text) IS
    '''committed'' or ''rolled_back''; an error means that it is not known yet. In a transaction of its own.';

-- A bounded part of the barriers that are older than dtm.barriers_kept. DTM's Go client used to leave no time: those are counted
-- from when they are first seen.
CREATE FUNCTION dtm.purge_barriers(max_rows int) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    purged bigint;
BEGIN
    UPDATE dtm_barrier.barrier SET create_time = now() WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm_barrier.barrier WHERE create_time IS NULL LIMIT max_rows FOR UPDATE SKIP LOCKED));
    DELETE FROM dtm_barrier.barrier WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm_barrier.barrier WHERE create_time < clock_timestamp() - dtm.barriers_kept()
        ORDER BY create_time LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS purged = ROW_COUNT;
    RETURN purged;
END
$$;

-- The setting dtm.barriers_kept.
CREATE FUNCTION dtm.barriers_kept() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'barriers_kept_wrapper';

-- A bounded part of what is older than its setting says; 0 when there was nothing. Relays call it; a database that only
-- receives has it called now and then by whatever schedules jobs there.
CREATE OR REPLACE FUNCTION dtm.purge(max_rows int DEFAULT 10000) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    purged bigint;
    receipts bigint;
BEGIN
    IF max_rows IS NULL OR max_rows < 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'max_rows must be positive',
            DETAIL = format('It is %s.', coalesce(max_rows::text, 'null')),
            HINT = 'Pass how many rows one call may delete of each kind, such as 10000.';
    END IF;
    DELETE FROM dtm.given_ids WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm.given_ids WHERE given_at < clock_timestamp() - dtm.retention()
        ORDER BY given_at LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS purged = ROW_COUNT;
    DELETE FROM dtm.receipts WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm.receipts WHERE received_at < clock_timestamp() - dtm.receipts_kept()
        ORDER BY received_at LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS receipts = ROW_COUNT;
    RETURN purged + receipts + dtm.purge_barriers(max_rows) + dtm.purge_transactions(max_rows);
END
$$;

-- What a relay calls in a database that is a target: functions there get events, and branches of global transactions, each in one
-- transaction with its receipt or barrier. They run with the rights of the relay's role there, and set no search_path, for the
-- function that is called has its own idea of it.

-- Calls f(event jsonb) for each event that the consumer has not had yet, in their order, each in a subtransaction of its own.
-- Answers those that were not done: why, or, without a state, that an earlier one of the same key was not. An error of the whole
-- transaction (a deadlock, a time-out, a server that shuts down) ends it: nothing is done then.
CREATE FUNCTION dtm.call_events(
    consumer text, function_schema text, function_name text, ids uuid[], keys text[], events text[]
) RETURNS TABLE (n int, state text, message text)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
DECLARE
    call CONSTANT text := pg_catalog.format('SELECT %I.%I($1)', function_schema, function_name);
    failed text[] := '{}';
BEGIN
    FOR at IN 1 .. pg_catalog.cardinality(ids) LOOP
        n := at;
        state := NULL;
        message := NULL;
        IF keys[at] OPERATOR(pg_catalog.=) ANY (failed) THEN
            RETURN NEXT;
            CONTINUE;
        END IF;
        BEGIN
            IF dtm.receive(consumer, ids[at]) THEN
                EXECUTE call USING events[at]::pg_catalog.jsonb;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            IF pg_catalog.left(SQLSTATE, 2) OPERATOR(pg_catalog.=) ANY ('{40,53,57,58}') THEN
                RAISE;
            END IF;
            state := SQLSTATE;
            message := SQLERRM;
            failed := failed OPERATOR(pg_catalog.||) keys[at];
            RETURN NEXT;
        END;
    END LOOP;
END
$$;

-- Calls f(gid text, branch_id text, op text, payload jsonb), unless the barrier says that the branch is done or called off.
CREATE FUNCTION dtm.call_branch(
    function_schema text, function_name text, trans_type text, gid text, branch_id text, op text, payload text
) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
BEGIN
    IF dtm.barrier(trans_type, gid, branch_id, op) THEN
        EXECUTE pg_catalog.format('SELECT %I.%I($1, $2, $3, $4)', function_schema, function_name)
        USING gid, branch_id, op, payload::pg_catalog.jsonb;
    END IF;
END
$$;

-- What users and operators do with global transactions, and see of them (06-transaction-tables.sql).

-- The setting dtm.transactions_kept.
CREATE FUNCTION dtm.transactions_kept() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'transactions_kept_wrapper';

-- A submitted transaction announces itself.
CREATE FUNCTION dtm.announce(gid text) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT dtm.append(gen_random_uuid(), 'dtm.transactions', gid, NULL, NULL, NULL);
END;

CREATE FUNCTION dtm.raise_no_transaction(gid text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'undefined_object',
        MESSAGE = 'there is no such transaction',
        DETAIL = format('The gid is %s.', coalesce(quote_literal(left(gid, 150)), 'null')),
        HINT = 'SELECT gid FROM dtm.transactions lists them. Those that have ended are kept for dtm.transactions_kept.';
END
$$;

CREATE FUNCTION dtm.raise_wrong_status(gid text, status text, what text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'object_not_in_prerequisite_state',
        MESSAGE = format('the transaction is %s and cannot be %s', status, what),
        DETAIL = format('The gid is %s.', quote_literal(gid)),
        HINT = 'dtm.transactions and dtm.branches show how far it is.';
END
$$;

-- The status of a transaction, whose row is locked; null: there is none.
CREATE FUNCTION dtm.locked_status(gid text) RETURNS text
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT t.status FROM dtm.transaction t WHERE t.gid = locked_status.gid FOR UPDATE;
END;

-- Locks a transaction that has not ended; there being none is an error. what: that which is to be done with it, as a participle.
CREATE FUNCTION dtm.lock_unfinished(gid text, what text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text := dtm.locked_status(gid);
BEGIN
    IF old IS NULL THEN
        PERFORM dtm.raise_no_transaction(gid);
    ELSIF old IN ('succeed', 'failed') THEN
        PERFORM dtm.raise_wrong_status(gid, old, what);
    END IF;
END
$$;

-- Ends a transaction where it stands: nothing more is called, nothing that was done is taken back.
CREATE FUNCTION dtm.force_stop(gid text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.lock_unfinished(gid, 'stopped');
    UPDATE dtm.transaction t
    SET status = 'failed', finished_at = clock_timestamp(), stuck_since = NULL, reason = 'stopped by dtm.force_stop'
    WHERE t.gid = force_stop.gid;
    DELETE FROM dtm.due d WHERE d.gid = force_stop.gid;
END
$$;

-- Tries now what waits for its next attempt. One that stood still begins its attempts anew.
CREATE FUNCTION dtm.retry_now(gid text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.lock_unfinished(gid, 'tried again');
    UPDATE dtm.transaction t SET failures = 0, stuck_since = NULL
    WHERE t.gid = retry_now.gid AND (t.failures <> 0 OR t.stuck_since IS NOT NULL);
    INSERT INTO dtm.due AS d (gid, due_at) VALUES (retry_now.gid, clock_timestamp())
    ON CONFLICT ON CONSTRAINT due_pkey DO UPDATE SET due_at = excluded.due_at;
END
$$;

CREATE VIEW dtm.transactions AS
SELECT t.gid, t.trans_type, t.status, t.created_at, t.finished_at, t.reason, t.failures,
       coalesce(t.last_error, b.last_error) AS last_error, d.due_at AS next_attempt_at, t.stuck_since,
       t.query_prepared, t.options, t.id
FROM dtm.transaction t
LEFT JOIN dtm.due d ON d.gid = t.gid
LEFT JOIN LATERAL (
    SELECT f.last_error FROM dtm.branch f
    WHERE f.gid = t.gid AND f.status = 'prepared' ORDER BY f.last_attempt_at DESC LIMIT 1) b ON true;

COMMENT ON VIEW dtm.transactions IS 'Global transactions and how far they are. next_attempt_at: where one waits.';

-- A branch without a row of its own was called once, or not at all: what its transaction says holds for it.
CREATE VIEW dtm.branches AS
SELECT t.gid, step ->> 'branch_id' AS branch_id, step ->> 'op' AS op, step ->> 'action' AS action,
       coalesce(b.status, CASE t.status WHEN 'succeed' THEN 'succeed' ELSE 'prepared' END) AS status,
       coalesce(b.attempts, CASE t.status WHEN 'succeed' THEN 1 ELSE 0 END) AS attempts,
       b.last_status, b.last_error, b.last_attempt_at,
       CASE WHEN b.status = 'prepared' THEN d.due_at END AS next_attempt_at,
       coalesce(b.finished_at, CASE WHEN b.status IS NULL AND t.status = 'succeed' THEN t.finished_at END) AS finished_at,
       t.payloads[n] AS payload
FROM dtm.transaction t
CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(t.branches) WITH ORDINALITY AS of_transaction (step, n)
LEFT JOIN dtm.branch b ON b.gid = t.gid AND b.branch_id = step ->> 'branch_id' AND b.op = step ->> 'op'
LEFT JOIN dtm.due d ON d.gid = t.gid;

COMMENT ON VIEW dtm.branches IS 'The calls of global transactions: what came of each, and when it is made again.';

-- A bounded part of what has ended long ago.
CREATE FUNCTION dtm.purge_transactions(max_rows int) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    gone text[];
BEGIN
    WITH old AS (
        SELECT t.gid FROM dtm.transaction t
        WHERE t.created_at < clock_timestamp() - dtm.transactions_kept() ORDER BY t.id LIMIT max_rows
    ), deleted AS (
        DELETE FROM dtm.transaction t USING old
        WHERE t.gid = old.gid AND t.finished_at < clock_timestamp() - dtm.transactions_kept()
        RETURNING t.gid
    )
    SELECT array_agg(d.gid) INTO gone FROM deleted d;
    DELETE FROM dtm.branch b WHERE b.gid = ANY (gone);
    RETURN coalesce(cardinality(gone), 0);
END
$$;

-- 2-phase messages: calls of several services that are certain to be made if and only if the business transaction commits. They
-- are SECURITY DEFINER: who may execute them needs no rights on the tables.

CREATE FUNCTION dtm.new_gid() RETURNS text
LANGUAGE c VOLATILE PARALLEL SAFE AS 'MODULE_PATHNAME', 'new_gid_wrapper';
CREATE FUNCTION dtm.check_gid(gid text) RETURNS void
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'check_gid_wrapper';
CREATE FUNCTION dtm.check_steps(steps jsonb) RETURNS void
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'check_steps_wrapper';
CREATE FUNCTION dtm.check_transaction_options(options jsonb) RETURNS TABLE (delay float8, timeout_to_fail float8)
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'check_transaction_options_wrapper';

-- Who gets what is sent to topic://NAME: DTM's message topics. They have nothing to do with subscriptions.
CREATE TABLE dtm.msg_topics (
    topic      text        NOT NULL,
    url        text        NOT NULL,
    remark     text        NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (topic, url)
);
SELECT pg_catalog.pg_extension_config_dump('dtm.msg_topics', '');

-- The branches of steps, numbered as DTM does: 01, 02, and where a topic has several subscribers 01-01, 01-02.
CREATE FUNCTION dtm.branches_of_steps(steps jsonb, bodies bytea[], OUT branches jsonb, OUT payloads bytea[])
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    lonely text;
BEGIN
    SELECT s.step ->> 'action' INTO lonely
    FROM jsonb_array_elements(steps) AS s (step)
    WHERE s.step ->> 'action' LIKE 'topic://%'
      AND NOT EXISTS (SELECT FROM dtm.msg_topics m WHERE 'topic://' || m.topic = s.step ->> 'action')
    LIMIT 1;
    IF lonely IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = 'nobody is subscribed to this message topic',
            DETAIL = format('The action is %L.', lonely),
            HINT = 'Insert its subscribers into dtm.msg_topics first.';
    END IF;
    SELECT jsonb_agg((s.step - 'payload' - 'action') || jsonb_build_object(
               'branch_id', lpad(s.n::text, 2, '0') || CASE WHEN t.among > 1 THEN '-' || lpad(t.nth::text, 2, '0') ELSE '' END,
               'op', 'action', 'action', coalesce(t.url, s.step ->> 'action')) ORDER BY s.n, t.nth),
           array_agg(CASE WHEN bodies IS NULL THEN convert_to((s.step -> 'payload')::text, 'UTF8') ELSE bodies[s.n] END
                     ORDER BY s.n, t.nth)
    INTO branches, payloads
    FROM jsonb_array_elements(steps) WITH ORDINALITY AS s (step, n)
    LEFT JOIN (
        SELECT 'topic://' || m.topic AS action, m.url, row_number() OVER subscribers AS nth,
               count(*) OVER (PARTITION BY m.topic) AS among
        FROM dtm.msg_topics m WINDOW subscribers AS (PARTITION BY m.topic ORDER BY m.created_at, m.url)) t
    ON t.action = s.step ->> 'action';
END
$$;

-- Makes a message. 23505: there is one of this gid. bodies: of each step, instead of its payload.
CREATE FUNCTION dtm.insert_message(
    gid text, status text, steps jsonb, bodies bytea[], query_prepared text, options jsonb
) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known record;
    expanded record;
    size bigint;
    wait float8;
BEGIN
    PERFORM dtm.check_gid(gid);
    PERFORM dtm.check_steps(steps);
    SELECT * INTO known FROM dtm.check_transaction_options(options);
    SELECT * INTO expanded FROM dtm.branches_of_steps(steps, bodies);
    SELECT sum(length(p)) INTO size FROM unnest(expanded.payloads) AS p;
    IF size > pg_size_bytes(current_setting('dtm.max_payload')) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'program_limit_exceeded',
            MESSAGE = 'the payloads are too large',
            DETAIL = format('Together they have %s bytes; dtm.max_payload is %s.', size, current_setting('dtm.max_payload')),
            HINT = 'Store the bodies elsewhere and send references to them.';
    END IF;
    INSERT INTO dtm.transaction (gid, trans_type, status, branches, payloads, query_prepared, options)
    VALUES (insert_message.gid, 'msg', insert_message.status, expanded.branches, expanded.payloads,
            insert_message.query_prepared, insert_message.options);
    wait := CASE status WHEN 'prepared' THEN known.timeout_to_fail ELSE known.delay END;
    IF wait > 0 THEN
        INSERT INTO dtm.due (gid, due_at) VALUES (insert_message.gid, clock_timestamp() + make_interval(secs => wait));
    ELSE
        PERFORM dtm.announce(gid);
    END IF;
END
$$;

CREATE FUNCTION dtm.msg_send(steps jsonb, gid text DEFAULT NULL, options jsonb DEFAULT '{}') RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    chosen text := coalesce(gid, dtm.new_gid());
BEGIN
    PERFORM dtm.insert_message(chosen, 'submitted', steps, NULL, NULL, options);
    RETURN chosen;
END
$$;

COMMENT ON FUNCTION dtm.msg_send(jsonb, text, jsonb) IS
    'In the business transaction: its steps are called if and only if it commits. Returns the gid.';

CREATE FUNCTION dtm.msg_prepare(gid text, steps jsonb, query_prepared text, options jsonb DEFAULT '{}') RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF query_prepared IS NULL OR query_prepared !~ '^(https?|postgres)://[^/]' OR query_prepared ~ '@'
       OR length(query_prepared) > 2048 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'a prepared message needs somebody to be asked whether it is committed',
            HINT = 'Pass a URL that answers as DTM''s query-prepared does, or postgres://TARGET, without credentials.';
    END IF;
    PERFORM dtm.insert_message(gid, 'prepared', steps, NULL, query_prepared, options);
END
$$;

COMMENT ON FUNCTION dtm.msg_prepare(text, jsonb, text, jsonb) IS
    'Before a business transaction that runs elsewhere: dtm.msg_submit follows it, or query_prepared is asked.';

-- Submitting what is submitted already is no error: the first call's answer may have been lost.
CREATE FUNCTION dtm.msg_submit(gid text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old dtm.transaction;
    left_to_wait float8;
BEGIN
    SELECT * INTO old FROM dtm.transaction t WHERE t.gid = msg_submit.gid AND t.trans_type = 'msg' FOR UPDATE;
    IF old.gid IS NULL THEN
        PERFORM dtm.raise_no_transaction(gid);
    ELSIF old.status IN ('submitted', 'succeed') THEN
        RETURN;
    ELSIF old.status <> 'prepared' THEN
        PERFORM dtm.raise_wrong_status(gid, old.status, 'submitted');
    END IF;
    UPDATE dtm.transaction t SET status = 'submitted', failures = 0, last_error = NULL, stuck_since = NULL
    WHERE t.gid = msg_submit.gid;
    SELECT o.delay - extract(epoch FROM clock_timestamp() - old.created_at) INTO left_to_wait
    FROM dtm.check_transaction_options(old.options) o;
    IF left_to_wait > 0 THEN
        INSERT INTO dtm.due AS d (gid, due_at) VALUES (msg_submit.gid, clock_timestamp() + make_interval(secs => left_to_wait))
        ON CONFLICT ON CONSTRAINT due_pkey DO UPDATE SET due_at = excluded.due_at, endpoint = NULL;
    ELSE
        DELETE FROM dtm.due d WHERE d.gid = msg_submit.gid;
        PERFORM dtm.announce(gid);
    END IF;
END
$$;

COMMENT ON FUNCTION dtm.msg_submit(text) IS 'The business transaction of a prepared message is committed.';

CREATE FUNCTION dtm.msg_abort(gid text, reason text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text := (SELECT t.status FROM dtm.transaction t WHERE t.gid = msg_abort.gid AND t.trans_type = 'msg' FOR UPDATE);
BEGIN
    IF old IS NULL THEN
        PERFORM dtm.raise_no_transaction(gid);
    ELSIF old = 'failed' THEN
        RETURN;
    ELSIF old <> 'prepared' THEN
        PERFORM dtm.raise_wrong_status(gid, old, 'aborted');
    END IF;
    UPDATE dtm.transaction t
    SET status = 'failed', finished_at = clock_timestamp(), stuck_since = NULL, reason = coalesce(msg_abort.reason, 'aborted')
    WHERE t.gid = msg_abort.gid;
    DELETE FROM dtm.due d WHERE d.gid = msg_abort.gid;
END
$$;

COMMENT ON FUNCTION dtm.msg_abort(text, text) IS 'The business transaction of a prepared message is rolled back.';

-- What a relay's coordinator calls.

CREATE FUNCTION dtm.flush() RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'flush_wal_wrapper';

-- The first transaction of a database calls for its coordinator: a subscription of its own, so that it is shared, moved, paused
-- after a restore, and seen, as others are. What was submitted before it is there waits in dtm.due.
CREATE FUNCTION dtm.start_coordinator() RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint;
    came_with_a_restore boolean;
BEGIN
    -- Transactions that came from elsewhere wait for dtm.resume: a copy of production must not call production's services.
    came_with_a_restore := EXISTS (
        SELECT FROM dtm.installation i JOIN dtm.eras here ON here.era = i.era
        WHERE EXISTS (SELECT FROM dtm.eras e WHERE e.era <> i.era)
          AND EXISTS (SELECT FROM dtm.transaction t WHERE t.created_at < here.began_at));
    INSERT INTO dtm.subscription AS s (name, topics, destination, options, era, state, reason)
    VALUES ('dtm.transactions', '{dtm.transactions}', 'coordinator:', '{"shards": 4, "max_in_flight": 1024}',
            (SELECT era FROM dtm.installation), CASE WHEN came_with_a_restore THEN 'paused' ELSE 'active' END,
            CASE WHEN came_with_a_restore THEN 'the database was restored or copied' END)
    ON CONFLICT ON CONSTRAINT subscription_name_key DO NOTHING
    RETURNING s.id INTO subscription_id;
    IF FOUND THEN
        PERFORM dtm.start_subscription(subscription_id, 'now');
        -- A statement of its own: whatever it does not see lies past the subscription's cursor.
        INSERT INTO dtm.due (gid, due_at)
        SELECT t.gid, clock_timestamp() FROM dtm.transaction t WHERE t.status IN ('submitted', 'aborting')
        ON CONFLICT ON CONSTRAINT due_pkey DO NOTHING;
    END IF;
END
$$;

-- Transactions that have not ended, with all that there is to know. undecidable: barriers of so long ago may be gone, so nobody
-- is asked any more.
CREATE FUNCTION dtm.relay_transactions(gids text[])
RETURNS TABLE (gid text, trans_type text, status text, branches text, payloads bytea[], query_prepared text, options text,
               failures int, undecidable boolean, waits boolean, known text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET jit = off
BEGIN ATOMIC
    SELECT t.gid, t.trans_type, t.status, t.branches::text, t.payloads, t.query_prepared, t.options::text, t.failures,
           t.created_at < clock_timestamp() - dtm.barriers_kept() / 2,
           EXISTS (SELECT FROM dtm.due d WHERE d.gid = t.gid),
           (SELECT jsonb_agg(jsonb_build_object('branch_id', b.branch_id, 'op', b.op, 'status', b.status, 'attempts', b.attempts))
            FROM dtm.branch b WHERE b.gid = t.gid)::text
    FROM dtm.transaction t
    WHERE t.gid = ANY (gids) AND t.status IN ('prepared', 'submitted', 'aborting') AND t.stuck_since IS NULL;
END;

-- What is due in the shards that a relay owns, but for what it is at already; and in how many seconds the next is.
CREATE FUNCTION dtm.relay_due_transactions(shards int, own int[], busy text[], max_rows int, OUT gids text[], OUT next_in float8)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    gids := ARRAY(
        SELECT d.gid FROM dtm.due d
        WHERE d.due_at <= clock_timestamp() AND d.gid <> ALL (busy) AND dtm.shard_of(d.gid, 0, shards) = ANY (own)
        ORDER BY d.due_at LIMIT max_rows);
    SELECT extract(epoch FROM min(d.due_at) - clock_timestamp()) INTO next_in FROM dtm.due d WHERE d.due_at > clock_timestamp();
    IF gids <> '{}' THEN
        -- What a crash could still take back is not acted on.
        PERFORM dtm.flush();
    END IF;
END
$$;

-- Messages whose branches were all called with success: those that it ends.
CREATE FUNCTION dtm.relay_succeed(gids text[]) RETURNS text[]
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    ended text[];
BEGIN
    -- Nobody's open transaction holds up the others: what is locked is tried again.
    BEGIN
        WITH done AS (
            UPDATE dtm.transaction t SET status = 'succeed', finished_at = clock_timestamp()
            WHERE t.gid = ANY (gids) AND t.status = 'submitted' RETURNING t.gid
        )
        SELECT array_agg(d.gid) INTO ended FROM done d;
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        WITH free AS MATERIALIZED (
            SELECT t.gid FROM dtm.transaction t
            WHERE t.gid = ANY (gids) AND t.status = 'submitted' FOR UPDATE SKIP LOCKED
        ), done AS (
            UPDATE dtm.transaction t SET status = 'succeed', finished_at = clock_timestamp()
            FROM free WHERE t.gid = free.gid RETURNING t.gid
        )
        SELECT array_agg(d.gid) INTO ended FROM done d;
    END;
    RETURN coalesce(ended, '{}');
END
$$;

-- What came of passes that were not all success. Each is an object: gid, "from" (the status it leaves), "to", reason, failures,
-- retry_in (seconds; null: it waits for nothing), endpoint, error, stuck, and branches: those that something came of. Answers
-- those that still had the status they leave.
CREATE FUNCTION dtm.relay_settle(settlements jsonb) RETURNS text[]
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    settled text[];
BEGIN
    WITH settlement AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(settlements) AS s (
            gid text, "from" text, "to" text, reason text, failures int, retry_in float8, endpoint text, error text, stuck boolean)
    ), free AS MATERIALIZED (
        SELECT t.gid FROM dtm.transaction t JOIN settlement s ON s.gid = t.gid AND s."from" = t.status
        FOR UPDATE OF t SKIP LOCKED
    ), moved AS (
        UPDATE dtm.transaction t
        SET status = s."to", failures = s.failures, last_error = s.error, reason = coalesce(s.reason, t.reason),
            finished_at = CASE WHEN s."to" IN ('succeed', 'failed') THEN clock_timestamp() END,
            stuck_since = CASE WHEN s.stuck THEN clock_timestamp() END
        FROM settlement s JOIN free ON free.gid = s.gid
        WHERE t.gid = s.gid
        RETURNING t.gid
    ), waits AS (
        INSERT INTO dtm.due AS d (gid, due_at, endpoint)
        SELECT s.gid, clock_timestamp() + make_interval(secs => s.retry_in), s.endpoint
        FROM settlement s JOIN moved m ON m.gid = s.gid WHERE s.retry_in IS NOT NULL
        ON CONFLICT ON CONSTRAINT due_pkey DO UPDATE SET due_at = excluded.due_at, endpoint = excluded.endpoint
    ), over AS (
        DELETE FROM dtm.due d USING settlement s JOIN moved m ON m.gid = s.gid
        WHERE d.gid = s.gid AND s.retry_in IS NULL
    ), known AS (
        INSERT INTO dtm.branch AS b (gid, branch_id, op, status, attempts, last_status, last_error, last_attempt_at, finished_at)
        SELECT m.gid, n.branch_id, n.op, n.status, n.attempts, n.last_status, n.last_error, clock_timestamp(),
               CASE WHEN n.status <> 'prepared' THEN clock_timestamp() END
        FROM moved m
        JOIN jsonb_array_elements(settlements) AS e (settlement) ON e.settlement ->> 'gid' = m.gid
        CROSS JOIN jsonb_to_recordset(e.settlement -> 'branches') AS n (
            branch_id text, op text, status text, attempts int, last_status int, last_error text)
        ON CONFLICT ON CONSTRAINT branch_pkey DO UPDATE
        SET status = excluded.status, attempts = excluded.attempts, last_status = excluded.last_status,
            last_error = excluded.last_error, last_attempt_at = excluded.last_attempt_at, finished_at = excluded.finished_at
    )
    SELECT array_agg(m.gid) INTO settled FROM moved m;
    RETURN coalesce(settled, '{}');
END
$$;

-- An endpoint works again: a part of what waits for it is due. Answers how many.
CREATE FUNCTION dtm.relay_revive(endpoint text, max_rows int) RETURNS int
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    revived int;
BEGIN
    UPDATE dtm.due SET due_at = clock_timestamp(), endpoint = NULL WHERE ctid = ANY (ARRAY(
        SELECT d.ctid FROM dtm.due d WHERE d.endpoint = relay_revive.endpoint
        LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS revived = ROW_COUNT;
    RETURN revived;
END
$$;

-- What a relay's DTM-compatible server calls, with the relay's rights.

-- Makes a message unless there is one. Answers the status of the one that was there; null: it was made.
CREATE FUNCTION dtm.server_insert(
    gid text, status text, steps jsonb, bodies bytea[], query_prepared text, options jsonb
) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text := dtm.locked_status(gid);
BEGIN
    IF old IS NULL THEN
        BEGIN
            PERFORM dtm.insert_message(gid, status, steps, bodies, query_prepared, options);
        EXCEPTION WHEN unique_violation THEN
            -- Somebody else has made it meanwhile.
            old := dtm.locked_status(gid);
        END;
    END IF;
    RETURN old;
END
$$;

-- Submits a message that is prepared, or makes one. Answers the status of the one that was there. What of the options the client
-- says now replaces what it said before: DTM's clients tell the delay only here.
CREATE FUNCTION dtm.server_submit(gid text, steps jsonb, bodies bytea[], options jsonb) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text := dtm.server_insert(gid, 'submitted', steps, bodies, NULL, options);
BEGIN
    IF old = 'prepared' THEN
        UPDATE dtm.transaction t SET options = t.options || server_submit.options WHERE t.gid = server_submit.gid;
        PERFORM dtm.msg_submit(gid);
    END IF;
    RETURN old;
END
$$;

-- Answers the status that it had; what has failed already, or is not prepared, stays as it is. Null: there is none.
CREATE FUNCTION dtm.server_abort(gid text, reason text) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text := dtm.locked_status(gid);
BEGIN
    IF old = 'prepared' THEN
        PERFORM dtm.msg_abort(gid, reason);
    END IF;
    RETURN old;
END
$$;

-- Ends a transaction where it stands. Answers the status that it had; what has ended stays as it is. Null: there is none.
CREATE FUNCTION dtm.server_stop(gid text) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text := dtm.locked_status(gid);
BEGIN
    IF old IN ('prepared', 'submitted', 'aborting') THEN
        PERFORM dtm.force_stop(gid);
    END IF;
    RETURN old;
END
$$;

-- How far a transaction is: "has_failed": a pass has been made over it and did not end it.
CREATE FUNCTION dtm.server_progress(gid text) RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT jsonb_build_object(
        'status', t.status, 'reason', t.reason, 'error', t.last_error, 'next_attempt_at', t.next_attempt_at,
        'has_failed', t.failures > 0 OR t.stuck_since IS NOT NULL OR EXISTS (
            SELECT FROM dtm.branch b WHERE b.gid = t.gid AND b.status = 'prepared'),
        'is_delayed', t.next_attempt_at > clock_timestamp() AND t.last_error IS NULL AND t.failures = 0)
    FROM dtm.transactions t WHERE t.gid = server_progress.gid;
END;

-- Not before then is anything called: a delayed message's services, or who is asked about a prepared one.
CREATE FUNCTION dtm.server_earliest(status text, created_at timestamptz, options jsonb) RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT created_at + make_interval(secs => CASE status WHEN 'prepared' THEN o.timeout_to_fail ELSE o.delay END)
    FROM dtm.check_transaction_options(options) o;
END;

-- Tries now what waits for its next attempt, but nothing before its time. False: there is no such transaction.
CREATE FUNCTION dtm.server_retry(gid text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old dtm.transaction;
BEGIN
    SELECT * INTO old FROM dtm.transaction t WHERE t.gid = server_retry.gid FOR UPDATE;
    IF old.status IN ('prepared', 'submitted', 'aborting') THEN
        IF dtm.server_earliest(old.status, old.created_at, old.options) <= clock_timestamp() THEN
            PERFORM dtm.retry_now(gid);
        END IF;
    END IF;
    RETURN old.gid IS NOT NULL;
END
$$;

-- The same for all whose next attempt is later than that. Answers how many.
CREATE FUNCTION dtm.server_retry_all(later_than interval, max_rows int) RETURNS int
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    hurried int;
BEGIN
    WITH late AS MATERIALIZED (
        SELECT d.gid FROM dtm.due d JOIN dtm.transaction t ON t.gid = d.gid
        WHERE d.due_at > clock_timestamp() + later_than
          AND dtm.server_earliest(t.status, t.created_at, t.options) <= clock_timestamp()
        ORDER BY d.due_at LIMIT max_rows FOR UPDATE OF d SKIP LOCKED
    )
    UPDATE dtm.due d SET due_at = clock_timestamp(), endpoint = NULL FROM late WHERE d.gid = late.gid;
    GET DIAGNOSTICS hurried = ROW_COUNT;
    RETURN hurried;
END
$$;

-- A transaction in DTM's form. What has no value is left out.
CREATE FUNCTION dtm.server_transaction(t dtm.transaction) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'id', t.id, 'create_time', t.created_at, 'update_time', coalesce(t.finished_at, t.created_at), 'gid', t.gid,
        'trans_type', t.trans_type, 'status', t.status, 'query_prepared', t.query_prepared, 'protocol', 'http',
        'finish_time', CASE t.status WHEN 'succeed' THEN t.finished_at END,
        'rollback_time', CASE t.status WHEN 'failed' THEN t.finished_at END, 'rollback_reason', t.reason,
        'options', (t.options - '{delay,success_status,outcome_in_body}'::text[])::text,
        'custom_data', CASE WHEN t.options ? 'delay' THEN jsonb_build_object('delay', t.options -> 'delay')::text END,
        'next_cron_time', d.due_at, 'concurrent', coalesce(t.options -> 'concurrent', 'false')))
    FROM (SELECT) AS one LEFT JOIN dtm.due d ON d.gid = t.gid;
END;

CREATE FUNCTION dtm.server_query(gid text) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT jsonb_build_object(
        'transaction', (SELECT dtm.server_transaction(t) FROM dtm.transaction t WHERE t.gid = server_query.gid),
        'branches', coalesce((
            SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
                'id', t.id * 10000 + n, 'create_time', t.created_at,
                'update_time', coalesce(b.last_attempt_at, t.finished_at, t.created_at), 'gid', t.gid,
                'url', step ->> 'action', 'branch_id', step ->> 'branch_id', 'op', step ->> 'op',
                'bin_data', translate(encode(t.payloads[n], 'base64'), E'\n', ''),
                'status', coalesce(b.status, CASE t.status WHEN 'succeed' THEN 'succeed' ELSE 'prepared' END),
                'finish_time', coalesce(b.finished_at, CASE t.status WHEN 'succeed' THEN t.finished_at END))) ORDER BY n)
            FROM dtm.transaction t
            CROSS JOIN LATERAL jsonb_array_elements(t.branches) WITH ORDINALITY AS of_transaction (step, n)
            LEFT JOIN dtm.branch b ON b.gid = t.gid AND b.branch_id = step ->> 'branch_id' AND b.op = step ->> 'op'
            WHERE t.gid = server_query.gid), '[]'));
END;

-- Newest first, from a position on. Each parameter may be null.
CREATE FUNCTION dtm.server_all(
    gid text, "position" bigint, status text, trans_type text, made_from timestamptz, made_until timestamptz, max_rows int
) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH page AS (
        SELECT t.id, dtm.server_transaction(t) AS object FROM dtm.transaction t
        WHERE (server_all.gid IS NULL OR t.gid = server_all.gid)
          AND ("position" IS NULL OR t.id < "position")
          AND (server_all.status IS NULL OR t.status = server_all.status)
          AND (server_all.trans_type IS NULL OR t.trans_type = server_all.trans_type)
          AND (made_from IS NULL OR t.created_at >= made_from)
          AND (made_until IS NULL OR t.created_at <= made_until)
        ORDER BY t.id DESC LIMIT max_rows
    )
    SELECT jsonb_build_object(
        'transactions', coalesce(jsonb_agg(p.object ORDER BY p.id DESC), '[]'),
        'next_position', CASE WHEN count(*) = max_rows THEN min(p.id)::text ELSE '' END)
    FROM page p;
END;

-- Message topics as DTM stores them, each a key of the category "topics". Newest first, from a position on.
CREATE FUNCTION dtm.server_topics(topic text, "position" bigint, max_rows int) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH grouped AS (
        SELECT row_number() OVER (ORDER BY min(m.created_at), m.topic) AS id, m.topic, min(m.created_at) AS made,
               max(m.created_at) AS changed, count(*) AS version,
               jsonb_agg(jsonb_build_object('url', m.url, 'remark', m.remark) ORDER BY m.created_at, m.url) AS subscribers
        FROM dtm.msg_topics m GROUP BY m.topic
    ), page AS (
        SELECT g.* FROM grouped g
        WHERE (server_topics.topic IS NULL OR g.topic = server_topics.topic) AND ("position" IS NULL OR g.id < "position")
        ORDER BY g.id DESC LIMIT max_rows
    )
    SELECT jsonb_build_object(
        'kv', coalesce(jsonb_agg(jsonb_build_object(
            'id', p.id, 'create_time', p.made, 'update_time', p.changed, 'cat', 'topics', 'k', p.topic,
            'v', p.subscribers::text, 'version', p.version) ORDER BY p.id DESC), '[]'),
        'next_position', CASE WHEN count(*) = max_rows THEN min(p.id)::text ELSE '' END)
    FROM page p;
END;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA dtm FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA dtm FROM PUBLIC;
