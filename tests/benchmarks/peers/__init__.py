"""The other engines, each a process that speaks `tests.benchmarks.protocol`."""
