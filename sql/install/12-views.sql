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

-- Above which number all lies that a position has not seen and that can be read by now: above its own, or above the floor (in the
-- fifth part of its text) of a publisher that has committed since. Those that are still open hide nothing from whoever looks now.
CREATE FUNCTION dtm.unseen_above(body text) RETURNS bigint
LANGUAGE sql STABLE STRICT
BEGIN ATOMIC
    SELECT least(dtm.position_seq(body), min(floor.seq))
    FROM (SELECT pg_catalog.split_part(f.text, '>', 1)::pg_catalog.xid8 AS xid, pg_catalog.split_part(f.text, '>', 2)::bigint AS seq
          FROM pg_catalog.string_to_table(nullif(pg_catalog.split_part(body, '|', 5), ''), ',') AS f (text)) floor
    -- In another era everybody has ended, and transaction ids say nothing here.
    WHERE CASE WHEN dtm.position_era(body) = (SELECT era FROM dtm.installation)
               THEN pg_catalog.pg_visible_in_snapshot(floor.xid, pg_catalog.pg_current_snapshot())
                    AND pg_catalog.pg_xact_status(floor.xid) IS DISTINCT FROM 'aborted'
               ELSE true END;
END;

-- The newest cursor of a subscription, or of a shard. It has seen what its position's snapshot sees (the fourth part of its
-- text), and in the window after it what lies up to acked; all that it has not lies above low, and what of it can be read by now
-- above look_above.
CREATE FUNCTION dtm.cursor_at(subscription bigint, shard int, epoch bigint)
RETURNS TABLE (era int, low bigint, acked bigint, moved_at timestamptz, seen pg_snapshot, seen_then pg_snapshot, look_above bigint)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT p.era,
           CASE WHEN p.seq = 9223372036854775807 THEN 0  -- the end of an era: all of the next one lies before it
                ELSE least(CASE WHEN c.acked = 0 THEN p.low ELSE c.acked END, t.low) END,
           c.acked, c.moved_at,
           pg_catalog.split_part(p.body, '|', 4)::pg_catalog.pg_snapshot,
           pg_catalog.split_part(t.body, '|', 4)::pg_catalog.pg_snapshot,
           CASE WHEN p.seq = 9223372036854775807 THEN 0
                ELSE least(CASE WHEN c.acked = 0 THEN dtm.unseen_above(p.body) ELSE c.acked END, dtm.unseen_above(t.body)) END
    FROM dtm.cursor_log c
    JOIN dtm.position_log p ON p.id = c."position" AND p.segment = c.segment
    LEFT JOIN dtm.position_log t ON t.id = c.target AND t.segment = c.segment
    WHERE c.subscription = cursor_at.subscription AND c.shard = cursor_at.shard AND c.epoch = cursor_at.epoch
    ORDER BY c.id DESC LIMIT 1;
END;

-- The first and the last event of each segment of the log, and its size.
CREATE FUNCTION dtm.log_segments()
RETURNS TABLE (segment int, first_seq bigint, first_at timestamptz, last_seq bigint, last_at timestamptz, bytes bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    FOR n IN 1 .. 3 LOOP
        segment := n;
        EXECUTE format('SELECT f.seq, f.published_at, l.seq, l.published_at, pg_table_size(''dtm.log_%1$s'')
                        FROM (SELECT seq, published_at FROM dtm.log_%1$s ORDER BY seq LIMIT 1) f,
                             (SELECT seq, published_at FROM dtm.log_%1$s ORDER BY seq DESC LIMIT 1) l', segment)
        INTO first_seq, first_at, last_seq, last_at, bytes;
        RETURN NEXT;
    END LOOP;
END
$$;

-- How many bytes of the log lie above a number, about: events are taken for evenly large.
CREATE FUNCTION dtm.log_bytes_above(seq bigint) RETURNS bigint
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT coalesce(sum(s.bytes * least(1, (s.last_seq - log_bytes_above.seq)::float8 / (s.last_seq - s.first_seq + 1))), 0)::bigint
    FROM dtm.log_segments() s WHERE s.last_seq > log_bytes_above.seq;
END;

-- How far each subscription, or each of its shards, is. The lag is counted from the first event that it has not had. lag_events
-- counts sequence numbers, so it is an upper bound: rolled-back events, other topics, other shards, what was delivered before a
-- transaction that began earlier has ended, and what lies before the time that it begins at, count too. Null: there is no cursor.
CREATE VIEW dtm.progress AS
SELECT s.id AS subscription, o.shard,
       CASE WHEN o.alive THEN o.name END AS owner,
       CASE WHEN cursor.low IS NULL THEN NULL
            ELSE coalesce(extract(epoch FROM pg_catalog.clock_timestamp() - behind.published_at), 0) END::float8 AS lag_seconds,
       CASE WHEN cursor.low IS NULL THEN NULL
            WHEN behind.seq IS NULL THEN 0 ELSE head.seq - (behind.seq - 1) END AS lag_events,
       cursor.moved_at,
       CASE WHEN cursor.low IS NULL THEN NULL
            WHEN behind.seq IS NULL THEN 0 ELSE dtm.log_bytes_above(behind.seq - 1) END AS lag_bytes,
       behind.seq AS next_seq  -- the first that is not delivered
FROM dtm.subscription s
JOIN dtm.owners o ON o.subscription = s.id
CROSS JOIN LATERAL (
    SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS seq FROM dtm.event_seq) head
LEFT JOIN LATERAL dtm.cursor_at(s.id, o.shard, s.epoch) cursor ON true
LEFT JOIN dtm.eras ON eras.era = cursor.era
-- The first that is not delivered: of the position's era, or of a later one.
LEFT JOIN LATERAL (
    SELECT l.seq, l.published_at FROM dtm.log l
    WHERE l.seq > cursor.look_above
      AND CASE WHEN l.era <> cursor.era
               THEN coalesce((SELECT e.ordinal > coalesce(eras.ordinal, 2147483647) FROM dtm.eras e WHERE e.era = l.era), true)
               ELSE NOT pg_catalog.pg_visible_in_snapshot(l.xid, cursor.seen)
                    AND (l.seq > cursor.acked OR NOT pg_catalog.pg_visible_in_snapshot(l.xid, cursor.seen_then)) END
    ORDER BY l.seq LIMIT 1) behind ON true;

-- The lag is that of the slowest shard; next_seq is the first event that it has not had.
CREATE VIEW dtm.subscriptions AS
SELECT s.name, s.topics, s.destination, s.options, s.state, s.reason,
       progress.owner, progress.lag_seconds, progress.lag_events, progress.moved_at,
       s.epoch, s.since, s.created_at, s.id,
       (SELECT count(*) FROM dtm.retry r WHERE r.subscription = s.id) AS retrying,
       (SELECT count(*) FROM dtm.dead_letter d WHERE d.subscription = s.id) AS dead,
       progress.shards, progress.lag_bytes, progress.next_seq
FROM dtm.subscription s
CROSS JOIN LATERAL (
    SELECT pg_catalog.string_agg(DISTINCT p.owner, ', ' ORDER BY p.owner) AS owner,
           CASE WHEN bool_and(p.lag_seconds IS NOT NULL) THEN max(p.lag_seconds) END AS lag_seconds,
           CASE WHEN bool_and(p.lag_events IS NOT NULL) THEN max(p.lag_events) END AS lag_events,
           CASE WHEN bool_and(p.lag_events IS NOT NULL) THEN max(p.lag_bytes) END AS lag_bytes,
           max(p.moved_at) AS moved_at, count(*)::int AS shards, min(p.next_seq) AS next_seq
    FROM dtm.progress p WHERE p.subscription = s.id) progress;

COMMENT ON VIEW dtm.subscriptions IS
    'Every subscription: what it matches, where it goes, its state, owner and lag, and how much of it failed.';

CREATE VIEW dtm.retries AS
SELECT s.name, r.id, r.topic, r.key, r.attempts, r.next_at,
       r.key IS NOT NULL AND s.options ->> 'ordering' IS DISTINCT FROM 'none' AND (
           row_number() OVER (PARTITION BY r.subscription, r.key ORDER BY r.n) > 1
           OR s.options ->> 'on_dead' = 'block' AND EXISTS (
               SELECT FROM dtm.dead_letter d
               WHERE d.subscription = r.subscription AND d.key = r.key AND d.n < r.n)) AS waits_behind,
       CASE WHEN pg_catalog.jsonb_typeof(r.history -> -1 -> 'status') = 'number'
            THEN (r.history -> -1 ->> 'status')::int END AS last_status,
       r.history -> -1 ->> 'error' AS last_error, r.history, r.published_at, r.parked_at,
       CASE WHEN r.content_type IS NULL THEN pg_catalog.convert_from(r.payload, 'UTF8')::jsonb
            WHEN r.content_type ~* '^[^;]*[/+]json\s*(;|$)' THEN dtm.json_or_null(r.payload) END AS payload,
       r.payload AS body,
       coalesce(r.content_type, 'application/json') AS content_type,
       r.headers::jsonb AS headers, r.seq, r.era
FROM dtm.retry r JOIN dtm.subscription s ON s.id = r.subscription;

COMMENT ON VIEW dtm.retries IS 'What is tried again: why, and when next. waits_behind: after an earlier event of its key.';

CREATE VIEW dtm.dead_letters AS
SELECT s.name, d.id, d.topic, d.key, d.attempts, d.died_at,
       CASE WHEN pg_catalog.jsonb_typeof(d.history -> -1 -> 'status') = 'number'
            THEN (d.history -> -1 ->> 'status')::int END AS last_status,
       d.history -> -1 ->> 'error' AS last_error, d.history,
       CASE WHEN d.content_type IS NULL THEN pg_catalog.convert_from(d.payload, 'UTF8')::jsonb
            WHEN d.content_type ~* '^[^;]*[/+]json\s*(;|$)' THEN dtm.json_or_null(d.payload) END AS payload,
       d.payload AS body,
       coalesce(d.content_type, 'application/json') AS content_type,
       d.headers::jsonb AS headers, d.published_at, d.parked_at, d.seq, d.era
FROM dtm.dead_letter d JOIN dtm.subscription s ON s.id = d.subscription;

COMMENT ON VIEW dtm.dead_letters IS 'What was given up. dtm.redrive tries it again, dtm.discard deletes it.';
