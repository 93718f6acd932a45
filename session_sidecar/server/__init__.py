"""What the sidecar needs of the server and the process it runs in."""
