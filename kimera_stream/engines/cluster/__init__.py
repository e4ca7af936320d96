"""Several nodes: which engine owns which slice, scoring by slices, and what edges ask of engines."""
