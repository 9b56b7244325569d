"""Parts of `tools/bench.py`, and benchmarks of single parts of the project. Begin with `stages.py`."""
