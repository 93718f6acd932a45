"""Who may call, and whose threads: names of this server, origins of pages, and tokens."""
