-- SPDX-License-Identifier: PostgreSQL
-- Publishing. These functions write the log themselves, without rights of the caller on its tables: who may execute one may
-- publish. They are grouped as users call them: one event, one event of bytes, and many of either.

CREATE FUNCTION dtm.publish(
    topic text, payload jsonb, key text DEFAULT NULL, headers jsonb DEFAULT NULL,
    id uuid DEFAULT NULL, deliver_at timestamptz DEFAULT NULL
) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_wrapper';

CREATE FUNCTION dtm.publish_bytes(
    topic text, payload bytea, content_type text, key text DEFAULT NULL, headers jsonb DEFAULT NULL,
    id uuid DEFAULT NULL, deliver_at timestamptz DEFAULT NULL
) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_bytes_wrapper';

CREATE FUNCTION dtm.publish_many(
    topic text, payloads jsonb[], keys text[] DEFAULT NULL, headers jsonb[] DEFAULT NULL,
    ids uuid[] DEFAULT NULL, deliver_at timestamptz[] DEFAULT NULL
) RETURNS uuid[]
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_many_wrapper';

CREATE FUNCTION dtm.publish_bytes_many(
    topic text, payloads bytea[], content_type text, keys text[] DEFAULT NULL, headers jsonb[] DEFAULT NULL,
    ids uuid[] DEFAULT NULL, deliver_at timestamptz[] DEFAULT NULL
) RETURNS uuid[]
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'publish_bytes_many_wrapper';

COMMENT ON FUNCTION dtm.publish(text, jsonb, text, jsonb, uuid, timestamptz) IS
    'Publishes an event if and only if the transaction commits. Returns its id.';
COMMENT ON FUNCTION dtm.publish_bytes(text, bytea, text, text, jsonb, uuid, timestamptz) IS
    'dtm.publish of a body that is delivered byte by byte as it is given.';
COMMENT ON FUNCTION dtm.publish_many(text, jsonb[], text[], jsonb[], uuid[], timestamptz[]) IS
    'dtm.publish of many events of one topic, in the order of the array. Returns their ids.';
COMMENT ON FUNCTION dtm.publish_bytes_many(text, bytea[], text, text[], jsonb[], uuid[], timestamptz[]) IS
    'dtm.publish_bytes of many events of one topic, in the order of the array. Returns their ids.';
