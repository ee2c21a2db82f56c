-- SPDX-License-Identifier: PostgreSQL
-- 2-phase messages: calls of several services that are certain to be made if and only if the business transaction commits. They
-- are SECURITY DEFINER: who may execute them needs no rights on the tables.

CREATE FUNCTION dtm.new_gid() RETURNS text
LANGUAGE c VOLATILE PARALLEL SAFE AS 'MODULE_PATHNAME', 'new_gid_wrapper';
-- Checks in Rust take texts in UTF-8, whatever the database's encoding is.
CREATE FUNCTION dtm.check_gid(gid bytea) RETURNS void
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'check_gid_wrapper';
-- Checks steps; answers a JSON array of branches, numbered as DTM does: 01, 02, and their payloads.
CREATE FUNCTION dtm.branches_of_steps(steps bytea) RETURNS TABLE (branches bytea, payloads bytea[], has_topics boolean)
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'branches_of_steps_wrapper';
CREATE FUNCTION dtm.check_action(action bytea) RETURNS void
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'check_action_wrapper';
CREATE FUNCTION dtm.check_query_prepared(query_prepared bytea) RETURNS void
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'check_query_prepared_wrapper';
CREATE FUNCTION dtm.read_transaction_options(options bytea) RETURNS TABLE (delay float8, timeout_to_fail float8)
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'read_transaction_options_wrapper';
CREATE FUNCTION dtm.check_transaction_options(options jsonb) RETURNS TABLE (delay float8, timeout_to_fail float8)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT o.delay, o.timeout_to_fail FROM dtm.read_transaction_options(convert_to(options::text, 'UTF8')) o;
END;

-- Not before then is anything called: a delayed message's services, or who is asked about a prepared one.
CREATE FUNCTION dtm.earliest_attempt(status text, created_at timestamptz, options jsonb) RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT created_at + make_interval(secs => CASE status WHEN 'prepared' THEN o.timeout_to_fail ELSE o.delay END)
    FROM dtm.check_transaction_options(options) o;
END;

-- Who gets what is sent to topic://NAME: DTM's message topics. They have nothing to do with subscriptions.
CREATE TABLE dtm.msg_topics (
    topic      text        NOT NULL,
    url        text        NOT NULL,
    remark     text        NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (topic, url)
);
SELECT pg_catalog.pg_extension_config_dump('dtm.msg_topics', '');

-- Branches with the subscribers of message topics in the place of those: where there are several, 01 becomes 01-01, 01-02.
CREATE FUNCTION dtm.branches_of_topics(INOUT branches jsonb, INOUT payloads bytea[])
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    lonely text;
BEGIN
    SELECT b.branch ->> 'action' INTO lonely
    FROM jsonb_array_elements(branches) AS b (branch)
    WHERE b.branch ->> 'action' LIKE 'topic://%'
      AND NOT EXISTS (SELECT FROM dtm.msg_topics m WHERE 'topic://' || m.topic = b.branch ->> 'action')
    LIMIT 1;
    IF lonely IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = 'nobody is subscribed to this message topic',
            DETAIL = format('The action is %L.', lonely),
            HINT = 'Insert its subscribers into dtm.msg_topics first.';
    END IF;
    PERFORM dtm.check_action(convert_to(m.url, 'UTF8')) FROM dtm.msg_topics m
    WHERE 'topic://' || m.topic IN (SELECT b.branch ->> 'action' FROM jsonb_array_elements(branches) AS b (branch));
    SELECT jsonb_agg(CASE
               WHEN t.url IS NULL THEN b.branch
               ELSE b.branch || jsonb_build_object('action', t.url, 'branch_id', (b.branch ->> 'branch_id')
                   || CASE WHEN t.among > 1 THEN '-' || lpad(t.nth::text, greatest(2, length(t.nth::text)), '0') ELSE '' END)
           END ORDER BY b.n, t.nth),
           array_agg(payloads[b.n] ORDER BY b.n, t.nth)
    INTO branches, payloads
    FROM jsonb_array_elements(branches) WITH ORDINALITY AS b (branch, n)
    LEFT JOIN (
        SELECT 'topic://' || m.topic AS action, m.url, row_number() OVER subscribers AS nth,
               count(*) OVER (PARTITION BY m.topic) AS among
        FROM dtm.msg_topics m WINDOW subscribers AS (PARTITION BY m.topic ORDER BY m.created_at, m.url)) t
    ON t.action = b.branch ->> 'action';
    IF jsonb_array_length(branches) > 1000 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'program_limit_exceeded',
            MESSAGE = 'too many calls for one message',
            DETAIL = format('With all subscribers of its topics there are %s; the most is 1000.', jsonb_array_length(branches)),
            HINT = 'Publish an event: a subscription delivers to any number of receivers.';
    END IF;
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
    PERFORM dtm.check_gid(convert_to(gid, 'UTF8'));
    SELECT convert_from(b.branches, 'UTF8')::jsonb AS branches, coalesce(bodies, b.payloads) AS payloads, b.has_topics
    INTO expanded FROM dtm.branches_of_steps(convert_to(steps::text, 'UTF8')) AS b;
    IF expanded.has_topics THEN
        SELECT t.branches, t.payloads INTO expanded FROM dtm.branches_of_topics(expanded.branches, expanded.payloads) AS t;
    END IF;
    SELECT * INTO known FROM dtm.read_transaction_options(convert_to(options::text, 'UTF8'));
    SELECT coalesce(sum(length(p)), 0) + length(expanded.branches::text) + length(options::text) INTO size
    FROM unnest(expanded.payloads) AS p;
    IF size > pg_size_bytes(current_setting('dtm.max_payload')) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'program_limit_exceeded',
            MESSAGE = 'the message is too large',
            DETAIL = format('With payloads, actions and options it has %s bytes; dtm.max_payload is %s.',
                            size, current_setting('dtm.max_payload')),
            HINT = 'Store the bodies elsewhere and send references to them.';
    END IF;
    IF status = 'prepared' AND make_interval(secs => known.timeout_to_fail) >= dtm.barriers_kept() / 2 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'nobody would ever be asked about this message',
            DETAIL = format('timeout_to_fail is %s, and after half of dtm.barriers_kept (%s) its barrier could be forgotten.',
                            make_interval(secs => known.timeout_to_fail), dtm.barriers_kept()),
            HINT = 'Make timeout_to_fail shorter: a business transaction takes seconds.';
    END IF;
    INSERT INTO dtm.transaction (gid, trans_type, status, branches, payloads, payload_bytes, query_prepared, options)
    VALUES (insert_message.gid, 'msg', insert_message.status, expanded.branches, expanded.payloads, size,
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
    PERFORM dtm.check_query_prepared(convert_to(query_prepared, 'UTF8'));
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
