"""Kinds of attention of the GPT-J family, one module each; `base.py` has what they implement."""
