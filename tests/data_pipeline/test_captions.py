"""Captions of raw records: every form is read, nothing that is no caption passes in silence."""

import json

import pytest

from data_pipeline.captions import Caption, CaptionError, captions_to_json, read_captions, require_captions


def as_json(**values: object) -> bytes:
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("json_member", "txt_member", "texts"),
    [
        (as_json(captions=["a fox", " runs "]), None, [("a fox", 1.0), ("runs", 1.0)]),
        (as_json(captions=[{"text": "a", "weight": 3}, "b", {"text": "c", "weight": 0}]), None,
         [("a", 3.0), ("b", 1.0), ("c", 0.0)]),
        (as_json(captions=["list"], caption="one", text="two"), b"three", [("list", 1.0)]),
        (as_json(captions=None, caption="one", text="two"), b"three", [("one", 1.0)]),
        (as_json(caption=" ", text="two"), b"three", [("two", 1.0)]),
        (as_json(caption="", text=None), b"three", [("three", 1.0)]),
        (None, "\ufeffüber die See \n".encode(), [("über die See", 1.0)]),
        (as_json(), b" \n", []),
        (None, None, []),
    ],
)  # fmt: skip
def test_each_form_of_captions_is_read(
    json_member: bytes | None, txt_member: bytes | None, texts: list[tuple[str, float]]
) -> None:
    captions, _ = read_captions(json_member, txt_member)
    assert [(caption.text, caption.weight) for caption in captions] == texts


def test_what_else_the_json_member_holds_is_kept() -> None:
    assert read_captions(as_json(caption="a", text="b", licence="CC0"), None)[1] == {"licence": "CC0"}


@pytest.mark.parametrize(
    ("json_member", "reason"),
    [
        (as_json(captions=[]), r"captions is \[\], not a list of at least one"),
        (as_json(captions="a fox"), "captions is 'a fox', not a list"),
        (as_json(captions=["a", " "]), r"captions\[1\] is blank"),
        (as_json(captions=["a", 7]), r"captions\[1\] is 7, not a text"),
        (as_json(captions=[{"txt": "a"}]), r"captions\[0\] has the keys \['txt'\]"),
        (as_json(captions=[{"text": "a", "wieght": 2}]), r"\['text', 'wieght'\]"),
        (as_json(captions=[{"text": "a", "weight": -1}]), r"captions\[0\] has the weight -1"),
        (b'{"captions": [{"text": "a", "weight": NaN}]}', "weight nan"),
        (b'{"captions": [{"text": "a", "weight": Infinity}]}', "weight inf"),
        (b'{"captions": [{"text": "a", "weight": 1' + b"0" * 400 + b"}]}", "weight 1000.*int"),
        (b'{"captions": [{"text": "a", "weight": 1e308}, {"text": "b", "weight": 1e308}]}', "add up to inf"),
        (as_json(captions=[{"text": "a", "weight": True}]), "weight True"),
        (as_json(captions=[{"text": "a", "weight": "2"}]), "weight '2'"),
        (as_json(captions=[{"text": "a", "weight": 0}, {"text": "b", "weight": 0}]), "add up to 0"),
        (as_json(caption=["a"]), r"caption is \['a'\], not a text"),
        (as_json(text=5), "text is 5, not a text"),
        (b'{"caption": "\\ud83e"}', r"caption holds half a character \(\\ud83e\)"),
        (b'["a"]', r"json is \['a'\], not an object"),
        (b"null", "json is None, not an object"),
        (b"{caption: a}", "json is no JSON"),
        (b"", "json is no JSON"),
        (b"[" * 100_000, "json is no JSON"),
        (b'{"caption": "caf\xe9"}', "json is no UTF-8 .byte 0xe9 at 16"),
        ('{"caption": "a"}'.encode("utf-16"), "json is no UTF-8"),
    ],
)
def test_what_is_no_caption_is_told_by_its_reason(json_member: bytes, reason: str) -> None:
    with pytest.raises(CaptionError, match=reason) as caught:
        read_captions(json_member, b"a txt beside it does not hide that")
    assert len(str(caught.value)) < 200


def test_a_txt_that_is_no_utf_8_is_told_with_the_byte() -> None:
    with pytest.raises(CaptionError, match="txt is no UTF-8 .byte 0xe9 at 3"):
        read_captions(None, b"caf\xe9")


@pytest.mark.parametrize("captions", [(), (Caption("a"),), (Caption("a", 2.0),), (Caption("a"), Caption("b", 0.5))])
def test_captions_are_read_back_as_they_were_written(captions: tuple[Caption, ...]) -> None:
    assert read_captions(json.dumps(captions_to_json(captions)).encode(), None) == (captions, {})


def test_captions_that_could_not_be_read_back_are_refused() -> None:
    require_captions((Caption("a"), Caption("b", 0.0)))
    with pytest.raises(CaptionError, match=r"captions\[0\] is blank"):
        require_captions((Caption(" "),))
