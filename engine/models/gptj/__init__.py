"""The `gptj` family: GPT-J blocks around Cottention or a related kind of attention."""
