"""What is known of sessions, and what is changed by hand: not by a turn."""
