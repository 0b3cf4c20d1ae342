"""The command line: `sparkmoe serve`, `status`, `quantize` and `selftest`, and the demo."""
