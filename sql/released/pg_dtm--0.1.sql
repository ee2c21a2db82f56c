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
    created_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
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
    moved_at     timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
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

-- A subscription begins where start_at says: 'now', 'earliest', or a time. Sets its cursor and the time it skips to.
CREATE FUNCTION dtm.start_subscription(subscription_id bigint, start_at text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    body text;
    start_time timestamptz;
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
    INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", acked)
    SELECT nextval('dtm.cursor_id_seq'), s.id, 0, s.epoch, 0, (dtm.store_positions(ARRAY[body]))[1], 0
    FROM dtm.subscription s WHERE s.id = subscription_id AND segment = 1;
    INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", acked)
    SELECT nextval('dtm.cursor_id_seq'), s.id, 0, s.epoch, 0, (dtm.store_positions(ARRAY[body]))[1], 0
    FROM dtm.subscription s WHERE s.id = subscription_id AND segment = 2;
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
BEGIN
    DELETE FROM dtm.subscription AS s WHERE s.name = unsubscribe.name;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
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
    UPDATE dtm.subscription AS s SET epoch = s.epoch + 1 WHERE s.name = rewind.name RETURNING s.id INTO subscription_id;
    IF NOT FOUND THEN
        PERFORM dtm.raise_no_subscription(name);
    END IF;
    PERFORM dtm.start_subscription(subscription_id, start_at);
END
$$;

COMMENT ON FUNCTION dtm.subscribe(text, text, text, jsonb, text) IS
    'Delivers events whose topic matches to a destination. Again with the same name: changes it and keeps its cursor.';
COMMENT ON FUNCTION dtm.rewind(text, text) IS
    'Sets a subscription''s cursor: ''now'', ''earliest'', or a time.';
-- SPDX-License-Identifier: PostgreSQL
-- Who delivers what. A relay says once a second that it lives (one row for all that it owns), and appends a lease when it
-- takes a subscription over. A lease holds while its relay's last heartbeat has not expired, by the database's clock. The
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
    expires_at timestamptz NOT NULL
);
CREATE INDEX heartbeat_log_1_latest ON dtm.heartbeat_log_1 (relay, id);
CREATE TABLE dtm.heartbeat_log_2 (LIKE dtm.heartbeat_log_1 INCLUDING ALL);

CREATE VIEW dtm.lease_log AS SELECT * FROM dtm.lease_log_1 UNION ALL SELECT * FROM dtm.lease_log_2;
CREATE VIEW dtm.heartbeat_log AS SELECT * FROM dtm.heartbeat_log_1 UNION ALL SELECT * FROM dtm.heartbeat_log_2;

-- The newest lease of each subscription and whether its relay lives.
CREATE VIEW dtm.owners AS
SELECT s.id AS subscription, lease.shard, lease.token, lease.relay, heartbeat.name,
       coalesce(heartbeat.expires_at > pg_catalog.clock_timestamp(), false) AS alive
FROM dtm.subscription s
LEFT JOIN LATERAL (
    SELECT l.shard, l.token, l.relay FROM dtm.lease_log l
    WHERE l.subscription = s.id AND l.shard = 0 ORDER BY l.token DESC LIMIT 1) lease ON true
LEFT JOIN LATERAL (
    SELECT h.name, h.expires_at FROM dtm.heartbeat_log h
    WHERE h.relay = lease.relay ORDER BY h.id DESC LIMIT 1) heartbeat ON true;

CREATE FUNCTION dtm.heartbeat(relay uuid, relay_name text, expires_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (SELECT control_segment FROM dtm.installation) = 1 THEN
        INSERT INTO dtm.heartbeat_log_1 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at);
    ELSE
        INSERT INTO dtm.heartbeat_log_2 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at);
    END IF;
END
$$;

-- Renews all leases of a relay, takes those that are free, and answers what it now has to deliver.
CREATE FUNCTION dtm.relay_lease(relay uuid, relay_name text, lease_seconds float8)
RETURNS TABLE (subscription bigint, shard int, name text, topics text[], destination text, options jsonb,
               since timestamptz, epoch bigint, token bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := (SELECT control_segment FROM dtm.installation);
BEGIN
    PERFORM dtm.heartbeat(relay_lease.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds));
    IF EXISTS (SELECT FROM dtm.owners WHERE NOT alive) THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND segment = 1;
        INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND segment = 2;
    END IF;
    RETURN QUERY
    SELECT s.id, o.shard, s.name, s.topics, s.destination, s.options, s.since, s.epoch, o.token
    FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
    WHERE o.relay = relay_lease.relay AND s.state = 'active';
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

-- lag_events counts sequence numbers, so it is an upper bound: rolled-back events, other topics, and what was delivered before
-- a transaction that began earlier has ended, count too. Null: the subscription has no cursor.
CREATE VIEW dtm.subscriptions AS
SELECT s.name, s.topics, s.destination, s.options, s.state, s.reason,
       CASE WHEN o.alive THEN o.name END AS owner,
       CASE WHEN cursor.low IS NULL THEN NULL
            ELSE coalesce(extract(epoch FROM pg_catalog.clock_timestamp() - behind.published_at), 0) END::float8 AS lag_seconds,
       CASE WHEN cursor.low IS NULL THEN NULL
            WHEN behind.published_at IS NULL THEN 0 ELSE head.seq - cursor.low END AS lag_events,
       cursor.moved_at, s.epoch, s.since, s.created_at, s.id
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
    WHERE c.subscription = s.id AND c.shard = 0 AND c.epoch = s.epoch
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

COMMENT ON VIEW dtm.subscriptions IS 'Every subscription: what it matches, where it goes, its state, owner and lag.';
-- SPDX-License-Identifier: PostgreSQL
-- PUBLIC gets nothing. A publisher needs USAGE on the schema and EXECUTE on dtm.publish, a relay what the README says.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA dtm FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA dtm FROM PUBLIC;
