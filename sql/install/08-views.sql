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

CREATE VIEW dtm.log AS
SELECT * FROM dtm.log_1 UNION ALL SELECT * FROM dtm.log_2 UNION ALL SELECT * FROM dtm.log_3;

CREATE VIEW dtm.events AS
SELECT seq, id, topic, key,
       CASE WHEN content_type IS NULL THEN pg_catalog.convert_from(payload, 'UTF8')::jsonb
            WHEN content_type ~* '^[^;]*[/+]json\s*(;|$)' THEN dtm.json_or_null(payload) END AS payload,
       payload AS body,
       coalesce(content_type, 'application/json') AS content_type,
       headers::jsonb AS headers, published_at, xid, era
FROM dtm.log;

COMMENT ON VIEW dtm.events IS 'The log: every event that is retained. payload is its body where that is JSON.';

-- lag_events counts sequence numbers, so it is an upper bound: rolled-back events and other topics count too.
CREATE VIEW dtm.subscriptions AS
SELECT s.name, s.topics, s.destination, s.options, s.state, s.reason,
       CASE WHEN o.alive THEN o.name END AS owner,
       coalesce(extract(epoch FROM pg_catalog.clock_timestamp() - behind.published_at), 0)::float8 AS lag_seconds,
       CASE WHEN behind.published_at IS NULL THEN 0 ELSE head.seq - cursor.seq END AS lag_events,
       cursor.moved_at, s.epoch, s.since, s.created_at, s.id
FROM dtm.subscription s
JOIN dtm.owners o ON o.subscription = s.id
CROSS JOIN LATERAL (
    SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS seq FROM dtm.event_seq) head
LEFT JOIN LATERAL (
    SELECT CASE WHEN c.target IS NULL THEN p.seq WHEN c.acked = 0 THEN p.low ELSE c.acked END AS seq, c.moved_at
    FROM dtm.cursor_log c JOIN dtm.position_log p ON p.id = c."position"
    WHERE c.subscription = s.id AND c.shard = 0 AND c.epoch = s.epoch
    ORDER BY c.id DESC LIMIT 1) cursor ON true
LEFT JOIN LATERAL (
    SELECT l.published_at FROM dtm.log l WHERE l.seq > cursor.seq ORDER BY l.seq LIMIT 1) behind ON true;

COMMENT ON VIEW dtm.subscriptions IS 'Every subscription: what it matches, where it goes, its state, owner and lag.';
