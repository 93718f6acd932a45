"""The agent: its processes, and what they leave in transcripts. The only room that knows the SDK."""
