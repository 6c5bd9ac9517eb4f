"""Pure functions on arrays: each with an obvious reference beside the fast path. No flax."""
