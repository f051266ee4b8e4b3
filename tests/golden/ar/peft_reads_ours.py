"""Shows that peft reads what proxytune writes: an adapter of a LlamaGen student, and the checkpoint that
`proxytune merge` made with it. Makes no golden file; it fails when the two differ.

    proxytune merge --model nano-llamagen --adapter datasets/runs/nano/student --out merged --dtype f32
    LLAMAGEN=path/to/LlamaGen python tests/golden/ar/peft_reads_ours.py \
        datasets/nano/checkpoints/llamagen datasets/runs/nano/student merged
"""
import dataclasses
import json
import os
import pathlib
import sys
import tempfile

import peft
import torch
from safetensors.torch import load_file

sys.path.insert(0, os.environ["LLAMAGEN"])
from autoregressive.models import gpt

base, adapter, merged = (pathlib.Path(argument) for argument in sys.argv[1:])


NO_DROPOUT = dict(token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0, class_dropout_prob=0.0)


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    known = {field.name for field in dataclasses.fields(gpt.ModelArgs)}
    args = gpt.ModelArgs(**{key: value for key, value in config.items() if key in known} | NO_DROPOUT)
    model = gpt.Transformer(args)
    state = load_file(folder / "model.safetensors")
    null = state["cls_embedding.uncond_embedding"]
    model.cls_embedding.uncond_embedding = torch.nn.Parameter(null.clone(), requires_grad=False)
    model.load_state_dict(state, strict=True)
    # Without dropout, training mode is the one that takes a whole sequence.
    return model.train(), args


def logits(model, args):
    generator = torch.Generator().manual_seed(1)
    captions = torch.randn(2, args.cls_token_num, args.caption_dim, generator=generator)
    tokens = torch.randint(args.vocab_size, (2, args.block_size - 1), generator=generator)
    n = args.cls_token_num + tokens.shape[1]
    mask = torch.ones(2, 1, n, n).tril().bool()
    with torch.no_grad():
        return model(idx=tokens, cond_idx=captions, mask=mask)[0]


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


model, args = load(base)
plain = logits(model, args)
tuned = peft.PeftModel.from_pretrained(model, adapter).train()
with_adapter = logits(tuned, args)
with tempfile.TemporaryDirectory() as folder:
    tuned.save_pretrained(folder)
    theirs, ours = load_file(f"{folder}/adapter_model.safetensors"), load_file(adapter / "adapter_model.safetensors")
assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
assert all(torch.equal(theirs[key], ours[key]) for key in ours)
in_weights = logits(*load(merged))
print(f"{len(ours)} tensors, the same when peft writes them again")
print(f"logits: the adapter changes them by {apart(with_adapter, plain):.3f}; "
      f"merged weights and peft's adapter differ by {apart(in_weights, with_adapter):.1e}")
assert apart(with_adapter, plain) > 1e-3 > 1e-5 > apart(in_weights, with_adapter)
