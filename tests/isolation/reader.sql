-- SPDX-License-Identifier: PostgreSQL
-- A reader of the log in SQL, for specs: it keeps its position in a table and answers the payloads of what is new to it.

CREATE EXTENSION pg_dtm;

CREATE TABLE reader (name text PRIMARY KEY, "position" text NOT NULL);

CREATE FUNCTION read_int(bytes bytea, at int) RETURNS int LANGUAGE sql IMMUTABLE
RETURN ('x' || encode(substring(bytes FROM at FOR 4), 'hex'))::bit(32)::int;

-- The payloads of a page (core/src/page.rs).
CREATE FUNCTION payloads(page bytea) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    at int := 15;
    length int;
    field bytea;
BEGIN
    FOR event IN 1..read_int(page, 11) LOOP
        at := at + 32;
        FOR i IN 1..5 LOOP
            length := read_int(page, at);
            at := at + 4;
            field := CASE WHEN length >= 0 THEN substring(page FROM at FOR length) END;
            at := at + greatest(length, 0);
        END LOOP;
        RETURN NEXT coalesce(convert_from(field, 'UTF8'), 'no body');
    END LOOP;
END
$$;

-- Reads up to the head.
CREATE FUNCTION read_log(reader_name text DEFAULT 'r') RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    known text := (SELECT r."position" FROM reader r WHERE r.name = reader_name);
    head text := dtm.relay_poll(known);
    result text;
BEGIN
    IF head IS NULL THEN
        RETURN 'nothing new';
    END IF;
    SELECT string_agg(p, ' ') INTO result FROM payloads(dtm.relay_page(known, head, 0, ARRAY['>'], NULL, 1000, 1000000)) p;
    UPDATE reader r SET "position" = head WHERE r.name = reader_name;
    RETURN coalesce(result, 'no events');
END
$$;

-- Begins to read where a subscription does.
CREATE FUNCTION begin_reading(subscription_name text, reader_name text DEFAULT 'r') RETURNS void LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO reader
    SELECT reader_name, c."position"
    FROM dtm.subscription s, dtm.relay_cursor(s.id, 0, s.epoch) c WHERE s.name = subscription_name;
END;

SELECT dtm.subscribe('all', '>', 'http://127.0.0.1:9/');
SELECT begin_reading('all');
