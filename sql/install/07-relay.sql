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
    PERFORM dtm.meet_restored();
    RETURN QUERY SELECT here.era, dtm.all_eras(), dtm.source(),
        (SELECT extversion FROM pg_extension WHERE extname = 'pg_dtm'), dtm.library_preloaded();
END
$$;

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
CREATE FUNCTION dtm.unregistered_eras() RETURNS SETOF int
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
CREATE FUNCTION dtm.adopt(environment text) RETURNS void
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
-- whose epoch or token is not the newest, or that name positions which are no longer stored, and says which.
CREATE FUNCTION dtm.relay_move(
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

-- Appends an event to the log: for events that were checked when they were published.
CREATE FUNCTION dtm.append(id uuid, topic text, key text, content_type text, headers text, payload bytea) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'append_wrapper';

-- Moves events that are due into the log. next_in: seconds until the next one is, null if none waits. One relay at a time
-- moves them: two that took a part each could swap events of one key.
CREATE FUNCTION dtm.relay_due(max_rows int, OUT moved int, OUT next_in float8)
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
