"""For all tests: what Hypothesis tries is the same each time, so that a change is judged by what it changes."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
