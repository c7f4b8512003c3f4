"""The files of benchmarks/family_models.py as GGUF, in float32 or bfloat16, for llama.cpp.

Names, shapes and settings are those that llama.cpp reads for its architectures `mamba2` and
`rwkv7`; in bfloat16 are the matrices that its own conversion leaves so. The files have no
vocabulary.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]

_RWKV_7_NAMES = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.k_k": "time_mix_k_k",
    "att.k_a": "time_mix_k_a",
    "att.r_k": "time_mix_r_k",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.output": "time_mix_output",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
}


_FLOAT32 = re.compile(r"_norm|_lerp_|ssm_conv1d|time_mix_w[12]")
"""In names of matrices that are float32 in every file."""


def written(model: Path, dtype: torch.dtype) -> Path:
    """The GGUF of a family's files, beside them; written if it is not there."""
    file = model.with_suffix(f".{dtype}.gguf")
    if not file.exists():
        _mamba2(model, file, dtype) if model.is_dir() else _rwkv7(model, file, dtype)
    return file


def _mamba2(folder: Path, file: Path, dtype: torch.dtype) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    inner = config["expand"] * config["hidden_size"]
    writer = _writer(file, "mamba2", config["num_hidden_layers"], config["hidden_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_feed_forward_length(0)
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config["state_size"])
    writer.add_ssm_time_step_rank(config["num_heads"])
    writer.add_ssm_group_count(config["n_groups"])
    _write(writer, _mamba2_weights(weights, config), dtype)


def _mamba2_weights(weights: dict[str, Tensor], config: dict[str, Any]) -> Named:
    yield "token_embd.weight", weights["backbone.embeddings.weight"]
    yield "output_norm.weight", weights["backbone.norm_f.weight"]
    for layer in range(config["num_hidden_layers"]):
        block, part = f"blk.{layer}.", f"backbone.layers.{layer}."
        mixer = part + "mixer."
        yield block + "attn_norm.weight", weights[part + "norm.weight"]
        yield block + "ssm_in.weight", weights[mixer + "in_proj.weight"]
        yield block + "ssm_conv1d.weight", weights[mixer + "conv1d.weight"].squeeze(1)
        yield block + "ssm_conv1d.bias", weights[mixer + "conv1d.bias"]
        yield block + "ssm_dt.bias", weights[mixer + "dt_bias"]
        yield block + "ssm_a", -weights[mixer + "A_log"].float().exp().unsqueeze(1)
        yield block + "ssm_d", weights[mixer + "D"].unsqueeze(1)
        yield block + "ssm_norm.weight", weights[mixer + "norm.weight"].view(config["n_groups"], -1)
        yield block + "ssm_out.weight", weights[mixer + "out_proj.weight"]


def _rwkv7(source: Path, file: Path, dtype: torch.dtype) -> None:
    weights: dict[str, Tensor] = torch.load(source, weights_only=True)
    vocab_size, width = weights["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    last = f"blocks.{layers - 1}."
    writer = _writer(file, "rwkv7", layers, width)
    writer.add_vocab_size(vocab_size)
    writer.add_feed_forward_length(len(weights[last + "ffn.key.weight"]))
    writer.add_layer_norm_eps(1e-5)
    writer.add_token_shift_count(2)
    writer.add_wkv_head_size(weights[last + "att.r_k"].shape[1])
    writer.add_decay_lora_rank(weights[last + "att.w1"].shape[1])
    writer.add_iclr_lora_rank(weights[last + "att.a1"].shape[1])
    writer.add_value_residual_mix_lora_rank(weights[last + "att.v1"].shape[1])
    writer.add_gate_lora_rank(weights[last + "att.g1"].shape[1])
    _write(writer, _rwkv7_weights(weights, layers), dtype)


def _rwkv7_weights(weights: dict[str, Tensor], layers: int) -> Named:
    yield "token_embd.weight", weights["emb.weight"]
    yield "output.weight", weights["head.weight"]
    for end in ("weight", "bias"):
        yield f"token_embd_norm.{end}", weights[f"blocks.0.ln0.{end}"]
        yield f"output_norm.{end}", weights[f"ln_out.{end}"]
    for layer in range(layers):
        block, part = f"blk.{layer}.", f"blocks.{layer}."
        for name, other in _RWKV_7_NAMES.items():
            for end in (".weight", ".bias", ""):
                if part + name + end in weights:
                    named = f"{block}{other}{end or '.weight'}"
                    yield named, weights[part + name + end].squeeze()
        mixes = [weights[f"{part}att.x_{name}"] for name in "rwkvag"]
        yield block + "time_mix_lerp_fused.weight", torch.stack(mixes)
        yield block + "channel_mix_lerp_k.weight", weights[part + "ffn.x_k"].view(1, 1, -1)
        for name in "wavg":
            # llama.cpp wants those of v in the first block, of a's rank, and does not use them
            own = "a" if name == "v" and layer == 0 else name
            for end in "012":
                if part + f"att.{own}{end}" in weights:
                    weight = weights[part + f"att.{own}{end}"].squeeze()
                    yield f"{block}time_mix_{name}{end}.weight", weight.T if end > "0" else weight


def _writer(file: Path, architecture: str, layers: int, width: int) -> Any:
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_head_count(0)
    writer.add_tokenizer_model("no_vocab")
    return writer


def _write(writer: Any, weights: Named, dtype: torch.dtype) -> None:
    from gguf import GGMLQuantizationType, quants

    stored = GGMLQuantizationType.BF16
    for name, weight in weights:
        tensor = weight.float()
        # norms of groups and lerps keep their ones; r_k is a vector there
        flat = name.endswith("time_mix_r_k.weight")
        values = (tensor.flatten() if flat else tensor).contiguous().numpy()
        is_matrix = values.ndim == 2 and name.endswith(".weight") and not _FLOAT32.search(name)
        if is_matrix and dtype == torch.bfloat16:
            writer.add_tensor(name, quants.quantize(values, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
