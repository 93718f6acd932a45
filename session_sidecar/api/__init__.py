"""HTTP: parse, call, render. Nothing here knows the SDK or the database."""
