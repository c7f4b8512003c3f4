"""Model folders as accidents leave them: one seeded mutation of a good folder for each number."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.engine.models.weight_files import read_weights

Mutation = Callable[[random.Random, Path], None]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 64, 319, 320, 10**9, 10**30, 0.5, 1e300, float("nan")),
    *("", "a", "<|endoftext|>", "<|nowhere|>", "\ud800", "\u2581", "é\n"),
    *([], [0], [1, "b"], [[]], {}, {"content": "a"}, {"content": None}, {"a": {"b": 1}}),
)


def mutated_folder(good: Path, number: int, target: Path) -> str:
    """Make the folder of this number at `target`; returns what was done to it."""
    rng = random.Random(number)
    shutil.copytree(good, target)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(MUTATIONS))
        MUTATIONS[name](rng, target)
        names.append(name)
    return f"{number}: {', '.join(names)}"


def make_good_folder(golden: Path, target: Path) -> None:
    """The small golden model with every side file that a published folder has."""
    shutil.copytree(golden, target, ignore=shutil.ignore_patterns("expected.*", "*.bin"))
    save_file(read_weights(golden), target / "model.safetensors")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEFAULT_MODEL / name, target)
    generation = {"eos_token_id": [0], "temperature": 0.7, "top_k": 50, "max_new_tokens": 8}
    (target / "generation_config.json").write_text(json.dumps(generation))
    (target / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )


def _file(rng: random.Random, folder: Path, suffix: str = "") -> Path:
    files = [each for each in folder.iterdir() if each.is_file() and each.name.endswith(suffix)]
    return rng.choice(sorted(files))


def _remove(rng: random.Random, folder: Path) -> None:
    _file(rng, folder).unlink()


def _double(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder)
    path.write_bytes(path.read_bytes() * 2)


def _truncate(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder)
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice((0, 1, len(data) // 2, len(data) - 1, len(data) - 9))])


def _change_bytes(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 20))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def _encode(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder, ".json")
    encoding = rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "crlf"))
    text = path.read_bytes().decode("utf-8", errors="replace")
    if encoding == "crlf":
        path.write_bytes(text.replace("\n", "\r\n").encode())
    else:
        path.write_bytes(text.encode(encoding, errors="replace"))


def _replace_by(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder)
    path.unlink()
    match rng.choice(("folder", "broken link", "link to itself", "text", "deep", "other")):
        case "folder":
            path.mkdir()
        case "broken link":
            path.symlink_to(folder / "nowhere")
        case "link to itself":
            path.symlink_to(path)
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        case "deep":
            path.write_text("[" * 100_000)
        case _:
            path.write_text(json.dumps(rng.choice(VALUES)))


def _change_value(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder, ".json")
    _edit(path, rng, lambda raw, name: raw.__setitem__(name, rng.choice(VALUES)))


def _change_config(rng: random.Random, folder: Path) -> None:
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    path = folder / rng.choice(names)
    _edit(path, rng, lambda raw, name: raw.__setitem__(name, rng.choice(VALUES)), depth=1)


def _drop_key(rng: random.Random, folder: Path) -> None:
    _edit(_file(rng, folder, ".json"), rng, lambda raw, name: raw.pop(name))


def _repeat_key(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder, ".json")
    text = path.read_text(errors="replace").strip()
    if text.startswith("{") and path.is_file():
        name = rng.choice(("eos_token_id", "eos_token", "vocab_size", "model"))
        extra = f'"{name}": {json.dumps(rng.choice(VALUES))}'
        path.write_text(f"{text[:-1]}, {extra}, {extra}}}")


def _older_tokenizer(rng: random.Random, folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = _read(path)
    if not isinstance(raw, dict) or "model" not in raw:
        return
    vocabulary, merges = raw["model"].get("vocab", {}), raw["model"].get("merges", [])
    lines = [each if isinstance(each, str) else " ".join(each) for each in merges]
    end = rng.choice(("\n", "\r\n"))
    text = end.join(["#version: 0.2", *lines, *rng.choice(([], [""], ["a"], ["a b c"], ["x y"]))])
    size = len(vocabulary)
    added = rng.choice(({}, {"    ": size}, {"a": size}, {"é": size + 9}, {"é": -1}, {"é": "1"}))
    path.unlink()
    encoding = rng.choice(("utf-8", "utf-8-sig", "utf-16"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding=encoding)
    (folder / "merges.txt").write_bytes(text.encode(rng.choice(("utf-8", "utf-8-sig"))))
    (folder / "added_tokens.json").write_text(json.dumps(added))


def _add_decoder(rng: random.Random, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    raw = _read(path)
    if isinstance(raw, dict):
        token = rng.choice(
            ({"content": "zz", "special": rng.choice(VALUES[:3])}, "zz", {"content": 5}, None)
        )
        decoder = {rng.choice(("0", "300", "320", "x", "-1", "99999999999999999999")): token}
        path.write_text(json.dumps(raw | {"added_tokens_decoder": decoder}))


def _change_weights(rng: random.Random, folder: Path) -> None:
    import torch

    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except Exception:
        return
    name = rng.choice(sorted(weights))
    match rng.randrange(7):
        case 0:
            del weights[name]
        case 1:
            weights[name] = weights[name].to(torch.int64)
        case 2:
            weights[name] = weights[name].flatten()[:-1].clone()
        case 3:
            prefix = rng.choice(("module.", "_orig_mod.", "module._orig_mod.", "model."))
            weights = {prefix + key: value for key, value in weights.items()}
        case 4:
            weights["module." + name] = weights[name].clone()
        case 5:
            weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        case _:
            weights[name] = weights[name].to(torch.bfloat16)
    save_file(weights, path)


def _shard_weights(rng: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors"
    if path.is_file():
        path.rename(folder / "model-00001-of-00001.safetensors")
        shard = rng.choice(("model-00001-of-00001.safetensors", "../x.safetensors", "no", 5, None))
        index = rng.choice(({"weight_map": {"lm_head.bias": shard}}, {}, [], {"weight_map": []}))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _edit(
    path: Path, rng: random.Random, change: Callable[[Any, Any], Any], depth: int = 3
) -> None:
    """Change a key of a JSON file's object, or of one within it."""
    whole = raw = _read(path)
    if not isinstance(raw, dict) or not raw:
        return
    for _ in range(rng.randrange(depth)):
        inner = [each for each in raw.values() if isinstance(each, dict) and each]
        if inner:
            raw = rng.choice(inner)
    change(raw, rng.choice(sorted(raw)))
    path.write_text(json.dumps(whole))


MUTATIONS: dict[str, Mutation] = {
    each.__name__.strip("_"): each
    for each in (
        *(_remove, _double, _truncate, _change_bytes, _encode, _replace_by, _change_value),
        *(_change_config, _drop_key, _repeat_key, _older_tokenizer, _add_decoder),
        *(_change_weights, _shard_weights),
    )
}
