"""Eight fake CPU devices; deterministic property tests."""

import hypothesis
import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
hypothesis.settings.register_profile(
  'suite', derandomize=True, deadline=None, print_blob=True
)
hypothesis.settings.load_profile('suite')
