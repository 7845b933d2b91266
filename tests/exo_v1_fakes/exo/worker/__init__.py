"""Part of a stand-in for exo's second generation."""
