"""The HTTP endpoints and the application that holds them."""
