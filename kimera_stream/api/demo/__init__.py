"""The demo: a feed written for this project, opened to a real server through its public doors, and scored."""
