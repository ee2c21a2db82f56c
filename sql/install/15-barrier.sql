-- SPDX-License-Identifier: PostgreSQL
-- The barrier: work of a branch of a global transaction happens once, and not after it was called off. DTM's algorithm on DTM's
-- relation, so that services with DTM's own clients and those that call these functions share it.

-- Makes the relation, or makes DTM's, where there is one, the extension's. Whoever owns a table, or may put a trigger on it, has
-- code run by those who write to it, and dtm.barrier writes as the extension's owner: a table that is adopted has no code of
-- anybody else's, and nobody else can give it any from then on.
DO $adopt$
DECLARE
    path text := current_setting('search_path');
    adopted oid;
    sequence oid;
    owner oid;
    schema_owner oid;
    wrong text;
    granted record;
BEGIN
    SET LOCAL search_path = pg_catalog, pg_temp;
    IF to_regnamespace('dtm_barrier') IS NULL THEN
        CREATE SCHEMA dtm_barrier;
    ELSE
        -- Who owns it could give the name to another schema, with another table.
        schema_owner := (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'dtm_barrier');
        ALTER SCHEMA dtm_barrier OWNER TO CURRENT_USER;
        ALTER EXTENSION pg_dtm ADD SCHEMA dtm_barrier;
    END IF;
    adopted := to_regclass('dtm_barrier.barrier');
    sequence := to_regclass('dtm_barrier.barrier_seq');
    IF adopted IS NULL AND sequence IS NULL THEN
        CREATE SEQUENCE dtm_barrier.barrier_seq;
        CREATE TABLE dtm_barrier.barrier (
            id          bigint       NOT NULL DEFAULT nextval('dtm_barrier.barrier_seq') PRIMARY KEY,
            trans_type  varchar(45)  DEFAULT '',
            gid         varchar(128) DEFAULT '',
            branch_id   varchar(128) DEFAULT '',
            op          varchar(45)  DEFAULT '',
            barrier_id  varchar(45)  DEFAULT '',
            reason      varchar(45)  DEFAULT '',
            create_time timestamp(0) with time zone DEFAULT now(),
            update_time timestamp(0) with time zone DEFAULT now(),
            CONSTRAINT uniq_barrier UNIQUE (gid, branch_id, op, barrier_id)
        );
        CREATE INDEX barrier_create_time ON dtm_barrier.barrier (create_time);
    ELSE
        IF adopted IS NOT NULL THEN
            -- From here on nobody changes it.
            LOCK TABLE dtm_barrier.barrier IN ACCESS EXCLUSIVE MODE;
            adopted := to_regclass('dtm_barrier.barrier');
        END IF;
        wrong := CASE
            WHEN adopted IS NULL OR sequence IS NULL THEN 'there is only one of the table and its sequence'
            WHEN NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = adopted AND c.relkind = 'r' AND c.relpersistence = 'p'
                                 AND NOT c.relispartition AND c.reloftype = 0)
                THEN 'it is not a plain table that survives a crash'
            WHEN NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = sequence AND c.relkind = 'S' AND c.relpersistence = 'p')
                THEN 'barrier_seq is not a sequence that survives a crash'
            WHEN EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid IN (adopted, sequence)
                             AND d.deptype = 'e')
                THEN 'it belongs to another extension'
            WHEN EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = adopted)
                THEN 'it has triggers, or foreign keys refer to it'
            WHEN EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = adopted) THEN 'it has rules'
            WHEN EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = adopted)
              OR EXISTS (SELECT FROM pg_class c WHERE c.oid = adopted AND c.relrowsecurity) THEN 'it has row security'
            WHEN EXISTS (SELECT FROM pg_inherits i WHERE adopted IN (i.inhrelid, i.inhparent)) THEN 'it inherits, or is inherited from'
            WHEN EXISTS (SELECT FROM pg_statistic_ext s WHERE s.stxrelid = adopted) THEN 'it has extended statistics'
            WHEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = adopted AND a.attnum > 0 AND NOT a.attisdropped
                             AND a.attacl IS NOT NULL) THEN 'it has privileges on columns'
            -- Types are told with their schema unless they are PostgreSQL's own.
            WHEN ARRAY(SELECT format('%s %s%s', a.attname, format_type(a.atttypid, a.atttypmod),
                                     CASE WHEN a.attidentity <> '' OR a.attgenerated <> '' THEN ' generated' END)
                       FROM pg_attribute a WHERE a.attrelid = adopted AND a.attnum > 0 AND NOT a.attisdropped
                       ORDER BY a.attnum)
                 <> ARRAY['id bigint', 'trans_type character varying(45)', 'gid character varying(128)',
                          'branch_id character varying(128)', 'op character varying(45)',
                          'barrier_id character varying(45)', 'reason character varying(45)',
                          'create_time timestamp(0) with time zone', 'update_time timestamp(0) with time zone']
                THEN 'its columns are not DTM''s'
            -- By another one two transactions could count as the same.
            WHEN EXISTS (SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                         WHERE a.attrelid = adopted AND a.attnum > 0 AND NOT a.attisdropped AND a.attcollation <> t.typcollation)
                THEN 'it has columns with a collation of their own'
            WHEN EXISTS (
                SELECT FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
                WHERE d.adrelid = adopted AND NOT CASE
                    WHEN a.attname = 'id' THEN
                        pg_get_expr(d.adbin, adopted) = 'nextval(''dtm_barrier.barrier_seq''::regclass)'
                    WHEN a.attname IN ('create_time', 'update_time') THEN
                        pg_get_expr(d.adbin, adopted) IN ('now()', 'NULL::timestamp with time zone')
                    ELSE pg_get_expr(d.adbin, adopted) = '''''::character varying' END)
                THEN 'it has defaults that are not DTM''s'
            WHEN EXISTS (SELECT FROM pg_constraint c WHERE c.conrelid = adopted AND c.contype NOT IN ('p', 'u', 'n'))
                THEN 'it has constraints that are not DTM''s'
            WHEN ARRAY(SELECT pg_get_constraintdef(c.oid) FROM pg_constraint c
                       WHERE c.conrelid = adopted AND (c.contype = 'p' OR c.contype = 'u' AND c.conname = 'uniq_barrier')
                       ORDER BY c.contype::text)
                 <> ARRAY['PRIMARY KEY (id)', 'UNIQUE (gid, branch_id, op, barrier_id)']
                THEN 'it does not have the primary key (id) and the constraint uniq_barrier on (gid, branch_id, op, barrier_id)'
            WHEN EXISTS (
                SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                WHERE i.indrelid = adopted AND NOT (
                    i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
                    AND (i.indisprimary OR c.relname IN ('uniq_barrier', 'barrier_create_time'))
                    AND i.indisunique = (c.relname <> 'barrier_create_time')
                    AND pg_get_indexdef(i.indexrelid) ~ ' USING btree \((id|gid, branch_id, op, barrier_id|create_time)\)$'))
                THEN 'it has indexes that are not DTM''s'
        END;
        IF wrong IS NOT NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = 'dtm_barrier.barrier cannot be made a part of the extension: ' || wrong,
                DETAIL = 'Functions of the extension write to it with the rights of the extension''s owner.',
                HINT = 'Give it DTM''s definition and nothing else, or rename it or drop it: then the extension makes it.';
        END IF;
        owner := (SELECT c.relowner FROM pg_class c WHERE c.oid = adopted);
        ALTER TABLE dtm_barrier.barrier OWNER TO CURRENT_USER;
        ALTER SEQUENCE dtm_barrier.barrier_seq OWNER TO CURRENT_USER;
        -- What lets others attach code, or empty it at once, or set the sequence back.
        FOR granted IN
            SELECT DISTINCT c.relkind, c.relname, a.grantee, a.privilege_type
            FROM pg_class c, aclexplode(c.relacl) a
            WHERE c.oid IN (adopted, sequence) AND a.grantee <> c.relowner
              AND a.privilege_type <> ALL (CASE c.relkind WHEN 'S' THEN '{SELECT,USAGE}'::text[]
                                                          ELSE '{SELECT,INSERT,UPDATE,DELETE}' END)
        LOOP
            EXECUTE format('REVOKE %s ON %s dtm_barrier.%I FROM %s CASCADE', granted.privilege_type,
                           CASE granted.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, granted.relname,
                           CASE granted.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(granted.grantee)) END);
        END LOOP;
        IF owner <> (SELECT c.relowner FROM pg_class c WHERE c.oid = adopted) THEN
            EXECUTE format('GRANT USAGE ON SCHEMA dtm_barrier TO %I', pg_get_userbyid(owner));
            EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON dtm_barrier.barrier TO %I', pg_get_userbyid(owner));
            EXECUTE format('GRANT USAGE ON SEQUENCE dtm_barrier.barrier_seq TO %I', pg_get_userbyid(owner));
            RAISE NOTICE USING
                MESSAGE = format('dtm_barrier.barrier is a part of the extension from now on; %s, who owned it, may go on using it',
                                 pg_get_userbyid(owner)),
                HINT = 'A dump does not have these grants: repeat them in a database that is restored.';
        END IF;
        ALTER SEQUENCE dtm_barrier.barrier_seq AS bigint INCREMENT 1 NO MAXVALUE NO CYCLE;
        PERFORM setval('dtm_barrier.barrier_seq', b.greatest) FROM (
            SELECT max(id) AS greatest FROM dtm_barrier.barrier) b, dtm_barrier.barrier_seq s
        WHERE b.greatest >= s.last_value;
        ALTER TABLE dtm_barrier.barrier
            ALTER id SET DEFAULT nextval('dtm_barrier.barrier_seq'),
            ALTER create_time SET DEFAULT now(), ALTER update_time SET DEFAULT now();
        IF to_regclass('dtm_barrier.barrier_create_time') IS NULL THEN
            CREATE INDEX barrier_create_time ON dtm_barrier.barrier (create_time);
        END IF;
        ALTER EXTENSION pg_dtm ADD TABLE dtm_barrier.barrier;
        ALTER EXTENSION pg_dtm ADD SEQUENCE dtm_barrier.barrier_seq;
    END IF;
    IF schema_owner <> (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'dtm_barrier') THEN
        EXECUTE format('GRANT USAGE, CREATE ON SCHEMA dtm_barrier TO %I', pg_get_userbyid(schema_owner));
    END IF;
    PERFORM set_config('search_path', path, true);
END
$adopt$;

SELECT pg_catalog.pg_extension_config_dump('dtm_barrier.barrier', '');
SELECT pg_catalog.pg_extension_config_dump('dtm_barrier.barrier_seq', '');

-- To be called first in the transaction that does a branch's work. SECURITY DEFINER: services need no rights on the table; it
-- looks nothing up by the caller's search_path.
CREATE FUNCTION dtm.barrier(trans_type text, gid text, branch_id text, op text, barrier_id text DEFAULT '01') RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER AS 'MODULE_PATHNAME', 'barrier_wrapper';

COMMENT ON FUNCTION dtm.barrier(text, text, text, text, text) IS
    'True: do the branch''s work in this transaction. False: it is done already or must not be done; commit and answer success.';

-- The barrier of a prepared message: its first row is the decision.
CREATE FUNCTION dtm.msg_barrier(gid text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dtm.barrier('msg', gid, '00', 'msg');
END
$$;

COMMENT ON FUNCTION dtm.msg_barrier(text) IS
    'In the business transaction of a prepared message: it is committed if and only if this transaction is.';

-- Whether the business transaction of a message is committed. If it is not, it never will be: the row stands in its way. It is
-- waited for while it is open or prepared. Whatever error there is (55P03 when that takes too long, 40001, 25006 on a standby)
-- means: not known, ask later. What it answers counts once its own transaction is committed.
CREATE FUNCTION dtm.query_prepared(gid text) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    decision text;
BEGIN
    IF (length(gid) BETWEEN 1 AND 128) IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'a message has a gid of 1 to 128 characters',
            DETAIL = format('It is %s.', coalesce(quote_literal(left(gid, 150)), 'null')),
            HINT = 'Pass the gid that the message was prepared with.';
    END IF;
    -- Its own barrier would look like a committed one, and what it answers could be taken back with the rest.
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'active_sql_transaction',
            MESSAGE = 'dtm.query_prepared cannot be called in a transaction that has written something',
            HINT = 'Call it in a transaction of its own.';
    END IF;
    -- The answer is acted on: neither its row nor the one that it found may be taken back by a crash.
    IF current_setting('synchronous_commit') = 'off' THEN
        SET LOCAL synchronous_commit TO local;
    END IF;
    INSERT INTO dtm_barrier.barrier (trans_type, gid, branch_id, op, barrier_id, reason)
    VALUES ('msg', query_prepared.gid, '00', 'msg', '01', 'rollback')
    ON CONFLICT ON CONSTRAINT uniq_barrier DO NOTHING;
    -- A statement of its own: at READ COMMITTED it sees what the first one has waited for.
    SELECT CASE b.reason WHEN 'rollback' THEN 'rolled_back' ELSE 'committed' END INTO decision
    FROM dtm_barrier.barrier b
    WHERE b.gid = query_prepared.gid AND b.branch_id = '00' AND b.op = 'msg' AND b.barrier_id = '01';
    IF decision IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'serialization_failure',
            MESSAGE = format('it is not known whether message %s is committed', gid),
            HINT = 'Ask again.';
    END IF;
    PERFORM dtm.flush();
    RETURN decision;
END
$$;

COMMENT ON FUNCTION dtm.query_prepared(text) IS
    '''committed'' or ''rolled_back''; an error means that it is not known yet. In a transaction of its own.';

-- A bounded part of the barriers that are older than dtm.barriers_kept. DTM's Go client used to leave no time: those are counted
-- from when they are first seen.
CREATE FUNCTION dtm.purge_barriers(max_rows int) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    purged bigint;
BEGIN
    UPDATE dtm_barrier.barrier SET create_time = now() WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm_barrier.barrier WHERE create_time IS NULL LIMIT max_rows FOR UPDATE SKIP LOCKED));
    DELETE FROM dtm_barrier.barrier WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dtm_barrier.barrier WHERE create_time < clock_timestamp() - dtm.barriers_kept()
        ORDER BY create_time LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS purged = ROW_COUNT;
    RETURN purged;
END
$$;

-- The setting dtm.barriers_kept.
CREATE FUNCTION dtm.barriers_kept() RETURNS interval
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'barriers_kept_wrapper';
