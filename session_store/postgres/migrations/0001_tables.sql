-- All tables of a fleet. Which agent session a thread of a resource belongs to, who has the thread, and its transcript.
--
-- IDs are opaque and compare byte for byte (COLLATE "C"). created_at and updated_at are UTC microseconds since the
-- epoch, as in SQLite; whatever is only ever compared with this database's clock is a timestamptz.
-- A file here that has been released never changes: what comes later is another file.

-- Each lease gets the next one, whichever thread it is of: a mapping that is removed and made anew begins no lower.
CREATE SEQUENCE fences;

-- Whoever has a thread renews its row every few seconds: there is room on the page for that, and no index goes by it.
CREATE TABLE session_mappings (
    thread_id         text COLLATE "C" NOT NULL,
    resource_id       text COLLATE "C" NOT NULL,
    sdk_session_id    text COLLATE "C" NOT NULL UNIQUE,
    parent_thread_id  text COLLATE "C", -- null unless forked; the parent has the same resource
    parent_message_id text COLLATE "C", -- null unless forked at a message
    version           bigint NOT NULL DEFAULT 0,
    created_at        bigint NOT NULL,
    updated_at        bigint NOT NULL,
    holder            uuid, -- the replica that had it last; it stays when the lease is released
    fence             bigint NOT NULL,
    lease_until       timestamptz, -- null: released
    contested_at      timestamptz, -- when somebody else first found the lease run out
    settled           bigint NOT NULL DEFAULT 0, -- bytes of the main transcript at the end of the last completed turn
    PRIMARY KEY (resource_id, thread_id)
) WITH (fillfactor = 80);

-- A resource's mappings, newest first: a page is one walk along it, in either direction, from any position.
CREATE INDEX session_mappings_by_age ON session_mappings (resource_id, created_at, thread_id);

-- The same walk over all resources.
CREATE INDEX session_mappings_by_age_of_all ON session_mappings (created_at, resource_id, thread_id);

-- The same walk among the forks of one thread. A third ID would not fit into an entry where all are as long as they may
-- be; those that were made in the same microsecond are sorted instead.
CREATE INDEX session_mappings_by_parent ON session_mappings (resource_id, parent_thread_id, created_at)
    WHERE parent_thread_id IS NOT NULL;

-- What begins alike over all resources; within one, the key itself serves.
CREATE INDEX session_mappings_by_thread ON session_mappings (thread_id, resource_id, created_at);

-- Where the replicas are.
CREATE TABLE replicas (
    id      uuid PRIMARY KEY,
    url     text, -- null: it advertises none
    seen_at timestamptz NOT NULL
);

-- Which turn was begun under which idempotency key, until some minutes after its end. Nothing but digests: the key is that
-- of the resource and the caller's key, the other that of what was asked for. No index goes by the time, which each turn
-- changes at its end; a sweep reads no more rows than turns began in some minutes.
CREATE TABLE turn_keys (
    key        bytea PRIMARY KEY,
    digest     bytea NOT NULL,
    turn_id    text NOT NULL,
    holder     uuid NOT NULL, -- the replica that runs it, or has run it
    expires_at timestamptz NOT NULL
);

-- The files of a session as chunks, sealed where there are keys. path is relative to the session.
CREATE TABLE session_files (
    sdk_session_id text COLLATE "C" NOT NULL,
    path           text COLLATE "C" NOT NULL,
    seq            integer NOT NULL,
    off            bigint NOT NULL, -- of the plain bytes
    len            integer NOT NULL, -- of the plain bytes
    mac            bytea NOT NULL,
    fence          bigint, -- of the lease that it was written with
    key_id         text, -- null: not sealed
    data           bytea NOT NULL,
    PRIMARY KEY (sdk_session_id, path, seq)
);

-- Title and preview of a session, so that lists need no files.
CREATE TABLE session_outlines (
    sdk_session_id text COLLATE "C" PRIMARY KEY,
    key_id         text, -- null: not sealed
    data           bytea NOT NULL
);

-- What a resource's keys are derived with. Without its row, what was sealed for it can never be read again.
CREATE TABLE resource_keys (
    resource_id text COLLATE "C" PRIMARY KEY,
    salt        bytea NOT NULL
);
