"""A folder as PyramidFlow releases its text encoders, tiny and random: for tests of T5 and CLIP."""

import string
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from m4v_dist import tensor_files

WORDS = ("a", "fox", "runs", "over", "the", "snow")
T5_WIDTH, CLIP_WIDTH = 24, 16


def make_text_release(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "50GB", seed: int = 0) -> Path:
    """Write the four parts; `shard` is the largest size of one T5 weights file."""
    torch.manual_seed(seed)
    t5_tokenizer, clip_tokenizer = _t5_tokenizer(), _clip_tokenizer()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer) + 3, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, eos_token_id=2,  # as released: the pooled vector is read at the largest id
        )
    )  # fmt: skip
    for parameter in (*t5.parameters(), *clip.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    t5.to(dtype).save_pretrained(folder / "text_encoder_2", max_shard_size=shard)
    clip.to(dtype).save_pretrained(folder / "text_encoder")
    _name_as_released(folder / "text_encoder" / "model.safetensors")
    t5_tokenizer.save_pretrained(folder / "tokenizer_2")
    clip_tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def _name_as_released(weights: Path) -> None:
    """Released CLIP text weights carry a prefix that transformers 5 no longer writes."""
    tensors = tensor_files.read_tensors(str(weights))
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    tensor_files.write_tensors(str(weights), named, {"format": "pt"})


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -6.0) for letter in string.ascii_lowercase]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding of which "fox" is the one learnt word; the end marker has the largest id, as released."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    names = [*letters, "fo", "fox</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=[("f", "o"), ("fo", "x</w>")], model_max_length=77)
