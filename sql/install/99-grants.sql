-- SPDX-License-Identifier: PostgreSQL
-- PUBLIC gets nothing. A publisher needs USAGE on the schema and EXECUTE on dtm.publish, a relay what the README says.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA dtm FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA dtm FROM PUBLIC;
-- Settings that everybody may SHOW: relays look whether a target remembers for long enough.
GRANT EXECUTE ON FUNCTION dtm.receipts_kept, dtm.barriers_kept TO PUBLIC;
