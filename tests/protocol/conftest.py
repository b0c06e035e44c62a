"""Hypothesis profiles: ``ci`` by default, ``long`` for ``make stress`` (``--hypothesis-profile long``)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=150, deadline=None, suppress_health_check=_quiet, derandomize=True)
settings.register_profile("long", max_examples=50_000, deadline=None, suppress_health_check=_quiet, print_blob=True)
if settings.get_current_profile_name() == "default":
    settings.load_profile("ci")
