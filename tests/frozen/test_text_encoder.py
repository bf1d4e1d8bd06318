"""MiniLM from the installed package: real features, no padding, cut captions counted, no download."""

from pathlib import Path

import pytest
import torch

from m4v_dist.config.data_settings import TextEncoderSettings
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.text_encoder import TextEncoder, build_text_encoder, text_encoder_fingerprint, token_counter


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return build_text_encoder(TextEncoderSettings(max_tokens=16))


def test_similar_captions_have_similar_features(encoder: TextEncoder) -> None:
    dog, puppy, tax = encoder.encode(["a dog runs on grass", "a puppy running across a lawn", "quarterly tax report"])
    near = torch.cosine_similarity(dog.pooled, puppy.pooled, dim=0)
    far = torch.cosine_similarity(dog.pooled, tax.pooled, dim=0)
    assert near > 0.6 and far < 0.2


def test_features_carry_no_padding_and_ignore_the_neighbours(encoder: TextEncoder) -> None:
    alone = encoder.encode(["a cat"])[0]
    together = encoder.encode(["a much longer caption with many words", "a cat"])[1]
    assert alone.tokens.shape == (4, 384) and alone.pooled.shape == (384,)
    assert torch.equal(alone.tokens, together.tokens)
    torch.testing.assert_close(alone.pooled, alone.tokens.mean(0))


def test_the_null_prompt_has_its_two_markers_only(encoder: TextEncoder) -> None:
    assert encoder.encode([""])[0].tokens.shape == (2, 384)


def test_a_long_caption_is_cut_and_counted(encoder: TextEncoder) -> None:
    before = encoder.num_cut_captions
    (features,) = encoder.encode(["word " * 40])
    assert features.tokens.shape == (16, 384)
    assert encoder.num_cut_captions == before + 1


def test_the_fingerprint_names_weights_and_limit(encoder: TextEncoder) -> None:
    other = build_text_encoder(TextEncoderSettings(max_tokens=32)).fingerprint()
    assert other["text_encoder_weights_sha256"] == encoder.fingerprint()["text_encoder_weights_sha256"]
    assert other["text_encoder_config"] != encoder.fingerprint()["text_encoder_config"]


def test_a_folder_without_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json is missing"):
        build_text_encoder(TextEncoderSettings(weights=str(tmp_path)))


def test_a_folder_that_is_not_there_is_told_apart_from_an_incomplete_one(tmp_path: Path) -> None:
    for build in (build_text_encoder, text_encoder_fingerprint, token_counter):
        with pytest.raises(ConfigError, match="weights=.*/none: no such folder"):
            build(TextEncoderSettings(weights=str(tmp_path / "none")))


def test_tokens_are_counted_without_the_weights_as_with_them(encoder: TextEncoder) -> None:
    count = token_counter(TextEncoderSettings(max_tokens=16))
    for caption in ("", "a red fox", "word " * 40):
        assert count(caption) == encoder.count_tokens(caption)


def test_the_fingerprint_known_without_the_package_is_that_of_its_files(encoder: TextEncoder) -> None:
    assert text_encoder_fingerprint(TextEncoderSettings(max_tokens=16)) == encoder.fingerprint()
