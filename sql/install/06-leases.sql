-- SPDX-License-Identifier: PostgreSQL
-- Who delivers what. A relay says once a second that it lives (one row for all that it owns), and appends a lease when it
-- takes a subscription, or a shard of one, over. A lease holds while its relay's last heartbeat has not expired, by the database's clock. The
-- token fences: a cursor moves only under the newest lease.

CREATE SEQUENCE dtm.lease_token_seq AS bigint;
CREATE TABLE dtm.lease_log_1 (
    token        bigint      PRIMARY KEY,
    subscription bigint      NOT NULL,
    shard        int         NOT NULL,
    relay        uuid        NOT NULL,
    taken_at     timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE INDEX lease_log_1_latest ON dtm.lease_log_1 (subscription, shard, token);
CREATE TABLE dtm.lease_log_2 (LIKE dtm.lease_log_1 INCLUDING ALL);

CREATE SEQUENCE dtm.heartbeat_id_seq AS bigint;
CREATE TABLE dtm.heartbeat_log_1 (
    id         bigint      PRIMARY KEY,
    relay      uuid        NOT NULL,
    name       text        NOT NULL,
    expires_at timestamptz NOT NULL,
    shares     boolean     NOT NULL DEFAULT false  -- it leaves others their share; false: a relay of version 0.1
);
CREATE INDEX heartbeat_log_1_latest ON dtm.heartbeat_log_1 (relay, id);
CREATE INDEX heartbeat_log_1_expires ON dtm.heartbeat_log_1 (expires_at);
CREATE TABLE dtm.heartbeat_log_2 (LIKE dtm.heartbeat_log_1 INCLUDING ALL);

CREATE VIEW dtm.lease_log AS SELECT * FROM dtm.lease_log_1 UNION ALL SELECT * FROM dtm.lease_log_2;
CREATE VIEW dtm.heartbeat_log AS SELECT * FROM dtm.heartbeat_log_1 UNION ALL SELECT * FROM dtm.heartbeat_log_2;

-- The newest lease of each subscription, or of each of its shards, and whether its relay lives. (Shards are counted so that the
-- planner expects one: most have no more, and of generate_series it expects a thousand.)
CREATE VIEW dtm.owners AS
SELECT s.id AS subscription, unit.shard, lease.token, lease.relay, heartbeat.name,
       coalesce(heartbeat.expires_at > pg_catalog.clock_timestamp(), false) AS alive,
       coalesce((s.options ->> 'shards')::int, 1) AS shards, coalesce(heartbeat.shares, false) AS shares,
       s.state = 'active' AND s.era = (SELECT i.era FROM dtm.installation i) AS active  -- not one of a restore that nobody has met
FROM dtm.subscription s
CROSS JOIN LATERAL (
    SELECT (n.th - 1)::int AS shard
    FROM unnest(array_fill(true, ARRAY[coalesce((s.options ->> 'shards')::int, 1)])) WITH ORDINALITY AS n (is_there, th)
    LIMIT coalesce((s.options ->> 'shards')::int, 1)) unit
LEFT JOIN LATERAL (
    SELECT l.token, l.relay FROM dtm.lease_log l
    WHERE l.subscription = s.id AND l.shard = unit.shard ORDER BY l.token DESC LIMIT 1) lease ON true
LEFT JOIN LATERAL (
    SELECT h.name, h.expires_at, h.shares FROM dtm.heartbeat_log h
    WHERE h.relay = lease.relay ORDER BY h.id DESC LIMIT 1) heartbeat ON true;

CREATE FUNCTION dtm.heartbeat(relay uuid, relay_name text, expires_at timestamptz, shares boolean) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF dtm.control_segment() = 1 THEN
        INSERT INTO dtm.heartbeat_log_1 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at, shares);
    ELSE
        INSERT INTO dtm.heartbeat_log_2 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at, shares);
    END IF;
END
$$;

CREATE FUNCTION dtm.heartbeat(relay uuid, relay_name text, expires_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.heartbeat(relay, relay_name, expires_at, false);
END
$$;

-- For relays of version 0.1: renews all leases of a relay, takes those that are free, and answers what it now has to deliver.
-- They know of no shards: a subscription that has some is not for them.
CREATE FUNCTION dtm.relay_lease(relay uuid, relay_name text, lease_seconds float8)
RETURNS TABLE (subscription bigint, shard int, name text, topics text[], destination text, options jsonb,
               since timestamptz, epoch bigint, token bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
#variable_conflict use_column
DECLARE
    segment smallint;
BEGIN
    PERFORM dtm.heartbeat(relay_lease.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds));
    IF EXISTS (SELECT FROM dtm.owners o WHERE NOT o.alive AND o.shards = 1 AND o.active) THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        segment := dtm.control_segment();
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND o.shards = 1 AND o.active AND segment = 1;
        INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND o.shards = 1 AND o.active AND segment = 2;
    END IF;
    RETURN QUERY
    SELECT s.id, o.shard, s.name, s.topics, s.destination, s.options, s.since, s.epoch, o.token
    FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
    WHERE o.relay = relay_lease.relay AND o.shards = 1 AND o.active;
    -- Last, for it takes locks that others wait for.
    PERFORM dtm.meet_restored();
END
$$;

-- Gives up all leases of a relay at once.
CREATE FUNCTION dtm.relay_release(relay uuid) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT dtm.heartbeat(relay, 'released', '-infinity');
END;
