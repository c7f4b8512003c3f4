"""Sessions: what can be done with one, where its state is kept, and its form as bytes."""
