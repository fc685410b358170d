"""What is run from the Makefile."""
