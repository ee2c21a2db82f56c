-- SPDX-License-Identifier: PostgreSQL
-- The log: a ring of segments, appended to and truncated, never updated. Publishers write to the current segment
-- (dtm.installation.log_segment); readers merge all of them by seq. The extension's library knows the order of the columns.

CREATE SEQUENCE dtm.event_seq AS bigint CACHE 1;  -- CACHE 1: a session must not hold back numbers it was given

CREATE TABLE dtm.log_1 (
    seq          bigint      PRIMARY KEY,
    xid          xid8        NOT NULL,  -- the top-level transaction
    published_at timestamptz NOT NULL,
    era          int         NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,                  -- null: application/json, made by dtm.publish from jsonb
    headers      text,                  -- a JSON object of strings
    payload      bytea                  -- the bytes that go over the wire; null: no body
) USING heap;
CREATE TABLE dtm.log_2 (LIKE dtm.log_1 INCLUDING ALL) USING heap;
CREATE TABLE dtm.log_3 (LIKE dtm.log_1 INCLUDING ALL) USING heap;

CREATE VIEW dtm.log AS
SELECT * FROM dtm.log_1 UNION ALL SELECT * FROM dtm.log_2 UNION ALL SELECT * FROM dtm.log_3;

-- Events that are due later wait here and are moved into the log when they are.
CREATE SEQUENCE dtm.delayed_seq AS bigint CACHE 1;
CREATE TABLE dtm.delayed (
    due          timestamptz NOT NULL,
    n            bigint      NOT NULL,
    id           uuid        NOT NULL,
    topic        text        NOT NULL,
    key          text,
    content_type text,
    headers      text,
    payload      bytea,
    PRIMARY KEY (due, n)
) USING heap;

-- Ids that publishers gave: a second publish of one raises 23505 for as long as it is kept.
CREATE TABLE dtm.given_ids (
    id       uuid        PRIMARY KEY,
    given_at timestamptz NOT NULL
) USING heap;
CREATE INDEX given_ids_given_at ON dtm.given_ids (given_at);

SELECT pg_catalog.pg_extension_config_dump('dtm.event_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.log_1', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.log_2', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.log_3', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.delayed_seq', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.delayed', '');
SELECT pg_catalog.pg_extension_config_dump('dtm.given_ids', '');
