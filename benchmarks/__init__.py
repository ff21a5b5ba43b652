"""What `bench.py` is made of: workloads, engines, the device's ceilings, the roofline and the step's breakdown."""
