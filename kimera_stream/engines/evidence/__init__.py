"""Textual evidence: what two statements say against each other, in words and numbers.

``reading`` reads one statement (polarity, names, quantities, mood), ``findings`` compares two readings, ``rules`` turns
findings into a probability and into plain words. No model, no network: word lists written for this project in ``data/``.
"""

from kimera_stream.engines.evidence.rules import Evidence, Rules, packaged_rules

__all__ = ["Evidence", "Rules", "packaged_rules"]
