"""Identity of documents by their content."""

import hashlib


def content_hash(*parts: str) -> int:
    """64 bits of a document's content, which decide its split and identify it in fingerprints."""
    # File names that are not UTF-8 contain surrogates.
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big")
