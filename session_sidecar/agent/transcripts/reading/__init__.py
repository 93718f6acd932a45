"""What is read of transcripts: their chains, histories and exchanges, in threads or a process beside."""
