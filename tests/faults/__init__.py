"""The fault harness: real servers, random faults, and a comparison with a sequential model."""
