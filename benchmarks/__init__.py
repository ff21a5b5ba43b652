"""The parts of `bench.py` (workloads, engines, ceilings, roofline, step timing, modes), and single benchmarks."""
