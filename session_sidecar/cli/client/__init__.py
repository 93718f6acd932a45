"""The command line's calls: a caller like any other, over HTTP alone. Nothing in the server imports this."""
