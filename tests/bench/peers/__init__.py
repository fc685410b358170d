"""The alternatives: a module for each, with its worker, settings and way to enqueue."""
