"""T5 and CLIP from a released folder: equal to padding with a mask, nothing downloaded, nothing filled in at random."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from m4v_dist import tensor_files
from m4v_dist.config.data_settings import TextEncoderSettings
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.t5_clip_encoder import T5ClipEncoder, count_t5_tokens
from m4v_dist.frozen.text_encoder import build_text_encoder, text_encoder_fingerprint
from tests.frozen.made_text_release import CLIP_WIDTH, T5_WIDTH, WORDS, make_text_release

MAX_TOKENS = 16
CAPTIONS = ["", "a fox", "the fox runs over a snow", "zebra", "fox " * 15, "a " * 40, "quartz " * 30]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def encoder(release: Path) -> T5ClipEncoder:
    return T5ClipEncoder(str(release), MAX_TOKENS)


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "release"))


def test_tokens_are_counted_without_the_weights_as_with_them(encoder: T5ClipEncoder, release: Path) -> None:
    count = count_t5_tokens(str(release))
    for caption in ("", "a red fox", "fox " * 40):
        assert count(caption) == encoder.count_tokens(caption)


def _padded_and_masked(folder: Path, caption: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the reference computes: T5 padded to its limit with a mask, CLIP padded to 77 without one."""
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_2")
    ids = tokenizer(caption, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=dtype).eval()
    clip_ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    with torch.no_grad():
        hidden = t5(ids.input_ids, attention_mask=ids.attention_mask)[0][0]
        return hidden[ids.attention_mask[0].bool()].float(), clip(clip_ids.input_ids).pooler_output[0].float()


@pytest.mark.parametrize("caption", CAPTIONS)
def test_features_equal_the_reference_s_padded_and_masked_ones(
    release: Path, encoder: T5ClipEncoder, caption: str
) -> None:
    tokens, pooled = _padded_and_masked(release, caption, torch.float32)
    (ours,) = encoder.encode([caption])
    assert ours.tokens.shape == tokens.shape and ours.tokens.shape[1] == T5_WIDTH and ours.pooled.shape == (CLIP_WIDTH,)
    torch.testing.assert_close(ours.tokens, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-5, atol=1e-5)


def test_features_differ_between_captions_and_ignore_the_neighbours(encoder: T5ClipEncoder) -> None:
    fox, snow = encoder.encode(["a fox", "the snow"])
    again = encoder.encode(["the fox runs over the snow", "a fox"])[1]
    assert torch.equal(fox.tokens, again.tokens) and torch.equal(fox.pooled, again.pooled)
    assert not torch.allclose(fox.pooled, snow.pooled, atol=0.01)


@pytest.mark.parametrize("runs_in", ["float32", "bfloat16"])
def test_bfloat16_weights_run_in_the_dtype_that_is_asked_for(tmp_path: Path, runs_in: str) -> None:
    folder = make_text_release(tmp_path / "release", dtype=torch.bfloat16)
    settings = TextEncoderSettings(kind="t5_clip", weights=str(folder), max_tokens=MAX_TOKENS, dtype=runs_in)
    (ours,) = build_text_encoder(settings).encode(["the fox runs over a snow"])
    tokens, pooled = _padded_and_masked(folder, "the fox runs over a snow", getattr(torch, runs_in))
    assert ours.tokens.dtype == ours.pooled.dtype == torch.float32
    # bfloat16 has 8 bits: sums over padded rows round elsewhere
    tolerance = 1e-5 if runs_in == "float32" else 0.05
    torch.testing.assert_close(ours.tokens, tokens, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.pooled, pooled, rtol=tolerance, atol=tolerance)
    is_rounded = torch.equal(ours.tokens, ours.tokens.bfloat16().float())
    assert is_rounded == (runs_in == "bfloat16")


def test_weights_in_shards_give_the_features_of_the_whole(tmp_path: Path, encoder: T5ClipEncoder) -> None:
    folder = make_text_release(tmp_path / "release", shard="8KB")
    assert len(list((folder / "text_encoder_2").glob("model-*.safetensors"))) > 1
    (ours,), (whole,) = (maker.encode(["a fox"]) for maker in (T5ClipEncoder(str(folder), MAX_TOKENS), encoder))
    assert torch.equal(ours.tokens, whole.tokens) and torch.equal(ours.pooled, whole.pooled)


def test_a_clip_tokenizer_of_vocabulary_and_merges_is_read(copy: Path, encoder: T5ClipEncoder) -> None:
    """The release has no tokenizer.json for CLIP."""
    values = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(values["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["merges"]]
    (copy / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (ours,), (usual,) = (maker.encode(["a fox runs"]) for maker in (T5ClipEncoder(str(copy), MAX_TOKENS), encoder))
    assert torch.equal(ours.pooled, usual.pooled)


@pytest.mark.parametrize("blank", [" ", "\n\t  "])
def test_a_blank_caption_is_the_null_prompt(encoder: T5ClipEncoder, blank: str) -> None:
    null, ours = encoder.encode(["", blank])
    assert null.tokens.shape == (1, T5_WIDTH)  # the end marker alone
    assert torch.equal(null.tokens, ours.tokens) and torch.equal(null.pooled, ours.pooled)


@pytest.mark.parametrize(
    ("caption", "num_tokens", "is_cut"),
    [
        ("a " * 15, 16, False),  # 15 words and the end marker
        ("a " * 16, 16, True),
        ("a " * 200, 16, True),  # too long for both: counted once
        ("fox", 2, False),
    ],
)
def test_a_caption_past_the_limit_is_cut_and_counted(
    encoder: T5ClipEncoder, caption: str, num_tokens: int, is_cut: bool
) -> None:
    before = encoder.num_cut_captions
    (features,) = encoder.encode([caption])
    assert features.tokens.shape == (num_tokens, T5_WIDTH)
    assert encoder.num_cut_captions - before == is_cut


def test_a_caption_that_only_clip_cuts_is_counted_too(release: Path) -> None:
    encoder = T5ClipEncoder(str(release), 256)
    long, longer = encoder.encode(["a " * 75, "a " * 76])  # 77 tokens with both markers, and 78
    assert encoder.num_cut_captions == 1
    assert long.tokens.shape[0] == 76 and longer.tokens.shape[0] == 77
    torch.testing.assert_close(long.pooled, longer.pooled)


def test_nothing_is_asked_of_a_network(release: Path, encoder: T5ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (ours,), (usual,) = (maker.encode(["a fox"]) for maker in (T5ClipEncoder(str(release), MAX_TOKENS), encoder))
    assert torch.equal(ours.tokens, usual.tokens)


def test_a_relative_folder_is_a_path_and_no_name_on_a_hub(
    release: Path, encoder: T5ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(release.parent)
    assert T5ClipEncoder(release.name, MAX_TOKENS).fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize(
    "piece",
    [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_a_missing_piece_is_exit_2_and_named(copy: Path, piece: str) -> None:
    (copy / piece).unlink()
    settings = TextEncoderSettings(kind="t5_clip", weights=str(copy))
    for ask in (build_text_encoder, text_encoder_fingerprint):
        with pytest.raises(ConfigError, match=f"text_encoder.weights={copy}: {piece} is missing.*Nothing is downl"):
            ask(settings)


def test_a_missing_part_a_missing_shard_and_half_a_vocabulary_are_named(copy: Path, tmp_path: Path) -> None:
    sharded = make_text_release(tmp_path / "sharded", shard="8KB")
    shard = sorted((sharded / "text_encoder_2").glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"text_encoder_2/{shard.name} is missing, which model.safetensors.index"):
        T5ClipEncoder(str(sharded), MAX_TOKENS)
    (copy / "tokenizer" / "tokenizer.json").rename(copy / "tokenizer" / "vocab.json")
    with pytest.raises(ConfigError, match="tokenizer/merges.txt is missing"):
        T5ClipEncoder(str(copy), MAX_TOKENS)
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ConfigError, match="text_encoder/config.json is missing"):
        T5ClipEncoder(str(copy), MAX_TOKENS)


@pytest.mark.parametrize("folder", ["/no/such/folder", "google/t5-v1_1-xxl"])
def test_what_is_no_local_folder_is_exit_2(folder: str) -> None:
    with pytest.raises(ConfigError, match="no such local folder.*text_encoder_2"):
        build_text_encoder(TextEncoderSettings(kind="t5_clip", weights=folder))


def _change_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = tensor_files.read_tensors(str(path))
    change(tensors)
    tensor_files.write_tensors(str(path), tensors, {"format": "pt"})


_LAST = "encoder.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(_LAST), f"text_encoder_2: .*1 missing .{_LAST}"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "1 too many .extra"),
        (
            lambda tensors: tensors.update({_LAST: torch.ones(3)}),
            rf"1 of another shape .{_LAST}: file \[3\], config \[24\]",
        ),
        (
            lambda tensors: tensors.update({_LAST: torch.ones(24, dtype=torch.int8)}),
            f"model.safetensors: {_LAST} is int8; weights are float32",
        ),
    ],
)
def test_weights_of_another_network_are_exit_3_and_never_filled_in(
    copy: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    _change_weights(copy / "text_encoder_2" / "model.safetensors", change)
    with pytest.raises(DataError, match=words):
        T5ClipEncoder(str(copy), MAX_TOKENS)


@pytest.mark.parametrize(
    ("piece", "text", "words"),
    [
        ("text_encoder/model.safetensors", "cut", "text_encoder/model.safetensors"),
        ("text_encoder_2/config.json", '{"d_model":', "text_encoder_2: holds no T5EncoderModel"),
        ("tokenizer/tokenizer.json", "{}", "tokenizer: holds no CLIPTokenizer"),
        ("tokenizer_2/tokenizer.json", '{"model":', "tokenizer_2: holds no T5Tokenizer"),
    ],
)
def test_a_damaged_file_is_exit_3_and_named(copy: Path, piece: str, text: str, words: str) -> None:
    (copy / piece).write_text(text)
    with pytest.raises(DataError, match=words):
        T5ClipEncoder(str(copy), MAX_TOKENS)


def test_a_damaged_index_of_shards_is_exit_3(tmp_path: Path) -> None:
    folder = make_text_release(tmp_path / "release", shard="8KB")
    for text in ("{", '{"weight_map": 1}', "[]"):
        (folder / "text_encoder_2" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(DataError, match="index.json: no index of shards"):
            T5ClipEncoder(str(folder), MAX_TOKENS)


def test_a_tokenizer_of_a_larger_vocabulary_is_exit_3(copy: Path) -> None:
    tokenizer = T5Tokenizer.from_pretrained(copy / "tokenizer_2")
    tokenizer.add_tokens([f"new{number}" for number in range(4)])
    tokenizer.save_pretrained(copy / "tokenizer_2")
    with pytest.raises(DataError, match="tokenizer_2: gives 40 token ids, but its model knows 39"):
        T5ClipEncoder(str(copy), MAX_TOKENS)


def test_the_fingerprint_holds_weights_tokenizers_limit_and_dtype(copy: Path, encoder: T5ClipEncoder) -> None:
    def ask(**changes: object) -> dict[str, str]:
        settings = {"kind": "t5_clip", "weights": str(copy), "max_tokens": MAX_TOKENS, **changes}
        return text_encoder_fingerprint(TextEncoderSettings(**settings))

    first = ask()
    assert first == encoder.fingerprint() and first["text_encoder"] == "t5_clip"  # of a copy, unbuilt
    assert "at most 16 tokens" in first["text_encoder_config"] and "at most 77" in first["text_encoder_config"]
    others = [ask(max_tokens=17), ask(dtype="bfloat16")]
    _change_weights(copy / "text_encoder" / "model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
    others.append(ask())
    config = copy / "tokenizer_2" / "tokenizer.json"
    config.write_text(config.read_text().replace(f"▁{WORDS[1]}", "▁dog"))
    others.append(ask())
    assert len({tuple(sorted(found.items())) for found in (first, *others)}) == 5


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (["a fox", None], "caption 1 is NoneType None"),
        ([3.5], "caption 0 is float 3.5"),
        ([b"a fox"], "caption 0 is bytes"),
        ("a fox", "got the caption 'a fox' alone"),
        (["a \ud800 fox"], "caption 0 .* is no text: surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("kind", ["t5_clip", "minilm"])
def test_what_is_no_list_of_text_is_refused(kind: str, release: Path, captions: object, words: str) -> None:
    weights = str(release) if kind == "t5_clip" else None
    encoder = build_text_encoder(TextEncoderSettings(kind=kind, weights=weights))
    with pytest.raises(ValueError, match=words):
        encoder.encode(captions)  # type: ignore[arg-type]


def test_settings_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="set weights to PyramidFlow's released folder"):
        TextEncoderSettings(kind="t5_clip")
    with pytest.raises(ValueError, match="no effect on kind='minilm'"):
        TextEncoderSettings(dtype="bfloat16")
