-- SPDX-License-Identifier: PostgreSQL
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
-- is asked any more, and what may have been done is not called again. payloads: null in those that are more than max_bytes
-- together with smaller ones; the oldest has its own.
CREATE FUNCTION dtm.relay_transactions(gids text[], max_bytes int)
RETURNS TABLE (gid text, trans_type text, status text, branches text, payloads bytea[], payload_bytes int, query_prepared text,
               options text, age float8, failures int, undecidable boolean, waits boolean, known text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
#variable_conflict use_column
BEGIN
    -- In PL/pgSQL the plan is kept: to make it takes longer than to run it.
    RETURN QUERY SELECT t.gid, t.trans_type, t.status, t.branches::text,
           CASE WHEN sum(t.payload_bytes) OVER smaller <= max_bytes OR row_number() OVER older = 1 THEN t.payloads END,
           t.payload_bytes, t.query_prepared, t.options::text,
           extract(epoch FROM clock_timestamp() - t.created_at)::float8, t.failures,
           CASE t.status
               WHEN 'prepared' THEN t.created_at < clock_timestamp() - dtm.barriers_kept() / 2
               ELSE EXISTS (SELECT FROM dtm.branch b
                            WHERE b.gid = t.gid AND b.status = 'prepared'
                              AND b.first_attempt_at < clock_timestamp() - dtm.barriers_kept() / 2)
           END,
           EXISTS (SELECT FROM dtm.due d WHERE d.gid = t.gid),
           (SELECT jsonb_agg(jsonb_build_object('branch_id', b.branch_id, 'op', b.op, 'status', b.status, 'attempts', b.attempts))
            FROM dtm.branch b WHERE b.gid = t.gid)::text
    FROM dtm.transaction t
    WHERE t.gid = ANY (gids) AND t.status IN ('prepared', 'submitted', 'aborting') AND t.stuck_since IS NULL
    WINDOW smaller AS (ORDER BY t.payload_bytes, t.id), older AS (ORDER BY t.id);
END
$$;

-- What is due in the shards that a relay owns, but for what it is at already, and in how many seconds the next is. Of what waits
-- for one of these endpoints no more than it has room for, of any other no more than usual: those that are down, or slow, take
-- nothing from the others, however much waits for them. By turns of what was not called yet, the oldest and the newest, and of what has
-- failed: whether the endpoint works, what was not called can tell better, and the newest finds out that the older ones are to
-- blame themselves, however many they are.
CREATE FUNCTION dtm.relay_due_transactions(
    shards int, own int[], busy text[], max_rows int, endpoints text[], rooms int[], usual int, OUT gids text[], OUT next_in float8
)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    WITH RECURSIVE waited_for AS (
        (SELECT d.endpoint FROM dtm.due d WHERE d.endpoint IS NOT NULL ORDER BY d.endpoint LIMIT 1)
        UNION ALL
        SELECT (SELECT d.endpoint FROM dtm.due d WHERE d.endpoint > w.endpoint ORDER BY d.endpoint LIMIT 1)
        FROM waited_for w WHERE w.endpoint IS NOT NULL
    ), found AS (
        (SELECT d.gid, d.due_at, row_number() OVER (ORDER BY d.due_at) AS nth
         FROM dtm.due d
         WHERE d.endpoint IS NULL AND d.due_at <= clock_timestamp() AND d.gid <> ALL (busy)
           AND dtm.shard_of(d.gid, 0, shards) = ANY (own)
         ORDER BY d.due_at LIMIT max_rows)
        UNION ALL
        SELECT f.gid, f.due_at, f.nth
        FROM waited_for w
        LEFT JOIN unnest(endpoints, rooms) AS r (endpoint, room) ON r.endpoint = w.endpoint
        CROSS JOIN LATERAL (
            SELECT k.gid, k.due_at, min(k.nth) AS nth
            FROM (
                SELECT o.gid, o.due_at, o.nth, kind.turn
                FROM (VALUES (false, 1), (true, 3)) AS kind (failed_before, turn)
                CROSS JOIN LATERAL (
                    SELECT d.gid, d.due_at, row_number() OVER (ORDER BY d.due_at) AS nth
                    FROM dtm.due d
                    WHERE d.endpoint = w.endpoint AND d.failed_before = kind.failed_before AND d.due_at <= clock_timestamp()
                      AND d.gid <> ALL (busy) AND dtm.shard_of(d.gid, 0, shards) = ANY (own)
                    ORDER BY d.due_at LIMIT coalesce(r.room, usual)) o
                UNION ALL
                (SELECT d.gid, d.due_at, row_number() OVER (ORDER BY d.due_at DESC), 2
                 FROM dtm.due d
                 WHERE d.endpoint = w.endpoint AND NOT d.failed_before AND d.due_at <= clock_timestamp()
                   AND d.gid <> ALL (busy) AND dtm.shard_of(d.gid, 0, shards) = ANY (own)
                 ORDER BY d.due_at DESC LIMIT coalesce(r.room, usual))
            ) k
            GROUP BY k.gid, k.due_at
            ORDER BY min(k.nth), min(k.turn) LIMIT coalesce(r.room, usual)) f
        WHERE w.endpoint IS NOT NULL
    )
    SELECT coalesce(array_agg(f.gid ORDER BY f.nth, f.due_at), '{}') INTO gids
    FROM (SELECT * FROM found ORDER BY found.nth, found.due_at LIMIT max_rows) f;
    SELECT extract(epoch FROM min(d.due_at) - clock_timestamp()) INTO next_in
    FROM dtm.due d WHERE d.endpoint IS NULL AND d.due_at > clock_timestamp();
    IF gids <> '{}' THEN
        -- Somebody may have hurried what has ended meanwhile.
        DELETE FROM dtm.due d WHERE d.gid = ANY (gids) AND NOT EXISTS (
            SELECT FROM dtm.transaction t WHERE t.gid = d.gid AND t.status IN ('prepared', 'submitted', 'aborting'));
        -- What a crash could still take back is not acted on.
        PERFORM dtm.flush();
    END IF;
END
$$;

-- Messages whose branches were all called with success. stored: those that it ends; held: those that are still submitted, but
-- somebody's open transaction holds their rows.
CREATE FUNCTION dtm.relay_succeed(gids text[], OUT stored text[], OUT held text[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
BEGIN
    -- Nobody's open transaction holds up the others: what is locked is tried again.
    BEGIN
        WITH done AS (
            UPDATE dtm.transaction t SET status = 'succeed', finished_at = clock_timestamp()
            WHERE t.gid = ANY (gids) AND t.status = 'submitted' RETURNING t.gid
        )
        SELECT coalesce(array_agg(d.gid), '{}') INTO stored FROM done d;
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        WITH free AS MATERIALIZED (
            SELECT t.gid FROM dtm.transaction t
            WHERE t.gid = ANY (gids) AND t.status = 'submitted' FOR UPDATE SKIP LOCKED
        ), done AS (
            UPDATE dtm.transaction t SET status = 'succeed', finished_at = clock_timestamp()
            FROM free WHERE t.gid = free.gid RETURNING t.gid
        )
        SELECT coalesce(array_agg(d.gid), '{}') INTO stored FROM done d;
    END;
    held := '{}';
    IF cardinality(stored) < cardinality(gids) THEN
        held := ARRAY(SELECT t.gid FROM dtm.transaction t
                      WHERE t.gid = ANY (gids) AND t.gid <> ALL (stored) AND t.status = 'submitted');
    END IF;
END
$$;

-- What came of passes that were not all success. Each is an object: gid, "from" (the status it leaves), "to", reason, failures,
-- retry_in (seconds; null: it waits for nothing), endpoint, failed_before, error, stuck, took (seconds since it was read: what was hurried
-- since then is tried again at once), and branches: those that something came of. stored: those
-- that still had the status they leave; held: those that still have it, but somebody's open transaction holds their rows.
CREATE FUNCTION dtm.relay_settle(settlements jsonb, OUT stored text[], OUT held text[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    WITH settlement AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(settlements) AS s (
            gid text, "from" text, "to" text, reason text, failures int, retry_in float8, endpoint text, error text, stuck boolean,
            failed_before boolean, took float8)
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
        INSERT INTO dtm.due AS d (gid, due_at, endpoint, failed_before)
        SELECT s.gid, clock_timestamp() + make_interval(secs => s.retry_in), s.endpoint, coalesce(s.failed_before, false)
        FROM settlement s JOIN moved m ON m.gid = s.gid WHERE s.retry_in IS NOT NULL
        ON CONFLICT ON CONSTRAINT due_pkey DO UPDATE
        SET due_at = excluded.due_at, endpoint = excluded.endpoint, failed_before = excluded.failed_before
        WHERE d.due_at NOT BETWEEN clock_timestamp() - make_interval(
            secs => (SELECT coalesce(s.took, 0) FROM settlement s WHERE s.gid = d.gid)) AND clock_timestamp()
    ), over AS (
        DELETE FROM dtm.due d USING settlement s JOIN moved m ON m.gid = s.gid
        WHERE d.gid = s.gid AND s.retry_in IS NULL
    ), known AS (
        INSERT INTO dtm.branch AS b (
            gid, branch_id, op, status, attempts, last_status, last_error, first_attempt_at, last_attempt_at, finished_at)
        SELECT m.gid, n.branch_id, n.op, n.status, n.attempts, n.last_status, n.last_error, clock_timestamp(), clock_timestamp(),
               CASE WHEN n.status <> 'prepared' THEN clock_timestamp() END
        FROM moved m
        JOIN jsonb_array_elements(settlements) AS e (settlement) ON e.settlement ->> 'gid' = m.gid
        CROSS JOIN jsonb_to_recordset(e.settlement -> 'branches') AS n (
            branch_id text, op text, status text, attempts int, last_status int, last_error text)
        ON CONFLICT ON CONSTRAINT branch_pkey DO UPDATE
        SET status = excluded.status, attempts = excluded.attempts, last_status = excluded.last_status,
            last_error = excluded.last_error, last_attempt_at = excluded.last_attempt_at, finished_at = excluded.finished_at
        -- Whoever has lost the transaction to another relay meanwhile does not know better than that.
        WHERE b.status = 'prepared' AND (excluded.status = 'succeed' OR excluded.attempts > b.attempts)
    )
    SELECT coalesce(array_agg(m.gid), '{}') INTO stored FROM moved m;
    held := ARRAY(
        SELECT t.gid FROM jsonb_to_recordset(settlements) AS s (gid text, "from" text)
        JOIN dtm.transaction t ON t.gid = s.gid AND t.status = s."from"
        WHERE t.gid <> ALL (stored));
END
$$;

-- An endpoint works again: a part of what waits for it is due now, if it was not yet; it still takes no more than it has room for.
-- Answers how many.
CREATE FUNCTION dtm.relay_revive(endpoint text, max_rows int) RETURNS int
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    revived int;
BEGIN
    UPDATE dtm.due SET due_at = clock_timestamp() WHERE ctid = ANY (ARRAY(
        SELECT d.ctid FROM dtm.due d WHERE d.endpoint = relay_revive.endpoint AND d.due_at > clock_timestamp()
        LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS revived = ROW_COUNT;
    RETURN revived;
END
$$;
