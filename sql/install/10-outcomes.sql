-- SPDX-License-Identifier: PostgreSQL
-- What became of events: a relay's reports, and what it has to know of earlier ones when it begins.

-- Moves cursors and settles events, all in one statement: an event is parked in the transaction that moves the cursor past it.
-- A position is a stored one's id, or -k for the k-th of the new ones. "of" says, counted from 1, which cursor a settlement
-- goes with: both are applied or neither. Fenced are those whose epoch or token is not the newest, busy those whose
-- subscription a user works on just now, broken those that speak of an event that is not in the log, stale those that name
-- positions which are no longer stored: they have to be told anew. windows: those of exactly-once delivery.
CREATE FUNCTION dtm.relay_store(
    new_positions text[], subscriptions bigint[], shards int[], epochs bigint[], tokens bigint[],
    positions bigint[], targets bigint[], acked bigint[], ahead text[],
    "of" int[], seqs bigint[], what text[], attempts int[], next_in float8[], histories jsonb[],
    windows text[] DEFAULT NULL,
    OUT position_ids bigint[], OUT fenced int[], OUT busy int[], OUT broken int[], OUT stale int[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := dtm.control_segment();
    moved int[];
    unknown bigint[];
BEGIN
    -- What Kafka's positions speak of has to be known after a failover, too: as durable as the database's users have it, while
    -- the relay's session does not wait for standbys.
    IF EXISTS (SELECT FROM unnest(relay_store.windows) AS w (stored) WHERE w.stored <> '{}') THEN
        SET LOCAL synchronous_commit TO DEFAULT;
        IF current_setting('synchronous_commit') = 'off' THEN
            SET LOCAL synchronous_commit TO local;
        END IF;
    END IF;
    -- Against a lease that is being taken over at this moment.
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    position_ids := dtm.store_positions(new_positions);
    unknown := dtm.keep_positions(positions || targets);
    stale := ARRAY(SELECT m.at::int FROM unnest(positions, targets) WITH ORDINALITY AS m ("position", target, at)
                   WHERE m."position" = ANY (unknown) OR m.target = ANY (unknown));
    busy := '{}';
    broken := '{}';
    IF cardinality("of") > 0 THEN
        -- Before epochs are looked at: a user who is done by now has raised them.
        busy := ARRAY(SELECT o.at FROM (SELECT DISTINCT unnest("of") AS at) o
                      WHERE NOT dtm.try_settlements(subscriptions[o.at]) ORDER BY o.at);
        broken := dtm.without_event("of", seqs, what);
    END IF;
    WITH asked AS (
        SELECT m.at::int AS at, m.subscription, m.shard, m.epoch, m.token, m.acked, m.ahead::bigint[] AS ahead,
               m.windows::uuid[] AS windows,
               CASE WHEN m."position" < 0 THEN position_ids[-m."position"] ELSE m."position" END AS "position",
               CASE WHEN m.target < 0 THEN position_ids[-m.target] ELSE m.target END AS target
        FROM unnest(subscriptions, shards, epochs, tokens, positions, targets, relay_store.acked, relay_store.ahead,
                    relay_store.windows)
             WITH ORDINALITY AS m (subscription, shard, epoch, token, "position", target, acked, ahead, windows, at)
        WHERE m.at <> ALL (busy || broken || stale)
    ), granted AS MATERIALIZED (
        SELECT nextval('dtm.cursor_id_seq') AS id, a.*
        FROM asked a
        JOIN dtm.subscription s ON s.id = a.subscription AND s.epoch = a.epoch
        WHERE a.token = (SELECT l.token FROM dtm.lease_log l
                         WHERE l.subscription = a.subscription AND l.shard = a.shard ORDER BY l.token DESC LIMIT 1)
    ), first AS (
        INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", target, acked, ahead, windows)
        SELECT id, subscription, shard, epoch, token, "position", target, acked, ahead, windows FROM granted WHERE segment = 1
    ), second AS (
        INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", target, acked, ahead, windows)
        SELECT id, subscription, shard, epoch, token, "position", target, acked, ahead, windows FROM granted WHERE segment = 2
    )
    SELECT coalesce(array_agg(at), '{}') INTO moved FROM granted;
    fenced := ARRAY(SELECT generate_subscripts(subscriptions, 1) EXCEPT SELECT unnest(moved)
                    EXCEPT SELECT unnest(busy || broken || stale) ORDER BY 1);
    IF cardinality("of") > 0 THEN
        PERFORM dtm.settle(moved, subscriptions, "of", seqs, what, attempts, next_in, histories);
    END IF;
END
$$;

-- The cursors that settlements go with whose event should be in the log and is not: somebody has truncated it by hand.
-- enable_seqscan: a plan that was made while the log was empty must not read all of it a moment later.
CREATE FUNCTION dtm.without_event("of" int[], seqs bigint[], what text[]) RETURNS int[]
LANGUAGE sql STABLE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
RETURN ARRAY(
    SELECT DISTINCT a."of" FROM unnest(without_event."of", without_event.seqs, without_event.what) AS a ("of", seq, what)
    WHERE a.what IN ('park', 'bury') AND NOT EXISTS (SELECT FROM dtm.log l WHERE l.seq = a.seq));

-- Settles events of those cursors that were moved.
--   park   copies an event from the log, to be tried again
--   bury   copies it from the log, as a dead letter
--   again  says of a parked one when it is tried next
--   die    makes a dead letter of a parked one
--   done   forgets a parked one
-- What is no longer parked was discarded meanwhile, or its subscription rewound: nothing is left to be done for it. What is
-- parked already, because its shard has begun anew before it, stays as it is. enable_seqscan: as above.
CREATE FUNCTION dtm.settle(
    granted int[], subscriptions bigint[],
    "of" int[], seqs bigint[], what text[], attempts int[], next_in float8[], histories jsonb[]) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    IF NOT what <@ ARRAY['park', 'bury', 'again', 'die', 'done'] THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'malformed report of a relay',
            DETAIL = format('What became of events is %s.', what),
            HINT = 'Use a relay of a matching version.';
    END IF;
    IF what && ARRAY['park', 'bury'] THEN
        WITH fresh AS MATERIALIZED (
            SELECT nextval('dtm.retry_seq') AS n, subscriptions[a."of"] AS subscription, a.seq, a.what, a.attempts,
                   clock_timestamp() + make_interval(secs => a.next_in) AS next_at, coalesce(a.history, '[]') AS history,
                   l.era, l.published_at, l.id, l.topic, l.key, l.content_type, l.headers, l.payload
            FROM unnest(settle."of", seqs, settle.what, settle.attempts, settle.next_in, histories)
                 WITH ORDINALITY AS a ("of", seq, what, attempts, next_in, history, at)
            CROSS JOIN LATERAL (SELECT * FROM dtm.log e WHERE e.seq = a.seq LIMIT 1) l
            WHERE a."of" = ANY (granted) AND a.what IN ('park', 'bury')
            ORDER BY a.at
        ), parked AS (
            INSERT INTO dtm.retry (subscription, seq, n, era, published_at, id, topic, key, content_type, headers, payload,
                                   attempts, next_at, history)
            SELECT f.subscription, f.seq, f.n, f.era, f.published_at, f.id, f.topic, f.key, f.content_type, f.headers, f.payload,
                   f.attempts, f.next_at, f.history
            FROM fresh f WHERE f.what = 'park'
            ON CONFLICT DO NOTHING
        )
        INSERT INTO dtm.dead_letter AS d (subscription, seq, n, era, published_at, id, topic, key, content_type, headers,
                                          payload, attempts, history)
        SELECT f.subscription, f.seq, f.n, f.era, f.published_at, f.id, f.topic, f.key, f.content_type, f.headers,
               f.payload, f.attempts, f.history
        FROM fresh f WHERE f.what = 'bury'
        ON CONFLICT (subscription, seq) DO UPDATE
        SET attempts = excluded.attempts, history = d.history || excluded.history, died_at = excluded.died_at;
    END IF;
    IF what && ARRAY['again'] THEN
        UPDATE dtm.retry r
        SET attempts = a.attempts, next_at = clock_timestamp() + make_interval(secs => a.next_in),
            history = r.history || coalesce(a.history, '[]')
        FROM unnest(settle."of", seqs, settle.what, settle.attempts, settle.next_in, histories) AS a ("of", seq, what, attempts, next_in, history)
        WHERE a."of" = ANY (granted) AND a.what = 'again' AND r.subscription = subscriptions[a."of"] AND r.seq = a.seq;
    END IF;
    IF what && ARRAY['die'] THEN
        WITH dying AS (
            DELETE FROM dtm.retry r
            USING unnest(settle."of", seqs, settle.what, settle.attempts, histories) AS a ("of", seq, what, attempts, history)
            WHERE a."of" = ANY (granted) AND a.what = 'die' AND r.subscription = subscriptions[a."of"] AND r.seq = a.seq
            RETURNING r.*, a.attempts AS attempts_made, r.history || coalesce(a.history, '[]') AS whole_history
        )
        INSERT INTO dtm.dead_letter AS d (subscription, seq, n, era, published_at, id, topic, key, content_type, headers,
                                          payload, attempts, history, parked_at)
        SELECT g.subscription, g.seq, g.n, g.era, g.published_at, g.id, g.topic, g.key, g.content_type, g.headers,
               g.payload, g.attempts_made, g.whole_history, g.parked_at
        FROM dying g
        ON CONFLICT (subscription, seq) DO UPDATE
        SET attempts = excluded.attempts, history = d.history || excluded.history, died_at = excluded.died_at;
    END IF;
    IF what && ARRAY['done'] THEN
        DELETE FROM dtm.retry r
        USING unnest(settle."of", seqs, settle.what) AS a ("of", seq, what)
        WHERE a."of" = ANY (granted) AND a.what = 'done' AND r.subscription = subscriptions[a."of"] AND r.seq = a.seq;
    END IF;
END
$$;

-- What is parked of a shard, in the order in which it is delivered; and, where a dead letter blocks its key, that (blocks).
-- next_in: seconds until it is tried; null: it waits behind what comes before it of its key.
CREATE FUNCTION dtm.relay_parked(subscription bigint, shard int, shards int)
RETURNS TABLE (seq bigint, key text, bytes int, attempts int, next_in float8, blocks boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH parked AS (
        SELECT r.n, r.seq, r.key, r.topic, r.headers, r.payload, r.attempts, r.next_at, false AS blocks
        FROM dtm.retry r WHERE r.subscription = relay_parked.subscription
        UNION ALL
        -- The first of a key: when that is gone, all is read anew.
        (SELECT DISTINCT ON (d.key) d.n, d.seq, d.key, d.topic, d.headers, d.payload, d.attempts, NULL::timestamptz, true
         FROM dtm.dead_letter d JOIN dtm.subscription s ON s.id = d.subscription
         WHERE d.subscription = relay_parked.subscription AND d.key IS NOT NULL AND s.options ->> 'on_dead' = 'block'
         ORDER BY d.key, d.n)
    )
    SELECT p.seq, p.key,
           octet_length(p.topic) + coalesce(octet_length(p.key), 0) + coalesce(octet_length(p.headers), 0)
           + coalesce(octet_length(p.payload), 0),
           p.attempts,
           CASE WHEN p.blocks THEN NULL
                WHEN p.next_at IS NOT NULL THEN greatest(extract(epoch FROM p.next_at - clock_timestamp()), 0)
                -- Nothing is before it any more.
                WHEN p.key IS NULL OR row_number() OVER (PARTITION BY p.key ORDER BY p.n) = 1 THEN 0 END::float8,
           p.blocks
    FROM parked p
    WHERE dtm.shard_of(p.key, p.seq, relay_parked.shards) = relay_parked.shard
    ORDER BY p.n;
END;

-- Parked events, packed as a page, in the order in which they are delivered. Those that are gone are left out.
CREATE FUNCTION dtm.relay_parked_events(subscription bigint, seqs bigint[]) RETURNS bytea
LANGUAGE c STABLE STRICT SET search_path = pg_catalog, pg_temp AS 'MODULE_PATHNAME', 'relay_parked_events_wrapper';

-- Ends a subscription whose endpoint is gone for good, until dtm.resume. False: it is not this relay's any more, it is not active,
-- or a transaction is changing it; then relay_assign tells, and the relay may ask again.
CREATE FUNCTION dtm.relay_disable(subscription bigint, epoch bigint, token bigint, shard int, reason text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- It does not wait for a user's transaction: other relays would wait for its lock on the leases.
    PERFORM FROM dtm.subscription s WHERE s.id = relay_disable.subscription FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE;
    -- The revision: if it is resumed before the relay looks again, that must see that something has happened.
    UPDATE dtm.subscription s SET state = 'disabled', reason = relay_disable.reason, revision = s.revision + 1
    WHERE s.id = relay_disable.subscription AND s.epoch = relay_disable.epoch AND s.state = 'active'
      AND relay_disable.token = (SELECT l.token FROM dtm.lease_log l
                                 WHERE l.subscription = s.id AND l.shard = relay_disable.shard ORDER BY l.token DESC LIMIT 1);
    RETURN FOUND;
END
$$;
