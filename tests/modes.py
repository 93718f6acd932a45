"""Whether processes are kept between turns, and what makes a CLI trace. What is promised holds both ways."""

import pytest

COLD = {"SIDECAR_WARM_SESSIONS": "0", "SIDECAR_SPARE_PROCESSES": "0"}
WARM = {"SIDECAR_WARM_SESSIONS": "4", "SIDECAR_SPARE_PROCESSES": "1"}
NO_SPARE = {"SIDECAR_SPARE_PROCESSES": "0"}
KEPT = {"SIDECAR_WARM_SESSIONS": "4", "SIDECAR_SPARE_PROCESSES": "0"}  # one start a thread, and none ahead

# `make test` takes the mode that users have; `make test-all` both.
in_both_modes = pytest.mark.parametrize("mode", ["warm", pytest.param("cold", marks=pytest.mark.long)], indirect=True)


def marks_of(keeper: str) -> list[pytest.MarkDecorator]:
    """Of a contract that all keepers are held to: `make test` leaves out the one that is reached through pgbouncer."""
    return [pytest.mark.long] if keeper == "pgbouncer" else []


# The CLI makes spans, which nobody collects, and tells the API which one it is in.
CLI_TRACES = {
    "CLAUDE_CODE_ENABLE_TELEMETRY": "1",
    "CLAUDE_CODE_ENHANCED_TELEMETRY_BETA": "1",
    "CLAUDE_CODE_PROPAGATE_TRACEPARENT": "1",
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
}
