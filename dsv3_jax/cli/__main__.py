"""`python -m dsv3_jax.cli` is `dsv3`."""

import sys

from dsv3_jax.cli import main

sys.exit(main.main())
