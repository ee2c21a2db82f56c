-- SPDX-License-Identifier: PostgreSQL
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
        'has_failed', t.failures > 0 OR t.last_error IS NOT NULL OR t.stuck_since IS NOT NULL OR EXISTS (
            SELECT FROM dtm.branch b WHERE b.gid = t.gid AND b.status = 'prepared'),
        'is_delayed', t.next_attempt_at > clock_timestamp() AND t.last_error IS NULL AND t.failures = 0)
    FROM dtm.transactions t WHERE t.gid = server_progress.gid;
END;

-- Tries now what waits for its next attempt, but nothing before its time. False: there is no such transaction.
CREATE FUNCTION dtm.server_retry(gid text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old text := dtm.locked_status(gid);
BEGIN
    IF old IN ('prepared', 'submitted', 'aborting') THEN
        PERFORM dtm.retry_now(gid);
    END IF;
    RETURN old IS NOT NULL;
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
          AND dtm.earliest_attempt(t.status, t.created_at, t.options) <= clock_timestamp()
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

CREATE FUNCTION dtm.server_waiting(OUT waiting bigint, OUT stuck bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT (SELECT count(*) FROM dtm.due), (SELECT count(*) FROM dtm.transaction t WHERE t.stuck_since IS NOT NULL);
END;
