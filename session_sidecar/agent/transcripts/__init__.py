"""The transcripts that the SDK and its CLI keep: found, read, copied, appended to, removed."""
