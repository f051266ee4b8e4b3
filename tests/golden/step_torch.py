"""Torch's side of `proxytune bench step --torch PYTHON --source LlamaGen`: LoRA steps of LlamaGen's own GPT with peft
and random weights. Reads lines: `step` takes one and answers with its seconds, `peak` answers with the most memory
that the process has held, in bytes. `--memory fit` is torch.utils.checkpoint around every block.
"""

import argparse
import sys
import time

import peft
import torch
from torch.utils.checkpoint import checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--source", required=True)
parser.add_argument("--memory", choices=["fit", "fast"], default="fast")
parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
parser.add_argument("--sizes", default="36,20,1280", help="layers, heads, width")
parser.add_argument("--size", type=int, default=256)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
args = parser.parse_args()

torch.set_num_threads(args.threads)
torch.manual_seed(0)
sys.path.insert(0, args.source)
from autoregressive.models import gpt

device = torch.device(args.device)
on_card = device.type == "cuda"
layers, heads, dim = map(int, args.sizes.split(","))
side = args.size // 16
torch.set_default_dtype(getattr(torch, args.dtype))
with device:  # weights are drawn where they are used
    model = gpt.Transformer(
        gpt.ModelArgs(
            n_layer=layers, n_head=heads, dim=dim, block_size=side * side, model_type="t2i", cls_token_num=120
        )
    )
model.output.weight.data.normal_(std=0.02)
torch.set_default_dtype(torch.float32)
model = peft.get_peft_model(
    model,
    peft.LoraConfig(r=16, lora_alpha=16, target_modules=r"layers\..*\.(wqkv|wo|w1|w2|w3)"),
)
model.train().to(device)
if args.memory == "fit":
    for block in model.base_model.model.layers:
        block.forward = (lambda inner: lambda *given: checkpoint(inner, *given, use_reentrant=False))(block.forward)
trained = [p for p in model.parameters() if p.requires_grad]
for p in trained:
    p.data = p.data.float()
optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

b, n = args.batch_size, 120 + side * side - 1
captions = torch.randn(b, 120, 2048, dtype=getattr(torch, args.dtype)).to(device)
tokens = torch.randint(16384, (b, side * side)).to(device)
mask = torch.tril(torch.ones(n, n, dtype=torch.bool))[None, None].repeat(b, 1, 1, 1).to(device)


def step():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
        _, loss = model(idx=tokens[:, :-1], cond_idx=captions, targets=tokens, mask=mask)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return loss.item()


for line in sys.stdin:
    if line.strip() == "step":
        start = time.perf_counter()
        step()
        if on_card:
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)
    else:
        status = dict(part.split(":", 1) for part in open("/proc/self/status").read().splitlines())
        print(int(status["VmHWM"].split()[0]) * 1024, flush=True)
