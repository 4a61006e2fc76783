"""Benchmarks made here, with exact truth, in the official layouts that the benchmark readers read."""
