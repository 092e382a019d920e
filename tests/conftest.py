"""What all tests share: settings for few and busy cores."""

import os

from hypothesis import HealthCheck, settings

# Tests run side by side, where threads that spin for work cost the most.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is slow at times, and so is the first example (Hypothesis builds its Unicode tables then).
settings.register_profile("chimera", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("chimera")
