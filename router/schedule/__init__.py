"""The scheduling of requests: which tokens each step computes, and what a request gets of it."""
