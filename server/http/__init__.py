"""The HTTP layer: connections and their limits, bodies, errors, request ids."""
