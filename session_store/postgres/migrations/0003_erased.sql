-- Sessions whose transcripts were deleted: each replica removes what it has of them. Kept for as long as one may be away.
CREATE TABLE erased_sessions (
    sdk_session_id text COLLATE "C" PRIMARY KEY,
    erased_at      timestamptz NOT NULL
);
CREATE INDEX erased_sessions_by_time ON erased_sessions (erased_at);
