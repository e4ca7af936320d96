"""Programs that make what the package ships. Not installed with it."""
