"""Everything between HTTP and the Claude Agent SDK."""

__version__ = "0.1.0"
