"""Trains small models, from a folder of Python text to a Hugging Face model folder.

The model that ships with the package was made here. Run `python -m cottention.engine.training`.
"""
