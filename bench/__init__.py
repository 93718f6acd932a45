"""What the sidecar costs, against what people would use instead: `make bench`."""
