"""Leases kept, and whose they are."""
