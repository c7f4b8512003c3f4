"""The `gptj` family: GPT-J blocks around Cottention, cosFormer or linear attention."""
