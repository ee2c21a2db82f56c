-- SPDX-License-Identifier: PostgreSQL
-- Turning over. The log is a ring of three segments, control data (cursors, positions, leases, heartbeats) one of two. Publishers go
-- on in an empty segment when the one they write has half of the retention time in it; a segment whose last event is older than
-- the retention time, and that every subscription has had, is emptied by TRUNCATE. Nobody waits for any of this for longer than
-- the lock_timeout that stands at these functions.
--
-- TRUNCATE is seen by snapshots that were taken before it. A dump could find cursors that need a segment, and the segment
-- empty. So it happens in two transactions: one writes down that nobody needs the segment, and another empties it once no
-- snapshot is held that does not see the first. Snapshots that are taken in between find that nobody needs it either: the first
-- lets nobody write there or set a subscription to a place meanwhile, and what does so later makes it begin anew.

-- Every transaction with a smaller id has ended, as all snapshots that are held in this database see it.
CREATE FUNCTION dtm.horizon() RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'horizon_wrapper';

-- An old snapshot does not see what has to be kept.
CREATE FUNCTION dtm.require_read_committed() RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'segments are turned over in READ COMMITTED transactions only',
            DETAIL = format('This one is %s.', upper(current_setting('transaction_isolation'))),
            HINT = 'Call it outside a transaction block, or begin one with ISOLATION LEVEL READ COMMITTED.';
    END IF;
END
$$;

-- Up to which number each subscription, or each of its shards, needs nothing of the log any more. Null: it has no cursor, and needs all.
CREATE VIEW dtm.needs AS
SELECT s.id AS subscription, o.shard, c.low
FROM dtm.subscription s
JOIN dtm.owners o ON o.subscription = s.id
LEFT JOIN LATERAL dtm.cursor_at(s.id, o.shard, s.epoch) c ON true
WHERE s.state <> 'dropped';

-- How long whoever reads or writes a segment is left alone that was in the way once: an idle transaction may stay for long, and
-- while it is waited for, others wait.
CREATE FUNCTION dtm.is_held_up(since timestamptz) RETURNS boolean
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
RETURN coalesce(since > clock_timestamp() - least(dtm.retention() / 10, interval '1 min'), false);

-- Goes one step on with the log, if there is one to go. Answers what it did: 'rotated', 'retired', 'emptied', or
-- 'kept', where what was retired is needed again; null: nothing.
-- SECURITY DEFINER: a relay needs no right to truncate.
CREATE FUNCTION dtm.rotate_log() RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    here dtm.installation;
    turning dtm.rotation;
    horizon bigint;
    old int;
    next int;
    starts bigint;
BEGIN
    PERFORM dtm.require_read_committed();
    IF NOT dtm.take_turn('rotation') OR NOT dtm.meet_restored() THEN
        RETURN NULL;
    END IF;
    SELECT * INTO STRICT here FROM dtm.installation;
    SELECT * INTO STRICT turning FROM dtm.rotation;
    horizon := dtm.horizon();
    FOR old IN SELECT n FROM generate_series(1, 3) AS n WHERE n <> here.log_segment AND NOT dtm.is_held_up(turning.log_held_up[n]) LOOP
        IF turning.log_retired[old] < horizon THEN
            BEGIN
                -- It waits for whoever reads or writes the segment; not for long, since others wait behind it.
                EXECUTE format('LOCK TABLE dtm.log_%s IN ACCESS EXCLUSIVE MODE', old);
            EXCEPTION WHEN lock_not_available THEN
                UPDATE dtm.rotation SET log_held_up[old] = clock_timestamp();
                CONTINUE;
            END;
            SELECT CASE WHEN is_called THEN last_value ELSE 0 END INTO starts FROM dtm.start_seq;
            UPDATE dtm.rotation SET log_retired[old] = NULL;
            -- Subscriptions were set to a place since: one may need it, or may have for a snapshot that is held.
            IF starts <> turning.log_starts[old] OR NOT dtm.is_needless(old) THEN
                RETURN 'kept';
            END IF;
            EXECUTE format('TRUNCATE dtm.log_%s', old);
            RETURN 'emptied';
        ELSIF turning.log_retired[old] IS NULL AND dtm.is_needless(old) THEN
            BEGIN
                -- Whoever writes there still, or sets a subscription to a place, has ended.
                EXECUTE format('LOCK TABLE dtm.subscription, dtm.log_%s IN SHARE MODE', old);
            EXCEPTION WHEN lock_not_available THEN
                UPDATE dtm.rotation SET log_held_up[old] = clock_timestamp();
                CONTINUE;
            END;
            SELECT CASE WHEN is_called THEN last_value ELSE 0 END INTO starts FROM dtm.start_seq;
            IF dtm.is_needless(old) THEN
                UPDATE dtm.rotation SET log_retired[old] = pg_current_xact_id()::text::bigint, log_starts[old] = starts;
                RETURN 'retired';
            END IF;
        END IF;
    END LOOP;
    SELECT s.segment INTO next FROM dtm.log_segments() s
    WHERE s.segment <> here.log_segment AND s.last_seq IS NULL
    ORDER BY (s.segment - here.log_segment + 3) % 3 LIMIT 1;
    IF next IS NOT NULL
       AND EXISTS (SELECT FROM dtm.log_segments() s
                   WHERE s.segment = here.log_segment AND s.first_at < clock_timestamp() - dtm.retention() / 2) THEN
        UPDATE dtm.installation SET log_segment = next;
        PERFORM dtm.installation_changed();
        RETURN 'rotated';
    END IF;
    RETURN NULL;
END
$$;

-- Whether there is something in a segment of the log, and nothing of it is wanted: by the retention time, by a subscription, or
-- by one that is still being restored.
CREATE FUNCTION dtm.is_needless(segment int) RETURNS boolean
LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
RETURN EXISTS (
    SELECT FROM dtm.log_segments() last
    WHERE last.segment = is_needless.segment AND last.last_at < clock_timestamp() - dtm.retention()
      AND NOT EXISTS (SELECT FROM dtm.needs n WHERE n.low IS NULL OR n.low < last.last_seq)
      AND NOT dtm.is_restoring());

-- Copies from a segment of control data to the other one what is the newest of its kind and is not there; answers how much.
CREATE FUNCTION dtm.copy_control(source int, target int) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    copied bigint := 0;
    n bigint;
    statement text;
BEGIN
    FOREACH statement IN ARRAY ARRAY[
        'INSERT INTO dtm.cursor_log_%2$s
         SELECT c.* FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id
         CROSS JOIN LATERAL (SELECT * FROM dtm.cursor_log_%1$s l
                             WHERE l.subscription = s.id AND l.shard = o.shard AND l.epoch = s.epoch
                             ORDER BY l.id DESC LIMIT 1) c
         WHERE NOT EXISTS (SELECT FROM dtm.cursor_log_%2$s l
                           WHERE l.subscription = c.subscription AND l.shard = c.shard AND l.epoch = c.epoch AND l.id >= c.id)',
        -- What cursors name, and what the next head is read from.
        'INSERT INTO dtm.position_log_%2$s
         SELECT p.* FROM dtm.position_log_%1$s p
         WHERE (p.id IN (SELECT unnest(ARRAY[c."position", c.target]) FROM dtm.cursor_log_%2$s c)
                OR p.id = (SELECT max(id) FROM dtm.position_log))
           AND NOT EXISTS (SELECT FROM dtm.position_log_%2$s o WHERE o.id = p.id)
         ON CONFLICT DO NOTHING',
        'INSERT INTO dtm.lease_log_%2$s
         SELECT newest.* FROM (SELECT DISTINCT ON (l.subscription, l.shard) l.* FROM dtm.lease_log_%1$s l
                               ORDER BY l.subscription, l.shard, l.token DESC) newest
         WHERE EXISTS (SELECT FROM dtm.subscription s WHERE s.id = newest.subscription)
           AND NOT EXISTS (SELECT FROM dtm.lease_log_%2$s l
                           WHERE l.subscription = newest.subscription AND l.shard = newest.shard AND l.token >= newest.token)',
        'INSERT INTO dtm.heartbeat_log_%2$s
         SELECT newest.* FROM (SELECT DISTINCT ON (h.relay) h.* FROM dtm.heartbeat_log_%1$s h
                               ORDER BY h.relay, h.id DESC) newest
         WHERE newest.expires_at > clock_timestamp()
           AND NOT EXISTS (SELECT FROM dtm.heartbeat_log_%2$s h WHERE h.relay = newest.relay AND h.id >= newest.id)'
    ] LOOP
        EXECUTE format(statement, source, target);
        GET DIAGNOSTICS n = ROW_COUNT;
        copied := copied + n;
    END LOOP;
    RETURN copied;
END
$$;

-- Locks tables of control data as a LOCK TABLE statement says. False: somebody is in the way, and is left alone for a while.
CREATE FUNCTION dtm.try_lock_control(tables text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    BEGIN
        EXECUTE 'LOCK TABLE ' || tables;
    EXCEPTION WHEN lock_not_available THEN
        UPDATE dtm.rotation SET control_held_up = clock_timestamp();
        RETURN false;
    END;
    RETURN true;
END
$$;

-- Goes one step on with control data: once the segment that is written has grown beyond max_bytes. Answers as rotate_log does.
CREATE FUNCTION dtm.rotate_control(max_bytes bigint DEFAULT 33554432) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    here dtm.installation;
    turning dtm.rotation;
    old int;
    is_empty boolean;
    bytes bigint;
BEGIN
    PERFORM dtm.require_read_committed();
    -- Relays of version 0.1 name positions that may have gone.
    IF NOT dtm.take_turn('rotation') OR NOT dtm.meet_restored() OR EXISTS (SELECT FROM dtm.live_relays WHERE NOT shares) THEN
        RETURN NULL;
    END IF;
    SELECT * INTO STRICT here FROM dtm.installation;
    SELECT * INTO STRICT turning FROM dtm.rotation;
    IF dtm.is_held_up(turning.control_held_up) THEN
        RETURN NULL;
    END IF;
    old := 3 - here.control_segment;
    EXECUTE format('SELECT NOT (EXISTS (SELECT FROM dtm.cursor_log_%1$s) OR EXISTS (SELECT FROM dtm.position_log_%1$s)
                                OR EXISTS (SELECT FROM dtm.lease_log_%1$s) OR EXISTS (SELECT FROM dtm.heartbeat_log_%1$s))', old)
    INTO is_empty;
    IF is_empty THEN
        EXECUTE format('SELECT pg_relation_size(''dtm.cursor_log_%1$s'') + pg_relation_size(''dtm.position_log_%1$s'')
                               + pg_relation_size(''dtm.lease_log_%1$s'') + pg_relation_size(''dtm.heartbeat_log_%1$s'')',
                       here.control_segment) INTO bytes;
        IF bytes <= max_bytes THEN
            RETURN NULL;
        END IF;
        -- Whoever writes control data has ended, and whoever comes next reads the new segment.
        IF NOT dtm.try_lock_control('dtm.rotation IN EXCLUSIVE MODE') THEN
            RETURN NULL;
        END IF;
        UPDATE dtm.installation SET control_segment = old;
        PERFORM dtm.copy_control(here.control_segment, old);
        UPDATE dtm.rotation SET control_retired = pg_current_xact_id()::text::bigint;
        RETURN 'rotated';
    ELSIF turning.control_retired IS NULL THEN
        IF NOT dtm.try_lock_control('dtm.rotation IN EXCLUSIVE MODE') THEN
            RETURN NULL;
        END IF;
        PERFORM dtm.copy_control(old, here.control_segment);
        UPDATE dtm.rotation SET control_retired = pg_current_xact_id()::text::bigint;
        RETURN 'retired';
    ELSIF turning.control_retired < dtm.horizon() THEN
        IF NOT dtm.try_lock_control(format(
            'dtm.cursor_log_%1$s, dtm.position_log_%1$s, dtm.lease_log_%1$s, dtm.heartbeat_log_%1$s IN ACCESS EXCLUSIVE MODE', old)) THEN
            RETURN NULL;
        END IF;
        IF dtm.is_restoring() THEN
            RETURN NULL;  -- cursors, before their subscriptions
        END IF;
        IF dtm.copy_control(old, here.control_segment) > 0 THEN
            -- Written with an old snapshot since: for those that are held now it must stay.
            UPDATE dtm.rotation SET control_retired = pg_current_xact_id()::text::bigint;
            RETURN 'retired';
        END IF;
        EXECUTE format('TRUNCATE dtm.cursor_log_%1$s, dtm.position_log_%1$s, dtm.lease_log_%1$s, dtm.heartbeat_log_%1$s', old);
        UPDATE dtm.rotation SET control_retired = NULL;
        RETURN 'emptied';
    END IF;
    RETURN NULL;
EXCEPTION WHEN lock_not_available THEN
    RETURN NULL;
END
$$;
