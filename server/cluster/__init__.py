"""Servers of one cluster that something else than `cottention serve` starts."""
