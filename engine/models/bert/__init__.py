"""Bidirectional encoders in a BERT's shape, with Cottention or cosFormer in place of softmax."""
