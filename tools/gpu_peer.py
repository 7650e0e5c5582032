#!/usr/bin/env python3
"""Decoding speed of the 8B shape in Hugging Face transformers: bf16, random weights, a static cache,
a compiled step. Prints JSON: {"CONTEXT": tokens a second, ...}. Needs torch with CUDA."""
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache

CONTEXTS, STEPS = [512, 8192, 32768], 32


def main():
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, intermediate_size=14336, vocab_size=128256,
                         rope_theta=5e5, max_position_embeddings=131072)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    speeds = {}
    for context in CONTEXTS:
        cache = StaticCache(config=config, max_batch_size=1, max_cache_len=context + STEPS + 8,
                            device="cuda", dtype=torch.bfloat16)
        token = torch.tensor([[7]], device="cuda")
        place = torch.tensor([context], device="cuda")

        def decode(n):
            for _ in range(n):
                step(token, past_key_values=cache, cache_position=place, use_cache=True)
                place.add_(1)
            torch.cuda.synchronize()

        with torch.no_grad():
            decode(4)  # compiles and records
            rates = []
            for _ in range(5):
                place.fill_(context)
                start = time.perf_counter()
                decode(STEPS)
                rates.append(STEPS / (time.perf_counter() - start))
        speeds[str(context)] = sorted(rates)[len(rates) // 2]
        del cache
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
