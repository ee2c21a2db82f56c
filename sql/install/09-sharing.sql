-- SPDX-License-Identifier: PostgreSQL
-- Any number of relays share what is to be delivered: units, which are subscriptions or shards of them, as evenly as it goes.

-- The relays whose newest heartbeat holds. Who wrote any that still holds is found by its index (the time is a subquery for
-- that), however many there are that no longer do.
CREATE VIEW dtm.live_relays AS
SELECT newest.relay, newest.name, newest.shares
FROM (SELECT DISTINCT h.relay FROM dtm.heartbeat_log h WHERE h.expires_at > (SELECT pg_catalog.clock_timestamp())) lately
CROSS JOIN LATERAL (
    SELECT h.relay, h.name, h.shares, h.expires_at FROM dtm.heartbeat_log h
    WHERE h.relay = lately.relay ORDER BY h.id DESC LIMIT 1) newest
WHERE newest.expires_at > pg_catalog.clock_timestamp();

-- What each relay that lives owns and should own, and how many units nobody owns. All relays find the same: of u units r relays
-- get u / r each, and the first u % r of them, those that own the most, one more: nothing moves that need not. Units of a
-- relay of version 0.1 are its own until it ends.
CREATE VIEW dtm.shares AS
WITH unit AS (
    SELECT o.relay, o.alive
    FROM dtm.owners o
    WHERE o.active AND (o.shares OR NOT o.alive)
), total AS (
    SELECT count(*) AS units, count(*) FILTER (WHERE NOT u.alive) AS free FROM unit u
), owner AS (
    SELECT u.relay, count(*) AS owned FROM unit u WHERE u.alive GROUP BY u.relay
), holder AS (
    SELECT l.relay, coalesce(o.owned, 0) AS owned
    FROM dtm.live_relays l LEFT JOIN owner o ON o.relay = l.relay WHERE l.shares
)
SELECT h.relay, h.owned, t.free,
       t.units / count(*) OVER ()
       + CASE WHEN row_number() OVER (ORDER BY h.owned DESC, h.relay) <= t.units % count(*) OVER () THEN 1 ELSE 0 END AS target
FROM holder h CROSS JOIN total t;

-- Renews all leases of a relay, takes what is free up to its share, and answers what it now has to deliver. What it owns
-- beyond its share comes with release: it should end that in peace and give it back. jit: it is called every second, and is
-- done before a compiler would be.
CREATE FUNCTION dtm.relay_assign(relay uuid, relay_name text, lease_seconds float8)
RETURNS TABLE (subscription bigint, shard int, shards int, name text, topics text[], destination text, options jsonb,
               since timestamptz, epoch bigint, revision bigint, token bigint, release boolean)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
    lacking bigint;  -- how many units it may take; below 0: how many it should give
BEGIN
    PERFORM dtm.heartbeat(relay_assign.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds), true);
    IF NOT EXISTS (SELECT FROM dtm.subscription s WHERE s.name = 'dtm.transactions') AND EXISTS (SELECT FROM dtm.transaction)
       AND NOT dtm.is_restoring() THEN
        PERFORM dtm.start_coordinator();
    END IF;
    SELECT least(s.target - s.owned, s.free) INTO lacking FROM dtm.shares s WHERE s.relay = relay_assign.relay;
    IF lacking > 0 THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused. And for
        -- other relays that take: then it counts anew.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        segment := dtm.control_segment();
        SELECT least(s.target - s.owned, s.free) INTO lacking FROM dtm.shares s WHERE s.relay = relay_assign.relay;
        WITH taken AS MATERIALIZED (
            SELECT o.subscription, o.shard
            FROM dtm.owners o
            WHERE NOT o.alive AND o.active
            ORDER BY o.subscription, o.shard LIMIT greatest(lacking, 0)
        ), first AS (
            INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
            SELECT nextval('dtm.lease_token_seq'), t.subscription, t.shard, relay_assign.relay FROM taken t WHERE segment = 1
        )
        INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), t.subscription, t.shard, relay_assign.relay FROM taken t WHERE segment = 2;
    END IF;
    RETURN QUERY
    SELECT s.id, o.shard, o.shards, s.name, s.topics, s.destination, s.options, s.since, s.epoch, s.revision, o.token,
           coalesce(row_number() OVER (ORDER BY o.token DESC) <= -lacking, false)
    FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
    WHERE o.relay = relay_assign.relay AND o.active
    ORDER BY s.id, o.shard;
    -- Last, for it takes locks that others wait for.
    PERFORM dtm.meet_restored();
END
$$;

-- A relay begins a session: all that it owns gets new leases. What an earlier session of it has sent and the server has not
-- come to yet is refused; what was stored before is read.
CREATE FUNCTION dtm.relay_begin(relay uuid) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
BEGIN
    LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
    segment := dtm.control_segment();
    WITH own AS MATERIALIZED (
        SELECT o.subscription, o.shard FROM dtm.owners o WHERE o.relay = relay_begin.relay
    ), first AS (
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, o.shard, relay_begin.relay FROM own o WHERE segment = 1
    )
    INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
    SELECT nextval('dtm.lease_token_seq'), o.subscription, o.shard, relay_begin.relay FROM own o WHERE segment = 2;
END
$$;

-- Gives units back, those whose newest lease is still the given one: another relay may take them at once.
CREATE FUNCTION dtm.relay_give(relay uuid, subscriptions bigint[], shards int[], tokens bigint[]) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
BEGIN
    IF cardinality(tokens) = 0 THEN
        RETURN;
    END IF;
    LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
    segment := dtm.control_segment();
    WITH given AS MATERIALIZED (
        SELECT g.subscription, g.shard
        FROM unnest(subscriptions, shards, tokens) AS g (subscription, shard, token)
        CROSS JOIN LATERAL (
            SELECT l.token, l.relay FROM dtm.lease_log l
            WHERE l.subscription = g.subscription AND l.shard = g.shard ORDER BY l.token DESC LIMIT 1) newest
        WHERE newest.token = g.token AND newest.relay = relay_give.relay
    ), first AS (
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), g.subscription, g.shard, nobody FROM given g WHERE segment = 1
    )
    INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
    SELECT nextval('dtm.lease_token_seq'), g.subscription, g.shard, nobody FROM given g WHERE segment = 2;
END
$$;

-- Gives a subscription another number of shards, if it has another by now. Keys change their shards, so each of the new ones
-- begins where the slowest of the old ones stood: what others had delivered past it is delivered again. Where all stood in one
-- window, as a single one does, the window goes on.
CREATE FUNCTION dtm.reshard(subscription_name text, new_options jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    subscription_id bigint;
    old dtm.subscription;
    old_shards int;
    new_shards int := coalesce((new_options ->> 'shards')::int, 1);
    segment smallint := dtm.control_segment();
    start record;
BEGIN
    -- Not FOR UPDATE: relays go on reporting, unless the number of shards changes.
    SELECT * INTO old FROM dtm.subscription s WHERE s.name = subscription_name FOR NO KEY UPDATE;
    old_shards := coalesce((old.options ->> 'shards')::int, 1);
    IF old.id IS NULL OR old_shards = new_shards THEN
        RETURN;
    END IF;
    subscription_id := dtm.lock_settlements(subscription_name);
    SELECT count(*) AS cursors, (array_agg(c."position" ORDER BY e.ordinal, dtm.position_order(p.body)))[1] AS "position",
           count(DISTINCT (c."position", c.target)) = 1 AS together,
           min(c.target) AS target, min(c.acked) AS acked, min(c.ahead) AS ahead
    INTO start
    FROM generate_series(0, old_shards - 1) AS unit (shard)
    CROSS JOIN LATERAL (
        SELECT l."position", l.target, l.acked, l.ahead, l.segment FROM dtm.cursor_log l
        WHERE l.subscription = subscription_id AND l.shard = unit.shard AND l.epoch = old.epoch
        ORDER BY l.id DESC LIMIT 1) c
    JOIN dtm.position_log p ON p.id = c."position" AND p.segment = c.segment
    LEFT JOIN dtm.eras e ON e.era = p.era;
    IF start.cursors <> old_shards THEN
        RAISE EXCEPTION USING
            ERRCODE = 'data_corrupted',
            MESSAGE = 'a shard of the subscription has no cursor',
            DETAIL = format('%s of %s have one: where the others stood is not known.', start.cursors, old_shards),
            HINT = 'Set its cursor with dtm.rewind, then subscribe again.';
    END IF;
    UPDATE dtm.subscription s SET epoch = s.epoch + 1, revision = s.revision + 1 WHERE s.id = subscription_id;
    PERFORM nextval('dtm.start_seq');  -- an old snapshot finds cursors that have moved on since
    PERFORM dtm.keep_positions(ARRAY[start."position", start.target]);
    WITH cursor AS (
        SELECT nextval('dtm.cursor_id_seq') AS id, shard, start."position",
               CASE WHEN start.together THEN start.target END AS target,
               CASE WHEN start.together THEN start.acked ELSE 0 END AS acked,
               CASE WHEN old_shards = 1 THEN start.ahead END AS ahead
        FROM generate_series(0, new_shards - 1) AS shard
    ), first AS (
        INSERT INTO dtm.cursor_log_1 (id, subscription, shard, epoch, token, "position", target, acked, ahead)
        SELECT c.id, subscription_id, c.shard, old.epoch + 1, 0, c."position", c.target, c.acked, c.ahead
        FROM cursor c WHERE segment = 1
    )
    INSERT INTO dtm.cursor_log_2 (id, subscription, shard, epoch, token, "position", target, acked, ahead)
    SELECT c.id, subscription_id, c.shard, old.epoch + 1, 0, c."position", c.target, c.acked, c.ahead
    FROM cursor c WHERE segment = 2;
END
$$;
