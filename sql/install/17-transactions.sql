-- SPDX-License-Identifier: PostgreSQL
-- What users and operators do with global transactions, and see of them (06-transaction-tables.sql).

-- The setting dtm.transactions_kept.
CREATE FUNCTION dtm.transactions_kept() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'transactions_kept_wrapper';

-- A submitted transaction announces itself. In PL/pgSQL, and without a search_path of its own: it stands in the way of each message.
CREATE FUNCTION dtm.announce(gid text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
BEGIN
    PERFORM dtm.append(pg_catalog.gen_random_uuid(), 'dtm.transactions', gid, NULL, NULL, NULL);
END
$$;

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

-- Tries now what waits for its next attempt, but nothing before its time: no delayed message, and nobody is asked about a prepared
-- one whose business transaction may not have begun. One that stood still begins its attempts anew, however old they are.
CREATE FUNCTION dtm.retry_now(gid text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.lock_unfinished(gid, 'tried again');
    UPDATE dtm.branch b SET first_attempt_at = clock_timestamp(), attempts = 0
    FROM dtm.transaction t
    WHERE t.gid = retry_now.gid AND t.stuck_since IS NOT NULL AND b.gid = t.gid AND b.status = 'prepared';
    UPDATE dtm.transaction t SET failures = 0, stuck_since = NULL
    WHERE t.gid = retry_now.gid AND (t.failures <> 0 OR t.stuck_since IS NOT NULL);
    INSERT INTO dtm.due AS d (gid, due_at)
    SELECT t.gid, greatest(clock_timestamp(), dtm.earliest_attempt(t.status, t.created_at, t.options))
    FROM dtm.transaction t WHERE t.gid = retry_now.gid
    ON CONFLICT ON CONSTRAINT due_pkey DO UPDATE SET due_at = excluded.due_at, endpoint = NULL;
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

-- A bounded part of what has ended long ago: in the order in which they were made, up to the first that is too young. What has not
-- ended, however old, is passed over. It never reads the whole table, and takes no index that each end would have to be written to.
CREATE FUNCTION dtm.purge_transactions(max_rows int) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET enable_sort = off AS $$
DECLARE
    before timestamptz := clock_timestamp() - dtm.transactions_kept();
    oldest record;
    gone text[] := '{}';
BEGIN
    FOR oldest IN SELECT t.gid, t.created_at, t.finished_at FROM dtm.transaction t ORDER BY t.id LOOP
        EXIT WHEN oldest.created_at >= before OR cardinality(gone) >= max_rows;
        IF oldest.finished_at < before THEN
            gone := gone || oldest.gid;
        END IF;
    END LOOP;
    DELETE FROM dtm.transaction t WHERE t.gid = ANY (gone);
    DELETE FROM dtm.branch b WHERE b.gid = ANY (gone);
    RETURN cardinality(gone);
END
$$;
