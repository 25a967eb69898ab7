"""Benchmarks. Each one checks its results before it measures times, and prints the hardware and the threads."""
