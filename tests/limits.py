"""How long a test waits for what must come: only hangs take so long.

No test passes or fails by the clock. A busy machine is no fault.
"""

HANG = 1200.0  # seconds; below pytest's limit, which ends a test with its stack
