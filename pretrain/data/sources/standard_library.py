"""The built-in text as a source: the Python standard library, and questions about it."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from pretrain.config import DataConfig
from pretrain.data.builtin.standard_library import TextFile, questions, read_corpus
from pretrain.data.cache import key_of
from pretrain.data.chat import REPLY, Message
from pretrain.data.composer import Composer
from pretrain.data.conversations import Conversation
from pretrain.data.sources.chat import Chat, ChatDocuments, index_chats
from pretrain.data.sources.indexed import IndexedSource, InputFile, R
from pretrain.data.sources.text import Text, TextDocuments, index_text


class _Corpus(IndexedSource[R]):
    """Documents that are made of the standard library's files."""

    needs_path = False
    reads_field = False
    location = "the standard library"

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        super().__init__(number, data, seed)
        corpus = read_corpus(int(data.max_corpus_mb * 1e6))
        self.key = key_of("corpus", *(file.text for file in corpus))
        self.files = [InputFile("", (int(self.key, 16),), lambda: self.read(corpus))]

    @abstractmethod
    def read(self, corpus: Sequence[TextFile]) -> Iterator[R]:
        """The documents."""


class StandardLibrarySource(_Corpus[Text]):
    """The manual's topics and the source files."""

    def read(self, corpus: Sequence[TextFile]) -> Iterator[Text]:
        return (Text(file.name, file.text) for file in corpus)

    def index(self, composer: Composer) -> TextDocuments:
        return index_text(self, composer)


class StandardLibraryChatSource(_Corpus[Chat]):
    """Questions about modules, classes and functions, answered from their documentation."""

    is_chat = True

    def read(self, corpus: Sequence[TextFile]) -> Iterator[Chat]:
        """Conversations of one question and its answer; no answer is repeated."""
        answers: set[str] = set()
        for file in corpus:
            for question, answer in questions(file):
                if answer not in answers:
                    answers.add(answer)
                    messages = Message("user", question), Message(REPLY, answer)
                    yield Chat(f"{file.name}: {question}", Conversation(messages))

    def index(self, composer: Composer) -> ChatDocuments:
        return index_chats(self, composer)
