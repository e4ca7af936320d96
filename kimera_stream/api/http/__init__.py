"""The HTTP door: requests in, answers and streams out. ``routes`` puts it together."""
