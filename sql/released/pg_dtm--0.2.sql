-- SPDX-License-Identifier: PostgreSQL
\echo Use "CREATE EXTENSION pg_dtm" to load this file. \quit

-- Fails if somebody made the schema first: what stands in it could take over calls.
CREATE SCHEMA dtm;

-- One row about this very database. It is not dumped: a restored database makes a row of its own, and with it a new era,
-- for stored transaction ids mean nothing there.
CREATE TABLE dtm.installation (
    only_row        boolean  PRIMARY KEY DEFAULT true CHECK (only_row),
    era             int      NOT NULL,
    database        oid      NOT NULL,            -- another oid than ours: the database is a copy
    environment     text,                         -- recorded by the first relay that runs
    log_segment     smallint NOT NULL DEFAULT 1 CHECK (log_segment BETWEEN 1 AND 3),
    control_segment smallint NOT NULL DEFAULT 1 CHECK (control_segment BETWEEN 1 AND 2)
);

INSERT INTO dtm.installation (era, database)
SELECT ('x' || pg_catalog.left(pg_catalog.md5(pg_catalog.gen_random_uuid()::text), 8))::bit(32)::int, oid
FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database();

-- The eras that rows of the log were written in, by age. The first relay that meets a new one adds it.
CREATE TABLE dtm.eras (
    era      int         PRIMARY KEY,
    ordinal  int         NOT NULL UNIQUE,
    began_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
SELECT pg_catalog.pg_extension_config_dump('dtm.eras', '');

-- Publishers keep what they read of dtm.installation; this makes them read it anew.
CREATE FUNCTION dtm.installation_changed() RETURNS void
LANGUAGE c AS 'MODULE_PATHNAME', 'installation_changed_wrapper';

-- The protocols between relay and extension that this version speaks.
CREATE FUNCTION dtm.library_protocol() RETURNS int
LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'library_protocol_wrapper';
CREATE FUNCTION dtm.protocol(OUT "least" int, OUT "greatest" int)
LANGUAGE sql STABLE PARALLEL SAFE AS 'SELECT 1, dtm.library_protocol()';
-- SPDX-License-Identifier: PostgreSQL
-- The log: a ring of segments, appended to and truncated, never updated. Publishers write to the current segment
-- (dtm.installation.log_segment); readers merge all of them by seq. The extension's library knows the order of the columns.

CREATE SEQUENCE dtm.event_seq AS bigint CACHE 1;  -- CACHE 1: a session must not hold back numbers it was given

CREATE TABLE dtm.log_1 (
    seq          bigint      PRIMARY KEY,
    xid          xid8        NOT NULL,  -- the top-level transaction
    published_at timestamptz NOT NULL,
    era          int         NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,                  -- null: application/json, made by dtm.publish from jsonb
    headers      text,                  -- a JSON object of strings
    payload      bytea                  -- the bytes that go over the wire; null: no body
) USING heap;
CREATE TABLE dtm.log_2 (LIKE dtm.log_1 INCLUDING ALL) USING heap;
CREATE TABLE dtm.log_3 (LIKE dtm.log_1 INCLUDING ALL) USING heap;

CREATE VIEW dtm.log AS
SELECT * FROM dtm.log_1 UNION ALL SELECT * FROM dtm.log_2 UNION ALL SELECT * FROM dtm.log_3;

-- Events that are due later wait here and are moved into the log when they are.
CREATE SEQUENCE dtm.delayed_seq AS bigint CACHE 1;
CREATE TABLE dtm.delayed (
    due          timestamptz NOT NULL,
    n            bigint      NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,
    headers      text,
    payload      bytea,
    PRIMARY KEY (due, n)
) USING heap;

-- Ids that publishers gave: a second publish of one raises 23505 for as long as it is kept.
CREATE TABLE dtm.given_ids (
    id       uuid        PRIMARY KEY,
    given_at timestamptz NOT NULL
) USING heap;
CREATE INDEX given_ids_given_at ON dtm.given_ids (given_at);

SELECT pg_catalog.pg_extension_config_dump('dtm.event_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.log_1', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.log_2', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.log_3', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.delayed_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.delayed', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.given_ids', '');
-- SPDX-License-Identifier: PostgreSQL
-- Publishing. These functions write the log themselves, without rights of the caller on its tables: who may execute one may
-- publish. They are grouped as users call them: one event, one event of bytes, and many of either.

CREATE FUNCTION dtm.publish(
    topic text, payload jsonb, key text DEFAULT NULL, headers jsonb DEFAULT NULL,
    id uuid DEFAULT NULL, deliver_at timestamptz DEFAULT NULL
) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_wrapper';

CREATE FUNCTION dtm.publish_bytes(
    topic text, payload bytea, content_type text, key text DEFAULT NULL, headers jsonb DEFAULT NULL,
    id uuid DEFAULT NULL, deliver_at timestamptz DEFAULT NULL
) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_bytes_wrapper';

CREATE FUNCTION dtm.publish_many(
    topic text, payloads jsonb[], keys text[] DEFAULT NULL, headers jsonb[] DEFAULT NULL,
    ids uuid[] DEFAULT NULL, deliver_at timestamptz[] DEFAULT NULL
) RETURNS uuid[]
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_many_wrapper';

CREATE FUNCTION dtm.publish_bytes_many(
    topic text, payloads bytea[], content_type text, keys text[] DEFAULT NULL, headers jsonb[] DEFAULT NULL,
    ids uuid[] DEFAULT NULL, deliver_at timestamptz[] DEFAULT NULL
) RETURNS uuid[]
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_bytes_many_wrapper';

COMMENT ON FUNCTION dtm.publish(text, jsonb, text, jsonb, uuid, timestamptz) IS
    'Publishes an event if and only if the transaction commits. Returns its id.';
COMMENT ON FUNCTION dtm.publish_bytes(text, bytea, text, text, jsonb, uuid, timestamptz) IS
    'dtm.publish of a body that is delivered byte by byte as it is given.';
COMMENT ON FUNCTION dtm.publish_many(text, jsonb[], text[], jsonb[], uuid[], timestamptz[]) IS
    'dtm.publish of many events of one topic, in the order of the array. Returns their ids.';
COMMENT ON FUNCTION dtm.publish_bytes_many(text, bytea[], text, text[], jsonb[], uuid[], timestamptz[]) IS
    'dtm.publish_bytes of many events of one topic, in the order of the array. Returns their ids.';
-- SPDX-License-Identifier: PostgreSQL
-- The receiving side's inbox: at least once on the wire, once in effect.

CREATE TABLE dtm.receipts (
    consumer    text        NOT NULL CHECK (consumer <> '' AND pg_catalog.octet_length(consumer) <= 255),
    id          uuid        NOT NULL,
    received_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (consumer, id)
);
CREATE INDEX receipts_received_at ON dtm.receipts (received_at);
SELECT pg_catalog.pg_extension_config_dump('dtm.receipts', '');

-- SECURITY DEFINER: a consumer writes its receipt without rights on the table.
CREATE FUNCTION dtm.receive(consumer text, id uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF consumer IS NULL OR consumer = '' OR octet_length(consumer) > 255 OR id IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'a receipt needs a consumer and the id of an event',
            DETAIL = format('The consumer is %s, the id is %s.', coalesce(quote_literal(left(consumer, 100)), 'null'), coalesce(quote_literal(id), 'null')),
            HINT = 'Name the consumer in 1 to 255 bytes, and pass the id that came with the event (header ce-id).';
    END IF;
    INSERT INTO dtm.receipts (consumer, id) VALUES (receive.consumer, receive.id) ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION dtm.receive(text, uuid) IS
    'True: the event is new to this consumer, do the work in this transaction. False: the work was done before.';

-- A bounded part of what is older than its setting says; 0 when there was nothing. Relays call it; a database that only
-- receives has it called now and then by whatever schedules jobs there.
CREATE FUNCTION dtm.purge(max_rows int DEFAULT 10000) RETURNS bigint
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
    RETURN purged + receipts;
END
$$;

-- The settings dtm.retention and dtm.receipts_kept, which are known only once the library is loaded.
CREATE FUNCTION dtm.retention() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'retention_wrapper';
CREATE FUNCTION dtm.receipts_kept() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'receipts_kept_wrapper';
-- SPDX-License-Identifier: PostgreSQL
-- Subscriptions, and the positions and cursors that say how far each has come.

CREATE SEQUENCE dtm.subscription_id_seq AS bigint;  -- an id is never used again
CREATE TABLE dtm.subscription (
    id          bigint      PRIMARY KEY DEFAULT pg_catalog.nextval('dtm.subscription_id_seq'),
    name        text        NOT NULL UNIQUE,
    topics      text[]      NOT NULL,
    destination text        NOT NULL,
    options     jsonb       NOT NULL,
    state       text        NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'paused', 'disabled')),
    reason      text,                         -- why it is not active, where nobody asked for it
    since       timestamptz,                  -- events published before are passed over
    epoch       bigint      NOT NULL DEFAULT 1, -- raised by rewind: cursors of an earlier epoch are void
    created_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    revision    bigint      NOT NULL DEFAULT 0 -- raised by what makes its relays begin anew from what is stored
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
    ahead        bigint[]                     -- beyond acked, what is delivered or parked already; null: nothing
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

CREATE VIEW dtm.position_log AS SELECT * FROM dtm.position_log_1 UNION ALL SELECT * FROM dtm.position_log_2;
CREATE VIEW dtm.cursor_log AS SELECT * FROM dtm.cursor_log_1 UNION ALL SELECT * FROM dtm.cursor_log_2;

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
    segment smallint := (SELECT control_segment FROM dtm.installation);
BEGIN
    IF cardinality(bodies) = 0 THEN
        RETURN '{}';
    END IF;
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

-- A subscription begins where start_at says: 'now', 'earliest', or a time. Sets a cursor for each shard, and the time it skips
-- to.
CREATE FUNCTION dtm.start_subscription(subscription_id bigint, start_at text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    body text;
    start_time timestamptz;
    position_id bigint;
    segment smallint := (SELECT control_segment FROM dtm.installation);
BEGIN
    IF start_at = 'now' THEN
        body := dtm.current_position(dtm.latest_position());
    ELSE
        IF start_at <> 'earliest' THEN
            start_time := start_at::timestamptz;
        END IF;
        -- Restored data that no relay has met yet has its eras, too.
        body := dtm.start_of_era(coalesce(
            (SELECT era FROM dtm.eras ORDER BY ordinal LIMIT 1),
            (SELECT era FROM dtm.unregistered_eras() AS era LIMIT 1),
            (SELECT era FROM dtm.installation)));
    END IF;
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
        INSERT INTO dtm.subscription AS s (name, topics, destination, options)
        VALUES (subscribe.name, subscribe.topics, subscribe.destination, subscribe.options)
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

CREATE FUNCTION dtm.unsubscribe(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint := dtm.lock_settlements(name);
BEGIN
    DELETE FROM dtm.subscription AS s WHERE s.id = subscription_id;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
    DELETE FROM dtm.retry r WHERE r.subscription = subscription_id;
    DELETE FROM dtm.dead_letter d WHERE d.subscription = subscription_id;
END
$$;

CREATE FUNCTION dtm.pause(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE dtm.subscription AS s SET state = 'paused', reason = NULL WHERE s.name = pause.name;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
END
$$;

CREATE FUNCTION dtm.resume(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
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
    PERFORM dtm.check_start_at(start_at);
    subscription_id := dtm.lock_settlements(name);
    UPDATE dtm.subscription AS s SET epoch = s.epoch + 1 WHERE s.id = subscription_id;
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
-- SPDX-License-Identifier: PostgreSQL
-- Who delivers what. A relay says once a second that it lives (one row for all that it owns), and appends a lease when it
-- takes a subscription, or a shard of one, over. A lease holds while its relay's last heartbeat has not expired, by the database's clock. The
-- token fences: a cursor moves only under the newest lease.

CREATE SEQUENCE dtm.lease_token_seq AS bigint;
CREATE TABLE dtm.lease_log_1 (
    token        bigint      PRIMARY KEY,
    subscription bigint      NOT NULL,
    shard        int         NOT NULL,
    relay        uuid        NOT NULL,
    taken_at     timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE INDEX lease_log_1_latest ON dtm.lease_log_1 (subscription, shard, token);
CREATE TABLE dtm.lease_log_2 (LIKE dtm.lease_log_1 INCLUDING ALL);

CREATE SEQUENCE dtm.heartbeat_id_seq AS bigint;
CREATE TABLE dtm.heartbeat_log_1 (
    id         bigint      PRIMARY KEY,
    relay      uuid        NOT NULL,
    name       text        NOT NULL,
    expires_at timestamptz NOT NULL,
    shares     boolean     NOT NULL DEFAULT false  -- it leaves others their share; false: a relay of version 0.1
);
CREATE INDEX heartbeat_log_1_latest ON dtm.heartbeat_log_1 (relay, id);
CREATE INDEX heartbeat_log_1_expires ON dtm.heartbeat_log_1 (expires_at);
CREATE TABLE dtm.heartbeat_log_2 (LIKE dtm.heartbeat_log_1 INCLUDING ALL);

CREATE VIEW dtm.lease_log AS SELECT * FROM dtm.lease_log_1 UNION ALL SELECT * FROM dtm.lease_log_2;
CREATE VIEW dtm.heartbeat_log AS SELECT * FROM dtm.heartbeat_log_1 UNION ALL SELECT * FROM dtm.heartbeat_log_2;

-- The newest lease of each subscription, or of each of its shards, and whether its relay lives. (Shards are counted so that the
-- planner expects one: most have no more, and of generate_series it expects a thousand.)
CREATE VIEW dtm.owners AS
SELECT s.id AS subscription, unit.shard, lease.token, lease.relay, heartbeat.name,
       coalesce(heartbeat.expires_at > pg_catalog.clock_timestamp(), false) AS alive,
       coalesce((s.options ->> 'shards')::int, 1) AS shards, coalesce(heartbeat.shares, false) AS shares
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
    IF (SELECT control_segment FROM dtm.installation) = 1 THEN
        INSERT INTO dtm.heartbeat_log_1 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at, shares);
    ELSE
        INSERT INTO dtm.heartbeat_log_2 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at, shares);
    END IF;
END
$$;

CREATE FUNCTION dtm.heartbeat(relay uuid, relay_name text, expires_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.heartbeat(relay, relay_name, expires_at, false);
END
$$;

-- For relays of version 0.1: renews all leases of a relay, takes those that are free, and answers what it now has to deliver.
-- They know of no shards: a subscription that has some is not for them.
CREATE FUNCTION dtm.relay_lease(relay uuid, relay_name text, lease_seconds float8)
RETURNS TABLE (subscription bigint, shard int, name text, topics text[], destination text, options jsonb,
               since timestamptz, epoch bigint, token bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
#variable_conflict use_column
DECLARE
    segment smallint := (SELECT control_segment FROM dtm.installation);
BEGIN
    PERFORM dtm.heartbeat(relay_lease.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds));
    IF EXISTS (SELECT FROM dtm.owners o JOIN dtm.subscription s ON s.id = o.subscription
               WHERE NOT o.alive AND o.shards = 1 AND s.state = 'active') THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o JOIN dtm.subscription s ON s.id = o.subscription
        WHERE NOT o.alive AND o.shards = 1 AND s.state = 'active' AND segment = 1;
        INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o JOIN dtm.subscription s ON s.id = o.subscription
        WHERE NOT o.alive AND o.shards = 1 AND s.state = 'active' AND segment = 2;
    END IF;
    RETURN QUERY
    SELECT s.id, o.shard, s.name, s.topics, s.destination, s.options, s.since, s.epoch, o.token
    FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
    WHERE o.relay = relay_lease.relay AND o.shards = 1 AND s.state = 'active';
END
$$;

-- Gives up all leases of a relay at once.
CREATE FUNCTION dtm.relay_release(relay uuid) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT dtm.heartbeat(relay, 'released', '-infinity');
END;
-- SPDX-License-Identifier: PostgreSQL
-- What a relay calls. Its role needs EXECUTE on these and rights on the tables of the schema (see the README).

-- Refuses a database that this relay must not deliver from; names the eras of its log, oldest first.
CREATE FUNCTION dtm.relay_hello(environment text)
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
    PERFORM dtm.register_era(here.era);
    RETURN QUERY SELECT here.era, ARRAY(SELECT e.era FROM dtm.eras e ORDER BY e.ordinal), dtm.source(),
        (SELECT extversion FROM pg_extension WHERE extname = 'pg_dtm'), dtm.library_preloaded();
END
$$;

-- The eras in restored data that no relay has met, oldest first. Numbers of events and positions go on over a restore, so
-- every row of a later era has a greater one; where an era has left nothing but positions, their ids tell. It reads the whole
-- log: called once in the life of an era.
CREATE FUNCTION dtm.unregistered_eras() RETURNS SETOF int
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT f.era
    FROM (SELECT l.era, min(l.seq) - 1 AS seq, NULL::bigint AS id FROM dtm.log l GROUP BY l.era
          UNION ALL
          SELECT p.era, min(p.seq), min(p.id) FROM dtm.position_log p GROUP BY p.era) f
    WHERE NOT EXISTS (SELECT FROM dtm.eras e WHERE e.era = f.era)
    GROUP BY f.era
    ORDER BY min(f.seq), min(f.id) NULLS LAST;
END;

-- Gives a new era its place behind the others. Where there are others the data came from elsewhere, and subscriptions wait
-- for dtm.resume unless they say otherwise: a copy of production must not call production's customers. The data may have
-- come through several databases that no relay ever saw: their eras go first.
CREATE FUNCTION dtm.register_era(new_era int) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last_ordinal int;
BEGIN
    IF EXISTS (SELECT FROM dtm.eras WHERE era = new_era) THEN
        RETURN;
    END IF;
    LOCK TABLE dtm.eras IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM dtm.eras WHERE era = new_era) THEN
        RETURN;
    END IF;
    SELECT coalesce(max(ordinal), 0) INTO last_ordinal FROM dtm.eras;
    INSERT INTO dtm.eras (era, ordinal)
    SELECT f.era, last_ordinal + row_number() OVER (ORDER BY f.era = new_era, f.n)
    FROM (SELECT found.era, found.n FROM dtm.unregistered_eras() WITH ORDINALITY AS found (era, n)
          WHERE found.era <> new_era
          UNION ALL SELECT new_era, 0) f;
    IF (SELECT count(*) FROM dtm.eras) > 1 THEN
        UPDATE dtm.subscription SET state = 'paused', reason = 'the database was restored or copied'
        WHERE state = 'active' AND options ->> 'on_restore' IS DISTINCT FROM 'continue';
    END IF;
END
$$;

-- Makes a copy of a database one of its own: a new era, this environment.
CREATE FUNCTION dtm.adopt(environment text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    new_era int := ('x' || left(md5(gen_random_uuid()::text), 8))::bit(32)::int;
BEGIN
    -- Every publisher of the old era has ended once these locks are held; the next ones read the new era.
    LOCK TABLE dtm.log_1, dtm.log_2, dtm.log_3 IN SHARE ROW EXCLUSIVE MODE;
    PERFORM dtm.register_era((SELECT era FROM dtm.installation));
    UPDATE dtm.installation
    SET era = new_era, environment = adopt.environment,
        database = (SELECT oid FROM pg_database WHERE datname = current_database());
    PERFORM dtm.installation_changed();
    PERFORM dtm.register_era(new_era);
END
$$;

-- Where a subscription goes on. No row: it has no cursor, and must not be delivered.
CREATE FUNCTION dtm.relay_cursor(subscription bigint, shard int, epoch bigint)
RETURNS TABLE ("position" text, target text, acked bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.body, t.body, c.acked
    FROM (SELECT * FROM dtm.cursor_log l
          WHERE l.subscription = relay_cursor.subscription AND l.shard = relay_cursor.shard AND l.epoch = relay_cursor.epoch
          ORDER BY l.id DESC LIMIT 1) c
    JOIN dtm.position_log p ON p.id = c."position"
    LEFT JOIN dtm.position_log t ON t.id = c.target
    WHERE c.target IS NULL OR t.id IS NOT NULL;
END;

-- The same with what is delivered beyond acked.
CREATE FUNCTION dtm.relay_resume(subscription bigint, shard int, epoch bigint)
RETURNS TABLE ("position" text, target text, acked bigint, ahead bigint[])
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.body, t.body, c.acked, c.ahead
    FROM (SELECT * FROM dtm.cursor_log l
          WHERE l.subscription = relay_resume.subscription AND l.shard = relay_resume.shard AND l.epoch = relay_resume.epoch
          ORDER BY l.id DESC LIMIT 1) c
    JOIN dtm.position_log p ON p.id = c."position"
    LEFT JOIN dtm.position_log t ON t.id = c.target
    WHERE c.target IS NULL OR t.id IS NOT NULL;
END;

-- The head of the log if there is anything past a known position, else null. When it returns, everything that the position
-- rests on is flushed: a crash cannot take it back.
CREATE FUNCTION dtm.relay_poll(known text) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF known IS NULL THEN
        RETURN dtm.head(coalesce(dtm.latest_position(), dtm.start_of_era((SELECT era FROM dtm.installation))), true);
    END IF;
    RETURN dtm.head(known, false);
END
$$;
CREATE FUNCTION dtm.head(known text, always boolean) RETURNS text
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'head_wrapper';

-- Returns when there is something past a known position, or after a time. It holds no snapshot while it waits, so it must
-- not be called inside a transaction block; it needs shared_preload_libraries = 'pg_dtm'.
CREATE PROCEDURE dtm.relay_wait(known text, timeout_ms int)
LANGUAGE c AS 'MODULE_PATHNAME', 'relay_wait_wrapper';

-- The next events of a window that match, packed (core/src/page.rs describes the bytes).
CREATE FUNCTION dtm.relay_page(from_position text, to_position text, after bigint, topics text[], since timestamptz,
                               max_rows int, max_bytes int) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'relay_page_wrapper';
-- The same of one shard: events of others are passed over.
CREATE FUNCTION dtm.relay_page(from_position text, to_position text, after bigint, topics text[], since timestamptz,
                               max_rows int, max_bytes int, shard int, shards int) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'relay_page_of_shard_wrapper';

-- Moves cursors, all in one statement. A position is a stored one's id, or -k for the k-th of the new ones. Refuses those
-- whose epoch or token is not the newest, and says which.
CREATE FUNCTION dtm.relay_move(
    new_positions text[], subscriptions bigint[], shards int[], epochs bigint[], tokens bigint[],
    positions bigint[], targets bigint[], acked bigint[], OUT position_ids bigint[], OUT fenced bigint[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := (SELECT control_segment FROM dtm.installation);
    moved bigint[];
BEGIN
    -- Against a lease that is being taken over at this moment.
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    position_ids := dtm.store_positions(new_positions);
    WITH asked AS (
        SELECT m.subscription, m.shard, m.epoch, m.token, m.acked,
               CASE WHEN m."position" < 0 THEN position_ids[-m."position"] ELSE m."position" END AS "position",
               CASE WHEN m.target < 0 THEN position_ids[-m.target] ELSE m.target END AS target
        FROM unnest(subscriptions, shards, epochs, tokens, positions, targets, relay_move.acked)
             AS m (subscription, shard, epoch, token, "position", target, acked)
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

-- Appends an event to the log: for events that were checked when they were published.
CREATE FUNCTION dtm.append(id uuid, topic text, key text, content_type text, headers text, payload bytea) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'append_wrapper';

-- Moves events that are due into the log. next_in: seconds until the next one is, null if none waits. One relay at a time
-- moves them: two that took a part each could swap events of one key.
CREATE FUNCTION dtm.relay_due(max_rows int, OUT moved int, OUT next_in float8)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- An advisory lock of this database; the number is "dtm.due" in ASCII.
    moving CONSTANT bigint := 28275509949658469;
BEGIN
    moved := 0;
    SELECT extract(epoch FROM min(due) - clock_timestamp()) INTO next_in FROM dtm.delayed;
    IF next_in IS NULL OR next_in > 0 THEN
        RETURN;
    END IF;
    IF NOT pg_try_advisory_xact_lock(moving) THEN
        next_in := 0.1;  -- whoever has the lock moves what is due
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

-- Who the relay says the events are from: dtm.source as it is set for the database, else for the server, else
-- /pg_dtm/DATABASE. What a role or a session sets does not count: every relay says the same. SECURITY DEFINER: the server's
-- files are read where such a setting hides theirs.
CREATE FUNCTION dtm.source() RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    source text;
    database bytea := convert_to(current_database(), getdatabaseencoding());
BEGIN
    PERFORM dtm.library_protocol();  -- loads the library, which makes its settings known
    SELECT substr(setting, strpos(setting, '=') + 1) INTO source
    FROM pg_db_role_setting r, unnest(r.setconfig) AS setting
    WHERE r.setrole = 0 AND r.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND lower(split_part(setting, '=', 1)) = 'dtm.source';
    IF NOT FOUND THEN
        SELECT setting INTO source FROM pg_settings
        WHERE name = 'dtm.source' AND pg_settings.source IN ('configuration file', 'command line');
    END IF;
    IF NOT FOUND THEN
        SELECT setting INTO source FROM pg_file_settings
        WHERE lower(name) = 'dtm.source' AND error IS NULL ORDER BY seqno DESC LIMIT 1;
    END IF;
    RETURN coalesce(nullif(source, ''), '/pg_dtm/' || (
        SELECT string_agg(CASE WHEN byte < 128 AND chr(byte) ~ '[A-Za-z0-9._~-]' THEN chr(byte)
                               ELSE '%' || upper(lpad(to_hex(byte), 2, '0')) END, '' ORDER BY at)
        FROM generate_series(0, length(database) - 1) AS at, get_byte(database, at) AS byte));
END
$$;
CREATE FUNCTION dtm.library_preloaded() RETURNS boolean
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'library_preloaded_wrapper';
-- SPDX-License-Identifier: PostgreSQL
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
-- relays' reports until their transaction ends; relays do not wait, but report again later. The lock is an advisory one of
-- two numbers: "dtms" in ASCII, and the subscription. Users take it after its row, so that they do not wait for each other in a
-- circle. Null: there is no such subscription.
CREATE FUNCTION dtm.lock_settlements(subscription_name text) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint;
BEGIN
    SELECT s.id INTO subscription_id FROM dtm.subscription s WHERE s.name = subscription_name FOR UPDATE;
    PERFORM pg_advisory_xact_lock(1685351795, (subscription_id % 2147483647)::int);
    RETURN subscription_id;
END
$$;
CREATE FUNCTION dtm.try_settlements(subscription bigint) RETURNS boolean
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
RETURN pg_try_advisory_xact_lock_shared(1685351795, (subscription % 2147483647)::int);
-- SPDX-License-Identifier: PostgreSQL
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
    FROM dtm.owners o JOIN dtm.subscription s ON s.id = o.subscription
    WHERE s.state = 'active' AND (o.shares OR NOT o.alive)
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
    segment smallint := (SELECT control_segment FROM dtm.installation);
    lacking bigint;  -- how many units it may take; below 0: how many it should give
BEGIN
    PERFORM dtm.heartbeat(relay_assign.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds), true);
    SELECT least(s.target - s.owned, s.free) INTO lacking FROM dtm.shares s WHERE s.relay = relay_assign.relay;
    IF lacking > 0 THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused. And for
        -- other relays that take: then it counts anew.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        SELECT least(s.target - s.owned, s.free) INTO lacking FROM dtm.shares s WHERE s.relay = relay_assign.relay;
        WITH taken AS MATERIALIZED (
            SELECT o.subscription, o.shard
            FROM dtm.owners o JOIN dtm.subscription s ON s.id = o.subscription
            WHERE NOT o.alive AND s.state = 'active'
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
    WHERE o.relay = relay_assign.relay AND s.state = 'active'
    ORDER BY s.id, o.shard;
END
$$;

-- Gives units back, those whose newest lease is still the given one: another relay may take them at once.
CREATE FUNCTION dtm.relay_give(relay uuid, subscriptions bigint[], shards int[], tokens bigint[]) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := (SELECT control_segment FROM dtm.installation);
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
BEGIN
    IF cardinality(tokens) = 0 THEN
        RETURN;
    END IF;
    LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
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
    segment smallint := (SELECT control_segment FROM dtm.installation);
    start record;
BEGIN
    SELECT * INTO old FROM dtm.subscription s WHERE s.name = subscription_name FOR UPDATE;
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
        SELECT l."position", l.target, l.acked, l.ahead FROM dtm.cursor_log l
        WHERE l.subscription = subscription_id AND l.shard = unit.shard AND l.epoch = old.epoch
        ORDER BY l.id DESC LIMIT 1) c
    JOIN dtm.position_log p ON p.id = c."position"
    LEFT JOIN dtm.eras e ON e.era = p.era;
    IF start.cursors <> old_shards THEN
        RAISE EXCEPTION USING
            ERRCODE = 'data_corrupted',
            MESSAGE = 'a shard of the subscription has no cursor',
            DETAIL = format('%s of %s have one: where the others stood is not known.', start.cursors, old_shards),
            HINT = 'Set its cursor with dtm.rewind, then subscribe again.';
    END IF;
    UPDATE dtm.subscription s SET epoch = s.epoch + 1, revision = s.revision + 1 WHERE s.id = subscription_id;
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
-- SPDX-License-Identifier: PostgreSQL
-- What became of events: a relay's reports, and what it has to know of earlier ones when it begins.

-- Moves cursors and settles events, all in one statement: an event is parked in the transaction that moves the cursor past it.
-- A position is a stored one's id, or -k for the k-th of the new ones. "of" says, counted from 1, which cursor a settlement
-- goes with: both are applied or neither. Fenced are those whose epoch or token is not the newest, busy those whose
-- subscription a user works on just now.
CREATE FUNCTION dtm.relay_store(
    new_positions text[], subscriptions bigint[], shards int[], epochs bigint[], tokens bigint[],
    positions bigint[], targets bigint[], acked bigint[], ahead text[],
    "of" int[], seqs bigint[], what text[], attempts int[], next_in float8[], histories jsonb[],
    OUT position_ids bigint[], OUT fenced int[], OUT busy int[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := (SELECT control_segment FROM dtm.installation);
    moved int[];
BEGIN
    -- Against a lease that is being taken over at this moment.
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    position_ids := dtm.store_positions(new_positions);
    busy := '{}';
    IF cardinality("of") > 0 THEN
        -- Before epochs are looked at: a user who is done by now has raised them.
        busy := ARRAY(SELECT o.at FROM (SELECT DISTINCT unnest("of") AS at) o
                      WHERE NOT dtm.try_settlements(subscriptions[o.at]) ORDER BY o.at);
    END IF;
    WITH asked AS (
        SELECT m.at::int AS at, m.subscription, m.shard, m.epoch, m.token, m.acked, m.ahead::bigint[] AS ahead,
               CASE WHEN m."position" < 0 THEN position_ids[-m."position"] ELSE m."position" END AS "position",
               CASE WHEN m.target < 0 THEN position_ids[-m.target] ELSE m.target END AS target
        FROM unnest(subscriptions, shards, epochs, tokens, positions, targets, relay_store.acked, relay_store.ahead)
             WITH ORDINALITY AS m (subscription, shard, epoch, token, "position", target, acked, ahead, at)
        WHERE m.at <> ALL (busy)
    ), granted AS MATERIALIZED (
        SELECT nextval('dtm.cursor_id_seq') AS id, a.*
        FROM asked a
        JOIN dtm.subscription s ON s.id = a.subscription AND s.epoch = a.epoch
        WHERE a.token = (SELECT l.token FROM dtm.lease_log l
                         WHERE l.subscription = a.subscription AND l.shard = a.shard ORDER BY l.token DESC LIMIT 1)
    ), first AS (
        INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", target, acked, ahead)
        SELECT id, subscription, shard, epoch, token, "position", target, acked, ahead FROM granted WHERE segment = 1
    ), second AS (
        INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", target, acked, ahead)
        SELECT id, subscription, shard, epoch, token, "position", target, acked, ahead FROM granted WHERE segment = 2
    )
    SELECT coalesce(array_agg(at), '{}') INTO moved FROM granted;
    fenced := ARRAY(SELECT generate_subscripts(subscriptions, 1) EXCEPT SELECT unnest(moved) EXCEPT SELECT unnest(busy)
                    ORDER BY 1);
    IF cardinality("of") > 0 THEN
        PERFORM dtm.settle(moved, subscriptions, "of", seqs, what, attempts, next_in, histories);
    END IF;
END
$$;

-- Settles events of those cursors that were moved.
--   park   copies an event from the log, to be tried again
--   bury   copies it from the log, as a dead letter
--   again  says of a parked one when it is tried next
--   die    makes a dead letter of a parked one
--   done   forgets a parked one
-- What is no longer parked was discarded meanwhile, or its subscription rewound: nothing is left to be done for it. What is
-- parked already, because its shard has begun anew before it, stays as it is.
-- enable_seqscan: a plan that was made while the log was empty must not read all of it a moment later.
CREATE FUNCTION dtm.settle(
    granted int[], subscriptions bigint[],
    "of" int[], seqs bigint[], what text[], attempts int[], next_in float8[], histories jsonb[]) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    missing bigint;
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
                   l.seq IS NOT NULL AS found,
                   l.era, l.published_at, l.id, l.topic, l.key, l.content_type, l.headers, l.payload
            FROM unnest(settle."of", seqs, settle.what, settle.attempts, settle.next_in, histories)
                 WITH ORDINALITY AS a ("of", seq, what, attempts, next_in, history, at)
            LEFT JOIN LATERAL (SELECT * FROM dtm.log e WHERE e.seq = a.seq LIMIT 1) l ON true
            WHERE a."of" = ANY (granted) AND a.what IN ('park', 'bury')
            ORDER BY a.at
        ), parked AS (
            INSERT INTO dtm.retry (subscription, seq, n, era, published_at, id, topic, key, content_type, headers, payload,
                                   attempts, next_at, history)
            SELECT f.subscription, f.seq, f.n, f.era, f.published_at, f.id, f.topic, f.key, f.content_type, f.headers, f.payload,
                   f.attempts, f.next_at, f.history
            FROM fresh f WHERE f.found AND f.what = 'park'
            ON CONFLICT DO NOTHING
        ), buried AS (
            INSERT INTO dtm.dead_letter AS d (subscription, seq, n, era, published_at, id, topic, key, content_type, headers,
                                              payload, attempts, history)
            SELECT f.subscription, f.seq, f.n, f.era, f.published_at, f.id, f.topic, f.key, f.content_type, f.headers,
                   f.payload, f.attempts, f.history
            FROM fresh f WHERE f.found AND f.what = 'bury'
            ON CONFLICT (subscription, seq) DO UPDATE
            SET attempts = excluded.attempts, history = d.history || excluded.history, died_at = excluded.died_at
        )
        SELECT f.seq INTO missing FROM fresh f WHERE NOT f.found LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION USING
                ERRCODE = 'data_corrupted',
                MESSAGE = 'an event that failed is not in the log',
                DETAIL = format('Its sequence number is %s.', missing),
                HINT = 'Has the log been truncated by hand? Nothing was stored; dtm.rewind sets the cursor past the gap.';
        END IF;
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
        SELECT d.n, d.seq, d.key, d.topic, d.headers, d.payload, d.attempts, NULL, true
        FROM dtm.dead_letter d JOIN dtm.subscription s ON s.id = d.subscription
        WHERE d.subscription = relay_parked.subscription AND d.key IS NOT NULL AND s.options ->> 'on_dead' = 'block'
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
    UPDATE dtm.subscription s SET state = 'disabled', reason = relay_disable.reason
    WHERE s.id = relay_disable.subscription AND s.epoch = relay_disable.epoch AND s.state = 'active'
      AND relay_disable.token = (SELECT l.token FROM dtm.lease_log l
                                 WHERE l.subscription = s.id AND l.shard = relay_disable.shard ORDER BY l.token DESC LIMIT 1);
    RETURN FOUND;
END
$$;
-- SPDX-License-Identifier: PostgreSQL
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
-- SPDX-License-Identifier: PostgreSQL
-- What users look at.

-- JSON that came as bytes need not be JSON: then it is shown as null.
CREATE FUNCTION dtm.json_or_null(payload bytea) RETURNS jsonb
LANGUAGE plpgsql STABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN convert_from(payload, 'UTF8')::jsonb;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN NULL;
END
$$;

CREATE VIEW dtm.events AS
SELECT seq, id, topic, key,
       CASE WHEN content_type IS NULL THEN pg_catalog.convert_from(payload, 'UTF8')::jsonb
            WHEN content_type ~* '^[^;]*[/+]json\s*(;|$)' THEN dtm.json_or_null(payload) END AS payload,
       payload AS body,
       coalesce(content_type, 'application/json') AS content_type,
       headers::jsonb AS headers, published_at, xid, era
FROM dtm.log;

COMMENT ON VIEW dtm.events IS 'The log: every event that is retained. payload is its body where that is JSON.';

-- How far each subscription, or each of its shards, is. lag_events counts sequence numbers, so it is an upper bound: rolled-back
-- events, other topics, other shards, and what was delivered before a transaction that began earlier has ended, count too. Null:
-- there is no cursor.
CREATE VIEW dtm.progress AS
SELECT s.id AS subscription, o.shard,
       CASE WHEN o.alive THEN o.name END AS owner,
       CASE WHEN cursor.low IS NULL THEN NULL
            ELSE coalesce(extract(epoch FROM pg_catalog.clock_timestamp() - behind.published_at), 0) END::float8 AS lag_seconds,
       CASE WHEN cursor.low IS NULL THEN NULL
            WHEN behind.published_at IS NULL THEN 0 ELSE head.seq - cursor.low END AS lag_events,
       cursor.moved_at
FROM dtm.subscription s
JOIN dtm.owners o ON o.subscription = s.id
CROSS JOIN LATERAL (
    SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS seq FROM dtm.event_seq) head
-- A position has seen what its snapshot sees (the fourth part of its text); all that it has not lies above its low.
LEFT JOIN LATERAL (
    SELECT p.era, e.ordinal, c.acked, c.moved_at,
           pg_catalog.split_part(p.body, '|', 4)::pg_catalog.pg_snapshot AS seen,
           pg_catalog.split_part(t.body, '|', 4)::pg_catalog.pg_snapshot AS seen_then,
           CASE WHEN p.seq = 9223372036854775807 THEN 0  -- the end of an era: all of the next one lies before it
                ELSE least(CASE WHEN c.acked = 0 THEN p.low ELSE c.acked END, t.low) END AS low
    FROM dtm.cursor_log c
    JOIN dtm.position_log p ON p.id = c."position"
    LEFT JOIN dtm.position_log t ON t.id = c.target
    LEFT JOIN dtm.eras e ON e.era = p.era
    WHERE c.subscription = s.id AND c.shard = o.shard AND c.epoch = s.epoch
    ORDER BY c.id DESC LIMIT 1) cursor ON true
-- The first that is not delivered: of the position's era, or of a later one.
LEFT JOIN LATERAL (
    SELECT l.published_at FROM dtm.log l
    WHERE l.seq > cursor.low
      AND CASE WHEN l.era <> cursor.era
               THEN coalesce((SELECT e.ordinal > coalesce(cursor.ordinal, 2147483647) FROM dtm.eras e WHERE e.era = l.era), true)
               ELSE NOT pg_catalog.pg_visible_in_snapshot(l.xid, cursor.seen)
                    AND (l.seq > cursor.acked OR NOT pg_catalog.pg_visible_in_snapshot(l.xid, cursor.seen_then)) END
    ORDER BY l.seq LIMIT 1) behind ON true;

-- The lag is that of the slowest shard.
CREATE VIEW dtm.subscriptions AS
SELECT s.name, s.topics, s.destination, s.options, s.state, s.reason,
       progress.owner, progress.lag_seconds, progress.lag_events, progress.moved_at,
       s.epoch, s.since, s.created_at, s.id,
       (SELECT count(*) FROM dtm.retry r WHERE r.subscription = s.id) AS retrying,
       (SELECT count(*) FROM dtm.dead_letter d WHERE d.subscription = s.id) AS dead,
       progress.shards
FROM dtm.subscription s
CROSS JOIN LATERAL (
    SELECT pg_catalog.string_agg(DISTINCT p.owner, ', ' ORDER BY p.owner) AS owner,
           CASE WHEN bool_and(p.lag_seconds IS NOT NULL) THEN max(p.lag_seconds) END AS lag_seconds,
           CASE WHEN bool_and(p.lag_events IS NOT NULL) THEN max(p.lag_events) END AS lag_events,
           max(p.moved_at) AS moved_at, count(*)::int AS shards
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
-- SPDX-License-Identifier: PostgreSQL
-- PUBLIC gets nothing. A publisher needs USAGE on the schema and EXECUTE on dtm.publish, a relay what the README says.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA dtm FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA dtm FROM PUBLIC;
