"""Trains small Cottention models; the one that ships in the package is made here.

Owns everything from a folder of Python text to a complete Hugging Face model folder. Knows nothing
of serving: no slots, no scheduler, no requests. Run as `python -m cottention.engine.training`.
"""
