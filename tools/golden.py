#!/usr/bin/env python3
"""Golden values: what Hugging Face transformers, in f32, says about the same weights.

    tools/golden.py smollm2 --model FILE.gguf     writes tests/golden/smollm2.json
    tools/golden.py tiny                          writes tests/golden/tiny_*/
    tools/golden.py hf-dir DIR --model FILE.gguf  saves the weights as an HF directory, f32
    tools/golden.py compare --model FILE.gguf     KL and top-1 of build/thaw against transformers

Needs numpy, torch, transformers, tokenizers, safetensors and gguf; `make test` never runs it. The GGUF
weights are dequantised here by the gguf package, independently of thaw's own code.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from kl import log_softmax
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TEXT = ROOT / "tests" / "data" / "alice.txt"


# --- A GGUF file as a transformers model -----------------------------------------------------------

HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{HF_LAYER_NAMES[parts[2]]}.weight"
    return f"{top[parts[0]]}.weight"


def interleaved_to_halves(matrix, n_heads):
    """Undoes the row order of llama.cpp's converter, which puts the two elements that RoPE rotates
    together next to each other: row (h, i, half) of the file is row (h, half, i) of the checkpoint."""
    rows, cols = matrix.shape
    return matrix.reshape(n_heads, rows // n_heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def read_gguf(path):
    """(transformers config, dict of f32 tensors under their Hugging Face names, GGUF fields)"""
    reader = gguf.GGUFReader(path)
    field = {name: f.contents() for name, f in reader.fields.items()}
    key = lambda name: field[f"llama.{name}"]
    tensors = {}
    for t in reader.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in t.shape[::-1]])
        if t.name.endswith("attn_q.weight"):
            values = interleaved_to_halves(values, key("attention.head_count"))
        if t.name.endswith("attn_k.weight"):
            values = interleaved_to_halves(values, key("attention.head_count_kv"))
        tensors[hf_name(t.name)] = torch.from_numpy(np.ascontiguousarray(values))
    config = transformers.LlamaConfig(
        vocab_size=len(tensors["model.embed_tokens.weight"]),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in tensors,
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=field["tokenizer.ggml.eos_token_id"],
    )
    return config, tensors, field


def build_model(config, tensors, dtype=torch.float32):
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.to(dtype).eval()


def build_tokenizer(field):
    """The byte-level BPE of a GGUF file whose pre-tokenizer is "smollm"."""
    assert field["tokenizer.ggml.pre"] == "smollm"
    vocab = {token: i for i, token in enumerate(field["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ")) for m in field["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = zip(field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"])
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == gguf.TokenType.CONTROL])
    return tokenizer


@torch.no_grad()
def hf_logits(model, ids):
    """T x vocab logits of one causal pass, as float64."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    return model.lm_head(hidden).double().numpy()


# --- Goldens ---------------------------------------------------------------------------------------


def smollm2(args):
    """Per position: the most probable id, and the NLL of the token that follows; for KL, the
    log-probabilities of the args.top most probable ids."""
    config, tensors, field = read_gguf(args.model)
    ids = build_tokenizer(field).encode(TEXT.read_text()).ids[: args.tokens]
    logp = log_softmax(hf_logits(build_model(config, tensors), ids))
    best = np.argsort(-logp, axis=1, kind="stable")[:, : args.top]
    golden = {
        "about": "transformers LlamaForCausalLM, f32, on the first tokens of tests/data/alice.txt",
        "made_by": "tools/golden.py smollm2",
        "tokens": ids,
        "nll": [round(float(-logp[t, ids[t + 1]]), 5) for t in range(len(ids) - 1)],
        "top_ids": best.tolist(),
        "top_logp": [[round(float(logp[t, i]), 6) for i in row] for t, row in enumerate(best)],
    }
    write_json(GOLDEN / "smollm2.json", golden)


def write_json(path, value):
    """One top-level key a line, so that a change shows where it is."""
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in value.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


# Shapes that SmolLM2 does not have. The context is short so that 48 tokens reach every band of RoPE
# scaling. "new_keys": RoPE as transformers 5 writes it, in one object, not in the two keys of before.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY = {
    "tiny_mha_tied": {"heads": 3, "kv_heads": 3, "head_dim": 8, "hidden": 24, "tied": True},
    "tiny_gqa3_untied": {"heads": 6, "kv_heads": 2, "head_dim": 4, "hidden": 24, "tied": False},
    "tiny_gqa4_llama3": {"heads": 4, "kv_heads": 1, "head_dim": 16, "hidden": 40, "tied": False,
                         "scaling": LLAMA3_SCALING, "dtype": torch.bfloat16, "theta": 500000.0},
    "tiny_linear": {"heads": 4, "kv_heads": 2, "head_dim": 12, "hidden": 32, "tied": True,
                    "scaling": {"type": "linear", "factor": 4.0}, "dtype": torch.float16},
    "tiny_sharded": {"heads": 8, "kv_heads": 2, "head_dim": 6, "hidden": 32, "tied": False,
                     "scaling": LLAMA3_SCALING, "shards": 2, "dtype": torch.bfloat16,
                     "new_keys": True},
}
TINY_VOCAB, TINY_LAYERS, TINY_FFN, TINY_TOKENS = 64, 2, 40, 48


def tiny_config(spec):
    """config.json of a tiny model."""
    scaling, theta = spec.get("scaling"), spec.get("theta", 10000.0)
    rope = {"rope_scaling": scaling, "rope_theta": theta}
    if spec.get("new_keys"):
        rope = {"rope_parameters": scaling | {"rope_theta": theta}}
    return rope | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": spec["head_dim"],
        "hidden_act": "silu",
        "hidden_size": spec["hidden"],
        "intermediate_size": TINY_FFN,
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": spec["heads"],
        "num_hidden_layers": TINY_LAYERS,
        "num_key_value_heads": spec["kv_heads"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": spec["tied"],
        "torch_dtype": str(spec.get("dtype", torch.float32)).removeprefix("torch."),
        "vocab_size": TINY_VOCAB,
    }


def tiny(args):
    """Random models, with logits so wide that an error anywhere shows. `logits` come from float64 (where
    transformers does not force f32 itself); `f32_error` is how far its f32 strays from them."""
    for seed, (name, spec) in enumerate(TINY.items()):
        folder = GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(tiny_config(spec), indent=2) + "\n")
        config = transformers.LlamaConfig.from_pretrained(folder)
        generator = torch.Generator().manual_seed(seed)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
        tensors = {}
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            value = 1 + 0.2 * noise if p.dim() == 1 else noise * 1.5 / p.shape[1] ** 0.5
            tensors[key] = value.to(spec.get("dtype", torch.float32))
        save_shards(folder, tensors, spec.get("shards", 1))
        ids = torch.randint(TINY_VOCAB, (TINY_TOKENS,), generator=generator).tolist()
        wide = {key: value.float() for key, value in tensors.items()}
        exact = hf_logits(build_model(config, wide, torch.float64), ids)
        f32_error = np.abs(hf_logits(build_model(config, wide), ids) - exact).max()
        expected = [[float(f"{x:.8g}") for x in row] for row in exact]
        write_json(folder / "expected.json",
                   {"tokens": ids, "f32_error": float(f"{f32_error:.2g}"), "logits": expected})


def save_shards(folder, tensors, n_shards):
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for s in range(n_shards):
        shard = f"model-{s + 1:05}-of-{n_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[s::n_shards]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= {name: shard for name in part}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def hf_dir(args):
    """The weights of a GGUF file as a Hugging Face directory, f32, with its tokenizer."""
    config, tensors, field = read_gguf(args.model)
    folder = pathlib.Path(args.dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    build_tokenizer(field).save(str(folder / "tokenizer.json"))
    tokens = field["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "add_bos_token": field["tokenizer.ggml.add_bos_token"],
        "bos_token": tokens[config.bos_token_id],
        "eos_token": tokens[config.eos_token_id],
        "chat_template": field["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    print(f"{folder}: {sum(t.numel() for t in tensors.values())} parameters")


# --- Comparing -------------------------------------------------------------------------------------


def thaw_logits(args, model, ids_file, prefill, out):
    command = [args.thaw, "logits", "-m", model, "--tokens", ids_file, "-o", out, *args.flags.split()]
    if prefill is not None:
        command += ["--prefill", str(prefill)]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return np.load(out).astype(np.float64)


def report(name, logp, other, ids):
    """KL(logp || other) and whether both choose the same token; logp is the trusted side."""
    kl = (np.exp(logp) * (logp - other)).sum(axis=1)
    agree = (logp.argmax(axis=1) == other.argmax(axis=1)).mean()
    rows = np.arange(len(ids) - 1)
    nll = [-x[rows, ids[1:]].mean() for x in (logp, other)]
    print(f"{name}: {len(ids)} tokens, KL mean {kl.mean():.2e} p99 {np.quantile(kl, 0.99):.2e} "
          f"max {kl.max():.2e}, top-1 {100 * agree:.2f} %, NLL {nll[0]:.6f} / {nll[1]:.6f}")


def peer_log_probs(args, ids):
    """What llama-perplexity saves of the first len(ids) tokens: (first position, log-probabilities).
    Its file: magic, context, vocabulary, chunks, tokens; then for each position of the second half of
    the context f32 scale, f32 least log-probability, and a 16-bit code for each vocabulary entry."""
    with tempfile.TemporaryDirectory() as temp:
        out = f"{temp}/logits"
        command = [args.llama_perplexity, "-m", args.model, "-f", args.text, "-c", len(ids), "-b",
                   len(ids), "--chunks", 1, "-t", 2, "--save-all-logits", out]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        data = pathlib.Path(out).read_bytes()
    n_ctx, n_vocab, n_chunks = np.frombuffer(data, np.int32, 3, 8)
    assert data[:8] == b"_logits_" and n_ctx == len(ids) and n_chunks == 1
    assert np.frombuffer(data, np.int32, n_ctx, 20).tolist() == ids
    first, width = n_ctx // 2, 2 * ((n_vocab + 1) // 2) + 4
    rows = np.frombuffer(data, np.uint16, offset=20 + 4 * n_ctx).reshape(-1, width)
    scale, least = np.ascontiguousarray(rows[:, :4]).view(np.float32).astype(np.float64).T[:, :, None]
    return first, scale * rows[:, 4 : 4 + n_vocab] + least


def compare(args):
    config, tensors, field = read_gguf(args.model)
    ids = build_tokenizer(field).encode(pathlib.Path(args.text).read_text()).ids[: args.tokens]
    truth = log_softmax(hf_logits(build_model(config, tensors), ids))
    if args.llama_perplexity:
        first, peer = peer_log_probs(args, ids)
        last = first + len(peer)
        report("llama.cpp: transformers / second half", truth[first:last], peer, ids[first:last])
    with tempfile.TemporaryDirectory() as temp:
        ids_file, out = f"{temp}/ids.txt", f"{temp}/logits.npy"
        pathlib.Path(ids_file).write_text(" ".join(map(str, ids)) + "\n")
        for model in [args.model] + ([args.hf_dir] if args.hf_dir else []):
            whole = log_softmax(thaw_logits(args, model, ids_file, None, out))
            report(f"{model}: transformers / one prefill", truth, whole, ids)
            steps = log_softmax(thaw_logits(args, model, ids_file, 1, out))
            report(f"{model}: transformers / token by token", truth, steps, ids)
            report(f"{model}: one prefill / token by token", whole, steps, ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("smollm2")
    p.add_argument("--model", required=True)
    p.add_argument("--tokens", type=int, default=384)
    p.add_argument("--top", type=int, default=16)
    p.set_defaults(run=smollm2)
    commands.add_parser("tiny").set_defaults(run=tiny)
    p = commands.add_parser("hf-dir")
    p.add_argument("dir")
    p.add_argument("--model", required=True)
    p.set_defaults(run=hf_dir)
    p = commands.add_parser("compare")
    p.add_argument("--model", required=True)
    p.add_argument("--thaw", default="build/thaw")
    p.add_argument("--hf-dir", help="compare this directory (from `hf-dir`) too")
    p.add_argument("--llama-perplexity", help="compare this program of tools/peers.sh too")
    p.add_argument("--text", default=TEXT)
    p.add_argument("--tokens", type=int, default=2304)
    p.add_argument("--flags", default="--policy full", help="more flags for `thaw logits`, in one argument")
    p.set_defaults(run=compare)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.run(args)


if __name__ == "__main__":
    main()
