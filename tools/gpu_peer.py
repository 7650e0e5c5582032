#!/usr/bin/env python3
"""What PyTorch reaches on this GPU, for tools/gpu_check.sh: the rate of a large bf16 product, and the
decoding speed of the 8B shape in Hugging Face transformers: bf16, random weights, a static cache, a
compiled step. Prints JSON: {"product_tflops": .., "decode_tok_s": {"CONTEXT": .., ...}}. Needs torch
with CUDA and transformers 5."""
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache

CONTEXTS, STEPS, REPETITIONS, PRODUCT = [512, 8192, 32768], 32, 5, 8192


def seconds_of(work):
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def product_tflops():
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def multiply():
        for _ in range(10):
            torch.matmul(a, b)

    multiply()
    times = [seconds_of(multiply) for _ in range(REPETITIONS)]
    return 10 * 2 * PRODUCT**3 / statistics.median(times) / 1e12


def make_model():
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, intermediate_size=14336, vocab_size=128256,
                         rope_theta=5e5, max_position_embeddings=131072)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()


def decode_speed(model, step, context):
    cache = StaticCache(config=model.config, max_cache_len=context + STEPS + 8)
    token = torch.tensor([[7]], device="cuda")
    model(token, past_key_values=cache, use_cache=True)  # the cache takes its memory

    def decode():
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        for _ in range(STEPS):
            step(token, past_key_values=cache, use_cache=True)

    decode()  # compiles and records
    return STEPS / statistics.median(seconds_of(decode) for _ in range(REPETITIONS))


def main():
    with torch.no_grad():
        result = {"product_tflops": product_tflops(), "decode_tok_s": {}}
        model = make_model()
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        for context in CONTEXTS:
            result["decode_tok_s"][str(context)] = decode_speed(model, step, context)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
