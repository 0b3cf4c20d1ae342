"""Which tokens of which requests a step computes, and what becomes of what it sampled."""
