"""Conformance suites: one per contract, for our implementations and for third parties."""
