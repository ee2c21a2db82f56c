-- SPDX-License-Identifier: PostgreSQL
-- A subscriber that is away holds the log, also where its subscription is paused or disabled. How far it may lag behind is an
-- option, and whether it is dropped then. Relays look, and drop what lags too far at several looks and does not catch up between
-- them: one look does not tell who is away from who was kept waiting.

CREATE FUNCTION dtm.lag_policy(options jsonb, OUT drops boolean, OUT max_seconds float8, OUT max_bytes bigint) RETURNS SETOF record
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE ROWS 1 AS 'MODULE_PATHNAME', 'lag_policy_wrapper';

INSERT INTO dtm.turn VALUES ('lag');

-- How far each subscription that is not dropped lags behind, beside how far it may.
CREATE VIEW dtm.lag AS
SELECT s.id, s.name, s.state,
       -- Others than before: somebody has done something about it, and an earlier look says nothing any more.
       pg_catalog.hashtextextended(pg_catalog.format('%s %s %s', s.epoch, s.state, s.options), 0) AS terms,
       s.lag_seconds, s.lag_events, s.lag_bytes, s.next_seq,
       s.lag_events IS NOT NULL AS has_cursor,
       coalesce(s.lag_seconds > policy.max_seconds OR s.lag_bytes > policy.max_bytes, false) AS is_late,
       -- Events that are older than the subscription, or came with a restore, have not waited for it for all their age.
       policy.drops AND coalesce(
           least(s.lag_seconds, extract(epoch FROM pg_catalog.clock_timestamp() - greatest(begun.started_at, era.began_at)))
               > policy.max_seconds
           OR s.lag_bytes > policy.max_bytes, false) AS may_be_dropped
FROM dtm.subscriptions s
JOIN dtm.subscription begun ON begun.id = s.id
CROSS JOIN LATERAL dtm.lag_policy(s.options) policy
LEFT JOIN (SELECT e.began_at FROM dtm.eras e JOIN dtm.installation i ON i.era = e.era) era ON true
WHERE s.state <> 'dropped';

-- Subscriptions that lag behind further than they may, and those that have no cursor (and hold all of the log). A row of nulls:
-- nobody was looked at, since another relay is looking, or a restore is not complete.
CREATE FUNCTION dtm.watch_lag()
RETURNS TABLE (id bigint, name text, state text, terms bigint, lag_seconds float8, lag_events bigint, lag_bytes bigint,
               has_cursor boolean, may_be_dropped boolean)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT dtm.take_turn('lag') OR NOT dtm.meet_restored() THEN
        RETURN NEXT;
        RETURN;
    END IF;
    RETURN QUERY
    SELECT l.id, l.name, l.state, l.terms, l.lag_seconds, l.lag_events, l.lag_bytes, l.has_cursor, l.may_be_dropped
    FROM dtm.lag l WHERE l.is_late OR NOT l.has_cursor ORDER BY l.name;
END
$$;

-- Drops a subscription if it lags too far behind still, by at least so many events, on the terms of that look. Its cursor stays
-- where it is, but holds nothing any more. Answers what it has lost; null: it is not dropped.
CREATE FUNCTION dtm.drop_late(subscription bigint, terms bigint, least_events bigint) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    late dtm.lag;
    lost text;
BEGIN
    -- Whoever has it locked is changing it.
    PERFORM FROM dtm.subscription s WHERE s.id = drop_late.subscription FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- A statement of its own: it sees what was changed until the row was locked.
    SELECT * INTO late FROM dtm.lag l
    WHERE l.id = drop_late.subscription AND l.terms = drop_late.terms AND l.may_be_dropped AND l.lag_events >= least_events;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    lost := format('events %s to %s', late.next_seq,
                   (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dtm.event_seq));
    UPDATE dtm.subscription s
    SET state = 'dropped', state_before = s.state, reason_before = s.reason, revision = s.revision + 1,
        reason = format('it lagged %s s and %s bytes behind, and has lost %s', round(late.lag_seconds), late.lag_bytes, lost)
    WHERE s.id = drop_late.subscription;
    RETURN lost;
END
$$;
