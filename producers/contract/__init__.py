"""The contract between producers, workers and readers: what may be said. It needs pydantic alone."""
