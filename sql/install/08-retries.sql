-- SPDX-License-Identifier: PostgreSQL
-- Events that could not be delivered: those that are tried again, and those that are given up. Each is a full copy, which
-- holds no segment of the log. Nothing is written here for an event that is delivered at once.

CREATE SEQUENCE dtm.retry_seq AS bigint;
CREATE TABLE dtm.retry (
    subscription bigint      NOT NULL,
    seq          bigint      NOT NULL,        -- of the log: an event is here once for each subscription
    n            bigint      NOT NULL DEFAULT pg_catalog.nextval('dtm.retry_seq'), -- the order of delivery within a key
    era          int         NOT NULL,
    published_at timestamptz NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,
    headers      text,
    payload      bytea,
    attempts     int         NOT NULL,
    next_at      timestamptz,                 -- null: waits behind an earlier event of its key
    history      jsonb       NOT NULL DEFAULT '[]', -- an object for each attempt: at, status, error, body
    parked_at    timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (subscription, seq)
);

CREATE TABLE dtm.dead_letter (
    subscription bigint      NOT NULL,
    seq          bigint      NOT NULL,
    n            bigint      NOT NULL DEFAULT pg_catalog.nextval('dtm.retry_seq'), -- kept: redriven, it takes its old place
    era          int         NOT NULL,
    published_at timestamptz NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,
    headers      text,
    payload      bytea,
    attempts     int         NOT NULL,
    history      jsonb       NOT NULL DEFAULT '[]',
    parked_at    timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    died_at      timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (subscription, seq)
);
CREATE INDEX dead_letter_oldest ON dtm.dead_letter (subscription, n);

SELECT pg_catalog.pg_extension_config_dump('dtm.retry_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.retry', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.dead_letter', '');

-- Which shard an event belongs to: by its key, or by its number where it has none (core/src/shard.rs). Pages are read by the
-- same code.
CREATE FUNCTION dtm.shard_of(key text, seq bigint, shards int) RETURNS int
LANGUAGE c IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'shard_of_wrapper';

-- What a relay reports about failures and what a user does about them must not meet half way. Users lock a subscription to its
-- relays' reports until their transaction ends; relays do not wait, but report again later. The lock is that of its row: users
-- have it as for a deletion, relays share it as a foreign key does, which lets other changes of the row pass. Null: there is no
-- such subscription.
CREATE FUNCTION dtm.lock_settlements(subscription_name text) RETURNS bigint
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.id FROM dtm.subscription s WHERE s.name = subscription_name FOR UPDATE;
END;
-- One that is gone is nobody's.
CREATE FUNCTION dtm.try_settlements(subscription bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM FROM dtm.subscription s WHERE s.id = try_settlements.subscription FOR KEY SHARE SKIP LOCKED;
    RETURN FOUND OR NOT EXISTS (SELECT FROM dtm.subscription s WHERE s.id = try_settlements.subscription);
END
$$;
