"""Measurements of the server, each as a ratio to a floor or a peer taken in the same run."""
