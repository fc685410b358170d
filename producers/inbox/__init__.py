"""The inbox protocol: the one owner of an organization's stream and lease."""
