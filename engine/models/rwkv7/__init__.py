"""RWKV-7: folders as flash-linear-attention has them, and single .pth files."""
