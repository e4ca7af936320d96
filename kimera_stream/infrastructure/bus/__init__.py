"""The bus between nodes: work streams, topics, questions and shared values.

The bus carries work and hurry, never truth: whatever it loses is in the database, or is asked again. ``interface`` is what others
import; ``redis`` and ``memory`` implement it and are imported by the composition alone (a single node loads no Redis client).
"""
