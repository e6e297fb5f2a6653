"""Recognize the format of data, and write the configuration that reads it."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pretrain.config import sources_yaml
from pretrain.data import conversations, files, saved_datasets, tables
from pretrain.data.media import pixels, video
from pretrain.data.media.frames import Media
from pretrain.data.media.span import Place
from pretrain.data.remote import is_url
from pretrain.data.skipped import Skip
from pretrain.data.sources import megatron
from pretrain.data.sources.chat import read_conversation
from pretrain.data.tools import split_names
from pretrain.data.tools.beginnings import beginnings
from pretrain.data.vision_text import archives, columns, mds, reading
from pretrain.data.vision_text.layouts import (
    CAPTION,
    SOUND,
    Files,
    Folder,
    Names,
    documents,
    layout_of,
    media_keys,
)
from pretrain.errors import PretrainError, one_line

Entry = dict[str, Any]
"""Settings of an entry of ``data.sources``."""
# Hosts that are suggested by name.
_MOST_HOSTS = 3
_SAMPLED = 20
_SUFFIXES = (*files.with_compressed((*files.JSON_LINES, *files.PLAIN)), *tables.SUFFIXES)
_DESCRIBING = (*files.with_compressed(files.JSON_LINES), *tables.SUFFIXES, ".csv", ".tsv")
# Names of a column of captions in public data sets, the most likely ones first.
_CAPTIONS = (
    *("text", "caption", "captions", "texts", "description", "alt_text", "alt", "prompt"),
    *("sentences", "title", "label_text", "answer"),
)
# Columns next to the URL of an image.
_OF_IMAGES = {"width", "height", "original_width", "similarity", "clip_similarity_vitb32", "nsfw"}
_ORIGINS = re.compile(r".*(url|uri|path|sha256|md5|hash|key|id|license|status)", re.IGNORECASE)
# Questions or instructions, and their answers.
_ASKED = ("prompt", "instruction", "question", "query", "problem", "input")
_ANSWERED = (
    *("completion", "completions", "response", "responses", "answer", "answers", "reply"),
    *("solution", "output"),
)
# Keys of messages that are not in conversations.
_APART = (("role", "content"), ("role", "parent_id"), ("from", "value"))
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+\s*")
# Files that are compared with the first one, and that are named in a message.
_MOST_COMPARED = 8
_MOST_NAMED = 3


class Recognized(NamedTuple):
    """The format of data.

    Attributes:
        description: a sentence, without the path.
        entries: the entries of ``data.sources`` that read it.
    """

    description: str
    entries: list[Entry]


def configuration(path: str) -> str:
    """YAML with the configuration that reads a file, a folder, a pattern or a URL of them; comments
    describe it.

    Raises:
        PretrainError: as :func:`recognize`.
    """
    if not files.is_unicode(path):
        raise PretrainError(
            f"{one_line(path)}: its name is not UTF-8, so that no configuration can contain it: "
            "rename it"
        )
    found = _at_url(path) if is_url(path) else recognize(path)
    return f"# {one_line(path)}: {one_line(found.description)}\n{sources_yaml(found.entries)}"


def recognize(path: str) -> Recognized:
    """The format of a file, a folder or a pattern, from its names and its first records.

    Raises:
        PretrainError: nothing is found, or it is not read; the message names the format.
    """
    root = Path(path)
    if root.is_dir():
        if names := saved_datasets.splits(root):
            found = recognize(str(root / names[0]))
            (entry,) = found.entries
            entries = [_of_split(entry, str(root / name), name) for name in names]
            return Recognized(f"a saved dataset with the splits {', '.join(names)}", entries)
        if special := _special_folder(root):
            return special
    suffixes = _SUFFIXES if root.is_dir() else ("",)
    listed = reading.numbered(path, "") or files.find(path, "", suffixes, "data")
    items = saved_datasets.select(listed, root, "")
    paths = [item for item in items if isinstance(item, Path)]
    if archives.is_archive(paths[0]):
        return _shards(path, paths)
    if files.ends_with(paths[0], mds.SUFFIXES):
        return _mds(path, paths[0])
    if root.is_dir():
        others = split_names.find(root, paths)[1]
        in_splits = [file for file in paths if file not in set(others)]
        return _with_splits(_of_files(path, in_splits), root, paths)
    found = _of_files(path, paths)
    common = Path(os.path.commonpath([file.parent for file in paths]))
    if splits := split_names.find(common, paths)[0]:
        advice = f"inspect {common} for a configuration of each"
        named = ", ".join(dict.fromkeys(split.name for split in splits))
        return found._replace(description=f"{found.description}; its splits: {named}; {advice}")
    return found


def _at_url(url: str) -> Recognized:
    """The format of the files at a URL, from their names and beginnings.

    Raises:
        PretrainError: nothing is found, or it is not read.
    """
    with beginnings(url) as read:
        try:
            found = recognize(read.path)
        except PretrainError as error:
            raise PretrainError(read.with_urls(str(error))) from error
    if others := {entry["type"] for entry in found.entries} & {"energon", "megatron"}:
        advice = f"copy it to this machine: a source of type {others.pop()} has no URL"
        raise _refused(url, found.description, advice)
    whole = {read.path: url}  # of a file, with the query of its URL
    entries = [
        entry | {"path": whole.get(entry["path"], read.with_urls(entry["path"]))}
        for entry in found.entries
    ]
    return Recognized(read.with_urls(found.description), entries)


def _of_split(entry: Entry, path: str, name: str) -> Entry:
    known = split_names.SPLITS
    split = next((known[begin] for begin in known if name.startswith(begin)), "hash")
    return {**entry, "path": path} | ({"split": split} if split != "hash" else {})


def _with_splits(
    found: Recognized, root: Path, paths: Sequence[Path], *, in_names: bool = True
) -> Recognized:
    """An entry for each split of a folder's files; ``found`` if it has none."""
    splits, others = split_names.find(root, paths, in_names=in_names)
    if not splits:
        return found
    (entry,) = found.entries
    named = ", ".join(dict.fromkeys(split.name for split in splits))
    rest = f"; in none of them: {_listed(others)}" if others else ""
    entries = [_of_split(entry, split.path, split.name) for split in splits]
    return Recognized(f"{found.description}; its splits: {named}{rest}", entries)


def _listed(paths: Sequence[Path]) -> str:
    """The names of some files."""
    more = f" and {len(paths) - _MOST_NAMED:,} more" if len(paths) > _MOST_NAMED else ""
    return ", ".join(str(path.name) for path in paths[:_MOST_NAMED]) + more


# ---------------------------------------------------------------------- folders


def _special_folder(root: Path) -> Recognized | None:
    """Folders that are recognized by the names of their files.

    Raises:
        PretrainError: the format is not read.
    """
    if (root / ".nv-meta").is_dir():
        return _found("shards for megatron-energon", "energon", root)
    walked = (item for item in files.walk(root, ("",), "files") if isinstance(item, Path))
    paths = sorted(itertools.islice(walked, 10_000))
    names = {path.name for path in paths}
    if any(f"{name[:-4]}.bin" in names for name in names if name.endswith(".idx")):
        return _tokens(root, paths)
    images = [path for path in paths if files.ends_with(path, pixels.suffixes())]
    kind = reading.kind_of(root, paths)
    if kind == "metadata":
        return _imagefolder(root, [path for path in paths if path.name in reading.METADATA])
    if kind == "shards":
        shards = [path for path in paths if archives.is_archive(path)]
        return _with_splits(_shards(root, shards), root, shards)
    if kind == "MDS":
        shards = [path for path in paths if files.ends_with(path, mds.SUFFIXES)]
        return _with_splits(_mds(root, shards[0]), root, shards, in_names=False)
    if kind == "captions" or (kind == "images" and images):
        captioned = kind == "captions" or any(reading.caption_of(path).exists() for path in images)
        other = [p for p in paths if files.ends_with(p, _DESCRIBING) and not files.is_about(p)]
        if not captioned:
            advice = "write metadata.jsonl of {file_name: …, text: …}"
            if other:
                advice = f"inspect a file that describes them ({_listed(other)}), or {advice}"
            raise _refused(root, "a folder of images without captions", advice)
        description = f"{len(images):,} images with captions"
        of_images = {path.stem for path in images}  # with their metadata, as img2dataset writes it
        if other := [p for p in other if p.name != reading.CAPTIONS and p.stem not in of_images]:
            description += f"; other data is not read: inspect {_listed(other)} separately"
        found = _found(description, "images", root)
        return found if kind == "captions" else _with_splits(found, root, images, in_names=False)
    return None


def _tokens(root: Path, paths: Sequence[Path]) -> Recognized:
    prefixes = sorted(path.with_suffix("") for path in paths if path.suffix == ".idx")
    types = ["megatron_chat" if megatron.has_conversations(one) else "megatron" for one in prefixes]
    found = _found("tokens in Megatron's format; set data.tokenizer", types[0], root)
    if len({*types}) == 1:
        return found
    entries = [{"type": t, "path": str(one)} for t, one in zip(types, prefixes, strict=True)]
    return Recognized(found.description, entries)


def _imagefolder(root: Path, described: Sequence[Path]) -> Recognized:
    """A folder that metadata describe, with an entry for each split."""
    entries = []
    for file in described:
        rows = list(_rows(file, reading.read_records(file)))
        entries.append({"type": "images", "path": str(root)} | _pictured(file, rows)[1])
    description = f"a folder of images with {described[0].name}"
    names = [file.parent.name for file in described]
    if len(names) < 2 or not all(map(reading.is_split, names)):
        return Recognized(description, entries[:1])
    splits = [
        _of_split(entry, str(file.parent), file.parent.name)
        for entry, file in zip(entries, described, strict=True)
    ]
    return Recognized(f"{description}; its splits: {', '.join(names)}", splits)


def _shards(root: Path | str, shards: Sequence[Path]) -> Recognized:
    """Shards for WebDataset.

    Raises:
        PretrainError: none of the first samples can be read.
    """
    plural = "s" * (len(shards) > 1)
    found = _found(f"{len(shards):,} WebDataset shard{plural}", "images", root)
    try:
        if files.is_compressed(shards[0]):  # whatever its name says: it would have to be unpacked
            return found
    except files.UNREADABLE as error:
        raise _refused(shards[0], "WebDataset shards", files.reason(error)) from error
    first = list(itertools.islice(archives.read_samples(shards[0], Names(), ""), _SAMPLED))
    if all(isinstance(sample, Skip) for sample in first):
        skip = next(sample for sample in first if isinstance(sample, Skip))
        raise _refused(skip.name, "WebDataset shards", skip.reason)
    return found


def _mds(root: Path | str, shard: Path) -> Recognized:
    """Shards of MosaicML.

    Raises:
        PretrainError: they have no images with captions.
    """
    try:
        if files.is_compressed(shard):
            return _found("compressed MDS shards of MosaicML", "images", root)
        kinds = mds.kinds(shard, "")
        if not columns.image_columns(kinds, Names()):
            names = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            advice = f"it has no images, only {names}: convert it to Parquet or JSON lines"
            raise _refused(shard, "MosaicML's MDS", advice)
        entry = _columns(kinds, next((name for name, kind in kinds.items() if kind == "text"), ""))
    except ValueError as error:
        raise _refused(shard, "MosaicML's MDS", files.reason(error)) from error
    return Recognized("MDS shards of MosaicML", [{"type": "images", "path": str(root)} | entry])


def _found(description: str, type: str, path: Path | str) -> Recognized:
    return Recognized(description, [{"type": type, "path": str(path)}])


def _refused(path: Path | str, format: str, advice: str) -> PretrainError:
    return PretrainError(f"{path}: {format}, which is not read: {advice}")


# ---------------------------------------------------------------------- files


def _of_files(path: str, paths: Sequence[Path]) -> Recognized:
    """The format of files: that of the first one of the suffix with the most bytes."""
    sizes: Counter[str] = Counter()
    for file in paths:
        sizes[file.suffix.lower()] += file.stat().st_size
    most = max(sizes, key=lambda suffix: sizes[suffix])
    same = [file for file in paths if file.suffix.lower() == most]
    first = next((file for file in same if file.stat().st_size), same[0])
    count = "a file" if len(paths) == 1 else f"{len(paths):,} files"
    if files.ends_with(first, pixels.suffixes()) or video.is_video(str(first)):
        raise _refused(first, "an image or a video", "inspect the folder with its captions")
    try:
        format = tables.kind(first) or files.content(first)
        columns = len(tables.schema(first).names) if tables.kind(first) else 0
        if format == "plain":
            files.read_plain(first)
    except files.UNREADABLE as error:
        raise PretrainError(f"{first}: {files.reason(error)}") from error
    if format == "plain":
        return Recognized(f"{count} of plain text", [{"type": "text", "path": path}])
    names = {"lines": "JSON lines", "array": "JSON arrays"}
    width = f", {columns} column{'s' * (columns > 1)}" if columns else ""
    description, entry = _of_file(first)
    return Recognized(
        f"{count} of {names.get(format, format)}{width}; {description}"
        f"{_with_other_layouts(entry, first, paths)}",
        [{"type": entry["type"], "path": path} | entry],
    )


def _of_file(file: Path) -> tuple[str, Entry]:
    """:func:`_of_rows` of a file's first records."""
    return _of_rows(file, list(_rows(file, tables.read_objects(file))))


def _with_other_layouts(entry: Entry, first: Path, paths: Sequence[Path]) -> str:
    """A remark about files that the settings of the first do not read."""
    others = [file for file in paths if file != first and file.stat().st_size]
    for file in others[:: -(-len(others) // _MOST_COMPARED) or 1]:
        try:
            if not tables.kind(file) and files.content(file) == "plain":
                continue
            description, other = _of_file(file)
        except (*files.UNREADABLE, PretrainError):
            continue  # it is listed when the source is read
        if {**other, "media_urls": 0} != {**entry, "media_urls": 0}:
            return f"; other files differ, such as {file.name}: {description}"
    return ""


def _rows(file: Path, records: Iterable[tuple[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The first of a file's records.

    Raises:
        PretrainError: none of the first records can be read.
    """
    first: Skip | None = None
    found = False
    for _, value in itertools.islice(records, _SAMPLED):
        if isinstance(value, Skip):
            first = first or value
        else:
            found = True
            yield value
    if not found:
        why = first or Skip(str(file), "no records in it")
        raise PretrainError(f"{why.name}: {why.reason}")


def _of_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, Entry]:
    """A description of records, and the settings that read them, without the path.

    Raises:
        PretrainError: the records are not read.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    if chat := _chat(file, rows):
        return chat
    if {"images", "annotations"} <= set(names):
        advice = "write a line for each image, {file_name: …, text: …}"
        raise _refused(file, "annotations as in COCO", advice)
    if any(files.lost_field(row, SOUND) for row in rows):
        raise _refused(file, "sound", "set field to the text of each record to train on that alone")
    layout = layout_of(names)
    if layout != "captions" or any(row.get(key) for row in rows for key in media_keys(row)):
        return _pictured(file, rows)
    if tables.kind(file) and columns.image_columns(columns.kinds_of(tables.schema(file)), Names()):
        return _pictured(file, rows)
    if "url" in (lower := {name.lower() for name in names}) and lower & _OF_IMAGES:
        advice = "download them with img2dataset, and inspect its folder"
        raise _refused(file, "captions with URLs of images, as in LAION", advice)
    if key := _image_key(names, rows):
        return _pictured(file, rows, key)
    if apart := next((keys for keys in _APART if lower.issuperset(keys)), ()):
        advice = "write a line for each conversation, {messages: […]}"
        raise _refused(file, f"single messages ({' and '.join(map(repr, apart))})", advice)
    texts = tables.text_columns(file) if tables.kind(file) else names
    field = tables.likely_field({key: row.get(key) for key in texts} for row in rows)
    _refuse_answers(file, field, names, tables.TEXT_NAMES)
    if not field:
        found = ", ".join(names) or "none"
        raise PretrainError(f"{file}: no text in its fields, which are {found}")
    return f"the text is probably {field!r}", {"type": "text", "field": field}


def _image_key(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The key of images that are stored in other files, if it is none of the usual ones; an empty
    string if there is none."""
    for key in names:
        values = [row[key] for row in rows if row.get(key)]
        named = [one for value in values for one in (value if isinstance(value, list) else [value])]
        is_media = key in files.MEDIA and key not in SOUND
        if named and all(isinstance(one, str) and (is_media or _is_image(one)) for one in named):
            return key
    return ""


def _is_image(name: str) -> bool:
    """Whether a text is the name of an image or a video, and not a URL."""
    if is_url(name) or "\n" in name:
        return False
    return files.ends_with(Path(name), pixels.suffixes()) or video.is_video(name)


def _pictured(file: Path, rows: Sequence[Mapping[str, Any]], key: str = "") -> tuple[str, Entry]:
    """A description of records with images, and the settings that read them, without the path.

    Args:
        key: of the images; default: the usual ones.

    Raises:
        PretrainError: they have no text, their images are at URLs that are not read, or none of
            them can be read.
    """
    layout = layout_of(list(dict.fromkeys(name for row in rows for name in row)))
    entry: Entry = {"type": "images"}
    if layout == "OBELICS" and any(_is_turn(text) for row in rows for text in row["texts"] or ()):
        advice = "write its 'texts' as messages, with a placeholder for each image"
        raise _refused(file, "questions about images, as in the Cauldron", advice)
    if not key and layout not in ("captions", "imagefolder"):
        remark, hosts = _by_url(file, _urls(file, rows, Names()))
        return f"documents as in {layout}{remark}", entry | hosts
    kinds = _kinds(file, rows)
    try:
        entry |= _columns(kinds, tables.likely_field(rows), key)
    except ValueError as error:
        raise PretrainError(f"{file}: {error}") from error
    if not key and not tables.kind(file) and not any(_has_several(row) for row in rows):
        entry.pop("image_field", None)
    field = entry.get("field", CAPTION)
    _refuse_answers(file, field, kinds, (*tables.TEXT_NAMES, *_CAPTIONS))
    urls = _urls(file, rows, Names(entry.get("field", Names().field), entry.get("image_field", "")))
    remark, hosts = _by_url(file, urls)
    return f"images or videos with captions{remark}", entry | hosts


def _is_turn(text: Any) -> bool:
    """Whether an entry of `texts` is a question with its answer."""
    return isinstance(text, Mapping) and {"user", "assistant"} <= text.keys()


def _has_several(row: Mapping[str, Any]) -> bool:
    """Whether a record has images under several of the usual keys."""
    return sum(bool(row[key]) for key in media_keys(row)) > 1


def _kinds(file: Path, rows: Sequence[Mapping[str, Any]]) -> columns.Kinds:
    """The kind of each column of a table; of other records, that of most values."""
    if tables.kind(file):
        return columns.kinds_of(tables.schema(file))
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items():
            if value:
                is_number = file.suffix.lower() == ".csv" and _NUMBER.fullmatch(value)
                counts.setdefault(name, Counter())["number" if is_number else _kind(value)] += 1
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def _urls(file: Path, rows: Sequence[Mapping[str, Any]], names: Names) -> list[str]:
    """The URLs of images in records.

    Raises:
        PretrainError: no record can be read.
    """
    found = _Named(Folder(file.parent), [])
    made = [one for row in rows for one in documents("", row, found, names)]
    skips = [one for one in made if isinstance(one, Skip)]
    if len(skips) == len(made) and not tables.kind(file):  # images in tables are not rows' values
        raise PretrainError(f"{file}: images and text that are not read: {skips[0].reason}")
    return found.urls


@dataclass
class _Named:
    """Files that records name, and the URLs among them, which are not read."""

    files: Files
    urls: list[str]

    def find(self, name: str) -> Place:
        if not is_url(name):
            return self.files.find(name)
        self.urls.append(name)
        return name


def _by_url(file: Path, urls: Sequence[str]) -> tuple[str, Entry]:
    """A remark about URLs of images, and the setting that allows their hosts.

    Raises:
        PretrainError: they are not those of http.
    """
    if not urls:
        return "", {}
    parts = [urlsplit(url) for url in urls]
    if any(part.scheme not in ("http", "https") for part in parts):
        raise _refused(file, "images at URLs of other schemes than http", "download them")
    hosts = sorted({part.hostname or "" for part in parts})
    chosen = hosts if len(hosts) <= _MOST_HOSTS else ["*"]
    return "; images are copied from the hosts in media_urls", {"media_urls": chosen}


def _refuse_answers(file: Path, field: str, names: Iterable[str], usual: Sequence[str]) -> None:
    """
    Args:
        usual: names of fields that may be read of records with questions and answers.

    Raises:
        PretrainError: the field would lose the questions or the answers of records with both.
    """
    lower = {name.lower(): name for name in names}
    asked, answered = (
        next((lower[name] for name in known if name in lower), "") for known in (_ASKED, _ANSWERED)
    )
    if asked and answered and (field in (asked, answered) or field.lower() not in usual):
        advice = "write them as instruction and output, or as messages; field: NAME would read one"
        raise _refused(file, f"{asked!r} with its reply in {answered!r}", advice)


def _kind(value: Any) -> str:
    """The kind of a value of JSON, as of a column."""
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else "list of nothing"
    return "text" if isinstance(value, str) else type(value).__name__


def _columns(kinds: columns.Kinds, longest: str, key: str = "") -> Entry:
    """The settings that choose columns of images and captions.

    Args:
        longest: the column with the longest text.
        key: the column of images; default: the usual ones.

    Raises:
        ValueError: there is no column of text.
    """
    if not (images := columns.image_columns(kinds, Names(image_field=key))):
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ValueError(f"no images in its columns, which are {listed}")
    texts = [
        name
        for name, kind in kinds.items()
        if kind in ("text", "list of text") and name not in images
    ]
    lower = {name.lower(): name for name in texts}
    usual = [lower[name] for name in _CAPTIONS if name in lower]
    other = [name for name in (longest, *texts) if name in texts and not _ORIGINS.fullmatch(name)]
    caption = next(iter([*usual, *other]), "")
    if not caption:
        raise ValueError(f"no captions in its fields, which are {', '.join(kinds)}")
    entry = {"field": caption} if caption != "caption" else {}
    if key or len(images) > 1:
        entry["image_field"] = images[0]
    return entry


def _chat(file: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, Entry] | None:
    """The layout of conversations; None if the records are no conversations.

    Raises:
        PretrainError: the layout is not read, or none of the first conversations is.
    """
    entry: Entry = {}
    name = problem = seen = ""
    urls: list[str] = []

    def named(references: Sequence[conversations.Reference], moving: bool) -> Media:
        """An image or video, which is not looked for."""
        urls.extend(filter(is_url, (re.sub("^file://", "", str(one)) for one in references)))
        return Media(("",) * len(references), moving)

    for row in rows:
        field = _messages_field(row)
        try:
            found = conversations.layout_name(row, field)
            if not found:
                continue
            conversation = read_conversation("", row, field, named)
        except conversations.UnsupportedLayoutError as error:
            raise PretrainError(f"{file}: {error}") from error
        except ValueError as error:
            problem = problem or files.reason(error)
            continue
        if isinstance(conversation, Skip):
            problem = problem or conversation.reason
            continue
        usual = field in conversations.LISTS or found not in ("OpenAI", "ShareGPT", "LLaVA")
        first = {"type": "chat"} | ({} if usual else {"field": field})
        name, entry = name or found, entry or first
        if conversation.media:
            seen = "" if found == "LLaVA" else ", with images or videos"
            entry = first | {"type": "vision_chat"}
            name = found
    if not entry:
        if problem:
            raise PretrainError(f"{file}: conversations that are not read: {problem}")
        return None
    remark, hosts = _by_url(file, urls)
    like = f"in {name}" if name in ("OpenAI", "ShareGPT", "LLaVA", "Alpaca") else name
    return f"conversations as {like}{seen}{remark}", entry | hosts


def _messages_field(row: Mapping[str, Any]) -> str:
    """The key of a record's messages; one of the usual names if it has none."""
    lists = [name for name, value in row.items() if _is_messages(value)]
    names = [*conversations.LISTS, *lists]
    if conversations.preference(row) or conversations.is_completed(row):
        return ""  # it may contain the chosen messages once more
    return next((name for name in names if name in lists), names[0])


def _is_messages(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())
