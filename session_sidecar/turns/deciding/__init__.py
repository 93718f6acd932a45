"""Who may have a thread, and what a turn on it is going to be."""
