"""Streams of server-sent events: the frames of the native dialect, and the response that sends them."""
