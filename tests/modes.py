"""Whether processes are kept between turns. What is promised holds both ways."""

import pytest

COLD = {"SIDECAR_WARM_SESSIONS": "0", "SIDECAR_SPARE_PROCESSES": "0"}
WARM = {"SIDECAR_WARM_SESSIONS": "4", "SIDECAR_SPARE_PROCESSES": "1"}

# `make test` takes the mode that users have; `make test-all` both.
in_both_modes = pytest.mark.parametrize("mode", ["warm", pytest.param("cold", marks=pytest.mark.long)], indirect=True)
