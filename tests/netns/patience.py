"""How long tests wait: a multiple of what a machine of its own needs, as an emulated kernel is ten times slower."""

from __future__ import annotations

import os

TIME_SCALE = float(os.environ.get("SLUICE_TIME_SCALE", "1"))
"""SLUICE_TIME_SCALE; tests/vm sets it."""
