"""The processor in an export processes images and videos as in training.

It does not need torchvision. The calls of servers are copied from SGLang's and vLLM's processors
for Kimi-K2.5.
"""

import ast
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from tokenizers import Tokenizer as Backend

from pretrain.config import DataConfig
from pretrain.data import Document, chat
from pretrain.data.composer import Composer
from pretrain.data.conversations import conversation_of
from pretrain.data.media import frames, pixels
from pretrain.data.media.frames import Media
from pretrain.data.sources.vision_chat import VisionChat
from pretrain.data.tokenizer import Tokenizer
from pretrain.export import chat_templates
from pretrain.export.to_hf import export
from tests.pretrain.data.media import test_pixels
from tests.pretrain.data.media.test_video import film
from tests.pretrain.saved_run import Made

transformers = pytest.importorskip("transformers", minversion="5.23")
PATCH, CONTEXT = 14, 96
IMAGE, VIDEO = "<|media_pad|>", "<|kimi_k25_video_placeholder|>"


@pytest.fixture(scope="module")
def hf(made: Made, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run_folder / "run", tmp_path_factory.mktemp("processor") / "hf")


@pytest.fixture(scope="module")
def processor(hf: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(hf, trust_remote_code=True)


@pytest.fixture(scope="module")
def composer(run_folder: Path) -> Composer:
    tokenizer = Tokenizer.load(run_folder / "run" / "tokenizer.json")
    return Composer.of(DataConfig(seq_length=CONTEXT), tokenizer, PATCH)


def documents_of(composer: Composer, *parts: str | Media) -> Document:
    """The trainer's document of texts and media, without its end."""
    document = Document(composer.tokenizer)
    for part in parts:
        if isinstance(part, str):
            document.add_tokens(composer.tokenizer.encode(part))
        else:
            shape = frames.measure(part, composer.video_fps)
            composer.add(document, composer.read(part, shape))
    return document


def check_equal(found: Any, document: Document) -> None:
    """Check that tokens, grids and patches are those of the document."""
    assert found["input_ids"][0].tolist() == document.tokens
    assert found["image_grid_thw"].tolist() == [list(grid) for grid in document.grids]
    patches = torch.cat(document.patches)
    expected = (patches / 127.5 - 1).view(-1, 3, PATCH, PATCH)
    torch.testing.assert_close(found["pixel_values"], expected, rtol=0, atol=1e-5)


def noise(*size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def picture(path: Path, moving: bool = False) -> Media:
    return Media((str(path),), moving)


def test_images_of_any_size_are_processed_as_in_training(
    processor: Any, composer: Composer, tmp_path: Path
) -> None:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 200), st.integers(1, 700), st.booleans())
    def agree(height: int, width: int, by_name: bool) -> None:
        path = tmp_path / "image.png"
        noise(height, width).save(path)
        text = f"See <|media_begin|>{IMAGE}<|media_end|> it"
        image = str(path) if by_name else Image.open(path)
        found = processor(text=text, images=[image], return_tensors="pt")
        check_equal(found, documents_of(composer, "See ", picture(path), " it"))
        assert len(found["input_ids"][0]) <= CONTEXT

    agree()


KIMI_K25 = ("<|media_content|>", "<think>", "</think>")
WORDS = st.text("abc <>.", max_size=6)


@pytest.mark.parametrize("added", [(), KIMI_K25], ids=["K2", "K2.5"])
def test_conversations_are_those_of_training(
    processor: Any, composer: Composer, tmp_path: Path, added: tuple[str, ...]
) -> None:
    backend = Backend.from_str(processor.tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(list(added))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=processor.tokenizer.bos_token
    )
    ours = replace(composer, tokenizer=Tokenizer(Backend.from_str(backend.to_str())))
    template = chat.template(ours.tokenizer, chat_templates.content(ours.tokenizer, is_chat=True))
    chatting = type(processor)(processor.image_processor, theirs, template)
    for number, size in enumerate([(28, 28), (40, 90), (14, 140)]):
        noise(*size).save(tmp_path / f"{number}.png")
    film = [str(tmp_path / "0.png")] * 5
    parts = st.one_of(
        WORDS.map(lambda text: {"type": "text", "text": text}),
        st.integers(0, 2).map(
            lambda number: {"type": "image", "image": str(tmp_path / f"{number}.png")}
        ),
        st.just({"type": "video", "video": film}),
    )
    turns = st.tuples(st.lists(parts, max_size=4), WORDS, st.one_of(st.none(), WORDS))

    @settings(deadline=None, max_examples=40)
    @given(st.lists(turns, min_size=1, max_size=2))
    def agree(turns: list[tuple[list[dict[str, Any]], str, str | None]]) -> None:
        messages = []
        for asked, reply, reasoning in turns:
            thought = {} if reasoning is None else {"reasoning_content": reasoning}
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": reply, **thought})
        conversation = conversation_of(
            {"messages": messages}, "messages", lambda names, moving: Media(tuple(names), moving)
        )
        assert conversation is not None
        record = VisionChat("", conversation)
        shapes = [frames.measure(media, 2) for media in record.media]
        read = [ours.read(*pair) for pair in zip(record.media, shapes, strict=True)]
        document = record.document(ours, read)
        assert record.document(ours, shapes).tokens == document.tokens
        placeholders = document.tokens.count(ours.tokenizer.media_pad)
        assert record.size(ours, shapes) == (len(document), placeholders)
        found = chatting.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt"
        )
        if document.grids:
            check_equal(found, document)
        else:
            assert found["input_ids"][0].tolist() == document.tokens

    agree()


def sixteen_bits(path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    Image.fromarray(values).save(path)


def with_profile(path: Path) -> None:
    """Save an image with another colour profile than sRGB, as cameras and phones do."""
    noise(20, 30).save(path, icc_profile=wide_gamut())


def wide_gamut() -> bytes:
    """sRGB's profile with the red and green primaries swapped."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return content.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(20, 30).save(path, exif=exif)


def in_mode(mode: str) -> Callable[[Path], None]:
    return lambda path: noise(20, 30).convert(mode).save(path)


def transparent(path: Path) -> None:
    image = noise(20, 30).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30).astype("uint8")))
    image.save(path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        *((f"{mode}.{kind}", in_mode(mode)) for mode, kind in (
            *(("L", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("P", "gif")),
            *(("CMYK", "tiff"), ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "webp"), ("RGB", "bmp")),
        )),
        ("sixteen.png", sixteen_bits),
        ("sixteen.tiff", sixteen_bits),
        ("transparent.png", transparent),
        ("turned.jpg", turned),
        ("turned.png", turned),
        ("turned.tiff", turned),
        ("profile.jpg", with_profile),
        ("profile.png", with_profile),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["name", "opened", "bytes"])
def test_image_files_of_any_kind_are_processed_as_in_training(
    processor: Any,
    composer: Composer,
    tmp_path: Path,
    name: str,
    save: Callable[[Path], None],
    how: str,
) -> None:
    path = tmp_path / name
    save(path)
    image = {"name": lambda: path, "opened": lambda: Image.open(path), "bytes": path.read_bytes}
    text = f"<|media_begin|>{IMAGE}<|media_end|>"
    found = processor(text=text, images=[image[how]()], return_tensors="pt")
    check_equal(found, documents_of(composer, picture(path)))


@pytest.mark.parametrize("how", ["frames", "array", "first-channels", "names", "gif", "mp4"])
@pytest.mark.parametrize("usual", ["videos=", "messages"])
def test_videos_are_processed_as_in_training(
    processor: Any, composer: Composer, tmp_path: Path, how: str, usual: str
) -> None:
    frames = [Image.new("RGB", (64, 48), (40 * number,) * 3) for number in range(6)]
    names = [str(tmp_path / f"{number}.png") for number in range(6)]
    for frame, name in zip(frames, names, strict=True):
        frame.save(name)
    media = Media(tuple(names), moving=True)
    array = np.stack([np.asarray(frame) for frame in frames])
    video: Any = {"frames": frames, "array": array, "names": names}.get(how)
    if how == "first-channels":
        video = torch.from_numpy(array).permute(0, 3, 1, 2)
    if how in ("gif", "mp4"):
        path = tmp_path / f"film.{how}"
        if how == "gif":
            frames[0].save(path, save_all=True, append_images=frames[1:])
        else:
            pytest.importorskip("av")
            film(path, [40 * number for number in range(6)], rate=2)
        media, video = picture(path, moving=True), str(path)
    if usual == "videos=":
        found = processor(text=f"{VIDEO}What?", videos=[video], return_tensors="pt")
    else:
        content = [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    document = documents_of(composer, media, "What?")
    assert [grid[0] for grid in document.grids] == [4, 2]
    check_equal(found, document)


def test_images_and_videos_keep_their_order_across_texts(
    processor: Any, composer: Composer, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        noise(20 + 28 * number, 30).save(path)
    frames = [noise(28, 28)] * 2
    texts = [f"{IMAGE}a{VIDEO}b{IMAGE}", f"c{IMAGE}"]
    found = processor(
        text=texts, images=[str(path) for path in paths], videos=[frames], padding=True
    )
    assert [grid[1:] for grid in found["image_grid_thw"].tolist()] == [
        *([2, 4], [2, 2], [4, 4], [6, 4])
    ]
    counts = [ids.count(processor.image_token_id) for ids in found["input_ids"]]
    assert counts == [2 + 1 + 4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": f"a{IMAGE}"}, f"the text has 1 {IMAGE}"),
        ({"text": "a", "images": [noise(9, 9)]}, "there are 1 images"),
        ({"text": f"{VIDEO}{VIDEO}", "videos": [[noise(9, 9)]]}, f"the text has 2 {VIDEO}"),
        ({"text": VIDEO, "videos": [[noise(9, 9), noise(9, 8)]]}, "frames, all of one size"),
        ({"text": "a", "audio": [0.0]}, "not audio"),
    ],
)
def test_media_that_do_not_match_the_text_are_an_error(
    processor: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        processor(**arguments)


@torch.no_grad()
def test_the_model_generates_text_after_an_image_and_a_video(processor: Any, hf: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(hf)
    content = [
        {"type": "image", "image": noise(40, 60)},
        {"type": "video", "video": [noise(28, 28)] * 5},
        {"type": "text", "text": "What?"},
    ]
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    written = model.generate(**found, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > found["input_ids"].shape[1]
    assert set(found) <= {*processor.model_input_names, "attention_mask"}


def test_sglangs_calls_process_images_as_in_training(
    processor: Any, composer: Composer, tmp_path: Path
) -> None:
    """sglang.srt.multimodal.processors.kimi_k25, on a machine without CUDA."""
    needed = {"patch_size", "merge_kernel_size", "in_patch_limit", "patch_limit_on_one_side"}
    needed |= {"image_mean", "image_std"}
    assert needed <= processor.media_processor.media_proc_cfg.keys()
    assert isinstance(processor.image_processor, transformers.BaseImageProcessor)
    path = tmp_path / "a.png"
    noise(480, 640).save(path)
    image = Image.open(path).convert("RGB")
    medium = {"type": "image", "image": image}
    tokens = processor.media_processor.media_tokens_calculator(medium)
    assert type(tokens) is int and 0 < tokens < CONTEXT
    text = f"See <|media_begin|>{IMAGE * tokens}<|media_end|>"
    found = processor(text=[text], padding=True, return_tensors="pt", medias=[medium])
    found["image_grid_thw"] = found.pop("grid_thws", None)
    check_equal(found, documents_of(composer, "See ", picture(path)))


def test_vllms_calls_process_images_as_in_training(
    hf: Path, composer: Composer, tmp_path: Path
) -> None:
    """vllm.model_executor.models.kimi_k25, without numba."""
    media = transformers.AutoImageProcessor.from_pretrained(hf, trust_remote_code=True)
    path = tmp_path / "a.png"
    noise(50, 71).save(path)
    frames = [noise(28, 56)] * media.num_frames_per_chunk
    chunks = [
        {"type": "image", "image": Image.open(path)},
        {"type": "video_chunk", "video_chunk": frames, "uuid": None, "prompt": "", "video_idx": 0},
    ]
    found = media.preprocess(chunks, return_tensors="pt", do_rescale=True, do_normalize=True)
    assert found["grid_thws"].tolist() == [[1, 4, 6], [4, 2, 4]]
    assert [media.media_tokens_calculator(chunk) for chunk in chunks] == [6, 2]
    first = documents_of(composer, picture(path)).patches[0]
    expected = (first / 127.5 - 1).view(-1, 3, PATCH, PATCH)
    torch.testing.assert_close(found["pixel_values"][:24], expected, rtol=0, atol=1e-5)
    raw = media.preprocess(chunks, return_tensors="pt", do_rescale=False, do_normalize=False)
    assert torch.equal(raw["pixel_values"][:24], first.view(-1, 3, PATCH, PATCH).float())
    content = io.BytesIO()
    Image.new("RGB", (28, 28)).save(content, "PNG")
    assert media.media_tokens_calculator({"type": "image", "image": content.getvalue()}) == 1
    (chunk, last) = media.split_video_chunks([noise(28, 28)] * 5)
    assert (len(chunk["video_chunk"]), len(last["video_chunk"])) == (4, 1)


def test_crop_to_patches_returns_the_number_of_patches_of_each_image(processor: Any) -> None:
    """TRL passes crop_to_patches to every processor and needs num_patches."""
    found = processor.image_processor([noise(50, 71), noise(28, 28)], crop_to_patches=True)
    assert found["num_patches"].tolist() == [24, 4]
    assert "num_patches" not in processor.image_processor([noise(28, 28)])


def test_saving_and_loading_the_processor_preserves_it(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    arguments = {"text": IMAGE, "images": noise(300, 200), "return_tensors": "pt"}
    before, after = processor(**arguments), again(**arguments)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.chat_template == processor.chat_template


def test_all_files_have_the_image_limits_of_the_run(hf: Path, processor: Any) -> None:
    """A quarter of the context in tokens of four patches, for servers and for transformers."""
    image = json.loads((hf / "preprocessor_config.json").read_text())
    video = json.loads((hf / "video_preprocessor_config.json").read_text())
    server = image["media_proc_cfg"]
    assert image["max_patches"] == server["in_patch_limit"] == CONTEXT
    assert video["max_patches"] == server["in_patch_limit_each_frame"] == CONTEXT
    assert image["size"]["max_height"] == server["patch_limit_on_one_side"]
    assert processor.image_processor.get_number_of_image_patches(480, 640) // 4 < CONTEXT - 4


def test_the_copied_files_do_not_import_this_project(hf: Path) -> None:
    imported = set()
    for name in ("kimi_k25_processor.py", "pixels.py"):
        for node in ast.walk(ast.parse((hf / name).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module == "pixels"
            elif isinstance(node, ast.ImportFrom):
                assert node.module
                imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"PIL", "av", "numpy", "torch", "transformers"}


@pytest.mark.parametrize(("kind", "mode", "options"), test_pixels.LOSSLESS)
def test_images_of_every_mode_are_decoded_as_in_training(
    processor: Any, kind: str, mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    image, _ = test_pixels.MODES[mode](np.random.default_rng(0))
    content = test_pixels.file(image, kind, 6, **options)
    (tmp_path / "image").write_bytes(content)
    expected = pixels.decode(content)
    shown = sys.modules[type(processor).__module__]._rgb
    for source in (content, tmp_path / "image", str(tmp_path / "image")):
        assert np.array_equal(np.asarray(shown(source)), expected)
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(np.asarray(shown(opened)), expected)


def test_pyav_is_needed_for_video_files_only(hf: Path) -> None:
    """transformers does not load a file if a package that it imports is missing."""
    from transformers.dynamic_module_utils import get_imports

    for name in ("kimi_k25_processor.py", "pixels.py"):
        needed = set(get_imports(hf / name)) - sys.stdlib_module_names
        assert needed <= {"PIL", "numpy", "torch", "transformers"}
