"""Read a plan: what is kept, what is recomputed, why, and where the peak is; and the two graphs that run.

python examples/reading_a_plan.py [--pictures FOLDER]
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import fxckpt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pictures", type=Path, help="also write plan.html, timeline.svg and plan.json there")
options = parser.parse_args()

block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True, norm_first=True, activation="gelu")
model = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
x = torch.randn(8, 128, 128)
model = fxckpt.optimize(model, memory_budget=0.5, example_inputs=(x,))

# The report: the header says what the plan costs and where its peak is, the breakdown what the peak consists of, the
# table what is decided for the largest tensors and why.
fxckpt.print_plan(model)

# The graphs: repeated ops stand in the backward graph under names that end in _again.
emitted = fxckpt.graphs(model)
repeats = [node for node in emitted.backward.graph.nodes if "_again" in node.name]
print(f"\nbackward repeats {len(repeats)} nodes; the first of them:")
for node in repeats[:5]:
    print(f"    {node.name} = {node.target}{node.args}")

# Each op of the captured graph carries its decision.
decided = next(n for n in emitted.captured.graph.nodes if n.meta.get("fxckpt", {}).get("runs", 1) > 1)
print(f"\n{decided.name}.meta['fxckpt'] = {decided.meta['fxckpt']}")

# A plan is data: it can be saved, compared, and applied to the same model elsewhere.
plan = emitted.plan
again = fxckpt.Plan.from_json(plan.to_json())
print(f"\n{again!r}")
if options.pictures:
    options.pictures.mkdir(parents=True, exist_ok=True)
    (options.pictures / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    plan.save_html(options.pictures / "plan.html")
    figure, _ = plan.plot_timeline()
    figure.savefig(options.pictures / "timeline.svg")
