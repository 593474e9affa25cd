"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# The machine is shared and noisy: no deadline per example.  Shrinking is for a person at work on a failure
# (HYPOTHESIS_PROFILE=work); a run of the suite reports the example that it found.
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=60,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("work", parent=settings.get_profile("suite"), max_examples=500, phases=list(Phase))
# `make fuzz`: the decoders, for as long as somebody has patience.
FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20000"))
settings.register_profile("fuzz", parent=settings.get_profile("work"), max_examples=FUZZ_EXAMPLES)
settings.load_profile("suite")
