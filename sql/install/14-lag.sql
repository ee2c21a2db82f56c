-- SPDX-License-Identifier: PostgreSQL
-- A subscriber that is away holds the log, also where its subscription is paused or disabled. How far it may lag behind is an
-- option, and whether it is dropped then.

CREATE FUNCTION dtm.lag_policy(options jsonb, OUT drops boolean, OUT max_seconds float8, OUT max_bytes bigint) RETURNS SETOF record
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE ROWS 1 AS 'MODULE_PATHNAME', 'lag_policy_wrapper';

-- Subscriptions that lag behind further than they may. Drops those that say so: their cursor stays where it is, but holds
-- nothing any more. lost: what a dropped one has lost.
CREATE FUNCTION dtm.watch_lag() RETURNS TABLE (name text, state text, lag_seconds float8, lag_bytes bigint, lost text)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    late record;
BEGIN
    FOR late IN
        SELECT s.id, s.name, s.state, s.lag_seconds, s.lag_bytes, s.next_seq, policy.*
        FROM dtm.subscriptions s CROSS JOIN LATERAL dtm.lag_policy(s.options) policy
        WHERE s.state <> 'dropped' AND (s.lag_seconds > policy.max_seconds OR s.lag_bytes > policy.max_bytes)
        ORDER BY s.name
    LOOP
        name := late.name;
        state := late.state;
        lag_seconds := late.lag_seconds;
        lag_bytes := late.lag_bytes;
        lost := NULL;
        IF late.drops THEN
            PERFORM FROM dtm.subscription s WHERE s.id = late.id FOR NO KEY UPDATE SKIP LOCKED;
            IF FOUND THEN
                lost := format('events %s to %s', late.next_seq,
                               (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.event_seq));
                UPDATE dtm.subscription s
                SET state = 'dropped', revision = s.revision + 1,
                    reason = format('it lagged %s s and %s bytes behind, and has lost %s', round(late.lag_seconds),
                                    late.lag_bytes, lost)
                WHERE s.id = late.id;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;
