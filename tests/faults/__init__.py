"""The fault harness: real servers and workers, faults at random, and a comparison with a sequential model."""
