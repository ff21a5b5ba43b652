"""The parts of `bench.py`: workloads, engines, the device's ceilings, the roofline and the step's breakdown."""
