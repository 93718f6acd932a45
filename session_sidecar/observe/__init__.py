"""What an operator sees of a running sidecar beside its log: figures for Prometheus, spans for OpenTelemetry."""
