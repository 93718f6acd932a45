"""Everything between HTTP and the Claude Agent SDK."""
