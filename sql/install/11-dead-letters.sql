-- SPDX-License-Identifier: PostgreSQL
-- What users do about events that failed.

-- Whether a topic matches a pattern; raises an error with a hint if that is none.
CREATE FUNCTION dtm.topic_matches(pattern text, topic text) RETURNS boolean
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'topic_matches_wrapper';

-- Checks what dtm.redrive and dtm.discard are called with, keeps the subscription's relays from reporting until the transaction
-- ends, and picks the dead letters, oldest first.
CREATE FUNCTION dtm.choose_dead_letters(
    subscription text, ids uuid[], topic text, since timestamptz, max_rows int, everything boolean,
    OUT subscription_id bigint, OUT seqs bigint[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF ids IS NULL AND topic IS NULL AND since IS NULL AND everything IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'which dead letters?',
            DETAIL = 'There is neither ids nor topic nor since.',
            HINT = 'Pass one of them, or everything => true for all dead letters of the subscription.';
    END IF;
    IF max_rows IS NULL OR max_rows < 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'max_rows must be positive',
            DETAIL = format('It is %s.', coalesce(max_rows::text, 'null')),
            HINT = 'Pass how many dead letters one call may take, such as 1000, and call it until it answers 0.';
    END IF;
    PERFORM dtm.topic_matches(topic, 'any');  -- is it a pattern?
    subscription_id := dtm.lock_settlements(subscription);
    IF subscription_id IS NULL THEN
        PERFORM dtm.raise_no_subscription(subscription);
    END IF;
    seqs := ARRAY(
        SELECT d.seq FROM dtm.dead_letter d
        WHERE d.subscription = subscription_id
          AND (ids IS NULL OR d.id = ANY (ids))
          AND (choose_dead_letters.topic IS NULL OR dtm.topic_matches(choose_dead_letters.topic, d.topic))
          AND (since IS NULL OR d.published_at >= since)
        ORDER BY d.n LIMIT max_rows);
END
$$;

CREATE FUNCTION dtm.redrive(
    subscription text, ids uuid[] DEFAULT NULL, topic text DEFAULT NULL, since timestamptz DEFAULT NULL,
    max_rows int DEFAULT 1000, everything boolean DEFAULT false) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    chosen record;
    redriven bigint;
BEGIN
    SELECT * INTO chosen FROM dtm.choose_dead_letters(
        redrive.subscription, ids, redrive.topic, since, max_rows, everything);
    WITH gone AS (
        DELETE FROM dtm.dead_letter d
        WHERE d.subscription = chosen.subscription_id AND d.seq = ANY (chosen.seqs)
        RETURNING d.*
    ), parked AS (
        INSERT INTO dtm.retry (subscription, seq, n, era, published_at, id, topic, key, content_type, headers, payload,
                               attempts, next_at, history, parked_at)
        SELECT g.subscription, g.seq, g.n, g.era, g.published_at, g.id, g.topic, g.key, g.content_type, g.headers, g.payload,
               0, clock_timestamp(), g.history, g.parked_at
        FROM gone g
        ON CONFLICT DO NOTHING  -- it is being tried again already
    )
    SELECT count(*) INTO redriven FROM gone;
    IF redriven > 0 THEN
        UPDATE dtm.subscription s SET revision = s.revision + 1 WHERE s.id = chosen.subscription_id;
    END IF;
    RETURN redriven;
END
$$;

CREATE FUNCTION dtm.discard(
    subscription text, ids uuid[] DEFAULT NULL, topic text DEFAULT NULL, since timestamptz DEFAULT NULL,
    max_rows int DEFAULT 1000, everything boolean DEFAULT false) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    chosen record;
    discarded bigint;
    freed text[];
BEGIN
    SELECT * INTO chosen FROM dtm.choose_dead_letters(
        discard.subscription, ids, discard.topic, since, max_rows, everything);
    WITH gone AS (
        DELETE FROM dtm.dead_letter d
        WHERE d.subscription = chosen.subscription_id AND d.seq = ANY (chosen.seqs)
        RETURNING d.key
    )
    SELECT count(*), array_agg(DISTINCT g.key) INTO discarded, freed FROM gone g;
    IF discarded > 0 THEN
        -- Where a dead letter blocks its key: what waited behind one of these goes on, unless behind another, too.
        UPDATE dtm.retry r SET next_at = clock_timestamp()
        WHERE r.subscription = chosen.subscription_id AND r.key = ANY (freed) AND r.next_at IS NULL
          AND r.n = (SELECT min(f.n) FROM dtm.retry f WHERE f.subscription = r.subscription AND f.key = r.key)
          AND NOT EXISTS (SELECT FROM dtm.dead_letter d
                          WHERE d.subscription = r.subscription AND d.key = r.key AND d.n < r.n)
          AND (SELECT s.options ->> 'on_dead' = 'block' FROM dtm.subscription s WHERE s.id = r.subscription);
        UPDATE dtm.subscription s SET revision = s.revision + 1 WHERE s.id = chosen.subscription_id;
    END IF;
    RETURN discarded;
END
$$;

-- Drops what failed and is delivered again from the log, since the subscription begins anew before it. What the log no longer
-- has lies before every beginning, and stays.
CREATE FUNCTION dtm.forget_failures(subscription_id bigint, start_at text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    start_time timestamptz;
BEGIN
    IF start_at = 'now' THEN
        RETURN;
    END IF;
    start_time := CASE start_at WHEN 'earliest' THEN '-infinity' ELSE start_at END;
    DELETE FROM dtm.retry r
    WHERE r.subscription = subscription_id AND r.published_at >= start_time
      AND EXISTS (SELECT FROM dtm.log l WHERE l.seq = r.seq);
    DELETE FROM dtm.dead_letter d
    WHERE d.subscription = subscription_id AND d.published_at >= start_time
      AND EXISTS (SELECT FROM dtm.log l WHERE l.seq = d.seq);
END
$$;

COMMENT ON FUNCTION dtm.redrive(text, uuid[], text, timestamptz, int, boolean) IS
    'Tries dead letters again: by id, by topic (a pattern), published at a time or later. They may come after later ones of a key.';
COMMENT ON FUNCTION dtm.discard(text, uuid[], text, timestamptz, int, boolean) IS
    'Deletes dead letters: by id, by topic (a pattern), published at a time or later.';
