"""What is told again: the events of turns, running and ended, and turns under an idempotency key."""
