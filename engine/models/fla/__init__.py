"""Models of flash-linear-attention: gated linear attention, RetNet, HGRN2 and the delta rules."""
