"""Plan for a GPU that you don't have: the model is on the meta device, so nothing is allocated and nothing runs.

    python examples/other_gpu.py [--layers 32] [--budget 60GB]

By default a small Llama-like model, so that this page runs in seconds; `--layers 32 --width 4096 --length 4096` is one
of eight billion parameters, planned in about a minute.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxckpt
from fxckpt.units import format_bytes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--width", type=int, default=1024)
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--budget", default=None, help="such as 60GB; by default 70 %% of the plain peak")
options = parser.parse_args()

config = LlamaConfig(
    hidden_size=options.width,
    intermediate_size=7 * options.width // 2,
    num_hidden_layers=options.layers,
    num_attention_heads=options.width // 64,
    num_key_value_heads=options.width // 128,
    vocab_size=32_000,
    use_cache=False,
)
with torch.device("meta"):
    model = LlamaForCausalLM(config).bfloat16()
    tokens = torch.zeros(options.batch, options.length, dtype=torch.long)

for device in ("A100", "H100", "RTX 4090"):
    plan = fxckpt.plan(
        model,
        options.budget or 0.7,
        example_kwargs={"input_ids": tokens, "labels": tokens},
        device=device,
    )
    plain, planned = plan.baseline, plan.predicted
    print(
        f"{device:9} plain {format_bytes(plain.peak_bytes)}, {plain.step_us / 1e3:.1f} ms a step; "
        f"planned {format_bytes(planned.peak_bytes)}, {planned.step_us / 1e3:.1f} ms"
    )
