"""What an operator does by command, beside a running sidecar or in its place."""
