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

-- Where a subscription goes on, and what is delivered beyond acked. No row: it has no cursor, and must not be delivered.
CREATE FUNCTION dtm.relay_resume(subscription bigint, shard int, epoch bigint)
RETURNS TABLE ("position" text, target text, acked bigint, ahead bigint[], windows uuid[])
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.body, t.body, c.acked, c.ahead, c.windows
    FROM (SELECT * FROM dtm.cursor_log l
          WHERE l.subscription = relay_resume.subscription AND l.shard = relay_resume.shard AND l.epoch = relay_resume.epoch
          ORDER BY l.id DESC LIMIT 1) c
    JOIN dtm.position_log p ON p.id = c."position" AND p.segment = c.segment
    LEFT JOIN dtm.position_log t ON t.id = c.target AND t.segment = c.segment
    WHERE c.target IS NULL OR t.id IS NOT NULL;
END;

-- The same for relays of version 0.1.
CREATE FUNCTION dtm.relay_cursor(subscription bigint, shard int, epoch bigint)
RETURNS TABLE ("position" text, target text, acked bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT r."position", r.target, r.acked
    FROM dtm.relay_resume(relay_cursor.subscription, relay_cursor.shard, relay_cursor.epoch) r;
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
    segment smallint := dtm.control_segment();
    moved bigint[];
BEGIN
    -- Against a lease that is being taken over at this moment.
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    PERFORM dtm.keep_positions(positions || targets);
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
