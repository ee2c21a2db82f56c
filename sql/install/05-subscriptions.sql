-- SPDX-License-Identifier: PostgreSQL
-- Subscriptions, and the positions and cursors that say how far each has come.

CREATE SEQUENCE dtm.subscription_id_seq AS bigint;  -- an id is never used again
CREATE TABLE dtm.subscription (
    id          bigint      PRIMARY KEY DEFAULT pg_catalog.nextval('dtm.subscription_id_seq'),
    name        text        NOT NULL UNIQUE,
    topics      text[]      NOT NULL,
    destination text        NOT NULL,
    options     jsonb       NOT NULL,
    state       text        NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'paused', 'disabled', 'dropped')),
    reason      text,                         -- why it is not active, where nobody asked for it
    since       timestamptz,                  -- events published before are passed over
    epoch       bigint      NOT NULL DEFAULT 1, -- raised by rewind: cursors of an earlier epoch are void
    created_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    revision    bigint      NOT NULL DEFAULT 0, -- raised by what makes its relays begin anew from what is stored
    started_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(), -- when it was made, or rewound last
    state_before text,                        -- of one that is dropped: what it was until then …
    reason_before text,                       -- … and why
    era         int                           -- in which it was made, or met after a restore; another one: not met yet
);

-- Positions and cursors are appended, never updated: an updated row grows without end while anything holds the xmin
-- horizon. Both logs are rings of two segments; dtm.installation.control_segment says which one is written.
CREATE SEQUENCE dtm.position_id_seq AS bigint;
CREATE TABLE dtm.position_log_1 (
    id       bigint      PRIMARY KEY,
    era      int         NOT NULL,
    seq      bigint      NOT NULL,            -- the last sequence number given out when it was read
    low      bigint      NOT NULL,            -- at and below this one it needs no row of the log
    body     text        NOT NULL,            -- the position itself, as the library writes it
    taken_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE TABLE dtm.position_log_2 (LIKE dtm.position_log_1 INCLUDING ALL);

CREATE SEQUENCE dtm.cursor_id_seq AS bigint;
CREATE TABLE dtm.cursor_log_1 (
    id           bigint      PRIMARY KEY,
    subscription bigint      NOT NULL,
    shard        int         NOT NULL,
    epoch        bigint      NOT NULL,
    token        bigint      NOT NULL,        -- of the lease under which it was moved; 0: set by SQL
    "position"   bigint      NOT NULL,        -- everything before it is delivered
    target       bigint,                      -- where the window ends that is being delivered; null between windows
    acked        bigint      NOT NULL,        -- up to this sequence number the window is delivered
    moved_at     timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    ahead        bigint[],                    -- beyond acked, what is delivered or parked already; null: nothing
    windows      uuid[]                       -- of exactly-once delivery: the window before the last, and the last
);
CREATE INDEX cursor_log_1_latest ON dtm.cursor_log_1 (subscription, shard, id);
CREATE TABLE dtm.cursor_log_2 (LIKE dtm.cursor_log_1 INCLUDING ALL);

SELECT pg_catalog.pg_extension_config_dump('dtm.subscription_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.subscription', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.position_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.position_log_1', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.position_log_2', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.cursor_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.cursor_log_1', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.cursor_log_2', '');

-- A cursor and the positions that it names stand in the same segment.
CREATE VIEW dtm.position_log AS
SELECT *, 1::smallint AS segment FROM dtm.position_log_1 UNION ALL SELECT *, 2::smallint FROM dtm.position_log_2;
CREATE VIEW dtm.cursor_log AS
SELECT *, 1::smallint AS segment FROM dtm.cursor_log_1 UNION ALL SELECT *, 2::smallint FROM dtm.cursor_log_2;

-- The segment that is written, which stays so until the transaction ends: rotation waits for the lock that this takes. An old
-- snapshot does not count, that of a REPEATABLE READ transaction for one: it is the segment of now.
CREATE FUNCTION dtm.control_segment() RETURNS smallint
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'control_segment_wrapper';

-- The newest stored position of this era, or null: the later the base of a new one, the less has to be looked back for.
CREATE FUNCTION dtm.latest_position() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN (SELECT body FROM dtm.position_log p
        WHERE era = (SELECT i.era FROM dtm.installation i) AND p.seq < 9223372036854775807
        ORDER BY id DESC LIMIT 1);

-- Where this transaction stands in the log: what commits after, this transaction included, is not yet seen.
CREATE FUNCTION dtm.current_position(base text) RETURNS text
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'current_position_wrapper';
-- The parts of a position that SQL needs.
CREATE FUNCTION dtm.position_era(body text) RETURNS int
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'position_era_wrapper';
CREATE FUNCTION dtm.position_seq(body text) RETURNS bigint
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'position_seq_wrapper';
CREATE FUNCTION dtm.position_low(body text) RETURNS bigint
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'position_low_wrapper';
CREATE FUNCTION dtm.start_of_era(era int) RETURNS text
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'start_of_era_wrapper';

-- Positions of one era were read in the order of this.
CREATE FUNCTION dtm.position_order(body text) RETURNS bigint[]
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'position_order_wrapper';

-- Raises an error with a hint if any part of a subscription is malformed.
CREATE FUNCTION dtm.check_subscription(name text, topics text[], destination text, options jsonb) RETURNS void
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'check_subscription_wrapper';

CREATE FUNCTION dtm.store_positions(bodies text[]) RETURNS bigint[]
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

-- A subscription begins where start_at says: 'now', 'earliest', or a time. Sets a cursor for each shard, and the time it skips
-- to. The transaction has written its row, so that rotation waits for it, or is told by dtm.start_seq.
CREATE FUNCTION dtm.start_subscription(subscription_id bigint, start_at text) RETURNS void
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

CREATE FUNCTION dtm.check_start_at(start_at text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF start_at IS NULL OR NOT (start_at IN ('now', 'earliest') OR isfinite(start_at::timestamptz)) THEN
        RAISE invalid_datetime_format;
    END IF;
EXCEPTION WHEN invalid_datetime_format OR datetime_field_overflow OR invalid_parameter_value THEN
    RAISE EXCEPTION USING
        ERRCODE = 'invalid_parameter_value',
        MESSAGE = 'start_at is no place in the log',
        DETAIL = format('It is %s.', coalesce(quote_literal(left(start_at, 100)), 'null')),
        HINT = 'Use ''now'', ''earliest'', or a time such as ''2026-01-31 12:00+00''.';
END
$$;

CREATE FUNCTION dtm.subscribe(
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

CREATE FUNCTION dtm.subscribe(
    name text, topic text, destination text, options jsonb DEFAULT '{}', start_at text DEFAULT 'now'
) RETURNS bigint
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
RETURN dtm.subscribe(name, ARRAY[topic], destination, options, start_at);

-- The error for a name that no subscription has.
CREATE FUNCTION dtm.raise_no_subscription(name text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'undefined_object',
        MESSAGE = 'there is no such subscription',
        DETAIL = format('The name is %s.', coalesce(quote_literal(left(name, 200)), 'null')),
        HINT = 'SELECT name FROM dtm.subscriptions lists them.';
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

CREATE FUNCTION dtm.unsubscribe(name text) RETURNS void
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

CREATE FUNCTION dtm.pause(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.check_not_dropped(name);
    UPDATE dtm.subscription AS s SET state = 'paused', reason = NULL WHERE s.name = pause.name;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
END
$$;

CREATE FUNCTION dtm.resume(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.check_not_dropped(name);
    UPDATE dtm.subscription AS s SET state = 'active', reason = NULL WHERE s.name = resume.name;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
END
$$;

CREATE FUNCTION dtm.rewind(name text, start_at text) RETURNS void
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

COMMENT ON FUNCTION dtm.subscribe(text, text, text, jsonb, text) IS
    'Delivers events whose topic matches to a destination. Again with the same name: changes it and keeps its cursor.';
COMMENT ON FUNCTION dtm.rewind(text, text) IS
    'Sets a subscription''s cursor: ''now'', ''earliest'', or a time. Drops what failed and is delivered again from there.';
