"""The contract between producers, workers and readers. It needs pydantic alone."""
