-- SPDX-License-Identifier: PostgreSQL
-- Who delivers what. A relay says once a second that it lives (one row for all that it owns), and appends a lease when it
-- takes a subscription over. A lease holds while its relay's last heartbeat has not expired, by the database's clock. The
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
    expires_at timestamptz NOT NULL
);
CREATE INDEX heartbeat_log_1_latest ON dtm.heartbeat_log_1 (relay, id);
CREATE TABLE dtm.heartbeat_log_2 (LIKE dtm.heartbeat_log_1 INCLUDING ALL);

CREATE VIEW dtm.lease_log AS SELECT * FROM dtm.lease_log_1 UNION ALL SELECT * FROM dtm.lease_log_2;
CREATE VIEW dtm.heartbeat_log AS SELECT * FROM dtm.heartbeat_log_1 UNION ALL SELECT * FROM dtm.heartbeat_log_2;

-- The newest lease of each subscription and whether its relay lives.
CREATE VIEW dtm.owners AS
SELECT s.id AS subscription, lease.shard, lease.token, lease.relay, heartbeat.name,
       coalesce(heartbeat.expires_at > pg_catalog.clock_timestamp(), false) AS alive
FROM dtm.subscription s
LEFT JOIN LATERAL (
    SELECT l.shard, l.token, l.relay FROM dtm.lease_log l
    WHERE l.subscription = s.id AND l.shard = 0 ORDER BY l.token DESC LIMIT 1) lease ON true
LEFT JOIN LATERAL (
    SELECT h.name, h.expires_at FROM dtm.heartbeat_log h
    WHERE h.relay = lease.relay ORDER BY h.id DESC LIMIT 1) heartbeat ON true;

CREATE FUNCTION dtm.heartbeat(relay uuid, relay_name text, expires_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (SELECT control_segment FROM dtm.installation) = 1 THEN
        INSERT INTO dtm.heartbeat_log_1 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at);
    ELSE
        INSERT INTO dtm.heartbeat_log_2 VALUES (nextval('dtm.heartbeat_id_seq'), relay, relay_name, expires_at);
    END IF;
END
$$;

-- Renews all leases of a relay, takes those that are free, and answers what it now has to deliver.
CREATE FUNCTION dtm.relay_lease(relay uuid, relay_name text, lease_seconds float8)
RETURNS TABLE (subscription bigint, shard int, name text, topics text[], destination text, options jsonb,
               since timestamptz, epoch bigint, token bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    segment smallint := (SELECT control_segment FROM dtm.installation);
BEGIN
    PERFORM dtm.heartbeat(relay_lease.relay, relay_name, clock_timestamp() + make_interval(secs => lease_seconds));
    IF EXISTS (SELECT FROM dtm.owners WHERE NOT alive) THEN
        -- Waits for cursors on their way: what an owner wrote is read by the next, what it writes later is refused.
        LOCK TABLE dtm.lease_log_1 IN EXCLUSIVE MODE;
        INSERT INTO dtm.lease_log_1 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND segment = 1;
        INSERT INTO dtm.lease_log_2 (token, subscription, shard, relay)
        SELECT nextval('dtm.lease_token_seq'), o.subscription, 0, relay_lease.relay
        FROM dtm.owners o WHERE NOT o.alive AND segment = 2;
    END IF;
    RETURN QUERY
    SELECT s.id, o.shard, s.name, s.topics, s.destination, s.options, s.since, s.epoch, o.token
    FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
    WHERE o.relay = relay_lease.relay AND s.state = 'active';
END
$$;

-- Gives up all leases of a relay at once.
CREATE FUNCTION dtm.relay_release(relay uuid) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT dtm.heartbeat(relay, 'released', '-infinity');
END;
