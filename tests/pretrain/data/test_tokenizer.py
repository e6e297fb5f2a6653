"""Every text survives the tokenizer, and no text turns into a special token."""

from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.tokenizer import ROLES, SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer.train(["the quick brown fox\n", "def f(x):\n    return x\n"] * 20, 300)


@given(st.text(max_size=200))
def test_decoding_inverts_encoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=20))
def test_special_tokens_written_out_are_encoded_as_text(special: str, text: str) -> None:
    ids = TOKENIZER.encode(f"{text}{special}{text}")
    assert ids.min() >= len(SPECIAL_TOKENS)


def test_special_tokens_come_first_and_newline_is_one_token() -> None:
    ids = (TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.eos)
    media = (TOKENIZER.media_begin, TOKENIZER.media_pad, TOKENIZER.media_end)
    chat = (*(TOKENIZER.roles[role] for role in ROLES), TOKENIZER.im_middle, TOKENIZER.im_end)
    assert (*ids, *media, *chat) == tuple(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.encode("\n").tolist() == [TOKENIZER.newline]
