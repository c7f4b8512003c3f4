"""The wire: limits against slow or malformed requests, bodies, errors, request ids."""
