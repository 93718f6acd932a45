-- Whose keys seal a transcript: its mapping may be gone, or be another session's by now.
ALTER TABLE session_files ADD COLUMN IF NOT EXISTS resource_id text COLLATE "C" NOT NULL;
ALTER TABLE session_outlines ADD COLUMN IF NOT EXISTS resource_id text COLLATE "C" NOT NULL;

-- What is sealed cannot be compressed, and trying to takes longer than storing it.
ALTER TABLE session_files ALTER COLUMN data SET STORAGE EXTERNAL;
