"""Benchmarks.  Every script checks its result before it takes a time, and prints the hardware and the threads."""
