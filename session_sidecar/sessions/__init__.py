"""What is known of session_map, and what is changed by hand: not by a turn."""
