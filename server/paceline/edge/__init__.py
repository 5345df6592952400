"""Rounds of edge inference (PartialLoading, arXiv 2503.22982): who is served, in which order models
are loaded, and what share of the uplink each client gets."""
