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

\include install/06-transaction-tables.sql

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

\include install/08-retries.sql
\include install/09-sharing.sql
\include install/10-outcomes.sql
\include install/11-dead-letters.sql

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

\include install/13-rotation.sql
\include install/14-lag.sql
\include install/15-barrier.sql

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

\include install/16-calls.sql
\include install/17-transactions.sql
\include install/18-messages.sql
\include install/19-coordinator.sql
\include install/20-server.sql
\include install/99-grants.sql
