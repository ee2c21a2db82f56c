-- SPDX-License-Identifier: PostgreSQL
\echo Use "CREATE EXTENSION pg_dtm" to load this file. \quit

-- Fails if somebody made the schema first: what stands in it could take over calls.
CREATE SCHEMA dtm;

-- One row about this very database. It is not dumped: a restored database makes a row of its own, and with it a new era,
-- for stored transaction ids mean nothing there.
CREATE TABLE dtm.installation (
    only_row        boolean  PRIMARY KEY DEFAULT true CHECK (only_row),
    era             int      NOT NULL,
    database        oid      NOT NULL,            -- another oid than ours: the database is a copy
    environment     text,                         -- recorded by the first relay that runs
    log_segment     smallint NOT NULL DEFAULT 1 CHECK (log_segment BETWEEN 1 AND 3),
    control_segment smallint NOT NULL DEFAULT 1 CHECK (control_segment BETWEEN 1 AND 2)
);

INSERT INTO dtm.installation (era, database)
SELECT ('x' || pg_catalog.left(pg_catalog.md5(pg_catalog.gen_random_uuid()::text), 8))::bit(32)::int, oid
FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database();

-- How far the turning over of the log and of control data is (13-rotation.sql). Whoever writes control data holds a lock on this
-- table, so that the segment does not change under it. Not dumped: what is restored begins anew.
CREATE TABLE dtm.rotation (
    only_row        boolean  PRIMARY KEY DEFAULT true CHECK (only_row),
    log_retired     bigint[] NOT NULL DEFAULT '{NULL,NULL,NULL}', -- by segment: the transaction that found it needed by nobody
    log_starts      bigint[] NOT NULL DEFAULT '{0,0,0}', -- by segment: dtm.start_seq at that time
    log_held_up     timestamptz[] NOT NULL DEFAULT '{NULL,NULL,NULL}', -- by segment: when somebody was in the way
    control_retired bigint,                   -- the transaction that copied what is needed out of the segment that is not written
    control_held_up timestamptz
);
INSERT INTO dtm.rotation DEFAULT VALUES;

-- How often subscriptions were set to a place, be it by transactions that have not ended: what is needed of the log may have
-- become more.
CREATE SEQUENCE dtm.start_seq AS bigint CACHE 1;

-- What one relay does at a time: it locks the row. No advisory locks: every role of the database could take those.
CREATE TABLE dtm.turn (name text PRIMARY KEY);
INSERT INTO dtm.turn VALUES ('rotation'), ('delayed');

-- False: another relay is at it.
CREATE FUNCTION dtm.take_turn(name text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM FROM dtm.turn t WHERE t.name = take_turn.name FOR UPDATE SKIP LOCKED;
    RETURN FOUND;
END
$$;

-- The eras that rows of the log were written in, by age. The first relay that meets a new one adds it. An ordinal may be there
-- twice for a while: a relay may meet this database before its older eras are restored.
CREATE TABLE dtm.eras (
    era      int         PRIMARY KEY,
    ordinal  int         NOT NULL,
    began_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
SELECT pg_catalog.pg_extension_config_dump('dtm.eras', '');

-- Publishers keep what they read of dtm.installation; this makes them read it anew.
CREATE FUNCTION dtm.installation_changed() RETURNS void
LANGUAGE c AS 'MODULE_PATHNAME', 'installation_changed_wrapper';

-- The protocols between relay and extension that this version speaks.
CREATE FUNCTION dtm.library_protocol() RETURNS int
LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'library_protocol_wrapper';
CREATE FUNCTION dtm.protocol(OUT "least" int, OUT "greatest" int)
LANGUAGE sql STABLE PARALLEL SAFE AS 'SELECT 1, dtm.library_protocol()';
