-- The session map: which agent session a thread of a resource belongs to. No message, title or count is ever kept here.
--
-- Times are UTC microseconds since the epoch. IDs are opaque and compare byte for byte (SQLite's BINARY collation).
-- A change to this file needs a new user_version, here and in session_store/sqlite/file.py: but for an index, which an
-- older program keeps up without knowing it. From the first index on, all that a file lacks is made when it is opened,
-- in one transaction: that is how a file of an older schema comes to this one.

PRAGMA application_id = 1936028525; -- "sesm": tells our file from any other program's

-- The resource leads the key, so that what belongs to one resource lies together; thread IDs often come in random order.
-- Without a rowid the key is the table: a look-up walks one tree instead of two, and a new row writes one tree less.
CREATE TABLE session_mappings (
    thread_id         TEXT    NOT NULL,
    resource_id       TEXT    NOT NULL,
    sdk_session_id    TEXT    NOT NULL UNIQUE,
    parent_thread_id  TEXT, -- null unless forked; the parent has the same resource
    parent_message_id TEXT, -- null unless forked at a message
    version           INTEGER NOT NULL DEFAULT 0,
    created_at        INTEGER NOT NULL,
    updated_at        INTEGER NOT NULL,
    PRIMARY KEY (resource_id, thread_id)
) STRICT, WITHOUT ROWID;

-- A resource's mappings, newest first: a page is one walk along it, in either direction, from any position.
-- It goes by created_at, which never changes: a page must not shift because a thread was spoken to meanwhile.
CREATE INDEX IF NOT EXISTS session_mappings_by_age ON session_mappings (resource_id, created_at, thread_id);

-- The same walk over all resources.
CREATE INDEX IF NOT EXISTS session_mappings_by_age_of_all ON session_mappings (created_at, resource_id, thread_id);

-- The same walk among the forks of one thread. Rows that are no fork cost nothing here.
CREATE INDEX IF NOT EXISTS session_mappings_by_parent
    ON session_mappings (resource_id, parent_thread_id, created_at, thread_id)
    WHERE parent_thread_id IS NOT NULL;

-- What begins alike over all resources; within one, the key itself serves. With created_at it is sorted without the table.
CREATE INDEX IF NOT EXISTS session_mappings_by_thread ON session_mappings (thread_id, resource_id, created_at);

-- Since schema 2: which turn was begun under which idempotency key, until some minutes after its end. Nothing but digests:
-- the key is that of the resource and the caller's key, the other that of what was asked for.
CREATE TABLE IF NOT EXISTS turn_keys (
    key        BLOB    NOT NULL PRIMARY KEY,
    digest     BLOB    NOT NULL,
    turn_id    TEXT    NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

PRAGMA user_version = 2;
