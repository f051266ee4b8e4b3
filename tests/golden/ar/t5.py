"""Cases for t5, from transformers: python tests/golden/ar/t5.py"""
import torch
from common import case, randomise, save, training
from transformers import T5Config, T5EncoderModel


def make(name, lengths, **config):
    generator = torch.Generator().manual_seed(len(name))
    folder = case("t5", name)
    config = T5Config(dropout_rate=0.0, **config)
    model = T5EncoderModel(config).eval()
    randomise(model, generator)
    model.save_pretrained(folder / "model")
    b, n = len(lengths), max(lengths)
    input_ids = torch.randint(2, config.vocab_size, (b, n), generator=generator)
    attention_mask = (torch.arange(n)[None] < torch.tensor(lengths)[:, None]).long()
    input_ids = input_ids * attention_mask
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    output = model(**inputs).last_hidden_state
    save(folder / "reference.safetensors", {f"input.{k}": v for k, v in inputs.items()} | {"output": output})
    # What stands at padding means nothing, so nothing may flow from there.
    cotangent = torch.randn(output.shape, generator=generator) * attention_mask[:, :, None]
    training(folder, model, inputs, output, cotangent, lambda key: key.replace("encoder.embed_tokens", "shared"))


make(
    "gated-gelu", [31, 5, 17], vocab_size=40, d_model=16, d_kv=6, d_ff=27, num_layers=2, num_heads=3,
    relative_attention_num_buckets=12, relative_attention_max_distance=20, feed_forward_proj="gated-gelu",
)
make("relu", [1, 40], vocab_size=33, d_model=12, d_kv=4, d_ff=20, num_layers=3, num_heads=2, feed_forward_proj="relu")
