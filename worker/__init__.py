"""What applies and serves tags. Deliberately empty: `import worker.rules` must not load Celery."""
