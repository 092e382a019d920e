"""Settings all tests share."""

from hypothesis import HealthCheck, settings

# Machines under load are slow at times, and so is the first example (Hypothesis builds its Unicode tables then).
settings.register_profile("chimera", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("chimera")
