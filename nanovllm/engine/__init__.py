"""The decisions, in plain Python, loaded without torch: sequences, blocks, the schedule, and refusals with reasons."""
