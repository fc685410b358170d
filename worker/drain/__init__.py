"""A batch's way through the worker: admission, application, publication."""
