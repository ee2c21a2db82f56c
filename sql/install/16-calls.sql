-- SPDX-License-Identifier: PostgreSQL
-- What a relay calls in a database that is a target: functions there get events, and branches of global transactions, each in one
-- transaction with its receipt or barrier. They run with the rights of the relay's role there, and set no search_path, for the
-- function that is called has its own idea of it.

-- Calls f(event jsonb) for each event that the consumer has not had yet, in their order, each in a subtransaction of its own.
-- Answers those that were not done: why, or, without a state, that an earlier one of the same key was not. An error of the whole
-- transaction (a deadlock, a time-out, a server that shuts down) ends it: nothing is done then.
CREATE FUNCTION dtm.call_events(
    consumer text, function_schema text, function_name text, ids uuid[], keys text[], events text[]
) RETURNS TABLE (n int, state text, message text)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
DECLARE
    call CONSTANT text := pg_catalog.format('SELECT %I.%I($1)', function_schema, function_name);
    failed text[] := '{}';
BEGIN
    FOR at IN 1 .. pg_catalog.cardinality(ids) LOOP
        n := at;
        state := NULL;
        message := NULL;
        IF keys[at] OPERATOR(pg_catalog.=) ANY (failed) THEN
            RETURN NEXT;
            CONTINUE;
        END IF;
        BEGIN
            IF dtm.receive(consumer, ids[at]) THEN
                EXECUTE call USING events[at]::pg_catalog.jsonb;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            IF pg_catalog.left(SQLSTATE, 2) OPERATOR(pg_catalog.=) ANY ('{40,53,57,58}') THEN
                RAISE;
            END IF;
            state := SQLSTATE;
            message := SQLERRM;
            failed := failed OPERATOR(pg_catalog.||) keys[at];
            RETURN NEXT;
        END;
    END LOOP;
END
$$;

-- Calls f(gid text, branch_id text, op text, payload jsonb), unless the barrier says that the branch is done or called off.
CREATE FUNCTION dtm.call_branch(
    function_schema text, function_name text, trans_type text, gid text, branch_id text, op text, payload text
) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
BEGIN
    IF dtm.barrier(trans_type, gid, branch_id, op) THEN
        EXECUTE pg_catalog.format('SELECT %I.%I($1, $2, $3, $4)', function_schema, function_name)
        -- A function that is strict would not be called for a null.
        USING gid, branch_id, op, coalesce(payload, 'null')::pg_catalog.jsonb;
    END IF;
END
$$;
