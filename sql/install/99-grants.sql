-- SPDX-License-Identifier: PostgreSQL
-- PUBLIC gets nothing. A publisher needs USAGE on the schema and EXECUTE on dtm.publish, a relay what the README says.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA dtm FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA dtm FROM PUBLIC;
