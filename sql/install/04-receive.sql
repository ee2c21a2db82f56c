-- SPDX-License-Identifier: PostgreSQL
-- The receiving side's inbox: at least once on the wire, once in effect.

CREATE TABLE dtm.receipts (
    consumer    text        NOT NULL CHECK (consumer <> '' AND pg_catalog.octet_length(consumer) <= 255),
    id          uuid        NOT NULL,
    received_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (consumer, id)
);
CREATE INDEX receipts_received_at ON dtm.receipts (received_at);
SELECT pg_catalog.pg_extension_config_dump('dtm.receipts', '');

-- SECURITY DEFINER: a consumer writes its receipt without rights on the table.
CREATE FUNCTION dtm.receive(consumer text, id uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF consumer IS NULL OR consumer = '' OR octet_length(consumer) > 255 OR id IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'a receipt needs a consumer and the id of an event',
            DETAIL = format('The consumer is %s, the id is %s.', coalesce(quote_literal(left(consumer, 100)), 'null'), coalesce(quote_literal(id), 'null')),
            HINT = 'Name the consumer in 1 to 255 bytes, and pass the id that came with the event (header ce-id).';
    END IF;
    INSERT INTO dtm.receipts (consumer, id) VALUES (receive.consumer, receive.id) ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION dtm.receive(text, uuid) IS
    'True: the event is new to this consumer, do the work in this transaction. False: the work was done before.';

-- A bounded part of what is older than its setting says; 0 when there was nothing. Relays call it; a database that only
-- receives has it called now and then by whatever schedules jobs there.
CREATE FUNCTION dtm.purge(max_rows int DEFAULT 10000) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    purged bigint;
    receipts bigint;
BEGIN
    IF max_rows IS NULL OR max_rows < 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'max_rows must be positive',
            DETAIL = format('It is %s.', coalesce(max_rows::text, 'null')),
            HINT = 'Pass how many rows one call may delete of each kind, such as 10000.';
    END IF;
    DELETE FROM dtm.given_ids WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm.given_ids WHERE given_at < clock_timestamp() - dtm.retention()
        ORDER BY given_at LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS purged = ROW_COUNT;
    DELETE FROM dtm.receipts WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm.receipts WHERE received_at < clock_timestamp() - dtm.receipts_kept()
        ORDER BY received_at LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS receipts = ROW_COUNT;
    RETURN purged + receipts + dtm.purge_barriers(max_rows) + dtm.purge_transactions(max_rows);
END
$$;

-- The settings dtm.retention and dtm.receipts_kept, which are known only once the library is loaded.
CREATE FUNCTION dtm.retention() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'retention_wrapper';
CREATE FUNCTION dtm.receipts_kept() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'receipts_kept_wrapper';
