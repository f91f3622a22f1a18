"""Benchmarks, the compile report and the demo: `python -m bench.<name>`."""
