"""The command line: `sparkmoe serve`, `status`, `quantize`, `selftest`, and the demo."""
