"""Several nodes: what a process is made of that shares the log with others, by its role."""
