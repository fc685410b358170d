"""What applies and serves tags. Deliberately empty: `import worker.decide` must not load Celery."""
