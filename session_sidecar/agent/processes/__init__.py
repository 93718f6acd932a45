"""Processes of the CLI: one of them, those that are kept, and what a crash left running."""
