"""Jinja of exported chat templates: the contents of messages, and documents."""

from pretrain.data import chat
from pretrain.data.tokenizer import Tokenizer
from pretrain.export.hf_config import VIDEO_PLACEHOLDER


def document(tokenizer: Tokenizer | None) -> str:
    """The chat template of a model trained on documents alone, which knows no roles.

    The contents of messages are concatenated, as text and images are in a document.

    Args:
        tokenizer: see :func:`content`.
    """
    body = content(tokenizer, is_chat=False)
    return f"{{{{ bos_token }}}}{{% for message in messages %}}{body}{{% endfor %}}"


def content(tokenizer: Tokenizer | None, *, is_chat: bool) -> str:
    """Jinja that renders the content of a message.

    Args:
        tokenizer: of a model with images; None for a text model.
        is_chat: whether it is the content of a conversation instead of a document.
    """
    readable, media_parts = "text", ""
    if tokenizer is not None:
        kind = chat.KIND_OF_IMAGE if is_chat and chat.has_kinds(tokenizer) else ""
        line = "{{ '\\n' }}" if kind else ""
        names = (tokenizer.media_begin, tokenizer.media_pad, tokenizer.media_end)
        begin, pad, end = map(tokenizer.name_of, names)
        image = f"{begin}{kind}{pad}{end}{line}"
        readable = "text, images and videos"
        media_parts = (
            f"{{% elif part.type in ('image', 'image_url') %}}{image}"
            f"{{% elif part.type in ('video', 'video_url') %}}{VIDEO_PLACEHOLDER}{line}"
        )
    return (
        "{% if message.content is string %}{{ message.content }}{% elif message.content %}"
        "{% for part in message.content %}"
        f"{{% if part.type == 'text' %}}{{{{ part.text }}}}{media_parts}{{% else %}}"
        f"{{{{ raise_exception('this model reads {readable}, not ' ~ part.type) }}}}"
        "{% endif %}{% endfor %}{% endif %}"
    )
